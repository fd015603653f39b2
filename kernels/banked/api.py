"""A linear map for each row of a batch, out of a bank of them.

>>> bank = jnp.stack([jnp.eye(2), 10 * jnp.eye(2)])
>>> x = jnp.ones((3, 1, 2))
>>> banked_linear(x, bank, jnp.array([1, -1, 0])).tolist()
[[[10.0, 10.0]], [[0.0, 0.0]], [[1.0, 1.0]]]
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmethods.kernels import one_device
from jaxmethods.kernels.banked import pallas_tpu, xla
from jaxmethods.kernels.manual_axes import vary, varying_axes

IMPLEMENTATIONS: dict[str, Callable[[bool], Callable[..., Any]]] = {
    "xla": lambda transposed: functools.partial(xla.banked_linear, transposed=transposed),
    "pallas_tpu": lambda transposed: one_device.compiled_or_interpreted(
        functools.partial(pallas_tpu.banked_linear, transposed=transposed)
    ),
}


def banked_linear(
    x: Float[Array | np.ndarray, "batch time d_in"],
    bank: Float[Array | np.ndarray, "size d_in d_out"] | Float[Array | np.ndarray, "size d_out d_in"],
    rows: Int[Array | np.ndarray, " batch"],
    *,
    transposed: bool = False,
    implementation: str | None = None,
) -> Float[Array, "batch time d_out"]:
    """x[b] @ bank[rows[b]] for each row b of a batch, in x's dtype with float32 sums; 0 where rows[b] is negative.

    For decoding, where time is 1, the bank's entries are nearly all that is read. "xla" gathers them first, so that each is
    read, written and read again; "pallas_tpu" reads each where it lies, in its own dtype, and one that adjacent rows share
    only once. Differentiable in reverse mode, in x and bank, by the "xla" form.

    Args:
        rows: below the bank's size; larger ones mean the last entry.
        transposed: entries are [d_out, d_in]. A TPU keeps an array whose last axis is short, as LoRA's [d_in, rank] is, with
            that axis second to last anyhow, so that `bank.swapaxes(1, 2)` costs nothing there, and padding it would.
        implementation: "xla" or "pallas_tpu" (one TPU device: alone, or inside a `jax.shard_map` over all mesh axes; compiled for a
            CPU it is interpreted). None is "pallas_tpu" where the call is seen to stand on such a device and its arrays fit
            (`pallas_tpu.tile`), else "xla".

    Raises:
        ValueError: widths that differ, an unknown implementation, or arrays that "pallas_tpu" does not take.
    """
    x, bank, rows = jnp.asarray(x), jnp.asarray(bank), jnp.asarray(rows, jnp.int32)
    width, d_out = bank.shape[1:][:: -1 if transposed else 1]
    if x.shape[2] != width:
        raise ValueError(f"x has width {x.shape[2]} and the bank {tuple(bank.shape)} ({transposed=}) takes {width}.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")
    fits = pallas_tpu.tile(x.shape[1], width, d_out, x.dtype, bank.dtype)
    if implementation is None:
        implementation = "pallas_tpu" if fits and one_device.on_one_tpu() else "xla"
    if implementation == "pallas_tpu" and not fits:
        raise ValueError(
            f"implementation='pallas_tpu' takes float32 or bfloat16 rows that fit on the chip; {x.dtype}[{x.shape[1]}, {width}] to "
            f"{d_out} does not: use 'xla'."
        )
    operands = (x, bank, jnp.clip(rows, -1, len(bank) - 1))
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    return _banked_linear(implementation, transposed, *vary(operands, varying_axes(operands)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _banked_linear(implementation: str, transposed: bool, x: Array, bank: Array, rows: Array) -> Array:
    return IMPLEMENTATIONS[implementation](transposed)(x, bank, rows)


def _fwd(implementation: str, transposed: bool, x: Array, bank: Array, rows: Array):  # type: ignore[no-untyped-def]
    return _banked_linear(implementation, transposed, x, bank, rows), (x, bank, rows)


def _bwd(implementation: str, transposed: bool, saved, g: Array):  # type: ignore[no-untyped-def]
    x, bank, rows = saved
    run = lambda x, bank: xla.banked_linear(x, bank, rows, transposed=transposed)
    return *jax.vjp(run, x, bank)[1](g), None


_banked_linear.defvjp(_fwd, _bwd)
