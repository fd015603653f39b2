"""Several readings of a row: CAFe's three, to the letter of its authors' code, and pairs of any kind."""

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data import Data, Source, batch_shapes, batches, build
from jaxmethods.objectives import CAFe
from tests.data.test_pictures import BLUE, GREEN, GREY, RED, asked, colours, flat, sight, tokenizer, write

SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
CLOSED = "<|im_start|>assistant\n<|im_end|>"
PICTURE = "<|picture|>" * 4

DIALOGUE = {
    "messages": [
        {"role": "user", "content": "<image>\nwhat is it?"},
        {"role": "assistant", "content": "a cat."},
        {"role": "user", "content": "where?"},
        {"role": "assistant", "content": "on the mat."},
    ],
    "images": flat(RED),
}


def laid_out(rows, objective=None, **settings):
    """The rows of a build for CAFe, one batch a view, and its report."""
    views = (objective or CAFe()).views()
    made, report = build(Data(pack=False, **settings), tokenizer(), rows=rows, sight=sight(), views=views)
    parted = []
    for index in range(len(made)):
        parted.append({name: {} for name in views})
        for name, array in made[index].items():
            view, _, kind = name.partition("/")
            parted[-1][view][kind] = array
    return parted, report


def read(view):
    """The text of a row, padding left out."""
    return tokenizer().decode(view["tokens"][view["segment_ids"] > 0])


def test_the_three_readings_of_a_dialogue():
    (row,), report = laid_out([DIALOGUE], sequence_length=128)
    dialogue = f"<|im_start|>user\n{PICTURE}\nwhat is it?<|im_end|>\n<|im_start|>assistant\na cat.<|im_end|>\n"
    dialogue += "<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\non the mat.<|im_end|>\n"
    assert read(row["generation"]) == SYSTEM + dialogue
    image = f"<|im_start|>user\n{PICTURE}\nCompress this image in one word:<|im_end|>\n"
    assert read(row["query"]) == SYSTEM + image + CLOSED
    text = "<|im_start|>user\na cat.on the mat.Compress this sentence in one word:<|im_end|>\n"
    assert read(row["target"]) == SYSTEM + text + CLOSED

    last = lambda view: view["tokens"][np.flatnonzero(view["segment_ids"])[-1]]
    assert last(row["query"]) == last(row["target"]) == tokenizer().convert_tokens_to_ids("<|im_end|>")
    for view in ("generation", "query"):
        assert colours(row[view], row[view]["segment_ids"] > 0, sight()) == [RED] * 4
    assert "pixels" not in row["target"] and (report.examples, report.rows) == (3, 3)
    picture = (
        row["generation"]["tokens"] == sight().image_token_id
    )  # published marks: the newline behind it is a target
    assert not row["generation"]["target_mask"][picture].any()
    assert row["generation"]["target_mask"][np.flatnonzero(picture)[-1] + 1]


