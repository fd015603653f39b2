"""Models in llama.cpp's GGUF files, read without torch: configuration, dequantised weights, tokenizer fields.

The file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) is a header of typed key-value pairs and of
tensors' places, then the data. The header is read here (the `gguf` package takes seconds over a vocabulary); blocks of
quantised numbers are opened by that package. Where llama.cpp's files differ from Hugging Face's is undone here: names,
the order of rows in Llama's query and key matrices, Gemma's norms (stored as 1 + w).
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxmethods.kernels.quantized import BLOCK, Quantized
from jaxmethods.models.decoder import DecoderConfig, RopeScaling
from jaxmethods.models.layout import Slices, assemble, check_tensors, layout
from jaxmethods.tree import Tree

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2")
"""`general.architecture` of the files that are read. Mistral's go under "llama"."""


class GgufTensor(NamedTuple):
    """A tensor's block format, its shape in numpy's order, and where its data begin."""

    format: int
    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True)
class Gguf:
    """An open file: its metadata, and where its tensors are. The data stay on disk until they are read."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    def rows(self, name: str, rows: np.ndarray | slice) -> np.ndarray:
        """Rows of a tensor (its first axis), dequantised to float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        width = _row_bytes(tensor.format, tensor.shape[-1])
        stored = np.memmap(self.path, np.uint8, "r", tensor.offset, (*tensor.shape[:-1], width))
        kind = GGMLQuantizationType(tensor.format)
        try:
            opened = dequantize(np.array(stored[rows] if len(tensor.shape) > 1 else stored), kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.path}: tensor {name!r} is stored as {kind.name}, which is not read; "
                "take a file of another quantisation, such as Q8_0."
            ) from None
        return opened if len(tensor.shape) > 1 else opened[rows]

    def blocks(self, name: str, rows: np.ndarray | slice, blocks: slice, kind: str) -> Quantized | None:
        """Some blocks of some rows of a matrix as they are stored, blocks along the first axis; None where their format is
        not that of `kind`."""
        from gguf import GGMLQuantizationType

        tensor = self.tensors[name]
        if tensor.format != {"int8": GGMLQuantizationType.Q8_0, "int4": GGMLQuantizationType.Q4_1}[kind]:
            return None
        count = tensor.shape[-1] // BLOCK
        size = _row_bytes(tensor.format, BLOCK)
        mapped = np.memmap(self.path, np.uint8, "r", tensor.offset, (tensor.shape[0], count, size))
        found = np.array(mapped[rows, blocks])
        half = lambda first: found[..., first : first + 2].copy().view(np.float16)[..., 0].T
        columns = lambda codes: codes.reshape(len(found), -1).T
        if kind == "int8":
            return Quantized(columns(found[..., 2:].view(np.int8)), half(0))
        return Quantized(columns(found[..., 4:]), half(0), half(2))


