"""Reports and questions about pictures: what a picture is known to show, balance, and parts that do not overlap."""

import json

import pytest

from jaxmethods.data import picture_reports, vqa


def asked(*pairs, picture="0.png"):
    messages = []
    for question, answer in pairs:
        said = question if messages else f"<image>\n{question}"
        messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]
    return {"images": picture, "messages": messages}


@pytest.mark.parametrize(
    ("pairs", "known"),
    [
        ([("what color is it?", "blue"), ("what shape is it?", "circle")], ("blue", "circle")),
        ([("is there a red shape?", "yes"), ("is there no circle?", "no")], ("red", "circle")),
        ([("is there a red shape?", "no"), ("is there not a circle?", "yes")], (None, None)),
        ([("what is the teal shape?", "triangle")], ("teal", "triangle")),
        ([("what color is the rectangle?", "gray"), ("is a black shape present?", "no")], ("gray", "rectangle")),
    ],
)
def test_what_questions_tell(pairs, known):
    assert picture_reports.told(asked(*pairs)) == known


def shape(number, colour, form):
    other = "red" if colour != "red" else "blue"
    return asked(
        ("what color is it?", colour), ("what shape is it?", form), (f"is there a {colour} shape?", "yes"),
        (f"is there a {other} shape?", "no"), picture=f"{number}.png",
    )  # fmt: skip


def test_shapes_are_told_in_reports_and_asked_about_in_other_pictures():
    forms = [(c, s) for c in sorted(vqa.COLOURS) for s in sorted(vqa.SHAPES)]
    train = [shape(i, *forms[i % len(forms)]) for i in range(30)] + [
        asked(("is there a red shape?", "no"), picture="x.png")
    ]
    test = [shape(100 + i, *forms[i % len(forms)]) for i in range(30)]
    part = picture_reports.shapes(train, test, reports=25, questions=12, held_out=10, seed=0)
    assert (len(part.reports), len(part.questions), len(part.held_out)) == (25, 12, 10)
    known = {row["images"]: picture_reports.told(row) for row in train}
    for row in part.reports:
        assert row["report"] == "A {} {}.".format(*known[row["images"]])
    pictures = [{row["images"] for row in rows} for rows in part]
    assert not pictures[0] & pictures[1] and not pictures[1] & pictures[2] and not pictures[0] & pictures[2]
    shown = {row["images"]: picture_reports.told(row) for row in test}
    for row in part.questions + part.held_out:
        assert (
            row["answer"] in row["options"]
            and row["answer"] in shown[row["images"]]
            and "<image>" not in row["question"]
        )
        assert set(row["options"]) in (vqa.COLOURS, vqa.SHAPES) and row["domain"] == "shapes"


def test_stamps_are_asked_for_their_sentences():
    rows = [{"images": f"{i}.png", "answer": f"A thing {i % 40}.", "prompt": vqa.CAPTION} for i in range(60)]
    part = picture_reports.stamps(rows, "things", share=0.25, seed=1)
    sentences = {row["images"]: row["answer"] for row in rows}
    assert sum(map(len, part)) == 60 and min(map(len, part)) > 4
    held_out = {sentences[row["images"]] for row in part.held_out}
    assert not held_out & {row["report"] for row in part.reports}
    for row in part.questions + part.held_out:
        assert row == {
            "images": row["images"],
            "question": "What is this?",
            "answer": sentences[row["images"]],
            "domain": "things",
        }


def test_the_command_writes_three_domains(tmp_path, capsys, monkeypatch):
    stamps = tmp_path / "stamps"
    for kind in ("animals", "food"):
        (stamps / "usr/share/tuxpaint/stamps" / kind).mkdir(parents=True)
        for i in range(30):
            base = stamps / "usr/share/tuxpaint/stamps" / kind / f"{i}"
            base.with_suffix(".txt").write_text(f"A {kind} {i}.\n")
            base.with_suffix(".png").write_bytes(b"")
    forms = [(c, s) for c in sorted(vqa.COLOURS) for s in sorted(vqa.SHAPES)]
    monkeypatch.setattr(vqa, "easy_vqa", lambda split: [shape(i, *forms[i % len(forms)]) for i in range(40)])
    arguments = ["--to", str(tmp_path / "out"), "--stamps", str(stamps), "--reports", "20"]
    assert picture_reports.main(arguments) == 0
    lines = {path.stem: path.read_text().splitlines() for path in (tmp_path / "out").iterdir()}
    assert set(lines) == {"reports_shapes", "reports_animals", "reports_things", "questions", "questions_heldout"}
    assert f"reports_shapes.jsonl: {len(lines['reports_shapes'])} rows" in capsys.readouterr().out
    assert {json.loads(line)["domain"] for line in lines["questions"]} == set(picture_reports.DOMAINS)
    assert picture_reports.main(["--to", str(tmp_path / "new"), "--stamps", str(tmp_path / "out")]) == 2
    assert "holds no stamps" in capsys.readouterr().err and not (tmp_path / "new").exists()
