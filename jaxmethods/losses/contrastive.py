"""Contrastive losses of embeddings.

>>> x = jnp.eye(3)
>>> info_nce(x, x, temperature=0.01).item() < 1e-6  # each query is nearest to its own target
True
>>> sigmoid_loss(x, x, scale=20.0, bias=-10.0).item() < 1e-3
True
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods import kernels
from jaxmethods.kernels.manual_axes import varying_axes

LEAST_NORM = 1e-12
"""An embedding shorter than this has no direction: its cosines are 0, and it gets no gradient."""
LOGITS = 1 << 21
"""How many logits `sigmoid_loss` holds at once, about."""


def info_nce(
    queries: Float[Array | np.ndarray, "pairs dim"],
    targets: Float[Array | np.ndarray, "targets width"],
    *,
    temperature: float | Float[Array | np.ndarray, ""],
    symmetric: bool = True,
    axis_name: str | tuple[str, ...] | None = None,
    negatives: Float[Array | np.ndarray, "*negatives size"] | None = None,
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
        negatives: [N, K, D] or [M, D]: more targets that belong to no query, and that every query chooses among; the order
            does not matter. Targets do not choose among them. Over devices they are split like the pairs, or are the same
            everywhere; each device gathers them all.

    Raises:
        ValueError: queries and targets of different shapes, negatives that do not fit them, fewer than two pairs in all without
            negatives, a number <= 0 as temperature, or an embedding without length (where values are known: not under `jax.jit`).
    """
    if isinstance(temperature, int | float) and temperature <= 0:
        raise ValueError(f"{temperature=} must be positive.")
    queries, targets = _pairs(queries, targets)
    pairs = len(queries) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    if pairs == 1 and negatives is None:
        raise ValueError(
            "a contrastive loss needs at least two pairs: the other targets are a query's negatives. "
            "Give a larger batch, or `negatives`."
        )
    query_scale, target_scale = _inverse_norm(queries) / temperature, _inverse_norm(targets)
    forth, back = (queries, targets, query_scale, target_scale), (targets, queries, target_scale, query_scale)
    if negatives is None:
        losses = kernels.info_nce(*forth, symmetric=symmetric, axis_name=axis_name)
    else:
        more = _everywhere(_unit(_negatives(negatives, queries)), axis_name)
        scaled = queries.astype(jnp.float32) * query_scale[:, None]
        own = jnp.einsum("nd,nd->n", scaled, targets.astype(jnp.float32)) * target_scale
        lse = kernels.token_statistics(scaled, more, jnp.zeros(len(queries), jnp.int32), transposed=True).logsumexp
        # A pair's loss is lse(its logits) - own; with more logits lse is logaddexp(lse, lse of those).
        assert lse is not None
        losses = jnp.logaddexp(kernels.info_nce(*forth, symmetric=False, axis_name=axis_name), lse - own)
        if symmetric:
            losses = (losses + kernels.info_nce(*back, symmetric=False, axis_name=axis_name)) / 2
    total = losses.sum()
    return (total if axis_name is None else jax.lax.psum(total, axis_name)) / pairs


