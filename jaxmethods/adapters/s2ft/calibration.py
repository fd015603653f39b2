"""Scores of channels from data: the norms of activations or of gradients over a calibration set (section 5.4)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods import tree
from jaxmethods.adapters.attach import attach, detach, init, partition
from jaxmethods.adapters.base import Call, Result
from jaxmethods.adapters.s2ft.adapter import S2FT
from jaxmethods.tree import Tree


def calibrate(
    adapted: Any, base_params: Tree, batches: Iterable[Any], loss_fn: Callable[[Any], Callable[..., Any]]
) -> Tree:
    """The squared norm of each channel, summed over batches, for every S²FT adapter that chooses by data.

    Activations need a forward pass alone; gradients are those of each batch's mean loss with respect to the kernel, of
    which one layer's exists at a time. Tokens that the model's `mask` leaves out do not count.

    Args:
        adapted: the module with its adapters attached.
        base_params: of the module without them.
        batches: of the calibration set (the paper takes 1% of the training data), read one by one.
        loss_fn: `objective.loss_fn`: from a module to `(params, batch, key) -> (Mean, metrics)`.

    Returns:
        float32 [*stack, channels] at LAYER/adapter/s2ft, as `adapters.init` takes for `scores`; empty where no adapter
        chooses by data.
    """
    probes = [(pattern, _probe(adapter)) for pattern, adapter in adapted.adapters if isinstance(adapter, S2FT)]
    chosen = {pattern: probe for pattern, probe in probes if probe is not None}
    if not chosen:
        return {}
    module = attach(detach(adapted, base_params)[0], chosen)
    total = loss_fn(module)
    zeros = partition(init(module, base_params, jax.random.key(0)))[0]

    @functools.partial(jax.jit, donate_argnums=0)
    def add(sums: Tree, base_params: Tree, batch: Any) -> Tree:
        value = lambda probes: total(tree.combine(probes, base_params), batch, None)[0].value()
        return jax.tree.map(jnp.add, sums, jax.grad(value)(zeros))

    sums, seen = jax.tree.map(jnp.copy, zeros), 0
    for seen, batch in enumerate(batches, 1):  # noqa: B007
        sums = add(sums, base_params, batch)
    if not seen:
        raise ValueError("s2ft.calibrate was given no batch.")
    flat = tree.flatten(sums)
    return tree.unflatten({path.replace("/adapter/probe/squares", "/adapter/s2ft"): x for path, x in flat.items()})


def _probe(adapter: S2FT) -> _Probe | None:
    return _Probe(adapter.side, adapter.selection == "gradient") if adapter.needs_scores else None


@dataclasses.dataclass(frozen=True)
class _Probe:
    """Changes nothing; the gradient of its leaf is the sum of squares of each channel."""

    side: str
    gradient: bool

    kind: ClassVar[str] = "probe"
    has_loss: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False

    def init(self, key: Any, d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Tree:
        return {"squares": jnp.zeros(d_in if self.side == "in" else d_out, jnp.float32)}

    def apply(self, leaves: Tree, call: Call) -> Result:
        if self.gradient:
            return Result(_gradient_probe(call.x, call.y, leaves["squares"], self.side))
        seen = call.x if self.side == "in" else call.y
        if call.token_mask is not None:
            seen = jnp.where(call.token_mask[..., None], seen, 0)
        squares = jnp.square(jax.lax.stop_gradient(seen).astype(jnp.float32))
        return Result(_activation_probe(call.y, leaves["squares"], squares.sum(tuple(range(squares.ndim - 1)))))


@jax.custom_vjp
def _activation_probe(y: Array, leaf: Float[Array, " c"], squares: Float[Array, " c"]) -> Array:
    return y


def _activation_forward(y: Array, leaf: Array, squares: Array) -> tuple[Array, Array]:
    return y, squares


def _activation_backward(squares: Array, g: Array) -> tuple[Array, Array, None]:
    return g, squares, None


_activation_probe.defvjp(_activation_forward, _activation_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gradient_probe(x: Array, y: Array, leaf: Float[Array, " c"], side: str) -> Array:
    return y


def _gradient_forward(x: Array, y: Array, leaf: Array, side: str) -> tuple[Array, Array]:
    return y, x


def _gradient_backward(side: str, x: Array, g: Array) -> tuple[None, Array, Array]:
    kernel = jnp.einsum("...i,...o->io", x, g, preferred_element_type=jnp.float32)
    return None, g, jnp.square(kernel).sum(1 if side == "in" else 0)


_gradient_probe.defvjp(_gradient_forward, _gradient_backward)
