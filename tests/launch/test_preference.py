"""Preference runs from a recipe: trained with adapters and whole, resumed to the bit, and refused where they cannot be."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from jaxmethods import tree
from jaxmethods.data import Data
from jaxmethods.launch import cli
from jaxmethods.launch import config as run_config
from jaxmethods.launch.assembly import assemble, model_shapes
from jaxmethods.launch.opening import open_model
from jaxmethods.objectives import CREAM, MMedPO, Preference
from jaxmethods.sharding import make_mesh
from tests.launch.conftest import first_device, numbers, save_talker, write_shop

RECIPE = """
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.objectives import MMedPO
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model={model!r},
        data=Data(train={train!r}, evaluation={evaluation!r}, sequence_length=48, pack=False),
        workdir={workdir!r},
        adapters={{"_proj": LoRA(rank=2)}},
        objective=MMedPO(beta=0.5),
        optimizer=Optimizer(learning_rate=1e-2, warmup=0),
        steps=4,
        batch_size=4,
        checkpoint_every=2,
        remat="none",
        compilation_cache={cache!r},
    )
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """model/, train.jsonl, heldout.jsonl and recipe.py; cats are preferred to dogs."""
    folder = tmp_path_factory.mktemp("pairs")
    save_talker(folder)
    row = lambda i: {
        "prompt": f"cats on mat {i}?", "chosen": f"{i % 7} cats", "rejected": f"{i % 7} dogs", "relevance": i % 3 / 2,
    }  # fmt: skip
    write_shop(folder, RECIPE, train=[row(i) for i in range(20)], heldout=[row(i) for i in range(20, 26)])
    return folder


@pytest.fixture(scope="module")
def run(room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", first_device)
        cli.main(["train", str(room / "recipe.py")])
    jax.config.update("jax_compilation_cache_dir", None)
    return room / "run"


def test_it_learns_what_is_preferred_and_says_so(run):
    first, *_, last = numbers(run)
    assert first["rewards/margins"] == first["rewards/chosen"] == 0 < last["rewards/margins"]
    assert first["logps/chosen"] < 0 < first["nll"]
    assert 0 <= last["evaluation_rewards/accuracies"] <= 1 and last["evaluation_loss"] > 0
    weights = np.array([i % 3 / 2 for i in range(20)])
    least, most = (np.clip(1 + np.sqrt(0.1) * (x - weights.mean()) / weights.std(), 0.75, 1.25) for x in (0, 1))
    assert least * np.log(2) < first["loss"] < most * np.log(2)  # a mean of weights times that of no margin


def test_resumed_it_is_the_same_run_to_the_bit(run, room, here, one_device, tmp_path):
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    done = here("train", room / "recipe.py", "--workdir", tmp_path / "again")
    assert done.returncode == 0 and "resumes after step 2" in done.stdout, done
    assert numbers(tmp_path / "again") == numbers(run)


@pytest.mark.slow
def test_all_of_a_model_is_trained_against_what_it_was(room, here, one_device, tmp_path):
    """No adapters: the reference is a copy, also after a restart; it is in no checkpoint."""
    recipe = (room / "recipe.py").read_text().replace('{"_proj": LoRA(rank=2)}', "{}")
    (tmp_path / "full.py").write_text(recipe)
    train = lambda *more: here("train", tmp_path / "full.py", "--workdir", tmp_path / "full", *more)
    assert train().returncode == 0
    whole = numbers(tmp_path / "full")
    assert whole[0]["rewards/margins"] == 0 < whole[-1]["rewards/margins"]
    shutil.rmtree(tmp_path / "full" / "checkpoints" / "4")
    assert train().returncode == 0 and numbers(tmp_path / "full") == whole
    opened = open_model(str(tmp_path / "full"))
    assert not any(path.startswith("reference") for path in tree.flatten(opened.params))


def test_assembly_keeps_a_copy_of_exactly_what_moves(room):
    recipe = run_config.load_config(str(room / "recipe.py"))
    mesh = make_mesh({"data": 1}, jax.devices()[:1])
    copies = lambda **changes: {
        path.removeprefix("reference/")
        for path in tree.flatten(assemble(dataclasses.replace(recipe, **changes), *model_shapes(recipe), mesh).frozen)
        if path.startswith("reference/")
    }
    norms = {"model/layers/input_layernorm/scale", "model/layers/post_attention_layernorm/scale", "model/norm/scale"}
    assert copies() == set()
    assert copies(trained="norm|/adapter/") == norms
    assert copies(trained="norm|/adapter/", objective=Preference(reference="drifting")) == set()
    assert copies(trained="norm|/adapter/", objective=Preference(loss="orpo")) == set()


@pytest.mark.parametrize(
    "objective", [Preference(loss="simpo", beta=2.0, gamma=0.5), MMedPO(mode="raw"), CREAM(scope="prompt", clamp=True)]
)
def test_objectives_round_trip_through_json(objective):
    run = run_config.Run(model="m", data=Data(train="a"), workdir="w", objective=objective)
    assert run_config.from_json(json.loads(json.dumps(run_config.to_json(run)))) == run


def test_refused_before_anything_is_written(room, refused, one_device, tmp_path):
    train = lambda *options: refused("train", room / "recipe.py", "--workdir", tmp_path / "none", *options)
    assert "cannot share one; set Data(pack=False)" in train("--data.pack", "True")
    assert "no pair is left" in train("--data.sequence-length", "16")
    assert "is for loss" in train("--objective.loss", "dpo", "--objective.gamma", "0.5")
    assert not (tmp_path / "none").exists()
