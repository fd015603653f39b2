"""Contrastive losses of embeddings.

>>> x = jnp.eye(3)
>>> info_nce(x, x, temperature=0.01).item() < 1e-6  # each query is nearest to its own target
True
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods import kernels

LEAST_NORM = 1e-12
"""An embedding shorter than this is divided by this."""


def info_nce(
    queries: Float[Array | np.ndarray, "pairs dim"],
    targets: Float[Array | np.ndarray, "targets width"],
    *,
    temperature: float | Float[Array | np.ndarray, ""],
    symmetric: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """Mean over pairs i of -log softmax_j(cos(query_i, target_j) / temperature)[i]; of both directions where `symmetric`.

    One direction is eq. 4 of https://arxiv.org/abs/1807.03748 with cosines, the half sum of both is CLIP's loss
    (https://arxiv.org/abs/2103.00020, figure 3). float32. Never holds [pairs, pairs]; differentiable once, in reverse mode,
    in embeddings and temperature.

    Args:
        queries: [N, D], of any length: they are normalised here.
        targets: [N, D]; row i belongs to query i, all other rows are its negatives.
        temperature: divides cosines; positive. An array may be traced, and gets a gradient.
        axis_name: inside `jax.shard_map` (with `check_vma`, its default), the mesh axis or axes over which the rows are
            split, equally many on each device. Value and gradients are those of the whole batch.

    Raises:
        ValueError: queries and targets of different shapes, no rows, or a number <= 0 as temperature.
    """
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"{temperature=} must be positive.")
    if not len(queries):
        raise ValueError("there are no pairs; give at least one row of queries and targets.")
    queries, targets = jnp.asarray(queries), jnp.asarray(targets)
    scales = _inverse_norm(queries) / temperature, _inverse_norm(targets)
    total = kernels.info_nce(queries, targets, *scales, symmetric=symmetric, axis_name=axis_name).sum()
    if axis_name is None:
        return total / len(queries)
    return jax.lax.psum(total, axis_name) / (len(queries) * jax.lax.axis_size(axis_name))


def _inverse_norm(x: Float[Array, "pairs dim"]) -> Float[Array, "pairs"]:
    return jax.lax.rsqrt(jnp.maximum(jnp.square(x.astype(jnp.float32)).sum(axis=1), LEAST_NORM**2))
