"""InfoNCE as its equation says, holding all logits: what other forms are compared with."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def info_nce(
    queries: Float[Array, "pairs dim"],
    targets: Float[Array, "pairs dim"],
    query_scale: Float[Array, "pairs"],
    target_scale: Float[Array, "pairs"],
    *,
    symmetric: bool,
    axis_name: str | tuple[str, ...] | None,
) -> Float[Array, "pairs"]:
    """See `api.info_nce`; every device gathers all embeddings."""

    def one_way(x: Array, x_scale: Array, y: Array, y_scale: Array) -> Array:
        label = jnp.arange(len(x))
        if axis_name is not None:
            label = label + len(x) * jax.lax.axis_index(axis_name)
            y, y_scale = (jax.lax.all_gather(a, axis_name, tiled=True) for a in (y, y_scale))
        logits = jnp.einsum("nd,md->nm", x, y, preferred_element_type=jnp.float32) * x_scale[:, None] * y_scale
        own = jnp.take_along_axis(logits, label[:, None], axis=1)[:, 0]
        return jax.nn.logsumexp(logits, axis=1) - own

    forth = one_way(queries, query_scale, targets, target_scale)
    return (forth + one_way(targets, target_scale, queries, query_scale)) / 2 if symmetric else forth
