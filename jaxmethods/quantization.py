"""Quantised kernels in trees of parameters: `LAYER/kernel` holds codes, beside it stand `kernel_scale` and, in "int4",
`kernel_minimum` (`jaxmethods.kernels.quantized`). Whoever reads a base model's kernels does it through here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxmethods import tree
from jaxmethods.kernels import quantized
from jaxmethods.kernels.quantized import BLOCK, Quantized
from jaxmethods.tree import Tree

NAMES = {"codes": "kernel", "scale": "kernel_scale", "minimum": "kernel_minimum"}
"""Field of `Quantized` -> name of its leaf."""


def quantize(module: Any, params: Tree, kind: str) -> tuple[Any, Tree]:
    """The module with its linear layers quantised, and its parameters; embeddings, norms, output matrix and biases stay.

    The float parameters stay as they are: both are held until the caller lets go of one. `models.load(..., quantize=kind)`
    never holds the float kernels together.

    Args:
        module: one with a field `quantization`, such as `Decoder`.
        kind: "int8" or "int4".

    Raises:
        ValueError: a layer whose input is no multiple of 32 wide (named), adapters that are attached already, a module
            that is quantised or cannot be.
    """
    tree.require_one_of("quantize", kind, quantized.KINDS)
    if not hasattr(module, "quantization"):
        raise ValueError(f"{type(module).__name__} has no field `quantization`; its linear layers take float kernels.")
    if module.quantization is not None:
        raise ValueError(f"the model is quantised already ({module.quantization}); models.dequantize it first.")
    flat = dict(tree.flatten(params))
    if any("/adapter/" in f"/{path}" for path in flat):
        raise ValueError(
            "the model has adapters, which start from the kernels they see; quantise it, then attach them."
        )
    codes = jax.jit(functools.partial(quantized.quantize, kind=kind))
    for layer in [path.removesuffix("/kernel") for path in flat if path.endswith("/kernel") and is_quantizable(path)]:
        require_blocks(layer, flat[f"{layer}/kernel"].shape[-2])
        flat |= leaves(layer, codes(flat[f"{layer}/kernel"]))
    return module.clone(quantization=kind), tree.unflatten(flat)


def dequantize(module: Any, params: Tree) -> tuple[Any, Tree]:
    """The module with plain linear layers, and its parameters with float kernels (of the module's `param_dtype`)."""
    flat = dict(tree.flatten(params))
    for layer, _ in list(_quantized(flat)):
        open_in(flat, layer, getattr(module, "param_dtype", jnp.float32))
    return (module.clone(quantization=None) if is_quantized(module) else module), tree.unflatten(flat)


def is_quantizable(path: str) -> bool:
    """Whether a kernel is one of a decoder's layers: what a model sees with stays in float."""
    return not path.startswith(("vision_tower/", "projector/"))


def open_in(flat: dict[str, Any], layer: str, dtype: Any = jnp.float32) -> bool:
    """Puts a layer's float kernel in the place of its codes; False where it is no quantised one."""
    q = _read(_getter(flat, layer))
    if q is None:
        return False
    for name in NAMES.values():
        flat.pop(f"{layer}/{name}", None)
    flat[f"{layer}/kernel"] = jax.jit(functools.partial(quantized.dequantize, dtype=dtype))(q)
    return True


def is_quantized(module: Any) -> bool:
    """Whether a module's linear layers read codes."""
    return getattr(module, "quantization", None) is not None


def kernel_of(get: Callable[[str], Any]) -> Any:
    """A layer's float kernel [*stack, d_in, d_out], from `get(name of a leaf)`, which is None where there is none.

    Codes are opened to float32; under `jax.jit` that costs nothing where the values are not read. Of shapes, a shape.
    """
    kernel = get("kernel")
    if (q := _read(get)) is None:
        return kernel
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(q.shape, jnp.float32)
    return quantized.dequantize(q)


def kernel_in(flat: Mapping[str, Any], layer: str) -> Any:
    """`kernel_of` a layer of flattened parameters."""
    return kernel_of(_getter(flat, layer))


def shape_in(flat: Mapping[str, Any], layer: str) -> tuple[int, ...]:
    """The shape [*stack, d_in, d_out] of a layer's kernel, quantised or not."""
    q = _read(_getter(flat, layer))
    return flat[f"{layer}/kernel"].shape if q is None else q.shape


def raw_in(flat: Mapping[str, Any], layer: str) -> Any:
    """A layer's kernel as it is stored: an array or a `Quantized`."""
    q = _read(_getter(flat, layer))
    return flat[f"{layer}/kernel"] if q is None else q


def leaves(layer: str, q: Quantized) -> dict[str, Any]:
    """Path -> leaf of a quantised kernel."""
    return {f"{layer}/{NAMES[field]}": x for field, x in q._asdict().items() if x is not None}


def is_part(flat: Mapping[str, Any], path: str) -> bool:
    """Whether a path of flattened parameters holds a part of a quantised kernel."""
    layer, _, name = path.rpartition("/")
    return name in NAMES.values() and f"{layer}/{NAMES['scale']}" in flat


def count(params: Tree) -> int:
    """How many parameters the leaves stand for: `tree.count`, a quantised kernel counted as what it was."""
    flat = tree.flatten(params)
    plain = {path: x for path, x in flat.items() if not is_part(flat, path)}
    return tree.count(plain) + sum(tree.count(jax.ShapeDtypeStruct(q.shape, jnp.int8)) for _, q in _quantized(flat))


def require_plain(params: Tree, what: str) -> None:
    """Raises ValueError where a kernel is quantised, telling that `what` needs float kernels."""
    if layer := next((layer for layer, _ in _quantized(tree.flatten(params))), None):
        raise ValueError(f"{what} needs float kernels and {layer!r} is quantised; models.dequantize the model first.")


def require_blocks(layer: str, d_in: int) -> None:
    """Raises ValueError where a layer's input does not divide into blocks."""
    if d_in % BLOCK:
        raise ValueError(
            f"layer {layer!r} reads {d_in} channels, which is no multiple of {BLOCK}: it cannot be quantised. "
            "Leave this model in float (quantize=None)."
        )


def _getter(flat: Mapping[str, Any], layer: str) -> Callable[[str], Any]:
    return lambda name: flat.get(f"{layer}/{name}")


def _read(get: Callable[[str], Any]) -> Quantized | None:
    scale = get(NAMES["scale"])
    return None if scale is None else Quantized(get(NAMES["codes"]), scale, get(NAMES["minimum"]))


def _quantized(flat: Mapping[str, Any]) -> Iterator[tuple[str, Quantized]]:
    """Each quantised layer."""
    suffix = f"/{NAMES['scale']}"
    for layer in [path.removesuffix(suffix) for path in flat if path.endswith(suffix)]:
        q = _read(_getter(flat, layer))
        assert q is not None
        yield layer, q
