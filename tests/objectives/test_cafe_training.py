"""CAFe's steps: what it trains through, on one device and eight, and what its two losses teach."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods import adapters, models, sharding, training, tree
from jaxmethods.evals import retrieval
from jaxmethods.objectives import CAFe
from tests import tiny
from tests.objectives.readings import (
    IMAGE,
    ROWS,
    THREE,
    close,
    contrast_by_hand,
    log_softmax,
    readings,
    unit,
    with_pictures,
)

ADAPTERS = {
    "self_attn/(q|v)_proj": adapters.LoRA(rank=2),
    "mlp/up_proj": adapters.SMoRE(experts=(3,), fanout=(2,), ranks=(2,), gate_dim=4, router_dim=5),
    "mlp/down_proj": adapters.S2FT(count=4),
    "projector/linear_2": adapters.LoRA(rank=2),
}


@pytest.fixture(scope="module")
def stepped():
    """(which, mesh) -> trained leaves before and after two steps on a batch with pictures, and the metrics of each step.

    "full" trains all of the VLM; "adapters" has LoRA, S'MoRE and S2FT on different layers of one.
    """
    objective = CAFe(alpha_lm=0.7, alpha_con=1.3, temperature=0.2)
    tx = training.Optimizer(name="sgd", b1=0.0, learning_rate=0.05, schedule="constant", warmup=0).transformation(2)
    batch = with_pictures(readings(*THREE), "generation", "query")

    @functools.cache
    def run(which, mesh=None):
        module, params = tiny.vlm(num_layers=2)
        if which == "adapters":
            module = adapters.attach(module, ADAPTERS)
            params = adapters.init(module, params, jax.random.key(2))
        trained, frozen = adapters.partition(params, None if which == "adapters" else lambda path: True)
        rng = np.random.default_rng(3)
        if which == "adapters":  # away from where they start, so that every part of them can move
            trained = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), trained)
        before, rows = jax.tree.map(np.asarray, trained), batch
        if mesh is not None:
            module = module.clone(mesh=mesh)
            place = lambda part: jax.device_put(
                part, sharding.shardings_for(part, mesh, (*adapters.RULES, *models.RULES))
            )
            trained, frozen, rows = place(trained), place(frozen), sharding.place_rows(batch, ROWS, mesh)
        step = jax.jit(training.make_train_step(objective.loss_fn(module), tx))
        state, told = training.init_state(trained, tx, jax.random.key(0)), []
        for _ in range(2):
            state, metrics = step(state, frozen, rows)
            told.append({name: float(x) for name, x in metrics.items()})
        return before, jax.tree.map(np.asarray, state.trained), told

    return run, objective, batch


def test_a_step_with_pictures_by_hand(stepped):
    """log-softmax of `models.logits` and embeddings from hidden states, in numpy."""
    run, objective, batch = stepped
    _, _, (told, after) = run("full")
    module, params = tiny.vlm(num_layers=2)
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


@pytest.mark.parametrize("which", ["full", pytest.param("adapters", marks=pytest.mark.slow)])
def test_two_steps_move_what_is_trained(stepped, which):
    before, after, told = stepped[0](which)
    paths = set(tree.flatten(after))
    assert all(adapters.is_adapter(path) for path in paths) == (which == "adapters")
    kinds = {path.split("/adapter/")[1].split("/")[0] for path in paths if "/adapter/" in path}
    assert kinds == ({"lora", "smore", "s2ft"} if which == "adapters" else set())
    for path, leaf in tree.flatten(after).items():
        moved = np.any(leaf != tree.flatten(before)[path]) or path.endswith("k_proj/bias")  # softmax does not see these
        assert np.isfinite(leaf).all() and moved, path
    assert all(metrics["finite"] for metrics in told)
    assert (told[0]["auxiliary_loss"] > 0) == (which == "adapters")


@pytest.mark.slow
@pytest.mark.parametrize(("which", "axes"), [("full", {"fsdp": 4, "tensor": 2}), ("adapters", {"data": 2, "fsdp": 4})])
def test_eight_devices_step_as_one_does(stepped, which, axes):
    run = stepped[0]
    _, alone, told = run(which)
    _, together, also = run(which, sharding.make_mesh(axes))
    close(together, alone)
    for one, other in zip(told, also, strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)


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
    assert recall[0] < 0.1 and recall[1] < 0.3 and recall[2] > 0.6 and recall[3] > 0.6, told
    assert nats[1] < 0.5 and nats[3] < 0.7 and nats[2] > 3, told
    assert gap[3] < 0.5 * gap[0], told
