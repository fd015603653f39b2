"""Attention by the kernel that JAX ships for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

It keeps scores on the chip and skips blocks that causality or the window hide. It compares places in the row and not
positions, so it serves rows whose positions rise by one along each segment: packed or padded rows, without a cache.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as library
from jaxtyping import Array, Float, Int

LANES = 128
"""Tokens of a device are a multiple of this."""
BLOCK = 512
"""Most queries and keys of one block."""


def supports(tokens: int, shards: int = 1) -> bool:
    """Whether rows of so many tokens, split over so many devices, make whole blocks."""
    return tokens % (LANES * shards) == 0


def kernel(
    heads: int,
    tokens: int,
    *,
    window: int | Array | None,
    softcap: float | None,
    shards: int = 1,
    interpret: bool = False,
) -> Any:
    """The library's kernel for `heads` query heads: a pytree.

    Args:
        tokens: of a row.
        shards: over how many devices the queries of a row are split; the keys are whole. Inside `jax.shard_map` the kernel
            is then an argument, with `kernel.manual_sharding_spec`.

    Raises:
        ValueError: tokens that do not make whole blocks, or a traced window.
    """
    if isinstance(window, jax.core.Tracer):
        raise ValueError('splash attention takes a window known beforehand; use implementation="xla".')
    if not supports(tokens, shards):
        raise ValueError(
            f"splash attention takes rows of a multiple of {LANES * shards} tokens, and these have {tokens}; "
            'pad them, or use implementation="xla".'
        )
    own = tokens // shards
    queries, keys = (next(b for b in (BLOCK, 256, LANES) if n % b == 0) for n in (own, tokens))
    sizes = library.BlockSizes(
        block_q=queries, block_kv=keys, block_kv_compute=keys, block_q_dkv=queries, block_kv_dkv=keys,
        block_kv_dkv_compute=keys, block_q_dq=queries, block_kv_dq=keys,
    )  # fmt: skip
    shape = tokens, tokens
    mask = library.CausalMask(shape) if window is None else library.LocalMask(shape, (int(window) - 1, 0), 0)
    return library.make_splash_mha(
        library.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=shards,
        attn_logits_soft_cap=softcap, residual_checkpoint_name="attention_out", interpret=interpret,
    )  # fmt: skip


def apply(
    kernel: Any,
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch source kv_heads head_dim"],
    v: Float[Array, "batch source kv_heads head_dim"],
    q_segment_ids: Int[Array, "batch time"],
    kv_segment_ids: Int[Array, "batch source"],
    *,
    scale: float,
) -> Float[Array, "batch time heads head_dim"]:
    """The kernel on rows of tokens; padding gives 0, as the other implementations do."""
    by_head = lambda x: x.swapaxes(1, 2)
    ids = library.SegmentIds(q_segment_ids, kv_segment_ids)
    out = jax.vmap(kernel)((by_head(q) * scale).astype(q.dtype), by_head(k), by_head(v), ids)
    return jnp.where((q_segment_ids > 0)[..., None, None], by_head(out), 0).astype(q.dtype)


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
    interpret: bool = False,
) -> Float[Array, "batch time heads head_dim"]:
    """See `api.attention`."""
    if not causal or q.shape[1] != k.shape[1]:
        raise ValueError(
            f"splash attention is causal and takes as many keys as queries ({k.shape[1]} and {q.shape[1]} here); "
            'use implementation="xla".'
        )
    if q_segment_ids is None or kv_segment_ids is None:
        q_segment_ids = kv_segment_ids = jnp.ones_like(q_positions)
    made = kernel(q.shape[2], q.shape[1], window=window, softcap=softcap, interpret=interpret)
    return apply(made, q, k, v, q_segment_ids, kv_segment_ids, scale=scale)
