"""InfoNCE in plain XLA: blocks of logits with online softmaxes over rows and columns at once, and a ring over devices.

The forward pass computes each block once and keeps the log-sum-exp of each row and column; the backward pass computes it
again. Over devices, queries stay and targets go round, with the running softmax of their columns, later with their
gradient. Against gathering all embeddings on each device this sends as many bytes (N D forward; backward N D of targets and
N D of gradients, as the gather and the scatter would) and holds N D / devices of them instead of N D, twice.

There is no Pallas form: what one would read and write, XLA's form reads and writes as well (docs/kernels.md).

Names of dimensions: N pairs of one device; D width; n queries and m targets in one block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.manual_axes import vary, varying_axes

QUERIES, TARGETS = 2048, 1024
"""Most of each in one block. On a TPU bytes go with 1 / n; in smaller blocks (1024 and 256) the compiler also keeps a bfloat16
copy of both sides' embeddings, in these of one."""
LOW = -1e38
"""Logit of padding, and where running maxima start; finite, so that differences are never nan."""


class _Settings(NamedTuple):
    symmetric: bool
    axis_name: str | tuple[str, ...] | None


class _Side(NamedTuple):
    """Queries or targets in blocks, padded with 0."""

    rows: Float[Array, "b n D"]
    scale: Float[Array, "b n"]
    place: Int[Array, "b n"]
    """Their number on the device they come from; -1 where there is padding."""


class _Softmax(NamedTuple):
    """Running results of an online softmax."""

    top: Float[Array, "b n"]
    total: Float[Array, "b n"]
    """Sum of exp(logit - top)."""

    def log(self) -> Array:
        return self.top + jnp.log(self.total)


