"""Runs of several processes on one machine, joined over loopback: the numbers of one process, and nobody waits for the dead."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxmethods.launch import config as run_config
from jaxmethods.launch import reference, train
from jaxmethods.launch.config import load_config
from tests.launch.test_preference import room  # noqa: F401  # a fixture
from tests.launch.test_train import losses

pytestmark = pytest.mark.slow

COUNTED = """
import json, sys
from jaxmethods.data.packing import PackedRows
from jaxmethods.launch import cli

made, make = [], PackedRows.__getitem__

def counted(self, row):
    made.append((len(self), row))
    return make(self, row)

PackedRows.__getitem__ = counted
cli.main(sys.argv[2:])
json.dump(made, open(sys.argv[1], "w"))
"""
"""The command line, which at its end writes which rows this process made: [rows of the data set, row]."""

STEPS, ROWS = 12, 40


@pytest.fixture(scope="module")
def recipe(shop, tmp_path_factory):
    """The shop's, training every parameter (they are split among devices; the small adapters are not)."""
    text = re.sub(r" +adapters=\{.*?\n +\},\n", "", (shop / "recipe.py").read_text(), flags=re.DOTALL)
    for old, new in (("accumulate=2", "keep_latest=9"), ("learning_rate=1e-2", "learning_rate=1e-3")):
        assert old in text
        text = text.replace(old, new)
    file = tmp_path_factory.mktemp("distributed") / "recipe.py"
    file.write_text(re.sub(r"compilation_cache=.*,", "compilation_cache=None,", text))
    return file


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def told(index, count):
    """The flags that name the processes."""
    return lambda port: (["--coordinator", f"127.0.0.1:{port}", "--processes", count, "--process", index], {})


def by_slurm(index, count):
    """What SLURM sets for a task, for JAX to find."""
    found = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(count)}
    found |= {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)}
    return lambda port: (["--distributed"], found | {"JAX_COORDINATOR_PORT": str(port)})


class Processes:
    """`jaxmethods train RECIPE --workdir WORKDIR ...` in `count` processes; more options for each by `each(index)`."""

    def __init__(self, recipe, workdir, *options, count, devices=1, how=told, each=lambda index: (), counted=False):
        self.workdir = workdir
        self.outputs = [workdir.with_name(f"{workdir.name}.{index}.{time.monotonic_ns()}") for index in range(count)]
        self.made = [workdir.with_name(f"{workdir.name}.{index}.rows") for index in range(count)]
        port, self.all = free_port(), []
        for index in range(count):
            flags, environment = how(index, count)(port) if count > 1 else ([], {})
            program = ["-c", COUNTED, self.made[index]] if counted else ["-m", "jaxmethods.launch.cli"]
            line = [sys.executable, *program, "train", recipe, "--workdir", workdir, *options, *each(index), *flags]
            environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
            with self.outputs[index].open("w") as output:
                self.all.append(
                    subprocess.Popen(
                        list(map(str, line)), env=os.environ | environment, stdout=output, stderr=subprocess.STDOUT
                    )
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.all:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()

    def said(self, index=0):
        return self.outputs[index].read_text()

    def ended(self, timeout=600):
        """The exit statuses, when all have ended."""
        end = time.monotonic() + timeout
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.all]

    def wait_until(self, true):
        while not true():
            assert [process.poll() for process in self.all] == [None] * len(self.all), self.said()
            time.sleep(0.02)

    def wait_for_rows(self, count):
        file = self.workdir / "metrics.jsonl"
        self.wait_until(lambda: file.exists() and file.read_text().count("\n") >= count)


def run(*arguments, **options):
    with Processes(*arguments, **options) as started:
        assert started.ended() == [0] * len(started.all), "\n".join(map(started.said, range(len(started.all))))
        return started


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory):
    return run(recipe, tmp_path_factory.mktemp("one") / "run", count=1, counted=True)


@pytest.fixture(scope="module")
def two(recipe, tmp_path_factory):
    """Two processes that find each other as tasks of SLURM do; fsdp=2."""
    return run(recipe, tmp_path_factory.mktemp("two") / "run", count=2, how=by_slurm, counted=True)


def assert_same_losses(workdir, want):
    """Training and held-out losses to 1e-6 of their value, about eight units in the last place of float32."""
    found, want = losses(workdir), losses(want.workdir)
    assert list(found) == list(range(1, STEPS + 1))
    for step, (loss, _, evaluation) in found.items():
        assert loss == pytest.approx(want[step][0], rel=1e-6), step
        assert (evaluation is None) == (step not in (6, 12))
        if evaluation is not None:
            assert evaluation == pytest.approx(want[step][2], rel=1e-6), step


def at_step(run, step, workdir):
    """A copy of a work folder as it was after a step's checkpoint; the metrics are cut when the run goes on."""
    shutil.copytree(run.workdir, workdir)
    for folder in (workdir / "checkpoints").iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    return workdir


@pytest.mark.ci
def test_two_processes_found_by_the_cluster_give_the_losses_of_one(one, two):
    assert_same_losses(two.workdir, one)
    assert "2 x cpu (data=1 x fsdp=2 x sequence=1 x tensor=1) in 2 processes" in two.said(0)
    assert "2 processes" not in two.said(1)  # the first one speaks for all


def test_each_process_makes_its_own_rows_and_no_others(one, two):
    """Each row that a process made, in order: together they are those of one process, and none was made twice."""

    def made(run):
        return [[row for size, row in json.loads(file.read_text()) if size == ROWS] for file in run.made]

    (whole,), halves = made(one), made(two)
    for index, half in enumerate(halves):
        assert 2 * STEPS <= len(half) <= 2 * (STEPS + 6)  # and a few batches ahead of the device
        for step in range(STEPS):
            assert half[2 * step : 2 * step + 2] == whole[4 * step + 2 * index : 4 * step + 2 * index + 2], (
                index,
                step,
            )


