# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""The loss of a whole batch, from text to number, is the one TRL's DPOTrainer gives for the same two models."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import datasets
from transformers import AutoModelForCausalLM

from jaxmethods import data, models
from jaxmethods.objectives import Preference
from tests import tiny
from tests.data.conftest import CHATML
from tests.launch.conftest import chatml_tokenizer

ROWS = [
    {"prompt": "how many cats are on the mat?", "chosen": "three cats", "rejected": "no cats at all, none"},
    {"prompt": "where is the dog?", "chosen": "the dog sat on the log", "rejected": "France"},
    {"prompt": "is the heart normal?", "chosen": "yes", "rejected": "no acute disease"},
    {"prompt": "what is it?", "chosen": "the capital of France is Paris.", "rejected": "a cat"},
]
CASES = {
    "sigmoid": Preference(beta=0.3), "hinge": Preference(loss="hinge", beta=0.3),
    "ipo": Preference(loss="ipo", beta=0.3, per_token=True), "sigmoid_norm": Preference(beta=0.3, per_token=True),
    "robust": Preference(loss="robust", beta=0.3, label_smoothing=0.2),
}  # fmt: skip


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A policy and a reference, as folders, and their tokenizer."""
    tokenizer = chatml_tokenizer()
    # Nothing behind the end of a turn: TRL counts such a newline as a part of the answer, and a model never writes it.
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    folder = tmp_path_factory.mktemp("two")
    module, params = tiny.decoder("llama", vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    moved = jax.tree.map(lambda x: x + 0.05 * np.random.default_rng(0).normal(size=x.shape).astype(x.dtype), params)
    models.save(folder / "policy", module, moved, tokenizer=tokenizer)
    models.save(folder / "reference", module, params, tokenizer=tokenizer)
    return folder, tokenizer


def of_trl(folder, tokenizer, kind, objective, out):
    settings = trl.DPOConfig(
        output_dir=str(out), per_device_train_batch_size=len(ROWS), loss_type=[kind], beta=objective.beta,
        label_smoothing=objective.label_smoothing, report_to=[], use_cpu=True, bf16=False, max_length=None,
    )  # fmt: skip
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [{n: turn("user" if n == "prompt" else "assistant", text) for n, text in row.items()} for row in ROWS]
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in ("policy", "reference")
    )
    trainer = trl.DPOTrainer(
        policy, ref_model=reference, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )  # fmt: skip
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    told = trainer._metrics["train"] or trainer._metrics["eval"]
    return float(loss), {name: values[-1] for name, values in told.items()}


@pytest.mark.filterwarnings("ignore")  # TRL's and torch's own
@pytest.mark.parametrize("kind", CASES)
def test_batch_parity(two, kind, tmp_path):
    (folder, tokenizer), objective = two, CASES[kind]
    expected, told = of_trl(folder, tokenizer, kind, objective, tmp_path)
    module, params = models.load(folder / "policy")
    _, reference = models.load(folder / "reference")
    rows, _ = data.build(data.Data(sequence_length=64, pack=False), tokenizer, rows=ROWS, views=objective.views())
    batch = next(iter(data.batches(rows, batch_size=len(ROWS), seed=0)))
    loss, metrics = objective.loss_fn(module)(params | {"reference": reference}, batch, None)
    assert float(loss.value()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ):
        assert float(metrics[name].value()) == pytest.approx(told[name], rel=1e-4, abs=1e-5), name
