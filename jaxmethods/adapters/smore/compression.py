"""The first product of each token: with A of every expert, and with the router's down-projection."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmethods.adapters.smore.leaves import Params
from jaxmethods.adapters.smore.spec import Spec
from jaxmethods.kernels.manual_axes import vary, varying_axes


def compress(params: Params, x: Array, spec: Spec) -> tuple[list[Array], Array]:
    """A x + a of each pool's experts, [s_l r_l, tokens], in x's dtype; x_down [router_dim, tokens] in float32."""
    a, down = params["experts"]["a"], params["router"]["down"]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype == wide:  # one product reads x once
        kernel, bias = (jnp.concatenate([p[n].astype(wide) for p in (a, down)], -1) for n in ("kernel", "bias"))
        terms = jnp.einsum("dc,nd->cn", kernel, x) + bias[:, None]
        *own, token = jax.lax.split(terms, (*spec.down_sizes, spec.router_dim))
        return own, token
    operands = (a["kernel"], down["kernel"], x)
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    terms, token = _both(*vary(operands, varying_axes(operands)))
    terms = terms + a["bias"].astype(x.dtype)[:, None]
    return list(jax.lax.split(terms, spec.down_sizes)), token + down["bias"].astype(wide)[:, None]


@jax.custom_vjp
def _both(a: Array, down: Array, x: Array) -> tuple[Array, Array]:
    """a' x' in x's dtype, which has fewer bits than the kernels, and down' x' in float32, by one product that reads x once.

    `down` is split into two parts of x's dtype, whose sum is known to twice as many bits: a product with x loses nothing that
    matters. Likewise the router's cotangent, so that the gradient of x, too, is written by one product.
    """
    high, low = _parts(down, x.dtype)
    kernel = jnp.concatenate([a.astype(x.dtype), high, low], 1)
    rows = jax.lax.dot_general(kernel, x, (((0,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    terms, by_high, by_low = jax.lax.split(rows, (a.shape[1], *[down.shape[1]] * 2))
    return terms.astype(x.dtype), by_high + by_low


def _both_forward(a: Array, down: Array, x: Array) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    return _both(a, down, x), (a, down, x)


def _both_backward(saved: tuple[Array, Array, Array], cotangents: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    a, down, x = saved
    of_terms, of_token = cotangents
    rows = jnp.concatenate([of_terms, *_parts(of_token, x.dtype)])
    high = down.astype(x.dtype)
    kernel = jnp.concatenate([a.astype(x.dtype), high, high], 1)
    for_x = jax.lax.dot_general(rows, kernel, (((0,), (1,)), ((), ())))
    for_kernel = jax.lax.dot_general(x, rows, (((0,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    for_a, by_high, by_low = jax.lax.split(for_kernel, (a.shape[1], *[down.shape[1]] * 2), 1)
    return for_a.astype(a.dtype), (by_high + by_low).astype(down.dtype), for_x


_both.defvjp(_both_forward, _both_backward)


def _parts(wide: Array, dtype: Any) -> tuple[Array, Array]:
    """Two arrays of `dtype` whose sum is `wide`, nearly."""
    info = jnp.finfo(dtype)
    high = jax.lax.reduce_precision(wide, info.nexp, info.nmant)  # a cast there and back might be optimised away
    return high.astype(dtype), (wide - high).astype(dtype)
