"""Vision towers: images to one vector a patch, and to one vector an image. CLIP's and SigLIP's."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxmethods.kernels.linear import linear
from jaxmethods.models.encoder import MLP, Encoder, EncoderConfig, dense, layer_norm
from jaxmethods.sharding import split_tokens

Pixels = (
    UInt8[Array | np.ndarray, "images height width channels"]
    | Float[Array | np.ndarray, "images height width channels"]
)
"""Images, 0..255 whatever the dtype."""

FAMILIES = ("clip", "siglip")

MEAN_AND_STD = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Of the red, green and blue of pixels in 0..1, as each family's models were trained with."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The architecture of a vision tower, and what is read from it.

    Args:
        encoder: its layers, all of them; those after the one that is read are not built (`num_layers` says how many are).
        image_size: pixels a side; images of another size are refused. What is left beyond whole patches is cut off.
        mean, std: of each colour in 0..1; pixels are normalised with them.
        features: the hidden states that are read, counted as transformers counts `hidden_states`: -1 is the last layer's
            output, -2 that of the layer before.
        norm_features: the features are normed by `post_layernorm` (SigLIP's `last_hidden_state`; `hidden_states[-1]` is not).
        class_token: CLIP's class token stays in front of the patches' features; SigLIP has none.
        pooled: there is one vector an image: CLIP's normed class token, or what SigLIP's probe attends to.
    """

    family: str
    encoder: EncoderConfig
    image_size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    features: int = -1
    norm_features: bool = False
    class_token: bool = False
    pooled: bool = True

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; the families are {', '.join(FAMILIES)}.")
        if self.encoder.causal or self.encoder.post_norm:
            raise ValueError(
                "a vision tower's encoder has its norms in front and is not causal; leave both switches off."
            )
        if self.patch_size < 1 or not self.grid:
            raise ValueError(f"image_size={self.image_size} must hold at least one patch of {self.patch_size} pixels.")
        if not -self.encoder.num_layers <= self.features <= -1:
            raise ValueError(
                f"features={self.features} must count from the end, -1 (the last layer) to {-self.encoder.num_layers}."
            )
        if self.features != -1 and (self.pooled or self.norm_features):
            raise ValueError(
                f"features={self.features} leaves out the last layer, which `pooled` and `norm_features` need; "
                "set both to False, or features to -1."
            )
        if self.class_token and self.family == "siglip":
            raise ValueError("class_token=True: SigLIP has no class token; leave it False.")
        if self.norm_features and self.family == "clip":
            raise ValueError("norm_features=True: CLIP norms its pooled class token alone; leave it False.")

    @property
    def width(self) -> int:
        """The length of a feature."""
        return self.encoder.hidden_size

    @property
    def grid(self) -> int:
        """Patches a side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Features an image."""
        return self.grid**2 + self.class_token

    @property
    def num_layers(self) -> int:
        """Layers that are built."""
        return self.encoder.num_layers + self.features + 1

    def reading(self, features: int, *, class_token: bool = False) -> VisionConfig:
        """The same tower as a vision-language model reads it: that layer's output, not normed, and nothing else.

        Args:
            features: LLaVA's `vision_feature_layer`, counted from the end.
            class_token: its select strategy "full"; without effect on SigLIP.
        """
        kept = class_token and self.family == "clip"
        return dataclasses.replace(self, features=features, class_token=kept, norm_features=False, pooled=False)


class VisionOutput(NamedTuple):
    """Features of the patches, row by row from the upper left, behind the class token where it is kept; float32 `pooled`."""

    features: Float[Array, "images tokens width"]
    pooled: Float[Array, "images width"] | None


