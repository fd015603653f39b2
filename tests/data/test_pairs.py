"""Preference rows: what is read of them, what is a target, what is left out and counted, and what is refused."""

import math

import numpy as np
import pytest

from jaxmethods.data import Data, Number, Source, batch_shapes, batches, build, evaluation_batches
from jaxmethods.data.views import conversation_of
from jaxmethods.objectives import CREAM, MMedPO, Preference
from tests.data.test_pictures import BLUE, GREEN, RED, colours, flat, sight, tokenizer, write

TEXT = {"prompt": "how many cats?", "chosen": "three cats", "rejected": "no cats at all"}
TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where?"},
]
PICTURE = "<|picture|>" * 4


def laid_out(rows, objective=None, sees=None, **settings):
    views = (objective or Preference()).views()
    return build(Data(pack=False, **settings), tokenizer(), rows=rows, sight=sees, views=views)


def text(row, side, targets=False):
    tokens, marked = row[f"{side}/tokens"], row[f"{side}/target_mask"]
    return tokenizer().decode(tokens[marked if targets else row[f"{side}/segment_ids"] > 0])


def asked(*turns):
    said = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return f"{said}<|im_start|>assistant\n"


def test_a_pair_is_two_rows_with_one_prompt():
    rows, report = laid_out([TEXT], sequence_length=64)
    prompt = asked(("user", "how many cats?"))
    for side in ("chosen", "rejected"):
        assert text(rows[0], side) == f"{prompt}{TEXT[side]}<|im_end|>"
        assert text(rows[0], side, targets=True) == f"{TEXT[side]}<|im_end|>"
    assert (report.examples, report.rows, report.too_long, report.equal_pairs) == (2, 2, 0, 0)


def test_only_the_last_answer_is_a_target_however_the_row_is_written():
    answers = {side: [{"role": "assistant", "content": TEXT[side]}] for side in ("chosen", "rejected")}
    forms = [
        {"prompt": TURNS} | {side: TEXT[side] for side in answers},
        {"prompt": TURNS} | answers,
        {side: [*TURNS, *answer] for side, answer in answers.items()},
    ]
    rows, _ = laid_out(forms, sequence_length=96)
    turns = [(turn["role"], turn["content"]) for turn in TURNS]
    for i in range(3):
        assert text(rows[i], "rejected") == asked(*turns) + "no cats at all<|im_end|>"
        assert text(rows[i], "rejected", targets=True) == "no cats at all<|im_end|>"
        np.testing.assert_array_equal(rows[i]["chosen/tokens"], rows[0]["chosen/tokens"])


def test_what_does_not_fit_and_what_teaches_nothing_is_left_out_and_counted():
    """A cut prompt would not be the same on both sides, and a cut answer is another answer."""
    long = TEXT | {"rejected": "no " * 60}
    rows, report = laid_out(
        [TEXT, long, TEXT | {"rejected": "three cats"}, TEXT | {"prompt": "why?"}], sequence_length=48
    )
    assert len(rows) == 2 and (report.too_long, report.equal_pairs) == (1, 1)
    assert "1 dropped because an answer with its prompt does not fit" in str(report)
    assert "1 dropped because both answers are the same" in str(report)
    with pytest.raises(ValueError, match="no pair is left; of 1 an answer with its prompt does not fit, and 0 have"):
        laid_out([long], sequence_length=48)


def test_pictures_of_each_side():
    same = {"prompt": "<image>\nwhat is it?", "chosen": "a cat", "rejected": "a dog", "images": flat(RED)}
    noised = same | {"rejected": "a cat", "rejected_images": [flat(BLUE)]}
    rows, report = laid_out([same, noised], sees=sight(), sequence_length=64)
    assert report.equal_pairs == 0  # the answers are equal, and what they are given to is not
    of = lambda row, side: colours(
        {k.partition("/")[2]: x for k, x in row.items() if k.startswith(side)}, row[f"{side}/segment_ids"] > 0, sight()
    )
    assert [of(rows[i], side)[0] for i in (0, 1) for side in ("chosen", "rejected")] == [RED, RED, RED, BLUE]
    assert text(rows[1], "rejected") == asked(("user", f"{PICTURE}\nwhat is it?")) + "a cat<|im_end|>"
    _, report = laid_out([same, same | {"rejected": "a cat"}], sees=sight(), sequence_length=64)
    assert report.equal_pairs == 1