def test_readings_do_not_depend_on_how_the_row_is_written():
    """Content in parts, prompt and answer; a system prompt of the dialogue's own stays, and no embedding reads it."""
    parts = [{"type": "image"}, {"type": "text", "text": "what is it?"}]
    said = [{"type": "text", "text": "a cat."}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": said, "name": None}]
    one, two, three = laid_out(
        [
            {"messages": messages, "images": [flat(RED)]},
            {"messages": [{"role": "user", "content": "<image>\nwhat is it?"}, {"role": "assistant", "content": "a cat."}],
             "images": flat(RED)},
            {"messages": [{"role": "system", "content": "be kind"}, *messages], "images": flat(RED)},
        ],
        sequence_length=96,
    )[0]  # fmt: skip
    (four,), _ = laid_out([asked("<image>\nwhat is it?", "a cat.", flat(RED))], sequence_length=96)
    for other in (two, four):
        for view in one:
            np.testing.assert_array_equal(one[view]["tokens"], other[view]["tokens"])
            np.testing.assert_array_equal(one[view]["target_mask"], other[view]["target_mask"])
    assert read(three["generation"]).startswith("<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\n")
    for view in ("query", "target"):
        np.testing.assert_array_equal(one[view]["tokens"], three[view]["tokens"])


def test_pairs_have_their_pictures_on_the_side_whose_marker_stands_there():
    given = [
        asked("<image>\nfind a dog like <image>", "<image>\nthis dog", [flat(RED), flat(GREEN), flat(BLUE)]),
        asked("a cat on the mat", "<image>", flat(GREY)),
        asked("<image>\nwhat is it?", "a cat"),
    ]
    given[2]["images"] = [flat(BLUE)]
    rows, _ = laid_out(given, CAFe(pairs=True, alpha_lm=0), sequence_length=64)
    four = lambda *seen: [colour for colour in seen for _ in range(4)]
    for row, query, target in zip(rows, ((RED, GREEN), (), (BLUE,)), ((BLUE,), (GREY,), ()), strict=True):
        assert set(row) == {"query", "target"}
        assert colours(row["query"], row["query"]["segment_ids"] > 0, sight()) == four(*query)
        assert colours(row["target"], row["target"]["segment_ids"] > 0, sight()) == four(*target)
    user = lambda content: f"{SYSTEM}<|im_start|>user\n{content}<|im_end|>\n{CLOSED}"
    assert read(rows[0]["query"]) == user(f"{PICTURE}\nfind a dog like {PICTURE}")
    assert read(rows[0]["target"]) == user(f"{PICTURE}\nthis dog") and read(rows[1]["target"]) == user(PICTURE)
    (several,), _ = laid_out(
        [{"messages": DIALOGUE["messages"], "images": flat(RED)}], CAFe(pairs=True), sequence_length=96
    )
    assert read(several["query"]) == user(f"{PICTURE}\nwhat is it?\nwhere?")
    assert read(several["target"]) == user("a cat.on the mat.")


def test_text_that_is_too_long_is_cut_at_its_end_and_the_instruction_stays():
    caption = "the cat sat on the mat and the dog sat on the log. " * 6
    row = asked("<image>\nwhat?", caption, flat(RED))
    (cut,), report = laid_out([row], CAFe(embedding_length=80), sequence_length=512)
    text = read(cut["target"])
    begin, end = f"{SYSTEM}<|im_start|>user\n", f"Compress this sentence in one word:<|im_end|>\n{CLOSED}"
    assert text.startswith(begin) and text.endswith(end) and report.answers_cut == 1
    kept = text.removeprefix(begin).removesuffix(end)
    assert kept and caption.startswith(kept) and len(kept) < len(caption)
    assert 60 < (cut["target"]["segment_ids"] > 0).sum() <= 80  # no more is lost than it must
    assert cut["target"]["tokens"].shape == (80,) and cut["generation"]["tokens"].shape == (512,)
    (whole,), report = laid_out([row], sequence_length=512)
    assert read(whole["target"]) == begin + caption + end and report.answers_cut == 0
    with pytest.raises(
        ValueError, match=r"row 1: what stands around the text takes \d+ tokens and a row has 20; raise"
    ):
        laid_out([row], CAFe(alpha_lm=0, embedding_length=20), sequence_length=512)


@pytest.mark.parametrize(
    ("row", "objective", "message"),
    [
        (asked("what?", "a cat"), CAFe(), "this row has no picture to embed; its messages are user: 'what.'"),
        ({"messages": [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": " "}],
          "images": flat(RED)}, CAFe(alpha_lm=0), "this row's caption is empty"),
        (asked("", "a cat"), CAFe(pairs=True, alpha_lm=0), "the user's side of this pair is empty"),
        (asked("<image>", "a cat", flat(RED)), CAFe(negatives=True), "no text in its field 'negative'; its fields are prompt,"),
        ({"text": "a cat"}, CAFe(), "has neither 'messages' nor 'prompt'.'answer', which views are made of; its fields are text"),
        ({"messages": "a cat"}, CAFe(), r"field 'messages' must be a list of \{'role', 'content'\}, not text"),
        ({"messages": None}, CAFe(), "field 'messages' must be a list of .* not null"),
        ({"messages": ["a cat"]}, CAFe(), "message 1 of 'messages' must be .* not text"),
        (asked("<image>", 7, flat(RED)), CAFe(), "field 'content' must be text, not a number"),
        (asked("what?", "a cat", flat(RED)), CAFe(), "the text has 0 <image> markers and the row 1 pictures"),
    ],
)  # fmt: skip
def test_a_row_of_which_a_reading_cannot_be_made_is_named(row, objective, message):
    good = asked("<image>\nwhat?", "a cat", flat(RED)) | {"negative": "a dog"}
    with pytest.raises(ValueError, match=f"^rows given in memory, row 2.*{message}"):
        laid_out([good, row], objective, sequence_length=96)


def test_rows_are_left_out_of_all_views_or_of_none():
    """Where the picture does not fit into one of them; counted once."""
    good = asked("<image>\nwhat?", "a cat", flat(RED))
    late = asked("what? " * 40 + "<image>", "a cat", flat(GREEN))
    rows, report = laid_out([late, good, late, good], CAFe(embedding_length=72), sequence_length=64)
    assert len(rows) == 2 and (report.examples, report.rows) == (6, 6)
    assert (report.pictures_dropped, report.dropped) == (2, 0)
    assert all(colours(row["query"], row["query"]["segment_ids"] > 0, sight()) == [RED] * 4 for row in rows)
    with pytest.raises(ValueError, match="no row is left; 2 have pictures that do not fit, and 0 no token"):
        laid_out([late, late], sequence_length=64)
    two = asked("<image>\nand <image>", "a cat", [flat(RED), flat(GREEN)])
    for objective in (CAFe(pairs=True), CAFe(pairs=True, alpha_lm=0)):  # with a dialogue, and with embeddings alone
        rows, report = laid_out([two, good], objective, sequence_length=64, crops=1)
        assert len(rows) == 1 and (report.pictures_dropped, report.dropped) == (1, 0)


def test_views_are_not_packed():
    with pytest.raises(
        ValueError, match=r"reads each row in several ways, so rows cannot share one; set Data\(pack=False\)"
    ):
        build(Data(), tokenizer(), rows=[DIALOGUE], sight=sight(), views=CAFe().views())


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
@pytest.mark.parametrize("views", [None, CAFe(embedding_length=72).views()], ids=["plain", "views"])
def test_the_shapes_of_a_batch_are_known_before_any_data(tmp_path, kind, views):
    """Without `crops` the room is that of the largest picture, so the first rows have such a one."""
    large = {"llava": (8, 8), "llava_onevision": (16, 16)}[kind]
    given = [asked("<image>\nwhat?", "a cat", flat(RED, large)), asked("<image>\nwhat?", "a dog", flat(GREEN, (8, 8)))]
    text = [asked("what?", "a cat")] * 2
    for eyes, rows in ((sight(kind), given), (None, text)):
        if eyes is None and views is not None:
            continue  # CAFe's rows have pictures
        for crops in (None, 7):
            data = Data(sequence_length=80, pack=False, crops=crops)
            made, _ = build(data, tokenizer(), rows=rows, sight=eyes, views=views)
            batch = batches(made, batch_size=2, seed=0)[0]
            told = batch_shapes(data, 2, sight=eyes, views=views)
            assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
                name: (shape, np.dtype(dtype)) for name, (shape, dtype) in told.items()
            }
            corners = {array.shape[2] for name, array in batch.items() if name.endswith("places")}
            assert corners == (set() if eyes is None else {{"llava": 1, "llava_onevision": 4}[kind]})


def test_views_of_several_sources_have_room_for_as_many_crops(tmp_path):
    for name, size in (("small.png", (8, 16)), ("large.png", (16, 16))):
        Image.new("RGB", size).save(tmp_path / name)
    files = [
        Source(write(tmp_path / f"{name}.jsonl", [asked("<image>\nwhat?", "a cat", f"{name}.png")] * 3))
        for name in ("small", "large")
    ]
    data = Data(train=files, sequence_length=80, pack=False)
    rows, _ = build(data, tokenizer(), sight=sight("llava_onevision"), views=CAFe().views())
    batch = next(iter(batches(rows, batch_size=4, seed=0)))
    assert batch["query/pixels"].shape == batch["generation/pixels"].shape == (4, 5, 8, 8, 3)
