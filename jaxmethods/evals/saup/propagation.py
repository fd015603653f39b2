"""From uncertainties of steps to one of the trajectory (SAUP, arXiv 2412.01033, section 3.1), and the baselines beside it.

All take [B, N] and a mask that is false at padding, under `jit` and `vmap` too; values at padding may be anything, and have no
gradient.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Steps = Float[Array | np.ndarray, "batch steps"]
Mask = Bool[Array | np.ndarray, "masked real"]

_SMALLEST = 1e-12
"""The least uncertainty that the geometric mean takes: its logarithm is finite."""


def propagate(
    uncertainty: Float[Array | np.ndarray, "batch steps"] | Int[Array | np.ndarray, "batch steps"],
    weight: Float[Array | np.ndarray, "rows columns"] | Int[Array | np.ndarray, "rows columns"],
    mask: Mask | None = None,
) -> Float[Array, "batch"]:
    """U_agent = sqrt((1/N) sum_n (W_n U_n)^2), eq. 1, over the N steps of each trajectory.

    A mean, not a sum: confident steps dilute an uncertain one. Where every weight is 0 so is the result, whatever the uncertainties
    (see `bias` in `saup.weights`).

    Args:
        uncertainty: [B, N], U_n >= 0.
        weight: [B, N], W_n; `jnp.ones_like(uncertainty)` for plain RMS.
        mask: [B, N], true at steps; all are when None.

    Returns:
        [B], float32 (float64 where JAX has that and an argument does).

    Raises:
        ValueError: shapes that differ, a trajectory without steps, a value that is not finite or an uncertainty below 0 where the
            mask is true. Traced arrays are checked for their shapes alone.
    """
    mask = checked("uncertainty", uncertainty, mask, least=0.0)
    if np.shape(weight) != np.shape(uncertainty):
        raise ValueError(f"weight has shape {np.shape(weight)}; it must be {np.shape(uncertainty)}, as uncertainty.")
    checked("weight", weight, mask)
    product = jnp.where(mask, uncertainty, 0.0) * jnp.where(mask, weight, 0.0)
    # The largest step is taken out, so that squares neither overflow nor vanish.
    largest = jax.lax.stop_gradient(jnp.abs(product).max(axis=1, keepdims=True))
    scale = jnp.where(largest > 0, largest, 1.0)
    mean = _over_steps(jnp.square(product / scale), mask)
    some = mean > 0
    return jnp.where(some, scale[:, 0] * jnp.sqrt(jnp.where(some, mean, 1.0)), 0.0)


def arithmetic_mean(uncertainty: Steps, mask: Mask | None = None) -> Float[Array, "batch"]:
    """(1/N) sum_n U_n: "simple propagation" of the paper's table 1.

    Raises:
        ValueError: as `propagate`.
    """
    mask = checked("uncertainty", uncertainty, mask, least=0.0)
    return _over_steps(jnp.where(mask, uncertainty, 0.0), mask)


def geometric_mean(uncertainty: Steps, mask: Mask | None = None) -> Float[Array, "batch"]:
    """exp((1/N) sum_n log U_n), U_n being at least 1e-12.

    Raises:
        ValueError: as `propagate`.
    """
    mask = checked("uncertainty", uncertainty, mask, least=0.0)
    logs = jnp.log(jnp.maximum(jnp.where(mask, uncertainty, 1.0), _SMALLEST))
    return jnp.exp(_over_steps(logs, mask))


def last_step(uncertainty: Steps, mask: Mask | None = None) -> Float[Array, "batch"]:
    """U_N: what methods for single answers see of a trajectory.

    Raises:
        ValueError: as `propagate`.
    """
    mask = checked("uncertainty", uncertainty, mask, least=0.0)
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(jnp.asarray(uncertainty), last[:, None], axis=1)[:, 0]


def _over_steps(values: Float[Array, "batch steps"], mask: Array) -> Float[Array, "batch"]:
    return jnp.where(mask, values, 0.0).sum(axis=1) / jnp.maximum(mask.sum(axis=1), 1)


def checked(name: str, values: Array | np.ndarray, mask: Mask | None = None, *, least: float | None = None) -> Array:
    """The mask of [B, N] (all true when None), if it and the values where it is true are sound.

    Raises:
        ValueError: names the array and the first place that is wrong. Traced arrays are checked for their shapes alone.
    """
    shape = np.shape(values)
    if len(shape) < 2 or not shape[1]:
        raise ValueError(f"{name} has shape {shape}; it must be [trajectories, steps], with one step at least.")
    mask = np.ones(shape[:2], bool) if mask is None else mask
    if np.shape(mask) != shape[:2]:
        raise ValueError(f"mask has shape {np.shape(mask)}; it must be {shape[:2]}, as {name}.")
    if not isinstance(mask, jax.core.Tracer):
        real = np.asarray(mask)
        if not (some := real.any(axis=1)).all():
            raise ValueError(f"trajectory {int(np.argmin(some))} has no step; leave it out.")
        if not isinstance(values, jax.core.Tracer):
            _sound(name, np.asarray(values), real, least)
    return jnp.asarray(mask)


def _sound(name: str, values: np.ndarray, mask: np.ndarray, least: float | None) -> None:
    with np.errstate(invalid="ignore"):
        bad = ~np.isfinite(values) if least is None else ~(np.isfinite(values) & (values >= least))
    bad &= mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    if bad.any():
        row, step, *_ = np.argwhere(bad)[0]
        wanted = "must be finite" if least is None else f"must be finite and at least {least:g}"
        raise ValueError(
            f"{name} of trajectory {row}, step {step} is {values[tuple(np.argwhere(bad)[0])]}; it {wanted}."
        )
