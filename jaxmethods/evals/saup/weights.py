"""How much each step counts: the paper's four surrogates of an agent's situation (SAUP, arXiv 2412.01033, section 3.3).

SAUP-D is `distance_weights`, SAUP-P `position_weights`, SAUP-PD `hybrid_weights`, SAUP-HMMD `state_weights` of a hidden Markov
model's posterior. All are [B, N], and 0 at padding. The paper has no formulas for P and PD, nor one from states to weights: those
are ours.

bias: is added to the weights of steps. 0 is the paper's; 1 keeps the uncertainty of a trajectory that does not drift at all, whose
distances are 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

Steps = Float[Array | np.ndarray, "batch steps"]
Mask = Bool[Array | np.ndarray, "batch steps"]

LEVELS = (0.5, 1.0, 1.5)
"""Weights of the three states by fixed levels, the least deviating first."""


def distance_weights(
    drift: Steps, gap: Steps, mask: Mask | None = None, *, bias: float = 0.0
) -> Float[Array, "batch steps"]:
    """W_n = D_a,n + D_o,n (+ bias).

    Args:
        drift: [B, N], inquiry drift D_a: distance of the trajectory so far to the question.
        gap: [B, N], inference gap D_o: distance of the action to what it brought; 0 where it brought nothing.
        mask: [B, N], true at steps; all are when None.
    """
    return _masked(jnp.asarray(drift) + jnp.asarray(gap) + bias, mask)


def position_weights(mask: Mask, *, bias: float = 0.0) -> Float[Array, "batch steps"]:
    """W_n = n/N (+ bias), n from 1: the last step has weight 1."""
    there = jnp.asarray(mask)
    place = jnp.cumsum(there, axis=1) / jnp.maximum(there.sum(axis=1, keepdims=True), 1)
    return _masked(place + bias, there)


def hybrid_weights(
    drift: Steps, gap: Steps, mask: Mask | None = None, *, rho: float = 0.5, bias: float = 0.0
) -> Float[Array, "batch steps"]:
    """W_n = rho n/N + (1 - rho) D_n / max_m D_m (+ bias), D = D_a + D_o, the maximum within the trajectory (0 where all are 0).

    Raises:
        ValueError: rho outside [0, 1].
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"{rho=} must be between 0 (distance alone) and 1 (position alone).")
    distance = distance_weights(drift, gap, mask)
    there = jnp.ones(distance.shape, bool) if mask is None else jnp.asarray(mask)
    largest = distance.max(axis=1, keepdims=True)
    share = distance / jnp.where(largest > 0, largest, 1.0)
    return _masked(rho * position_weights(there) + (1 - rho) * share + bias, there)


def state_weights(
    gamma: Float[Array | np.ndarray, "batch steps states"],
    values: Float[Array | np.ndarray, "states"],
    mask: Mask | None = None,
    *,
    bias: float = 0.0,
) -> Float[Array, "batch steps"]:
    """W_n = sum_s gamma_n(s) w_s (+ bias).

    Args:
        gamma: [B, N, S], posterior of the states (`hmm.posterior`), filtered or not; or one-hot, of the states that
            `hmm.viterbi` finds (`one_hot`).
        values: [S], w_s: `hmm.state_distances`, which keeps the unit of SAUP-D (our choice), or levels such as `LEVELS`.
    """
    return _masked(jnp.asarray(gamma) @ jnp.asarray(values) + bias, mask)


def one_hot(states: Array | np.ndarray, count: int) -> Float[Array, "batch steps states"]:
    """A posterior that is sure of the states [B, N]."""
    return jax.nn.one_hot(jnp.asarray(states), count)


def _masked(weights: Array, mask: Mask | None) -> Array:
    return weights if mask is None else jnp.where(jnp.asarray(mask), weights, 0.0)
