"""Kernels of linear layers in blocks of small integers, and the product with them.

>>> q = quantize(jnp.linspace(-1.0, 1.0, 32)[:, None], "int8")
>>> q.codes[0].item(), q.codes[-1].item(), q.kind, q.shape
(-127, 127, 'int8', (32, 1))

The formats are two of GGUF's, so that its files are taken over as they are (llama.cpp, ggml-quants.c):

    "int8", Q8_0:   weight = scale * code,            codes -127 ... 127    8.5 bits a weight
    "int4", Q4_1:   weight = scale * code + minimum,  codes 0 ... 15        5 bits a weight

Each block of 32 weights along the input axis has its own scale (and minimum), float16. Other packages, such as qwix,
have no format with a minimum and could not hold what those files hold. Four-bit codes lie two to a byte and not as
jnp.uint4: in a loop over layers XLA's CPU compiler widens a stack of those to bytes, all layers at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float16, Int8, Key, UInt8

from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.tree import require_one_of

KINDS = ("int8", "int4")
BLOCK = 32
"""Weights that share a scale: neighbours along the input axis."""

AnyArray = Array | np.ndarray


class Quantized(NamedTuple):
    """A kernel [*stack, d_in, d_out] as codes with a scale, and in "int4" a minimum, for each block."""

    codes: Int8[AnyArray, "*stack d_in d_out"] | UInt8[AnyArray, "*stack half d_out"]
    """Of "int4" two to a byte, [*stack, d_in / 2, d_out]: in the 16 bytes of a block the low halves are its first 16 weights."""
    scale: Float16[AnyArray, "*stack block d_out"]
    minimum: Float16[AnyArray, "*stack block d_out"] | None = None

    @property
    def kind(self) -> str:
        """ "int8" or "int4"."""
        return "int8" if self.minimum is None else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the kernel."""
        *stack, blocks, d_out = self.scale.shape
        return (*stack, blocks * BLOCK, d_out)


def quantize(kernel: Float[AnyArray, "*stack d_in d_out"], kind: str) -> Quantized:
    """The nearest codes by GGUF's rules; a numpy array is worked on by numpy, and gives what the `gguf` package gives.

    An "int8" weight is off by at most half of the block's max |w| / 127, an "int4" weight by half of (max - min) / 15, and
    by what scale and minimum lose as float16.

    Raises:
        ValueError: an unknown kind, or d_in no multiple of 32.
    """
    require_one_of("quantization", kind, KINDS)
    *stack, d_in, d_out = kernel.shape
    if d_in % BLOCK:
        raise ValueError(f"a kernel of {d_in} inputs does not divide into blocks of {BLOCK}.")
    xp: Any = np if isinstance(kernel, np.ndarray) else jnp
    blocks = xp.asarray(kernel, xp.float32).reshape(*stack, d_in // BLOCK, BLOCK, d_out)
    if kind == "int8":
        scale = xp.max(xp.abs(blocks), -2, keepdims=True) / 127
        codes = _rounded(blocks * _inverse(scale, xp), xp).astype(xp.int8)
        return Quantized(codes.reshape(kernel.shape), scale[..., 0, :].astype(xp.float16))
    minimum = xp.min(blocks, -2, keepdims=True)
    scale = (xp.max(blocks, -2, keepdims=True) - minimum) / 15
    codes = xp.trunc((blocks - minimum) * _inverse(scale, xp) + xp.float32(0.5)).clip(0, 15).astype(xp.uint8)
    packed = codes[..., : BLOCK // 2, :] | codes[..., BLOCK // 2 :, :] << 4
    return Quantized(
        packed.reshape(*stack, d_in // 2, d_out), *(x[..., 0, :].astype(xp.float16) for x in (scale, minimum))
    )


def dequantize(q: Quantized, dtype: Any = jnp.float32) -> Float[Array, "*stack d_in d_out"]:
    """The kernel that the codes stand for: computed in float32, then rounded to `dtype`."""
    *stack, blocks, d_out = q.scale.shape
    wide = lambda x: jnp.asarray(x, jnp.float32)[..., None, :]
    if q.minimum is None:
        kernel = wide(q.scale) * jnp.asarray(q.codes, jnp.float32).reshape(*stack, blocks, BLOCK, d_out)
    else:
        bytes_ = jnp.asarray(q.codes).reshape(*stack, blocks, 1, BLOCK // 2, d_out)
        codes = (bytes_ >> jnp.array([0, 4], jnp.uint8)[:, None, None]) & 15
        kernel = wide(q.scale) * codes.astype(jnp.float32).reshape(*stack, blocks, BLOCK, d_out) + wide(q.minimum)
    return kernel.reshape(q.shape).astype(dtype)


def draw(key: Key[Array, ""], d_in: int, d_out: int, kind: str) -> Quantized:
    """A random kernel, its weights uniform with mean 0 and variance 1 / d_in.

    Raises:
        ValueError: an unknown kind, or d_in no multiple of 32.
    """
    require_one_of("quantization", kind, KINDS)
    if d_in % BLOCK:
        raise ValueError(f"a kernel of {d_in} inputs does not divide into blocks of {BLOCK}.")
    shape = (d_in // BLOCK, d_out)
    if kind == "int8":
        codes = jax.random.randint(key, (d_in, d_out), -127, 128, jnp.int8)
        return Quantized(codes, jnp.full(shape, (127 * 128 / 3 * d_in) ** -0.5, jnp.float16))
    scale = ((16**2 - 1) / 12 * d_in) ** -0.5
    codes = jax.random.bits(key, (d_in // 2, d_out), jnp.uint8)
    return Quantized(codes, jnp.full(shape, scale, jnp.float16), jnp.full(shape, -7.5 * scale, jnp.float16))


def quantized_linear(x: Float[Array, "*batch d_in"], q: Quantized) -> Float[Array, "*batch d_out"]:
    """x @ dequantize(q, x.dtype). Differentiable in x alone; the backward pass keeps the codes, and opens them again."""
    return _linear(*vary((x, q), varying_axes(x, q)))


@jax.custom_vjp
def _linear(x: Array, q: Quantized) -> Array:
    return jnp.matmul(x, dequantize(q, x.dtype))


def _fwd(x: Array, q: Quantized) -> tuple[Array, Quantized]:
    return _linear(x, q), q


def _bwd(q: Quantized, g: Array) -> tuple[Array, None]:
    return jax.lax.dot_general(g, dequantize(q, g.dtype), (((g.ndim - 1,), (1,)), ((), ()))), None


_linear.defvjp(_fwd, _bwd)


def _inverse(scale: Any, xp: Any) -> Any:
    """1 / scale, and 0 in blocks of zeros."""
    return xp.where(scale == 0, 0, 1 / xp.where(scale == 0, 1, scale)).astype(xp.float32)


def _rounded(x: Any, xp: Any) -> Any:
    """To the nearest integer, halves away from zero; x + 0.5 would round twice."""
    size = xp.abs(x)
    whole = xp.floor(size)
    return xp.sign(x) * (whole + xp.floor(2 * (size - whole)))
