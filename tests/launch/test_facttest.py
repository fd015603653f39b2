"""`jaxmethods evaluate facttest`: from questions to certified answers, by a tiny model, a server, and a real sentence encoder."""

import dataclasses
import json
import math
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
import tyro
from etils import epath

from jaxmethods import data, models
from jaxmethods.evals import completion, facttest
from jaxmethods.launch.facttest import FactTest, evaluate_facttest, read_questions
from jaxmethods.launch.train import RunFailed
from tests.chat_server import ChatServer, asked
from tests.launch.conftest import save_talker

SIZES = {"calibration": 30, "test": 14}


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """model/, calibration.jsonl and test.jsonl; a third of the questions have the answers that the model gives."""
    folder = tmp_path_factory.mktemp("facttest")
    module, params, tokenizer = save_talker(folder)
    asked_for = {part: [f"{part} question {i}?" for i in range(count)] for part, count in SIZES.items()}
    length = max(len(data.prompt_tokens(tokenizer, prompt)) for prompts in asked_for.values() for prompt in prompts)
    for part, prompts in asked_for.items():
        said = completion.complete(module, params, tokenizer, prompts, max_new_tokens=4, length=length, batch_size=16)
        known = lambda i, text: text.split(".")[0] if i % 3 == 0 and text.split(".")[0] else "not this"
        write(folder / f"{part}.jsonl", [
            {"prompt": prompt, "answers": ["nor this", known(i, text)], "kind": str(i % 3)}
            for i, (prompt, text) in enumerate(zip(prompts, said, strict=True))
        ])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def options(room):
    return FactTest(
        model=str(room / "model"), calibration=str(room / "calibration.jsonl"), test=str(room / "test.jsonl"), to=str(room / "out"),
        score=("vanilla", "semantic", "degree", "likelihood"), alpha=(0.2, 0.4), delta=0.3, samples=3, temperature=1.0,
        max_new_tokens=4, equivalence="words", resamples=500, batch_size=16,
    )  # fmt: skip


@pytest.fixture(scope="module")
def found(options):
    return evaluate_facttest(options)


def columns(folder):
    return pyarrow.parquet.read_table(folder / "rows.parquet").to_pydict()


