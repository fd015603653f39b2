"""`jaxmethods evaluate score` and `evaluate harness`: rows to files, resumed after an interrupt, refused with one line."""

import json

import numpy as np
import pyarrow.parquet
import pytest
import tyro

from jaxmethods import models
from jaxmethods.evals import scoring
from jaxmethods.evals.scoring import texts
from jaxmethods.launch import harness, score
from tests.evals.harness_tasks import write_tasks

ROWS = [
    {"prompt": "how many cats?", "choices": ["three", "four cats", "none"], "answer": 0},
    {"prompt": "who sat on the log?", "answer": "the dog sat on it"},
    {"text": "the cat sat on the mat and the dog sat on the log. " * 3},
    {"prompt": "is the heart normal?", "choices": ["yes", "no"], "answer": "no"},
    {"prompt": "what is the capital of France? " * 12, "answer": "Paris"},
    {"prompt": "which mat?", "choices": ["this", "that one"]},
    {"prompt": "how many cats?", "answer": "three"},
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return file


def run(shop, rows, to, *more):
    given = [
        str(shop / "model"),
        "--data",
        str(rows),
        "--to",
        str(to),
        "--part",
        "3",
        "--max-length",
        "64",
        "--json",
        *more,
    ]
    score.score(tyro.cli(score.Score, args=given))


def test_rows_of_all_kinds_have_the_numbers_of_each_alone(shop, rows, tmp_path, capsys):
    run(shop, rows, tmp_path / "out.parquet", "--batch-tokens", "128")
    told = json.loads(capsys.readouterr().out)
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["row"] for row in found] == list(range(7)) and [len(row["logps"]) for row in found] == [
        3,
        1,
        1,
        2,
        1,
        2,
        1,
    ]
    (module, params), tokenizer = models.load(shop / "model"), models.load_tokenizer(shop / "model")

    def alone(pairs):
        total = 0.0
        for context, continuation in pairs:
            whole = np.zeros((1, 80), np.int32)
            tokens = [*context, *continuation][-65:]
            whole[0, : len(tokens)] = tokens
            target = np.zeros((1, 80), bool)
            target[0, len(tokens) - len(continuation) : len(tokens)] = True
            total += float(models.sequence_logps(module, params, whole, target, np.arange(80)[None] < len(tokens))[0])
        return total

    for row, given in zip(found, ROWS, strict=True):
        if "text" in given:
            expected = [alone(texts.rolling(tokenizer.encode(given["text"]), prefix=1, limit=64))]
        else:
            answers = given.get("choices") or [given["answer"]]
            expected = [alone([texts.pair_of(tokenizer, given["prompt"], f" {answer}")]) for answer in answers]
            assert row["bytes"] == [len(answer) for answer in answers]
        np.testing.assert_allclose(row["logps"], expected, rtol=1e-5)
        if "choices" in given:
            assert row["best"] == np.argmax(expected)
            assert row["best_per_byte"] == np.argmax(
                [x / len(a) for x, a in zip(expected, given["choices"], strict=True)]
            )
    assert [row["right"] for row in found] == [0, None, None, 1, None, None, None] and found[4]["cut"] > 0
    assert told["accuracy"] == np.mean([found[i]["best"] == found[i]["right"] for i in (0, 3)])
    given = [
        (found[i], found[i]["right"] or 0) for i in (0, 1, 2, 3, 4, 6)
    ]  # not that of which no choice is known as right
    nll = -sum(row["logps"][i] for row, i in given) / sum(row["tokens"][i] for row, i in given)
    assert told["nll"] == pytest.approx(nll) and told["perplexity"] == pytest.approx(np.exp(nll)) and told["rows"] == 7
    assert told["programs"] <= 3 and not (tmp_path / "out.parquet.parts").exists()


