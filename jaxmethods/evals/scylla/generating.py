"""ID and OOD examples: what a model invents, or a synthetic stand-in for it, and the same shapes with numbers that are not its own.

ID elements E_id are a multiset of numbers, ID data lists (pairs, matrices). OOD data have the shapes of ID data, filled from as
many numbers as E_id has, drawn from a universe without E_id (section 3 of https://arxiv.org/abs/2410.01769).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxmethods import tree
from jaxmethods.evals.scylla.repairs import Data, Pool
from jaxmethods.evals.scylla.task import Answer, Example, Task, is_element, numbers

UNIVERSES = {"released": (range(1000, 10_000), range(100, 1000)), "paper": (range(10_000), range(10_000))}
"""Numbers that OOD elements are drawn from, in lists and in matrices: of the released code, and of the paper."""
_REPEATED = ("RemoveDuplicateNumbers", "LongestCommonSubarray")
"""Tasks whose OOD data may occur twice, as in the released code."""
_IDLE_PASSES = 5


class Distribution(NamedTuple):
    """What a model takes numbers and inputs from.

    elements: E_id, with multiplicity. data: distinct valid inputs, in the order in which they were found.
    """

    elements: list[int]
    data: list[Data]


@dataclasses.dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    split: "id" or "ood". answer: the reference.
    """

    task: str
    split: str
    example: Example
    answer: Answer


def synthetic(task: Task, rng: np.random.Generator, count: int, elements: Sequence[int] = range(101)) -> Distribution:
    """`count` distinct inputs of 4 to 16 numbers (4 to 10 cities) drawn from `elements`: a stand-in for what a model invents.

    Raises:
        ValueError: so many distinct ones could not be made.
    """
    pool, found = Pool.of(elements), dict[str, Data]()
    for _ in range(20 * count):
        if len(found) == count:
            break
        data = task.sample_data(rng, pool)
        found.setdefault(json.dumps(data), data)
    if len(found) < count:
        raise ValueError(
            f"{task.name}: these elements make {len(found)} distinct inputs, fewer than {count}; give more."
        )
    return Distribution(numbers(list(found.values())), list(found.values()))


def spans(text: str) -> Iterator[Any]:
    """The balanced outermost [...] spans of a text that are JSON, parsed."""
    depth, start = 0, 0
    for i, character in enumerate(text):
        if character == "[":
            start = start if depth else i
            depth += 1
        elif character == "]" and depth:
            depth -= 1
            if not depth:
                try:
                    yield json.loads(text[start : i + 1])
                except (ValueError, RecursionError):
                    continue


def probed(task: Task, rng: np.random.Generator, texts: Iterable[str]) -> Distribution:
    """What a model invented: the elements of all lists in its texts, and those lists that serve the task, repaired once if need be.

    Elements of repaired inputs are elements too, so that OOD numbers never meet them (the released code does not look).
    """
    elements: list[int] = []
    found: dict[str, Data] = {}
    for text in texts:
        for span in spans(text):
            elements += numbers(span)
            data = span if task.is_valid(span) else _repaired(task, rng, span)
            if data is not None:
                found.setdefault(json.dumps(data), data)
    new = set(numbers(list(found.values()))) - set(elements)
    return Distribution(elements + sorted(new), list(found.values()))


def _repaired(task: Task, rng: np.random.Generator, span: Any) -> Data | None:
    """A list that the task cannot use, mended if it has the right form at all."""
    lists = span if task.data in ("pair", "matrix") else [span]
    if not isinstance(span, list) or not all(isinstance(part, list) and part for part in lists):
        return None
    if (task.data == "pair" and len(span) != 2) or not all(is_element(x) for part in lists for x in part):
        return None
    if not all(task.least <= len(part) <= task.most for part in ([span] if task.data == "matrix" else lists)):
        return None
    values = numbers(span)
    if task.data == "matrix":
        values = [x for row, part in enumerate(span) for column, x in enumerate(part) if row != column] or values
    return task.repair(rng, span, Pool(values), task.is_valid)


def universe_of(task: Task, universe: str = "released") -> range:
    """The numbers that OOD elements may be."""
    tree.require_one_of("universe", universe, tuple(UNIVERSES))
    return UNIVERSES[universe][task.data == "matrix"]


