"""S'MoRE against a tree walked token by token, and against its own laws."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, tree
from jaxmethods.adapters import SMoRE, smore
from jaxmethods.adapters.smore import aggregation, compression, routing

SMALL = {"gate_dim": 4, "router_dim": 5}


def quick_compiler_options():
    """Many tiny programs are compiled here; a compiler that does not know these options is only slower."""
    options = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=options)()
    except Exception:
        return {}
    return options


jit = functools.partial(jax.jit, compiler_options=quick_compiler_options())
fresh = jit(smore.init, static_argnums=(1, 2, 3))
run = jit(smore.apply, static_argnames="spec")
run_route = jit(smore.route, static_argnames="spec")


@functools.partial(jit, static_argnames="spec")
def run_both(params, x, spec, mask):
    return smore.apply(params, x, spec, token_mask=mask), smore.route(params, x, spec)


def random_params(spec, d_in=16, d_out=12, seed=0, size=0.5):
    """Leaves with nothing at zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: smore.init(jax.random.key(0), d_in, d_out, spec))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape, scale=size), jnp.float32), shapes)


def tokens(count=9, width=16, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(count, width)), jnp.float32)


# A tree, token by token -----------------------------------------------------------------------------------------


def walk(params, x, spec, token_mask=None):
    """(delta, loss): the equations of all variants by recursion, one token and one node at a time, in float64."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    e, r = p["experts"], p["router"]
    x = np.asarray(x, np.float64)
    starts = np.cumsum([0, *spec.down_sizes])
    rows = [[] for _ in range(spec.layers)]  # (valid, softmax or cosines, chosen, scores) of each parent

    def choose(layer, context):
        g = r["gate"][str(layer)]
        hidden = np.maximum(context @ g["hidden"]["kernel"] + g["hidden"]["bias"], 0)
        q, keys = hidden @ g["query"]["kernel"] + g["query"]["bias"], g["keys"]
        if spec.gate == "noisy_topk":
            q, keys = q / np.linalg.norm(q), keys / np.linalg.norm(keys, axis=1, keepdims=True)
        logits = keys @ q
        soft = np.exp(logits) / np.exp(logits).sum()
        if spec.gate == "dense":
            return range(len(soft)), soft, soft, keys
        best = sorted(range(len(logits)), key=lambda i: -logits[i])[: spec.fanout[layer]]
        if spec.gate == "switch":
            return best, soft[best] / (soft[best].sum() if len(best) > 1 else 1), soft, keys
        kept = np.exp(logits[best])
        return best, kept / kept.sum() if len(best) > 1 else logits[best], logits, keys

    def expert(token, layer, index):
        pool = spec.pool(layer)
        start = starts[pool] + (0 if spec.tied_down else index * spec.ranks[layer])
        a = slice(start, start + spec.ranks[layer])
        h = token @ e["a"]["kernel"][:, a] + e["a"]["bias"][a]
        b = e["b"][str(pool)]
        return spec.scales[layer] * (h @ b["kernel"][index] + b["bias"][index])

    def node(token, valid, layer, context):
        """The state x_{layer + 1} of a parent whose children come from `layer`."""
        chosen, scores, soft, keys = choose(layer, context)
        rows[layer].append((valid, soft, list(chosen), scores))
        act = sigma(spec, e.get("slope", [0.0] * spec.layers)[layer])
        out = np.zeros(spec.widths[layer + 1])
        for index, alpha in zip(chosen, scores, strict=True):
            own = expert(token, layer, index)
            if layer == 0:
                out += alpha * (own if spec.variant in ("star", "child") else act(own))
                continue
            below = node(token, valid, layer - 1, np.concatenate([context, keys[index]]))
            w = e["w"][str(layer)]
            if spec.variant in ("star", "child"):
                up = act(below) @ w["kernel"] + w["bias"]
                out += alpha * own + (alpha * up if spec.variant == "star" else up)
            else:
                out += alpha * act(own + below @ w["kernel"] + w["bias"])
        return out

    mask = np.ones(len(x), bool) if token_mask is None else np.asarray(token_mask)
    delta = []
    for token, valid in zip(x, mask, strict=True):
        root = node(token, valid, spec.layers - 1, token @ r["down"]["kernel"] + r["down"]["bias"])
        delta.append(root @ e["proj"]["kernel"] + e["proj"]["bias"])

    loss = 0.0
    for s, layer in zip(spec.experts, rows, strict=True):
        layer = [row for row in layer if row[0]]
        if spec.gate == "dense" or not layer:
            continue
        if spec.gate == "switch":
            share = np.array([sum(e in chosen for _, _, chosen, _ in layer) for e in range(s)]) / len(layer)
            loss += s * (share * np.mean([soft for _, soft, _, _ in layer], 0)).sum()
        else:
            importance, load = np.zeros(s), np.zeros(s)
            for _, _, chosen, scores in layer:
                importance[chosen] += scores
                load[chosen] += scores > 0
            loss += sum(v.var(ddof=1) / (v.mean() ** 2 + 1e-10) for v in (importance, load))
    return np.array(delta), spec.balance_weight * loss


def sigma(spec, slope):
    return {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "identity": lambda v: v,
            "prelu": lambda v: np.where(v > 0, v, slope * v)}[spec.activation.split("|")[0]]  # fmt: skip


TREES = {
    "L1": {"experts": (3,), "fanout": (2,), "ranks": (3,), "activation": "tanh"},
    "L2_f1": {"experts": (3, 4), "fanout": (1, 1), "ranks": (2, 1), "activation": "relu", "scale": (2.0, 0.5)},
    "L2": {"experts": (2, 5), "fanout": (1, 3), "ranks": (3, 2), "activation": "prelu|0.1", "gate_dim": (3, 6)},
    "L3": {"experts": (3, 2, 4), "fanout": (2, 1, 3), "ranks": (1, 2, 1), "activation": "identity"},
}
CASES = {f"{gate}_{name}": SMoRE(**(SMALL | shape), gate=gate) for gate in smore.GATES for name, shape in TREES.items()}
CASES |= {
    "star_L2": SMoRE(**(SMALL | TREES["L2"]), variant="star", gate="noisy_topk"),
    "star_L3": SMoRE(**(SMALL | TREES["L3"] | {"activation": "tanh", "scale": (2.0, 1.0, 0.5)}), variant="star"),
    "child_L2_f1": SMoRE(**(SMALL | TREES["L2_f1"]), variant="child"),
    "child_L2": SMoRE(**(SMALL | TREES["L2"]), variant="child", gate="dense"),
    "child_L3": SMoRE(**(SMALL | TREES["L3"]), variant="child"),
    "shared_L3": SMoRE((3, 3, 3), (2, 1, 2), (2, 2, 2), activation="prelu", scale=(2.0, 1.0, 0.5), variant="shared", **SMALL),
    "tied": SMoRE((3,), (2,), (2,), activation="tanh", tied_down=True, scale=(0.5,), **SMALL),
}  # fmt: skip
"""Every variant, gate and activation, one to three layers."""


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_the_batched_form_equals_a_walk_through_each_tree(spec):
    params, x, mask = random_params(spec), tokens(7), np.arange(7) % 3 > 0
    delta, loss = run(params, x, spec, token_mask=mask)
    expected, expected_loss = walk(params, x, spec, mask)
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-4, atol=1e-7)


def aggregate(params, x, spec, routes, form):
    """delta along given routes, in float64 and on the released code's arrays: weights of each node gathered ("tree"),
    or outputs of all experts computed and then gathered ("subgraph")."""
    state = {name: np.asarray(leaf, np.float64) for name, leaf in smore.to_official(params, spec).items()}
    x, below = np.asarray(x, np.float64), None
    for layer, (index, alpha) in enumerate(zip(routes.indices, routes.scores, strict=True)):
        index, alpha = np.asarray(index), np.asarray(alpha)[..., None]
        a, a_bias, b, b_bias = (state[f"moe_{name}.{layer}"] for name in ("A", "A_bias", "B", "B_bias"))
        if form == "tree":
            h = np.einsum("n...rd,nd->n...r", a[index], x) + a_bias[index]
            own = np.einsum("n...dr,n...r->n...d", b[index], h) + b_bias[index]
        else:
            every = np.einsum("sdr,nsr->nsd", b, np.einsum("srd,nd->nsr", a, x) + a_bias) + b_bias
            own = np.take_along_axis(every, index.reshape(len(x), -1, 1), 1).reshape(*index.shape, -1)
        own = own * spec.scales[layer]
        act = sigma(spec, state.get(f"moe_expert_act_param.{layer}"))
        outside = spec.variant in ("full", "shared")
        if layer == 0:
            terms = alpha * (act(own) if outside else own)
        else:
            up = (below if outside else act(below)) @ state[f"moe_W.{layer}"].T + state[f"moe_W_bias.{layer}"]
            terms = alpha * act(own + up) if outside else alpha * own + (alpha if spec.variant == "star" else 1) * up
        below = terms.sum(-2)
    return below @ state["moe_W_final"].T + state["moe_W_final_bias"]


@pytest.mark.parametrize("name", ["switch_L3", "star_L2", "child_L2", "shared_L3", "tied"])
def test_tree_and_subgraph_evaluation_agree(name):
    """Invariant 8, both against each other and against `apply`."""
    spec, x = CASES[name], tokens(7)
    params = random_params(spec)
    (delta, _), routes = run_both(params, x, spec, None)
    tree_form, subgraph = (aggregate(params, x, spec, routes, form) for form in ("tree", "subgraph"))
    np.testing.assert_allclose(tree_form, subgraph, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(delta, subgraph, rtol=1e-4, atol=1e-4)


def grown(params, x, spec, indices, scores):
    """x_L of trees that are laid out by hand: entry l of both lists is [tokens, f_{L-1}, ..., f_l], as in `Routes`."""

    def choose(*_):
        choices = []
        for layer, (index, alpha) in enumerate(zip(indices, scores, strict=True)):
            s, f = spec.experts[layer], spec.children[layer]
            one_hot = index.T.reshape(f, -1, len(x)) == np.arange(s)[:, None, None, None]
            weights = (one_hot * alpha.T.reshape(f, -1, len(x))).sum(1)
            choices.append(routing.Choice(*(jnp.asarray(v, jnp.float32) for v in (one_hot, weights, 0))))
        return choices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregation, "choose", choose)
        own, token = compression.compress(params, x, spec)
        state, _ = jit(lambda own, token: aggregation.grow(params, own, token, None, None, spec=spec))(own, token)
    return np.asarray(state).T


# The start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", smore.VARIANTS)
@pytest.mark.parametrize("initialization", smore.INITIALIZATIONS)
def test_a_fresh_adapter_gives_exactly_zero_unless_normal(initialization, variant):
    spec = SMoRE(experts=(3, 3), fanout=(1, 2), ranks=(2, 2), initialization=initialization, variant=variant, **SMALL)
    params = smore.init(jax.random.key(0), 16, 12, spec)
    zero = {path for path, leaf in tree.flatten(params).items() if path.endswith("kernel") and not leaf.any()}
    ups = {f"experts/b/{pool}/kernel" for pool in spec.pools}
    proj = {"experts/proj/kernel"}
    assert zero == {"w_final_zero": proj, "eq_1_layer": proj, "b_zero": ups, "bw_zero": ups | {"experts/w/1/kernel"},
                    "normal": set()}[initialization]  # fmt: skip
    for dtype in (jnp.float32, jnp.bfloat16):
        x, frozen = tokens().astype(dtype), jnp.full((9, 12), 0.1, dtype)
        delta, _ = run(params, x, spec)
        assert delta.dtype == dtype
        same = np.asarray(frozen + delta).view(np.uint8) == np.asarray(frozen).view(np.uint8)
        assert same.all() == (initialization != "normal")


@pytest.mark.parametrize(("fields", "learning"), [
    ({"initialization": "w_final_zero"}, {"proj/kernel"}),
    ({"initialization": "b_zero"}, {"b/0/kernel", "b/1/kernel"}),
    ({"initialization": "b_zero", "activation": "relu"}, set()),
    ({"initialization": "b_zero", "activation": "relu", "variant": "star"}, {"b/1/kernel"}),
    ({"initialization": "bw_zero"}, {"b/1/kernel"}),
])  # fmt: skip
def test_which_kernels_learn_from_the_first_step(fields, learning):
    """As the fields' documentation says; sigma'(0) of relu is 0."""
    spec = SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), balance_weight=0.0, **(SMALL | fields))
    grads = tree.flatten(gradient(fresh(jax.random.key(0), 16, 12, spec), tokens(), spec)["experts"])
    assert {path for path, leaf in grads.items() if path.endswith("kernel") and leaf.any()} == learning


def test_the_random_parts_start_within_their_bounds():
    spec = SMoRE(experts=(4, 4), ranks=(4, 9), gate="noisy_topk", activation="prelu|0.1", gate_dim=16, router_dim=25)
    flat = jax.tree.map(np.asarray, tree.flatten(fresh(jax.random.key(0), 64, 12, spec)))
    bounds = {"experts/a/kernel": 1 / 8, "experts/b/0/kernel": 1 / 2, "experts/b/1/kernel": 1 / 3,
              "experts/w/1/kernel": 1 / 4, "router/down/kernel": 1 / 8, "router/down/bias": 1 / 8,
              "router/gate/1/hidden/kernel": 1 / 5,
              "router/gate/0/query/kernel": 1 / 4, "router/gate/0/query/bias": 1 / 4}  # fmt: skip
    for path, bound in bounds.items():
        assert 0.7 * bound < np.abs(flat[path]).max() <= bound, path
    assert flat["router/gate/0/keys"].min() >= 0 and 0.8 < flat["router/gate/0/keys"].max() < 1
    for path in flat:
        if path.endswith(("noise/kernel", "proj/kernel")) or (path.startswith("experts") and path.endswith("bias")):
            assert not flat[path].any(), path
    np.testing.assert_allclose(flat["experts/slope"], 0.1)


def test_eq_1_layer_copies():
    spec = SMoRE(experts=(2, 2), ranks=(2, 1), fanout=(1, 1), initialization="eq_1_layer")
    experts = fresh(jax.random.key(0), 16, 12, spec)["experts"]
    np.testing.assert_array_equal(experts["b"]["0"]["kernel"].reshape(4, 4), np.eye(4))
    np.testing.assert_array_equal(experts["b"]["1"]["kernel"].reshape(2, 6), np.eye(2, 6))
    np.testing.assert_array_equal(experts["w"]["1"]["kernel"], np.eye(6)[2:])
    shared = SMoRE(experts=(2, 2), ranks=(2, 2), fanout=(1, 1), variant="shared", initialization="eq_1_layer")
    experts = fresh(jax.random.key(0), 16, 12, shared)["experts"]
    assert experts["b"].keys() == {"0"} and experts["a"]["kernel"].shape == (16, 4)
    np.testing.assert_array_equal(experts["b"]["0"]["kernel"].reshape(4, 4), np.eye(4))
    np.testing.assert_array_equal(experts["w"]["1"]["kernel"], np.eye(4))


def test_it_starts_without_regard_to_kernel_and_scores():
    spec, key = SMoRE(experts=(2,), fanout=(1,), ranks=(2,), **SMALL), jax.random.key(0)
    given = spec.init(key, 16, 12, kernel=jnp.ones((16, 12)), scores=jnp.ones(16))
    jax.tree.map(np.testing.assert_array_equal, given, fresh(key, 16, 12, spec))


# What it contains as special cases ------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [
    adapters.MixLoRA(experts=4, rank=3, **SMALL),
    adapters.MixLoRA(experts=4, fanout=1, rank=2, gate="noisy_topk", scale=(2.0,), **SMALL),
    adapters.HydraLoRA(rank=3, **SMALL),
    adapters.HydraLoRA(rank=3, tied_down=False, **SMALL),
])  # fmt: skip
def test_one_layer_with_identity_is_a_mixture_of_loras(spec):
    """Invariant 2: sum_e alpha_e W_proj (B_e (A_e x + a_e) + b_e), with one A for all of HydraLoRA's heads."""
    params, x = random_params(spec), tokens()
    (delta, aux), routes = run_both(params, x, spec, None)
    indices, scores = (np.asarray(part[0]) for part in routes)
    e, r = tree.flatten(params["experts"]), spec.ranks[0]
    assert e["a/kernel"].shape == (16, r if spec.tied_down else 4 * r)
    expected = np.tile(e["proj/bias"], (len(x), 1))
    for n, token in enumerate(np.asarray(x)):
        for expert, alpha in zip(indices[n], scores[n], strict=True):
            own = slice(r) if spec.tied_down else slice(r * expert, r * expert + r)
            h = token @ e["a/kernel"][:, own] + e["a/bias"][own]
            up = spec.scales[0] * (h @ e["b/0/kernel"][expert] + e["b/0/bias"][expert])
            expected[n] += alpha * up @ e["proj/kernel"]
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)
    assert spec.has_loss == (spec.gate != "dense") and (spec.has_loss or float(aux) == 0)


