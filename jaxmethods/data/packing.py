"""Laying examples into rows of one length, as a plan made once from their lengths.

A plan makes packed data random-access: row r of an epoch is known without packing the rows before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from jaxmethods.data.examples import Examples
from jaxmethods.data.pictures import Picture, seen

Batch = dict[str, np.ndarray]
"""int32 `tokens`, `segment_ids`, `positions`, bool `target_mask`; each [time] (a row) or [batch, time].

For models that see also uint8 `pixels` [crops, size, size, 3], int32 `places` [time, corners] and perhaps float32 `place_weights`
[time, corners] (`jaxmethods.images`)."""


@dataclass(frozen=True)
class Plan:
    """Which examples share a row: row r holds `examples[starts[r]:starts[r + 1]]`, in this order."""

    examples: Int64[np.ndarray, " examples"]
    starts: Int64[np.ndarray, " rows_and_one"]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int64[np.ndarray, " examples_in_row"]:
        if not 0 <= row < len(self):
            raise IndexError(f"the plan has {len(self)} rows; none has index {row}.")
        return self.examples[self.starts[row] : self.starts[row + 1]]

    def __iter__(self) -> Iterator[Int64[np.ndarray, " examples_in_row"]]:
        return (self[row] for row in range(len(self)))


def one_each(count: int) -> Plan:
    """The plan of unpacked data: one example a row."""
    return Plan(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def best_fit(lengths: Int[np.ndarray, " examples"], capacity: int) -> Plan:
    """Packs by best fit, longest first: each example goes to the fullest row in which it still fits.

    Never more than 11/9 of the fewest rows possible (and one). Deterministic: ties are settled by the
    examples' and rows' order. The search is a bit set over the free space, so a million examples take
    seconds.

    >>> [row.tolist() for row in best_fit(np.array([3, 6, 5, 2]), 8)]
    [[1, 3], [2, 0]]

    Raises ValueError where an example is longer than `capacity` or empty.
    """
    if len(lengths) and (lengths.min() < 1 or lengths.max() > capacity):
        raise ValueError(f"lengths must lie in 1..{capacity} to be packed; got {lengths.min()}..{lengths.max()}.")
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> rows with that much
    spaces = 0  # bit s is set where by_space[s] is not empty
    rows = 0
    for example in order.tolist():
        length = int(lengths[example])
        if fitting := spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, rows
            rows += 1
        row_of[example] = row
        by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    by_row = order[np.argsort(row_of[order], kind="stable")].astype(np.int64)
    counts = np.bincount(row_of, minlength=rows)
    return Plan(by_row, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


@dataclass(frozen=True)
class PackedRows:
    """Rows of `length` tokens after a plan: a random-access source of `Batch` rows, padded with segment 0.

    sight: of a model that sees, whose `format` and `image_token_id` are read; pictures are opened when their row is drawn.
    room: crops of each row; None: the most that one has.
    """

    examples: Examples
    plan: Plan
    length: int
    sight: Any = None
    room: int | None = None

    @cached_property
    def crops(self) -> int:
        """How many crops a row has; at least one, so that a batch of a model that sees always has pictures.

        Raises:
            ValueError: a row needs more than `room`.
        """
        of_examples = [sum(picture.crops for picture in pictures) for pictures in self.examples.pictures]
        rows = (sum(of_examples[index] for index in row.tolist()) for row in self.plan)
        needed = max(1, *rows) if of_examples else 1
        if self.room is not None and needed > self.room:
            raise ValueError(
                f"the pictures of a row make {needed} crops and crops={self.room} leaves room for fewer; set "
                f"Data(crops={needed}), or None for as many as the rows need."
            )
        return needed if self.room is None else self.room

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, row: int) -> Batch:
        out = empty_row(self.length)
        at, pictures = 0, list[Picture]()
        for segment, index in enumerate(self.plan[row].tolist(), 1):
            example = self.examples[index]
            end = at + len(example.tokens)
            out["tokens"][at:end] = example.tokens
            out["target_mask"][at:end] = example.target_mask
            out["segment_ids"][at:end] = segment
            out["positions"][at:end] = np.arange(end - at)
            pictures += example.pictures
            at = end
        if self.sight is not None:
            of_images = (out["tokens"] == self.sight.image_token_id) & (out["segment_ids"] > 0)
            out |= seen(pictures, of_images, self.sight.format, self.crops)
        return out


def empty_row(length: int) -> Batch:
    """A row of padding only."""
    return {
        "tokens": np.zeros(length, np.int32),
        "target_mask": np.zeros(length, bool),
        "segment_ids": np.zeros(length, np.int32),
        "positions": np.zeros(length, np.int32),
    }
