"""Operations that earn their own implementations: one folder each, with a reference and faster forms.

`linear` (one file: only its gradient is its own) is imported from where it stands.
"""

from jaxmethods.kernels.attention import attention
from jaxmethods.kernels.info_nce import info_nce
from jaxmethods.kernels.token_logprobs import token_logprobs, token_statistics

__all__ = ["attention", "info_nce", "token_logprobs", "token_statistics"]
