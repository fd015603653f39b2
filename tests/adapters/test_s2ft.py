"""S²FT by hand, against slices of the full gradient, and in its limits. Its laws as an adapter: test_attach.py."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxmethods import adapters, models, objectives, tree
from jaxmethods.adapters import S2FT, Call, s2ft
from jaxmethods.adapters.s2ft.calibration import _Probe
from tests import tiny

D_IN, D_OUT = 12, 8


def case(adapter, seed=1):
    """(x, kernel, leaves with a random change), float32."""
    keys = jax.random.split(jax.random.key(seed), 4)
    kernel = jax.random.normal(keys[3], (D_IN, D_OUT))
    leaves = adapter.init(keys[0], D_IN, D_OUT, kernel=kernel)
    leaves[adapter.form] += jax.random.normal(keys[1], leaves[adapter.form].shape)
    return jax.random.normal(keys[2], (5, D_IN)), kernel, leaves


def output(adapter, leaves, x, kernel):
    return adapter.apply(leaves, Call(x, x @ kernel, kernel, None, None)).y


attached = tiny.adapted


def logits(module, params):
    rows = tiny.batch()
    return models.logits(module, params, rows["tokens"], rows["segment_ids"] > 0)


def assert_equal_trees(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


sides = pytest.mark.parametrize("side", ["in", "out"])
forms = pytest.mark.parametrize("form", ["delta", "block"])


# One layer ------------------------------------------------------------------------------------------------------


@sides
@forms
def test_by_hand_and_merged(side, form):
    adapter = S2FT(fraction=0.5, unit="head", head_dim=2, side=side, form=form)
    x, kernel, leaves = case(adapter)
    changed = np.array(kernel, np.float64)
    for n, channel in enumerate(np.asarray(leaves["indices"])):
        at, own = (channel, n) if side == "in" else ((slice(None), channel), (slice(None), n))
        changed[at] = np.asarray(leaves[form])[own] + (changed[at] if form == "delta" else 0)
    np.testing.assert_allclose(output(adapter, leaves, x, kernel), np.asarray(x) @ changed, rtol=1e-4, atol=2e-5)
    np.testing.assert_allclose(adapter.merge(leaves, kernel), changed, rtol=1e-6, atol=1e-6)
    assert np.linalg.matrix_rank(np.asarray(adapter.merge(leaves, kernel) - kernel)) <= len(leaves["indices"])


@sides
@forms
def test_its_gradient_is_the_slice_of_the_full_one(side, form):
    adapter = S2FT(fraction=0.4, side=side, form=form)
    x, kernel, leaves = case(adapter)
    loss = lambda y: jnp.sum(jnp.sin(y))
    own = jax.grad(lambda trained: loss(output(adapter, {**leaves, form: trained}, x, kernel)))(leaves[form])
    full = jax.grad(lambda kernel: loss(x @ kernel))(adapter.merge(leaves, kernel))
    want = full[leaves["indices"]] if side == "in" else full[:, leaves["indices"]]
    np.testing.assert_allclose(own, want, rtol=1e-4, atol=1e-5)


@sides
def test_all_channels_are_full_fine_tuning_of_the_matrix(side):
    leaves = S2FT(fraction=1.0, side=side).init(jax.random.key(0), D_IN, D_OUT)
    np.testing.assert_array_equal(leaves["indices"], np.arange(D_IN if side == "in" else D_OUT))
    assert leaves["delta"].shape == (D_IN, D_OUT)


def test_decay_pulls_a_change_to_nothing_and_a_block_to_zero():
    for form, limit in (("delta", lambda kernel, at: kernel), ("block", lambda kernel, at: kernel.at[at].set(0))):
        adapter = S2FT(fraction=0.5, form=form)
        _, kernel, leaves = case(adapter)
        decayed = {**leaves, form: 0 * leaves[form]}
        np.testing.assert_allclose(adapter.merge(decayed, kernel), limit(kernel, leaves["indices"]), atol=1e-6)


def test_small_steps_are_not_lost_over_a_bfloat16_kernel():
    """The block is float32: a thousand steps of 1e-5 add up, which in bfloat16 would all be rounded away."""
    kernel = jnp.ones((D_IN, D_OUT), jnp.bfloat16)
    adapter = S2FT(count=2, form="block")
    leaves = adapter.init(jax.random.key(0), D_IN, D_OUT, kernel=kernel)
    assert leaves["block"].dtype == jnp.float32
    for _ in range(1000):
        leaves["block"] += 1e-5
    np.testing.assert_allclose(adapter.merge(leaves, kernel)[leaves["indices"]].astype(jnp.float32), 1.01, atol=0.004)
    y = output(adapter, leaves, jnp.ones((1, D_IN), jnp.float32), kernel)
    np.testing.assert_allclose(y, 12 + 2 * 0.01, rtol=1e-5)


# Partial back-propagation (section 3.4) -------------------------------------------------------------------------


def bytes_and_products(pairs):
    """(Bytes that live at once beside the arguments, shapes of all products) in the compiled gradient of a decoder's loss."""
    _, _, adapted, params = attached(pairs)
    trained, frozen = adapters.partition(params)
    batch = tiny.batch(16, 64)
    loss_fn = objectives.Supervised().loss_fn(adapted)
    gradient = jax.grad(lambda trained, frozen: loss_fn(tree.combine(trained, frozen), batch, None)[0].value())
    compiled = jax.jit(gradient).lower(trained, frozen).compile()
    found = re.findall(r"f32\[([\d,]+)\]\S* dot\(", compiled.as_text())
    return compiled.memory_analysis().temp_size_in_bytes, {tuple(map(int, shape.split(","))) for shape in found}


