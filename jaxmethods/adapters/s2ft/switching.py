"""What was learned, apart from the model: taken off, put on, taken back, exactly (section 4.3).

A `Change` of a layer is small: the channels in the order of the original model, and what is added there (or, as `fuse` returns
it, what stood there). Putting one on is a scatter of s rows or columns, whatever the width of the model.

>>> base, change = decouple(adapted, params)            # doctest: +SKIP
>>> tuned, before = fuse(base, change)                  # doctest: +SKIP
>>> base = restore(tuned, *before)                      # doctest: +SKIP
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods import quantization, tree
from jaxmethods.adapters.attach import adapted_layers, detach, leaves_of
from jaxmethods.adapters.s2ft.adapter import S2FT
from jaxmethods.adapters.s2ft.permutation import unpermute
from jaxmethods.tree import Tree


class Change(NamedTuple):
    """Of one layer, or with leading axes of a stack. Exactly one of rows and columns is there."""

    indices: Int[Array, "*stack s"]
    rows: Float[Array, "*stack s d_out"] | None = None
    columns: Float[Array, "*stack d_in s"] | None = None


Changes = dict[str, Change]
"""'/'-joined path of a layer -> its change."""


def decouple(adapted: Any, params: Tree) -> tuple[Tree, Changes]:
    """(The base model's parameters, the change of each adapted layer): float32, in the order of the original channels.

    Permuted parameters are brought back first. Globally drawn layers keep their padding, indices past the last channel.

    Raises:
        ValueError: another adapter than S²FT is attached.
    """
    params = unpermute(params)
    flat, changes = tree.flatten(params), Changes()
    for layer, adapter in adapted_layers(adapted, params):
        if not isinstance(adapter, S2FT):
            raise ValueError(f"layer {layer!r} has a {adapter.kind!r} adapter; decouple takes models with S2FT alone.")
        leaves = leaves_of(flat, layer, adapter)
        kernel, change = quantization.kernel_in(flat, layer), adapter.change
        for _ in kernel.shape[2:]:
            change = jax.vmap(change)
        side = "rows" if adapter.side == "in" else "columns"
        changes[layer] = Change(leaves["indices"], **{side: change(leaves, kernel)})
    return detach(adapted, params)[1], changes


def fuse(
    params: Tree, *changes: Changes, weights: Sequence[float] | None = None, disjoint: bool = False
) -> tuple[Tree, tuple[Changes, ...]]:
    """Kernels plus the weighted changes, put on one after the other, and what stood there before each: for `restore`.

    Each is added in float32 and rounded once to the kernel's dtype.

    Args:
        weights: one for each of `changes`; 1 by default.
        disjoint: refuse changes that share channels; disjoint ones survive one another exactly, in any order.
    """
    quantization.require_plain(params, "s2ft.fuse")
    if weights is not None and len(weights) != len(changes):
        raise ValueError(f"s2ft.fuse: {len(weights)} weights for {len(changes)} changes.")
    if disjoint:
        require_disjoint(*changes)
    flat, before = tree.flatten(params), []
    for each, weight in zip(changes, weights or [1.0] * len(changes), strict=True):
        old = Changes()
        for layer, change in each.items():
            kernel = _kernel(flat, layer, change)
            old[layer] = _stacked(_taken, kernel)(kernel, change)
            flat[f"{layer}/kernel"] = _stacked(functools.partial(_added, weight=weight), kernel)(kernel, change)
        before.append(old)
    return tree.unflatten(flat), tuple(before)


def restore(params: Tree, *before: Changes) -> Tree:
    """Undoes `fuse` to the bit: writes what stood there, last change first, instead of subtracting."""
    flat = tree.flatten(params)
    for each in reversed(before):
        for layer, old in each.items():
            kernel = _kernel(flat, layer, old)
            flat[f"{layer}/kernel"] = _stacked(_written, kernel)(kernel, old)
    return tree.unflatten(flat)


def require_disjoint(*changes: Changes) -> None:
    """Raises ValueError, naming layer and channels, if two changes touch the same channels of a layer."""
    for n, one in enumerate(changes):
        for m, other in enumerate(changes[n + 1 :], n + 1):
            for layer in sorted(one.keys() & other.keys()):
                if (one[layer].rows is None) != (other[layer].rows is None):
                    raise ValueError(
                        f"layer {layer!r}: change {n} and change {m} lie across each other, rows and columns."
                    )
                rows = zip(
                    *(np.reshape(c[layer].indices, (-1, c[layer].indices.shape[-1])) for c in (one, other)), strict=True
                )
                for place, (a, b) in enumerate(rows):
                    if len(shared := np.intersect1d(a, b)):
                        raise ValueError(
                            f"layer {layer!r}[{place}]: change {n} and change {m} both touch channels "
                            f"{shared[:5].tolist()}{' ...' if len(shared) > 5 else ''}; train them on disjoint channels, or "
                            "fuse them without disjoint=True."
                        )


def _kernel(flat: dict[str, Any], layer: str, change: Change) -> Array:
    kernel = flat.get(f"{layer}/kernel")
    if kernel is None:
        raise ValueError(f"the change is of layer {layer!r}, which this model does not have.")
    values = _values(change)
    kept = values.shape[-2] if change.rows is None else values.shape[-1]
    if values.shape[:-2] != kernel.shape[:-2] or kept != kernel.shape[-2 if change.rows is None else -1]:
        raise ValueError(f"layer {layer!r}: a change of shape {values.shape} does not fit a kernel of {kernel.shape}.")
    return kernel


def _stacked(act: Any, kernel: Array) -> Any:
    for _ in kernel.shape[2:]:
        act = jax.vmap(act)
    return act


def _at(kernel: Array, change: Change) -> Any:
    return kernel.at[change.indices] if change.rows is not None else kernel.at[:, change.indices]


def _values(change: Change) -> Any:
    return change.columns if change.rows is None else change.rows


def _taken(kernel: Array, change: Change) -> Change:
    old = _at(kernel, change).get(mode="clip")
    return Change(change.indices, **{"columns" if change.rows is None else "rows": old})


def _added(kernel: Array, change: Change, weight: float) -> Array:
    old = _at(kernel, change).get(mode="clip").astype(jnp.float32)
    return _at(kernel, change).set((old + weight * _values(change)).astype(kernel.dtype))


def _written(kernel: Array, old: Change) -> Array:
    return _at(kernel, old).set(_values(old))
