"""Programs: train, cream, rag, curate, generate, evaluate, embed, export, plan."""

from jaxmethods.launch.config import Mesh, Run, Vision

__all__ = ["Mesh", "Run", "Vision"]
