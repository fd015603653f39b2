"""MMedPO's weights, noise and loss: by hand, against what the paper's numbers imply, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import losses
from jaxmethods.losses import PairLogps
from jaxmethods.models.vision import MEAN_AND_STD
from jaxmethods.objectives import MMedPO, mmedpo

RNG = np.random.default_rng(0)
POLICY, REFERENCE = (PairLogps(*RNG.uniform(-40, -2, (2, 16)).astype(np.float32)) for _ in range(2))
SCORES = np.round(RNG.random(200), 1)


def test_weights_by_hand():
    """Standardised to mean 1 and variance 0.1, then clipped: the released scores' own moments give the documented values."""
    mean, std = SCORES.mean(), SCORES.std()
    expected = [min(max(1 + 0.1**0.5 * (s - mean) / std, 0.75), 1.25) for s in SCORES]
    np.testing.assert_allclose(mmedpo.relevance_weights(SCORES), expected, rtol=1e-5)
    np.testing.assert_array_equal(mmedpo.relevance_weights(SCORES, mode="literal"), 0.75)
    np.testing.assert_allclose(mmedpo.relevance_weights(SCORES, mode="raw"), SCORES)


def test_released_scores_map_to_documented_weights():
    """Scores with the released SLAKE file's mean 0.721 and deviation 0.320: 0.2, 0.7, 0.8, 1.0 -> 0.75, 0.98, 1.08, 1.25."""
    pair = np.sqrt(2) * np.array([1.0, -1.0])  # together with the asked ones these fix mean and deviation
    asked = np.array([0.2, 0.7, 0.8, 1.0])
    others = np.tile(0.721 + 0.320 * pair / np.sqrt(2), 5000)  # so many that the asked ones hardly move them
    got = mmedpo.relevance_weights(np.concatenate([asked, others]))[:4]
    np.testing.assert_allclose(got, [0.75, 0.98, 1.08, 1.25], atol=6e-3)


def test_weight_laws():
    weights = np.asarray(mmedpo.relevance_weights(SCORES))
    assert weights.min() >= 0.75 and weights.max() <= 1.25 and np.isclose(np.median(weights), 1, atol=0.2)
    assert (np.diff(weights[np.argsort(SCORES)]) >= 0).all()
    np.testing.assert_allclose(mmedpo.relevance_weights(3 * SCORES - 7), weights, rtol=1e-4)
    for constant in (0.0, 0.3, -2.0):
        np.testing.assert_array_equal(mmedpo.relevance_weights(np.full(9, constant)), 1)
    with pytest.raises(ValueError, match="mode='moments' is unknown"):
        mmedpo.relevance_weights(SCORES, mode="moments")


def calls(*judges):
    """Judges that count how often they were asked."""
    count = [0]

    def counted(judge):
        def asked(answer, previous):
            count[0] += 1
            return judge(answer, previous)

        return asked

    return [counted(judge) for judge in judges], count


AGREES = lambda answer, previous: previous
ALWAYS = lambda score: lambda answer, previous: score


def test_a_debate_of_one_mind_asks_each_judge_once():
    judges, count = calls(ALWAYS(0.7), AGREES, AGREES)
    assert mmedpo.debate(judges, "an answer") == (0.7, True, (0.7, 0.7, 0.7)) and count == [3]


def test_a_debate_without_end_is_the_mean_of_all_that_was_said():
    judges, count = calls(ALWAYS(0.2), ALWAYS(0.4), ALWAYS(0.9))
    score, agreed, history = mmedpo.debate(judges, "an answer", rounds=5)
    assert score == pytest.approx(0.5) and not agreed and history == (0.2, 0.4, 0.9) * 5 and count == [15]


def test_a_debate_ends_in_the_round_that_agrees():
    """The first judge is won over in the second round."""
    first = lambda answer, previous: 0.9 if previous is None else previous
    assert mmedpo.debate([first, ALWAYS(0.3), AGREES], "x") == (0.3, True, (0.9, 0.3, 0.3, 0.3, 0.3, 0.3))
    heard = []
    mmedpo.debate([lambda answer, previous: heard.append((answer, previous)) or 0.5], "x")
    assert heard == [("x", None)]


