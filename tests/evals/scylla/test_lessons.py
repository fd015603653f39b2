"""Lessons ask what an evaluation asks, of the same numbers, with right answers, and none of its questions."""

import json

import pytest

from jaxmethods.evals.scylla import TASKS, benchmark
from jaxmethods.evals.scylla.lessons import lessons
from jaxmethods.evals.scylla.prompting import prompt, read_prompt
from jaxmethods.evals.scylla.reading import extract

SHORT = ("FindMinimum", "TwoSum", "SortNumbers", "LongestCommonSubarray")


@pytest.fixture(scope="module")
def rows():
    return list(lessons(SHORT, count=12))


def test_every_answer_is_the_one_that_grading_takes(rows):
    assert [row["kind"] for row in rows] == [name for name in SHORT for _ in range(12)]
    for row in rows:
        task, example = read_prompt(row["prompt"])
        answer = extract(task.name, row["answer"])
        assert answer is not None and task.check(example, answer)
        assert row["prompt"] == prompt(task, example)


def test_numbers_are_familiar_and_questions_are_not(rows):
    asked = benchmark(SHORT, items=256, shots=8)
    seen = {json.dumps(item.example) for of in asked.values() for item in (*of["id"].shots, *of["id"].items)}
    for row in rows:
        _, example = read_prompt(row["prompt"])
        assert json.dumps(example) not in seen
    again = list(lessons(SHORT, count=12))
    assert rows == again and rows != list(lessons(SHORT, count=12, seed=2))


def test_leaving_out_is_needed():
    """Lessons are drawn as an evaluation with their seed draws: with the same one they would be its very questions."""
    mine = {row["prompt"] for row in lessons(("FindMaximum",), count=40, seed=3, asked_seed=0)}
    asked = benchmark(("FindMaximum",), items=248, seed=3)["FindMaximum"]["id"].items
    assert mine & {prompt(TASKS["FindMaximum"], item.example) for item in asked}


@pytest.mark.parametrize(
    ("given", "told"), [({"count": 0}, "count=0"), ({"seed": 0}, "seed=0"), ({"tasks": ("TwoSums",)}, "TwoSum")]
)
def test_bad_arguments(given, told):
    with pytest.raises(ValueError, match=told):
        next(iter(lessons(**given)))
