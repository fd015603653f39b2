"""Image and text towers that embed into one space: CLIP (https://arxiv.org/abs/2103.00020), SigLIP (https://arxiv.org/abs/2303.15343)."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.models.encoder import dense
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxmethods.models.vision import Pixels, VisionConfig, VisionTower

LEAST_NORM = 1e-12
"""A shorter embedding is divided by this, as in `losses.info_nce`."""


@dataclasses.dataclass(frozen=True)
class DualConfig:
    """Two towers of one family.

    Args:
        projection: the width of the common space (CLIP); None where the pooled vectors lie in it already (SigLIP).
        initial_scale: what `init` sets the logarithm of the factor on cosines to.
        initial_bias: what `init` sets the number that is added to the logits to; None where there is no such parameter (CLIP).
    """

    vision: VisionConfig
    text: TextEncoderConfig
    projection: int | None = None
    initial_scale: float = 2.6592
    initial_bias: float | None = None

    def __post_init__(self) -> None:
        if self.vision.family != self.text.family:
            raise ValueError(
                f"a {self.vision.family} vision tower and a {self.text.family} text tower; take both of one family."
            )
        if not self.vision.pooled:
            raise ValueError("the vision tower gives no vector an image; set pooled=True and features=-1.")
        has = [self.projection is not None, self.initial_bias is None]
        if has != [self.vision.family == "clip"] * 2:
            raise ValueError(
                "CLIP has a projection and no bias, SigLIP a bias and no projection; give what the family has."
            )
        if self.projection is None and self.vision.width != self.text.width:
            raise ValueError(
                f"images embed into {self.vision.width} numbers and texts into {self.text.width}; "
                f"set the text tower's head_width to {self.vision.width}."
            )

    @property
    def width(self) -> int:
        """The length of an embedding."""
        return self.text.width if self.projection is None else self.projection


class DualEncoder(nn.Module):
    """Images and texts to unit vectors, and the similarities of all images to all texts.

    Args:
        config: the architecture.
        dtype: of activations and matrix products; embeddings, similarities, scale and bias are float32 whatever it is.
        param_dtype: of the parameters that `init` makes, but scale and bias.
        remat: what the backward pass computes again: "none" or "full" (each layer).
        mesh: of `jaxmethods.sharding.make_mesh`; images and texts are then split over `data` and `fsdp`.
    """

    config: DualConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Any = None

    def setup(self) -> None:
        c, settings = self.config, (self.dtype, self.param_dtype, self.remat, self.mesh)
        self.vision = VisionTower(c.vision, *settings)
        self.text = TextEncoder(c.text, *settings)
        if c.projection is not None:
            self.visual_projection = dense(self, c.projection, use_bias=False)
            self.text_projection = dense(self, c.projection, use_bias=False)
        shape = () if c.vision.family == "clip" else (1,)  # as in the checkpoints
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(c.initial_scale), shape, jnp.float32)
        if c.initial_bias is not None:
            self.logit_bias = self.param("logit_bias", nn.initializers.constant(c.initial_bias), shape, jnp.float32)

    def images(self, pixels: Pixels) -> Float[Array, "images dim"]:
        """Embeddings of images, of unit norm, float32; `pixels` as in `VisionTower`."""
        pooled: Any = self.vision(pixels).pooled  # `DualConfig` sees to it that there is one
        return unit(pooled if self.config.projection is None else self.visual_projection(pooled))

    def texts(
        self, tokens: Int[Array | np.ndarray, "batch time"], mask: Bool[Array | np.ndarray, "batch time"] | None = None
    ) -> Float[Array, "batch dim"]:
        """Embeddings of texts, of unit norm, float32; `tokens` and `mask` as in `TextEncoder`."""
        pooled = self.text(tokens, mask).pooled
        return unit(pooled if self.config.projection is None else self.text_projection(pooled))

    def scale_and_bias(self) -> tuple[Float[Array, ""], Float[Array, ""] | None]:
        """The factor on cosines, exp(logit_scale) = 1 / temperature, and what is added to them (SigLIP)."""
        bias = None if self.config.initial_bias is None else self.logit_bias.astype(jnp.float32).reshape(())
        return jnp.exp(self.logit_scale.astype(jnp.float32)).reshape(()), bias

    def __call__(
        self,
        pixels: Pixels,
        tokens: Int[Array | np.ndarray, "batch time"],
        mask: Bool[Array | np.ndarray, "batch time"] | None = None,
    ) -> Float[Array, "images batch"]:
        """Logits of each image with each text: scale * cosine + bias, float32."""
        images, texts = self.images(pixels), self.texts(tokens, mask)
        scale, bias = self.scale_and_bias()
        cosines = jnp.matmul(images, texts.T, precision=jax.lax.Precision.HIGHEST)
        return scale * cosines + (0.0 if bias is None else bias)


def unit(x: Float[Array, "batch dim"]) -> Float[Array, "batch dim"]:
    """Rows [B, D] of any float dtype at length 1, float32; a row of zeros stays one."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=1, keepdims=True), LEAST_NORM**2))
