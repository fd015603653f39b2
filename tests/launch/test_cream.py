"""CREAM's loop: end to end, stopped anywhere and gone on with, its pairs by hand, and DPO where labels are sure."""

import dataclasses
import itertools
import json
import os
import signal

import jax
import numpy as np
import pytest
from etils import epath

from jaxmethods import models
from jaxmethods.data import Data
from jaxmethods.evals import completion
from jaxmethods.launch import cli
from jaxmethods.launch import config as run_config
from jaxmethods.launch import cream as program
from jaxmethods.launch import train as trainer
from jaxmethods.launch.cream import SelfRewarding
from jaxmethods.objectives import Preference
from tests.launch.conftest import first_device, numbers, save_talker

RECIPE = """
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.launch.cream import SelfRewarding
from jaxmethods.objectives import CREAM
from jaxmethods.training import Optimizer

SHARED = dict(
    adapters={{"_proj": LoRA(rank=2)}}, optimizer=Optimizer(learning_rate=1e-2, warmup=0), batch_size=4, checkpoint_every=2,
    remat="none", compilation_cache={cache!r},
)


def config():
    return SelfRewarding(
        workdir={workdir!r},
        sft=Run(model={model!r}, data=Data(train={train!r}, sequence_length=64), workdir={sft!r}, steps=4, **SHARED),
        round=Run(model="", data=Data(sequence_length=64, pack=False), workdir="", objective=CREAM(beta=0.5), **SHARED),
        prompts={prompts!r},
        held_out={held_out!r},
        samples=4,
        max_new_tokens=5,
        batch_size=4,
        seed=3,
    )
"""


def question(i):
    return {"prompt": f"how many cats on mat {i}?", "answer": f"{i % 7} cats"}


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """model/, the three files of rows, and recipe.py."""
    folder = tmp_path_factory.mktemp("loop")
    save_talker(folder)
    rows = {"train": range(16), "prompts": range(16, 33), "held_out": range(33, 39)}
    for name, numbers_ in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(question(i)) + "\n" for i in numbers_))
    paths = {name: str(folder / f"{name}.jsonl") for name in rows}
    folders = {"workdir": "run", "sft": "sft", "model": "model", "cache": "compiled"}
    (folder / "recipe.py").write_text(RECIPE.format(**paths, **{name: str(folder / x) for name, x in folders.items()}))
    return folder


@pytest.fixture(scope="module")
def run(room):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", first_device)
        cli.main(["cream", str(room / "recipe.py")])
    jax.config.update("jax_compilation_cache_dir", None)
    return room / "run"


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_seconds(workdir):
    return [{name: x for name, x in row.items() if name != "seconds"} for row in rows_of(workdir / "rounds.jsonl")]


def test_the_loop_end_to_end(run, room):
    rows = rows_of(run / "rounds.jsonl")
    assert [(row["round"], row["model"]) for row in rows] == [(0, "M0"), (0, "M1"), (1, "M2"), (2, "M3")]
    assert [row["prompts"] for row in rows[2:]] == [9, 8]  # 17 prompts, evenly
    asked = [row["prompt"] for number in (1, 2) for row in rows_of(run / f"round_{number}" / "answers.jsonl")]
    assert sorted(asked) == sorted(question(i)["prompt"] for i in range(16, 33))
    for row in rows[2:]:
        assert row["pairs"] + sum(row["skipped"].values()) == row["prompts"] and row["pairs"] > 4
        assert set(row["consistency"]) == {"kendall", "spearman", "top_order"}
        assert row["label"] == pytest.approx(row["consistency"]["kendall"]["mean"])
        assert row["seconds"]["answers"] > 0 and row["seconds"]["train"] > 0
    assert (run / "rounds.png").stat().st_size > 5000
    assert not list(run.glob("**/*.partial"))
    said = completion.complete(
        *models.load(run / "round_2" / "model"), models.load_tokenizer(str(run / "round_2" / "model")),
        [question(i)["prompt"] for i in range(33, 39)], max_new_tokens=5, batch_size=4,
    )  # fmt: skip
    assert said == [row["said"] for row in rows_of(run / "round_2" / "held_out_M3.jsonl")]