def test_one_expert_is_plain_lora():
    spec = SMoRE(experts=(1,), fanout=(1,), ranks=(4,), activation="identity", gate="dense", **SMALL)
    params, x = random_params(spec), tokens()
    params["experts"] = jax.tree.map_with_path(
        lambda path, leaf: leaf * 0 if path[-1].key == "bias" else leaf, params["experts"]
    )
    e = params["experts"]
    lora = x @ e["a"]["kernel"] @ (e["b"]["0"]["kernel"][0] @ e["proj"]["kernel"])
    np.testing.assert_allclose(run(params, x, spec)[0], lora, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [1, 3])
def test_copying_layers_with_identity_are_a_flat_mixture_of_all_orders(layers):
    """Propositions 3.1 (one layer: any mixture of LoRAs) and 3.2; invariant 4: eq. 2 with weights summed over paths,
    W_proj holding the top layer's columns first."""
    shape = {"experts": (3, 4, 2)[:layers], "fanout": (2,) * layers, "ranks": (2, 1, 3)[:layers]}
    spec = SMoRE(**shape, activation="identity", initialization="eq_1_layer", **SMALL)
    params, x = fresh(jax.random.key(0), 16, 12, spec), tokens()
    rng = np.random.default_rng(0)
    ups = [rng.normal(size=(s, r, 12)).astype(np.float32) for s, r in zip(spec.experts, spec.ranks, strict=True)]
    params["experts"]["proj"]["kernel"] = jnp.concatenate([up.reshape(-1, 12) for up in reversed(ups)])
    indices, scores = jax.tree.map(np.asarray, run_route(params, x, spec))
    a, start = np.asarray(params["experts"]["a"]["kernel"]), np.cumsum([0, *spec.sizes])
    expected = np.zeros((len(x), 12))
    for n, token in enumerate(np.asarray(x)):
        for layer, r in enumerate(spec.ranks):
            weights = np.zeros(spec.experts[layer])
            for path in itertools.product(range(2), repeat=spec.layers - layer):  # slots, from the root down
                alphas = [scores[spec.layers - 1 - depth][(n, *path[: depth + 1])] for depth in range(len(path))]
                weights[indices[layer][(n, *path)]] += math.prod(alphas)
            for expert, weight in enumerate(weights):
                own = slice(start[layer] + expert * r, start[layer] + (expert + 1) * r)
                expected[n] += weight * token @ a[:, own] @ ups[layer][expert]
    np.testing.assert_allclose(run(params, x, spec)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", ["tanh", "prelu"])
def test_one_pool_is_a_general_adapter_with_copied_experts(activation):
    """Invariant 8: S'MoRE# within widths that grow, the channels beyond s r being zero in all layers."""
    shape = {"experts": (3, 3, 3), "fanout": (2, 1, 2), "ranks": (2, 2, 2), "activation": activation, **SMALL}
    shared, general = SMoRE(**shape, variant="shared"), SMoRE(**shape)
    params, x = random_params(shared), tokens()
    wider = jax.tree.map(np.array, random_params(general))
    wider["router"] = params["router"]
    own, new = params["experts"], wider["experts"]
    new["a"] = jax.tree.map(lambda leaf: np.concatenate([leaf] * 3, -1), own["a"])
    for layer in range(3):
        parts = [(new["b"][str(layer)], own["b"]["0"])] + (
            [(new["w"][str(layer)], own["w"][str(layer)])] if layer else []
        )
        for target, source in parts:
            for name in ("kernel", "bias"):
                target[name][...] = 0
                target[name][tuple(slice(size) for size in source[name].shape)] = source[name]
    new["proj"]["kernel"][...] = 0
    new["proj"]["kernel"][:6], new["proj"]["bias"] = own["proj"]["kernel"], own["proj"]["bias"]
    if activation == "prelu":
        new["slope"] = own["slope"]
    (delta, aux), (expected, expected_aux) = run(params, x, shared), run(jax.tree.map(jnp.asarray, wider), x, general)
    np.testing.assert_allclose(delta, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(aux, expected_aux, rtol=1e-6)


# Laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["switch_L3", "star_L3", "child_L3", "shared_L3"])
def test_the_order_of_children_does_not_matter(name):
    """Invariant 6: every node's children, with their weights and the trees below them, in another order."""
    spec, rng, x = CASES[name], np.random.default_rng(0), tokens(6)
    shapes = [(len(x), *spec.children[layer:][::-1]) for layer in range(3)]
    indices = [rng.random((*shape[:-1], s)).argsort(-1)[..., : shape[-1]]
               for shape, s in zip(shapes, spec.experts, strict=True)]  # fmt: skip
    scores = [rng.random(shape) for shape in shapes]
    params = random_params(spec)
    expected = grown(params, x, spec, indices, scores)
    for axis in (1, 2, 3):
        order = rng.random(shapes[3 - axis]).argsort(-1)
        for arrays in (indices, scores):
            for layer in range(3 - axis + 1):
                arrays[layer] = np.take_along_axis(
                    arrays[layer], order.reshape(*order.shape, *(1,) * (arrays[layer].ndim - order.ndim)), axis
                )
    np.testing.assert_allclose(grown(params, x, spec, indices, scores), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", smore.GATES)
def test_the_order_of_experts_does_not_matter(gate):
    """Invariant 7: experts permuted in A, B and keys; a node's children then come in another order, too."""
    spec = SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), gate=gate, **SMALL)
    params, x = random_params(spec), tokens()
    official = smore.to_official(params, spec)
    for layer, order in enumerate(([2, 0, 1], [3, 1, 0, 2])):
        for name in official:
            gates = (f"moe_gate.{layer}.keys", f"moe_gate.{layer}.weight_noise.weight")
            if name in gates or (name.startswith(("moe_A", "moe_B")) and name.endswith(f".{layer}")):
                official[name] = official[name][jnp.array(order)]
    permuted = smore.from_official(official, spec)
    for one, other in zip(run(params, x, spec), run(permuted, x, spec), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def gradient(params, x, spec, compile=jit, **options):
    """Of a random functional of delta, and of the loss."""
    g = tokens(x.shape[0], 12, seed=5)
    both = lambda p: (lambda delta, aux: (delta * g).sum() + aux)(*smore.apply(p, x, spec, **options))
    return compile(jax.grad(both))(params)


def test_gradients_reach_all_dense_experts_and_only_selected_sparse_ones():
    dense = SMoRE(experts=(3, 4), ranks=(2, 3), gate="dense", **SMALL)
    grads = tree.flatten(gradient(random_params(dense), tokens(1), dense))
    assert float(run(random_params(dense), tokens(1), dense)[1]) == 0
    for layer in (0, 1):
        per_expert = np.abs(grads[f"experts/b/{layer}/kernel"]).max((1, 2))
        assert (per_expert > 0).all()

    spec = SMoRE(experts=(3, 4), fanout=(1, 2), ranks=(2, 3), **SMALL)
    params, x = random_params(spec), tokens(1)
    routes = run_route(params, x, spec)
    grads = jax.tree.map(np.asarray, smore.to_official(gradient(params, x, spec), spec))
    for layer in (0, 1):
        selected = set(np.asarray(routes.indices[layer]).ravel().tolist())
        for name in (f"moe_A.{layer}", f"moe_B.{layer}", f"moe_A_bias.{layer}", f"moe_B_bias.{layer}"):
            moved = np.abs(grads[name]).reshape(len(grads[name]), -1).max(1) > 0
            assert set(np.flatnonzero(moved).tolist()) == selected, name


def test_a_single_child_trains_the_switch_router():
    """Invariant 15: with fanout 1 the raw probability is kept, and it has a gradient without the loss, too."""
    spec = SMoRE(experts=(3, 4), fanout=(1, 1), ranks=(2, 3), balance_weight=0.0, **SMALL)
    grads = tree.flatten(gradient(random_params(spec), tokens(), spec))
    assert all(float(jnp.abs(grads[path]).max()) > 1e-6 for path in grads if path.startswith("router"))


@pytest.mark.parametrize("name", ["switch_L3", "star_L3", "child_L2", "shared_L3", "tied"])
def test_the_gradient_is_that_of_finite_differences(name):
    """In float64, where routing stays fixed in a small enough neighbourhood."""
    with jax.enable_x64(True):
        spec = CASES[name]
        params, direction = (
            jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), random_params(spec, seed=seed)) for seed in (0, 7)
        )
        x, dx, g = (np.asarray(tokens(4, width, seed), np.float64) for width, seed in ((16, 1), (16, 8), (12, 5)))
        both = jit(jax.value_and_grad(lambda p, x: (smore.apply(p, x, spec)[0] * g).sum(), (0, 1)))
        move = lambda t: (jax.tree.map(lambda a, b: a + t * b, params, direction), x + t * dx)
        slope = (both(*move(1e-6))[0] - both(*move(-1e-6))[0]) / 2e-6
        _, grads = both(params, x)
        along = [np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (grads, (direction, dx))), strict=True)]
        np.testing.assert_allclose(sum(along), slope, rtol=1e-4)


