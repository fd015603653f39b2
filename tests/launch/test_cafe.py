"""CAFe from a recipe to embeddings: a tiny model that sees, a dozen painted pictures, the commands as a user calls them."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image, ImageDraw

from jaxmethods import data, models, sharding
from jaxmethods.data import Data, Source
from jaxmethods.evals.embedding import embed_rows
from jaxmethods.launch import cli, evaluate, sheets
from jaxmethods.launch import config as run_config
from jaxmethods.launch.assembly import assemble, model_shapes
from jaxmethods.launch.opening import open_model
from jaxmethods.objectives import CAFe
from tests import tiny
from tests.launch.conftest import chatml_tokenizer, first_device, numbers, write_shop

RECIPE = """
from jaxmethods.adapters import LoRA
from jaxmethods.data import Data, Source
from jaxmethods.launch import Run
from jaxmethods.objectives import CAFe
from jaxmethods.training import Optimizer


def config() -> Run:
    named = dict(answer="caption", images="picture")
    return Run(
        model={model!r},
        data=Data(
            train=Source({train!r}, **named), evaluation=Source({evaluation!r}, **named), sequence_length=128, pack=False
        ),
        workdir={workdir!r},
        adapters={{"self_attn/q_proj": LoRA(rank=2, dropout=0.1)}},
        objective=CAFe(temperature=0.1, heads=True, learn_temperature=True),
        optimizer=Optimizer(learning_rate=1e-2, warmup=0),
        steps=4,
        batch_size=8,
        checkpoint_every=2,
        remat="none",
        compilation_cache={cache!r},
    )
"""

COLOURS = ("red", "green", "blue", "white", "yellow", "purple")
PLACES = {"left": (0, 4), "right": (8, 4)}


def paint(path, colour, place):
    picture = Image.new("RGB", (16, 16), "grey")
    left, top = PLACES[place]
    ImageDraw.Draw(picture).rectangle((left, top, left + 7, top + 7), fill=colour)
    picture.save(path)


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """model/, pictures/, train.jsonl, heldout.jsonl (twelve and nine rows, two of these of one picture), recipe.py in a folder."""
    folder = tmp_path_factory.mktemp("room")
    tokenizer = chatml_tokenizer("<image>")
    token_id = tokenizer.convert_tokens_to_ids("<image>")
    module, params = tiny.vlm(
        num_layers=2, image_token_id=token_id, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,)
    )
    models.save(folder / "model", module, params, tokenizer=tokenizer)
    (folder / "pictures").mkdir()
    rows = []
    for i, (colour, place) in enumerate((colour, place) for colour in COLOURS for place in PLACES):
        paint(folder / f"pictures/{i}.png", colour, place)
        asked = "<image>\nwhat is there?"
        rows.append(
            {"prompt": asked, "caption": f"a {colour} square, {place}", "picture": f"pictures/{i}.png", "number": i}
        )
    heldout = [*rows[:8], rows[0] | {"caption": "something red"}]
    write_shop(folder, RECIPE, train=rows, heldout=heldout)
    return folder


@pytest.fixture(scope="module")
def run(room):
    """The recipe, trained with both losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", first_device)
        cli.main(["train", str(room / "recipe.py")])
    jax.config.update("jax_compilation_cache_dir", None)
    return room / "run"


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_both_losses_are_trained_and_recorded(run, room):
    found = rows_of(run)
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    for row in found:
        assert row["loss"] == pytest.approx(row["language_loss"] + row["contrastive_loss"], rel=1e-5)
    last = found[-1]
    assert 0 <= last["evaluation_recall"] <= 1 and last["evaluation_contrastive_loss"] > 0
    assert last["evaluation_loss"] > last["evaluation_language_loss"] > 0
    assert run_config.read_json(run / "config.json") == run_config.load_config(str(room / "recipe.py"))


@pytest.mark.parametrize(
    "objective",
    [
        CAFe(),
        CAFe(alpha_con=0.25, gather="official", chunk=4, embedding_length=64),
        CAFe(alpha_lm=0, contrast="one_way", negatives=True, pooling="token", token_id=7, pairs=True, heads=True),
    ],
    ids=["default", "official", "pairs"],
)
def test_objectives_round_trip_through_json(objective):
    run = run_config.Run(model="m", data=Data(train=Source("a", images="picture")), workdir="w", objective=objective)
    assert run_config.from_json(json.loads(json.dumps(run_config.to_json(run)))) == run


