"""The twenty tasks (table 1 of https://arxiv.org/abs/2410.01769): 17 anchors with a level of complexity, and 3 probes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxmethods import tree
from jaxmethods.evals.scylla import repairs, solvers
from jaxmethods.evals.scylla.repairs import Data
from jaxmethods.evals.scylla.solvers import Sizes
from jaxmethods.evals.scylla.task import Answer, Example, Task

SUBSETS: Sizes = (4, 5, 6)
"""Sizes of the subsets of the three subset tasks."""
_SUM_ENTRIES, _ENTRIES = 40, 64  # longest lists [project choice]: those of which choices are summed, and others


def _same(solve: Callable[[Any], Answer]) -> Callable[[Example, Any], bool]:
    """Of tasks with one answer: whether it is that."""
    return lambda example, answer: answer == solve(example)


def _whole(rng: np.random.Generator, data: Data) -> Example:
    return data


def _always(data: Data) -> bool:
    return True


def _taken(answer: list[int], values: Sequence[int]) -> bool:
    return Counter(answer) <= Counter(values)


# Lists


def _pose_top_k(rng: np.random.Generator, data: Data) -> Example:
    return data, int(rng.integers(2, len(data) // 2 + 1))


def _top_k(example: Example) -> int:
    values, k = example
    return sorted(values, reverse=True)[k - 1]


# Sums: the same three kinds for pairs, triples, quadruples and subsets


def _fit(total: Any, wanted: Any) -> Any:
    """Whether sums are what is wanted: a target, an open interval, or (None) multiples of ten."""
    if wanted is None:
        return total % 10 == 0
    if isinstance(wanted, int | np.integer):
        return total == wanted
    return (wanted[0] < total) & (total < wanted[1])


def _solve_sum(sizes: Sizes, wanted: Any, values: Sequence[int]) -> list[int]:
    return solvers.first_choice(values, sizes, lambda total: _fit(total, wanted))


def _holds_sum(sizes: Sizes, wanted: Any, values: Sequence[int], answer: list[int]) -> bool:
    return len(answer) in sizes and _taken(answer, values) and bool(_fit(sum(answer), wanted))


def _sum_tasks(word: str, what: str, sizes: Sizes, level: int, least: int, most: int, told: str = "") -> list[Task]:
    """The task of a target, of a range and of multiples of ten."""
    whole = word == "SubsetSum"
    unique = solvers.unique_subset_sums if whole else solvers.unique_sums
    tries = 10 if whole else 30
    common: dict[str, Any] = dict(level=level, data="list", least=least, most=most, answer="unordered")
    ranges = lambda data: solvers.intervals(data, sizes, unique=word != "FourSum")
    text = f"Given a list l of numbers, find {what}{{}} of l whose sum {{}}. Each entry of l may be used once."

    def instruct(condition: str) -> dict[str, Any]:
        return {"instruction": text.format(told, condition), "untold": text.format("", condition)}

    return [
        Task(
            word, instruction=text.format("", "is k"), **common, repair=repairs.raise_entries(tries),
            fits=lambda data: unique(data, sizes).size > 0,
            pose=lambda rng, data: (data, int(rng.choice(unique(data, sizes)))),
            solved=lambda e: solvers.subset_of_sum(*e) if whole else _solve_sum(sizes, e[1], e[0]),
            holds=lambda e, said: _holds_sum(tuple(range(1, 17)) if whole else sizes, e[1], e[0], said),
        ),
        Task(
            f"{word}InRange", **instruct("is greater than a and less than b"), **common, repair=repairs.raise_entries(tries),
            fits=lambda data: bool(ranges(data)),
            pose=lambda rng, data: (data, (found := ranges(data))[int(rng.integers(len(found)))]),
            solved=lambda e: _solve_sum(sizes, tuple(e[1]), e[0]),
            holds=lambda e, said: _holds_sum(sizes, tuple(e[1]), e[0], said),
        ),
        Task(
            f"{word}MultipleTen", **instruct("is divisible by 10"), **common, repair=repairs.one_multiple(sizes),
            fits=lambda data: solvers.multiples(data, sizes) == 1, pose=_whole,
            solved=lambda e: _solve_sum(sizes, None, e),
            holds=lambda e, said: _holds_sum(sizes, None, e, said),
        ),
    ]  # fmt: skip


# Tours and runs


def _is_distances(matrix: Data) -> bool:
    array = np.asarray(matrix) if all(len(row) == len(matrix) for row in matrix) else np.ones((1, 1))
    return bool((array == array.T).all() and not array.diagonal().any()) and solvers.shortest_tour(matrix)[2] == 2


def _holds_tour(matrix: Data, tour: list[int]) -> bool:
    if tour[:1] != [0] or tour[-1:] != [0] or sorted(tour[1:]) != list(range(len(matrix))):
        return False
    return solvers.tour_length(matrix, tour) == solvers.shortest_tour(matrix)[1]


def _holds_increasing(values: Sequence[int], said: list[int]) -> bool:
    ascends = all(a < b for a, b in itertools.pairwise(said))
    return ascends and solvers.is_subsequence(said, values) and len(said) == len(solvers.longest_increasing(values))


def _holds_consecutive(values: Sequence[int], said: list[int]) -> bool:
    follows = all(a + 1 == b for a, b in itertools.pairwise(said))
    return follows and set(said) <= set(values) and len(said) == len(solvers.longest_consecutive(values))


def _block(example: Example) -> list[int]:
    return list(solvers.common_blocks(*example)[0])


def _has_one_block(data: Data) -> bool:
    blocks = solvers.common_blocks(*data)
    return len(blocks) == 1 and blocks[0] != ()


def _list_task(
    name: str, level: int | None, text: str, answer: Any, solve: Callable[[Any], Answer], **more: Any
) -> Task:
    given: dict[str, Any] = dict(
        data="list", least=2, most=_ENTRIES, fits=_always, pose=_whole, solved=solve, holds=_same(solve)
    )
    return Task(name, level, text, answer=answer, **given | more)


def _all_tasks() -> list[Task]:
    return [
        _list_task("FindMinimum", 1, "Find the smallest number of a list.", "number", lambda e: int(min(e))),
        _list_task("FindMaximum", 1, "Find the largest number of a list.", "number", lambda e: int(max(e))),
        _list_task(
            "FindMode", 1, "Find the number that occurs most often in a list.", "number", lambda e: solvers.modes(e)[0],
            fits=lambda data: len(solvers.modes(data)) == 1, repair=repairs.repeat_mode,
        ),
        _list_task(
            "FindTopk", 2, "Given a list l of numbers, find its k-th largest entry; equal entries count as several.", "number",
            _top_k, least=4, pose=_pose_top_k,
        ),
        *_sum_tasks("TwoSum", "two numbers", (2,), 2, 3, _SUM_ENTRIES)[:1],
        _list_task("SortNumbers", 2, "Sort the numbers of a list in ascending order.", "ordered", lambda e: sorted(e)),
        _list_task(
            "RemoveDuplicateNumbers", 2,
            "Remove the duplicates from a list: keep the first of equal numbers, and the order of those that stay.",
            "ordered", lambda e: list(dict.fromkeys(e)),
        ),
        *_sum_tasks("ThreeSum", "three numbers", (3,), 3, 4, _SUM_ENTRIES),
        *_sum_tasks("FourSum", "four numbers", (4,), 4, 5, _SUM_ENTRIES),
        *_sum_tasks("SubsetSum", "a subset", SUBSETS, 5, 6, 16, told=" of 4 to 6 entries"),
        Task(
            "TSP", 5,
            "Solve the travelling salesman problem: given the n x n matrix D of distances between cities 0 to n - 1, "
            "find a shortest tour that begins and ends in city 0 and visits each other city once.",
            "matrix", 4, 10, "tour", _is_distances, _whole, lambda e: solvers.shortest_tour(e)[0], _holds_tour,
            repairs.symmetric, attempts=10,
        ),
        _list_task(
            "LongestIncreasingSubsequence", None,
            "Find a longest strictly increasing subsequence of a list; its entries need not be neighbours.", "ordered",
            solvers.longest_increasing, holds=_holds_increasing, repair=repairs.raise_entries(30),
            fits=lambda data: len(solvers.longest_increasing(data)) > 1,
        ),
        _list_task(
            "LongestConsecutiveElements", None,
            "Find the longest run of consecutive numbers, such as 5, 6, 7, that all occur in a list, wherever they stand. "
            "Give it in ascending order.", "ordered", solvers.longest_consecutive,
            holds=_holds_consecutive, repair=repairs.add_neighbours, fits=lambda data: len(solvers.longest_consecutive(data)) > 1,
        ),
        _list_task(
            "LongestCommonSubarray", None, "Find the longest contiguous block of numbers that two lists have in common.", "ordered",
            _block, data="pair", fits=_has_one_block, repair=repairs.raise_entries(30), attempts=10,
        ),
    ]  # fmt: skip


TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _all_tasks()})
"""Name -> task, in the paper's order: 17 anchors with a level, and 3 probes."""
ANCHORS: Mapping[str, int] = MappingProxyType(
    {name: task.level for name, task in TASKS.items() if task.level is not None}
)
"""Name -> level."""


def require_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names of tasks, in the paper's order; none stands for all.

    Raises:
        ValueError: one is unknown.
    """
    for name in names:
        tree.require_one_of("task", name, tuple(TASKS))
    return tuple(name for name in TASKS if name in names or not names)