def test_only_the_chosen_activations_are_kept_and_only_their_gradient_is_formed():
    """down_proj is 48 x 32: S²FT forms [5, 32] and never [48, 32], and keeps 5 of its 48 inputs where LoRA needs them all."""
    ours, shapes = bytes_and_products({"down_proj": S2FT(count=5)})
    assert (5, 32) in shapes and not {(48, 32), (32, 48)} & shapes
    by_lora, _ = bytes_and_products({"down_proj": adapters.LoRA(rank=2)})  # equal in parameters: 160
    print(ours, by_lora)
    tokens, layers = 16 * 64, 3
    assert ours < by_lora - 4 * layers * tokens * 30
    _, shapes = bytes_and_products({"up_proj": S2FT(count=5, side="out")})
    assert {(32, 5), (5, 32)} & shapes and not {(48, 32), (32, 48)} & shapes


# What is chosen -------------------------------------------------------------------------------------------------


def test_whole_heads_are_drawn_uniformly_by_the_key():
    adapter = S2FT(fraction=0.25, unit="head", head_dim=4)
    draw = lambda key: np.asarray(adapter.init(key, 32, 3)["indices"])
    np.testing.assert_array_equal(draw(jax.random.key(5)), draw(jax.random.key(5)))
    counts = np.zeros(8)
    for key in jax.random.split(jax.random.key(0), 400):
        heads = draw(key).reshape(2, 4)
        np.testing.assert_array_equal(heads, heads[:, :1] // 4 * 4 + np.arange(4))
        assert heads[0, 0] < heads[1, 0]
        counts[heads[:, 0] // 4] += 1
    assert np.abs(counts - 100).max() < 4 * (400 * 0.25 * 0.75) ** 0.5


@sides
@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("unit", ["channel", "head"])
def test_norms_by_hand(side, largest, unit):
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(D_IN, D_OUT)).astype(np.float32)
    seen = rng.normal(size=(30, D_IN if side == "in" else D_OUT)).astype(np.float32) ** 3
    scores = np.square(seen).sum(0)
    size = 2 if unit == "head" else 1
    pooled = lambda squares: np.sqrt(squares.reshape(-1, size).sum(1))
    weight = pooled(np.square(kernel).sum(1 if side == "in" else 0))
    activation = pooled(scores)
    for selection, norms in (("weight", weight), ("activation", activation), ("product", weight * activation)):
        adapter = S2FT(count=3, unit=unit, head_dim=size, side=side, selection=selection, largest=largest)
        given = jnp.asarray(scores) if adapter.needs_scores else None
        leaves = adapter.init(jax.random.key(0), D_IN, D_OUT, kernel=jnp.asarray(kernel), scores=given)
        order = np.argsort(norms)
        best = np.sort(order[-3:] if largest else order[:3])
        np.testing.assert_array_equal(leaves["indices"][::size] // size, best, err_msg=selection)


def test_the_head_width_comes_from_the_model():
    _, _, adapted, params = attached({"o_proj": S2FT(count=1, unit="head")})
    indices = params["model"]["layers"]["self_attn"]["o_proj"]["adapter"]["s2ft"]["indices"]
    head_dim = adapted.config.head_dim
    np.testing.assert_array_equal(indices, indices[:, :1] // head_dim * head_dim + np.arange(head_dim))


def test_a_global_draw_is_the_released_codes():
    """One draw over all layers: counts differ between layers and add up to int(fraction * all)."""
    adapter = S2FT(fraction=0.2, budget="global", seed=3)
    leaves = adapter.init_stack(jax.random.key(0), 6, d_in=40, d_out=8)
    used = (leaves["indices"] < 40).sum(1)
    assert used.sum() == int(0.2 * 6 * 40) and used.max() == leaves["indices"].shape[1] and used.min() < used.max()
    for row, n in zip(np.asarray(leaves["indices"]), used, strict=True):
        assert (np.diff(row[:n]) > 0).all() and (row[n:] == 40).all()
    same = adapter.init_stack(jax.random.key(9), 6, d_in=40, d_out=8)  # on every process, whatever its key
    np.testing.assert_array_equal(leaves["indices"], same["indices"])
    other = dataclasses.replace(adapter, seed=4).init_stack(jax.random.key(0), 6, d_in=40, d_out=8)["indices"]
    assert not np.array_equal(np.sort(leaves["indices"])[:, :3], np.sort(other)[:, :3])


def test_padding_of_a_global_draw_neither_acts_nor_moves():
    adapter = S2FT(fraction=0.1, budget="global")
    _, _, adapted, params = attached({"down_proj": adapter}, moved=0.0)
    trained, frozen = adapters.partition(params)
    loss_fn = objectives.Supervised().loss_fn(adapted)
    value = lambda trained: loss_fn(tree.combine(trained, frozen), tiny.batch(), None)[0].value()
    gradient = tree.flatten(jax.grad(value)(trained))["model/layers/mlp/down_proj/adapter/s2ft/delta"]
    indices = params["model"]["layers"]["mlp"]["down_proj"]["adapter"]["s2ft"]["indices"]
    padded = np.asarray(indices) == adapted.config.intermediate_size
    assert padded.any() and (np.abs(gradient[padded]) == 0).all() and (np.abs(gradient[~padded]).max(-1) > 0).all()


def test_the_papers_counts():
    """LLaMA3-8B, down projections, 3% of 14336 channels: 430 in each of 32 layers, or 13,762 of all drawn together;
    LLaMA2-7B: 53 heads and 7045 channels."""
    shapes = jax.eval_shape(lambda key: S2FT(fraction=0.03).init(key, 14336, 4096), jax.random.key(0))
    assert shapes["delta"].shape == (430, 4096)
    for adapter, width, channels in (
        (S2FT(fraction=0.03, budget="global"), 14336, 13762),
        (S2FT(fraction=0.02, budget="global"), 11008, 7045),
        (S2FT(fraction=0.052, unit="head", head_dim=128, budget="global"), 4096, 53 * 128),
    ):
        leaves = jax.eval_shape(lambda a=adapter, w=width: a.init_stack(jax.random.key(0), 32, d_in=w, d_out=1))
        drawn = adapter.init_stack(jax.random.key(0), 32, d_in=width, d_out=1)["indices"]
        assert leaves["indices"].shape == drawn.shape and int((drawn < width).sum()) == channels


# Scores from data -----------------------------------------------------------------------------------------------


class TwoLayers:
    """A linear network written out: x -> x A -> (x A) B."""

    @staticmethod
    def batches():
        return [jax.random.normal(jax.random.key(n), (4, 6)) for n in range(3)]

    @staticmethod
    def objective(module):
        def loss_fn(params, batch, key):
            y = module.apply({"params": params}, batch)
            return tree.Mean.of(jnp.square(y).sum(-1)), {}

        return loss_fn


@sides
@pytest.mark.parametrize("selection", ["activation", "product", "gradient"])
def test_scores_are_the_norms_over_all_batches(side, selection):
    import flax.linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(5, name="b")(nn.Dense(7, name="a")(x))

    module, batches = Net(), TwoLayers.batches()
    base = module.init(jax.random.key(0), batches[0])["params"]
    adapted = adapters.attach(module, {"a|b": S2FT(count=1, side=side, selection=selection)})
    scores = s2ft.calibrate(adapted, base, batches, TwoLayers.objective)
    a, b = base["a"], base["b"]
    want = {"a": 0.0, "b": 0.0}
    for x in batches:
        hidden = x @ a["kernel"] + a["bias"]
        y = hidden @ b["kernel"] + b["bias"]
        if selection == "gradient":
            g = 2 * y / len(x)
            seen = {"a": x.T @ (g @ b["kernel"].T), "b": hidden.T @ g}
            squares = {name: np.square(dw).sum(1 if side == "in" else 0) for name, dw in seen.items()}
        else:
            seen = {"a": x, "b": hidden} if side == "in" else {"a": hidden, "b": y}
            squares = {name: np.square(values).sum(0) for name, values in seen.items()}
        want = {name: want[name] + squares[name] for name in want}
    for name, values in want.items():
        np.testing.assert_allclose(scores[name]["adapter"]["s2ft"], values, rtol=1e-4)
    params = adapters.init(adapted, base, jax.random.key(1), scores=scores)
    assert set(params["a"]["adapter"]["s2ft"]) == {"indices", "delta"}


def test_scores_of_a_decoder_leave_padding_out_and_choose_disjoint_extremes():
    module, base = tiny.decoder()
    batch = tiny.batch()
    loss = objectives.Supervised().loss_fn
    chosen = {}
    for largest in (False, True):
        adapted = adapters.attach(module, {"down_proj": S2FT(fraction=0.4, selection="activation", largest=largest)})
        scores = s2ft.calibrate(adapted, base, [batch, batch], loss)
        params = adapters.init(adapted, base, jax.random.key(0), scores=scores)
        chosen[largest] = np.asarray(params["model"]["layers"]["mlp"]["down_proj"]["adapter"]["s2ft"]["indices"])
    for small, large in zip(chosen[False], chosen[True], strict=True):
        assert not np.intersect1d(small, large).size
    wider = {name: np.pad(x, ((0, 0), (0, 5))) for name, x in batch.items()}
    same = s2ft.calibrate(adapted, base, [wider, wider], loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), same, scores)


@pytest.mark.parametrize("gradient", [False, True])
def test_activations_cost_a_forward_pass_alone(gradient):
    """Their scores are a gradient in form; the compiler drops the backward pass, on which they do not depend."""
    module, base = tiny.decoder()
    probed = adapters.attach(module, {"down_proj": _Probe("in", gradient)})
    probes = adapters.partition(adapters.init(probed, base, jax.random.key(0)))[0]
    loss = lambda module, params: objectives.Supervised().loss_fn(module)(params, tiny.batch(), None)[0].value()
    products = lambda act, *args: jax.jit(act).lower(*args).compile().as_text().count(" dot(")
    scores = products(jax.grad(lambda probes, base: loss(probed, tree.combine(probes, base))), probes, base)
    forward = products(lambda base: loss(module, base), base)
    assert scores > 2 * forward if gradient else scores <= forward


# The permuted form ----------------------------------------------------------------------------------------------

PAIRS = {
    "one side": {"down_proj": S2FT(count=5)},
    "both sides": {"up_proj": S2FT(count=6, side="out"), "down_proj": S2FT(count=9)},
    "blocks": {"up_proj": S2FT(count=6, side="out", form="block"), "down_proj": S2FT(count=9, form="block")},
    "heads": {"v_proj": S2FT(count=1, side="out", unit="head")},
}


@pytest.mark.parametrize("pairs", PAIRS.values(), ids=PAIRS)
def test_the_permuted_model_is_the_same_function_and_learns_the_same(pairs):
    _, _, adapted, params = attached(pairs)
    permuted = s2ft.permute(adapted, params)
    assert not any(path.endswith("s2ft/indices") for path in tree.flatten(permuted))
    np.testing.assert_allclose(logits(adapted, permuted), logits(adapted, params), atol=2e-5)
    assert_equal_trees(s2ft.unpermute(permuted), params)

    def after_steps(params):
        trained, frozen = adapters.partition(params)
        tx, loss_fn = optax.adam(1e-2), objectives.Supervised().loss_fn(adapted)

        @jax.jit
        def step(trained, state):
            value = lambda trained: loss_fn(tree.combine(trained, frozen), tiny.batch(), None)[0].value()
            updates, state = tx.update(jax.grad(value)(trained), state)
            return optax.apply_updates(trained, updates), state

        state = tx.init(trained)
        for _ in range(3):
            trained, state = step(trained, state)
        return tree.combine(trained, frozen)

    assert_close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4)
    jax.tree.map(assert_close, s2ft.unpermute(after_steps(permuted)), after_steps(params))


def test_grouped_queries_move_with_their_key_value_head():
    module, base = tiny.decoder("llama")
    config = module.config
    group = config.num_heads // config.num_kv_heads
    assert group > 1
    whole = S2FT(count=1, unit="head", head_dim=group * config.head_dim)  # the queries of one key-value head
    _, _, adapted, params = attached({"v_proj": S2FT(count=1, side="out", unit="head"), "o_proj": whole})
    np.testing.assert_allclose(logits(adapted, s2ft.permute(adapted, params)), logits(adapted, params), atol=2e-5)
    _, _, adapted, params = attached({"o_proj": S2FT(count=1, unit="head")})
    with pytest.raises(ValueError, match="parts of key-value heads, which move as wholes"):
        s2ft.permute(adapted, params)
    # Why: a query head in another group reads other keys.
    kernel = lambda params, name: params["model"]["layers"]["self_attn"][name]
    swapped = jax.tree.map(lambda x: x, base)
    heads = np.arange(config.num_heads)
    heads[[0, group]] = heads[[group, 0]]
    channels = (heads[:, None] * config.head_dim + np.arange(config.head_dim)).reshape(-1)
    for name, axis in (("q_proj", -1), ("o_proj", -2)):
        kernel(swapped, name)["kernel"] = jnp.take(kernel(base, name)["kernel"], channels, axis=axis)
    assert float(jnp.abs(logits(module, swapped) - logits(module, base)).max()) > 1e-3


def test_biases_are_permuted_too():
    _, _, adapted, params = attached({"v_proj": S2FT(count=1, side="out", unit="head")}, "qwen2")
    assert "bias" in params["model"]["layers"]["self_attn"]["v_proj"]
    np.testing.assert_allclose(logits(adapted, s2ft.permute(adapted, params)), logits(adapted, params), atol=2e-5)


def test_what_cannot_be_permuted_says_why():
    _, _, adapted, params = attached({"down_proj": S2FT(fraction=0.1, budget="global")})
    with pytest.raises(ValueError, match="drawn globally"):
        s2ft.permute(adapted, params)
    _, _, adapted, params = attached({"down_proj": S2FT(count=2)})
    with pytest.raises(ValueError, match="'model/layers/mlp/down_proj' is no part of a coupled structure"):
        s2ft.permute(adapted, params, coupled=())


# Apart from the model -------------------------------------------------------------------------------------------


def two_tasks(dtype=jnp.float32, **fields):
    """(base parameters, two changes of it, each with the logits of its fused model)."""
    changes = []
    for seed in (2, 7):
        module, _, adapted, params = attached(
            {"up_proj": S2FT(count=4, side="out"), "down_proj": S2FT(**fields)}, seed=seed
        )
        params = tree.combine(
            adapters.partition(params)[0],
            jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, adapters.partition(params)[1]),
        )
        base, change = s2ft.decouple(adapted, params)
        changes.append((change, logits(adapted, params)))
    return module, base, *changes


