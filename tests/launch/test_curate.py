"""`jaxmethods curate mmedpo`: rows with pictures and heat maps to pairs that train, by rules and by a judge behind a server."""

import dataclasses
import json
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmethods import models
from jaxmethods.data import Source, reports
from jaxmethods.launch import config as run_config
from jaxmethods.launch import curate
from jaxmethods.launch.train import train
from tests import tiny
from tests.chat_server import HANG, ChatServer, asked
from tests.launch.conftest import chatml_tokenizer, numbers, write_shop

RECIPE = """
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.launch import Run
from jaxmethods.objectives import MMedPO
from jaxmethods.training import Optimizer


def config() -> Run:
    return Run(
        model={model!r},
        data=Data(train={train!r}, sequence_length=96, pack=False),
        workdir={workdir!r},
        adapters={{"q_proj": LoRA(rank=2)}},
        objective=MMedPO(),
        optimizer=Optimizer(learning_rate=1e-2, warmup=0),
        steps=1,
        batch_size=8,
        remat="none",
        compilation_cache={cache!r},
    )
"""
RNG = np.random.default_rng(0)
MASK = np.zeros((16, 12), bool)
MASK[3:9, 2:10] = True


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """model/ (it sees), rows.jsonl, some of them with heat maps of all kinds and one without its picture, and recipe.py."""
    folder = tmp_path_factory.mktemp("room")
    tokenizer = chatml_tokenizer("<image>")
    module, params = tiny.vlm(
        num_layers=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vocab_size=len(tokenizer),
        rope_scaling=None, eos_ids=(2,),
    )  # fmt: skip
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    rows = []
    for i in range(8):
        Image.fromarray(RNG.integers(0, 256, (16, 12, 3), np.uint8)).save(folder / f"{i}.png")
        asked_for = {"prompt": f"<image>\nIs there a mass in {i}?", "answer": ["no", "yes"][i % 2]}
        rows.append(asked_for | {"images": f"{i}.png"})
    np.save(folder / "mask.npy", MASK)
    np.save(folder / "coarse.npy", np.eye(4, 3))
    np.save(folder / "square.npy", np.ones((4, 4)))
    np.save(folder / "none.npy", np.zeros((16, 12)))
    Image.fromarray((MASK * 255).astype(np.uint8)).save(folder / "mask.png")
    for i, name in ((0, "mask.npy"), (2, "mask.png"), (3, "coarse.npy"), (4, "square.npy"), (5, "none.npy")):
        rows[i] |= {"heat_map": name, "confidence": i / 10}
    rows[7] = {"prompt": "<image>\nWhy?", "answer": "For a reason.", "images": "7.png"}
    rows[6]["id"] = "own/id"
    rows.append({"prompt": "<image>\nIs there?", "answer": "no", "images": "gone.png", "heat_map": "mask.npy"})
    write_shop(folder, RECIPE, rows=rows)
    return folder


