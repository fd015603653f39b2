"""Preference losses against float64 numpy by another form, their laws, and margins far beyond any that training meets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import losses
from jaxmethods.losses import PairLogps

RNG = np.random.default_rng(0)
POLICY = PairLogps(*RNG.uniform(-80, -2, (2, 64)).astype(np.float32))
REFERENCE = PairLogps(*RNG.uniform(-80, -2, (2, 64)).astype(np.float32))
LENGTHS = PairLogps(*RNG.integers(1, 40, (2, 64)))
DESIRABLE = RNG.random(64) < 0.6

KINDS = {
    "dpo": lambda p, r: losses.dpo_loss(p, r, beta=0.3),
    "cdpo": lambda p, r: losses.dpo_loss(p, r, beta=0.3, label_smoothing=0.2),
    "robust": lambda p, r: losses.robust_dpo_loss(p, r, beta=0.3, label_smoothing=0.2),
    "ipo": lambda p, r: losses.ipo_loss(p, r, beta=0.3),
    "ipo_means": lambda p, r: losses.ipo_loss(p, r, beta=0.3, lengths=LENGTHS),
    "hinge": lambda p, r: losses.hinge_loss(p, r, beta=0.3),
    "simpo": lambda p, r: losses.simpo_loss(p, LENGTHS, beta=2.5, gamma=1.4),
    "cpo": lambda p, r: losses.cpo_loss(p, beta=0.3),
    "orpo": lambda p, r: losses.orpo_loss(p, LENGTHS, beta=0.3),
}  # fmt: skip


def by_hand(kind, policy, reference):
    """In float64, from probabilities where the library has logits."""
    p, r = (PairLogps(*(np.asarray(x, np.float64) for x in pair)) for pair in (policy, reference))
    means = lambda pair: PairLogps(pair.chosen / LENGTHS.chosen, pair.rejected / LENGTHS.rejected)
    prefers = lambda x: 1 / (1 + np.exp(-x))  # the Bradley-Terry probability
    ratio = np.exp(0.3 * (p.chosen - p.rejected)) / np.exp(0.3 * (r.chosen - r.rejected))
    if kind in ("dpo", "cdpo", "robust"):
        clean, flipped = np.log(1 + 1 / ratio), np.log(1 + ratio)  # the winner's probability is ratio / (1 + ratio)
        return {"dpo": clean, "cdpo": 0.8 * clean + 0.2 * flipped, "robust": (0.8 * clean - 0.2 * flipped) / 0.6}[kind]
    margin = np.log(ratio) / 0.3
    if kind == "ipo":
        return margin**2 - margin / 0.3 + 1 / (4 * 0.3**2)
    if kind == "ipo_means":
        p, r = means(p), means(r)
        return ((p.chosen - p.rejected) - (r.chosen - r.rejected) - 1 / 0.6) ** 2
    if kind == "hinge":
        return np.where(0.3 * margin < 1, 1 - 0.3 * margin, 0)
    if kind == "simpo":
        p = means(p)
        return -np.log(prefers(2.5 * p.chosen - 2.5 * p.rejected - 1.4))
    if kind == "cpo":
        return np.log1p(np.exp(p.rejected - p.chosen) ** 0.3)
    odds = PairLogps(*(np.exp(x) / (1 - np.exp(x)) for x in means(p)))
    return -0.3 * np.log(odds.chosen / (odds.chosen + odds.rejected))


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand(kind):
    got = KINDS[kind](POLICY, REFERENCE)
    assert got.dtype == jnp.float32 and got.shape == (64,)
    np.testing.assert_allclose(got, by_hand(kind, POLICY, REFERENCE), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_differences(kind):
    """Central differences of the float64 form, in both answers' log-probabilities."""
    gradient = jax.grad(lambda p: KINDS[kind](p, REFERENCE).sum())(POLICY)
    step = 1e-5
    for name in ("chosen", "rejected"):
        moved = [
            by_hand(kind, POLICY._replace(**{name: getattr(POLICY, name).astype(np.float64) + sign}), REFERENCE)
            for sign in (step, -step)
        ]
        numeric = (moved[0] - moved[1]) / (2 * step)
        np.testing.assert_allclose(getattr(gradient, name), numeric, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 1.0, 1e3, 1e8])
def test_extreme_margins_are_finite(kind, size):
    """Also an answer that is certain (log p = 0), whose odds are infinite."""
    zero = np.zeros(64, np.float32)
    for policy in (PairLogps(zero, zero - size), PairLogps(zero - size, zero)):
        value, gradient = jax.value_and_grad(lambda p: KINDS[kind](p, PairLogps(zero, zero)).sum())(policy)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in gradient), (kind, size)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_stands_alone_and_its_loss_falls_with_its_margin(kind):
    order = RNG.permutation(64)
    whole = KINDS[kind](POLICY, REFERENCE)
    if kind not in ("ipo_means", "simpo", "orpo"):  # whose lengths would have to move too
        shuffled = KINDS[kind](*(PairLogps(pair.chosen[order], pair.rejected[order]) for pair in (POLICY, REFERENCE)))
        np.testing.assert_array_equal(shuffled, whole[order])
    slope = jax.grad(lambda p: KINDS[kind](p, REFERENCE).sum())(REFERENCE)  # no margin
    assert (np.asarray(slope.chosen) < 0).all() and (np.asarray(slope.rejected) > 0).all()


