"""Attach adapters to the linear layers of any Flax module, without the module knowing.

`attach` returns a module of a subclass of the given one. Its public methods run with an interceptor on `nn.Dense` that
hands each matching layer's input, output and kernel to the adapter. The parameter tree of the base model stays as it is;
the adapter's leaves stand beside the kernels, stacked over layers where the model scans them.

>>> import flax.linen as nn, jax, jax.numpy as jnp
>>> from jaxmethods import adapters
>>> class Foreign(nn.Module):
...     @nn.compact
...     def __call__(self, x):
...         return nn.Dense(3, name="out")(nn.relu(nn.Dense(5, name="inner")(x)))
>>> x = jnp.ones((2, 4))
>>> base = Foreign().init(jax.random.key(0), x)["params"]
>>> adapted = adapters.attach(Foreign(), {"inner|out": adapters.LoRA(rank=2)})
>>> params = adapters.init(adapted, base, jax.random.key(1))
>>> jax.tree.map(jnp.shape, params["inner"])
{'adapter': {'lora': {'a': (4, 2), 'b': (2, 5)}}, 'bias': (5,), 'kernel': (4, 5)}
>>> bool((adapted.apply({"params": params}, x) == Foreign().apply({"params": base}, x)).all())
True
"""

from __future__ import annotations

import contextvars
import dataclasses
import difflib
import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxmethods import quantization, tree
from jaxmethods.adapters.base import AnyAdapter, Call
from jaxmethods.kernels.quantized import Quantized, dequantize
from jaxmethods.tree import Tree

_IN_TREE = "/adapter/"


def attach(module: nn.Module, adapters: Mapping[str, AnyAdapter]) -> Any:
    """A module like `module` whose linear layers (`nn.Dense`) that match a regex are adapted.

    Every public method is adapted. The tokens that `mask` (an argument of that name, [B, T] bool, true at real tokens)
    marks as padding take no part in auxiliary losses; layers that a module's attribute `unmasked` (a regex) finds see other
    things than tokens, and none of them is padding.

    Args:
        module: a Flax Linen module, of this library or another.
        adapters: regex -> adapter. A regex is searched in the '/'-joined path of a layer, such as
            `model/layers/mlp/up_proj`. A layer may have several adapters of different kinds; they act in this order.
    """
    base: Any = type(module)
    pairs = tuple((pattern, _settled(adapter, module)) for pattern, adapter in adapters.items())
    if isinstance(module, _Adapted):
        base, pairs = base.base_class, (*module.adapters, *pairs)
    if not pairs:
        raise ValueError("attach: no adapter given; use the module as it is, or name a regex and an adapter.")
    return _adapted_class(base)(**_fields(module), adapters=pairs)


def detach(adapted: Any, params: Tree) -> tuple[nn.Module, Tree]:
    """The module without its adapters, and its parameters without theirs: the base model."""
    _require_adapted(adapted)
    _, kept = tree.partition(params, is_adapter)
    return adapted.base_class(**_fields(adapted)), kept


