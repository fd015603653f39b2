"""Pictures of rows: the right crop at the right tokens, whatever the row; and what is said of rows that are wrong."""

import functools
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from jaxmethods.data import Data, Place, Renderer, Source, batches, blank, build, evaluation_batches, located, render
from jaxmethods.images import NEWLINE
from tests import tiny
from tests.data.conftest import CHATML, byte_level

ASSISTANT = "<|im_start|>assistant\n"
RED, GREEN, BLUE, GREY = (200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)


@functools.cache
def tokenizer():
    """ChatML, with a token for pictures that is spelt otherwise than the marker in rows."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|picture|>"]
    told = dict(bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML)
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(specials), **told)


@functools.cache
def sight(kind="llava"):
    """Four features a crop; "llava_onevision" cuts a picture into crops and puts a newline behind their rows."""
    return tiny.sight(kind, tokenizer().convert_tokens_to_ids("<|picture|>"))


def ids(text):
    return tokenizer()(text, add_special_tokens=False)["input_ids"]


def paint(folder, name, colour, size=(8, 8)):
    Image.new("RGB", size, colour).save(folder / name)
    return str(folder / name)


def flat(colour, size=(8, 8)):
    return np.full((*size[::-1], 3), colour, np.uint8)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(question, answer, pictures=None):
    row = {"prompt": question, "answer": answer}
    return row if pictures is None else row | {"images": pictures}


def colours(row, where, sight):
    """The colour seen at each image token of `where`: the weighted mean of the crops' first pixels; None for the newline."""
    at = np.flatnonzero((row["tokens"] == sight.image_token_id) & where)
    corner = row["pixels"][:, 0, 0].astype(np.float64)
    weights = row.get("place_weights", np.ones((len(where), 1), np.float32))
    seen = []
    for token in at:
        places = row["places"][token]
        assert (places == NEWLINE).all() or (places >= 0).all()
        mixed = weights[token] @ corner[places // sight.format.features_per_crop] if places[0] >= 0 else None
        seen.append(None if mixed is None else tuple(round(float(level)) for level in mixed))
    assert (row["places"][row["tokens"] != sight.image_token_id] == -1).all()
    return seen


def same(one, two):
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)


# One row


def test_a_row_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "cat.png")
    given = asked("<image>\nhow many cats?", "three", str(tmp_path / "cat.png"))
    rows, report = build(Data(sequence_length=64), tokenizer(), rows=[given], sight=sight())
    row = rows[0]
    before, after, said = (
        ids("<|im_start|>user\n"),
        ids("\nhow many cats?<|im_end|>\n" + ASSISTANT),
        ids("three<|im_end|>"),
    )
    tokens = [*before, *[sight().image_token_id] * 4, *after, *said]
    assert row["tokens"][: len(tokens)].tolist() == tokens and not row["tokens"][len(tokens) :].any()
    assert row["target_mask"].sum() == len(said) == report.target_tokens
    assert row["target_mask"][len(tokens) - len(said) : len(tokens)].all()
    places = np.full((64, 1), -1)
    places[len(before) : len(before) + 4, 0] = range(4)
    np.testing.assert_array_equal(row["places"], places)
    np.testing.assert_array_equal(row["pixels"], picture[None])
    assert row["places"].dtype == np.int32 and row["pixels"].dtype == np.uint8 and "place_weights" not in row


def test_parts_of_content_are_lines_with_a_marker_for_each_picture():
    parts = [{"type": "text", "text": "which?"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "say"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "the dog"}]}
    listed = {"messages": [{"role": "user", "content": parts}, answer], "images": [flat(RED), flat(GREEN)]}
    spelt = asked("which?\n<image>\n<image>\nsay", "the dog", [flat(RED), flat(GREEN)])
    one, two = render(listed, tokenizer(), sight=sight()), render(spelt, tokenizer(), sight=sight())
    assert one.tokens.tolist() == two.tokens.tolist() and one.target_mask.tolist() == two.target_mask.tolist()
    prompts = [Renderer(tokenizer(), sight=sight()).prompt(content, [flat(RED), flat(GREEN)]) for content in (
        [{"role": "user", "content": parts}], "which?\n<image>\n<image>\nsay",
    )]  # fmt: skip
    assert prompts[0].tokens.tolist() == prompts[1].tokens.tolist() == one.tokens[: len(prompts[0].tokens)].tolist()


