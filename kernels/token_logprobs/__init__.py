from jaxmethods.kernels.token_logprobs.api import token_logprobs

__all__ = ["token_logprobs"]
