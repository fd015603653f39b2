"""What a model's likelihoods tell beside its answers: how likely the reference answers are, how ID and OOD differ, Min-K%.

These follow the released code of https://arxiv.org/abs/2410.01769. Token log-probabilities are nats, [N] for an answer of N tokens.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Float
from scipy.stats import gaussian_kde

from jaxmethods import data
from jaxmethods.evals.scylla.task import Answer, Task
from jaxmethods.models.functional import target_logps
from jaxmethods.tree import Tree

Logps = Float[np.ndarray, "tokens"]
PERCENTS = (10, 30, 50, 70, 90)
_FLOOR, _POINTS = 1e-10, 100
_TOKENS = 1 << 17


class Likelihood(NamedTuple):
    """prob: geometric mean of the tokens' probabilities. ppl: exp of their mean -log p, which is 1 / prob."""

    prob: float
    ppl: float


class Divergence(NamedTuple):
    """Of two samples' densities on a grid, summed over its points (not times their distance), as in the released code."""

    kl: float
    js: float


def likelihood(logps: Sequence[float] | Logps) -> Likelihood:
    """prob = (prod p_i)^(1/N), ppl = exp(mean of -log p_i)."""
    mean = float(np.mean(_some(logps)))
    return Likelihood(float(np.exp(mean)), float(np.exp(-mean)))


def min_k(logps: Sequence[float] | Logps, percent: float) -> float:
    """Min-K% score: the geometric mean of the lowest `percent` of the token probabilities, of one token at least."""
    if not 0 < percent <= 100:
        raise ValueError(f"percent={percent} must be above 0 and at most 100.")
    ascending = np.sort(_some(logps))
    return float(np.exp(ascending[: max(1, int(len(ascending) * percent / 100))].mean()))


def normalised_accuracy(accuracy: float, min_k_score: float) -> float:
    """Accuracy / Min-K% score: less where the model is sure of the text already."""
    if not min_k_score > 0:
        raise ValueError(f"min_k_score={min_k_score} must be positive.")
    return accuracy / min_k_score


def divergences(inside: Sequence[float] | np.ndarray, outside: Sequence[float] | np.ndarray) -> Divergence:
    """KL(inside || outside) and Jensen-Shannon, of Gaussian kernel densities at 100 points between the joint least and greatest.

    Densities are at least 1e-10. KL is the sum of p log(p / q) over the points, JS the mean of KL(p || m) and KL(q || m) with
    m = (p + q) / 2.

    Raises:
        ValueError: fewer than two values or no spread on a side, of which there is no density.
    """
    first, second = np.asarray(inside, np.float64), np.asarray(outside, np.float64)
    for name, values in (("inside", first), ("outside", second)):
        if len(values) < 2 or not np.isfinite(values).all() or np.ptp(values) == 0:
            raise ValueError(
                f"{name}: {len(values)} values without spread have no density; give two different finite ones at least."
            )
    both = np.concatenate([first, second])
    grid = np.linspace(both.min(), both.max(), _POINTS)
    p, q = (np.maximum(gaussian_kde(values)(grid), _FLOOR) for values in (first, second))
    kl = lambda a, b: float(np.sum(a * np.log(a / b)))
    middle = (p + q) / 2
    return Divergence(kl(p, q), (kl(p, middle) + kl(q, middle)) / 2)


def orders(task: Task, answer: Answer, most: int = 6) -> list[Answer]:
    """Up to `most` forms of an answer that are as right: the orders of an unordered list, both directions of a tour."""
    if isinstance(answer, int) or task.answer == "ordered":
        return [answer]
    if task.answer == "tour":
        return [answer, answer[::-1]]
    return [list(one) for one in itertools.islice(dict.fromkeys(itertools.permutations(answer)), most)]


def token_logps(
    module: Any,
    params: Tree,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    *,
    sequence_length: int | None = None,
    batch_size: int = 16,
) -> list[Logps]:
    """log p of each token of each row's answer, the closing token included. One compiled program.

    Args:
        rows: {"prompt", "answer"}.
        sequence_length: None: the longest row's, rounded up to a multiple of 256, so that calls share programs.
        batch_size: rows at a time; fewer where they are long, so that a batch has at most 131,072 tokens.

    Raises:
        ValueError: a row of more than `sequence_length` tokens.
    """
    examples = [
        example for _, example in data.Renderer(tokenizer, marks="last").many(data.records_in_memory(rows).placed())
    ]
    longest = max(len(example.tokens) for example in examples)
    sequence_length = sequence_length or -(-longest // 256) * 256
    if longest > sequence_length:
        raise ValueError(f"sequence_length={sequence_length} is less than the {longest} tokens of the longest row.")
    batch_size = min(batch_size, max(_TOKENS // sequence_length, 1))
    every = data.Examples.of(examples)
    source = grain.MapDataset.source(data.PackedRows(every, data.one_each(len(every)), sequence_length, None, None))
    found: list[Logps] = []
    for batch in data.evaluation_batches(source, batch_size):
        logps, mask = np.asarray(_batch(module, params, batch)), np.asarray(batch["target_mask"])
        found += [row[marked].astype(np.float64) for row, marked in zip(logps, mask, strict=True)]
    return found[: len(rows)]


@functools.partial(jax.jit, static_argnums=0)
def _batch(module: Any, params: Tree, batch: dict[str, Any]) -> jax.Array:
    return target_logps(
        module, params, batch["tokens"], batch["target_mask"], batch["segment_ids"] > 0,
        segment_ids=batch["segment_ids"], positions=batch["positions"],
    )[0]  # fmt: skip


def _some(logps: Sequence[float] | Logps) -> np.ndarray:
    values = np.asarray(logps, np.float64)
    if not values.size:
        raise ValueError("an answer without tokens has no likelihood.")
    return values
