"""The quantities: gap and score of a task, the valley over levels, critical complexity, and the complexity that a probe shows.

Accuracies are in [0, 1]; {task: accuracy} names tasks as `TASKS` does. `gap` and `score` are for numbers and for arrays of any
kind, inside jit and vmap as well. https://arxiv.org/abs/2410.01769, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmethods import tree
from jaxmethods.evals.scylla.tasks import ANCHORS, TASKS

Accuracies = Mapping[str, float]


class Level(NamedTuple):
    """Means over the anchor tasks of a level; the gap is clipped at 0 for each task, before the mean."""

    level: int
    inside: float
    outside: float
    gap: float
    score: float


def gap(inside: Any, outside: Any) -> Any:
    """g = max(0, A_id - A_ood)."""
    difference = inside - outside
    return (abs(difference) + difference) / 2


def score(inside: Any, outside: Any) -> Any:
    """S = A_ood - g, in [-1, 1]."""
    return outside - gap(inside, outside)


def ratio(inside: float, outside: float) -> float:
    """A_ood / A_id; 1 where A_id is 0."""
    return outside / inside if inside else 1.0


def relative_gap(inside: float, outside: float) -> float:
    """g / A_id; 1 where A_id is 0, as in the released code."""
    return gap(inside, outside) / inside if inside else 1.0


def accuracy(
    right: Sequence[bool], parsed: Sequence[bool], *, denominator: str = "all", least_parsed: float = 0.1
) -> float:
    """The share of right answers.

    Args:
        denominator: "all" answers, as in the paper, or those that could be "parsed", as in the released code.
        least_parsed: with "parsed", the accuracy is 0 where fewer than this share could be (the code: 0.1, second pass 0.5).

    Raises:
        ValueError: no answers.
    """
    tree.require_one_of("denominator", denominator, ("all", "parsed"))
    if not len(right):
        raise ValueError("there is no answer to count; ask the model first.")
    hits = sum(map(bool, right))
    if denominator == "all":
        return hits / len(right)
    readable = sum(map(bool, parsed))
    return hits / readable if readable and readable >= least_parsed * len(right) else 0.0


def valley(id_accuracy: Accuracies, ood_accuracy: Accuracies) -> list[Level]:
    """The means of each level that has a task in both, lowest first; probes have no level.

    Raises:
        ValueError: an unknown task, one that is missing on one side, or an accuracy outside of [0, 1].
    """
    _check(id_accuracy, ood_accuracy)
    made = []
    for level in sorted({ANCHORS[name] for name in id_accuracy if name in ANCHORS}):
        names = [name for name in TASKS if name in id_accuracy and ANCHORS.get(name) == level]
        inside, outside = (np.array([side[name] for name in names], np.float64) for side in (id_accuracy, ood_accuracy))
        means = (float(x.mean()) for x in (inside, outside, gap(inside, outside), score(inside, outside)))
        made.append(Level(level, *means))
    return made


def critical_complexity(id_accuracy: Accuracies, ood_accuracy: Accuracies) -> int | None:
    """The level with the largest mean gap, to nine decimals; the lowest of equals. None where no task has a gap.

    That it is the argmax of mean gaps is inferred from figure 5 and table 2 of the paper, which it reproduces.

    >>> critical_complexity({"FindMode": 0.9, "TwoSum": 0.8, "TSP": 0.1}, {"FindMode": 0.9, "TwoSum": 0.5, "TSP": 0.0})
    2

    Raises:
        ValueError: as `valley`.
    """
    levels = valley(id_accuracy, ood_accuracy)
    largest = max((round(level.gap, 9) for level in levels), default=0.0)
    return next(level.level for level in levels if round(level.gap, 9) == largest) if largest > 0 else None


def complexity_used(ood_by_level: Mapping[int, float], ood_accuracy: float) -> float | None:
    """The level at which anchors are as hard as a probe: where its A_ood crosses the line through the anchors' means.

    Linear between neighbouring levels, the first crossing from the left; a probe above the whole line is at its left end, one below
    at its right end. None where there is no level.
    """
    levels = sorted(ood_by_level)
    if not levels:
        return None
    heights = [ood_by_level[level] for level in levels]
    for i, (level, height) in enumerate(zip(levels, heights, strict=True)):
        if height == ood_accuracy:
            return float(level)
        if i + 1 < len(levels) and (height - ood_accuracy) * (heights[i + 1] - ood_accuracy) < 0:
            return level + (levels[i + 1] - level) * (height - ood_accuracy) / (height - heights[i + 1])
    return float(levels[0] if ood_accuracy > max(heights) else levels[-1])


def _check(id_accuracy: Accuracies, ood_accuracy: Accuracies) -> None:
    if different := sorted(set(id_accuracy) ^ set(ood_accuracy)):
        raise ValueError(f"{different[0]} has an accuracy in one split alone; give the same tasks for both.")
    for name in id_accuracy:
        tree.require_one_of("task", name, tuple(TASKS))
        for split, value in (("ID", id_accuracy[name]), ("OOD", ood_accuracy[name])):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name}: the {split} accuracy {value} is not in [0, 1].")
