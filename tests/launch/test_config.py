import dataclasses
import json
import runpy
from pathlib import Path

import pytest

from jaxmethods.adapters import LoRA, SMoRE
from jaxmethods.data import Data, Source
from jaxmethods.launch import Mesh, Run
from jaxmethods.launch import config as run_config
from jaxmethods.launch.cream import SelfRewarding
from jaxmethods.launch.rag import RetrievalAugmented
from jaxmethods.training import Optimizer

RUN = Run(
    model="m", workdir="w", data=Data(train=(Source("a.jsonl", weight=2.0), Source("b.jsonl"))),
    adapters={"mlp": SMoRE(ranks=(1, 2)), "q_proj": LoRA(rank=4)},
    optimizer=Optimizer(groups=(("router", 0.5),)), mesh=Mesh(data=2), profile=(3, 5),
)  # fmt: skip
KINDS = {"cream_smollm2": SelfRewarding, "mmed_rag_small": RetrievalAugmented}  # the others are runs
RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def test_a_run_survives_json():
    assert run_config.from_json(json.loads(json.dumps(run_config.to_json(RUN)))) == RUN


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_is_a_run_with_its_command_in_the_docstring(path):
    kind = KINDS.get(path.stem, Run)
    run = run_config.load_config(str(path), kind)
    assert isinstance(run, kind) and run.workdir == f"runs/{path.stem}"
    assert run_config.from_json(json.loads(json.dumps(run_config.to_json(run))), kind) == run
    assert f"configs/{path.name}" in runpy.run_path(str(path))["__doc__"]


def test_differences_name_nested_fields_and_skip_what_may_change():
    other = dataclasses.replace(
        RUN, seed=4, checkpoint_every=7, mesh=Mesh(tensor=2), optimizer=Optimizer(learning_rate=1.0, groups=(("router", 0.5),)),
        adapters={"mlp": SMoRE(ranks=(2, 2)), "q_proj": LoRA(rank=4)},
    )  # fmt: skip
    assert run_config.differences(RUN, other) == {
        "seed": (0, 4), "optimizer.learning_rate": (1e-4, 1.0), "adapters.mlp.ranks": ([1, 2], [2, 2]),
    }  # fmt: skip


def test_json_of_another_version_is_refused_with_the_nearest_name():
    written = run_config.to_json(RUN)
    with pytest.raises(ValueError, match="Run has no field 'batchsize'; did you mean 'batch_size'"):
        run_config.from_json(written | {"batchsize": 3})
    written["optimizer"]["kind"] = "Optimiser"
    with pytest.raises(ValueError, match="did you mean 'Optimizer'"):
        run_config.from_json(written)
