"""`jaxmethods evaluate scylla`: built-in solvers, a model on disk, a server that misbehaves; every run can be gone on with."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
import tyro
from PIL import Image

from jaxmethods import models
from jaxmethods.evals import scylla
from jaxmethods.launch import scylla as program
from jaxmethods.launch.scylla import Scylla, evaluate_scylla
from jaxmethods.launch.train import RunFailed
from tests import tiny
from tests.chat_server import ChatServer, asked
from tests.launch.conftest import chatml_tokenizer

NOISY = "noisy:.9,.9,.9,.4,.2/.9,.8,.1,.3,.1"
FEW = ("FindMinimum", "TwoSum", "LongestCommonSubarray")


def run(model, to, *arguments):
    """Runs the command; returns results.json."""
    given = [model, "--to", str(to), *map(str, arguments)]
    if "--items" not in given:
        given += ["--items", "5"]
    if "--tasks" not in given:
        given += ["--tasks", *FEW]
    evaluate_scylla(tyro.cli(Scylla, args=given))
    return json.loads((Path(to) / "results.json").read_text())


def files(folder):
    """What was made, without how long it took and the picture's bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(Path(folder).rglob("*"))
        if (path.is_file() and path.suffix in (".jsonl", ".parquet")) or path.name == "results.json"
    }


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_whole_benchmark(tmp_path, capsys):
    made = run("memoriser", tmp_path / "memory", "--tasks", *scylla.TASKS, "--items", 2, "--second", "--json")
    assert json.loads(capsys.readouterr().out) == made
    assert [(level["inside"], level["outside"], level["gap"], level["score"]) for level in made["levels"]] == [
        (1, 0, 1, -1)
    ] * 5
    assert made["critical_complexity"] == 1 and made["failed"] == 0 and made["second"]["critical_complexity"] == 1
    assert (
        made["tasks"]["TSP"]["gap"] == 1 and made["tasks"]["TSP"]["ratio"] == 0 and made["tasks"]["TSP"]["level"] == 5
    )
    rows = pyarrow.parquet.read_table(tmp_path / "memory" / "rows.parquet").to_pylist()
    assert len(rows) == 20 * 2 * 2 and sum(row["right"] for row in rows) == 40
    row = next(row for row in rows if row["task"] == "TSP" and row["split"] == "id")
    assert json.loads(row["parsed"]) == json.loads(row["reference"]) and row["prompt"].startswith("Task: TSP.")
    assert "Therefore, the answer is" in row["second_prompt"] and row["second_right"]

    run("oracle", tmp_path / "oracle", "--beside", tmp_path / "memory")
    shown = capsys.readouterr().out
    assert "none, as no task has a gap" in shown and "LongestCommonSubarray is as hard as level 1.00" in shown
    with Image.open(tmp_path / "oracle" / "valley.png") as picture:
        assert picture.size > (800, 300)


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    whole = run(NOISY, tmp_path / "whole", "--batch-size", 2)
    real, left = scylla.Noisy.__call__, [13]

    def tired(self, prompt):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(self, prompt)

    monkeypatch.setattr(scylla.Noisy, "__call__", tired)
    sittings = 0
    while True:
        sittings += 1
        try:
            again = run(NOISY, tmp_path / "cut", "--batch-size", 2)
            break
        except KeyboardInterrupt:
            left[0] = 13
    assert sittings > 2 and again == whole and files(tmp_path / "cut") == files(tmp_path / "whole")

    # Other grading and denominator need no new answers, more tasks only theirs.
    monkeypatch.setattr(scylla.Noisy, "__call__", lambda self, prompt: pytest.fail("asked again"))
    assert run(NOISY, tmp_path / "cut", "--grading", "reference", "--denominator", "parsed")["grading"] == "reference"
    monkeypatch.undo()
    assert set(run(NOISY, tmp_path / "cut", "--tasks", "TwoSum", "TSP")["tasks"]) == {"TwoSum", "TSP"}
    with pytest.raises(ValueError, match=r"belongs to another run \(shots: 0 there, 3 now\); choose another --to"):
        run(NOISY, tmp_path / "cut", "--shots", 3)


class Server:
    """Answers as the oracle does, and invents inputs; `sick` says what it answers instead."""

    def __init__(self):
        self.sick = lambda number: None
        self.count = 0

    def __call__(self, request):
        self.count += 1
        if (told := self.sick(self.count)) is not None:
            return told
        text = asked(request)
        if text.startswith("Task: "):
            return scylla.oracle(text)
        lists = [[(7 * i * j + self.count) % 50 for j in range(5 + i % 3)] for i in range(6)]
        return "ready" if "ready" in text else f"Some inputs: {', '.join(map(json.dumps, lists))} and [1, 2"


@pytest.fixture
def server():
    answer = Server()
    with ChatServer(answer) as real:
        answer.model, answer.requests = f"{real.url}#m", real.requests
        yield answer


