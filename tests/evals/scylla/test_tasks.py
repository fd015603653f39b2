"""The twenty tasks against brute force over all choices, subsets, tours and blocks, and the laws of grading."""

import itertools
import json

import numpy as np
import pytest

from jaxmethods.evals.scylla import ANCHORS, TASKS, require_tasks
from jaxmethods.evals.scylla.repairs import Pool
from jaxmethods.evals.scylla.solving import wrong

FAMILIAR, UNFAMILIAR = range(101), range(1000, 10_000)
SUMS = {"TwoSum": (2,), "ThreeSum": (3,), "FourSum": (4,), "SubsetSum": (4, 5, 6)}
SUMMED = [name for name in TASKS if "Sum" in name]
SMALL = range(30)  # sums of these meet often


def rng(seed=0):
    return np.random.default_rng(seed)


def samples(name, elements, count=5, seed=0):
    made = rng(seed)
    return [TASKS[name].sample(made, elements) for _ in range(count)]


def choices(values, sizes):
    """All index choices, by itertools."""
    return [c for k in sizes for c in itertools.combinations(range(len(values)), k)]


def sum_task(name):
    """(sizes, kind) of a task of sums."""
    kind = next((end for end in ("InRange", "MultipleTen") if name.endswith(end)), "")
    return SUMS[name.removesuffix(kind)], kind


def solutions(name, example):
    """The index choices that solve a task of sums."""
    sizes, kind = sum_task(name)
    if name == "SubsetSum":
        sizes = range(1, len(example[0]) + 1)
    values, wanted = (example, None) if kind == "MultipleTen" else example
    total = lambda choice: sum(values[i] for i in choice)
    fits = {
        "": lambda s: s == wanted,
        "InRange": lambda s: wanted[0] < s < wanted[1],
        "MultipleTen": lambda s: s % 10 == 0,
    }[kind]
    return values, [choice for choice in choices(values, sizes) if fits(total(choice))]


def tours(matrix):
    """Every tour with its length."""
    for middle in itertools.permutations(range(1, len(matrix))):
        tour = [0, *middle, 0]
        yield tour, sum(matrix[a][b] for a, b in itertools.pairwise(tour))


def test_names_and_levels_are_those_of_the_paper():
    levels = {name: task.level for name, task in TASKS.items()}
    assert len(levels) == 20 and len(ANCHORS) == 17
    assert [list(levels.values()).count(level) for level in (1, 2, 3, 4, 5, None)] == [3, 4, 3, 3, 4, 3]
    assert levels["FindMode"] == 1 and levels["TwoSum"] == 2 and levels["TSP"] == 5
    assert require_tasks(["TSP", "FindMode"]) == ("FindMode", "TSP") and require_tasks([]) == tuple(TASKS)
    with pytest.raises(ValueError, match="did you mean 'TwoSum'"):
        require_tasks(["TwoSums"])


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("elements", [FAMILIAR, UNFAMILIAR], ids=["familiar", "unfamiliar"])
def test_every_example_is_valid_and_its_answer_is_right(name, elements):
    task = TASKS[name]
    for example in samples(name, elements):
        answer = task.solve(example)
        assert json.loads(json.dumps(answer)) == answer
        for grading in ("verifier", "reference"):
            assert task.check(example, answer, grading=grading)
            assert task.check(json.loads(json.dumps(example)), np.asarray(answer), grading=grading)
            assert not task.check(example, wrong(task, example), grading=grading)
            for nothing in (None, "", "7", [], [None], [[1]], True, float("nan"), {}, 3.5):
                assert not task.check(example, nothing, grading=grading)
        with pytest.raises(ValueError, match="grading='fair' is unknown"):
            task.check(example, answer, grading="fair")


