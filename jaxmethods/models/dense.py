"""A linear layer whose kernel is quantised and frozen."""

from __future__ import annotations

from typing import Any, no_type_check

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.kernels import quantized
from jaxmethods.kernels.quantized import Quantized
from jaxmethods.quantization import NAMES


@no_type_check  # run-time checkers cannot read the annotations of flax's own fields
class QuantizedDense(nn.Dense):
    """`nn.Dense` over the leaves `kernel` (codes), `kernel_scale` and `kernel_minimum`; `init` draws them at random.

    Without a `dot_general` of its own the product is `quantized_linear`, whose backward pass keeps the codes alone.
    """

    quantization: str = "int8"

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        x = jnp.asarray(inputs, self.dtype)
        part = lambda key, field: getattr(quantized.draw(key, x.shape[-1], self.features, self.quantization), field)
        leaf: Any = lambda field: self.param(NAMES[field], part, field)
        q = Quantized(leaf("codes"), leaf("scale"), leaf("minimum") if self.quantization == "int4" else None)
        if self.dot_general is None:
            y = quantized.quantized_linear(x, q)
        else:
            kernel = quantized.dequantize(q, x.dtype)
            y = self.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())), precision=self.precision)
        if self.use_bias:
            y += jnp.asarray(self.param("bias", self.bias_init, (self.features,), self.param_dtype), y.dtype)
        return y
