"""What an adapter is: how it starts, how it acts in a linear layer, how it is fused into the kernel.

An adapter is a frozen dataclass with the methods of `Adapter`; its state is a nested dict of arrays that lives beside the
kernel it changes, at LAYER/adapter/KIND. Nothing else is needed for it to train, shard, save and compose.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Key

from jaxmethods.tree import Tree


class Call(NamedTuple):
    """One call of an adapted linear layer, y = x @ kernel (+ bias)."""

    x: Float[Array, "*batch d_in"]
    y: Float[Array, "*batch d_out"]
    kernel: Float[Array, "d_in d_out"]
    """Of a quantised layer what its codes stand for, opened where it is read."""
    token_mask: Bool[Array, "*batch"] | None
    """True at real tokens; None where all are."""
    key: Key[Array, ""] | None
    """Given while training: for dropout and router noise."""
    bias: Float[Array, " d_out"] | None = None
    """The layer's own, which y holds."""
    mesh: Any = None
    """Of the module: how it lets x [rows, tokens, d_in] lie (`sharding.tokens_spec`)."""


class Result(NamedTuple):
    """The layer's new output, and an auxiliary loss (already weighted) where the adapter has one."""

    y: Float[Array, "*batch d_out"]
    loss: Float[Array, ""] | None = None


@runtime_checkable
class Adapter(Protocol):
    """The plug-in point: any frozen dataclass with these members can be attached."""

    kind: ClassVar[str]
    """Names the adapter's leaves in the tree and in files; one adapter of a kind for each layer."""

    @property
    def needs_key(self) -> bool:
        """Whether training draws random numbers."""
        ...

    @property
    def has_loss(self) -> bool:
        """Whether `apply` returns an auxiliary loss."""
        ...

    def init(
        self,
        key: Key[Array, ""],
        d_in: int,
        d_out: int,
        *,
        kernel: Float[Array, "d_in d_out"] | None = None,
        scores: Any = None,
    ) -> Tree:
        """Leaves for one layer; with them the layer's output is unchanged.

        Args:
            kernel: of the layer; only shape and dtype can be relied on unless `reads_kernel` is true.
            scores: what `adapters.init` was given for this layer.
        """
        ...

    def apply(self, leaves: Tree, call: Call) -> Result:
        """What the adapted layer gives."""
        ...

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """The kernel of a plain layer that gives the same output.

        Raises:
            ValueError: when there is none, as for adapters that depend on the token.
        """
        ...


AnyAdapter = Any
"""`Adapter`, for signatures that run-time type checks look at."""
