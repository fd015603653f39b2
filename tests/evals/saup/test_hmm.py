"""The hidden Markov model against enumeration of all paths, against hmmlearn, and by its laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import norm

from jaxmethods.evals import saup
from jaxmethods.evals.saup import hmm, weights

RNG = np.random.default_rng(0)
N, STATES = 5, 3
MASK = np.arange(N) < np.array([[5], [1], [3], [4], [5], [2]])


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def model(mixtures=1, dim=2, states=STATES):
    draw = lambda *shape: RNG.dirichlet(np.ones(shape[-1]), shape[:-1])
    return hmm.CHMM(
        *(jnp.log(jnp.asarray(draw(*shape))) for shape in ((states,), (states, states), (states, mixtures))),
        jnp.asarray(RNG.normal(size=(states, mixtures, dim))), jnp.asarray(RNG.gamma(2.0, size=(states, mixtures, dim))),
    )  # fmt: skip


def drawn(count, steps, means=((0.1, 0.1), (0.5, 0.4), (1.2, 0.9)), size=0.08, stay=0.8):
    """Trajectories of three well separated states: (data, states)."""
    moves = np.full((3, 3), (1 - stay) / 2) + np.eye(3) * (stay - (1 - stay) / 2)
    states = np.zeros((count, steps), int)
    states[:, 0] = RNG.choice(3, count, p=[0.7, 0.2, 0.1])
    for n in range(1, steps):
        states[:, n] = [RNG.choice(3, p=moves[s]) for s in states[:, n - 1]]
    return np.asarray(means)[states] + size * RNG.normal(size=(count, steps, 2)), states


def every_path(params, steps):
    """(path, log p(path, steps)) of all paths, with scipy's densities."""
    initial, moves, mixture, means, variances = (np.asarray(part) for part in params)
    normal = norm.logpdf(steps[:, None, None], means, np.sqrt(variances)).sum(axis=-1)
    emitted = logsumexp(mixture + normal, axis=-1)
    for path in itertools.product(range(len(initial)), repeat=len(steps)):
        moved = sum(moves[a, b] for a, b in itertools.pairwise(path))
        yield path, initial[path[0]] + moved + sum(emitted[n, s] for n, s in enumerate(path))


@pytest.mark.parametrize("mixtures", [1, 2])
def test_recursions_are_enumeration(mixtures):
    params, data = model(mixtures), RNG.normal(size=(len(MASK), N, 2))
    data[~MASK] = np.nan  # whatever stands at padding
    found, best = hmm.posterior(params, data, MASK), np.asarray(hmm.viterbi(params, data, MASK))
    online = np.asarray(hmm.filtered(params, data, MASK))
    for i, length in enumerate(MASK.sum(axis=1)):
        paths, logs = zip(*every_path(params, data[i, :length]), strict=True)
        paths, total = np.array(paths), logsumexp(logs)
        p = np.exp(np.array(logs) - total)
        assert float(found.log_likelihood[i]) == pytest.approx(total, abs=1e-10)
        for n in range(length):
            by_hand = [p[paths[:, n] == s].sum() for s in range(STATES)]
            np.testing.assert_allclose(found.gamma[i, n], by_hand, atol=1e-10)
        for n in range(length - 1):
            pairs = [[p[(paths[:, n] == s) & (paths[:, n + 1] == r)].sum() for r in range(3)] for s in range(3)]
            np.testing.assert_allclose(found.xi[i, n], pairs, atol=1e-10)
        np.testing.assert_array_equal(best[i, :length], paths[np.argmax(logs)])
        np.testing.assert_allclose(online[i, length - 1], found.gamma[i, length - 1], atol=1e-10)  # nothing is later
        assert not np.asarray(found.gamma[i, length:]).any() and not np.asarray(found.xi[i, max(length - 1, 0) :]).any()
    np.testing.assert_allclose(found.gamma.sum(axis=-1), MASK, atol=1e-10)
    np.testing.assert_allclose(found.xi.sum(axis=-1), np.where(MASK[:, 1:, None], found.gamma[:, :-1], 0), atol=1e-10)


def test_padding_changes_no_fit():
    data, _ = drawn(20, N)
    mask = np.arange(N) < RNG.integers(1, N + 1, (20, 1))
    start = hmm.from_kmeans(data, mask)
    fitted = hmm.fit(start, data, mask, iterations=25)
    wide = np.pad(data, ((0, 0), (0, 3), (0, 0)), constant_values=np.nan)
    other = hmm.fit(start, wide, np.pad(mask, ((0, 0), (0, 3))), iterations=25)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), fitted, other)


