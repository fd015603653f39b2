"""A model before any weight is read: its module and the shapes of its parameters."""

from __future__ import annotations

import os
from typing import Any

import jax.numpy as jnp

from jaxmethods.models import architectures, files, gguf, hf_vlm, huggingface
from jaxmethods.models.architectures import AnyConfig
from jaxmethods.models.decoder import DecoderConfig
from jaxmethods.tree import Tree

_LLAMA3: Any = dict(
    family="llama", vocab_size=128_256, rope_theta=500_000.0, max_position_embeddings=8192, rms_norm_eps=1e-5, head_dim=128,
    num_kv_heads=8, bos_id=128_000, eos_ids=(128_001, 128_009),
)  # fmt: skip

_8B: Any = dict(hidden_size=4096, intermediate_size=14_336, num_layers=32, num_heads=32)

_QWEN2: Any = dict(
    model_type="qwen2", vocab_size=152_000, rope_theta=1e6, max_position_embeddings=32_768, rms_norm_eps=1e-6
)


def _onevision(**text: Any) -> AnyConfig:
    """LLaVA-OneVision as its config.json has it, on SigLIP-so400m at 384 pixels."""
    return hf_vlm.vlm_config_from_hf({"model_type": "llava_onevision", "text_config": _QWEN2 | text})


KNOWN: dict[str, AnyConfig] = {
    "meta-llama/Meta-Llama-3-8B": DecoderConfig(**_LLAMA3 | {"eos_ids": (128_001,)}, **_8B),
    "meta-llama/Meta-Llama-3-8B-Instruct": DecoderConfig(**_LLAMA3, **_8B),
    "meta-llama/Meta-Llama-3-70B-Instruct": DecoderConfig(
        **_LLAMA3, hidden_size=8192, intermediate_size=28_672, num_layers=80, num_heads=64
    ),
    "llava-hf/llava-onevision-qwen2-0.5b-si-hf": _onevision(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    ),
    "llava-hf/llava-onevision-qwen2-7b-si-hf": _onevision(
        hidden_size=3584, intermediate_size=18_944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4
    ),
}
"""Architectures by hub name, so that a pod run can be planned where the hub is out of reach (and its licence unsigned)."""


def read_config(path: str | os.PathLike[str]) -> AnyConfig:
    """The architecture of a model, as `load` would find it; weights are not touched.

    Raises:
        FileNotFoundError, ValueError, ConnectionError: as `load` does; the last only for a hub name that is not `KNOWN`.
    """
    try:
        found = files.resolve(path, weights=False)
    except (ConnectionError, FileNotFoundError):
        if os.fspath(path) in KNOWN:
            return KNOWN[os.fspath(path)]
        raise
    if found.suffix == ".gguf":
        return gguf.config_from_gguf(gguf.open_gguf(found))
    return huggingface.read_config(found)


def shapes(path: str | os.PathLike[str], *, dtype: Any = jnp.float32, quantize: str | None = None) -> tuple[Any, Tree]:
    """(module, params) like `load`, with a ShapeDtypeStruct in place of each array."""
    config = read_config(path)
    module = architectures.build(config, dtype=dtype, quantize=quantize)
    return module, architectures.shapes(config, dtype, quantize)
