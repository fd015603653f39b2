# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""KTO of a whole batch, from text to number, is the one TRL's KTOTrainer gives for the same two models."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

import datasets
from transformers import AutoModelForCausalLM

from jaxmethods import data, models
from jaxmethods.objectives import KTO
from tests.objectives.test_preference_parity import two  # noqa: F401 (a fixture)

ROWS = [
    {"prompt": "how many cats are on the mat?", "answer": "three cats", "label": True},
    {"prompt": "where is the dog?", "answer": "France", "label": False},
    {"prompt": "is the heart normal?", "answer": "yes", "label": True},
    {"prompt": "what is it?", "answer": "the capital of France is Paris.", "label": False},
]
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


@pytest.mark.filterwarnings("ignore")  # TRL's and torch's own
@pytest.mark.parametrize(("kind", "point"), [("kto", "batch"), ("apo_zero_unpaired", "none")])
@pytest.mark.parametrize("swapped", [False, True])
def test_batch_parity(two, kind, point, swapped, tmp_path):  # noqa: F811
    folder, tokenizer = two
    names = (
        ("reference", "policy") if swapped else ("policy", "reference")
    )  # one of the two has a reference point above 0
    settings = trl.KTOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(ROWS), loss_type=kind, beta=0.3, report_to=[], use_cpu=True,
        bf16=False, max_length=None, **WEIGHTS,
    )  # fmt: skip
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [
        {"prompt": turn("user", r["prompt"]), "completion": turn("assistant", r["answer"]), "label": r["label"]}
        for r in ROWS
    ]
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32) for name in names)
    trainer = trl.KTOTrainer(
        policy, ref_model=reference, args=settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )  # fmt: skip
    given = next(iter(torch.utils.data.DataLoader(trainer.train_dataset, len(ROWS), collate_fn=trainer.data_collator)))
    with torch.no_grad():
        expected = float(trainer.compute_loss(trainer.model, given))
    told = {name: values[-1] for name, values in (trainer._metrics["train"] or trainer._metrics["eval"]).items()}

    (module, params), (_, start) = (models.load(folder / name) for name in names)
    objective = KTO(beta=0.3, reference_point=point, **WEIGHTS)
    made, _ = data.build(data.Data(sequence_length=64, pack=False), tokenizer, rows=ROWS, views=objective.views())
    batch = next(iter(data.evaluation_batches(made, len(ROWS))))
    loss, metrics = objective.loss_fn(module)(params | {"reference": start}, batch, None)
    assert float(loss.value()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert float(metrics["kl"].value()) == pytest.approx(told["kl"], rel=1e-4, abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected"):
        if name in told:
            assert float(metrics[name].value()) == pytest.approx(told[name], rel=1e-4, abs=1e-5), name