@pytest.fixture(scope="module")
def options(room, tmp_path_factory):
    """Options of a quick run, and a folder of its own."""
    return lambda **changes: curate.Curate(
        **{"name": "mmedpo", "model": str(room / "model"), "data": str(room / "rows.jsonl"), "samples": 2,
           "max_new_tokens": 4, "batch_size": 4, "to": str(tmp_path_factory.mktemp("out") / "pairs.jsonl")} | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def made(options):
    """The folder that a run with the built-in judge filled."""
    run = options()
    curate.curate(run)
    return run


def lines(run, kind):
    file = Path(run.to).with_suffix(f".{kind}.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def files(run):
    """Every file that a run made, by its name."""
    at = Path(run.to).parent
    return {str(path.relative_to(at)): path.read_bytes() for path in sorted(at.rglob("*")) if path.is_file()}


def picture(path):
    return np.asarray(Image.open(path))


def test_text_pairs_hold_the_truth_and_what_contradicts_it(made, room):
    pairs = lines(made, "text")
    assert len(pairs) == 7 and {pair["kind"] for pair in pairs} == {"text"}
    for i, pair in enumerate(pairs):
        assert pair["prompt"] == f"<image>\nIs there a mass in {i}?"
        assert {pair["chosen"], pair["rejected"].casefold().strip(".")} == {"yes", "no"}
        assert pair["relevance"] == 0.9 and pair["origin"] in ("sampled", "written")  # of a mass
        assert (Path(made.to).parent / pair["images"]).resolve() == room / f"{i}.png"
    assert pairs[6]["id"] == "own/id" and len({pair["id"] for pair in pairs}) == 7


def test_visual_pairs_differ_in_the_lesion_alone(made, room):
    pairs = lines(made, "visual")
    assert [pair["relevance"] for pair in pairs] == [0.0, 0.2, 0.3]
    for i, pair in zip((0, 2, 3), pairs, strict=True):
        assert pair["chosen"] == pair["rejected"] == ["no", "yes"][i % 2]
        before, after = picture(room / f"{i}.png"), picture(Path(made.to).parent / pair["rejected_images"])
        assert after.dtype == np.uint8 and after.shape == before.shape
        changed = (before != after).any(axis=-1)
        if i != 3:
            assert not changed[~MASK].any() and changed[MASK].mean() > 0.9
        else:  # bilinear: the diagonal of the grid, and what lies between it and its neighbours
            assert changed[:2, :2].all() and not changed[:3, 10:].any() and not changed[14:].any()


def test_what_makes_no_pair_is_kept_with_its_reason(made):
    skipped = {(row["row"].rpartition(" ")[2], row["kind"]): row for row in lines(made, "skipped")}
    assert {place: row["why"] for place, row in skipped.items()} == {
        ("5", "visual"): "row", ("6", "visual"): "row", ("8", "text"): "none",
        ("9", "text"): "row", ("9", "visual"): "row",
    }  # fmt: skip
    reason = skipped["5", "visual"]["reason"]
    assert "rows.jsonl, line 5: the heat map has 4 x 4 cells and the picture 12 x 16 pixels" in reason
    assert (
        skipped["9", "text"]["reason"] == skipped["9", "visual"]["reason"]
        and "gone.png does not" in skipped["9", "text"]["reason"]
    )
    assert "resize the map to 12 x 16" in reason and "0 everywhere" in skipped["6", "visual"]["reason"]


def test_pairs_of_both_kinds_train_a_step(made, room, one_device, tmp_path):
    run = run_config.load_config(str(room / "recipe.py"))
    sources = tuple(Source(str(Path(made.to).with_suffix(f".{kind}.jsonl"))) for kind in ("text", "visual"))
    train(dataclasses.replace(run, data=dataclasses.replace(run.data, train=sources), workdir=str(tmp_path / "run")))
    (row,) = numbers(tmp_path / "run")
    assert abs(row["rewards/margins"]) < 1e-5 and 0.75 * np.log(2) < row["loss"] < 1.25 * np.log(2)


def test_another_run_makes_the_same_files(made, options):
    again = options(batch_size=3)
    curate.curate(again)
    assert files(again) == files(made)
    other = options(seed=1)
    curate.curate(other)
    differ = {name for name, content in files(other).items() if content != files(made)[name]}
    assert len([name for name in differ if name.endswith(".png")]) == 3


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.5, 0.99])
def test_cut_anywhere_it_goes_on_to_the_same_files(made, options, capsys, kept):
    again = options()
    shutil.copytree(Path(made.to).parent, Path(again.to).parent, dirs_exist_ok=True)
    for kind in ("text", "visual", "skipped"):
        file = Path(again.to).with_suffix(f".{kind}.jsonl")
        file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    for noised in list(Path(again.to).parent.rglob("*.png"))[: 3 if kept == 0 else 0]:
        noised.unlink()
    curate.curate(again)
    assert files(again) == files(made)
    there = capsys.readouterr().err
    assert ("were there" in there) == (kept > 0.2), there