def test_a_judge_without_a_score_is_passed_over():
    silent = lambda answer, previous: None
    assert mmedpo.debate([silent, ALWAYS(0.6), AGREES], "x") == (0.6, True, (0.6, 0.6))
    assert mmedpo.debate([silent, silent], "x") == (None, False, ())
    for score in (1.2, -0.1, float("nan")):
        with pytest.raises(ValueError, match="judge 2 gave the score"):
            mmedpo.debate([ALWAYS(0.5), ALWAYS(score)], "x")
    for judges, rounds in (([], 5), ([AGREES], 0)):
        with pytest.raises(ValueError, match="has nothing to say"):
            mmedpo.debate(judges, "x", rounds=rounds)


def test_schedule_is_the_documented_one():
    rates = mmedpo.signal_rates()
    told = {0: 1.0000, 100: 0.998, 300: 0.981, 500: 0.863, 700: 0.593, 900: 0.365, 999: 0.285}
    np.testing.assert_allclose(rates[list(told)], list(told.values()), atol=6e-4)
    assert (np.diff(rates) < 0).all() and rates.shape == (1000,)


@pytest.mark.parametrize("step", [0, 500, 999])
def test_noise_moments_inside_and_not_a_bit_outside(step):
    image = jnp.asarray(RNG.normal(size=(64, 64, 3)), jnp.float32)
    heat = np.zeros((64, 64))
    heat[10:50, 5:60] = 1
    keys = jax.random.split(jax.random.key(0), 64)
    noised = jax.jit(jax.vmap(lambda key: mmedpo.noise_lesion(image, heat, step, key)))(keys)
    np.testing.assert_array_equal(noised[:, heat == 0], np.broadcast_to(image[heat == 0], noised[:, heat == 0].shape))
    signal = mmedpo.signal_rates()[step]
    inside = np.asarray(noised)[:, heat == 1] - signal * np.asarray(image)[heat == 1]
    assert abs(inside.mean()) < 4 * np.sqrt(1 - signal**2) / inside.size**0.5 + 1e-6
    np.testing.assert_allclose(inside.var(), 1 - signal**2, rtol=0.02, atol=1e-6)


def test_noise_is_keyed_and_follows_its_map():
    image, key = jnp.asarray(RNG.normal(size=(8, 6, 3)), jnp.float32), jax.random.key(3)
    soft, ones = RNG.random((8, 6)), np.ones((8, 6))
    noise = lambda heat, key=key, step=700: np.asarray(mmedpo.noise_lesion(image, heat, step, key))
    np.testing.assert_array_equal(noise(soft), noise(soft))
    assert not np.array_equal(noise(soft), noise(soft, jax.random.key(4)))
    # Linear in the map: the soft form lies between the untouched picture and global noise of the same key.
    between = soft[..., None] * noise(ones) + (1 - soft[..., None]) * np.asarray(image)
    np.testing.assert_allclose(noise(soft), between, atol=1e-6)
    np.testing.assert_array_equal(noise(np.zeros((8, 6))), image)
    traced = jax.jit(lambda step: mmedpo.noise_lesion(image, soft, step, key))(700)
    np.testing.assert_allclose(traced, noise(soft), atol=1e-6)
    half = mmedpo.noise_lesion(image.astype(jnp.bfloat16), soft, 700, key)
    assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("image", "heat", "step", "said"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.ones((4, 4)), 0, "dtype uint8; noise needs floats"),
        (np.zeros((4, 4, 3), np.float32), np.ones((4, 5)), 0, r"heat_map has shape \(4, 5\) and the image \(4, 4\)"),
        (np.zeros((4, 4, 3), np.float32), 2 * np.ones((4, 4)), 0, r"goes from 2 to 2; it must lie in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.float32), np.full((4, 4), np.nan), 0, r"must lie in \[0, 1\]"),
        (np.zeros((4, 4, 3), np.float32), np.ones((4, 4)), 1000, "step=1000 must be between 0 and 999"),
    ],
)
def test_noise_refuses(image, heat, step, said):
    with pytest.raises(ValueError, match=said):
        mmedpo.noise_lesion(image, heat, step, jax.random.key(0))