@pytest.mark.parametrize("marks", ["answers", "published"])
def test_image_tokens_are_never_targets(marks):
    """Also where an assistant shows a picture, and where a row is plain text, which is all targets."""
    messages = [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "here <image> it is"}]
    rows = [
        {"messages": messages, "images": flat(RED)},
        asked("a cat", "here <image> it is", flat(RED)),
        {"text": "here <image> it is", "images": flat(RED)},
    ]
    for row in rows:
        example = Renderer(tokenizer(), sight=sight(), marks="answers" if "text" in row else marks)(row)
        of_image = example.tokens == sight().image_token_id
        assert of_image.sum() == 4 and not example.target_mask[of_image].any()
        assert (
            example.target_mask[np.flatnonzero(of_image)[-1] + 1]
            and example.target_mask[np.flatnonzero(of_image)[0] - 1]
        )


def test_published_marks_by_hand(chatml):
    """Each assistant's turn from its header to the newline behind it, and elsewhere the newline and what begins and ends turns."""
    turns = [
        ("user", "how many\ncats?"), ("assistant", "three\n\ncats"), ("user", "and the dog assistant?"),
        ("assistant", "on the mat"),
    ]  # fmt: skip
    messages = [{"role": role, "content": content} for role, content in turns]
    example = Renderer(chatml, marks="published")({"messages": messages})
    stretches = [
        ("<|im_start|>", False),  # nothing precedes the first token
        ("user", False), ("\n", True), ("how many", False), ("\n", True), ("cats?", False), ("<|im_end|>\n", True),
        ("<|im_start|>assistant\nthree\n\ncats<|im_end|>\n", True),
        ("<|im_start|>", True), ("user", False), ("\n", True), ("and the dog assistant?", False), ("<|im_end|>\n", True),
        ("<|im_start|>assistant\non the mat<|im_end|>\n", True),
    ]  # fmt: skip
    encode = lambda text: chatml(text, add_special_tokens=False)["input_ids"]
    tokens = [(token, target) for text, target in stretches for token in encode(text)]
    assert example.tokens.tolist() == [token for token, _ in tokens]
    assert example.target_mask.tolist() == [target for _, target in tokens]


def test_published_marks_need_chatml(plain, spaced):
    with pytest.raises(ValueError, match='marks="published" needs a tokenizer of the ChatML form'):
        other = PreTrainedTokenizerFast(tokenizer_object=spaced.backend_tokenizer, bos_token="<s>", eos_token="</s>")
        other.chat_template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}"
        Renderer(other, marks="published")(asked("the cat", "sat"))
    with pytest.raises(ValueError, match="marks"):
        Renderer(plain, marks="all")


# Wrong rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked("<image> cat", "sat"), "has 1 <image> markers and the row 0 pictures; give one marker for each"),
        (asked("<image> <image> cat", "sat", flat(RED)), "has 2 <image> markers and the row 1 pictures"),
        (asked("cat", "sat", [flat(RED), flat(RED)]), "has 0 <image> markers and the row 2 pictures"),
        (asked("<image> cat", "sat", 7), "a picture must be a path, bytes, .* this one is int '?7"),
        (asked("<image> cat", "sat", {"bytes": None, "path": None}), "a picture must be a path"),
        (asked("<image> cat", "sat", b"GIF or not"), "the picture is none in a format read here .* begins with b'GIF or"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "must have type 'text' or 'image', not 'video'"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named(row, message):
    user, assistant = {"role": "user", "content": "cat"}, {"role": "assistant", "content": "sat"}
    first = asked("cat", "sat") if "prompt" in row else {"messages": [user, assistant]}
    with pytest.raises(ValueError, match=f"^rows given in memory, row 2.*{message}"):
        build(Data(), tokenizer(), rows=[first, row], sight=sight())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (asked("<image> cat", "sat"), "the text has <image> in it and the model reads no pictures; take it out"),
        (asked("cat", "sat", "cat.png"), "has pictures and the model reads none; take a model that sees"),
    ],
)
def test_a_model_that_reads_text_alone_refuses_pictures(row, message):
    with pytest.raises(ValueError, match=f"^rows given in memory, row 2:? {message}"):
        build(Data(), tokenizer(), rows=[asked("cat", "sat"), row])
    with pytest.raises(ValueError, match=message):
        Renderer(tokenizer()).prompt(row["prompt"], row.get("images"))
    rows, _ = build(Data(), tokenizer(), rows=[{"text": "write <image> here"}])  # words like others
    assert tokenizer().decode(rows[0]["tokens"][rows[0]["segment_ids"] > 0]) == "write <image> here<|im_end|>"


