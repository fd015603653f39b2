"""A language model given eyes: a vision tower before it, and a projector between them that has yet to learn."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from jaxmethods import tree
from jaxmethods.images import ImageFormat, open_picture, prepare
from jaxmethods.models import architectures, efficientnet, files, huggingface
from jaxmethods.models.decoder import Decoder, DecoderConfig
from jaxmethods.models.dual import DualConfig
from jaxmethods.models.efficientnet import EfficientNet
from jaxmethods.models.vision import VisionConfig, VisionTower
from jaxmethods.models.vlm import VLM, Sight, VLMConfig
from jaxmethods.sharding import shardings_for
from jaxmethods.tree import Tree


def vlm_config(
    decoder: DecoderConfig, tower: str | os.PathLike[str], *, image_token_id: int, pool: int | None = None
) -> VLMConfig:
    """The architecture of a decoder behind a vision tower; no weight is read.

    Args:
        tower: a folder or hub name of a CLIP, SigLIP or EfficientNet-Lite0 model. Of the former the layer before the last is
            read, without class token, as LLaVA does.
        image_token_id: of a token that the tokenizer knows and texts do not use.
        pool: for EfficientNet, average its 7 x 7 features to this many a side.

    Raises:
        ValueError: another kind of model, or `pool` for a transformer.
        FileNotFoundError, ConnectionError: as `models.load`.
    """
    folder = files.resolve(tower, weights=False)
    told = files.model_config(folder)
    seen: Any
    if told.get("model_type") == efficientnet.FAMILY:
        seen = dataclasses.replace(efficientnet.config_from_json(told), pool=pool, classes=0)
    else:
        if pool is not None:
            raise ValueError(f"pool={pool} is for EfficientNet; the features of {tower} stay as they are.")
        seen = huggingface.read_config(folder)
        seen = seen.vision if isinstance(seen, DualConfig) else seen
        if not isinstance(seen, VisionConfig):
            raise ValueError(f"{tower} holds a {type(seen).__name__.removesuffix('Config')}, not a vision tower.")
        seen = seen.reading(-2)
    crops = "crop" if isinstance(seen, VisionConfig) and seen.family == "clip" else "squash"
    form = ImageFormat(size=seen.image_size, grid=seen.grid, resize=crops)
    return VLMConfig(decoder, Sight("llava", seen, form, image_token_id))


def with_eyes(
    module: Decoder,
    params: Tree,
    tower: str | os.PathLike[str],
    *,
    image_token_id: int,
    key: Key[Array, ""],
    pool: int | None = None,
    pictures: Sequence[Any] = (),
    mesh: Mesh | None = None,
) -> tuple[VLM, Tree]:
    """A decoder with its parameters as a `VLM` with the tower's weights and a projector drawn from `key`.

    Args:
        pictures: some of those to learn from, a few hundred (what `images.open_picture` opens). The projector's first layer then
            starts with the whitening of their features before it: what tells pictures apart is mostly a small part of a tower's
            features, and an optimiser is slow to find it.
        mesh: places what is new, as `models.load` does.
        The others as `vlm_config`.

    Raises:
        ValueError: a module with eyes or adapters; pictures whose features are all equal.
        ValueError, FileNotFoundError, ConnectionError: as `vlm_config` and `models.load`.
    """
    _require_plain(module)
    config = vlm_config(module.config, tower, image_token_id=image_token_id, pool=pool)
    dtype = module.param_dtype
    eyes = tree.partition(architectures.shapes(config, dtype), lambda path: path.startswith("vision_tower/"))[0]
    placed = None if mesh is None else shardings_for(eyes, mesh, architectures.RULES)
    placed = None if placed is None else placed["vision_tower"]
    seen = huggingface.read_params(files.resolve(tower), config.sight.tower, dtype=dtype, shardings=placed)
    projector = _draw_projector(config, dtype, key)
    if pictures:
        told = np.concatenate(list(tower_features(config.sight, seen, pictures)))
        flat = told.reshape(-1, told.shape[-1]).astype(np.float64)
        projector["projector"]["linear_1"] = _whitened(projector["projector"]["linear_1"], flat)
    if mesh is not None:
        projector = jax.device_put(projector, shardings_for(projector, mesh, architectures.RULES))
    return _seeing(module, config), params | {"vision_tower": seen} | projector


def with_eyes_shapes(
    module: Decoder, tower: str | os.PathLike[str], *, image_token_id: int, pool: int | None = None
) -> tuple[VLM, Tree]:
    """(module, params) like `with_eyes`, with a ShapeDtypeStruct in place of each array."""
    _require_plain(module)
    config = vlm_config(module.config, tower, image_token_id=image_token_id, pool=pool)
    return _seeing(module, config), architectures.shapes(config, module.param_dtype, module.quantization)


def _seeing(module: Decoder, config: VLMConfig) -> VLM:
    """The module with all its settings, and eyes."""
    told: Any = {
        f.name: getattr(module, f.name) for f in dataclasses.fields(Decoder) if f.name not in ("parent", "name")
    }
    return VLM(**told, sight=config.sight)


def _require_plain(module: Any) -> None:
    if type(module) is not Decoder:
        raise ValueError(
            f"{type(module).__name__} cannot be given eyes: it must be a Decoder, without eyes and before adapters are attached."
        )


_DAMPING = 0.02
"""Of the largest variance, added to all: directions of less are left smaller than one."""


def tower_features(
    sight: Sight, tower: Tree, pictures: Sequence[Any], *, batch_size: int = 32
) -> Iterator[Float[np.ndarray, "pictures places width"]]:
    """A vision tower's features of pictures, so many at once; float32, on one device, each picture as one crop.

    Args:
        tower: its parameters.
        pictures: what `images.open_picture` opens.

    Raises:
        ValueError, FileNotFoundError: a picture that cannot be read.
    """
    kind: Any = VisionTower if isinstance(sight.tower, VisionConfig) else EfficientNet
    params, form = jax.device_get(tower), sight.format.one_crop
    apply = jax.jit(lambda params, x: kind(sight.tower).apply({"params": params}, x).features)
    for start in range(0, len(pictures), batch_size):
        some = enumerate(pictures[start : start + batch_size], start + 1)
        crops = [prepare(open_picture(picture, f"picture {number}"), form).crops for number, picture in some]
        pixels = np.concatenate(crops + crops[-1:] * (batch_size - len(crops)))  # one shape
        yield np.asarray(apply(params, pixels), np.float32)[: len(crops)]


def _whitened(layer: Tree, features: np.ndarray) -> Tree:
    """A drawn linear layer behind the whitening x -> (C + d 1)^(-1/2) (x - mean), its outputs of unit variance over all."""
    mean = features.mean(axis=0)
    variance, axes = np.linalg.eigh(np.cov(features, rowvar=False, bias=True))
    if not variance[-1] > 0:
        raise ValueError(f"the features of {len(features)} places are all equal; give pictures that differ.")
    inverse_root = (axes / np.sqrt(variance.clip(0) + _DAMPING * variance[-1])) @ axes.T
    kernel = inverse_root @ np.asarray(layer["kernel"], np.float64)
    kernel /= ((features - mean) @ kernel).std()
    dtype = layer["kernel"].dtype
    return {"kernel": jnp.asarray(kernel, dtype)} | (
        {"bias": jnp.asarray(-mean @ kernel, dtype)} if "bias" in layer else {}
    )


def _draw_projector(config: VLMConfig, dtype: Any, key: Key[Array, ""]) -> Tree:
    """Normal with the standard deviation that keeps the size of what goes through; biases of 0."""
    shapes = architectures.shapes(config, dtype)
    new = tree.partition(shapes, lambda path: path.startswith(("projector/", "image_newline")))[0]

    def draw(number: int, shape: jax.ShapeDtypeStruct) -> Array:
        if len(shape.shape) < 2:
            return jnp.zeros(shape.shape, shape.dtype)
        scale = shape.shape[0] ** -0.5
        return (scale * jax.random.normal(jax.random.fold_in(key, number), shape.shape)).astype(shape.dtype)

    return tree.unflatten({path: draw(i, x) for i, (path, x) in enumerate(sorted(tree.flatten(new).items()))})