def out_of_distribution(
    task: Task,
    rng: np.random.Generator,
    inside: Distribution,
    count: int,
    *,
    universe: range | None = None,
) -> list[Data]:
    """`count` inputs with the shapes of `inside.data`, in their order, of numbers of the universe that are no ID elements.

    A shape that cannot be filled in 50 attempts (10 for matrices and pairs) is left out; where that leaves fewer than `count`, the
    shapes are gone through again. Repairs keep the shape.

    Raises:
        ValueError: no number is left, or the shapes cannot be filled.
    """
    elements = np.unique(np.asarray(inside.elements, np.int64))
    free = np.setdiff1d(np.asarray(universe_of(task) if universe is None else universe, np.int64), elements)
    if not free.size or not inside.data:
        what = (
            "ID elements leave no number of the universe"
            if not free.size
            else "there is no ID input to take shapes from"
        )
        raise ValueError(f"{task.name}: {what}.")
    drawn = rng.choice(free, len(inside.elements))
    pool = Pool(drawn.tolist(), free.tolist())
    made: list[Data] = []
    seen: set[str] = set()
    idle = 0
    while len(made) < count:
        before = len(made)
        for data in inside.data:
            if len(made) == count:
                break
            filled = _like(task, rng, data, pool)
            if filled is not None and (task.name in _REPEATED or (key := json.dumps(filled)) not in seen):
                made.append(filled)
                if task.name not in _REPEATED:
                    seen.add(key)
        idle = idle + 1 if len(made) == before else 0
        if idle == _IDLE_PASSES:
            raise ValueError(
                f"{task.name}: {len(made)} of {count} OOD inputs could be made from the shapes of {len(inside.data)} ID inputs; "
                "give more of these."
            )
    return made


def _like(task: Task, rng: np.random.Generator, data: Data, pool: Pool) -> Data | None:
    """Data of the same shape, of the pool's numbers."""
    if task.name == "RemoveDuplicateNumbers":
        return _same_counts(rng, data, pool)
    for _ in range(task.attempts):
        made = task.filled(rng, task.shape(data), pool, exact=True)
        if made is not None:
            return made
    return None


def _same_counts(rng: np.random.Generator, data: Data, pool: Pool) -> Data | None:
    """Distinct numbers of the pool, as often as those of `data`, shuffled."""
    counts = Counter(data).values()
    distinct = np.unique(pool.drawn)
    if len(distinct) < len(counts):
        return None
    values = np.repeat(rng.choice(distinct, len(counts), replace=False), list(counts))
    return rng.permutation(values).tolist()


class Questions(NamedTuple):
    """The questions of one task and split.

    shots: shown with their answers. items: asked.
    """

    shots: list[Item]
    items: list[Item]


def questions(
    task: Task,
    inside: Distribution,
    *,
    items: int = 256,
    shots: int = 8,
    seed: int = 0,
    universe: str = "released",
) -> dict[str, Questions]:
    """{"id", "ood"}: `items` + `shots` questions each, none twice among the ID ones; the same for the same seed.

    ID data are drawn without replacement from `inside`, OOD data have their shapes. Where `inside` has fewer, there are as many
    as it has.

    Raises:
        ValueError: no example is left for an item.
    """
    rng = np.random.default_rng([seed, *task.name.encode()])
    count = min(items + shots, len(inside.data))
    if count <= shots:
        raise ValueError(
            f"{task.name}: {len(inside.data)} ID inputs leave none to ask beside {shots} shots; probe the model more often, or "
            "take synthetic examples."
        )
    kept = [inside.data[i] for i in rng.permutation(len(inside.data))[:count].tolist()]
    inner = Distribution(inside.elements, kept)
    outer = out_of_distribution(task, rng, inner, count, universe=universe_of(task, universe))
    made = {}
    for split, data in (("id", kept), ("ood", outer)):
        posed = [_item(task, split, task.pose(rng, one)) for one in data]
        made[split] = Questions(posed[:shots], posed[shots:])
    return made


def _item(task: Task, split: str, example: Example) -> Item:
    plain = json.loads(json.dumps(example))  # as a file gives it back
    return Item(task.name, split, plain, task.solve(plain))
