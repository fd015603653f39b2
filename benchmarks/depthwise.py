"""EfficientNet-Lite0's depthwise convolutions on the CPU: shifted products (what the tower computes) and XLA's convolution.

    python benchmarks/depthwise.py

All layers of the network, each on random numbers of its own shape; seconds of a call, the least of several, after one that is not
counted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import processes
import tyro

from jaxmethods.models import efficientnet


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    images: int = 8
    """In a batch."""
    size: int = 224
    """Pixels a side."""
    calls: int = 5
    """Timed calls of each layer."""


def main() -> None:
    o = tyro.cli(Options)
    forms = {"shifted products": efficientnet.depthwise, "jax.lax.conv_general_dilated": convolution}
    seconds = dict.fromkeys(forms, 0.0)
    side = o.size // 2  # what the stem leaves
    for block in efficientnet.BLOCKS:
        shape = (o.images, side, side, block.expansion * block.d_in)
        x = jax.random.normal(jax.random.key(0), shape)
        kernel = jax.random.normal(jax.random.key(1), (block.size, block.size, 1, shape[-1]))
        for name, form in forms.items():
            seconds[name] += least(jax.jit(form, static_argnums=2), o.calls, x, kernel, block.stride)
        side = -(-side // block.stride)
    print(
        f"{processes.cpu()}, jax {jax.__version__}: {len(efficientnet.BLOCKS)} layers, {o.images} images of {o.size} pixels"
    )
    first = seconds["shifted products"]
    for name, taken in seconds.items():
        print(f"{name}: {taken:.3f} s, {taken / first:.1f} times")


def convolution(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[-1]
    )


def least(function: Callable[..., jax.Array], calls: int, *arguments: Any) -> float:
    function(*arguments).block_until_ready()
    found = []
    for _ in range(calls):
        start = time.perf_counter()
        function(*arguments).block_until_ready()
        found.append(time.perf_counter() - start)
    return min(found)


if __name__ == "__main__":
    main()
