"""Attention by cuDNN's flash kernels on NVIDIA's GPUs, as `jax.nn.dot_product_attention` calls them.

They know no segments, only how many tokens of a row are real, so they serve rows of one example each: its tokens from the
first place on, their positions rising by one, and padding behind them. `data` makes such rows where examples are not packed.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

HEAD_DIM = 128
"""The widest heads that are served here; the backward pass of wider ones asks for a later GPU than others."""


def supports(dtype: Any, head_dim: int, softcap: float | None) -> bool:
    """Whether there is a kernel for such heads."""
    return (
        jnp.dtype(dtype) in (jnp.bfloat16, jnp.float16) and head_dim <= HEAD_DIM and head_dim % 8 == 0 and not softcap
    )


def attention(
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch source kv_heads head_dim"],
    v: Float[Array, "batch source kv_heads head_dim"],
    q_positions: Int[Array, "batch time"],
    kv_positions: Int[Array, "batch source"],
    q_segment_ids: Int[Array, "batch time"] | None,
    kv_segment_ids: Int[Array, "batch source"] | None,
    window: Int[Array, ""] | int | None,
    *,
    causal: bool,
    softcap: float | None,
    scale: float,
    library: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch time heads head_dim"]:
    """See `api.attention`. `library="xla"` is the same call where there is no such GPU, of any dtype.

    Raises:
        ValueError: heads that no kernel serves, a traced window, or another number of keys than of queries.
    """
    if library == "cudnn" and not supports(q.dtype, q.shape[-1], softcap):
        raise ValueError(
            f"cuDNN's attention takes bfloat16 or float16, heads of a multiple of 8 up to {HEAD_DIM} and no softcap; here are "
            f'{q.dtype}, {q.shape[-1]} and {softcap}. Use implementation="xla".'
        )
    if isinstance(window, jax.core.Tracer):
        raise ValueError('cuDNN\'s attention takes a window known beforehand; use implementation="xla".')
    if q.shape[1] != k.shape[1]:
        raise ValueError(
            f"cuDNN's attention goes by places and takes as many keys as queries ({k.shape[1]} and {q.shape[1]} here); "
            'use implementation="xla".'
        )
    count = lambda ids: None if ids is None else (ids > 0).sum(axis=1, dtype=jnp.int32)
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, scale=scale, local_window_size=None if window is None else (int(window) - 1, 0),
        query_seq_lengths=count(q_segment_ids), key_value_seq_lengths=count(kv_segment_ids), implementation=library,
    )  # fmt: skip
    if q_segment_ids is not None:
        out = jnp.where((q_segment_ids > 0)[..., None, None], out, 0)
    return checkpoint_name(out.astype(q.dtype), "attention_out")
