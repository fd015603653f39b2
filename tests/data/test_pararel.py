"""ParaRel's files: read, refused by entry, and parted by question."""

import json

import pytest

from jaxmethods.data import pararel

TRAIN = [[f"Where was Person {i // 2} born?", f"City {i}", "P19(place of birth)"] for i in range(40)]
TEST = [
    ["Where was Person 3 born?", "City 7", "P19(place of birth)"],
    ["Where was Nobody born?", "Rome", "P19(place of birth)"],
]
OTHERS = [[f"What is the capital of Land {i}?", f"Town {i}", "P36(capital)"] for i in range(30)]


@pytest.fixture
def folder(tmp_path):
    for name, rows in zip(pararel.FILES.values(), (TRAIN, TEST, OTHERS), strict=True):
        (tmp_path / name).write_text(json.dumps(rows))
    return tmp_path


def test_a_question_stands_in_one_part(folder):
    made = pararel.parts(folder, target=10)
    asked = {name: {row["prompt"] for row in rows} for name, rows in made.items()}
    assert len(asked["tune"]) == len(asked["calibration"]) == 10 and not asked["tune"] & asked["calibration"]
    assert len(made["tune"]) + len(made["calibration"]) == len(TRAIN)  # both answers to each of its questions
    assert made["test"] == [{"prompt": "Where was Nobody born?", "answer": "Rome", "kind": "P19(place of birth)"}]
    assert len(made["target"]) == 10 and len(made["shifted"]) == 20 and not asked["target"] & asked["shifted"]
    assert made == pararel.parts(folder, target=10) != pararel.parts(folder, target=10, seed=1)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[["a question", "an answer"]]', "entry 0"),
        ('[["q", "a", "r"], ["q", " ", "r"]]', "entry 1"),
        ('{"q": "a"}', "entry 0"),
        ("[[", "no JSON"),
    ],
)
def test_other_files_are_refused(folder, text, told):
    (folder / pararel.FILES["test"]).write_text(text)
    with pytest.raises(ValueError, match=told):
        pararel.parts(folder)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training_data\.json is not there; it is dataset/pararel"):
        pararel.parts(tmp_path)


def test_the_program_says_so_in_one_line(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pararel", "--files", str(folder), "--to", str(tmp_path / "out")])
    assert pararel.main() == 0 and len(list((tmp_path / "out").iterdir())) == 5
    (folder / pararel.FILES["test"]).unlink()
    capsys.readouterr()
    assert pararel.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {folder / pararel.FILES['test']} is not there")
