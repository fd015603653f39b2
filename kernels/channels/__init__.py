from jaxmethods.kernels.channels.api import add_channels, take_channels

__all__ = ["add_channels", "take_channels"]
