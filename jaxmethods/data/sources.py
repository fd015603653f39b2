"""Reading records: JSON lines and lists, Parquet, Arrow, folders of `datasets.save_to_disk`, lists in memory.

>>> records = records_in_memory([{"prompt": "1 + 1 =", "answer": "2"}])
>>> len(records), records[0]["answer"], str(records.place(0))
(1, '2', 'rows given in memory, row 1')

Records keep the form they have on disk (bytes, Arrow columns) and become dicts one at a time. Paths may be
anything that `etils.epath` opens, such as `gs://bucket/train.jsonl`. What is wrong with a record is said with
its `Place`: file and line.
"""

from __future__ import annotations

import abc
import contextlib
import difflib
import functools
import json
import os
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath

Record = Mapping[str, Any]

_LOADERS = ".jsonl, .json, .parquet, .arrow, or a folder saved by datasets.save_to_disk"


class Place(NamedTuple):
    """Where a record stands, counted from 1: prints as 'train.jsonl, line 3'."""

    source: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.source}, {self.unit} {self.number}"


class Records(abc.ABC):
    """Records with random access, and a cheaper walk through all of them."""

    source: str
    unit: str = "row"

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    @abc.abstractmethod
    def placed(self) -> Iterator[tuple[Place, Record]]:
        """All records in order with their places, each read once."""

    def place(self, index: int) -> Place:
        """Where record `index` stands."""
        return Place(self.source, self.unit, index + 1)

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.placed())

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.source} has {len(self)} {self.unit}s; there is none at index {index}.")
        return index % len(self)


def open_records(path: str) -> Records:
    """The records at `path`: the suffix tells the format, a `*` in the last part joins all matching files.

    Raises FileNotFoundError (with the nearest names) where nothing is found, ValueError for an unknown
    format, an unreadable file or one without records, ImportError where pyarrow or datasets is needed and
    missing.
    """
    place = epath.Path(path)
    if "*" in place.name:
        parts = sorted(str(part) for part in place.parent.glob(place.name)) if place.parent.exists() else []
        if not parts:
            raise FileNotFoundError(f"no file matches {path}.{_nearest(place)}")
        return _Joined(path, [open_records(part) for part in parts])
    if not place.exists():
        raise FileNotFoundError(f"{path} does not exist.{_nearest(place)}")
    records: Records
    if place.is_dir():
        records = _saved_dataset(path)
    elif place.suffix == ".jsonl":
        return _JsonLines(path)
    elif place.suffix == ".json":
        if not _is_json_list(place):
            return _JsonLines(path)
        records = _Listed(path, _json_list(path))
    elif place.suffix == ".parquet":
        records = _Table(path, _parquet(path))
    elif place.suffix == ".arrow":
        records = _Table(path, _arrow(path))
    else:
        raise ValueError(f"{path}: unknown format {place.suffix!r}; readable are {_LOADERS}.")
    if not len(records):
        raise ValueError(_empty(path))
    return records


def records_in_memory(rows: Sequence[Any]) -> Records:
    """A list of dicts as records. Raises ValueError where it is empty; what is no dict, when it is reached."""
    if not len(rows):
        raise ValueError("the rows given in memory are an empty list; give at least one.")
    return _Listed("rows given in memory", rows)


class _JsonLines(Records):
    """One JSON object a line, blank lines passed over. Offsets are found on the first random access."""

    unit = "line"

    def __init__(self, path: str):
        self.source = path

    def placed(self) -> Iterator[tuple[Place, Record]]:
        found = False
        with epath.Path(self.source).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not _blank(line):
                    found = True
                    place = Place(self.source, self.unit, number)
                    yield place, _object(line, place)
        if not found:
            raise ValueError(_empty(self.source))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Record:
        offset, _ = self._index[self._checked(index)]
        with epath.Path(self.source).open("rb") as lines:
            lines.seek(int(offset))
            return _object(lines.readline(), self.place(index))

    def place(self, index: int) -> Place:
        return Place(self.source, self.unit, int(self._index[self._checked(index)][1]))

    @cached_property
    def _index(self) -> np.ndarray:
        """int64 [records, 2]: byte offset and line number of each record, found without parsing."""
        found, offset = [], 0
        with epath.Path(self.source).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not _blank(line):
                    found.append((offset, number))
                offset += len(line)
        if not found:
            raise ValueError(_empty(self.source))
        return np.array(found, np.int64)


class _Listed(Records):
    def __init__(self, source: str, rows: Sequence[Any]):
        self.source = source
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        index = self._checked(index)
        row = self._rows[index]
        if not isinstance(row, Mapping):
            raise ValueError(f"{self.place(index)}: expected an object with named fields, found {kind_of(row)}.")
        return row

    def placed(self) -> Iterator[tuple[Place, Record]]:
        for index in range(len(self)):
            yield self.place(index), self[index]


