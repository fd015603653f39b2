"""Embeddings of rows, by one compiled program a view."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmethods import data
from jaxmethods.objectives import CAFe
from jaxmethods.tree import Tree


def embed_rows(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: data.Source | str | Sequence[Mapping[str, Any]],
    *,
    objective: CAFe | None = None,
    views: Sequence[str] = ("query", "target"),
    sequence_length: int = 512,
    batch_size: int = 16,
    limit: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, np.ndarray]:
    """View -> float32 [rows, width] of unit norm, in the order of the rows.

    Args:
        rows: a file or dicts, as the objective's training rows; a view needs only what it reads ("query" the picture, "target" the
            answer).
        objective: whose views, pooling and heads are taken; `CAFe()` when None.
        views: "query" and "target", or one of them.
        sequence_length: tokens a row; longer text is cut at its end.
        limit: the first so many rows.

    Raises:
        ValueError: an unknown view, no rows, a row without the token that is read, or what `data.build` raises.
    """
    objective = objective or CAFe()
    known = objective.embeddings()
    if unknown := [name for name in views if name not in known]:
        raise ValueError(f"view {unknown[0]!r} is unknown; the views are {', '.join(known)}.")
    config = data.Data(sequence_length=objective.embedding_length or sequence_length, pack=False, evaluation_rows=limit)
    given: Any
    if isinstance(rows, str | data.Source):
        config, given = dataclasses.replace(config, evaluation=rows), {"split": "evaluation"}
    else:
        given = {"rows": rows[:limit]}
    out = {}
    for name in views:
        sight, view = getattr(module, "sight", None), {name: known[name]}
        laid_out, _ = data.build(config, tokenizer, sight=sight, views=view, **given)
        found: list[np.ndarray] = []
        for batch in data.evaluation_batches(laid_out, batch_size):
            progress(f"{name}: {min(batch_size * (len(found) + 1), len(laid_out))} of {len(laid_out)}")
            own = {key.partition("/")[2]: value for key, value in batch.items()}
            found.append(np.asarray(_embedded(module, objective, name, params, own)))
        out[name] = np.concatenate(found)[: len(laid_out)]
        if not (there := out[name].any(axis=1)).all():
            raise ValueError(
                f"row {there.argmin()}: its {name} has no token {objective.token_id}, whose state is read."
            )
    return out


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _embedded(module: Any, objective: CAFe, name: str, params: Tree, batch: Any) -> Any:
    return objective.embed(module, params, batch, name)
