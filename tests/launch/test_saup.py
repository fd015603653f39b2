"""`jaxmethods evaluate saup`: trajectories to scores, by a tiny model."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import tyro

from jaxmethods.data import trajectories
from jaxmethods.evals import saup as equations
from jaxmethods.launch.saup import Saup, saup
from tests.launch.conftest import save_talker

RNG = np.random.default_rng(0)
NAMES = ["likelihood of the last step", "last step", "arithmetic mean", "geometric mean", "RMS", "SAUP-P", "SAUP-D", "SAUP-PD",
         "SAUP-HMMD"]  # fmt: skip


def row(i):
    words = lambda: " ".join(RNG.choice(["cat", "dog", "mat", "log", "three"], 3))
    steps = [{"thought": words(), "action": f"look[{words()}]", "observation": words()} for _ in range(1 + i % 3)]
    steps.append({"thought": words(), "action": "finish[3]", "observation": ""})
    return {"id": f"row {i}", "question": f"how many cats are on mat {i // 2}?", "steps": steps, "correct": bool(i % 2)}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    folder = tmp_path_factory.mktemp("room")
    save_talker(folder, num_layers=1)
    write(folder / "rows.jsonl", [row(i) for i in range(20)])
    return folder


def options(room, to, *more, data="rows.jsonl"):
    given = ["--data", str(room / data), "--to", str(to), "--distance", "overlap", "--resamples", "50", *more]
    return tyro.cli(Saup, args=[str(room / "model"), *given])


@pytest.fixture(scope="module")
def made(room, tmp_path_factory):
    to = tmp_path_factory.mktemp("out") / "saup"
    return to, saup(options(room, to))


def test_scores_are_the_equations_of_what_is_written(made, capsys):
    to, record = made
    assert list(record["auroc"]) == NAMES and record["trajectories"] == 20 and record["wrong"] == 0.5
    assert json.loads((to / "saup.json").read_text()) == record and (to / "saup.png").read_bytes()[:4] == b"\x89PNG"
    for one in pyarrow.parquet.read_table(to / "scores.parquet").to_pylist():
        u, drift, gap = (np.array([one[name]]) for name in ("uncertainty", "drift", "gap"))
        assert gap[0, -1] == 0 and 2 <= u.shape[1] <= 4
        for name, weight in (
            ("RMS", np.ones_like(u)),
            ("SAUP-D", drift + gap),
            ("SAUP-P", np.arange(1, u.shape[1] + 1)[None] / u.shape[1]),
            ("SAUP-HMMD", np.array([one["weight SAUP-HMMD"]])),
        ):
            assert one[name] == pytest.approx(float(equations.propagate(u, weight)[0]), rel=1e-5)
        assert one["last step"] == pytest.approx(u[0, -1], rel=1e-6)


def test_the_same_command_goes_on_and_makes_the_same(made, room, tmp_path, capsys):
    to, record = made
    for name in ("settings.json", "logps.jsonl"):
        (tmp_path / name).write_bytes((to / name).read_bytes())
    (tmp_path / "distances.jsonl.partial").write_text("")
    again = saup(options(room, tmp_path, "--json"))
    assert again == record == json.loads(capsys.readouterr().out)
    assert (tmp_path / "scores.parquet").read_bytes() == (to / "scores.parquet").read_bytes()
    # What is kept serves other weights, and is refused where it was made otherwise.
    other = saup(
        options(room, tmp_path, "--bias", "1", "--uncertainty", "sum", "--observed", "1", "--states", "viterbi")
    )
    assert other["auroc"]["SAUP-D"] != record["auroc"]["SAUP-D"]
    with pytest.raises(ValueError, match=r"begun otherwise .gap: 'action' there, 'step' now.; choose another --to"):
        saup(options(room, tmp_path, "--gap", "step"))


def test_labelled_states_and_estimators_of_single_answers(room, tmp_path):
    rows = [row(i) for i in range(20)]
    for i, one in enumerate(rows):
        for n, step in enumerate(one["steps"]):
            step["state"] = (i + n) % 3
    write(tmp_path / "labelled.jsonl", rows)
    record = saup(
        options(room, tmp_path / "out", "--p-true", "--entropy-samples", "2", "--max-new-tokens", "6", "--states", "levels",
                "--batch-size", "4", data=str(tmp_path / "labelled.jsonl"))
    )  # fmt: skip
    assert record["states"] == "labels"
    assert set(record["auroc"]) - set(NAMES) == {"P(True)", "predictive entropy", "semantic entropy"}
    table = pyarrow.parquet.read_table(tmp_path / "out" / "scores.parquet").to_pydict()
    assert all(0 <= p <= 1 for p in table["P(True)"]) and all(
        0 <= e <= np.log(2) + 1e-6 for e in table["semantic entropy"]
    )
    levels = np.concatenate(table["weight SAUP-HMMD"])
    assert levels.min() >= 0.5 - 1e-4 and levels.max() <= 1.5 + 1e-4


def test_a_model_acts_and_one_that_knows_nothing_is_always_wrong(room, tmp_path):
    try:
        trajectories.retail()
    except ModuleNotFoundError as missing:
        pytest.skip(str(missing))
    questions = [{"id": str(i), "question": f"how many? {i}", "answer": "3", "path": ["finish[3]"]} for i in range(3)]
    write(tmp_path / "questions.jsonl", questions)
    acting = options(
        room, tmp_path / "out", "--environment", "retail", "--samples", "2", "--max-steps", "2", "--max-new-tokens", "4",
        "--folds", "2", data=str(tmp_path / "questions.jsonl"),
    )  # fmt: skip
    with pytest.raises(ValueError, match="all 6 trajectories are wrong"):
        saup(acting)
    drawn = [json.loads(line) for line in (tmp_path / "out" / "trajectories.jsonl").read_text().splitlines()]
    assert [one["id"] for one in drawn] == ["0-1", "0-2", "1-1", "1-2", "2-1", "2-2"]
    assert all(len(one["steps"]) == 2 and one["steps"][0]["state"] == 2 for one in drawn)
    assert drawn[0]["steps"] != drawn[1]["steps"]


def test_refused_before_anything_is_made(room, tmp_path):
    good = row(1)
    for bad, words in (
        (dict(good, id="other", steps=[]), "leave empty trajectories out"),
        (dict(good, id="other", correct=None), "field 'correct' must be true or false"),
        (dict(good, id="other", question=""), "field 'question' must be text"),
        (good, "its id 'row 1' is also that of a row before"),
    ):
        write(tmp_path / "bad.jsonl", [good, bad])
        with pytest.raises(ValueError, match=words) as told:
            saup(options(room, tmp_path / "out", data=str(tmp_path / "bad.jsonl")))
        assert "line 2" in str(told.value) and "\n" not in str(told.value)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty and holds no settings"):
        saup(options(room, tmp_path / "full"))
    with pytest.raises(ValueError, match="--folds 11 is more than the 10 questions"):
        saup(options(room, tmp_path / "out", "--folds", "11"))
    for more, words in (
        ({"folds": 1}, "--folds 1 must be at least 2"),
        ({"samples": 2}, "give --environment"),
        ({"samples": 2, "environment": "retail", "temperature": 0.0}, "would all be the same"),
        ({"rho": 2.0}, "--rho 2.0 must be between 0 and 1"),
        ({"entropy_samples": 1}, "--entropy-samples 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Saup("model", "rows.jsonl", "out", **more)
    assert not (tmp_path / "out").exists()
