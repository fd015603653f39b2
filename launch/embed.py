"""`jaxmethods embed`: embeddings of rows, into a Parquet file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console

from jaxmethods import data
from jaxmethods.data.config import as_sources
from jaxmethods.evals import embedding
from jaxmethods.launch.files import require_pyarrow, write_table
from jaxmethods.launch.opening import Opened, open_model
from jaxmethods.objectives import CAFe


@dataclasses.dataclass(frozen=True)
class Embed:
    """Embed rows with a run's model, or any other."""

    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    data: Annotated[str, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows as the run was trained on, with the same names of fields: pictures for "query", answers for "target"."""
    to: Annotated[str, tyro.conf.arg(metavar="FILE.parquet")]
    """The file to write: the rows' fields that are text or numbers, and a column of embeddings for each view."""
    view: Literal["both", "query", "target"] = "both"
    """Which reading of the rows: the picture (or the user's side of a pair), the answer, or both."""
    batch_size: int = 16
    """Rows at a time."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""


def embed(options: Embed) -> None:
    """Writes the file, whole or not at all."""
    require_pyarrow(options.to)
    import pyarrow

    target = Path(options.to)
    if target.exists():
        raise ValueError(f"{options.to} exists already; choose another --to.")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.to}: there is no folder {target.absolute().parent}.")
    console = Console(stderr=True)
    opened = open_model(options.model, best=options.best)
    rows = list(data.open_records(options.data))
    views = ("query", "target") if options.view == "both" else (options.view,)
    columns: dict[str, Any] = {"row": np.arange(len(rows))}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        if name not in ("row", *views) and all(
            value is None or isinstance(value, str | int | float) for value in values
        ):
            try:
                columns[name] = pyarrow.array(values)
            except (ValueError, TypeError, OverflowError) as error:
                raise ValueError(f"{options.data}: field {name!r} has values of no one kind ({error}).") from None
    source = data.Source(options.data)
    if opened.run and opened.run.data.train:
        first: Any = as_sources(opened.run.data.train)[0]
        source = dataclasses.replace(first, path=options.data, weight=1.0)
    found = embedded(opened, source, views, options.batch_size, console)
    columns |= {name: list(array) for name, array in found.items()}
    write_table(target, columns)
    width = next(iter(found.values())).shape[1]
    print(f"wrote {options.to}: {len(rows)} rows, {' and '.join(views)} of {width} numbers")


def objective_of(opened: Opened) -> CAFe:
    """How rows are read and embedded: as the run does, or as CAFe does by default."""
    return opened.run.objective if opened.run and isinstance(opened.run.objective, CAFe) else CAFe()


def embedded(
    opened: Opened,
    rows: data.Source | str,
    views: tuple[str, ...],
    batch_size: int,
    console: Console,
    limit: int | None = None,
) -> dict[str, np.ndarray]:
    """View -> [rows, width]."""
    length = opened.run.data.sequence_length if opened.run else 512
    with console.status("embedding") as status:
        return embedding.embed_rows(
            opened.module, opened.params, opened.tokenizer, rows, objective=objective_of(opened), views=views,
            sequence_length=length, batch_size=batch_size, limit=limit, progress=status.update,
        )  # fmt: skip


__all__ = ["Embed", "embed", "embedded", "objective_of"]