# The losses -----------------------------------------------------------------------------------------------------


def test_the_switch_loss_is_fanout_when_balanced_and_more_when_collapsed():
    """Invariant 11, on the gate itself: gamma * f is the least."""
    balanced = jnp.log(jnp.array([[0.4, 0.4, 0.1, 0.1], [0.1, 0.1, 0.4, 0.4]], jnp.float32)).T[:, None]
    collapsed = jnp.broadcast_to(balanced[..., :1], balanced.shape)
    loss = jit(lambda logits: routing.switch_gate(logits, 2, None).loss)
    assert float(loss(balanced)) == pytest.approx(2.0)
    assert float(loss(collapsed)) == pytest.approx(4 * 2 * 0.4)


def test_noise_is_for_training_only_and_has_the_stated_width():
    """Invariant 12: without W_noise the logits' noise has std softplus(0) + 0.01."""
    spec = SMoRE(experts=(4,), fanout=(1,), ranks=(2,), gate="noisy_topk", **SMALL)
    params, x = fresh(jax.random.key(0), 16, 12, spec), jnp.tile(tokens(1), (4000, 1))
    quiet, again = run_route(params, x, spec), run_route(params, x, spec)
    jax.tree.map(np.testing.assert_array_equal, quiet, again)
    key = jax.random.key(1)
    noisy = run_route(params, x, spec, key=key)
    assert len(np.unique(noisy.indices[0])) == 4 and len(np.unique(quiet.indices[0])) == 1

    logits = jnp.zeros((3, 1, 5000), jnp.float32)
    kept = routing.noisy_gate(logits, jnp.zeros_like(logits), 1, None, key).weights.sum(0)  # largest of three normals
    draws = np.random.default_rng(0).normal(size=(200_000, 3)).max(1)
    assert float(kept.std()) == pytest.approx((math.log(2) + 0.01) * draws.std(), rel=0.05)
    assert float(kept.mean()) == pytest.approx((math.log(2) + 0.01) * draws.mean(), rel=0.05)


