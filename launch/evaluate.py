"""`jaxmethods evaluate`: measure a run's model, or any other, on held-out rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from jaxmethods import data
from jaxmethods.data.views import conversation_of
from jaxmethods.evals import completion, retrieval
from jaxmethods.launch import sheets
from jaxmethods.launch.embed import embedded, objective_of
from jaxmethods.launch.opening import Opened, open_model


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a model on rows with known answers."""

    name: tyro.conf.Positional[Literal["completion", "retrieval"]]
    """completion: likelihood of the answers, and how far greedy ones agree with them. retrieval: which pictures and answers find
    each other by their embeddings."""
    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    data: str | None = None
    """Rows with `prompt` and `answer`, and perhaps `images`; by default the run's evaluation data."""
    rows: int = 64
    """The first so many rows."""
    max_new_tokens: int = 64
    """Of each answer."""
    batch_size: int = 16
    """Rows at a time."""
    against_base: bool = False
    """Measure the model before training too, and show both."""
    samples: int = 2
    """Answers to print."""
    by: str | None = None
    """A field of the rows, such as `kind`: how many answers are the given ones for each of its values too."""
    blind: bool = False
    """Show the model grey pictures: what it knows without looking."""
    sheet: str | None = None
    """A PNG to draw pictures with their answers, or with what they find, into."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""


def evaluate(options: Evaluate) -> None:
    """Prints the measurements; for a run they are also written to WORKDIR/evaluation.json."""
    console = Console(stderr=options.json)
    if options.sheet and "://" not in options.sheet and not Path(options.sheet).absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.sheet}: there is no folder {Path(options.sheet).absolute().parent}.")
    opened = open_model(options.model, best=options.best)
    if options.name == "retrieval":
        _retrieval(console, options, opened)
        return
    rows, source = _rows(options, opened)
    length = opened.run.data.sequence_length if opened.run else 512
    models: dict[str, Opened] = {"before": opened.base()} if options.against_base and opened.run else {}
    models["after" if opened.run else options.model] = opened

    results: dict[str, completion.Completion] = {}
    for name, model in models.items():
        with console.status(f"{name}: scoring") as status:
            results[name] = completion.evaluate(
                model.module, model.params, model.tokenizer, rows, sequence_length=length,
                max_new_tokens=options.max_new_tokens, batch_size=min(options.batch_size, len(rows)),
                system=getattr(opened.run.objective, "system", None) if opened.run else None,
                progress=lambda text, name=name: status.update(f"{name}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
    numbers = {
        name: {"nll": r.nll, "perplexity": r.perplexity, "rouge_l": r.rouge_l, "exact": r.exact}
        | ({} if options.by is None else {"exact_by": _exact_by(r, rows, options.by)})
        for name, r in results.items()
    }
    _, share = completion.majority(rows)
    record = {
        "data": source,
        "rows": len(rows),
        "step": opened.step,
        "blind": options.blind,
        "majority": share,
        **numbers,
    }
    if options.sheet:
        sheets.draw_answers(options.sheet, rows, {name: result.answers for name, result in results.items()})
    if opened.run:
        (epath.Path(options.model) / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    if options.json:
        print(json.dumps(record))
        return
    _show(console, options, results, rows, source)
    if opened.run:
        _next_steps(console, options.model, opened)


def _source(options: Evaluate, opened: Opened) -> data.Source:
    """Where the rows are: the file that is asked for, or the run's own."""
    if options.data is not None:
        return data.Source(options.data)
    if opened.run is None or not opened.run.data.evaluation:
        raise ValueError("evaluate needs --data FILE: there is no run with evaluation data to take rows from.")
    return opened.run.data.evaluation[0]  # type: ignore[index,return-value]


