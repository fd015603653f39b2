"""S'MoRE against the released code: its numbers, its arrays and its files."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxmethods import adapters, models
from jaxmethods.adapters import SMoRE, smore
from tests.adapters.test_smore import SMALL, random_params, run_both
from tests.adapters.test_smore_counts import distinct

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "smore"
GOLDEN = {path.stem: path for path in sorted(FOLDER.glob("*.npz"))}
WHOLE = FOLDER / "whole_model"


def golden(name):
    z = np.load(GOLDEN[name])
    spec = SMoRE(**json.loads(str(z["spec"])))
    return z, spec, {name[6:]: z[name] for name in z.files if name.startswith("state/")}


# One linear map -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_the_released_codes_outputs_losses_and_routes(name):
    z, spec, state = golden(name)
    params = smore.from_official(state, spec)
    (delta, aux), routes = run_both(params, z["x"], spec, z["mask"])
    np.testing.assert_allclose(delta, z["delta"], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(aux, z["aux"], atol=1e-6)
    for layer in range(spec.layers):
        indices, expected = np.asarray(routes.indices[layer]), z[f"route/indices.{layer}"]
        assert indices.shape == expected.shape == (len(z["x"]), *spec.children[layer:][::-1])
        if "distinct" not in z.files:  # there all scores are equal, and the order of children means nothing
            np.testing.assert_array_equal(indices, expected)
        np.testing.assert_allclose(routes.scores[layer], z[f"route/scores.{layer}"], atol=1e-5)
    if "distinct" in z.files:  # invariant 5 for s = (3, 4), f = (2, 2), routed by x: one token for each of the 54 trees
        count = 36 if spec.activation == "identity" else smore.count_structures((3, 4), (2, 2), spec.variant)
        assert distinct(np.asarray(delta)) == int(z["distinct"]) == count


def test_the_golden_cases_are_all_there():
    assert len(GOLDEN) == 43


@pytest.mark.parametrize("name", ["L3_noisy_prelu_full", "L2_switch_relu_star", "shared3_noisy_tanh"])
def test_official_weights_go_there_and_back(name):
    _, spec, state = golden(name)
    back = smore.to_official(smore.from_official(state, spec), spec)
    assert back.keys() == state.keys()
    jax.tree.map(np.testing.assert_array_equal, back, state)
    live = {name.replace(".", ".default.", 1) if "." in name else name + ".default": x for name, x in state.items()}
    jax.tree.map(np.testing.assert_array_equal, smore.from_official(live, spec), smore.from_official(state, spec))


def test_a_tied_down_projection_is_written_once_for_each_expert():
    spec = adapters.HydraLoRA(rank=3, **SMALL)
    params = random_params(spec)
    state = smore.to_official(params, spec)
    assert state["moe_A.0"].shape == (4, 3, 16)
    jax.tree.map(np.testing.assert_array_equal, smore.from_official(state, spec), params)
    untied = adapters.HydraLoRA(rank=3, tied_down=False, **SMALL)
    x = np.ones((2, 16), np.float32)
    outputs = [run_both(p, x, s, None)[0][0] for p, s in ((params, spec), (smore.from_official(state, untied), untied))]
    np.testing.assert_allclose(*outputs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"'moe_A\.0' differs between experts"):
        smore.from_official(state | {"moe_A.0": state["moe_A.0"].at[1].add(1)}, spec)


def test_official_weights_that_do_not_fit_are_refused():
    _, spec, state = golden("L2_switch_tanh_full")
    with pytest.raises(ValueError, match=r"lacks 'moe_W\.1'"):
        smore.from_official({k: v for k, v in state.items() if k != "moe_W.1"}, spec)
    with pytest.raises(ValueError, match=r"holds 'moe_gate\.0\.mlp\.1\.weight'"):
        smore.from_official(state | {"moe_gate.0.mlp.1.weight": np.ones(1)}, spec)
    with pytest.raises(ValueError, match=r"'moe_A\.1' has shape"):
        smore.from_official(state | {"moe_A.1": np.ones((4, 2, 24))}, spec)
    _, spec, state = golden("shared2_switch_tanh")
    with pytest.raises(ValueError, match=r"'moe_B\.1' differs from 'moe_B\.0'"):
        smore.from_official(state | {"moe_B.1": state["moe_B.1"] + 1}, spec)


# A checkpoint of a whole model ----------------------------------------------------------------------------------


def checkpoint():
    config = json.loads((WHOLE / "adapter" / "adapter_config.json").read_text())
    return config, load_file(WHOLE / "adapter" / "adapter_model.safetensors")


def shapes_of(state):
    return {name: array.shape for name, array in state.items()}


def test_a_released_checkpoint_gives_its_logits_and_loss():
    config, arrays = checkpoint()
    states = smore.split_state(arrays)
    names = [f"model.layers.{i}.mlp.{name}" for i in range(2) for name in ("down_proj", "gate_proj", "up_proj")]
    assert sorted(states) == names
    specs = {smore.spec_from_config(config, shapes_of(state)) for state in states.values()}
    assert specs == {SMoRE((3, 4), (2, 2), (2, 3), gate_dim=8, router_dim=6)}
    (spec,) = specs

    z = np.load(WHOLE / "arrays.npz")
    module, params = models.load(WHOLE / "base")
    tokens, mask = jnp.asarray(z["tokens"]), jnp.asarray(z["mask"])
    close = lambda actual, key: np.testing.assert_allclose(actual[z["mask"]], z[key][z["mask"]], rtol=1e-4, atol=2e-5)
    close(np.asarray(models.logits(module, params, tokens, mask)), "base_logits")
    for name in ("down_proj", "gate_proj", "up_proj"):
        layers = [smore.from_official(states[f"model.layers.{i}.mlp.{name}"], spec) for i in range(2)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        params["model"]["layers"]["mlp"][name]["adapter"] = {"smore": stacked}
    adapted = adapters.attach(module, {"mlp/(gate|up|down)_proj": spec})
    hidden, aux = models.hidden_states(adapted, params, tokens, mask)
    close(np.asarray(models.logits_of(adapted, params, hidden)), "logits")
    np.testing.assert_allclose(aux, z["aux"], rtol=1e-5)


def test_a_checkpoint_goes_there_and_back():
    config, arrays = checkpoint()
    states = smore.split_state(arrays)
    spec = smore.spec_from_config(config, shapes_of(states["model.layers.0.mlp.up_proj"]))
    assert smore.config_from_spec(spec, config["target_modules"]) == config
    back = smore.join_state({
        path: smore.to_official(smore.from_official(state, spec), spec) for path, state in states.items()
    })  # fmt: skip
    assert back.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, back, arrays)


@pytest.mark.parametrize("spec", [
    SMoRE((3, 4), (2, 2), (2, 3), gate="noisy_topk", gate_dim=(4, 6), activation="prelu|0.1", scale=(0.5, 2.0)),
    SMoRE((3, 4), (3, 4), (2, 3), gate="dense", variant="star", initialization="eq_1_layer", balance_weight=0.1),
    SMoRE((4, 4), (2, 1), (3, 3), variant="shared", initialization="b_zero", gate_activation="tanh"),
    SMoRE(variant="child", initialization="normal"),
    adapters.MixLoRA(initialization="bw_zero"),
])  # fmt: skip
def test_configs_go_there_and_back(spec):
    config = json.loads(json.dumps(smore.config_from_spec(spec, ["up_proj"])))
    assert smore.spec_from_config(config, {}) == spec


def test_a_router_without_a_width_has_the_maps_own():
    """dim_downproj_x <= 0 means a square map in the released code."""
    config, arrays = checkpoint()
    for path, state in smore.split_state(arrays).items():
        width = 20 if "down_proj" in path else 24
        assert smore.spec_from_config(config | {"dim_downproj_x": 0}, shapes_of(state)).router_dim == width


def test_a_noisy_gate_is_an_mlp_whatever_the_config_says():
    config, _ = checkpoint()
    noisy = config | {"gate_type": "noisy_topk"}
    assert smore.spec_from_config(noisy | {"gate_arch": "linear"}, {}) == smore.spec_from_config(noisy, {})


@pytest.mark.parametrize(("fields", "message"), [
    ({"peft_type": "LORA"}, "peft_type='LORA' is unknown.*HIER_MOE"),
    ({"moe_arch": "llama_moe"}, "moe_arch='llama_moe'"),
    ({"activation_position": "child_v2", "is_shared_expert_pool": True}, "'child_v2' with is_shared_expert_pool=True"),
    ({"activation_position": "child", "is_shared_expert_pool": True}, "'child' with is_shared_expert_pool=True"),
    ({"gate_arch": "linear"}, "gate_arch='linear'"),
    ({"gate_arch": "bottom_up", "gate_type": "noisy_topk"}, "gate_arch='bottom_up'"),
    ({"gate_act_fn": "prelu|0.25"}, "gate_act_fn='prelu"),
    ({"num_active": [2, 5]}, r"fanout=\(2, 5\) exceeds"),
    ({"gate_dims": [8]}, r"gate_dim=\(8,\) has 1 entries"),
    ({"lora_alpha": [8.0]}, r"lora_alpha=\[8.0\] has 1 entries"),
])  # fmt: skip
def test_configs_of_what_is_not_here_are_refused(fields, message):
    config, _ = checkpoint()
    with pytest.raises(ValueError, match=message):
        smore.spec_from_config(config | fields, {})


def test_configs_and_checkpoints_that_are_not_complete_are_refused():
    config, _ = checkpoint()
    with pytest.raises(ValueError, match="lacks num_experts, gate_type"):
        smore.spec_from_config({k: v for k, v in config.items() if k not in ("num_experts", "gate_type")}, {})
    with pytest.raises(ValueError, match=r"'base_model.model.lm_head.weight' is not an array of a S'MoRE adapter"):
        smore.split_state({"base_model.model.lm_head.weight": 0})
