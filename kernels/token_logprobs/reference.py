"""Log-probabilities of given tokens as the equation says, holding all logits: what other forms are compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def token_logprobs(
    hidden: Float[Array, "tokens dim"],
    unembedding: Float[Array, "dim vocab"] | Float[Array, "vocab dim"],
    targets: Int[Array, "tokens"],
    where: Bool[Array, "tokens"] | None,
    *,
    softcap: float | None,
    axis_name: str | None,
    transposed: bool,
    compact: bool | None,
) -> Float[Array, "tokens"]:
    """See `api.token_logprobs`; always computes every token."""
    del compact
    equation = "nd,vd->nv" if transposed else "nd,dv->nv"
    logits = jnp.einsum(equation, hidden, unembedding, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    top = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    local = targets[:, None]
    vocab = logits.shape[1]
    if axis_name is not None:
        top = jax.lax.pmax(top, axis_name)
        local = local - vocab * jax.lax.axis_index(axis_name)
        vocab *= jax.lax.axis_size(axis_name)
    total = jnp.exp(logits - top).sum(axis=-1)
    target = jnp.where(jnp.arange(logits.shape[1]) == local, logits - top, 0.0).sum(axis=-1)
    if axis_name is not None:
        total, target = jax.lax.psum((total, target), axis_name)
    logps = jnp.where((targets >= 0) & (targets < vocab), target - jnp.log(total), jnp.nan)
    return logps if where is None else jnp.where(where, logps, 0.0)
