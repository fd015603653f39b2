"""Blockwise attention in plain XLA: an online softmax forward, and a backward pass that recomputes each block.

The forward pass follows https://arxiv.org/abs/2112.05682; the backward pass, from (q, k, v, out, log-sum-exp), follows
https://arxiv.org/abs/2205.14135, section 3.1. One block without any loop serves short inputs and decoding.

Queries of the heads that share a key-value head are rows of one matrix, [B, K, G * T, h]: matrix products are then
batched over B and K alone, and keys are never repeated. Gradients of keys and values are computed as [B, K, h, S]: that
product reads the probabilities as they lie, where [S, h] would transpose them (on a CPU, twice the time).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.attention.reference import visible
from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.kernels.one_device import on_one_gpu

BLOCK, GPU_BLOCK = 256, 512
"""Most queries and keys of one block, when there are several. Measured on two CPU cores (9 heads of 64, 3 of keys and
values, causal, forward and backward): 2048 tokens take 320 ms of processor time, 357 in blocks of 512, 1596 in the
reference. On an H200 (4 rows of 4096 tokens, 32 heads of 128, 8 of keys and values, bfloat16): 32 ms in blocks of 256, 22 of
512, 19 of 1024, which hold 0.8, 1.1 and 2.3 GiB."""
SINGLE = 384 * 384
"""Up to this many query-key pairs (of one head) there is one block and no loop; with more, skipping hidden blocks pays."""
_MULTIPLE = 16
"""Block lengths are multiples of this."""
_HIDDEN = -1e30
"""Score of a key that is not seen; finite, so that differences are never nan."""
_FLOOR = -0.5e30
"""Least maximum of a row: exp(_HIDDEN - _FLOOR) is 0, so a row that sees nothing sums to 0."""


class _Places(NamedTuple):
    """What decides who sees whom; ids are None where every token is of one example."""

    q_positions: Int[Array, "*blocks batch time"]
    kv_positions: Int[Array, "*blocks batch source"]
    q_segment_ids: Int[Array, "*blocks batch time"] | None
    kv_segment_ids: Int[Array, "*blocks batch source"] | None
    window: Int[Array, ""] | None


class _Settings(NamedTuple):
    causal: bool
    softcap: float | None
    scale: float
    block: int
    """Most queries and keys of one block."""


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
    places = _Places(q_positions, kv_positions, q_segment_ids, kv_segment_ids, window)
    arguments = vary((q, k, v, places), varying_axes(q, k, v, places))
    block = GPU_BLOCK if on_one_gpu() else BLOCK
    return _attention(_Settings(causal, softcap, scale, block), *arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(settings: _Settings, q: Array, k: Array, v: Array, places: _Places) -> Array:
    return _forward(settings, q, k, v, places)[0]


def _attention_fwd(settings: _Settings, q: Array, k: Array, v: Array, places: _Places):  # type: ignore[no-untyped-def]
    out, lse = _forward(settings, q, k, v, places)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, places, out, lse)


def _attention_bwd(settings: _Settings, residuals, d_out: Array):  # type: ignore[no-untyped-def]
    q, k, v, places, out, lse = residuals
    one_block = q.shape[1] * k.shape[1] <= SINGLE
    dq, dk, dv = (_backward_single if one_block else _backward_blocks)(settings, q, k, v, places, out, lse, d_out)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_attention_fwd, _attention_bwd)


def _forward(settings: _Settings, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, Array]:
    one_block = q.shape[1] * k.shape[1] <= SINGLE
    return (_forward_single if one_block else _forward_blocks)(settings, q, k, v, places)


# One block. Rows are the folded queries: R = G * T.


def _fold(x: Float[Array, "B T H h"], kv_heads: int) -> Float[Array, "B K R h"]:
    B, T, H, h = x.shape
    return x.reshape(B, T, kv_heads, H // kv_heads, h).transpose(0, 2, 3, 1, 4).reshape(B, kv_heads, -1, h)


def _unfold(x: Float[Array, "B K R h"], time: int) -> Float[Array, "B T H h"]:
    B, K, R, h = x.shape
    return x.reshape(B, K, R // time, time, h).transpose(0, 3, 1, 2, 4).reshape(B, time, -1, h)


def _scores(
    settings: _Settings, rows: Float[Array, "B K R h"], k: Float[Array, "B S K h"], sees: Bool[Array, "B T S"] | None
) -> tuple[Float[Array, "B K R S"], Float[Array, "B K R S"]]:
    """Soft-capped scores, before and after masking."""
    scores = settings.scale * jnp.einsum("bkrh,bskh->bkrs", rows, k, preferred_element_type=jnp.float32)
    if settings.softcap is not None:
        scores = settings.softcap * jnp.tanh(scores / settings.softcap)
    if sees is None:
        return scores, scores
    B, T, S = sees.shape
    by_group = scores.reshape(B, k.shape[2], -1, T, S)
    return scores, jnp.where(sees[:, None, None], by_group, _HIDDEN).reshape(scores.shape)


def _weighted(p: Float[Array, "B K R S"], v: Float[Array, "B S K h"]) -> Float[Array, "B K R h"]:
    return jnp.einsum("bkrs,bskh->bkrh", p.astype(v.dtype), v, preferred_element_type=jnp.float32)


def _forward_single(settings: _Settings, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, Array]:
    _, scores = _scores(settings, _fold(q, k.shape[2]), k, visible(*places, settings.causal))
    top = jnp.maximum(scores.max(axis=-1), _FLOOR)
    p = jnp.exp(scores - top[..., None])
    total = jnp.maximum(p.sum(axis=-1), 1.0)  # >= 1 wherever anything is seen: the largest term is exp(0)
    out = _weighted(p, v) / total[..., None]
    return _unfold(out, q.shape[1]).astype(q.dtype), top + jnp.log(total)


def _block_gradients(
    settings: _Settings,
    rows: Float[Array, "B K R h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    sees: Bool[Array, "B T S"] | None,
    lse: Float[Array, "B K R"],
    d_rows: Float[Array, "B K R h"],
    delta: Float[Array, "B K R"],
) -> tuple[Float[Array, "B K R h"], Float[Array, "B K h S"], Float[Array, "B K h S"]]:
    """What one block adds to the gradients of the rows, of k and of v (the latter two transposed), float32.

    `delta` is the inner product of each row of the output with its cotangent.
    """
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    capped, scores = _scores(settings, rows, k, sees)
    p = jnp.exp(scores - lse[..., None])
    dv = product("bkrh,bkrs->bkhs", d_rows, p.astype(v.dtype))
    ds = p * (product("bkrh,bskh->bkrs", d_rows, v) - delta[..., None])
    if settings.softcap is not None:
        ds = ds * (1.0 - jnp.square(capped / settings.softcap))
    ds = ds.astype(k.dtype)
    d_q = product("bkrs,bskh->bkrh", ds, k) * settings.scale
    dk = product("bkrh,bkrs->bkhs", rows, ds) * settings.scale
    return d_q, dk, dv


def _backward_single(
    settings: _Settings, q: Array, k: Array, v: Array, places: _Places, out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    rows, out, d_rows = (_fold(x, k.shape[2]) for x in (q, out, d_out))
    delta = jnp.sum(out.astype(jnp.float32) * d_rows, axis=-1)
    sees = visible(*places, settings.causal)
    dq, dk, dv = _block_gradients(settings, rows, k, v, sees, lse, d_rows, delta)
    # The barrier keeps the compiler from folding the transposition below into the product, which undoes the layout.
    dk, dv = (x.transpose(0, 3, 1, 2) for x in jax.lax.optimization_barrier((dk, dv)))
    return _unfold(dq, q.shape[1]), dk, dv


# Several blocks. The number of query blocks is M, of key blocks N; t and s are the lengths of one.


def _length(total: int, most: int) -> int:
    """Length of a block, so that `total` splits into as few and as equal blocks as `most` allows."""
    each = -(-total // -(-total // most))
    return min(total, -(-each // _MULTIPLE) * _MULTIPLE)


def _split(x: Array, length: int) -> Array:
    """[B, T, ...] -> [blocks, B, length, ...], padded with 0."""
    blocks = -(-x.shape[1] // length)
    x = jnp.pad(x, [(0, 0), (0, blocks * length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, length, *x.shape[2:]), 1, 0)


def _join(x: Array, total: int) -> Array:
    """Undoes `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :total]


def _split_places(places: _Places, q_length: int, kv_length: int) -> _Places:
    """Places by block. Padding needs segment ids: with none given, real tokens are of example 1."""
    q_ids, kv_ids = places.q_segment_ids, places.kv_segment_ids
    if q_ids is None or kv_ids is None:
        q_ids, kv_ids = jnp.ones_like(places.q_positions), jnp.ones_like(places.kv_positions)
    return places._replace(
        q_positions=_split(places.q_positions, q_length),
        kv_positions=_split(places.kv_positions, kv_length),
        q_segment_ids=_split(q_ids, q_length),
        kv_segment_ids=_split(kv_ids, kv_length),
    )


def _needed(places: _Places, causal: bool) -> tuple[Int[Array, "M"], Int[Array, "M"]]:
    """The first key block that a query block may see, and one past the last (0, 0 if none), over the whole batch.

    Judged by the least and largest segment id and position of each block, so blocks between may still be all hidden.
    """

    def bounds(x, ids):  # type: ignore[no-untyped-def]
        """Least and largest value at real tokens; of padding alone, least > largest."""
        info = jnp.iinfo(x.dtype)
        return jnp.where(ids > 0, x, info.max).min(-1), jnp.where(ids > 0, x, info.min).max(-1)

    q_ids, kv_ids = places.q_segment_ids, places.kv_segment_ids
    q_least, q_most = bounds(q_ids, q_ids)  # [M, B]
    kv_least, kv_most = bounds(kv_ids, kv_ids)  # [N, B]
    meets = (q_least[:, None] <= kv_most) & (q_most[:, None] >= kv_least)  # [M, N, B]
    meets &= (q_least <= q_most)[:, None] & (kv_least <= kv_most)
    if causal:
        q_least, q_most = bounds(places.q_positions, q_ids)
        kv_least, kv_most = bounds(places.kv_positions, kv_ids)
        meets &= q_most[:, None] >= kv_least
        if places.window is not None:
            # Padding's bounds overflow here, and are ruled out above.
            meets &= (q_least[:, None] - kv_most < places.window) | (places.window <= 0)
    any_row = meets.any(-1)
    blocks = any_row.shape[1]
    first = jnp.argmax(any_row, axis=1)
    last = blocks - jnp.argmax(any_row[:, ::-1], axis=1)
    return first, jnp.where(any_row.any(axis=1), last, first)


def _at(tree: Any, j: Array) -> Any:
    """Block `j` of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, j, keepdims=False), tree)


def _forward_blocks(settings: _Settings, q: Array, k: Array, v: Array, places: _Places) -> tuple[Array, Array]:
    B, T, _, h = q.shape
    t, s, K = _length(T, settings.block), _length(k.shape[1], settings.block), k.shape[2]
    places = _split_places(places, t, s)
    first, last = _needed(places, settings.causal)
    q_blocks, k_blocks, v_blocks = _split(q, t), _split(k, s), _split(v, s)
    R = q.shape[2] // K * t
    axes = varying_axes(q)

    def queries(_, block):  # type: ignore[no-untyped-def]
        q, q_positions, q_ids, first, last = block
        rows = _fold(q, K)

        def keys(j, carry):  # type: ignore[no-untyped-def]
            top, total, out = carry
            k, v, kv_positions, kv_ids = _at((k_blocks, v_blocks, places.kv_positions, places.kv_segment_ids), j)
            sees = visible(q_positions, kv_positions, q_ids, kv_ids, places.window, settings.causal)
            _, scores = _scores(settings, rows, k, sees)
            new_top = jnp.maximum(top, scores.max(axis=-1))
            shrink = jnp.exp(top - new_top)
            p = jnp.exp(scores - new_top[..., None])
            return new_top, total * shrink + p.sum(axis=-1), out * shrink[..., None] + _weighted(p, v)

        start = (
            jnp.full((B, K, R), _FLOOR, jnp.float32),
            jnp.zeros((B, K, R), jnp.float32),
            jnp.zeros((B, K, R, h), jnp.float32),
        )
        top, total, out = jax.lax.fori_loop(first, last, keys, vary(start, axes))
        total = jnp.maximum(total, 1.0)
        return (), (_unfold(out / total[..., None], t).astype(q.dtype), top + jnp.log(total))

    _, (out, lse) = jax.lax.scan(queries, (), (q_blocks, places.q_positions, places.q_segment_ids, first, last))
    return _join(out, T), lse  # lse stays in blocks: [M, B, K, R]


def _backward_blocks(
    settings: _Settings, q: Array, k: Array, v: Array, places: _Places, out: Array, lse: Array, d_out: Array
) -> tuple[Array, Array, Array]:
    B, T, _, h = q.shape
    S, K = k.shape[1:3]
    t, s = _length(T, settings.block), _length(S, settings.block)
    places = _split_places(places, t, s)
    first, last = _needed(places, settings.causal)
    q_blocks, out_blocks, d_blocks = _split(q, t), _split(out, t), _split(d_out, t)
    k_blocks, v_blocks = _split(k, s), _split(v, s)
    axes = varying_axes(q)

    def queries(carry, block):  # type: ignore[no-untyped-def]
        q, out, d_out, lse, q_positions, q_ids, first, last = block
        rows, out, d_rows = (_fold(x, K) for x in (q, out, d_out))
        delta = jnp.sum(out.astype(jnp.float32) * d_rows, axis=-1)

        def keys(j, carry):  # type: ignore[no-untyped-def]
            dq, dk, dv = carry
            k, v, kv_positions, kv_ids = _at((k_blocks, v_blocks, places.kv_positions, places.kv_segment_ids), j)
            sees = visible(q_positions, kv_positions, q_ids, kv_ids, places.window, settings.causal)
            more_q, more_k, more_v = _block_gradients(settings, rows, k, v, sees, lse, d_rows, delta)
            return dq + more_q, dk.at[j].add(more_k), dv.at[j].add(more_v)

        dq = vary(jnp.zeros(rows.shape, jnp.float32), axes)
        dq, dk, dv = jax.lax.fori_loop(first, last, keys, (dq, *carry))
        return (dk, dv), _unfold(dq, t)

    zeros = vary(jnp.zeros((k_blocks.shape[0], B, K, h, s), jnp.float32), axes)
    blocks = (q_blocks, out_blocks, d_blocks, lse, places.q_positions, places.q_segment_ids, first, last)
    (dk, dv), dq = jax.lax.scan(queries, (zeros, zeros), blocks)
    dk, dv = (_join(x.transpose(0, 1, 4, 2, 3), S) for x in (dk, dv))
    return _join(dq, T), dk, dv
