"""Rows of pictures with words: stamps laid out as their package lays them, and easy-VQA where it is installed."""

import importlib.metadata
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmethods.data import vqa

STAMPS = {
    "animals/cat": "A cat.\nGato: un gato.\n",
    "animals/dogs/dog": "  A dog\u2019s head.  \nfr.utf8=Un chien.\n",
    "food/apple": "An apple.",
    "symbols/a": "The letter A.",  # left out
    "food/silent": "",  # no caption
    "food/blank": "  \nsecond line\n",
}


@pytest.fixture
def folder(tmp_path):
    """Six stamps with a text, one without a text, and a text without a stamp."""
    for name, text in STAMPS.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (4, 4)).save(path.with_suffix(".png"))
        path.with_suffix(".txt").write_text(text, encoding="utf-8")
    Image.new("RGB", (4, 4)).save(tmp_path / "stamps/food/untold.png")
    (tmp_path / "stamps/food/unseen.txt").write_text("Nothing to see.")
    (tmp_path / "stamps/food/latin.txt").write_bytes(b"Caf\xe9.")
    Image.new("RGB", (4, 4)).save(tmp_path / "stamps/food/latin.png")
    return tmp_path / "stamps"


def test_stamps_are_pictures_with_the_first_line_of_their_text(folder, tmp_path, monkeypatch):
    row = lambda name, caption: {
        "images": str(folder / f"{name}.png"), "prompt": "<image>\nWhat is this?", "answer": caption,
    }  # fmt: skip
    wanted = [
        row("animals/cat", "A cat."), row("animals/dogs/dog", "A dog\u2019s head."), row("food/apple", "An apple."),
        row("food/latin", "Caf\ufffd."),
    ]  # fmt: skip
    assert vqa.stamps(folder) == wanted
    unpacked = tmp_path / "unpacked" / "usr/share/tuxpaint"
    unpacked.mkdir(parents=True)
    os.symlink(folder, unpacked / "stamps")
    assert [row["answer"] for row in vqa.stamps(tmp_path / "unpacked")] == [row["answer"] for row in wanted]
    monkeypatch.chdir(tmp_path)
    assert vqa.stamps("stamps") == wanted  # paths are absolute wherever it is called
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no stamps; get them with .*apt-get download"):
        vqa.stamps(tmp_path / "nowhere")


def test_stamps_of_one_caption_stay_on_one_side():
    rows = [{"images": f"{i}.png", "prompt": vqa.CAPTION, "answer": f"A thing {i // 2}."} for i in range(2000)]
    rows[1]["answer"] = "a THING 0."  # the same but for case
    train, held_out = vqa.split_by_caption(rows)
    assert sorted(row["images"] for row in train + held_out) == sorted(row["images"] for row in rows)
    captions = [{row["answer"].casefold() for row in part} for part in (train, held_out)]
    assert not captions[0] & captions[1]
    # A share of 15% of 1,000 captions, give or take three standard deviations of a binomial.
    assert abs(len(captions[1]) - 150) < 3 * np.sqrt(1000 * 0.15 * 0.85)
    assert vqa.split_by_caption(rows) == (train, held_out)
    assert vqa.split_by_caption(rows[::-1])[1] == held_out[::-1]  # each by itself, whatever the others are
    assert vqa.split_by_caption(rows, seed=1)[1] != held_out
    more = vqa.split_by_caption(rows, held_out=0.5)[1]
    assert {row["images"] for row in held_out} < {row["images"] for row in more}
    assert vqa.split_by_caption(rows, held_out=0.0) == (rows, []) and vqa.split_by_caption(rows, held_out=1.0) == (
        [],
        rows,
    )


def test_questions_of_a_picture_one_by_one():
    turns = [("user", "<image>\nwhat?"), ("assistant", "circle"), ("user", "red?"), ("assistant", "no")]
    rows = [{"images": "0.png", "messages": [{"role": role, "content": text} for role, text in turns]}]
    assert vqa.single_questions(rows) == [
        {"images": "0.png", "prompt": "<image>\nwhat?", "answer": "circle", "kind": "shape"},
        {"images": "0.png", "prompt": "<image>\nred?", "answer": "no", "kind": "yes or no"},
    ]