def test_rounds_by_hand(run, room):
    """Rewards from the saved models anew; their agreement and the pairs by loops over answers."""
    models_ = [room / "model", room / "sft" / "model", run / "round_1" / "model"]
    for number in (1, 2):
        folder = run / f"round_{number}"
        answers = rows_of(folder / "answers.jsonl")
        flat = [{"prompt": row["prompt"], "answer": text} for row in answers for text in row["answers"]]
        told = next(row for row in without_seconds(run) if row["round"] == number)
        assert told["skipped"] == {"equal": 0, "unusable": 0, "too_long": 0}  # else the loops below say too little
        of = lambda path, flat=flat: completion.answer_logps(
            *models.load(path), models.load_tokenizer(str(path)), flat, sequence_length=64, batch_size=8
        )
        start, lengths = (x.reshape(-1, 4) for x in of(models_[0]))
        reward = of(models_[number])[0].reshape(-1, 4) - start
        before = start / lengths if number == 1 else of(models_[1])[0].reshape(-1, 4) - start
        taus = []
        for one, two in zip(reward, before, strict=True):
            signs = [np.sign((one[i] - one[j]) * (two[i] - two[j])) for i, j in itertools.combinations(range(4), 2)]
            taus.append((sum(signs) / 6 + 1) / 2)
        assert told["consistency"]["kendall"]["mean"] == pytest.approx(np.mean(taus), abs=1e-6)
        for row, some, pair in zip(reward, answers, rows_of(folder / "pairs.jsonl"), strict=True):
            assert pair["prompt"] == some["prompt"]
            assert (pair["chosen"], pair["rejected"]) == (some["answers"][row.argmax()], some["answers"][row.argmin()])
        first = numbers(folder / "train")[0]  # the reference is the start of the round
        assert first["loss"] == pytest.approx(np.log(2), abs=1e-6) and first["rewards/margins"] == 0


def test_stopped_anywhere_it_goes_on_to_the_same_files(run, room, here, one_device, monkeypatch, tmp_path):
    """The program is ended at every fifth call of a model, and each training told to stop after its first step."""
    calls = {"left": 0, "stops": 0}

    def ending(function):
        def call(*arguments, **options):
            calls["left"] -= 1
            if calls["left"] < 0:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        return call

    append = trainer.MetricsFile.append

    def stopping(file, row):
        append(file, row)
        if row["step"] == 1:
            calls["stops"] += 1
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(completion, "complete", ending(completion.complete))
    monkeypatch.setattr(completion, "answer_logps", ending(completion.answer_logps))
    monkeypatch.setattr(trainer.MetricsFile, "append", stopping)
    again, ends = tmp_path / "again", []
    for _ in range(40):
        calls["left"] = 4
        done = here("cream", room / "recipe.py", "--workdir", again)
        ends.append(done.returncode)
        assert done.returncode in (0, 130), done
        if (again / "round_2" / "held_out_M3.jsonl").exists():
            break
    assert ends.count(130) >= 4 and calls["stops"] == 2
    assert without_seconds(again) == without_seconds(run)
    made = [path.relative_to(run) for path in sorted(run.glob("round_*/*")) if path.is_file()]
    made += [path.relative_to(run) for path in sorted(run.glob("round_*/model/*"))]
    assert len(made) > 20
    for path in made:
        assert (again / path).read_bytes() == (run / path).read_bytes(), path
    for number in (1, 2):
        assert numbers(again / f"round_{number}" / "train") == numbers(run / f"round_{number}" / "train")


