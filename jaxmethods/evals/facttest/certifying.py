"""The threshold of FactTest: the Neyman-Pearson umbrella rule, and its form under covariate shift.

    v(k) = P(Bin(n0, 1 - alpha) >= k)          tau = T_(k), the least k with v(k) <= delta          certify where score > tau

T_(1) <= ... <= T_(n0) are the scores of n0 wrong answers. Then P(share of wrong answers that are certified > alpha) <= delta over
the draw of these, whatever the score and the distribution, ties included: the decision is strict. It bounds P(certified | wrong),
not P(wrong | certified); and choosing a score, or alpha, by the same answers voids it.

https://arxiv.org/abs/2411.02603; the rule is of https://doi.org/10.1126/sciadv.aao1659. All on the host, in float64.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


def violation(k: int, n: int, alpha: float) -> float:
    """v(k) = P(Bin(n, 1 - alpha) >= k): a bound on the chance that the k-th of n scores is too low a threshold.

    By the regularised incomplete beta function, I_{1 - alpha}(k, n - k + 1). v(0) = 1 and v(n + 1) = 0.

    Raises:
        ValueError: k outside of 0..n + 1, alpha outside of (0, 1).
    """
    _in_unit("alpha", alpha)
    if not 0 <= k <= n + 1:
        raise ValueError(f"k={k} must be in 0..{n + 1}, the ranks of {n} scores and what lies beyond.")
    if k in (0, n + 1):
        return float(k == 0)
    return float(special.betainc(float(k), n - k + 1.0, 1 - alpha))


def rank(n: int, *, alpha: float, delta: float) -> int:
    """The least k of 1..n + 1 with v(k) <= delta; n + 1: never certify.

    >>> rank(1000, alpha=0.05, delta=0.01)
    966

    Args:
        n: scores of wrong answers.
        alpha: the share of wrong answers that may be certified.
        delta: the chance that more are.
    """
    _in_unit("delta", delta)
    low, high = 0, n + 1  # v(low) > delta >= v(high): v decreases
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if violation(middle, n, alpha) <= delta else (middle, high)
    return high


def least_incorrect(*, alpha: float, delta: float) -> int:
    """How many wrong answers it takes for anything to be certified: ln(delta) / ln(1 - alpha), rounded up.

    >>> least_incorrect(alpha=0.05, delta=0.01)
    90
    """
    _in_unit("alpha", alpha)
    _in_unit("delta", delta)
    return math.ceil(math.log(delta) / math.log1p(-alpha))


def threshold(incorrect_scores: ArrayLike, *, alpha: float, delta: float) -> float:
    """The threshold above which answers are certified; inf where there are too few wrong answers to certify any.

    Args:
        incorrect_scores: [n0], of wrong answers alone; larger is surer. Numbers of any real dtype, infinite ones too.
        alpha: the share of wrong answers that may be certified, in (0, 1).
        delta: the chance, over the draw of these answers, that more are; in (0, 1).

    Raises:
        ValueError: no scores, some that are nan, not one axis; alpha or delta outside of (0, 1).
    """
    scores = real("incorrect_scores", incorrect_scores)
    if scores.ndim != 1:
        raise ValueError(f"incorrect_scores have shape {scores.shape}; give one score for each wrong answer, [n0].")
    k = rank(len(scores), alpha=alpha, delta=delta)
    if not len(scores):
        raise ValueError("incorrect_scores are empty: there are no incorrect answers to set a threshold by; give more.")
    return math.inf if k > len(scores) else float(np.partition(scores, k - 1)[k - 1])


def certify(scores: ArrayLike, threshold: float) -> np.ndarray:
    """Which answers are certified: score > threshold, strictly; bool of the same shape.

    Raises:
        ValueError: a score, or the threshold, is nan.
    """
    if math.isnan(threshold):
        raise ValueError("threshold is nan; take the one that `threshold` returns.")
    return real("scores", scores) > threshold


# Covariate shift


def keep_by_rejection(ratios: ArrayLike, *, bound: float, seed: int = 0) -> np.ndarray:
    """Which rows of the source to keep so that they are distributed as the target: U < w, U uniform on [0, bound).

    The kept wrong answers follow the target's distribution of wrong answers where P(right | question, answer) is the same in both
    (the paper's section on covariate shift). A w above the bound is kept always: then the guarantee is off by no more than
    the target's probability of such rows. Scaling w and the bound together changes nothing.

    Args:
        ratios: [N], w = p_target / p_source, perhaps up to a constant.
        bound: of w, in the same units.

    Raises:
        ValueError: ratios that are negative, infinite or nan; a bound that is not positive.
    """
    ratios = real("ratios", ratios)
    if bad := int(((ratios < 0) | np.isinf(ratios)).sum()):
        place = int(np.argmax((ratios < 0) | np.isinf(ratios)))
        raise ValueError(
            f"ratios[{place}] is {ratios.flat[place]:g} ({bad} such); they must be finite and not negative."
        )
    if not (bound > 0 and math.isfinite(bound)):
        raise ValueError(f"bound={bound} of the ratios must be positive and finite.")
    return np.random.default_rng(seed).random(ratios.shape) < ratios / bound


def shifted_threshold(
    incorrect_scores: ArrayLike,
    ratios: ArrayLike,
    *,
    alpha: float,
    delta: float,
    bound: float,
    seed: int = 0,
    repeats: int = 1,
) -> float:
    """`threshold` for another distribution of questions, by those wrong answers that `keep_by_rejection` keeps.

    Args:
        incorrect_scores, ratios: [n0], of the same answers.
        repeats: so many draws of what is kept; the largest threshold is returned, which keeps the guarantee.

    Raises:
        ValueError: as `threshold` and `keep_by_rejection`; nothing is kept.
    """
    scores, weights = real("incorrect_scores", incorrect_scores), real("ratios", ratios)
    if scores.shape != weights.shape:
        raise ValueError(f"there are {scores.shape} scores and {weights.shape} ratios; give one ratio for each score.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1.")
    found = []
    for draw in range(repeats):
        kept = scores[keep_by_rejection(weights, bound=bound, seed=seed + draw)]
        if not len(kept) and len(scores):
            raise ValueError(
                f"none of {len(scores)} wrong answers is kept: their ratios are at most {weights.max():g} of a bound of {bound:g}; "
                "lower the bound, or take calibration questions that are more like the target."
            )
        found.append(threshold(kept, alpha=alpha, delta=delta))
    return max(found)


@dataclasses.dataclass(frozen=True)
class DensityRatio:
    """w(x) = p_target(x) / p_source(x), as a classifier of the two tells it. Call it with features [N, F] for ratios [N].

    classifier: of scikit-learn, with `predict_proba`.
    odds: rows of the source a row of the target.
    seen: [S], the ratios of the source's rows that it was fitted on.
    """

    classifier: Any
    odds: float
    seen: np.ndarray

    def __call__(self, features: ArrayLike) -> np.ndarray:
        return _ratios(self.classifier, self.odds, real("features", features))

    def bound(self, quantile: float = 0.9) -> float:
        """The ratio that this share of the source's rows does not exceed."""
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile={quantile} must be in (0, 1].")
        return float(np.quantile(self.seen, quantile))


def fit_density_ratio(source: ArrayLike, target: ArrayLike, *, strength: float | None = None) -> DensityRatio:
    """Logistic regression of target against source: w = p / (1 - p) n_source / n_target.

    Fit it on other rows than those that are calibrated. The features are standardised first.

    Args:
        source, target: [S, F] and [T, F], such as sentence embeddings of questions.
        strength: scikit-learn's C, the inverse of the penalty; None: of 1e-5 .. 1 what has the best log-likelihood in five-fold
            cross-validation. Too weak a penalty makes ratios of many features extreme.

    Raises:
        ValueError: fewer than five rows, other widths, features that are not finite.
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import GridSearchCV, StratifiedKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError:
        raise ImportError("density ratios need scikit-learn: pip install 'jaxmethods[facttest]'") from None
    rows = [real("source", source), real("target", target)]
    if any(x.ndim != 2 or len(x) < 5 for x in rows) or rows[0].shape[1] != rows[1].shape[1]:
        raise ValueError(
            f"source and target have shapes {rows[0].shape} and {rows[1].shape}; give five rows or more, [S, F] and [T, F]."
        )
    if not all(np.isfinite(x).all() for x in rows):
        raise ValueError("source or target has features that are infinite; leave these rows out.")
    is_target = np.repeat([0, 1], [len(x) for x in rows])
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=strength or 1.0, max_iter=1000))
    if strength is None:
        grid = {"logisticregression__C": np.logspace(-5, 0, 6)}
        folds = StratifiedKFold(5, shuffle=True, random_state=0)
        classifier = GridSearchCV(classifier, grid, scoring="neg_log_loss", cv=folds)
    classifier.fit(np.concatenate(rows), is_target)
    odds = len(rows[0]) / len(rows[1])
    return DensityRatio(classifier, odds, _ratios(classifier, odds, rows[0]))


def _ratios(classifier: Any, odds: float, features: np.ndarray) -> np.ndarray:
    log_odds = classifier.decision_function(features)
    return np.exp(log_odds) * odds


def real(name: str, values: ArrayLike) -> np.ndarray:
    """The values in float64.

    Raises:
        ValueError: what is no real number, or nan.
    """
    try:
        given = np.asarray(values)
        if given.dtype.kind not in "buif" and given.dtype.name != "bfloat16":
            raise TypeError(f"dtype {given.dtype}")
        given = given.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} must be real numbers, an array of one shape ({error}).") from None
    if np.isnan(given).any():
        places = np.argwhere(np.isnan(given))
        at = ", ".join(map(str, places[0]))
        raise ValueError(
            f"{name}[{at}] is nan ({len(places)} of {given.size} are); leave these answers out or score them anew."
        )
    return given


def _in_unit(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name}={value} must be above 0 and below 1.")
