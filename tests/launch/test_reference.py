"""The kept log-probabilities of a reference: those of the model itself, found again by what a pair is, and never another's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest

from jaxmethods import data, models, sharding
from jaxmethods.data import Data
from jaxmethods.launch import reference
from jaxmethods.models import functional
from jaxmethods.objectives import Preference
from tests import tiny
from tests.data.test_pictures import BLUE, RED, flat, write
from tests.launch.conftest import chatml_tokenizer, numbers
from tests.launch.test_preference import room, run  # noqa: F401  # fixtures

ROWS = [{"prompt": f"cats on mat {i}?", "chosen": f"{i} cats", "rejected": "dogs"} for i in range(7)]
VIEWS = Preference().views()


@pytest.fixture(scope="module")
def model():
    tokenizer = chatml_tokenizer("<|picture|>")
    told = dict(num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, eos_ids=(2,))
    return *tiny.vlm(image_token_id=tokenizer.convert_tokens_to_ids("<|picture|>"), **told), tokenizer


def laid_out(model, rows, **settings):
    return data.build(
        Data(sequence_length=48, pack=False, **settings), model[2], rows=rows, views=VIEWS, sight=model[0].sight
    )[0]


def kept(model, path, *of_rows, params=None, mesh=None, other=None, **options):
    module, own, tokenizer = model
    said = []
    told = dict(module=module, params=own if params is None else params, batch_size=4) | options
    made_by = reference.fingerprint(told["module"], told["params"], tokenizer if other is None else other)
    told |= dict(made_by=made_by, known=reference.read(str(path), made_by))
    mesh = mesh or sharding.make_mesh({"data": 1}, jax.devices()[:1])
    found = reference.kept(str(path), of_rows, say=said.append, mesh=mesh, **told)
    return found, said[0]


def test_numbers_are_the_models_and_stay_with_their_pairs(model, tmp_path):
    module, params, _ = model
    rows = laid_out(model, ROWS)
    (found, nothing), said = kept(model, tmp_path / "new" / "file.parquet", rows, None)
    assert nothing is None and "7 pairs, 7 of them scored now" in said and "file.parquet" in said
    for i in range(7):
        for side in ("chosen", "rejected"):
            row = {name: rows[i][f"{side}/{name}"][None] for name in ("tokens", "target_mask", "segment_ids")}
            by_hand = functional.sequence_logps(
                module, params, row["tokens"], row["target_mask"], row["segment_ids"] > 0
            )
            assert found[i][f"reference_{side}"] == pytest.approx(float(by_hand[0]), rel=1e-5)
            assert found[i][f"reference_{side}"].dtype == np.float32
    *_, last = data.evaluation_batches(found, 4)
    assert last["reference_chosen"].shape == (4,) and last["reference_chosen"][3] == 0


def test_pairs_are_found_again_in_any_company(model, tmp_path):
    """In another order, in a mixture, beside new ones: only what is new is scored."""
    path = tmp_path / "file.parquet"
    (first,), _ = kept(model, path, laid_out(model, ROWS))
    (again,), said = kept(model, path, laid_out(model, ROWS[::-1]))
    assert "7 pairs, 0 of them scored now" in said
    assert [again[6 - i]["reference_chosen"] for i in range(7)] == [first[i]["reference_chosen"] for i in range(7)]
    other = [row | {"prompt": "and now?"} for row in ROWS[:3]]
    for name, some in (("a", ROWS), ("b", other)):
        write(tmp_path / f"{name}.jsonl", some)
    sources = (str(tmp_path / "a.jsonl"), data.Source(str(tmp_path / "b.jsonl"), weight=2.0))
    mixed, _ = data.build(
        Data(train=sources, sequence_length=48, pack=False), model[2], views=VIEWS, sight=model[0].sight
    )
    (found,), said = kept(model, path, mixed)
    assert "10 pairs, 3 of them scored now" in said and len(found) == len(mixed)
    seen = {
        batch["reference_chosen"][0]
        for batch, _ in zip(data.batches(found, batch_size=1, seed=0), range(40), strict=False)
    }
    assert len(seen) == 10


def test_another_picture_makes_another_pair(model, tmp_path):
    pair = {"prompt": "<image>\nwhat?", "chosen": "a cat", "rejected": "a dog"}
    of = lambda colour: laid_out(model, [pair | {"images": flat(colour)}])
    path = tmp_path / "file.parquet"
    (red,), _ = kept(model, path, of(RED))
    (blue,), said = kept(model, path, of(BLUE))
    assert "1 pairs, 1 of them scored now" in said and red[0]["reference_chosen"] != blue[0]["reference_chosen"]


def test_what_was_scored_before_an_interruption_stays(model, tmp_path, monkeypatch):
    path, rows = tmp_path / "file.parquet", laid_out(model, ROWS)
    scored = reference._require_finite
    calls = []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 6:
            raise KeyboardInterrupt
        scored(*given)

    monkeypatch.setattr(reference, "_require_finite", interrupted)
    with pytest.raises(KeyboardInterrupt):
        kept(model, path, rows)
    monkeypatch.undo()
    assert len(reference.read(str(path))) == 5 and [x.name for x in tmp_path.iterdir()] == ["file.parquet"]
    (found,), said = kept(model, path, rows)
    assert "7 pairs, 2 of them scored now" in said and len({found[i]["reference_chosen"] for i in range(7)}) == 7


def test_another_makers_numbers_are_refused_by_name(model, tmp_path):
    module, params, tokenizer = model
    path, rows = tmp_path / "file.parquet", laid_out(model, ROWS[:2])
    kept(model, path, rows)
    held = path.read_bytes()
    one_weight = jax.tree.map(lambda x: x, params)
    one_weight["model"]["norm"]["scale"] = one_weight["model"]["norm"]["scale"].at[3].add(1e-6)
    other = chatml_tokenizer("<|picture|>")
    other.chat_template += " "
    for options, what in (
        (dict(params=one_weight), "another model;"),
        (dict(module=module.clone(dtype=jnp.bfloat16)), "another precision;"),
        (dict(other=other), "another template;"),
        (dict(other=chatml_tokenizer("<|picture|>", "<|more|>")), "another tokenizer;"),
        (dict(other=other, params=one_weight), "another model and another template;"),
    ):
        with pytest.raises(ValueError, match=f"file.parquet was made with {what} give objective.cache another file"):
            kept(model, path, rows, **options)
    assert path.read_bytes() == held
    for content in (b"PAR1 and then nothing", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="holds no reference log-probabilities"):
            kept(model, path, rows)
    pyarrow.parquet.write_table(pyarrow.table({"key": [1]}), path)
    with pytest.raises(ValueError, match="holds no reference log-probabilities"):
        kept(model, path, rows)


def test_a_reference_that_is_broken_is_told(model, tmp_path):
    params = jax.tree.map(lambda x: x, model[1])
    params["model"]["norm"]["scale"] *= jnp.nan
    with pytest.raises(ValueError, match="log-probabilities nan and nan; the model's weights or compute_dtype"):
        kept(model, tmp_path / "file.parquet", laid_out(model, ROWS[:2]), params=params)
    assert not (tmp_path / "file.parquet").exists()


def test_eight_devices_know_the_file_of_one(model, tmp_path):
    module, params, tokenizer = model
    path, rows = tmp_path / "file.parquet", laid_out(model, ROWS)
    (alone,), _ = kept(model, path, rows)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings_for(params, mesh, models.RULES))
    assert reference.fingerprint(module, placed, tokenizer) == reference.fingerprint(module, params, tokenizer)
    options = dict(module=module.clone(mesh=mesh), params=placed, mesh=mesh)
    (found,), said = kept(model, path, rows, **options)
    assert "0 of them scored now" in said
    (found,), said = kept(model, tmp_path / "other.parquet", rows, **options)
    for i in range(7):
        assert found[i]["reference_rejected"] == pytest.approx(alone[i]["reference_rejected"], rel=1e-5)


def test_a_run_with_the_file_is_the_run_without(room, run, here, one_device, tmp_path):  # noqa: F811
    """The same losses; a second run scores nothing; and a model that was changed is refused before the folder is made."""
    train = lambda name, *more: here(
        "train", room / "recipe.py", "--workdir", tmp_path / name, "--objective.cache", tmp_path / "kept.parquet", *more
    )
    done = train("one")
    assert done.returncode == 0 and "26 pairs, 26 of them scored now" in done.stdout, done
    assert "26 pairs, 0 of them scored now" in train("two").stdout
    plain, one, two = numbers(run), numbers(tmp_path / "one"), numbers(tmp_path / "two")
    assert one == two
    for row, other in zip(plain, one, strict=True):
        assert other == pytest.approx(row, rel=1e-4, abs=1e-5)
    model = json.loads((run / "config.json").read_text())["model"]
    module, params = models.load(model)
    models.save(
        tmp_path / "changed", module, jax.tree.map(lambda x: 1.01 * x, params), tokenizer=models.load_tokenizer(model)
    )
    done = train("three", "--model", tmp_path / "changed")
    assert done.returncode == 2 and "kept.parquet was made with another model" in done.stderr
    assert not (tmp_path / "three").exists()