def test_short_dialogues_by_hand():
    """Single questions of yes or no, as many of what is there as of what is not; colour and shape in words that tell neither."""
    there = [("is it blue?", "yes"), ("is there no triangle?", "no"), ("is there a triangle?", "yes")]
    absent = [("is there a circle?", "no"), ("is it not red?", "yes")]
    turns = [
        *there, *absent, ("what color is the triangle?", "blue"), ("what is the blue shape?", "triangle"),
        ("what color is it?", "blue"), ("which shape is there?", "triangle"),
    ]  # fmt: skip
    row = {"images": "a/0.png", "messages": []}
    for number, (question, answer) in enumerate(turns):
        asked = question if number else f"<image>\n{question}"
        row["messages"] += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    direct = turns[5:]
    marked = lambda pairs: {(f"<image>\n{question}", answer) for question, answer in pairs}
    for most, each in ((0, 0), (1, 0), (2, 1), (3, 1), (4, 2), (9, 2)):  # two ask for what is not there
        dialogues = vqa.short_dialogues([row], yes_no=most)
        made = [[message["content"] for message in dialogue["messages"]] for dialogue in dialogues]
        *alone, one, dialogue = made
        said = {tuple(turn) for turn in alone}
        assert len(alone) == 2 * each and len(said & marked(there)) == len(said & marked(absent)) == each
        assert tuple(one) in marked(direct)
        # Colour and shape first, in words that tell neither, and then what was asked alone.
        assert sorted(dialogue[1:4:2]) == ["blue", "triangle"] and dialogue[0].startswith("<image>\n")
        assert {text.removeprefix("<image>\n") for text in dialogue[:4:2]} == {
            "what color is it?",
            "which shape is there?",
        }
        assert marked(zip(dialogue[4::2], dialogue[5::2], strict=True)) == said
        assert [dialogue["images"] for dialogue in dialogues] == ["a/0.png"] * (2 * each + 2)
    of_seeds = [vqa.short_dialogues([row], seed) for seed in range(8)]
    assert len({made[0]["messages"][0]["content"] for made in of_seeds}) > 1
    assert len({made[-1]["messages"][0]["content"] for made in of_seeds}) == 2  # now the colour first, now the shape


def test_easy_vqa_of_its_package(tmp_path, folder, capsys):
    try:
        package = importlib.metadata.distribution("easy-vqa")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package easy-vqa")
    counts = {"train": (4000, 38_575), "test": (1000, 9_673)}  # as its authors tell
    of_split = {split: vqa.easy_vqa(split) for split in counts}
    for split, (pictures, questions) in counts.items():
        rows = of_split[split]
        assert len(rows) == pictures and len(vqa.single_questions(rows)) == questions
        assert sum(message["content"].count("<image>") for message in rows[7]["messages"]) == 1
    listed = json.loads(Path(package.locate_file("easy_vqa/data/test/questions.json")).read_text())
    of_seven = [(question, answer) for question, answer, number in listed if number == 7]
    told = [message["content"] for message in rows[7]["messages"]]
    assert told[0] == f"<image>\n{of_seven[0][0]}" and told[1::2] == [answer for _, answer in of_seven]
    assert told[2::2] == [question for question, _ in of_seven[1:]] and rows[7]["images"].endswith("test/images/7.png")
    with Image.open(rows[7]["images"]) as image:
        assert image.size == (64, 64)
    with pytest.raises(ValueError, match="split='validation' is unknown"):
        vqa.easy_vqa("validation")

    assert vqa.main(["--to", str(tmp_path / "out"), "--stamps", str(folder), "--held-out", "0.5"]) == 0
    lines = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "out").iterdir()}
    assert lines.pop("captions.jsonl") + lines.pop("captions_heldout.jsonl") == 4
    dialogues = vqa.short_dialogues(of_split["train"])
    assert lines == {"questions.jsonl": len(dialogues), "questions_heldout.jsonl": 9_673,
                     "questions_text.jsonl": len(dialogues), "questions_text_heldout.jsonl": 9_673}  # fmt: skip
    for name in ("questions", "questions_heldout"):
        seen, bare = (
            [
                json.loads(x)
                for x in (tmp_path / f"out/{name.replace('questions', kind)}.jsonl").read_text().splitlines()
            ]
            for kind in ("questions", "questions_text")
        )
        assert "images" in seen[5] and "images" not in bare[5] and "<image>" not in str(bare)
        assert str(seen).count("?") == str(bare).count("?")
    assert f"questions.jsonl: {len(dialogues):,} rows" in capsys.readouterr().out
    shown = {row["images"] for row in dialogues}
    assert shown <= {row["images"] for row in of_split["train"]} and len(shown) > 3_900
    denied = lambda text: bool({"no", "not"} & set(text.lower().replace("?", "").split()))
    alone = [[m["content"] for m in row["messages"]] for row in dialogues if len(row["messages"]) == 2]
    there = [(said == "yes") != denied(text) for text, said in alone if said in ("yes", "no")]
    assert len(there) > 5_000 and sum(there) * 2 == len(there)
    for row in dialogues:  # the colour and the shape are asked for in words that tell neither
        asked, said = ([message["content"] for message in row["messages"][i::2]] for i in (0, 1))
        assert [text.count("<image>") for text in asked] == [1, *[0] * (len(asked) - 1)]
        assert not any(
            answer in question.lower().split() for question in asked[:2] for answer in said[:2] if len(said) > 1
        )


def test_what_is_missing_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    assert vqa.main(["--to", str(tmp_path / "out"), "--stamps", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds no stamps") and not (tmp_path / "out").exists()
    monkeypatch.setattr(vqa, "_PACKAGE", "easy-vqa-that-no-one-has")
    with pytest.raises(ModuleNotFoundError, match=r"easy-VQA is not installed; pip install --no-deps easy-vqa"):
        vqa.easy_vqa("train")
