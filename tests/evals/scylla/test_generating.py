"""ID and OOD questions: disjoint numbers, equal shapes, the same bytes for a seed; what a model invents is read and mended."""

import dataclasses
import json
import time
from collections import Counter

import numpy as np
import pytest

from jaxmethods.evals.scylla import (
    TASKS,
    Distribution,
    benchmark,
    out_of_distribution,
    probed,
    questions,
    synthetic,
    universe_of,
)  # fmt: skip
from jaxmethods.evals.scylla.generating import spans
from jaxmethods.evals.scylla.task import numbers


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def made():
    """Task -> (ID, OOD data of the same shapes)."""
    inside = {name: synthetic(task, rng(), 16) for name, task in TASKS.items()}
    return {name: (one, out_of_distribution(TASKS[name], rng(1), one, 16)) for name, one in inside.items()}


@pytest.mark.parametrize("name", TASKS)
def test_shapes_stay_and_numbers_do_not(name, made):
    task, (inside, outside) = TASKS[name], made[name]
    assert len(inside.data) == len({json.dumps(one) for one in inside.data}) == len(outside) == 16
    assert all(task.is_valid(one) for one in (*inside.data, *outside))
    there = set(numbers(outside)) - ({0} if task.data == "matrix" else set())  # the diagonal
    assert not there & set(inside.elements) and there <= set(universe_of(task))
    shapes = Counter(map(task.shape, inside.data))
    assert sum((Counter(map(task.shape, outside)) - shapes).values()) <= 8  # shapes that could not be filled gave way
    if not name.endswith("MultipleTen") and name != "SubsetSum":
        assert Counter(map(task.shape, outside)) == shapes


def test_counts_of_duplicates_stay(made):
    inside, outside = made["RemoveDuplicateNumbers"]
    profile = lambda values: sorted(Counter(values).values())
    assert list(map(profile, inside.data)) == list(map(profile, outside)) and any(
        len(set(one)) < len(one) for one in outside
    )


def test_universes():
    assert universe_of(TASKS["TwoSum"]) == range(1000, 10_000) and universe_of(TASKS["TSP"]) == range(100, 1000)
    inside = synthetic(TASKS["SortNumbers"], rng(), 4)
    wide = out_of_distribution(
        TASKS["SortNumbers"], rng(), inside, 40, universe=universe_of(TASKS["SortNumbers"], "paper")
    )
    assert len(wide) == 40 and min(numbers(wide)) < 1000 and not set(numbers(wide)) & set(inside.elements)
    everything = Distribution(list(range(1000, 10_000)), [[1, 2, 3]])
    with pytest.raises(ValueError, match="leave no number of the universe"):
        out_of_distribution(TASKS["SortNumbers"], rng(), everything, 1)
    with pytest.raises(ValueError, match="no ID input to take shapes from"):
        out_of_distribution(TASKS["SortNumbers"], rng(), Distribution([1], []), 1)
    with pytest.raises(ValueError, match="0 of 1 OOD inputs could be made"):  # one number makes no unique sum
        out_of_distribution(TASKS["TwoSum"], rng(), Distribution([1, 2, 3], [[1, 2, 3]]), 1, universe=range(5, 6))
    with pytest.raises(ValueError, match="distinct inputs, fewer than 99"):
        synthetic(TASKS["FindMinimum"], rng(), 99, elements=[3])


def test_a_seed_is_a_benchmark():
    names = ["FindTopk", "TwoSum", "TSP"]
    whole = lambda **options: json.dumps(benchmark(names, items=6, **options), default=dataclasses.asdict).encode()
    assert whole(seed=3) == whole(seed=3) != whole(seed=4)
    assert benchmark(["TSP"], items=6) == {"TSP": benchmark(names, items=6)["TSP"]}  # whatever else is asked for
    for splits in benchmark(names, items=6).values():
        for split, (shots, items) in splits.items():
            assert len(shots) == 8 and len(items) == 6 and {item.split for item in items} == {split}
            shown = [json.dumps(item.example) for item in (*shots, *items)]
            assert len(set(shown)) == 14
    with pytest.raises(ValueError, match="items=0"):
        benchmark(items=0)


TEXT = """Sure! Here are inputs: [3, 1, 2], then [5, 5, 5, 7]. A nested one [[1, 2], [3]] and a wrong one [1, x] and [4, -2, 90].
Unfinished: [8, 9"""


def test_what_a_model_invents():
    assert list(spans(TEXT)) == [[3, 1, 2], [5, 5, 5, 7], [[1, 2], [3]], [4, -2, 90]]
    found = probed(TASKS["SortNumbers"], rng(), [TEXT, "again [3, 1, 2] and [7, true, 2.5, null]"])
    assert found.data == [[3, 1, 2], [5, 5, 5, 7]]  # without duplicates; and elements with multiplicity, of all spans
    assert found.elements == [3, 1, 2, 5, 5, 5, 7, 1, 2, 3, 4, 90, 3, 1, 2, 7]
    assert list(spans("]] [[[ " + "[" * 5000)) == [] and probed(TASKS["TSP"], rng(), [""]) == Distribution([], [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("FindMode", "[4, 9, 4, 9, 1]"),  # two modes
        ("TwoSum", "[5, 5, 5, 5]"),
        ("ThreeSumMultipleTen", "[1, 1, 1, 2]"),
        (
            "TSP",
            "[[0, 3, 4, 9], [7, 0, 5, 2], [1, 1, 8, 6], [3, 3, 3, 0]]",
        ),  # neither symmetric nor zero on the diagonal
        ("LongestConsecutiveElements", "[10, 20, 30]"),
        ("LongestCommonSubarray", "[[1, 2, 3], [4, 2, 1]]"),
    ],
)
def test_invented_inputs_are_mended_once(name, text):
    task, made = TASKS[name], [probed(TASKS[name], rng(seed), [text]) for seed in range(12)]
    assert any(one.data for one in made)
    for one in made:
        assert all(task.is_valid(data) for data in one.data)
        assert set(numbers(one.data)) - {0} <= set(one.elements)  # a repair makes elements too
    assert (
        probed(
            task, rng(), ["[1]", "[[1], [2], [3]]", "[[1, 2], [3, -4]]", "[[[1]]]", "[[1, 2], 3]", "[]", "[[], []]"]
        ).data
        == []
    )


def test_too_few_inputs_are_told():
    few = Distribution([1, 2, 3], [[1, 2, 3], [3, 2, 1], [2, 3, 1]])
    asked = questions(TASKS["SortNumbers"], few, items=5, shots=1)
    assert [len(asked[split].items) for split in ("id", "ood")] == [2, 2]
    with pytest.raises(ValueError, match="3 ID inputs leave none to ask beside 3 shots"):
        questions(TASKS["SortNumbers"], few, items=5, shots=3)


@pytest.mark.ci
@pytest.mark.slow
def test_the_papers_size_takes_less_than_a_minute():
    start = time.process_time()
    made = benchmark()
    assert (
        time.process_time() - start < 60
    )  # 27 s on a core of an AMD EPYC, for both splits: 10,240 items and 320 shots
    assert all(len(of.items) == 256 for splits in made.values() for of in splits.values())
