"""FactTest's rule: its golden ranks, its guarantee by simulation, also under shift, and what it does to a test set."""

import math

import numpy as np
import pytest
from scipy import stats

from jaxmethods.evals import facttest
from jaxmethods.evals.facttest import certify, rank, threshold, violation, violation_rate

# (alpha, delta) -> least n0, and at each n0 (k, v(k)): derived by hand for the method's description, not by this code.
SIZES = (100, 200, 500, 1000, 5000)
GOLDEN = {
    (0.05, 0.01): (90, (100, 0.005921), (197, 0.009048), (487, 0.005508), (966, 0.009304), (4786, 0.009423)),
    (0.05, 0.05): (59, (99, 0.037081), (196, 0.026447), (484, 0.034290), (962, 0.043348), (4776, 0.047204)),
    (0.10, 0.05): (29, (96, 0.023711), (188, 0.032047), (462, 0.039340), (916, 0.048503), (4536, 0.045969)),
    (0.10, 0.01): (44, (97, 0.007836), (190, 0.008071), (466, 0.007920), (922, 0.009867), (4550, 0.009069)),
    (0.20, 0.05): (14, (87, 0.046912), (170, 0.043021), (416, 0.039415), (822, 0.043113), (4047, 0.049450)),
}


@pytest.mark.parametrize(("levels", "expected"), GOLDEN.items())
def test_golden_ranks(levels, expected):
    alpha, delta = levels
    least, *ranks = expected
    for n, (k, v) in zip(SIZES, ranks, strict=True):
        assert rank(n, alpha=alpha, delta=delta) == k
        assert violation(k, n, alpha) == pytest.approx(v, abs=1e-6)
        scores = np.random.default_rng(n).permutation(n).astype(np.float32)  # score i has rank i + 1
        assert threshold(scores, alpha=alpha, delta=delta) == k - 1
        assert certify(scores, k - 1).mean() == (n - k) / n  # Type I on the calibration answers themselves
    assert facttest.least_incorrect(alpha=alpha, delta=delta) == least
    rng = np.random.default_rng(0)
    assert threshold(rng.normal(size=least - 1), alpha=alpha, delta=delta) == math.inf
    assert not certify(np.array([1e300, math.inf]), math.inf).any()
    assert threshold(scores := rng.normal(size=least), alpha=alpha, delta=delta) == scores.max()


def test_v_by_three_routes():
    rng = np.random.default_rng(0)
    for n, alpha in ((1, 0.5), (7, 0.1), (30, 0.05), (30, 0.9)):
        terms = [math.comb(n, j) * (1 - alpha) ** j * alpha ** (n - j) for j in range(n + 1)]
        found = [violation(k, n, alpha) for k in range(n + 2)]
        np.testing.assert_allclose(found, [sum(terms[k:]) for k in range(n + 2)], atol=1e-10)
        assert found[0] == 1 and found[-1] == 0 and (np.diff(found) <= 0).all()
    for n in (1000, 60_000):  # where sums in float32 fail
        for k in rng.integers(int(0.93 * n), int(0.97 * n), 5):
            assert violation(int(k), n, 0.05) == pytest.approx(stats.binom.sf(k - 1, n, 0.95), abs=1e-10)
    k = rank(60_000, alpha=0.05, delta=0.01)
    assert violation(k, 60_000, 0.05) <= 0.01 < violation(k - 1, 60_000, 0.05)


def test_the_rule_is_monotone_and_knows_order_alone():
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(size=300), 1)  # with ties
    grid = (0.02, 0.05, 0.1, 0.2, 0.4)
    for fixed in grid:
        assert (np.diff([threshold(scores, alpha=a, delta=fixed) for a in grid]) <= 0).all()
        assert (np.diff([threshold(scores, alpha=fixed, delta=d) for d in grid]) <= 0).all()
    new = rng.normal(size=50)
    tau = threshold(scores, alpha=0.1, delta=0.05)
    assert threshold(np.exp(scores), alpha=0.1, delta=0.05) == np.exp(tau)
    np.testing.assert_array_equal(certify(np.exp(new), np.exp(tau)), certify(new, tau))
    assert threshold(rng.permutation(scores), alpha=0.1, delta=0.05) == tau
    assert threshold(list(scores.astype(np.float32)), alpha=0.1, delta=0.05) == pytest.approx(tau, abs=1e-6)
    assert certify(new.reshape(5, 10), tau).shape == (5, 10)
    with_infinite = np.r_[scores, np.full(40, -np.inf)]  # answers that no score could be given sort last
    assert math.isfinite(threshold(with_infinite, alpha=0.1, delta=0.05))


