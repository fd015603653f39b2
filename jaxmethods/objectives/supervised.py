"""Supervised fine-tuning: next-token prediction on the tokens that a row marks as targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmethods.models.functional import target_logps
from jaxmethods.models.vlm import pictures
from jaxmethods.tree import Mean, Tree


@dataclasses.dataclass(frozen=True)
class Supervised:
    """Mean of -log p(token | tokens before) over target tokens."""

    def loss_fn(self, module: Any) -> Any:
        """`loss_fn(params, batch, key) -> (Mean, metrics)` for a language model.

        The batch has `tokens`, `target_mask`, `segment_ids` and `positions`, each [B, T], and pictures where the model sees.
        Auxiliary losses of adapters enter as aux x weight, so that parts of a batch add up. `key=None` evaluates: no dropout,
        no noise, and no auxiliary loss.

        Metrics: `loss`, in nats a target token and without auxiliary losses, so that training and held-out losses
        compare; and `auxiliary_loss` while training.
        """

        def loss_fn(params: Tree, batch: Mapping[str, Any], key: Any) -> tuple[Mean, dict[str, Mean]]:
            logps, aux = target_logps(
                module, params, batch["tokens"], batch["target_mask"], batch["segment_ids"] > 0, key=key,
                segment_ids=batch["segment_ids"], positions=batch["positions"], **pictures(batch),
            )  # fmt: skip
            nll = Mean.of(-logps, batch["target_mask"])
            if key is None:
                return nll, {"loss": nll}
            auxiliary = Mean(aux * nll.weight, nll.weight)
            return Mean(nll.total + auxiliary.total, nll.weight), {"loss": nll, "auxiliary_loss": auxiliary}

        return loss_fn
