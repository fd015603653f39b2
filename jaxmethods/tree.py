"""Trees of parameters: split by path, join, count; and averages that survive masks and sharding.

>>> params = {"layer": {"kernel": 1.0, "adapter": {"a": 2.0}}}
>>> trained, frozen = partition(params, lambda path: "adapter" in path)
>>> trained, frozen
({'layer': {'adapter': {'a': 2.0}}}, {'layer': {'kernel': 1.0}})
>>> combine(trained, frozen) == params
True
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

Tree = Any
"""A nested dict of arrays (or of shapes, shardings, numbers)."""


class Mean(NamedTuple):
    """An average as its sum and its weight; means over parts of a batch add up to the mean of the batch.

    >>> halves = Mean.of(jnp.array([1.0, 2.0]), jnp.array([True, True])), Mean.of(jnp.array([6.0, 9.0]), jnp.array([True, False]))
    >>> float((halves[0] + halves[1]).value())
    3.0
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]

    @classmethod
    def of(
        cls, values: Num[Array | np.ndarray, "*shape"], where: Bool[Array | np.ndarray, "*shape"] | None = None
    ) -> Mean:
        """The mean of `values` where `where` is true; values elsewhere may be anything, also not finite."""
        values = jnp.asarray(values)
        if where is None:
            return cls(values.sum(dtype=jnp.float32), jnp.float32(values.size))
        kept = jnp.where(where, values, 0)  # `where`, not a product: inf * 0 is nan
        return cls(kept.sum(dtype=jnp.float32), jnp.asarray(where).sum(dtype=jnp.float32))

    def __add__(self, other: Mean) -> Mean:  # type: ignore[override]  # not tuple concatenation
        return Mean(self.total + other.total, self.weight + other.weight)

    def value(self) -> Float[Array, ""]:
        """Sum over weight; 0 when nothing was counted."""
        return self.total / jnp.where(self.weight == 0, 1.0, self.weight)


def flatten(tree: Tree) -> dict[str, Any]:
    """A nested dict as {'a/b/c': leaf}, in the tree's own order.

    >>> flatten({"a": {"b": 1}, "c": 2})
    {'a/b': 1, 'c': 2}
    """
    return dict(_walk(tree, ""))


def _walk(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _walk(value, f"{prefix}{key}/")
    else:
        yield prefix.removesuffix("/"), tree


def unflatten(flat: dict[str, Any]) -> Tree:
    """Undoes `flatten`.

    >>> unflatten({"a/b": 1, "c": 2})
    {'a': {'b': 1}, 'c': 2}
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def partition(tree: Tree, chosen: Callable[[str], bool]) -> tuple[Tree, Tree]:
    """Splits a nested dict into (leaves whose path `chosen` accepts, the rest); `combine` undoes it."""
    flat = flatten(tree)
    return tuple(unflatten({p: x for p, x in flat.items() if chosen(p) == keep}) for keep in (True, False))  # type: ignore[return-value]


def combine(first: Tree, second: Tree) -> Tree:
    """Joins two nested dicts that share no leaf.

    Raises ValueError where both hold a leaf at one path.
    """
    one, two = flatten(first), flatten(second)
    if shared := one.keys() & two.keys():
        raise ValueError(f"both trees hold {sorted(shared)[0]!r}; `combine` joins trees without common leaves.")
    return unflatten(two | one)


def require_one_of(name: str, value: str, known: Sequence[str]) -> None:
    """Raises a ValueError that suggests the nearest of the known values.

    >>> require_one_of("gate", "swich", ("dense", "switch"))
    Traceback (most recent call last):
    ValueError: gate='swich' is unknown; did you mean 'switch'? Known: dense, switch.
    """
    if value not in known:
        near = difflib.get_close_matches(str(value), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name}={value!r} is unknown; {hint}Known: {', '.join(known)}.")


def count(tree: Tree) -> int:
    """How many numbers the leaves hold together (shapes suffice: nothing is read)."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def size_in_bytes(tree: Tree) -> int:
    """How many bytes the leaves take together (shapes and dtypes suffice)."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def cast(tree: Tree, dtype: Any) -> Tree:
    """The floating-point leaves in `dtype`, the others as they are."""
    return jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
