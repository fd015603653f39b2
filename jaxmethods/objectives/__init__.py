"""What is optimised: one file a method, each as its difference from the shared losses."""

from jaxmethods.objectives import cafe
from jaxmethods.objectives.cafe import CAFe
from jaxmethods.objectives.supervised import Supervised

__all__ = ["CAFe", "Supervised", "cafe"]
