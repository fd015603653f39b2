"""For which device is compiled, where it is one, which the caller need not name: there TPU kernels may run.

A kernel cannot be split by `jax.jit`, so that it stands either on a machine with one device or inside a `jax.shard_map` over all
mesh axes, where each device computes on its own.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax

VMEM = 44 << 20
"""Bytes that the blocks of one kernel may take on the chip; the least of v5e, v5p, v6e and 7x has 64 MiB."""
VMEM_LIMIT = 60 << 20
"""Bytes that the compiler may use: blocks, and what it keeps of a tile's intermediate values."""
_WITH_ROOM = r"TPU (v5|v6)|TPU7x"
"""Generations with that much; v4 and older have 16 MiB."""


def one_device() -> Any | None:
    """The device on which what is traced now will run alone, with its `device_kind`; None where several may share it.

    Inside a `shard_map` the mesh says for which device is compiled, which need not be present. Without a mesh the process'
    only device is meant.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh.abstract_device if mesh.are_all_axes_manual or mesh.size == 1 else None
    return jax.devices()[0] if jax.device_count() == 1 else None


def on_one_tpu() -> bool:
    """Whether that is a TPU with enough VMEM, as far as can be seen; False if in doubt."""
    device = one_device()
    return device is not None and bool(re.match(_WITH_ROOM, device.device_kind))


def on_one_gpu() -> bool:
    """Whether that is one of NVIDIA's GPUs; False if in doubt."""
    device = one_device()
    return device is not None and device.device_kind.startswith("NVIDIA")


def compiled_or_interpreted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, or where it is compiled for a CPU (whatever the host is) its interpreted form, `kernel(..., interpret=True)`."""
    interpreted = functools.partial(kernel, interpret=True)
    return lambda *arrays: jax.lax.platform_dependent(*arrays, cpu=interpreted, default=kernel)