@pytest.mark.parametrize("name", SUMMED)
def test_sums_have_one_solution_by_brute_force(name):
    counts = []
    for elements in (SMALL, UNFAMILIAR):
        for example in samples(name, elements, 12):
            values, found = solutions(name, example)
            if len(values) > 12:
                continue
            answer = TASKS[name].solve(example)
            answers = {tuple(sorted(values[i] for i in choice)) for choice in found}
            assert tuple(sorted(answer)) in answers and len(answer) in sum_task(name)[0]
            counts.append(len(found))
            for said in answers:
                assert TASKS[name].check(example, list(said)[::-1])  # all that solve it are right, in any order
            sizes, _ = sum_task(name)
            others = [values[i] for i in range(sizes[0])]
            assert TASKS[name].check(example, others) == (tuple(sorted(others)) in answers)
    assert len(counts) > 4
    if name == "FourSumInRange":
        assert max(counts) > 1  # the released code takes each sum once
    else:
        assert set(counts) == {1}


def test_a_range_holds_one_inner_sum():
    for name in ("ThreeSumInRange", "FourSumInRange", "SubsetSumInRange"):
        for example in samples(name, SMALL, 6):
            values, (low, high) = example
            every = {sum(values[i] for i in choice) for choice in choices(values[:12], sum_task(name)[0])}
            inside = [s for s in every if low < s < high]
            assert len(values) > 12 or (len(inside) == 1 and {low, high} <= every)


def test_an_entry_is_used_once():
    task = TASKS["TwoSum"]
    assert task.check(([3, 3, 5], 6), [3, 3]) and not task.check(([3, 4, 5], 6), [3, 3])
    assert not task.check(([3, 4, 5], 7), [3.5, 3.5])


def test_tours_by_all_permutations():
    for example in (TASKS["TSP"].sample(rng(seed), range(1, 40)) for seed in range(10)):
        if len(example) > 6:
            continue
        task, every = TASKS["TSP"], {tuple(t): n for t, n in tours(example)}
        assert (np.array(example) == np.array(example).T).all() and not np.diag(example).any()
        best = [tour for tour, length in every.items() if length == min(every.values())]
        assert len(best) == 2 and best[0] == best[1][::-1]
        assert {tour for tour in every if task.check(example, list(tour))} == set(best)
        assert {tour for tour in every if task.check(example, list(tour), grading="reference")} == set(best)
        assert not task.check(example, list(best[0][:-1])) and not task.check(example, [0, *best[0][1:-1]])


def test_the_number_of_shortest_tours_by_all_permutations():
    from jaxmethods.evals.scylla.solvers import shortest_tour

    made = rng()
    for cities in (4, 5, 6):
        for high in (2, 4, 50):  # few distances have many ties
            upper = np.triu(made.integers(1, high + 1, (cities, cities)), 1)
            matrix = (upper + upper.T).tolist()
            lengths = [length for _, length in tours(matrix)]
            tour, length, count = shortest_tour(matrix)
            assert length == min(lengths) and count == lengths.count(length)
            assert sum(matrix[a][b] for a, b in itertools.pairwise(tour)) == length and sorted(tour[1:]) == list(
                range(cities)
            )


def test_lists_by_hand():
    solve = lambda name, example: TASKS[name].solve(example)
    assert solve("FindMinimum", [4, 2, 9]) == 2 and solve("FindMaximum", [4, 2, 9]) == 9
    assert solve("FindMode", [4, 2, 4, 9]) == 4 and not TASKS["FindMode"].is_valid([4, 4, 2, 2])
    assert solve("FindTopk", ([5, 5, 1, 9], 2)) == 5 and solve("FindTopk", ([5, 5, 1, 9], 3)) == 5
    assert solve("SortNumbers", [3, 1, 3]) == [1, 3, 3]
    assert solve("RemoveDuplicateNumbers", [3, 1, 3, 2, 1]) == [3, 1, 2]
    assert not TASKS["SortNumbers"].check([3, 1, 2], [3, 2, 1])  # order counts
    assert solve("LongestConsecutiveElements", [7, 3, 9, 4, 8, 5]) == [3, 4, 5]
    assert TASKS["LongestConsecutiveElements"].check([7, 3, 9, 4, 8, 5], [7, 8, 9])  # as long
    assert not TASKS["LongestConsecutiveElements"].check([7, 3, 9, 4, 8, 5], [7, 8, 9], grading="reference")
    assert solve("LongestCommonSubarray", ([1, 2, 3, 9], [2, 3, 1, 2, 3])) == [1, 2, 3]
    assert not TASKS["LongestCommonSubarray"].is_valid([[1, 2], [2, 1]]) and not TASKS[
        "LongestCommonSubarray"
    ].is_valid([[1, 2], [3, 4]])


