"""How sure a model is of its answers, by S answers drawn to each question: larger is surer, all negated uncertainties.

Functions of arrays, for a batch of questions [B, ...]; `mask` is true at answers that there are. What two answers have in common
comes as arrays too: numbers of clusters (`clusters`, `first_of_each` on the host), or a similarity [B, N, N] from a model of
inference (`nli_similarity`), from embeddings (`cosine_similarity`) or from words (`word_overlap`).

>>> same = jnp.array([[0, 0, 0, 0], [0, 1, 2, 3]])  # all answers the same, all different
>>> vanilla_entropy(same).round(3).tolist()
[0.0, -1.38600...]

https://arxiv.org/abs/2411.02603, and its released code where the paper leaves it open. Float32.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.evals import completion

SHIFT = 5.0
"""Taken from each cluster's log-likelihood in the released code; it changes no order."""
_SMALLEST = 1e-10
_ARTICLES = {"a", "an", "the"}


def _real(mask: Array | np.ndarray | None, shape: tuple[int, ...]) -> Array:
    return jnp.ones(shape, bool) if mask is None else jnp.asarray(mask)


def vanilla_entropy(
    ids: Int[Array | np.ndarray, "questions samples"],
    mask: Bool[Array | np.ndarray, "questions samples"] | None = None,
) -> Float[Array, "questions"]:
    """sum_g p_g ln p_g, p_g the share of the samples in group g: 0 where all agree, -ln S where none do.

    With strings told apart by their words it is the paper's vanilla entropy, with clusters of meaning discrete semantic entropy
    (https://doi.org/10.1038/s41586-024-07421-0). The order of the samples changes nothing, to the bit.

    Args:
        ids: [B, S], equal where two samples are of one group.
    """
    ids = jnp.asarray(ids)
    mask = _real(mask, ids.shape)
    pairs = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
    count = jnp.maximum(mask.sum(axis=1, keepdims=True), 1)
    share = pairs.sum(axis=2) / count
    # A group of n samples has n terms (1 / S) ln p. Sorted, so that the sum is of the same numbers in the same order.
    terms = jnp.sort(jnp.where(mask, jnp.log(jnp.where(mask, share, 1.0)), 0.0), axis=1)
    return (terms / count).sum(axis=1)


def mean_cluster_likelihood(
    logps: Float[Array | np.ndarray, "questions answers"],
    ids: Int[Array | np.ndarray, "questions answers"],
    mask: Bool[Array | np.ndarray, "questions answers"] | None = None,
) -> Float[Array, "questions"]:
    """The paper's semantic score: the mean over clusters c of L_c = logsumexp_{s in c} l_s - 5.

    It is no entropy, and not in [-ln S, 0]; only its order matters. -inf where there is no answer.

    Args:
        logps: [B, N], mean log-probability of a token of each distinct answer.
        ids: [B, N], the answers' clusters.
    """
    ids, mask, of = _likelihoods(logps, ids, mask)
    first = _first(ids, mask)
    clusters = first.sum(axis=1)
    total = jnp.where(first, of - SHIFT, 0.0).sum(axis=1)
    return jnp.where(clusters > 0, total / jnp.maximum(clusters, 1), -jnp.inf)


def semantic_entropy(
    logps: Float[Array | np.ndarray, "questions answers"],
    ids: Int[Array | np.ndarray, "questions answers"],
    mask: Bool[Array | np.ndarray, "questions answers"] | None = None,
) -> Float[Array, "questions"]:
    """sum_c p_c ln p_c, p_c a cluster's share of the likelihood: semantic entropy (https://arxiv.org/abs/2302.09664), negated.

    Args:
        logps: [B, N], mean log-probability of a token of each distinct answer (or the sum: then longer ones count less).
        ids: [B, N], the answers' clusters.
    """
    ids, mask, of = _likelihoods(logps, ids, mask)
    first = _first(ids, mask)
    whole = jax.nn.logsumexp(jnp.where(first, of, -jnp.inf), axis=1, keepdims=True)
    log_share = jnp.where(first, of - whole, 0.0)
    return jnp.where(first, jnp.exp(log_share) * log_share, 0.0).sum(axis=1)


