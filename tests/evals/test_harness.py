"""The real lm-evaluation-harness on local task files: its tasks run on our models, with the numbers of each request alone."""

import json

import numpy as np
import pytest

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from jaxmethods import models
from jaxmethods.evals.harness import HarnessLM
from jaxmethods.evals.scoring import texts
from tests import tiny
from tests.evals.harness_tasks import TASKS, write_tasks
from tests.launch.conftest import chatml_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("tasks"))), include_defaults=False)


@pytest.fixture(scope="module")
def model():
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder(
        "llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, max_position_embeddings=64
    )
    return module, params, tokenizer


def logp(model, context, continuation):
    module, params, _ = model
    tokens = np.zeros((1, 80), np.int32)
    whole = [*context, *continuation]
    tokens[0, : len(whole)], places = whole, np.arange(80)
    logits = np.asarray(models.logits(module, params, tokens, (places < len(whole))[None]))[0]
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return logps[np.arange(len(context), len(whole)) - 1, continuation].sum()


def test_the_harness_runs_its_tasks(model, manager):
    lm = HarnessLM(*model, batch_tokens=128)
    names = [f"tiny_{name}" for name in TASKS]
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    assert set(found["results"]) == set(names) and found["config"]["model_num_parameters"] > 0
    for sample in found["samples"]["tiny_choices"]:
        scores = []
        for (context, continuation), ((told, greedy),) in zip(sample["arguments"], sample["resps"], strict=True):
            pair = texts.pair_of(model[2], context, continuation)
            cut = [*pair.context, *pair.continuation][-65 : -len(pair.continuation)]
            assert told == pytest.approx(logp(model, cut, pair.continuation), rel=1e-5) and not greedy
            scores.append(told)
        assert sample["acc"] == (np.argmax(scores) == sample["doc"]["answer"])
    for sample in found["samples"]["tiny_texts"]:
        ((text,),), ((told,),) = sample["arguments"], sample["resps"]
        pairs = texts.rolling(model[2].encode(text), prefix=lm.prefix_token_id, limit=64)
        assert told == pytest.approx(sum(logp(model, *pair) for pair in pairs), rel=1e-5)
    for sample in found["samples"]["tiny_answers"]:
        ((said,),) = sample["resps"]
        assert "cat" not in said and "." not in said
    assert lm.work.requests > 15 and len(lm.work.programs) <= 6


def test_chat_templates_reach_the_prompts(model, manager):
    lm = HarnessLM(*model, batch_tokens=128, max_length=48)
    found = lm_eval.simple_evaluate(
        lm, tasks=["tiny_answers"], task_manager=manager, limit=1, apply_chat_template=True, system_instruction="be short",
        bootstrap_iters=0,
    )  # fmt: skip
    (context, options), *_ = found["samples"]["tiny_answers"][0]["arguments"]
    assert context == (
        "<|im_start|>system\nbe short<|im_end|>\n<|im_start|>user\nQuestion: What colour is the mat?\nAnswer:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert lm.tokenizer_name == "jaxmethods"


def asked(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def test_answers_that_are_known_are_not_asked_for_again(model):
    done, given = {}, asked("loglikelihood", ("a cat", " sat"), ("", "a dog"), ("a cat", " sat"), ("a mat ", "sat"))
    first = HarnessLM(*model, done=done)
    found = first.loglikelihood(given)
    assert found[0] == found[2] and first.work.requests == 4 and len(done) == 3
    kept = json.loads(json.dumps(done))
    again = HarnessLM(*model, done=kept)
    assert again.loglikelihood(given) == found and again.work.requests == 0
    assert isinstance(again.loglikelihood(given)[0], tuple)
    drawn = HarnessLM(*model, done=kept)
    drawn.generate_until(
        asked("generate_until", ("a", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 2, "until": []}))
    )
    assert len(kept) == 3


def test_pairs_and_windows_are_those_of_the_harness(model, manager):
    lm, tokenizer = HarnessLM(*model), model[2]
    for context, continuation in (
        ("a cat", " sat"),
        ("a cat  ", "sat on"),
        ("<|im_start|>a", "b"),
        ("the mat\n", "\n"),
    ):
        assert texts.pair_of(tokenizer, context, continuation) == TemplateLM._encode_pair(lm, context, continuation)
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in (1, 4, 5, 8, 9, 14):
        tokens = list(range(10, 10 + count))
        theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 1, 4, 1))
        assert [tuple(map(list, pair)) for pair in texts.rolling(tokens, prefix=1, limit=4)] == list(theirs)


def test_rolling_texts_without_tokens_are_nought(model):
    lm = HarnessLM(*model)
    text = "the cat sat on the mat " * 12
    empty = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("",), (text,), ("",), ("",), ("a",), ("",)))
    assert empty[0] == empty[2] == empty[3] == empty[5] == 0
    assert [empty[1], empty[4]] == lm.loglikelihood_rolling(asked("loglikelihood_rolling", (text,), ("a",)))


def test_wrong_requests_are_refused(model):
    lm = HarnessLM(*model)
    for kind, arguments, words in (
        ("loglikelihood", ("a cat", ""), "request 1 of 1 has an empty continuation, after 'a cat'"),
        ("loglikelihood", ("a", " cat" * 80), "and the model reads 64"),
        ("generate_until", ("a", {"num_beams": 4}), "generation option 'num_beams' is not supported"),
        ("generate_until", ("a", {"do_sample": True}), "do_sample with temperature 0"),
        ("generate_until", ("a", {"max_gen_toks": 64}), "asks for 64 new tokens; give 1 to 63"),
    ):
        with pytest.raises(ValueError, match=words):
            getattr(lm, kind)(asked(kind, arguments))