def init(adapted: Any, base_params: Tree, key: Key[Array, ""], *, scores: Tree | None = None) -> Tree:
    """The base parameters with fresh adapter leaves beside the kernels; outputs are those of the base model.

    No forward pass is run. Layers draw from `key` by their path, so that the leaves of one layer depend on no other.
    Kernels may be ShapeDtypeStructs under `jax.eval_shape`, unless an adapter starts from their values (DoRA): then give
    `base_params` as an argument of the evaluated function.

    Args:
        scores: for adapters that choose parts of a layer by data: what `s2ft.calibrate` gives, an array at
            LAYER/adapter/KIND.

    Raises:
        ValueError: a regex that matches no linear layer, two adapters of one kind on a layer, scores of no adapter.
    """
    _require_adapted(adapted)
    flat, known = tree.flatten(base_params), tree.flatten(scores or {})
    fresh: dict[str, Any] = {}
    for layer, adapter in _matches(adapted, base_params):
        kernel = quantization.raw_in(flat, layer)
        *stack, d_in, d_out = kernel.shape
        path = f"{layer}{_IN_TREE}{adapter.kind}"
        given = {
            "kernel": None if isinstance(flat[f"{layer}/kernel"], jax.ShapeDtypeStruct) else kernel,
            "scores": known.pop(path, None),
        }
        drawn = jax.random.fold_in(key, _hash(path))
        start: Callable[..., Tree] = functools.partial(_start, adapter, d_in, d_out)
        if stack and getattr(adapter, "across_layers", False):
            leaves = adapter.init_stack(drawn, *stack, d_in=d_in, d_out=d_out)
        else:
            for size in stack:
                start = functools.partial(_stacked, start, size)
            if isinstance(kernel, Quantized):
                start = jax.jit(start)  # codes are opened where the adapter reads them, and nowhere else
            leaves = start(drawn, **given)
        fresh |= {f"{path}/{name}": leaf for name, leaf in tree.flatten(leaves).items()}
    if known:
        raise ValueError(f"scores for {next(iter(known))!r} belong to no attached adapter.")
    return tree.unflatten(flat | fresh)


def score_shapes(adapted: Any, base_params: Tree) -> Tree:
    """The shapes of the `scores` that `init` needs: empty where no adapter chooses by data."""
    flat, shapes = tree.flatten(base_params), {}
    for layer, adapter in adapted_layers(adapted, base_params):
        if getattr(adapter, "needs_scores", False):
            *stack, d_in, d_out = quantization.shape_in(flat, layer)
            width = adapter.scored(d_in, d_out)
            shapes[f"{layer}{_IN_TREE}{adapter.kind}"] = jax.ShapeDtypeStruct((*stack, width), jnp.float32)
    return tree.unflatten(shapes)


def init_shapes(adapted: Any, base_params: Tree) -> Tree:
    """The shapes of what `init` returns, from those of the base; nothing is computed."""
    start = lambda base, key, scores: init(adapted, base, key, scores=scores)
    return jax.eval_shape(start, base_params, jax.random.key(0), score_shapes(adapted, base_params))


def partition(params: Tree, trained: Callable[[str], bool] | None = None) -> tuple[Tree, Tree]:
    """Splits parameters into (trained, frozen); `tree.combine` joins them.

    By default the adapters' floating-point leaves are trained; otherwise those whose '/'-joined path `trained` accepts.
    """
    if trained is None:
        flat = tree.flatten(params)
        trained = lambda path: is_adapter(path) and jnp.issubdtype(flat[path].dtype, jnp.floating)
    return tree.partition(params, trained)


def merge(adapted: Any, params: Tree) -> tuple[nn.Module, Tree]:
    """The base module with the adapters fused into its kernels: the same outputs, no adapter left.

    A quantised base comes back in float, of the module's `param_dtype`: an adapter's change lies between the codes.

    Raises:
        ValueError: an adapter that depends on the token, and so has no equal kernel.
    """
    flat, opened = dict(tree.flatten(params)), set()
    for layer, adapter in adapted_layers(adapted, params):
        if quantization.open_in(flat, layer):
            opened.add(layer)
        fuse = adapter.merge
        for _ in flat[f"{layer}/kernel"].shape[2:]:
            fuse = jax.vmap(fuse)
        flat[f"{layer}/kernel"] = fuse(leaves_of(flat, layer, adapter), flat[f"{layer}/kernel"])
    for layer in opened:
        flat[f"{layer}/kernel"] = flat[f"{layer}/kernel"].astype(adapted.param_dtype)
    module, merged = detach(adapted, tree.unflatten(flat))
    return quantization.dequantize(module, merged) if quantization.is_quantized(module) else (module, merged)


def adapted_layers(adapted: Any, params: Tree) -> list[tuple[str, AnyAdapter]]:
    """Each (path of a layer, adapter), in the order in which adapters act.

    Raises:
        ValueError: a regex that matches no linear layer, or two adapters of one kind on a layer.
    """
    _require_adapted(adapted)
    return list(_matches(adapted, params))


