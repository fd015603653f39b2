import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import generation

PROBABILITIES = np.array([0.15, 0.5, 0.05, 0.3], np.float32)


def kept(logits, **options) -> list[bool]:
    return np.isfinite(np.asarray(generation.filter_logits(logits, **options))).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 3}, [1, 1, 0, 1]),
        ({"top_k": 9}, [1, 1, 1, 1]),
        ({"top_p": 1e-6}, [0, 1, 0, 0]),
        ({"top_p": 0.49}, [0, 1, 0, 0]),
        ({"top_p": 0.51}, [0, 1, 0, 1]),
        ({"top_p": 0.81}, [1, 1, 0, 1]),
        ({"top_p": 0.96}, [1, 1, 1, 1]),
        ({"top_p": 1.0}, [1, 1, 1, 1]),
        # Among the two that top_k leaves the first has 0.5 / 0.8 = 0.625 of the mass.
        ({"top_k": 2, "top_p": 0.6}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.65}, [0, 1, 0, 1]),
    ],
)
def test_filters_by_hand(options, expected):
    logits = np.log(PROBABILITIES) - 3.0
    assert kept(logits, **options) == [bool(x) for x in expected]
    filtered = np.asarray(generation.filter_logits(logits, **options))
    np.testing.assert_array_equal(filtered[np.isfinite(filtered)], logits[np.isfinite(filtered)])


def test_ties_stay_together_and_minus_infinity_stays_out():
    logits = np.array([1.0, -np.inf, 1.0, -2.0, 1.0], np.float32)
    assert kept(logits, top_k=2) == [True, False, True, False, True]
    assert kept(logits, top_p=0.4) == [True, False, True, False, True]
    assert kept(logits, top_p=1.0) == [True, False, True, True, True]


def test_filters_agree_with_sorting_on_rows_of_both_signs():
    logits = np.random.default_rng(0).normal(size=(3, 4, 50)).astype(np.float32) * 4
    for k, p in ((7, 0.8), (50, 0.3), (1, 0.99)):
        got = np.isfinite(np.asarray(jax.jit(generation.filter_logits)(logits, jnp.int32(k), jnp.float32(p))))
        for row, mask in zip(logits.reshape(-1, 50), got.reshape(-1, 50), strict=True):
            order = np.argsort(-row)[:k]
            share = np.exp(row[order] - row[order[0]])
            share /= share.sum()
            before = np.cumsum(share) - share
            assert set(np.flatnonzero(mask)) == set(order[before < p])


def test_draws_have_the_softmax_distribution():
    logits = np.log(PROBABILITIES)
    draws = 20_000
    rows = np.broadcast_to(logits, (draws, 4))
    for options, weights in (
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"temperature": 1.0, "top_p": 0.7}, PROBABILITIES * (PROBABILITIES >= 0.3)),
    ):
        found = np.bincount(np.asarray(generation.sample(jax.random.key(0), rows, **options)), minlength=4)
        wanted = draws * weights / weights.sum()
        assert not found[wanted == 0].any()
        some = wanted > 0
        # Pearson's statistic exceeds 20 for one seed in 5,000 at three degrees of freedom.
        assert ((found[some] - wanted[some]) ** 2 / wanted[some]).sum() < 20


def test_a_key_for_each_row_makes_rows_independent_and_zero_is_greedy():
    logits = np.random.default_rng(1).normal(size=(5, 30)).astype(np.float32)
    keys = jax.random.split(jax.random.key(2), 5)
    together = generation.sample(keys, logits, 1.3)
    alone = [int(generation.sample(keys[i], logits[i], 1.3)) for i in range(5)]
    assert together.tolist() == alone
    assert generation.sample(keys, logits, 0.0).tolist() == logits.argmax(-1).tolist()