def test_the_noisy_loss_while_training():
    """Shazeer et al.'s smooth load, recomputed from the same noise."""
    rng = np.random.default_rng(0)
    clean, raw = (jnp.asarray(rng.normal(size=(4, 2, 5)), jnp.float32) for _ in range(2))
    key, mask = jax.random.key(3), np.array([True, True, False, True, True])
    choice = jit(lambda clean, raw, mask, key: routing.noisy_gate(clean, raw, 2, mask, key))(clean, raw, mask, key)
    std = np.log1p(np.exp(raw)) + 0.01
    noisy = np.asarray(clean + std * jax.random.normal(key, clean.shape, clean.dtype))
    importance, load = np.zeros(4), np.zeros(4)
    for parent, token in itertools.product(range(2), np.flatnonzero(mask)):
        row = noisy[:, parent, token]
        order = np.argsort(-row)
        importance[order[:2]] += np.exp(row[order[:2]]) / np.exp(row[order[:2]]).sum()
        for e in range(4):
            bar = row[order[2]] if e in order[:2] else row[order[1]]
            z = (float(clean[e, parent, token]) - bar) / std[e, parent, token]
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = sum(v.var(ddof=1) / v.mean() ** 2 for v in (importance, load))
    assert float(choice.loss) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("gate", "training"), [("switch", False), ("noisy_topk", True)])
