"""Exact search by inner products: the nearest candidates of each query, and at which rank the right one stands.

Scores are in float32; give embeddings of unit norm for cosines. They are computed block by block: [queries, candidates] is never
held, and candidates may be split over the devices of a mesh.

>>> scores, rows = top_k(jnp.eye(3), jnp.eye(3), 2, forbidden=(jnp.arange(3), jnp.arange(3)))  # none finds itself
>>> rows.tolist()
[[1, 2], [0, 2], [0, 1]]
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.manual_axes import vary

QUERIES, CANDIDATES = 512, 2048
"""Most of each in one block. All blocks have one shape, on one device or many, so that all sums are in one order: equal
embeddings score equal, and a mesh gives the numbers of one device."""
LEAST = 128
"""The sides of a block are multiples of this."""
LOWEST = float(np.finfo(np.float32).min)
"""What a score of nan or -inf counts as; still higher than -inf, the score of padding."""


Marks = (
    Bool[Array | np.ndarray, "rows columns"]
    | tuple[Int[Array | np.ndarray, "rows"], Int[Array | np.ndarray, "columns"]]
)
"""Pairs of queries and candidates: bool [Q, C], or ids of the queries [Q] and of the candidates [C], marked where equal."""


def top_k(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "candidates width"],
    k: int,
    *,
    forbidden: Marks | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The k best candidates of each query, best first: scores [Q, k], float32, and rows of `candidates` [Q, k], int32.

    Exact. Of equal scores the lower row comes first. Where fewer than k are allowed, the places left have score -inf and row -1.

    Args:
        queries: [Q, D], any float dtype.
        candidates: [C, D].
        forbidden: which candidates a query never gets: bool [Q, C]; or ids of the queries [Q] and of the candidates [C], forbidden
            where equal: the number of a report, or of a group of duplicates, so that none finds itself or a copy of it. A query
            with an id that no candidate has may get all.
        mesh: splits candidates over all of its devices; the result is the same.

    Raises:
        ValueError: k below 1 or above C, an embedding that is not finite, shapes that do not fit, no rows. Traced arrays
            are not checked for finite values: nan is then the lowest score.
    """
    block = _block(queries, candidates)
    check_k(k, len(candidates))
    arrays, count = _placed(queries, candidates, marks_of("forbidden", forbidden, queries, candidates), mesh)
    return _top_k(*arrays, k=k, count=count, block=block, mesh=mesh)


def ranks(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "candidates width"],
    relevant: Marks,
    *,
    mesh: Mesh | None = None,
) -> Int[Array, "queries"]:
    """How many wrong candidates score at least as high as the best right one, for each query; 0: a right one is first. int32.

    Q queries, C candidates, width D: 4QCD operations, as scores are computed twice: for the best right one, and to count.

    Args:
        queries: [Q, D], any float dtype.
        candidates: [C, D].
        relevant: which candidates are right: bool [Q, C], or ids of the queries [Q] and of the candidates [C], right where
            equal.
        mesh: splits candidates over all of its devices; the ranks are the same.

    Raises:
        ValueError: a query without a right candidate, an embedding that is not finite, shapes that do not fit, no rows.
            Traced arrays are not checked: then the rank of such a query is C, and nan scores lowest.
    """
    block = _block(queries, candidates)
    relevant = marks_of("relevant", relevant, queries, candidates)
    _check_all_have_one(relevant)
    arrays, count = _placed(queries, candidates, relevant, mesh)
    return _ranks(*arrays, count=count, block=block, mesh=mesh)


# What is compiled. `count`: candidates before padding; block: queries and candidates in one.


@functools.partial(jax.jit, static_argnames=("count", "block", "mesh"))
def _ranks(queries: Array, candidates: Array, relevant: Any, *, count: int, block: tuple[int, int], mesh: Any) -> Array:
    def of_block(fold: Callable[..., Any], axes: tuple[str, ...]) -> Array:
        nothing = jnp.full(block[0], LOWEST)  # also of a query that has no right one; padding scores lower
        right_best = lambda best, scores, right, _: jnp.maximum(best, jnp.where(right, scores, -jnp.inf).max(axis=1))
        best = fold(right_best, nothing)
        best = jax.lax.pmax(best, axes) if axes else best
        wrong_above = lambda n, scores, right, _: n + (~right & (scores >= best[:, None])).sum(axis=1, dtype=jnp.int32)
        above = fold(wrong_above, jnp.zeros(block[0], jnp.int32))
        return jax.lax.psum(above, axes) if axes else above

    return _over_queries(of_block, queries, candidates, relevant, count, block, mesh)


