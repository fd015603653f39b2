"""`jaxmethods rag`: from pictures with reports to a trained model, on tiny models; stopped and gone on with; results by hand."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from PIL import Image, ImageDraw

from jaxmethods import models
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data
from jaxmethods.data.sources import write_jsonl
from jaxmethods.evals import answers
from jaxmethods.launch import Run
from jaxmethods.launch import rag as program
from jaxmethods.launch.rag import Domain, RetrievalAugmented, run_rag
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxmethods.objectives import Preference
from jaxmethods.retrieval import RetrieverConfig
from jaxmethods.training import Optimizer
from tests import tiny
from tests.launch.conftest import chatml_tokenizer, first_device
from tests.models.test_composing import LAYERS, random

COLOURS = ("red", "green", "blue", "white", "yellow", "purple")
GROUNDS = {"dark": 30, "bright": 200}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two domains, pictures of a square on dark and on bright ground; twelve reports, eight questions and four held out of each."""
    folder = tmp_path_factory.mktemp("rag")
    tokenizer = chatml_tokenizer("<image>")
    module, params = tiny.vlm(
        num_layers=2, image_token_id=tokenizer.convert_tokens_to_ids("<image>"), vocab_size=len(tokenizer), rope_scaling=None,
        eos_ids=(2,),
    )  # fmt: skip
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    text = TextEncoderConfig(
        "bert", vocab_size=len(tokenizer), max_positions=32, token_types=2,
        encoder=dataclasses.replace(LAYERS, post_norm=True, activation="gelu"),
    )  # fmt: skip
    models.save(folder / "text", TextEncoder(text), random(text), tokenizer=tokenizer)

    def paint(name, colour, place, left):
        picture = Image.new("RGB", (16, 16), (GROUNDS[place],) * 3)
        ImageDraw.Draw(picture).rectangle((left, 4, left + 7, 11), fill=colour)
        picture.save(folder / name)
        return name

    rows = {"questions": [], "held_out": []}
    for place in GROUNDS:
        reports = []
        for i, colour in enumerate(COLOURS):
            for left in (0, 8):
                name = paint(f"{place}_{colour}_{left}.png", colour, place, left)
                reports.append({"images": name, "report": f"{colour} {place}"})
            kind = "questions" if i < 4 else "held_out"
            own = {"images": reports[-1]["images"] if i == 0 else paint(f"{place}_{colour}.png", colour, place, 4)}
            rows[kind].append(
                own | {"question": f"is it {colour}?", "answer": "yes", "domain": place, "options": ["yes", "no"]}
            )
            rows[kind].append(own | {"question": "what is it?", "answer": f"{colour} {place}", "domain": place})
        write_jsonl(folder / f"{place}.jsonl", reports)
    for name, some in rows.items():
        write_jsonl(folder / f"{name}.jsonl", some)
    return RetrievalAugmented(
        workdir=str(folder / "run"), model=str(folder / "model"), text_encoder=str(folder / "text"),
        domains=tuple(Domain(place, str(folder / f"{place}.jsonl"), f"Look at the {place}.") for place in GROUNDS),
        questions=str(folder / "questions.jsonl"), held_out=str(folder / "held_out.jsonl"),
        retriever=RetrieverConfig(width=8, epochs=20, batch_size=4, held_out=0.0, patience=None), k=3, threshold=0.5,
        training=Run(
            model="", data=Data(sequence_length=512, pack=False), workdir="", adapters={"self_attn/q_proj": LoRA(rank=2)},
            objective=Preference(beta=0.5), optimizer=Optimizer(learning_rate=1e-2, warmup=0), batch_size=2, remat="none",
            checkpoint_every=2, compilation_cache=str(folder / "compiled"),
        ),
        right_above=0.3, max_new_tokens=6, batch_size=4,
    )  # fmt: skip


