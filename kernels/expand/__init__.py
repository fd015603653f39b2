from jaxmethods.kernels.expand.api import expand

__all__ = ["expand"]
