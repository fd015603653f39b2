"""The cotangents of `expand` in plain XLA: two products."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def cotangents(
    rows: Float[Array, "rows tokens"], kernel: Float[Array, "channels d_out"], g: Float[Array, "tokens d_out"]
) -> tuple[Float[Array, "channels tokens"], Float[Array, "rows d_out"]]:
    """kernel g', in g's dtype, and rows g, in float32 (float64 for float64)."""
    wide = jnp.promote_types(g.dtype, jnp.float32)
    for_state = jax.lax.dot_general(kernel, g, (((1,), (1,)), ((), ())))
    return for_state, jax.lax.dot_general(rows, g, (((1,), (0,)), ((), ())), preferred_element_type=wide)
