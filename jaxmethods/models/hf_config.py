"""The config.json of Hugging Face's models, to and from our description of an architecture."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Set
from typing import Any

from jaxmethods.models.decoder import DecoderConfig, RopeScaling

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
}
"""`model_type` in config.json -> the class of transformers that opens it."""

# What a family always is. Nothing in its config.json says so.
_FAMILY: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True},
    "gemma2": {"post_norms": True, "embedding_scale": True, "norm_plus_one": True},
}

# The values that transformers takes where config.json is silent.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    "mistral": {"max_position_embeddings": 131_072, "bos_token_id": 1, "eos_token_id": 2, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28},
    "qwen3": {"max_position_embeddings": 32_768, "sliding_window": 4096, "max_window_layers": 28, "head_dim": 128},
    "gemma2": {
        "max_position_embeddings": 8192, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "sliding_window": 4096, "head_dim": 256, "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    },
}  # fmt: skip

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
}  # fmt: skip

# Features we have not got, with the values that leave them off.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "compression_config": (None,),
    "attention_bias": (None, False),
    "qkv_bias": (None, False),
    "mlp_bias": (None, False),
    "partial_rotary_factor": (None, 1, 1.0),
    "rope_interleaved": (None, False),
    "use_mrope": (None, False),
    "mrope_section": (None,),
    "no_rope_layers": (None, []),
    "attention_dropout": (None, 0, 0.0),
    "hidden_dropout": (None, 0, 0.0),
    "hidden_dropout_prob": (None, 0, 0.0),
    "attention_probs_dropout_prob": (None, 0, 0.0),
    "resid_pdrop": (None, 0, 0.0),
    "embd_pdrop": (None, 0, 0.0),
    "num_experts": (None, 0, 1),
    "num_local_experts": (None, 0, 1),
    "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0),
    "moe_intermediate_size": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    "use_bidirectional_attention": (None, False),
    "is_causal": (None, True),
    "is_encoder_decoder": (None, False),
    "add_cross_attention": (None, False),
    "cross_attention_hidden_size": (None,),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "clip_qkv": (None,),
    "alibi": (None, False),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "logit_scale": (None, 1, 1.0),
    "attention_chunk_size": (None,),
    "text_config": (None,),
    "vision_config": (None,),
    # read for the families that have them, refused elsewhere
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "layer_types": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
}

_READ_BY_FAMILY = {
    "llama": {"hidden_act"},
    "mistral": {"hidden_act", "sliding_window", "layer_types"},
    "qwen2": {"hidden_act", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "qwen3": {"hidden_act", "sliding_window", "use_sliding_window", "max_window_layers", "layer_types"},
    "gemma2": {
        "hidden_activation", "sliding_window", "layer_types", "attn_logit_softcapping", "final_logit_softcapping",
        "query_pre_attn_scalar",
    },
}  # fmt: skip
_READ = {
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings",
    "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip

# Change nothing in the function that a trained model computes, or are neither true nor false of our models.
INERT = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "use_cache", "initializer_range", "pretraining_tp",
    "max_window_layers", "cache_implementation", "hidden_act", "model_max_length", "auto_map", "name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "torchscript", "use_bfloat16", "tf_legacy_loss",
    "pruned_heads", "chunk_size_feed_forward", "is_decoder", "finetuning_task", "id2label", "label2id", "num_labels",
    "problem_type", "task_specific_params", "tokenizer_class", "prefix", "sep_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "tie_encoder_decoder", "remove_invalid_values", "max_length",
    "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty", "temperature",
    "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "begin_suppress_tokens",
    "suppress_tokens", "return_dict_in_generate", "exponential_decay_length_penalty", "is_llama_config",
    "transformers.js_config", "unsloth_version", "unsloth_fixed", "unk_token_id", "attn_implementation", "license",
}  # fmt: skip


def config_from_hf(config: Mapping[str, Any]) -> DecoderConfig:
    """What the dict in a config.json says of the architecture; files of transformers 4 and of 5 are understood.

    A key that no one knows here is reported with a warning; a feature that is known and not implemented is refused.

    Raises:
        ValueError: an architecture or a feature that is not implemented, a key missing, a value out of place.
    """
    family = config.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(ARCHITECTURES)}.")
    _refuse_features(config, family)
    told = _DEFAULTS[family] | {key: value for key, value in config.items() if value is not None or key in _NULLABLE}

    def required(key: str) -> int:
        if not isinstance(told.get(key), int):
            raise ValueError(f"config.json must give {key} as a whole number, not {config.get(key)!r}.")
        return int(told[key])

    width, layers, heads = (
        required("hidden_size"),
        required("num_hidden_layers"),
        required("num_attention_heads"),
    )
    if family == "llama" or "num_key_value_heads" in config:  # null means as many as heads; absent did so for Llama 1
        kv_heads = int(told.get("num_key_value_heads") or heads)
    else:
        kv_heads = required("num_key_value_heads")
    head_dim = int(told.get("head_dim") or width // heads)
    activation = told.get("hidden_activation" if family == "gemma2" else "hidden_act", "silu")
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}.")
    rope_theta, rope_scaling = _rope(config, int(told["max_position_embeddings"]))
    window, window_layers = _windows(told, family, layers)
    eos = told.get("eos_token_id")
    scale = float(told["query_pre_attn_scalar"]) ** -0.5 if family == "gemma2" else None
    return DecoderConfig(
        family=family,
        vocab_size=required("vocab_size"),
        hidden_size=width,
        intermediate_size=required("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=int(told["max_position_embeddings"]),
        rms_norm_eps=float(told.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[activation],
        tie_embeddings=bool(told.get("tie_word_embeddings", False)),
        sliding_window=window,
        window_layers=window_layers,
        attention_softcap=_float(told["attn_logit_softcapping"]) if family == "gemma2" else None,
        final_softcap=_float(told["final_logit_softcapping"]) if family == "gemma2" else None,
        query_scale=None if scale == head_dim**-0.5 else scale,
        bos_id=told.get("bos_token_id"),
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=told.get("pad_token_id"),
        **_FAMILY[family],
    )


_NULLABLE = {  # null in config.json means none, not the default
    "sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
    "bos_token_id", "eos_token_id", "pad_token_id", "head_dim", "num_key_value_heads",
}  # fmt: skip


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def _refuse_features(config: Mapping[str, Any], family: str) -> None:
    read = _READ | _READ_BY_FAMILY[family]
    for key, value in config.items():
        off_by = _REFUSED.get(key) if key not in read else None
        if off_by and not any(value is off or (value == off and type(value) is type(off)) for off in off_by):
            raise ValueError(f"{key}={value!r} in the config.json of a {family} model is not supported.")
    report_unknown(config, read | _REFUSED.keys())


def report_unknown(config: Mapping[str, Any], known: Set[str]) -> None:
    """Warns of keys that are neither known nor `INERT` nor off; those that begin with "_" are transformers' own."""
    known = known | INERT
    unknown = {
        key: value
        for key, value in config.items()
        if key not in known and not key.startswith("_") and value not in (None, False, 0, [], {})
    }
    if unknown:
        told = ", ".join(f"{key}={value!r}"[:80] for key, value in unknown.items())
        warnings.warn(f"config.json has keys that nothing here reads: {told}.", stacklevel=4)


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary angles, from `rope_parameters` (transformers 5) or the two keys before it."""
    # transformers 5 prefers rope_scaling where a file has both
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = [entry for entry in rope.values() if isinstance(entry, Mapping)]
    if nested:
        if any(entry != nested[0] for entry in nested) or len(nested) != len(rope):
            raise ValueError(f"rope_parameters that differ between kinds of layers are not supported: {rope}.")
        rope = dict(nested[0])
    kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    theta = rope.pop("rope_theta", None)
    theta = float(config.get("rope_theta") or 10_000.0) if theta is None else float(theta)
    if rope.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ValueError("rope_parameters with a partial_rotary_factor are not supported.")
    scaling = None
    if kind == "llama3":
        missing = [key for key in ("factor", "low_freq_factor", "high_freq_factor") if key not in rope]
        if missing:
            raise ValueError(f"rope scaling 'llama3' in config.json lacks {missing[0]}.")
        scaling = RopeScaling(
            factor=float(rope.pop("factor")),
            low_freq_factor=float(rope.pop("low_freq_factor")),
            high_freq_factor=float(rope.pop("high_freq_factor")),
            original_max_position_embeddings=int(rope.pop("original_max_position_embeddings", max_positions)),
        )
    elif kind != "default":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported are 'default' and 'llama3'.")
    if rope:
        raise ValueError(
            f"rope parameter {sorted(rope)[0]!r} has no meaning for rope type {kind!r}; nothing here reads it."
        )
    return theta, scaling


def _windows(told: Mapping[str, Any], family: str, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """The sliding window, and which layers have it (None: all of them)."""
    window = told.get("sliding_window")
    kinds = told.get("layer_types")
    if family == "llama" or (family.startswith("qwen") and not told.get("use_sliding_window", False)):
        window = None
    if family in ("llama", "mistral"):
        marked = [window is not None] * layers
    elif family == "gemma2":
        marked = [layer % 2 == 0 for layer in range(layers)]
    else:
        marked = [layer >= told["max_window_layers"] for layer in range(layers)]
    if kinds is not None:
        if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
            raise ValueError(f"layer_types {sorted(unknown)[0]!r} in config.json is not supported.")
        if len(kinds) != layers:
            raise ValueError(f"layer_types in config.json names {len(kinds)} layers of {layers}.")
        listed = [kind == "sliding_attention" for kind in kinds]
        if family == "mistral" and listed != marked:
            raise ValueError(
                "layer_types of a mistral model must agree with its sliding_window; use another model_type."
            )
        if any(listed) and window is None:
            raise ValueError("layer_types in config.json names sliding_attention but no sliding_window is in use.")
        marked = listed
    if window is None or not any(marked):
        return None, None
    return int(window), None if all(marked) else tuple(marked)


def config_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The dict for a config.json that transformers 4 and 5 read as this architecture.

    Raises:
        ValueError: the family cannot express the configuration in its config.json.
    """
    c = config
    eos: Any = None if not c.eos_ids else c.eos_ids[0] if len(c.eos_ids) == 1 else list(c.eos_ids)
    rope: dict[str, Any] = {"rope_type": "default"}
    if c.rope_scaling:
        rope = {"rope_type": "llama3", **dataclasses.asdict(c.rope_scaling)}
    told: dict[str, Any] = {
        "architectures": [ARCHITECTURES[c.family]],
        "model_type": c.family,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": c.bos_id,
        "eos_token_id": eos,
        "pad_token_id": c.pad_id,
        "rope_theta": c.rope_theta,  # with rope_scaling: for transformers 4
        "rope_scaling": rope if c.rope_scaling else None,
        "rope_parameters": {**rope, "rope_theta": c.rope_theta},
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    activation = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[c.activation]
    told["hidden_activation" if c.family == "gemma2" else "hidden_act"] = activation
    windowed = [c.sliding_window is not None] * c.num_layers if c.window_layers is None else list(c.window_layers)
    if c.family != "llama":
        told["sliding_window"] = c.sliding_window
    if c.family in ("qwen2", "qwen3", "gemma2"):
        told["layer_types"] = ["sliding_attention" if mark else "full_attention" for mark in windowed]
    if c.family in ("qwen2", "qwen3"):
        told["use_sliding_window"] = c.sliding_window is not None
        told["max_window_layers"] = windowed.index(True) if any(windowed) else c.num_layers
    if c.family == "gemma2":
        scalar = c.head_dim if c.query_scale is None else c.query_scale**-2
        told["query_pre_attn_scalar"] = round(scalar)
        told["attn_logit_softcapping"] = c.attention_softcap
        told["final_logit_softcapping"] = c.final_softcap
        if c.sliding_window is None:  # transformers wants a number there; no layer reads it
            told["sliding_window"] = c.max_position_embeddings
    _check_expressed(c, told)
    return told


def _check_expressed(config: DecoderConfig, told: dict[str, Any]) -> None:
    wanted, read = (dataclasses.asdict(_plain(c)) for c in (config, config_from_hf(told)))
    for field, value in wanted.items():
        if read[field] != value:
            raise ValueError(
                f"{field}={value!r} cannot be written in the config.json of a {config.family} model, "
                f"which means {read[field]!r} there."
            )


def _plain(c: DecoderConfig) -> DecoderConfig:
    """The same architecture with what can be said in two ways said in one."""
    windowed = c.window_layers
    if c.sliding_window is None or (windowed is not None and not any(windowed)):
        c = dataclasses.replace(c, sliding_window=None, window_layers=None)
    elif windowed is not None and all(windowed):
        c = dataclasses.replace(c, window_layers=None)
    return dataclasses.replace(c, query_scale=None) if c.query_scale == c.head_dim**-0.5 else c
