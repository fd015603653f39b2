"""The adapter: which channels are chosen, and how a layer with some trained channels acts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmethods.adapters.base import Call, Result
from jaxmethods.kernels.channels import add_channels, take_channels
from jaxmethods.kernels.linear import linear
from jaxmethods.tree import Tree, require_one_of

UNITS = ("channel", "head")
SIDES = ("in", "out")
SELECTIONS = ("random", "weight", "activation", "product", "gradient")
BUDGETS = ("uniform", "global")
FORMS = ("delta", "block")


@dataclasses.dataclass(frozen=True)
class S2FT:
    """y = x (kernel + delta), where delta is zero outside of a few rows (`side="in"`) or columns (`side="out"`).

    The chosen channels stay what they were chosen as, in the integer leaf `indices`. They are gathered; section 3.2
    permutes them to make them adjacent, which `s2ft.permute` does, and the function is the same. Trained leaves are float32
    and start at the pretrained model; what they add is computed in the dtype of x.

    The paper's recipe: `side="in"` on o_proj (`unit="head"`) and on down_proj; with grouped-query attention on down_proj
    alone, `fraction=0.03`.

    Args:
        fraction: of the units that are trained, rounded down, at least one. 0.03 if `count` is not given either.
        count: of the units, instead of `fraction`.
        unit: "channel", or "head": adjacent channels of one attention head, chosen together.
        side: "in" chooses what the layer reads (o_proj, down_proj), "out" what it writes (v_proj, up_proj).
        selection: section 5.4. "random" (S²FT-R); by norm over the unit's "weight" (W), "activation" (A), their "product" (S) or
            "gradient" (G). The last three need `adapters.init(..., scores=s2ft.calibrate(...))`.
        largest: take the largest norms; by default the smallest, which did better in the paper for A, S and G.
        budget: "uniform": equally many units in each layer, as the paper says. "global": units are drawn over all layers
            together, as in the released code (random ones only); layers are padded to the largest with indices past the end.
        form: "delta": the trained leaf is the change, so weight decay pulls towards the pretrained kernel. "block": it is the
            new value, in place of the kernel's, and decay pulls towards zero.
        head_dim: channels of a head; taken from the module's config where it has one.
        calibration: share of the training rows by which a run chooses, where it chooses by data.
        seed: of the global draw, which must be the same on all processes. (Others draw from the key of `adapters.init`.)
    """

    fraction: float | None = None
    count: int | None = None
    unit: str = "channel"
    side: str = "in"
    selection: str = "random"
    largest: bool = False
    budget: str = "uniform"
    form: str = "delta"
    head_dim: int | None = None
    calibration: float = 0.01
    seed: int = 0

    kind: ClassVar[str] = "s2ft"
    has_loss: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, choices in (("unit", UNITS), ("side", SIDES), ("selection", SELECTIONS), ("budget", BUDGETS),
                              ("form", FORMS)):  # fmt: skip
            require_one_of(f"S2FT {name}", getattr(self, name), choices)
        if self.fraction is not None and self.count is not None:
            raise ValueError(
                f"S2FT fraction={self.fraction} and count={self.count} say the same thing; give one of them."
            )
        if self.fraction is not None and not 0 < self.fraction <= 1:
            raise ValueError(f"S2FT fraction={self.fraction} must lie in (0, 1].")
        if not 0 < self.calibration <= 1:
            raise ValueError(f"S2FT calibration={self.calibration} must lie in (0, 1].")
        for name in ("count", "head_dim"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"S2FT {name}={value} must be at least 1.")
        if self.across_layers and self.selection != "random":
            raise ValueError(
                f"S2FT selection={self.selection!r} needs budget='uniform': only random units are drawn globally."
            )

    @property
    def across_layers(self) -> bool:
        """Whether the layers of a stack are drawn together."""
        return self.budget == "global"

    @property
    def needs_scores(self) -> bool:
        """Whether `adapters.init` needs the scores of a calibration."""
        return self.selection in ("activation", "product", "gradient")

    def scored(self, d_in: int, d_out: int) -> int:
        """How many channels the scores of a layer have."""
        return d_in if self.side == "in" else d_out

    def for_module(self, module: Any) -> S2FT:
        """With `head_dim` of the module's config, where it is needed and not given."""
        head_dim = getattr(getattr(module, "config", None), "head_dim", None)
        needed = self.unit == "head" and self.head_dim is None
        return dataclasses.replace(self, head_dim=head_dim) if needed and head_dim else self

    def units(self, d_in: int, d_out: int) -> tuple[int, int]:
        """(How many units the chosen side has, channels in each).

        Raises:
            ValueError: heads of unknown width, or that do not divide the side.
        """
        width, size = (d_in if self.side == "in" else d_out), 1
        if self.unit == "head":
            if self.head_dim is None:
                raise ValueError("S2FT unit='head' needs head_dim: the module's config does not tell it.")
            size = self.head_dim
        if width % size:
            raise ValueError(f"S2FT head_dim={size} does not divide the layer's {width} channels.")
        return width // size, size

    def init(self, key: Key[Array, ""], d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Tree:
        """Leaves `indices` [s], ascending, and `delta` (or `block`) [s, d_out] or [d_in, s].

        Raises:
            ValueError: more units than there are, or scores or a kernel that are needed and missing.
        """
        units, size = self.units(d_in, d_out)
        count = self._count(units)
        if self.selection == "random":
            chosen = jax.random.permutation(key, units)[:count]
        else:
            norms = self._norms(kernel, scores, units, size)
            chosen = jax.lax.top_k(norms if self.largest else -norms, count)[1]
        indices = _channels(jnp.sort(chosen), size)
        return {"indices": indices, self.form: self._start(indices, d_in, d_out, kernel)}

    def init_stack(self, key: Key[Array, ""], layers: int, *, d_in: int, d_out: int) -> Tree:
        """Leaves of a stack of layers whose units are drawn together: `indices` [layers, s] and `delta` [layers, s, d_out] or
        [layers, d_in, s], where s is the most that a layer has. Others are filled with an index past the last channel."""
        if self.form == "block":
            raise ValueError("S2FT budget='global' pads layers with changes of zero; use form='delta'.")
        units, size = self.units(d_in, d_out)
        drawn = np.random.default_rng(self.seed).permutation(layers * units)[: self._count(layers * units)]
        chosen = [np.sort(drawn[drawn // units == layer] % units) for layer in range(layers)]
        most = max(len(each) for each in chosen)
        padded = np.stack([np.pad(each, (0, most - len(each)), constant_values=units) for each in chosen])
        indices = (padded[..., None] * size + np.arange(size)).reshape(layers, -1)
        delta = self._start(indices[0], d_in, d_out, None)
        return {"indices": jnp.asarray(indices, jnp.int32), "delta": jnp.zeros((layers, *delta.shape), jnp.float32)}

    def apply(self, leaves: Tree, call: Call) -> Result:
        x, y, change = call.x, call.y, self.change(leaves, call.kernel).astype(call.x.dtype)
        if "start" in leaves:  # adjacent channels, after `permute`
            start, axis = leaves["start"], call.x.ndim - 1
            if self.side == "in":
                return Result(
                    y + linear(jax.lax.dynamic_slice_in_dim(x, start, len(change), axis), change).astype(y.dtype)
                )
            own = jax.lax.dynamic_slice_in_dim(y, start, change.shape[1], axis) + linear(x, change).astype(y.dtype)
            return Result(jax.lax.dynamic_update_slice_in_dim(y, own, start, axis))
        if self.side == "in":
            return Result(y + linear(take_channels(x, leaves["indices"]), change).astype(y.dtype))
        return Result(add_channels(y, linear(x, change), leaves["indices"]))

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        new = (self.own(leaves, kernel).astype(jnp.float32) + self.change(leaves, kernel)).astype(kernel.dtype)
        channels = self.channels(leaves)
        return kernel.at[channels].set(new) if self.side == "in" else kernel.at[:, channels].set(new)

    def as_lora(
        self, leaves: Tree, kernel: Float[Array, "d_in d_out"]
    ) -> tuple[Float[Array, "d_in s"], Float[Array, "s d_out"]]:
        """Two factors whose product is the change of the kernel; one of them selects channels (section 4.3)."""
        if "indices" not in leaves:
            raise ValueError(
                "S2FT leaves of permuted kernels mean nothing elsewhere; s2ft.unpermute the parameters first."
            )
        width = kernel.shape[0 if self.side == "in" else 1]
        selection, change = jax.nn.one_hot(leaves["indices"], width, dtype=jnp.float32), self.change(leaves, kernel)
        return (selection.T, change) if self.side == "in" else (change, selection)

    def channels(self, leaves: Tree) -> Int[Array, " s"]:
        """Where the trained channels lie in the kernel."""
        return leaves["indices"] if "indices" in leaves else leaves["start"] + jnp.arange(self._size(leaves))

    def own(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "..."]:
        """The kernel's own values at the trained channels, [s, d_out] or [d_in, s]."""
        return jnp.take(kernel, self.channels(leaves), axis=0 if self.side == "in" else 1, mode="clip")

    def change(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "..."]:
        """What is added to the kernel at the trained channels, float32."""
        if "block" in leaves:
            return leaves["block"].astype(jnp.float32) - jax.lax.stop_gradient(self.own(leaves, kernel)).astype(
                jnp.float32
            )
        return leaves["delta"].astype(jnp.float32)

    def _size(self, leaves: Tree) -> int:
        trained = leaves["block"] if "block" in leaves else leaves["delta"]
        return trained.shape[0 if self.side == "in" else 1]

    def _count(self, units: int) -> int:
        if self.count is None:
            return max(int((0.03 if self.fraction is None else self.fraction) * units), 1)
        if self.count > units:
            raise ValueError(f"S2FT count={self.count} is over the layer's {units} {self.unit}s.")
        return self.count

    def _norms(self, kernel: Any, scores: Any, units: int, size: int) -> Float[Array, " units"]:
        """The squared norm of each unit."""
        norms = jnp.ones(units)
        if self.selection in ("weight", "product"):
            if kernel is None:
                raise ValueError(
                    f"S2FT selection={self.selection!r} reads the kernel; give adapters.init arrays, not shapes."
                )
            squares = jnp.square(kernel.astype(jnp.float32)).sum(1 if self.side == "in" else 0)
            norms *= squares.reshape(units, size).sum(1)
        if self.needs_scores:
            if scores is None:
                raise ValueError(
                    f"S2FT selection={self.selection!r} chooses by data; give adapters.init(..., "
                    "scores=adapters.s2ft.calibrate(...))."
                )
            if scores.shape != (units * size,):
                raise ValueError(f"S2FT scores have shape {scores.shape}; this layer has {units * size} channels.")
            norms *= scores.reshape(units, size).sum(1)
        return norms

    def _start(self, indices: Any, d_in: int, d_out: int, kernel: Any) -> Array:
        if self.form == "delta":
            return jnp.zeros((len(indices), d_out) if self.side == "in" else (d_in, len(indices)), jnp.float32)
        if kernel is None:
            raise ValueError(
                "S2FT form='block' starts from the kernel's values; give adapters.init arrays, not shapes."
            )
        return self.own({"indices": indices}, kernel).astype(jnp.float32)


def _channels(units: Int[Array, " n"], size: int) -> Int[Array, " s"]:
    return (units[:, None] * size + jnp.arange(size)).reshape(-1).astype(jnp.int32)
