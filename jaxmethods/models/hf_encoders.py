"""Encoders in Hugging Face's layout: config.json to and from our configurations, and the tensors of each parameter."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxmethods.models.dual import DualConfig
from jaxmethods.models.encoder import EncoderConfig
from jaxmethods.models.layout import Leaf
from jaxmethods.models.text_encoder import TextEncoderConfig
from jaxmethods.models.vision import MEAN_AND_STD, VisionConfig

AnyConfig = VisionConfig | TextEncoderConfig | DualConfig

MODEL_TYPES = {
    "clip": "CLIPModel",
    "clip_vision_model": "CLIPVisionModel",
    "clip_text_model": "CLIPTextModel",
    "siglip": "SiglipModel",
    "siglip_vision_model": "SiglipVisionModel",
    "siglip_text_model": "SiglipTextModel",
    "bert": "BertModel",
}
"""`model_type` in config.json -> the class of transformers that opens it."""

# The values that transformers takes where config.json is silent.
_CLIP = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "num_hidden_layers": 12}
_SIGLIP = {
    "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_hidden_layers": 12, "hidden_size": 768,
    "intermediate_size": 3072, "num_attention_heads": 12,
}  # fmt: skip
_IDS = {"pad_token_id": 1, "bos_token_id": 49406, "eos_token_id": 49407}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "clip_vision_model": _CLIP | {
        "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
    },
    "clip_text_model": _CLIP | _IDS | {
        "hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "vocab_size": 49408,
        "max_position_embeddings": 77,
    },
    "siglip_vision_model": _SIGLIP | {"image_size": 224, "patch_size": 16, "vision_use_head": True},
    "siglip_text_model": _SIGLIP | _IDS | {"vocab_size": 32000, "max_position_embeddings": 64, "projection_size": None},
    "bert": _SIGLIP | {
        "hidden_act": "gelu", "layer_norm_eps": 1e-12, "vocab_size": 30522, "max_position_embeddings": 512,
        "type_vocab_size": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
    },
}  # fmt: skip

_ACTIVATIONS = {
    "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "quick_gelu": "quick_gelu",
}  # fmt: skip

# Features we have not got, with the values that leave them off. Dropout is none of them: it is 0 outside of training, and in
# training adapters have their own.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "num_channels": (3,),
    "is_decoder": (None, False),
    "add_cross_attention": (None, False),
    "position_embedding_type": (None, "absolute"),
}

SIGLIP_SCALE, SIGLIP_BIAS = float(np.log(10.0)), -10.0
"""Where SigLIP's training starts (https://arxiv.org/abs/2303.15343, section 3.2); no config.json says so."""