def test_an_interrupted_run_goes_on_to_the_same_file(shop, rows, tmp_path, capsys, monkeypatch):
    run(shop, rows, tmp_path / "whole.parquet")
    target, asked, whole = tmp_path / "out.parquet", [], scoring.log_likelihoods

    def interrupted(module, params, pairs, **options):
        asked.append(len(pairs))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return whole(module, params, pairs, **options)

    monkeypatch.setattr(scoring, "log_likelihoods", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(shop, rows, target)
    assert not target.exists() and len(list((tmp_path / "out.parquet.parts").glob("*.parquet"))) == 1
    with pytest.raises(ValueError, match=r"was begun otherwise \(delimiter: ' ' there, '_' now\)"):
        run(shop, rows, target, "--delimiter", "_")
    run(shop, rows, target)
    assert len(asked) == 4  # the first part is not scored again
    assert target.read_bytes() == (tmp_path / "whole.parquet").read_bytes()

    before = capsys.readouterr().out.splitlines()[-1]
    run(shop, rows, target)  # whole: only told again
    again = json.loads(capsys.readouterr().out)
    assert len(asked) == 4 and {k: v for k, v in json.loads(before).items() if k in again and k != "seconds"} == {
        k: v for k, v in again.items() if k != "seconds"
    }
    with pytest.raises(ValueError, match=r"out\.parquet was begun otherwise"):
        run(shop, rows, target, "--form", "chat")


def test_other_rows_are_noticed(shop, rows, tmp_path, monkeypatch):
    data, target = tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    data.write_text(rows.read_text())
    monkeypatch.setattr(score, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(shop, data, target)
    data.write_text(rows.read_text().replace("four cats", "five cats"))
    with pytest.raises(ValueError, match=r"000000\.parquet is of other rows than"):
        run(shop, data, target)


@pytest.mark.parametrize(
    "row, words",
    [
        ({"prompt": "a"}, "line 2: `answer` is missing; the fields are prompt; give a text."),
        ({"prompt": "", "answer": "b"}, "line 2: `prompt` is ''; give a text."),
        ({"prompt": "a", "choices": "b"}, "line 2: `choices` must be a list of texts that are not empty."),
        ({"prompt": "a", "choices": ["b"], "answer": 1}, "line 2: `answer` is 1; give one of the 1 choices"),
        ({"prompt": "a", "answer": "b " * 99}, "and the model reads 64."),
    ],
)
def test_rows_that_cannot_be_scored_are_named(shop, tmp_path, row, words):
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "a", "answer": "b"}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError) as refused:
        run(shop, data, tmp_path / "out.parquet")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_wrong_files_and_flags(shop, rows, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        run(shop, rows, tmp_path / "no" / "out.parquet")
    (tmp_path / "text.parquet").write_text("no Parquet")
    with pytest.raises(ValueError, match="is no Parquet file"):
        run(shop, rows, tmp_path / "text.parquet")
    with pytest.raises(SystemExit):
        run(shop, rows, tmp_path / "out.parquet", "--part", "none")
    with pytest.raises(ValueError, match="--part 0 must be at least 1"):
        score.Score("m", "d", "t", part=0)


# Tasks of lm-evaluation-harness.


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_harness_writes_results_and_goes_on(shop, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    folder = write_tasks(tmp_path)

    def evaluate(to, *more, tasks="tiny_choices,tiny_texts"):
        given = [str(shop / "model"), "--tasks", tasks, "--include-path", str(folder), "--to", str(tmp_path / to)]
        harness.harness(
            tyro.cli(harness.Harness, args=[*given, "--max-length", "64", "--bootstrap", "0", "--json", *more])
        )
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    told = evaluate("whole")
    assert set(told["results"]) == {"tiny_choices", "tiny_texts"} and told["work"]["programs"] <= 3
    rows = pyarrow.parquet.read_table(tmp_path / "whole" / "tiny_choices.parquet").to_pylist()
    assert told["results"]["tiny_choices"]["acc,none"] == np.mean([row["acc"] for row in rows]) and len(rows) == 4
    assert json.loads(rows[0]["doc"])["answer"] == 0
    kept = (tmp_path / "whole" / "answers.jsonl").read_text()

    # A kill in the middle of a line: what was answered before is not asked again, and the results are the same.
    part = tmp_path / "part"
    part.mkdir()
    (part / "settings.json").write_text((tmp_path / "whole" / "settings.json").read_text())
    (part / "answers.jsonl").write_text("".join(kept.splitlines(keepends=True)[:9]) + kept[:11])
    again = evaluate("part")
    assert again["results"] == told["results"] and 0 < again["work"]["requests"] < told["work"]["requests"]
    assert sorted((part / "answers.jsonl").read_text().splitlines()) == sorted(kept.splitlines())
    assert evaluate("part")["work"]["requests"] == 0

    with pytest.raises(ValueError, match=r"was begun otherwise \(limit: None there, 2 now\)"):
        evaluate("part", "--limit", "2")
    chat = evaluate("chat", "--chat", "--limit", "2", "--generation", "max_gen_toks=4", tasks="tiny_answers")
    assert chat["work"]["requests"] == 2


@pytest.mark.ci  # the harness reads all of its own task files
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_harness_names_an_unknown_task(shop, tmp_path):
    pytest.importorskip("lm_eval")
    with pytest.raises(ValueError, match="task 'tiny_nothing' is unknown"):
        harness.harness(harness.Harness(str(shop / "model"), "arc_easy,tiny_nothing", str(tmp_path / "other")))
    assert not (tmp_path / "other").exists()
