"""The contrastive loss of pairs, each against all others of the batch, without ever holding [pairs, pairs].

>>> same = jnp.ones((4, 3))
>>> info_nce(same, same, jnp.ones(4), jnp.ones(4)).round(3).tolist()  # log(4)
[1.3860000371932983, 1.3860000371932983, 1.3860000371932983, 1.3860000371932983]
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods.kernels.info_nce import reference, xla

IMPLEMENTATIONS = {"xla": xla.info_nce, "reference": reference.info_nce}


def info_nce(
    queries: Float[Array | np.ndarray, "pairs dim"],
    targets: Float[Array | np.ndarray, "targets width"],
    query_scale: Float[Array | np.ndarray, "pairs"],
    target_scale: Float[Array | np.ndarray, "targets"],
    *,
    symmetric: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    implementation: str | None = None,
) -> Float[Array, "pairs"]:
    """InfoNCE of each pair, float32: -log softmax_j(z_ij)[i], or the mean of that and of -log softmax_i(z_ij)[j].

    The logits are z_ij = query_scale_i target_scale_j <queries_i, targets_j>, float32; the inner product is in the inputs'
    dtype with float32 sums. Scales carry whatever norm and temperature embeddings have (`jaxmethods.losses.info_nce`), so that no
    normalised copy of them is kept. Differentiable once, in reverse mode, in the four arrays. N pairs of width D cost 2NND
    operations, and 8NND in training: the backward pass computes the logits again.

    Args:
        symmetric: targets choose among queries too, with weight 1/2 each; else queries among targets only.
        axis_name: inside `jax.shard_map` (with `check_vma`, its default), the mesh axis or axes over which the pairs are split.
            Values and gradients are those of the whole batch.
        implementation: "xla" (blocks; over devices a ring) or "reference" (holds all logits); None means "xla".

    Raises:
        ValueError: queries and targets of different shapes, or an unknown implementation.
    """
    if queries.shape != targets.shape:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and targets {tuple(targets.shape)}; row i of both is one pair."
        )
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")
    arrays = (jnp.asarray(x) for x in (queries, targets, query_scale, target_scale))
    return IMPLEMENTATIONS[implementation or "xla"](*arrays, symmetric=symmetric, axis_name=axis_name)
