"""Scoring of streams of requests of mixed lengths by a bounded number of compiled programs: likelihoods, texts, embeddings."""

from jaxmethods.evals.scoring.answering import Continuation, Prompt, continuations
from jaxmethods.evals.scoring.embedding import embeddings
from jaxmethods.evals.scoring.likelihoods import Likelihood, Pair, log_likelihoods
from jaxmethods.evals.scoring.planning import Work

__all__ = ["Continuation", "Likelihood", "Pair", "Prompt", "Work", "continuations", "embeddings", "log_likelihoods"]