def test_each_process_writes_its_share_of_a_checkpoint(one, two):
    """Orbax keeps what each process wrote in a folder of its own before it joins their indices."""
    size = lambda folder: sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    written = lambda run: [
        size(f) for f in sorted((run.workdir / "checkpoints" / "12" / "state").glob("ocdbt.process_*"))
    ]
    (whole,), halves = written(one), written(two)
    assert len(halves) == 2 and sum(halves) < 1.1 * whole
    assert max(halves) < 0.6 * whole


@pytest.mark.ci
def test_four_processes_two_of_them_with_the_same_rows_give_the_losses_of_one(one, recipe, tmp_path):
    made = run(recipe, tmp_path / "run", "--mesh", "fsdp=2,tensor=2", count=4)
    assert_same_losses(made.workdir, one)


@pytest.mark.ci
def test_two_processes_of_two_devices_as_the_documents_start_them(one, recipe, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()
    (block,) = [block for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) if "127.0.0.1" in block]
    for shown, here in (
        ("configs/quickstart.py", f"{recipe} --workdir {tmp_path / 'run'}"),
        ("8476", str(free_port())),
    ):
        assert shown in block
        block = block.replace(shown, here)
    program = f'jaxmethods() {{ {sys.executable} -m jaxmethods.launch.cli "$@"; }}\n'
    done = subprocess.run(["bash", "-c", program + block], capture_output=True, text=True, timeout=600)
    assert "4 x cpu (data=1 x fsdp=2 x sequence=1 x tensor=2) in 2 processes" in done.stdout, done.stderr
    assert_same_losses(tmp_path / "run", one)


@pytest.mark.ci
def test_four_processes_with_tensor_go_on_from_two_with_fsdp(one, two, recipe, tmp_path):
    workdir = at_step(two, 6, tmp_path / "run")
    made = run(recipe, workdir, "--mesh", "fsdp=1,tensor=4", count=4)
    assert "resumes after step 6" in made.said()
    assert_same_losses(made.workdir, one)


def test_killed_restarted_preempted_and_restarted_it_is_the_same_run_to_the_bit(two, recipe, tmp_path):
    workdir = tmp_path / "run"
    with Processes(recipe, workdir, count=2) as started:
        started.wait_for_rows(4)
        started.all[1].kill()
        killed = time.monotonic()
        assert started.ended(timeout=60)[0] not in (0, None), started.said()
        assert time.monotonic() - killed < 60
    # A notice to one process, here while it compiles: both save after the same step and end well.
    with Processes(recipe, workdir, count=2) as started:
        started.wait_until(lambda: f"{workdir}: " in started.said())
        started.all[1].send_signal(signal.SIGTERM)
        assert started.ended() == [0, 0], started.said(0) + started.said(1)
        reached = len(losses(workdir))
        assert reached < STEPS and f"stopped after step {reached} and saved" in started.said()
        assert (workdir / "checkpoints" / str(reached)).is_dir()
    assert losses(run(recipe, workdir, count=2).workdir) == losses(two.workdir)


def test_a_checkpoint_that_one_process_cannot_read_is_left_aside_by_all(two, recipe, tmp_path):
    workdir = at_step(two, 12, tmp_path / "run")
    for file in (workdir / "checkpoints" / "12" / "state" / "ocdbt.process_1" / "d").iterdir():
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    made = run(recipe, workdir, count=2)
    assert "checkpoint of step 12" in made.said() and "resumes after step 9" in made.said()
    assert losses(workdir) == losses(two.workdir)


def test_what_one_process_cannot_read_ends_all_of_them(recipe, tmp_path):
    nowhere = tmp_path / "nowhere.jsonl"
    each = lambda index: ("--data", nowhere) if index else ()
    with Processes(recipe, tmp_path / "run", count=2, each=each) as started:
        assert started.ended() == [1, 2], started.said(0) + started.said(1)
        assert "[process 0 of 2]: process 1 failed while reading config, data and model" in started.said(0)
        assert "[process 1 of 2]: " in started.said(1) and str(nowhere) in started.said(1)
        assert "Traceback" not in started.said(0) + started.said(1)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_shared_and_processes_of_different_runs_are_refused(recipe, tmp_path):
    ours = load_config(str(recipe))
    with pytest.raises(ValueError, match=r"config.json, which process 0 wrote, is not to be seen from process 0"):
        train._find_claim(tmp_path, ours, patience=0.0)
    run_config.claim(tmp_path, ours)
    train._find_claim(tmp_path, ours)
    with pytest.raises(ValueError, match="give all processes the same config and flags"):
        train._find_claim(tmp_path, dataclasses.replace(ours, checkpoint_every=5), patience=0.0)


@pytest.mark.ci
def test_two_processes_keep_the_reference_of_one(room, tmp_path):  # noqa: F811
    """Each scores its rows; the file, written by the first, is that of one process, and both know what is in it."""
    recipe = room / "recipe.py"
    start = lambda count: run(
        recipe,
        tmp_path / f"run{count}",
        "--steps",
        "2",
        "--objective.cache",
        tmp_path / f"{count}.parquet",
        count=count,
    )
    start(1), start(2)
    one, two = (reference.read(str(tmp_path / f"{count}.parquet")) for count in (1, 2))
    assert len(one) == 26 and list(one) == list(two)
    for key, numbers in one.items():
        assert two[key] == pytest.approx(numbers, rel=1e-5)
