"""Tensors in safetensors files, read slice by slice and written one by one.

The format (https://github.com/huggingface/safetensors): 8 bytes with the header's length, a JSON header
{name: {dtype, shape, data_offsets}}, the data. It is read here directly, since the `safetensors` package has no slices
of bfloat16 for numpy, and written here directly, since that package wants all tensors in memory at once.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Types of numbers that are read; quantised ones are not."""

_SIZES = {name: dtype.itemsize for name, dtype in DTYPES.items()} | {
    "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, "C64": 8,
}  # fmt: skip

_LONGEST_HEADER = 100_000_000  # what the reference implementation allows


class Tensor(NamedTuple):
    """Where a tensor lies in its file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


def read_header(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a safetensors file and its metadata; no data is read.

    Raises:
        ValueError: the file is cut short or not in this format.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= _LONGEST_HEADER:
            raise ValueError(f"{file} is not a safetensors file ({size} bytes); download or copy it again.")
        if 8 + length > size:
            raise ValueError(
                f"{file} is cut short: its header alone takes {8 + length} bytes and the file has {size}; "
                "download or copy it again."
            )
        try:
            header = json.loads(stream.read(length))
            metadata = header.pop("__metadata__", None) or {}
            spans = {name: _span(entry) for name, entry in header.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{file} has no readable header ({error}); download or copy it again.") from None
    end = 8 + length
    for name, (dtype, shape, first, last) in sorted(spans.items(), key=lambda item: item[1][2]):
        fits = dtype not in _SIZES or last - first == math.prod(shape) * _SIZES[dtype]
        if 8 + length + first != end or not fits:
            raise ValueError(f"{file}: the header's offsets of {name!r} do not fit; download or copy it again.")
        end = 8 + length + last
    if end != size:
        kind = "is cut short" if end > size else "has bytes beyond its tensors"
        told = f"its header tells of {end} bytes and the file has {size}"
        raise ValueError(f"{file} {kind}: {told}; download or copy it again.")
    start = 8 + length
    return {name: Tensor(file, kind, shape, start + first) for name, (kind, shape, first, _) in spans.items()}, metadata


def _span(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    first, last = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError("shapes and offsets must be whole numbers")
    return str(entry["dtype"]), shape, first, last


def read_slice(name: str, tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """That part of a tensor; only the pages it lies on are read.

    Raises:
        ValueError: the tensor holds no floating-point numbers of 16 bits or more.
    """
    if tensor.dtype not in DTYPES:
        raise ValueError(
            f"{tensor.file}: tensor {name!r} is stored as {tensor.dtype}, which is not read; "
            f"convert the model to one of {', '.join(DTYPES)}."
        )
    if math.prod(tensor.shape) == 0:
        return np.empty(tensor.shape, DTYPES[tensor.dtype])[index]
    mapped = np.memmap(tensor.file, DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)
    return np.array(mapped[index])  # a copy: the mapping counts as memory of this process, and goes at once


class Planned(NamedTuple):
    """A tensor to be written, and how to get it when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(file: Path, tensors: Sequence[Planned], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file, holding one tensor at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        kind = names[tensor.dtype]
        header[tensor.name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data begin at a multiple of 8
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in tensors:
            array = np.asarray(tensor.make(), tensor.dtype, order="C")
            assert array.shape == tensor.shape, (tensor.name, array.shape, tensor.shape)
            stream.write(array.reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


def in_shards(tensors: Iterable[Planned], shard_bytes: float) -> list[list[Planned]]:
    """Splits a sequence of tensors into runs of at most `shard_bytes` (a larger tensor stands alone)."""
    shards: list[list[Planned]] = []
    free = 0.0
    for tensor in tensors:
        if not shards or tensor.nbytes > free:
            shards.append([])
            free = shard_bytes
        shards[-1].append(tensor)
        free -= tensor.nbytes
    return shards
