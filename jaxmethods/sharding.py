"""Meshes and the short lists of rules that place arrays on them.

One function builds every mesh; a list of (regex, PartitionSpec) per model says where parameters lie. Rules are written for
one layer: a leaf that the layer scan has stacked gets its leading axis replicated.

>>> mesh = make_mesh({"data": 1}, jax.devices()[:1])
>>> spec_for("model/layers/mlp/up_proj/kernel", (30, 576, 1536), mesh, [("up_proj/kernel", P("fsdp", "tensor"))])
P(None, 'fsdp', 'tensor')
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods import tree

AXES = ("data", "fsdp", "sequence", "tensor")
"""Batch rows are split over `data` and `fsdp`, their tokens over `sequence`; parameters over `fsdp` and `tensor`."""

Rules = Sequence[tuple[str, P]]

BATCH = P(("data", "fsdp"), "sequence")
"""How [rows, tokens] of a batch lie: rows over both axes that hold different ones, the tokens of a row over `sequence`."""


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes of `AXES`, all of type Auto.

    Args:
        axes: axis name -> size. Axes not named have size 1; one of them may be -1: all devices that are left. By
            default every device serves `fsdp`.
        devices: all devices of all processes by default.

    Raises:
        ValueError: an unknown axis, or sizes that do not use every device.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(AXES, 1) | dict({"fsdp": -1} if axes is None else axes)
    if unknown := sizes.keys() - set(AXES):
        raise ValueError(f"mesh axis {sorted(unknown)[0]!r} is unknown; the axes are {', '.join(AXES)}.")
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh sizes {sizes} must be positive, with -1 (all that is left) at most once.")
    if free and len(devices) % fixed == 0:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{name}={size}" for name, size in sizes.items())
        raise ValueError(
            f"mesh {asked} asks for {math.prod(abs(s) for s in sizes.values())} devices and there are {len(devices)}; "
            f"choose sizes whose product is {len(devices)}, or -1 for one of them."
        )
    return jax.make_mesh(
        tuple(sizes[name] for name in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def spec_for(path: str, shape: Sequence[int], mesh: Mesh, rules: Rules) -> P:
    """The first rule whose regex is found in `path`, padded with replicated leading axes and made to divide.

    An axis that does not divide its dimension is left out (the dimension is then replicated): small models run on
    any mesh. Leaves without a rule are replicated.
    """
    spec = next((spec for pattern, spec in rules if re.search(pattern, path)), P())
    if not spec or len(spec) > len(shape):
        return P()
    entries = [None] * (len(shape) - len(spec)) + list(spec)
    return P(*(_that_divide(entry, size, mesh) for entry, size in zip(entries, shape, strict=True)))


def _that_divide(entry: Any, size: int, mesh: Mesh) -> Any:
    """The longest prefix of a spec's entry whose mesh axes divide the dimension."""
    kept: tuple[str, ...] = ()
    for name in _names(entry):
        if size % math.prod(mesh.shape[n] for n in (*kept, name)):
            break
        kept = (*kept, name)
    return kept if len(kept) > 1 else kept[0] if kept else None


def _names(entry: Any) -> tuple[str, ...]:
    """The mesh axes that a spec's entry names."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def shardings_for(shapes: tree.Tree, mesh: Mesh, rules: Rules) -> tree.Tree:
    """A tree of NamedShardings for a nested dict of arrays or ShapeDtypeStructs."""
    flat = tree.flatten(shapes)
    return tree.unflatten({p: NamedSharding(mesh, spec_for(p, x.shape, mesh, rules)) for p, x in flat.items()})


def split_tokens(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Under `jax.jit`: x [rows, tokens, ...] as `tokens_spec` says, its other axes whole.

    Without this XLA may let activations follow the parameters, and hold all rows on every device. No mesh, or one device: x
    as it is.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, tokens_spec(x.shape, mesh)))


def split_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Under `jax.jit`: x [rows, ...] with its rows over `data` and `fsdp`, its other axes whole; as it is without a mesh."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, rows_spec(x.shape, mesh)))


def rows_spec(shape: Sequence[int], mesh: Mesh) -> P:
    """How an array [rows, ...] lies: its rows as a batch's, as far as the mesh divides them."""
    return P(_that_divide(BATCH[0], shape[0], mesh))


