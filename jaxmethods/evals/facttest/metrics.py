"""What certification does to the answers of a test set, with bootstrap intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from jaxmethods.evals.facttest.certifying import certify, rank, real


class Outcome(NamedTuple):
    """Test answers under one threshold. A share of nothing is nan; the counts tell which."""

    answers: int
    right: int
    certified: int
    certified_right: int
    average_precision: float
    """Of right answers in the order of their scores."""
    accuracy_interval: tuple[float, float]
    """95 % bootstrap interval of `accuracy_after`; draws without a certified answer are left out."""
    type_1_interval: tuple[float, float]

    @property
    def accuracy_before(self) -> float:
        """Right of all."""
        return _share(self.right, self.answers)

    @property
    def accuracy_after(self) -> float:
        """Right of those certified."""
        return _share(self.certified_right, self.certified)

    @property
    def answer_rate(self) -> float:
        """Certified of all."""
        return _share(self.certified, self.answers)

    @property
    def type_1(self) -> float:
        """Certified of the wrong ones: what the threshold bounds. (The released code prints it as "fnr".)"""
        return _share(self.certified - self.certified_right, self.answers - self.right)

    @property
    def type_2(self) -> float:
        """Not certified of the right ones. (The released code prints it as "fpr".)"""
        return _share(self.right - self.certified_right, self.right)

    def numbers(self) -> dict[str, float | int | list[float | None] | None]:
        """Counts and shares in JSON's types: None for what is nan."""
        plain = lambda x: None if isinstance(x, float) and math.isnan(x) else x
        shares = ("accuracy_before", "accuracy_after", "answer_rate", "type_1", "type_2")
        return {
            **{name: getattr(self, name) for name in ("answers", "right", "certified", "certified_right")},
            **{name: plain(getattr(self, name)) for name in (*shares, "average_precision")},
            **{name: [plain(x) for x in getattr(self, name)] for name in ("accuracy_interval", "type_1_interval")},
        }


def measure(
    scores: ArrayLike, right: ArrayLike, threshold: float, *, resamples: int = 100_000, seed: int = 0
) -> Outcome:
    """Accuracy, answer rate and errors of the answers that a threshold certifies.

    Args:
        scores, right: [N], of test answers; whether each is right, bool.
        resamples: of the bootstrap.

    Raises:
        ValueError: no answers, other numbers of the two, a score that is nan.
    """
    scores, right = real("scores", scores), np.asarray(right)
    if scores.ndim != 1 or scores.shape != right.shape or not len(scores):
        raise ValueError(
            f"scores and right have shapes {scores.shape} and {right.shape}; give both for each answer, [N]."
        )
    right = right.astype(bool)
    told = certify(scores, threshold)
    accuracy, type_1 = bootstrap(told, right, resamples=resamples, seed=seed)
    return Outcome(
        len(scores), int(right.sum()), int(told.sum()), int((told & right).sum()), average_precision(scores, right),
        accuracy, type_1,
    )  # fmt: skip


def bootstrap(
    certified: ArrayLike, right: ArrayLike, *, resamples: int = 100_000, seed: int = 0, level: float = 0.95
) -> tuple[tuple[float, float], tuple[float, float]]:
    """(interval of the accuracy after certification, interval of Type I), percentiles over resamples of the answers.

    A resample of N answers matters only by how many fall into each of the four kinds: their counts are drawn, multinomial.
    (nan, nan) where no resample has a certified answer, or a wrong one.
    """
    told, good = np.asarray(certified, bool), np.asarray(right, bool)
    kinds = np.bincount(2 * told + good, minlength=4)
    drawn = np.random.default_rng(seed).multinomial(len(told), kinds / len(told), resamples)
    uncertified_wrong, _, wrong, correct = drawn.T

    def interval(part: np.ndarray, rest: np.ndarray) -> tuple[float, float]:
        there = part + rest > 0
        if not there.any():
            return math.nan, math.nan
        low, high = np.quantile(part[there] / (part + rest)[there], [(1 - level) / 2, (1 + level) / 2])
        return float(low), float(high)

    return interval(correct, wrong), interval(wrong, uncertified_wrong)


def average_precision(scores: ArrayLike, right: ArrayLike) -> float:
    """Sum over thresholds of (recall gained) x precision, as scikit-learn's; equal scores share one. nan without a right answer."""
    scores, good = real("scores", scores), np.asarray(right, bool)
    if not good.any():
        return math.nan
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)  # the last of each group of equal scores
    hits = np.cumsum(good[order])[last]
    return float((np.diff(hits, prepend=0) / good.sum() * hits / (np.flatnonzero(last) + 1)).sum())


def violation_rate(
    population: ArrayLike, n: int, *, alpha: float, delta: float, draws: int = 2000, seed: int = 0
) -> float:
    """How often a threshold set by n wrong answers, drawn from a population of their scores, certifies more than alpha of it.

    The guarantee says: in at most delta of the draws, but for the simulation's own error.

    Args:
        population: [P], scores of wrong answers, which stand for the whole distribution (draws are with replacement).
    """
    scores = np.sort(real("population", population))
    if not len(scores) or n < 1:
        raise ValueError(f"population has {len(scores)} scores and n={n}; give at least one of each.")
    k = rank(n, alpha=alpha, delta=delta)
    if k > n:
        return 0.0
    rng, violated = np.random.default_rng(seed), 0
    block = max(1, 4_000_000 // n)
    for start in range(0, draws, block):
        # Places in the sorted population stand for its scores.
        places = rng.integers(len(scores), size=(min(block, draws - start), n))
        tau = scores[np.partition(places, k - 1, axis=1)[:, k - 1]]
        above = len(scores) - np.searchsorted(scores, tau, side="right")
        violated += int((above > alpha * len(scores)).sum())
    return violated / draws


def _share(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
