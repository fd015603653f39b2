"""`banked_linear` in plain XLA: each row's entry of the bank is gathered, then multiplied."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def banked_linear(
    x: Float[Array, "batch time d_in"], bank: Float[Array, "size _ _"], rows: Int[Array, " batch"], *, transposed: bool
) -> Float[Array, "batch time d_out"]:
    """See `api`."""
    own = jnp.take(bank, rows, axis=0, mode="clip").astype(x.dtype)
    y = jnp.einsum("btk,bdk->btd" if transposed else "btk,bkd->btd", x, own)
    return jnp.where((rows >= 0)[:, None, None], y, 0)
