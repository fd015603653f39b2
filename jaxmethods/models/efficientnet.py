"""EfficientNet-Lite0 as a vision tower: a small convolutional network whose feature map is read place by place.

Tan and Le 2019 (https://arxiv.org/abs/1905.11946); "lite" is the authors' variant for small devices: ReLU6, no squeeze and
excitation. Batch norms are folded into their convolutions, so what is left is kernels and biases.
`jaxmethods.models.convert_efficientnet` makes them of the published ImageNet weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmethods.kernels.linear import linear
from jaxmethods.models.layout import Leaf
from jaxmethods.models.vision import Pixels, VisionOutput

FAMILY = "efficientnet_lite0"
STEM, HEAD = 32, 1280
"""Channels of the first convolution and of the last."""


class BlockShape(NamedTuple):
    """One inverted bottleneck: d_in -> expansion * d_in -> d_out channels, the depthwise kernel [size, size] between."""

    size: int
    stride: int
    expansion: int
    d_in: int
    d_out: int


_STAGES = (  # repeats, size, stride of the first, expansion, channels: table 1 of the paper
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _blocks() -> tuple[BlockShape, ...]:
    blocks: list[BlockShape] = []
    for repeats, size, stride, expansion, d_out in _STAGES:
        for repeat in range(repeats):
            d_in = blocks[-1].d_out if blocks else STEM
            blocks.append(BlockShape(size, 1 if repeat else stride, expansion, d_in, d_out))
    return tuple(blocks)


BLOCKS = _blocks()


@dataclasses.dataclass(frozen=True)
class EfficientNetConfig:
    """The architecture, how pixels are normalised, and what is read from the feature map.

    Args:
        image_size: pixels a side; the feature map has a place for each 32 of them.
        mean, std: of each colour in 0..1. The defaults make (x - 127) / 128 of pixels in 0..255.
        pool: the feature map is averaged to this many places a side; left as it is when None.
        classes: of the classifier on the pooled features; 0 for none.
    """

    family: str = FAMILY
    image_size: int = 224
    mean: tuple[float, float, float] = (127 / 255, 127 / 255, 127 / 255)
    std: tuple[float, float, float] = (128 / 255, 128 / 255, 128 / 255)
    pool: int | None = None
    classes: int = 1000

    def __post_init__(self) -> None:
        if self.family != FAMILY:
            raise ValueError(f"family {self.family!r} is unknown; the family here is {FAMILY}.")
        if self.image_size < 1:
            raise ValueError(f"image_size={self.image_size} must be positive.")
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(f"mean={self.mean} and std={self.std} must be three numbers each, std positive.")
        if self.pool is not None and not 1 <= self.pool <= self._side:
            raise ValueError(
                f"pool={self.pool} must be between 1 and {self._side}, the places a side; None leaves all."
            )
        if self.classes < 0:
            raise ValueError(f"classes={self.classes} must not be negative; 0 builds no classifier.")

    @property
    def _side(self) -> int:
        return -(-self.image_size // 32)  # five halvings, each rounded up

    @property
    def width(self) -> int:
        """The length of a feature."""
        return HEAD

    @property
    def grid(self) -> int:
        """Places a side that features are given of."""
        return self.pool or self._side

    @property
    def tokens(self) -> int:
        """Features an image."""
        return self.grid**2


def config_from_json(told: Mapping[str, Any]) -> EfficientNetConfig:
    """The configuration that `config_to_json` wrote.

    Raises:
        ValueError: another model_type, a key that nothing reads, or a value out of place.
    """
    if told.get("model_type") != FAMILY:
        raise ValueError(f"model_type {told.get('model_type')!r} is no {FAMILY}.")
    fields = {name: value for name, value in told.items() if name != "model_type"}
    known = [field.name for field in dataclasses.fields(EfficientNetConfig) if field.name != "family"]
    if unknown := sorted(fields.keys() - set(known)):
        raise ValueError(f"{FAMILY}: key {unknown[0]!r} is unknown; known are {', '.join(known)}.")
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    for name, value in fields.items():
        if name in ("mean", "std"):
            if not isinstance(value, list | tuple) or not all(whole(x) or isinstance(x, float) for x in value):
                raise ValueError(f"{FAMILY}: {name}={value!r} must be a list of three numbers.")
            fields[name] = tuple(map(float, value))
        elif not whole(value) and (name, value) != ("pool", None):
            raise ValueError(f"{FAMILY}: {name}={value!r} must be a whole number.")
    return EfficientNetConfig(**fields)


def config_to_json(config: EfficientNetConfig) -> dict[str, Any]:
    """The dict for a config.json; `config_from_json` reads it."""
    told = dataclasses.asdict(config)
    return {"model_type": told.pop("family")} | told | {"mean": list(config.mean), "std": list(config.std)}


def layout(config: EfficientNetConfig) -> list[Leaf]:
    """The parameters of `EfficientNet(config)` and their tensors, which have the same names and axes."""
    leaves = []

    def add(module: str, *shape: int) -> None:
        for path, of_leaf in ((f"{module}/kernel", shape), (f"{module}/bias", shape[-1:])):
            leaves.append(Leaf(path, path.replace("/", "."), of_leaf, False))

    add("stem", 3, 3, 3, STEM)
    for number, block in enumerate(BLOCKS):
        wide = block.expansion * block.d_in
        if block.expansion > 1:
            add(f"block_{number}/expand", 1, 1, block.d_in, wide)
        add(f"block_{number}/depthwise", block.size, block.size, 1, wide)
        add(f"block_{number}/project", 1, 1, wide, block.d_out)
    add("head", 1, 1, BLOCKS[-1].d_out, HEAD)
    if config.classes:
        add("classifier", HEAD, config.classes)
    return leaves


def normalize(
    pixels: Pixels, mean: tuple[float, float, float], std: tuple[float, float, float]
) -> Float[Array, "images height width channels"]:
    """(pixels / 255 - mean) / std of each colour, float32.

    Computed as (pixels - 255 mean) / (255 std): exact where these are whole numbers, as (x - 127) / 128.
    """
    center, scale = ((255 * np.asarray(numbers)).astype(np.float32) for numbers in (mean, std))
    return (jnp.asarray(pixels).astype(jnp.float32) - center) / scale


def depthwise(
    x: Float[Array | np.ndarray, "images height width channels"],
    kernel: Float[Array | np.ndarray, "size size 1 channels"],
    stride: int,
) -> Float[Array, "images rows columns channels"]:
    """Convolves each channel with a kernel of its own; "SAME" zero padding, sums in float32, in x's dtype.

    It is a sum of size * size shifted products. XLA has no fast depthwise convolution on the CPU:
    benchmarks/depthwise.py times both.
    """
    size, (height, width) = len(kernel), x.shape[1:3]
    padding = jax.lax.padtype_to_pads((height, width), (size, size), (stride, stride), "SAME")
    rows, columns = (stride * ((side - 1) // stride) + 1 for side in (height, width))  # what the places span
    x, kernel = jnp.pad(x, ((0, 0), *padding, (0, 0))), kernel.astype(jnp.float32)
    shifted = lambda i, j: x[:, i : i + rows : stride, j : j + columns : stride].astype(jnp.float32)
    total = sum(shifted(i, j) * kernel[i, j, 0] for i in range(size) for j in range(size))
    return jnp.asarray(total, x.dtype)


def adaptive_average(
    x: Float[Array | np.ndarray, "images height width channels"], places: int
) -> Float[Array, "images places places channels"]:
    """Averages to places * places cells, in float32, returned in x's dtype.

    Cell i covers the rows from floor(i * height / places) to ceil((i + 1) * height / places); neighbours share a row where
    the division leaves a rest. Columns alike.
    """
    y = jnp.asarray(x, jnp.float32)
    for axis in (1, 2):
        side = x.shape[axis]
        cells = [(i * side // places, -(-(i + 1) * side // places)) for i in range(places)]
        y = jnp.stack([jax.lax.slice_in_dim(y, *cell, axis=axis).mean(axis) for cell in cells], axis)
    return y.astype(x.dtype)


class Convolution(nn.Module):
    """A convolution with bias and "SAME" padding.

    Args:
        features: channels that come out.
        size: of the kernel's sides.
        each_channel: each channel has a kernel of its own.
        dtype: of the result and of matrix products; sums over places are made in float32.
        param_dtype: of the parameters that `init` makes.
    """

    features: int
    size: int = 1
    stride: int = 1
    each_channel: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "images height width d_in"]) -> Float[Array, "images rows columns d_out"]:
        shape = (self.size, self.size, 1 if self.each_channel else x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        if self.each_channel:
            y = depthwise(x, kernel, self.stride)
        elif self.size == 1:  # on the CPU a third of the network's time less than a convolution
            y = linear(x.astype(self.dtype), jnp.asarray(kernel[0, 0], self.dtype))
        else:
            wide, strides = jnp.asarray(kernel, jnp.float32), (self.stride, self.stride)
            axes = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(x.astype(jnp.float32), wide, strides, "SAME", dimension_numbers=axes)
        return (y + bias.astype(y.dtype)).astype(self.dtype)


class Block(nn.Module):
    """Widens by a 1x1 convolution, convolves each channel, narrows again; added to its input where shapes allow."""

    shape: BlockShape
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "images height width d_in"]) -> Float[Array, "images rows columns d_out"]:
        s, told = self.shape, dict[str, Any](dtype=self.dtype, param_dtype=self.param_dtype)
        wide, y = s.expansion * s.d_in, x
        if s.expansion > 1:
            y = jax.nn.relu6(Convolution(wide, **told, name="expand")(y))
        y = jax.nn.relu6(Convolution(wide, s.size, s.stride, each_channel=True, **told, name="depthwise")(y))
        y = Convolution(s.d_out, **told, name="project")(y)
        return x + y if s.stride == 1 and s.d_in == s.d_out else y


class EfficientNet(nn.Module):
    """Pixels to features, and to logits of classes.

    Args:
        config: the architecture, and what is read.
        dtype: of activations and matrix products; pixels are normalised, and averages made, in float32.
        param_dtype: of the parameters that `init` makes.
    """

    config: EfficientNetConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        told: dict[str, Any] = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.stem = Convolution(STEM, 3, 2, **told)
        self.block = [Block(shape, **told) for shape in BLOCKS]
        self.head = Convolution(HEAD, **told)
        if self.config.classes:
            self.classifier = nn.Dense(self.config.classes, param_dtype=self.param_dtype)

    def __call__(self, pixels: Pixels) -> VisionOutput:
        """Features of each place, row by row from the upper left, and their mean over the whole map in float32.

        Args:
            pixels: [n, image_size, image_size, 3], red, green, blue in 0..255, as uint8 or floating-point numbers.

        Raises:
            ValueError: images of another shape.
        """
        c = self.config
        if pixels.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"pixels are {list(pixels.shape)} and the tower reads [n, {c.image_size}, {c.image_size}, 3]; "
                "resize the images."
            )
        x = jax.nn.relu6(self.stem(normalize(pixels, c.mean, c.std)))
        for block in self.block:
            x = block(x)
        x = jax.nn.relu6(self.head(x))
        pooled = x.astype(jnp.float32).mean((1, 2))
        if c.classes and self.is_initializing():
            self.classifier(pooled)  # `init` calls this method, and makes the parameters of the other too
        features = x if c.pool is None else adaptive_average(x, c.pool)
        return VisionOutput(features.reshape(-1, c.tokens, c.width), pooled)

    def logits(self, pixels: Pixels) -> Float[Array, "images classes"]:
        """Logits of the classes, float32; `module.apply({"params": params}, pixels, method="logits")`.

        Raises:
            ValueError: images of another shape, or no classifier.
        """
        if not self.config.classes:
            raise ValueError("this tower has no classifier; build it with the classes of its weights (1000).")
        return self.classifier(self(pixels).pooled)