def leaves_of(flat: Mapping[str, Any], layer: str, adapter: AnyAdapter) -> Tree:
    """The adapter's leaves in a layer, from flattened parameters."""
    prefix = f"{layer}{_IN_TREE}{adapter.kind}/"
    return tree.unflatten({path.removeprefix(prefix): x for path, x in flat.items() if path.startswith(prefix)})


def is_adapter(path: str) -> bool:
    """Whether a '/'-joined path belongs to an adapter's leaf."""
    return _IN_TREE in f"/{path}"


def layers(params: Tree) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the kernel, for each linear layer; a stack of layers has a leading axis."""
    flat = tree.flatten(params)
    found = [p.removesuffix("/kernel") for p in flat if p.endswith("/kernel") and not is_adapter(p)]
    kernels = {path: quantization.shape_in(flat, path) for path in found}
    return {path: shape for path, shape in kernels.items() if len(shape) in (2, 3)}


def _matches(adapted: Any, params: Tree) -> Iterator[tuple[str, AnyAdapter]]:
    """Each (layer, adapter) in the order of `adapters`; checks that every regex matches something."""
    names = layers(params)
    seen: set[tuple[str, str]] = set()
    for pattern, adapter in adapted.adapters:
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            near = difflib.get_close_matches(
                pattern, sorted({n.rsplit("/", 1)[-1] for n in names} | names.keys()), 1, 0.3
            )
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(
                f"adapter regex {pattern!r} matches no linear layer; {hint}The layers are {', '.join(names)}."
            )
        for name in found:
            if (name, adapter.kind) in seen:
                raise ValueError(
                    f"layer {name!r} has two adapters of kind {adapter.kind!r}; let one regex of them match it."
                )
            seen.add((name, adapter.kind))
            yield name, adapter


def _start(adapter: AnyAdapter, d_in: int, d_out: int, key: Key[Array, ""], *, kernel: Any, scores: Any) -> Tree:
    kernel = dequantize(kernel) if isinstance(kernel, Quantized) else kernel
    return adapter.init(key, d_in=d_in, d_out=d_out, kernel=kernel, scores=scores)


def _stacked(start: Callable[..., Tree], size: int, key: Key[Array, ""], **given: Any) -> Tree:
    return jax.vmap(lambda key, given: start(key, **given))(jax.random.split(key, size), given)


def _settled(adapter: AnyAdapter, module: Any) -> AnyAdapter:
    """The adapter with what it takes from the module's configuration, such as the width of a head."""
    settle = getattr(adapter, "for_module", None)
    return adapter if settle is None else settle(module)


def _hash(path: str) -> int:
    """A stable 31-bit number of a string (Python's own differs between processes)."""
    value = 2166136261
    for byte in path.encode():
        value = (value ^ byte) * 16777619 % 2**32
    return value >> 1


def _fields(module: nn.Module) -> dict[str, Any]:
    names = [f.name for f in dataclasses.fields(module) if f.init and f.name not in ("parent", "adapters")]
    return {name: getattr(module, name) for name in names}


def _require_adapted(module: Any) -> None:
    if not isinstance(module, _Adapted):
        raise ValueError(f"{type(module).__name__} has no adapters attached; call adapters.attach first.")


class _Adapted:
    """Marks the classes that `attach` makes."""

    base_class: ClassVar[Any]
    adapters: tuple[tuple[str, AnyAdapter], ...]


@functools.cache
def _adapted_class(base: type[nn.Module]) -> Any:
    """The subclass of `base` whose public methods run intercepted; one per base, so that equal modules are equal."""
    names = [n for n in dir(base) if n == "__call__" or not (n.startswith("_") or hasattr(nn.Module, n))]
    methods = {n: _intercepted(getattr(base, n)) for n in names if inspect.isfunction(getattr(base, n))}
    fields = {"__annotations__": {"adapters": Any}, "adapters": (), "base_class": base}
    return type(
        f"Adapted{base.__name__}",
        (_Adapted, base),
        {"__module__": __name__, "__doc__": base.__doc__} | fields | methods,
    )


