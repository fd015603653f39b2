"""FactTest: answers that are certified so that few wrong ones are, with a guarantee for any score and any distribution.

>>> import numpy as np
>>> rng = np.random.default_rng(0)
>>> wrong, new = rng.normal(0, 1, 500), rng.normal(1, 1, 4)  # scores of wrong answers, and of new ones
>>> tau = threshold(wrong, alpha=0.1, delta=0.05)
>>> round(tau, 3), certify(new, tau).tolist()
(1.384, [True, True, False, False])

https://arxiv.org/abs/2411.02603. `certifying` has the rule and its form under covariate shift, `scores` what tells how sure a model
is, `metrics` what comes of it. `jaxmethods evaluate facttest` does all of it with a model and questions.
"""

from jaxmethods.evals.facttest.certifying import (
    DensityRatio,
    certify,
    fit_density_ratio,
    keep_by_rejection,
    least_incorrect,
    rank,
    shifted_threshold,
    threshold,
    violation,
)
from jaxmethods.evals.facttest.metrics import Outcome, average_precision, bootstrap, measure, violation_rate
from jaxmethods.evals.facttest.scores import (
    clusters,
    cosine_similarity,
    degree,
    first_of_each,
    kernel_entropy,
    mean_cluster_likelihood,
    nli_equivalent,
    nli_similarity,
    self_check,
    semantic_entropy,
    vanilla_entropy,
    word_overlap,
)

__all__ = [
    "DensityRatio", "Outcome", "average_precision", "bootstrap", "certify", "clusters", "cosine_similarity", "degree",
    "first_of_each", "fit_density_ratio", "keep_by_rejection", "kernel_entropy", "least_incorrect",
    "mean_cluster_likelihood", "measure", "nli_equivalent", "nli_similarity", "rank", "self_check", "semantic_entropy",
    "shifted_threshold", "threshold", "vanilla_entropy", "violation", "violation_rate", "word_overlap",
]  # fmt: skip
