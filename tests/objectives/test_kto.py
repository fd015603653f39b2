"""KTO: its mismatched answers token by token, its value by hand, its laws, and steps through adapters and meshes."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from jaxmethods import data, losses
from jaxmethods.objectives import KTO, kto
from tests.objectives.readings import ROWS, close, with_pictures
from tests.objectives.test_preference import moved, sums_by_hand, value


def labelled(rows=ROWS, sees=False):
    """Rows whose answer is their end, and a label of each."""
    batch = with_pictures(data_rows(rows), "answer") if sees else data_rows(rows)
    return batch | {"desirable": np.float32(np.arange(rows) % 3 > 0)}


def data_rows(rows):
    rng, length = np.random.default_rng(7), 12
    ends = rng.integers(8, length + 1, (rows, 1))
    begins = rng.integers(5, 8, (rows, 1))
    at = np.arange(length)[None, :]
    real = at < ends
    return {
        "answer/tokens": np.where(real, rng.integers(3, 60, (rows, length)), 0).astype(np.int32),
        "answer/segment_ids": real.astype(np.int32),
        "answer/positions": np.where(real, at, 0).astype(np.int32),
        "answer/target_mask": real & (at >= begins),
    }


def rows_of(batch):
    return {name.partition("/")[2]: x for name, x in batch.items() if "/" in name}


def by_lists(rows):
    """The mismatched rows, with Python's lists."""
    made = {name: np.zeros_like(rows[name]) for name in ("tokens", "target_mask", "segment_ids", "positions")}
    full = [i for i in range(len(rows["tokens"])) if rows["target_mask"][i].any()]
    for number, i in enumerate(full):
        other = full[number - 1]
        prompt = rows["tokens"][i][: rows["target_mask"][i].argmax()].tolist()
        answer = rows["tokens"][other][rows["target_mask"][other]].tolist()
        whole = (prompt + answer)[: rows["tokens"].shape[1]]
        made["tokens"][i, : len(whole)] = whole
        made["segment_ids"][i, : len(whole)] = 1
        made["positions"][i, : len(whole)] = range(len(whole))
        made["target_mask"][i, len(prompt) : len(whole)] = True
    return made


def test_mismatched_rows_by_lists():
    """Also where a row in between and at the end fill up the batch, and where an answer does not fit behind another prompt."""
    rows = rows_of(labelled())
    for name in rows:
        rows[name][[3, ROWS - 1]] = 0
    rows["tokens"][2], rows["segment_ids"][2], rows["target_mask"][2] = np.arange(3, 15), 1, np.arange(12) >= 1
    expected = by_lists(rows)
    assert expected["segment_ids"][4].all()  # row 2's eleven tokens are cut
    found = kto.mismatched(rows)
    for name, x in expected.items():
        np.testing.assert_array_equal(
            found[name][expected["segment_ids"].any(1)], x[expected["segment_ids"].any(1)], name
        )
    assert not np.asarray(found["target_mask"])[[3, ROWS - 1]].any()


def test_pictures_stay_with_their_prompt():
    rows = rows_of(labelled(sees=True))
    found = kto.mismatched(rows)
    np.testing.assert_array_equal(found["pixels"], rows["pixels"])
    np.testing.assert_array_equal(found["places"][:, :, 0] >= 0, found["tokens"] == 60)


def turned(params):
    """LoRA's product with the other sign: the mismatched answers are then likelier than by the reference, and `kl` is not 0."""
    return jax.tree_util.tree_map_with_path(lambda path, x: -x if "'b'" in str(path[-1]) else x, params)