def _intercepted(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        path = self.path
        if path in _intercepting.get():  # one public method called another
            return original(self, *args, **kwargs)
        mask = signature.bind(self, *args, **kwargs).arguments.get("mask")
        context = _intercepting.set((*_intercepting.get(), path))
        try:
            with nn.intercept_methods(_interceptor(self, mask)):
                return original(self, *args, **kwargs)
        finally:
            _intercepting.reset(context)

    method.__name__, method.__doc__ = original.__name__, original.__doc__
    method.__signature__ = signature  # type: ignore[attr-defined]
    return method


_intercepting: contextvars.ContextVar[tuple[Any, ...]] = contextvars.ContextVar("_intercepting", default=())


def _interceptor(root: Any, of_tokens: Any) -> Callable[..., Any]:
    depth, unmasked = len(root.path), getattr(root, "unmasked", None)
    reports, draws = root.is_mutable_collection("losses"), root.has_rng("dropout")

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        y = call(*args, **kwargs)
        layer = context.module
        if context.method_name != "__call__" or not isinstance(layer, nn.Dense):
            return y
        path = "/".join(layer.path[depth:])
        matching = tuple(adapter for pattern, adapter in root.adapters if re.search(pattern, path))
        if not matching or layer.path[:depth] != root.path:
            return y
        x = jnp.asarray(args[0] if args else kwargs["inputs"]).astype(y.dtype)
        mask = None if unmasked is not None and re.search(unmasked, path) else of_tokens
        if mask is not None and any(a.has_loss for a in matching) and jnp.shape(mask) != x.shape[:-1]:
            raise ValueError(
                f"layer {path!r} sees tokens of shape {x.shape[:-1]} and `mask` has {jnp.shape(mask)}; an adapter with an "
                "auxiliary loss needs one mask entry for each token."
            )
        leaves = _Leaves(matching, reports, draws, getattr(root, "mesh", None), parent=layer, name="adapter")
        own: Any = lambda name: layer.get_variable("params", name)
        return leaves(x, y, quantization.kernel_of(own), own("bias") if layer.use_bias else None, mask)

    return intercept


class _Leaves(nn.Module):
    """The adapters of one linear layer: owns their leaves, applies them in order and reports their losses."""

    adapters: tuple[AnyAdapter, ...]
    reports: bool
    draws: bool
    mesh: Any

    @nn.compact
    def __call__(self, x: Any, y: Any, kernel: Any, bias: Any, mask: Any) -> Any:
        for adapter in self.adapters:
            if self.is_initializing():
                start = functools.partial(adapter.init, d_in=x.shape[-1], d_out=y.shape[-1], kernel=kernel)
                self.param(adapter.kind, start)
                continue
            leaves: Any = self.get_variable("params", adapter.kind)
            if leaves is None:
                layer = "/".join(self.path[:-1])
                raise ValueError(
                    f"layer {layer!r} has no leaves for its {adapter.kind!r} adapter; give what adapters.init returned."
                )
            key = None
            if self.draws and adapter.needs_key:
                if not self.has_rng("dropout"):
                    raise ValueError(
                        _FOREIGN_SCAN.format(adapter.kind, "draws random numbers", "split_rngs={'dropout': True}")
                    )
                key = self.make_rng("dropout")
            y, loss = adapter.apply(leaves, Call(x, y, kernel, mask, key, bias, self.mesh))
            if loss is not None and self.reports:
                if not self.is_mutable_collection("losses"):
                    raise ValueError(
                        _FOREIGN_SCAN.format(adapter.kind, "has an auxiliary loss", "variable_axes={'losses': 0}")
                    )
                self.sow("losses", adapter.kind, loss, init_fn=lambda: jnp.float32(0), reduce_fn=lambda _, new: new)
        return y


_FOREIGN_SCAN = "adapter {!r} {} and the module's own nn.scan hides it; give that scan {}."