def test_resumed_it_is_the_same_run_to_the_bit(run, room, here, one_device, tmp_path):
    workdir = tmp_path / "resumed"
    shutil.copytree(run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    done = here("train", room / "recipe.py", "--workdir", workdir)
    assert done.returncode == 0 and "resumes after step 2" in done.stdout, done
    assert numbers(workdir) == numbers(run)


@pytest.mark.slow
def test_the_contrastive_arm_alone(run, room, here, one_device, tmp_path):
    arm = ("--objective.alpha-lm", "0", "--steps", "2")
    done = here("train", room / "recipe.py", "--workdir", tmp_path / "arm", *arm)
    assert done.returncode == 0, done
    row = rows_of(tmp_path / "arm")[0]
    assert "language_loss" not in row and row["loss"] == pytest.approx(row["contrastive_loss"])
    # The same rows, weights and adapters; dropout draws other numbers, as views are counted.
    assert row["contrastive_loss"] == pytest.approx(rows_of(run)[0]["contrastive_loss"], rel=0.05)


def test_batches_that_cannot_be_are_refused_before_anything_is_written(room, refused, tmp_path):
    train = lambda *options: refused("train", room / "recipe.py", "--workdir", tmp_path / "none", *options)
    assert "accumulate=2 would cut the batch" in train("--batch-size", "16", "--accumulate", "2")
    assert "batch_size=1 leaves a row alone" in train("--batch-size", "1")
    assert "evaluation_batch_size=1 leaves a row alone" in train("--evaluation-batch-size", "1")
    assert "cannot share one; set Data(pack=False)" in train("--data.pack", "True")
    assert not (tmp_path / "none").exists()
    # The language arm has no pairs: its batches can be cut, and be of one row.
    recipe = run_config.load_config(str(room / "recipe.py"))
    arm = dataclasses.replace(recipe, objective=CAFe(alpha_con=0), accumulate=2)
    mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
    assert assemble(arm, *model_shapes(arm), mesh).views.keys() == {"generation"}
    assert CAFe(alpha_con=0).least_rows == 1


def test_bad_rows_are_named(room, refused, tmp_path):
    def train(changes, *options):
        rows = [json.loads(line) for line in (room / "train.jsonl").read_text().splitlines()]
        rows = [row | {"picture": str(room / row["picture"])} for row in rows]
        rows[2] |= changes
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        named = tmp_path / "recipe.py"
        named.write_text(
            (room / "recipe.py").read_text().replace(str(room / "train.jsonl"), str(tmp_path / "rows.jsonl"))
        )
        return refused("train", named, "--workdir", tmp_path / "none", *options)

    assert "line 3: this row's caption is empty" in train({"caption": "  "}, "--objective.alpha-lm", "0")
    assert "line 3" in (line := train({"caption": "  "})) and "is empty" in line, line
    assert "line 3" in (line := train({"picture": str(room / "pictures/7.pngg")})) and "near it: 7.png" in line, line
    assert "line 3: this row has no picture to embed" in train({"picture": [], "prompt": "what is there?"})
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_plan_tells_what_the_run_is(room, here):
    """For the eight devices at hand, by which its step is compiled: three views of eight rows of 128 tokens."""
    done = here("plan", room / "recipe.py", "--json")
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told["devices"]["count"] == 8 and told["tokens_per_step"] == 3 * 8 * 128
    assert told["bytes_per_device"]["total"] > 0 and told["flops_per_step"] > 0
    adapters, heads = 2 * 2 * (32 + 32) + 2 * 2 * (16 + 16), 2 * (32 * 32 + 32)  # of the decoder and of the tower
    assert told["trained"]["parameters"] == adapters + heads + 1


@pytest.fixture(scope="module")
def embedded(run, room):
    """The held-out rows by `embed_rows`, with what `train` wrote."""
    opened = open_model(str(run))
    found = embed_rows(
        opened.module, opened.params, opened.tokenizer, opened.run.data.evaluation[0], objective=opened.run.objective,
        sequence_length=128, batch_size=9,
    )  # fmt: skip
    return opened, found


def test_embed_writes_what_embed_rows_gives(run, room, here, refused, embedded, tmp_path):
    target = tmp_path / "embeddings.parquet"
    done = here("embed", run, "--data", room / "heldout.jsonl", "--to", target, "--batch-size", "9")
    assert done.returncode == 0 and "9 rows, query and target of 32 numbers" in done.stdout, done
    table = pyarrow.parquet.read_table(target)
    assert table.column_names == ["row", "prompt", "caption", "picture", "number", "query", "target"]
    assert table["number"].to_pylist() == [*range(8), 0] and table["row"].to_pylist() == list(range(9))
    for name in ("query", "target"):
        found = np.array(table[name].to_pylist(), np.float32)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(found, embedded[1][name])
    np.testing.assert_array_equal(embedded[1]["query"][0], embedded[1]["query"][8])  # the same picture
    embed = lambda *options: refused("embed", run, "--data", room / "heldout.jsonl", *options)
    assert "exists already; choose another --to" in embed("--to", target)
    assert "there is no folder" in embed("--to", tmp_path / "none" / "a.parquet")
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"caption": "a", "n": 1}\n{"caption": "b", "n": "one"}\n')
    line = refused("embed", run, "--data", mixed, "--to", tmp_path / "mixed.parquet", "--view", "target")
    assert "field 'n' has values of no one kind" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["embeddings.parquet", "mixed.jsonl"]