def test_padding_changes_neither_loss_nor_its_gradient_and_no_token_gives_zero(gate, training):
    spec = SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), gate=gate, **SMALL)
    params, x = random_params(spec), tokens(6)
    key = jax.random.key(0) if training else None
    mask = np.array([True, True, False, True, False, True])
    other = x.at[jnp.array([2, 4])].set(7.0)  # what stands at padded places
    loss = jit(jax.value_and_grad(lambda p, x, m: smore.apply(p, x, spec, token_mask=m, key=key)[1]))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, loss(params, x, mask), loss(params, other, mask))
    if not training:  # noise is drawn by shape
        short, full = run(params, x[mask], spec), run(params, x, spec, token_mask=mask)
        np.testing.assert_allclose(short[1], full[1], rtol=1e-5)
        np.testing.assert_allclose(short[0], full[0][mask], rtol=1e-4, atol=1e-5)
    value, grads = loss(params, x, np.zeros(6, bool))
    assert float(value) == 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


# Shapes, dtypes, transformations --------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", smore.GATES)
def test_three_layers_have_the_stated_shapes(gate):
    spec = SMoRE(experts=(3, 4, 5), fanout=(2, 3, 4), ranks=(1, 1, 1), gate=gate, gate_dim=(4, 6, 7), router_dim=5)
    params = random_params(spec)
    assert spec.context_dims == (5 + 7 + 6, 5 + 7, 5)
    assert [params["router"]["gate"][str(layer)]["hidden"]["kernel"].shape[0] for layer in range(3)] == [18, 12, 5]
    routes = run_route(params, tokens(3), spec)
    f = spec.children
    assert [r.shape for r in routes.indices] == [(3, f[2], f[1], f[0]), (3, f[2], f[1]), (3, f[2])]
    assert [r.shape for r in routes.scores] == [r.shape for r in routes.indices]
    for layer in range(3):  # the children of one parent are distinct
        ordered = np.sort(routes.indices[layer], -1)
        assert (np.diff(ordered, axis=-1) > 0).all()


