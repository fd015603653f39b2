"""Mathematics that several methods share, as pure functions of arrays."""

from jaxmethods.kernels.token_logprobs import token_logprobs

__all__ = ["token_logprobs"]
