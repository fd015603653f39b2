"""Some channels (last axis) of an array, and values added to them.

>>> x, indices = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([2, 0])
>>> take_channels(x, indices).tolist()
[[3.0, 1.0]]
>>> add_channels(x, jnp.array([[10.0, 20.0]]), indices).tolist()
[[21.0, 2.0, 13.0]]

Channels lie along the lanes of a TPU's registers, where it cannot look up: XLA's gather of channels first writes all of x out
transposed, and its scatter writes zeros, the transposed sum and the sum. A product with the one-hot matrix [channels, s] reads
x as it lies, once. It costs 2 s operations for each number of x: for S²FT's 3%, 3% of what a layer as wide as its input costs.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.kernels.manual_axes import vary, varying_axes

IMPLEMENTATIONS = ("product", "gather")


def take_channels(
    x: Float[Array | np.ndarray, "*batch channels"],
    indices: Int[Array | np.ndarray, " chosen"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch chosen"]:
    """x[..., indices], and 0 for an index past the end. Differentiable in reverse mode, in x.

    Both implementations give the same bits, but for numbers so small that a TPU takes them, or the lower one of the bfloat16
    parts into which it splits float32, for 0; and for an infinity or nan in a token's x, where "product" gives nan for
    all of the token's channels.

    Args:
        indices: from 0 up.
        implementation: "product" or "gather"; None is "product" where it is compiled for a TPU, whatever the host is.

    Raises:
        ValueError: an unknown implementation.
    """
    _require_known(implementation)
    x = jnp.asarray(x)
    return _take(implementation, x.shape[-1], *_varying(x, jnp.asarray(indices)))


def add_channels(
    x: Float[Array | np.ndarray, "*batch channels"],
    values: Float[Array | np.ndarray, "*batch chosen"],
    indices: Int[Array | np.ndarray, " chosen"],
    *,
    implementation: str | None = None,
) -> Float[Array, "*batch channels"]:
    """x with `values` added at channels `indices`, in x's dtype. Differentiable in reverse mode, in x and values.

    An index past the end adds nothing; one that occurs twice adds twice. Arguments and errors as for `take_channels`.
    """
    _require_known(implementation)
    x = jnp.asarray(x)
    return _add(implementation, *_varying(x, jnp.asarray(values).astype(x.dtype), jnp.asarray(indices)))


def _require_known(implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")


def _varying(*arrays: Array) -> tuple[Array, ...]:
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    return vary(arrays, varying_axes(arrays))


def _choose(implementation: str | None, product: Callable, gather: Callable, *arrays: Array) -> Array:
    if implementation is None:
        return jax.lax.platform_dependent(*arrays, tpu=product, default=gather)
    return {"product": product, "gather": gather}[implementation](*arrays)


def _one_hot(indices: Array, channels: int, like: Array) -> Float[Array, "channels chosen"]:
    return (jnp.arange(channels)[:, None] == indices).astype(like.dtype)


def _product(lhs: Array, rhs: Array, axis: int) -> Array:
    """The last axis of lhs with `axis` of rhs. Nothing is rounded: one term of each sum is not zero."""
    return jax.lax.dot_general(
        lhs, rhs, (((lhs.ndim - 1,), (axis,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )  # fmt: skip


def _taken(implementation: str | None, x: Array, indices: Array) -> Array:
    product = lambda x, indices: _product(x, _one_hot(indices, x.shape[-1], x), 0)
    gather = lambda x, indices: jnp.take(x, indices, axis=-1, mode="fill", fill_value=0)
    return _choose(implementation, product, gather, x, indices)


def _added(implementation: str | None, x: Array, values: Array, indices: Array) -> Array:
    product = lambda x, values, indices: x + _product(values, _one_hot(indices, x.shape[-1], x), 1)
    scatter = lambda x, values, indices: x.at[..., indices].add(values, mode="drop")
    return _choose(implementation, product, scatter, x, values, indices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take(implementation: str | None, channels: int, x: Array, indices: Array) -> Array:
    return _taken(implementation, x, indices)


def _take_fwd(implementation: str | None, channels: int, x: Array, indices: Array):  # type: ignore[no-untyped-def]
    return _taken(implementation, x, indices), indices


def _take_bwd(implementation: str | None, channels: int, indices: Array, g: Array):  # type: ignore[no-untyped-def]
    zero = vary(jnp.zeros((*g.shape[:-1], channels), g.dtype), varying_axes(g))
    return _added(implementation, zero, g, indices), None


_take.defvjp(_take_fwd, _take_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _add(implementation: str | None, x: Array, values: Array, indices: Array) -> Array:
    return _added(implementation, x, values, indices)


def _add_fwd(implementation: str | None, x: Array, values: Array, indices: Array):  # type: ignore[no-untyped-def]
    return _added(implementation, x, values, indices), indices


def _add_bwd(implementation: str | None, indices: Array, g: Array):  # type: ignore[no-untyped-def]
    return g, _taken(implementation, g, indices), None


_add.defvjp(_add_fwd, _add_bwd)
