"""LoRA, a low-rank term beside a frozen linear map (https://arxiv.org/abs/2106.09685), and DoRA, which learns the
directions of the kernel's columns with it and their lengths apart (https://arxiv.org/abs/2402.09353)."""

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
        name = type(self).__name__
        if self.rank < 1:
            raise ValueError(f"{name} rank={self.rank} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{name} dropout={self.dropout} must lie in [0, 1).")

    @property
    def needs_key(self) -> bool:
        return self.dropout > 0

    @property
    def scale(self) -> float:
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def init(self, key: Key[Array, ""], d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Tree:
        """Leaves `a` and `b`, float32.

        Raises:
            ValueError: a rank beyond the layer's width.
        """
        if self.rank > min(d_in, d_out):
            raise ValueError(
                f"{type(self).__name__} rank={self.rank} is over the width of a layer of {d_in} x {d_out}; lower it, or "
                "name layers of other sizes in a regex of their own."
            )
        bound = d_in**-0.5
        a = jax.random.uniform(key, (d_in, self.rank), jnp.float32, -bound, bound)
        return {"a": a, "b": jnp.zeros((self.rank, d_out), jnp.float32)}

    def apply(self, leaves: Tree, call: Call) -> Result:
        return Result(call.y + self.delta(leaves, call).astype(call.y.dtype))

    def delta(self, leaves: Tree, call: Call) -> Float[Array, "*batch d_out"]:
        """scale * dropout(x) a b, in x's dtype."""
        x, key = call.x, call.key
        if key is not None and self.dropout:
            keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return linear(linear(x, leaves["a"].astype(x.dtype)) * self.scale, leaves["b"].astype(x.dtype))

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        return self._changed(leaves, kernel).astype(kernel.dtype)

    def as_lora(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> tuple[Array, Array]:
        """The factors a [d_in, rank] and b [rank, d_out]."""
        return leaves["a"], leaves["b"]

    def _changed(self, leaves: Tree, kernel: Array) -> Array:
        change = self.scale * (leaves["a"].astype(jnp.float32) @ leaves["b"].astype(jnp.float32))
        return kernel.astype(jnp.float32) + change


@dataclasses.dataclass(frozen=True)
class DoRA(LoRA):
    """x (magnitude * V / |V|) with V = kernel + scale * a b and |V| the length of each column (eq. 5).

    `magnitude` [d_out] starts at the kernel's own lengths. |V| is taken as a constant in the gradient (section 4.3), and
    found without forming V. Dropout acts on the low-rank term alone.
    """

    kind: ClassVar[str] = "dora"

    def init(self, key: Key[Array, ""], d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Tree:
        """Leaves `a`, `b` and `magnitude`, float32.

        Raises:
            ValueError: a rank beyond the layer's width, or no kernel.
        """
        if kernel is None:
            raise ValueError("DoRA starts from the kernel's values; give adapters.init arrays, not shapes.")
        leaves = super().init(key, d_in, d_out)
        return leaves | {"magnitude": jnp.sqrt(_squares(kernel.astype(jnp.float32)))}

    def apply(self, leaves: Tree, call: Call) -> Result:
        fixed = jax.lax.stop_gradient({"a": leaves["a"], "b": leaves["b"]})
        gain = leaves["magnitude"] / self._lengths(fixed, call.kernel)
        bias = 0.0 if call.bias is None else call.bias.astype(jnp.float32)
        plain = call.y.astype(jnp.float32) - bias  # x @ kernel
        return Result((gain * (plain + self.delta(leaves, call)) + bias).astype(call.y.dtype))

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        changed = self._changed(leaves, kernel)
        return (changed * (leaves["magnitude"] / jnp.sqrt(_squares(changed)))).astype(kernel.dtype)

    def _lengths(self, leaves: Tree, kernel: Array) -> Float[Array, " d_out"]:
        """|kernel + scale a b| of each column: |K|^2 + 2 scale (a'K) . b + scale^2 b . (a'a) b."""
        a, b, kernel = leaves["a"], leaves["b"], kernel.astype(jnp.float32)
        exact = jax.lax.Precision.HIGHEST
        cross = jnp.einsum("ir,io->ro", a, kernel, precision=exact)
        square = jnp.einsum("ir,is,so->ro", a, a, b, precision=exact)
        beyond = self.scale * jnp.sum(b * (2 * cross + self.scale * square), axis=0)
        return jnp.sqrt(jnp.maximum(_squares(kernel) + beyond, jnp.finfo(jnp.float32).tiny))


def _squares(kernel: Array) -> Float[Array, " d_out"]:
    return jnp.sum(kernel * kernel, axis=0)
