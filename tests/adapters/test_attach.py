"""Laws that every adapter must obey; a new one joins ADAPTERS and inherits them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, models, objectives, sharding, training, tree
from tests import tiny

SMALL = {"gate_dim": 4, "router_dim": 5}
ADAPTERS = {
    "lora": adapters.LoRA(rank=3, alpha=5.0),
    "lora_dropout": adapters.LoRA(rank=4, alpha=4.0, rslora=True, dropout=0.5),
    "smore_dense": adapters.SMoRE(experts=(2, 3), ranks=(2, 1), gate="dense", gate_dim=4, router_dim=5),
    "smore_switch": adapters.SMoRE(
        experts=(3, 4), fanout=(2, 2), ranks=(1, 2), gate="switch", gate_dim=4, router_dim=5
    ),
    "smore_star": adapters.SMoRE(
        experts=(2, 2), fanout=(1, 2), ranks=(1, 2), gate="switch", variant="star", activation="prelu", **SMALL
    ),
    "hydralora": adapters.HydraLoRA(experts=2, rank=2, **SMALL),
    "smore_noisy": adapters.SMoRE(experts=(4,), fanout=(2,), ranks=(2,), gate="noisy_topk", gate_dim=4, router_dim=5),
    "dora": adapters.DoRA(rank=3, alpha=5.0),
    "s2ft_in": adapters.S2FT(fraction=0.3),
    "s2ft_out": adapters.S2FT(count=3, side="out", unit="head", head_dim=4, selection="weight", form="block"),
    "s2ft_global": adapters.S2FT(fraction=0.1, side="in", budget="global"),
}
each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)


def attached(adapter, pattern="mlp/up_proj", family="llama", moved=True):
    """A decoder with the adapter; `moved`: its leaves away from the start, so that it does something."""
    return tiny.adapted({pattern: adapter}, family, moved=0.2 if moved else 0.0)


def logits(module, params):
    rows = tiny.batch()
    return models.logits(module, params, rows["tokens"], rows["segment_ids"] > 0)


def assert_starts_alike(adapter, got, want):
    rounding = 1e-5 if adapter.kind == "dora" else 0  # a kernel column divided by its length and multiplied by it again
    np.testing.assert_allclose(got, want, atol=rounding, rtol=rounding)


@each
def test_a_fresh_adapter_changes_nothing(adapter):
    module, base, adapted, params = attached(adapter, moved=False)
    assert_starts_alike(adapter, logits(adapted, params), logits(module, base))


@each
def test_an_adapter_that_moved_changes_the_outputs_and_detach_takes_it_off(adapter):
    module, base, adapted, params = attached(adapter)
    assert float(jnp.abs(logits(adapted, params) - logits(module, base)).max()) > 1e-3
    same, without = adapters.detach(adapted, params)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, without, base)


@each
def test_the_leaves_stand_beside_the_kernels_stacked_over_layers(adapter):
    _, base, _, params = attached(adapter, moved=False)
    fresh = set(tree.flatten(params)) - set(tree.flatten(base))
    assert fresh and all(f"_proj/adapter/{adapter.kind}/" in path and "/mlp/" in path for path in fresh)
    assert all(tree.flatten(params)[path].shape[0] == 3 for path in fresh)


@each
def test_layers_draw_their_own_numbers_whatever_else_is_adapted(adapter):
    module, base = tiny.decoder()
    one = adapters.init(adapters.attach(module, {"up_proj": adapter}), base, jax.random.key(2))
    two = adapters.init(adapters.attach(module, {"(up|q)_proj": adapter}), base, jax.random.key(2))
    leaves = one["model"]["layers"]["mlp"]["up_proj"]["adapter"]
    jax.tree.map(np.testing.assert_array_equal, leaves, two["model"]["layers"]["mlp"]["up_proj"]["adapter"])
    first = next(x for p, x in tree.flatten(leaves).items() if x.std() > 0 and x.ndim > 1)
    assert float(jnp.abs(first[0] - first[1]).max()) > 0


@each
def test_a_step_moves_only_the_adapter_and_every_part_of_it_can_move(adapter):
    _, _, adapted, params = attached(adapter)
    trained, frozen = adapters.partition(params)
    tx = training.Optimizer(learning_rate=1e-2, warmup=0).transformation(10)
    step = training.make_train_step(objectives.Supervised().loss_fn(adapted), tx)
    state, metrics = jax.jit(step)(training.init_state(trained, tx, jax.random.key(0)), frozen, tiny.batch())
    assert bool(metrics["finite"])
    floats = {p for p, x in tree.flatten(params).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    assert set(tree.flatten(state.trained)) == {p for p in floats if adapters.is_adapter(p)}
    for path, leaf in tree.flatten(state.trained).items():
        moved = float(jnp.abs(leaf - tree.flatten(trained)[path]).max())
        assert moved > 0, path


@each
def test_padding_and_its_side_do_not_matter(adapter):
    _, _, adapted, params = attached(adapter)
    rows = np.random.default_rng(0).integers(3, 61, (3, 7)).astype(np.int32)
    plain = models.logits(adapted, params, rows, np.ones_like(rows, bool))
    for before, after in ((3, 1), (0, 4), (2, 2)):
        padded = np.pad(rows, ((0, 0), (before, after)), constant_values=1)
        mask = np.pad(np.ones_like(rows, bool), ((0, 0), (before, after)))
        got = models.logits(adapted, params, padded, mask)[:, before : before + 7]
        np.testing.assert_allclose(got, plain, atol=2e-5)


@each
def test_padding_takes_no_part_in_the_auxiliary_loss(adapter):
    if not adapter.has_loss:
        return
    _, _, adapted, params = attached(adapter)
    rows = np.random.default_rng(0).integers(3, 61, (3, 7)).astype(np.int32)
    auxiliary = jax.jit(lambda rows, mask: models.hidden_states(adapted, params, rows, mask)[1])
    plain = auxiliary(rows, np.ones_like(rows, bool))
    same = auxiliary(np.pad(rows, ((0, 0), (0, 9))), np.pad(np.ones_like(rows, bool), ((0, 0), (0, 9))))
    np.testing.assert_allclose(same, plain, rtol=1e-5)
    assert float(plain) > 0


@pytest.mark.parametrize("name", ["lora_dropout", "dora", "smore_switch", "s2ft_out", "s2ft_global"])
def test_the_same_under_remat_and_unrolled(name):
    _, _, adapted, params = attached(ADAPTERS[name])
    trained, frozen = adapters.partition(params)

    def gradient(module):
        loss_fn = objectives.Supervised().loss_fn(module)
        total = lambda t: loss_fn(tree.combine(t, frozen), tiny.batch(), jax.random.key(5))[0].value()
        return jax.jit(jax.value_and_grad(total))(trained)

    plain = gradient(adapted)
    for changes in ({"remat": "full"}, {"remat": "dots", "unroll": 3}):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient(adapted.clone(**changes)), plain
        )


@each
def test_bfloat16_compute_keeps_the_leaves_in_float32(adapter):
    module, base, adapted, params = attached(adapter)
    low = adapted.clone(dtype=jnp.bfloat16)
    got = logits(low, params)
    assert got.dtype == jnp.float32
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(adapters.partition(params)[0]))
    np.testing.assert_allclose(got, logits(adapted, params), atol=0.5)


@each
def test_eight_devices_give_what_one_gives(adapter):
    _, _, adapted, params = attached(adapter)
    alone = logits(adapted, params)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placed = jax.device_put(params, sharding.shardings_for(params, mesh, (*adapters.RULES, *models.RULES)))
    together = jax.jit(lambda p: logits(adapted, p))(placed)
    np.testing.assert_allclose(together, alone, atol=2e-5)


@each
def test_merged_equals_unmerged_or_is_refused(adapter):
    _, _, adapted, params = attached(adapter)
    if adapter.kind == "smore":
        with pytest.raises(ValueError, match="depends on the token"):
            adapters.merge(adapted, params)
        return
    module, merged = adapters.merge(adapted, params)
    assert not any(adapters.is_adapter(path) for path in tree.flatten(merged))
    np.testing.assert_allclose(logits(module, merged), logits(adapted, params), atol=2e-5)


@each
def test_it_composes_with_another_adapter_on_other_layers_and_on_the_same(adapter):
    module, base, adapted, params = attached(adapter)
    other = adapters.attach(adapted, {"self_attn/(q|v)_proj": adapters.LoRA(rank=2)})
    assert isinstance(other, models.Decoder) and len(other.adapters) == 2
    both = adapters.init(other, base, jax.random.key(2))
    assert sum("self_attn" in p for p in tree.flatten(adapters.partition(both)[0])) == 4
    if adapter.kind != "lora":
        stacked = adapters.attach(adapted, {"up_proj": adapters.LoRA(rank=2)})
        kinds = adapters.init(stacked, base, jax.random.key(2))["model"]["layers"]["mlp"]["up_proj"]["adapter"]
        assert set(kinds) == {"lora", adapter.kind}
        fresh = adapters.init(stacked, base, jax.random.key(2))
        assert_starts_alike(adapter, logits(stacked, fresh), logits(module, base))


def test_the_tree_that_lora_adds():
    _, base, _, params = attached(adapters.LoRA(rank=3), "(q|down)_proj", moved=False)
    added = {p: x.shape for p, x in tree.flatten(params).items() if p not in tree.flatten(base)}
    assert added == {
        "model/layers/self_attn/q_proj/adapter/lora/a": (3, 32, 3),
        "model/layers/self_attn/q_proj/adapter/lora/b": (3, 3, 32),
        "model/layers/mlp/down_proj/adapter/lora/a": (3, 48, 3),
        "model/layers/mlp/down_proj/adapter/lora/b": (3, 3, 32),
    }


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6.0 / 4), (True, 6.0 / 2)])
def test_lora_by_hand(rslora, scale):
    adapter = adapters.LoRA(rank=4, alpha=6.0, rslora=rslora)
    rng = np.random.default_rng(0)
    x, w, a, b = (rng.normal(size=s).astype(np.float32) for s in ((5, 6), (6, 7), (6, 4), (4, 7)))
    call = adapters.Call(jnp.asarray(x), jnp.asarray(x @ w), jnp.asarray(w), None, None)
    leaves = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
    expected = np.einsum("ni,ir,ro->no", x, a, b) * scale + x @ w
    np.testing.assert_allclose(adapter.apply(leaves, call).y, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(adapter.merge(leaves, jnp.asarray(w)), w + scale * a @ b, rtol=1e-4, atol=1e-4)


def test_lora_dropout_keeps_the_mean_and_is_off_without_a_key():
    adapter = adapters.LoRA(rank=2, alpha=2.0, dropout=0.25)
    leaves = {"a": jnp.ones((400, 2)) / 400, "b": jnp.ones((2, 1))}
    call = lambda key: adapters.Call(jnp.ones((200, 400)), jnp.zeros((200, 1)), jnp.zeros((400, 1)), None, key)
    np.testing.assert_allclose(adapter.apply(leaves, call(None)).y, 2.0, rtol=1e-5)
    dropped = adapter.apply(leaves, call(jax.random.key(0))).y
    # Each entry is kept with 3/4 and scaled by 4/3: mean 1, variance 1/3; a row averages 400 of them, doubled.
    assert abs(float(dropped.mean()) - 2.0) < 4 * 2 * (1 / 3 / 400 / 200) ** 0.5
    assert 0.5 < float(dropped.std()) / (2 * (1 / 3 / 400) ** 0.5) < 1.5


class Foreign(nn.Module):
    """Somebody's module: two public methods, one calling the other, and a scan of its own that knows of no losses."""

    declares: bool = False

    @nn.compact
    def __call__(self, x):
        more = {"variable_axes": {"params": 0, "losses": 0}, "split_rngs": {"params": True, "dropout": True}}
        plain = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        block = nn.scan(_Block, length=2, **(more if self.declares else plain))
        return block(name="blocks")(x)[0]

    def twice(self, x):
        return self(x), self(x)


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="out")(nn.tanh(x)), None


