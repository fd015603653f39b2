# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""SmolLM2 in lm-evaluation-harness: our model and the harness' own `hf` model, on the same weights, give the same answers."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from jaxmethods import models
from jaxmethods.evals.harness import HarnessLM
from tests.evals.harness_tasks import write_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning", "ignore::FutureWarning"
    ),
]
LONG = (
    "The heart is normal in size, the lungs are clear, and no effusion is seen on this frontal view of the chest. " * 5
)


@pytest.fixture(scope="module")
def both(smollm2_file, tmp_path_factory):
    """Ours and theirs: the dequantised weights, saved in Hugging Face's layout and opened by transformers. 64 tokens are read."""
    folder = str(tmp_path_factory.mktemp("smollm2"))
    module, params = models.load(smollm2_file)
    tokenizer = models.load_tokenizer(smollm2_file)
    models.save(folder, module, params, tokenizer=tokenizer)
    theirs = HFLM(folder, device="cpu", dtype="float32", batch_size=4, max_length=64)
    return HarnessLM(module, params, tokenizer, max_length=64, batch_tokens=256), theirs


def asked(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_loglikelihoods_and_greedy_flags(both):
    ours, theirs = both
    given = asked(
        "loglikelihood",
        ("The capital of France is", " Paris"), ("The capital of France is", " Berlin"),
        ("The capital of France is ", "the city of Paris"),
        ("One, two, three,", " four"), ("", "The cat sat on the mat."), (LONG, " No acute disease."), ("a\n", "\nb"),
        ("<|im_start|>user\nHello<|im_end|>\n", "<|im_start|>assistant"),
        ("1 + 1 =", " 2"), ("1 + 1 =", " 3"), ("Naïve café", "s ☕"),
    )  # fmt: skip
    found, expected = ours.loglikelihood(given), theirs.loglikelihood(given, disable_tqdm=True)
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4, atol=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in found} == {True, False}


def test_rolling_texts(both):
    ours, theirs = both
    given = asked("loglikelihood_rolling", (LONG,), ("Paris",), ("The cat sat on the mat.\n\nThe end.",))
    expected = theirs.loglikelihood_rolling(given, disable_tqdm=True)
    np.testing.assert_allclose(ours.loglikelihood_rolling(given), expected, rtol=1e-4, atol=1e-3)


def test_greedy_texts(both):
    ours, theirs = both
    given = asked(
        "generate_until",
        ("The capital of France is", {"until": ["."], "max_gen_toks": 12}),
        (LONG, {"until": ["\n", " the"], "max_gen_toks": 12}),
        ("One, two, three,", {"until": [], "max_gen_toks": 6}),
        ("<|im_start|>user\nSay hello.<|im_end|>\n<|im_start|>assistant\n", {"until": ["<|im_end|>"], "max_gen_toks": 12}),
    )  # fmt: skip
    assert ours.generate_until(given) == theirs.generate_until(given, disable_tqdm=True)


def test_whole_tasks(both, tmp_path):
    write_tasks(tmp_path)
    run = lambda lm: lm_eval.simple_evaluate(
        lm, tasks=["tiny_choices", "tiny_texts"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )["results"]  # fmt: skip
    found, expected = map(run, both)
    assert found.keys() == expected.keys()
    for task, numbers in expected.items():
        for name, value in numbers.items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-4), (task, name)
