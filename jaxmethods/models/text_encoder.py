"""Text encoders: tokens to hidden states and to one vector a text. CLIP's and SigLIP's text towers, BERT's sentence encoders.

>>> hidden = jnp.array([[[1.0], [3.0], [9.0]]])
>>> pool(hidden, jnp.array([[5, 6, 0]]), jnp.array([[True, True, False]]), pooling="mean").tolist()
[[2.0]]
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.models.encoder import Encoder, EncoderConfig, dense, layer_norm
from jaxmethods.sharding import split_tokens

POOLINGS = {"clip": ("eos",), "siglip": ("last",), "bert": ("mean", "first")}
"""What each family's one vector a text may be; the first is the default."""


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """The architecture of a text encoder.

    Args:
        max_positions: the longest text, padding included.
        token_types: how many kinds of tokens BERT tells apart, such as question and passage.
        pooling: the token whose hidden state stands for the text: "eos" (CLIP), "last" (SigLIP: the last place, padding or not),
            "first" (BERT); or "mean" (of the real tokens). The family's own when "".
        head_width: the width of the linear layer on SigLIP's pooled state.
        eos_id: of the token that "eos" looks for; see `pool`.
    """

    family: str
    vocab_size: int
    max_positions: int
    encoder: EncoderConfig
    token_types: int = 0
    pooling: str = ""
    head_width: int | None = None
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in POOLINGS:
            raise ValueError(f"family {self.family!r} is unknown; the families are {', '.join(POOLINGS)}.")
        allowed = POOLINGS[self.family]
        if not self.pooling:
            object.__setattr__(self, "pooling", allowed[0])
        if self.pooling not in allowed:
            raise ValueError(f"pooling={self.pooling!r} is not {self.family}'s; choose of {', '.join(allowed)}.")
        for switch, owner in (("causal", "clip"), ("post_norm", "bert")):
            found, usual = getattr(self.encoder, switch), self.family == owner
            if found != usual:
                raise ValueError(f"{switch}={found} is not how {self.family} encodes text; set it to {usual}.")
        if (self.head_width is not None) != (self.family == "siglip"):
            raise ValueError(
                f"head_width={self.head_width} with family {self.family!r}: SigLIP has a head, and no other."
            )
        if (self.token_types > 0) != (self.family == "bert"):
            raise ValueError(
                f"token_types={self.token_types} with family {self.family!r}: BERT has them, and no other."
            )
        if self.pooling == "eos" and self.eos_id is None:
            raise ValueError("eos_id=None: CLIP's pooling looks for this token; give its id.")

    @property
    def width(self) -> int:
        """The length of the pooled vector."""
        return self.encoder.hidden_size if self.head_width is None else self.head_width


class TextOutput(NamedTuple):
    """Hidden states after the last norm, and one float32 vector a text, not normalised."""

    hidden: Float[Array, "batch time width"]
    pooled: Float[Array, "batch pooled_width"]


def pool(
    hidden: Float[Array, "batch time width"],
    tokens: Int[Array, "batch time"],
    mask: Bool[Array, "batch time"] | None = None,
    *,
    pooling: str,
    eos_id: int | None = None,
) -> Float[Array, "batch width"]:
    """One hidden state a text, or their mean; float32.

    Args:
        mask: true at real tokens; all by default.
        pooling: "mean" of the real tokens (0 without any); "first" real token; "last" place whatever `mask` says; "eos": the
            first real token that is `eos_id`, or where that is 2, as in OpenAI's first configurations, the first one with the
            largest id. Like in transformers, a text without that token gives its first place.
    """
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    if pooling == "mean":
        kept = jnp.where(real[..., None], hidden, 0).sum(axis=1, dtype=jnp.float32)
        return kept / jnp.maximum(real.sum(axis=1, keepdims=True), 1)
    if pooling == "last":
        return hidden[:, -1].astype(jnp.float32)
    if pooling == "first":
        at = jnp.argmax(real, axis=1)
    elif eos_id == 2:
        at = jnp.argmax(jnp.where(real, tokens, -1), axis=1)
    else:
        at = jnp.argmax(real & (tokens == eos_id), axis=1)
    return jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0].astype(jnp.float32)


class Embeddings(nn.Module):
    config: TextEncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch time"], positions: Int[Array, "batch time"], types: Int[Array, "batch time"]
    ) -> Float[Array, "batch time width"]:
        c, width = self.config, self.config.encoder.hidden_size
        words = nn.Embed(c.vocab_size, width, dtype=self.dtype, param_dtype=self.param_dtype, name="token_embedding")

        def learned(name: str, rows: int, at: Int[Array, "batch time"]) -> Float[Array, "batch time width"]:
            table = self.param(name, nn.initializers.normal(0.02), (rows, width), self.param_dtype)
            return table.astype(self.dtype)[at]

        x = words(tokens) + learned("position_embedding", c.max_positions, positions)
        if c.family == "bert":
            x = x + learned("token_type_embedding", c.token_types, types)
            x = layer_norm(self, x, c.encoder.layer_norm_eps, "layer_norm")
        return x


class TextEncoder(nn.Module):
    """Tokens to hidden states and one vector a text.

    Args:
        config: the architecture.
        dtype: of activations and matrix products; norms, softmax and means are in float32 whatever it is.
        param_dtype: of the parameters that `init` makes.
        remat: what the backward pass computes again: "none" or "full" (each layer).
        mesh: of `jaxmethods.sharding.make_mesh`; texts are then split over `data` and `fsdp`.
    """

    config: TextEncoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    mesh: Any = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch time"],
        mask: Bool[Array | np.ndarray, "batch time"] | None = None,
        *,
        token_type_ids: Int[Array | np.ndarray, "batch time"] | None = None,
    ) -> TextOutput:
        """Hidden states of each token and the pooled vector of each text.

        Args:
            mask: true at real tokens, padding on either side; positions count real tokens. All are real by default. SigLIP's
                models were trained on texts padded to `max_positions` with their padding seen: give none to them. With a mask
                they do as in transformers: padding is not seen, positions count all places, and the last one is pooled.
            token_type_ids: BERT's kind of each token; 0 by default.

        Raises:
            ValueError: more tokens than positions, or token types that the family has not got.
        """
        c = self.config
        tokens, mask = jnp.asarray(tokens), None if mask is None else jnp.asarray(mask)
        if tokens.shape[1] > c.max_positions:
            raise ValueError(
                f"tokens are {list(tokens.shape)} and the encoder has {c.max_positions} positions; truncate the texts."
            )
        if token_type_ids is not None and not c.token_types:
            raise ValueError(f"token_type_ids are BERT's, and this is a {c.family} encoder; leave them out.")
        types = jnp.zeros_like(tokens) if token_type_ids is None else jnp.asarray(token_type_ids)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if mask is not None and c.family != "siglip":
            positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1, 0)
        x = Embeddings(c, self.dtype, self.param_dtype, name="embeddings")(tokens, positions, types)
        x = split_tokens(x, self.mesh)
        x = Encoder(c.encoder, self.dtype, self.param_dtype, self.remat, self.mesh, name="encoder")(x, mask)
        if c.family != "bert":
            x = layer_norm(self, x, c.encoder.layer_norm_eps, "final_layer_norm")
        pooled = pool(x, tokens, mask, pooling=c.pooling, eos_id=c.eos_id)
        if c.head_width is not None:
            pooled = dense(self, c.head_width, "head")(pooled)
        return TextOutput(x, pooled.astype(jnp.float32))
