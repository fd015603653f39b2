"""config.json: what published models say is understood, what is not implemented is refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from jaxmethods.models import DecoderConfig, RopeScaling
from jaxmethods.models.hf_config import config_from_hf, config_to_hf

# The keys of published models' files, as transformers 4 wrote them.
LLAMA_3_2_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "vocab_size": 128256,
}  # fmt: skip
LLAMA_1 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": None,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "torch_dtype": "float16", "transformers_version": "4.28.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
    "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645,
    "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GEMMA_2_27B = {
    "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "head_dim": 128, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608, "intermediate_size": 36864,
    "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 32, "num_hidden_layers": 46,
    "num_key_value_heads": 16, "pad_token_id": 0, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "use_cache": True, "vocab_size": 256000,
    "_attn_implementation": "eager",
}  # fmt: skip
PUBLISHED = [LLAMA_3_2_1B, LLAMA_1, MISTRAL_7B, QWEN_2_5, QWEN_3, GEMMA_2_27B]


def test_published_files():
    llama = config_from_hf(LLAMA_3_2_1B)
    assert llama == DecoderConfig(
        family="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
        num_kv_heads=8, head_dim=64, rope_theta=500000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),
        max_position_embeddings=131072, rms_norm_eps=1e-5, tie_embeddings=True, bos_id=128000,
        eos_ids=(128001, 128008, 128009),
    )  # fmt: skip
    old = config_from_hf(LLAMA_1)
    assert (old.num_kv_heads, old.head_dim, old.rope_theta, old.max_position_embeddings) == (32, 128, 10_000.0, 2048)
    mistral = config_from_hf(MISTRAL_7B)
    assert (mistral.sliding_window, mistral.window_layers, mistral.head_dim) == (4096, None, 128)
    qwen2 = config_from_hf(QWEN_2_5)
    assert qwen2.attention_bias and not qwen2.qk_norm and qwen2.sliding_window is None and qwen2.head_dim == 64
    qwen3 = config_from_hf(QWEN_3)
    assert qwen3.qk_norm and not qwen3.attention_bias and qwen3.head_dim == 128 and qwen3.rope_theta == 1e6
    gemma = config_from_hf(GEMMA_2_27B)
    assert gemma.query_scale == pytest.approx(1 / 12) and gemma.tie_embeddings and gemma.activation == "gelu_tanh"
    assert gemma.post_norms and gemma.norm_plus_one and gemma.embedding_scale
    assert (gemma.attention_softcap, gemma.final_softcap) == (50.0, 30.0)
    assert gemma.window_layers == (True, False) * 23


@pytest.mark.parametrize("told", PUBLISHED, ids=lambda told: told["model_type"])
def test_what_we_write_reads_as_the_same(told):
    config = config_from_hf(told)
    written = config_to_hf(config)
    assert config_from_hf(written) == config
    # either generation of keys alone says the same
    for left_out in ({"rope_parameters"}, {"rope_theta", "rope_scaling"}):
        assert config_from_hf({k: v for k, v in written.items() if k not in left_out}) == config


@pytest.mark.parametrize(
    "change, window, layers",
    [
        ({}, None, None),
        ({"use_sliding_window": True}, 32768, (False, False, True, True)),  # from max_window_layers = 2 on
        ({"use_sliding_window": True, "max_window_layers": 0}, 32768, None),
        ({"use_sliding_window": True, "max_window_layers": 4}, None, None),
        (
            {"use_sliding_window": True, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
            32768, (True, False, False, False),
        ),
        ({"layer_types": ["full_attention"] * 4}, None, None),
    ],
)  # fmt: skip
def test_windows_of_qwen(change, window, layers):
    told = QWEN_2_5 | {"num_hidden_layers": 4, "max_window_layers": 2} | change
    config = config_from_hf(told)
    assert (config.sliding_window, config.window_layers) == (window, layers)
    assert config_from_hf(config_to_hf(config)) == config


def test_windows_of_mistral_and_gemma():
    assert config_from_hf(MISTRAL_7B | {"sliding_window": None}).sliding_window is None
    silent = {k: v for k, v in MISTRAL_7B.items() if k != "sliding_window"}
    assert config_from_hf(silent).sliding_window == 4096  # as transformers has it
    full = config_from_hf(GEMMA_2_27B | {"layer_types": ["full_attention"] * 46})
    assert full.sliding_window is None and config_from_hf(config_to_hf(full)) == full


def test_defaults_of_gemma():
    required = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads",
    )  # fmt: skip
    config = config_from_hf({key: GEMMA_2_27B[key] for key in required})
    assert config.tie_embeddings and config.head_dim == 256 and config.query_scale is None
    assert (config.bos_id, config.eos_ids, config.pad_id) == (2, (1,), 0)
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)
    uncapped = config_from_hf(GEMMA_2_27B | {"attn_logit_softcapping": None, "final_logit_softcapping": None})
    assert (uncapped.attention_softcap, uncapped.final_softcap) == (None, None)


@pytest.mark.parametrize(
    "told, change, words",
    [
        (LLAMA_1, {"model_type": "mamba"}, "'mamba' is not supported; supported are llama, mistral, qwen2"),
        (LLAMA_1, {"model_type": None}, "model_type None"),
        (LLAMA_1, {"attention_bias": True}, "attention_bias=True"),
        (LLAMA_1, {"mlp_bias": True}, "mlp_bias=True"),
        (LLAMA_1, {"quantization_config": {"quant_method": "gptq"}}, "quantization_config="),
        (LLAMA_1, {"num_local_experts": 8}, "num_local_experts=8"),
        (LLAMA_1, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (LLAMA_1, {"rope_interleaved": True}, "rope_interleaved=True"),
        (LLAMA_1, {"sliding_window": 64}, "sliding_window=64 in the config.json of a llama model"),
        (LLAMA_1, {"attention_dropout": 0.1}, "attention_dropout=0.1"),
        (LLAMA_1, {"hidden_act": "gelu"}, "activation 'gelu'"),
        (LLAMA_1, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'linear'"),
        (LLAMA_1, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'"),
        (LLAMA_1, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        (LLAMA_1, {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "lacks low_freq_factor"),
        (
            LLAMA_1,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
            "partial_rotary_factor",
        ),
        (LLAMA_1, {"rope_parameters": {"rope_type": "default", "factor": 8.0}}, "'factor'"),
        (
            GEMMA_2_27B,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            "differ between kinds of layers",
        ),
        (LLAMA_1, {"hidden_size": None}, "must give hidden_size as a whole number"),
        (LLAMA_1, {"num_hidden_layers": "32"}, "must give num_hidden_layers as a whole number, not '32'"),
        (QWEN_3, {"attention_bias": True}, "attention_bias=True"),
        (QWEN_3, {"num_experts": 128}, "num_experts=128"),
        (QWEN_3, {"layer_types": ["chunked_attention"] * 28}, "'chunked_attention'"),
        (QWEN_3, {"layer_types": ["full_attention"] * 3}, "names 3 layers of 28"),
        (QWEN_3, {"layer_types": ["sliding_attention"] * 28}, "no sliding_window is in use"),
        (MISTRAL_7B, {"layer_types": ["full_attention"] * 32}, "must agree with its sliding_window"),
        (GEMMA_2_27B, {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        (GEMMA_2_27B, {"attention_bias": True}, "attention_bias=True"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(told, change, words):
    with pytest.raises(ValueError, match=words) as error:
        config_from_hf(told | change)
    assert "\n" not in str(error.value)


def test_an_unknown_key_is_reported():
    with pytest.warns(UserWarning, match="keys that nothing here reads: hyper_connections=4"):
        config_from_hf(LLAMA_1 | {"hyper_connections": 4, "unknown_but_off": False})


@pytest.mark.parametrize(
    "told, change",
    [
        (LLAMA_1, {"sliding_window": 64}),
        (LLAMA_1, {"qk_norm": True}),
        (LLAMA_1, {"final_softcap": 30.0}),
        (LLAMA_1, {"query_scale": 0.5}),
        (LLAMA_1, {"attention_bias": True}),
        (MISTRAL_7B, {"window_layers": (True, False) * 16}),
        (QWEN_2_5, {"attention_bias": False}),
        (QWEN_3, {"activation": "gelu_tanh", "embedding_scale": True}),
        (GEMMA_2_27B, {"norm_plus_one": False}),
        (GEMMA_2_27B, {"query_scale": 0.3}),  # 11.1..: transformers wants a whole number
    ],
)
def test_a_configuration_that_no_file_can_say_is_refused(told, change):
    config = dataclasses.replace(config_from_hf(told), **change)
    field = list(change)[-1]
    with pytest.raises(ValueError, match=f"{field}=.*cannot be written in the config.json of a {config.family} model"):
        config_to_hf(config)


def test_a_scale_said_in_two_ways_is_one():
    config = dataclasses.replace(config_from_hf(LLAMA_1), query_scale=128**-0.5)
    assert config_from_hf(config_to_hf(config)).query_scale is None