def test_done_it_does_nothing_and_another_config_is_refused(run, room, here, refused, one_device, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("asked a model")

    before = {path: path.stat().st_mtime_ns for path in run.glob("round_*/**/*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(completion, "complete", never)
        patch.setattr(completion, "answer_logps", never)
        done = here("cream", room / "recipe.py", "--batch-size", 8)
        assert done.returncode == 0 and "M3" in done.stdout, done
    assert before == {path: path.stat().st_mtime_ns for path in run.glob("round_*/**/*") if path.is_file()}
    loop = lambda *options: refused("cream", room / "recipe.py", *options)
    assert "temperature: 0.8 there, 0.5 now" in loop("--temperature", 0.5)
    assert "round.optimizer.learning_rate: 0.01 there, 0.1 now" in loop("--round.optimizer.learning-rate", 0.1)
    assert "label: 'cream' there, 0.7 now" in loop("--label", 0.7)


def test_sure_labels_are_dpo(run, room, here, one_device, tmp_path):
    """The self-rewarding baseline shares M1, and its round is plain DPO on its pairs."""
    done = here("cream", room / "recipe.py", "--label", "srlm", "--rounds", 1, "--workdir", tmp_path / "srlm")
    assert done.returncode == 0, done
    pairs = tmp_path / "srlm" / "round_1" / "pairs.jsonl"
    assert {row["consistency"] for row in rows_of(pairs)} == {1.0}
    loop = run_config.load_config(str(room / "recipe.py"), SelfRewarding)
    softened = run_config.read_json(epath.Path(tmp_path / "srlm" / "round_1" / "train" / "config.json"))
    plain = dataclasses.replace(
        softened, objective=Preference(beta=loop.objective.beta), workdir=str(tmp_path / "dpo"),
        data=Data(train=str(pairs), sequence_length=64, pack=False, seed=loop.seed),
    )  # fmt: skip
    trainer.train(plain)
    ours, theirs = numbers(tmp_path / "srlm" / "round_1" / "train"), numbers(tmp_path / "dpo")
    assert len(ours) == len(theirs) > 2
    for one, two in zip(ours, theirs, strict=True):
        assert {name: pytest.approx(x, rel=1e-5, abs=1e-6) for name, x in two.items()} == one


@pytest.fixture
def loop(room):
    return run_config.load_config(str(room / "recipe.py"), SelfRewarding)


def scored(*rows):
    return [{"logps": [None if x is None else float(x) for x in row], "lengths": [2] * len(row)} for row in rows]


def test_pairs_by_hand(loop):
    prompts = [{"prompt": p, "answer": "b"} for p in "xyzw"]
    answers = [
        {"answers": ["a", "b", "b", "c"]},
        {"answers": ["a"] * 4},
        {"answers": ["a", "", "b", "c"]},
        {"answers": list("abcd")},
    ]
    start = scored([-4, -4, -4, -4], [-1] * 4, [-1] * 4, [-1] * 4)
    now = scored([-1, -2, -2, -3], [-2] * 4, [-1, -2, -3, -4], [-1, None, -2, -3])
    then = scored([-3, -2, -2, -1], [-2] * 4, [-1, -2, -3, -4], [-1, None, -2, -3])
    now[2]["lengths"][1] = 0
    pairs, told = program.select(loop, 2, prompts, answers, now, then, start)
    # Five of the six pairs of answers to the first prompt are ordered, all the other way round by the model before.
    rate = (-5 / 6 + 1) / 2
    assert pairs == [{"prompt": "x", "chosen": "a", "rejected": "c", "consistency": pytest.approx(rate)}]
    assert told["skipped"] == {"equal": 1, "unusable": 1, "too_long": 1} and told["pairs"] == 1
    assert told["consistency"]["kendall"] == {"mean": pytest.approx(rate), "std": 0}
    assert told["consistency"]["top_order"]["mean"] == 0 == told["right"]["chosen"]
    assert told["right"]["answers"] == pytest.approx((2 + 0 + 1 + 1) / 16)

    # In round 1 the model before is the start itself, and ranks by its mean log-probability: here by none.
    pairs, told = program.select(loop, 1, prompts[:1], answers[:1], now[:1], None, start[:1])
    assert pairs[0]["consistency"] == told["label"] == 0.5

    fixed = dataclasses.replace(loop, label=0.7, reward="oracle")
    pairs, told = program.select(fixed, 2, prompts, answers, now, then, start)
    assert pairs == [{"prompt": "x", "chosen": "b", "rejected": "a", "consistency": 0.7}]
    assert told["right"]["chosen"] == 1 and told["right"]["rejected"] == 0
    own = dataclasses.replace(loop, label="srlm", reward="tests.launch.test_cream:longest")
    _, told = program.select(own, 2, prompts[:1], answers[:1], now[:1], then[:1], start[:1])
    assert told["pairs"] == 0 and told["skipped"]["equal"] == 1 and told["label"] is None


def longest(row, answer):
    return len(answer)


def test_a_loop_survives_json_which_knows_its_fields(loop):
    written = json.loads(json.dumps(run_config.to_json(loop)))
    assert run_config.from_json(written, SelfRewarding) == loop
    with pytest.raises(ValueError, match="SelfRewarding has no field 'sample'; did you mean 'samples'"):
        run_config.from_json(written | {"sample": 3}, SelfRewarding)


def test_refused_before_anything_is_written(room, refused, one_device, tmp_path):
    loop = lambda *options: refused("cream", room / "recipe.py", "--workdir", tmp_path / "none", *options)
    bare = tmp_path / "bare.jsonl"
    bare.write_text('{"prompt": "how many?"}\n')
    oracle = ("--label", "srlm", "--reward", "oracle")
    assert "line 1: a row of prompts has no field 'answer'" in loop("--prompts", bare, *oracle)
    assert "has 1 rows for rounds=2" in loop("--prompts", bare)
    assert "line 1: a row of held_out has no field 'answer'" in loop("--held-out", bare)
    assert "samples=1 must be at least 2" in loop("--samples", 1)
    assert "temperature=0.0 must be positive" in loop("--temperature", 0)
    assert "compares two models' own" in loop("--reward", "oracle")
    assert "label=1.5 must be in [0, 1]" in loop("--label", 1.5)
    assert "No module named 'nowhere'" in loop("--label", "srlm", "--reward", "nowhere:f")
    assert "round.steps=7 is filled in by the loop" in loop("--round.steps", 7)
    assert "set Data(pack=False)" in loop("--round.data.pack", "True")
    assert "'nowhere_proj'" in refused("cream", with_(room, tmp_path, '"_proj"', '"nowhere_proj"'))
    assert "token and cannot be fused" in refused(
        "cream", with_(room, tmp_path, "LoRA(rank=2)", "LoRA.__mro__ and SMoRE()")
    )
    assert "Unrecognized options: --sample" in loop("--sample", 3)
    assert "takes Run; give it to `jaxmethods cream`" in refused("train", room / "recipe.py")
    assert not (tmp_path / "none").exists()


def with_(room, folder, old, new):
    """The recipe with another work folder, SMoRE at hand, and one change."""
    text = (room / "recipe.py").read_text().replace("import LoRA", "import LoRA, SMoRE")
    assert old in text
    (folder / "changed.py").write_text(text.replace(old, new).replace(str(room / "run"), str(folder / "none")))
    return folder / "changed.py"


def test_other_prompts_than_those_answered_are_refused(run, room, refused, one_device):
    file = room / "prompts.jsonl"
    text = file.read_text()
    try:
        file.write_text(text.replace("mat 20", "mat 99"))
        assert "is of other prompts than the config names now" in refused("cream", room / "recipe.py")
        assert len(without_seconds(run)) == 4  # and what it told stays
    finally:
        file.write_text(text)


def test_the_quiz_is_disjoint_and_right():
    from jaxmethods.data import quiz

    parts = quiz.make(sft=60, prompts=60, held_out=30)
    asked = [row["prompt"] for part in parts for row in part]
    assert len(set(asked)) == len(asked) == 150 and quiz.make(sft=60, prompts=60, held_out=30) == parts
    assert quiz.make(seed=1, sft=60, prompts=60, held_out=30) != parts
    words = {quiz.in_words(n): n for n in range(100)}
    number = lambda word: int(word) if word.isdigit() else words[word]
    for row in itertools.chain(*parts):
        said = row["prompt"].rstrip("?.").split()
        if row["kind"] in ("sum", "difference"):
            sign = 1 if row["kind"] == "sum" else -1
            assert int(row["answer"]) == number(said[2]) + sign * number(said[4])
        elif row["kind"] == "digits":
            assert int(row["answer"]) == 100 * number(said[1]) + number(said[4])
        else:
            pick = max if row["kind"] == "larger" else min
            assert row["answer"] == pick(said[-3].strip(","), said[-1])
    with pytest.raises(ValueError, match="prompts=0"):
        quiz.make(prompts=0)
