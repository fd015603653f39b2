"""Tokenised examples: one, many in flat arrays, and what to do with those that are too long."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Int64

from jaxmethods.data.pictures import Picture


class Example(NamedTuple):
    """Tokens, which of them are to be predicted from those before (never the first), and the pictures they stand for."""

    tokens: Int32[np.ndarray, " time"]
    target_mask: Bool[np.ndarray, " time"]
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Examples:
    """Examples one after the other in flat arrays: example i is at `offsets[i]:offsets[i + 1]`."""

    tokens: Int32[np.ndarray, " total"]
    target_mask: Bool[np.ndarray, " total"]
    offsets: Int64[np.ndarray, " examples_and_one"]
    pictures: Sequence[tuple[Picture, ...]] = field(default=())
    """Of each example; empty where no example has any."""

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Examples:
        """Gathers examples (read once, in order)."""
        tokens, masks, lengths = [np.zeros(0, np.int32)], [np.zeros(0, bool)], [0]
        pictures = []
        for example in examples:
            tokens.append(example.tokens)
            masks.append(example.target_mask)
            lengths.append(len(example.tokens))
            pictures.append(example.pictures)
        offsets = np.cumsum(lengths, dtype=np.int64)
        return cls(np.concatenate(tokens), np.concatenate(masks), offsets, pictures if any(pictures) else ())

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples; none has index {index}.")
        part = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[part], self.target_mask[part], self.pictures[index] if self.pictures else ())

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> Int64[np.ndarray, " examples"]:
        """Tokens of each example."""
        return np.diff(self.offsets)


class Cut(NamedTuple):
    """A shortened example, and how many tokens its prompt and its answer lost."""

    example: Example
    prompt: int
    answer: int


def truncate(example: Example, length: int, *, bos_id: int | None = None) -> Cut:
    """Shortens an example to `length` tokens without ever losing its whole answer.

    The answer is the last run of targets, the prompt all before it (earlier turns included). The prompt is
    cut from the left, down to a quarter of `length`; if that is not enough, the answer loses its end. A first
    token equal to `bos_id` stays. Tokens behind the last target go first: no loss depends on them.
    """
    tokens, target_mask, pictures = example
    targets = np.flatnonzero(target_mask)
    if len(tokens) <= length or not len(targets):
        return Cut(Example(tokens[:length], target_mask[:length], pictures), 0, 0)
    end = int(targets[-1]) + 1
    start = int(np.flatnonzero(~target_mask[:end])[-1]) + 1  # there is one: the first token is no target
    prompt, answer = start, end - start
    prompt_room = min(prompt, max(length - answer, length // 4, 1))
    answer_room = min(answer, length - prompt_room)
    head = int(prompt_room > 1 and prompt_room < prompt and tokens[0] == bos_id)
    keep = np.r_[0:head, prompt - prompt_room + head : start + answer_room]
    kept_mask = target_mask[keep]
    kept_mask[0] = False  # an earlier turn's target may have become the first token
    return Cut(Example(tokens[keep], kept_mask, pictures), prompt - prompt_room, answer - answer_room)


def split_text(example: Example, length: int) -> list[Example]:
    """Plain text in pieces of at most `length` tokens; each begins with the last token of the one before.

    So every target stays a target once, and none is predicted from nothing.

    >>> pieces = split_text(Example(np.arange(5, dtype=np.int32), np.arange(5) > 0), 3)
    >>> [(piece.tokens.tolist(), piece.target_mask.tolist()) for piece in pieces]
    [([0, 1, 2], [False, True, True]), ([2, 3, 4], [False, True, True])]
    """
    pieces = []
    for start in range(0, max(len(example.tokens) - 1, 1), length - 1):
        target_mask = example.target_mask[start : start + length].copy()
        target_mask[:1] = False
        pieces.append(Example(example.tokens[start : start + length], target_mask))
    return pieces