def tokens_spec(shape: Sequence[int], mesh: Mesh) -> P:
    """How an array [rows, tokens, ...] lies: as a batch does, as far as the mesh divides it."""
    return P(*(_that_divide(entry, size, mesh) for entry, size in zip(BATCH, shape[:2], strict=True)))


def join_tokens(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """[rows, tokens, ...] as [rows x tokens, ...], in an order that leaves each device the tokens it has.

    Where rows and tokens are both split, no one axis in their plain order could lie as they do, and XLA would gather them.
    How the other axes lie is left to XLA. `part_tokens` undoes it.
    """
    of_rows, of_tokens = _token_axes(x.shape, mesh)
    rows, tokens, *rest = x.shape
    if mesh is None or not of_tokens:
        return x.reshape(-1, *rest)
    a, b = _size(of_rows, mesh), _size(of_tokens, mesh)
    joined = x.reshape(a, rows // a, b, tokens // b, *rest).swapaxes(1, 2).reshape(-1, *rest)
    return _lies(joined, mesh, (*of_rows, *of_tokens))


def part_tokens(x: jax.Array, shape: Sequence[int], mesh: Mesh | None) -> jax.Array:
    """[rows x tokens, ...] of `join_tokens` as [rows, tokens, ...]; `shape` begins with rows and tokens."""
    of_rows, of_tokens = _token_axes(shape, mesh)
    (rows, tokens), rest = shape[:2], x.shape[1:]
    if mesh is None or not of_tokens:
        return x.reshape(rows, tokens, *rest)
    a, b = _size(of_rows, mesh), _size(of_tokens, mesh)
    parted = x.reshape(a, b, rows // a, tokens // b, *rest).swapaxes(1, 2).reshape(rows, tokens, *rest)
    return _lies(parted, mesh, of_rows, of_tokens)


def _token_axes(shape: Sequence[int], mesh: Mesh | None) -> list[tuple[str, ...]]:
    """Over which axes of more than one device the rows lie, and over which their tokens do."""
    if mesh is None:
        return [(), ()]
    return [tuple(name for name in _names(entry) if mesh.shape[name] > 1) for entry in tokens_spec(shape, mesh)]


def _size(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[name] for name in axes)


def _lies(x: jax.Array, mesh: Mesh, *axes: tuple[str, ...]) -> jax.Array:
    """x with its first axes over these; the others as XLA likes."""
    free = [P.UNCONSTRAINED] * (x.ndim - len(axes))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*axes, *free)))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh, name: str = "tokens", rank: int = 2) -> NamedSharding:
    """Where an array of a batch lies: [rows, tokens, ...] over `data` and `fsdp`, and `sequence`; [rows, ...] of pictures
    ("pixels", or "VIEW/pixels") and [rows] (rank 1) over the rows alone."""
    return NamedSharding(mesh, P(BATCH[0]) if rank == 1 or name.rpartition("/")[2] == "pixels" else BATCH)


def rows_here(rows: int, mesh: Mesh) -> list[int]:
    """Which rows of a batch of `rows` rows this process' devices hold, in ascending order.

    Processes along `tensor` and `sequence` hold the same rows, and on a torus those of one process need not be neighbours: of
    sixteen rows on a v5e:4x4 with fsdp=16, process 0 holds 0, 1, 6 and 15.
    """
    held = batch_sharding(mesh).addressable_devices_indices_map((rows, mesh.shape["sequence"])).values()
    return sorted({row for index in held if index is not None for row in range(rows)[index[0]]})


def place_rows(batch: Mapping[str, np.ndarray], rows: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch of `rows` rows, from arrays [rows here, ...] that hold those of `rows_here` in its order."""
    here = rows_here(rows, mesh)

    def place(name: str, values: np.ndarray) -> jax.Array:
        def block(index: tuple[slice, ...] | None) -> np.ndarray:
            of_rows, *others = index or (slice(None),)
            start, stop, _ = of_rows.indices(rows)
            first = bisect.bisect_left(here, start)  # a device's rows are neighbours, and so they are here
            return values[first : first + stop - start, *others]

        return jax.make_array_from_callback((rows, *values.shape[1:]), batch_sharding(mesh, name, values.ndim), block)

    return {name: place(name, values) for name, values in batch.items()}
