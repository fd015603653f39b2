"""Adapters over a quantised base: the laws of adapters, with the base frozen in codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmethods import adapters, models, objectives, quantization, sharding, training, tree
from jaxmethods.generation import generate
from tests import tiny

ADAPTERS = {
    "lora": adapters.LoRA(rank=3, alpha=5.0),
    "dora": adapters.DoRA(rank=3, alpha=5.0),
    "smore": adapters.SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(1, 2), gate="switch", gate_dim=4, router_dim=5),
    "s2ft_delta": adapters.S2FT(fraction=0.3),
    "s2ft_block": adapters.S2FT(count=3, side="out", unit="head", head_dim=4, form="block"),
    "s2ft_weight": adapters.S2FT(fraction=0.1, selection="weight"),
}
each = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
each_kind = pytest.mark.parametrize("kind", ["int8", "int4"])


def quantized(kind, family="llama"):
    """A tiny decoder whose every linear layer divides into blocks; the float one is in its `base`."""
    return models.quantize(*tiny.decoder(family, hidden_size=64, intermediate_size=96), kind)


def logits(module, params):
    rows = tiny.batch()
    return models.logits(module, params, rows["tokens"], rows["segment_ids"] > 0)


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [(ADAPTERS["lora"], "int8"), *((adapter, "int4") for adapter in ADAPTERS.values())],
    ids=lambda value: getattr(value, "kind", value),
)
def test_it_starts_at_the_quantised_model_trains_alone_and_merges_into_float(adapter, kind):
    module, base = quantized(kind)
    adapted = adapters.attach(module, {"mlp/(up|down)_proj": adapter})
    params = adapters.init(adapted, base, jax.random.key(2))
    rounding = 2e-6 if adapter.kind == "dora" else 0
    np.testing.assert_allclose(logits(adapted, params), logits(module, base), atol=rounding, rtol=rounding)

    trained, frozen = adapters.partition(params)
    assert all(adapters.is_adapter(path) for path in tree.flatten(trained))
    tx = training.Optimizer(learning_rate=1e-2, warmup=0).transformation(10)
    step = jax.jit(training.make_train_step(objectives.Supervised().loss_fn(adapted), tx))
    state = training.init_state(trained, tx, jax.random.key(0))
    losses = []
    for _ in range(3):
        state, metrics = step(state, frozen, tiny.batch())
        assert bool(metrics["finite"])
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]

    params = tree.combine(state.trained, frozen)
    same, without = adapters.detach(adapted, params)
    assert same == module
    jax.tree.map(np.testing.assert_array_equal, without, base)
    if adapter.kind == "smore":
        with pytest.raises(ValueError, match="depends on the token"):
            adapters.merge(adapted, params)
        return
    plain, merged = adapters.merge(adapted, params)
    assert plain == module.clone(quantization=None)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.float32)}
    assert merged.keys() == base.keys() and not any(quantization.is_part(tree.flatten(merged), p) for p in merged)
    np.testing.assert_allclose(logits(plain, merged), logits(adapted, params), atol=3e-5)


@pytest.mark.parametrize(("kind", "remat"), [("int8", "none"), ("int4", "dots"), ("int4", "full")])
def test_the_gradient_is_that_over_the_opened_kernels(kind, remat):
    module, base = quantized(kind, "qwen2")
    adapted = adapters.attach(module, {"proj": adapters.LoRA(rank=3), "down": ADAPTERS["dora"]})
    params = adapters.init(adapted, base, jax.random.key(2))

    def gradient(module, params):
        trained, frozen = adapters.partition(params)
        loss_fn = objectives.Supervised().loss_fn(module)
        return jax.jit(jax.grad(lambda t: loss_fn(tree.combine(t, frozen), tiny.batch(), None)[0].value()))(trained)

    plain = gradient(*models.dequantize(adapted, params))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6)
    jax.tree.map(close, gradient(adapted.clone(remat=remat), params), plain)


@pytest.mark.parametrize("remat", ["none", "dots"])
@each_kind
def test_a_backward_pass_keeps_no_opened_kernel(kind, remat):
    module, base = quantized(kind)
    pairs = {"q_proj": ADAPTERS["lora"], "up_proj": ADAPTERS["dora"], "down_proj": ADAPTERS["s2ft_weight"]}
    adapted = adapters.attach(module.clone(remat=remat), pairs)
    trained, frozen = adapters.partition(adapters.init(adapted, base, jax.random.key(2)))
    loss_fn = objectives.Supervised().loss_fn(adapted)
    total = lambda t, frozen: loss_fn(tree.combine(t, frozen), tiny.batch(1, 8), None)[0].value()
    kept = jax.eval_shape(lambda t, frozen: jax.vjp(lambda t: total(t, frozen), t)[1], trained, frozen)
    kernels = {shape[-2:] for shape in adapters.layers(base).values()}
    floats = [x.shape for x in jax.tree.leaves(kept) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) > 5 and not [shape for shape in floats if shape[-2:] in kernels]


@each_kind
def test_logits_stay_near_those_of_the_float_model(kind):
    module, base = tiny.decoder(hidden_size=64, intermediate_size=96)
    exact = logits(module, base)
    off = jnp.abs(logits(*models.quantize(module, base, kind)) - exact).mean() / jnp.abs(exact).mean()
    # A code is off by a step / sqrt(12); the largest of 32 normal weights is about 2.1 sigma, their range 4.1 sigma. Random
    # layers without a common scale, three blocks deep, may amplify that a few times.
    weights = {"int8": 2.1 / 127, "int4": 4.1 / 15}[kind] / 12**0.5
    assert float(off) < 8 * weights


@each_kind
def test_opened_it_is_the_same_model_and_its_own_init_makes_such_a_tree(kind):
    module, base = quantized(kind, "qwen2")
    plain, opened = models.dequantize(module, base)
    assert plain.quantization is None and adapters.layers(opened) == adapters.layers(base)
    np.testing.assert_allclose(logits(plain, opened), logits(module, base), atol=1e-6)
    fresh = module.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(lambda x: (x.shape, x.dtype), base)
    assert quantization.count(fresh) == tree.count(opened)


@each_kind
def test_bfloat16_compute_and_parameters(kind):
    module, base = tiny.decoder(hidden_size=64, intermediate_size=96)
    module = module.clone(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    low, params = models.quantize(module, tree.cast(base, jnp.bfloat16), kind)
    adapted = adapters.attach(low, {"up_proj": ADAPTERS["dora"]})
    params = adapters.init(adapted, params, jax.random.key(0))
    plain, merged = adapters.merge(adapted, params)
    assert {x.dtype for x in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(logits(plain, merged), logits(adapted, params), atol=0.15)


@each_kind
def test_eight_devices_give_what_one_gives_and_scales_lie_as_their_codes(kind):
    module, base = quantized(kind)
    adapted = adapters.attach(module, {"(up|down)_proj": ADAPTERS["lora"], "q_proj": ADAPTERS["dora"]})
    params = adapters.init(adapted, base, jax.random.key(2))
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    placements = sharding.shardings_for(params, mesh, (*adapters.RULES, *models.RULES))
    specs = {path.split("layers/")[-1]: s.spec for path, s in tree.flatten(placements).items()}
    for name in ("kernel", "kernel_scale", *(["kernel_minimum"] if kind == "int4" else [])):
        assert specs[f"mlp/up_proj/{name}"] == P(None, "fsdp", "tensor")
        # Three blocks do not divide by two devices: each holds all of them.
        assert specs[f"mlp/down_proj/{name}"] == P(None, "tensor" if name == "kernel" else None, "fsdp")
    loss_fn = objectives.Supervised().loss_fn(adapted)

    def gradient(params):
        trained, frozen = adapters.partition(params)
        return jax.grad(lambda t: loss_fn(tree.combine(t, frozen), tiny.batch(), None)[0].value())(trained)

    alone, together = jax.jit(gradient)(params), jax.jit(gradient)(jax.device_put(params, placements))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), together, alone)


@each_kind
def test_a_bank_serves_rows_and_generation_goes_on(kind):
    module, base = quantized(kind)
    adapted = adapters.attach(module, {"up_proj": ADAPTERS["dora"]})
    variants = [adapters.init(adapted, base, jax.random.key(n)) for n in range(2)]
    moved = lambda p, x: x + 0.3 if p.endswith("/b") else x
    variants[1] = tree.unflatten({p: moved(p, x) for p, x in tree.flatten(variants[1]).items()})
    served, params = adapters.bank(adapted, variants)
    tokens = tiny.batch(3)["tokens"][:, :6]
    got = models.logits(served, adapters.for_rows(params, [1, 0, -1]), tokens)
    for row, want in enumerate([(adapted, variants[1]), (adapted, variants[0]), (module, base)]):
        np.testing.assert_allclose(got[row], models.logits(*want, tokens)[row], atol=2e-5)
    mask = np.ones_like(tokens, bool)
    answer = generate(adapted, variants[1], tokens, mask, max_new_tokens=17, temperature=0.0)
    plain = generate(*adapters.merge(adapted, variants[1]), tokens, mask, max_new_tokens=17, temperature=0.0)
    np.testing.assert_allclose(answer.logps, plain.logps, atol=1e-4)


def test_calibration_peft_and_switching_read_the_opened_kernels(tmp_path):
    module, base = quantized("int4")
    plain, opened = models.dequantize(module, base)
    loss_fn = objectives.Supervised().loss_fn
    adapter = adapters.S2FT(fraction=0.2, selection="product", form="block")
    chosen = []
    for m, p in ((module, base), (plain, opened)):
        adapted = adapters.attach(m, {"down_proj": adapter})
        scores = adapters.s2ft.calibrate(adapted, p, [tiny.batch()], loss_fn)
        params = adapters.init(adapted, p, jax.random.key(0), scores=scores)
        chosen.append((adapted, params, tree.flatten(params)["model/layers/mlp/down_proj/adapter/s2ft/indices"]))
    np.testing.assert_array_equal(chosen[0][2], chosen[1][2])
    adapted, params, _ = chosen[0]
    adapters.save_peft(tmp_path / "peft", adapted, params, base_model="tiny", revision=None)
    loaded, back = adapters.load_peft(tmp_path / "peft", module, base)
    np.testing.assert_allclose(logits(loaded, back), logits(adapted, params), atol=2e-5)
    with pytest.raises(ValueError, match=r"s2ft.permute needs float kernels and .* is quantised"):
        adapters.s2ft.permute(adapted, params)
    _, changes = adapters.s2ft.decouple(adapted, params)
    with pytest.raises(ValueError, match=r"s2ft.fuse needs float kernels"):
        adapters.s2ft.fuse(base, changes)
    adapters.s2ft.fuse(opened, changes)


def test_what_cannot_be_quantised_says_why(tmp_path):
    module, base = tiny.decoder()
    with pytest.raises(ValueError, match=r"'model/layers/mlp/down_proj' reads 48 channels, which is no multiple of 32"):
        models.quantize(module, base, "int8")
    module, base = quantized("int8")
    with pytest.raises(ValueError, match="quantised already"):
        models.quantize(module, base, "int8")
    with pytest.raises(ValueError, match=r"models.save needs float kernels"):
        models.save(tmp_path / "model", module, base)
    module, base = tiny.decoder(hidden_size=64, intermediate_size=96)
    adapted = adapters.attach(module, {"up_proj": ADAPTERS["lora"]})
    with pytest.raises(ValueError, match="quantise it, then attach"):
        models.quantize(adapted, adapters.init(adapted, base, jax.random.key(0)), "int4")
