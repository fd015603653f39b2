"""Log-probabilities of given tokens as the equation says, holding all logits: what other forms are compared with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class TokenStatistics(NamedTuple):
    """Of the distribution that each token is drawn from, float32; nan where a wanted target lies outside of the vocabulary."""

    logps: Float[Array, "tokens"]
    """log p(target)."""
    logsumexp: Float[Array, "tokens"] | None = None
    """log of the sum of exp(logit); the square of it is the z-loss."""
    entropy: Float[Array, "tokens"] | None = None
    """- sum of p log p, in nats."""


def token_statistics(
    hidden: Float[Array, "tokens dim"],
    unembedding: Float[Array, "dim vocab"] | Float[Array, "vocab dim"],
    targets: Int[Array, "tokens"],
    where: Bool[Array, "tokens"] | None,
    *,
    softcap: float | None,
    axis_name: str | None,
    transposed: bool,
    compact: bool | None,
    everything: bool,
) -> TokenStatistics:
    """See `api`; without `everything`, log-probabilities alone. Always computes every token."""
    del compact
    if where is not None:
        hidden = jnp.where(where[:, None], hidden, 0)  # padding may hold anything, also not finite
    equation = "nd,vd->nv" if transposed else "nd,dv->nv"
    logits = jnp.einsum(equation, hidden, unembedding, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    local = targets[:, None]
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
        local = local - logits.shape[1] * jax.lax.axis_index(axis_name)
    total = jnp.exp(logits - top).sum(axis=-1)
    target = jnp.where(jnp.arange(logits.shape[1]) == local, logits - top, 0.0).sum(axis=-1)
    if axis_name is not None:
        total, target = jax.lax.psum((total, target), axis_name)
    found = TokenStatistics(target - jnp.log(total))
    if everything:
        share = jnp.exp(logits - top) / total[:, None]
        mean = (share * (logits - top)).sum(axis=-1)
        mean = mean if axis_name is None else jax.lax.psum(mean, axis_name)
        found = TokenStatistics(found.logps, top[:, 0] + jnp.log(total), jnp.log(total) - mean)
    vocab = logits.shape[1] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    return masked(found, targets, where, vocab)


def masked(found: TokenStatistics, targets: Array, where: Array | None, vocab: int) -> TokenStatistics:
    """Values with nan for log-probabilities of targets that are none of the vocabulary's, and 0 where no value is wanted."""
    found = found._replace(logps=jnp.where((targets >= 0) & (targets < vocab), found.logps, jnp.nan))
    return found if where is None else jax.tree.map(lambda x: jnp.where(where, x, 0.0), found)
