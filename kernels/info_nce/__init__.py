from jaxmethods.kernels.info_nce.api import info_nce

__all__ = ["info_nce"]
