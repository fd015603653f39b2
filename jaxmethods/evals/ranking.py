"""How well scores rank: the area under the ROC curve, and bootstrap intervals over questions.

>>> float(auroc(np.array([0.9, 0.2, 0.5, 0.5]), np.array([True, False, True, False])))  # of four pairs one is tied
0.875
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped


class Interval(NamedTuple):
    """A value and its bootstrap percentile interval."""

    value: float
    low: float
    high: float


class Bootstrap(NamedTuple):
    """AUROCs of several scores of the same rows."""

    auroc: dict[str, Interval]
    difference: dict[str, Interval]
    """AUROC less that of the baseline, over the same resamples; of the others."""
    used: int
    """Resamples; one without rows of both kinds is left out."""


def auroc(
    scores: Float[Array | np.ndarray, "rows"],
    labels: Bool[Array | np.ndarray, "labels"],
    weights: Float[Array | np.ndarray, "weights"] | None = None,
) -> Float[Array, ""]:
    """Mann-Whitney: the share of pairs of a true and a false row where the true one has the higher score, ties counting 1/2.

    In O(N log N), under `jit` and `vmap` too; nan where one kind is missing.

    Args:
        scores: [N]; finite.
        labels: [N], true at the rows that should score high.
        weights: [N], how often each row counts; 0 leaves it out.

    Raises:
        ValueError: lengths that differ, or a score that is not finite. Traced arrays are not checked for the latter.
    """
    if not np.shape(scores) == np.shape(labels) == (np.shape(scores) if weights is None else np.shape(weights)):
        shapes = [np.shape(x) for x in (scores, labels, weights) if x is not None]
        raise ValueError(
            f"scores, labels and weights have shapes {', '.join(map(str, shapes))}; they must be the same."
        )
    if not isinstance(scores, jax.core.Tracer) and not (sound := np.isfinite(np.asarray(scores))).all():
        where = int(np.argmin(sound))
        raise ValueError(f"score {where} is {np.asarray(scores)[where]}; only finite scores can be ranked.")
    return _auroc(
        jnp.asarray(scores), jnp.asarray(labels), jnp.ones(len(scores)) if weights is None else jnp.asarray(weights)
    )


@jax.jit
def _auroc(scores: Array, labels: Array, weights: Array) -> Array:
    # Where the scores lie among those in order, from which the false rows below and at each of them are read.
    ordered = jnp.sort(scores)
    below, upto = (jnp.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    false = jnp.where(labels, 0.0, weights)[jnp.argsort(scores)]
    lower = jnp.concatenate([jnp.zeros(1), jnp.cumsum(false)])
    true = jnp.where(labels, weights, 0.0)
    won = (true * (lower[below] + lower[upto])).sum() / 2
    pairs = true.sum() * false.sum()
    return jnp.where(pairs > 0, won / jnp.where(pairs > 0, pairs, 1.0), jnp.nan)


def bootstrap(
    scores: Mapping[str, Float[Array | np.ndarray, "rows"]],
    labels: Bool[Array | np.ndarray, "labels"],
    groups: Sequence[Any] | Shaped[np.ndarray, "rows"] | None = None,
    *,
    baseline: str | None = None,
    resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """AUROC of each score with a percentile interval over resampled groups, such as questions that several rows are of.

    Args:
        scores: name -> [N].
        labels: [N], true at the rows that should score high.
        groups: [N], of which question each row is; every row is its own when None.
        baseline: the name of the score that the others are held against, over the same resamples.

    Raises:
        ValueError: labels of one kind only, an unknown baseline, a level outside (0, 1), fewer than two resamples; as `auroc`.
    """
    labels = np.asarray(labels)
    if not 0 < level < 1 or resamples < 2:
        raise ValueError(f"{level=} must be between 0 and 1, and {resamples=} at least 2.")
    if baseline is not None and baseline not in scores:
        raise ValueError(f"{baseline=} is none of the scores {', '.join(scores)}.")
    if labels.all() or not labels.any():
        raise ValueError(
            f"all {len(labels)} labels are {bool(labels[0]) if len(labels) else 'missing'}; AUROC needs rows of both kinds."
        )
    own = np.arange(len(labels)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    drawn = np.random.default_rng(seed).multinomial(
        own.max() + 1, np.full(own.max() + 1, 1 / (own.max() + 1)), resamples
    )
    weights = drawn[:, own].astype(np.float32)
    values = {name: float(auroc(some, labels)) for name, some in scores.items()}
    of_all = jax.jit(jax.vmap(_auroc, (None, None, 0)))
    found = {name: np.asarray(of_all(jnp.asarray(some), labels, weights)) for name, some in scores.items()}
    kept = ~np.isnan(next(iter(found.values())))
    ends = lambda some: [float(x) for x in np.quantile(some[kept], [(1 - level) / 2, (1 + level) / 2])]
    held = {} if baseline is None else {name: found[name] - found[baseline] for name in found if name != baseline}
    return Bootstrap(
        {name: Interval(values[name], *ends(some)) for name, some in found.items()},
        {name: Interval(values[name] - values[baseline], *ends(some)) for name, some in held.items()},  # type: ignore[index]
        int(kept.sum()),
    )


__all__ = ["Bootstrap", "Interval", "auroc", "bootstrap"]