class PatchEmbedding(nn.Module):
    """A linear layer on the pixels of each patch.

    The kernel is [patch width, patch height, colours, width of the tower]: the convolution's tensor of a checkpoint with its
    axes reversed.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "images height width channels"]
    ) -> Float[Array, "images patches embedding"]:
        size, grid, width = self.config.patch_size, self.config.grid, self.config.width
        start = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal", in_axis=(0, 1, 2), out_axis=3)
        kernel = self.param("kernel", start, (size, size, 3, width), self.param_dtype)
        cut = pixels[:, : grid * size, : grid * size].reshape(-1, grid, size, grid, size, 3)
        patches = cut.transpose(0, 1, 3, 4, 2, 5).reshape(-1, grid * grid, size * size * 3)
        x = linear(patches.astype(self.dtype), kernel.reshape(-1, width).astype(self.dtype))
        if self.config.family == "siglip":
            x = x + self.param("bias", nn.initializers.zeros, (width,), self.param_dtype).astype(self.dtype)
        return x


class Embeddings(nn.Module):
    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Float[Array, "images height width channels"]) -> Float[Array, "images tokens embedding"]:
        c = self.config
        x = PatchEmbedding(c, self.dtype, self.param_dtype, name="patch_embedding")(pixels)
        if c.family == "clip":
            start = nn.initializers.normal(c.width**-0.5)
            token = self.param("class_embedding", start, (c.width,), self.param_dtype).astype(self.dtype)
            x = jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], 1, c.width)), x], axis=1)
        places = (x.shape[1], c.width)
        learned = self.param("position_embedding", nn.initializers.normal(c.width**-0.5), places, self.param_dtype)
        return x + learned.astype(self.dtype)


class ProbeAttention(nn.Module):
    """Attention of one query to the tokens; the three input projections are one linear layer, as in the checkpoints."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, probe: Float[Array, "images 1 width"], x: Float[Array, "images tokens width"]
    ) -> Float[Array, "images 1 width"]:
        width = x.shape[-1]
        # One product for the probe's query and the tokens' keys and values. The third of it that no one reads is a twelfth of
        # what one layer of the tower computes, and there are dozens.
        parts = dense(self, 3 * width, "in_proj")(jnp.concatenate([probe, x], axis=1))
        q, k, v = (y.reshape(*y.shape[:2], self.config.num_heads, -1) for y in jnp.split(parts, 3, axis=-1))
        out = jax.nn.dot_product_attention(q[:, :1], k[:, 1:], v[:, 1:])  # softmax in float32
        return dense(self, width, "out_proj")(out.reshape(probe.shape))


class ProbeHead(nn.Module):
    """SigLIP's pooling: a learned probe attends to the tokens, an MLP follows (https://arxiv.org/abs/2106.04560, "MAP")."""

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "images tokens width"]) -> Float[Array, "images width"]:
        c = self.config
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, c.hidden_size), self.param_dtype)
        probe = jnp.broadcast_to(probe.astype(self.dtype), (x.shape[0], 1, c.hidden_size))
        y = ProbeAttention(c, self.dtype, self.param_dtype, name="attention")(probe, x)
        normed = layer_norm(self, y, c.layer_norm_eps, "layernorm")
        return (y + MLP(c, self.dtype, self.param_dtype, name="mlp")(normed))[:, 0]


class VisionTower(nn.Module):
    """Pixels to features.

    Args:
        config: the architecture, and what is read.
        dtype: of activations and matrix products; pixels are normalised, and norms and softmax computed, in float32.
        param_dtype: of the parameters that `init` makes.
        remat: what the backward pass computes again: "none" or "full" (each layer).
        mesh: of `jaxmethods.sharding.make_mesh`; images are then split over `data` and `fsdp`.
    """

    config: VisionConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Any = None

    @nn.compact
    def __call__(self, pixels: Pixels) -> VisionOutput:
        """Features of each image, and its pooled vector where the configuration has one.

        Args:
            pixels: [n, image_size, image_size, 3], red, green, blue in 0..255, as uint8 or floating-point numbers.

        Raises:
            ValueError: images of another shape.
        """
        c, eps = self.config, self.config.encoder.layer_norm_eps
        if pixels.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"pixels are {list(pixels.shape)} and the tower reads [n, {c.image_size}, {c.image_size}, 3]; resize the images."
            )
        mean, std = (jnp.asarray(numbers, jnp.float32) for numbers in (c.mean, c.std))
        x = (jnp.asarray(pixels).astype(jnp.float32) / 255 - mean) / std
        x = Embeddings(c, self.dtype, self.param_dtype, name="embeddings")(x)
        x = split_tokens(x, self.mesh)
        if c.family == "clip":
            x = layer_norm(self, x, eps, "pre_layrnorm")  # spelled as in the checkpoints
        settings = self.dtype, self.param_dtype, self.remat, self.mesh
        x = Encoder(c.encoder, *settings, skip_last=-1 - c.features, name="encoder")(x)

        features, pooled = x, None
        if c.family == "clip" and c.pooled:
            pooled = layer_norm(self, x[:, 0], eps, "post_layernorm")
        elif c.pooled or c.norm_features:
            normed = layer_norm(self, x, eps, "post_layernorm")
            features = normed if c.norm_features else x
            if c.pooled:
                pooled = ProbeHead(c.encoder, self.dtype, self.param_dtype, name="head")(normed)
        if c.family == "clip" and not c.class_token:
            features = features[:, 1:]
        return VisionOutput(features, None if pooled is None else pooled.astype(jnp.float32))
