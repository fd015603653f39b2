"""Many adapters in one batch: each row of a batch goes through its own, over one base model.

>>> module, params = adapters.bank(adapted, [params_of_a, params_of_b])     # doctest: +SKIP
>>> params = adapters.for_rows(params, [0, 1, 1, -1])                       # doctest: +SKIP
>>> models.logits(module, params, tokens)      # rows 1 and 2 by b, the last by the base model alone   # doctest: +SKIP

`for_rows` is a pure function of arrays: under `jax.jit` the rows may change from call to call without compiling anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmethods import tree
from jaxmethods.adapters.attach import adapted_layers, attach, detach, is_adapter, leaves_of
from jaxmethods.adapters.base import AnyAdapter, Call, Result
from jaxmethods.kernels.banked import banked_linear
from jaxmethods.tree import Tree


def bank(adapted: Any, variants: Sequence[Tree], *, implementation: str | None = None) -> tuple[Any, Tree]:
    """A module that holds several adapters for each layer, and its parameters: the base and all adapters' leaves.

    Args:
        adapted: a module with adapters attached (LoRA, DoRA, S²FT, S'MoRE, ...).
        variants: its parameters as different runs trained them; of the base those of the first are taken.
        implementation: of the products of LoRA and of S²FT's input side with each row's own leaves, see
            `kernels.banked.banked_linear`.

    Raises:
        ValueError: no variant, or one whose leaves differ in name or shape; names the first wrong one.
    """
    if not variants:
        raise ValueError("adapters.bank needs the parameters of at least one adapter.")
    first = tree.flatten(variants[0])
    flats = [tree.flatten(variant) for variant in variants]
    flat = {path: x for path, x in first.items() if not is_adapter(path)}
    for layer, adapter in adapted_layers(adapted, variants[0]):
        depth = len(first[f"{layer}/kernel"].shape) - 2
        for path in [path for path in first if path.startswith(f"{layer}/adapter/{adapter.kind}/")]:
            for n, other in enumerate(flats):
                if path not in other or other[path].shape != first[path].shape:
                    found = f"shape {other[path].shape}" if path in other else "nothing"
                    raise ValueError(f"variant {n} holds {found} at {path!r}; the first one has {first[path].shape}.")
            stacked = jnp.stack([other[path] for other in flats], depth)
            if _takes_channels(adapter, leaves_of(first, layer, adapter)):
                stacked = _even(stacked, depth + 1)
            flat[path.replace(f"/{adapter.kind}/", f"/{adapter.kind}/bank/", 1)] = stacked
    module, _ = detach(adapted, variants[0])
    served = {pattern: Banked(adapter, len(variants), implementation) for pattern, adapter in adapted.adapters}
    return attach(module, served), tree.unflatten(flat)


def for_rows(params: Tree, rows: Int[Array | np.ndarray, " batch"] | Sequence[int]) -> Tree:
    """The parameters of a `bank` set up for a batch: which adapter each row goes through; -1 is none."""
    rows = jnp.asarray(rows, jnp.int32)
    flat = dict(tree.flatten(params))
    banks = {path.split("/bank/")[0]: path for path in flat if is_adapter(path) and "/bank/" in path}
    if not banks:
        raise ValueError("adapters.for_rows takes the parameters that adapters.bank made.")
    for place in banks:
        stack = flat[f"{place.split('/adapter/')[0]}/kernel"].shape[:-2]
        flat[f"{place}/rows"] = jnp.broadcast_to(rows, (*stack, *rows.shape))
    return tree.unflatten(flat)


@dataclasses.dataclass(frozen=True)
class Banked:
    """`size` adapters alike in one layer, of which each row of a batch uses one."""

    adapter: AnyAdapter
    size: int
    implementation: str | None = None
    """Of `banked_linear`, where the adapter's product is one."""

    has_loss: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        return self.adapter.kind

    def init(self, key: Any, d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Tree:
        start = lambda key: self.adapter.init(key, d_in, d_out, kernel=kernel, scores=scores)
        return {"bank": jax.vmap(start)(jax.random.split(key, self.size))}

    def apply(self, leaves: Tree, call: Call) -> Result:
        if "rows" not in leaves:
            raise ValueError(
                "the batch's rows have no adapters yet; give the parameters that adapters.for_rows returns."
            )
        rows = leaves["rows"]
        if rows.shape[0] != call.x.shape[0]:
            raise ValueError(f"adapters.for_rows was given {rows.shape[0]} rows, and the batch has {call.x.shape[0]}.")
        if (delta := self._products(leaves["bank"], rows, call)) is not None:
            return Result(call.y + delta.astype(call.y.dtype))
        own = _own(leaves["bank"], rows)

        def one(own: Tree, x: Array, y: Array) -> Array:
            return self.adapter.apply(own, Call(x, y, call.kernel, None, None, call.bias)).y

        y = jax.vmap(one)(own, call.x, call.y)
        return Result(jnp.where((rows >= 0).reshape(-1, *[1] * (y.ndim - 1)), y, call.y))

    def _products(self, bank: Tree, rows: Array, call: Call) -> Array | None:
        """What is added to y, where that is a product with the leaves as they lie in the bank; None for other adapters."""
        x = call.x.reshape(len(rows), -1, call.x.shape[-1])
        product = functools.partial(banked_linear, rows=rows, implementation=self.implementation)
        if self.kind == "lora":
            narrow = product(x, bank["a"].swapaxes(1, 2), transposed=True)
            delta = product(narrow * self.adapter.scale, bank["b"])
        elif _takes_channels(self.adapter, bank):
            indices = _own(bank["indices"], rows)
            chosen = jnp.take_along_axis(x, indices[:, None], axis=-1, mode="fill", fill_value=0)
            delta = product(chosen, bank["delta"])
        else:
            return None
        return delta.reshape(call.y.shape)

    def merge(self, leaves: Tree, kernel: Any) -> Any:
        raise ValueError("a bank of adapters has no one kernel; merge the adapters one by one.")


def _takes_channels(adapter: AnyAdapter, leaves: Tree) -> bool:
    """Whether what it adds is chosen channels of x times a change: S²FT's input side, neither permuted nor in "block" form."""
    return adapter.kind == "s2ft" and adapter.side == "in" and {"delta", "indices"} <= leaves.keys()


def _even(leaf: Array, axis: int) -> Array:
    """S²FT's channels padded to a multiple of eight by changes of zero to a channel past the end.

    A TPU lays arrays out in tiles of eight rows. Where entries are no whole tiles it keeps the bank in another order, and each
    call would first copy all of it.
    """
    pads = [(0, -leaf.shape[axis] % 8 if n == axis else 0) for n in range(leaf.ndim)]
    past_the_end = 0 if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.iinfo(leaf.dtype).max
    return jnp.pad(leaf, pads, constant_values=past_the_end)


def _own(bank: Tree, rows: Array) -> Tree:
    """Each row's entry; any for a row without one."""
    return jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0, mode="clip"), bank)
