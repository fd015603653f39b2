"""What is read together: pairs as segments, each run of tokens once, and segments as rows of batches. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from jaxmethods.evals.scoring.planning import Shape

SHORTEST_CONTEXT = 16
"""Tokens of a context that is worth being kept for its continuations; it must also be longer than they are on average."""


class Pair(NamedTuple):
    """What is scored: the continuation, given the context. Both are token ids, at least one of each."""

    context: Sequence[int]
    continuation: Sequence[int]


class Segment(NamedTuple):
    """Tokens that are read together, and what is asked of them: at `places` the tokens `targets`, for the pairs `owners`."""

    tokens: np.ndarray
    places: np.ndarray
    targets: np.ndarray
    owners: np.ndarray

    @property
    def size(self) -> int:
        """The room it takes in a row, which has as many places for targets as for tokens."""
        return max(len(self.tokens), len(self.targets))


class Shared(NamedTuple):
    """Segments that all continue the same tokens."""

    context: Segment
    tails: list[Segment]

    @property
    def size(self) -> int:
        return max(self.context.size, *(tail.size for tail in self.tails))

    @property
    def worth_sharing(self) -> bool:
        mean = np.mean([len(tail.tokens) for tail in self.tails])
        return len(self.tails) > 1 and len(self.context.tokens) >= max(SHORTEST_CONTEXT, float(mean))

    def segments(self) -> list[Segment]:
        """The tails, each behind the context."""
        before = self.context.tokens
        return [
            tail._replace(tokens=np.concatenate([before, tail.tokens]), places=tail.places + len(before))
            for tail in self.tails
        ]


class Laid(NamedTuple):
    """Segments in the rows of a batch."""

    arrays: dict[str, np.ndarray]
    tokens: int
    owners: np.ndarray
    rows: np.ndarray
    slots: np.ndarray
    """Row and column of each owner's target among the batch's targets."""


def segments_of(pairs: Sequence[Pair], limit: int, least: int | None) -> tuple[list[Segment], list[Shared]]:
    """(what is read alone, what shares a context) for the pairs; nothing that is equal is read twice.

    A tail is the last token of the context, whose next one is the first that is asked for, and the continuation but for its last.

    Args:
        least: tokens of contexts that are worth batches of their own; None: they never are.
    """
    contexts: dict[bytes, np.ndarray] = {}
    tails: dict[bytes, dict[bytes, list[tuple[int, np.ndarray]]]] = {}
    for number, (context, continuation) in enumerate(pairs):
        kept = np.asarray(context, np.int32)[-(limit + 1 - len(continuation)) :]
        said = np.asarray(continuation, np.int32)
        key = kept.tobytes()
        contexts[key] = kept
        tails.setdefault(key, {}).setdefault(said[:-1].tobytes(), []).append((number, said))
    none = np.zeros(0, np.int32)
    made = [
        Shared(
            Segment(context[:-1], none, none, none),
            [_tail(context[-1:], some) for asked in tails[key].values() for some in _that_fit(asked, limit)],
        )
        for key, context in contexts.items()
    ]
    shared = [of for of in made if of.worth_sharing] if least is not None else []
    if least is not None and sum(len(of.context.tokens) for of in shared) < least:
        shared = []
    apart = {id(of) for of in shared}
    return [segment for of in made if id(of) not in apart for segment in of.segments()], shared


def _that_fit(asked: list[tuple[int, np.ndarray]], limit: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Parts with at most `limit` targets."""
    count = max(limit // len(asked[0][1]), 1)
    return (asked[start : start + count] for start in range(0, len(asked), count))


def _tail(last: np.ndarray, asked: list[tuple[int, np.ndarray]]) -> Segment:
    """The segment of continuations that are equal but for their last tokens."""
    first = asked[0][1]
    return Segment(
        np.concatenate([last, first[:-1]]),
        np.tile(np.arange(len(first), dtype=np.int32), len(asked)),
        np.concatenate([said for _, said in asked]),
        np.repeat([number for number, _ in asked], len(first)),
    )


def sizes(segments: Sequence[Segment] | Sequence[Shared]) -> np.ndarray:
    """The room each takes in a row, int64."""
    return np.array([segment.size for segment in segments], np.int64)


def behind(
    shape: Shape, groups: list[list[Shared]]
) -> Iterator[tuple[Shape, np.ndarray, list[list[tuple[Segment, int, int]]]]]:
    """(shape, the row of contexts that each row follows, the rows) of the continuations of a batch of contexts.

    As many rows as of contexts, and an eighth, a quarter, a half or the whole as long: what takes the fewest places.
    """
    longest = max(tail.size for row in groups for of in row for tail in of.tails)
    lengths = [length for length in (shape.length >> part for part in (3, 2, 1, 0)) if length >= longest]
    tried = [[(number, row) for number, of in enumerate(groups) for row in _packed(of, length)] for length in lengths]
    places = [-(-len(laid) // shape.rows) * length for laid, length in zip(tried, lengths, strict=True)]
    best = int(np.argmin(places))
    for start in range(0, len(tried[best]), shape.rows):
        some = tried[best][start : start + shape.rows]
        rows = np.zeros(shape.rows, np.int32)
        rows[: len(some)] = [number for number, _ in some]
        yield Shape(shape.rows, lengths[best]), rows, [there for _, there in some]


def _packed(row: list[Shared], length: int) -> list[list[tuple[Segment, int, int]]]:
    """The continuations of a row of contexts in rows that hold at most one of each context, the longest first."""
    tails = [(tail, number, len(of.context.tokens)) for number, of in enumerate(row, 1) for tail in of.tails]
    made: list[list[tuple[Segment, int, int]]] = []
    free: list[int] = []
    there: list[set[int]] = []
    for tail in sorted(tails, key=lambda tail: -tail[0].size):
        size, number = tail[0].size, tail[1]
        fits = [i for i in range(len(made)) if size <= free[i] and number not in there[i]]
        if not fits:
            fits = [len(made)]
            made.append([])
            free.append(length)
            there.append(set())
        best = min(fits, key=lambda i: free[i])
        made[best].append(tail)
        free[best] -= size
        there[best].add(number)
    return made


def lay(shape: Shape, rows: Sequence[Sequence[tuple[Segment, int, int]]]) -> Laid:
    """Segments side by side in their rows, each with its id and the position of its first token.

    `pairs` tells the pairs of a row apart: the column of the first target of each target's pair.
    """
    numbers = ("tokens", "segment_ids", "positions", "places", "targets", "pairs")
    arrays = {name: np.zeros(shape, np.int32) for name in numbers} | {"wanted": np.zeros(shape, bool)}
    owners, row_of, slots = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    tokens = 0
    for row, segments in enumerate(rows):
        start = asked = 0
        for segment, number, position in segments:
            read, wanted = slice(start, start + len(segment.tokens)), slice(asked, asked + len(segment.targets))
            arrays["tokens"][row, read] = segment.tokens
            arrays["segment_ids"][row, read] = number
            arrays["positions"][row, read] = position + np.arange(len(segment.tokens))
            arrays["places"][row, wanted] = start + segment.places
            arrays["targets"][row, wanted] = segment.targets
            arrays["pairs"][row, wanted] = asked + np.searchsorted(segment.owners, segment.owners)
            arrays["wanted"][row, wanted] = True
            owners.append(segment.owners)
            row_of.append(np.full(len(segment.targets), row))
            slots.append(np.arange(wanted.start, wanted.stop))
            start, asked = read.stop, wanted.stop
        tokens += start
    return Laid(arrays, tokens, *(np.concatenate(x) for x in (owners, row_of, slots)))
