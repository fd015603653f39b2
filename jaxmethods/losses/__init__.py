"""Mathematics that several methods share, as pure functions of arrays."""

from jaxmethods.kernels.token_logprobs import TokenStatistics, token_logprobs, token_statistics
from jaxmethods.losses.cached import cached_info_nce, in_chunks
from jaxmethods.losses.contrastive import gather_without_gradient, info_nce, sigmoid_loss

__all__ = [
    "info_nce", "sigmoid_loss", "gather_without_gradient", "cached_info_nce", "in_chunks",
    "token_logprobs", "token_statistics", "TokenStatistics",
]  # fmt: skip
