"""The shape and the options of a S'MoRE adapter: all that the functions of this package read beside arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxmethods.adapters.smore.activations import ACTIVATIONS, GATE_ACTIVATIONS, initial_slope
from jaxmethods.tree import require_one_of

GATES = ("dense", "switch", "noisy_topk")
VARIANTS = ("full", "star", "shared", "child")
INITIALIZATIONS = ("w_final_zero", "eq_1_layer", "b_zero", "bw_zero", "normal")


@dataclasses.dataclass(frozen=True)
class Spec:
    """Shape and options of one S'MoRE adapter. Its sequences run from the bottom layer up and become tuples.

    Raises ValueError for lengths that differ, numbers out of range, unknown names and options that exclude each other.
    """

    experts: Sequence[int] = (4, 4)
    """s_l: how many experts each layer has."""
    fanout: Sequence[int] = (2, 2)
    """f_l: how many children each parent picks from layer l. The dense gate picks all and does not read this."""
    ranks: Sequence[int] = (8, 8)
    """r_l: the rank of each expert of a layer."""
    gate: str = "switch"
    """How children are picked and weighted: "dense" (softmax over all), "switch" (the best of a softmax,
    renormalised) or "noisy_topk" (softmax over the best noisy cosines)."""
    gate_dim: int | Sequence[int] = 32
    """m_l: width of the router's queries and keys, one for all layers or one a layer."""
    router_dim: int = 24
    """Width to which the router first brings the token."""
    activation: str = "tanh"
    """sigma: "tanh", "relu", "identity", or "prelu" with a learned slope for each layer, which starts at 0.25
    ("prelu|0.1": at 0.1). In "star" and "child" the slope of layer l acts on x_l, and that of layer 0 on nothing."""
    variant: str = "full"
    """How a child n of layer l adds to its parent. With h = B_l^n A_l^n x (for l = 0 without the terms in W and x_l):

    "full"    alpha sigma(h + W_l x_l)               eq. 3
    "star"    alpha (h + W_l sigma(x_l))             S'MoRE*, eq. 10
    "child"   alpha h + W_l sigma(x_l)               in the released code only
    "shared"  as "full", with one pool of experts    S'MoRE#: A and B are those of layer 0 in all layers, d_l = s r
    """
    scale: Sequence[float] | None = None
    """Factor of each layer's B(Ax + a) + b; None is 1 everywhere."""
    initialization: str = "w_final_zero"
    """What is random and what is zero at the start. Biases are always zero.

    "w_final_zero"  W_proj = 0
    "eq_1_layer"    W_proj = 0; B and W copy, so that with sigma = identity the layers equal one flat mixture
    "b_zero"        B = 0; with sigma = "relu", whose gradient at 0 is 0, "full" and "shared" then never learn
    "bw_zero"       B = W = 0; as W_l and what lies below it wait for each other, only the top layer's experts learn
    "normal"        nothing: the one mode whose fresh adapter changes the layer's output
    """
    balance_weight: float = 0.01
    """gamma: the weight of the gates' losses, included in `aux_loss`."""
    gate_activation: str = "relu"
    """Between the two linear maps of a gate: "relu", "tanh" or "identity"."""
    tied_down: bool = False
    """Whether the experts share one A, as HydraLoRA's heads do; for one layer only."""

    def __post_init__(self) -> None:
        for name in ("experts", "fanout", "ranks", "gate_dim", "scale"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        require_one_of("gate", self.gate, GATES)
        require_one_of("variant", self.variant, VARIANTS)
        require_one_of("initialization", self.initialization, INITIALIZATIONS)
        require_one_of("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        require_one_of("activation", self.activation.split("|")[0], ACTIVATIONS)
        if "|" in self.activation:
            initial_slope(self.activation)
        self._check_layers()
        if self.variant == "shared" and (len(set(self.experts)) > 1 or len(set(self.ranks)) > 1):
            raise ValueError(
                f'variant="shared" has one pool of experts for all layers, but experts={self.experts} and '
                f"ranks={self.ranks} differ between layers; give each layer the same."
            )
        if self.tied_down and self.layers > 1:
            raise ValueError(
                f"tied_down=True is for one layer, but experts={self.experts} has {self.layers}; "
                "leave it out, or give one layer."
            )
        for name in ("gate_dim", "router_dim"):
            if not isinstance(value := getattr(self, name), tuple) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number from 1 up.")
        if not self.balance_weight >= 0:
            raise ValueError(f"balance_weight={self.balance_weight} must not be negative; 0 turns the loss off.")

    def _check_layers(self) -> None:
        check_sizes("experts", self.experts)
        per_layer: dict[str, Any] = {"ranks": self.ranks}
        if self.gate != "dense":
            per_layer["fanout"] = self.fanout
        if isinstance(self.gate_dim, tuple):
            per_layer["gate_dim"] = self.gate_dim
        for name, value in per_layer.items():
            check_sizes(name, value)
        if self.scale is not None:
            per_layer["scale"] = self.scale
        for name, value in per_layer.items():
            if len(value) != self.layers:
                raise ValueError(
                    f"{name}={value} has {len(value)} entries but experts={self.experts} has {self.layers}; "
                    "give one entry for each layer, the bottom layer first."
                )
        if self.gate != "dense":
            check_fanout(self.experts, self.fanout)

    @property
    def layers(self) -> int:
        """L."""
        return len(self.experts)

    @property
    def children(self) -> tuple[int, ...]:
        """f_l as used: `fanout`, or all experts with the dense gate."""
        return tuple(self.experts if self.gate == "dense" else self.fanout)

    @property
    def nodes(self) -> tuple[int, ...]:
        """F_l = f_l ... f_{L-1}: how many nodes a tree has in layer l; a last entry, 1, is the root."""
        nodes = [1]
        for fanout in reversed(self.children):
            nodes.append(nodes[-1] * fanout)
        return tuple(nodes[::-1])

    @property
    def sizes(self) -> tuple[int, ...]:
        """s_l r_l: the ranks of a layer's experts together."""
        return tuple(s * r for s, r in zip(self.experts, self.ranks, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """d_0 = 0, d_1, ..., d_L: a layer adds its size to the width below; layers with one pool all have its size."""
        if self.variant == "shared":
            return (0, *self.sizes)
        return tuple(sum(self.sizes[:layer]) for layer in range(self.layers + 1))

    @property
    def pools(self) -> tuple[int, ...]:
        """The layers that have experts of their own: all, or with variant "shared" the bottom one."""
        return (0,) if self.variant == "shared" else tuple(range(self.layers))

    def pool(self, layer: int) -> int:
        """The layer whose experts `layer` uses."""
        return 0 if self.variant == "shared" else layer

    @property
    def down_sizes(self) -> tuple[int, ...]:
        """Columns of A that each pool has: s_l r_l, or r_l where its experts share them."""
        return tuple(self.ranks[pool] if self.tied_down else self.sizes[pool] for pool in self.pools)

    @property
    def gate_dims(self) -> tuple[int, ...]:
        """m_l of each layer."""
        return (self.gate_dim,) * self.layers if isinstance(self.gate_dim, int) else tuple(self.gate_dim)

    @property
    def context_dims(self) -> tuple[int, ...]:
        """in_l: width of what the gate of layer l sees, the token and the keys of all ancestors."""
        return tuple(self.router_dim + sum(self.gate_dims[layer + 1 :]) for layer in range(self.layers))

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale of each layer."""
        return (1.0,) * self.layers if self.scale is None else tuple(self.scale)


def check_sizes(field: str, value: Any) -> None:
    """Raises ValueError unless `value` is a tuple of whole numbers from 1 up."""
    if not isinstance(value, tuple) or not value or any(not isinstance(n, int) or n < 1 for n in value):
        raise ValueError(f"{field}={value!r} must be a tuple of whole numbers from 1 up, one for each layer.")


def check_fanout(experts: Sequence[int], fanout: Sequence[int]) -> None:
    """Raises ValueError where a parent would pick more children than there are experts."""
    if any(f > s for f, s in zip(fanout, experts, strict=True)):
        raise ValueError(
            f"fanout={fanout} exceeds experts={experts}: a parent's children are distinct; lower fanout or add experts."
        )