def _retrieval(console: Console, options: Evaluate, opened: Opened) -> None:
    """Which queries find their targets and the reverse; those that occur more than once count as one."""
    if options.blind:
        raise ValueError("--blind is of evaluate completion; leave it out.")
    source = _source(options, opened)
    records = data.open_records(source.path)
    rows = [records[i] for i in range(min(options.rows, len(records)))]
    objective, run = objective_of(opened), opened.run
    models = {"after" if run else options.model: opened}
    if options.against_base and run:
        # Before training the model read rows as the run does, by heads that were the identity.
        plain = dataclasses.replace(run, objective=dataclasses.replace(objective, heads=False))
        models = {"before": dataclasses.replace(opened.base(), run=plain)} | models
    embed = lambda model: embedded(
        model, source, ("query", "target"), min(options.batch_size, len(rows)), console, options.rows
    )
    found = {name: embed(model) for name, model in models.items()}
    asked, said = (_labels(rows, source, objective.embeddings()[name]) for name in ("query", "target"))
    ids = _joined(asked, said)
    first = [asked.index(label) for label in dict.fromkeys(asked)]
    results = {
        name: retrieval.retrieval(of["query"][first], of["target"], ids[first], ids) for name, of in found.items()
    }
    if options.sheet:
        seen = [{"images": data.located(rows[i].get(source.images), source.path)} for i in first]
        captions = [_answer(row, source) for row in rows]
        last = list(found.values())[-1]
        sheets.draw_retrieval(options.sheet, seen, last["query"][first], captions, last["target"], ids[first], ids)
    record = {"data": source.path, "rows": len(rows), "images": len(first), "step": opened.step}
    record |= {name: {**_plain(result)} for name, result in results.items()}
    if opened.run:
        (epath.Path(options.model) / "retrieval.json").write_text(json.dumps(record, indent=2) + "\n")
    if options.json:
        print(json.dumps(record))
        return
    table = Table(title=f"{len(first)} pictures and {len(rows)} captions of {source.path}")
    table.add_column("")
    for name in results:
        for heading in ("picture to caption", "caption to picture"):
            table.add_column(f"{name}: {heading}", justify="right")
    ways = [way for result in results.values() for way in (result.image_to_text, result.text_to_image)]
    for k in ways[0].recall:
        table.add_row(f"recall@{k}", *(f"{way.recall[k]:.3f}" for way in ways))
    table.add_row("mean reciprocal rank", *(f"{way.mean_reciprocal_rank:.3f}" for way in ways))
    table.add_row("median rank", *(f"{way.median_rank:g}" for way in ways))
    console.print(table)
    gaps = ", ".join(f"{name} {result.modality_gap:.3f}" for name, result in results.items())
    console.print(f"distance between the means of both kinds: {gaps}", highlight=False)
    if options.sheet:
        console.print(f"the nearest captions of some pictures: {options.sheet}", highlight=False)


def _plain(result: Any) -> dict[str, Any]:
    ways = {"image_to_text": result.image_to_text, "text_to_image": result.text_to_image}
    told = {name: way._asdict() | {"recall": {str(k): v for k, v in way.recall.items()}} for name, way in ways.items()}
    return told | {"modality_gap": result.modality_gap}


def _labels(rows: Sequence[Any], source: data.Source, view: data.View) -> list[str]:
    """What tells the rows' readings apart: their words and their pictures."""
    made = [view.make(conversation_of(row, source, source.path), None) for row in rows]
    words = ("".join(message["content"] for message in reading.messages) for reading in made)
    return [
        json.dumps([completion.plain(text) or text, list(reading.images)], default=repr)
        for text, reading in zip(words, made, strict=True)
    ]


def _answer(row: Any, source: data.Source) -> str:
    if source.messages in row:
        return "".join(m["content"] for m in row[source.messages] if m["role"] == "assistant")
    if source.answer not in row:
        raise ValueError(f"{source.path}: rows have no field {source.answer!r}; they have {', '.join(row)}.")
    return str(row[source.answer])


def _joined(*labels: Sequence[str]) -> np.ndarray:
    """A number for each row; rows that share a label of any kind, directly or through others, have the same."""
    count = len(labels[0])
    first = [np.unique(kind, return_index=True, return_inverse=True)[1:] for kind in labels]
    ends = np.concatenate([index[inverse] for index, inverse in first])
    edges = coo_array((np.ones(len(ends)), (np.tile(np.arange(count), len(labels)), ends)), (count, count))
    return connected_components(edges, directed=False)[1]


