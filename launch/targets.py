"""What runs are planned for and measured against: chips with their published rates, and topologies of chips.

A topology is named as `v5p:8x8x8`, a TPU generation and its chips along each axis, or as `h100:8` or `h100:2x8`, one
node or two of eight GPUs. Its devices are descriptions that the compiler of TPUs or of NVIDIA's GPUs compiles for; none need be
present.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmethods import sharding, tree


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
    network_rate: float | None = None
    """Bytes a second that it sends to other nodes; None where its links reach every other device."""


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
    Chip(r".*\bA100\b.*80GB.*", 312 * _T, 80 * _G, 2039 * _G, 300 * _G, 25 * _G),
    Chip(r".*\bA100\b.*", 312 * _T, 40 * _G, 1555 * _G, 300 * _G, 25 * _G),
    Chip(r".*\bL4\b.*", 121 * _T),
    Chip(r".*\bL40S\b.*", 362 * _T),
    Chip(r".*\bH100 PCIe\b.*", 756 * _T, 80 * _G, 2000 * _G),
    Chip(r".*\b(H100|H200) NVL\b.*", 835 * _T),
    Chip(r".*\bH200\b.*", 989 * _T, 141 * _G, 4800 * _G, 450 * _G, 50 * _G),
    Chip(r".*\b(H100|GH200)\b.*", 989 * _T, 80 * _G, 3350 * _G, 450 * _G, 50 * _G),
    Chip(r".*\bB200\b.*", 2250 * _T, 180 * _G, 8000 * _G, 900 * _G, 50 * _G),
    Chip(r".*\bGB200\b.*", 2500 * _T),
)
"""The first whose `kind` fits is taken.

TPUs: https://docs.cloud.google.com/tpu/docs/v5p and the page of each other generation there; where a chip is two JAX devices
(v2, v3, 7x) a device has half of it; `link_rate` is half of the bidirectional rate (v4: six links of 50 GB/s each way,
https://arxiv.org/abs/2304.01433). v5p was looked up again on 2026-11-25.

NVIDIA: the data sheet of each product; operations "with sparsity" are halved, and so is NVLink's rate, which counts both ways.
`network_rate`: the DGX of each has one adapter a GPU, of 200 Gb/s (A100) or 400 Gb/s. A100 80GB, H100 SXM, H200 and B200 were
held on 2026-11-25 against what such devices say of themselves, as XLA keeps it (`specs/` in openxla/xla): multiprocessors x
operations a clock x clock are 989 T (H100, H200) and 2225 T (B200); memory runs at 2039, 3352, 4800 and 7672 GB/s; 18 links
each; memory of 85, 85, 151 and 192 GB, so that a limit of what the data sheet names leaves room for what CUDA and NCCL take.

Of v2, v3 and 7x, and of NVIDIA's other products, memory and its rate and links have been written down without looking each up
again: check a row before relying on it."""


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


_EXAMPLES = {"v4": "4x4x4", "v5e": "4x4", "v5p": "4x4x4", "v6e": "4x4", "tpu7x": "4x4x4"}


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What NVIDIA's compiler is told of a device, as the device reports it (cudaDeviceProp)."""

    name: str
    capability: int
    """Major number of its compute capability; the minor one is 0."""
    multiprocessors: int
    lanes: int
    """Float32 units of a multiprocessor."""
    shared: int
    """Bytes of shared memory of a multiprocessor; a block may ask for 1 KiB less."""
    l2: int
    memory: int
    memory_rate: float
    clock_ghz: float


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 8, 108, 64, 164 * 2**10, 40 * 2**20, 85_100_068_864, 2.03904e12, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 228 * 2**10, 50 * 2**20, 84_942_979_072, 3.35232e12, 1.98),
    "h200": Gpu("NVIDIA H200", 9, 132, 128, 228 * 2**10, 50 * 2**20, 151_397_597_184, 4.8e12, 1.98),
    "b200": Gpu("NVIDIA B200", 10, 148, 128, 228 * 2**10, 132_644_864, 191_514_411_008, 7.67232e12, 1.965),
}
"""Sizes by capability: the tables of the CUDA C++ Programming Guide. The rest: what XLA's `specs/` say that devices report."""