def test_files_that_are_missing_broken_or_changed(tmp_path):
    paint(tmp_path, "cat.png", RED, (8, 16))
    path = write(tmp_path / "rows.jsonl", [asked("cat", "sat"), asked("<image> cat", "sat", "cap.png")])
    eyes = sight("llava_onevision")
    with pytest.raises(
        FileNotFoundError, match=r"rows.jsonl, line 2: picture .*cap.png does not exist; near it: cat.png"
    ):
        build(Data(train=path), tokenizer(), sight=eyes)

    write(tmp_path / "rows.jsonl", [asked("cat", "sat"), asked("<image> cat", "sat", "cat.png")])
    rows, _ = build(Data(train=path, pack=False), tokenizer(), sight=eyes)
    assert rows[1]["pixels"].shape == (3, 8, 8, 3)  # the sizes were read, and now the file changes
    paint(tmp_path, "cat.png", RED, (16, 16))
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 2: picture .*cat.png has another size than when the run began"
    ):
        rows[1]

    noise = np.random.default_rng(0).integers(0, 256, (16, 8, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "cat.png")
    whole = (tmp_path / "cat.png").read_bytes()
    (tmp_path / "cat.png").write_bytes(whole[: len(whole) // 2])  # the header is whole, so that rows are laid out
    rows, _ = build(Data(train=path, pack=False), tokenizer(), sight=eyes)
    for threads in (1, 2):
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: picture .*cat.png is cut short"):
            next(iter(batches(rows, batch_size=2, seed=0, threads=threads)))
    (tmp_path / "cat.png").write_bytes(whole[:20])
    with pytest.raises(
        ValueError, match=r"rows.jsonl, line 2: picture .*cat.png (is cut short|cannot be read|is none in)"
    ):
        build(Data(train=path), tokenizer(), sight=eyes)


# Where pictures are


def test_relative_paths_start_from_the_rows(tmp_path, monkeypatch):
    (tmp_path / "data" / "png").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    paint(tmp_path / "data" / "png", "red.png", RED)
    absolute = paint(tmp_path, "green.png", GREEN)
    given = [asked("<image> <image> cat", "sat", ["png/red.png", absolute]), asked("<image> dog", "sat", "png/red.png")]
    path = write(tmp_path / "data" / "rows.jsonl", given)
    for train in (path, "data/rows.jsonl", "data/*.jsonl"):
        rows, _ = build(Data(train=train, pack=False), tokenizer(), sight=sight())
        assert colours(rows[0], rows[0]["segment_ids"] > 0, sight()) == [RED] * 4 + [GREEN] * 4
        assert colours(rows[1], rows[1]["segment_ids"] > 0, sight()) == [RED] * 4

    assert located(given[0]["images"], path) == [str(tmp_path / "data" / "png" / "red.png"), absolute]
    assert located("png/red.png", path) == str(tmp_path / "data" / "png" / "red.png") and located(None, path) is None
    assert located({"bytes": None, "path": "png/red.png"}, "data/rows.jsonl") == os.path.join("data", "png", "red.png")
    grey = blank([absolute, "data/png/red.png"])
    assert [picture.shape for picture in grey] == [(8, 8, 3)] * 2 and (grey[0] == 127).all() and blank(None) is None


def test_pictures_inside_a_parquet_file(tmp_path):
    """As `datasets` stores them: {"bytes", "path"} in a column, or a list of these; and decoded, from one of its folders."""
    datasets = pytest.importorskip("datasets")
    given = [
        asked("<image> cat", "sat", flat(RED)),
        asked("no picture", "sat"),
        asked("<image> dog", "sat", flat(GREEN)),
    ]
    wanted, _ = build(Data(pack=False), tokenizer(), rows=given, sight=sight())
    inside = {"bytes": Path(paint(tmp_path, "red.png", RED)).read_bytes(), "path": "red.png"}
    outside = {"bytes": None, "path": paint(tmp_path, "green.png", GREEN)}
    columns = {"prompt": [row["prompt"] for row in given], "answer": ["sat"] * 3, "images": [inside, None, outside]}
    one = datasets.Dataset.from_dict(columns).cast_column("images", datasets.Image())
    lists = columns | {"images": [[inside], [], [outside]]}
    several = datasets.Dataset.from_dict(lists).cast_column("images", datasets.Sequence(datasets.Image()))
    one.to_parquet(tmp_path / "one.parquet")
    several.to_parquet(tmp_path / "several.parquet")
    one.save_to_disk(tmp_path / "folder")
    (tmp_path / "red.png").unlink()
    for name in ("one.parquet", "several.parquet", "folder"):
        rows, _ = build(Data(train=str(tmp_path / name), pack=False), tokenizer(), sight=sight())
        for index in range(3):
            same(rows[index], wanted[index])


# Many rows


def painted(count, kind="llava"):
    """Rows of none, one or two pictures, each in a colour of its own, whose number the text tells; and all their colours."""
    rows, painted = [], []
    for number in range(count):
        pictures = [(10 + 20 * number, 5, 100 * second) for second in range(number % 3)]
        # Of several pictures each is padded to a square; alone, these make three crops, five, and three.
        size = ((8, 16), (16, 16), (16, 8))[number // 3 % 3] if kind != "llava" and len(pictures) == 1 else (8, 8)
        marked = "<image> and " * len(pictures)
        told = None if not pictures else [flat(colour, size) for colour in pictures]
        rows.append(asked(f"{marked}cat {number}?", f"sat {number}", told))
        painted.append(pictures)
    return rows, painted


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_packed_rows_have_each_picture_at_its_own_tokens(kind):
    given, wanted = painted(10, kind)
    eyes = sight(kind)
    rows, report = build(Data(sequence_length=128), tokenizer(), rows=given, sight=eyes)
    assert len(rows) < 10 == report.examples and max(rows[i]["segment_ids"].max() for i in range(len(rows))) > 2
    found = {}
    for row in (rows[i] for i in range(len(rows))):
        assert row["pixels"].shape == rows[0]["pixels"].shape
        for segment in range(1, row["segment_ids"].max() + 1):
            here = row["segment_ids"] == segment
            number = int(tokenizer().decode(row["tokens"][here]).split("cat ")[1].split("?")[0])
            found[number] = colours(row, here, eyes)
            assert row["positions"][here].tolist() == list(range(here.sum()))
    assert sorted(found) == list(range(10))
    for number, pictures in enumerate(wanted):
        assert [colour for colour, _ in itertools.groupby(c for c in found[number] if c)] == pictures
        # Features and newlines: four of the whole picture; behind them a map of 4 x 2, 4 x 4 (averaged to 2 x 2) or 2 x 4.
        alone = ((4 + 8, 4), (4 + 4, 2), (4 + 8, 2))[number // 3 % 3]
        features, newlines = (4, 0) if kind == "llava" else (4, 1) if len(pictures) > 1 else alone
        assert len([c for c in found[number] if c]) == features * len(pictures)
        assert found[number].count(None) == newlines * len(pictures)


def test_the_features_of_a_picture_stand_in_their_order():
    """Row by row, crop behind crop, and in a packed row behind those of the examples before."""
    given, _ = painted(6)
    rows, _ = build(Data(sequence_length=256), tokenizer(), rows=given, sight=sight())
    assert len(rows) == 1
    row = rows[0]
    of_image = row["tokens"] == sight().image_token_id
    assert row["places"][of_image, 0].tolist() == list(range(4 * 6)) and row["pixels"].shape == (6, 8, 8, 3)


def test_rows_that_are_too_long_keep_their_pictures_whole():
    room = len(ids("<|im_start|>user\n")) + 4 + len(ids(" cat<|im_end|>\n" + ASSISTANT)) + 3
    given = [
        asked("<image> cat", "on the mat " * 9, flat(RED)),  # the answer loses its end
        asked("<image> cat" + " cat" * 9, "sat", flat(RED)),  # nothing of the answer is left
        asked("cat" + " cat" * 9 + "<image>", "sat", flat(RED)),  # the picture ends behind the row
        asked("<image> cat", "s", flat(GREEN)),
        asked("cat " * 20, "sat"),  # text alone loses its beginning, as ever
    ]
    for pack in (True, False):
        rows, report = build(Data(sequence_length=room, pack=pack), tokenizer(), rows=given, sight=sight())
        assert (report.examples, report.dropped, report.pictures_dropped) == (3, 0, 2)
        assert (report.answers_cut, report.prompts_cut) == (1, 1)
        assert "2 dropped with pictures that do not fit" in str(report)
        found = [colours(rows[i], rows[i]["segment_ids"] > 0, sight()) for i in range(len(rows))]
        assert sorted(found) == [[], [GREEN] * 4, [RED] * 4]
        assert all(rows[i]["target_mask"].any() for i in range(len(rows)))
    with pytest.raises(ValueError, match=r"no row is left; 2 have pictures that do not fit"):
        build(Data(sequence_length=room), tokenizer(), rows=given[1:3], sight=sight())


def test_plain_text_with_a_picture_is_one_example():
    given = [{"text": "see <image> the cat " + "sat " * 20, "images": flat(RED)}, {"text": "the cat"}]
    whole = len(render(given[0], tokenizer(), sight=sight()).tokens)
    rows, report = build(Data(sequence_length=whole, pack=False), tokenizer(), rows=given, sight=sight())
    assert report.examples == 2 and colours(rows[0], rows[0]["segment_ids"] > 0, sight()) == [RED] * 4
    rows, report = build(Data(sequence_length=16, pack=False), tokenizer(), rows=given, sight=sight())
    assert report.examples == 2 and report.texts_split == 0 and report.answers_cut == 1
    assert colours(rows[0], rows[0]["segment_ids"] > 0, sight()) == [RED] * 4


def test_rows_of_one_batch_have_room_for_as_many_crops(tmp_path):
    """Several sources, and text alone among them."""
    two, none = painted(3)[0][2], asked("no picture", "at all")
    large = asked("<image> cat", "sat", paint(tmp_path, "large.png", GREY, (16, 16)))
    eyes = sight("llava_onevision")
    for given, kind, crops in (([two, none], "llava", 2), ([none], "llava", 1), ([large, none], "llava_onevision", 5)):
        rows, _ = build(Data(pack=False), tokenizer(), rows=given, sight=sight(kind))
        assert {rows[i]["pixels"].shape[0] for i in range(len(rows))} == {crops}
    files = [write(tmp_path / f"{i}.jsonl", [row] * 4) for i, row in enumerate((none, large))]
    for split, told in (("train", {"train": files}), ("evaluation", {"evaluation": files})):
        rows, _ = build(Data(**told, pack=False), tokenizer(), split=split, sight=eyes)
        assert {rows[i]["pixels"].shape[0] for i in range(8)} == {5}
    small = paint(tmp_path, "small.png", RED, (8, 16))
    rows, report = build(
        Data(pack=False, crops=3), tokenizer(), rows=[large, asked("<image> cat", "sat", small), none], sight=eyes
    )
    assert (report.examples, report.pictures_dropped) == (2, 1) and rows[1]["pixels"].shape[0] == 3
    with pytest.raises(ValueError, match=r"pictures of a row make 6 crops .*crops=4.*crops=6"):
        build(Data(crops=4), tokenizer(), rows=[asked("<image> cat", "sat", small)] * 2, sight=eyes)


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_batches_are_the_same_for_any_processes_threads_and_stops(kind):
    given, _ = painted(7, kind)
    rows, _ = build(Data(sequence_length=64, pack=False), tokenizer(), rows=given, sight=sight(kind))
    stream = functools.partial(batches, rows, batch_size=4, seed=1)
    wanted = list(itertools.islice(stream(), 4))
    assert wanted[0]["pixels"].shape[:2] == (4, rows[0]["pixels"].shape[0])
    halves = [stream(share=share) for share in ([0, 1], [2, 3])]
    for threads in (1, 4):
        for one, two in zip(wanted, itertools.islice(stream(threads=threads), 4), strict=True):
            same(one, two)
    for number, batch in enumerate(wanted):
        parts = [half[number] for half in halves]
        same({name: np.concatenate([part[name] for part in parts]) for name in batch}, batch)
    iterator = iter(stream(threads=4))
    next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    again = iter(stream())
    again.set_state(state)
    for batch in wanted[1:]:
        same(next(again), batch)
        same(next(iterator), batch)


def test_rows_that_fill_up_an_evaluation_batch_have_no_pictures():
    given, _ = painted(3, "llava_onevision")
    eyes = sight("llava_onevision")
    rows, _ = build(Data(sequence_length=64, pack=False), tokenizer(), rows=given, sight=eyes)
    (batch,) = evaluation_batches(rows, 4)
    assert (batch["places"][3] == -1).all() and not batch["segment_ids"][3].any() and not batch["pixels"][3].any()
    same({name: x[2] for name, x in batch.items()}, rows[2])


def test_rendering_many_is_rendering_each():
    given, _ = painted(5)
    placed = [(Place("rows", "row", number), row) for number, row in enumerate(given, 1)]
    for (_, example), row in zip(Renderer(tokenizer(), sight=sight()).many(placed), given, strict=True):
        alone = render(row, tokenizer(), Source("rows", images="images"), sight=sight())
        assert example.tokens.tolist() == alone.tokens.tolist() and len(example.pictures) == len(
            row.get("images") or []
        )
