from jaxmethods.kernels.banked.api import banked_linear

__all__ = ["banked_linear"]