def test_equal_logits_pick_the_first_experts():
    logits = jnp.array([1.0, 3.0, 3.0, 1.0, 3.0], jnp.float32)[:, None, None]
    np.testing.assert_array_equal(routing.rank_of(logits)[:, 0, 0], [3, 0, 1, 4, 2])


@pytest.mark.parametrize("name", ["switch_L3", "star_L2", "child_L2", "shared_L3", "tied"])
def test_bfloat16_inputs_route_in_float32(name):
    spec = CASES[name]
    params, x = random_params(spec), tokens().astype(jnp.bfloat16)
    (delta, aux), routes = run_both(params, x, spec, None)
    (wide, wide_aux), wide_routes = run_both(params, x.astype(jnp.float32), spec, None)
    assert (delta.dtype, aux.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(aux, wide_aux, rtol=1e-5)
    np.testing.assert_allclose(np.asarray(delta, np.float32), wide, atol=0.03 * np.abs(wide).max())
    jax.tree.map(np.testing.assert_array_equal, routes.indices, wide_routes.indices)


def test_a_bfloat16_token_is_compressed_by_one_product():
    """Exact in x, within bfloat16 for experts and far within it for the router; two products for the gradients."""
    spec = CASES["star_L2"]
    params, x = random_params(spec), tokens(40).astype(jnp.bfloat16)
    compress = lambda params, x: (jnp.concatenate((got := compression.compress(params, x, spec))[0]), got[1])
    (own, token), back = jax.vjp(compress, params, x)
    a, down = (
        {n: np.float64(leaf) for n, leaf in p.items()} for p in (params["experts"]["a"], params["router"]["down"])
    )
    wide = np.float64(x)
    near = lambda got, want, bits: np.testing.assert_allclose(
        np.float64(got), want, rtol=2.0**-bits, atol=2.0**-bits * np.abs(want).max()
    )
    near(own, (wide @ a["kernel"] + a["bias"]).T, 6)
    near(token, (wide @ down["kernel"] + down["bias"]).T, 14)

    rng = np.random.default_rng(2)
    of_own = jnp.asarray(rng.normal(size=own.shape), jnp.bfloat16)
    of_token = jnp.asarray(rng.normal(size=token.shape), jnp.float32)
    d_params, d_x = back((of_own, of_token))
    near(d_x, (a["kernel"] @ np.float64(of_own) + down["kernel"] @ np.float64(of_token)).T, 6)
    near(
        d_params["experts"]["a"]["kernel"], wide.T @ np.float64(of_own).T, 20
    )  # products of bfloat16, summed in float32
    near(d_params["router"]["down"]["kernel"], wide.T @ np.float64(of_token).T, 14)
    products = lambda f, *arguments: str(jax.make_jaxpr(f)(*arguments)).count(" dot_general[")
    assert products(compress, params, x) == 1
    assert products(lambda params, x: jax.vjp(compress, params, x)[1]((of_own, of_token)), params, x) == 3


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["switch_L3", "child_L2"])
def test_gradients_through_the_tpu_kernel(name, dtype):
    """The last product's backward pass interpreted: all gradients are those of the other implementation."""
    spec = CASES[name]
    params, x = random_params(spec), tokens().astype(dtype)

    def loss(params, x, implementation):
        delta, aux = smore.apply(params, x, spec, implementation=implementation)
        return (delta.astype(jnp.float32) ** 2).sum() + aux

    gradients = jit(jax.grad(loss, (0, 1)), static_argnums=2)
    got, want = (gradients(params, x, implementation) for implementation in ("pallas_tpu", "xla"))
    scale = 1e-5 if dtype == jnp.float32 else 2.0**-6
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        one, other = np.float32(one), np.float32(other)
        np.testing.assert_allclose(one, other, rtol=scale, atol=scale * max(1.0, np.abs(other).max()))