def test_thresholds_and_shares_are_those_of_the_rows(options, found, room):
    folder = room / "out" / "test_test"
    table = {name: np.array(values, dtype=object) for name, values in columns(folder).items()}
    assert len(table["part"]) == sum(SIZES.values()) and sorted(set(table["part"])) == ["calibration", "test"]
    right = np.array(
        [any(one in said for one in given) for said, given in zip(table["said"], table["answers"], strict=True)]
    )
    np.testing.assert_array_equal(table["right"].astype(bool), right)
    calibration = table["part"] == "calibration"
    assert 5 < right[calibration].sum() < 15 and found["wrong_kept"] == {"none": int((calibration & ~right).sum())}
    assert [row["score"] for row in found["results"]] == list(options.score) * 2
    for row in found["results"]:
        scores = table[f"score_{row['score']}"].astype(float)
        wrong = np.sort(scores[calibration & ~right])
        k = next(k for k in range(1, len(wrong) + 2) if facttest.violation(k, len(wrong), row["alpha"]) <= 0.3)
        tau = wrong[k - 1] if k <= len(wrong) else math.inf
        assert row["threshold"] == (tau if tau < math.inf else None) and row["k"] == k
        certified = (scores > tau)[~calibration]
        of_test = right[~calibration]
        np.testing.assert_array_equal(table[f"certified_{row['score']}_{row['alpha']:g}"][~calibration], certified)
        assert row["type_1"] == pytest.approx(certified[~of_test].mean())
        assert row["type_2"] == pytest.approx(1 - certified[of_test].mean())
        assert row["answer_rate"] == pytest.approx(certified.mean())
        assert row["accuracy_before"] == pytest.approx(of_test.mean())
        assert row["accuracy_after"] == (pytest.approx(of_test[certified].mean()) if certified.any() else None)
        assert 0 <= row["violations"] <= 0.36
    assert json.loads((folder / "results.json").read_text()) == found
    assert (folder / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_scores_are_of_the_answers_by_another_route(options, found, room):
    table = columns(room / "out" / "test_test")
    module, params = models.load(room / "model")
    tokenizer = models.load_tokenizer(room / "model")
    rows = [{"prompt": table["prompt"][i], "answer": table["said"][i]} for i in range(3)]
    sums, lengths = completion.answer_logps(module, params, tokenizer, rows, sequence_length=128, batch_size=4)
    np.testing.assert_allclose(table["score_likelihood"][:3], sums / lengths, rtol=1e-4)
    words = [[completion.plain(text.split(".")[0]) for text in some] for some in table["samples"]]
    by_hand = [sum(math.log(some.count(one) / 3) / 3 for one in some) for some in words]
    agree = np.isclose(table["score_vanilla"], by_hand, atol=1e-6)
    assert agree.mean() > 0.9  # articles and line breaks are cut too
    said = completion.complete(
        module, params, tokenizer, table["prompt"][:4], max_new_tokens=4, samples=3, temperature=1.0, batch_size=16,
        key=jax.random.fold_in(jax.random.key(0), 0), length=max(len(data.prompt_tokens(tokenizer, p)) for p in table["prompt"]),
    )  # fmt: skip
    assert said == table["samples"][:4]  # what is drawn depends on the seed and the question's place


def test_it_goes_on_after_an_interrupt_and_asks_nothing_twice(options, found, room):
    other = room / "interrupted"
    (other / "answers").mkdir(parents=True)
    shutil.copy(room / "out" / "config.json", other)
    first = (room / "out" / "answers" / "calibration.jsonl").read_text().splitlines(keepends=True)
    (other / "answers" / "calibration.jsonl.partial").write_text("".join(first[:21]))  # a block, and a part of one
    again = evaluate_facttest(dataclasses.replace(options, to=str(other)))
    assert again == found
    for name in ("answers/calibration", "answers/test_test", "logps/test_test", "compared/calibration"):
        assert (other / f"{name}.jsonl").read_bytes() == (room / "out" / f"{name}.jsonl").read_bytes()

    # Other levels and scores of the same answers; the model is not needed any more, only its tokenizer to measure prompts.
    when = (other / "answers" / "test_test.jsonl").stat().st_mtime_ns
    more = evaluate_facttest(
        dataclasses.replace(options, to=str(other), alpha=(0.05,), delta=0.01, score=("discrete", "kernel"))
    )
    assert (other / "answers" / "test_test.jsonl").stat().st_mtime_ns == when
    n = more["wrong_kept"]["none"]
    assert more["notes"] == [f"alpha 0.05: {n} wrong answers cannot certify anything; it takes 90 (shift none)."]
    assert all(
        row["threshold"] is None and row["accuracy_after"] is None and row["type_1"] == 0 for row in more["results"]
    )
    with pytest.raises(ValueError, match=r"samples: 3 there, 4 now.*choose another --to"):
        evaluate_facttest(dataclasses.replace(options, to=str(other), samples=4))
    with pytest.raises(ValueError, match=r"is of other prompts than the config names"):
        write(other / "test.jsonl", [{"prompt": f"other {i}", "answer": "x"} for i in range(13)])
        evaluate_facttest(dataclasses.replace(options, to=str(other), test=str(other / "test.jsonl")))


def nli(premises, hypotheses):
    """Entailment where the first letters agree."""
    return np.array(
        [[0.8, 0.1, 0.1] if a[:1] == b[:1] else [0.1, 0.1, 0.8] for a, b in zip(premises, hypotheses, strict=True)]
    )


def test_a_model_behind_a_server_judged_by_inference(options, room, tmp_path, capsys):
    """Answers that say how sure they are: those to even questions are drawn alike, and right."""
    count = {"n": 0}

    def answer(request):
        number = int(asked(request).split()[-1].rstrip("?"))
        if number == 5 and "test" in asked(request):
            return 400, "no such question"
        count["n"] += 1
        return (
            "Paris" if number % 2 == 0 or request["temperature"] == 0 else f"{chr(97 + count['n'] % 26)} {count['n']}"
        )

    for part, n in SIZES.items():
        rows = [{"prompt": f"{part} question {i}?", "answer": "Paris" if i % 2 == 0 else "Rome"} for i in range(n)]
        write(tmp_path / f"{part}.jsonl", rows)
    with ChatServer(answer) as server:
        told = dataclasses.replace(
            options, model=f"{server.url}#m", calibration=str(tmp_path / "calibration.jsonl"), test=str(tmp_path / "test.jsonl"),
            to=str(tmp_path / "out"), score=("vanilla", "kernel", "self_check"), equivalence="tests.launch.test_facttest:nli",
            json=True,
        )  # fmt: skip
        found = evaluate_facttest(told)
        assert all(r["temperature"] in (0.0, 1.0) for r in server.requests)
    assert json.loads(capsys.readouterr().out) == found
    assert found["failed"] == {"test": 1} and "left out" in found["notes"][-1] and found["test"]["answers"] == 13
    for row in found["results"]:
        assert row["type_1"] == 0 and row["type_2"] == 0 and row["accuracy_after"] == 1, row
        assert row["accuracy_before"] == pytest.approx(7 / 13)
    with (
        ChatServer(lambda request: (400, "no")) as server,
        pytest.raises(RunFailed, match=r"answered none of 16.*goes on"),
    ):
        evaluate_facttest(dataclasses.replace(told, model=f"{server.url}#m", to=str(tmp_path / "none")))
    assert not list((tmp_path / "none" / "answers").glob("*.jsonl"))


OF_CITIES = ("capital", "river", "port", "language", "coast", "weather", "king", "coin")
OF_DOGS = ("toy", "food", "bed", "walk", "game", "sound", "smell", "sport")
PEOPLES = ("Dutch", "Poles", "Swedes", "Greeks", "Danes", "Turks")
BREEDS = ("poodle", "beagle", "terrier", "hound", "collie", "spaniel")
CITIES = [f"What is the {a} of the {b}?" for a in OF_CITIES for b in PEOPLES]
DOGS = [f"Which {a} does a {b} like?" for a in OF_DOGS for b in BREEDS]


@pytest.mark.ci
@pytest.mark.slow
@pytest.mark.usefixtures("minilm_folder")
def test_shift_by_a_real_sentence_encoder(options, tmp_path):
    """Questions of cities and of dogs, 3 : 1 in the source and 1 : 3 in the target: w is 1/3 and 3."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    cities, dogs = ([some[i] for i in rng.permutation(48)] for some in (CITIES, DOGS))
    rows = lambda name, prompts: write(tmp_path / f"{name}.jsonl", [{"prompt": p, "answer": "Rome"} for p in prompts])
    learned = {"source": cities[:27] + dogs[:9], "target": cities[27:36] + dogs[9:36]}
    count = {"n": 0}

    def answer(request):
        count["n"] += 1
        return "Oslo" if count["n"] % 3 else f"Oslo {count['n']}"

    with ChatServer(answer) as server:
        told = dataclasses.replace(
            options, model=f"{server.url}#m", calibration=rows("calibration", cities[36:] + dogs[36:44]),
            test=rows("test", dogs[44:]), to=str(tmp_path / "out"), score=("vanilla", "kernel"), equivalence="encoder",
            shift="rejection",
            source=rows("source", learned["source"]), target=rows("target", learned["target"]),
        )  # fmt: skip
        found = evaluate_facttest(told)
        with pytest.raises(ValueError, match=r"--source .* has only questions that are asked"):
            evaluate_facttest(dataclasses.replace(told, source=told.calibration, to=str(tmp_path / "other")))
    table = columns(tmp_path / "out" / "test_test")
    ratio = np.array([r for r in table["ratio"] if r is not None])
    of_dogs = np.array([prompt in DOGS for prompt in table["prompt"]])[: len(ratio)]
    assert len(ratio) == 20 and ratio[of_dogs].min() > 1 > ratio[~of_dogs].max()
    assert found["wrong_kept"]["none"] == 20 and 6 <= found["wrong_kept"]["rejection"] <= 14
    assert [(row["shift"], row["alpha"]) for row in found["results"]] == [
        (shift, alpha) for shift in ("none", "rejection") for alpha in (0.2, 0.2, 0.4, 0.4)
    ]


def test_questions_of_all_forms(tmp_path):
    lists = [["Who?", "him", "P1(x)"], ["Where?", "there", "P2(y)"]]
    (tmp_path / "pararel.json").write_text(json.dumps(lists))
    assert read_questions(str(tmp_path / "pararel.json")) == [
        {"prompt": "Who?", "answers": ["him"], "kind": "P1(x)"}, {"prompt": "Where?", "answers": ["there"], "kind": "P2(y)"},
    ]  # fmt: skip
    (tmp_path / "rows.json").write_text(json.dumps([{"prompt": "a", "answer": "b"}]))
    assert read_questions(str(tmp_path / "rows.json")) == [{"prompt": "a", "answers": ["b"], "kind": ""}]
    for row, words in (
        ({"prompt": "a"}, "field 'answer' must be text"),
        ({"answer": "a"}, "field 'prompt' must be text"),
    ):
        with pytest.raises(ValueError, match=rf"bad\.jsonl, line 1: {words}"):
            read_questions(write(tmp_path / "bad.jsonl", [row]))


def test_refused_with_one_line(options, room, tmp_path):
    change = lambda **fields: dataclasses.replace(options, to=str(tmp_path / "new"), **fields)
    for fields, words in (
        ({"score": ("vanila",)}, "did you mean 'vanilla'"),
        ({"score": ()}, "--score : give at least one"),
        ({"alpha": (0.1, 0.1)}, "each once"),
        ({"alpha": (1.5,)}, r"alpha=1\.5 must be above 0"),
        ({"delta": 0.0}, r"delta=0\.0 must be above 0"),
        ({"samples": 1}, "draw at least 2"),
        ({"temperature": 0.0}, "--temperature 0.0 be positive"),
        ({"equivalence": "nli"}, "none of encoder, words, MODULE:FUNCTION"),
        ({"score": ("self_check",)}, "tells contradictions"),
        ({"shift": "rejection"}, "needs --source ROWS and --target ROWS"),
        ({"model": "http://127.0.0.1:9/v1"}, "names no model"),
        ({"model": "http://127.0.0.1:9/v1#m"}, "gives no likelihoods, which --score semantic, likelihood needs"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            change(**fields)
    for fields, words in (
        ({"equivalence": "no.such:nli"}, "give MODULE:FUNCTION that Python can import"),
        ({"calibration_rows": 31}, "has 30 rows for 0 shots and 31 questions"),
        ({"test": options.calibration}, r"all test questions .* are calibration questions"),
        ({"encoder": options.model, "equivalence": "encoder"}, "holds a Decoder; give a sentence encoder"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate_facttest(change(**fields))
    assert not (tmp_path / "new").exists()
    anything = [c for c in map(chr, range(1000)) if c.strip() and c != "."]
    every = write(
        tmp_path / "every.jsonl", [{"prompt": f"calibration question {i}?", "answers": anything} for i in (1, 2)]
    )
    with pytest.raises(ValueError, match="there are no incorrect answers"):
        evaluate_facttest(change(calibration=every, score=("vanilla",)))


def test_options_on_the_command_line(options, room):
    told = tyro.cli(FactTest, args=[
        "MODEL", "--calibration", "a.jsonl", "--test", "b.jsonl", "--to", "out", "--score", "vanilla", "kernel", "--alpha",
        "0.05", "0.1", "--shots", "4",
    ])  # fmt: skip
    assert told.score == ("vanilla", "kernel") and told.alpha == (0.05, 0.1) and told.shots == 4 and told.delta == 0.01


def test_shots_are_shown_and_not_asked(options, room, tmp_path):
    with ChatServer(lambda request: "x") as server:
        told = dataclasses.replace(
            options, model=f"{server.url}#m", to=str(tmp_path / "out"), score=("vanilla",), shots=2, instruction="Be brief.",
            calibration_rows=5, test_rows=3, samples=2,
        )  # fmt: skip
        found = evaluate_facttest(told)
        talks = [[(m["role"], m["content"]) for m in request["messages"]] for request in server.requests]
    assert found["calibration"]["answers"] == 5 and len(talks) == 8 * 3
    assert {tuple(talk[:5]) for talk in talks} == {tuple(talks[0][:5])}
    assert [role for role, _ in talks[0]] == ["system", "user", "assistant", "user", "assistant", "user"]
    shown = {talks[0][1][1], talks[0][3][1]}
    assert not shown & {talk[-1][1] for talk in talks} and talks[0][2][1] == "nor this"
    assert epath.Path(told.to).is_dir()
