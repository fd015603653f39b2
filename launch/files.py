"""What programs leave behind: files that are whole or not there, and what says how they were made."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file such that a reader, or a kill, sees either the old content or the new."""
    name = os.fspath(path)
    if "://" in name:  # an object in a bucket appears whole or not at all
        epath.Path(path).write_bytes(data)
        return
    folder, base = os.path.split(name)
    partial = os.path.join(folder, f".{base}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, name)
    except BaseException:
        if os.path.exists(partial):
            os.remove(partial)
        raise


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as indented JSON, whole."""
    write_whole(path, (json.dumps(value, indent=2) + "\n").encode())


def write_figure(path: str | os.PathLike[str], figure: Any, **options: Any) -> None:
    """Writes a figure of matplotlib as a PNG, whole."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", **options)
    write_whole(path, picture.getvalue())


def write_table(path: str | os.PathLike[str], table: Any) -> None:
    """Writes a Parquet file, whole.

    Args:
        table: of pyarrow; or name -> column; or a list of rows.

    Raises:
        ImportError: pyarrow is missing.
    """
    require_pyarrow(path)
    import pyarrow
    import pyarrow.parquet

    if isinstance(table, Mapping):
        table = pyarrow.table(dict(table))
    elif isinstance(table, Sequence):
        table = pyarrow.Table.from_pylist(list(table))
    written = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, written)
    write_whole(path, written.getvalue().to_pybytes())


def require_pyarrow(path: str | os.PathLike[str]) -> None:
    """Says before any work that a table could not be written.

    Raises:
        ImportError: pyarrow is missing.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ImportError(f"{os.fspath(path)}: writing this needs pyarrow; pip install jaxmethods[data].") from None


def require_same(to: Any, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Refuses to go on with what was begun with other settings.

    Raises:
        ValueError: names the settings that differ, as they were and as they are.
    """
    if differ := [name for name in settings if before.get(name) != settings[name]]:
        shown = "; ".join(f"{name}: {before.get(name)!r} there, {settings[name]!r} now" for name in differ)
        raise ValueError(f"{to} was begun otherwise ({shown}); choose another --to, or make them equal.")