def _rows(options: Evaluate, opened: Opened) -> tuple[list[dict[str, Any]], str]:
    """The first rows of the file that is asked for, or of the run's own, by the names `prompt`, `answer` and `images`."""
    source = _source(options, opened)
    records = data.open_records(source.path)
    rows = [records[i] for i in range(min(options.rows, len(records)))]
    missing = [name for name in (source.prompt, source.answer) if name not in rows[0]]
    if missing:
        raise ValueError(f"{source.path}: rows have no field {missing[0]!r}; they have {', '.join(rows[0])}.")
    seen = [data.located(row.get(source.images), source.path) for row in rows]
    if options.blind:
        seen = [data.blank(given) for given in seen]
    if (
        options.by is not None
        and (without := next((i for i, row in enumerate(rows) if options.by not in row), None)) is not None
    ):
        raise ValueError(
            f"{records.place(without)}: no field {options.by!r} for --by; the fields are {', '.join(rows[without])}."
        )
    kept = lambda row: (
        {"prompt": row[source.prompt], "answer": row[source.answer]}
        | ({} if options.by is None else {options.by: row[options.by]})
    )
    return [
        kept(row) | ({} if given is None else {"images": given}) for row, given in zip(rows, seen, strict=True)
    ], source.path


def _exact_by(result: completion.Completion, rows: Sequence[dict[str, Any]], field: str) -> dict[str, float]:
    """Value of a field -> the share of its rows whose answers are the given ones; values in order of their rows."""
    right: dict[str, list[bool]] = {}
    for answer, row in zip(result.answers, rows, strict=True):
        right.setdefault(str(row[field]), []).append(completion.same(answer, row["answer"]))
    return {value: float(np.mean(some)) for value, some in right.items()}


def _show(
    console: Console,
    options: Evaluate,
    results: dict[str, completion.Completion],
    rows: Sequence[dict[str, Any]],
    source: str,
) -> None:
    blind = ", shown as grey pictures" if options.blind else ""
    table = Table(title=f"{len(rows)} held-out rows of {source}{blind}")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) > 1:
        table.add_column("change", justify="right")
    for label, attribute, form in (
        ("answer NLL (nats a token)", "nll", ".3f"),
        ("perplexity", "perplexity", ".2f"),
        ("ROUGE-L of greedy answers", "rouge_l", ".3f"),
        ("greedy answers that are the given ones", "exact", ".3f"),
    ):
        values = [getattr(result, attribute) for result in results.values()]
        cells = [format(value, form) for value in values]
        if len(values) > 1:
            cells.append(format(values[-1] - values[0], f"+{form}"))
        table.add_row(label, *cells)
    if options.by is not None:
        by = [_exact_by(result, rows, options.by) for result in results.values()]
        for value in by[0]:
            cells = [format(of[value], ".3f") for of in by]
            change = [format(by[-1][value] - by[0][value], "+.3f")] if len(by) > 1 else []
            count = sum(str(row[options.by]) == value for row in rows)
            table.add_row(f"  {options.by} {escape(value)} ({count})", *cells, *change)
    console.print(table)
    answer, share = completion.majority(rows)
    console.print(f"always answering {escape(answer)!r} would be right in {share:.3f} of them", highlight=False)
    if options.sheet:
        console.print(f"pictures and answers: {options.sheet}", highlight=False)
    for i in range(min(options.samples, len(rows))):
        text = f"[bold]asked[/]  {escape(rows[i]['prompt'])}\n[bold]given[/]  {escape(rows[i]['answer'])}"
        for name, result in results.items():
            text += f"\n[bold]{escape(name)}[/]  {escape(result.answers[i]) or '(nothing)'}"
        console.print(Panel(text, title=f"sample {i + 1}", title_align="left"))


def _next_steps(console: Console, workdir: str, opened: Opened) -> None:
    picture = epath.Path(workdir) / "loss.png"
    if picture.exists():
        console.print(f"loss over steps  {picture}")
    program = _program()
    console.print(f"ask it           {program} generate {workdir} --prompt TEXT", markup=False, soft_wrap=True)
    token_dependent = opened.run is not None and any(
        getattr(a, "token_dependent", False) for a in opened.run.adapters.values()
    )
    console.print(
        f"export it        {program} export {workdir} --to OUT --format {'peft' if token_dependent else 'hf'}",
        markup=False,
        soft_wrap=True,
    )


def _program() -> str:
    """How the reader can call this program again: by its path where the shell does not know its name."""
    called = sys.argv[0]
    return called if Path(called).name == "jaxmethods" and not shutil.which("jaxmethods") else "jaxmethods"


__all__ = ["Evaluate", "evaluate"]
