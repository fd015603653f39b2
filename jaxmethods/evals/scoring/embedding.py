"""Embeddings of texts of mixed lengths, from a stream: few compiled programs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float32

from jaxmethods.evals.scoring.likelihoods import BATCH_TOKENS, WINDOW, on_mesh, place, ways
from jaxmethods.evals.scoring.planning import UNPACKED, Work, plan, shapes_for, windows
from jaxmethods.objectives import cafe
from jaxmethods.tree import Tree


def embeddings(
    module: Any,
    params: Tree,
    texts: Iterable[Sequence[int]],
    *,
    pooling: str = "last",
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    window: int = WINDOW,
    mesh: Mesh | None = None,
    work: Work | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Float32[np.ndarray, "width"]]:
    """`objectives.cafe.embed` of each text's tokens, of unit norm, in the order of the stream.

    Args:
        texts: token ids, at least one of each text; text that is too long loses its end.
        pooling: "last" or "mean".
        limit, batch_tokens, window, mesh, work, progress: as of `log_likelihoods`.

    Raises:
        ValueError: a text without tokens, or an unknown pooling.
    """
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling {pooling!r} is unknown; choose of last, mean.")
    module, mesh = on_mesh(module, mesh)
    limit = limit or module.config.max_position_embeddings
    shapes = shapes_for(limit, batch_tokens, shortest=UNPACKED, multiple=ways(mesh))
    work = Work() if work is None else work
    done = 0
    for some in windows(texts, window):
        rows = [np.asarray(text, np.int32)[:limit] for text in some]
        if empty := [number for number, row in enumerate(rows, done + 1) if not len(row)]:
            raise ValueError(f"request {empty[0]} has no tokens; give at least one.")
        found: dict[int, np.ndarray] = {}
        for shape, laid in plan(np.array([len(row) for row in rows]), shapes, pack=False):
            tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
            mask[:, 0] = True  # rows that are left over are embedded too, as a token
            for i, (number,) in enumerate(laid):
                tokens[i, : len(rows[number])], mask[i, : len(rows[number])] = rows[number], True
            placed = place({"tokens": tokens, "mask": mask}, mesh)
            made = np.asarray(_embedded(module, params, placed["tokens"], placed["mask"], pooling=pooling))
            found |= {int(number): made[i] for i, (number,) in enumerate(laid)}
            work.count(("embeddings", *shape, pooling), shape.places, sum(len(rows[number]) for (number,) in laid))
        done += len(some)
        work.requests += len(some)
        progress(done)
        yield from (found[number] for number in range(len(some)))


@functools.partial(jax.jit, static_argnames=("module", "pooling"))
def _embedded(module: Any, params: Tree, tokens: Array, mask: Array, *, pooling: str) -> Array:
    return cafe.embed(module, params, tokens, mask, pooling=pooling)
