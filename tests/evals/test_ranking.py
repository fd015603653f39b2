"""AUROC by its definition over pairs, by ranks of scipy, and its bootstrap over questions."""

import jax
import numpy as np
import pytest
from scipy.stats import rankdata

from jaxmethods.evals import ranking

RNG = np.random.default_rng(0)


def by_pairs(scores, labels):
    first, second = scores[labels][:, None], scores[~labels][None]
    return np.mean((first > second) + 0.5 * (first == second))


@pytest.mark.parametrize("levels", [3, 1000])
def test_auroc_is_the_share_of_pairs_and_the_rank_formula(levels):
    scores, labels = RNG.integers(0, levels, 80).astype(np.float32), RNG.random(80) < 0.3
    ranks, true, false = rankdata(scores), labels.sum(), (~labels).sum()
    by_ranks = (ranks[labels].sum() - true * (true + 1) / 2) / (true * false)
    found = float(ranking.auroc(scores, labels))
    assert found == pytest.approx(by_pairs(scores, labels), abs=1e-6) == pytest.approx(by_ranks, abs=1e-6)
    # Only the order counts; and reversed scores give what is left to 1.
    assert float(ranking.auroc(np.exp(scores / levels), labels)) == pytest.approx(found, abs=1e-6)
    assert float(ranking.auroc(-scores, labels)) == pytest.approx(1 - found, abs=1e-6)


def test_auroc_of_perfect_reversed_and_constant_scores():
    labels = np.array([False, True, False, True])
    of = jax.jit(ranking.auroc)
    assert float(of(labels.astype(np.float32), labels)) == 1
    assert float(of(-labels.astype(np.float32), labels)) == 0
    assert float(of(np.ones(4, np.float32), labels)) == 0.5
    assert np.isnan(of(np.ones(4, np.float32), np.ones(4, bool)))


def test_weights_count_a_row_so_often():
    scores, labels = RNG.integers(0, 9, 30).astype(np.float32), RNG.random(30) < 0.5
    often = RNG.integers(0, 4, 30)
    repeated = by_pairs(np.repeat(scores, often), np.repeat(labels, often))
    assert float(ranking.auroc(scores, labels, often.astype(np.float32))) == pytest.approx(repeated, abs=1e-6)


def test_the_bootstrap_draws_questions_and_pairs_scores():
    labels = np.tile([True, False], 60)
    scores = {
        "good": (labels + RNG.normal(size=120)).astype(np.float32),
        "noise": RNG.normal(size=120).astype(np.float32),
    }
    found = ranking.bootstrap(scores, labels, baseline="noise", resamples=400)
    good = found.auroc["good"]
    assert good.value == pytest.approx(by_pairs(scores["good"], labels), abs=1e-6) and good.low < good.value < good.high
    # The interval is about as wide as Hanley and McNeil's standard error says.
    a, n = good.value, 60
    error = np.sqrt((a * (1 - a) + (n - 1) * ((a / (2 - a) - a**2) + (2 * a**2 / (1 + a) - a**2))) / n**2)
    assert good.high - good.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    assert (
        found.difference["good"].value == pytest.approx(good.value - found.auroc["noise"].value) and found.used == 400
    )
    same = ranking.bootstrap({"a": scores["good"], "b": scores["good"]}, labels, baseline="a", resamples=50)
    assert same.difference["b"] == (0, 0, 0)  # over the same resamples

    # Copies of rows tell nothing new: as one question each they leave the interval, as rows of their own they narrow it.
    twice = lambda x: np.repeat(x, 4)
    width = lambda interval: interval.high - interval.low
    groups = twice(np.arange(120))
    one = ranking.bootstrap({"good": twice(scores["good"])}, twice(labels), groups, resamples=400).auroc["good"]
    own = ranking.bootstrap({"good": twice(scores["good"])}, twice(labels), resamples=400).auroc["good"]
    assert width(one) == pytest.approx(width(good), rel=1e-3) and width(own) < 0.7 * width(one)


def test_what_cannot_be_ranked_is_refused():
    scores, labels = np.array([1.0, 2.0]), np.array([True, False])
    for given, words in (
        ((np.array([1.0, np.nan]), labels), "score 1 is nan"),
        ((scores, labels[:1]), "they must be the same"),
    ):
        with pytest.raises(ValueError, match=words):
            ranking.auroc(*given)
    for options, words in (
        ({"labels": np.ones(2, bool)}, "all 2 labels are True"),
        ({"baseline": "b"}, "baseline='b' is none of the scores a"),
        ({"level": 1.0}, "level=1.0"),
    ):
        with pytest.raises(ValueError, match=words):
            ranking.bootstrap({"a": scores}, **{"labels": labels} | options)
