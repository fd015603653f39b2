"""Contrastive losses of batches whose activations do not fit: the gradient cache, as rematerialisation.

>>> queries, targets = jnp.eye(5), jnp.eye(5)[::-1]
>>> encode = lambda params, rows: rows @ params
>>> loss = lambda params, chunk: cached_info_nce(encode, params, queries, targets, chunk=chunk, temperature=0.1)
>>> gradient = jax.jit(jax.grad(loss), static_argnums=1)
>>> params = jax.random.normal(jax.random.key(0), (5, 3))
>>> bool(jnp.allclose(gradient(params, 2), gradient(params, 5), atol=1e-5))  # two rows at once, and all
True
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.losses.contrastive import info_nce

Encode = Callable[[Any, Any], Float[Array, "rows dim"]]
"""(params, rows) -> one embedding a row; it must treat each row on its own."""


def cached_info_nce(
    encode: Encode | tuple[Encode, Encode],
    params: Any,
    queries: Any,
    targets: Any,
    *,
    chunk: int,
    temperature: float | Float[Array | np.ndarray, ""],
    symmetric: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    negatives: Any = None,
) -> Float[Array, ""]:
    """`info_nce` of encoded rows, in the memory of one chunk: its value and gradient on the whole batch.

    GradCache (https://arxiv.org/abs/2101.06983, section 3): embeddings of the whole batch, chunk by chunk, without their
    activations; then the loss; then the backward pass encodes each chunk again. Here it is `in_chunks`, differentiated. With a
    backward pass of twice the forward pass' time, this takes 4/3 of the direct form's.

    Gradients are summed over chunks in the parameters' dtype: float32 where there are many chunks.

    Args:
        encode: `encode(params, rows) -> [n, D]` for any n rows, of any length; or a pair, for queries and for targets.
        params: what is differentiated, a tree of arrays.
        queries, targets: trees of arrays with the leading axis N, each its own; float leaves can be differentiated too.
            Randomness is keyed by row, a leaf of keys [N], so that a row encoded again draws the same.
        chunk: most rows at once (on each device inside `jax.shard_map`, of all devices under `jax.jit` alone).
        negatives: rows of a tree like targets with a leading axis M, encoded like targets.
        temperature, symmetric, axis_name: as in `info_nce`.

    Raises:
        ValueError: as `info_nce` and `in_chunks`.
    """
    encode_query, encode_target = (encode, encode) if callable(encode) else encode
    # Inside `shard_map`, gradients of the parameters are then summed over devices once, not for each chunk.
    params = vary(params, varying_axes(queries, targets, negatives))
    embed = lambda encode, rows: in_chunks(lambda rows: encode(params, rows), rows, chunk)
    return info_nce(
        embed(encode_query, queries), embed(encode_target, targets), temperature=temperature, symmetric=symmetric,
        axis_name=axis_name, negatives=None if negatives is None else embed(encode_target, negatives),
    )  # fmt: skip


def in_chunks(function: Callable[[Any], Any], rows: Any, chunk: int) -> Any:
    """`function(rows)`, computed for at most `chunk` rows at a time; the backward pass computes each chunk again.

    What is kept for the backward pass is rows and results. Chunks are as few and as equal as `chunk` allows; where they do not
    come out even, the first rows are computed a second time and dropped, fewer of them than there are chunks. Row i goes to chunk
    i % chunks: where `jax.jit` splits rows over devices, each keeps its own (if chunks come out even). A batch of a single
    chunk is a plain call, whose activations are kept.

    Args:
        function: from rows to a tree of arrays with one entry for each row on the leading axis. It must treat each row on
            its own, and is compiled once.
        rows: a tree of arrays with the same leading axis N; keys are arrays too.

    Returns:
        What the function returns, leading axis N, in the order of the rows.

    Raises:
        ValueError: chunk < 1, no rows, leaves with different leading axes, or results without an entry for each row.
    """
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1 row.")
    lengths = sorted({x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(rows)})
    if len(lengths) != 1 or not lengths[0]:
        raise ValueError(f"rows need one leading axis of at least 1 in all arrays; theirs are {lengths}.")
    count = lengths[0]
    chunks = -(-count // chunk)
    size = -(-count // chunks)

    def whole(rows: Any) -> Any:
        results = function(rows)
        if wrong := [x.shape for x in jax.tree.leaves(results) if x.shape[:1] != (size,)]:
            raise ValueError(
                f"the function gave an array of shape {wrong[0]} for {size} rows; it must give one entry a row."
            )
        return results

    if chunks == 1:
        return whole(rows)

    def cut(x: Any) -> Array:
        x = jnp.asarray(x)
        if more := chunks * size - count:
            x = jnp.concatenate([x, x[:more]])
        return x.reshape(size, chunks, *x.shape[1:])

    # Chunks are looked up in the loop: to scan over them, all rows would be copied into the chunks' order.
    chunked = jax.tree.map(cut, rows)
    look_up = lambda i: jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False), chunked)
    found = jax.lax.map(jax.checkpoint(lambda i: whole(look_up(i)), prevent_cse=False), jnp.arange(chunks))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:count], found)
