"""What a run is, before it runs: for eight devices here, and for TPU slices where their compiler is installed."""

import dataclasses
import json

import jax
import pytest

from jaxmethods import adapters, sharding
from jaxmethods.launch import cli, config, hlo, plan, targets
from tests.compiler import needs_compiler, needs_cuda_compiler


@pytest.fixture
def recipe(shop):
    return str(shop / "recipe.py")


def run_of(recipe, *arguments):
    return cli._run_of("plan", [recipe, *arguments])


def test_a_mesh_is_given_in_one_word(recipe):
    assert run_of(recipe, "--mesh", "data=2,fsdp=2,tensor=2").mesh == config.Mesh(2, 2, 2)
    assert run_of(recipe, "--mesh=tensor=4").mesh == config.Mesh(1, -1, 4)
    for wrong in ("model=2", "data", "data=x"):
        with pytest.raises(ValueError, match="is not AXIS=SIZE; the axes are data, fsdp, tensor, sequence"):
            run_of(recipe, "--mesh", wrong)
    with pytest.raises(ValueError, match="--mesh needs a value"):
        run_of(recipe, "--mesh", "--json")


@pytest.mark.slow
def test_what_devices_hold_and_send(recipe, monkeypatch):
    """FSDP gathers each sharded parameter in the forward and the backward pass, and the gradients' sums go round."""
    rate = dict(memory=1e9, memory_rate=1e9, link_rate=1e8)
    monkeypatch.setattr(targets, "CHIPS", (targets.Chip("cpu", 1e9, **rate),))
    run = run_of(recipe, "--mesh", "fsdp=2", "--batch-size", "8", "--accumulate", "1", "--remat", "none")
    monkeypatch.setattr(jax, "devices", lambda *_: jax.local_devices()[:2])
    found = plan.plan(run)
    held = found["state_bytes_per_device"]
    assert found["bytes_per_device"]["total"] > sum(held.values()) and found["fits"]
    sent = {kind: value["bytes_sent"] for kind, value in found["collectives"].items()}
    # Each device has half of the matrices, and sends it once forward and once backward: both are summed over the layers.
    matrices = sum(held[part] for part in ("frozen", "trained"))
    assert 0.7 * matrices < sent["all-gather"] < 3 * matrices
    assert any("while" in loop for loop in found["counted_once"])  # attention over the keys of a packed row
    seconds = found["roofline"]
    assert seconds["interconnect"] == pytest.approx(sum(sent.values()) / 1e8)
    assert found["step_seconds_roofline"] == max(seconds.values()) == seconds[found["bound"]]


def test_the_next_choices_that_need_less_memory(recipe):
    mesh = lambda **axes: sharding.make_mesh(axes)
    run = run_of(recipe, "--batch-size", "16", "--accumulate", "1", "--remat", "dots")
    assert plan.choices(run, mesh(fsdp=8)) == [
        {"remat": "full"}, {"accumulate": 2}, {"mesh": config.Mesh(1, 4, 2)},
    ]  # fmt: skip
    full = dataclasses.replace(run, remat="full", accumulate=2)
    assert plan.choices(full, mesh(data=4, fsdp=2)) == [{"mesh": config.Mesh(1, 8, 1)}]
    assert plan.choices(full, mesh(tensor=8)) == [{"accumulate": 4}]