def test_vmap_scan_and_checkpoint_over_stacked_layers_agree():
    spec = SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), **SMALL)
    parts = [random_params(spec, 16, 16, seed) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *jax.tree.map(np.asarray, parts))
    x = tokens()

    def layer(x, params):
        delta, aux = smore.apply(params, x, spec)
        return jnp.tanh(x + delta), aux

    def scanned(stacked):
        y, losses = jax.lax.scan(jax.checkpoint(layer), x, stacked)
        return (y**2).sum() + losses.sum()

    def unrolled(stacked):
        y, total = x, 0.0
        for index in range(2):
            y, aux = layer(y, jax.tree.map(lambda leaf, i=index: leaf[i], stacked))
            total += aux
        return (y**2).sum() + total

    def each(stacked):
        return jax.vmap(lambda params: smore.apply(params, x, spec))(stacked)

    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, *(jit(jax.value_and_grad(f))(stacked) for f in (scanned, unrolled)))
    mapped = jit(each)(stacked)
    for index, params in enumerate(parts):
        jax.tree.map(close, jax.tree.map(lambda out, i=index: out[i], mapped), run(params, x, spec))


def test_a_real_size_trains_on_this_backend():
    """Forward and backward at a width and a length where a compiler's fused reductions have crashed before."""
    spec = SMoRE(router_dim=16, gate_dim=16)
    params, x = random_params(spec, 192, 12), tokens(512, 192)
    grads = gradient(params, x, spec, jax.jit, token_mask=np.arange(512) < 500)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(grads))


