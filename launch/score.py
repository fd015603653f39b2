"""`jaxmethods evaluate score`: log-likelihoods of answers, choices or texts, from a file of any size into a Parquet file.

Rows are read, scored and written a part at a time; the parts of a run that is interrupted stand beside its file, and it goes on
behind the last of them. The same command makes the same file to the byte, interrupted or not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from jaxmethods import data, models
from jaxmethods.evals import scoring
from jaxmethods.evals.scoring.likelihoods import BATCH_TOKENS
from jaxmethods.evals.scoring.planning import windows
from jaxmethods.evals.scoring.texts import encoded, pair_of, prefix_of, rolling
from jaxmethods.launch.files import require_pyarrow, require_same, write_json, write_table
from jaxmethods.launch.opening import Opened, open_model


@dataclasses.dataclass(frozen=True)
class Score:
    """Score rows with a run's model, or any other. The same command goes on after an interrupt."""

    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    data: Annotated[str, tyro.conf.arg(metavar="ROWS")]
    """Rows with `prompt` and `answer`; or with `prompt`, `choices` and perhaps `answer` (a choice, or its number from 0); or with
    `text`."""
    to: Annotated[str, tyro.conf.arg(metavar="FILE.parquet")]
    """The file to write, a row for each."""
    form: Literal["plain", "chat"] = "plain"
    """plain: an answer stands right behind its prompt. chat: behind the tokenizer's chat template of a user who says the prompt."""
    delimiter: str = " "
    """Between prompt and answer, of the plain form."""
    rows: int | None = None
    """The first so many rows."""
    max_length: int | None = None
    """Tokens that the model reads; by default its configuration's `max_position_embeddings`."""
    part: int = 1024
    """Rows that are scored and written at a time."""
    batch_tokens: int = BATCH_TOKENS
    """Places of a batch, about."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if "://" in self.to:
            raise ValueError(f"--to {self.to}: parts are joined into it, which a bucket cannot; give a local path.")
        for field in ("rows", "max_length", "part", "batch_tokens"):
            if getattr(self, field) is not None and getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} {getattr(self, field)} must be at least 1.")


_SETTINGS = ("model", "data", "form", "delimiter", "rows", "max_length", "part", "best")
"""Options that tell what is written; the others tell how fast."""


class _Asked(NamedTuple):
    """A row of the data as it is scored: its pairs, which of them belong to one answer, the bytes of each answer, the right one."""

    pairs: list[scoring.Pair]
    answers: list[int]
    bytes: list[int]
    right: int | None
    chooses: bool


def score(options: Score) -> None:
    """Writes the file, and prints means over its rows.

    Raises:
        ValueError: a row that cannot be scored, which is named; a file, or parts of one, made with other settings or of other rows.
    """
    require_pyarrow(options.to)
    target, console = Path(options.to), Console(stderr=True)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.to}: there is no folder {target.absolute().parent}.")
    parts = Path(f"{options.to}.parts")
    settings = {name: getattr(options, name) for name in _SETTINGS} | {"revision": models.revision(options.model)}
    work, begin = scoring.Work(), time.monotonic()
    if target.exists():
        if (before := _metadata(target).get("settings")) is None:
            raise ValueError(f"{options.to} exists already and does not say how it was made; choose another --to.")
        require_same(options.to, before, settings)
    else:
        if parts.exists():
            require_same(options.to, json.loads((parts / "settings.json").read_text()), settings)
        records = data.open_records(options.data)
        opened = open_model(options.model, best=options.best)
        parts.mkdir(exist_ok=True)
        write_json(parts / "settings.json", settings)
        _write_parts(options, opened, records, parts, work, console)
        _join(parts, target, settings)
    shutil.rmtree(parts, ignore_errors=True)
    told = _summary(target) | {"seconds": round(time.monotonic() - begin, 1)}
    if work.requests:
        told |= {"read": work.tokens, "reused": work.reused, "batches": work.batches, "fill": round(work.fill, 3)}
        told |= {"programs": len(work.programs)}
    if options.json:
        print(json.dumps({"to": options.to} | told))
        return
    _show(Console(), options, told)


def _write_parts(
    options: Score, opened: Opened, records: data.Records, parts: Path, work: scoring.Work, console: Console
) -> None:
    placed = records.placed()
    if options.rows is not None:
        placed = itertools.islice(placed, options.rows)
    done = 0
    with console.status("scoring") as status:
        for number, some in enumerate(windows(placed, options.part)):
            file = parts / f"{number:06d}.parquet"
            digest = hashlib.sha256(json.dumps([dict(row) for _, row in some], default=repr).encode()).hexdigest()
            told = {"rows": digest, "step": str(opened.step)}
            if file.exists():
                before = _metadata(file)
                if differ := [name for name in told if before.get(name) != told[name]]:
                    what = (
                        f"of other rows than {options.data} has now"
                        if differ == ["rows"]
                        else f"of step {before['step']}"
                    )
                    raise ValueError(f"{file} is {what}; choose another --to, or remove {parts}.")
            else:
                say = lambda count, done=done: status.update(f"scoring from row {done + 1}: {count} requests")
                made = _scored(options, opened, some, done, work, say)
                write_table(file, made.replace_schema_metadata(told))
            done += len(some)
            status.update(f"scored {done} rows")


def _scored(options: Score, opened: Opened, some: Sequence[Any], first: int, work: scoring.Work, say: Any) -> Any:
    """The table of a part."""
    import pyarrow as pa

    limit = options.max_length or opened.module.config.max_position_embeddings
    asked = [_asked(options, opened.tokenizer, limit, place, row) for place, row in some]
    pairs = [pair for row in asked for pair in row.pairs]
    found = iter(list(scoring.log_likelihoods(
        opened.module, opened.params, pairs, limit=limit, batch_tokens=options.batch_tokens, window=max(len(pairs), 1),
        work=work, progress=say,
    )))  # fmt: skip
    columns: dict[str, list[Any]] = {name: [] for name in _schema().names}
    for number, row in enumerate(asked, first):
        of = [next(found) for _ in row.pairs]
        count = max(row.answers) + 1
        parts = [[one for one, answer in zip(of, row.answers, strict=True) if answer == i] for i in range(count)]
        logps = [sum(one.logp for one in part) for part in parts]
        best, per_byte = int(np.argmax(logps)), int(np.argmax(np.array(logps) / np.maximum(row.bytes, 1)))
        values = {
            "row": number, "logps": logps, "tokens": [sum(one.tokens for one in part) for part in parts],
            "bytes": row.bytes, "greedy": [all(one.greedy for one in part) for part in parts],
            "cut": max(one.cut for one in of), "best": best if row.chooses else None,
            "best_per_byte": per_byte if row.chooses else None, "right": row.right,
        }  # fmt: skip
        for name, value in values.items():
            columns[name].append(value)
    return pa.table(columns, schema=_schema())


def _schema() -> Any:
    import pyarrow as pa

    return pa.schema({
        "row": pa.int64(), "logps": pa.list_(pa.float64()), "tokens": pa.list_(pa.int32()), "bytes": pa.list_(pa.int32()),
        "greedy": pa.list_(pa.bool_()), "cut": pa.int32(), "best": pa.int32(), "best_per_byte": pa.int32(), "right": pa.int32(),
    })  # fmt: skip


def _asked(options: Score, tokenizer: Any, limit: int, place: Any, row: Mapping[str, Any]) -> _Asked:
    """What is asked of the model for a row.

    Raises:
        ValueError: with its place, a row of another form.
    """
    try:
        if "text" in row and "prompt" not in row:
            text = _string(row, "text")
            pairs = list(rolling(encoded(tokenizer, text), prefix=prefix_of(tokenizer), limit=limit))
            if not pairs:
                raise ValueError("`text` is empty")
            return _Asked(pairs, [0] * len(pairs), [len(text.encode())], None, False)
        context, answers, right = _context(options, tokenizer, row), *_answers(row)
        between = options.delimiter if options.form == "plain" else ""
        pairs = [pair_of(tokenizer, context, between + answer) for answer in answers]
        if over := [len(pair.continuation) for pair in pairs if len(pair.continuation) > limit]:
            raise ValueError(f"an answer has {over[0]} tokens, and the model reads {limit}")
    except ValueError as error:
        raise ValueError(f"{place}: {str(error).rstrip('.')}.") from None
    return _Asked(pairs, list(range(len(pairs))), [len(one.encode()) for one in answers], right, "choices" in row)


def _context(options: Score, tokenizer: Any, row: Mapping[str, Any]) -> str:
    prompt = _string(row, "prompt")
    if options.form == "plain":
        return prompt
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template; use --form plain")
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )


def _answers(row: Mapping[str, Any]) -> tuple[list[str], int | None]:
    """(the answers to score, the number of the right one among choices)."""
    choices, answer = row.get("choices"), row.get("answer")
    if choices is None:
        return [_string(row, "answer")], None
    choices = list(choices) if isinstance(choices, list | tuple) else []
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise ValueError("`choices` must be a list of texts that are not empty")
    if answer is None:
        return choices, None
    if isinstance(answer, str) and answer in choices:
        return choices, choices.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return choices, answer
    raise ValueError(f"`answer` is {answer!r}; give one of the {len(choices)} choices, or its number from 0")


def _string(row: Mapping[str, Any], field: str) -> str:
    value = row.get(field)
    if not isinstance(value, str) or not value:
        there = f"is {value!r}" if field in row else f"is missing; the fields are {', '.join(row)}"
        raise ValueError(f"`{field}` {there}; give a text")
    return value


# Files.


def _join(parts: Path, target: Path, settings: Mapping[str, Any]) -> None:
    """All parts as one file, a row group each."""
    import pyarrow.parquet

    schema = _schema().with_metadata({"settings": json.dumps(settings)})
    partial = parts / "whole.partial"
    with pyarrow.parquet.ParquetWriter(partial, schema) as writer:
        for file in sorted(parts.glob("*.parquet")):
            writer.write_table(pyarrow.parquet.read_table(file).replace_schema_metadata(schema.metadata))
    partial.replace(target)


def _metadata(file: Path) -> dict[str, Any]:
    """What is told in a file beside its rows; JSON is read."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        told = pyarrow.parquet.read_schema(file).metadata or {}
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is no Parquet file ({error}); choose another --to.") from None
    read = {key.decode(): value.decode() for key, value in told.items()}
    return read | ({"settings": json.loads(read["settings"])} if "settings" in read else {})


