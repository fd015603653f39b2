"""What a row becomes: by hand from the text that the template should write."""

import random

import numpy as np
import pytest

from jaxmethods import models
from jaxmethods.data import Place, Renderer, Source, prompt_tokens, render

USER, ASSISTANT = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n"


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def runs(tokenizer, example):
    """The text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.r_[0, example.target_mask.astype(int), 0]))
    return [tokenizer.decode(example.tokens[a:b]) for a, b in edges.reshape(-1, 2)]


def test_one_exchange_by_hand(chatml):
    example = render({"prompt": "how many cats?", "answer": "three cats."}, chatml)
    asked, said = ids(chatml, USER.format("how many cats?") + ASSISTANT), ids(chatml, "three cats.<|im_end|>")
    assert example.tokens.tolist() == asked + said
    assert example.target_mask.tolist() == [False] * len(asked) + [True] * len(said)
    assert example.tokens.dtype == np.int32 and example.target_mask.dtype == bool


def test_every_assistant_turn_is_a_target_and_nothing_else(chatml):
    messages = [
        {"role": "system", "content": "you are a cat"},
        {"role": "user", "content": "what is the capital?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "of France?"},
        {"role": "assistant", "content": "the cat sat.\n\nno"},
        {"role": "user", "content": "this turn is never answered"},
    ]
    example = render({"messages": messages}, chatml)
    assert runs(chatml, example) == ["Paris<|im_end|>", "the cat sat.\n\nno<|im_end|>"]
    written = "<|im_start|>system\nyou are a cat<|im_end|>\n" + USER.format("what is the capital?") + ASSISTANT
    written += "Paris<|im_end|>\n" + USER.format("of France?") + ASSISTANT + "the cat sat.\n\nno<|im_end|>"
    assert chatml.decode(example.tokens) == written  # what follows the last answer is left out


def test_training_shows_the_prompt_as_it_is_asked(chatml, plain, spaced):
    """Whatever the texts, the tokens begin with those of the prompt alone, and the first target comes right after."""
    rng = random.Random(0)
    pieces = ["the", " cat", "\n", " ", "  ", "s", "sat", "'s", " on", "é", "France", ".", "\n\n", " the capital"]
    for _ in range(60):
        prompt, answer = ("".join(rng.choices(pieces, k=rng.randint(1, 6))) for _ in "pa")
        if not answer.strip():
            continue
        for tokenizer in (chatml, plain):
            example, asked = render({"prompt": prompt, "answer": answer}, tokenizer), prompt_tokens(tokenizer, prompt)
            assert example.tokens[: len(asked)].tolist() == asked.tolist()
            assert not example.target_mask[: len(asked)].any() and example.target_mask[len(asked) :].all()
            # joining loses nothing: the ids spell prompt and answer
            assert tokenizer.decode(example.tokens[len(asked) : -1]) == answer
            assert example.tokens[-1] == tokenizer.eos_token_id


def test_prompt_and_answer_never_share_a_token(plain):
    assert ids(plain, "the cat") != ids(plain, "the ca") + ids(plain, "t")  # together they would
    example = render({"prompt": "the ca", "answer": "t"}, plain)
    assert example.tokens.tolist() == [*ids(plain, "the ca"), *ids(plain, "t"), plain.eos_token_id]


def test_an_answer_goes_on_without_the_space_that_begins_a_text(spaced):
    """Where the boundary falls between words, the joined pieces are the tokens of the whole."""
    for prompt, answer in (("the cat", " sat on the mat"), ("the cat\n", "sat"), ("no", "\nno")):
        whole = [spaced.bos_token_id, *ids(spaced, prompt + answer), spaced.eos_token_id]
        assert render({"prompt": prompt, "answer": answer}, spaced).tokens.tolist() == whole
    assert ids(spaced, "sat") != ids(spaced, "\nsat")[-len(ids(spaced, "sat")) :]  # so the space was real


def test_bos_stands_where_the_tokenizer_puts_it(spaced, plain):
    row = {"text": "the cat sat"}
    example = render(row, spaced)
    assert example.tokens.tolist() == [*spaced("the cat sat")["input_ids"], spaced.eos_token_id]
    assert example.target_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)
    assert render(row, plain).tokens.tolist() == [*ids(plain, "the cat sat"), plain.eos_token_id]
    assert prompt_tokens(spaced, "the cat").tolist() == spaced("the cat")["input_ids"]


def test_an_empty_prompt_leaves_the_first_token_untrained(plain):
    example = render({"prompt": "", "answer": "the cat"}, plain)
    assert example.target_mask.tolist() == [False] + [True] * (len(example.tokens) - 1)


def test_many_rows_are_rendered_as_one_by_one(chatml):
    rng = random.Random(1)
    rows = [{"prompt": "cat " * rng.randint(1, 9), "answer": "sat " * rng.randint(1, 9)} for _ in range(700)]
    placed = [(Place("rows", "row", n), row) for n, row in enumerate(rows, 1)]
    many = list(Renderer(chatml).many(placed))
    assert {form for form, _ in many} == {"answer"}
    for row, (_, example) in zip(rows[::50], many[::50], strict=True):
        alone = render(row, chatml)
        assert np.array_equal(alone.tokens, example.tokens) and np.array_equal(alone.target_mask, example.target_mask)


def test_fields_by_other_names(chatml):
    source = Source("x", prompt="question", answer="reply")
    row = {"question": "a", "reply": "b", "other": 3}
    assert np.array_equal(render(row, chatml, source).tokens, render({"prompt": "a", "answer": "b"}, chatml).tokens)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "respnse": "b"}, "this row has neither 'prompt'.'answer' .* its fields are prompt, respnse"),
        ({"prompt": "a", "answer": "b", "text": "c"}, "can be read as answer or text; say which"),
        ({"prompt": "a", "answer": " \n"}, "field 'answer' is empty"),
        ({"prompt": "a", "answer": None}, "field 'answer' must be text, not null"),
        ({"prompt": 3, "answer": "b"}, "field 'prompt' must be text, not a number"),
        ({"text": ""}, "field 'text' is empty"),
        ({"messages": "hi"}, r"must be a list of \{'role', 'content'\}, not text"),
        ({"messages": []}, "not an empty list"),
        ({"messages": ["hi"]}, "message 1 of 'messages' must be .* not text"),
        ({"messages": [{"role": "user"}]}, "message 1 of 'messages': no field 'content'; its fields are role"),
        ({"messages": [{"role": "user", "content": "x"}]}, r"no message has the role 'assistant' \(user\)"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
            "message 2 of 'messages': field 'content' is empty",
        ),
        ({"prompt": "a", "answer": "b<|im_end|>c"}, r"message 2 contains '<\|im_end\|>', which ends a turn"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(chatml, row, message):
    with pytest.raises(ValueError, match=message):
        render(row, chatml)


def test_a_field_missing_later_is_named(chatml):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answr": "b"}]
    placed = [(Place("train.jsonl", "line", n), row) for n, row in enumerate(rows, 1)]
    with pytest.raises(ValueError, match=r"^train.jsonl, line 2: no field 'answer'; its fields are prompt, answr"):
        list(Renderer(chatml).many(placed))


def test_a_default_system_prompt_stays(with_template, chatml):
    tokenizer = with_template(
        "{% if messages and messages[0].role != 'system' %}<|im_start|>system\nbe kind<|im_end|>\n{% endif %}"
        + chatml.chat_template
    )
    example = render({"prompt": "cat?", "answer": "sat"}, tokenizer)
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\ncat?")
    assert runs(tokenizer, example) == ["sat<|im_end|>"]


def test_a_last_turn_may_be_written_with_more_than_the_others(with_template):
    """As templates of reasoning models do: only the last answer shows (empty) thoughts."""
    tokenizer = with_template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    turns = [("user", "one?"), ("assistant", "1"), ("user", "two?"), ("assistant", "2")]
    example = render({"messages": [{"role": role, "content": content} for role, content in turns]}, tokenizer)
    assert runs(tokenizer, example) == ["1<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation .*roles must alternate"),
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
            "ends an answer with '\\\\n' and no special",
        ),
        (
            "[{{ messages | length }}]{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}",
            "changes what precedes message 2",
        ),
    ],
)
def test_templates_that_cannot_be_trained_on_are_refused(with_template, template, message):
    with pytest.raises(ValueError, match=message):
        render({"prompt": "a", "answer": "b"}, with_template(template))


def test_rendering_does_not_depend_on_the_day(with_template, chatml):
    """A template that would print today's date (as Llama 3.2's) gets a fixed one."""
    dated = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    tokenizer = with_template(dated + "{{ date_string }} " + chatml.chat_template)
    assert tokenizer.decode(prompt_tokens(tokenizer, "cat")).startswith("26 Jul 2024 <|im_start|>")


def test_tokenizers_without_template_or_end(plain, chatml):
    with pytest.raises(ValueError, match="chat rows need a chat template"):
        render({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, plain)
    with pytest.raises(ValueError, match="give the prompt as text"):
        prompt_tokens(plain, [{"role": "user", "content": "a"}])
    messages = [{"role": "user", "content": "a"}]
    assert prompt_tokens(chatml, messages).tolist() == prompt_tokens(chatml, "a").tolist()


def test_smollm2_of_its_gguf_file(smollm2_file):
    """The instruct model's own tokenizer and template, default system prompt included."""
    tokenizer = models.load_tokenizer(smollm2_file)
    example = render({"prompt": "What is the capital of France?", "answer": " Paris.\n"}, tokenizer)
    written = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    asked, said = ids(tokenizer, written), ids(tokenizer, " Paris.\n<|im_end|>")
    assert example.tokens.tolist() == asked + said
    assert example.target_mask.tolist() == [False] * len(asked) + [True] * len(said)
    assert asked[:2] == [1, 9690] and said[-1] == 2  # ids of the published vocabulary