def sigmoid_loss(
    queries: Float[Array | np.ndarray, "pairs dim"],
    targets: Float[Array | np.ndarray, "targets width"],
    *,
    scale: float | Float[Array | np.ndarray, ""],
    bias: float | Float[Array | np.ndarray, ""],
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """-1/N sum_ij log sigmoid(y_ij (scale cos(query_i, target_j) + bias)), y_ij = 1 where i = j, else -1.

    SigLIP's loss (https://arxiv.org/abs/2303.15343, section 3.2; it starts from scale 10 and bias -10, and learns both). float32.
    Never holds [pairs, pairs]: blocks of queries, each computed again in the backward pass.

    Args:
        queries, targets: [N, D], of any length; row i of both is one pair.
        scale, bias: arrays may be traced, and get gradients; the scale is positive.
        axis_name: as in `info_nce`; each device gathers all targets.

    Raises:
        ValueError: queries and targets of different shapes, no rows, a number <= 0 as scale, or an embedding without length
            (where values are known).
    """
    if isinstance(scale, int | float) and scale <= 0:
        raise ValueError(f"{scale=} must be positive.")
    queries, targets = _pairs(queries, targets)
    columns, place = _unit(targets), jnp.arange(len(queries))
    if axis_name is not None:
        columns = jax.lax.all_gather(columns, axis_name, tiled=True)
        place += len(queries) * jax.lax.axis_index(axis_name)

    def of_query(row: tuple[Array, Array]) -> Array:
        query, own = row
        logits = scale * (columns @ query) + bias
        return jax.nn.softplus(jnp.where(jnp.arange(len(columns)) == own, -logits, logits)).sum()

    rows = _unit(queries), place
    block = min(max(LOGITS // len(columns), 1), len(queries))
    total = jax.lax.map(jax.checkpoint(of_query, prevent_cse=False), rows, batch_size=block).sum()
    return (total if axis_name is None else jax.lax.psum(total, axis_name)) / len(columns)


def gather_without_gradient(
    embeddings: Float[Array, "rows dim"], axis_name: str | tuple[str, ...]
) -> Float[Array, "all dim"]:
    """The rows of all devices of a mesh axis, of which only this device's own carry a gradient; inside `jax.shard_map`.

    So the released code of CAFe, E5-V and LamRA gathers. With its results every device computes the whole loss,

        v, t = gather_without_gradient(v, "data"), gather_without_gradient(t, "data")
        loss = jax.lax.pmean(info_nce(v, t, temperature=0.05), "data")

    and averaging over W devices then gives 1 / W of the gradient, as each device contributes the part of its own rows. So an
    official run with weight w on W devices is one with w / W here (`info_nce` with `axis_name` gives the whole gradient). Next to
    another loss the factor matters.
    """
    everywhere = jax.lax.all_gather(jax.lax.stop_gradient(embeddings), axis_name, tiled=True)
    start = len(embeddings) * jax.lax.axis_index(axis_name)
    return jax.lax.dynamic_update_slice_in_dim(everywhere, embeddings, start, axis=0)


def _pairs(queries: Any, targets: Any) -> tuple[Array, Array]:
    """Both as arrays, checked."""
    if queries.shape != targets.shape:
        raise ValueError(
            f"queries have shape {tuple(queries.shape)} and targets {tuple(targets.shape)}; row i of both is one pair."
        )
    if not len(queries):
        raise ValueError("there are no pairs; give at least two rows of queries and targets.")
    return _with_length("queries", queries), _with_length("targets", targets)


def _negatives(negatives: Any, queries: Array) -> Float[Array, "rows dim"]:
    pairs, dim = queries.shape
    per_query = negatives.ndim == 3 and len(negatives) == pairs
    if (negatives.ndim != 2 and not per_query) or negatives.shape[-1] != dim:
        raise ValueError(
            f"negatives have shape {tuple(negatives.shape)}; for {pairs} queries of width {dim} give "
            f"[{pairs}, K, {dim}] or [M, {dim}]."
        )
    if not negatives.size:
        raise ValueError("negatives have no rows; give None for none.")
    return _with_length("negatives", negatives.reshape(-1, dim))


def _with_length(name: str, embeddings: Any) -> Array:
    """The embeddings; a ValueError where one is known to be 0, as only a broken encoder gives it."""
    if not isinstance(embeddings, jax.core.Tracer):
        with jax.ensure_compile_time_eval():  # constants have values inside of `jax.jit` too
            short = np.asarray(_squares(embeddings) < LEAST_NORM**2)
        if short.any():
            raise ValueError(
                f"row {short.argmax()} of {name} has length 0 and so no direction; leave it out, or look for what made it 0 "
                "(pooling without a single token does)."
            )
    return jnp.asarray(embeddings)


def _squares(x: Float[Array | np.ndarray, "rows dim"]) -> Float[Array, "rows"]:
    return jnp.square(jnp.asarray(x, jnp.float32)).sum(axis=1)


def _inverse_norm(x: Float[Array, "rows dim"]) -> Float[Array, "rows"]:
    """1 / length; 0 for a row without one, whose gradient would else be of order 1 / LEAST_NORM."""
    squares = _squares(x)
    return jnp.where(squares < LEAST_NORM**2, 0.0, jax.lax.rsqrt(jnp.maximum(squares, LEAST_NORM**2)))


def _unit(x: Float[Array, "rows dim"]) -> Float[Array, "rows dim"]:
    return x.astype(jnp.float32) * _inverse_norm(x)[:, None]


def _everywhere(x: Float[Array, "rows dim"], axis_name: str | tuple[str, ...] | None) -> Float[Array, "all dim"]:
    """The rows of all devices; as they are where they are the same on each."""
    names = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    split = tuple(name for name in names if name in varying_axes(x))
    return jax.lax.all_gather(x, split, tiled=True) if split else x
