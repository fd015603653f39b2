"""Finding what belongs to a query: exact and approximate search, trained retrievers, and the choice of a domain's base."""

from jaxmethods.retrieval import approximate, heads, search
from jaxmethods.retrieval.retriever import History, Retriever, RetrieverConfig, contrastive_loss, train
from jaxmethods.retrieval.router import Base, Found, Route, Router, find, train_router, zero_shot
from jaxmethods.retrieval.search import ranks, top_k

__all__ = [
    "Base", "Found", "History", "Retriever", "RetrieverConfig", "Route", "Router", "approximate", "contrastive_loss", "find",
    "heads", "ranks", "search", "top_k", "train", "train_router", "zero_shot",
]  # fmt: skip
