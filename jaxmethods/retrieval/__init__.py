"""Finding: similarity search."""

from jaxmethods.retrieval.search import Found, top_k

__all__ = ["Found", "top_k"]
