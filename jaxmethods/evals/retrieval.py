"""How well embeddings find what belongs to them: ranks, recall at K, nearest neighbours.

Scores are inner products in float32; give embeddings of unit norm for cosines. They are computed block by block: [queries,
candidates] is never held. A wrong candidate that scores as high as the right one ranks before it, so that embeddings which
are all equal find nothing.

>>> images, captions = jnp.eye(3), jnp.eye(3)[jnp.array([0, 0, 1, 2])]  # the first image has two captions
>>> retrieval(images, captions, jnp.arange(3), jnp.array([0, 0, 1, 2]), ks=(1,)).image_to_text
Direction(recall={1: 1.0}, mean_reciprocal_rank=1.0, median_rank=1.0)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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


class Direction(NamedTuple):
    """What queries of one kind find among candidates of the other."""

    recall: dict[int, float]
    """K -> share of queries with a right candidate among the first K, 0..1."""
    mean_reciprocal_rank: float
    median_rank: float
    """1: first."""


class Retrieval(NamedTuple):
    """Image-text retrieval in both directions, and how far the two kinds of embeddings lie apart."""

    image_to_text: Direction
    text_to_image: Direction
    modality_gap: float


def retrieval(
    images: Float[Array | np.ndarray, "images dim"],
    texts: Float[Array | np.ndarray, "texts width"],
    image_ids: Int[Array | np.ndarray, "images"],
    text_ids: Int[Array | np.ndarray, "texts"],
    *,
    ks: Sequence[int] = (1, 5, 10),
    mesh: Mesh | None = None,
) -> Retrieval:
    """Recall at each K, mean reciprocal and median rank of both directions, and the modality gap.

    An image's query is a hit where any of its captions is among the first K; a caption has one right image.

    Args:
        images: [I, D], any float dtype, of unit norm.
        texts: [T, D].
        image_ids: [I], which image each is.
        text_ids: [T], of which image each text is a caption.
        mesh: splits candidates over all of its devices; the numbers are the same.

    Raises:
        ValueError: as `ranks`; a K below 1.
    """

    def direction(found: Array) -> Direction:
        recall = {k: float(recall_at(found, k)) for k in ks}
        return Direction(recall, float(mean_reciprocal_rank(found)), float(median_rank(found)))

    return Retrieval(
        direction(ranks(images, texts, (image_ids, text_ids), mesh=mesh)),
        direction(ranks(texts, images, (text_ids, image_ids), mesh=mesh)),
        float(modality_gap(images, texts)),
    )


def ranks(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "candidates width"],
    relevant: Bool[Array | np.ndarray, "rows columns"]
    | tuple[Int[Array | np.ndarray, "rows"], Int[Array | np.ndarray, "columns"]],
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
    if isinstance(relevant, tuple):
        relevant = _small_ids(*relevant)
    shape = tuple(map(len, relevant)) if isinstance(relevant, tuple) else relevant.shape
    if shape != (len(queries), len(candidates)):
        raise ValueError(
            f"relevant is of {shape[0]} queries and {shape[1]} candidates; "
            f"there are {len(queries)} and {len(candidates)}."
        )
    _check_all_have_one(relevant)
    arrays, count = _placed(queries, candidates, relevant, mesh)
    return _ranks(*arrays, count=count, block=block, mesh=mesh)


def top_k(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "candidates width"],
    k: int,
    *,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The k best candidates of each query, best first: scores [Q, k], float32, and rows of `candidates` [Q, k], int32.

    Exact. Of equal scores the lower row comes first.

    Args:
        queries: [Q, D], any float dtype.
        candidates: [C, D].
        mesh: splits candidates over all of its devices; the result is the same.

    Raises:
        ValueError: k below 1 or above C, an embedding that is not finite, shapes that do not fit, no rows. Traced arrays
            are not checked for finite values: nan is then the lowest score.
    """
    block = _block(queries, candidates)
    if not 1 <= k <= len(candidates):
        raise ValueError(f"{k=} must be between 1 and the number of candidates, {len(candidates)}.")
    arrays, count = _placed(queries, candidates, None, mesh)
    return _top_k(*arrays, k=k, count=count, block=block, mesh=mesh)