@pytest.mark.parametrize("mixtures, smoothing", [(1, 0.0), (2, 0.0), (1, 1.0)])
def test_baum_welch_never_decreases(mixtures, smoothing):
    data, _ = drawn(20, N, size=0.4)
    mask = np.arange(N) < RNG.integers(1, N + 1, (20, 1))
    fitted = hmm.fit(model(mixtures), data, mask, iterations=25, tolerance=0.0, smoothing=smoothing)
    gains = np.diff(np.asarray(fitted.objective))
    assert (gains >= -1e-8).all() and gains.max() > 0.1
    if not smoothing:
        np.testing.assert_allclose(fitted.objective, fitted.log_likelihood)


def test_well_separated_states_are_recovered():
    data, states = drawn(120, 8)
    fitted = hmm.fit(hmm.from_kmeans(data), data)
    assert int(fitted.iterations) < 50  # it converged
    np.testing.assert_allclose(fitted.params.means[:, 0], [[0.1, 0.1], [0.5, 0.4], [1.2, 0.9]], rtol=0.1)
    assert (hmm.posterior(fitted.params, data).gamma.argmax(-1) == states).mean() > 0.95
    assert (np.diff(hmm.state_distances(fitted.params)) > 0).all()  # sorted
    np.testing.assert_allclose(np.exp(fitted.params.log_transition).diagonal(), 0.8, atol=0.08)
    by_label = hmm.fit(hmm.from_labels(data, states), data)
    assert float(by_label.log_likelihood[-1]) == pytest.approx(float(fitted.log_likelihood[-1]), rel=1e-3)


def test_the_supervised_start_by_counting():
    data = np.array([[[0.0], [1.0], [9.0]], [[2.0], [7.0], [np.nan]]])
    labels, mask = np.array([[0, 0, 2], [0, -1, 0]]), np.array([[True, True, True], [True, True, False]])
    start = hmm.from_labels(data, labels, mask)
    np.testing.assert_allclose(np.exp(start.log_initial), [3 / 5, 1 / 5, 1 / 5])
    np.testing.assert_allclose(np.exp(start.log_transition), [[2 / 5, 1 / 5, 2 / 5], [1 / 3] * 3, [1 / 3] * 3])
    steps = np.array([0, 1, 9, 2, 7.0])
    np.testing.assert_allclose(start.means[:, 0, 0], [1, steps.mean(), 9])  # no step is in state 1: all are
    np.testing.assert_allclose(start.variances[:, 0, 0], [2 / 3, steps.var(), 1e-4 * steps.var()])
    two = hmm.from_labels(data, np.zeros_like(labels), mask, states=1, mixtures=2)
    np.testing.assert_allclose(two.means[0, :, 0], [1, 8])
    np.testing.assert_allclose(np.exp(two.log_mixture), [[3 / 5, 2 / 5]])


def test_nothing_collapses():
    """Steps that are all but equal, a state that none is in, and trajectories of one step."""
    data, mask = np.full((20, N, 2), np.nan), np.zeros((20, N), bool)
    data[:, 0], mask[:, 0] = np.array([[0.1, 0.0], [0.9, 0.0], [0.5, 0.0], [0.5, 0.0]] * 5), True
    fitted = hmm.fit(hmm.from_labels(data, np.zeros((20, N), int), mask), data, mask, iterations=25)
    assert all(np.isfinite(part).all() for part in fitted.params) and (np.asarray(fitted.params.variances) > 0).all()
    np.testing.assert_allclose(np.exp(fitted.params.log_transition), 1 / 3)  # one step tells of no transition
    one = hmm.fit(hmm.from_kmeans(data, mask, states=1), data, mask, iterations=2)
    made = weights.state_weights(hmm.posterior(one.params, data, mask).gamma, hmm.state_distances(one.params))
    np.testing.assert_allclose(made, np.where(mask, 0.5, 0))  # one state: constant weights


def test_sorting_states_changes_no_likelihood():
    params, data = model(2), RNG.normal(size=(len(MASK), N, 2))
    sorted_ = hmm.sorted_states(params)
    np.testing.assert_allclose(hmm.log_likelihood(sorted_, data, MASK), hmm.log_likelihood(params, data, MASK))
    assert (np.diff(hmm.state_distances(sorted_)) > 0).all()


