"""The transformer encoder inside vision towers, text towers and sentence encoders: CLIP's, SigLIP's and BERT's.

The families differ in a few switches of `EncoderConfig`; the module reads those, never the family's name. Layers are scanned as
in the decoder: parameters of all layers are stacked on their first axis.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.linear import dot_general
from jaxmethods.models.attention import attention_on
from jaxmethods.sharding import split_tokens

RULES = (
    (r"token_embedding/embedding", P("tensor", "fsdp")),
    (r"patch_embedding/kernel", P(None, None, None, "fsdp")),
    (r"(q_proj|k_proj|v_proj|fc1|in_proj)/kernel", P("fsdp", "tensor")),
    (r"(out_proj|fc2)/kernel", P("tensor", "fsdp")),
    (r"(visual_projection|text_projection|head)/kernel", P("fsdp", None)),
    (r"(q_proj|k_proj|v_proj|fc1|in_proj)/bias", P("tensor")),
)
"""Where an encoder's parameters lie, and those of the towers around it: as `decoder.RULES` says of a decoder's."""

REMAT = ("none", "full")

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}
"""GELU and its two approximations (https://arxiv.org/abs/1606.08415, section 2)."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder's layers; names follow Hugging Face's where they exist.

    Args:
        activation: one of `ACTIVATIONS`.
        post_norm: norms after the sums (BERT), not before attention and MLP.
        causal: a token sees itself and what stands before it (CLIP's text tower).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    activation: str = "gelu"
    layer_norm_eps: float = 1e-5
    post_norm: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1.")
        if self.num_heads < 1 or self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} must be a multiple of num_heads={self.num_heads}.")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; choose of {', '.join(ACTIVATIONS)}.")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def dense(module: Any, features: int, name: str | None = None, *, use_bias: bool = True) -> nn.Dense:
    """A linear layer with the dtypes of the module that calls it."""
    told: Any = dict(dtype=module.dtype, param_dtype=module.param_dtype, name=name)
    return nn.Dense(features, use_bias=use_bias, dot_general=dot_general, **told)


def layer_norm(module: Any, x: Float[Array, "*batch width"], eps: float, name: str) -> Float[Array, "*batch width"]:
    """(x - mean) / sqrt(variance + eps) * scale + bias over the last axis, in float32, returned in x's dtype."""
    told: Any = dict(epsilon=eps, dtype=jnp.float32, param_dtype=module.param_dtype, name=name)
    # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large, as it is in trained vision towers.
    return nn.LayerNorm(use_fast_variance=False, **told)(x).astype(x.dtype)


class Attention(nn.Module):
    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    mesh: Any = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch time width"], order: Int[Array, "batch time"], keys: Int[Array, "batch time"]
    ) -> Float[Array, "batch time width"]:
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = (dense(self, x.shape[-1], f"{part}_proj")(x).reshape(heads) for part in "qkv")
        out = attention_on(
            self.mesh, q, k, v, q_positions=order, kv_positions=order, q_segment_ids=jnp.ones_like(keys), kv_segment_ids=keys,
            window=None, softcap=None, scale=None, implementation=None,
        )  # fmt: skip
        return dense(self, x.shape[-1], "out_proj")(out.reshape(x.shape))


class MLP(nn.Module):
    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        inner = dense(self, self.config.intermediate_size, "fc1")(x)
        return dense(self, x.shape[-1], "fc2")(ACTIVATIONS[self.config.activation](inner))


class Layer(nn.Module):
    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    mesh: Any = None

    @nn.compact
    def __call__(self, x, order, keys):  # type: ignore[no-untyped-def]
        c = self.config
        x = split_tokens(x, self.mesh)
        norm = lambda name, y: layer_norm(self, y, c.layer_norm_eps, name)
        attend = lambda y: Attention(c, self.dtype, self.param_dtype, self.mesh, name="self_attn")(y, order, keys)
        mlp = MLP(c, self.dtype, self.param_dtype, name="mlp")
        if c.post_norm:
            x = norm("layer_norm1", x + attend(x))
            return norm("layer_norm2", x + mlp(x)), None
        x = x + attend(norm("layer_norm1", x))
        return x + mlp(norm("layer_norm2", x)), None


class Encoder(nn.Module):
    """Embeddings to hidden states, by the layers alone: what is normed before and after them is the caller's.

    Args:
        config: the architecture.
        dtype: of activations and matrix products; norms and softmax are in float32 whatever it is.
        param_dtype: of the parameters that `init` makes.
        remat: what the backward pass computes again: "none" or "full" (each layer).
        mesh: of `jaxmethods.sharding.make_mesh`; rows of activations are then split over `data` and `fsdp`.
        skip_last: so many of the last layers are not built, and have no parameters: for who reads the layer before them.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Any = None
    skip_last: int = 0

    @nn.compact
    def __call__(
        self,
        x: Float[Array | np.ndarray, "batch time width"],
        mask: Bool[Array | np.ndarray, "batch time"] | None = None,
    ) -> Float[Array, "batch time width"]:
        """The last layer's output.

        Args:
            mask: true at tokens that are seen; all by default. Tokens that are not seen do see the others, as in transformers.
        """
        c = self.config
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; choose of {', '.join(REMAT)}.")
        if not 0 <= self.skip_last < c.num_layers:
            raise ValueError(f"skip_last={self.skip_last} must leave at least one of {c.num_layers} layers.")
        x, places = jnp.asarray(x), x.shape[:2]
        # The attention op lets a token see those at its own position or before it: at one position, all see all.
        order = (
            jnp.broadcast_to(jnp.arange(places[1], dtype=jnp.int32), places)
            if c.causal
            else jnp.zeros(places, jnp.int32)
        )
        keys = jnp.ones(places, jnp.int32) if mask is None else jnp.asarray(mask).astype(jnp.int32)
        layers = nn.scan(
            Layer if self.remat == "none" else nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0, "losses": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=c.num_layers - self.skip_last,
        )(c, self.dtype, self.param_dtype, self.mesh, name="layers")
        return split_tokens(layers(x, order, keys)[0], self.mesh)