def test_delta_takes_any_number_of_axes():
    spec = SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), **SMALL)
    params, x, mask = random_params(spec), tokens(6), np.arange(6) < 4
    flat, aux = run(params, x, spec, token_mask=mask)
    delta, same = jit(lambda p, x, m: spec.delta(p, x, token_mask=m))(params, x.reshape(2, 3, 16), mask.reshape(2, 3))
    np.testing.assert_allclose(delta.reshape(6, 12), flat, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(same, aux, rtol=1e-6)


# Configuration --------------------------------------------------------------------------------------------------


def test_lists_become_tuples_and_the_dense_gate_ignores_fanout():
    spec = SMoRE(experts=[3, 4], fanout=[2, 2], ranks=[2, 3], gate_dim=[4, 5], scale=[1.0, 2.0])
    assert spec == SMoRE(experts=(3, 4), fanout=(2, 2), ranks=(2, 3), gate_dim=(4, 5), scale=(1.0, 2.0))
    assert isinstance(hash(spec), int)
    assert SMoRE(experts=(5,), ranks=(2,), gate="dense").children == (5,)
    assert (SMoRE().has_loss, SMoRE().needs_key, SMoRE().token_dependent) == (True, False, True)
    assert not SMoRE(gate="dense").has_loss and SMoRE(gate="noisy_topk").needs_key


@pytest.mark.parametrize(("fields", "message"), [
    ({"gate": "swich"}, r"gate='swich'.*did you mean 'switch'"),
    ({"activation": "thanh"}, r"activation='thanh'.*did you mean 'tanh'"),
    ({"activation": "prelu|x"}, r"like \"prelu\|0.25\""),
    ({"activation": "tanh|0.1"}, r"only \"prelu\" takes a number"),
    ({"gate_activation": "gelu"}, r"gate_activation='gelu'"),
    ({"initialization": "w_final_zeros"}, r"did you mean 'w_final_zero'"),
    ({"variant": "fulll"}, r"did you mean 'full'"),
    ({"variant": "shared", "ranks": (2, 4)}, r"one pool .* ranks=\(2, 4\) differ"),
    ({"variant": "shared", "experts": (2, 4)}, r"experts=\(2, 4\) and"),
    ({"tied_down": True}, r"tied_down=True is for one layer, but experts=\(4, 4\) has 2"),
    ({"ranks": (8,)}, r"ranks=\(8,\) has 1 entries but experts=\(4, 4\) has 2"),
    ({"scale": (1.0,)}, r"scale=\(1.0,\) has 1 entries"),
    ({"gate_dim": (8, 8, 8)}, r"gate_dim=\(8, 8, 8\) has 3 entries"),
    ({"fanout": (2, 5)}, r"fanout=\(2, 5\) exceeds experts=\(4, 4\)"),
    ({"experts": ()}, r"experts=\(\) must be"),
    ({"ranks": (8, 0)}, r"ranks=\(8, 0\) must be"),
    ({"router_dim": 0}, r"router_dim=0 must be"),
    ({"balance_weight": -1.0}, r"balance_weight=-1.0"),
])  # fmt: skip
def test_wrong_fields_are_refused_with_the_way_out(fields, message):
    with pytest.raises(ValueError, match=message):
        SMoRE(**fields)


def test_noisy_training_needs_an_expert_left_out_but_inference_does_not():
    spec = SMoRE(experts=(2,), fanout=(2,), ranks=(2,), gate="noisy_topk", **SMALL)
    params = random_params(spec)
    assert run(params, tokens(), spec)[0].shape == (9, 12)
    with pytest.raises(ValueError, match="fanout=2 picks every expert"):
        smore.apply(params, tokens(), spec, key=jax.random.key(0))


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="cannot be merged"):
        SMoRE().merge({}, jnp.ones((2, 2)))
