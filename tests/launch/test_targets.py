"""Chips and topologies; the compilers of TPUs and NVIDIA's GPUs where they are installed (jaxmethods[aot], [aot-cuda])."""

import dataclasses
import importlib.util

import jax
import pytest

from jaxmethods.launch import cost, hlo, targets
from tests.compiler import needs_compiler, needs_cuda_compiler


def test_peaks_belong_to_one_device():
    assert targets.peak_flops("TPU v5 lite") == 197e12
    assert targets.peak_flops("TPU v5") == targets.peak_flops("TPU v5p") == 459e12
    assert targets.peak_flops("TPU v6 lite") == 918e12
    assert targets.peak_flops("TPU7x") == 2307e12 / 2  # a chip is two devices
    assert targets.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert targets.peak_flops("NVIDIA H100 80GB HBM3") == targets.peak_flops("NVIDIA H200") == 989e12
    assert targets.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert targets.peak_flops("NVIDIA H200 NVL") == 835e12
    assert targets.peak_flops("NVIDIA B200") == 2250e12
    assert targets.peak_flops("NVIDIA GB200") == 2500e12
    assert targets.peak_flops("NVIDIA L4") == 121e12
    assert targets.peak_flops("Tesla T4") == 65e12


@pytest.mark.parametrize("kind", ["cpu", "NVIDIA H20", "NVIDIA A10G", "TPU v9", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""])
def test_a_device_of_unknown_peak_has_none(kind):
    assert targets.peak_flops(kind) is None
    assert targets.mfu(1e12, 1.0, ["NVIDIA H200", kind]) is None


def test_utilisation_is_the_share_of_all_devices():
    assert targets.mfu(989e12, 2.0, ["NVIDIA H200"]) == 0.5
    assert targets.mfu(989e12, 2.0, ["NVIDIA H200", "NVIDIA H100 80GB HBM3"]) == 0.25
    assert targets.peak_flops(jax.devices()[0]) is None
    assert targets.mfu(1e12, 1.0, jax.devices()) is None
    assert targets.mfu(1e12, 1.0, []) is None


def test_published_rates_are_in_proportion():
    """A slip of a factor of 1000 or 8 in the table would fall outside."""
    for chip in targets.CHIPS:
        if chip.memory_rate and chip.memory:
            assert 50 < chip.flops / chip.memory_rate < 700, chip  # operations a byte
            assert 0.01 < chip.memory / chip.memory_rate < 0.05, chip  # seconds to read all of it
        if chip.link_rate and chip.memory_rate:
            assert 3 < chip.memory_rate / chip.link_rate < 15, chip


@pytest.mark.parametrize(
    ("topology", "says"),
    [
        ("v9:2x2", "'v9' is unknown"),
        ("v5p", "chips along each axis"),
        ("v5p:8", "as in v5p:4x4x4"),
        ("v5e:ax2", "as in v5e:4x4"),
        ("h100", "as in h100:8 or h100:2x8"),
        ("h100:16", "at most 8"),
        ("b200:0x8", "as in b200:8 or b200:2x8"),
    ],
)
def test_a_topology_that_is_none_is_refused(topology, says):
    with pytest.raises(ValueError, match=says):
        targets.devices_of(topology)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"jaxmethods\[aot\]"):
        targets.devices_of("v5p:2x2x1")
    with pytest.raises(ImportError, match=r"jaxmethods\[aot-cuda\]"):
        targets.devices_of("h100:8")


def test_what_the_compiler_is_told_of_a_gpu_agrees_with_the_published_rates():
    for gpu in targets.GPUS.values():
        chip = targets.chip_of(gpu.name)
        assert chip.memory <= gpu.memory < 1.08 * chip.memory  # what CUDA and NCCL take is between the two
        assert gpu.memory_rate == pytest.approx(chip.memory_rate, rel=0.05)
        # Four matrix units in a multiprocessor, of 256, 512 and 1024 fused operations a clock; they run at most at its clock.
        each = {8: 256, 9: 512, 10: 1024}[gpu.capability]
        peak = 2 * 4 * each * gpu.multiprocessors * gpu.clock_ghz * 1e9
        assert chip.flops <= 1.01 * peak and peak < 1.1 * chip.flops


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "devices"),
    [
        ("v4:4x4x4", 64),
        ("v5e:1x1", 1),
        ("v5e:16x16", 256),
        ("v5p:8x8x8", 512),
        ("v6e:16x16", 256),
        ("tpu7x:4x4x4", 128),
    ],
)
def test_slices_have_their_devices_and_rates(topology, devices):
    found = targets.devices_of(topology)
    assert len(found) == devices and found[0].platform == "tpu"
    assert dataclasses.astuple(targets.chip_of(found[0])).count(None) == 1  # a slice's links reach every chip


@needs_compiler
def test_a_shape_that_no_slice_has_is_refused():
    with pytest.raises(ValueError, match="knows no topology 'v5p:7x9x11'"):
        targets.devices_of("v5p:7x9x11")


@needs_cuda_compiler
@pytest.mark.parametrize(
    ("topology", "nodes", "of_each"), [("a100:8", 1, 8), ("h100:1", 1, 1), ("h200:4", 1, 4), ("b200:2x8", 2, 8)]
)
def test_nodes_have_their_gpus_and_rates(topology, nodes, of_each):
    found = targets.devices_of(topology)
    assert [device.process_index for device in found] == [node for node in range(nodes) for _ in range(of_each)]
    assert found[0].platform == "gpu"
    assert dataclasses.astuple(targets.chip_of(found[0])).count(None) == 0


@needs_cuda_compiler
@pytest.mark.slow
def test_a_program_for_gpus_has_its_collectives_and_memory():
    """A row-split product: x [64, 512] over eight devices, w [512, 256] gathered from its eighths, 32 KiB each."""
    mesh = jax.sharding.Mesh(targets.devices_of("h100:8"), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    shapes = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=split) for shape in ((64, 512), (512, 256))]
    lowered = jax.jit(lambda x, w: jax.numpy.tanh(x @ w), out_shardings=split).lower(*shapes)
    compiled, text = targets.compile_for(lowered, "gpu")
    (found,) = hlo.collectives(hlo.parse(text), 8)
    assert (found.kind, found.group, found.times, found.bytes) == ("all-gather", 8, 1, 512 * 256 * 2)
    memory = cost.memory(compiled)
    assert memory["arguments"] == (64 * 512 + 512 * 256) * 2 // 8 and memory["outputs"] == 64 * 256 * 2 // 8
    assert memory["temporaries"] >= 512 * 256 * 2  # where w is gathered