def info_nce(
    queries: Float[Array, "pairs dim"],
    targets: Float[Array, "pairs dim"],
    query_scale: Float[Array, "pairs"],
    target_scale: Float[Array, "pairs"],
    *,
    symmetric: bool,
    axis_name: str | tuple[str, ...] | None,
) -> Float[Array, "pairs"]:
    """See `api.info_nce`."""
    arrays = queries, targets, query_scale, target_scale
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    return _info_nce(_Settings(symmetric, axis_name), *vary(arrays, varying_axes(arrays)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _info_nce(settings: _Settings, queries: Array, targets: Array, query_scale: Array, target_scale: Array) -> Array:
    return _forward(settings, queries, targets, query_scale, target_scale)[0]


def _fwd(settings: _Settings, *arrays: Array):  # type: ignore[no-untyped-def]
    loss, *kept = _forward(settings, *arrays)
    return loss, (*arrays, *kept)


def _forward(
    settings: _Settings, queries: Array, targets: Array, query_scale: Array, target_scale: Array
) -> tuple[Array, Array, Array | None]:
    """The loss [N], and the log-sum-exp of rows [b, n] and, if symmetric, of columns [b, m]."""
    mine, theirs = _split(queries, query_scale, QUERIES), _split(targets, target_scale, TARGETS)
    start = lambda side: _Softmax(jnp.full(side.scale.shape, LOW, jnp.float32), jnp.zeros(side.scale.shape))
    axes = varying_axes(queries)

    def block(at_home: Any, i: Any, j: Any, theirs: _Side, state: Any) -> Any:
        rows, columns, own = state
        _, logits, is_pair = _logits(_at(mine, i), _at(theirs, j), at_home)
        rows = _add(rows, i, logits, axis=1)
        columns = columns and _add(columns, j, logits, axis=0)
        return rows, columns, own.at[i].add(jnp.where(is_pair, logits, 0.0).sum(axis=1))

    def meet(at_home: Any, theirs: _Side, state: Any) -> Any:
        step = lambda i, j, state: block(at_home, i, j, theirs, state)
        return _over(len(mine.rows), lambda i, s: _over(len(theirs.rows), functools.partial(step, i), s), state)

    def travel(at_home: Any, state: Any) -> Any:
        theirs, columns, rows, own = state
        rows, columns, own = meet(at_home, theirs, (rows, columns, own))
        return theirs, columns, rows, own

    columns = start(theirs) if settings.symmetric else None
    state = vary((theirs, columns, start(mine), jnp.zeros(mine.scale.shape)), axes)
    _, columns, rows, own = _round(settings, travel, state, travels=2)
    lse, column_lse = rows.log(), columns and columns.log()
    loss = _join(lse - own, len(queries))
    if column_lse is not None:
        loss = (loss + _join(column_lse, len(queries)) - _join(own, len(queries))) / 2
    return loss, lse, column_lse


def _bwd(settings: _Settings, residuals, g: Float[Array, "N"]):  # type: ignore[no-untyped-def]
    queries, targets, query_scale, target_scale, lse, column_lse = residuals
    mine, theirs = _split(queries, query_scale, QUERIES), _split(targets, target_scale, TARGETS)
    g_rows, g_columns = (_blocks(g, x.shape[1]) for x in (mine.scale, theirs.scale))
    share = 0.5 if settings.symmetric else 1.0

    axes = varying_axes(queries)
    zeros = lambda x: vary(jnp.zeros(x.shape, jnp.float32), axes)

    # Gradients of the embeddings are summed with their scales in them, so that the sums are the results and need no copy.
    def block(at_home: Any, i: Any, j: Any, theirs: _Side, columns: Any, d_query: Any, d_theirs: Any) -> Any:
        (q, a, _), (t, b, _) = query, target = _at(mine, i), _at(theirs, j)
        products, logits, is_pair = _logits(query, target, at_home)
        g, row_lse = _at((g_rows, lse), i)
        d = share * g[:, None] * jnp.exp(logits - row_lse[:, None]) - jnp.where(is_pair, g[:, None], 0.0)
        if columns is not None:
            g, column_lse = _at(columns, j)
            d += share * g * jnp.exp(logits - column_lse)
        for_scales = d * products
        d *= a[:, None] * b
        (of_rows, of_scale), (of_theirs, of_their_scale) = d_query, d_theirs
        d_query = of_rows + _product("nm,md->nd", d.astype(t.dtype), t), of_scale + _exact("nm,m->n", for_scales, b)
        of_theirs = of_theirs.at[j].add(_product("nm,nd->md", d.astype(q.dtype), q))
        return d_query, (of_theirs, of_their_scale.at[j].add(_exact("nm,n->m", for_scales, a)))

    def travel(at_home: Any, state: Any) -> Any:
        theirs, columns, d_theirs, d_mine = state

        def row(i: Any, state: Any) -> Any:
            d_mine, d_theirs = state
            step = lambda j, s: block(at_home, i, j, theirs, columns, *s)
            d_query, d_theirs = _over(len(theirs.rows), step, (_at(d_mine, i), d_theirs))
            return jax.tree.map(lambda whole, part: whole.at[i].set(part), d_mine, d_query), d_theirs

        d_mine, d_theirs = _over(len(mine.rows), row, (d_mine, d_theirs))
        return theirs, columns, d_theirs, d_mine

    columns = None if column_lse is None else (g_columns, column_lse)
    sums = lambda side: (zeros(side.rows), zeros(side.scale))
    state = *vary((theirs, columns), axes), sums(theirs), sums(mine)
    *_, d_theirs, d_mine = _round(settings, travel, state, travels=3)
    (d_queries, d_query_scale), (d_targets, d_target_scale) = (
        tuple(_join(x, len(queries)) for x in side) for side in (d_mine, d_theirs)
    )
    found = d_queries, d_targets, d_query_scale, d_target_scale
    return tuple(d.astype(x.dtype) for d, x in zip(found, (queries, targets, query_scale, target_scale), strict=True))


_info_nce.defvjp(_fwd, _bwd)


def _logits(
    query: _Side, target: _Side, at_home: Any
) -> tuple[Float[Array, "n m"], Float[Array, "n m"], Bool[Array, "n m"]]:
    """Products and logits of one block, and which are of pairs: targets that are at home, on the device they come from."""
    products = _product("nd,md->nm", query.rows, target.rows)
    logits = products * query.scale[:, None] * target.scale
    real = (query.place >= 0)[:, None] & (target.place >= 0)
    is_pair = (query.place[:, None] == target.place) & real & at_home
    return products, jnp.where(real, logits, LOW), is_pair


def _product(equation: str, x: Array, y: Array) -> Array:
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _exact(equation: str, x: Array, y: Array) -> Array:
    """A product with a vector: on the CPU several times as fast as multiplying and summing."""
    return jnp.einsum(equation, x, y, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def _add(softmax: _Softmax, i: Any, logits: Float[Array, "n m"], axis: int) -> _Softmax:
    """The softmax with more logits in block i, summed along `axis`."""
    top, total = _at(softmax, i)
    new_top = jnp.maximum(top, logits.max(axis=axis))
    more = jnp.exp(logits - jnp.expand_dims(new_top, axis)).sum(axis=axis)
    return _Softmax(softmax.top.at[i].set(new_top), softmax.total.at[i].set(total * jnp.exp(top - new_top) + more))


# The loops.


def _round(settings: _Settings, travel: Callable[[Any, Any], Any], state: tuple[Any, ...], travels: int) -> Any:
    """`state = travel(at_home, state)` on each device of the ring; the first `travels` parts of the state go round and come home.

    The embeddings themselves, the first part, are not sent the last time.
    """
    if settings.axis_name is None:
        return travel(True, state)
    size = jax.lax.axis_size(settings.axis_name)
    ring = [(i, (i + 1) % size) for i in range(size)]
    send = lambda tree: jax.tree.map(lambda x: jax.lax.ppermute(x, settings.axis_name, ring), tree)

    def step(k: Any, state: Any) -> Any:
        state = travel(k == 0, state)
        return *send(state[:travels]), *state[travels:]

    state = travel(size == 1, jax.lax.fori_loop(0, size - 1, step, state))
    return state[0], *send(state[1:travels]), *state[travels:]


def _over(count: int, step: Callable[[Any, Any], Any], state: Any) -> Any:
    return step(0, state) if count == 1 else jax.lax.fori_loop(0, count, step, state)


def _at(tree: Any, i: Any) -> Any:
    """Block `i` of each array."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _split(rows: Array, scale: Array, most: int) -> _Side:
    """In as few and as equal blocks as `most` allows."""
    blocks = -(-len(rows) // most)
    size = -(-len(rows) // blocks)
    place = _blocks(jnp.arange(1, len(rows) + 1), size) - 1
    return _Side(_blocks(rows, size), _blocks(scale, size), place)


def _blocks(x: Array, size: int) -> Array:
    """[N, ...] -> [b, size, ...], padded with 0."""
    blocks = -(-len(x) // size)
    return jnp.pad(x, [(0, blocks * size - len(x))] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, size, *x.shape[1:])


def _join(x: Array, rows: int) -> Array:
    """Undoes `_blocks`."""
    return x.reshape(-1, *x.shape[2:])[:rows]