def test_no_margin():
    told = {kind: np.asarray(KINDS[kind](REFERENCE, REFERENCE)) for kind in KINDS}
    for kind in ("dpo", "cdpo", "robust"):
        np.testing.assert_allclose(told[kind], np.log(2), rtol=1e-6)
    np.testing.assert_allclose(told["hinge"], 1)
    np.testing.assert_allclose(told["ipo"], 1 / 0.36, rtol=1e-6)


def test_label_smoothing():
    """0 is DPO, 1 is DPO of the swapped pair, a value a pair is each pair's own; the minimum is at log((1 - e) / e)."""
    swap = lambda pair: PairLogps(pair.rejected, pair.chosen)
    smoothed = lambda e: np.asarray(losses.dpo_loss(POLICY, REFERENCE, beta=0.3, label_smoothing=e))
    np.testing.assert_allclose(
        smoothed(1.0), losses.dpo_loss(swap(POLICY), swap(REFERENCE), beta=0.3), rtol=1e-5, atol=1e-5
    )
    each = RNG.random(64).astype(np.float32)
    np.testing.assert_allclose(smoothed(each), [smoothed(e)[i] for i, e in enumerate(each)], rtol=1e-6)
    zero = np.zeros(1, np.float32)
    of_margin = lambda m: losses.dpo_loss(
        PairLogps(m[None], zero), PairLogps(zero, zero), beta=0.5, label_smoothing=0.2
    )[0]
    assert abs(jax.grad(of_margin)(jnp.float32(np.log(4) / 0.5))) < 1e-7


def test_robust_is_unbiased():
    """Its mean over labels that are wrong with probability e is the DPO loss of the right ones."""
    e = 0.3
    swap = lambda pair: PairLogps(pair.rejected, pair.chosen)
    right, wrong = (
        losses.robust_dpo_loss(side(POLICY), side(REFERENCE), beta=0.3, label_smoothing=e)
        for side in (lambda x: x, swap)
    )
    np.testing.assert_allclose(
        (1 - e) * right + e * wrong, losses.dpo_loss(POLICY, REFERENCE, beta=0.3), rtol=1e-4, atol=1e-4
    )


def test_kto_by_hand():
    logps, reference = (x.astype(np.float64) for x in (POLICY.chosen, REFERENCE.chosen))
    kl = losses.kto_kl(POLICY.rejected, REFERENCE.rejected - 10)
    np.testing.assert_allclose(kl, np.mean(POLICY.rejected.astype(np.float64) - REFERENCE.rejected + 10), rtol=1e-5)
    assert losses.kto_kl(POLICY.rejected, POLICY.rejected + 1) == 0
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    got = losses.kto_loss(POLICY.chosen, REFERENCE.chosen, DESIRABLE, kl=kl, beta=0.2, **weights)
    gain = logps - reference - float(kl)
    expected = np.where(DESIRABLE, 1.5 / (1 + np.exp(0.2 * gain)), 0.7 / (1 + np.exp(-0.2 * gain)))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)

    slopes, through_kl = jax.grad(
        lambda x, kl: losses.kto_loss(x, REFERENCE.chosen, DESIRABLE, kl=kl, **weights).sum(), (0, 1)
    )(POLICY.chosen, kl)
    assert through_kl == 0 and np.array_equal(np.sign(slopes), np.where(DESIRABLE, -1, 1))
    for size in (1e3, 1e8):
        told = losses.kto_loss(POLICY.chosen - size, REFERENCE.chosen, DESIRABLE, kl=0.0)
        np.testing.assert_allclose(told, DESIRABLE.astype(np.float32), atol=1e-6)


def test_half_precision_is_read_in_float32():
    half = PairLogps(*(jnp.asarray(x, jnp.bfloat16) for x in POLICY))
    got = losses.dpo_loss(half, REFERENCE)
    full = losses.dpo_loss(PairLogps(*(np.asarray(x, np.float32) for x in half)), REFERENCE)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, full)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: losses.dpo_loss(POLICY, REFERENCE, beta=0), "beta=0 must be positive"),
        (lambda: losses.kto_loss(*POLICY, DESIRABLE, kl=0.0, beta=-1), "beta=-1 must be positive"),
        (lambda: losses.dpo_loss(POLICY, REFERENCE, label_smoothing=1.2), "label_smoothing=1.2 must be between 0 and 1"),
        (lambda: losses.robust_dpo_loss(POLICY, REFERENCE, label_smoothing=0.5), r"label_smoothing=0.5 must be in \[0, 0.5\)"),
    ],
)  # fmt: skip
def test_bad_options(call, said):
    with pytest.raises(ValueError, match=said):
        call()
