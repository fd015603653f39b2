"""Programs: train, generate, evaluate, export, plan."""

from jaxmethods.launch.config import Mesh, Run

__all__ = ["Mesh", "Run"]