@pytest.mark.parametrize(("alpha", "delta", "n"), [(0.1, 0.05, 100), (0.05, 0.05, 59), (0.05, 0.01, 200)])
def test_type_1_exceeds_alpha_as_often_as_v_says(alpha, delta, n):
    """Uniform scores: the true Type I of a threshold t is 1 - t, and the k-th of n has a beta distribution."""
    draws, rng = 100_000, np.random.default_rng(2)
    k = rank(n, alpha=alpha, delta=delta)
    blocks = (np.partition(rng.random((draws // 20, n)), k - 1, axis=1)[:, k - 1] for _ in range(20))
    violated = np.mean([(1 - tau > alpha).mean() for tau in blocks])
    v = violation(k, n, alpha)
    assert abs(violated - v) < 4 * math.sqrt(v / draws) and violated <= delta


def test_split_conformal_and_ties_would_break_it():
    rng = np.random.default_rng(3)
    conformal = 1 - np.partition(rng.random((20_000, 100)), 90, axis=1)[:, 90]  # rank 91 bounds the mean alone
    assert (conformal > 0.1).mean() == pytest.approx(0.451, abs=0.015)

    shares = np.array([0.3, 0.3, 0.2, 0.15, 0.05])
    above = 1 - np.cumsum(shares)  # true Type I of the strict rule at each atom
    k = rank(100, alpha=0.1, delta=0.05)
    drawn = rng.choice(5, p=shares, size=(20_000, 100))
    taus = np.partition(drawn, k - 1, axis=1)[:, k - 1]
    assert all(threshold(row, alpha=0.1, delta=0.05) == tau for row, tau in zip(drawn[:20], taus, strict=False))
    assert (above[taus] > 0.1).sum() == 0
    assert ((above + shares)[taus] > 0.1).mean() == pytest.approx(0.44, abs=0.02)  # with >= instead of >


def test_the_guarantee_over_a_population_of_scores():
    values, shares = [-1.609, -1.332, -1.055, -0.95, -0.673, -0.5, 0], [0.4, 0.2, 0.1, 0.1, 0.1, 0.06, 0.04]
    population = np.random.default_rng(4).choice(values, 3000, p=shares)
    for alpha in (0.02, 0.05, 0.1, 0.3):
        assert violation_rate(population, 300, alpha=alpha, delta=0.05, draws=2000) <= 0.07
    smooth = np.random.default_rng(5).normal(size=200_000)
    v = violation(rank(150, alpha=0.1, delta=0.05), 150, 0.1)
    assert violation_rate(smooth, 150, alpha=0.1, delta=0.05, draws=20_000) == pytest.approx(v, abs=0.006)
    assert violation_rate(smooth, 20, alpha=0.1, delta=0.05) == 0  # too few to certify anything


# Covariate shift


def shifted_violations(draws, *, corrected, seed=6):
    """Source x ~ U[0, 1], target density 2x; a wrong answer's score is x + 0.3 N(0, 1)."""
    rng, found = np.random.default_rng(seed), []
    x = np.sqrt(rng.random(400_000))
    target = np.sort(x + 0.3 * rng.normal(size=x.size))
    for draw in range(draws):
        x = rng.random(200)
        scores = x + 0.3 * rng.normal(size=200)
        if corrected:
            tau = facttest.shifted_threshold(scores, 2 * x, alpha=0.1, delta=0.05, bound=2.0, seed=draw)
        else:
            tau = threshold(scores, alpha=0.1, delta=0.05)
        found.append(1 - np.searchsorted(target, tau, side="right") / target.size > 0.1)
    return np.mean(found)


def test_rejection_restores_the_guarantee_under_shift():
    assert shifted_violations(1500, corrected=False) == pytest.approx(0.61, abs=0.04)
    assert shifted_violations(1500, corrected=True) == pytest.approx(0.03, abs=0.015)


def test_rejection_sampling():
    rng = np.random.default_rng(7)
    x = rng.random(200_000)
    kept = facttest.keep_by_rejection(2 * x, bound=2.0)
    assert kept.mean() == pytest.approx(0.5, abs=0.005)  # E[w] / B
    assert x[kept].mean() == pytest.approx(2 / 3, abs=0.003)
    np.testing.assert_array_equal(kept, facttest.keep_by_rejection(14 * x, bound=14.0))
    assert facttest.keep_by_rejection(np.full(9, 3.0), bound=3.0).all()
    assert facttest.keep_by_rejection(2 * x, bound=1.0)[x > 0.5].all()  # above the bound: always
    assert (kept != facttest.keep_by_rejection(2 * x, bound=2.0, seed=1)).any()
    scores = rng.normal(size=200)
    assert facttest.shifted_threshold(scores, np.ones(200), alpha=0.1, delta=0.05, bound=1.0) == threshold(
        scores, alpha=0.1, delta=0.05
    )
    taus = [facttest.shifted_threshold(scores, x[:200], alpha=0.2, delta=0.05, bound=1.0, seed=s) for s in range(4)]
    assert facttest.shifted_threshold(scores, x[:200], alpha=0.2, delta=0.05, bound=1.0, repeats=4) == max(taus)


def test_learned_density_ratios():
    """Two normals: w(x) = exp(x - 1/2) in the first feature, whatever the others."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(8)
    source, target = rng.normal(size=(8000, 3)), rng.normal([1, 0, 0], size=(4000, 3))
    ratio = facttest.fit_density_ratio(source, target)
    x = rng.normal(size=(2000, 3))
    np.testing.assert_allclose(np.log(ratio(x)), x[:, 0] - 0.5, atol=0.25)
    assert ratio.seen.mean() == pytest.approx(1, abs=0.05)  # E_source[w] = 1
    assert (ratio.seen <= ratio.bound(0.9)).mean() == pytest.approx(0.9, abs=0.001)
    kept = facttest.keep_by_rejection(ratio(x), bound=ratio.bound(0.99))
    assert x[kept].mean(axis=0) == pytest.approx([1, 0, 0], abs=0.15)
    none = facttest.fit_density_ratio(source[:4000], source[4000:])
    assert np.abs(np.log(none(x))).max() < 0.3


# What comes of it


def test_outcome_by_hand():
    scores = np.array([5, 4, 3, 2, 1, 0.0])
    right = np.array([True, False, True, True, False, False])
    found = facttest.measure(scores, right, 2.0, resamples=2000)
    assert (found.answers, found.right, found.certified, found.certified_right) == (6, 3, 3, 2)
    assert found.accuracy_before == 0.5 and found.accuracy_after == 2 / 3 and found.answer_rate == 0.5
    assert found.type_1 == 1 / 3 and found.type_2 == 1 / 3
    assert found.average_precision == pytest.approx((1 / 1 + 2 / 3 + 3 / 4) / 3)
    assert found.numbers()["type_1"] == found.type_1

    none = facttest.measure(scores, right, math.inf, resamples=10)
    assert math.isnan(none.accuracy_after) and none.certified == 0 and none.type_1 == 0 and none.type_2 == 1
    assert none.numbers()["accuracy_after"] is None and none.numbers()["accuracy_interval"] == [None, None]
    every = facttest.measure(scores, np.ones(6, bool), -1.0, resamples=10)
    assert math.isnan(every.type_1) and every.accuracy_after == 1 == every.answer_rate and every.type_2 == 0
    assert math.isnan(facttest.measure(scores, np.zeros(6, bool), 2.0, resamples=10).average_precision)


def test_bootstrap_is_that_of_resampled_answers():
    rng = np.random.default_rng(9)
    told, right = rng.random(80) < 0.4, rng.random(80) < 0.6
    accuracy, type_1 = facttest.bootstrap(told, right, resamples=40_000)
    places = rng.integers(80, size=(40_000, 80))
    of, good = told[places], right[places]
    by_hand = np.quantile((of & good).sum(1) / of.sum(1), [0.025, 0.975])
    np.testing.assert_allclose(accuracy, by_hand, atol=0.012)
    np.testing.assert_allclose(type_1, np.quantile((of & ~good).sum(1) / (~good).sum(1), [0.025, 0.975]), atol=0.012)


def test_average_precision_as_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(10)
    for ties in (0, 1):
        scores, right = np.round(rng.normal(size=200), ties), rng.random(200) < 0.3
        expected = metrics.average_precision_score(right, scores)
        assert facttest.average_precision(scores, right) == pytest.approx(expected, abs=1e-12)


def test_bad_input_has_one_line():
    fine = np.arange(100.0)
    for given, words in (
        ([], "there are no incorrect answers"),
        ([1.0, math.nan, math.nan], r"incorrect_scores\[1\] is nan \(2 of 3 are\)"),
        (np.ones((3, 2)), r"shape \(3, 2\); give one score"),
        (["a"], "must be real numbers"),
        ([[1.0], [1.0, 2.0]], "must be real numbers"),
    ):
        with pytest.raises(ValueError, match=words) as told:
            threshold(given, alpha=0.1, delta=0.05)
        assert "\n" not in str(told.value)
    for levels in ({"alpha": 0, "delta": 0.1}, {"alpha": 1.0, "delta": 0.1}, {"alpha": 0.1, "delta": math.nan}):
        with pytest.raises(ValueError, match="must be above 0 and below 1"):
            threshold(fine, **levels)
    for call, words in (
        (lambda: certify([0.0, math.nan], 1.0), r"scores\[1\] is nan"),
        (lambda: certify(fine, math.nan), "threshold is nan"),
        (lambda: violation(12, 10, 0.1), r"k=12 must be in 0\.\.11"),
        (lambda: facttest.keep_by_rejection([1.0, -1.0], bound=2.0), r"ratios\[1\] is -1"),
        (lambda: facttest.keep_by_rejection([1.0], bound=0.0), "bound=0.0"),
        (lambda: facttest.shifted_threshold(fine, fine[1:], alpha=0.1, delta=0.1, bound=1.0), "one ratio for each score"),
        (lambda: facttest.shifted_threshold(fine, 0 * fine, alpha=0.1, delta=0.1, bound=1.0), "none of 100 wrong answers is kept"),
        (lambda: facttest.measure(fine, fine[1:] > 0, 1.0), "give both for each answer"),
        (lambda: violation_rate([], 5, alpha=0.1, delta=0.1), "at least one of each"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
