"""How far apart texts are, and so how far an agent has drifted (SAUP, arXiv 2412.01033, section 3.3).

A distance takes two lists of texts and gives float32 [pairs], each at least 0. The paper's is 1 / score of a RoBERTa trained on
SQuAD v2, of which neither checkpoint nor score is told; `reciprocal` makes one of any score.

>>> token_overlap(["the price of a lamp"], ["a lamp, the price of which is 3.00"])
array([0.44444445], dtype=float32)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from jaxmethods import tree
from jaxmethods.data import trajectories
from jaxmethods.evals import completion
from jaxmethods.evals.sentences import Embedder

Distance = Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, "pairs"]]

GAPS = ("action", "step")
FLOOR = 1e-3


def pairwise(distance: Callable[[str, str], float]) -> Distance:
    """A distance of lists from one of two texts."""
    return lambda first, second: np.array([distance(a, b) for a, b in zip(first, second, strict=True)], np.float32)


def token_overlap(first: Sequence[str], second: Sequence[str]) -> Float32[np.ndarray, "pairs"]:
    """1 - |A and B| / |A or B| of the sets of words, in lower case; 0 where neither text has one."""
    return pairwise(lambda a, b: 1 - completion.jaccard(a, b))(first, second)


def cosine_distance(embed: Embedder) -> Distance:
    """clip(1 - cos, 0, 2) of the vectors of both texts; every text is embedded once.

    Args:
        embed: texts to [texts, D], such as `evals.sentences.sentence_embedder`.

    The distance raises:
        ValueError: a text whose vector is 0 or not finite.
    """

    def distance(first: Sequence[str], second: Sequence[str]) -> Float32[np.ndarray, "pairs"]:
        texts = list(dict.fromkeys([*first, *second]))
        if not texts:
            return np.zeros(0, np.float32)
        vectors = np.asarray(embed(texts), np.float32)
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        if not (sound := (np.isfinite(norms) & (norms > 0))[:, 0]).all():
            raise ValueError(
                f"the vector of {texts[int(np.argmin(sound))][:60]!r} is 0 or not finite; it has no direction."
            )
        unit = dict(zip(texts, vectors / norms, strict=True))
        cosines = [float(unit[a] @ unit[b]) for a, b in zip(first, second, strict=True)]
        return np.clip(1 - np.array(cosines, np.float32), 0, 2)

    return distance


def reciprocal(score: Distance, *, floor: float = FLOOR) -> Distance:
    """1 / max(score, floor), the paper's form: never above 1 / floor, which `floored` counts.

    Args:
        score: two lists of texts to [pairs], higher where they are closer: a reader's confidence, say, or 1 - a cosine distance.

    Raises:
        ValueError: a floor that is not positive; from the distance, a score that is not finite.
    """
    if not floor > 0:
        raise ValueError(f"{floor=} must be positive: it bounds 1 / score.")

    def distance(first: Sequence[str], second: Sequence[str]) -> Float32[np.ndarray, "pairs"]:
        scores = np.asarray(score(first, second), np.float32)
        if not (sound := np.isfinite(scores)).all():
            raise ValueError(
                f"the score of {first[int(np.argmin(sound))][:60]!r} is {scores[~sound][0]}; it must be finite."
            )
        return 1 / np.maximum(scores, np.float32(floor))

    return distance


def reciprocal_score(score: Callable[[str, str], float], floor: float = FLOOR) -> Distance:
    """`reciprocal` of a score of two texts."""
    return reciprocal(pairwise(score), floor=floor)


def floored(distances: Float[np.ndarray, "*shape"], *, floor: float = FLOOR) -> float:
    """The share of reciprocal distances that are 1 / floor: a few of them rule their trajectories."""
    return float(np.mean(np.asarray(distances, np.float32) >= np.float32(1) / np.float32(floor)))


def drifts(rows: Sequence[Mapping[str, Any]], distance: Distance) -> list[Float[np.ndarray, "steps"]]:
    """Inquiry drift D_a,n = dis(Z_n, Q): all steps up to n against the question."""
    texts = [[_told(row["steps"][: n + 1]) for n in range(len(row["steps"]))] for row in rows]
    questions = [[row["question"]] * len(row["steps"]) for row in rows]
    return _of_rows(texts, questions, distance)


def gaps(
    rows: Sequence[Mapping[str, Any]], distance: Distance, *, of: str = "action"
) -> list[Float[np.ndarray, "steps"]]:
    """Inference gap D_o,n: the step's "action", as in the paper's algorithm, or all of the "step", as in its figure, against what
    it brought; 0 where it brought nothing.

    Raises:
        ValueError: another `of`.
    """
    tree.require_one_of("of", of, GAPS)
    said = lambda step: step["action"] if of == "action" and step["action"] else trajectories.spoken(step)
    brought = [[step for step in row["steps"] if step.get("observation")] for row in rows]
    found = _of_rows(
        [[said(step) for step in steps] for steps in brought],
        [[step["observation"] for step in steps] for steps in brought],
        distance,
    )
    out = []
    for row, some in zip(rows, found, strict=True):
        there = np.array([bool(step.get("observation")) for step in row["steps"]])
        out.append(np.zeros(len(there), np.float32))
        out[-1][there] = some
    return out


def _told(steps: Sequence[Mapping[str, Any]]) -> str:
    """A trajectory so far as text."""
    lines = [[trajectories.spoken(step), f"Observation: {step.get('observation') or ''}".strip()] for step in steps]
    return "\n".join(line for pair in lines for line in pair)


def _of_rows(
    first: Sequence[Sequence[str]], second: Sequence[Sequence[str]], distance: Distance
) -> list[Float[np.ndarray, "steps"]]:
    """The distances of all pairs, asked for at once; checked, and by rows again."""
    found = np.asarray(distance([t for some in first for t in some], [t for some in second for t in some]), np.float32)
    if not (sound := np.isfinite(found) & (found >= 0)).all():
        raise ValueError(
            f"distance {int(np.argmin(sound))} is {found[~sound][0]}; distances are finite and at least 0."
        )
    ends = np.cumsum([len(some) for some in first])
    return np.split(found, ends[:-1])
