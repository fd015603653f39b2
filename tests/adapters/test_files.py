"""Adapters in files: what is written is read, in PEFT's layout and in our own; what is of another base is refused."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmethods import adapters, models, tree
from jaxmethods.adapters import S2FT, DoRA, LoRA, MixLoRA, SMoRE, s2ft
from tests import tiny

OFFICIAL = pathlib.Path(__file__).parents[1] / "golden" / "smore" / "whole_model"
SMALL = {"gate_dim": 4, "router_dim": 5}
KINDS = {
    "lora": {"q_proj|up_proj": LoRA(rank=3, alpha=7.0), "down_proj": LoRA(rank=5, dropout=0.1)},
    "rslora": {"o_proj": LoRA(rank=4, rslora=True)},
    "dora": {"q_proj": DoRA(rank=2), "o_proj": DoRA(rank=3, alpha=1.0)},
    "s2ft": {"up_proj": S2FT(count=5, side="out"), "down_proj": S2FT(count=7), "o_proj": S2FT(count=1, unit="head")},
    "s2ft_global": {"down_proj": S2FT(fraction=0.1, budget="global")},
    "smore": {"mlp": SMoRE(experts=(3, 2), fanout=(2, 1), ranks=(1, 2), activation="prelu", **SMALL)},
    "shared": {"up_proj": SMoRE(experts=(3, 3), fanout=(2, 2), ranks=(2, 2), variant="shared", gate="noisy_topk", **SMALL)},
    "mixlora": {"up_proj": MixLoRA(experts=3, fanout=2, rank=2)},
}  # fmt: skip
each = pytest.mark.parametrize("pairs", KINDS.values(), ids=KINDS)


attached = tiny.adapted


def logits(module, params):
    rows = tiny.batch(2)
    return models.logits(module, params, rows["tokens"], rows["segment_ids"] > 0)


@each
def test_peft_folders_come_back(pairs, tmp_path):
    module, base, adapted, params = attached(pairs)
    adapters.save_peft(tmp_path / "a", adapted, params, base_model="some/model", revision="main")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some/model", "main")
    again, read = adapters.load_peft(tmp_path / "a", module, base)
    np.testing.assert_allclose(logits(again, read), logits(adapted, params), atol=2e-5)
    if "s2ft" not in next(iter(pairs.values())).kind:  # these come back as the LoRA that they are
        jax.tree.map(np.testing.assert_array_equal, read, params)
        for pattern, adapter in again.adapters:
            assert pattern.startswith("^(model/layers/") and adapter.kind == next(iter(pairs.values())).kind
    names = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert not any(name.endswith("kernel") or ".base" in name for name in names)
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


@each
def test_our_own_files_come_back_to_the_bit(pairs, tmp_path):
    module, base, adapted, params = attached(pairs)
    adapters.save(tmp_path / "a", adapted, params, base_model="some/model")
    again, read = adapters.load(tmp_path / "a", module, base)
    assert again == adapted
    jax.tree.map(np.testing.assert_array_equal, read, params)
    assert jax.tree.structure(read) == jax.tree.structure(params)


def test_the_compact_form_of_s2ft_is_half_its_lora(tmp_path):
    _, _, adapted, params = attached({"down_proj": S2FT(count=7)}, hidden_size=32, intermediate_size=32)
    adapters.save(tmp_path / "own", adapted, params)
    adapters.save_peft(tmp_path / "peft", adapted, params)
    own, lora = (load_file(tmp_path / f) for f in ("own/adapter.safetensors", "peft/adapter_model.safetensors"))
    count = lambda arrays: sum(x.size for x in arrays.values())
    assert count(own) == 3 * (7 * 32 + 7) and count(lora) == 3 * (7 * 32 + 32 * 7)


def test_names_and_numbers_as_peft_writes_them(tmp_path):
    _, _, adapted, params = attached(KINDS["lora"])
    adapters.save_peft(tmp_path / "a", adapted, params)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["target_modules"] == ["down_proj", "q_proj", "up_proj"]
    assert (config["r"], config["lora_alpha"]) == (3, 7.0)
    assert config["rank_pattern"] == {"down_proj": 5} and config["alpha_pattern"] == {"down_proj": 10.0}
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a = arrays["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    b = arrays["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"]
    own = tree.flatten(params)
    np.testing.assert_array_equal(a, own["model/layers/self_attn/q_proj/adapter/lora/a"][2].T)
    np.testing.assert_array_equal(b, own["model/layers/mlp/down_proj/adapter/lora/b"][1].T)
    assert len(arrays) == 3 * 3 * 2


def test_layers_of_other_ranks_and_layers_left_out(tmp_path):
    """`layers_to_transform` and rank patterns by layer: one stack here."""
    module, base, adapted, params = attached({"up_proj": LoRA(rank=4, alpha=4.0)})
    adapters.save_peft(tmp_path / "a", adapted, params)
    arrays = load_file(tmp_path / "a" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.{}.mlp.up_proj.lora_{}.weight"
    kept = {n: x for n, x in arrays.items() if ".0." not in n}
    kept[name.format(1, "A")], kept[name.format(1, "B")] = (
        arrays[name.format(1, "A")][:2],
        np.ascontiguousarray(arrays[name.format(1, "B")][:, :2]),
    )
    save_file(kept, tmp_path / "a" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"layers.1.mlp.up_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 6.0}}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    _, read = adapters.merge(*adapters.load_peft(tmp_path / "a", module, base))
    kernel = lambda params: params["model"]["layers"]["mlp"]["up_proj"]["kernel"]
    leaves = params["model"]["layers"]["mlp"]["up_proj"]["adapter"]["lora"]
    want = [0, 3.0 * leaves["a"][1][:, :2] @ leaves["b"][1][:2], leaves["a"][2] @ leaves["b"][2]]
    for n, change in enumerate(want):
        np.testing.assert_allclose(kernel(read)[n] - kernel(base)[n], change, atol=1e-5)


def test_a_folder_of_the_released_s_more_opens():
    module, base = models.load(OFFICIAL / "base")
    adapted, params = adapters.load_peft(OFFICIAL / "adapter", module, base)
    z = np.load(OFFICIAL / "arrays.npz")
    mask = z["mask"]
    np.testing.assert_allclose(models.logits(module, base, z["tokens"], mask)[mask], z["base_logits"][mask], atol=1e-4)
    np.testing.assert_allclose(models.logits(adapted, params, z["tokens"], mask)[mask], z["logits"][mask], atol=1e-4)
    aux = models.hidden_states(adapted, params, z["tokens"], mask)[1]
    np.testing.assert_allclose(aux, z["aux"], rtol=1e-4)


def test_and_is_written_as_it_was(tmp_path):
    module, base = models.load(OFFICIAL / "base")
    adapters.save_peft(tmp_path / "a", *adapters.load_peft(OFFICIAL / "adapter", module, base))
    theirs, ours = (
        load_file(folder / "adapter_model.safetensors") for folder in (OFFICIAL / "adapter", tmp_path / "a")
    )
    assert theirs.keys() == ours.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x)
    config, written = (
        json.loads((f / "adapter_config.json").read_text()) for f in (OFFICIAL / "adapter", tmp_path / "a")
    )
    for field in ("peft_type", "moe_arch", "num_experts", "num_active", "expert_dims", "gate_type", "expert_act_fn"):
        assert written[field] == config[field], field
    assert set(written["target_modules"]) == set(config["target_modules"])


# Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "smore"])
@pytest.mark.parametrize(("changes", "says"), [
    ({"num_layers": 2}, r"layers\.2\.\S+' is .*another base"),
    ({"hidden_size": 24}, r"another base"),
])  # fmt: skip
def test_an_adapter_of_another_base_names_the_first_array(kind, changes, says, tmp_path):
    _, _, adapted, params = attached(KINDS[kind])
    adapters.save_peft(tmp_path / "a", adapted, params)
    other, base = tiny.decoder(**changes)
    with pytest.raises(ValueError, match=says):
        adapters.load_peft(tmp_path / "a", other, base)
    adapters.save(tmp_path / "b", adapted, params)
    with pytest.raises(ValueError, match=r"leaf 'model/layers/\S+' has shape .* and the model makes it shape"):
        adapters.load(tmp_path / "b", other, base)


def test_what_has_no_place_in_peft_is_refused(tmp_path):
    def refused(pairs, says):
        _, _, adapted, params = attached(pairs)
        with pytest.raises(ValueError, match=says):
            adapters.save_peft(tmp_path / "a", adapted, params)
        assert not any(tmp_path.iterdir())

    refused({"q_proj": LoRA(), "o_proj": DoRA()}, "DoRA for all layers or for none")
    refused({"q_proj": LoRA(rank=2), "q_pro": S2FT(count=3)}, "'model/layers/self_attn/q_proj' has several adapters")
    refused({"q_proj": LoRA(rank=2), "up_proj": MixLoRA(2, 1, 2)}, "holds one spec and no other adapter")
    _, _, adapted, params = attached({"down_proj": S2FT(count=3)})
    for save in (adapters.save_peft, adapters.save):
        with pytest.raises(ValueError, match="unpermute"):
            save(tmp_path / "a", adapted, s2ft.permute(adapted, params))


def test_folders_that_cannot_be_read_or_written(tmp_path):
    module, base, adapted, params = attached({"q_proj": LoRA(rank=2)})
    for load, name in ((adapters.load_peft, "adapter_config.json"), (adapters.load, "adapter.json")):
        with pytest.raises(FileNotFoundError, match=f"holds no {name}"):
            load(tmp_path, module, base)
    adapters.save_peft(tmp_path / "a", adapted, params)
    for save in (adapters.save_peft, adapters.save):
        with pytest.raises(FileExistsError, match="exists already"):
            save(tmp_path / "a", adapted, params)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    for change, says in (
        ({"peft_type": "IA3"}, "peft_type"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=says):
            adapters.load_peft(tmp_path / "a", module, base)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0, "alpha_pattern": {}}))
    _, silent = adapters.merge(*adapters.load_peft(tmp_path / "a", module, base))
    jax.tree.map(np.testing.assert_array_equal, silent, base)
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    weights = tmp_path / "a" / "adapter_model.safetensors"
    arrays = load_file(weights)
    first = next(name for name in arrays if "lora_B" in name)
    save_file(arrays | {first: arrays[first][:, :1].copy()}, weights)
    with pytest.raises(ValueError, match="rank 2 in lora_A and 1 in lora_B"):
        adapters.load_peft(tmp_path / "a", module, base)
    save_file({name: x for name, x in arrays.items() if name != first}, weights)
    with pytest.raises(ValueError, match="lacks its lora_B"):
        adapters.load_peft(tmp_path / "a", module, base)
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read"):
        adapters.load_peft(tmp_path / "a", module, base)
    assert jnp.isfinite(logits(adapted, params)).all()
