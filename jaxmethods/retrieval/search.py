"""Exact similarity search: the k nearest of many vectors, without ever holding all similarities.

>>> base = jnp.eye(4)
>>> found = top_k(jnp.float32([[0.0, 3.0, 1.0, 0.0]]), base, k=2)
>>> found.indices
Array([[1, 2]], dtype=int32)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmethods import tree
from jaxmethods.kernels.manual_axes import vary, varying_axes

SIMILARITIES = ("cosine", "dot")
BLOCK = 1 << 14
"""Vectors of the base that are compared at once, at most."""


class Found(NamedTuple):
    """The nearest vectors of each query, the nearest first; of equal ones the first in the base."""

    similarities: Float[Array, "queries k"]
    indices: Int[Array, "queries k"]
    """-1 where the base has no more vectors that may be taken; the similarity is then -inf."""


def top_k(
    queries: Num[Array | np.ndarray, "queries dim"],
    base: Num[Array | np.ndarray, "vectors width"],
    k: int,
    *,
    similarity: str = "cosine",
    where: Bool[Array | np.ndarray, "*queries taken"] | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Found:
    """The k vectors of the base that are most similar to each query.

    Blocks of the base are compared one after the other, each merged into the best so far. Pure: call it under `jax.jit`.

    Args:
        queries, base: [Q, D], [N, D]; compared in float32. A cosine with a vector of no length is 0.
        similarity: "cosine" or "dot".
        where: [N] or [Q, N], which vectors may be found (a query's own report, say, may not).
        axis_name: inside `jax.shard_map`, the mesh axis or axes over which the base (and `where`) is split, equally much on each
            device; queries are the same everywhere. Indices are those of the whole base.

    Raises:
        ValueError: widths that differ, k < 1 or more than the base has, an unknown similarity.
    """
    tree.require_one_of("similarity", similarity, SIMILARITIES)
    queries, base = (jnp.asarray(x).astype(jnp.float32) for x in (queries, base))
    held = len(base)
    shares = 1 if axis_name is None else jax.lax.axis_size(axis_name)
    if queries.shape[1] != base.shape[1]:
        raise ValueError(
            f"queries have width {queries.shape[1]} and the base {base.shape[1]}; embed both by one model."
        )
    if not 1 <= k <= held * shares:
        raise ValueError(f"k={k} must be between 1 and the {held * shares} vectors of the base.")
    if similarity == "cosine":
        queries, base = _unit(queries), _unit(base)
    allowed = jnp.ones((1, held), bool) if where is None else jnp.atleast_2d(jnp.asarray(where, bool))
    first = 0 if axis_name is None else held * jax.lax.axis_index(axis_name)

    size = min(BLOCK, held)
    blocks = -(-held // size)
    spare = blocks * size - held
    cut = lambda x: jnp.moveaxis(x.reshape(*x.shape[:-1], blocks, size), -2, 0)
    parts = (
        jnp.pad(base, [(0, spare), (0, 0)]).reshape(blocks, size, -1),
        cut(jnp.pad(allowed, [(0, 0), (0, spare)])),
        first + size * jnp.arange(blocks),
    )

    def merged(best: Found, part: Any) -> tuple[Found, None]:
        vectors, taken, start = part
        products = jnp.matmul(queries, vectors.T, precision=jax.lax.Precision.HIGHEST)
        numbers = jnp.where(taken, start + jnp.arange(size, dtype=jnp.int32), -1)
        new = Found(jnp.where(taken, products, -jnp.inf), jnp.broadcast_to(numbers, products.shape))
        return _best(Found(*map(lambda x, y: jnp.concatenate([x, y], axis=1), best, new)), k), None

    nothing = Found(jnp.full((len(queries), k), -jnp.inf), jnp.full((len(queries), k), -1, jnp.int32))
    best, _ = jax.lax.scan(merged, vary(nothing, varying_axes(queries, parts)), parts)
    if axis_name is None:
        return best
    of_all = Found(*(jax.lax.all_gather(x, axis_name, axis=1, tiled=True) for x in best))
    return Found(*jax.lax.pmax(_best(of_all, k), axis_name))  # equal everywhere, which `shard_map` now sees


def _best(found: Found, k: int) -> Found:
    values, places = jax.lax.top_k(found.similarities, k)  # of equal values the first
    return Found(values, jnp.take_along_axis(found.indices, places, axis=1))


def _unit(x: Float[Array, "rows width"]) -> Float[Array, "rows width"]:
    norm = jnp.linalg.norm(x, axis=1, keepdims=True)
    return jnp.where(norm > 0, x / jnp.where(norm > 0, norm, 1.0), 0.0)