def test_numbers_stay_with_their_rows():
    """Also past rows that are left out, in shuffled batches, by source, and in rows that fill a batch up."""
    objective = Preference(weight="sure")
    given = [TEXT | {"prompt": f"how many {i}?", "sure": i} for i in range(7)]
    given.insert(2, TEXT | {"rejected": "three cats", "sure": 100})
    rows, _ = laid_out(given, objective, sequence_length=64)
    seen = 0
    for batch, _ in zip(batches(rows, batch_size=3, seed=1), range(4), strict=False):
        assert batch["weight"].shape == (3,) and batch["weight"].dtype == np.float32
        for tokens, weight in zip(batch["chosen/tokens"], batch["weight"], strict=True):
            assert f"how many {int(weight)}?" in tokenizer().decode(tokens)
            seen += 1
    assert seen == 12
    *_, last = evaluation_batches(rows, 4)
    np.testing.assert_array_equal(last["weight"], [4, 5, 6, 0])
    shapes = batch_shapes(Data(sequence_length=64, pack=False), 3, views=objective.views())
    first = next(iter(batches(rows, batch_size=3, seed=1)))
    assert {name: (x.shape, x.dtype) for name, x in first.items()} == {
        name: (shape, np.dtype(dtype)) for name, (shape, dtype) in shapes.items()
    }


def test_weights_are_normalised_source_by_source(tmp_path):
    text_scores, visual_scores = [0.2, 0.4, 0.9], [7.0, 9.0]
    write(tmp_path / "text.jsonl", [TEXT | {"relevance": s} for s in text_scores])
    write(tmp_path / "visual.jsonl", [TEXT | {"relevance": s} for s in visual_scores])
    data = Data(
        evaluation=(str(tmp_path / "text.jsonl"), str(tmp_path / "visual.jsonl")), pack=False, sequence_length=64
    )
    rows, _ = build(data, tokenizer(), split="evaluation", views=MMedPO().views())
    by_hand = []
    for scores in map(np.array, (text_scores, visual_scores)):
        by_hand += np.clip(1 + math.sqrt(0.1) * (scores - scores.mean()) / scores.std(), 0.75, 1.25).tolist()
    np.testing.assert_allclose([rows[i]["weight"] for i in range(5)], by_hand, rtol=1e-5)


def test_fields_of_other_names():
    source = Source("rows.jsonl", chosen="better", rejected="worse", prompt="asked")
    row = {"asked": TEXT["prompt"], "better": TEXT["chosen"], "worse": TEXT["rejected"]}
    found = conversation_of(row, source, "row 1")
    assert found.pair == ("three cats", "no cats at all", None) and found.messages[0]["content"] == "how many cats?"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a?", "chosen": "b"}, "row 1.*no field 'rejected', and a pair needs both answers; its fields are prompt"),
        (TEXT | {"chosen": " "}, "field 'content' is empty"),
        (TEXT | {"rejected": 3}, "field 'rejected' must be a list"),
        (TEXT | {"rejected": []}, "field 'rejected' must be .*not an empty list"),
        (TEXT | {"chosen": TURNS}, "field 'chosen' ends with a message of 'user'"),
        (
            {"chosen": [*TURNS, {"role": "assistant", "content": "x"}], "rejected": [{"role": "assistant", "content": "y"}]},
            "'chosen' and 'rejected' answer different prompts",
        ),
        ({"chosen": "x", "rejected": "y"}, "no field 'prompt', and no messages before the answers"),
        ({"prompt": "a?", "answer": "b"}, "this row has no two answers, 'chosen' and 'rejected'; its fields are prompt, answer"),
        (TEXT | {"images": flat(GREEN), "prompt": "<image>"}, "has pictures and the model reads none|reads no pictures"),
    ],
)  # fmt: skip
def test_refused_with_its_row(row, said):
    with pytest.raises(ValueError, match=said):
        laid_out([row], sequence_length=64)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "0.5", None, True])
def test_weights_that_are_none(value):
    with pytest.raises(ValueError, match=r"row 2.*: field 'sure' must be a finite number of at least 0, not"):
        laid_out([TEXT | {"sure": 1.0}, TEXT | {"sure": value}], Preference(weight="sure"), sequence_length=64)
    with pytest.raises(ValueError, match="a finite number, not"):
        Number("x").read({"x": math.nan}, "row 1")


def test_weights_of_nothing():
    with pytest.raises(ValueError, match="field 'sure': every weight is 0, so nothing would be learnt"):
        laid_out([TEXT | {"sure": 0}] * 2, Preference(weight="sure"), sequence_length=64)
    with pytest.raises(ValueError, match="field 'consistency': a consistency of 2 is above 1"):
        laid_out([TEXT | {"consistency": 2}], CREAM(), sequence_length=64)
