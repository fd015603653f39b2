"""Wrong input: one clear line, exit status 2, no traceback, nothing half-written."""

import json

import pytest

from jaxmethods.launch import cli
from jaxmethods.launch.plan import show


def recipe(shop, tmp_path, old, new):
    text = (shop / "recipe.py").read_text()
    assert old in text
    file = tmp_path / "recipe.py"
    file.write_text(text.replace(old, new))
    return file


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("batch_size=4", "batch_size=-4", "batch_size=-4 must be at least 1"),
        ("accumulate=2", "accumulate=3", "must be a multiple of accumulate=3"),
        ("ranks=(1, 2)", "gate='swich'", "did you mean 'switch'"),
        ("def config()", "def configuration()", "defines no function config()"),
        ("steps=12,", "steps=12,,", "invalid syntax"),
    ],
)  # fmt: skip
def test_a_wrong_recipe(refused, shop, tmp_path, old, new, says):
    line = refused("train", recipe(shop, tmp_path, old, new), "--workdir", tmp_path / "run")
    assert says in line and "\n" not in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "line", "says"),
    [
        ("", "", "trian x.py", "did you mean 'train'"),
        (
            "", "", "train {} --workdir {} --distributed",
            "--distributed found no cluster of SLURM, Open MPI, Kubernetes or Cloud TPU here",
        ),
        ("steps=12", "stepz=12", "train {} --workdir {}", "Run has no field 'stepz'; did you mean 'steps'?"),
        ('"q_proj"', '"q_prj"', "train {} --workdir {}", "'q_prj' matches no linear layer"),
    ],
)  # fmt: skip
def test_what_is_refused_in_a_process_of_its_own(command, shop, tmp_path, old, new, line, says):
    done = command(*line.format(recipe(shop, tmp_path, old, new), tmp_path / "run").split())
    assert done.returncode == 2 and done.stdout == "", done
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_wrong_files_and_flags(refused, shop, tmp_path):
    fits = recipe(shop, tmp_path, "batch_size=4", "batch_size=16")  # eight devices are here
    train = lambda *flags: refused("train", fits, *flags, "--workdir", tmp_path / "run")
    assert "the hub does not answer" in refused("generate", "some-org/some-model", "--prompt", "hello")
    assert f"did you mean {shop / 'recipe.py'}" in refused("train", shop / "recip.py")
    assert "--optimizer.learning-rate" in train("--optimizer.learning-rte", "1")
    assert "invalid literal" in train("--steps", "many")
    assert "asks for 3 devices and there are 8" in train("--mesh.fsdp", "3")
    assert "train.jsonl" in train("--data", shop / "trian.jsonl")
    assert str(shop / "modle") in train("--model", shop / "modle")
    assert "no run" in refused("export", shop / "model", "--to", tmp_path / "out")
    broken = tmp_path / "broken.jsonl"
    broken.write_text((shop / "train.jsonl").read_text().splitlines()[0] + '\n{"prompt": "a"\n')
    assert f"{broken}:2" in train("--data", broken).replace(", line ", ":")
    assert not (tmp_path / "run").exists()
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("do not touch")
    assert "is not empty" in refused("train", fits, "--workdir", stranger)
    assert [p.name for p in stranger.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_help_and_plan(here, command, shop, capsys):
    assert "train CONFIG.py" in here("--help").stdout
    shown = here("train", shop / "recipe.py", "--help")
    assert shown.returncode == 0 and "--optimizer.learning-rate" in shown.stdout
    planned = command("plan", shop / "recipe.py", "--json")
    assert planned.returncode == 0, planned.stderr
    plan = json.loads(planned.stdout)
    assert plan["trained"]["parameters"] > 0 and plan["bytes_per_device"]["total"] > 0
    assert plan["flops_per_step"] > 0 and plan["model"]["layers"] == 3
    show(plan, as_json=False)
    assert "trained" in capsys.readouterr().out
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
