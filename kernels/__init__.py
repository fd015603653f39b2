"""Operations that earn their own implementations: one folder each, with a reference and faster forms.

`linear` (one file: only its gradient is its own) is imported from where it stands.
"""

from jaxmethods.kernels.attention import attention
from jaxmethods.kernels.token_logprobs import token_logprobs

__all__ = ["attention", "token_logprobs"]
