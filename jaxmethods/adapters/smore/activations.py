"""The non-linearities of experts and gates, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

ACTIVATIONS = ("tanh", "relu", "identity", "prelu")
GATE_ACTIVATIONS = ("relu", "tanh", "identity")


def activation(name: str, slope: Array | None = None) -> Callable[[Array], Array]:
    """The function `name`; with a slope, prelu."""
    if slope is not None:
        return lambda x: jnp.where(x > 0, x, slope * x)
    return {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda x: x}[name]


def initial_slope(name: str) -> float:
    """0.1 of "prelu|0.1", and 0.25 of "prelu". Raises ValueError for anything else with a "|"."""
    kind, _, number = name.partition("|")
    try:
        slope = float(number or 0.25)
    except ValueError:
        slope = math.nan
    if kind != "prelu" or not math.isfinite(slope):
        raise ValueError(f'activation={name!r}: only "prelu" takes a number after "|", like "prelu|0.25".')
    return slope
