"""CAFe's step by hand, and what its two losses teach."""

from __future__ import annotations

import functools

import jax
import numpy as np
import optax
import pytest

from jaxmethods import models, training, tree
from jaxmethods.evals import retrieval
from jaxmethods.objectives import CAFe
from tests import tiny
from tests.objectives.readings import (
    IMAGE,
    ROWS,
    THREE,
    contrast_by_hand,
    log_softmax,
    readings,
    unit,
    with_pictures,
)


def test_a_step_with_pictures_by_hand():
    """log-softmax of `models.logits` and embeddings from hidden states, in numpy."""
    objective = CAFe(alpha_lm=0.7, alpha_con=1.3, temperature=0.2)
    batch = with_pictures(readings(*THREE), "generation", "query")
    module, params = tiny.vlm(num_layers=2)
    tx = training.Optimizer(name="sgd", b1=0.0, learning_rate=0.05, schedule="constant", warmup=0).transformation(2)
    step = jax.jit(training.make_train_step(objective.loss_fn(module), tx))
    state, metrics = step(training.init_state(params, tx, jax.random.key(0)), {}, batch)
    told, after = ({name: float(x) for name, x in m.items()} for m in (metrics, step(state, {}, batch)[1]))
    view = lambda name: {key.partition("/")[2]: x for key, x in batch.items() if key.startswith(f"{name}/")}
    given = lambda name: models.Images(view(name)["pixels"], view(name)["places"])
    generation = view("generation")
    logits = models.logits(
        module, params, generation["tokens"], generation["segment_ids"] > 0, images=given("generation")
    )
    logps = log_softmax(np.asarray(logits, np.float64).reshape(-1, 61)).reshape(logits.shape)
    rows, columns = np.nonzero(generation["target_mask"])
    language = -logps[rows, columns - 1, generation["tokens"][rows, columns]].mean()
    embedded = {}
    for name in ("query", "target"):
        tokens, mask = view(name)["tokens"], view(name)["segment_ids"] > 0
        images = {"images": given(name)} if name == "query" else {}
        states = jax.jit(functools.partial(models.hidden_states, module))(params, tokens, mask, **images)[0]
        embedded[name] = unit(np.asarray(states, np.float64)[np.arange(ROWS), mask.sum(1) - 1])
    contrastive = contrast_by_hand(objective, embedded)
    np.testing.assert_allclose(told["language_loss"], language, rtol=1e-5)
    np.testing.assert_allclose(told["contrastive_loss"], contrastive, rtol=1e-5)
    np.testing.assert_allclose(told["loss"], 0.7 * language + 1.3 * contrastive, rtol=1e-5)
    assert told["auxiliary_loss"] == 0 and after["loss"] < told["loss"]


# What each loss teaches


COLOURS = [(r, g, b) for r in (0, 128, 255) for g in (0, 128, 255) for b in (0, 255)][2:]
ASK, OF_IMAGE, OF_TEXT, END = 50, 51, 52, 53


def squares() -> dict:
    """64 pictures of a square in one of sixteen colours at one of four places, and captions of two words."""
    pixels = np.full((64, 1, 8, 8, 3), 64, np.uint8)
    captions = np.array([(3 + i // 4, 30 + i % 4) for i in range(64)])
    for i, colour in enumerate(np.repeat(COLOURS, 4, axis=0)):
        top, left = 4 * (i % 4 // 2), 4 * (i % 2)
        pixels[i, 0, top : top + 4, left : left + 4] = colour
    rows = lambda *columns: np.concatenate(
        [np.broadcast_to(np.asarray(c, np.int32).reshape(-1, np.shape(c)[-1]), (64, np.shape(c)[-1])) for c in columns],
        1,
    )
    tokens = {
        "generation": rows([1, *[IMAGE] * 4, ASK], captions, [END]), "query": rows([1, *[IMAGE] * 4, OF_IMAGE, END]),
        "target": rows([1], captions, [OF_TEXT, END]),
    }  # fmt: skip
    batch = {}
    for name, x in tokens.items():
        batch |= {f"{name}/tokens": x, f"{name}/segment_ids": np.ones_like(x)}
        batch[f"{name}/positions"] = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape)
        batch[f"{name}/target_mask"] = np.broadcast_to(np.arange(x.shape[1]) > 5, x.shape)
        if name != "target":
            batch[f"{name}/pixels"] = pixels
            batch[f"{name}/places"] = np.where(x == IMAGE, np.arange(x.shape[1]) - 1, -1)[..., None].astype(np.int32)
    return batch


@pytest.mark.slow
@pytest.mark.ci
def test_each_loss_teaches_its_own_and_both_teach_both():
    """Contrastive training finds pictures and forgets to talk; language training the reverse; together they do both, and the
    clouds of pictures and captions come together."""
    module, start = tiny.vlm(num_layers=2)
    rows, ids = squares(), np.arange(64)
    look = CAFe()
    measure = jax.jit(
        lambda params, batch: (
            look.embed(module, params, tree.unflatten(batch)["query"], "query"),
            look.embed(module, params, tree.unflatten(batch)["target"], "target"),
            CAFe(alpha_con=0)
            .loss_fn(module)(params, {k: x for k, x in batch.items() if "generation" in k}, None)[0]
            .value(),
        )
    )

    def measured(params):
        query, target, language = measure(params, rows)
        found = retrieval.retrieval(query, target, ids, ids, ks=(1,))
        return found.image_to_text.recall[1], float(language), found.modality_gap

    def learned(objective):
        tx = optax.adam(3e-3)
        step = jax.jit(training.make_train_step(objective.loss_fn(module), tx))
        state = training.init_state(start, tx, jax.random.key(0))
        batch = {name: x for name, x in rows.items() if name.startswith(tuple(objective.views()))}
        for _ in range(100):
            state, _ = step(state, {}, batch)
        return measured(state.trained)

    before = measured(start)
    language, contrastive, both = (learned(CAFe(**arm)) for arm in ({"alpha_con": 0}, {"alpha_lm": 0}, {}))
    told = f"recall@1, nats a token, gap: before {before}, language {language}, contrastive {contrastive}, both {both}"
    recall, nats, gap = zip(before, language, contrastive, both, strict=True)
    assert recall[0] < 0.1 and recall[1] < 0.1 and recall[2] > 0.9 and recall[3] > 0.9, told
    assert nats[1] < 0.4 and nats[3] < 0.7 and nats[2] > 3, told
    assert gap[3] < 0.3 * gap[0], told
