from jaxmethods.kernels.attention.api import attention

__all__ = ["attention"]