# What is told.


def _summary(target: Path) -> dict[str, Any]:
    """Means over the rows of a file, read a row group at a time."""
    sums = dict.fromkeys(
        ("rows", "logp", "tokens", "bytes", "greedy", "answers", "cut", "judged", "right", "per_byte"), 0.0
    )
    for row in _rows(target):
        of = range(len(row["logps"])) if row["best"] is None else [] if row["right"] is None else [row["right"]]
        sums["rows"] += 1
        sums["cut"] += row["cut"] > 0
        for i in of:  # the given answer, or the right choice
            sums["answers"] += 1
            for name, column in (("logp", "logps"), ("tokens", "tokens"), ("bytes", "bytes"), ("greedy", "greedy")):
                sums[name] += row[column][i]
        if row["right"] is not None:
            sums["judged"] += 1
            sums["right"] += row["best"] == row["right"]
            sums["per_byte"] += row["best_per_byte"] == row["right"]
    share = lambda name, of: sums[name] / sums[of] if sums[of] else None
    nll = share("logp", "tokens")
    return {
        "rows": int(sums["rows"]), "cut": int(sums["cut"]), "tokens": int(sums["tokens"]), "nll": None if nll is None else -nll,
        "perplexity": None if nll is None else float(np.exp(-nll)),
        "bits_per_byte": None if nll is None else -sums["logp"] / sums["bytes"] / np.log(2), "greedy": share("greedy", "answers"),
        "accuracy": share("right", "judged"), "accuracy_per_byte": share("per_byte", "judged"),
    }  # fmt: skip


def _rows(target: Path) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(target) as file:
        for batch in file.iter_batches():
            yield from batch.to_pylist()


def _show(console: Console, options: Score, told: Mapping[str, Any]) -> None:
    table = Table(title=f"{told['rows']:,} rows of {options.data}")
    table.add_column("")
    table.add_column(options.model, justify="right")
    for name, label, form in (
        ("tokens", "tokens of given or right answers", ","), ("nll", "NLL (nats a token)", ".4f"),
        ("perplexity", "perplexity", ".2f"),
        ("bits_per_byte", "bits a byte", ".4f"), ("greedy", "answers that greedy decoding gives", ".3f"),
        ("accuracy", "likeliest choice is right", ".3f"), ("accuracy_per_byte", "likeliest choice a byte is right", ".3f"),
        ("cut", "rows whose prompt was cut", ","), ("programs", "compiled programs", ","),
    ):  # fmt: skip
        if told.get(name) is not None:
            table.add_row(label, format(told[name], form))
    console.print(table)
    console.print(f"rows: {options.to}", highlight=False)


__all__ = ["Score", "score"]
