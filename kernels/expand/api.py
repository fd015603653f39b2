"""The last product of a low-rank adapter, from its few channels to a layer's width, with a backward pass that reads the wide
cotangent as rarely as it can.

>>> expand(jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[1.0, -1.0]]), jnp.array([0.5, 0.5])).tolist()   # one channel, three tokens
[[1.5, -0.5], [2.5, -1.5], [3.5, -2.5]]
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods.kernels import one_device
from jaxmethods.kernels.expand import pallas_tpu, xla
from jaxmethods.kernels.manual_axes import vary, varying_axes

IMPLEMENTATIONS = {"xla": xla.cotangents, "pallas_tpu": one_device.compiled_or_interpreted(pallas_tpu.cotangents)}
LARGE = 64 << 20
"""Bytes of a cotangent that XLA no longer keeps on the chip between two products (docs/kernels.md)."""


def expand(
    state: Float[Array | np.ndarray, "channels tokens"],
    kernel: Float[Array | np.ndarray, "channels d_out"],
    bias: Float[Array | np.ndarray, " d_out"] | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "tokens d_out"]:
    """state' kernel (+ bias), in the dtype of `state`, whose tokens are the last axis. Differentiable once, in reverse mode.

    The forward pass is XLA's: it reads little and writes the result once, the least there is. The backward pass has three
    products with the cotangent g [tokens, d_out] (for state, kernel and bias). Here the bias is a row of ones below the state,
    which leaves "xla" two; a g that fits on the chip it reads once all the same. "pallas_tpu" computes both from one
    tile of g, so that it is always read once. The gradient of `kernel` and `bias` has their own dtype, with float32 sums.

    Args:
        implementation: of the backward pass, "xla" or "pallas_tpu" (one TPU device: alone, or inside a `jax.shard_map` over all
            mesh axes, as `jax.jit` cannot split a kernel; compiled for a CPU it is interpreted). None is "pallas_tpu" where
            the call is seen to stand on such a device, g is over 64 MiB (`LARGE`) and the kernel's own arrays fit
            (`pallas_tpu.tiles`), else "xla".

    Raises:
        ValueError: an unknown implementation, or arrays that "pallas_tpu" does not take.
    """
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")
    state, kernel = jnp.asarray(state), jnp.asarray(kernel)
    shape = (state.shape[1], kernel.shape[1])
    fits = pallas_tpu.tiles(len(state) + (bias is not None), *shape, state.dtype)
    if implementation is None:
        large = state.dtype.itemsize * shape[0] * shape[1] > LARGE
        implementation = "pallas_tpu" if large and fits and one_device.on_one_tpu() else "xla"
    if implementation == "pallas_tpu" and not fits:
        raise ValueError(
            f"implementation='pallas_tpu' takes float32 or bfloat16 whose gradients fit on the chip; {state.dtype} of "
            f"{len(state)} channels to {shape[1]} does not: use 'xla'."
        )
    operands = (state, kernel) if bias is None else (state, kernel, jnp.asarray(bias))
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    return _expand(implementation, *vary(operands, varying_axes(operands)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _expand(implementation: str, state: Array, kernel: Array, bias: Array | None = None) -> Array:
    y = jnp.einsum("kn,ko->no", state, kernel.astype(state.dtype))
    return y if bias is None else y + bias.astype(state.dtype)


def _fwd(implementation: str, state: Array, kernel: Array, bias: Array | None = None):  # type: ignore[no-untyped-def]
    return _expand(implementation, state, kernel, bias), (state, kernel, bias)


def _bwd(implementation: str, saved, g: Array):  # type: ignore[no-untyped-def]
    state, kernel, bias = saved
    rows = state
    if bias is not None:
        rows = jnp.concatenate([state, vary(jnp.ones((1, state.shape[1]), state.dtype), varying_axes(state))])
    d_state, d_rows = IMPLEMENTATIONS[implementation](rows, kernel.astype(state.dtype), g)
    d_kernel = d_rows[: len(state)].astype(kernel.dtype)
    return d_state, d_kernel, None if bias is None else d_rows[-1].astype(bias.dtype)


_expand.defvjp(_fwd, _bwd)
