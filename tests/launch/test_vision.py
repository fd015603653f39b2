"""A run that gives a model eyes: started, interrupted, opened, with the projector whitened by pictures of its rows."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxmethods import models, tree
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.data.sources import write_jsonl
from jaxmethods.launch import Run, Vision
from jaxmethods.launch.assembly import load_model
from jaxmethods.launch.opening import open_model
from jaxmethods.launch.train import train
from jaxmethods.training import Optimizer
from tests import tiny
from tests.launch.conftest import chatml_tokenizer, numbers
from tests.models.test_composing import tower


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eyes")
    tokenizer = chatml_tokenizer("<image>")
    module, params = tiny.decoder(num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    tower(folder / "tower", "clip")
    rows = []
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "purple", "yellow", "orange")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{i}.png")
        rows.append({"images": f"{i}.png", "prompt": "<image>\nwhat is it?", "answer": "cat" if i % 2 else "dog"})
    write_jsonl(folder / "rows.jsonl", rows)
    return Run(
        model=str(folder / "model"),
        vision=Vision(
            str(folder / "tower"), tokenizer.convert_tokens_to_ids("<image>"), whiten=str(folder / "rows.jsonl")
        ),
        data=Data(train=str(folder / "rows.jsonl"), sequence_length=64),
        workdir=str(folder / "run"), adapters={"self_attn/q_proj": LoRA(rank=2)}, trained="projector/|/adapter/",
        optimizer=Optimizer(learning_rate=1e-2, warmup=0), steps=2, batch_size=8, checkpoint_every=1,
        compilation_cache=str(folder / "compiled"),
    )  # fmt: skip


def test_a_run_starts_whitened_and_opens_as_it_ended(run):
    drawn = load_model(dataclasses.replace(run, vision=dataclasses.replace(run.vision, whiten=None)))[1]
    start = load_model(run)[1]
    first = lambda params: np.asarray(params["projector"]["linear_1"]["kernel"])
    assert not np.array_equal(first(start), first(drawn))

    train(run)
    opened = open_model(run.workdir)
    moved = {path for path, x in tree.flatten(opened.params).items() if path in tree.flatten(start)
             and not np.array_equal(x, tree.flatten(start)[path])}  # fmt: skip
    assert moved == {path for path in tree.flatten(start) if path.startswith("projector/")}
    assert np.abs(first(opened.params) - first(start)).max() < 0.05  # two steps of 0.01 from the whitened one

    # Gone on with from its first step, it ends at the same numbers.
    workdir = Path(run.workdir)
    told = numbers(workdir)
    shutil.rmtree(workdir / "checkpoints" / "2")
    train(run)
    assert numbers(workdir) == told
    assert jax.tree.all(jax.tree.map(np.array_equal, open_model(run.workdir).params, opened.params))


def test_rows_without_pictures_cannot_whiten(run, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "what is it?", "answer": "cat"}])
    vision = dataclasses.replace(run.vision, whiten=str(tmp_path / "rows.jsonl"))
    with pytest.raises(ValueError, match=r"whiten='.*rows\.jsonl': none of 1 rows has a field 'images'"):
        load_model(dataclasses.replace(run, vision=vision))
