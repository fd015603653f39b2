"""A decoder-only language model that covers Llama, Mistral, Qwen2, Qwen3 and Gemma-2.

The families differ in a few switches of `DecoderConfig`; the module reads those, never the family's name. Layers are
scanned: parameters of all layers are stacked on their first axis and compile time does not grow with depth. The module
returns hidden states, not logits: most losses need only the log-probabilities of given tokens (`jaxmethods.models.logits`
and `sequence_logps` do the rest).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.linear import dot_general
from jaxmethods.models.attention import attention_on
from jaxmethods.models.dense import QuantizedDense
from jaxmethods.sharding import split_tokens

RULES = (
    (r"embed_tokens/embedding", P("tensor", "fsdp")),
    (r"lm_head/unembedding", P("fsdp", "tensor")),
    (r"(q_proj|k_proj|v_proj|gate_proj|up_proj)/kernel", P("fsdp", "tensor")),
    (r"(o_proj|down_proj)/kernel", P("tensor", "fsdp")),
    (r"(q_proj|k_proj|v_proj)/bias", P("tensor")),
)
"""Where a decoder's parameters lie: megatron-style over `tensor`, the other matrix axis over `fsdp`. What starts with
"kernel" lies alike: the scales of a quantised kernel as its codes."""

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2")
REMAT = ("none", "dots", "full")
SAVED = ("linear", "attention_out", "attention_lse")
"""Names of what remat "dots" keeps: outputs of linear layers with their adapters, and of attention."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3's stretching of low rotary frequencies to longer contexts."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The architecture of a decoder; names follow Hugging Face's where they exist.

    Args:
        sliding_window: a token sees itself and the `sliding_window - 1` tokens before it, in the layers that
            `window_layers` marks (all of them when None).
        query_scale: factor on the query-key products; head_dim ** -0.5 when None.
        norm_plus_one: norms multiply by 1 + scale (Gemma).
        post_norms: a norm also after attention and after the MLP (Gemma-2).
        embedding_scale: embeddings are multiplied by sqrt(hidden_size) (Gemma).
        attention_softcap, final_softcap: logits are squashed to (-cap, cap) by cap * tanh(logits / cap).
        eos_ids: tokens that end a generation.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    activation: str = "silu"
    tie_embeddings: bool = False
    attention_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] | None = None
    attention_softcap: float | None = None
    final_softcap: float | None = None
    query_scale: float | None = None
    post_norms: bool = False
    embedding_scale: bool = False
    norm_plus_one: bool = False
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; the families are {', '.join(FAMILIES)}.")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}.")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs.")
        if self.activation not in _ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; choose of {', '.join(_ACTIVATIONS)}.")
        if self.window_layers is not None and len(self.window_layers) != self.num_layers:
            raise ValueError(f"window_layers names {len(self.window_layers)} layers of {self.num_layers}.")


_ACTIVATIONS = {"silu": jax.nn.silu, "gelu_tanh": jax.nn.gelu}


class KVCache(NamedTuple):
    """Keys and values of the tokens seen so far; every row fills the same columns, padding included."""

    k: Float[Array, "layer batch slot kv_head head_dim"]
    v: Float[Array, "layer batch slot kv_head head_dim"]
    positions: Int[Array, "batch slot"]
    segment_ids: Int[Array, "batch slot"]
    length: Int[Array, ""]

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: Any = jnp.float32) -> KVCache:
        shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
        zeros = jnp.zeros((batch, slots), jnp.int32)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), zeros, zeros, jnp.int32(0))


class Output(NamedTuple):
    """What a decoder returns: hidden states after the last norm, and the cache that was given, filled further."""

    hidden: Float[Array, "batch time width"]
    cache: KVCache | None


class Given(NamedTuple):
    """Embeddings that stand in the place of some tokens' own, such as features of an image."""

    embeddings: Float[Array, "batch time width"]
    where: Bool[Array, "batch time"]


class _Shared(NamedTuple):
    """What every layer reads and none changes."""

    cos: Float[Array, "batch time half"]
    sin: Float[Array, "batch time half"]
    positions: Int[Array, "batch time"]
    segment_ids: Int[Array, "batch time"]
    kv_positions: Int[Array, "batch slot"]
    kv_segment_ids: Int[Array, "batch slot"]
    start: Int[Array, ""] | None


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32, returned in x's dtype."""

    eps: float
    plus_one: bool = False
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        start = nn.initializers.zeros if self.plus_one else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],), self.param_dtype).astype(jnp.float32)
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (wide * (1.0 + scale if self.plus_one else scale)).astype(x.dtype)


