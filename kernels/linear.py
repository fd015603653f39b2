"""The product of a linear layer, with a gradient that reads its operands as they lie.

>>> linear(jnp.ones((2, 3)), jnp.ones((3, 4))).tolist()
[[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]

The gradient of a kernel, x' g, has one transposed operand. Differentiated by JAX it is always g, and XLA on the CPU then
writes g out transposed, recomputing element by element whatever makes it (the MLP's activation, say). Here it is the
narrower of the two (docs/performance.md).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxmethods.kernels.manual_axes import vary, varying_axes


def linear(x: Float[Array, "*batch d_in"], kernel: Float[Array, "d_in d_out"]) -> Float[Array, "*batch d_out"]:
    """x @ kernel, in the dtype of both. Differentiable in reverse mode."""
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    return _linear(*vary((x, kernel), varying_axes(x, kernel)))


def dot_general(lhs: Array, rhs: Array, dimension_numbers: Any, **settings: Any) -> Array:
    """`jax.lax.dot_general`; a plain linear layer's is `linear`. For `flax.linen.Dense(dot_general=...)`."""
    plain = dimension_numbers == (((lhs.ndim - 1,), (0,)), ((), ())) and lhs.dtype == rhs.dtype and rhs.ndim == 2
    if plain and not any(value is not None for value in settings.values()):
        return linear(lhs, rhs)
    return jax.lax.dot_general(lhs, rhs, dimension_numbers, **settings)


@jax.custom_vjp
def _linear(x: Array, kernel: Array) -> Array:
    return jnp.matmul(x, kernel)


def _fwd(x: Array, kernel: Array):  # type: ignore[no-untyped-def]
    return _linear(x, kernel), (x, kernel)


def _bwd(residuals, g: Array):  # type: ignore[no-untyped-def]
    x, kernel = residuals
    dx = jax.lax.dot_general(g, kernel, (((g.ndim - 1,), (1,)), ((), ())))
    tokens = tuple(range(x.ndim - 1))
    contract = lambda lhs, rhs: jax.lax.dot_general(lhs, rhs, ((tokens, tokens), ((), ())))
    return dx, contract(x, g) if x.shape[-1] <= g.shape[-1] else contract(g, x).T


_linear.defvjp(_fwd, _bwd)
