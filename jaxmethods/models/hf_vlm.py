"""Vision-language models in Hugging Face's layout: config.json and the names of tensors, to and from ours.

A tower of which only an inner layer is read loses the layers after it when it is opened here; it is written as the shorter
tower that it then is, whose last layer is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmethods.images import ImageFormat
from jaxmethods.models import efficientnet, hf_config, hf_encoders
from jaxmethods.models.efficientnet import EfficientNetConfig
from jaxmethods.models.layout import Leaf, layout
from jaxmethods.models.vision import VisionConfig
from jaxmethods.models.vlm import Sight, VLMConfig
from jaxmethods.models.weights import Planned

ARCHITECTURES = {"llava": "LlavaForConditionalGeneration", "llava_onevision": "LlavaOnevisionForConditionalGeneration"}
"""`model_type` in config.json -> the class of transformers that opens it."""

# What transformers takes where the text part of a config.json is silent.
_TEXT: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
              "vocab_size": 32_000},
    "mistral": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
                "num_key_value_heads": 8, "vocab_size": 32_000},
    "qwen2": {"hidden_size": 4096, "intermediate_size": 22_016, "num_hidden_layers": 32, "num_attention_heads": 32,
              "num_key_value_heads": 32, "vocab_size": 151_936},
}  # fmt: skip
_VISION: dict[str, dict[str, Any]] = {
    "llava": {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
              "num_attention_heads": 16, "image_size": 336, "patch_size": 14},
    "llava_onevision": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                        "num_hidden_layers": 26, "num_attention_heads": 16, "image_size": 384, "patch_size": 14,
                        "vision_use_head": False},
}  # fmt: skip
_READS = {"llava": (-2, "default", 32_000), "llava_onevision": (-1, "full", 151_646)}
"""Layer, selection and image token by default."""

_READ = {
    "model_type", "vision_config", "text_config", "image_token_index", "image_token_id", "vision_feature_layer",
    "vision_feature_select_strategy", "projector_hidden_act", "multimodal_projector_bias", "tie_word_embeddings",
    "image_grid_pinpoints", "vision_aspect_ratio",
}  # fmt: skip
_INERT = {
    "architectures", "torch_dtype", "dtype", "transformers_version", "ignore_index", "image_seq_length", "video_token_index",
    "video_token_id", "vocab_size", "pad_token_id", "use_image_newline_parameter", "initializer_range", "hidden_size",
}  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "quick_gelu": "quick_gelu"}
_RESAMPLES = {2: "bilinear", 3: "bicubic"}


def vlm_config_from_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> VLMConfig:
    """What the dicts in config.json and, where there is one, preprocessor_config.json say.

    Raises:
        ValueError: an architecture or a feature that is not implemented, or a value out of place.
    """
    family = str(config.get("model_type"))
    told = dict(preprocessor or {})
    hf_config.report_unknown(config, _READ | _INERT)
    tower = _tower(config, family, told)
    text = dict(config.get("text_config") or {})
    kind = text.setdefault("model_type", "llama" if family == "llava" else "qwen2")
    text = _TEXT.get(kind, {}) | text
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    activation = config.get("projector_hidden_act", "gelu")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"projector_hidden_act {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}."
        )
    token = config.get("image_token_index", config.get("image_token_id", _READS[family][2]))
    return VLMConfig(
        hf_config.config_from_hf(text),
        Sight(
            family=family,
            tower=tower,
            format=_format(config, family, told, tower),
            image_token_id=int(token),
            activation=_ACTIVATIONS[activation],
            bias=bool(config.get("multimodal_projector_bias", True)),
        ),
    )


def _tower(
    config: Mapping[str, Any], family: str, preprocessor: Mapping[str, Any]
) -> VisionConfig | EfficientNetConfig:
    given = dict(config.get("vision_config") or {})
    if given.get("model_type") == efficientnet.FAMILY:
        return efficientnet.config_from_json(given)
    silent = (
        _VISION[family]
        if given.get("model_type", _VISION[family]["model_type"]) == _VISION[family]["model_type"]
        else {}
    )
    tower = hf_encoders.encoder_config_from_hf(silent | given, preprocessor)
    if not isinstance(tower, VisionConfig):
        raise ValueError(f"vision_config of model_type {given.get('model_type')!r} is no vision tower.")
    layer, selection, _ = _READS[family]
    layer, selection = (
        config.get("vision_feature_layer", layer),
        config.get("vision_feature_select_strategy", selection),
    )
    if not isinstance(layer, int):
        raise ValueError(f"vision_feature_layer={layer!r} is not supported: one layer is read, such as -2.")
    if selection not in ("default", "full"):
        raise ValueError(f"vision_feature_select_strategy={selection!r} is unknown; it is 'default' or 'full'.")
    if selection == "default" and tower.family != "clip":
        raise ValueError(
            "vision_feature_select_strategy='default' drops the first patch of a tower without class token; use 'full'."
        )
    # transformers counts hidden_states, which begin with the embeddings: a layer from the front is one from the end.
    from_end = layer if layer < 0 else layer - tower.encoder.num_layers - 1
    return tower.reading(from_end, class_token=selection == "full")


def _format(
    config: Mapping[str, Any], family: str, preprocessor: Mapping[str, Any], tower: VisionConfig | EfficientNetConfig
) -> ImageFormat:
    size = tower.image_size
    resample = _RESAMPLES.get(preprocessor.get("resample", 3))
    if resample is None:
        raise ValueError(
            f"resample={preprocessor['resample']} in preprocessor_config.json is not supported: 2 (bilinear), 3 (bicubic)."
        )
    told: dict[str, Any] = dict(
        size=size, grid=tower.grid, resample=resample, class_token=getattr(tower, "class_token", False)
    )
    if family == "llava_onevision":
        ratio = str(config.get("vision_aspect_ratio", "anyres_max_9"))
        most = re.fullmatch(r"anyres_max_(\d+)", ratio)
        if not most:
            raise ValueError(f"vision_aspect_ratio={ratio!r} is not supported; supported is anyres_max_N.")
        sides = range(size, 6 * size + 1, size)
        grids = config.get("image_grid_pinpoints") or [[high, wide] for high in sides for wide in sides]
        grids = tuple((int(high), int(wide)) for high, wide in grids)
        told |= {"resize": "anyres", "resolutions": grids, "max_crops": int(most[1]), "newline": True}
        return ImageFormat(background=_background(tower), **told)
    if preprocessor.get("do_pad"):
        return ImageFormat(resize="pad", background=_background(tower), **told)
    crops = preprocessor.get("do_center_crop", tower.family == "clip")
    return ImageFormat(resize="crop" if crops else "squash", **told)


def _background(tower: VisionConfig | EfficientNetConfig) -> tuple[int, int, int]:
    red, green, blue = (int(255 * x) for x in tower.mean)
    return red, green, blue


def vlm_config_to_hf(config: VLMConfig) -> dict[str, Any]:
    """The dict for a config.json that transformers reads as this architecture (with an EfficientNet: only we do)."""
    sight, text = config.sight, hf_config.config_to_hf(config.decoder)
    tower = sight.tower
    if isinstance(tower, VisionConfig):
        vision = hf_encoders.encoder_config_to_hf(tower)
        selection = "default" if tower.family == "clip" and not tower.class_token else "full"
    else:
        vision, selection = efficientnet.config_to_json(tower), "full"
    told: dict[str, Any] = {
        "architectures": [ARCHITECTURES[sight.family]],
        "model_type": sight.family,
        "vision_config": vision,
        "text_config": text,
        "image_token_index": sight.image_token_id,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": selection,
        "projector_hidden_act": {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}[sight.activation],
        "multimodal_projector_bias": sight.bias,
        "tie_word_embeddings": config.decoder.tie_embeddings,
    }
    form = sight.format
    if sight.family == "llava_onevision":
        told["image_grid_pinpoints"] = [list(resolution) for resolution in form.resolutions]
        told["vision_aspect_ratio"] = f"anyres_max_{form.max_crops}"
    else:
        told["image_seq_length"] = form.features_per_crop
    return told


def preprocessor_to_hf(sight: Sight) -> dict[str, Any]:
    """The dict for preprocessor_config.json."""
    form, tower = sight.format, sight.tower
    kinds = {"anyres": "LlavaOnevision", "squash": "Siglip", "crop": "CLIP", "pad": "Llava"}
    told = hf_encoders.preprocessor(
        f"{kinds[form.resize]}ImageProcessor", form.size, tower.mean, tower.std, crops=form.resize in ("crop", "pad")
    )
    told |= {"do_convert_rgb": True, "resample": {name: number for number, name in _RESAMPLES.items()}[form.resample]}
    if form.resize == "squash":
        return told | {"do_center_crop": False}
    if form.resize == "anyres":
        told["image_grid_pinpoints"] = [list(resolution) for resolution in form.resolutions]
    return told if form.resize == "crop" else told | {"do_pad": True}


_TOWER, _PROJECTOR = "vision_tower.", "multi_modal_projector."


def vlm_layout(config: VLMConfig) -> list[Leaf]:
    """The parameters of a `VLM` with the names that the hub's checkpoints give their tensors."""
    sight, width = config.sight, config.decoder.hidden_size
    leaves = [dataclasses.replace(leaf, name=f"language_model.{leaf.name}") for leaf in layout(config.decoder)]
    if isinstance(sight.tower, VisionConfig):
        leaves += hf_encoders.encoder_layout(sight.tower, prefix=_TOWER, at="vision_tower/")
    else:
        leaves += [
            dataclasses.replace(leaf, path=f"vision_tower/{leaf.path}", name=f"{_TOWER}{leaf.name}")
            for leaf in efficientnet.layout(sight.tower)
        ]
    for layer, into in (("linear_1", sight.tower.width), ("linear_2", width)):
        leaves.append(Leaf(f"projector/{layer}/kernel", f"{_PROJECTOR}{layer}.weight", (into, width), True))
        if sight.bias:
            leaves.append(Leaf(f"projector/{layer}/bias", f"{_PROJECTOR}{layer}.bias", (width,), False))
    if sight.format.newline:
        leaves.append(Leaf("image_newline", "image_newline", (width,), False))
    return leaves