def test_hmmlearn_agrees():
    """Log-likelihood, posterior, Viterbi path and one step of Baum-Welch with add-one smoothing, of the same parameters."""
    learn = pytest.importorskip("hmmlearn.hmm")
    data, _ = drawn(20, N, size=0.4)
    mask = np.arange(N) < RNG.integers(1, N + 1, (20, 1))
    params, lengths, flat = model(), mask.sum(axis=1), data[mask]
    # Priors of 2 are add-one smoothing; the variance has none, and no floor is reached.
    other = learn.GaussianHMM(
        3, "diag", startprob_prior=2.0, transmat_prior=2.0, covars_prior=0.0, n_iter=1, init_params="", min_covar=0.0
    )
    other.startprob_, other.transmat_ = np.exp(params.log_initial), np.exp(params.log_transition)
    other.means_, other.covars_ = np.asarray(params.means[:, 0]), np.asarray(params.variances[:, 0])
    found = hmm.posterior(params, data, mask)
    assert float(found.log_likelihood.sum()) == pytest.approx(other.score(flat, lengths), rel=1e-8)
    np.testing.assert_allclose(np.asarray(found.gamma)[mask], other.predict_proba(flat, lengths), atol=1e-8)
    np.testing.assert_array_equal(np.asarray(hmm.viterbi(params, data, mask))[mask], other.decode(flat, lengths)[1])
    other.fit(flat, lengths)
    fitted = hmm.fit(params, data, mask, iterations=1, tolerance=0.0).params
    order = np.argsort(other.means_.sum(axis=1))
    np.testing.assert_allclose(np.exp(fitted.log_initial), other.startprob_[order], atol=1e-8)
    np.testing.assert_allclose(np.exp(fitted.log_transition), other.transmat_[order][:, order], atol=1e-8)
    np.testing.assert_allclose(fitted.means[:, 0], other.means_[order], atol=1e-8)
    variances = np.stack([np.diag(c) for c in other.covars_])[order]
    np.testing.assert_allclose(fitted.variances[:, 0], variances, atol=1e-8)


@pytest.mark.parametrize(
    "made, words",
    [
        (lambda: hmm.fit(model(), np.ones((2, 3, 1))), "data has 1 dimensions and the model 2"),
        (lambda: hmm.fit(model(), np.ones((2, 3, 2)), iterations=0), "iterations=0"),
        (lambda: hmm.posterior(model(), np.full((1, 2, 2), np.nan)), "data of trajectory 0, step 0 is nan"),
        (lambda: hmm.posterior(model(), np.ones((1, 2, 2)), np.array([[False, True]])), "false before a step"),
        (lambda: hmm.from_labels(np.ones((1, 2, 2)), np.array([[0, 3]])), "labels has 3; states are 0 to 2"),
        (lambda: hmm.from_labels(np.ones((1, 2, 2)), np.array([[-1, -1]])), "no labelled step"),
        (lambda: hmm.from_labels(np.ones((1, 2, 2)), np.array([[0, 0]]), smoothing=0.0), "smoothing=0.0"),
        (lambda: hmm.from_kmeans(np.ones((3, 2, 2))), "1 different steps for 3 states"),
        (lambda: hmm.observations(np.ones((1, 2)), np.ones((1, 2)), dim=3), "dim=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_fitted_is_refused(made, words):
    with pytest.raises(ValueError, match=words):
        made()


def test_learned_weights_know_nothing_of_their_own_fold():
    """What one question's trajectories are changes the weights of other folds, and not those of another question of its own."""
    rng = np.random.default_rng(0)
    drift, gap = rng.uniform(0, 1, (2, 8, 5))
    mask, groups = np.arange(5) < rng.integers(2, 6, (8, 1)), np.arange(8) // 2
    found = saup.learned_weights(drift, gap, mask, groups, folds=2, iterations=5)
    fold = (np.random.default_rng(0).permutation(4) % 2)[groups]
    other = np.array(drift)
    first = np.flatnonzero(fold == 0)[0]
    other[groups == groups[first]] += 1
    again = saup.learned_weights(other, gap, mask, groups, folds=2, iterations=5)
    beside = (fold == 0) & (groups != groups[first])
    np.testing.assert_array_equal(again[beside], found[beside])
    assert np.any(again[fold == 1] != found[fold == 1]) and not found[~mask].any() and (found[mask] > 0).all()
    with pytest.raises(ValueError, match="no more than the 4 questions"):
        saup.learned_weights(drift, gap, mask, groups, folds=5)
