"""Loops inside `jax.shard_map`: their carries must say from the start over which mesh axes they vary.

Under `check_vma` (the default) every array has a set of mesh axes over which it varies, and a loop's carry may not gain
one on the way. Outside of `shard_map` these functions return what they are given.
"""

from typing import Any

import jax


def varying_axes(*trees: Any) -> frozenset[str]:
    """The mesh axes over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(trees)))


def vary(tree: Any, axes: frozenset[str]) -> Any:
    """The arrays, marked as varying over all of `axes`; the transpose sums cotangents over the axes that were added."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - varying_axes(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