def _row_bytes(kind: int, length: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if length % block:
        raise ValueError(f"rows of {length} numbers do not divide into blocks of {block}")
    return length // block * size


_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
_BOOL, _STRING, _ARRAY = 7, 8, 9


class _Cursor:
    """Reads the header from front to back; running off its end is a ValueError."""

    def __init__(self, data: memoryview):
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if not 0 <= size <= len(self.data) - self.at:
            raise ValueError(f"it breaks off at byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, kind: str) -> int:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def string(self) -> str:
        return bytes(self.take(self.number("<Q"))).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner, count = self.number("<I"), self.number("<Q")
            if inner == _STRING:
                return [self.string() for _ in range(count)]
            return self._scalars(inner, count).tolist()
        return self._scalars(kind, 1).tolist()[0]

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in _SCALARS:
            raise ValueError(f"value type {kind} is unknown")
        dtype = np.dtype(_SCALARS[kind])
        values = np.frombuffer(self.take(count * dtype.itemsize), dtype)
        return values.astype(bool) if kind == _BOOL else values


def open_gguf(path: str | os.PathLike[str]) -> Gguf:
    """Reads the header of a GGUF file, version 2 or 3.

    Raises:
        ValueError: not such a file, or cut short.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as stream:
        if size < 24 or stream.read(4) != b"GGUF":
            raise ValueError(f"{path} is no GGUF file ({size} bytes).")
    cursor = _Cursor(np.memmap(path, np.uint8, "r").data)
    cursor.take(4)
    try:
        version = cursor.number("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version} is not read, versions 2 and 3 (little-endian) are")
        tensors, pairs = cursor.number("<Q"), cursor.number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(pairs):
            key = cursor.string()
            metadata[key] = cursor.value(cursor.number("<I"))
        places: dict[str, GgufTensor] = {}
        for _ in range(tensors):
            name = cursor.string()
            shape = tuple(cursor.number("<Q") for _ in range(cursor.number("<I")))[::-1]
            places[name] = GgufTensor(cursor.number("<I"), shape, cursor.number("<Q"))
        alignment = int(metadata.get("general.alignment", 32))
        start = -(-cursor.at // alignment) * alignment
        places = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in places.items()}
        ends = [t.offset + math.prod(t.shape[:-1]) * _row_bytes(t.format, t.shape[-1]) for t in places.values()]
    except (ValueError, KeyError, IndexError, OverflowError, ZeroDivisionError) as error:
        raise ValueError(f"{path} has no readable GGUF header: {error}; download or copy it again.") from None
    if ends and max(ends) > size:
        raise ValueError(
            f"{path} is cut short: its header tells of {max(ends)} bytes and the file has {size}; "
            "download or copy it again."
        )
    return Gguf(path, metadata, places)


_KNOWN = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "rope.freq_base", "rope.dimension_count",
}  # fmt: skip
_ONLY_GEMMA2 = {"attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"}
_OFF: dict[str, tuple[Any, ...]] = {  # what these say must be one of these
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1.0, 0.0),
    "rope.scaling.attn_factor": (1.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.causal": (True,),
    "attention.sliding_window": (0,),
    "pooling_type": (0, 1, 2, 3, 4),  # how an embedding program pools, nothing in the model
}


def config_from_gguf(file: Gguf) -> DecoderConfig:
    """The architecture that a GGUF file describes.

    Llama 3's rotary scaling is not in the metadata but in a tensor of factors; it is recognised there. Gemma-2's scale
    of query-key products is in neither: head_dim ** -0.5, and for the 27B model what llama.cpp takes.

    Raises:
        ValueError: an architecture or a feature that is not implemented, or a key missing.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: architecture {architecture!r} is not supported; supported are {', '.join(ARCHITECTURES)}."
        )
    gemma = architecture == "gemma2"
    told = {
        key.removeprefix(f"{architecture}."): value
        for key, value in file.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    for key, value in told.items():
        if key in _KNOWN or (gemma and key in _ONLY_GEMMA2) or value in _OFF.get(key, ()):
            continue
        raise ValueError(f"{file.path}: {architecture}.{key}={value!r} is not supported.")

    def number(key: str, default: int | None = None) -> int:
        value = told.get(key, default)
        if not isinstance(value, int):
            raise ValueError(f"{file.path}: {architecture}.{key} must be a whole number, not {value!r}.")
        return value

    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path}: tensor 'token_embd.weight' is missing; the file holds no whole language model.")
    width, heads, layers = number("embedding_length"), number("attention.head_count"), number("block_count")
    head_dim = number("attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise ValueError(f"{file.path}: {architecture}.{key}={told[key]} must equal the head size {head_dim}.")
    theta = _short(told.get("rope.freq_base", 10_000.0))
    ids = {key: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "padding")}
    config = DecoderConfig(
        family=architecture,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=width,
        intermediate_size=number("feed_forward_length"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, head_dim, theta),
        max_position_embeddings=number("context_length"),
        rms_norm_eps=_short(told.get("attention.layer_norm_rms_epsilon", 1e-6)),
        tie_embeddings=gemma or "output.weight" not in file.tensors,
        attention_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        bos_id=ids["bos"],
        eos_ids=tuple(dict.fromkeys(i for i in (ids["eos"], ids["eot"]) if i is not None)),
        pad_id=ids["padding"],
    )
    if not gemma:
        return config
    return dataclasses.replace(
        config,
        activation="gelu_tanh",
        sliding_window=number("attention.sliding_window", 4096),
        window_layers=None if layers == 1 else tuple(layer % 2 == 0 for layer in range(layers)),
        attention_softcap=_short(told.get("attn_logit_softcapping", 50.0)),
        final_softcap=_short(told.get("final_logit_softcapping", 30.0)),
        query_scale=(width // heads) ** -0.5 if layers == 46 and width // heads != head_dim else None,
        post_norms=True,
        embedding_scale=True,
        norm_plus_one=True,
    )


def _short(value: Any) -> float:
    """A float32 as the decimal number it was written from: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(file: Gguf, head_dim: int, theta: float) -> RopeScaling | None:
    """Llama 3's scaling, known from the factors by which its wavelengths are stretched."""
    if "rope_freqs.weight" not in file.tensors:
        return None
    factors = file.rows("rope_freqs.weight", slice(None))
    if np.all(factors == 1):
        return None
    scaling = RopeScaling(_short(factors.max()), 1.0, 4.0, 8192)  # all that Llama 3.1 to 3.3 differ in is the factor
    frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turns = scaling.original_max_position_embeddings * frequencies / (2 * np.pi)
    kept = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    if factors.shape != kept.shape or not np.allclose(factors, 1 / (kept + (1 - kept) / scaling.factor), rtol=1e-4):
        raise ValueError(
            f"{file.path}: 'rope_freqs.weight' is not the rotary scaling of Llama 3, the only one supported."
        )
    return scaling


_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
_GEMMA2_NAMES = _NAMES | {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip


def _renamed(name: str, names: Mapping[str, str]) -> str:
    module, kind = name.rsplit(".", 1)
    layer = "model.layers.{}."
    return f"{'blk.{}.' if module.startswith(layer) else ''}{names[module.removeprefix(layer)]}.{kind}"


def read_params(
    file: Gguf, config: DecoderConfig, *, dtype: Any, shardings: Tree | None = None, quantize: str | None = None
) -> Tree:
    """The parameters of `Decoder(config)` from a GGUF file, dequantised tensor by tensor.

    Args:
        dtype: of the parameters.
        shardings: a tree like the parameters'; the default device when None.
        quantize: "int8" or "int4" for quantised linear layers. Tensors that the file holds in that format (Q8_0, Q4_1) are
            taken over as they are, others dequantised and quantised anew.

    Raises:
        ValueError: tensors that do not fit the configuration, or a block format that is not read.
    """
    names = _GEMMA2_NAMES if config.post_norms else _NAMES
    leaves = [dataclasses.replace(leaf, name=_renamed(leaf.name, names)) for leaf in layout(config)]
    ignored = {"rope_freqs.weight"} | ({"output.weight"} if config.post_norms else set())
    check_tensors(leaves, {name: (t.shape, str(file.path)) for name, t in file.tensors.items() if name not in ignored})
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if config.family == "llama" else {}

    def stored_rows(name: str, rows: slice) -> slice | np.ndarray:
        module = name.split(".")[-2]
        return _interleaved(heads[module], config.head_dim)[rows] if module in heads else rows

    def read(name: str, index: Slices) -> np.ndarray:
        module = name.split(".")[-2]
        part = file.rows(name, stored_rows(name, index[0]))
        part = part[:, index[1]] if len(index) > 1 else part
        return part - 1 if config.norm_plus_one and module.endswith("norm") else part

    def stored(name: str, rows: slice, blocks: slice, kind: str) -> Quantized | None:
        return file.blocks(name, stored_rows(name, rows), blocks, kind)

    return assemble(leaves, read, dtype=dtype, shardings=shardings, quantize=quantize, stored=stored)


def _interleaved(heads: int, head_dim: int) -> np.ndarray:
    """Where llama.cpp keeps each row of a query or key matrix: it turns neighbours (2i, 2i + 1), we (i, i + half)."""
    stored = np.arange(heads * head_dim).reshape(heads, head_dim // 2, 2)
    return stored.swapaxes(1, 2).reshape(-1)
