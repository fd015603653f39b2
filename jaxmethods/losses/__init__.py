"""Mathematics that several methods share, as pure functions of arrays."""

from jaxmethods.kernels.token_logprobs import TokenStatistics, token_logprobs, token_statistics
from jaxmethods.losses.contrastive import info_nce

__all__ = ["info_nce", "token_logprobs", "token_statistics", "TokenStatistics"]
