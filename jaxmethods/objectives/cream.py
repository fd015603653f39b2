"""CREAM: how much two models of a self-rewarding loop agree on a ranking softens the labels that the ranking gives.

https://arxiv.org/abs/2410.12735. Each prompt has N sampled answers; `rewards` [P, N] rank them by the current model and
`previous_rewards` by the one before. The current model's best and worst answers make the pair, the agreement its label.

Where paper and released code differ: the code's TopOrder compares the ranks of the first and the last answer as listed, not of the
best and the worst (here: the definition); it ranks ties in order of appearance (here: ties agree with nothing); and after a prompt
without rewards it gives every later prompt another one's rate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from jaxmethods import losses, tree
from jaxmethods.data.views import Number
from jaxmethods.losses import PairLogps
from jaxmethods.objectives.preference import Preference

MEASURES = ("kendall", "spearman", "top_order")


class Pairs(NamedTuple):
    """The answers that make a prompt's pair, by their numbers, and whether there is one."""

    best: Int[Array, "prompts"]
    worst: Int[Array, "prompts"]
    keep: Bool[Array, "prompts"]


def consistency(
    rewards: Num[Array | np.ndarray, "prompts answers"],
    previous_rewards: Num[Array | np.ndarray, "others sampled"],
    *,
    measure: str = "kendall",
) -> Float[Array, "prompts"]:
    """How far two rankings of each prompt's answers agree, in [0, 1]; only the order of rewards matters.

    "kendall": (tau + 1) / 2, tau = 2 / (N (N - 1)) x (pairs of answers in the same order - pairs in the opposite one).
    "spearman": (rho + 1) / 2, the correlation of ranks (ties share theirs; 1/2 where one ranking has ties alone).
    "top_order": 1 where both have the same best and the same worst answers, else 0.

    Args:
        rewards, previous_rewards: [P, N], N of at least 2.
    """
    tree.require_one_of("measure", measure, MEASURES)
    one, two = (jnp.asarray(x).astype(jnp.float32) for x in (rewards, previous_rewards))
    answers = one.shape[-1]
    if one.shape != two.shape or answers < 2:
        raise ValueError(
            f"rewards have shape {one.shape} and previous_rewards {two.shape}; both must be [prompts, answers] of two or more."
        )
    if measure == "top_order":
        same = lambda of: (of(one) == of(two)).all(axis=-1)
        best, worst = (lambda x: x == x.max(-1, keepdims=True)), (lambda x: x == x.min(-1, keepdims=True))
        return (same(best) & same(worst)).astype(jnp.float32)
    first, second = (jnp.sign(x[..., :, None] - x[..., None, :]) for x in (one, two))
    if measure == "kendall":
        tau = (first * second).sum(axis=(-1, -2)) / (answers * (answers - 1))
        return (tau + 1) / 2
    # The sum of signs against all others is twice a rank from its middle.
    first, second = first.sum(-1), second.sum(-1)
    size = jnp.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return ((first * second).sum(-1) / jnp.where(size == 0, 1.0, size) + 1) / 2


def select_pairs(rewards: Num[Array | np.ndarray, "prompts answers"]) -> Pairs:
    """The answers of highest and lowest reward; no pair where all are equal, or one is not finite."""
    rewards = jnp.asarray(rewards)
    keep = jnp.isfinite(rewards).all(axis=-1) & (rewards.max(axis=-1) > rewards.min(axis=-1))
    return Pairs(rewards.argmax(axis=-1), rewards.argmin(axis=-1), keep)


def intrinsic_rewards(
    logps: Num[Array | np.ndarray, "prompts answers"],
    start_logps: Num[Array | np.ndarray, "prompts answers"],
    lengths: Num[Array | np.ndarray, "prompts answers"] | None = None,
) -> Float[Array, "prompts answers"]:
    """log p(answer) - log p_0(answer), sums over tokens, p_0 the model that the loop started from.

    Where the previous model is p_0 itself (round 1) that would be 0 everywhere: give `lengths`, and the mean log p_0 of a token
    is taken instead.
    """
    if lengths is not None:
        return jnp.asarray(start_logps, jnp.float32) / jnp.maximum(jnp.asarray(lengths, jnp.float32), 1.0)
    return jnp.asarray(logps, jnp.float32) - jnp.asarray(start_logps, jnp.float32)


def loss(
    policy: PairLogps,
    reference: PairLogps,
    *,
    consistency: Num[Array | np.ndarray, "*pairs"] | float,
    beta: float = 0.1,
) -> Float[Array, "pairs"]:
    """-C log sigmoid(beta m) - (1 - C) log sigmoid(-beta m): DPO with 1 - C as each pair's label smoothing.

    Below C = 1/2 it teaches the swapped preference, which the paper's theory does not cover.

    Args:
        consistency: [B] or one number, in [0, 1]: the mean over the round's prompts (the paper's default), or each prompt's own.
        reference: log-probabilities by the model at the start of the round.
    """
    rate = consistency if isinstance(consistency, int | float) else jnp.asarray(consistency).astype(jnp.float32)
    return losses.dpo_loss(policy, reference, beta=beta, label_smoothing=1 - rate)


@dataclasses.dataclass(frozen=True)
class CREAM(Preference):
    """`Preference` with DPO whose labels are as sure as the rows' field `consistency` says.

    Args:
        rate: the field with each pair's consistency, in [0, 1].
        scope: "set": all rows of a source get the mean, the paper's default; "prompt": each its own.
        clamp: at least 1/2, so that no pair is swapped; off in the paper.
    """

    rate: str = "consistency"
    scope: str = "set"
    clamp: bool = False

    takes: ClassVar[tuple[str, ...]] = ("dpo",)

    def __post_init__(self) -> None:
        super().__post_init__()
        tree.require_one_of("scope", self.scope, ("set", "prompt"))
        if self.label_smoothing:
            raise ValueError(f"label_smoothing={self.label_smoothing}: in CREAM each row's consistency decides it.")

    def numbers(self) -> dict[str, Number]:
        """The consistency of each pair, and its weight where rows have one."""
        return super().numbers() | {"consistency": Number(self.rate, least=0.0, of_all=self._rates)}

    def _rates(self, rates: np.ndarray) -> np.ndarray:
        if len(rates) and rates.max() > 1:
            raise ValueError(f"a consistency of {rates.max():g} is above 1.")
        rates = np.full_like(rates, rates.mean()) if self.scope == "set" and len(rates) else rates
        return np.maximum(rates, 0.5) if self.clamp else rates

    def pair_loss(
        self, policy: PairLogps, reference: PairLogps | None, lengths: PairLogps, numbers: Mapping[str, Any]
    ) -> Float[Array, "pairs"]:
        """The loss with softened labels."""
        assert reference is not None
        return loss(policy, reference, consistency=numbers["consistency"], beta=self.beta)