def test_a_server_that_goes_away_and_comes_back(tmp_path, server):
    how = ("--retries", 0, "--batch-size", 4, "--parallel", 1)
    server.sick = lambda number: (503, "restarting") if number > 8 else None
    with pytest.raises(RunFailed, match=r"answers nothing more: .* 503 .*the same command goes on"):
        run(server.model, tmp_path, *how)
    asked_for = len(server.requests)
    server.sick = lambda number: None
    made = run(server.model, tmp_path, *how)
    assert made["failed"] == 0 and all(level["inside"] == level["outside"] == 1 for level in made["levels"])
    prompts = [asked(request) for request in server.requests[asked_for:]]
    assert len([text for text in prompts if text.startswith("Task: ")]) == 30 - 5  # what came before is not asked again
    assert server.requests[-1]["temperature"] == 0 and server.requests[-1]["max_tokens"] == 2048


def test_questions_without_an_answer_count_nowhere_until_asked_again(tmp_path, server, capsys):
    how = ("--retries", 0, "--parallel", 1, "--tasks", "FindMinimum", "--second")
    server.sick = lambda number: (500, "hiccup") if number in (3, 5) else None
    made = run(server.model, tmp_path, *how)
    inside = made["tasks"]["FindMinimum"]["id"]
    assert made["failed"] == 2 and inside == {"accuracy": 1.0, "items": 5, "parsed": 3, "failed": 2}
    assert "2 questions got no answer and count nowhere; --again asks them once more" in capsys.readouterr().out
    rows = lines(tmp_path / "answers" / "id" / "FindMinimum.jsonl")
    assert [bool(row["failed"]) for row in rows] == [False, True, False, True, False] and "500 (hiccup)" in rows[1][
        "failed"
    ]
    assert (
        made["second"]["failed"] == 2
        and lines(tmp_path / "second" / "id" / "FindMinimum.jsonl")[1]["failed"] == "the first pass failed"
    )
    before = len(server.requests)
    assert run(server.model, tmp_path, *how)["failed"] == 2 and len(server.requests) == before  # nothing is asked
    made = run(server.model, tmp_path, *how, "--again")
    assert (
        made["failed"] == made["second"]["failed"] == 0
        and made["second"]["tasks"]["FindMinimum"]["id"]["accuracy"] == 1
    )
    assert len(server.requests) == before + 1 + 2 + 2  # whether it is there, the two, and their second pass


def test_what_the_model_itself_invents(tmp_path, server):
    how = ("--examples", "probed", "--probe-samples", 4, "--probe-tokens", 99, "--items", 6)
    made = run(server.model, tmp_path, "--tasks", "SortNumbers", "TwoSum", *how)
    assert made["tasks"]["SortNumbers"]["id"]["items"] == 6 and made["critical_complexity"] is None
    probes = [request for request in server.requests if "Invent" in asked(request)]
    assert len(probes) == 8 and all(request["temperature"] == 0.9 and request["max_tokens"] == 99 for request in probes)
    rows = lines(tmp_path / "items" / "SortNumbers.jsonl")
    numbers = {split: {x for row in rows if row["split"] == split for x in row["example"]} for split in ("id", "ood")}
    assert max(numbers["id"]) < 60 and min(numbers["ood"]) >= 1000 and len(rows) == 2 * 14


@pytest.mark.slow
def test_a_model_on_disk(tmp_path):
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder("llama", num_layers=1, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    models.save(tmp_path / "model", module, params, tokenizer=tokenizer)
    how = (
        "--items",
        2,
        "--tasks",
        "FindMinimum",
        "--max-new-tokens",
        3,
        "--second",
        "--second-tokens",
        3,
        "--intrinsic",
    )
    made = run(str(tmp_path / "model"), tmp_path / "out", *how, "--batch-size", 2)
    measured = made["intrinsic"]["FindMinimum"]
    for split in ("id", "ood"):
        assert 0 < measured[split]["min_10"] <= measured[split]["min_90"] <= measured[split]["prob"] + 1e-9 < 1
        assert measured[split]["ppl"] >= 1 / measured[split]["prob"] - 1e-6  # a mean of inverses
    assert measured["divergence"]["js"] > 0


def test_what_cannot_be_is_refused(tmp_path):
    for options, words in (
        ({"items": 0}, "--items 0 must be at least 1"),
        ({"shots": 9}, "--shots 9 must be between 0 and 8"),
        ({"tasks": ("SortNumber",)}, "did you mean 'SortNumbers'"),
        ({"intrinsic": True}, "--intrinsic needs the weights"),
        ({"examples": "probed"}, "which oracle cannot"),
        *(({"model": name}, "give five accuracies") for name in ("noisy", "noisy:.5", "noisy:1,1,1,1,2/1,1,1,1,1")),
    ):
        with pytest.raises(ValueError, match=words):
            Scylla(**{"model": "oracle", "to": str(tmp_path)} | options)
    with pytest.raises(FileNotFoundError, match="evaluate that model first"):
        run("oracle", tmp_path / "new", "--beside", tmp_path)
    with pytest.raises(ValueError, match="names no model"):
        run("http://localhost:1/v1", tmp_path / "endpoint")
    with pytest.raises(ConnectionError, match="cannot be reached"):
        run("http://localhost:1/v1#m", tmp_path / "nobody", "--retries", 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty and holds no config"):
        run("oracle", tmp_path / "other")
    assert program.__all__ == ["Scylla", "draw_valley", "evaluate_scylla"]
