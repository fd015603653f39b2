"""Where numbers come from, and the repair of data that a task cannot use: as in Scylla's released code, but for what is named.

Where the released code adds 1 to an entry, the next larger number that is allowed takes its place (after the last the first), so
that a repair never leaves the elements, nor meets those of the other split.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxmethods.evals.scylla import solvers
from jaxmethods.evals.scylla.solvers import Sizes

Data = list[Any]
"""A list of numbers, a pair of such lists, or a square matrix as a list of rows."""
Valid = Callable[[Data], bool]


@dataclasses.dataclass(frozen=True)
class Pool:
    """Numbers to draw from.

    drawn: drawn from uniformly, so often as each occurs.
    allowed: what else a repair may use, ascending and distinct; None: all numbers.
    """

    drawn: Sequence[int]
    allowed: Sequence[int] | None = None

    @classmethod
    def of(cls, elements: Sequence[int] | np.ndarray) -> Pool:
        """Elements, and nothing else.

        Raises:
            ValueError: there is none, or one that is no whole number from 0 to `solvers.LARGEST`.
        """
        drawn = [int(element) for element in elements]
        if (
            not drawn
            or min(drawn) < 0
            or max(drawn) > solvers.LARGEST
            or any(a != b for a, b in zip(drawn, elements, strict=True))
        ):
            shown = f"{drawn[:5]}{'...' if len(drawn) > 5 else ''}"
            raise ValueError(f"elements={shown} must be whole numbers from 0 to {solvers.LARGEST}, and one at least.")
        return cls(drawn, sorted(set(drawn)))

    def draw(self, rng: np.random.Generator, count: int) -> list[int]:
        return [self.drawn[i] for i in rng.integers(len(self.drawn), size=count).tolist()]

    def next(self, value: int) -> int:
        """The smallest allowed number above, or the smallest of all."""
        if self.allowed is None:
            return value + 1
        return self.allowed[bisect.bisect_right(self.allowed, value) % len(self.allowed)]

    def has(self, value: int) -> bool:
        if self.allowed is None:
            return value >= 0
        at = bisect.bisect_left(self.allowed, value)
        return at < len(self.allowed) and self.allowed[at] == value


Repair = Callable[[np.random.Generator, Data, Pool, Valid], Data | None]
"""Data like the given, valid; None where that failed."""


def raise_entries(tries: int) -> Repair:
    """Raises a random entry of a list, or of one of two lists, until the data are valid."""

    def repair(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
        lists = [list(part) for part in data] if data and isinstance(data[0], list) else [list(data)]
        for _ in range(tries):
            part = lists[rng.integers(len(lists))]
            at = int(rng.integers(len(part)))
            part[at] = pool.next(part[at])
            made = lists if len(lists) > 1 else lists[0]
            if valid(made):
                return made
        return None

    return repair


def repeat_mode(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
    """Appends 2 to 8 copies of one of the modes, and shuffles."""
    modes = solvers.modes(data)
    made = data + [modes[rng.integers(len(modes))]] * int(rng.integers(2, 9))
    return _if_valid([made[i] for i in rng.permutation(len(made)).tolist()], valid)


def add_neighbours(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
    """Appends e + 1 and e - 1 for half of the elements e, those of them that are allowed."""
    half = rng.choice(len(data), (len(data) + 1) // 2, replace=False).tolist()
    return _if_valid(data + [x for i in half for x in (data[i] + 1, data[i] - 1) if pool.has(x)], valid)


def one_multiple(sizes: Sizes) -> Repair:
    """Raises entries until some choice has a sum divisible by 10; if several have, one number takes random places until one is
    left.

    That number is one of which no choice alone is divisible; the released code asks that it is not divisible itself.
    """

    def repair(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
        made = list(data)
        for _ in range(10):
            if count := solvers.multiples(made, sizes):
                break
            at = int(rng.integers(len(made)))
            made[at] = pool.next(made[at])
        else:
            return None
        harmless = [x for x in pool.draw(rng, 20) if all(x * size % 10 for size in sizes)]
        if not harmless:
            return None
        for at in rng.permutation(len(made)).tolist():
            if count <= 1:
                break
            made[at] = harmless[0]
            count = solvers.multiples(made, sizes)
        return _if_valid(made, valid)

    return repair


def symmetric(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
    """A symmetric matrix of the same dimension, with zero diagonal, of numbers from the pool."""
    return _if_valid(distances(rng, len(data), pool), valid)


def distances(rng: np.random.Generator, cities: int, pool: Pool) -> Data:
    """A random symmetric matrix with zero diagonal."""
    matrix = np.zeros((cities, cities), np.int64)
    upper = np.triu_indices(cities, 1)
    matrix[upper] = pool.draw(rng, len(upper[0]))
    return (matrix + matrix.T).tolist()


def nothing(rng: np.random.Generator, data: Data, pool: Pool, valid: Valid) -> Data | None:
    """Of tasks that any list of the right length serves."""
    return None


def _if_valid(data: Data, valid: Valid) -> Data | None:
    return data if valid(data) else None