def encoder_config_from_hf(config: Mapping[str, Any], preprocessor: Mapping[str, Any] | None = None) -> AnyConfig:
    """What the dict in a config.json says of the architecture.

    A vision tower reads its last layer as `last_hidden_state` of transformers does, class token included, and pools where the
    model has a head; `VisionConfig.reading` changes that. A BERT pools the mean, unless modules.json beside it says otherwise
    (`hf_pooling`, which `models.load` reads).

    Args:
        preprocessor: the dict in preprocessor_config.json; its mean and standard deviation of pixels are taken. Without it they
            are the family's.

    Raises:
        ValueError: an architecture or a feature that is not implemented, a value out of place.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise ValueError(
            f"model_type {kind!r} is no encoder that is supported; supported are {', '.join(MODEL_TYPES)}."
        )
    if kind in ("clip", "siglip"):
        return _dual(config, str(kind), preprocessor)
    _refuse_features(config, str(kind))
    return _vision(config, str(kind), preprocessor) if kind.endswith("vision_model") else _text(config, str(kind))


def _dual(config: Mapping[str, Any], family: str, preprocessor: Mapping[str, Any] | None) -> DualConfig:
    _refuse_features(config, family)
    towers: Any = {}
    for part in ("vision", "text"):
        told = config.get(f"{part}_config_dict")  # wins where an old file has both, as in transformers
        told = dict((config.get(f"{part}_config") if told is None else told) or {})
        towers[part] = encoder_config_from_hf(told | {"model_type": f"{family}_{part}_model"}, preprocessor)
    if family == "siglip":
        return DualConfig(**towers, initial_scale=SIGLIP_SCALE, initial_bias=SIGLIP_BIAS)
    told = {"projection_dim": 512, "logit_scale_init_value": 2.6592} | dict(config)
    return DualConfig(
        **towers, projection=_whole(told, "projection_dim"), initial_scale=float(told["logit_scale_init_value"])
    )


def _vision(config: Mapping[str, Any], kind: str, preprocessor: Mapping[str, Any] | None) -> VisionConfig:
    told, family = _DEFAULTS[kind] | dict(config), kind.split("_")[0]
    mean, std = _mean_and_std(family, preprocessor or {})
    return VisionConfig(
        family=family,
        encoder=_encoder(told, kind),
        image_size=_square(told, "image_size"),
        patch_size=_square(told, "patch_size"),
        mean=mean,
        std=std,
        norm_features=family == "siglip",
        class_token=family == "clip",
        pooled=family == "clip" or bool(told["vision_use_head"]),
    )


def _text(config: Mapping[str, Any], kind: str) -> TextEncoderConfig:
    told, family = _DEFAULTS[kind] | dict(config), kind.split("_")[0]
    if isinstance(told["eos_token_id"], list):
        raise ValueError(
            f"eos_token_id={told['eos_token_id']} in config.json: an encoder knows one such token; name one."
        )
    return TextEncoderConfig(
        family=family,
        vocab_size=_whole(told, "vocab_size"),
        max_positions=_whole(told, "max_position_embeddings"),
        encoder=_encoder(told, kind),
        token_types=_whole(told, "type_vocab_size") if family == "bert" else 0,
        head_width=told["projection_size"] or told["hidden_size"] if family == "siglip" else None,
        bos_id=told["bos_token_id"],
        eos_id=told["eos_token_id"],
        pad_id=told["pad_token_id"],
    )


def _encoder(told: Mapping[str, Any], kind: str) -> EncoderConfig:
    activation = told["hidden_act"]
    if activation not in _ACTIVATIONS:
        raise ValueError(f"hidden_act {activation!r} is not supported; supported are {', '.join(_ACTIVATIONS)}.")
    return EncoderConfig(
        hidden_size=_whole(told, "hidden_size"),
        intermediate_size=_whole(told, "intermediate_size"),
        num_layers=_whole(told, "num_hidden_layers"),
        num_heads=_whole(told, "num_attention_heads"),
        activation=_ACTIVATIONS[activation],
        layer_norm_eps=float(told["layer_norm_eps"]),
        post_norm=kind == "bert",
        causal=kind == "clip_text_model",
    )


def _whole(told: Mapping[str, Any], key: str) -> int:
    if type(told[key]) is not int:
        raise ValueError(f"config.json must give {key} as a whole number, not {told[key]!r}.")
    return int(told[key])


def _square(told: Mapping[str, Any], key: str) -> int:
    sides = told[key] if isinstance(told[key], list | tuple) else [told[key]]
    if len(set(sides)) != 1 or type(sides[0]) is not int:
        raise ValueError(f"{key}={told[key]!r} in config.json: only squares are supported, given as one whole number.")
    return int(sides[0])


def _refuse_features(config: Mapping[str, Any], kind: str) -> None:
    for key, off in _REFUSED.items():
        if key in config and config[key] not in off:
            raise ValueError(f"{key}={config[key]!r} in the config.json of a {kind} model is not supported.")


def _mean_and_std(family: str, preprocessor: Mapping[str, Any]) -> tuple[Any, Any]:
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if not preprocessor.get("do_rescale", True) or abs(255 * factor - 1) > 1e-3:
        raise ValueError(
            f"preprocessor_config.json scales pixels by {factor if preprocessor.get('do_rescale', True) else 1}; "
            "only 1/255 is supported."
        )
    if not preprocessor.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    found = []
    for key, usual in zip(("image_mean", "image_std"), MEAN_AND_STD[family], strict=True):
        numbers = preprocessor.get(key) or usual
        if len(numbers) != 3 or (key == "image_std" and min(numbers) <= 0):
            raise ValueError(
                f"{key}={numbers!r} in preprocessor_config.json must be three numbers, one a colour, std above 0."
            )
        found.append(tuple(map(float, numbers)))
    return found[0], found[1]


def encoder_config_to_hf(config: AnyConfig) -> dict[str, Any]:
    """The dict for a config.json that transformers reads as this architecture.

    A vision tower that reads an earlier layer has no parameters of the later ones, and so is written as the smaller tower it is:
    who writes it inside a vision-language model names its last layer (-1) as the one that is read. What a tower reads, how a BERT
    pools and where SigLIP's training starts have no place in these files; mean and standard deviation of pixels are in
    `preprocessor_to_hf`.
    """
    if isinstance(config, DualConfig):
        family = config.vision.family
        both: dict[str, Any] = {"architectures": [MODEL_TYPES[family]], "model_type": family}
        for part in ("vision", "text"):
            both[f"{part}_config"] = encoder_config_to_hf(getattr(config, part))
            del both[f"{part}_config"]["architectures"]
        if family == "siglip":
            return both
        for part in ("vision_config", "text_config"):
            both[part]["projection_dim"] = config.projection  # transformers' projected single towers read it here
        return both | {"projection_dim": config.projection, "logit_scale_init_value": config.initial_scale}
    vision = isinstance(config, VisionConfig)
    kind = config.family if config.family == "bert" else f"{config.family}_{'vision' if vision else 'text'}_model"
    e = config.encoder
    activation = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}[e.activation]
    told: dict[str, Any] = {
        "architectures": [MODEL_TYPES[kind]],
        "model_type": kind,
        "hidden_size": e.hidden_size,
        "intermediate_size": e.intermediate_size,
        "num_hidden_layers": config.num_layers if isinstance(config, VisionConfig) else e.num_layers,
        "num_attention_heads": e.num_heads,
        "hidden_act": activation,
        "layer_norm_eps": e.layer_norm_eps,
    }
    if isinstance(config, VisionConfig):
        told |= {"image_size": config.image_size, "patch_size": config.patch_size, "num_channels": 3}
        return told | ({"vision_use_head": config.pooled} if config.family == "siglip" else {})
    told |= {"vocab_size": config.vocab_size, "max_position_embeddings": config.max_positions}
    told |= {"bos_token_id": config.bos_id, "eos_token_id": config.eos_id, "pad_token_id": config.pad_id}
    if config.family == "bert":
        told |= {"type_vocab_size": config.token_types}
    return told | ({"projection_size": config.head_width} if config.family == "siglip" else {})


def preprocessor_to_hf(config: VisionConfig | DualConfig) -> dict[str, Any]:
    """The dict for a preprocessor_config.json: how transformers makes of an image what this tower makes of its pixels."""
    c = config.vision if isinstance(config, DualConfig) else config
    if c.family == "siglip":
        return preprocessor("SiglipImageProcessor", c.image_size, c.mean, c.std, crops=False)
    return preprocessor("CLIPImageProcessor", c.image_size, c.mean, c.std, crops=True) | {"do_convert_rgb": True}


def preprocessor(
    kind: str, size: int, mean: tuple[float, ...], std: tuple[float, ...], *, crops: bool
) -> dict[str, Any]:
    """What a preprocessor_config.json of any of our models says.

    Args:
        kind: the class of transformers.
        size: pixels a side of what it gives.
        mean, std: of each colour in 0..1.
        crops: the shortest side is resized and the centre taken; else the whole picture is squashed.
    """
    square = {"height": size, "width": size}
    told: dict[str, Any] = {
        "image_processor_type": kind, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "resample": 3, "image_mean": list(mean), "image_std": list(std), "size": square,
    }  # fmt: skip
    return told | ({"size": {"shortest_edge": size}, "do_center_crop": True, "crop_size": square} if crops else {})


def canonical(config: AnyConfig) -> Callable[[str], str]:
    """From a tensor's name in a checkpoint to the name that `encoder_layout` has for it.

    Files of transformers 4, and the hub's, begin the names of a single tower with "vision_model." or "text_model.", those of
    transformers 5 do not. A BERT is called "bert." inside models with a head, and old files call its norms' parameters otherwise.
    """
    if isinstance(config, DualConfig):
        return lambda name: name
    if config.family != "bert":
        return lambda name: re.sub(_OF_TOWER, _own_prefix(config), name)
    return lambda name: re.sub(r"LayerNorm\.(gamma|beta)$", _old_norm, name.removeprefix("bert."))


_OF_TOWER = r"^(?=(embeddings|encoder|pre_layrnorm|post_layernorm|final_layer_norm|head)\.)"


def _old_norm(found: re.Match[str]) -> str:
    return {"gamma": "LayerNorm.weight", "beta": "LayerNorm.bias"}[found[1]]


def _own_prefix(config: VisionConfig | TextEncoderConfig) -> str:
    if config.family == "bert":
        return ""
    return "vision_model." if isinstance(config, VisionConfig) else "text_model."


def encoder_layout(config: AnyConfig, prefix: str = "", at: str = "") -> list[Leaf]:
    """The parameters of a `VisionTower`, `TextEncoder` or `DualEncoder` with the names of their tensors on the hub.

    Args:
        prefix: before each tensor's name: "vision_tower." in vision-language models.
        at: before each parameter's path: "vision/".
    """
    if isinstance(config, VisionConfig):
        return _vision_leaves(config, prefix + _own_prefix(config), at)
    if isinstance(config, TextEncoderConfig):
        return _text_leaves(config, prefix + _own_prefix(config), at)
    leaves = encoder_layout(config.vision, prefix, f"{at}vision/") + encoder_layout(config.text, prefix, f"{at}text/")
    shape = () if config.vision.family == "clip" else (1,)
    leaves.append(Leaf(f"{at}logit_scale", f"{prefix}logit_scale", shape, False, dtype=np.float32))
    if config.initial_bias is not None:
        leaves.append(Leaf(f"{at}logit_bias", f"{prefix}logit_bias", shape, False, dtype=np.float32))
    if config.projection is not None:
        for part, width in (("visual", config.vision.width), ("text", config.text.width)):
            leaves += _linear(at, prefix, f"{part}_projection", width, config.projection)[:1]  # no bias
    return leaves


def _linear(
    at: str, name: str, module: str, d_in: int, d_out: int, theirs: str | None = None, stack: tuple[int, ...] = ()
) -> list[Leaf]:
    path, name = at + module, name + (theirs or module.replace("/", "."))
    kernel = Leaf(f"{path}/kernel", f"{name}.weight", (*stack, d_in, d_out), True)
    return [kernel, Leaf(f"{path}/bias", f"{name}.bias", (*stack, d_out), False)]


def _norm(
    at: str, name: str, module: str, width: int, theirs: str | None = None, stack: tuple[int, ...] = ()
) -> list[Leaf]:
    path, name = at + module, name + (theirs or module.replace("/", "."))
    return [Leaf(f"{path}/{ours}", f"{name}.{tensor}", (*stack, width), False) for ours, tensor in _NORM]


_NORM = (("scale", "weight"), ("bias", "bias"))

_BERT = {
    "self_attn/q_proj": "attention.self.query", "self_attn/k_proj": "attention.self.key",
    "self_attn/v_proj": "attention.self.value", "self_attn/out_proj": "attention.output.dense",
    "layer_norm1": "attention.output.LayerNorm", "mlp/fc1": "intermediate.dense", "mlp/fc2": "output.dense",
    "layer_norm2": "output.LayerNorm",
}  # fmt: skip
"""Our modules in a layer -> BERT's, whose norms follow the sums that ours are named after."""


