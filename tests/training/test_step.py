import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods import adapters, models, objectives, sharding, training, tree
from jaxmethods.data import Data
from jaxmethods.launch import Mesh, Run
from jaxmethods.launch.assembly import assemble
from jaxmethods.tree import Mean
from tests import tiny


def pieces(family="llama", adapter=None):
    module, params = tiny.decoder(family)
    if adapter is not None:
        module = adapters.attach(module, {"mlp": adapter})
        params = adapters.init(module, params, jax.random.key(2))
    return module, params, objectives.Supervised().loss_fn(module)


def by_hand(module, params, batch):
    """Mean of -log softmax at the targets, segment by segment, each run through the model alone."""
    total, count = 0.0, 0
    for tokens, targets, segments in zip(batch["tokens"], batch["target_mask"], batch["segment_ids"], strict=True):
        for segment in range(1, segments.max() + 1):
            at = segments == segment
            row = np.zeros((1, 16), np.int32)
            row[0, : at.sum()] = tokens[at]
            logits = np.asarray(models.logits(module, params, row, np.arange(16)[None] < at.sum()), np.float64)[0]
            logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for t in np.flatnonzero(targets[at]):
                total, count = total - logps[t - 1, tokens[at][t]], count + 1
    return total / count, count


def test_the_loss_of_packed_rows_is_that_of_each_example_alone():
    module, params, loss_fn = pieces()
    batch = tiny.batch()
    loss, metrics = jax.jit(loss_fn)(params, batch, jax.random.key(0))
    expected, count = by_hand(module, params, batch)
    np.testing.assert_allclose(loss.value(), expected, rtol=1e-5)
    assert float(loss.weight) == count == batch["target_mask"].sum()
    assert float(metrics["auxiliary_loss"].value()) == 0.0


@pytest.mark.parametrize("accumulate", [2, 8])
@pytest.mark.parametrize("adapter", [None, adapters.LoRA(rank=2)], ids=["full", "lora"])
def test_accumulation_has_the_gradient_of_the_whole_batch(accumulate, adapter):
    _, params, loss_fn = pieces(adapter=adapter)
    trained, frozen = adapters.partition(params, None if adapter else lambda path: True)
    tx = optax.sgd(1.0)
    batch = tiny.batch(rows=8)
    run = lambda parts: jax.jit(training.make_train_step(loss_fn, tx, accumulate=parts))(
        training.init_state(trained, tx, jax.random.key(0)), frozen, batch
    )
    (whole, one), (summed, several) = run(1), run(accumulate)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), summed.trained, whole.trained)
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(several[name], one[name], rtol=1e-5)


def test_accumulated_means_weigh_parts_by_their_tokens():
    """Parts with 1 and 3 targets: the mean over 4, not the mean of two means."""
    loss_fn = lambda params, batch, key: (Mean.of(params["w"] * batch["x"], batch["x"] > 0), {})
    batch = {"x": np.array([[1.0, 0, 0], [2.0, 3.0, 4.0]], np.float32)}
    tx = optax.sgd(1.0)
    state = training.init_state({"w": jnp.float32(1)}, tx, jax.random.key(0))
    new, metrics = jax.jit(training.make_train_step(loss_fn, tx, accumulate=2))(state, {}, batch)
    assert float(metrics["loss"]) == 2.5
    assert float(new.trained["w"]) == 1 - 2.5


MESHES = [
    {"data": 8}, {"fsdp": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"sequence": 8},
    {"fsdp": 2, "sequence": 2, "tensor": 2},
]  # fmt: skip
SMORE = adapters.SMoRE(experts=(2, 3), fanout=(1, 2), ranks=(1, 2), router_dim=8, gate_dim=4)