class _Table(Records):
    """A pyarrow Table, held as Arrow columns."""

    def __init__(self, source: str, table: Any):
        self.source = source
        self._table = table

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def __getitem__(self, index: int) -> Record:
        return self._table.slice(self._checked(index), 1).to_pylist()[0]

    def placed(self) -> Iterator[tuple[Place, Record]]:
        index = 0
        for batch in self._table.to_batches(max_chunksize=1024):
            for record in batch.to_pylist():
                yield self.place(index), record
                index += 1


class _Dataset(Records):
    """A `datasets.Dataset`."""

    def __init__(self, source: str, dataset: Any):
        self.source = source
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> Record:
        return self._dataset[self._checked(index)]

    def placed(self) -> Iterator[tuple[Place, Record]]:
        for index, record in enumerate(self._dataset):
            yield self.place(index), record


class _Joined(Records):
    """Files of one pattern, one after the other in the order of their names."""

    def __init__(self, source: str, parts: Sequence[Records]):
        self.source = source
        self._parts = parts

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(part) for part in self._parts])

    def _find(self, index: int) -> tuple[Records, int]:
        index = self._checked(index)
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[part], index - int(self._ends[part - 1] if part else 0)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        part, within = self._find(index)
        return part[within]

    def place(self, index: int) -> Place:
        part, within = self._find(index)
        return part.place(within)

    def placed(self) -> Iterator[tuple[Place, Record]]:
        for part in self._parts:
            yield from part.placed()


def write_jsonl(path: str | os.PathLike[str], rows: Sequence[Record]) -> None:
    """Writes JSON lines, whole or not at all."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_all(folder: str | os.PathLike[str], files: Mapping[str, Sequence[Record]]) -> None:
    """Writes JSON lines to each of the named files of a folder, which is made, and says how many."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(Path(folder) / name, rows)
        print(f"{Path(folder) / name}: {len(rows):,} rows")


def one_line_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Makes a program that writes rows return its exit status: what is wrong with its input is one line, and status 2."""

    @functools.wraps(main)
    def told(*args: Any) -> int:
        try:
            main(*args)
        except (ImportError, OSError, ValueError, tarfile.TarError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0

    return told


def _blank(line: bytes) -> bool:
    return not line.removeprefix(b"\xef\xbb\xbf").strip()


def _object(line: bytes, place: Place) -> Record:
    """The JSON object in one line (a byte order mark in front is passed over)."""
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error}); convert the file to UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not a JSON object on one line ({error.msg} at column {error.colno}).") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object with named fields, found {kind_of(record)}.")
    return record


def _is_json_list(path: epath.Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _json_list(path: str) -> list[Any]:
    try:
        rows = json.loads(epath.Path(path).read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); convert the file to UTF-8.") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}: not a JSON list ({error.msg} at column {error.colno})."
        ) from error
    return rows


@contextlib.contextmanager
def _needing(package: str, path: str) -> Iterator[None]:
    """Turns a missing optional package, and a file it cannot read, into one line."""
    try:
        yield
    except ImportError as error:
        raise ImportError(f"{path}: reading this needs {package}; pip install jaxmethods[data].") from error
    except ValueError as error:  # pyarrow's ArrowInvalid is one
        raise ValueError(f"{path}: {package} cannot read it ({str(error).splitlines()[0]}).") from error


def _parquet(path: str) -> Any:
    with _needing("pyarrow", path):
        import pyarrow.parquet

        with epath.Path(path).open("rb") as file:
            return pyarrow.parquet.ParquetFile(file).read()


def _arrow(path: str) -> Any:
    """An Arrow file in either of its two layouts: with a footer, or (as `datasets` writes it) a stream."""
    with _needing("pyarrow", path):
        import pyarrow
        import pyarrow.ipc

        data = pyarrow.py_buffer(epath.Path(path).read_bytes()) if "://" in path else pyarrow.memory_map(path)
        try:
            return pyarrow.ipc.open_file(data).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_stream(data).read_all()


def _saved_dataset(path: str) -> Records:
    folder = epath.Path(path)
    if (folder / "dataset_dict.json").exists():
        splits = sorted(str(part.name) for part in folder.iterdir() if part.is_dir())
        raise ValueError(
            f"{path} holds several splits ({', '.join(splits)}); name one, for example {folder / splits[0]}."
        )
    if not (folder / "state.json").exists():
        names = sorted(part.name for part in folder.iterdir())
        inside = f"it holds {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "it is empty"
        raise ValueError(
            f"{path} is a folder, but not one saved by datasets.save_to_disk ({inside}); name a file in it."
        )
    with _needing("datasets", path):
        import datasets

        return _Dataset(path, datasets.load_from_disk(path))


def _nearest(path: epath.Path) -> str:
    """' Did you mean ...?' from the names beside a missing file."""
    if not path.parent.exists():
        return f" Nor does its folder {path.parent}."
    names = [part.name for part in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f" Did you mean {' or '.join(str(path.parent / name) for name in close)}?"
    return ""


def _empty(path: str) -> str:
    return f"{path} holds no rows."


def kind_of(value: Any) -> str:
    """The name a reader of JSON would use for the type of a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value)) or ("a number" if isinstance(value, (int, float)) else type(value).__name__)
