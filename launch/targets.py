"""What runs are planned for and measured against: chips with their published rates, and topologies of chips.

A topology is named as `v5p:8x8x8`: generation, then chips along each axis. Its devices are descriptions that the TPU
compiler compiles for; none need be present.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmethods import tree


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published rates of one JAX device."""

    kind: str
    """Regex of its `device_kind`."""
    flops: float
    """Dense bfloat16 operations a second."""
    memory: float | None = None
    """Bytes of HBM."""
    memory_rate: float | None = None
    """Bytes a second from and to HBM."""
    link_rate: float | None = None
    """Bytes a second that it sends to its neighbours, over all links; it receives as many."""


_G, _T, _GIB = 1e9, 1e12, 2**30
CHIPS = (
    Chip(r"TPU v2", 46 * _T / 2, 8 * _GIB, 700 * _G / 2),
    Chip(r"TPU v3", 123 * _T / 2, 16 * _GIB, 900 * _G / 2),
    Chip(r"TPU v4", 275 * _T, 32 * _GIB, 1200 * _G, 300 * _G),
    Chip(r"TPU v5 lite|TPU v5e", 197 * _T, 16 * _GIB, 800 * _G, 200 * _G),
    Chip(r"TPU v5|TPU v5p", 459 * _T, 95 * _GIB, 2765 * _G, 600 * _G),
    Chip(r"TPU v6 lite|TPU v6e", 918 * _T, 32 * _GIB, 1600 * _G, 400 * _G),
    Chip(r"TPU7x", 2307 * _T / 2, 96 * _GIB, 7380 * _G / 2, 600 * _G / 2),
    Chip(r".*\bV100-SXM.*", 125 * _T),  # float16: Volta has no bfloat16
    Chip(r".*\bT4\b.*", 65 * _T),  # float16: Turing has no bfloat16
    Chip(r".*\bA10\b.*", 125 * _T),
    Chip(r".*\bA100\b.*80GB.*", 312 * _T, 80 * _G, 2039 * _G, 300 * _G),
    Chip(r".*\bA100\b.*", 312 * _T, 40 * _G, 1555 * _G, 300 * _G),
    Chip(r".*\bL4\b.*", 121 * _T),
    Chip(r".*\bL40S\b.*", 362 * _T),
    Chip(r".*\bH100 PCIe\b.*", 756 * _T, 80 * _G, 2000 * _G),
    Chip(r".*\b(H100|H200) NVL\b.*", 835 * _T),
    Chip(r".*\bH200\b.*", 989 * _T, 141 * _G, 4800 * _G, 450 * _G),
    Chip(r".*\b(H100|GH200)\b.*", 989 * _T, 80 * _G, 3350 * _G, 450 * _G),
    Chip(r".*\bB200\b.*", 2250 * _T, 180 * _G, 8000 * _G, 900 * _G),
    Chip(r".*\bGB200\b.*", 2500 * _T),
)
"""The first whose `kind` fits is taken. TPUs: https://docs.cloud.google.com/tpu/docs/v5p and the page of each other generation
there; where a chip is two JAX devices (v2, v3, 7x) a device has half of it; `link_rate` is half of the bidirectional rate (v4:
six links of 50 GB/s each way, https://arxiv.org/abs/2304.01433). NVIDIA: the data sheet of each product; operations "with
sparsity" are halved, and so is NVLink's rate, which counts both ways. Of v2, v3 and 7x, and of NVIDIA's products, memory and its
rate and links have been written down without looking each up again: check a row before relying on it."""


def chip_of(device: jax.Device | str) -> Chip | None:
    """The published rates of a device, given as such or as its `device_kind`.

    None for a CPU, for a slice of a GPU (MIG), and for whatever else has no entry in the table.
    """
    kind = device if isinstance(device, str) else device.device_kind
    if re.search(r"\bMIG\b", kind):
        return None
    return next((chip for chip in CHIPS if re.fullmatch(chip.kind, kind)), None)


def peak_flops(device: jax.Device | str) -> float | None:
    """Published dense bfloat16 operations a second of a device; None where `chip_of` knows none.

    >>> peak_flops("TPU v5 lite") / 1e12
    197.0
    """
    chip = chip_of(device)
    return None if chip is None else chip.flops


def mfu(flops_per_step: float | int, seconds: float | int, devices: Sequence[jax.Device | str]) -> float | None:
    """The share of the devices' summed peak that a step of `seconds` reaches; None where a peak is not known.

    `flops_per_step` counts all devices together, as `cost.count` does.
    """
    peaks = [peak_flops(device) for device in devices]
    if not peaks or None in peaks:
        return None
    return flops_per_step / (seconds * sum(peak for peak in peaks if peak is not None))


GENERATIONS = ("v4", "v5e", "v5p", "v6e", "tpu7x")


def devices_of(topology: str) -> list[Any]:
    """Descriptions of a TPU slice's devices, to compile for.

    Raises:
        ValueError: not of the form `v5p:8x8x8`, an unknown generation, or a shape that the compiler does not know.
        ImportError: libtpu, which holds the compiler, is not installed.
    """
    generation, _, shape = topology.partition(":")
    tree.require_one_of("topology", generation, GENERATIONS)
    if not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise ValueError(
            f"topology {topology!r} needs chips along each axis, as in {generation}:{_EXAMPLES[generation]}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError("planning for a TPU takes its compiler, libtpu: pip install 'jaxmethods[aot]'.")
    from jax.experimental import topologies

    # No TPU is here to be asked: libtpu is kept from looking for one, from warning that it found none, and from its lock.
    absent = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-4"}
    for name, value in (absent | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}).items():
        os.environ.setdefault(name, value)
    sizes = [int(size) for size in shape.split("x")]
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device, as on a real v4
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"the TPU compiler knows no topology {topology!r} ({' '.join(str(error).split())[:120]}); "
            f"try {generation}:{_EXAMPLES[generation]}."
        ) from error


_EXAMPLES = {"v4": "4x4x4", "v5e": "4x4", "v5p": "4x4x4", "v6e": "4x4", "tpu7x": "4x4x4"}


def compile_for(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and its text (see `hlo.parse`)."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, str(compiled.as_text())
    # libtpu's programs may hold operations that this jaxlib cannot read back, so that it is libtpu who writes the text.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        largest = max(Path(folder).glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
        return compiled, largest.read_text()
