"""SAUP's equation and its laws; uncertainties of steps; weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import gmean

from jaxmethods.evals import ranking, saup
from jaxmethods.evals.saup import uncertainty as of_step
from jaxmethods.evals.saup import weights

RNG = np.random.default_rng(0)
MASK = np.arange(6) < np.array([[6], [1], [3], [4]])
U = np.where(MASK, RNG.gamma(2.0, size=MASK.shape), np.nan)
W = np.where(MASK, RNG.gamma(1.0, size=MASK.shape), np.inf)
rows = lambda *arrays: [tuple(a[i, MASK[i]][None] for a in arrays) for i in range(len(MASK))]
close = lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=2e-6, atol=1e-6)


def test_published_and_hand_worked_numbers():
    close(saup.propagate(np.array([[1, 2, 2]]), np.ones((1, 3), int)), 3**0.5)
    close(saup.propagate(np.array([[0.5, 2, 1]]), np.array([[2, 0.5, 1]])), 1)
    close(saup.propagate(np.array([[3.0]]), np.array([[0.5]])), 1.5)
    close(
        saup.propagate(np.array([[1e30, 1e30]], np.float32), np.ones((1, 2), np.float32)), 1e30
    )  # no square overflows


def test_padding_changes_nothing_and_each_is_numpy():
    close(saup.propagate(U, W, MASK), [np.sqrt(np.mean((u * w) ** 2)) for u, w in rows(U, W)])
    close(saup.arithmetic_mean(U, MASK), [u.mean() for (u,) in rows(U)])
    close(saup.geometric_mean(U, MASK), [gmean(u[0]) for (u,) in rows(U)])
    close(saup.last_step(U, MASK), [u[0, -1] for (u,) in rows(U)])
    close(jax.jit(saup.propagate)(U, W, MASK), saup.propagate(U, W, MASK))


def test_laws_of_propagation():
    u, w = RNG.gamma(2.0, size=(5, 7)), RNG.gamma(2.0, size=(5, 7))
    score, order = saup.propagate(u, w), RNG.permutation(7)
    close(saup.propagate(u, np.full_like(u, 2.5)), 2.5 * np.sqrt((u**2).mean(axis=1)))
    close(saup.propagate(3 * u, w), 3 * score)
    close(saup.propagate(u, 3 * w), 3 * score)
    close(saup.propagate(u[:, order], w[:, order]), score)
    close(saup.propagate(np.tile(u, 2), np.tile(w, 2)), score)
    zero = lambda x: np.pad(x, ((0, 0), (0, 1)))
    close(saup.propagate(zero(u), zero(w) + 1), saup.propagate(u, w + 1) * np.sqrt(7 / 8))  # a confident step dilutes
    assert (np.abs(w * u).min(axis=1) <= score).all() and (score <= np.abs(w * u).max(axis=1)).all()
    assert (saup.propagate(u + 0.1 * np.eye(5, 7), w) > score).all()
    rms, mean, geometric = saup.propagate(u, np.ones_like(u)), saup.arithmetic_mean(u), saup.geometric_mean(u)
    assert (rms > mean).all() and (mean > geometric).all()
    flat = np.full((1, 4), 0.7)
    close([saup.arithmetic_mean(flat)[0], saup.geometric_mean(flat)[0]], [0.7, 0.7])
    assert float(saup.propagate(u[:1], np.zeros((1, 7)))[0]) == 0  # where nothing drifts nothing is told: hence `bias`


def test_gradients_are_finite_and_0_at_padding():
    total = lambda u, w: saup.propagate(u, w, jnp.asarray(MASK)).sum()
    for grad in jax.grad(total, (0, 1))(U, W):
        assert not np.asarray(grad)[~MASK].any() and (np.asarray(grad)[MASK] > 0).all()
    zero = jax.grad(lambda u: saup.propagate(u, np.ones((1, 2))).sum())(jnp.zeros((1, 2)))
    assert not np.asarray(zero).any()
    for mean in (saup.arithmetic_mean, saup.geometric_mean, saup.last_step):
        grad = np.asarray(jax.grad(lambda u, mean=mean: mean(u, MASK).sum())(jnp.asarray(U)))
        assert not grad[~MASK].any() and np.isfinite(grad).all()


@pytest.mark.parametrize(
    "given, words",
    [
        ((np.zeros((1, 0)), np.zeros((1, 0))), r"uncertainty has shape \(1, 0\)"),
        ((np.ones((2, 2)), np.ones((2, 2)), np.array([[True, True], [False, False]])), "trajectory 1 has no step"),
        ((np.array([[1, np.nan]]), np.ones((1, 2))), "uncertainty of trajectory 0, step 1 is nan"),
        ((np.array([[1.0, -2.0]]), np.ones((1, 2))), "step 1 is -2.0; it must be finite and at least 0"),
        ((np.ones((1, 2)), np.array([[np.inf, 1]])), "weight of trajectory 0, step 0 is inf"),
        ((np.ones((1, 2)), np.ones((1, 3))), r"weight has shape \(1, 3\); it must be \(1, 2\), as uncertainty"),
    ],
)
def test_what_has_no_score_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        saup.propagate(*given)


def test_step_uncertainties_by_hand():
    logps = np.log(np.array([[0.5, 0.25, 0.9, 0.1, 0.8, 1.0]], np.float32))
    step, part = np.array([[0, 0, 0, 0, 1, 1]]), np.array([[1, 2, 2, 0, 2, 2]])
    sums = of_step.sum_by_step(logps, step, part, 3)
    first, action = np.log(2), -np.log(0.25 * 0.9)
    close(saup.step_uncertainty(sums)[0], [(first + action) / 3, -np.log(0.8) / 2, np.nan])
    close(saup.step_uncertainty(sums, mode="sum")[0], [first + action / 2, -np.log(0.8) / 2, np.nan])
    close(of_step.likelihood(sums)[0], [first + action, -np.log(0.8), 0])
    np.testing.assert_array_equal(sums.thought_tokens, [[1, 0, 0]])
    with pytest.raises(ValueError, match="mode"):
        saup.step_uncertainty(sums, mode="mean")


def test_certain_and_uniform_tokens():
    step = np.zeros((1, 5), int)
    part = np.array([[1, 1, 2, 2, 2]])
    of = lambda p: of_step.sum_by_step(np.full((1, 5), np.log(p), np.float32), step, part, 1)
    assert float(saup.step_uncertainty(of(1.0))[0, 0]) == 0
    close(saup.step_uncertainty(of(1 / 50))[0], np.log(50))
    close(saup.step_uncertainty(of(1 / 50), mode="sum")[0], 2 * np.log(50))  # both parts have the same mean


def test_uncertainties_of_single_answers():
    logps = np.log(np.array([[0.5, 0.25, 0.25, 0.9]], np.float32))
    there = np.array([[True, True, True, False]])
    close(of_step.predictive_entropy(logps, there), -np.log([0.5 * 0.25 * 0.25]) / 3)
    close(of_step.semantic_entropy(logps, np.array([[0, 1, 1, 0]]), there), [np.log(2)])
    close(of_step.semantic_entropy(logps, np.zeros((1, 4), int), there), [0])
    close(of_step.semantic_entropy(logps, np.array([[0, 1, 2, 3]]), there), [1.5 * np.log(2)])
    close(of_step.p_true(np.log([0.3])), 0.7)
    close(of_step.p_true(np.log([0.3]), np.log([0.1])), 0.25)
    assert of_step.meanings(["4", "four", "4", "5"], lambda a, b: a == b or {a, b} == {"4", "four"}) == [0, 0, 0, 1]
    assert of_step.meanings(["animal", "cat"], lambda a, b: b == "animal" or a == b) == [0, 1]  # in one direction alone


def test_weights_by_hand():
    drift, gap = np.array([[0.2, 0.4, 9.0]]), np.array([[0.3, 0.0, 9.0]])
    mask = np.array([[True, True, False]])
    close(saup.distance_weights(drift, gap, mask), [[0.5, 0.4, 0]])
    close(saup.distance_weights(drift, gap, mask, bias=1.0), [[1.5, 1.4, 0]])
    close(saup.position_weights(mask), [[0.5, 1, 0]])
    close(saup.hybrid_weights(drift, gap, mask), [[0.75, 0.9, 0]])
    close(saup.hybrid_weights(drift, gap, mask, rho=1.0), saup.position_weights(mask))
    close(saup.hybrid_weights(0 * drift, 0 * gap, mask, rho=0.0), [[0, 0, 0]])
    with pytest.raises(ValueError, match="rho=2"):
        saup.hybrid_weights(drift, gap, rho=2)


def test_state_weights_are_between_the_states():
    values = np.array([0.1, 0.5, 2.0])
    gamma = RNG.dirichlet(np.ones(3), (4, 6))
    made = np.asarray(saup.state_weights(gamma, values))
    assert (made >= 0.1).all() and (made <= 2).all()
    close(saup.state_weights(weights.one_hot(np.array([[2, 0]]), 3), values), [[2.0, 0.1]])


def test_drifting_early_steps_are_seen_by_all_of_saup_alone():
    """Wrong trajectories have one drifting, uncertain early step and a last step as confident as right ones."""
    rng, count, steps = np.random.default_rng(1), 800, 6
    wrong = rng.random(count) < 0.5
    u, d = rng.gamma(4.0, 0.1, (count, steps)), rng.gamma(4.0, 0.05, (count, steps))
    at = rng.integers(0, steps - 1, count)
    u[np.arange(count), at] += wrong * rng.gamma(4.0, 0.05, count)
    d[np.arange(count), at] += wrong * rng.gamma(4.0, 0.1, count)
    of = lambda scores: float(ranking.auroc(scores, wrong))
    last, rms = of(saup.last_step(u)), of(saup.propagate(u, np.ones_like(u)))
    weighted = of(saup.propagate(u, saup.distance_weights(d, np.zeros_like(d))))
    assert abs(last - 0.5) < 0.06 and rms > last + 0.05 and weighted > rms + 0.05
