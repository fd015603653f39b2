"""Attention with grouped heads, segments, sliding windows and soft-caps, without any time x time array for long inputs.

>>> q = k = v = jnp.ones((1, 3, 2, 4))
>>> positions = jnp.arange(3)[None]
>>> attention(q, k, v, q_positions=positions, kv_positions=positions).shape
(1, 3, 2, 4)
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.kernels.attention import cudnn, reference, splash, xla

IMPLEMENTATIONS = {
    "xla": xla.attention, "splash": splash.attention, "cudnn": cudnn.attention, "reference": reference.attention,
}  # fmt: skip


def attention(
    q: Float[Array | np.ndarray, "batch time heads head_dim"],
    k: Float[Array | np.ndarray, "batch source kv_heads head_dim"],
    v: Float[Array | np.ndarray, "batch source kv_heads head_dim"],
    *,
    q_positions: Int[Array | np.ndarray, "batch time"],
    kv_positions: Int[Array | np.ndarray, "batch source"],
    q_segment_ids: Int[Array | np.ndarray, "batch time"] | None = None,
    kv_segment_ids: Int[Array | np.ndarray, "batch source"] | None = None,
    causal: bool = True,
    window: int | Int[Array | np.ndarray, ""] | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "batch time heads head_dim"]:
    """Softmax attention, softmax(mask(cap(scale q k'))) v, where cap(s) = softcap * tanh(s / softcap).

    A query sees a key when both have the same segment id, that id is not 0, and, with `causal`, when
    0 <= q_position - kv_position (< window). A query that sees nothing gives 0, with zero gradients. Softmax and sums
    are in float32; the result has the dtype of `q`. Differentiable once, in reverse mode, in q, k and v. Memory grows
    with time + source, not with their product, once that exceeds one block (`xla.SINGLE`).

    Under `jax.checkpoint`, a policy that saves the names "attention_out" and "attention_lse" spares the backward pass
    the second forward pass of this operation.

    Args:
        q: queries; `heads` is a multiple of `kv_heads`, and head i reads key-value head i // (heads / kv_heads).
        q_segment_ids: which example of its row each query belongs to, 0 for padding. By default all are of one.
        kv_segment_ids: the same for keys; 0 also marks the places of a cache that are not filled yet.
        window: how many keys a query sees, itself included; None or a value <= 0 means all. An integer array may be
            traced, so that layers of one scan differ in it.
        softcap: soft limit on scaled scores (Gemma-2, https://arxiv.org/abs/2408.00118, section 2).
        scale: factor on q k'; head_dim ** -0.5 by default.
        implementation: "xla" (blockwise, as in https://arxiv.org/abs/2205.14135), "reference" (holds all scores), "splash"
            (JAX's kernel for TPUs) or "cudnn" (NVIDIA's). The last two go by places and not by positions: each query is the
            token of the key at its place, positions rise by one along each segment, the window is not traced. "splash" wants
            rows of a multiple of 128 tokens; "cudnn" 16-bit heads, and rows of one segment each with padding behind it.
            Whether that is so cannot be seen from the arrays, so None is "xla".

    Raises:
        ValueError: heads that kv_heads does not divide, one kind of segment ids without the other, a window without
            `causal`, a softcap <= 0, an unknown implementation, or one that does not serve these shapes.
    """
    heads, kv_heads = q.shape[2], k.shape[2]
    if heads % kv_heads:
        raise ValueError(
            f"{heads=} must be a multiple of {kv_heads=}: each key-value head serves equally many query heads."
        )
    if (q_segment_ids is None) != (kv_segment_ids is None):
        given, absent = ("kv", "q") if q_segment_ids is None else ("q", "kv")
        raise ValueError(f"{given}_segment_ids is given without {absent}_segment_ids; give both or neither.")
    if window is not None and not causal:
        raise ValueError(f"{window=} looks back from each query and needs causal=True; without it, leave window=None.")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be positive; use None for no cap.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")
    if not isinstance(window, jax.Array) and window is not None and window <= 0:
        window = None
    optional = (q_segment_ids, kv_segment_ids, window)
    return IMPLEMENTATIONS[implementation or "xla"](
        *map(jnp.asarray, (q, k, v, q_positions, kv_positions)),
        *(None if x is None else jnp.asarray(x) for x in optional),
        causal=causal,
        softcap=softcap,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
