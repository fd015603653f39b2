"""Preference losses of log-probabilities: one value a pair (or an answer), float32, no model in sight.

The log-probabilities are sums over an answer's tokens, log p(answer | prompt). A method that differs from these by a weight
multiplies the result; one that differs by its margin changes what it passes in.

>>> policy, reference = PairLogps(jnp.float32([-5.0]), jnp.float32([-9.0])), PairLogps(jnp.float32([-6.0]), jnp.float32([-6.0]))
>>> dpo_loss(policy, reference, beta=0.1).round(4)
Array([0.513], dtype=float32)
>>> dpo_loss(policy, policy, beta=0.1).round(4)  # log 2: the policy has not moved
Array([0.6931], dtype=float32)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

MOST_LOGP = -1.1920929e-07
"""`orpo_loss` takes no answer for likelier than this mean log-probability: at 0 its odds are infinite."""


class PairLogps(NamedTuple):
    """Summed log-probabilities of the two answers to each prompt (or, where lengths are asked for, their tokens)."""

    chosen: Num[Array | np.ndarray, "pairs"]
    rejected: Num[Array | np.ndarray, "pairs"]


def preference_margin(policy: PairLogps, reference: PairLogps) -> Float[Array, "pairs"]:
    """How much more than the reference the policy prefers the chosen answer, in nats."""
    return (_float(policy.chosen) - _float(reference.chosen)) - (_float(policy.rejected) - _float(reference.rejected))


def dpo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float | Any = 0.0
) -> Float[Array, "pairs"]:
    """-(1 - e) log sigmoid(beta m) - e log sigmoid(-beta m), m the margin and e the label smoothing.

    Eq. 7 of https://arxiv.org/abs/2305.18290 where e = 0. With e > 0, the probability that a label is wrong, it is "conservative"
    DPO (cDPO), whose margin settles at beta m = log((1 - e) / e); `robust_dpo_loss` is unbiased under such labels.

    Args:
        beta: positive; how strongly the policy is held to the reference.
        label_smoothing: in [0, 1]; a number, or one a pair.

    Raises:
        ValueError: beta or label smoothing outside their range (where values are known: not under `jax.jit`).
    """
    _check_beta(beta)
    _check_range("label_smoothing", label_smoothing, 1.0)
    logits = beta * preference_margin(policy, reference)
    # log sigmoid(x) - log sigmoid(-x) = x, so one softplus does: linear in the smoothing, and finite for any logit.
    return jax.nn.softplus(-logits) + label_smoothing * logits


def robust_dpo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.1
) -> Float[Array, "pairs"]:
    """(-(1 - e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2 e): the DPO loss under clean labels, in expectation.

    Eq. 12 of https://arxiv.org/abs/2403.00409, for labels that are wrong with probability e. It has no lower bound in m.

    Raises:
        ValueError: beta not positive, e not in [0, 1/2).
    """
    _check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(
            f"label_smoothing={label_smoothing} must be in [0, 0.5): at one half the labels would say nothing."
        )
    logits = beta * preference_margin(policy, reference)
    return jax.nn.softplus(-logits) - label_smoothing / (1 - 2 * label_smoothing) * logits


def ipo_loss(
    policy: PairLogps, reference: PairLogps, *, beta: float = 0.1, lengths: PairLogps | None = None
) -> Float[Array, "pairs"]:
    """(m - 1 / (2 beta))^2: eq. 17 of https://arxiv.org/abs/2310.12036, its tau called beta.

    Args:
        lengths: token counts; the log-probabilities are then means over tokens, as in the authors' runs (so they told TRL's).
    """
    _check_beta(beta)
    if lengths is not None:
        policy, reference = mean_logps(policy, lengths), mean_logps(reference, lengths)
    return (preference_margin(policy, reference) - 1 / (2 * beta)) ** 2


def hinge_loss(policy: PairLogps, reference: PairLogps, *, beta: float = 0.1) -> Float[Array, "pairs"]:
    """max(0, 1 - beta m): https://arxiv.org/abs/2305.10425 (SLiC) on DPO's margin, as https://arxiv.org/abs/2309.06657 has it."""
    _check_beta(beta)
    return jax.nn.relu(1 - beta * preference_margin(policy, reference))