def test_real_reports_are_contradicted_by_labels_that_are_not_in_their_rows(options, tmp_path):
    try:
        rows = reports.chest_xray_reports()[:5]
    except ModuleNotFoundError:
        pytest.skip("needs the package torchxrayvision: make assets")
    rows = [row | {"prompt": row["prompt"][:80]} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = options(data=str(tmp_path / "rows.jsonl"))
    curate.curate(run)
    normal, ill = lines(run, "text")[:2]
    assert (normal["id"], normal["chosen"], ill["id"]) == ("CXR1", "Normal chest x-XXXX.", "CXR4")
    assert (normal["rejected"], normal["origin"]) == (
        ill["chosen"],
        "written",
    )  # the one report here with findings that it states
    assert "emphysema" in ill["chosen"] and ill["rejected"] == "No acute cardiopulmonary findings."


def answering(request):
    """A judge: it picks the first candidate, or none of the third row's, writes, and agrees, or has a score of its own."""
    text = asked(request)
    if "Which candidate" in text:
        return "none" if " 2?" in text else "1"
    if "Begin with the word Answer" in text:
        return "Answer: a tumour"
    return "agree" if "Another clinician" in text else "0.3" if " 4?" in text else "0.7"


def test_a_model_behind_a_server_judges(options, room):
    with ChatServer(lambda request: answering(request) if request["model"] == "a" else "0.5") as server:
        run = options(judge=(f"{server.url}#a", f"{server.url}#b"), rounds=2, retries=0)
        curate.curate(run)
    pairs = lines(run, "text")
    assert len(pairs) == 8 and [pair["origin"] for pair in pairs].count("written") >= 1
    assert pairs[2]["rejected"] == "a tumour" and pairs[2]["origin"] == "written"
    # Said 0.7, 0.5, then agreed with twice in the second round; but judge b never knows the word.
    assert all(pair["agreed"] and pair["relevance"] == 0.5 for pair in pairs)
    assert server.requests[0]["messages"][0]["content"] == "Answer with the word ready."


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_files(options, command):
    """The judge falls silent in the second half; the process is killed; another one ends the work."""
    silent, reached = threading.Event(), threading.Event()

    def judge(request):
        if silent.is_set() and " 5?" in asked(request):
            reached.set()
            return HANG
        return answering(request)

    with ChatServer(judge) as server:
        whole = options(judge=(f"{server.url}#a",), parallel=1)
        curate.curate(whole)
        silent.set()
        run = options(judge=whole.judge, parallel=1)
        given = [run.name, run.model, "--data", run.data, "--to", run.to, "--judge", *run.judge, "--samples", "2",
                 "--max-new-tokens", "4", "--batch-size", "4", "--parallel", "1"]  # fmt: skip
        process = command("curate", *given, start=True)
        assert reached.wait(120)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        half = len(lines(run, "text"))
        silent.clear()
        server.over.set()
        curate.curate(run)
    assert half == 4 and files(run) == files(whole)


def test_a_judge_that_dies_stops_the_run_and_nothing_of_its_rows_is_recorded(options, here):
    gone, refusing = threading.Event(), threading.Event()

    def judge(request):
        text = asked(request)
        gone.set() if " 4?" in text else None
        if gone.is_set() or (refusing.is_set() and " 1?" in text and "Which candidate" in text):
            return 500, "out of memory"
        return answering(request)

    with ChatServer(judge) as server:
        run = options(judge=(f"{server.url}#a",), retries=0, parallel=1)
        given = [run.name, run.model, "--data", run.data, "--to", run.to, "--judge", *run.judge, "--samples", "2",
                 "--max-new-tokens", "4", "--batch-size", "4", "--retries", "0", "--parallel", "1"]  # fmt: skip
        refusing.set()
        done = here("curate", *given)
        assert done.returncode == 1 and "failed on all of" in done.stderr and "(out of memory)" in done.stderr
        assert len(lines(run, "text")) == 3 and [row["why"] for row in lines(run, "skipped")] == ["judge"]
        done = here("curate", *given)  # the server still fails
        assert done.returncode == 2 and "answers 500 (out of memory)" in done.stderr
        server.answer = answering
        assert here("curate", *given).returncode == 0
        assert len(lines(run, "text")) == 7 and lines(run, "skipped")[0]["why"] == "judge"
        done = here("curate", *given, "--again")
    assert done.returncode == 0 and len(lines(run, "text")) == 8 and "judge" not in str(lines(run, "skipped"))


def test_a_row_that_a_judge_always_fails_on_does_not_stop_the_run(options):
    """The row is alone in its batch, and the judge has answers to others."""
    with ChatServer(lambda request: (400, "too long") if " 2?" in asked(request) else answering(request)) as server:
        run = options(judge=(f"{server.url}#a",), batch_size=1)
        curate.curate(run)
    (failed,) = (row for row in lines(run, "skipped") if row["why"] == "judge")
    assert "answers 400 (too long)" in failed["reason"] and len(lines(run, "text")) == 7


def test_a_model_that_cannot_judge_makes_no_text_pair(options, room, here, tmp_path):
    """A random model's words cannot be read: every row says so, and the visual pairs are there."""
    run = options(judge=(f"local:{room / 'model'}",), judge_tokens=4, judge_retries=0)
    curate.curate(run)
    assert not lines(run, "text") and len(lines(run, "visual")) == 3
    failed = [row for row in lines(run, "skipped") if row["why"] == "judge"]
    assert len(failed) == 8 and all("cannot be read: it " in row["reason"] for row in failed)
    (tmp_path / "why.jsonl").write_text('{"prompt": "Why?", "answer": "For a reason."}\n')
    done = here("curate", "mmedpo", run.model, "--data", tmp_path / "why.jsonl", "--to", tmp_path / "pairs.jsonl")
    assert done.returncode == 1 and "no pair could be made" in done.stderr


def test_refused_before_anything_is_made(made, options, room, refused, tmp_path):
    def told(*more, model="model", to=tmp_path / "new.jsonl", rows=room / "rows.jsonl"):
        return refused("curate", "mmedpo", room / model, "--data", rows, "--to", to, *more)

    same = ["--samples", "2", "--max-new-tokens", "4"]
    assert "was begun otherwise (samples: 2 there, 3 now)" in told(*same, "--samples", "3", to=made.to)
    assert "seed: 0 there, 7 now" in told(*same, "--seed", "7", to=made.to)
    (tmp_path / "old.text.jsonl").write_text("")
    assert "says how it was made" in told(to=tmp_path / "old.jsonl")
    assert "there is no folder" in told(to=tmp_path / "none/pairs.jsonl")
    assert "is unknown; give built-in, local:MODEL or URL#MODEL" in told("--judge", "gpt")
    assert "names no model; give URL#MODEL" in told("--judge", "http://127.0.0.1:9/v1")
    assert "cannot be reached" in told("--judge", "http://127.0.0.1:9/v1#m", "--retries", "0")
    assert "--noise-step 1000 must be between 0 and 999" in told("--noise-step", "1000")
    assert "no such folder" in told(model="no-model")
    for name, row, said in (
        ("answer", {"prompt": "x"}, "field 'answer' must be text"),
        ("prompt", {"answer": "x"}, "field 'prompt' must be text or messages"),
        ("twice", {"prompt": "x", "answer": "y", "id": 1}, "line 2: its id '1' is also that of"),
        ("marks", {"prompt": "x", "answer": "y", "images": str(room / "0.png")}, "line 1: the text has 0 <image> markers"),
    ):  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 2)
        assert said in told(rows=tmp_path / f"{name}.jsonl")
    assert sorted(path.suffix for path in tmp_path.glob("new*")) == []