def test_foreign_modules_and_their_methods_are_adapted_once():
    module, x = Foreign(), jax.random.normal(jax.random.key(0), (3, 6))
    base = module.init(jax.random.key(1), x)["params"]
    adapted = adapters.attach(module, {"blocks/out": adapters.LoRA(rank=2)})
    params = adapters.init(adapted, base, jax.random.key(2))
    params["blocks"]["out"]["adapter"]["lora"]["b"] += 1.0
    y = adapted.apply({"params": params}, x)
    assert float(jnp.abs(y - module.apply({"params": base}, x)).max()) > 1e-3
    merged_module, merged = adapters.merge(adapted, params)
    np.testing.assert_allclose(merged_module.apply({"params": merged}, x), y, rtol=1e-5)
    for same in adapted.apply({"params": params}, x, method="twice"):
        np.testing.assert_allclose(same, y, rtol=1e-6)


def test_a_foreign_scan_that_would_lose_a_loss_or_a_key_is_refused():
    x = jnp.ones((3, 6))
    for adapter, options, says in (
        (ADAPTERS["smore_switch"], {"mutable": ["losses"]}, "auxiliary loss"),
        (ADAPTERS["lora_dropout"], {"rngs": {"dropout": jax.random.key(0)}}, "random numbers"),
    ):
        for declares in (True, False):
            module = Foreign(declares)
            base = module.init(jax.random.key(1), x)["params"]
            adapted = adapters.attach(module, {"out": adapter})
            params = adapters.init(adapted, base, jax.random.key(2))
            run = lambda adapted=adapted, params=params, options=options: adapted.apply(
                {"params": params}, x, **options
            )
            if declares:
                run()
            else:
                with pytest.raises(ValueError, match=says):
                    run()


def test_what_cannot_be_attached_says_why():
    module, base = tiny.decoder()
    with pytest.raises(ValueError, match=r"'mlp/upp_proj' matches no linear layer; did you mean '.*up_proj'"):
        adapters.init(adapters.attach(module, {"mlp/upp_proj": adapters.LoRA()}), base, jax.random.key(0))
    with pytest.raises(ValueError, match="two adapters of kind 'lora'"):
        twice = adapters.attach(module, {"up_proj": adapters.LoRA(), "mlp": adapters.LoRA()})
        adapters.init(twice, base, jax.random.key(0))
    with pytest.raises(ValueError, match="no adapter given"):
        adapters.attach(module, {})
    with pytest.raises(ValueError, match="no adapters attached"):
        adapters.detach(module, base)
    for wrong, says in ((dict(rank=0), "rank=0"), (dict(dropout=1.0), "dropout=1.0")):
        with pytest.raises(ValueError, match=says):
            adapters.LoRA(**wrong)
