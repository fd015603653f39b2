"""Runs as a user starts, kills and resumes them: real processes on real files."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxmethods import adapters, models, tree
from jaxmethods.launch import assembly
from jaxmethods.launch.opening import open_model
from tests.training.test_checkpoint import damage


def rows(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(workdir):
    """{step: (loss, gradient norm, evaluation)}, and that each step stands there once."""
    found = rows(workdir)
    assert [row["step"] for row in found] == list(range(1, len(found) + 1))
    return {row["step"]: (row["loss"], row["gradient_norm"], row.get("evaluation_loss")) for row in found}


@pytest.fixture(scope="module")
def whole(shop, command):
    """A run that nothing disturbed."""
    done = command("train", shop / "recipe.py")
    assert done.returncode == 0, done.stderr
    return shop / "run", done.stdout


def started(command, shop, workdir, *more):
    return command("train", shop / "recipe.py", "--workdir", workdir, *more, start=True)


def wait_for_rows(process, workdir, count):
    file = workdir / "metrics.jsonl"
    for _ in range(3000):
        if file.exists() and file.read_text().count("\n") >= count:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    raise AssertionError(f"no {count} rows in {file}")


def test_a_run_learns_and_leaves_what_it_promises(whole):
    workdir, printed = whole
    found = rows(workdir)
    assert len(losses(workdir)) == 12
    assert found[-1]["evaluation_loss"] < found[5]["evaluation_loss"]
    assert {"step", "loss", "tokens_per_second", "step_seconds", "learning_rate", "gradient_norm"} <= found[0].keys()
    assert (workdir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((workdir / "config.json").read_text())["kind"] == "Run"
    assert "trained" in printed and "mlp/up_proj" in printed


def test_the_same_command_again_has_nothing_to_do(whole, shop, command):
    before = (whole[0] / "metrics.jsonl").read_bytes()
    done = command("train", shop / "recipe.py")
    assert done.returncode == 0 and "already" in done.stdout
    assert (whole[0] / "metrics.jsonl").read_bytes() == before


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_it_is_the_same_run_to_the_bit(whole, shop, command, tmp_path):
    """SIGKILL twice: after a checkpoint with steps behind it, and while the resumed run is under way."""
    workdir = tmp_path / "killed"
    for count in (5, 8):
        process = started(command, shop, workdir)
        wait_for_rows(process, workdir, count)
        process.kill()
        process.communicate()
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "lo')  # as a kill in the middle of a write leaves it
    done = command("train", shop / "recipe.py", "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert losses(workdir) == losses(whole[0])


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(whole, shop, command, tmp_path, number):
    workdir = tmp_path / "stopped"
    process = started(command, shop, workdir)
    wait_for_rows(process, workdir, 4)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    reached = len(losses(workdir))
    if reached < 12:
        assert "the same command goes on" in out
        assert (workdir / "checkpoints" / str(reached)).is_dir()
    assert command("train", shop / "recipe.py", "--workdir", workdir).returncode == 0
    assert losses(workdir) == losses(whole[0])


@pytest.mark.slow
@pytest.mark.ci
def test_eight_devices_resume_what_one_began(whole, shop, command, tmp_path):
    workdir = tmp_path / "moved"
    shutil.copytree(whole[0], workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    done = command(
        "train", shop / "recipe.py", "--workdir", workdir, "--mesh.data", "2", "--mesh.fsdp", "1", "--mesh.tensor", "4",
        devices=8,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for step, values in losses(workdir).items():
        assert values[0] == pytest.approx(losses(whole[0])[step][0], rel=1e-5), step


@pytest.mark.slow
def test_a_damaged_checkpoint_falls_back_to_the_one_before(whole, shop, command, tmp_path):
    workdir = tmp_path / "damaged"
    shutil.copytree(whole[0], workdir)
    damage(workdir / "checkpoints" / "12")
    done = command("train", shop / "recipe.py", "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 12" in done.stdout and "left aside" in done.stdout
    assert losses(workdir) == losses(whole[0])


def test_a_work_folder_of_another_config_is_refused_naming_the_fields(whole, shop, refused):
    before = sorted(p.name for p in whole[0].iterdir())
    line = refused("train", shop / "recipe.py", "--optimizer.learning-rate", "0.5", "--seed", "3")
    assert "optimizer.learning_rate: 0.01 there, 0.5 now" in line and "seed: 0 there, 3 now" in line
    assert sorted(p.name for p in whole[0].iterdir()) == before


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_naming_the_step(shop, command, tmp_path):
    options = ("--optimizer.learning-rate", "1e30", "--optimizer.clip-norm", "None", "--optimizer.warmup", "0")
    done = command("train", shop / "recipe.py", "--workdir", tmp_path / "a", *options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "step 2" in done.stderr and "not finite" in done.stderr
    done = command("train", shop / "recipe.py", "--workdir", tmp_path / "b", *options, "--on-nonfinite", "skip")
    assert done.returncode == 0, done.stderr
    assert "its update was not made" in done.stdout
    assert len(rows(tmp_path / "b")) == 12


@pytest.mark.slow
def test_the_model_answers_evaluates_and_exports(whole, command, here, refused, tmp_path):
    workdir = whole[0]
    line = ("generate", workdir, "--prompt", "how many cats on mat?", "--max-new-tokens", "8")
    said = command(*line)
    assert said.returncode == 0, said.stderr
    assert said.stdout == here(*line).stdout
    done = here("evaluate", "completion", workdir, "--against-base", "--rows", "4", "--max-new-tokens", "6", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert numbers["after"]["nll"] < numbers["before"]["nll"]
    assert json.loads((workdir / "evaluation.json").read_text()) == numbers
    rows = [{"prompt": "how many cats on mat?", "answer": "x", "kind": kind} for kind in ("a", "b", "a")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = ("evaluate", "completion", workdir, "--data", tmp_path / "rows.jsonl", "--max-new-tokens", "4")
    by = json.loads(here(*line, "--by", "kind", "--json").stdout)["after"]["exact_by"]
    assert list(by) == ["a", "b"] and set(by.values()) <= {0.0, 1.0}
    assert "kind a (2)" in here(*line, "--by", "kind").stdout
    assert "line 1: no field 'sort' for --by; the fields are prompt, answer, kind" in refused(*line, "--by", "sort")
    assert "depends on the token" in refused("export", workdir, "--to", tmp_path / "hf")
    assert "--format adapter" in refused("export", workdir, "--to", tmp_path / "peft", "--format", "peft")
    assert not (tmp_path / "hf").exists() and not (tmp_path / "peft").exists()
    done = command("export", workdir, "--to", tmp_path / "adapter", "--format", "adapter")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path / "adapter").iterdir()} == {"adapter.safetensors", "adapter.json"}
    with pytest.MonkeyPatch.context() as patch:  # a kernel for the run's own rows, as on a GPU or TPU
        patch.setattr(assembly, "_attention", lambda *_: "splash")
        opened = open_model(str(workdir))
    assert opened.module.attention is None  # others may be packed, or padded on the left
    assert same_logits(opened, adapters.load(tmp_path / "adapter", *adapters.detach(opened.module, opened.params)))


def same_logits(opened, model):
    tokens = np.arange(6)[None]
    ours, theirs = models.logits(opened.module, opened.params, tokens), models.logits(*model, tokens)
    return float(np.abs(ours - theirs).max()) < 1e-5


@pytest.mark.slow
@pytest.mark.ci
def test_channels_chosen_by_data_and_by_weights_go_on_and_out(shop, command, here, tmp_path):
    recipe, workdir = tmp_path / "s2ft.py", tmp_path / "run"
    chosen = """        adapters={
            "down_proj": S2FT(count=4, selection="activation", calibration=0.5),
            "up_proj": S2FT(count=4, side="out", selection="weight", form="block"),
        },\n"""
    text = re.sub(r" +adapters=\{.*?\n +\},\n", chosen, (shop / "recipe.py").read_text(), flags=re.DOTALL)
    recipe.write_text(text.replace("import LoRA", "import S2FT, LoRA"))
    leaf = lambda name: tree.flatten(open_model(str(workdir)).params)[f"model/layers/mlp/down_proj/adapter/s2ft/{name}"]
    done = command("train", recipe, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert "choosing channels by activation" in done.stdout
    before = leaf("indices"), leaf("delta")
    assert np.abs(before[1]).max() > 0
    shutil.rmtree(workdir / "checkpoints" / "12")
    done = command("train", recipe, "--workdir", workdir)
    assert done.returncode == 0 and "choosing" not in done.stdout, done.stderr
    for name, want in zip(("indices", "delta"), before, strict=True):
        np.testing.assert_array_equal(leaf(name), want)
    done = here("export", workdir, "--to", tmp_path / "peft", "--format", "peft")
    assert done.returncode == 0, done.stderr
    opened = open_model(str(workdir))
    assert same_logits(opened, adapters.load_peft(tmp_path / "peft", *adapters.detach(opened.module, opened.params)))


@pytest.mark.slow
def test_a_full_run_exports_a_model_that_opens_again(shop, command, here, tmp_path):
    recipe = tmp_path / "full.py"
    recipe.write_text(re.sub(r" +adapters=\{.*?\n +\},\n", "", (shop / "recipe.py").read_text(), flags=re.DOTALL))
    done = command("train", recipe, "--workdir", tmp_path / "full", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "(100.00%)" in done.stdout
    done = command("export", tmp_path / "full", "--to", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        here("generate", tmp_path / name, "--prompt", "the cat", "--max-new-tokens", "5") for name in ("full", "hf")
    )
    assert ours.stdout == theirs.stdout and theirs.returncode == 0, theirs.stderr


@pytest.mark.slow
def test_tensorboard_a_profile_and_the_share_of_a_known_peak(shop, tmp_path):
    workdir = tmp_path / "watched"
    line = ["train", str(shop / "recipe.py"), "--workdir", str(workdir), "--steps", "4", "--tensorboard", "True"]
    code = f"""
from jaxmethods.launch import cli, targets
targets.CHIPS = (targets.Chip("cpu", 1e9), *targets.CHIPS)
cli.main({[*line, "--profile", "2", "3"]!r})
"""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = rows(workdir)
    flops = {row["mfu"] * row["step_seconds"] * 1e9 for row in found}
    assert max(flops) == pytest.approx(min(flops)) and min(flops) > 1e6
    assert "% of peak" in done.stdout
    assert list(workdir.glob("tensorboard/events*")) and list(workdir.glob("profile/**/*.xplane.pb"))