def rope_tables(
    config: DecoderConfig, positions: Int[Array, "batch time"]
) -> tuple[Float[Array, "batch time half"], Float[Array, "batch time half"]]:
    """Cosines and sines of the rotary angles, float32 (https://arxiv.org/abs/2104.09864, eq. 15)."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequencies = config.rope_theta**-exponents
    if scaling := config.rope_scaling:
        turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
        kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        kept = np.clip(kept, 0.0, 1.0)  # 1: many turns in the old context, left alone; 0: stretched in full
        frequencies = kept * frequencies + (1 - kept) * frequencies / scaling.factor
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch time head head_dim"],
    cos: Float[Array, "batch time half"],
    sin: Float[Array, "batch time half"],
) -> Float[Array, "batch time head head_dim"]:
    """Rotates the pairs (x_i, x_{i + half}) by the given angles."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class _Part(nn.Module):
    """What the parts of a layer share: the configuration, dtypes, and the product of linear layers."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    dot_general: Any = None
    quantization: str | None = None
    mesh: Any = None
    attention: str | None = None

    def dense(self, x: Array, features: int, name: str, use_bias: bool = False) -> Array:
        told: Any = dict(use_bias=use_bias, dtype=self.dtype, param_dtype=self.param_dtype, name=name)
        if self.quantization is None:
            layer = nn.Dense(features, dot_general=self.dot_general or dot_general, **told)
        else:
            layer = QuantizedDense(features, dot_general=self.dot_general, quantization=self.quantization, **told)
        return checkpoint_name(layer(x), "linear")

    @property
    def told(self) -> tuple[Any, ...]:
        """What the parts of this part are told, in the order of their fields."""
        settings = self.dtype, self.param_dtype, self.dot_general, self.quantization, self.mesh, self.attention
        return self.config, *settings

    def norm(self, name: str) -> RMSNorm:
        return RMSNorm(self.config.rms_norm_eps, self.config.norm_plus_one, self.param_dtype, name=name)


class Attention(_Part):
    @nn.compact
    def __call__(self, x, window, cache, layer, shared: _Shared):  # type: ignore[no-untyped-def]
        c = self.config
        heads = lambda y: y.reshape(*y.shape[:-1], -1, c.head_dim)
        q = heads(self.dense(x, c.num_heads * c.head_dim, "q_proj", c.attention_bias))
        k = heads(self.dense(x, c.num_kv_heads * c.head_dim, "k_proj", c.attention_bias))
        v = heads(self.dense(x, c.num_kv_heads * c.head_dim, "v_proj", c.attention_bias))
        if c.qk_norm:
            q, k = self.norm("q_norm")(q), self.norm("k_norm")(k)
        q, k = rotate(q, shared.cos, shared.sin), rotate(k, shared.cos, shared.sin)
        if cache is not None:
            at: Any = (layer, 0, shared.start, 0, 0)
            cache = tuple(
                jax.lax.dynamic_update_slice(old, new[None].astype(old.dtype), at)
                for old, new in zip(cache, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(c_, layer, keepdims=False).astype(x.dtype) for c_ in cache)
        out = attention_on(
            self.mesh if cache is None else None, q, k, v,
            q_positions=shared.positions, kv_positions=shared.kv_positions,
            q_segment_ids=shared.segment_ids, kv_segment_ids=shared.kv_segment_ids,
            window=c.sliding_window if window is None else window, softcap=c.attention_softcap, scale=c.query_scale,
            implementation=self.attention if cache is None else None,
        )  # fmt: skip
        return self.dense(out.reshape(*x.shape[:-1], -1), c.hidden_size, "o_proj"), cache


class MLP(_Part):
    @nn.compact
    def __call__(self, x: Float[Array, "batch time width"]) -> Float[Array, "batch time width"]:
        gate = self.dense(x, self.config.intermediate_size, "gate_proj")
        up = self.dense(x, self.config.intermediate_size, "up_proj")
        return self.dense(_ACTIVATIONS[self.config.activation](gate) * up, x.shape[-1], "down_proj")


class Layer(_Part):
    @nn.compact
    def __call__(self, carry, scanned, shared: _Shared):  # type: ignore[no-untyped-def]
        x, cache = carry
        x = split_tokens(x, self.mesh)
        layer, window = scanned
        part = lambda kind, name: kind(*self.told, name=name)
        after = lambda name, y: self.norm(name)(y) if self.config.post_norms else y
        # Gemma-2 norms what each half adds, and so calls the norm before the MLP by another name than the others do.
        before_mlp = "pre_feedforward_layernorm" if self.config.post_norms else "post_attention_layernorm"

        y, cache = part(Attention, "self_attn")(self.norm("input_layernorm")(x), window, cache, layer, shared)
        x = x + after("post_attention_layernorm", y)
        y = part(MLP, "mlp")(self.norm(before_mlp)(x))
        x = x + after("post_feedforward_layernorm", y)
        return (x, cache), None


class Backbone(_Part):
    remat: str = "none"
    unroll: int = 1

    @nn.compact
    def __call__(self, tokens, segment_ids, positions, cache, given=None):  # type: ignore[no-untyped-def]
        c = self.config
        embed = nn.Embed(
            c.vocab_size, c.hidden_size, dtype=self.dtype, param_dtype=self.param_dtype, name="embed_tokens"
        )
        x = embed(tokens)
        if c.embedding_scale:
            x = x * jnp.asarray(c.hidden_size**0.5, x.dtype)
        if given is not None:
            x = jnp.where(given.where[..., None], given.embeddings.astype(x.dtype), x)
        x = split_tokens(x, self.mesh)

        kv_positions, kv_segment_ids, start = positions, segment_ids, None
        if cache is not None:
            start = cache.length
            write = lambda old, new: jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (0, start))
            kv_positions, kv_segment_ids = write(cache.positions, positions), write(cache.segment_ids, segment_ids)
        shared = _Shared(*rope_tables(c, positions), positions, segment_ids, kv_positions, kv_segment_ids, start)

        layer = Layer
        if self.remat != "none":
            policy = jax.checkpoint_policies.save_only_these_names(*SAVED) if self.remat == "dots" else None
            layer = nn.remat(Layer, policy=policy, prevent_cse=False)
        layers = nn.scan(
            layer,
            variable_axes={"params": 0, "losses": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            unroll=self.unroll,
        )(*self.told, name="layers")

        held = None if cache is None else (cache.k, cache.v)
        (x, held), _ = layers((x, held), (jnp.arange(c.num_layers), _windows(c)), shared)
        x = split_tokens(self.norm("norm")(x), self.mesh)
        if held is not None:
            cache = KVCache(*held, kv_positions, kv_segment_ids, start + tokens.shape[1])
        return x, cache


def _windows(c: DecoderConfig) -> Int[Array, "layer"] | None:
    """The window of each layer (0: none), or None when all layers have the configuration's."""
    if c.window_layers is None or c.sliding_window is None:
        return None
    return jnp.asarray(np.where(c.window_layers, c.sliding_window, 0), jnp.int32)