def _layers(c: EncoderConfig, depth: int, name: str, at: str) -> list[Leaf]:
    width, inner = c.hidden_size, c.intermediate_size
    at, name = f"{at}encoder/layers/", f"{name}encoder.layer.{{}}." if c.post_norm else f"{name}encoder.layers.{{}}."
    theirs, stack = _BERT if c.post_norm else {}, (depth,)
    leaves = []
    for module in ("layer_norm1", "layer_norm2"):
        leaves += _norm(at, name, module, width, theirs.get(module), stack)
    for module in ("self_attn/q_proj", "self_attn/k_proj", "self_attn/v_proj", "self_attn/out_proj"):
        leaves += _linear(at, name, module, width, width, theirs.get(module), stack)
    leaves += _linear(at, name, "mlp/fc1", width, inner, theirs.get("mlp/fc1"), stack)
    return leaves + _linear(at, name, "mlp/fc2", inner, width, theirs.get("mlp/fc2"), stack)


def _vision_leaves(c: VisionConfig, name: str, at: str) -> list[Leaf]:
    width, embeddings = c.width, (f"{at}embeddings/", f"{name}embeddings.")
    kernel, bias = _linear(*embeddings, "patch_embedding", 3, width)
    leaves = [Leaf(kernel.path, kernel.name, (c.patch_size, c.patch_size, 3, width), True)]
    if c.family == "clip":
        leaves.append(Leaf(f"{at}embeddings/class_embedding", f"{name}embeddings.class_embedding", (width,), False))
        leaves += _norm(at, name, "pre_layrnorm", width)
    else:
        leaves.append(bias)
    places = c.grid**2 + (c.family == "clip")
    leaves.append(_table(*embeddings, "position_embedding", "position_embedding", (places, width)))
    leaves += _layers(c.encoder, c.num_layers, name, at)
    if c.pooled or c.norm_features:
        leaves += _norm(at, name, "post_layernorm", width)
    if c.pooled and c.family == "siglip":
        inner, attention = c.encoder.intermediate_size, "head.attention.in_proj"
        leaves += [
            Leaf(f"{at}head/probe", f"{name}head.probe", (1, 1, width), False),
            Leaf(f"{at}head/attention/in_proj/kernel", f"{name}{attention}_weight", (width, 3 * width), True),
            Leaf(f"{at}head/attention/in_proj/bias", f"{name}{attention}_bias", (3 * width,), False),
            *_linear(at, name, "head/attention/out_proj", width, width),
            *_norm(at, name, "head/layernorm", width),
            *_linear(at, name, "head/mlp/fc1", width, inner),
            *_linear(at, name, "head/mlp/fc2", inner, width),
        ]
    return leaves


