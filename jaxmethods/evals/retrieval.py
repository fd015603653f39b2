"""How well embeddings find what belongs to them: recall at K and the like, of the ranks that `retrieval.search` finds.

Scores are inner products in float32; give embeddings of unit norm for cosines. They are computed block by block: [queries,
candidates] is never held. A wrong candidate that scores as high as the right one ranks before it, so that embeddings which
are all equal find nothing.

>>> images, captions = jnp.eye(3), jnp.eye(3)[jnp.array([0, 0, 1, 2])]  # the first image has two captions
>>> retrieval(images, captions, jnp.arange(3), jnp.array([0, 0, 1, 2]), ks=(1,)).image_to_text
Direction(recall={1: 1.0}, mean_reciprocal_rank=1.0, median_rank=1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.retrieval.search import LOWEST, bounded, check_finite, ranks, top_k

__all__ = [
    "Direction", "Retrieval", "mean_reciprocal_rank", "median_rank", "modality_gap", "precision_at_1", "ranks", "recall_at",
    "retrieval", "top_k",
]  # fmt: skip


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
    check_finite("queries", queries)
    check_finite("candidates", candidates, mask)
    return _first_is_best(queries, candidates, mask)


@jax.jit
def _first_is_best(queries: Array, candidates: Array, mask: Array) -> Array:
    def of_row(row: tuple[Array, Array, Array]) -> Array:
        query, own, real = row
        # Not a product of matrices: at their edges those may sum in another order, and tell equal candidates apart.
        scores = bounded((own.astype(jnp.float32) * query.astype(jnp.float32)).sum(axis=1))
        return (scores[0] > LOWEST) & ~(real[1:] & (scores[1:] >= scores[0])).any()

    return jax.lax.map(of_row, (queries, candidates, mask))  # row by row: no float32 copy of all candidates