def _likelihoods(logps: Any, ids: Any, mask: Any) -> tuple[Array, Array, Array]:
    """(ids, mask, [B, N] each answer's cluster's log-likelihood); what is masked has likelihood 0."""
    logps, ids = jnp.asarray(logps, jnp.float32), jnp.asarray(ids)
    mask = _real(mask, ids.shape)
    pairs = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
    own = jnp.where(mask, logps, -jnp.inf)[:, None, :]
    of = jax.nn.logsumexp(jnp.where(pairs, own, -jnp.inf), axis=2)
    return ids, mask, jnp.where(mask, of, 0.0)


def _first(ids: Array, mask: Array) -> Array:
    """True at the first answer of each cluster."""
    pairs = (ids[:, :, None] == ids[:, None, :]) & mask[:, None, :]
    return mask & (jnp.argmax(pairs, axis=2) == jnp.arange(ids.shape[1]))


def kernel_entropy(
    similarity: Float[Array | np.ndarray, "questions answers answers"],
    mask: Bool[Array | np.ndarray, "questions answers"] | None = None,
    *,
    scale: float = 0.5,
    official: bool = False,
) -> Float[Array, "questions"]:
    """Kernel language entropy, negated: sum_i lam_i ln lam_i of the kernel exp(-t d), d_ij = 1 - s_ij, with unit trace.

    0 for one answer, -ln N for N that have nothing in common as t grows. The kernel need not be positive semi-definite, as d is no
    metric: eigenvalues below 0 are taken for 0 and the others scaled to a sum of 1.

    Args:
        similarity: [B, N, N], symmetric, of the distinct answers (the paper's choice) or of all.
        scale: t.
        official: as the released code, leave the sum as it is without the eigenvalues up to 1e-10.
    """
    s = jnp.asarray(similarity, jnp.float32)
    mask = _real(mask, s.shape[:2])
    both = mask[:, :, None] & mask[:, None, :]
    same = jnp.eye(s.shape[1], dtype=bool)
    kernel = jnp.exp(-scale * jnp.where(same | ~both, 0.0, 1.0 - s))  # its diagonal is 1
    count = jnp.maximum(mask.sum(axis=1), 1)
    kernel = jnp.where(both, kernel, 0.0) / count[:, None, None]
    values = jnp.linalg.eigvalsh((kernel + jnp.swapaxes(kernel, 1, 2)) / 2)
    kept = values > _SMALLEST
    values = jnp.where(kept, values, 0.0)
    if not official:
        values = values / jnp.maximum(values.sum(axis=1, keepdims=True), _SMALLEST)
    return jnp.where(kept, values * jnp.log(jnp.where(kept, values, 1.0)), 0.0).sum(axis=1)


def degree(
    similarity: Float[Array | np.ndarray, "questions samples samples"],
    mask: Bool[Array | np.ndarray, "questions samples"] | None = None,
) -> Float[Array, "questions"]:
    """How much the samples have in common: (sum_ij W_ij - S^2) / S^2, in [-1, 0] (https://arxiv.org/abs/2305.19187, negated).

    Args:
        similarity: [B, S, S] in [0, 1], of all samples, with 1 on the diagonal; `word_overlap` in the released code.
    """
    w = jnp.asarray(similarity, jnp.float32)
    mask = _real(mask, w.shape[:2])
    both = mask[:, :, None] & mask[:, None, :]
    return -jnp.where(both, 1.0 - w, 0.0).sum(axis=(1, 2)) / jnp.maximum(both.sum(axis=(1, 2)), 1)