@functools.partial(jax.jit, static_argnames=("k", "count", "block", "mesh"))
def _top_k(
    queries: Array, candidates: Array, forbidden: Any, *, k: int, count: int, block: tuple[int, int], mesh: Any
) -> tuple[Array, Array]:
    def best_of(scores: Array, places: Array) -> tuple[Array, Array]:
        # Of equal scores `top_k` takes the first, and 0.0 before -0.0.
        scores, at = jax.lax.top_k(jnp.where(scores == 0.0, 0.0, scores), k)
        return scores, jnp.take_along_axis(places, at, axis=1)

    def of_block(fold: Callable[..., Any], axes: tuple[str, ...]) -> tuple[Array, Array]:
        # Rows rise from block to block and from device to device, and what was found before stands first.
        join = lambda old, new: jnp.concatenate([old, jnp.broadcast_to(new, (len(old), new.shape[-1]))], axis=1)

        def better(best: tuple[Array, Array], scores: Array, no: Array | None, places: Array) -> tuple[Array, Array]:
            allowed = scores if no is None else jnp.where(no, -jnp.inf, scores)
            return best_of(join(best[0], allowed), join(best[1], places))

        best = fold(better, (jnp.full((block[0], k), -jnp.inf), jnp.zeros((block[0], k), jnp.int32)))
        if axes:
            best = best_of(*(jax.lax.all_gather(x, axes, axis=1, tiled=True, to="invarying") for x in best))
        scores, rows = best
        return scores, jnp.where(scores == -jnp.inf, -1, rows)

    return _over_queries(of_block, queries, candidates, forbidden, count, block, mesh)


def _over_queries(
    of_block: Callable[..., Any], queries: Array, candidates: Array, marked: Any, count: int, block: Any, mesh: Any
) -> Any:
    """`of_block(fold, axes)` for each block of queries, its results joined.

    `fold(step, state)` carries a state through the blocks of candidates of one device, state = step(state, scores, marks,
    rows): float32 [n, m], -inf where a candidate is padding or came before; bool [n, m]; int32 [m].
    """
    axes = () if mesh is None else mesh.axis_names

    def of_device(queries: Array, candidates: Array, marked: Any) -> Any:
        held, (n, m) = len(candidates), block
        first = jax.lax.axis_index(axes) * held if axes else 0
        # The last block ends with the rows and begins among those of the block before; what is less than a block is padded in
        # front. So no copy of many rows is made.
        queries, candidates = _fill(queries, n), _fill(candidates, m)
        place = jnp.arange(held - len(candidates), held, dtype=jnp.int32)
        if marked is not None and not isinstance(marked, tuple):
            marked = _fill(_fill(marked, n), m, axis=1)
        elif marked is not None:
            marked = _fill(marked[0], n), _fill(marked[1], m)

        def of_queries(start: Array) -> Any:
            asked = _at(queries, start, n).astype(jnp.float32)

            def visit(step: Callable[..., Any], state: Any, begin: Array) -> tuple[Any, None]:
                rows, places = _at(candidates, begin, m), _at(place, begin, m)
                scores = jnp.einsum("qd,cd->qc", asked, rows.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
                real = (places >= begin) & (first + places < count)
                marks = None if marked is None else _marks(marked, (start, begin), block) & real
                return step(state, jnp.where(real, bounded(scores), -jnp.inf), marks, first + places), None

            def fold(step: Callable[..., Any], state: Any) -> Any:
                begins = jnp.arange(0, held, m, dtype=jnp.int32)
                return jax.lax.scan(functools.partial(visit, step), vary(state, frozenset(axes)), begins)[0]

            return of_block(fold, axes)

        return jax.lax.map(of_queries, jnp.arange(0, rows, n, dtype=jnp.int32))

    rows = len(queries)
    if mesh is not None:
        specs = P(), P(axes), _specs(marked, axes)
        of_device = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P())
    blocks = of_device(queries, candidates, marked)
    join = lambda x: jnp.concatenate([x[:-1].reshape(-1, *x.shape[2:]), x[-1, len(x) * block[0] - rows :]])
    return jax.tree.map(join, blocks)


def _specs(marked: Any, axes: tuple[str, ...]) -> Any:
    """How marks of candidates lie: as they do."""
    if marked is None:
        return None
    return (P(), P(axes)) if isinstance(marked, tuple) else P(None, axes)


def _marks(marked: Any, start: tuple[Array, Array], block: tuple[int, int]) -> Bool[Array, "n m"]:
    """Which pairs of one block are marked."""
    if not isinstance(marked, tuple):
        return jax.lax.dynamic_slice(marked, start, block)
    of_queries, of_candidates = map(_at, marked, start, block)
    return of_queries[:, None] == of_candidates


def bounded(scores: Array) -> Array:
    """Scores with `LOWEST` for what is no number or lower."""
    return jnp.where(scores > LOWEST, scores, LOWEST)


