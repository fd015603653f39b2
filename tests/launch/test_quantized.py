"""Runs over a quantised base."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import models, quantization, sharding, tree
from jaxmethods.adapters import DoRA, LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.launch import config as run_config
from jaxmethods.launch.assembly import assemble, model_shapes
from jaxmethods.launch.opening import open_model
from jaxmethods.launch.plan import plan
from tests import tiny

RECIPE = """
from jaxmethods.adapters import DoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model={model!r}, data=Data(train={train!r}, sequence_length=48), workdir={workdir!r},
        adapters={{"mlp": DoRA(rank=2)}}, optimizer=Optimizer(learning_rate=1e-2, warmup=2), steps=6, batch_size=4,
        checkpoint_every=3, quantize="int4", compilation_cache={cache!r},
    )
"""


@pytest.fixture(scope="module")
def model(shop, tmp_path_factory):
    """A folder with a model whose layers divide into blocks."""
    folder = tmp_path_factory.mktemp("blocks") / "model"
    tokenizer = models.load_tokenizer(str(shop / "model"))
    module, params = tiny.decoder(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, rope_scaling=None, eos_ids=(2,)
    )
    models.save(folder, module, params, tokenizer=tokenizer)
    return folder


def run_over(model, **changes):
    fields = {"adapters": {"up_proj": LoRA(rank=2), "down_proj": DoRA(rank=2)}, "quantize": "int4"} | changes
    return Run(model=str(model), data=Data(train="rows.jsonl", sequence_length=8), workdir="w", **fields)


def assembled(run):
    return assemble(run, *model_shapes(run), sharding.make_mesh({"fsdp": 2, "tensor": 4}))


def test_the_frozen_part_is_codes_and_only_adapters_are_trained(model):
    assembly = assembled(run_over(model))
    flat = tree.flatten(assembly.base)
    assert flat["model/layers/mlp/up_proj/kernel"].dtype == jnp.uint8
    assert flat["model/layers/mlp/up_proj/kernel_minimum"].sharding.spec[1:] == ("fsdp", "tensor")
    assert flat["model/embed_tokens/embedding"].dtype == jnp.float32
    assert all("/adapter/" in path for path in tree.flatten(assembly.state.trained))
    base = models.load(str(model), quantize="int4", mesh=assembly.mesh)[1]
    leaves = assembly.initial_adapters(base, jax.random.key(0), {})
    assert jax.tree.map(lambda x: x.shape, leaves) == jax.tree.map(lambda x: x.shape, assembly.state.trained)


def test_plan_counts_parameters_as_they_were_and_bytes_as_they_are(model):
    plans = [plan(run_over(model, quantize=kind, mesh=run_config.Mesh(fsdp=8))) for kind in (None, "int8", "int4")]
    assert len({p["model"]["parameters"] for p in plans}) == len({p["trained"]["share"] for p in plans}) == 1
    assert [p["model"]["quantize"] for p in plans] == [None, "int8", "int4"]
    frozen = [p["state_bytes_per_device"]["frozen"] for p in plans]
    arguments = [p["bytes_per_device"]["arguments"] for p in plans]
    assert frozen[0] > frozen[1] > frozen[2] and arguments[0] > arguments[1] > arguments[2]


def test_training_what_is_frozen_in_codes_is_refused(model):
    with pytest.raises(ValueError, match="quantize='int4' freezes the linear layers; name `adapters`"):
        run_over(model, adapters={})
    with pytest.raises(ValueError, match=r"names 'model/layers/mlp/up_proj/kernel', which quantize='int4' freezes"):
        assembled(run_over(model, trained="up_proj/kernel$"))
    norms = tree.flatten(assembled(run_over(model, adapters={}, trained="norm")).state.trained)
    assert norms and all("norm" in path for path in norms)
    unquantised = run_over(model, quantize=None)
    changed = dataclasses.replace(unquantised, quantize="int8")
    assert run_config.differences(unquantised, changed) == {"quantize": (None, "int8")}


def test_a_model_that_does_not_divide_is_refused_by_its_layer(shop):
    with pytest.raises(ValueError, match="'model/layers/mlp/down_proj' reads 48 channels"):
        model_shapes(run_over(shop / "model"))


@pytest.mark.slow
@pytest.mark.ci
def test_a_run_learns_resumes_and_leaves_as_a_float_model(model, shop, command, tmp_path):
    recipe, workdir = tmp_path / "recipe.py", tmp_path / "run"
    values = {"model": str(model), "train": str(shop / "train.jsonl"), "workdir": str(workdir)}
    recipe.write_text(RECIPE.format(**values, cache=str(shop / "compiled")))
    done = command("train", recipe)
    assert done.returncode == 0, done.stderr
    assert "linear layers frozen in int4" in done.stdout
    losses = lambda: [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    before = losses()
    assert before[-1] < before[0]
    shutil.rmtree(workdir / "checkpoints" / "6")
    assert command("train", recipe).returncode == 0
    assert losses() == before
    done = command("train", recipe, "--quantize", "int8")
    assert done.returncode != 0 and "quantize: 'int4' there, 'int8' now" in done.stderr

    opened = open_model(str(workdir))
    assert quantization.is_quantized(opened.module) and quantization.is_quantized(opened.base().module)
    done = command("export", workdir, "--to", tmp_path / "hf")
    assert done.returncode == 0, done.stderr
    plain, params = models.load(tmp_path / "hf")
    rows = np.arange(3, 15).reshape(2, 6)
    np.testing.assert_allclose(
        models.logits(plain, params, rows), models.logits(opened.module, opened.params, rows), atol=3e-5
    )
