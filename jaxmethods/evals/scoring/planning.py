"""Which requests share a batch: a few shapes, and requests of any lengths laid into them. Pure planning, nothing is computed here.

>>> shapes = shapes_for(limit=2000, batch_tokens=1024)
>>> shapes
(Shape(rows=2, length=512), Shape(rows=1, length=1024), Shape(rows=1, length=2048))
>>> [(batch.shape, [row.tolist() for row in batch.rows]) for batch in plan(np.array([100, 1600, 300, 400]), shapes)]
[(Shape(rows=2, length=512), [[3, 0], [2]]), (Shape(rows=1, length=2048), [[1]])]
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int, Int64

from jaxmethods.data.packing import best_fit, one_each

PACKED = 512
"""Tokens of the shortest rows that requests share: several fit into one, and few places are left over."""
UNPACKED = 64
"""Tokens of the shortest rows that hold one request each."""

T = TypeVar("T")


class Shape(NamedTuple):
    """Of a batch of tokens."""

    rows: int
    length: int

    @property
    def places(self) -> int:
        return self.rows * self.length


class Batch(NamedTuple):
    """Which requests lie in which of the first rows of a batch; what is left of it is padding."""

    shape: Shape
    rows: tuple[Int64[np.ndarray, "requests_in_row"], ...]


@dataclasses.dataclass
class Work:
    """What an engine has done, added up over its calls: how much, how full its batches were, which programs they took.

    requests: answered. tokens: read, of requests as they were laid out. places: of all batches, padding included. reused: tokens
    that were not read again because requests have them in common. programs: what was compiled, as (kind, shape ...).
    """

    requests: int = 0
    tokens: int = 0
    places: int = 0
    reused: int = 0
    batches: int = 0
    programs: set[tuple[Any, ...]] = dataclasses.field(default_factory=set)

    def count(self, program: tuple[Any, ...], places: int, tokens: int) -> None:
        """Adds a batch."""
        self.programs.add(program)
        self.batches += 1
        self.places += places
        self.tokens += tokens

    @property
    def fill(self) -> float:
        """The share of places that held tokens."""
        return self.tokens / max(self.places, 1)

    def __str__(self) -> str:
        reused = f", {self.reused:,} more not read twice" if self.reused else ""
        return (
            f"{self.requests:,} requests, {self.tokens:,} tokens{reused}, {self.batches:,} batches ({self.fill:.0%} full), "
            f"{len(self.programs)} compiled programs"
        )


def shapes_for(limit: int, batch_tokens: int, *, shortest: int = PACKED, multiple: int = 1) -> tuple[Shape, ...]:
    """Shapes of batches whose lengths double from `shortest` up to `limit` tokens: log2(limit / shortest) + 1, rounded up.

    Args:
        limit: of the tokens of a request; the longest rows have it, rounded up to a multiple of 16, or of 128 (which kernels for
            TPUs take).
        batch_tokens: places of a batch, about: a longer row is a batch of its own.
        shortest: `PACKED` or `UNPACKED`.
        multiple: the number of rows is a multiple of it (of devices that hold different rows).

    Raises:
        ValueError: a number below 1.
    """
    for name, value in (("limit", limit), ("batch_tokens", batch_tokens), ("multiple", multiple)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    lengths = [shortest]
    while lengths[-1] < limit:
        lengths.append(2 * lengths[-1])
    unit = 128 if limit > 128 else 16
    lengths[-1] = -(-limit // unit) * unit
    return tuple(Shape(max(batch_tokens // length // multiple, 1) * multiple, length) for length in lengths)


def plan(lengths: Int[np.ndarray, "requests"], shapes: Sequence[Shape], *, pack: bool = True) -> list[Batch]:
    """Lays requests into batches, each request once.

    A request goes to the shortest rows that hold it, and shares them with others where these fit (best fit); rows that do not make
    a whole batch are taken apart again and laid into longer ones, so that only the last batch of all has room to spare.

    Args:
        lengths: tokens of each request.
        shapes: of `shapes_for`.
        pack: requests may share a row.

    Raises:
        ValueError: a request that is empty, or longer than all shapes.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > shapes[-1].length):
        raise ValueError(f"lengths must lie in 1..{shapes[-1].length}; got {lengths.min()}..{lengths.max()}.")
    batches: list[Batch] = []
    left = np.zeros(0, np.int64)
    before, longest = 0, lengths.max(initial=0)
    for shape in shapes:
        members = np.concatenate([left, np.flatnonzero((lengths > before) & (lengths <= shape.length))])
        members = members[np.argsort(-lengths[members], kind="stable")]
        laid = best_fit(lengths[members], shape.length) if pack else one_each(len(members))
        rows = [members[row] for row in laid]
        last = shape.length >= longest
        whole = len(rows) if last else len(rows) // shape.rows * shape.rows
        batches += [Batch(shape, tuple(rows[i : i + shape.rows])) for i in range(0, whole, shape.rows)]
        left = np.concatenate([np.zeros(0, np.int64), *rows[whole:]])
        before = shape.length
        if last:
            break
    return batches


def windows(stream: Iterable[T], size: int) -> Iterator[list[T]]:
    """The stream in lists of `size`, the last of what is left."""
    stream = iter(stream)
    while window := list(itertools.islice(stream, size)):
        yield window
