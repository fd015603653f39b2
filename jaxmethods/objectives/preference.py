"""Preference optimisation: two answers to each prompt, and a loss of their log-probabilities (`losses.preference`).

Both answers are scored in one forward pass. The reference is the model before the first step, never a drifting one: adapters
switched off, and where parameters of the model itself are trained, copies of what they were.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods import adapters, losses, tree
from jaxmethods.data.views import Conversation, Number, View, Views
from jaxmethods.losses import PairLogps
from jaxmethods.models.functional import hidden_states, logits_of, target_logps
from jaxmethods.models.vlm import pictures
from jaxmethods.tree import Mean, Tree

LOSSES = ("dpo", "robust", "ipo", "hinge", "simpo", "cpo", "orpo")
WITHOUT_REFERENCE = ("simpo", "cpo", "orpo")
REFERENCES = ("start", "drifting")
START = "reference"
"""Where in the parameters copies of trained leaves stand, as they were before the first step."""


def chosen_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """The prompt and the answer that is preferred."""
    pair = _pair(conversation)
    return _answered(conversation, pair.chosen, conversation.images)


def rejected_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """The prompt and the other answer, with pictures of its own where the row has some."""
    pair = _pair(conversation)
    return _answered(
        conversation, pair.rejected, conversation.images if pair.rejected_images is None else pair.rejected_images
    )


def _pair(conversation: Conversation) -> Any:
    if conversation.pair is None:
        names = ", ".join(map(str, conversation.row)) or "none"
        raise ValueError(f"this row has no two answers, 'chosen' and 'rejected'; its fields are {names}.")
    return conversation.pair


def _answered(conversation: Conversation, answer: str, images: Any) -> Conversation:
    return Conversation([*conversation.messages, {"role": "assistant", "content": answer}], images, conversation.row)


@dataclasses.dataclass(frozen=True)
class Preference:
    """Mean over pairs of weight x loss(log-probabilities of both answers).

    Args:
        loss: "dpo", "robust", "ipo", "hinge", "simpo", "cpo" or "orpo", as `losses` defines them.
        beta: of the loss. Published: 0.1 for dpo and its kin; 2 to 10 for simpo.
        label_smoothing: of "dpo" (then conservative DPO) and "robust": how likely a label is wrong.
        gamma: of "simpo".
        per_token: "dpo" and "ipo" of mean log-probabilities instead of sums.
        nll_weight: adds so much times the nats of each chosen answer, a token of it, as the papers of ORPO and CPO do (1.0).
        weight: a field of the rows with the weight of each pair, at least 0. The mean is over pairs, not over weights.
        reference: "start": the model before the first step. "drifting": parameters of the model that are trained beside
            adapters serve the reference too, as in the released code of MMedPO and MMed-RAG (the projector).
        cache: a Parquet file for the log-probabilities by the start: each pair is scored once before the first step, or found
            there. None: they are computed in every step.
        kl: evaluations report the exact `kl` too (`answer_kl`), which takes a product with the whole vocabulary for each place.
    """

    loss: str = "dpo"
    beta: float = 0.1
    label_smoothing: float = 0.0
    gamma: float | None = None
    per_token: bool = False
    nll_weight: float = 0.0
    weight: str | None = None
    reference: str = "start"
    cache: str | None = None
    kl: bool = False

    takes: ClassVar[tuple[str, ...]] = LOSSES
    """Which losses a method built on this one works with."""

    def __post_init__(self) -> None:
        tree.require_one_of("loss", self.loss, self.takes)
        tree.require_one_of("reference", self.reference, REFERENCES)
        if not self.beta > 0:
            raise ValueError(f"beta={self.beta} must be positive.")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 0.5).")
        if self.nll_weight < 0:
            raise ValueError(f"nll_weight={self.nll_weight} must not be negative.")
        given = {
            "label_smoothing": (self.label_smoothing != 0, ("dpo", "robust")),
            "gamma": (self.gamma is not None, ("simpo",)),
            "per_token": (self.per_token, ("dpo", "ipo")),
            "cache": (self.cache is not None, tuple(x for x in LOSSES if x not in WITHOUT_REFERENCE)),
            "kl": (self.kl, tuple(x for x in LOSSES if x not in WITHOUT_REFERENCE)),
        }
        if self.cache is not None and self.reference == "drifting":
            raise ValueError("a reference that drifts cannot be kept; leave cache=None, or reference='start'.")
        if self.cache is not None and self.kl:
            raise ValueError(
                "kl wants whole distributions of the reference, and a cache holds one number an answer; leave one."
            )
        for name, (is_given, takes) in given.items():
            if is_given and self.loss not in takes:
                raise ValueError(
                    f"{name} is for loss={' and '.join(map(repr, takes))}; {self.loss!r} would not read it."
                )

    @property
    def keeps_start(self) -> bool:
        """Whether copies of trained leaves are wanted at `reference/`."""
        return self.loss not in WITHOUT_REFERENCE and self.reference == "start" and self.cache is None

    @property
    def precomputed(self) -> tuple[str, ...]:
        """Arrays [rows] that a batch needs besides those of `views`."""
        return () if self.cache is None else ("reference_chosen", "reference_rejected")

    def views(self) -> Views:
        """The readings of a row that this objective takes."""
        return {"chosen": View(chosen_view, marks="last", whole=True),
                "rejected": View(rejected_view, marks="last", whole=True)} | self.numbers()  # fmt: skip

    def numbers(self) -> dict[str, Number]:
        """What else it reads of a row."""
        return {} if self.weight is None else {"weight": Number(self.weight, least=0.0, of_all=_some_weight)}

    def pair_loss(
        self, policy: PairLogps, reference: PairLogps | None, lengths: PairLogps, numbers: Mapping[str, Any]
    ) -> Float[Array, "pairs"]:
        """The loss of each pair, unweighted; `lengths` are token counts, `numbers` those of `numbers`."""
        if reference is None:
            if self.loss == "cpo":
                return losses.cpo_loss(policy, beta=self.beta)
            if self.loss == "orpo":
                return losses.orpo_loss(policy, lengths, beta=self.beta)
            gamma = {} if self.gamma is None else {"gamma": self.gamma}
            return losses.simpo_loss(policy, lengths, beta=self.beta, **gamma)
        if self.per_token:
            policy, reference = (losses.mean_logps(x, lengths) for x in (policy, reference))
        if self.loss == "hinge":
            return losses.hinge_loss(policy, reference, beta=self.beta)
        if self.loss == "ipo":
            return losses.ipo_loss(policy, reference, beta=self.beta)
        function = losses.dpo_loss if self.loss == "dpo" else losses.robust_dpo_loss
        return function(policy, reference, beta=self.beta, label_smoothing=self.label_smoothing)

    def loss_fn(self, module: Any) -> Any:
        """`loss_fn(params, batch, key) -> (Mean, metrics)`; the batch has the arrays of `views`.

        Where more than adapters is trained, `params` hold copies of these leaves at `reference/`, not trained (`keeps_start`):
        without them such leaves are their own reference, and drift.

        Metrics, means over pairs: `loss`; `rewards/chosen` and `rewards/rejected`, beta x (log p - reference's log p), or beta x
        log p (a token, where the loss is) without a reference; `rewards/margins`, `rewards/accuracies` (how often the chosen
        answer's is the larger); `logps/chosen`, `logps/rejected`; `nll`, nats of the chosen answer, a token of it; while training
        `auxiliary_loss`; in evaluations `kl`, a mean over places of both answers.
        """

        def loss_fn(params: Tree, batch: Mapping[str, Any], key: Any) -> tuple[Mean, dict[str, Mean]]:
            sides = tree.unflatten({name: x for name, x in batch.items() if "/" in name})
            numbers = {name: x for name, x in batch.items() if "/" not in name}
            both = together(sides["chosen"], sides["rejected"])
            counts = both["target_mask"].sum(axis=1).reshape(-1, 2).astype(jnp.float32)
            real = counts[:, 0] > 0  # of the rows that fill up a batch, none
            lengths = PairLogps(*jnp.maximum(counts, 1).T)
            policy, aux = pair_logps(module, params, both, key)
            reference = None
            if self.cache is not None:
                reference = PairLogps(numbers["reference_chosen"], numbers["reference_rejected"])
            elif self.loss not in WITHOUT_REFERENCE:
                reference = jax.lax.stop_gradient(pair_logps(*start_of(module, params), both, None)[0])
            value = self.pair_loss(policy, reference, lengths, numbers)
            if "weight" in numbers:
                value = numbers["weight"] * value
            nll = -policy.chosen / lengths.chosen
            loss = Mean.of(value + self.nll_weight * nll if self.nll_weight else value, real)
            if reference is not None:
                gain = PairLogps(policy.chosen - reference.chosen, policy.rejected - reference.rejected)
            elif self.loss == "cpo":
                gain = policy
            else:
                gain = losses.mean_logps(policy, lengths)
            metrics = {"loss": loss} | {
                name: Mean.of(x, real)
                for name, x in {
                    "rewards/chosen": self.beta * gain.chosen,
                    "rewards/rejected": self.beta * gain.rejected,
                    "rewards/margins": self.beta * (gain.chosen - gain.rejected),
                    "rewards/accuracies": (gain.chosen > gain.rejected).astype(jnp.float32),
                    "logps/chosen": policy.chosen,
                    "logps/rejected": policy.rejected,
                    "nll": nll,
                }.items()
            }
            if key is None:
                return loss, metrics | ({"kl": answer_kl(module, params, both)} if self.kl else {})
            auxiliary = Mean(aux * loss.weight, loss.weight)
            return Mean(loss.total + auxiliary.total, loss.weight), metrics | {"auxiliary_loss": auxiliary}

        return loss_fn


def pair_logps(module: Any, params: Tree, both: Mapping[str, Any], key: Any) -> tuple[PairLogps, Float[Array, ""]]:
    """(summed log-probabilities of the targets of chosen and rejected rows, the adapters' auxiliary loss).

    Args:
        both: [2 B, T] arrays of a batch, a chosen row and then its rejected one.
    """
    logps, aux = answer_logps(module, params, both, key)
    return PairLogps(*logps.reshape(-1, 2).T), aux


def answer_logps(
    module: Any, params: Tree, rows: Mapping[str, Any], key: Any
) -> tuple[Float[Array, "rows"], Float[Array, ""]]:
    """(summed log-probabilities of the targets of rows [B, T], the adapters' auxiliary loss)."""
    logps, aux = target_logps(
        module, params, rows["tokens"], rows["target_mask"], rows["segment_ids"] > 0, key=key,
        segment_ids=rows["segment_ids"], positions=rows["positions"], **pictures(rows),
    )  # fmt: skip
    return logps.sum(axis=1), aux


def answer_kl(module: Any, params: Tree, rows: Mapping[str, Any], *, block: int = 16) -> Mean:
    """Mean over targets of KL(policy || reference), in nats: exact, sum over the vocabulary of p (log p - log q).

    Args:
        rows: as `answer_logps`; policy and reference are `module` and its `start_of`, both without dropout.
        block: places of each row whose logits are held at once.
    """
    told = {"segment_ids": rows["segment_ids"], "positions": rows["positions"], **pictures(rows)}
    models = (module, params), start_of(module, params)
    hidden = [hidden_states(*model, rows["tokens"], rows["segment_ids"] > 0, **told)[0] for model in models]
    length = hidden[0].shape[1]
    blocks = lambda x: jnp.moveaxis(
        jnp.pad(x, [(0, 0), (0, -length % block), (0, 0)]).reshape(len(x), -1, block, x.shape[2]), 1, 0
    )

    def of(pair: Any) -> Array:
        policy, reference = (jax.nn.log_softmax(logits_of(*m, x)) for m, x in zip(models, pair, strict=True))
        return (jnp.exp(policy) * (policy - reference)).sum(axis=-1)

    each = jnp.moveaxis(jax.lax.map(of, tuple(blocks(x) for x in hidden)), 0, 1).reshape(len(hidden[0]), -1)[:, :length]
    wanted = jnp.roll(jnp.asarray(rows["target_mask"]), -1, axis=1).at[:, -1].set(False)
    return Mean.of(each, wanted)


def start_of(module: Any, params: Tree) -> tuple[Any, Tree]:
    """(module, parameters) of the model before the first step: no adapters, and of trained leaves the copies at `reference/`."""
    if getattr(module, "adapters", ()):
        module, params = adapters.detach(module, params)
    flat = {path: x for path, x in tree.flatten(params).items() if not path.startswith(f"{START}/")}
    return module, tree.unflatten(flat | tree.flatten(params.get(START, {})))


def together(chosen: Mapping[str, Any], rejected: Mapping[str, Any]) -> dict[str, Array]:
    """[B, ...] of each side as [2 B, ...], a pair side by side: every device keeps its rows."""
    both = {}
    for name, x in chosen.items():
        sides = [jnp.asarray(x), jnp.asarray(rejected[name])]
        if name == "pixels":  # the sides may have room for different numbers of crops
            most = max(side.shape[1] for side in sides)
            sides = [jnp.pad(s, [(0, 0), (0, most - s.shape[1]), *[(0, 0)] * (s.ndim - 2)]) for s in sides]
        both[name] = jnp.stack(sides, axis=1).reshape(-1, *sides[0].shape[1:])
    return both


def _some_weight(weights: Any) -> Any:
    if not weights.any():
        raise ValueError("every weight is 0, so nothing would be learnt.")
    return weights