@pytest.mark.parametrize(("point", "sign"), [("batch", 1), ("batch", -1), ("none", -1)])
def test_by_hand(point, sign):
    """Both models from whole logits, the mismatched rows from lists, and the equations of the paper."""
    base, base_params, module, params = moved()
    params = params if sign > 0 else turned(params)
    batch = labelled()
    objective = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5, reference_point=point)
    gain = sums_by_hand(module, params, batch, "answer") - sums_by_hand(base, base_params, batch, "answer")
    others = {f"answer/{name}": x for name, x in by_lists(rows_of(batch)).items()}
    apart = sums_by_hand(module, params, others, "answer") - sums_by_hand(base, base_params, others, "answer")
    assert (apart.mean() > 0.1) == (sign < 0)  # so that both sides of the clamp are seen
    kl = max(apart.mean(), 0.0) if point == "batch" else 0.0
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    good = batch["desirable"] > 0
    each = np.where(good, 1.5 * (1 - sigmoid(0.3 * (gain - kl))), 0.5 * (1 - sigmoid(0.3 * (kl - gain))))
    found, metrics = value(objective, module, params, batch)
    assert found == pytest.approx(each.mean(), rel=2e-5)
    told = {"kl": kl, "rewards/chosen": 0.3 * gain[good].mean(), "rewards/rejected": 0.3 * gain[~good].mean()}
    assert {name: metrics[name] for name in told} == pytest.approx(told, rel=2e-4, abs=1e-5)


def test_at_the_start_everything_is_worth_a_half():
    base, base_params, *_ = moved()
    found, metrics = value(KTO(), base, base_params, labelled())
    assert found == pytest.approx(0.5) and metrics["kl"] == metrics["rewards/chosen"] == 0


def test_filling_rows_weigh_nothing():
    _, _, module, params = moved()
    batch = labelled()
    loss_fn = jax.jit(KTO().loss_fn(module))
    whole, metrics = loss_fn(params, batch, None)
    filled, told = loss_fn(params, {n: np.concatenate([x, np.zeros_like(x[:2])]) for n, x in batch.items()}, None)
    close(filled, whole)
    close(told["kl"].value(), metrics["kl"].value())
    assert told["rewards/chosen"].weight + told["rewards/rejected"].weight == ROWS


def test_no_gradient_goes_through_the_reference_point():
    """Were the mismatched answers differentiated, their tokens would matter to the gradient beyond the number `kl`."""
    _, _, module, params = moved()
    batch = labelled()
    by = lambda objective: jax.jit(jax.grad(lambda p: objective.loss_fn(module)(p, batch, None)[0].value()))(params)
    params = turned(params)
    kl = value(KTO(), module, params, batch)[1]["kl"]
    assert kl > 0.1
    rows, start = rows_of(batch), kto.preference.start_of(module, params)
    reference = kto.preference.answer_logps(*start, rows, None)[0]

    def fixed(p):
        logps, _ = kto.preference.answer_logps(module, p, rows, None)
        return losses.kto_loss(logps, reference, batch["desirable"] > 0, kl=kl).mean()

    close(by(KTO()), jax.jit(jax.grad(fixed))(params), atol=1e-6)


def test_rows_of_data():
    """Labels are true or false; a pair is no row of KTO; conversations end with the answer that counts."""
    from tests.launch.conftest import chatml_tokenizer

    build = lambda row: data.build(
        data.Data(sequence_length=64, pack=False), chatml_tokenizer(), rows=[row], views=KTO().views()
    )
    told = {"prompt": "where is the cat?", "answer": "on the mat", "label": False}
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no"}] * 2
    for row, label in ((told, 0.0), (told | {"label": True}, 1.0), ({"messages": turns, "label": 1}, 1.0)):
        made = build(row)[0][0]
        assert made["desirable"] == label and made["answer/target_mask"].any()
    with pytest.raises(ValueError, match=r"row 1: field 'label' must be true or false, not 'yes'"):
        build(told | {"label": "yes"})
    with pytest.raises(ValueError, match="row 1: this row has two answers; KTO reads rows of one"):
        build({"prompt": "a", "chosen": "b", "rejected": "c", "label": True})


def test_bad_settings():
    for wrong, text in (
        ({"beta": 0.0}, "beta=0.0 must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight=-1.0 must not be negative"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing would be learnt"),
        ({"reference_point": "exact"}, "reference_point='exact'"),
    ):
        with pytest.raises(ValueError, match=text):
            KTO(**wrong)
    assert (KTO().least_rows, KTO(reference_point="none").least_rows) == (2, 1)
