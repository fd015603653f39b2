from jaxmethods.kernels.token_logprobs.api import TokenStatistics, implementation_for, token_logprobs, token_statistics

__all__ = ["TokenStatistics", "implementation_for", "token_logprobs", "token_statistics"]
