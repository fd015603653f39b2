"""Gaps, scores and levels: laws, hand-worked cases, and the paper's own numbers recomputed from its accuracies."""

import jax
import numpy as np
import pytest

from jaxmethods.evals.scylla import (
    ANCHORS,
    accuracy,
    complexity_used,
    critical_complexity,
    gap,
    ratio,
    relative_gap,
    score,
    valley,
)

# Figure 5: ID and OOD means of levels 1 to 5; table 2: scores and critical complexity.
QWEN = {
    "1.8B": ([.78, .45, .05, .03, .05], [.66, .34, .05, .01, .03], [.547, .226, .042, -.009, .018], 1),
    "4B": ([.80, .32, .11, .06, .05], [.72, .26, .12, .07, .03], [.631, .173, .094, .061, .007], 1),
    "7B": ([.91, .53, .13, .10, .09], [.91, .41, .16, .09, .07], [.887, .268, .152, .063, .056], 2),
    "14B": ([.95, .75, .19, .06, .05], [.90, .67, .13, .04, .05], [.849, .568, .075, .025, .037], 2),
    "32B": ([.99, .83, .30, .21, .07], [.98, .67, .22, .16, .06], [.969, .521, .137, .102, .045], 2),
    "72B": ([.95, .95, .26, .22, .06], [.93, .89, .19, .09, .03], [.911, .825, .115, -.027, .010], 4),
    "110B": ([.99, .96, .36, .36, .18], [.98, .96, .25, .21, .10], [.965, .950, .129, .044, .010], 4),
}  # fmt: skip
ONE_A_LEVEL = ("FindMinimum", "TwoSum", "ThreeSum", "FourSum", "TSP")
RNG = np.random.default_rng(0)


def of_levels(values):
    """The level's value for each of its tasks."""
    return {name: values[level - 1] for name, level in ANCHORS.items()}


@pytest.mark.parametrize("size", QWEN)
@pytest.mark.parametrize("whole", [True, False])
def test_the_papers_numbers(size, whole):
    inside, outside, scores, critical = QWEN[size]
    spread = of_levels if whole else lambda values: dict(zip(ONE_A_LEVEL, values, strict=True))
    assert critical_complexity(spread(inside), spread(outside)) == critical
    # Accuracies have two digits, and gaps are clipped for each task before the mean, which lowers scores.
    made = [level.score for level in valley(spread(inside), spread(outside))]
    np.testing.assert_allclose(made, scores, atol=0.04)


def test_laws_of_gap_and_score():
    inside, outside = RNG.random((2, 200))
    g, s = gap(inside, outside), score(inside, outside)
    assert (g >= 0).all() and (np.abs(s) <= 1).all()
    np.testing.assert_allclose(g, np.maximum(0, inside - outside), atol=1e-15)
    np.testing.assert_allclose(s, np.where(inside >= outside, 2 * outside - inside, outside), atol=1e-15)
    assert (score(1, 1), score(1, 0), score(0, 1), score(0, 0)) == (1, -1, 1, 0)
    for compiled in (jax.jit(score), jax.vmap(score)):
        np.testing.assert_allclose(compiled(inside, outside), s, atol=1e-6)
    assert (ratio(0.8, 0.4), ratio(0.0, 0.4), relative_gap(0.8, 0.4), relative_gap(0.0, 0.4)) == (0.5, 1, 0.5, 1)
    assert relative_gap(0.4, 0.8) == 0


def test_levels_clip_before_they_average():
    inside = {"FindMinimum": 0.5, "FindMaximum": 0.9, "FindMode": 0.4, "LongestCommonSubarray": 0.3}
    outside = {"FindMinimum": 0.9, "FindMaximum": 0.6, "FindMode": 0.4, "LongestCommonSubarray": 0.1}
    (level,) = valley(inside, outside)  # the probe has none
    assert level.level == 1 and level.gap == pytest.approx(0.1) and level.score == pytest.approx((0.9 + 0.3 + 0.4) / 3)
    assert level.gap > gap(level.inside, level.outside) == 0  # Jensen: the clip is convex
    for _ in range(20):
        sides = [dict(zip(ANCHORS, RNG.random(17), strict=True)) for _ in range(2)]
        for one in valley(*sides):
            assert one.gap >= gap(one.inside, one.outside) - 1e-12 and one.score == pytest.approx(one.outside - one.gap)


def test_critical_complexity_of_ties_and_nothing():
    same = of_levels([0.9, 0.5, 0.4, 0.3, 0.1])
    assert critical_complexity(same, same) is None and critical_complexity({}, {}) is None
    assert (
        critical_complexity({"TSP": 0.1, "LongestCommonSubarray": 1.0}, {"TSP": 0.2, "LongestCommonSubarray": 0.0})
        is None
    )
    # 0.9 - 0.8 and 0.4 - 0.3 are equal but for rounding: the lowest level
    assert critical_complexity({"FindMode": 0.9, "TwoSum": 0.4}, {"FindMode": 0.8, "TwoSum": 0.3}) == 1
    for inside, outside, words in (
        ({"TSP": 0.1}, {}, "TSP has an accuracy in one split alone"),
        ({"TSp": 0.1}, {"TSp": 0.1}, "did you mean 'TSP'"),
        ({"TSP": 1.1}, {"TSP": 0.1}, "the ID accuracy 1.1 is not in"),
        ({"TSP": 0.1}, {"TSP": float("nan")}, "the OOD accuracy nan is not in"),
    ):
        with pytest.raises(ValueError, match=words):
            critical_complexity(inside, outside)


def test_where_a_probe_meets_the_anchors():
    line = {1: 0.9, 2: 0.5, 3: 0.3, 4: 0.3, 5: 0.1}
    for level, height in line.items():
        assert complexity_used(line, height) == (3 if level == 4 else level)  # the first of equals
    assert complexity_used(line, 0.7) == pytest.approx(1.5) and complexity_used(line, 0.35) == pytest.approx(2.75)
    assert complexity_used(line, 0.95) == 1 and complexity_used(line, 0.0) == 5  # clipped to the ends
    assert complexity_used({1: 0.2, 3: 0.8, 4: 0.4}, 0.5) == pytest.approx(
        2
    )  # the first crossing, between the levels there are
    assert complexity_used({}, 0.5) is None


def test_denominators():
    right, parsed = [True, True, False, False, False], [True, True, True, False, False]
    assert accuracy(right, parsed) == 0.4 and accuracy(right, parsed, denominator="parsed") == pytest.approx(2 / 3)
    few = [True] + [False] * 19
    assert accuracy(few, few, denominator="parsed") == 0 and accuracy(few, few) == 0.05  # 5% were parsed
    assert accuracy(right, parsed, denominator="parsed", least_parsed=0.7) == 0
    assert accuracy([False], [False], denominator="parsed", least_parsed=0) == 0
    with pytest.raises(ValueError, match="no answer to count"):
        accuracy([], [])
    with pytest.raises(ValueError, match="denominator='some' is unknown"):
        accuracy(right, parsed, denominator="some")
