"""The metrics of a run, as a file anyone can plot: one JSON object a line, one line a step.

>>> import tempfile, pathlib
>>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
>>> with MetricsFile(path) as metrics:
...     metrics.append({"step": 1, "loss": 0.75})
...     metrics.append({"step": 2, "loss": float("nan")})
>>> read(path)
[{'step': 1, 'loss': 0.75}, {'step': 2, 'loss': None}]
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, TextIO

from etils import epath

from jaxmethods.launch.files import write_whole

Row = dict[str, Any]


class MetricsFile:
    """The metrics of one run, appended to by one process; nothing is read or written before it is used.

    On a local or mounted path each row reaches the file as one line, at once (not fsynced). In a bucket
    (`gs://...`), where nothing can be appended to, rows are held back until `sync` or `close` writes the file
    whole: call `sync` before each checkpoint. Rows lost to a kill are then those after the last checkpoint,
    which the resumed run writes again.
    """

    def __init__(self, path: str | os.PathLike[str], *, buffered: bool | None = None) -> None:
        """`buffered`: hold rows back until `sync`; None: where `path` is in a bucket."""
        self.path = os.fspath(path)
        self._buffered = "://" in self.path if buffered is None else buffered
        self._lines: list[bytes] = []  # when buffered: the whole file
        self._file: TextIO | None = None
        self._last_step: int | None = None
        self._opened = False

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row. It holds `step`, an integer above those before it; other values are numbers, strings,
        None, scalars of numpy or JAX, or lists and dicts of these. What is not finite is written as null, as
        JSON has no other word for it.

        Raises ValueError for a step that is not above the last one.
        """
        plain = {name: _plain(value, name) for name, value in row.items()}
        step = _step(plain, f"the row {plain}")
        self._open()
        if self._last_step is not None and step <= self._last_step:
            raise ValueError(
                f"{self.path} already holds step {self._last_step}, so step {step} cannot follow; "
                f"call cut_after({step - 1}) first."
            )
        line = json.dumps(plain, allow_nan=False)
        if self._file is None:
            self._lines.append(line.encode())
        else:
            self._file.write(line + "\n")
        self._last_step = step

    def cut_after(self, step: int) -> None:
        """Drops the rows after `step` and a half-written last line; the file is replaced as a whole.

        Raises ValueError for a line, other than the last, that is no row.
        """
        self.sync()
        self._close_file()
        if not epath.Path(self.path).exists():
            return
        before = epath.Path(self.path).read_bytes()
        kept = [line for line, row in _rows(before, self.path) if row["step"] <= step]
        if (after := _joined(kept)) != before:
            write_whole(self.path, after)

    def last(self) -> Row:
        """The last row, or {} where there is none."""
        self.sync()
        rows = read(self.path) if epath.Path(self.path).exists() else []
        return rows[-1] if rows else {}

    def sync(self) -> None:
        """Writes the rows held back, if any are."""
        if self._buffered and self._opened:
            write_whole(self.path, _joined(self._lines))

    def close(self) -> None:
        self.sync()
        self._close_file()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _open(self) -> None:
        if self._opened:
            return
        path = epath.Path(self.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else b""
        rows = _rows(before, self.path)
        lines = [line for line, _ in rows]
        self._last_step = rows[-1][1]["step"] if rows else None
        if self._buffered:
            self._lines = lines
        else:
            if (after := _joined(lines)) != before:  # else the next row would join a half-written one
                write_whole(self.path, after)
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._opened = True

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._opened = None, False


def read(path: str | os.PathLike[str]) -> list[Row]:
    """The rows of a metrics file, also of one that is being written; values that were not finite are None.

    A half-written last line is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line before the last is no row; the message says which.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"no metrics at {file}; a run writes them there with its first step.")
    return [row for _, row in _rows(file.read_bytes(), os.fspath(path))]


def _rows(data: bytes, path: str) -> list[tuple[bytes, Row]]:
    """(line, row) of each complete line."""
    lines = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    rows = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            if number == lines[-1][0]:
                break
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:60]!r}; mend or delete that line.")
        _step(row, f"{path}, line {number}")
        rows.append((line, row))
    return rows


def _step(row: Row, where: str) -> int:
    step = row.get("step")
    if not isinstance(step, int) or isinstance(step, bool):
        raise ValueError(f"{where} has step {step!r}; every row of metrics needs an integer `step`.")
    return step


def _joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def _plain(value: Any, name: str) -> Any:
    """The value in JSON's own types."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, name) for inner in value]
    if getattr(value, "shape", None) == ():
        return _plain(value.item(), name)
    raise ValueError(
        f"metric {name!r} is a {type(value).__name__}; give a number, a string, or a list or dict of these."
    )