GENERATIONS = (*_EXAMPLES, *GPUS)


def devices_of(topology: str) -> list[Any]:
    """Descriptions of a TPU slice's devices, or of the GPUs of NVIDIA nodes, to compile for.

    Raises:
        ValueError: not of the form `v5p:8x8x8` or `h100:2x8`, an unknown generation, or a shape that the compiler does not know.
        ImportError: the compiler (libtpu, or JAX's CUDA plugin) is not installed.
    """
    generation, _, shape = topology.partition(":")
    tree.require_one_of("topology", generation, GENERATIONS)
    return _gpus(topology, GPUS[generation], shape) if generation in GPUS else _tpus(topology, generation, shape)


def _gpus(topology: str, gpu: Gpu, shape: str) -> list[Any]:
    if not re.fullmatch(r"([1-9]\d*x)?[1-8]", shape):
        generation = topology.partition(":")[0]
        raise ValueError(
            f"topology {topology!r} needs the GPUs of a node, at most 8, or nodes x GPUs of each, as in {generation}:8 or "
            f"{generation}:2x8."
        )
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or not any(importlib.util.find_spec(f"jax_plugins.xla_cuda{n}") for n in (13, 12)):
        raise ImportError("planning for NVIDIA takes JAX's CUDA plugin: pip install 'jaxmethods[aot-cuda]'.")
    from jax.experimental import topologies

    target = f"""
        gpu_device_info {{
            cuda_compute_capability {{ major: {gpu.capability} }}
            core_count: {gpu.multiprocessors} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock_ghz}
            threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
            block_dim_limit_x: {2**31 - 1} block_dim_limit_y: {2**16 - 1} block_dim_limit_z: {2**16 - 1}
            registers_per_core_limit: {2**16} registers_per_block_limit: {2**16}
            shared_memory_per_block: {48 * 2**10} shared_memory_per_core: {gpu.shared}
            shared_memory_per_block_optin: {gpu.shared - 2**10} l2_cache_size: {gpu.l2}
            device_memory_size: {gpu.memory} memory_bandwidth: {int(gpu.memory_rate)}
        }}
        platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 8 }}
        device_description_str: "{gpu.name}"
    """
    nodes, _, of_each = shape.rpartition("x")
    # XLA's form: groups of nodes that NVLink joins x nodes x devices of each.
    described = topologies.get_topology_desc("", "cuda", target_config=target, topology=f"1x{nodes or 1}x{of_each}")
    return list(described.devices)


def _tpus(topology: str, generation: str, shape: str) -> list[Any]:
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


def compile_for(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """The compiled program, and its text (see `hlo.parse`)."""
    if platform != "tpu":  # of CPUs and GPUs jaxlib itself holds the program
        compiled = lowered.compile()
        return compiled, str(compiled.as_text())
    # libtpu's programs may hold operations that this jaxlib cannot read back, so that it is libtpu who writes the text.
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        largest = max(Path(folder).glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
        return compiled, largest.read_text()


def compile_on_one(topology: str, function: Callable[..., Any], *shapes: Any) -> tuple[jax.stages.Compiled, str]:
    """`function` compiled for one device of a topology, and the program's text.

    Args:
        shapes: its arguments: arrays or ShapeDtypeStructs, in trees.

    Raises:
        ValueError, ImportError: as `devices_of` does.
    """
    device = devices_of(topology)[0]
    mesh = sharding.make_mesh({"data": 1}, [device])
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding.replicated(mesh))
    with jax.set_mesh(mesh):  # by which a kernel is told its target
        lowered = jax.jit(function).lower(*jax.tree.map(place, shapes))
    return compile_for(lowered, device.platform)
