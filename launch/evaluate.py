"""`jaxmethods evaluate`: measure a run's model, or any other, on held-out rows."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from jaxmethods import data
from jaxmethods.evals import completion
from jaxmethods.launch.opening import Opened, open_model


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Measure a model on rows with known answers."""

    name: tyro.conf.Positional[Literal["completion"]]
    """completion: likelihood of the answers, and ROUGE-L of greedy ones."""
    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    data: str | None = None
    """Rows with `prompt` and `answer`; by default the run's evaluation data."""
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
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""


def evaluate(options: Evaluate) -> None:
    """Prints the measurements; for a run they are also written to WORKDIR/evaluation.json."""
    console = Console(stderr=options.json)
    opened = open_model(options.model, best=options.best)
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
                progress=lambda text, name=name: status.update(f"{name}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
    numbers = {name: {"nll": r.nll, "perplexity": r.perplexity, "rouge_l": r.rouge_l} for name, r in results.items()}
    record = {"data": source, "rows": len(rows), "step": opened.step, **numbers}
    if opened.run:
        (epath.Path(options.model) / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n")
    if options.json:
        print(json.dumps(record))
        return
    _show(console, options, results, rows, source)
    if opened.run:
        _next_steps(console, options.model, opened)


def _rows(options: Evaluate, opened: Opened) -> tuple[list[dict[str, str]], str]:
    """The first rows of the file that is asked for, or of the run's own, by the names `prompt` and `answer`."""
    if options.data is None and (opened.run is None or not opened.run.data.evaluation):
        raise ValueError("evaluate needs --data FILE: there is no run with evaluation data to take rows from.")
    sources: Any = (
        opened.run.data.evaluation if options.data is None and opened.run else (data.Source(str(options.data)),)
    )
    source = sources[0]
    records = data.open_records(source.path)
    rows = [records[i] for i in range(min(options.rows, len(records)))]
    missing = [name for name in (source.prompt, source.answer) if name not in rows[0]]
    if missing:
        raise ValueError(f"{source.path}: rows have no field {missing[0]!r}; they have {', '.join(rows[0])}.")
    return [{"prompt": row[source.prompt], "answer": row[source.answer]} for row in rows], source.path


def _show(
    console: Console,
    options: Evaluate,
    results: dict[str, completion.Completion],
    rows: Sequence[dict[str, str]],
    source: str,
) -> None:
    table = Table(title=f"{len(rows)} held-out rows of {source}")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    if len(results) > 1:
        table.add_column("change", justify="right")
    for label, attribute, form in (
        ("answer NLL (nats a token)", "nll", ".3f"),
        ("perplexity", "perplexity", ".2f"),
        ("ROUGE-L of greedy answers", "rouge_l", ".3f"),
    ):
        values = [getattr(result, attribute) for result in results.values()]
        cells = [format(value, form) for value in values]
        if len(values) > 1:
            cells.append(format(values[-1] - values[0], f"+{form}"))
        table.add_row(label, *cells)
    console.print(table)
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
