# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""Random tiny models of every family, with all its features: the same logits in transformers and here, both ways."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxmethods import models

ATOL = 2e-4  # float32; logits are of order 1

TINY = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip

CASES = {
    "llama-mha": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa": ("Llama", {"num_key_value_heads": 2, "head_dim": 20, "rms_norm_eps": 1e-3}),
    "llama-mqa-llama3-rope": ("Llama", {"num_key_value_heads": 1, "rope_parameters": LLAMA3}),
    "mistral-window": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 5, "head_dim": 10}),
    "mistral-full": ("Mistral", {"num_key_value_heads": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen2-window-above": (
        "Qwen2", {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3-own-head-dim": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 22, "tie_word_embeddings": True}),
    "qwen3-layer-types": (
        "Qwen3",
        {
            "num_key_value_heads": 1, "head_dim": 8, "use_sliding_window": True, "sliding_window": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": (
        "Gemma2",
        {
            "num_key_value_heads": 2, "head_dim": 14, "sliding_window": 4, "query_pre_attn_scalar": 9,
            "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
        },
    ),
    "gemma2-no-caps-untied": (
        "Gemma2",
        {
            "num_key_value_heads": 4, "head_dim": 12, "sliding_window": 100, "query_pre_attn_scalar": 12,
            "attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False,
        },
    ),
}  # fmt: skip


def theirs(name: str):
    """A model of transformers with large random weights: at its own initialisation most mistakes would not show."""
    kind, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**TINY | options, max_position_embeddings=64, pad_token_id=0)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for path, weight in model.named_parameters():
            weight.normal_(0.0, 0.5 if "norm" in path or "bias" in path else 1.5 * weight.shape[-1] ** -0.5)
            if "norm" in path and kind != "Gemma2":
                weight.add_(1.0)
    return model


def batch() -> tuple[np.ndarray, np.ndarray]:
    """Four rows: full, padded on the right, padded on the left, one real token; padding holds arbitrary ids."""
    tokens = np.random.default_rng(0).integers(1, 97, (4, 19))
    mask = np.ones((4, 19), bool)
    mask[1, 12:] = False
    mask[2, :8] = False
    mask[3, 1:] = False
    return tokens, mask


def their_logits(model, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    positions = np.maximum(np.cumsum(mask, -1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask).long(),
            position_ids=torch.tensor(positions),
        )
    return out.logits.float().numpy()


logits = jax.jit(models.logits, static_argnums=0)


def assert_same_logits(module, params, model, atol: float = ATOL) -> None:
    tokens, mask = batch()
    ours = np.asarray(logits(module, params, tokens, mask))
    others = their_logits(model, tokens, mask)
    assert ours.dtype == np.float32
    assert np.abs(others[mask]).max() > 0.5  # else any tolerance passes
    np.testing.assert_allclose(ours[mask], others[mask], atol=atol)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(name, their model, our module, our parameters read from the folder that they wrote)."""
    model = theirs(request.param)
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    return request.param, model, *models.load(folder)


def test_theirs_opened_here(case):
    _, model, module, params = case
    assert_same_logits(module, params, model)


def test_ours_opened_there(case, tmp_path):
    _, _, module, params = case
    # other numbers than theirs: what is compared is what we wrote
    params = jax.tree.map(lambda x: x + 0.01 * np.cos(np.arange(x.size, dtype=x.dtype).reshape(x.shape)), params)
    models.save(tmp_path / "ours", module, params, shard_bytes=20_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True, dtype="auto"
    )
    assert model.dtype == torch.float32
    assert not any(report.values()), report  # no tensor missing, left over or of another shape
    assert_same_logits(module, params, model.eval())


def test_the_configuration_survives_the_round_trip(case, tmp_path):
    """What transformers reads of the config.json we write is what it wrote itself."""
    name, model, module, params = case
    models.save(tmp_path / "ours", module, params)
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    new, old = again.to_dict(), model.config.to_dict()
    loose = {"architectures", "transformers_version", "_name_or_path", "dtype", "sliding_window", "max_window_layers"}
    assert type(again) is type(model.config)
    assert {k: new[k] for k in old if k not in loose} == {k: old[k] for k in old if k not in loose}
    if "sliding_attention" in old.get("layer_types", ()) or name.startswith("mistral"):
        assert new["sliding_window"] == old["sliding_window"]


def test_one_row_alone_is_as_in_a_padded_batch(case):
    """Padding on either side changes nothing at real tokens."""
    _, _, module, params = case
    tokens, mask = batch()
    together = np.asarray(logits(module, params, tokens, mask))
    rows = [np.asarray(logits(module, params, np.roll(tokens, by, 1), np.roll(mask, by, 1)))[2] for by in (-8, -3)]
    np.testing.assert_allclose(rows[0][:11], together[2, 8:], atol=ATOL)
    np.testing.assert_allclose(rows[1][5:16], together[2, 8:], atol=ATOL)


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2"])
def test_bfloat16_both_ways(name, tmp_path):
    model = theirs(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs")
    module, params = models.load(tmp_path / "theirs", dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    models.save(tmp_path / "ours", module, params)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == torch.bfloat16
    old, new = model.state_dict(), again.state_dict()
    assert old.keys() == new.keys() and all(torch.equal(old[path], new[path]) for path in old)
    # bfloat16 numbers in float32 arithmetic: no tolerance for rounding is needed
    wide = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager"
    )
    assert_same_logits(*models.load(tmp_path / "theirs"), wide)


def test_a_config_of_transformers_4_is_read_alike(tmp_path):
    """The keys that files had before `rope_parameters`."""
    model = theirs("llama-mqa-llama3-rope")
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    rope = told.pop("rope_parameters")
    told |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": told.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(told))
    assert_same_logits(*models.load(tmp_path), model)
