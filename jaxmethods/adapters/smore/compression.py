"""The first product of each token: with A of every expert, and with the router's down-projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxmethods.adapters.smore.leaves import Params
from jaxmethods.adapters.smore.spec import Spec


def compress(params: Params, x: Array, spec: Spec) -> tuple[list[Array], Array]:
    """A x + a of each pool's experts, [s_l r_l, tokens], in x's dtype; x_down [router_dim, tokens] in float32."""
    a, down = params["experts"]["a"], params["router"]["down"]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype == wide:  # one product reads x once
        kernel, bias = (jnp.concatenate([p[n].astype(wide) for p in (a, down)], -1) for n in ("kernel", "bias"))
        terms = jnp.einsum("dc,nd->cn", kernel, x) + bias[:, None]
        *own, token = jax.lax.split(terms, (*spec.down_sizes, spec.router_dim))
        return own, token
    terms = jnp.einsum("dc,nd->cn", a["kernel"].astype(x.dtype), x) + a["bias"].astype(x.dtype)[:, None]
    # Three bfloat16 passes lose nothing that matters of a product with a bfloat16 x.
    token = jnp.einsum("dc,nd->cn", down["kernel"].astype(wide), x.astype(wide), precision=jax.lax.Precision.HIGH)
    return list(jax.lax.split(terms, spec.down_sizes)), token + down["bias"].astype(wide)[:, None]