def test_loss_laws():
    of = lambda weight: mmedpo.loss(POLICY, REFERENCE, relevance=weight, beta=0.2)
    plain = losses.dpo_loss(POLICY, REFERENCE, beta=0.2)
    np.testing.assert_array_equal(of(np.ones(16)), plain)
    np.testing.assert_allclose(of(np.full(16, 0.3)), 0.3 * plain, rtol=1e-6)
    weights = RNG.random(16).astype(np.float32)
    weights[3] = 0
    slope = jax.grad(lambda p: mmedpo.loss(p, REFERENCE, relevance=weights, beta=0.2).sum())(POLICY)
    unweighted = jax.grad(lambda p: losses.dpo_loss(p, REFERENCE, beta=0.2).sum())(POLICY)
    for name in ("chosen", "rejected"):
        np.testing.assert_allclose(getattr(slope, name), weights * getattr(unweighted, name), rtol=1e-5, atol=1e-8)
    assert slope.chosen[3] == 0
    np.testing.assert_allclose(
        mmedpo.loss(POLICY, POLICY, relevance=weights).mean(), np.log(2) * weights.mean(), rtol=1e-6
    )
    through = jax.grad(lambda w: mmedpo.loss(POLICY, REFERENCE, relevance=w).sum())(weights)
    np.testing.assert_array_equal(through, 0)


def test_the_objective_weights_each_source_by_itself():
    number = MMedPO().numbers()["weight"]
    assert number.field == "relevance" and number.least == 0
    np.testing.assert_allclose(number.of_all(SCORES), mmedpo.relevance_weights(SCORES), rtol=1e-6)
    with pytest.raises(ValueError, match="every relevance is 0"):
        MMedPO(mode="raw").numbers()["weight"].of_all(np.zeros(3))
    with pytest.raises(ValueError, match="MMedPO needs the field"):
        MMedPO(weight=None)
    with pytest.raises(ValueError, match="loss='ipo' is unknown"):
        MMedPO(loss="ipo")


def test_noise_is_that_of_the_method_rounded_and_clipped():
    """Inside the mask: moments of a x + sqrt(1 - a^2) eps on grey levels far from the ends; outside: the same bits."""
    rng = np.random.default_rng(0)
    mean, std = (np.array(x) for x in MEAN_AND_STD["clip"])
    pixels = rng.integers(110, 140, (64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.float32)
    mask[:, 16:] = 1
    noised = mmedpo.noised_pixels(pixels, mask, 200, jax.random.key(0), mean=mean, std=std)
    np.testing.assert_array_equal(noised[:, :16], pixels[:, :16])
    rate = mmedpo.signal_rates()[200]
    expected = (rate * (pixels / 255 - mean) / std * std + mean) * 255
    left = (noised - expected)[:, 16:] / (255 * std)
    assert abs(left.mean()) < 0.005
    np.testing.assert_allclose(left.std(), np.sqrt(1 - rate**2), rtol=0.03)

    ends = rng.choice(np.array([0, 255], np.uint8), (64, 64, 3))  # clipped, never wrapped to the other end
    noised = mmedpo.noised_pixels(ends, np.ones((64, 64), np.float32), 200, jax.random.key(0), mean=mean, std=std)
    assert np.abs(noised.astype(int) - ends).max() < 128 and (noised == ends).mean() > 0.3
    soft = np.full((64, 64), 1e-6, np.float32)  # too little to tell: every grey level comes back as it was
    np.testing.assert_array_equal(
        mmedpo.noised_pixels(pixels, soft, 500, jax.random.key(1), mean=mean, std=std), pixels
    )
