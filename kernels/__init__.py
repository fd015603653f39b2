"""Operations that earn their own implementations: one folder each, with a reference and faster forms."""

from jaxmethods.kernels.attention import attention
from jaxmethods.kernels.token_logprobs import token_logprobs

__all__ = ["attention", "token_logprobs"]
