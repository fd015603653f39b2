"""Vectors of sentences by a BERT-style encoder, such as MiniLM."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32

from jaxmethods import tree
from jaxmethods.tree import Tree

Embedder = Callable[[Sequence[str]], Float[np.ndarray, "texts dim"]]

TRUNCATIONS = ("right", "left", "chunks")


def sentence_embedder(
    module: Any, params: Tree, tokenizer: Any, *, truncate: str = "right", batch_size: int = 32
) -> Embedder:
    """Texts to float32 [texts, D] by an encoder such as MiniLM, one compiled program for each of few lengths.

    Args:
        truncate: what happens to texts of more tokens than the encoder reads: "right" keeps their beginning, "left" their end (of
            a long trajectory, so that late steps count); "chunks" averages the vectors of their parts.
        batch_size: texts, or parts, at a time.

    Raises:
        ValueError: an unknown `truncate`.
    """
    tree.require_one_of("truncate", truncate, TRUNCATIONS)
    most = module.config.max_positions
    ids_of = lambda text, **options: list(tokenizer(text, verbose=False, **options)["input_ids"])
    alone = ids_of("a", add_special_tokens=False)
    around = ids_of("a")
    first = next(i for i in range(len(around)) if around[i : i + len(alone)] == alone)
    before, after = around[:first], around[first + len(alone) :]
    room = most - len(before) - len(after)

    def embed(texts: Sequence[str]) -> Float32[np.ndarray, "texts dim"]:
        pieces, owners = [], []
        for number, text in enumerate(texts):
            ids = ids_of(text, add_special_tokens=False)
            parts = [ids[i : i + room] for i in range(0, len(ids), room)] or [[]]
            kept = {"right": parts[:1], "left": [ids[-room:]], "chunks": parts}[truncate]
            for part in kept:
                pieces.append([*before, *part, *after])
                owners.append(number)
        vectors: list[Any] = [None] * len(pieces)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            width = min(most, -(-len(pieces[some[-1]]) // 64) * 64)
            tokens, mask = np.zeros((batch_size, width), np.int32), np.zeros((batch_size, width), bool)
            mask[len(some) :, 0] = True
            for row, i in enumerate(some):
                tokens[row, : len(pieces[i])], mask[row, : len(pieces[i])] = pieces[i], True
            for i, vector in zip(some, np.asarray(_pooled(module, params, tokens, mask), np.float32), strict=False):
                vectors[i] = vector
        starts = np.searchsorted(owners, np.arange(len(texts)))
        counts = np.diff(starts, append=len(owners))
        return np.add.reduceat(np.stack(vectors), starts) / counts[:, None].astype(np.float32)

    return embed


@functools.partial(jax.jit, static_argnums=0)
def _pooled(module: Any, params: Tree, tokens: Any, mask: Any) -> Any:
    return module.apply({"params": params}, tokens, mask).pooled
