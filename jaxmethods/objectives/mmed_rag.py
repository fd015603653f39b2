"""MMed-RAG: how many retrieved reports to keep, and which failures make the preference pairs of RAG-PT.

https://arxiv.org/abs/2410.13085. Its loss is DPO (`losses.dpo_loss`, `objectives.Preference`) on rows whose rejected answer may be
given to another picture (`rejected_images`): the prompt, with the retrieved reports in it, is the same on both sides.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Num

from jaxmethods import tree

MODES = ("consecutive", "top1")


def keep_contexts(
    similarities: Num[Array | np.ndarray, "*batch contexts"], *, threshold: float, mode: str = "consecutive"
) -> Int[Array, "*batch"]:
    """How many of the reports, the most similar first, to keep: at least one, and none behind a similarity that is not positive.

    "consecutive" (the paper): up to the first i with log(S_i / S_{i+1}) > threshold, all where there is none.
    "top1" (the released code): while S_1 / S_i < threshold; its example is 1.5.

    Args:
        similarities: [..., K], sorted descending.
        threshold: positive; for "consecutive" on the log ratio, for "top1" on the ratio.

    Raises:
        ValueError: an unknown mode, a threshold that is not positive, similarities that do not descend (where values are known).
    """
    tree.require_one_of("mode", mode, MODES)
    if not threshold > 0:
        raise ValueError(f"threshold={threshold} must be positive.")
    found = jnp.asarray(similarities).astype(jnp.float32)
    if isinstance(similarities, np.ndarray) and (np.diff(similarities, axis=-1) > 0).any():
        raise ValueError("similarities must be sorted, the largest first.")
    positive = found > 0
    safe = jnp.where(positive, found, 1.0)
    if mode == "consecutive":
        gap = jnp.where(positive[..., 1:], jnp.log(safe[..., :-1]) - jnp.log(safe[..., 1:]), math.inf)
        goes_on = ~(gap > threshold)
    else:
        goes_on = positive[..., 1:] & (safe[..., :1] / safe[..., 1:] < threshold)
    return 1 + jnp.cumprod(goes_on.astype(jnp.int32), axis=-1).sum(axis=-1)


class Subsets(NamedTuple):
    """Which of the three kinds of pairs each case gives; one case may give two."""

    cross_modal: Bool[Array, "cases"]
    """Right with the report even when the picture is noise: prefer the answer to the real picture, reject that to the noise."""
    use_reports: Bool[Array, "cases"]
    """Right with the report and wrong without: prefer the answer with it."""
    resist_reports: Bool[Array, "cases"]
    """Right without the report and wrong with it: prefer the answer without."""


def preference_subsets(
    alone: Bool[Array | np.ndarray, "cases"],
    with_reports: Bool[Array | np.ndarray, "cases"],
    noised: Bool[Array | np.ndarray, "cases"],
) -> Subsets:
    """The subsets of cases by which answers were right: without reports, with reports, and with reports and a noise picture."""
    alone, with_reports, noised = (jnp.asarray(x, bool) for x in (alone, with_reports, noised))
    return Subsets(with_reports & noised, with_reports & ~alone, alone & ~with_reports)
