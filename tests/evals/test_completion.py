"""Answers drawn and scored: the same whatever else is in the batch, and by another route."""

import jax
import numpy as np
import pytest

from jaxmethods import data, models
from jaxmethods.evals import completion
from tests import tiny
from tests.launch.conftest import chatml_tokenizer

PROMPTS = ["how many cats?", "and dogs", "which mat is it, and why?", "1 + 1", "a"]


@pytest.fixture(scope="module")
def model():
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    return module, params, tokenizer


def drawn(model, prompts=PROMPTS, **options):
    given = dict(max_new_tokens=5, samples=3, temperature=1.0, top_p=0.9, key=jax.random.key(0)) | options
    return completion.complete(*model, prompts, **given)


def test_samples_depend_on_the_prompts_key_alone(model):
    whole = drawn(model, batch_size=16)
    assert [len(some) for some in whole] == [3] * 5 and len({text for some in whole for text in some}) > 10
    assert drawn(model, batch_size=4) == whole
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(5))
    back = [4, 1, 3]
    assert drawn(model, [PROMPTS[i] for i in back], key=keys[np.array(back)], batch_size=4, length=48) == [
        whole[i] for i in back
    ]
    first = drawn(model, samples=1)
    assert first == [some[0] for some in whole]  # one sample is no list
    assert drawn(model, key=jax.random.key(1)) != whole


def test_greedy_answers_need_no_key_and_take_the_likeliest(model):
    said = completion.complete(*model, PROMPTS, max_new_tokens=3, batch_size=2)
    module, params, tokenizer = model
    tokens = data.prompt_tokens(tokenizer, PROMPTS[2])
    for _ in range(3):
        tokens = np.append(tokens, np.argmax(models.logits(module, params, tokens[None])[0, -1])).astype(np.int32)
    assert said[2] == tokenizer.decode(tokens[-3:], skip_special_tokens=True).strip()
    assert drawn(model, samples=1, temperature=0.0, key=None, max_new_tokens=3) == said


def test_what_cannot_be_drawn_is_refused(model):
    for options, words in (
        ({"key": None}, "key is missing"),
        ({"temperature": 0.0}, "samples=3 with temperature=0.0"),
        ({"samples": 0}, "samples=0"),
        (
            {"key": jax.random.split(jax.random.key(0), 2)},
            r"key has shape \(2,\); give one key, or one for each of the 5",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            drawn(model, **options)


def test_logps_of_answers_by_another_route(model):
    module, params, tokenizer = model
    rows = [{"prompt": prompt, "answer": f"{i} cats" * (i + 1)} for i, prompt in enumerate(PROMPTS[:3])]
    sums, lengths = completion.answer_logps(*model, rows, sequence_length=96, batch_size=2)
    for row, total, length in zip(rows, sums, lengths, strict=True):
        asked = data.prompt_tokens(tokenizer, row["prompt"])
        answer = np.array([*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], 2])  # <|im_end|>
        logps = jax.nn.log_softmax(models.logits(module, params, np.concatenate([asked, answer])[None])[0])
        by_hand = logps[np.arange(len(asked) - 1, len(asked) + len(answer) - 1), answer].sum()
        assert length == len(answer) and total == pytest.approx(float(by_hand), abs=1e-4)
    nll = completion.answer_nll(*model, rows, sequence_length=96, batch_size=2)
    assert nll == pytest.approx(-sums.sum() / lengths.sum(), rel=1e-5)

    # Nothing is cut: a row that does not fit has no sum, and the others theirs.
    longest = max(len(data.render(row, tokenizer).tokens) for row in rows)
    fewer, same = completion.answer_logps(*model, rows, sequence_length=longest - 1, batch_size=2)
    assert np.isnan(fewer).sum() == 1
    np.testing.assert_array_equal(same, lengths)
    np.testing.assert_allclose(fewer[~np.isnan(fewer)], sums[~np.isnan(fewer)], rtol=1e-5)


def test_only_the_last_turn_is_an_answer(model):
    turn = lambda role, content: {"role": role, "content": content}
    talk = [turn("user", "hi"), turn("assistant", "hello"), turn("user", "how many?"), turn("assistant", "3")]
    _, lengths = completion.answer_logps(*model, [{"messages": talk}], sequence_length=96, batch_size=1)
    assert lengths == 2
