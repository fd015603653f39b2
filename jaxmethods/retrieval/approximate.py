"""Approximate search in large bases by hnswlib's graphs (https://arxiv.org/abs/1603.09320), on the host.

For bases of more than tens of thousands that are asked many times: at 10,000 candidates the exact search is as fast at the same
recall, and `graph_of` takes seconds (docs/search.md; larger bases have not been timed).

    graph = graph_of(candidates)
    scores, rows = top_k(queries, graph, 5, forbidden=(query_ids, candidate_ids))
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.retrieval.search import Marks, check_finite, check_k, marks_of


class Graph(NamedTuple):
    """Candidates linked to their neighbours; immutable but for the library's own scratch space."""

    index: Any
    """hnswlib's."""
    shape: tuple[int, int]
    """Candidates, and the width of their embeddings."""

    def __len__(self) -> int:
        return self.shape[0]


def graph_of(
    candidates: Float[Array | np.ndarray, "candidates dim"],
    *,
    neighbours: int = 16,
    breadth: int = 200,
    seed: int = 0,
    threads: int = -1,
) -> Graph:
    """Links each candidate to others that are near by inner product; make embeddings of unit norm.

    With one thread the graph is the same each time.

    Args:
        candidates: [C, D], any float dtype.
        neighbours: links of a candidate in each layer (M of the paper); more find more, and take more memory and time.
        breadth: how many near ones are looked at for each link (efConstruction).
        threads: of the CPU; -1: all.

    Raises:
        ImportError: hnswlib is missing.
        ValueError: no candidates, or one that is not finite.
    """
    if not len(candidates):
        raise ValueError("there are 0 candidates; give at least one.")
    check_finite("candidates", candidates)
    index = _hnswlib().Index(space="ip", dim=candidates.shape[1])
    index.init_index(max_elements=len(candidates), M=neighbours, ef_construction=breadth, random_seed=seed)
    index.add_items(np.asarray(candidates, np.float32), np.arange(len(candidates)), num_threads=threads)
    return Graph(index, tuple(candidates.shape))


def top_k(
    queries: Float[Array | np.ndarray, "queries dim"],
    candidates: Float[Array | np.ndarray, "candidates width"] | Graph,
    k: int,
    *,
    forbidden: Marks | None = None,
    breadth: int = 64,
    threads: int = -1,
) -> tuple[Float[np.ndarray, "queries k"], Int[np.ndarray, "queries k"]]:
    """As `search.top_k`, but some of the k best may be missed, and then the next ones stand there.

    What is forbidden is never found: as many more are searched for as are forbidden to any one query, so large groups cost time.
    Scores are 1 - (1 - inner product) in float32: right to about 1e-7.

    Args:
        candidates: [C, D], or their graph, so that it is made once.
        breadth: how many near ones are looked at (ef of the paper), at least as many as are searched for.
        threads: of the CPU; -1: all.

    Raises:
        ImportError: hnswlib is missing.
        ValueError: as `search.top_k`; or the graph holds too few links to reach so many candidates.
    """
    graph = candidates if isinstance(candidates, Graph) else graph_of(candidates, threads=threads)
    if queries.shape[-1] != graph.shape[1]:
        raise ValueError(f"queries have width {queries.shape[-1]} and candidates {graph.shape[1]}; give equal ones.")
    check_k(k, len(graph))
    check_finite("queries", queries)
    marks = marks_of("forbidden", forbidden, queries, graph)
    marks = tuple(map(np.asarray, marks)) if isinstance(marks, tuple) else None if marks is None else np.asarray(marks)
    wanted = min(k + _most(marks), len(graph))
    graph.index.set_ef(max(breadth, wanted))
    try:
        rows, distances = graph.index.knn_query(np.asarray(queries, np.float32), k=wanted, num_threads=threads)
    except RuntimeError as error:
        raise ValueError(
            f"the graph of {len(graph)} candidates reaches fewer than {wanted}; raise breadth={breadth}, or make it with more "
            "neighbours."
        ) from error
    rows, scores = rows.astype(np.int32), 1 - distances
    if marks is not None:
        no = (
            marks[0][:, None] == marks[1][rows] if isinstance(marks, tuple) else np.take_along_axis(marks, rows, axis=1)
        )
        scores = np.where(no, -np.inf, scores)
        order = np.argsort(no, axis=1, kind="stable")[:, :k]  # what is allowed first, else as it stood
        rows, scores = (np.take_along_axis(x, order, axis=1) for x in (np.where(no, -1, rows), scores))
    return scores[:, :k], rows[:, :k]


def _most(marks: Any) -> int:
    """How many candidates are marked for any one query, at most."""
    if marks is None:
        return 0
    if not isinstance(marks, tuple):
        return int(marks.sum(axis=1).max())
    of_queries, of_candidates = marks
    return int(np.bincount(of_candidates, minlength=int(of_queries.max()) + 1)[of_queries].max())


def _hnswlib() -> Any:
    try:
        import hnswlib
    except ImportError:
        raise ImportError("approximate search needs a package: pip install 'jaxmethods[retrieval]'") from None
    return hnswlib