def _at(x: Array, start: Array, rows: int) -> Array:
    """Rows from `start`; the last ones where there are fewer from there on."""
    return jax.lax.dynamic_slice_in_dim(x, start, rows)


def _fill(x: Array, rows: int, axis: int = 0) -> Array:
    """At least so many rows, with zeros in front."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (max(0, rows - x.shape[axis]), 0)
    return jnp.pad(x, widths)


@jax.jit
def _first_not_finite(x: Array, mask: Array) -> Array:
    """The first row with a value that is not finite where the mask, of x's first axes, is true; -1: none."""
    bad = (~jnp.isfinite(x).all(axis=-1) & mask).reshape(len(x), -1).any(axis=1)
    return jnp.where(bad.any(), jnp.argmax(bad), -1)


# What is done before: checks, ids, and where arrays lie.


def _block(queries: Any, candidates: Any) -> tuple[int, int]:
    """The shape of a block of scores, from numbers of the whole problem alone."""
    if queries.shape[-1] != candidates.shape[-1]:
        raise ValueError(
            f"queries have width {queries.shape[-1]} and candidates {candidates.shape[-1]}; give equal ones."
        )
    if not len(queries) or not len(candidates):
        raise ValueError(
            f"there are {len(queries)} queries and {len(candidates)} candidates; give at least one of each."
        )
    fit = lambda rows, most: min(most, -(-rows // LEAST) * LEAST)
    return fit(len(queries), QUERIES), fit(len(candidates), CANDIDATES)


def check_k(k: int, candidates: int) -> None:
    """A ValueError where there are not so many candidates."""
    if not 1 <= k <= candidates:
        raise ValueError(f"{k=} must be between 1 and the number of candidates, {candidates}.")


def marks_of(name: str, marked: Any, queries: Any, candidates: Any) -> Any:
    """The marks, with ids as int32.

    Raises:
        ValueError: they are of other numbers of rows.
    """
    if marked is None:
        return None
    shape = tuple(map(len, marked)) if isinstance(marked, tuple) else tuple(marked.shape)
    if shape != (len(queries), len(candidates)):
        raise ValueError(
            f"{name} is of {shape[0]} queries and {shape[1]} candidates; there are {len(queries)} and {len(candidates)}."
        )
    return _small_ids(*marked) if isinstance(marked, tuple) else marked


def _small_ids(of_queries: Any, of_candidates: Any) -> tuple[Any, Any]:
    """The ids as int32, equal where they were: ids of photographs can be beyond 2 ** 31."""
    if isinstance(of_queries, jax.core.Tracer) or isinstance(of_candidates, jax.core.Tracer):
        return jnp.asarray(of_queries), jnp.asarray(of_candidates)
    both = np.concatenate([np.asarray(of_queries), np.asarray(of_candidates)])
    small = np.unique(both, return_inverse=True)[1].astype(np.int32)
    return small[: len(of_queries)], small[len(of_queries) :]


def _check_all_have_one(relevant: Any) -> None:
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(relevant)):
        return
    found = np.isin(*relevant) if isinstance(relevant, tuple) else np.asarray(relevant.any(axis=1))
    if not found.all():
        raise ValueError(
            f"query {int(np.argmin(found))} has no relevant candidate ({int((~found).sum())} of {len(found)} have none); "
            "leave such queries out, or add what they should find."
        )


def check_finite(name: str, x: Any, mask: Any = True) -> None:
    """A ValueError that names the first row with a value that is not finite, where the mask is true; traced arrays pass."""
    if isinstance(x, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    if (row := int(_first_not_finite(x, mask))) >= 0:
        raise ValueError(f"{name}[{row}] has a value that is not finite; look at what made this embedding.")


def _placed(queries: Any, candidates: Any, marked: Any, mesh: Mesh | None) -> tuple[tuple[Any, Any, Any], int]:
    """The arrays where they are needed, with as many candidates on each device; and how many candidates are real."""
    count, arrays = len(candidates), (queries, candidates, marked)
    if mesh is None:
        arrays = jax.tree.map(jnp.asarray, arrays)
    else:
        specs = P(), P(mesh.axis_names), _specs(marked, mesh.axis_names)

        def place(x: Any, spec: P) -> Array:
            # Only the last axis of a spec is split; zeros after the candidates are told from them by their number.
            xp = jnp if isinstance(x, jax.Array) else np
            short = -x.shape[len(spec) - 1] % mesh.size if spec else 0
            widths = [(0, short if axis == len(spec) - 1 else 0) for axis in range(x.ndim)]
            return jax.device_put(xp.pad(x, widths) if short else x, NamedSharding(mesh, spec))

        arrays = jax.tree.map(place, arrays, specs)
    for name, x in zip(("queries", "candidates"), arrays, strict=False):
        check_finite(name, x)
    return arrays, count
