"""Wrong input: one clear line, exit status 2, no traceback, nothing half-written."""

import json

import pytest

from jaxmethods.launch import cli


def recipe(shop, tmp_path, old, new):
    text = (shop / "recipe.py").read_text()
    assert old in text
    file = tmp_path / "recipe.py"
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("steps=12", "stepz=12", "Run has no field 'stepz'; did you mean 'steps'?"),
        ("batch_size=4", "batch_size=-4", "batch_size=-4 must be at least 1"),
        ("accumulate=2", "accumulate=3", "must be a multiple of accumulate=3"),
        ("ranks=(1, 2)", "gate='swich'", "did you mean 'switch'"),
        ("def config()", "def configuration()", "defines no function config()"),
        ("steps=12,", "steps=12,,", "invalid syntax"),
        ('"q_proj"', '"q_prj"', "'q_prj' matches no linear layer"),
    ],
)  # fmt: skip
def test_a_wrong_recipe(refused, shop, tmp_path, old, new, says):
    line = refused("train", recipe(shop, tmp_path, old, new), "--workdir", tmp_path / "run")
    assert says in line and "\n" not in line
    assert not (tmp_path / "run").exists()


def test_a_wrong_command_in_a_process_of_its_own(command):
    done = command("trian", "x.py")
    assert done.returncode == 2 and done.stdout == ""
    assert "did you mean 'train'" in done.stderr and done.stderr.count("\n") == 1


def test_wrong_files_and_flags(refused, shop, tmp_path):
    assert "the hub does not answer" in refused("generate", "some-org/some-model", "--prompt", "hello")
    assert f"did you mean {shop / 'recipe.py'}" in refused("train", shop / "recip.py")
    unknown = refused("train", shop / "recipe.py", "--optimizer.learning-rte", "1", "--workdir", tmp_path / "run")
    assert "--optimizer.learning-rate" in unknown
    assert "invalid literal" in refused("train", shop / "recipe.py", "--steps", "many", "--workdir", tmp_path / "run")
    alone = refused("train", shop / "recipe.py", "--distributed", "--workdir", tmp_path / "run")
    assert "--distributed found no cluster of SLURM, Open MPI, Kubernetes or Cloud TPU here" in alone
    mesh = refused("train", shop / "recipe.py", "--mesh.fsdp", "3", "--workdir", tmp_path / "run")
    assert "asks for 3 devices and there are 8" in mesh
    missing = refused("train", shop / "recipe.py", "--data", shop / "trian.jsonl", "--workdir", tmp_path / "run")
    assert "train.jsonl" in missing
    model = refused("train", shop / "recipe.py", "--model", str(shop / "modle"), "--workdir", tmp_path / "run")
    assert "model" in model
    assert "no run" in refused("export", shop / "model", "--to", tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text((shop / "train.jsonl").read_text().splitlines()[0] + '\n{"prompt": "a"\n')
    assert f"{broken}:2" in refused(
        "train", shop / "recipe.py", "--data", broken, "--workdir", tmp_path / "run"
    ).replace(", line ", ":")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("do not touch")
    assert not (tmp_path / "run").exists()
    assert "is not empty" in refused("train", shop / "recipe.py", "--workdir", stranger)
    assert [p.name for p in stranger.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_help_and_plan(here, command, shop):
    assert "train CONFIG.py" in here("--help").stdout
    shown = here("train", shop / "recipe.py", "--help")
    assert shown.returncode == 0 and "--optimizer.learning-rate" in shown.stdout
    planned = command("plan", shop / "recipe.py", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["trained"]["parameters"] > 0 and plan["bytes_per_device"]["total"] > 0
    assert plan["flops_per_step"] > 0 and plan["model"]["layers"] == 3
    assert "trained" in here("plan", shop / "recipe.py").stdout
    assert not (shop / "run" / "plan").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--coordinator 127.0.0.1:1", "--coordinator without --processes, --process: name all of"),
        ("--processes 2 --process 0", "--processes, --process without --coordinator: name all of"),
        ("--coordinator host --processes 2 --process 0", "--coordinator host is not HOST:PORT, as in"),
        ("--coordinator h:99999 --processes 2 --process 0", "--coordinator h:99999 is not HOST:PORT, as in"),
        ("--coordinator h:1 --processes 2 --process 2", "--process 2 is none of --processes 2; they are numbered 0 to 1"),
        ("--coordinator h:1 --processes 2 --process -1", "--process -1 is none of --processes 2; they are numbered 0 to 1"),
        ("--coordinator h:1 --processes 0 --process 0", "--processes 0 must be at least 1"),
        ("--coordinator h:1 --processes two --process 0", "--processes two is no whole number"),
        ("--coordinator --processes 2 --process 0", "--coordinator needs a value: --coordinator HOST:PORT"),
        ("--distributed --coordinator h:1 --processes 2 --process 0", "give one or the other"),
    ],
)  # fmt: skip
def test_processes_that_cannot_be_joined(capsys, flags, says):
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "recipe.py", *flags.split()])
    line = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and says in line and "\n" not in line
