"""KTO: single answers, each marked desirable or not, instead of pairs. https://arxiv.org/abs/2402.01306.

A row is a conversation and a `label`. How far policy and reference are apart, from which gains and losses count, is estimated from
answers that belong to other prompts: each prompt of a batch with the answer of the row before.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods import losses, tree
from jaxmethods.data.views import Conversation, Number, View, Views
from jaxmethods.images import TEXT
from jaxmethods.objectives import preference
from jaxmethods.tree import Mean, Tree

REFERENCE_POINTS = ("batch", "none")


def answer_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """The conversation as it is."""
    if conversation.pair is not None:
        raise ValueError("this row has two answers; KTO reads rows of one, with a label: write each answer as a row.")
    return conversation


@dataclasses.dataclass(frozen=True)
class KTO:
    """Mean over rows of `losses.kto_loss`; at least two rows a batch.

    Args:
        beta: of the loss.
        desirable_weight, undesirable_weight: of each kind; the paper keeps (weight x rows) of both within 4 : 3 of each other.
        label: the field of the rows that is true where the answer is desirable.
        reference_point: "batch": `losses.kto_kl` of the batch's mismatched answers, a second forward pass without gradient (of an
            accumulated batch, each part its own). "none": 0, which TRL calls apo_zero_unpaired.
        reference: as `Preference`.
    """

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    label: str = "label"
    reference_point: str = "batch"
    reference: str = "start"

    def __post_init__(self) -> None:
        tree.require_one_of("reference_point", self.reference_point, REFERENCE_POINTS)
        tree.require_one_of("reference", self.reference, preference.REFERENCES)
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive.")
        for name in ("desirable_weight", "undesirable_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative.")
        if not self.desirable_weight + self.undesirable_weight > 0:
            raise ValueError("both weights are 0, so nothing would be learnt.")

    @property
    def least_rows(self) -> int:
        """Rows a batch must have: another prompt's answer is wanted."""
        return 2 if self.reference_point == "batch" else 1

    @property
    def keeps_start(self) -> bool:
        """Whether copies of trained leaves are wanted at `reference/`."""
        return self.reference == "start"

    def views(self) -> Views:
        """The readings of a row that this objective takes."""
        return {"answer": View(answer_view, marks="last", whole=True), "desirable": Number(self.label, boolean=True)}

    def loss_fn(self, module: Any) -> Any:
        """`loss_fn(params, batch, key) -> (Mean, metrics)`; the batch has the arrays of `views`.

        Metrics, means over rows: `loss`; `rewards/chosen` and `logps/chosen` of desirable answers, `rewards/rejected` and
        `logps/rejected` of the others, a reward being beta x (log p - reference's log p); `kl`, the reference point in nats an
        answer; while training `auxiliary_loss`.
        """

        def loss_fn(params: Tree, batch: Mapping[str, Any], key: Any) -> tuple[Mean, dict[str, Mean]]:
            rows = tree.unflatten({name: x for name, x in batch.items() if "/" in name})["answer"]
            desirable = batch["desirable"] > 0.5
            real = jnp.asarray(rows["target_mask"]).any(axis=1)  # rows that fill up a batch have no answer
            start = preference.start_of(module, params)
            logps, aux = preference.answer_logps(module, params, rows, key)
            reference = jax.lax.stop_gradient(preference.answer_logps(*start, rows, None)[0])
            kl = self._reference_point(module, params, start, rows, real)
            value = losses.kto_loss(
                logps, reference, desirable, kl=kl, beta=self.beta,
                desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
            )  # fmt: skip
            loss = Mean.of(value, real)
            metrics = {"loss": loss, "kl": Mean.of(jnp.broadcast_to(kl, real.shape), real)}
            for name, chosen in (("chosen", desirable), ("rejected", ~desirable)):
                metrics[f"rewards/{name}"] = Mean.of(self.beta * (logps - reference), real & chosen)
                metrics[f"logps/{name}"] = Mean.of(logps, real & chosen)
            if key is None:
                return loss, metrics
            auxiliary = Mean(aux * loss.weight, loss.weight)
            return Mean(loss.total + auxiliary.total, loss.weight), metrics | {"auxiliary_loss": auxiliary}

        return loss_fn

    def _reference_point(
        self, module: Any, params: Tree, start: tuple[Any, Tree], rows: Mapping[str, Any], real: Array
    ) -> Float[Array, ""]:
        if self.reference_point == "none":
            return jnp.float32(0)
        others = mismatched(rows)
        policy, _ = preference.answer_logps(module, jax.lax.stop_gradient(params), others, None)
        apart = Mean.of(policy - preference.answer_logps(*start, others, None)[0], real)
        return jax.lax.stop_gradient(jnp.maximum(apart.value(), 0.0))


def mismatched(rows: Mapping[str, Any]) -> dict[str, Array]:
    """Each row's prompt, with its pictures, followed by the answer of the row before that has one; cut at the end of the row.

    The first row gets the answer of the last.

    Args:
        rows: `tokens`, `target_mask` (true over the answer, which ends the row), `segment_ids`, `positions`, each [B, T], and
            perhaps pictures.
    """
    tokens, targets = jnp.asarray(rows["tokens"]), jnp.asarray(rows["target_mask"])
    count, length = tokens.shape
    real = targets.any(axis=1)
    order = jnp.argsort(~real, stable=True)  # rows with an answer first
    rank = jnp.argsort(order)
    other = order[(rank - 1) % jnp.maximum(real.sum(), 1)]
    begin, size = targets.argmax(axis=1), targets.sum(axis=1)
    at = jnp.arange(length)[None, :]
    behind = at - begin[:, None]
    taken = jnp.take_along_axis(tokens[other], jnp.clip(begin[other][:, None] + behind, 0, length - 1), axis=1)
    answer = (behind >= 0) & (behind < size[other][:, None]) & real[:, None]
    prompt = (behind < 0) & (jnp.asarray(rows["segment_ids"]) > 0)
    made = {
        "tokens": jnp.where(prompt, tokens, jnp.where(answer, taken, 0)),
        "target_mask": answer,
        "segment_ids": (prompt | answer).astype(jnp.int32),
        "positions": jnp.where(prompt | answer, at, 0),
    }
    if "places" in rows:
        made |= {name: rows[name] for name in ("pixels", "place_weights") if name in rows}
        made["places"] = jnp.where(prompt[:, :, None], rows["places"], TEXT)
    return made
