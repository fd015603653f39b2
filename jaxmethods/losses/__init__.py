"""Mathematics that several methods share, as pure functions of arrays."""

from jaxmethods.kernels.token_logprobs import TokenStatistics, token_logprobs, token_statistics
from jaxmethods.losses.cached import cached_info_nce, in_chunks
from jaxmethods.losses.contrastive import gather_without_gradient, info_nce, sigmoid_loss
from jaxmethods.losses.preference import (
    PairLogps,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_kl,
    kto_loss,
    mean_logps,
    orpo_loss,
    preference_margin,
    robust_dpo_loss,
    simpo_loss,
)

__all__ = [
    "info_nce", "sigmoid_loss", "gather_without_gradient", "cached_info_nce", "in_chunks",
    "PairLogps", "preference_margin", "dpo_loss", "robust_dpo_loss", "ipo_loss", "hinge_loss", "simpo_loss", "cpo_loss",
    "orpo_loss", "kto_loss", "kto_kl", "mean_logps",
    "token_logprobs", "token_statistics", "TokenStatistics",
]  # fmt: skip
