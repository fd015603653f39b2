"""What belongs to each kind of architecture: its module, its tensors, its place on a mesh, its config.json."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax

from jaxmethods.models import decoder, efficientnet, encoder, hf_config, hf_encoders, hf_vlm, vlm
from jaxmethods.models.decoder import Decoder, DecoderConfig
from jaxmethods.models.dual import DualConfig, DualEncoder
from jaxmethods.models.efficientnet import EfficientNet, EfficientNetConfig
from jaxmethods.models.layout import Leaf, in_parts, layout
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxmethods.models.vision import VisionConfig, VisionTower
from jaxmethods.models.vlm import VLM, VLMConfig
from jaxmethods.models.weights import Planned
from jaxmethods.sharding import Rules
from jaxmethods.tree import Tree, unflatten

AnyConfig = DecoderConfig | VLMConfig | VisionConfig | TextEncoderConfig | DualConfig | EfficientNetConfig

RULES = vlm.RULES
"""Where the parameters of decoders and of vision-language models lie."""


def config_from_hf(told: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> AnyConfig:
    """The architecture that a config.json tells of, with a preprocessor_config.json where there is one.

    Raises:
        ValueError: an architecture or a feature that is not implemented, a key missing, a value out of place.
    """
    kind = told.get("model_type")
    if kind in hf_vlm.ARCHITECTURES:
        return hf_vlm.vlm_config_from_hf(told, preprocessor)
    if kind in hf_encoders.MODEL_TYPES:
        return hf_encoders.encoder_config_from_hf(told, preprocessor)
    if kind == efficientnet.FAMILY:
        return efficientnet.config_from_json(told)
    if kind not in hf_config.ARCHITECTURES:
        known = (*hf_config.ARCHITECTURES, *hf_vlm.ARCHITECTURES, *hf_encoders.MODEL_TYPES, efficientnet.FAMILY)
        raise ValueError(f"model_type {kind!r} is not supported; supported are {', '.join(known)}.")
    return hf_config.config_from_hf(told)


def config_to_hf(config: AnyConfig) -> dict[str, Any]:
    """The dict for a config.json that transformers reads as this architecture."""
    if isinstance(config, VLMConfig):
        return hf_vlm.vlm_config_to_hf(config)
    if isinstance(config, EfficientNetConfig):
        return efficientnet.config_to_json(config)
    return (
        hf_config.config_to_hf(config)
        if isinstance(config, DecoderConfig)
        else hf_encoders.encoder_config_to_hf(config)
    )


def preprocessor_to_hf(config: AnyConfig) -> dict[str, Any] | None:
    """The dict for a preprocessor_config.json, of models that see."""
    if isinstance(config, VLMConfig):
        return hf_vlm.preprocessor_to_hf(config.sight)
    return hf_encoders.preprocessor_to_hf(config) if isinstance(config, VisionConfig | DualConfig) else None


def config_of(module: Any) -> AnyConfig:
    """The architecture of a module.

    Raises:
        ValueError: a module of someone else.
    """
    found = module.whole if isinstance(module, VLM) else getattr(module, "config", None)
    if not isinstance(found, AnyConfig):
        raise ValueError(f"{type(module).__name__} is no model of this library and has no Hugging Face layout here.")
    return found


def decoder_of(config: AnyConfig) -> DecoderConfig | None:
    """The decoder of a model that writes; None of an encoder."""
    return config.decoder if isinstance(config, VLMConfig) else config if isinstance(config, DecoderConfig) else None


def with_decoder(config: AnyConfig, decoder: DecoderConfig) -> AnyConfig:
    """The architecture of a model that writes, with another decoder."""
    return dataclasses.replace(config, decoder=decoder) if isinstance(config, VLMConfig) else decoder


def unread_tensors(config: AnyConfig, dtype: Any) -> list[Planned]:
    """Tensors that transformers wants of a model and no one reads."""
    return hf_vlm.unread_tensors(config, dtype) if isinstance(config, VLMConfig) else []


def build(config: AnyConfig, *, dtype: Any, quantize: str | None = None) -> Any:
    """The module.

    Raises:
        ValueError: `quantize` for an encoder.
    """
    dtypes = {"dtype": dtype, "param_dtype": dtype}
    if isinstance(config, VLMConfig):
        return VLM(config.decoder, **dtypes, quantization=quantize, sight=config.sight)
    if isinstance(config, DecoderConfig):
        return Decoder(config, **dtypes, quantization=quantize)
    if quantize is not None:
        raise ValueError(f"quantize={quantize!r} is for decoders; leave an encoder in float.")
    kinds: dict[Any, type[nn.Module]] = {
        VisionConfig: VisionTower, TextEncoderConfig: TextEncoder, DualConfig: DualEncoder, EfficientNetConfig: EfficientNet,
    }  # fmt: skip
    return kinds[type(config)](config, **dtypes)  # type: ignore[call-arg]


def leaves(config: AnyConfig) -> list[Leaf]:
    """The parameters with the names that Hugging Face gives their tensors."""
    if isinstance(config, VLMConfig):
        return hf_vlm.vlm_layout(config)
    if isinstance(config, EfficientNetConfig):
        return efficientnet.layout(config)
    return layout(config) if isinstance(config, DecoderConfig) else hf_encoders.encoder_layout(config)


def shapes(config: AnyConfig, dtype: Any, quantize: str | None = None) -> Tree:
    """The parameter tree as shapes, without making any array."""
    parts = in_parts(leaves(config), quantize)
    return unflatten({leaf.path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype or dtype) for leaf in parts})


def rules(config: AnyConfig) -> Rules:
    """Where the parameters lie."""
    if isinstance(config, VLMConfig):
        return vlm.RULES
    return decoder.RULES if isinstance(config, DecoderConfig) else encoder.RULES


def canonical(config: AnyConfig) -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to the name that `leaves` has for it."""
    if isinstance(config, VLMConfig):
        return hf_vlm.canonical(config)
    return hf_encoders.canonical(config) if isinstance(config, hf_encoders.AnyConfig) else lambda name: name


def ignored(config: AnyConfig) -> Callable[[str], bool]:
    """Whether a tensor of a checkpoint has no place in the model by design, such as a buffer or a layer that is not read."""
    patterns: Sequence[str] = [r"rotary_emb\.inv_freq$"]
    if isinstance(config, VLMConfig):
        patterns = [*patterns, *hf_vlm.ignored(config)]
    elif isinstance(config, hf_encoders.AnyConfig):
        patterns = [*patterns, *hf_encoders.ignored_tensors(config)]
    elif isinstance(config, EfficientNetConfig) and not config.classes:
        patterns = [*patterns, r"^classifier\."]
    found = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    return lambda name: found.search(name) is not None