def _text_leaves(c: TextEncoderConfig, name: str, at: str) -> list[Leaf]:
    width, embeddings = c.encoder.hidden_size, (f"{at}embeddings/", f"{name}embeddings.")
    bert = c.family == "bert"
    words, places = ("word_embeddings", "position_embeddings") if bert else ("token_embedding", "position_embedding")
    leaves = [
        _table(*embeddings, "token_embedding/embedding", words, (c.vocab_size, width)),
        _table(*embeddings, "position_embedding", places, (c.max_positions, width)),
    ]
    if bert:
        leaves.append(_table(*embeddings, "token_type_embedding", "token_type_embeddings", (c.token_types, width)))
        leaves += _norm(*embeddings, "layer_norm", width, "LayerNorm")
    else:
        leaves += _norm(at, name, "final_layer_norm", width)
    if c.head_width is not None:
        leaves += _linear(at, name, "head", width, c.head_width)
    return leaves + _layers(c.encoder, c.encoder.num_layers, name, at)


def _table(at: str, name: str, module: str, theirs: str, shape: tuple[int, int]) -> Leaf:
    return Leaf(at + module, f"{name}{theirs}.weight", shape, False)


def ignored_tensors(config: AnyConfig, prefix: str = "") -> list[str]:
    """Regular expressions of tensors that a checkpoint may hold and the module has no place for; each fits a whole name.

    They are buffers, layers after the one that is read, norms and heads behind these, and BERT's pooler and training heads. A
    projection, a classifier or another tower is none of them.
    """
    if isinstance(config, DualConfig):
        return ignored_tensors(config.vision, prefix) + ignored_tensors(config.text, prefix)
    name = "^" + re.escape(prefix + _own_prefix(config))
    found = [rf"{name}embeddings\.position_ids$"]
    if isinstance(config, TextEncoderConfig):
        return found if config.family != "bert" else [*found, rf"{name}pooler\..*$", rf"{name}cls\..*$"]
    found += [rf"{name}encoder\.layers\.{layer}\..*$" for layer in range(config.num_layers, config.encoder.num_layers)]
    if not (config.pooled or config.norm_features):
        found.append(rf"{name}post_layernorm\..*$")
    if config.family == "siglip" and not config.pooled:
        found.append(rf"{name}head\..*$")
    return found
