"""From the answers drawn to questions to a score of each: rows of plain values in, arrays out.

A row of answers is {"said": the greedy answer, "samples": [S] texts}; of likelihoods {"logps": [sum, tokens] of the greedy answer
and of each distinct sample, or None}; of comparisons {"similarity": [N, N], "clusters": [N]} of the distinct samples, perhaps with
{"contradiction": [S]}. Distinct are samples that differ in their words (`scores.plain_answer`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxmethods.evals import completion
from jaxmethods.evals.facttest import scores

Row = dict[str, Any]

SCORES: Mapping[str, tuple[str, ...]] = {
    "vanilla": (),
    "degree": (),
    "discrete": ("compared",),
    "kernel": ("compared",),
    "semantic": ("logps", "compared"),
    "semantic_entropy": ("logps", "compared"),
    "likelihood": ("logps",),
    "self_check": ("compared", "contradiction"),
}
"""What each score needs beside the answers."""
_BLOCK = 256
"""Questions that a program scores at once."""


def right_answer(said: str, given: Sequence[str], how: str = "substring") -> bool:
    """Whether an answer, up to its first full stop, holds one of those given.

    >>> right_answer("It is Paris. Or Rome.", ["Paris"]), right_answer("artist", ["art"]), right_answer("artist", ["art"], "words")
    (True, True, False)

    Args:
        how: "substring", letter for letter, as in the paper; "words": as whole words in any case.
    """
    first = said.split(".")[0]
    if how == "substring":
        return any(one in first for one in given)
    words = f" {completion.plain(first)} "
    return any(f" {completion.plain(one)} " in words for one in given)


def distinct(samples: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """(the first of each kind of sample, [S] which of these each sample is)."""
    places, ids = scores.first_of_each([scores.plain_answer(text) for text in samples])
    return [samples[place] for place in places], ids


def by_embeddings(embeddings: np.ndarray, same_above: float) -> Row:
    """The comparison of distinct samples by the cosines of their embeddings [N, G]."""
    similar = np.asarray(scores.cosine_similarity(embeddings))
    return _compared(similar, similar > same_above)


def by_words(texts: Sequence[str]) -> Row:
    """The comparison of distinct samples by their words: all of them differ, and overlap by some share."""
    similar = scores.word_overlap([scores.plain_answer(text) for text in texts])
    return _compared(similar, similar == 1)


def by_inference(
    nli: Callable[[Sequence[str], Sequence[str]], Any], texts: Sequence[str], said: Row, *, official: bool = False
) -> Row:
    """The comparison of distinct samples by a model of inference, and whether samples contradict the greedy answer.

    Args:
        nli: (premises, hypotheses) -> [N, 3], P(entailment), P(neutral), P(contradiction).

    Raises:
        ValueError: what it gives has another shape, or is not finite.
    """
    n, drawn = len(texts), list(said["samples"])
    premises = [one for one in texts for _ in texts] + [said["said"]] * len(drawn)
    found = np.asarray(nli(premises, [*texts] * n + drawn), np.float32)
    if found.shape != (len(premises), 3) or not np.isfinite(found).all():
        raise ValueError(
            f"the model of inference gives shape {found.shape}, or what is not finite; it must give [{len(premises)}, 3] of "
            "(entailment, neutral, contradiction)."
        )
    square = found[: n * n].reshape(n, n, 3)
    same = np.asarray(scores.nli_equivalent(square, official=official)) | np.eye(n, dtype=bool)
    return _compared(np.asarray(scores.nli_similarity(square)), same) | {"contradiction": found[n * n :, 2].tolist()}


def _compared(similar: np.ndarray, same: np.ndarray) -> Row:
    return {"similarity": np.round(similar.astype(float), 6).tolist(), "clusters": scores.clusters(same).tolist()}


def scored(
    name: str, said: Sequence[Row], logps: Sequence[Row] = (), compared: Sequence[Row] = (), *, official: bool = False
) -> np.ndarray:
    """A score of each question, [N] float64, by its name in `SCORES`; -inf where no answer has a likelihood.

    A score is the same to the bit whatever questions stand beside its own, as long as each has as many samples. It must be: many
    scores take few values, and a threshold on one of them certifies nothing at it or everything, by the last bit.

    Args:
        said, logps, compared: rows of the same questions; those that the score needs.
        official: as of `scores.kernel_entropy`.
    """
    if name == "likelihood":
        first = [row["logps"][0] for row in logps]
        return np.array([-math.inf if one is None else one[0] / one[1] for one in first])
    width = max(len(row["samples"]) for row in said)
    if name == "self_check":
        return _run(scores.self_check, *_filled([row["contradiction"] for row in compared], width))
    if name == "degree":
        return _run(scores.degree, *_squares([scores.word_overlap(row["samples"]) for row in said], width))
    if name == "kernel":
        similar = _squares([np.array(row["similarity"]) for row in compared], width)
        return _run(_kernel_official if official else scores.kernel_entropy, *similar)
    kinds = [distinct(row["samples"])[1] for row in said]
    if name == "vanilla":
        return _run(scores.vanilla_entropy, *_filled(kinds, width, np.int32))
    clusters = [np.array(row["clusters"]) for row in compared]
    if name == "discrete":
        of_samples = [cluster[kind] for cluster, kind in zip(clusters, kinds, strict=True)]
        return _run(scores.vanilla_entropy, *_filled(of_samples, width, np.int32))
    each = [[math.nan if one is None else one[0] / one[1] for one in row["logps"][1:]] for row in logps]
    means, mask = _filled(each, width)
    mask &= ~np.isnan(means)
    of = {"semantic": scores.mean_cluster_likelihood, "semantic_entropy": scores.semantic_entropy}[name]
    found = _run(of, np.where(mask, means, 0).astype(np.float32), _filled(clusters, width, np.int32)[0], mask)
    return np.where(mask.any(axis=1), found, -np.inf)


_kernel_official = functools.partial(scores.kernel_entropy, official=True)
_program = jax.jit(lambda of, *given: of(*given), static_argnums=0)


def _run(of: Callable[..., Any], *given: np.ndarray) -> np.ndarray:
    """By one program for any number of questions: another shape would be another program, and round otherwise."""
    found = []
    for start in range(0, len(given[0]), _BLOCK):
        some = [one[start : start + _BLOCK] for one in given]
        short = _BLOCK - len(some[0])
        some = [np.concatenate([one, np.zeros((short, *one.shape[1:]), one.dtype)]) for one in some]
        found.append(np.asarray(_program(of, *some), np.float64)[: _BLOCK - short])
    return np.concatenate(found)


def _filled(rows: Sequence[Any], width: int, dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """(rows of up to `width` values side by side, mask)."""
    values, mask = np.zeros((len(rows), width), dtype), np.zeros((len(rows), width), bool)
    for at, row in enumerate(rows):
        values[at, : len(row)], mask[at, : len(row)] = row, True
    return values, mask


def _squares(rows: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(square arrays of up to `width` rows in the corner of one, mask)."""
    values, mask = np.zeros((len(rows), width, width), np.float32), np.zeros((len(rows), width), bool)
    for at, row in enumerate(rows):
        values[at, : len(row), : len(row)], mask[at, : len(row)] = row, True
    return values, mask
