"""Vision-language models: a tower's features, through a projector, in the place of a decoder's image tokens (LLaVA).

A `VLM` is a `Decoder` with eyes: the decoder's parameters lie where they always do, beside them `vision_tower`, `projector` and,
where the model has one, `image_newline`. A row of tokens holds the image token once for each feature of its pictures; which
feature stands where is said by `Images.places`, which the host works out (`jaxmethods.images`), so that pictures of any
number, shape and resolution become arrays of one shape.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, Num

from jaxmethods.images import TEXT, ImageFormat
from jaxmethods.kernels.linear import dot_general
from jaxmethods.models import decoder
from jaxmethods.models.decoder import Decoder, DecoderConfig, Given
from jaxmethods.models.efficientnet import EfficientNet, EfficientNetConfig
from jaxmethods.models.encoder import ACTIVATIONS
from jaxmethods.models.encoder import RULES as ENCODER_RULES
from jaxmethods.models.vision import VisionConfig, VisionTower
from jaxmethods.sharding import split_rows

RULES = (
    (r"projector/linear_1/kernel", P("fsdp", "tensor")),
    (r"projector/linear_2/kernel", P("tensor", "fsdp")),
    *((rf"vision_tower/.*{pattern}", spec) for pattern, spec in ENCODER_RULES),
    *decoder.RULES,
)
"""Where a VLM's parameters lie."""

FAMILIES = ("llava", "llava_onevision")
PARTS = ("vision_tower", "projector", "decoder")


def part_of(path: str) -> str:
    """The part of a VLM that a parameter belongs to; the newline vector is of the projector, an objective's own of none."""
    first = path.split("/")[0]
    if first in ("vision_tower", "projector", "objective"):
        return first
    return "projector" if first == "image_newline" else "decoder"


@dataclasses.dataclass(frozen=True)
class Sight:
    """How a decoder sees.

    Args:
        family: whose layout the files have: "llava" or "llava_onevision".
        tower: the architecture of the vision tower.
        format: how a picture becomes crops, and where their features stand.
        image_token_id: stands in a row of tokens once for each feature.
        activation: between the projector's two linear layers.
        bias: whether these have one.
    """

    family: str
    tower: VisionConfig | EfficientNetConfig
    format: ImageFormat
    image_token_id: int
    activation: str = "gelu"
    bias: bool = True

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; the families are {', '.join(FAMILIES)}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; choose of {', '.join(ACTIVATIONS)}.")
        if self.format.features_per_crop != self.tower.tokens:
            raise ValueError(
                f"the tower gives {self.tower.tokens} features a crop and the image format counts {self.format.features_per_crop}."
            )


@dataclasses.dataclass(frozen=True)
class VLMConfig:
    """The architecture of a vision-language model."""

    decoder: DecoderConfig
    sight: Sight

    def __post_init__(self) -> None:
        if not 0 <= self.sight.image_token_id < self.decoder.vocab_size:
            raise ValueError(
                f"image_token_id={self.sight.image_token_id} is no token of a vocabulary of {self.decoder.vocab_size}."
            )


class Images(NamedTuple):
    """The pictures of a batch.

    pixels: the crops of each row, filled up with zeros, grey levels 0..255.
    places: for each token which of the row's features stands there (crop * features a crop + feature), -1 at text, -2 for
        the newline vector; `corners` of them, whose features are averaged by `weights` (None where there is one corner).
    """

    pixels: Num[Array | np.ndarray, "batch crops height width 3"]
    places: Int[Array | np.ndarray, "batch time corners"]
    weights: Float[Array | np.ndarray, "batch time corners"] | None = None


def pictures(batch: Mapping[str, Any]) -> dict[str, Images]:
    """{"images": the pictures of a batch of the data room}, or {} where it has none: what a model is called with."""
    if "pixels" not in batch:
        return {}
    return {"images": Images(batch["pixels"], batch["places"], batch.get("place_weights"))}


