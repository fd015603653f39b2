"""SAUP-HMMD: weights that a hidden Markov model learns from other questions' trajectories (SAUP, arXiv 2412.01033, section 3.3)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int

from jaxmethods import tree
from jaxmethods.evals.saup import hmm, weights

MAPPINGS = ("posterior", "levels", "viterbi", "filtered")


def learned_weights(
    drift: Float[np.ndarray, "batch steps"],
    gap: Float[np.ndarray, "batch steps"],
    mask: Bool[np.ndarray, "batch steps"],
    groups: Int[np.ndarray, "batch"],
    *,
    labels: Int[np.ndarray, "batch steps"] | None = None,
    folds: int = 5,
    states: str = "posterior",
    dim: int = 2,
    mixtures: int = 1,
    iterations: int = 50,
    bias: float = 0.0,
    seed: int = 0,
) -> Float32[np.ndarray, "batch steps"]:
    """Weights of the trajectories in each fold of questions, by a model of those in the other folds; 0 at padding.

    Args:
        drift, gap: [B, N], both distances of each step.
        mask: [B, N], true at steps.
        groups: [B], from 0: of which question each trajectory is, so that no question is in two folds.
        labels: [B, N], states of steps to start from; None: k-means.
        states: how states become weights: mean distance under the "posterior" or under the "filtered" one, fixed "levels" under the
            posterior, mean distance of the likeliest states ("viterbi").
        dim: what the model sees: both distances (2), or their sum (1).
        mixtures, iterations: as of `hmm`.
        bias: as of `weights`.
        seed: of the folds.

    Raises:
        ValueError: an unknown `states`, fewer questions than folds, and as `hmm.fit`.
    """
    tree.require_one_of("states", states, MAPPINGS)
    count = int(groups.max()) + 1
    if not 2 <= folds <= count:
        raise ValueError(f"{folds=} must be at least 2, and no more than the {count} questions.")
    fold = (np.random.default_rng(seed).permutation(count) % folds)[groups]
    observed = np.asarray(hmm.observations(drift, gap, dim=dim))
    out = np.zeros(mask.shape, np.float32)
    for number in range(folds):
        others, own = fold != number, fold == number
        start = (
            hmm.from_kmeans(observed[others], mask[others], mixtures=mixtures)
            if labels is None
            else hmm.from_labels(observed[others], labels[others], mask[others], mixtures=mixtures)
        )
        fitted = hmm.fit(start, observed[others], mask[others], iterations=iterations).params
        values = np.array(weights.LEVELS) if states == "levels" else np.asarray(hmm.state_distances(fitted))
        if states == "viterbi":
            gamma = weights.one_hot(hmm.viterbi(fitted, observed[own], mask[own]), hmm.STATES)
        elif states == "filtered":
            gamma = hmm.filtered(fitted, observed[own], mask[own])
        else:
            gamma = hmm.posterior(fitted, observed[own], mask[own]).gamma
        out[own] = np.asarray(weights.state_weights(gamma, values.astype(np.float32), mask[own], bias=bias))
    return out