def recall_at(ranks: Int[Array | np.ndarray, "queries"], k: int) -> Float[Array, ""]:
    """Share of queries with a right candidate among the first k.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"{k=} must be at least 1: recall is of the first k candidates.")
    return jnp.mean(jnp.asarray(ranks) < k, dtype=jnp.float32)


def mean_reciprocal_rank(ranks: Int[Array | np.ndarray, "queries"]) -> Float[Array, ""]:
    """Mean of 1 / (rank + 1): 1 where the right candidate is first, 1/2 where it is second."""
    return jnp.mean(1.0 / (1.0 + jnp.asarray(ranks)), dtype=jnp.float32)


def median_rank(ranks: Int[Array | np.ndarray, "queries"]) -> Float[Array, ""]:
    """Median of rank + 1, as papers count (1: first); the mean of the middle two of an even number."""
    return jnp.median(1.0 + jnp.asarray(ranks))


def modality_gap(
    images: Float[Array | np.ndarray, "images dim"], texts: Float[Array | np.ndarray, "texts dim"]
) -> Float[Array, ""]:
    """||mean of images - mean of texts||, float32 (https://arxiv.org/abs/2203.02053, section 2)."""
    centre = lambda x: jnp.mean(jnp.asarray(x), axis=0, dtype=jnp.float32)
    return jnp.linalg.norm(centre(images) - centre(texts))


def precision_at_1(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "rows candidates width"],
    mask: Bool[Array | np.ndarray, "masked real"] | None = None,
) -> Bool[Array, "queries"]:
    """Whether candidate 0, the right one, scores higher than all other candidates of its own row, as in MMEB.

    A tie is a miss. (MMEB's own program takes the first of the highest, a hit: a constant model has a score of 1 there.)

    Args:
        queries: [Q, D], any float dtype.
        candidates: [Q, C, D], each query's own.
        mask: [Q, C], false at padding; all are real when None.

    Raises:
        ValueError: shapes that do not fit, a right candidate that is masked, an embedding that is not finite where the
            mask is true. Traced arrays are not checked for the latter two: the row is a miss where its right score is nan.
    """
    if (len(queries), queries.shape[-1]) != (len(candidates), candidates.shape[-1]) or not candidates.shape[1]:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and candidates {tuple(candidates.shape)}; "
            "they must be [Q, D] and [Q, C, D], with C of at least 1."
        )
    mask = np.ones(candidates.shape[:2], bool) if mask is None else mask
    if mask.shape != candidates.shape[:2]:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; it must be {tuple(candidates.shape[:2])}.")
    if not isinstance(mask, jax.core.Tracer) and not (real := np.asarray(mask[:, 0])).all():
        raise ValueError(f"mask is false at candidate 0 of row {int(np.argmin(real))}; that is the right one.")
    _check_finite("queries", queries)
    _check_finite("candidates", candidates, mask)
    return _first_is_best(queries, candidates, mask)


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
    queries: Array, candidates: Array, relevant: None, *, k: int, count: int, block: tuple[int, int], mesh: Any
) -> tuple[Array, Array]:
    def best_of(scores: Array, places: Array) -> tuple[Array, Array]:
        # Of equal scores `top_k` takes the first, and 0.0 before -0.0.
        scores, at = jax.lax.top_k(jnp.where(scores == 0.0, 0.0, scores), k)
        return scores, jnp.take_along_axis(places, at, axis=1)

    def of_block(fold: Callable[..., Any], axes: tuple[str, ...]) -> tuple[Array, Array]:
        # Rows rise from block to block and from device to device, and what was found before stands first.
        join = lambda old, new: jnp.concatenate([old, jnp.broadcast_to(new, (len(old), new.shape[-1]))], axis=1)
        better = lambda best, scores, _, places: best_of(join(best[0], scores), join(best[1], places))
        best = fold(better, (jnp.full((block[0], k), -jnp.inf), jnp.zeros((block[0], k), jnp.int32)))
        if axes:
            best = best_of(*(jax.lax.all_gather(x, axes, axis=1, tiled=True, to="invarying") for x in best))
        return best

    return _over_queries(of_block, queries, candidates, relevant, count, block, mesh)


