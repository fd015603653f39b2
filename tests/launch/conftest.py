"""A tiny model with tokenizer, rows, and a recipe, on disk as a user has them; the command line, in its own process or in this."""

import json
import os
import subprocess
import sys

import jax
import pytest
from transformers import PreTrainedTokenizerFast

from jaxmethods import models
from jaxmethods.launch import cli
from tests import tiny
from tests.data.conftest import CHATML, byte_level

RECIPE = """
from jaxmethods.adapters import LoRA, SMoRE
from jaxmethods.data import Data
from jaxmethods.launch import Mesh, Run
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model={model!r},
        data=Data(train={train!r}, evaluation={evaluation!r}, sequence_length=48),
        workdir={workdir!r},
        adapters={{
            "up_proj": SMoRE(experts=(2, 3), fanout=(1, 2), ranks=(1, 2), router_dim=6, gate_dim=4),
            "q_proj": LoRA(rank=2, dropout=0.1),  # draws random numbers at every step
        }},
        optimizer=Optimizer(learning_rate=1e-2, warmup=2),
        steps=12,
        batch_size=4,
        accumulate=2,
        checkpoint_every=3,
        evaluate_every=6,
        compilation_cache={cache!r},
    )
"""


def chatml_tokenizer(*more):
    """A byte tokenizer with ChatML's template and special tokens, and more of the latter."""
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", *more]),
        bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip


def save_talker(folder, num_layers=2):
    """(module, params, tokenizer) of a tiny decoder that talks in bytes, saved as FOLDER/model."""
    tokenizer = chatml_tokenizer()
    told = dict(num_layers=num_layers, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    module, params = tiny.decoder("llama", **told)
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    return module, params, tokenizer


def write_shop(folder, recipe, **rows):
    """NAME.jsonl of each of the rows, and recipe.py, which has the folder's paths."""
    for name, some in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    values = {
        "model": str(folder / "model"), "train": str(folder / "train.jsonl"), "evaluation": str(folder / "heldout.jsonl"),
        "workdir": str(folder / "run"), "cache": str(folder / "compiled"),
    }  # fmt: skip
    (folder / "recipe.py").write_text(recipe.format(**values))


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    """A folder with model/, train.jsonl, heldout.jsonl and recipe.py."""
    folder = tmp_path_factory.mktemp("shop")
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    question = lambda name, i: {"prompt": f"how many cats on mat {name} {i}?", "answer": f"there are {i % 7} cats"}
    rows = {name: [question(name, i) for i in range(count)] for name, count in (("train", 40), ("heldout", 6))}
    write_shop(folder, RECIPE, **rows)
    return folder


def first_device(*_):
    return jax.local_devices()[:1]


@pytest.fixture
def one_device(monkeypatch):
    """A step for eight devices takes three times as long to compile; `plan` and the objectives' own tests have them."""
    monkeypatch.setattr(jax, "devices", first_device)


def numbers(workdir):
    """What a run computed, without what it took."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in row.items() if name not in ("tokens_per_second", "step_seconds")} for row in rows]


@pytest.fixture(scope="session")
def command():
    """Runs `jaxmethods ...` as a process: command("train", "recipe.py") -> CompletedProcess; or starts it."""

    def run(*arguments, start=False, devices=1, timeout=300, **options):
        environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu", "COLUMNS": "120"}
        line = [sys.executable, "-m", "jaxmethods.launch.cli", *map(str, arguments)]
        options = {"env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        if start:
            return subprocess.Popen(line, **options)
        return subprocess.run(line, timeout=timeout, **options)

    return run


@pytest.fixture
def here(capsys, monkeypatch):
    """The same without a process, for what a process adds nothing to but its start: here("plan", ...) -> CompletedProcess."""
    monkeypatch.setenv("COLUMNS", "120")

    def run(*arguments):
        capsys.readouterr()
        status = 0
        try:
            cli.main(list(map(str, arguments)))
        except SystemExit as end:
            status = end.code or 0
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    yield run
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def refused(here):
    """Runs a command that must be refused; returns its one line."""

    def run(*arguments):
        done = here(*arguments)
        line = done.stderr.strip()
        assert done.returncode == 2 and "Traceback" not in line, done
        return line

    return run