class Unembedding(nn.Module):
    """The output matrix of a model that does not tie it to its embeddings."""

    config: DecoderConfig
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> Float[Array, "width vocab"]:
        shape = (self.config.hidden_size, self.config.vocab_size)
        return self.param("unembedding", nn.initializers.normal(0.02), shape, self.param_dtype)


class Decoder(nn.Module):
    """Tokens to hidden states.

    Args:
        config: the architecture.
        dtype: of activations and matrix products; norms, softmax and rotary angles are in float32 whatever it is.
        param_dtype: of the parameters that `init` makes.
        remat: what the backward pass computes again: "none", "dots" (norms, activations, and what is
            inside adapters), "full" (each layer).
        unroll: layers a step of the scan; more compiles longer and may run faster.
        dot_general: the product of every linear layer, called like `jax.lax.dot_general`; by default
            `jaxmethods.kernels.linear.dot_general`.
        quantization: "int8" or "int4" where the kernels of linear layers are quantised (`models.quantize`); they are then
            frozen. Embeddings, norms, biases and the output matrix are not quantised.
        mesh: of `jaxmethods.sharding.make_mesh`; rows of activations are then split over `data` and `fsdp`, and the tokens of a
            row over `sequence`.
        attention: implementation of `kernels.attention` where there is no cache. "splash" goes by places in the row: leave
            `positions` to their default, or count them from 0 in each segment.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    unroll: int = 1
    dot_general: Any = None
    quantization: str | None = None
    mesh: Any = None
    attention: str | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array | np.ndarray, "batch time"],
        mask: Bool[Array | np.ndarray, "batch time"] | None = None,
        *,
        segment_ids: Int[Array | np.ndarray, "batch time"] | None = None,
        positions: Int[Array | np.ndarray, "batch time"] | None = None,
        cache: KVCache | None = None,
        images: Any = None,
    ) -> Output:
        """Hidden states of each token, seen from the tokens before it in its segment.

        Args:
            mask: true at real tokens; all by default. Padding may stand on either side.
            segment_ids: tokens see only their own segment; 0 is padding. By default one segment where `mask` is true.
            positions: rotary positions; by default real tokens are counted from 0 (from where `cache` ends).
            cache: keys and values of earlier tokens; `tokens` continue it.
            images: for models that see, the pictures of each row (`vlm.Images`), also none; no others take any.
        """
        if self.remat not in REMAT:
            raise ValueError(f"remat={self.remat!r} is unknown; choose of {', '.join(REMAT)}.")
        tokens = jnp.asarray(tokens)
        if mask is None:
            mask = jnp.ones(tokens.shape, bool) if segment_ids is None else jnp.asarray(segment_ids) > 0
        segment_ids = jnp.asarray(mask).astype(jnp.int32) if segment_ids is None else jnp.asarray(segment_ids)
        if positions is None:
            before = 0 if cache is None else (cache.segment_ids > 0).sum(-1, keepdims=True)
            positions = jnp.maximum(jnp.cumsum(mask, axis=-1) - 1 + before, 0)
        given = self._see(tokens, images)
        if not self.config.tie_embeddings:
            Unembedding(self.config, self.param_dtype, name="lm_head")()
        settings = self.dtype, self.param_dtype, self.dot_general, self.quantization, self.mesh, self.attention
        backbone = Backbone(self.config, *settings, self.remat, self.unroll, name="model")
        return Output(*backbone(tokens, segment_ids, jnp.asarray(positions, jnp.int32), cache, given))

    def _see(self, tokens: Int[Array, "batch time"], images: Any) -> Given | None:
        """What stands in the place of image tokens: nothing, for a model that reads text alone."""
        if images is not None:
            raise ValueError(f"{type(self).__name__} reads no images; leave images=None.")
        return None