def recalls(query, target, of_query, of_target):
    """Recall at 1 and 5 by sorting."""
    found = []
    for x, own in zip(query, of_query, strict=True):
        scores = target @ x
        best = scores[of_target == own].max()
        found.append((scores[of_target != own] >= best).sum())
    return {str(k): np.mean(np.array(found) < k) for k in (1, 5)}


def test_evaluate_retrieval_is_what_sorting_finds(run, room, here, embedded, tmp_path):
    """Nine rows of eight pictures, before and after; a sheet of them."""
    sheet = tmp_path / "sheet.png"
    options = ("--json", "--against-base", "--sheet", sheet, "--batch-size", "9")
    done = here("evaluate", "retrieval", run, *options)
    assert done.returncode == 0, done
    told = json.loads(done.stdout)
    assert told == json.loads((run / "retrieval.json").read_text())
    assert (told["rows"], told["images"], told["step"]) == (9, 8, 4)
    opened, found = embedded
    base = opened.base()
    before = embed_rows(
        base.module, base.params, base.tokenizer, opened.run.data.evaluation[0], objective=CAFe(), sequence_length=128,
        batch_size=9,
    )  # fmt: skip
    captions = np.array([*range(8), 0])
    for name, given in (("before", before), ("after", found)):
        query, target = given["query"][:8], given["target"]
        for way, expected in (
            ("image_to_text", recalls(query, target, np.arange(8), captions)),
            ("text_to_image", recalls(target, query, captions, np.arange(8))),
        ):
            assert {k: told[name][way]["recall"][k] for k in ("1", "5")} == pytest.approx(expected)
        gap = np.linalg.norm(query.mean(0) - target.mean(0))
        assert told[name]["modality_gap"] == pytest.approx(gap, rel=1e-4)
    assert told["before"]["modality_gap"] != told["after"]["modality_gap"]
    with Image.open(sheet) as picture:
        picture.load()
        assert picture.format == "PNG" and picture.width > 1000


def test_what_evaluate_refuses(run, room, refused, tmp_path):
    told = lambda *options: refused("evaluate", "retrieval", run, *options)
    assert "there is no folder" in told("--sheet", tmp_path / "none" / "sheet.png")
    assert "--blind is of evaluate completion" in told("--blind")
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"prompt": "a", "answer": "b"}\n')
    assert "line 1: this row has no picture to embed" in told("--data", texts)
    given, numbers = np.eye(2, dtype=np.float32), np.arange(2)
    with pytest.raises(ValueError, match="no row has a picture"):
        sheets.draw_retrieval(str(tmp_path / "a.png"), [{"images": []}, {}], given, ["a", "b"], given, numbers, numbers)


def test_pairs_are_the_same_where_words_and_pictures_are():
    """Not where only their pictures are: pairs of text have none."""
    rows = [
        {"prompt": asked, "answer": said, "images": images}
        for asked, said, images in (
            ("2 + 2", "four", None), ("3 + 3", "six", None), ("Half of eight?", "Four.", None), ("2 + 2", "4", None),
            ("<image>", "<image>", ["a.png", "b.png"]), ("<image>", "<image>", ["c.png", "d.png"]),
        )
    ]  # fmt: skip
    views = CAFe(pairs=True).embeddings()
    labels = [evaluate._labels(rows, data.Source("rows"), views[name]) for name in ("query", "target")]
    assert [len(set(of)) for of in labels] == [5, 5]
    ids = evaluate._joined(*labels)
    assert ids[0] == ids[2] == ids[3] and len(set(ids.tolist())) == 4


def test_the_model_is_exported_without_what_is_the_objectives(run, here, tmp_path):
    done = here("export", run, "--to", tmp_path / "out")
    assert done.returncode == 0, done
    module, params = models.load(tmp_path / "out")
    assert isinstance(module, models.VLM) and "objective" not in params