def as_images(module: Any, tokens: Any, images: Any) -> Images | None:
    """What a module takes as `images=`, from what a caller may give: `Images`, or pixels alone.

    Args:
        tokens: [B, T]; each picture's image tokens stand in it, once a feature.
        images: `Images`; or pixels [B, crops, S, S, 3] in 0..255, where each crop is a picture whose features stand in order at
            the row's image tokens (for formats of one crop a picture, without newline); a row without image tokens has none.

    Raises:
        ValueError: images for a model that reads none; image tokens that are not as many as features; another shape.
    """
    if images is None:
        return None
    sight = getattr(module, "sight", None)
    if sight is None:
        raise ValueError(f"{type(module).__name__} reads no images; leave images=None.")
    tokens = jnp.asarray(tokens)
    here = tokens == sight.image_token_id
    pixels = images.pixels if isinstance(images, Images) else images
    size = sight.format.size
    if np.ndim(pixels) != 5 or np.shape(pixels)[0] != len(tokens) or np.shape(pixels)[2:] != (size, size, 3):
        raise ValueError(
            f"pixels have shape {np.shape(pixels)}; these rows want ({len(tokens)}, crops, {size}, {size}, 3)."
        )
    if isinstance(images, Images):
        _same(here, jnp.asarray(images.places)[:, :, 0] != TEXT)
        return images
    if sight.format.newline or sight.format.most_crops > 1:
        raise ValueError(
            "this model cuts pictures into crops; give images as jaxmethods.models.Images, with their places."
        )
    order = jnp.cumsum(here, axis=1) - 1
    whole = np.shape(pixels)[1] * sight.format.features_per_crop
    counts = here.sum(axis=1)
    if not isinstance(counts, jax.core.Tracer):
        for row, count in enumerate(np.asarray(counts).tolist()):
            if count not in (0, whole):
                raise ValueError(
                    f"row {row} has {count} image tokens and {np.shape(pixels)[1]} pictures of "
                    f"{sight.format.features_per_crop} features; it needs one token for each feature, or none where it has no "
                    "picture."
                )
    return Images(pixels, jnp.where(here, order, TEXT)[:, :, None])


def _same(here: Array, placed: Array) -> None:
    """Refuses image tokens that no feature stands for, and the reverse; traced values cannot be looked at."""
    if isinstance(here, jax.core.Tracer) or isinstance(placed, jax.core.Tracer):
        return
    one, two = np.asarray(here), np.asarray(placed)
    if one.shape != two.shape or (one != two).any():
        row = int((one != two).any(axis=1).argmax()) if one.shape == two.shape else 0
        counts = f"{one[row].sum()} image tokens and {two[row].sum()} features"
        raise ValueError(
            f"row {row} has {counts}, or they stand at different places; one token is needed for each feature."
        )


class Projector(nn.Module):
    """Linear, activation, linear: from a tower's features to a decoder's embeddings."""

    width: int
    activation: str
    bias: bool
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch out"]:
        told: Any = dict(use_bias=self.bias, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=dot_general)
        x = ACTIVATIONS[self.activation](nn.Dense(self.width, name="linear_1", **told)(features))
        return nn.Dense(self.width, name="linear_2", **told)(x)


class VLM(Decoder):
    """Tokens and pictures to hidden states; see `Decoder`, whose fields have the same meaning.

    Args:
        sight: how it sees, a `Sight`.
    """

    sight: Any = None

    unmasked: ClassVar[str] = r"^(vision_tower|projector)/"
    """Layers that see crops: `mask`, which is of tokens, says nothing of them."""

    @property
    def whole(self) -> VLMConfig:
        """The architecture."""
        return VLMConfig(self.config, self.sight)

    def _see(self, tokens: Int[Array, "batch time"], images: Images | None) -> Given | None:
        """The features of the pictures, at their places; nothing without pictures, as for tokens that continue a cache."""
        if images is None and not self.is_initializing():
            return None
        if images is None:
            size, corners = self.sight.tower.image_size, self.sight.format.corners
            blank = jnp.zeros((len(tokens), 1, size, size, 3), jnp.uint8)
            images = Images(blank, jnp.full((*tokens.shape, corners), TEXT))
        sight, pixels = self.sight, split_rows(jnp.asarray(images.pixels), self.mesh)
        rows, crops = pixels.shape[:2]
        dtypes: Any = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        told: Any = {}
        if isinstance(sight.tower, VisionConfig):
            told = {"remat": "none" if self.remat == "none" else "full", "mesh": self.mesh}
        kind: Any = VisionTower if told else EfficientNet
        tower = kind(sight.tower, **dtypes, **told, name="vision_tower")
        projector = Projector(self.config.hidden_size, sight.activation, sight.bias, **dtypes, name="projector")
        features = projector(tower(pixels.reshape(rows * crops, *pixels.shape[2:])).features)
        features = split_rows(features.reshape(rows, -1, features.shape[-1]), self.mesh)
        if sight.format.newline:
            newline = self.param("image_newline", nn.initializers.normal(0.02), features.shape[-1:], self.param_dtype)
            newline = jnp.broadcast_to(newline.astype(features.dtype), (rows, 1, len(newline)))
            features = jnp.concatenate([features, newline], axis=1)
        places = jnp.asarray(images.places)
        at = jnp.where(places < 0, features.shape[1] - 1, places)  # the newline stands last
        standing = lambda i: jax.vmap(lambda row, index: row[index])(features, at[:, :, i])
        if images.weights is None:
            return Given(standing(0), places[:, :, 0] != TEXT)
        weights = jnp.asarray(images.weights).astype(features.dtype)
        corners = [weights[:, :, i, None] * standing(i) for i in range(at.shape[2])]
        return Given(sum(corners[1:], start=corners[0]), places[:, :, 0] != TEXT)