def test_arrangements_of_64_devices(recipe):
    """All of parameters, layers and rows are split; a mesh that would leave a device without rows is not tried."""
    name = lambda change: {axis: n for axis, n in dataclasses.asdict(change["mesh"]).items() if n > 1}
    tried = lambda rows, length: [
        name(change) | ({"accumulate": change["accumulate"]} if change["accumulate"] > 1 else {})
        for change in plan.arrangements(
            run_of(recipe, "--batch-size", str(rows), "--data.sequence-length", str(length), "--accumulate", "1"), 64
        )
    ]
    copies = [{"data": 2, "fsdp": 32}, {"data": 4, "fsdp": 16}, {"data": 8, "fsdp": 8}]
    assert tried(64, 64) == [
        {"fsdp": 64}, {"fsdp": 32, "tensor": 2}, {"fsdp": 32, "tensor": 2, "accumulate": 2}, {"fsdp": 16, "tensor": 4},
        {"fsdp": 16, "tensor": 4, "accumulate": 2}, {"fsdp": 16, "tensor": 4, "accumulate": 4}, {"fsdp": 8, "tensor": 8},
        {"fsdp": 8, "tensor": 8, "accumulate": 2}, {"fsdp": 8, "tensor": 8, "accumulate": 4}, *copies,
    ]  # fmt: skip
    assert tried(16, 512) == [
        {"fsdp": 16, "tensor": 4}, {"fsdp": 8, "tensor": 8}, {"fsdp": 8, "tensor": 8, "accumulate": 2},
        {"fsdp": 16, "sequence": 4},
    ]  # fmt: skip
    assert tried(10, 64) == []


@pytest.mark.slow
@pytest.mark.ci
def test_a_search_puts_first_what_fits_and_is_fast(recipe, monkeypatch):
    monkeypatch.setattr(targets, "devices_of", lambda topology: jax.devices()[:2])
    run = run_of(recipe, "--batch-size", "2", "--accumulate", "1")
    run = dataclasses.replace(run, adapters={"q_proj": adapters.LoRA(rank=2)})

    def found(memory):
        chip = targets.Chip("cpu", 1e9, memory=memory, memory_rate=1e9, link_rate=1e8)
        monkeypatch.setattr(targets, "CHIPS", (chip,))
        return plan.search(run, "two of these")

    every = found(1e12)
    arranged = [
        (one["change"]["mesh"]["fsdp"], one["change"]["mesh"]["tensor"], one["change"]["accumulate"]) for one in every
    ]
    assert sorted(arranged) == [(1, 2, 1), (1, 2, 2), (2, 1, 1)]
    seconds = [one["step_seconds_roofline"] for one in every]
    assert all(one["fits"] for one in every) and seconds[0] > 0 and seconds == sorted(seconds)
    needed = sorted(one["bytes_per_device"]["total"] for one in every)
    assert [one["fits"] for one in found(needed[1])] == [True, True, False]


def test_what_fits_comes_first():
    found = [(False, None, 3), (True, 2.0, 9), (False, None, 2), (True, 1.0, 9), (False, 0.5, 1)]
    made = [{"fits": f, "step_seconds_roofline": s, "bytes_per_device": {"total": b}} for f, s, b in found]
    assert [made.index(one) for one in plan.ranked(made)] == [3, 1, 4, 2, 0]


@needs_compiler
@pytest.mark.slow
def test_a_step_that_does_not_fit_says_what_the_next_choices_need(command):
    done = command("plan", "configs/llama3_8b_full.py", "--topology", "v5e:2x2", "--batch-size", "8", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["fits"] is False and found["bytes_per_device"]["limit"] < 16 * 2**30 < found["bytes_per_device"]["total"]
    )
    assert [other["change"] for other in found["alternatives"]] == [
        {"accumulate": 2}, {"mesh": {"data": 1, "fsdp": 2, "tensor": 2, "sequence": 1}},
    ]  # fmt: skip
    assert all(other["bytes_per_device"]["total"] > 0 and not other["fits"] for other in found["alternatives"])