def _over_queries(
    of_block: Callable[..., Any], queries: Array, candidates: Array, relevant: Any, count: int, block: Any, mesh: Any
) -> Any:
    """`of_block(fold, axes)` for each block of queries, its results joined.

    `fold(step, state)` carries a state through the blocks of candidates of one device, state = step(state, scores, right,
    rows): float32 [n, m], -inf where a candidate is padding or came before; bool [n, m]; int32 [m].
    """
    axes = () if mesh is None else mesh.axis_names

    def of_device(queries: Array, candidates: Array, relevant: Any) -> Any:
        held, (n, m) = len(candidates), block
        first = jax.lax.axis_index(axes) * held if axes else 0
        # The last block ends with the rows and begins among those of the block before; what is less than a block is padded in
        # front. So no copy of many rows is made.
        queries, candidates = _fill(queries, n), _fill(candidates, m)
        place = jnp.arange(held - len(candidates), held, dtype=jnp.int32)
        if relevant is not None and not isinstance(relevant, tuple):
            relevant = _fill(_fill(relevant, n), m, axis=1)
        elif relevant is not None:
            relevant = _fill(relevant[0], n), _fill(relevant[1], m)

        def of_queries(start: Array) -> Any:
            asked = _at(queries, start, n).astype(jnp.float32)

            def visit(step: Callable[..., Any], state: Any, begin: Array) -> tuple[Any, None]:
                rows, places = _at(candidates, begin, m), _at(place, begin, m)
                scores = jnp.einsum("qd,cd->qc", asked, rows.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)
                real = (places >= begin) & (first + places < count)
                right = None if relevant is None else _right(relevant, (start, begin), block) & real
                return step(state, jnp.where(real, _bounded(scores), -jnp.inf), right, first + places), None

            def fold(step: Callable[..., Any], state: Any) -> Any:
                begins = jnp.arange(0, held, m, dtype=jnp.int32)
                return jax.lax.scan(functools.partial(visit, step), vary(state, frozenset(axes)), begins)[0]

            return of_block(fold, axes)

        return jax.lax.map(of_queries, jnp.arange(0, rows, n, dtype=jnp.int32))

    rows = len(queries)
    if mesh is not None:
        specs = P(), P(axes), _specs(relevant, axes)
        of_device = jax.shard_map(of_device, mesh=mesh, in_specs=specs, out_specs=P())
    blocks = of_device(queries, candidates, relevant)
    join = lambda x: jnp.concatenate([x[:-1].reshape(-1, *x.shape[2:]), x[-1, len(x) * block[0] - rows :]])
    return jax.tree.map(join, blocks)


def _specs(relevant: Any, axes: tuple[str, ...]) -> Any:
    """How what is known of candidates lies: as they do."""
    if relevant is None:
        return None
    return (P(), P(axes)) if isinstance(relevant, tuple) else P(None, axes)


def _right(relevant: Any, start: tuple[Array, Array], block: tuple[int, int]) -> Bool[Array, "n m"]:
    """Which candidates of one block are right."""
    if not isinstance(relevant, tuple):
        return jax.lax.dynamic_slice(relevant, start, block)
    of_queries, of_candidates = map(_at, relevant, start, block)
    return of_queries[:, None] == of_candidates


def _bounded(scores: Array) -> Array:
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
def _first_is_best(queries: Array, candidates: Array, mask: Array) -> Array:
    def of_row(row: tuple[Array, Array, Array]) -> Array:
        query, own, real = row
        # Not a product of matrices: at their edges those may sum in another order, and tell equal candidates apart.
        scores = _bounded((own.astype(jnp.float32) * query.astype(jnp.float32)).sum(axis=1))
        return (scores[0] > LOWEST) & ~(real[1:] & (scores[1:] >= scores[0])).any()

    return jax.lax.map(of_row, (queries, candidates, mask))  # row by row: no float32 copy of all candidates


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


def _check_finite(name: str, x: Any, mask: Any = True) -> None:
    if isinstance(x, jax.core.Tracer) or isinstance(mask, jax.core.Tracer):
        return
    if (row := int(_first_not_finite(x, mask))) >= 0:
        raise ValueError(f"{name}[{row}] has a value that is not finite; look at what made this embedding.")


def _placed(queries: Any, candidates: Any, relevant: Any, mesh: Mesh | None) -> tuple[tuple[Any, Any, Any], int]:
    """The arrays where they are needed, with as many candidates on each device; and how many candidates are real."""
    count, arrays = len(candidates), (queries, candidates, relevant)
    if mesh is None:
        arrays = jax.tree.map(jnp.asarray, arrays)
    else:
        specs = P(), P(mesh.axis_names), _specs(relevant, mesh.axis_names)

        def place(x: Any, spec: P) -> Array:
            # Only the last axis of a spec is split; zeros after the candidates are told from them by their number.
            xp = jnp if isinstance(x, jax.Array) else np
            short = -x.shape[len(spec) - 1] % mesh.size if spec else 0
            widths = [(0, short if axis == len(spec) - 1 else 0) for axis in range(x.ndim)]
            return jax.device_put(xp.pad(x, widths) if short else x, NamedSharding(mesh, spec))

        arrays = jax.tree.map(place, arrays, specs)
    for name, x in zip(("queries", "candidates"), arrays, strict=False):
        _check_finite(name, x)
    return arrays, count
