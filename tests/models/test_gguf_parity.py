# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""The same GGUF file in transformers' own loader and here: the same logits."""

from __future__ import annotations

import gguf as reference
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from jaxmethods import models

# head sizes are those that their loader assumes where it does not read them: 128 for qwen3, and query_pre_attn_scalar
# 256 for gemma2
TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
CASES = {
    "llama": ("Llama", {"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 1, "head_dim": 128}),
    "gemma2": ("Gemma2", {"num_key_value_heads": 2, "head_dim": 256, "sliding_window": 5}),
}


def write(path, name, model):
    """As llama.cpp's converter would: its names, its row order for llama, 1 + w for gemma's norms."""
    c = model.config
    writer = reference.GGUFWriter(path, name)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_vocab_size(c.vocab_size)
    writer.add_rope_freq_base(c.rope_parameters["rope_theta"])
    if name == "gemma2":
        writer.add_sliding_window(c.sliding_window)
        writer.add_attn_logit_softcapping(c.attn_logit_softcapping)
        writer.add_final_logit_softcapping(c.final_logit_softcapping)
    if name in ("qwen3", "gemma2"):
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    names = reference.get_tensor_name_map(getattr(reference.MODEL_ARCH, name.upper()), c.num_hidden_layers)
    for path_, weight in model.named_parameters():
        module, kind = path_.rsplit(".", 1)
        value = weight.detach().numpy()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(module.split(".")[-1])
        if name == "llama" and heads:
            rows, width = value.shape
            value = value.reshape(heads, 2, rows // heads // 2, width).swapaxes(1, 2).reshape(rows, width)
        if name == "gemma2" and module.endswith("norm"):
            value = value + 1
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compare(module, params, model, tokens, atol):
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(tokens)).logits.float().numpy()
    ours = np.asarray(jax.jit(models.logits, static_argnums=0)(module, params, tokens))
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=atol)
    return theirs


@pytest.mark.parametrize("name", CASES)
def test_tiny_models(name, tmp_path):
    kind, options = CASES[name]
    config = getattr(transformers, f"{kind}Config")(**TINY | options, max_position_embeddings=64, pad_token_id=None)
    torch.manual_seed(0)
    source = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for path, weight in source.named_parameters():
            weight.normal_(0.0, 0.5 if "norm" in path or "bias" in path else 1.5 * weight.shape[-1] ** -0.5)
    write(tmp_path / "m.gguf", name, source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="m.gguf", attn_implementation="eager", dtype=torch.float32
    )
    tokens = np.random.default_rng(0).integers(0, 97, (2, 17))
    compare(*models.load(tmp_path / "m.gguf"), model, tokens, 2e-4)


@pytest.mark.slow
def test_smollm2(smollm2_file):
    file = smollm2_file
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, attn_implementation="eager", dtype=torch.float32
    )
    tokenizer = models.load_tokenizer(file)
    text = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want"
    theirs = compare(*models.load(file), model, np.array([tokenizer(text).input_ids]), 1e-3)
    assert np.abs(theirs).max() > 20  # the tolerance is small against the logits