def test_taken_off_and_put_on_it_is_the_adapted_model():
    module, base, (change, want), _ = two_tasks(count=5)
    tuned, _ = s2ft.fuse(base, change)
    np.testing.assert_allclose(logits(module, tuned), want, atol=2e-5)
    double, _ = s2ft.fuse(base, change, weights=[2.0])
    kernel = lambda params: params["model"]["layers"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_allclose(kernel(double) - kernel(base), 2 * (kernel(tuned) - kernel(base)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("fields", [dict(count=5), dict(fraction=0.1, budget="global")], ids=["uniform", "global"])
def test_switching_back_and_forth_is_exact(dtype, fields):
    _, base, (a, _), (b, _) = two_tasks(dtype, **fields)
    with_a, before_a = s2ft.fuse(base, a)
    again = s2ft.restore(with_a, *before_a)
    assert_equal_trees(again, base)
    with_b, before_b = s2ft.fuse(again, b)
    assert_equal_trees(s2ft.fuse(s2ft.restore(with_b, *before_b), a)[0], with_a)
    both, before = s2ft.fuse(base, a, b)  # overlapping ones come off too, last first
    assert_equal_trees(s2ft.restore(both, *before), base)


def test_disjoint_changes_commute_and_overlapping_ones_are_refused():
    module, base = tiny.decoder()
    changes = []
    for side in (0, 1):
        indices = jnp.broadcast_to(jnp.arange(side, 20, 2), (3, 10))
        rows = jax.random.normal(jax.random.key(side), (3, 10, module.config.hidden_size))
        changes.append({"model/layers/mlp/down_proj": s2ft.Change(indices, rows=rows)})
    a, b = changes
    one, _ = s2ft.fuse(base, a, b, disjoint=True)
    assert_equal_trees(one, s2ft.fuse(base, b, a)[0])
    both = {name: s2ft.Change(c.indices + 1, rows=c.rows) for name, c in a.items()}
    with pytest.raises(
        ValueError, match=r"'model/layers/mlp/down_proj'\[0\]: change 0 and change 1 both touch channels \[1, 3"
    ):
        s2ft.fuse(base, b, both, disjoint=True)
    with pytest.raises(ValueError, match="does not fit a kernel of"):
        s2ft.fuse(base, {name: s2ft.Change(c.indices, rows=c.rows[..., 1:]) for name, c in a.items()})
    with pytest.raises(ValueError, match="'elsewhere', which this model does not have"):
        s2ft.fuse(base, {"elsewhere": next(iter(a.values()))})


def test_a_permuted_run_is_decoupled_in_original_order():
    _, _, adapted, params = attached(PAIRS["both sides"])
    plain, permuted = s2ft.decouple(adapted, params), s2ft.decouple(adapted, s2ft.permute(adapted, params))
    assert_equal_trees(permuted, plain)


# Theory (section 4, theorem 4.2) --------------------------------------------------------------------------------


def test_a_deep_linear_network_forgets_less_with_selected_channels_than_with_low_rank():
    """In closed form: the excess risk out of distribution. W_l + U V' is fitted to a target B_i in distribution; with
    rank(B_i - W) <= r LoRA's risk out of distribution is |B_o - B_i|^2, and S²FT's stays within (1 + 3 eps^2) of before."""
    rng = np.random.default_rng(0)
    d, r = 24, 4
    w = rng.normal(size=(d, d)) / d**0.5
    below = np.linalg.qr(rng.normal(size=(d, d)))[0]  # W_{l-1}...: orthogonal, Sigma = I
    shift = rng.normal(size=(d, r)) @ rng.normal(size=(r, d)) / d**0.5
    b_i = (w + shift) @ below
    b_o = w @ below + 0.3 * rng.normal(size=(d, d)) / d**0.5  # another task, nearer to the pretrained map
    risk = lambda map_: np.sum((map_ - b_o) ** 2)
    pretrained = risk(w @ below)

    wanted = b_i @ below.T - w  # the best change without a constraint
    u, s, vt = np.linalg.svd(wanted)
    lora = (w + (u[:, :r] * s[:r]) @ vt[:r]) @ below
    np.testing.assert_allclose(risk(lora), np.sum((b_o - b_i) ** 2), rtol=1e-10)

    adapter = S2FT(count=2 * r, side="out")  # equal parameters: 2 r d
    leaves = adapter.init(jax.random.key(0), d, d)
    chosen = np.asarray(leaves["indices"])
    leaves["delta"] = jnp.asarray(wanted.T[:, chosen], jnp.float32)  # minimum norm: the chosen outputs are fitted
    tuned = np.asarray(adapter.merge(leaves, jnp.asarray(w.T, jnp.float32)), np.float64).T @ below
    eps2 = np.sum((b_o - b_i)[chosen] ** 2) / pretrained
    assert risk(tuned) <= (1 + 3 * eps2) * pretrained + 1e-6
    assert risk(tuned) < risk(lora)
    in_distribution = lambda map_: np.sum((map_ - b_i) ** 2)
    assert in_distribution(tuned) < in_distribution(w @ below)


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"side": "inn"}, "did you mean 'in'"), ({"fraction": 0.0}, "fraction=0.0"), ({"count": 0}, "count=0"),
        ({"count": 2, "fraction": 0.1}, "give one of them"), ({"selection": "activations"}, "did you mean 'activation'"),
        ({"selection": "weight", "budget": "global"}, "only random units are drawn globally"),
    ],
)  # fmt: skip
def test_wrong_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        S2FT(**wrong)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"unit": "head", "head_dim": 5}, "head_dim=5 does not divide the layer's 12 channels"),
        ({"unit": "head"}, "needs head_dim"), ({"count": 13}, "count=13 is over the layer's 12 channels"),
        ({"selection": "gradient"}, "scores=adapters.s2ft.calibrate"), ({"selection": "weight"}, "give adapters.init arrays"),
        ({"form": "block"}, "give adapters.init arrays"),
    ],
)  # fmt: skip
def test_layers_that_do_not_fit(fields, says):
    with pytest.raises(ValueError, match=says):
        S2FT(**fields).init(jax.random.key(0), D_IN, D_OUT)


def test_scores_that_belong_to_nothing():
    module, base = tiny.decoder()
    adapted = adapters.attach(module, {"down_proj": S2FT(count=2)})
    with pytest.raises(ValueError, match="scores for 'elsewhere'"):
        adapters.init(adapted, base, jax.random.key(0), scores={"elsewhere": jnp.ones(3)})
