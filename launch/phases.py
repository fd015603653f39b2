"""Programs of several phases, each of which leaves a whole file: what is there is not made again.

A phase makes a row for each of its items, in blocks; the rows of one that is interrupted stand beside its file as .partial, and it
goes on from its last whole block.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from rich.console import Console

from jaxmethods import models
from jaxmethods.launch import progress
from jaxmethods.launch.config import Run, check_folder
from jaxmethods.launch.export import fused
from jaxmethods.launch.files import write_json, write_whole
from jaxmethods.launch.opening import open_model
from jaxmethods.launch.train import train

Row = dict[str, Any]
SECONDS = 30.0
"""Between two writings of a phase that is under way, at least."""


def begin(config: Any, cache: str | None, console: Console | None) -> tuple[Console, Any]:
    """(console, work folder) of a program; compiled programs are kept in `cache`.

    Raises:
        ValueError: the folder holds another config, or anything else.
    """
    if cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(cache))
    workdir = epath.Path(config.workdir)
    check_folder(workdir, config)
    return progress.tolerant(console or Console()), workdir


class Phases:
    """The phases of a work folder.

    Args:
        workdir: an `epath.Path`. What its phases take stands in its seconds.json, by name, over all sittings.
        block: items made between two looks at the clock.
    """

    def __init__(self, workdir: Any, console: Console, block: int):
        self.workdir, self._console, self._block = workdir, console, block
        self.say = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)

    def rows(
        self, name: str, count: int, make: Callable[[range], list[Row]], *, prompts: Sequence[Any] = (), title: str = ""
    ) -> list[Row]:
        """The rows of WORKDIR/NAME.jsonl.

        Args:
            make: the rows of a block of items, by their numbers.
            prompts: what the field `prompt` of each row must be.
            title: how the phase is called when it says something; by default its name.

        Raises:
            ValueError: a file, whole or partial, of other prompts.
        """
        title, file = title or name, self.workdir / f"{name}.jsonl"
        if file.exists():
            return _of_these(file, read_rows(file), prompts)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial, size = file.parent / f"{file.name}.partial", self._block
        rows = _of_these(partial, read_rows(partial), prompts) if partial.exists() else []
        rows, when = rows[: len(rows) // size * size], time.monotonic()
        try:
            with self.timed(name), self._console.status(title) as status:
                while len(rows) < count:
                    status.update(f"{title}: {len(rows)} of {count} prompts")
                    rows += make(range(len(rows), min(len(rows) + size, count)))
                    if time.monotonic() - when > SECONDS:
                        write_rows(partial, rows)
                        when = time.monotonic()
        finally:
            write_rows(partial, rows)
        partial.replace(file)
        self.say(f"{title}: {count} prompts in {self.seconds()[name]:.0f} s")
        return rows

    def trained(self, name: str, run: Run, target: Any) -> str | None:
        """The folder with a run's model, adapters fused; None where a signal ended its training, which goes on from there.

        Raises:
            RunFailed: as `train`.
        """
        if not target.exists():
            with self.timed(name):
                if train(run, console=self._console)["step"] < run.steps:
                    return None
                opened = open_model(run.workdir)
                models.save(str(target), *fused(opened), tokenizer=opened.tokenizer)
        return str(target)

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds what happens inside to seconds.json; where there is no work folder yet, to nothing."""
        start = time.monotonic()
        try:
            yield
        finally:
            if self.workdir.exists():
                seconds = self.seconds()
                told = seconds | {name: round(seconds.get(name, 0.0) + time.monotonic() - start, 2)}
                write_json(self.workdir / "seconds.json", told)

    def seconds(self) -> dict[str, float]:
        """Name -> seconds so far."""
        file = self.workdir / "seconds.json"
        return json.loads(file.read_text()) if file.exists() else {}


def read_rows(file: Any) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file: Any, rows: Sequence[Row]) -> None:
    """Writes a JSONL file whole."""
    write_whole(file, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _of_these(file: Any, rows: list[Row], prompts: Sequence[Any]) -> list[Row]:
    """The rows, if they are of these prompts."""
    if prompts and any(row["prompt"] != prompt for row, prompt in zip(rows, prompts, strict=False)):
        raise ValueError(f"{file} is of other prompts than the config names now; choose another --workdir.")
    return rows
