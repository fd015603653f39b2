"""LoRA: a low-rank term beside a frozen linear map, https://arxiv.org/abs/2106.09685."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmethods.adapters.base import Call, Result
from jaxmethods.kernels.linear import linear
from jaxmethods.tree import Tree


@dataclasses.dataclass(frozen=True)
class LoRA:
    """y + scale * dropout(x) a b, with a [d_in, rank] and b [rank, d_out].

    a starts uniform in +-1/sqrt(d_in) (as in PEFT) and b at zero. The term is computed in the dtype of x.

    Args:
        rank: width of the bottleneck.
        alpha: scale = alpha / rank (eq. 3), or alpha / sqrt(rank) with `rslora`. By default 2 * rank.
        dropout: share of x's entries dropped while training.
        rslora: rank-stabilised scaling, https://arxiv.org/abs/2312.03732, eq. 4.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    kind: ClassVar[str] = "lora"
    has_loss: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank={self.rank} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout={self.dropout} must lie in [0, 1).")

    @property
    def needs_key(self) -> bool:
        return self.dropout > 0

    @property
    def scale(self) -> float:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: Key[Array, ""], d_in: int, d_out: int) -> dict[str, Array]:
        bound = d_in**-0.5
        a = jax.random.uniform(key, (d_in, self.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out), jnp.float32)}

    def apply(self, leaves: Tree, call: Call) -> Result:
        x, key = call.x, call.key
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return Result(call.y + delta(leaves, x, self.scale).astype(call.y.dtype))

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        change = self.scale * (leaves["a"].astype(jnp.float32) @ leaves["b"].astype(jnp.float32))
        return (kernel.astype(jnp.float32) + change).astype(kernel.dtype)


def delta(leaves: dict[str, Any], x: Float[Array, "*batch d_in"], scale: float) -> Float[Array, "*batch d_out"]:
    """scale * x a b, in x's dtype."""
    return linear(linear(x, leaves["a"].astype(x.dtype)) * scale, leaves["b"].astype(x.dtype))
