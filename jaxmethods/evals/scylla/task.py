"""What a task is: valid input, how a question is posed of it, its answer, and whether another one is right.

Data are what a model invents or a generator draws: a list, a pair of lists, a matrix. An example is a whole question, in types
that JSON has: the data, or (data, k), (data, target), (data, (a, b)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np

from jaxmethods import tree
from jaxmethods.evals.scylla import repairs, solvers
from jaxmethods.evals.scylla.repairs import Data, Pool, Repair

Example = Any
Answer = int | list[int]
_ATTEMPTS = 200


@dataclasses.dataclass(frozen=True)
class Task:
    """One task of Scylla (table 1 of https://arxiv.org/abs/2410.01769).

    level: 1 O(N), 2 O([N, N^2]), 3 O([N^2, N^3]), 4 O([N^3, N^4]), 5 O(2^N); None: a probe.
    instruction: what a model is told. untold: the same where the sizes of subsets are not told, as in the paper.
    data: what its data are. least, most: entries of each list, or cities.
    answer: how answers compare: numbers; lists in order; lists in any order; tours, in either direction.
    fits: whether data of the right form serve. pose: an example of them. solved: its answer. holds: whether another one is right.
    attempts: how often one shape is filled before it is given up.
    """

    name: str
    level: int | None
    instruction: str
    data: Literal["list", "pair", "matrix"]
    least: int
    most: int
    answer: Literal["number", "ordered", "unordered", "tour"]
    fits: Callable[[Data], bool]
    pose: Callable[[np.random.Generator, Data], Example]
    solved: Callable[[Example], Answer]
    holds: Callable[[Example, Any], bool]
    repair: Repair = repairs.nothing
    attempts: int = 50
    untold: str = ""

    def is_valid(self, data: Any) -> bool:
        """Whether these are data that the task can use."""
        return self._has_form(data) and self.fits(data)

    def sample(self, rng: np.random.Generator, elements: Sequence[int] | np.ndarray) -> Example:
        """A random example, of 4 to 16 numbers (4 to 10 cities) drawn from `elements` with replacement.

        All of its numbers are elements, with one exception: where no two elements follow each other, LongestConsecutiveElements
        adds e + 1 and e - 1 of some.

        Args:
            elements: non-negative whole numbers.

        Raises:
            ValueError: these elements make no valid example.
        """
        return self.pose(rng, self.sample_data(rng, Pool.of(elements)))

    def sample_data(self, rng: np.random.Generator, pool: Pool) -> Data:
        """The data of `sample`."""
        for _ in range(_ATTEMPTS):
            found = self.filled(rng, self.random_shape(rng), pool)
            if found is not None:
                return found
        if self.name == "LongestConsecutiveElements" and pool.allowed is not None:
            return self.sample_data(rng, Pool(pool.drawn))
        raise ValueError(
            f"{self.name}: {_ATTEMPTS} draws from elements={list(pool.drawn[:5])}... gave no valid example; give more "
            "and other elements."
        )

    def random_shape(self, rng: np.random.Generator) -> tuple[int, ...]:
        """Lengths of lists, 4 to 16 where the task takes them; or the number of cities."""
        low, high = max(4, self.least), min(16, self.most)
        return tuple(rng.integers(low, high + 1, size=2 if self.data == "pair" else 1).tolist())

    def shape(self, data: Data) -> tuple[int, ...]:
        """Lengths of its lists, or its number of cities."""
        return tuple(len(part) for part in data) if self.data == "pair" else (len(data),)

    def filled(
        self, rng: np.random.Generator, shape: tuple[int, ...], pool: Pool, *, exact: bool = False
    ) -> Data | None:
        """Valid data of a shape, repaired once where that is needed; None where it failed.

        Args:
            exact: a repair that adds entries drops as many others, so that the shape stays.
        """
        data = self._drawn(rng, shape, pool)
        if self.is_valid(data):
            return data
        made = self.repair(rng, data, pool, self.is_valid)
        if made is not None and exact and self.shape(made) != shape:
            kept = np.sort(rng.choice(len(made), shape[0], replace=False))
            made = [made[i] for i in kept.tolist()]
            return made if self.is_valid(made) else None
        return made

    def _drawn(self, rng: np.random.Generator, shape: tuple[int, ...], pool: Pool) -> Data:
        if self.data == "matrix":
            return repairs.distances(rng, shape[0], pool)
        first = pool.draw(rng, shape[0])
        if self.data == "pair":
            second, same = pool.draw(rng, shape[1]), rng.random(shape[1]) < 0.5
            return [first, [first[i] if same[i] and i < len(first) else x for i, x in enumerate(second)]]
        if self.name == "RemoveDuplicateNumbers":  # something to remove, however many the elements are
            return Pool(first[: int(rng.integers(1, len(first)))]).draw(rng, len(first))
        return first

    def solve(self, example: Example) -> Answer:
        """The reference answer: a number, or a list.

        Raises:
            ValueError: it has none.
        """
        return self.solved(example)

    def check(self, example: Example, answer: Any, *, grading: str = "verifier") -> bool:
        """Whether an answer is right. What is no answer at all, such as None or text, is wrong.

        Args:
            grading: "verifier" takes all answers that do what the instruction asks for. They can differ from the reference in
                LongestIncreasingSubsequence, LongestConsecutiveElements and FourSumInRange; elsewhere it is the only one.
                "reference" takes that one alone, in any order where order is of no account, and tours in both directions.
        """
        tree.require_one_of("grading", grading, ("verifier", "reference"))
        plain = _plain(answer)
        if plain is None or isinstance(plain, int) != (self.answer == "number"):
            return False
        if grading == "verifier":
            return self.holds(example, plain)
        return _matches(self.answer, plain, self.solve(example))

    def _has_form(self, data: Any) -> bool:
        lists = data if self.data in ("pair", "matrix") else [data]
        if not isinstance(lists, list | tuple) or (self.data == "pair" and len(lists) != 2):
            return False
        if self.data == "matrix" and not self.least <= len(lists) <= self.most:
            return False
        if not all(isinstance(part, list | tuple) and self.least <= len(part) <= self.most for part in lists):
            return False
        return all(is_element(value) for part in lists for value in part)


def is_element(value: Any) -> bool:
    """Whether a value is a number that lists may have."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= solvers.LARGEST


def numbers(data: Any) -> list[int]:
    """All numbers in data, nested as they may be."""
    if isinstance(data, list | tuple):
        return [x for part in data for x in numbers(part)]
    return [data] if is_element(data) else []


def _plain(answer: Any) -> int | list[int] | None:
    """A number or a list of numbers in Python's own types; None for anything else."""
    if isinstance(answer, np.ndarray):
        answer = answer.tolist()
    if isinstance(answer, list | tuple):
        found = [_plain(part) for part in answer]
        return found if all(isinstance(part, int) for part in found) else None  # type: ignore[return-value]
    if isinstance(answer, bool | np.bool_) or not isinstance(answer, int | float | np.integer | np.floating):
        return None
    return int(answer) if np.isfinite(answer) and answer == int(answer) else None


def _matches(kind: str, answer: Any, reference: Any) -> bool:
    if kind == "unordered":
        return sorted(answer) == sorted(reference)
    return answer == reference or (kind == "tour" and answer == reference[::-1])