def unread_tensors(config: VLMConfig, dtype: Any) -> list[Planned]:
    """What transformers wants of the tower and nothing reads: the norm behind its last layer, as one that changes nothing."""
    tower = config.sight.tower
    if not isinstance(tower, VisionConfig):
        return []
    name, shape = f"{_TOWER}vision_model.post_layernorm", (tower.width,)
    return [
        Planned(f"{name}.weight", dtype, shape, lambda: np.ones(shape)),
        Planned(f"{name}.bias", dtype, shape, lambda: np.zeros(shape)),
    ]


_NAMES = (
    (r"^(model\.)?language_model\.lm_head\.", "language_model.lm_head."),
    (r"^lm_head\.", "language_model.lm_head."),
    (r"^(model\.)?language_model\.(model\.)?(?!lm_head)", "language_model.model."),
    (r"^(model\.)?vision_tower\.", _TOWER),
    (r"^(model\.)?multi_modal_projector\.", _PROJECTOR),
    (r"^(model\.)?image_newline$", "image_newline"),
)
"""Each version of transformers has had another nesting; ours is the hub's oldest."""


def canonical(config: VLMConfig) -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to the name that `vlm_layout` has for it."""
    tower = config.sight.tower
    inside = hf_encoders.canonical(tower) if isinstance(tower, VisionConfig) else lambda name: name

    def ours(name: str) -> str:
        for pattern, replacement in _NAMES:
            changed, hits = re.subn(pattern, replacement, name)
            if hits:
                return _TOWER + inside(changed.removeprefix(_TOWER)) if replacement == _TOWER else changed
        return name

    return ours


def ignored(config: VLMConfig) -> list[str]:
    """Regexes of tensors that a checkpoint may hold and this model has no place for."""
    tower = config.sight.tower
    return hf_encoders.ignored_tensors(tower, prefix=_TOWER) if isinstance(tower, VisionConfig) else []