def test_runs_by_brute_force():
    increasing = consecutive = common = 0
    for seed in range(6):
        values = TASKS["LongestIncreasingSubsequence"].sample(rng(seed), range(8))[:10]
        subsequences = [
            [values[i] for i in c]
            for k in range(1, len(values) + 1)
            for c in itertools.combinations(range(len(values)), k)
        ]
        rising = [s for s in subsequences if all(a < b for a, b in itertools.pairwise(s))]
        longest = [s for s in rising if len(s) == max(map(len, rising))]
        task = TASKS["LongestIncreasingSubsequence"]
        assert task.solve(values) in longest and all(task.check(values, s) for s in longest)
        assert not any(task.check(values, s) for s in subsequences if s not in longest)
        increasing += len({tuple(s) for s in longest}) > 1
        task, values = (
            TASKS["LongestConsecutiveElements"],
            TASKS["LongestConsecutiveElements"].sample(rng(seed), range(20)),
        )
        runs = [list(range(a, b)) for a in range(20) for b in range(a + 1, 21) if set(range(a, b)) <= set(values)]
        longest = [run for run in runs if len(run) == max(map(len, runs))]
        assert task.solve(values) == longest[0] and [run for run in runs if task.check(values, run)] == longest
        consecutive += len(longest)
        task, (one, other) = TASKS["LongestCommonSubarray"], TASKS["LongestCommonSubarray"].sample(rng(seed), range(5))
        blocks = lambda x: {tuple(x[a:b]) for a in range(len(x)) for b in range(a + 1, len(x) + 1)}
        shared = blocks(one) & blocks(other)
        assert [b for b in shared if len(b) == max(map(len, shared))] == [tuple(task.solve((one, other)))]
        common += len(shared)
    assert increasing > 1 and consecutive >= 6 and common > 6


@pytest.mark.parametrize("name", TASKS)
def test_numbers_are_elements(name):
    elements = rng(1).choice(9000, 300, replace=False) + 1000
    for example in samples(name, elements, 4):
        has_parameter = TASKS[name].data == "list" and isinstance(example[0], list)
        data = example[0] if has_parameter else example
        assert set(np.ravel(np.concatenate([np.ravel(part) for part in data])).tolist()) <= {0, *elements.tolist()}


def test_elements_that_serve_nothing_are_refused():
    for elements, words in (
        ([], "one at least"),
        ([-1, 2], "whole numbers from 0"),
        (np.array([1.5]), "whole numbers"),
        ([10**10], "whole numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            TASKS["FindMinimum"].sample(rng(), elements)
    with pytest.raises(ValueError, match="TwoSum: 200 draws from elements=\\[4\\]"):
        TASKS["TwoSum"].sample(rng(), [4])
    assert TASKS["LongestConsecutiveElements"].sample(rng(), [5, 50, 500])  # neighbours come from outside there
    with pytest.raises(ValueError, match="no choice of 2 numbers has such a sum"):
        TASKS["TwoSum"].solve(([1, 2, 3], 9))


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.repair.__name__ != "nothing"])
def test_repairs_make_what_is_valid_of_what_is_not(name):
    task, made = TASKS[name], rng(3)
    pool, mended = Pool.of(UNFAMILIAR), 0
    for _ in range(60):
        broken = task._drawn(made, task.random_shape(made), pool)
        if task.data == "matrix":
            broken[0][1] += 1
        if not task.is_valid(broken) and (found := task.repair(made, broken, pool, task.is_valid)) is not None:
            mended += 1
            assert task.is_valid(found) and len(found) >= len(broken)
    easy = ("TwoSum", "ThreeSum", "FourSum", "ThreeSumInRange", "FourSumInRange", "SubsetSumInRange", "SubsetSum")
    assert mended or name in (*easy, "LongestIncreasingSubsequence")  # what is drawn is valid already
    if name in easy:
        entries = [7] * max(task.least, 4)  # no sum is unique
        found = [task.repair(made, entries, pool, task.is_valid) for _ in range(10)]
        assert any(found) and all(one is None or task.is_valid(one) for one in found)
