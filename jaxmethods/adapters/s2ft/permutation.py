"""The paper's form: coupled kernels are permuted so that the trained channels are adjacent (sections 3.2 and 3.3).

Kernels are coupled when some write a hidden activation that one other reads and nothing mixes its channels in between:
gate and up with down, by channel; q, k and v with o, by whole key-value heads, each with its queries. The order of the hidden
channels can then be anything, and the model stays the same function; no activation is permuted at run time.

    order = (trained in the writers only) (in both) (in the reader only) (the rest, ascending)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxmethods import quantization, tree
from jaxmethods.adapters.attach import adapted_layers
from jaxmethods.tree import Tree


@dataclasses.dataclass(frozen=True)
class Coupled:
    """Linear layers around one hidden activation, by their names in a common parent.

    Args:
        writers: whose outputs are the activation, channel by channel.
        reader: whose input it is.
        heads: the channels are those of attention heads, and move as whole key-value heads: the writer with the fewest
            channels tells their size.
    """

    writers: tuple[str, ...]
    reader: str
    heads: bool = False


COUPLED = (
    Coupled(("gate_proj", "up_proj"), "down_proj"),
    Coupled(("q_proj", "k_proj", "v_proj"), "o_proj", heads=True),
)
"""Of Llama, Qwen, Gemma and their like."""


def permute(adapted: Any, params: Tree, coupled: tuple[Coupled, ...] = COUPLED, head_dim: int | None = None) -> Tree:
    """Parameters of the same function whose S²FT leaves hold `start` and `order` in place of `indices`.

    `start` is the first trained channel; `order` [*stack, units] names the original unit (channel, or key-value head) at
    each place, by which `unpermute` undoes it all. Orders are found on the host.

    Args:
        head_dim: channels of a head; by default that of the module's config.

    Raises:
        ValueError: a layer that is coupled to nothing, a selection that no order makes adjacent (parts of a head, or
            of the queries of a key-value head), globally drawn layers, quantised kernels.
    """
    quantization.require_plain(params, "s2ft.permute")
    head_dim = head_dim or getattr(getattr(adapted, "config", None), "head_dim", None)
    flat = dict(tree.flatten(params))
    todo = {layer: a for layer, a in adapted_layers(adapted, params) if f"{layer}{_S2FT}indices" in flat}
    for layers, group in _groups(flat, coupled):
        trained = {layer: np.asarray(flat[f"{layer}{_S2FT}indices"]) for layer in layers if layer in todo}
        if not trained:
            continue
        if group.heads and head_dim is None:
            raise ValueError("s2ft.permute needs head_dim: the module's config does not tell it.")
        widths = {layer: flat[f"{layer}/kernel"].shape[axis] for layer, axis in layers.items()}
        units = min(widths.values()) // (head_dim if group.heads and head_dim else 1)
        written, read = (
            _units({layer: at for layer, at in trained.items() if layers[layer] == axis}, widths, units)
            for axis in (_OUT, _IN)
        )
        order = _order(written, read, units)
        _reorder(flat, layers, widths, order)
        for layer, indices in trained.items():
            todo.pop(layer)
            channels = _channels(order, widths[layer] // units)
            places = np.sort(np.take_along_axis(np.argsort(channels, -1), indices, -1), -1)
            if not (np.diff(places, axis=-1) == 1).all():
                raise ValueError(
                    f"s2ft.permute: no order makes the trained channels of both {', '.join(trained)} adjacent with the "
                    "same number of them in front; train the writers alike."
                )
            _sort_trained(flat, layer, layers[layer], indices, np.take_along_axis(channels, places, -1))
            del flat[f"{layer}{_S2FT}indices"]
            flat[f"{layer}{_S2FT}start"] = jnp.asarray(places[..., 0], jnp.int32)
            flat[f"{layer}{_S2FT}order"] = jnp.asarray(order, jnp.int32)
    if todo:
        raise ValueError(f"s2ft.permute: layer {next(iter(todo))!r} is no part of a coupled structure; see `coupled`.")
    return tree.unflatten(flat)


def unpermute(params: Tree, coupled: tuple[Coupled, ...] = COUPLED) -> Tree:
    """Undoes `permute`; parameters that are not permuted come back as they are."""
    flat = dict(tree.flatten(params))
    for layers, _ in _groups(flat, coupled):
        orders = {layer: flat[f"{layer}{_S2FT}order"] for layer in layers if f"{layer}{_S2FT}order" in flat}
        if not orders:
            continue
        order = np.asarray(next(iter(orders.values())))
        widths = {layer: flat[f"{layer}/kernel"].shape[axis] for layer, axis in layers.items()}
        _reorder(flat, layers, widths, np.argsort(order, -1))
        for layer in orders:
            start = np.asarray(flat.pop(f"{layer}{_S2FT}start"))
            del flat[f"{layer}{_S2FT}order"]
            count = flat[f"{layer}{_S2FT}{_trained(flat, layer)}"].shape[layers[layer]]
            places = start[..., None] + np.arange(count)
            channels = np.take_along_axis(_channels(order, widths[layer] // order.shape[-1]), places, -1)
            _sort_trained(flat, layer, layers[layer], channels, np.sort(channels, -1))
            flat[f"{layer}{_S2FT}indices"] = jnp.asarray(np.sort(channels, -1), jnp.int32)
    return tree.unflatten(flat)


_S2FT = "/adapter/s2ft/"
_IN, _OUT = -2, -1


def _groups(flat: dict[str, Any], coupled: tuple[Coupled, ...]) -> Iterator[tuple[dict[str, int], Coupled]]:
    """Each coupled structure: {layer: the axis of its kernel that lies along the hidden activation}."""
    for group in coupled:
        for path in [path for path in flat if path.endswith(f"/{group.reader}/kernel")]:
            parent = path.removesuffix(f"{group.reader}/kernel")
            writers = [f"{parent}{name}" for name in group.writers if f"{parent}{name}/kernel" in flat]
            if writers:
                yield dict.fromkeys(writers, _OUT) | {f"{parent}{group.reader}": _IN}, group


def _units(trained: dict[str, np.ndarray], widths: dict[str, int], units: int) -> np.ndarray:
    """Which units are trained in any of the layers, [*stack, units] bool.

    Raises:
        ValueError: a unit of which only a part is trained.
    """
    chosen = np.zeros(units, bool)
    for layer, indices in trained.items():
        if (indices >= widths[layer]).any():
            raise ValueError(f"s2ft.permute: layer {layer!r} was drawn globally, and its blocks differ in size.")
        size = widths[layer] // units
        counts = np.zeros((*indices.shape[:-1], units), int)
        for at in np.ndindex(indices.shape[:-1]):
            counts[at] = np.bincount(indices[at] // size, minlength=units)
        if not np.isin(counts, (0, size)).all():
            raise ValueError(
                f"s2ft.permute: layer {layer!r} trains parts of key-value heads, which move as wholes (each {size} channels "
                "here, with all its queries); choose whole ones."
            )
        chosen = chosen | (counts > 0)
    return chosen


def _order(written: np.ndarray, read: np.ndarray, units: int) -> np.ndarray:
    """The original unit at each place: [*stack, units]."""
    written, read = np.broadcast_arrays(written, read)
    rank = np.where(written & ~read, 0, np.where(written & read, 1, np.where(read, 2, 3)))
    return np.argsort(rank, axis=-1, kind="stable")


def _channels(order: np.ndarray, size: int) -> np.ndarray:
    return (order[..., None] * size + np.arange(size)).reshape(*order.shape[:-1], -1)


def _reorder(flat: dict[str, Any], layers: dict[str, int], widths: dict[str, int], order: np.ndarray) -> None:
    for layer, axis in layers.items():
        channels = _channels(order, widths[layer] // order.shape[-1])
        flat[f"{layer}/kernel"] = _take(flat[f"{layer}/kernel"], channels, axis)
        if axis == _OUT and f"{layer}/bias" in flat:
            flat[f"{layer}/bias"] = _take(flat[f"{layer}/bias"], channels, -1)


def _trained(flat: dict[str, Any], layer: str) -> str:
    return "delta" if f"{layer}{_S2FT}delta" in flat else "block"


def _sort_trained(flat: dict[str, Any], layer: str, axis: int, now: np.ndarray, wanted: np.ndarray) -> None:
    """Puts the slices of the trained leaf, which lie as the channels `now`, in the order of the channels `wanted`."""
    path, by = f"{layer}{_S2FT}{_trained(flat, layer)}", np.argsort(now, -1)
    places = np.take_along_axis(by, np.argsort(np.argsort(wanted, -1), -1), -1)
    flat[path] = _take(flat[path], places, axis)


def _take(leaf: Any, places: np.ndarray, axis: int) -> Any:
    """`take` along one axis, with places of its own for each layer of a stack."""
    shape = [*leaf.shape[: places.ndim - 1], *[1] * (leaf.ndim - places.ndim + 1)]
    shape[axis] = places.shape[-1]
    return jnp.take_along_axis(jnp.asarray(leaf), jnp.asarray(places.reshape(shape)), axis=axis)
