"""Small trained heads on frozen features: a linear layer, or one hidden layer before it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from jaxmethods import tree
from jaxmethods.tree import Tree

LEAST_SPREAD = 1e-6
"""A feature whose standard deviation is below this share of the largest is taken as constant, and read as 0."""


def init(key: Array, d_in: int, width: int, hidden: int | None = None) -> Tree:
    """{"first": {"kernel", "bias"}, "last": ...}, or "last" alone without a hidden layer. Kernels are of spread d_in ** -0.5."""
    shapes = {"last": (d_in, width)} if hidden is None else {"first": (d_in, hidden), "last": (hidden, width)}
    keys = jax.random.split(key, len(shapes))
    return {
        name: {"kernel": jax.random.normal(of, shape) * shape[0] ** -0.5, "bias": jnp.zeros(shape[1])}
        for of, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def apply(params: Tree, features: Float[Array | np.ndarray, "rows d_in"]) -> Float[Array, "rows width"]:
    """The head of each row, float32; GELU after the hidden layer, where there is one."""
    x = jnp.asarray(features).astype(jnp.float32)
    if "first" in params:
        x = jax.nn.gelu(x @ params["first"]["kernel"] + params["first"]["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


def moments(features: Float[Array | np.ndarray, "rows d_in"]) -> tuple[Float[Array, "d_in"], Float[Array, "d_in"]]:
    """(mean, 1 / standard deviation) of each feature; 0 for one that does not vary."""
    x = jnp.asarray(features).astype(jnp.float32)
    mean, spread = x.mean(axis=0), x.std(axis=0)
    varies = spread > LEAST_SPREAD * jnp.maximum(spread.max(), LEAST_SPREAD)
    return mean, jnp.where(varies, 1 / jnp.where(varies, spread, 1.0), 0.0)


def fold(params: Tree, mean: Float[Array, "d_in"], inverse: Float[Array, "d_in"]) -> Tree:
    """The head that does to features what `params` does to (features - mean) x inverse."""
    name = "first" if "first" in params else "last"
    kernel = params[name]["kernel"] * inverse[:, None]
    return params | {name: {"kernel": kernel, "bias": params[name]["bias"] - mean @ kernel}}


def write(path: Any, params: Tree, kind: str) -> None:
    """Writes the leaves by their paths into one safetensors file."""
    flat = {name: np.ascontiguousarray(x, np.float32) for name, x in tree.flatten(params).items()}
    epath.Path(path).write_bytes(serialise(flat, metadata={"kind": kind}))


def read(path: Any, kind: str, names: tuple[frozenset[str], ...]) -> Tree:
    """The leaves that `write` wrote, float32.

    Args:
        names: the sets of paths that such a file may hold.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be read, or holds something else.
    """
    file = epath.Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path}: there is no such file; give one that a {kind}'s save() wrote.")
    try:
        flat = parse(file.read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read as safetensors ({error}); copy it again.") from error
    if frozenset(flat) not in names:
        found = ", ".join(sorted(flat)[:4]) or "nothing"
        raise ValueError(f"{path} is no {kind}: it holds {found}; give a file that a {kind}'s save() wrote.")
    return tree.unflatten({name: jnp.asarray(x, jnp.float32) for name, x in flat.items()})
