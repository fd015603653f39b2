"""How uncertain single steps are, from the log-probabilities of their own tokens (SAUP, arXiv 2412.01033, section 3.2).

A step's tokens are those of its thought and of its action, never of what it observes. All uncertainties are at least 0, larger
where the model is less sure.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods import tree
from jaxmethods.evals.facttest import scores

MODES = ("concat", "sum")
_NEITHER, _THOUGHT, _ACTION = 0, 1, 2


class StepLogps(NamedTuple):
    """Log-probabilities of the steps' tokens, summed, and how many these are; all [B, N]."""

    thought: Float[Array | np.ndarray, "batch steps"]
    action: Float[Array | np.ndarray, "batch steps"]
    thought_tokens: Int[Array | np.ndarray, "batch steps"]
    action_tokens: Int[Array | np.ndarray, "batch steps"]


def sum_by_step(
    logps: Float[Array | np.ndarray, "batch time"],
    step: Int[Array | np.ndarray, "batch time"],
    part: Int[Array | np.ndarray, "batch time"],
    steps: int,
) -> StepLogps:
    """Sums the log-probabilities of tokens over the steps that they are of.

    Args:
        logps: [B, T], log p of each token; anything where `part` is 0.
        step: [B, T], the token's step, from 0.
        part: [B, T]: 0, of no step; 1, of a thought; 2, of an action.
        steps: N.
    """

    def of(part_id: int, values: Array) -> Array:
        add = lambda values, where, step: jax.ops.segment_sum(jnp.where(where, values, 0), step, steps)
        return jax.vmap(add)(values, jnp.asarray(part) == part_id, jnp.asarray(step))

    ones = jnp.ones(np.shape(logps), jnp.int32)
    values = jnp.asarray(logps)
    return StepLogps(of(_THOUGHT, values), of(_ACTION, values), of(_THOUGHT, ones), of(_ACTION, ones))


def step_uncertainty(logps: StepLogps, *, mode: str = "concat") -> Float[Array, "batch steps"]:
    """Length-normalised negative log-likelihood of each step, nats a token; nan where a step has no token.

    "concat", of arXiv v1: -(1/(L_T + L_A)) sum_i log p_i over thought and action together. "sum", of the ACL version: that of the
    thought and that of the action, each over its own length, added; a part without tokens adds 0. (Eq. 3 as printed has no sign.)

    Raises:
        ValueError: an unknown mode.
    """
    tree.require_one_of("mode", mode, MODES)
    thought, action, thoughts, actions = (jnp.asarray(x) for x in logps)
    some = (thoughts + actions) > 0
    apart = lambda: _per(thought, thoughts) + _per(action, actions)
    return jnp.where(some, _per(thought + action, thoughts + actions) if mode == "concat" else apart(), jnp.nan)


def likelihood(logps: StepLogps) -> Float[Array, "batch steps"]:
    """-sum_i log p_i over the step's tokens, not normalised by their number."""
    return -(jnp.asarray(logps.thought) + jnp.asarray(logps.action))


def normalised_entropy(logps: StepLogps) -> Float[Array, "batch steps"]:
    """-(1/L) sum_i log p_i (https://arxiv.org/abs/2002.07650, by one sample): `step_uncertainty` in its mode "concat"."""
    return step_uncertainty(logps)


def predictive_entropy(
    logps: Float[Array | np.ndarray, "*batch samples"], mask: Bool[Array | np.ndarray, "*batch samples"] | None = None
) -> Float[Array, "*batch"]:
    """-(1/S) sum_s log p(y_s): Monte-Carlo estimate of the entropy of answers, from S drawn at temperature 1.

    Args:
        logps: [..., S], summed log-probability of each sample.
        mask: [..., S], false at samples that are none; all are when None.
    """
    values = jnp.asarray(logps)
    there = jnp.ones(values.shape, bool) if mask is None else jnp.asarray(mask)
    return -jnp.where(there, values, 0.0).sum(axis=-1) / jnp.maximum(there.sum(axis=-1), 1)


def semantic_entropy(
    logps: Float[Array | np.ndarray, "*batch samples"],
    clusters: Int[Array | np.ndarray, "*batch samples"],
    mask: Bool[Array | np.ndarray, "*batch samples"] | None = None,
) -> Float[Array, "*batch"]:
    """-sum_c p(c) log p(c), p(c) the share of cluster c of the samples' probabilities (https://arxiv.org/abs/2302.09664).

    Args:
        logps: [..., S], summed log-probability of each sample.
        clusters: [..., S], which meaning each has: numbers from 0 to S - 1, as of `meanings`.
        mask: [..., S], false at samples that are none; all are when None.
    """
    values = jnp.asarray(logps)
    there = jnp.ones(values.shape, bool) if mask is None else jnp.asarray(mask)
    rows = (jnp.asarray(x).reshape(-1, values.shape[-1]) for x in (values, clusters, there))
    return -scores.semantic_entropy(*rows).reshape(values.shape[:-1])


def meanings(texts: Sequence[str], entails: Callable[[str, str], bool]) -> list[int]:
    """Which cluster each text is of, from 0: it joins the first whose first text it entails, and is entailed by."""
    both = [[entails(first, text) and entails(text, first) for text in texts] for first in texts]
    return scores.clusters(np.array(both, bool).reshape(len(texts), len(texts))).tolist()


def p_true(
    true: Float[Array | np.ndarray, "*batch"], false: Float[Array | np.ndarray, "*batch"] | None = None
) -> Float[Array, "*batch"]:
    """1 - P("True") of a model that is asked whether its answer is true (https://arxiv.org/abs/2207.05221).

    Args:
        true: log-probability of "True".
        false: that of "False"; P("True") is the share of both then, and p("True") itself when None.
    """
    true = jnp.asarray(true)
    return -jnp.expm1(true) if false is None else jax.nn.sigmoid(jnp.asarray(false) - true)


def _per(total: Array, count: Array) -> Array:
    """-total/count, 0 (never -0) where there is none."""
    return jnp.where(count > 0, -total / jnp.maximum(count, 1), 0.0) + 0.0