@functools.cache
def losses(adapter, *axes):
    """[(loss, gradient norm)] of three steps on a mesh (on one device without `axes`); checks the state's shardings."""
    run = Run(
        model="tiny", data=Data(train="none.jsonl", sequence_length=16), workdir="none", steps=10, batch_size=8,
        adapters={} if adapter is None else {"up_proj": adapter}, mesh=Mesh(**{"fsdp": 1} | dict(axes)),
        optimizer=training.Optimizer(learning_rate=1e-2, weight_decay=0.1),
    )  # fmt: skip
    mesh = sharding.make_mesh(dict(axes) or {"data": 1}, jax.devices() if axes else jax.devices()[:1])
    module, base = tiny.decoder()
    made = assemble(run, module, jax.eval_shape(lambda: base), mesh)
    placed = jax.device_put(base, jax.tree.map(lambda x: x.sharding, made.base))
    flat = tree.flatten(placed) | tree.flatten(made.initial_adapters(placed, jax.random.key(1), {}))
    wanted = tree.flatten(made.state.trained)
    trained, frozen = tree.partition(tree.unflatten(flat), lambda path: path in wanted)
    state, found = made.initial_state(trained, jax.random.key(0)), []
    for seed in range(3):
        state, metrics = made.step(
            state, frozen, jax.device_put(tiny.batch(8, seed=seed), sharding.batch_sharding(mesh))
        )
        found.append([float(metrics[name]) for name in ("loss", "gradient_norm")])
    jax.tree.map(_same_sharding, state, made.state)
    return found


@pytest.mark.parametrize(
    ("adapter", "axes"),
    [*((None, axes) for axes in MESHES), (adapters.LoRA(rank=8), MESHES[3]), (SMORE, MESHES[3]), (SMORE, MESHES[5])],
    ids=lambda value: getattr(value, "kind", str(value)),
)  # fmt: skip
def test_every_mesh_gives_what_one_device_gives_and_keeps_its_shardings(adapter, axes):
    np.testing.assert_allclose(losses(adapter, *axes.items()), losses(adapter), rtol=1e-5)


def _same_sharding(x, like):
    assert x.sharding.is_equivalent_to(like.sharding, x.ndim), (x.sharding, like.sharding)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was():
    loss_fn = lambda params, batch, key: (Mean(params["w"] * batch["x"].sum(), jnp.float32(1)), {})
    tx = optax.adam(0.1)
    step = jax.jit(training.make_train_step(loss_fn, tx))
    state = training.init_state({"w": jnp.float32(1)}, tx, jax.random.key(0))
    state, metrics = step(state, {}, {"x": np.float32([[1.0]])})
    assert bool(metrics["finite"])
    for bad in (np.inf, np.nan):
        new, metrics = step(state, {}, {"x": np.float32([[bad]])})
        assert not bool(metrics["finite"]) and int(new.step) == int(state.step) + 1
        jax.tree.map(np.testing.assert_array_equal, (new.trained, new.opt), (state.trained, state.opt))


def test_keys_follow_the_step_and_not_the_history():
    """Two runs that reach a step by other ways draw the same numbers there."""
    seen = lambda params, batch, key: (Mean(params["w"] * jax.random.uniform(key), jnp.float32(1)), {})
    tx = optax.sgd(0.0)
    step = jax.jit(training.make_train_step(seen, tx))
    state = training.init_state({"w": jnp.float32(1)}, tx, jax.random.key(7))
    batch = {"x": np.zeros((1, 1), np.float32)}
    losses = []
    for _ in range(3):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    resumed = training.State(jnp.int32(2), *training.init_state({"w": jnp.float32(1)}, tx, jax.random.key(7))[1:])
    assert float(step(resumed, {}, batch)[1]["loss"]) == losses[2]
    assert len(set(losses)) == 3


def test_an_uneven_accumulation_is_refused():
    tx = optax.sgd(1.0)
    state = training.init_state({"w": jnp.float32(1)}, tx, jax.random.key(0))
    step = training.make_train_step(lambda p, b, k: (Mean.of(b["x"] * p["w"]), {}), tx, accumulate=3)
    with pytest.raises(ValueError, match="accumulate=3 must divide the batch's 4 rows"):
        step(state, {}, {"x": np.zeros((4, 1), np.float32)})
