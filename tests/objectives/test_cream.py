"""CREAM's agreement of rankings against scipy and by hand, its pairs, and its soft-label loss against the paper's two forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from jaxmethods import losses
from jaxmethods.losses import PairLogps
from jaxmethods.objectives import CREAM, cream

RNG = np.random.default_rng(0)
ONE, TWO = RNG.normal(size=(2, 40, 5)).astype(np.float32)
MEASURES = ("kendall", "spearman", "top_order")
ZERO = jnp.zeros(())


def margin_loss(m, c, beta=1.0):
    pair = lambda x: PairLogps(jnp.asarray(x)[None], ZERO[None])
    return cream.loss(pair(m), pair(0.0), consistency=c, beta=beta)[0]


def test_rank_correlations_are_scipys():
    kendall = [scipy.stats.kendalltau(a, b).statistic for a, b in zip(ONE, TWO, strict=True)]
    np.testing.assert_allclose(cream.consistency(ONE, TWO), (np.array(kendall) + 1) / 2, atol=1e-6)
    tied = np.round(ONE)
    tied[:, 0] = 9
    for a in (ONE, tied):
        spearman = [scipy.stats.spearmanr(x, y).statistic for x, y in zip(a, TWO, strict=True)]
        np.testing.assert_allclose(
            cream.consistency(a, TWO, measure="spearman"), (np.array(spearman) + 1) / 2, atol=1e-6
        )
    alone = cream.consistency(np.zeros((1, 5)), TWO[:1], measure="spearman")  # ties alone agree with nothing
    assert alone == 0.5


def test_kendall_by_hand_with_ties():
    """The formula of the paper, pair by pair: ties count for neither order."""
    one, two = np.round(ONE), np.round(TWO)
    for a, b, got in zip(one, two, cream.consistency(one, two), strict=True):
        signs = [np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in itertools.combinations(range(5), 2)]
        assert np.isclose(got, (sum(signs) / 10 + 1) / 2)


@pytest.mark.parametrize("measure", MEASURES)
def test_laws(measure):
    of = lambda a, b: np.asarray(cream.consistency(a, b, measure=measure))
    value, order = of(ONE, TWO), RNG.permutation(5)
    np.testing.assert_allclose(of(ONE, ONE), 1)
    np.testing.assert_allclose(of(ONE, -ONE), 0, atol=1e-6)
    np.testing.assert_allclose(of(TWO, ONE), value, atol=1e-6)
    np.testing.assert_allclose(of(ONE[:, order], TWO[:, order]), value, atol=1e-6)
    np.testing.assert_allclose(of(np.exp(ONE), 3 * TWO - 1), value, atol=1e-6)
    traced = jax.jit(lambda a, b: cream.consistency(a, b, measure=measure))(ONE, TWO)
    np.testing.assert_allclose(traced, value, atol=1e-6)
    rows = jax.vmap(lambda a, b: cream.consistency(a[None], b[None], measure=measure)[0])(ONE, TWO)
    np.testing.assert_allclose(rows, value, atol=1e-6)
    if measure == "kendall":
        np.testing.assert_allclose(value * 10, np.round(value * 10), atol=1e-5)
        swapped = np.sort(ONE, axis=1)
        swapped[:, [1, 2]] = swapped[:, [2, 1]]
        np.testing.assert_allclose(of(np.sort(ONE, axis=1), swapped), 1 - 0.5 * 4 / 20, atol=1e-6)
        many = np.random.default_rng(1).normal(size=(2, 20_000, 5))
        assert abs(of(*many).mean() - 0.5) < 0.01


def test_top_order_is_the_definition_and_not_the_released_codes():
    one = np.array([[3, 1, 2, 0], [0, 1, 2, 3], [5, 1, 1, 0]])
    two = np.array([[9, 2, 1, 0], [1, 0, 2, 3], [5, 0, 0, 1]])
    np.testing.assert_array_equal(cream.consistency(one, two, measure="top_order"), [1, 0, 0])


def test_pairs():
    rewards = np.array([[1.0, 3.0, 2.0], [4.0, 4.0, 4.0], [2.0, np.nan, 1.0], [0.0, -1.0, -1.0]])
    best, worst, keep = cream.select_pairs(rewards)
    np.testing.assert_array_equal(keep, [True, False, False, True])
    np.testing.assert_array_equal(best[keep], [1, 0])
    np.testing.assert_array_equal(worst[keep], [0, 1])
    best, worst, keep = cream.select_pairs(ONE)
    rows = np.arange(40)
    assert keep.all() and (ONE[rows, best] == ONE.max(1)).all() and (ONE[rows, worst] == ONE.min(1)).all()


def test_rewards_of_round_one_take_the_likelihood():
    logps, start, lengths = -20 * RNG.random((3, 4, 5))
    np.testing.assert_allclose(cream.intrinsic_rewards(logps, start), logps - start, rtol=1e-5)
    assert not np.asarray(cream.intrinsic_rewards(start, start)).any()
    lengths = RNG.integers(1, 9, (4, 5))
    np.testing.assert_allclose(cream.intrinsic_rewards(start, start, lengths), start / lengths, rtol=1e-5)


def test_soft_labels_are_the_papers_two_forms():
    """As two cross entropies; and (1 + 2 l) times it is DPO with its regulariser, l the regulariser's weight."""
    for m, c in itertools.product((-3.0, -0.2, 0.0, 1.7), (0.0, 0.3, 0.5, 1.0)):
        sigmoid = 1 / (1 + np.exp(-m))
        by_hand = -c * np.log(sigmoid) - (1 - c) * np.log(1 - sigmoid)
        np.testing.assert_allclose(margin_loss(m, c), by_hand, rtol=1e-5)
        np.testing.assert_allclose(margin_loss(m, c), -np.log(sigmoid) + (1 - c) * m, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(margin_loss(m, c), margin_loss(-m, 1 - c), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(margin_loss)(m, c), sigmoid - c, atol=1e-6)
        for weight in (0.1, 2.0):
            regular = -np.log(sigmoid) - np.log(1 - sigmoid)
            soft = margin_loss(m, (1 + weight) / (1 + 2 * weight))
            np.testing.assert_allclose((1 + 2 * weight) * soft, -np.log(sigmoid) + weight * regular, rtol=1e-5)
    for c in (0.2, 0.9):  # the least is the entropy of the label, where the margin is its logit
        logit = np.log(c / (1 - c))
        np.testing.assert_allclose(margin_loss(logit, c), -c * np.log(c) - (1 - c) * np.log(1 - c), rtol=1e-5)
        np.testing.assert_allclose(jax.grad(margin_loss)(logit, c), 0, atol=1e-6)


def test_full_consistency_is_dpo():
    policy, reference = (PairLogps(*RNG.uniform(-30, -1, (2, 8)).astype(np.float32)) for _ in range(2))
    swap = lambda pair: PairLogps(pair.rejected, pair.chosen)
    of = lambda c: cream.loss(policy, reference, consistency=c, beta=0.3)
    np.testing.assert_array_equal(of(1.0), losses.dpo_loss(policy, reference, beta=0.3))
    np.testing.assert_allclose(
        of(np.zeros(8)), losses.dpo_loss(swap(policy), swap(reference), beta=0.3), rtol=1e-5, atol=1e-6
    )


def test_the_objectives_rates():
    rates = np.array([0.1, 0.5, 0.9, 0.9])
    of = lambda **options: CREAM(**options).numbers()["consistency"].of_all(rates)
    np.testing.assert_allclose(of(), 0.6)
    np.testing.assert_allclose(of(scope="prompt"), rates)
    np.testing.assert_allclose(of(scope="prompt", clamp=True), [0.5, 0.5, 0.9, 0.9])
    assert CREAM(rate="c").numbers()["consistency"].field == "c"
    with pytest.raises(ValueError, match=r"a consistency of 1\.2 is above 1"):
        CREAM().numbers()["consistency"].of_all(np.array([0.2, 1.2]))
    with pytest.raises(ValueError, match="scope='all' is unknown"):
        CREAM(scope="all")
    with pytest.raises(ValueError, match="each row's consistency decides it"):
        CREAM(label_smoothing=0.1)


def test_refuses():
    with pytest.raises(ValueError, match="measure='kendal' is unknown; did you mean 'kendall'"):
        cream.consistency(ONE, TWO, measure="kendal")
    with pytest.raises(ValueError, match=r"rewards have shape \(40, 5\) and previous_rewards \(40, 4\)"):
        cream.consistency(ONE, TWO[:, :4])
    with pytest.raises(ValueError, match=r"two or more"):
        cream.consistency(ONE[:, :1], TWO[:, :1])
