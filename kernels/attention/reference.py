"""Attention as its equation says, holding all scores: what the other implementations are compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    q_positions: Int[Array, "batch time"],
    kv_positions: Int[Array, "batch source"],
    q_segment_ids: Int[Array, "batch time"] | None,
    kv_segment_ids: Int[Array, "batch source"] | None,
    window: Int[Array, ""] | None,
    causal: bool,
) -> Bool[Array, "batch time source"] | None:
    """Which key each query sees; None when every query sees every key."""
    sees = []
    if q_segment_ids is not None and kv_segment_ids is not None:
        same = q_segment_ids[:, :, None] == kv_segment_ids[:, None, :]
        sees.append(same & (q_segment_ids > 0)[:, :, None])
    if causal:
        distance = q_positions[:, :, None] - kv_positions[:, None, :]
        sees.append(distance >= 0)
        if window is not None:
            sees.append((distance < window) | (window <= 0))
    if not sees:
        return None
    result = sees[0]
    for other in sees[1:]:
        result = result & other
    return result


def attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch source kv_heads head_dim"],
    v: Float[Array, "batch source kv_heads head_dim"],
    q_positions: Int[Array, "batch time"],
    kv_positions: Int[Array, "batch source"],
    q_segment_ids: Int[Array, "batch time"] | None,
    kv_segment_ids: Int[Array, "batch source"] | None,
    window: Int[Array, ""] | None,
    *,
    causal: bool,
    softcap: float | None,
    scale: float,
) -> Float[Array, "batch time heads head_dim"]:
    """See `api.attention`."""
    groups = q.shape[2] // k.shape[2]
    k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
    scores = scale * jnp.einsum("bthd,bshd->bhts", q, k, preferred_element_type=jnp.float32)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    sees = visible(q_positions, kv_positions, q_segment_ids, kv_segment_ids, window, causal)
    if sees is None:
        sees = jnp.ones((q.shape[0], q.shape[1], k.shape[1]), bool)
    # A row that sees nothing gets an even softmax here, so that no gradient divides by zero, and is dropped below.
    scores = jnp.where(sees[:, None], scores, -1e30)
    weights = jnp.where(sees[:, None], jax.nn.softmax(scores, axis=-1), 0.0)
    out = jnp.einsum("bhts,bshd->bthd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return out.astype(q.dtype)
