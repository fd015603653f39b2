"""What is optimised: one file a method, each as its difference from the shared losses."""

from jaxmethods.objectives import cafe, cream, kto, mmed_rag, mmedpo
from jaxmethods.objectives.cafe import CAFe
from jaxmethods.objectives.cream import CREAM
from jaxmethods.objectives.kto import KTO
from jaxmethods.objectives.mmedpo import MMedPO
from jaxmethods.objectives.preference import Preference
from jaxmethods.objectives.supervised import Supervised

__all__ = ["CAFe", "CREAM", "KTO", "MMedPO", "Preference", "Supervised", "cafe", "cream", "kto", "mmed_rag", "mmedpo"]
