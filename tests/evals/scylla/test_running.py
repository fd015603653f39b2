"""Solvers whose valleys are known beforehand, and models that fail."""

import numpy as np
import pytest

from jaxmethods.evals.answers import Failed
from jaxmethods.evals.scylla import TASKS, Noisy, evaluate, grade, memoriser, one_by_one, oracle
from jaxmethods.evals.scylla.generating import Item

INSIDE, OUTSIDE = (0.95, 0.9, 0.85, 0.4, 0.2), (0.95, 0.8, 0.3, 0.2, 0.1)
ITEM = Item("FindMinimum", "id", [4, 2, 9], 2)


def test_the_oracle_has_no_valley():
    result = evaluate(oracle, items=4)
    assert set(result.accuracies("id").values()) == set(result.accuracies("ood").values()) == {1.0}
    assert [(level.gap, level.score) for level in result.levels] == [(0, 1)] * 5 and result.critical_complexity is None
    assert set(result.probes.values()) == {1.0} and result.failed == 0  # as easy as the easiest


def test_the_memoriser_knows_nothing_new():
    result = evaluate(memoriser, items=4, shots=2, grading="reference", denominator="parsed", passes=2)
    assert set(result.accuracies("id").values()) == {1.0} and set(result.accuracies("ood").values()) == {0.0}
    assert [(level.gap, level.score) for level in result.levels] == [(1, -1)] * 5 and result.critical_complexity == 1


def test_the_valley_lies_where_it_was_put():
    anchors = (
        "FindMinimum", "FindMode", "TwoSum", "SortNumbers", "ThreeSum", "ThreeSumInRange", "FourSum", "TSP",
        "LongestCommonSubarray",
    )  # fmt: skip
    result = evaluate(Noisy(INSIDE, OUTSIDE), anchors, items=48)
    assert result.critical_complexity == 3
    for level in result.levels:
        tasks = [name for name in anchors if TASKS[name].level == level.level]
        sigma = 4 * 0.5 / np.sqrt(48 * len(tasks))  # four deviations of a mean of coins
        assert level.inside == pytest.approx(INSIDE[level.level - 1], abs=sigma)
        assert level.outside == pytest.approx(OUTSIDE[level.level - 1], abs=sigma)
    assert result.probes["LongestCommonSubarray"] == pytest.approx(3, abs=1.2)
    with pytest.raises(ValueError, match="must be five probabilities"):
        Noisy((0.5,), OUTSIDE)


def test_answers_that_do_not_come_count_nowhere():
    asked = []

    def shaky(prompt):
        asked.append(prompt)
        if len(asked) % 2:
            raise TimeoutError("no answer\nin time")
        return oracle(prompt)

    result = evaluate(shaky, ["FindMinimum"], items=6)
    tally = result.tasks["FindMinimum"]["id"]
    assert (tally.accuracy, tally.items, tally.parsed, tally.failed) == (1.0, 6, 3, 3) and result.failed == 6
    nothing = evaluate(lambda prompt: None, ["FindMinimum", "TSP"], items=2)
    assert nothing.accuracies("id") == {} and nothing.levels == [] and nothing.critical_complexity is None
    assert one_by_one(shaky)(["x"]) == [Failed("TimeoutError: no answer in time")]
    assert "returned NoneType, and no text" in one_by_one(lambda prompt: None)(["x"])[0].reason


def test_grades():
    assert grade(ITEM, "The answer is 2").right and not grade(ITEM, "The answer is 4").right
    unread = grade(ITEM, "It is the smallest")
    assert unread.parsed is None and not unread.right and not unread.failed
    assert grade(ITEM, Failed("gone")).failed == "gone"


def test_whole_batches_and_the_second_pass():
    seen = []

    def second_thoughts(prompts):
        seen.append(prompts)
        return [
            f" {oracle(p).split('is ')[1]}." if p.endswith("the answer is") else "Let me think: 0 [0]" for p in prompts
        ]

    of = lambda passes: evaluate(second_thoughts, ["SortNumbers"], items=3, batched=True, passes=passes).accuracies(
        "id"
    )
    assert of(1) == {"SortNumbers": 0.0} and of(2) == {"SortNumbers": 1.0}
    assert len(seen[-1]) == 3 and "Let me think: 0 [0]\n\nTherefore, the answer is" in seen[-1][0]