def simpo_loss(
    policy: PairLogps, lengths: PairLogps, *, beta: float = 2.0, gamma: float = 1.0
) -> Float[Array, "pairs"]:
    """-log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma): eq. 6 of https://arxiv.org/abs/2405.14734.

    Args:
        lengths: token counts of the answers, at least 1.
        gamma: the margin that is asked for, in the scale of beta times means.
    """
    _check_beta(beta)
    means = mean_logps(policy, lengths)
    return jax.nn.softplus(gamma - beta * (means.chosen - means.rejected))


def cpo_loss(policy: PairLogps, *, beta: float = 0.1) -> Float[Array, "pairs"]:
    """-log sigmoid(beta (log p(chosen) - log p(rejected))): L_prefer of https://arxiv.org/abs/2401.08417, eq. 3.

    The paper adds the negative log-likelihood of the chosen answer.
    """
    _check_beta(beta)
    return jax.nn.softplus(-beta * (_float(policy.chosen) - _float(policy.rejected)))


def orpo_loss(policy: PairLogps, lengths: PairLogps, *, beta: float = 0.1) -> Float[Array, "pairs"]:
    """-beta log sigmoid(log(odds(chosen) / odds(rejected))), odds(y) = p / (1 - p) with p = exp(mean log p(y)).

    beta is the lambda of https://arxiv.org/abs/2403.07691, eqs. 6 and 7; the paper adds the negative log-likelihood of the chosen
    answer. A mean above -1.2e-7 counts as that, so that odds stay finite.
    """
    _check_beta(beta)
    chosen, rejected = (jnp.minimum(mean, MOST_LOGP) for mean in mean_logps(policy, lengths))
    log_odds = lambda mean: mean - _log1mexp(mean)
    return beta * jax.nn.softplus(log_odds(rejected) - log_odds(chosen))


def kto_loss(
    logps: Num[Array | np.ndarray, "answers"],
    reference: Num[Array | np.ndarray, "rows"],
    desirable: Bool[Array | np.ndarray, "labels"],
    *,
    kl: float | Num[Array | np.ndarray, ""],
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Float[Array, "answers"]:
    """w (1 - sigmoid(beta (r - kl))) of desirable answers and w (1 - sigmoid(beta (kl - r))) of others, r = logps - reference.

    Eqs. 7 and 8 of https://arxiv.org/abs/2402.01306. `kl` is the reference point (`kto_kl`); no gradient goes through it.
    """
    _check_beta(beta)
    kl = jax.lax.stop_gradient(_float(kl))
    gain = beta * (_float(logps) - _float(reference) - kl)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    return weight * jax.nn.sigmoid(jnp.where(desirable, -gain, gain))


def kto_kl(logps: Num[Array | np.ndarray, "answers"], reference: Num[Array | np.ndarray, "rows"]) -> Float[Array, ""]:
    """max(0, mean of logps - reference) over answers to *other* prompts: `kto_loss`'s KL(policy || reference)."""
    return jax.lax.stop_gradient(jnp.maximum((_float(logps) - _float(reference)).mean(), 0.0))


def mean_logps(sums: PairLogps, lengths: PairLogps) -> PairLogps:
    """Log-probabilities as means over tokens, [B] each; an answer without any has 0."""
    return PairLogps(*(_float(x) / jnp.maximum(_float(n), 1.0) for x, n in zip(sums, lengths, strict=True)))


def _log1mexp(x: Float[Array, "pairs"]) -> Float[Array, "pairs"]:
    """log(1 - exp(x)) of x < 0, in the form that is exact on its side of -log 2."""
    near = x > -0.6931472
    safe_near, safe_far = jnp.where(near, x, -0.1), jnp.where(near, -1.0, x)
    return jnp.where(near, jnp.log(-jnp.expm1(safe_near)), jnp.log1p(-jnp.exp(safe_far)))


def _float(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _check_beta(beta: Any) -> None:
    if isinstance(beta, int | float) and not beta > 0:
        raise ValueError(f"{beta=} must be positive; at 0 the loss would not see the margin.")


def _check_range(name: str, value: Any, most: float) -> None:
    if not isinstance(value, jax.core.Tracer) and not np.all((np.asarray(value) >= 0) & (np.asarray(value) <= most)):
        raise ValueError(f"{name}={value} must be between 0 and {most:g}.")