@needs_compiler
@pytest.mark.slow
def test_a_step_compiled_for_a_slice(command, recipe):
    line = ["plan", recipe, "--topology", "v5e:2x2", "--mesh", "fsdp=2,tensor=2"]
    done = command(*line, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == {
        "topology": "v5e:2x2", "kind": "TPU v5 lite", "count": 4, "mesh": {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 2},
    }  # fmt: skip
    assert found["fits"] and found["bytes_per_device"]["limit"] == 16 * 2**30
    assert (
        set(found["roofline"]) == {"compute", "memory", "interconnect"}
        and found["collectives"]["all-gather"]["count"] > 6
    )


@needs_cuda_compiler
@pytest.mark.slow
def test_a_step_compiled_for_nodes_of_gpus(command, recipe, tmp_path):
    """Over two nodes, `data` sends through one adapter a device and `fsdp` over NVLink."""
    picture = tmp_path / "memory.png"
    line = ["plan", recipe, "--topology", "h100:2x2", "--mesh", "data=2,fsdp=2", "--batch-size", "8"]
    done = command(*line, "--picture", picture, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["devices"] == {
        "topology": "h100:2x2", "kind": "NVIDIA H100 80GB HBM3", "count": 4,
        "mesh": {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1},
    }  # fmt: skip
    assert found["fits"] and found["bytes_per_device"]["limit"] == 80e9
    assert found["bytes_per_device"]["total"] > sum(found["state_bytes_per_device"].values())
    kinds = found["collectives"].values()
    fastest, slowest = (sum(kind["bytes_sent"] for kind in kinds) / rate for rate in (450e9, 50e9))
    assert fastest < found["roofline"]["interconnect"] < slowest
    assert picture.read_bytes().startswith(b"\x89PNG")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3_8b_full", "llama3_8b_lora", "llama3_8b_s2ft", "llama3_8b_smore"])
def test_the_recipes_fit_a_slice(command, name):
    done = command("plan", f"configs/{name}.py", "--topology", "v5p:4x4x4", "--json", timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["fits"] and found["devices"]["count"] == 64
    # What is trained and its two moments lie split over the chips; S'MoRE's routers are too small to be.
    held, whole = found["state_bytes_per_device"], 4 * found["trained"]["parameters"]
    assert held["optimizer"] == pytest.approx(2 * held["trained"], rel=1e-3)
    assert whole / 64 <= held["trained"] < whole / 30


def collective(*groups):
    return hlo.Collective("all-gather", groups, 1, 1000, "")


def test_a_ring_through_nodes_goes_at_the_rate_of_their_adapters():
    chip = targets.Chip("gpu", 1.0, link_rate=450.0, network_rate=50.0)
    nodes = [0] * 8 + [1] * 8
    rate = lambda *groups: plan._rate(chip, collective(*groups), nodes)
    assert rate(tuple(range(8)), tuple(range(8, 16))) == 450  # each group within its node
    assert rate(tuple(range(16))) == 8 * 50  # all eight adapters of a node carry the ring
    assert rate((0, 1, 8, 9), (2, 3, 10, 11)) == 2 * 50
    assert rate((0, 8), (1, 2)) == 50  # the slowest group holds up the others
    assert rate((0, 1, 2, 8)) == 50
    slice_of_a_pod = dataclasses.replace(chip, network_rate=None)
    assert plan._rate(slice_of_a_pod, collective(tuple(range(16))), nodes) == 450


def test_parts_add_up_to_what_a_step_needs():
    held = {"trained": 3, "optimizer": 6, "frozen": 20}
    parts = plan.parts({"state_bytes_per_device": held, "bytes_per_device": {"total": 40}})
    assert parts == {"frozen": 20, "trained": 3, "optimizer": 6, "temporaries": 11}


def test_a_picture_of_what_was_not_compiled_is_refused(tmp_path):
    found = {"state_bytes_per_device": {"trained": 1, "optimizer": 2, "frozen": 3}, "bytes_per_device": None}
    with pytest.raises(ValueError, match=r"--picture shows a compiled step.*--topology v5p:4x4x4"):
        plan.draw(found, tmp_path / "memory.png", title="")
    assert not (tmp_path / "memory.png").exists()


@pytest.mark.slow
def test_a_target_that_is_none_is_refused_in_one_line(command, recipe):
    done = command("plan", recipe, "--topology", "v9:2x2")
    assert (
        done.returncode == 2
        and done.stderr
        == "jaxmethods: topology='v9' is unknown; Known: v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200.\n"
    )