def said_by(prompts):
    """A model that says yes where there are reports, and their first one where no options are given."""
    made = []
    for prompt in prompts:
        text, pixels = prompt.prompt, np.asarray(Image.open(prompt.images))
        listed = [line[3:] for line in text.splitlines() if line.startswith("1. ")]
        noise = (pixels == 0).mean() > 0.3
        if "one of these" in text:
            made.append("yes" if listed and not noise else "no")
        else:
            made.append(listed[0] if listed else "nothing")
    return made


@pytest.fixture(scope="module")
def run(config):
    """The whole program, with answers that give pairs of each kind: a tiny random model has no right ones."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", first_device)
        patch.setattr(answers.Local, "__call__", lambda self, prompts: said_by(prompts))
        results = run_rag(config)
    jax.config.update("jax_compilation_cache_dir", None)
    return results


def rows_in(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def rows_of(config, name):
    return rows_in(f"{config.workdir}/{name}.jsonl")


def test_contexts_are_of_the_domain_and_never_of_the_own_picture(run, config):
    for name in ("questions", "held_out"):
        for row, found in zip(rows_in(getattr(config, name)), rows_of(config, f"contexts/{name}"), strict=True):
            assert (
                found["prompt"] == row["question"] and found["domain"] == row["domain"] and len(found["reports"]) == 3
            )
            assert all(text.endswith(found["domain"]) for text in found["reports"])
            assert found["similarities"] == sorted(found["similarities"], reverse=True) and 1 <= found["kept"] <= 3
    # The first question is about a picture that is in the base: of two red ones on this ground one is left.
    assert rows_of(config, "contexts/questions")[0]["reports"].count("red dark") <= 1


def test_pairs_follow_from_the_answers(run, config):
    """By the table of the paper, row by row; prompts hold the kept reports on both sides."""
    asked = rows_in(config.questions)
    told = {kind: rows_of(config, f"answers/{kind}") for kind in ("alone", "adaptive", "noised")}
    expected = []
    for i, row in enumerate(asked):
        alone, helped, noised = (told[kind][i] for kind in told)
        chosen = helped["said"] if row.get("options") else row["answer"]
        for subset, is_one, rejected in (
            ("cross_modal", helped["right"] and noised["right"], noised["said"]),
            ("use_reports", helped["right"] and not alone["right"], alone["said"]),
        ):
            if is_one:
                expected.append((subset, helped["prompt"], chosen, rejected))
    pairs = rows_of(config, "pairs")
    assert [(p["subset"], p["prompt"], p["chosen"], p["rejected"]) for p in pairs] == expected and len(expected) > 4
    assert {p["subset"] for p in pairs} == {"cross_modal", "use_reports"}
    for pair in pairs:
        assert ("rejected_images" in pair) == (pair["subset"] == "cross_modal")
        assert pair["prompt"].startswith("<image>\nLook at the ") and "reference report" in pair["prompt"]


def test_results_by_hand(run, config):
    asked = rows_in(config.held_out)
    assert [(row["model"], row["contexts"]) for row in run] == [
        (model, kind) for model in ("before", "after") for kind in ("alone", "fixed", "adaptive")
    ]
    for row in run[:3]:
        right = [x["right"] for x in rows_of(config, f"held_out/before_{row['contexts']}")]
        assert row["right"] == np.mean(right) and row["routed"] == 1.0 and row["questions"] == len(asked)
        assert row["by_domain"]["dark"] == np.mean(
            [r for r, x in zip(right, asked, strict=True) if x["domain"] == "dark"]
        )
    assert run[0]["right"] == 0 and run[1]["right"] >= 0.5  # "no" to what is so, and "yes"
    assert run[1]["reports"] == 3.0 >= run[2]["reports"] >= 1.0
    assert run[0]["over_reliance"] is None and run[1]["over_reliance"] == 0.0


def test_a_real_model_answers_and_a_stopped_program_goes_on(run, config, monkeypatch, tmp_path):
    """The real answers of the tiny model, interrupted at every call once; whole files are as without an interrupt."""
    monkeypatch.setattr(jax, "devices", first_device)
    calls = {"dark": 0}
    real = answers.Local.__call__

    def ending(self, prompts):
        calls["dark"] -= 1
        if calls["dark"] < 0:
            raise KeyboardInterrupt
        return real(self, prompts)

    again = dataclasses.replace(config, workdir=str(tmp_path / "again"))
    monkeypatch.setattr(answers.Local, "__call__", ending)
    ended = ""
    for _ in range(20):
        calls["dark"] = 3
        try:
            run_rag(again)
        except KeyboardInterrupt:
            continue
        except program.RunFailed as failed:  # a random model is right in no way
            ended = str(failed)
            break
    assert "no question makes a pair" in ended
    for name in ("contexts/questions", "contexts/held_out"):
        assert rows_of(again, name) == rows_of(config, name)
    monkeypatch.setattr(answers.Local, "__call__", real)
    once = dataclasses.replace(config, workdir=str(tmp_path / "once"))
    with pytest.raises(program.RunFailed):
        run_rag(once)
    for kind in ("alone", "adaptive", "noised"):
        assert rows_of(once, f"answers/{kind}") == rows_of(again, f"answers/{kind}")
    assert not list((tmp_path / "again").glob("**/*.partial"))


def test_noise_of_the_paper_takes_another_picture(config, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "devices", first_device)
    paper = dataclasses.replace(config, workdir=str(tmp_path / "paper"), noise="paper", noise_step=100)
    (tmp_path / "paper").mkdir()
    reports = {domain.name: program._reports(domain.reports) for domain in paper.domains}
    made = program._Program(paper, epath.Path(paper.workdir), program.Console(), reports)
    rows = program._questions(paper.questions, list(GROUNDS))
    for row, file in zip(rows, made.noise(rows), strict=True):
        own, other = (np.asarray(Image.open(path).convert("RGB"), float) for path in (row["images"], file))
        nearest = min(np.abs(np.asarray(Image.open(x["images"]).convert("RGB"), float) - other).mean() for x in rows)
        assert nearest < 20 < np.abs(own - other).mean()  # some question's picture, a little noised, and not its own


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domains": ()}, "give at least one, each with a name of its own"),
        ({"k": 0}, "k=0 must be at least 1"),
        ({"threshold": 0.0}, "threshold=0.0 must be positive"),
        ({"noise_step": 1000}, "noise_step=1000 must be between 0 and 999"),
    ],
)
def test_bad_settings(config, changes, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(config, **changes)


def test_bad_rows_and_another_config(run, config, tmp_path):
    with pytest.raises(ValueError, match=r"k: 3 there, 2 now"):
        run_rag(dataclasses.replace(config, k=2))
    for row, said in (
        ({"images": "a.png", "question": "x", "answer": "y"}, "line 1: field 'domain' must be text"),
        ({"images": "a.png", "question": "x", "answer": "y", "domain": "up"}, "domain 'up' is none of dark, bright"),
        ({"images": "a.png", "question": "x", "answer": "y", "domain": "dark", "options": ["n"]}, "none of its options"),
    ):  # fmt: skip
        write_jsonl(tmp_path / "rows.jsonl", [row])
        with pytest.raises(ValueError, match=said):
            run_rag(dataclasses.replace(config, workdir=str(tmp_path / "new"), questions=str(tmp_path / "rows.jsonl")))
    for changes, said in (
        ({"text_encoder": config.model}, "holds a VLM; give a sentence encoder"),
        ({"model": config.text_encoder}, "reads text alone; MMed-RAG asks about pictures"),
        ({"max_new_tokens": 600}, "sequence_length=512 has no room for prompts before max_new_tokens=600"),
    ):
        with pytest.raises(ValueError, match=said):
            run_rag(dataclasses.replace(config, workdir=str(tmp_path / "new"), **changes))
    assert not (tmp_path / "new").exists()