def self_check(
    contradiction: Float[Array | np.ndarray, "questions samples"],
    mask: Bool[Array | np.ndarray, "questions samples"] | None = None,
) -> Float[Array, "questions"]:
    """The negated mean probability that a sample contradicts the answer (SelfCheckGPT-NLI, https://arxiv.org/abs/2303.08896).

    Args:
        contradiction: [B, S], P(contradiction) of each sample with the answer.
    """
    p = jnp.asarray(contradiction, jnp.float32)
    mask = _real(mask, p.shape)
    return -jnp.where(mask, p, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


# What two answers have in common


def nli_similarity(
    probabilities: Float[Array | np.ndarray, "*batch answers answers 3"],
) -> Float[Array, "*batch answers answers"]:
    """0.7 P(entailment) + 0.3 P(neutral), the mean of both directions.

    Args:
        probabilities: [..., N, N, 3], of (entailment, neutral, contradiction), answer i as premise and j as hypothesis.
    """
    p = jnp.asarray(probabilities, jnp.float32)
    one = 0.7 * p[..., 0] + 0.3 * p[..., 1]
    return (one + jnp.swapaxes(one, -1, -2)) / 2


def nli_equivalent(
    probabilities: Float[Array | np.ndarray, "*batch answers answers 3"], *, official: bool = False
) -> Bool[Array, "*batch answers answers"]:
    """Whether two answers mean the same: entailment is the likeliest in both directions.

    Args:
        probabilities: as of `nli_similarity`.
        official: as the released code, in either direction.
    """
    entails = jnp.argmax(jnp.asarray(probabilities), axis=-1) == 0
    back = jnp.swapaxes(entails, -1, -2)
    return entails | back if official else entails & back


def cosine_similarity(
    embeddings: Float[Array | np.ndarray, "*batch answers width"],
) -> Float[Array, "*batch answers answers"]:
    """Cosines of embeddings, negative ones taken for 0: what stands for inference where there is no model of it."""
    x = jnp.asarray(embeddings, jnp.float32)
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    return jnp.clip(jnp.einsum("...nd,...md->...nm", x, x, precision="highest"), 0.0, 1.0)


# Texts, on the host


def plain_answer(text: str) -> str:
    """An answer up to its first full stop or line break, in lower case, without articles and punctuation.

    >>> plain_answer("The Eiffel Tower. It stands in Paris.")
    'eiffel tower'
    """
    first = re.split(r"[.\n]", text.strip(), maxsplit=1)[0]
    return " ".join(word for word in re.findall(r"\w+", first.casefold()) if word not in _ARTICLES)


def word_overlap(texts: Sequence[str]) -> np.ndarray:
    """Jaccard overlap of the texts' words in lower case, [N, N] float32; 1 for two without words."""
    return np.array([[completion.jaccard(a, b) for b in texts] for a in texts], np.float32).reshape(
        len(texts), len(texts)
    )


def first_of_each(texts: Sequence[str]) -> tuple[list[int], np.ndarray]:
    """(places of the first of each distinct text, [N] the number of the distinct text that each one is).

    >>> places, ids = first_of_each(["rome", "paris", "rome"])
    >>> places, ids.tolist()
    ([0, 1], [0, 1, 0])
    """
    number: dict[str, int] = collections.OrderedDict()
    ids = np.array([number.setdefault(text, len(number)) for text in texts], np.int32)
    return [int(np.argmax(ids == i)) for i in range(len(number))], ids


def clusters(equivalent: Bool[Array | np.ndarray, "answers answers"]) -> np.ndarray:
    """Clusters of answers, [N] int32 from 0: each joins the first cluster whose first answer means the same, or begins one.

    The greedy order is that of https://arxiv.org/abs/2302.09664; equivalence need not be transitive.
    """
    equivalent, ids, heads = np.asarray(equivalent), [], list[int]()
    for i in range(len(equivalent)):
        found = next((c for c, head in enumerate(heads) if equivalent[head, i]), len(heads))
        if found == len(heads):
            heads.append(i)
        ids.append(found)
    return np.array(ids, np.int32)
