"""Which tensor of a checkpoint each parameter comes from, and the assembling of parameters from them.

Checkpoints hold one tensor a layer, matrices as [out, in]; ours hold all layers in one array, matrices as [in, out].
A list of `Leaf` says so once, for reading (Hugging Face, GGUF) and for writing: `layout` of a decoder,
`architectures.leaves` of any model.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jaxmethods import quantization
from jaxmethods.kernels import quantized
from jaxmethods.kernels.quantized import BLOCK, Quantized
from jaxmethods.models.decoder import DecoderConfig
from jaxmethods.tree import Tree, flatten, unflatten

Slices = tuple[slice, ...]
Read = Callable[[str, Slices], np.ndarray]
"""`read(name, slices)` gives that part of a checkpoint's tensor, as the checkpoint lays it out."""
Stored = Callable[[str, slice, slice, str], Quantized | None]
"""`stored(name, rows, blocks, kind)` gives some blocks of some rows of a tensor [out, in], blocks along the first axis; None
where the tensor is not stored in the format of that kind."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter and its tensors.

    Args:
        path: of the parameter, "model/layers/mlp/up_proj/kernel".
        name: of the tensor; "{}" stands for the layer where there is one tensor a layer.
        shape: of the parameter, layers in front where they are stacked.
        transposed: the parameter's matrix is [in, out], the tensor [out, in].
        part: the field of `Quantized` that this parameter is, of a kernel that is quantised.
        dtype: of the parameter, whatever the others have.
    """

    path: str
    name: str
    shape: tuple[int, ...]
    transposed: bool
    part: str | None = None
    dtype: Any = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def names(self) -> list[str]:
        """The tensors, one a layer where layers are stacked."""
        return [self.name.format(layer) for layer in range(self.shape[0])] if self.stacked else [self.name]

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """The shape of each tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def layout(config: DecoderConfig) -> list[Leaf]:
    """The parameters of `Decoder(config)` with the names Hugging Face gives their tensors."""
    c = config
    depth, width = c.num_layers, c.hidden_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    leaves = [Leaf("model/embed_tokens/embedding", "model.embed_tokens.weight", (c.vocab_size, width), False)]

    def in_layer(module: str, leaf: str, shape: tuple[int, ...]) -> None:
        kind = "bias" if leaf == "bias" else "weight"
        name = f"model.layers.{{}}.{module.replace('/', '.')}.{kind}"
        leaves.append(Leaf(f"model/layers/{module}/{leaf}", name, (depth, *shape), leaf == "kernel"))

    in_layer("input_layernorm", "scale", (width,))
    for part, size in (("q", queries), ("k", keys), ("v", keys)):
        in_layer(f"self_attn/{part}_proj", "kernel", (width, size))
        if c.attention_bias:
            in_layer(f"self_attn/{part}_proj", "bias", (size,))
    in_layer("self_attn/o_proj", "kernel", (queries, width))
    if c.qk_norm:
        in_layer("self_attn/q_norm", "scale", (c.head_dim,))
        in_layer("self_attn/k_norm", "scale", (c.head_dim,))
    in_layer("post_attention_layernorm", "scale", (width,))
    if c.post_norms:
        in_layer("pre_feedforward_layernorm", "scale", (width,))
        in_layer("post_feedforward_layernorm", "scale", (width,))
    in_layer("mlp/gate_proj", "kernel", (width, c.intermediate_size))
    in_layer("mlp/up_proj", "kernel", (width, c.intermediate_size))
    in_layer("mlp/down_proj", "kernel", (c.intermediate_size, width))

    leaves.append(Leaf("model/norm/scale", "model.norm.weight", (width,), False))
    if not c.tie_embeddings:
        leaves.append(Leaf("lm_head/unembedding", "lm_head.weight", (width, c.vocab_size), True))
    return leaves


def in_parts(leaves: Sequence[Leaf], quantize: str | None) -> list[Leaf]:
    """The leaves with each kernel of a linear layer as its codes, scales and minimums; as they are where `quantize` is None.

    Raises:
        ValueError: a layer that cannot be quantised.
    """
    return list(leaves) if quantize is None else [part for leaf in leaves for part in _parts(leaf, quantize)]


def _parts(leaf: Leaf, kind: str) -> list[Leaf]:
    """The leaves of a kernel that is quantised; any other leaf as it is."""
    layer, _, name = leaf.path.rpartition("/")
    if name != "kernel" or not quantization.is_quantizable(leaf.path):
        return [leaf]
    depth, d_in, d_out = leaf.shape
    quantization.require_blocks(layer, d_in)
    shape = jax.eval_shape(lambda: quantized.draw(jax.random.key(0), d_in, d_out, kind))
    return [
        dataclasses.replace(leaf, path=path, shape=(depth, *x.shape), part=field, dtype=x.dtype)
        for (path, x), field in zip(quantization.leaves(layer, shape).items(), shape._fields, strict=False)
    ]


def check_tensors(leaves: Sequence[Leaf], found: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Raises ValueError for the first tensor that is missing, has another shape, or is not expected.

    Args:
        found: tensor name -> (its shape, the file that holds it).
    """
    expected = {name: leaf.tensor_shape for leaf in leaves for name in leaf.names}
    files = sorted({file for _, file in found.values()})
    for name, shape in expected.items():
        if name not in found:
            hint = "; set tie_word_embeddings to true if it shares the embedding" if name == "lm_head.weight" else ""
            missing = sum(other not in found for other in expected)
            more = f" (and {missing - 1} more)" if missing > 1 else ""
            raise ValueError(f"{_listed(files)}: tensor {name!r} {list(shape)} is missing{more}{hint}.")
        got, file = found[name]
        if got != shape:
            raise ValueError(
                f"{file}: tensor {name!r} has shape {list(got)} and config.json makes it {list(shape)}; "
                "the weights and the configuration are of different models."
            )
    if unknown := [name for name in found if name not in expected]:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ValueError(
            f"{found[unknown[0]][1]}: tensor {unknown[0]!r} {list(found[unknown[0]][0])} has no place in the model "
            f"that the configuration describes{more}."
        )


def _listed(files: Sequence[str]) -> str:
    return files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more files" if files else "the checkpoint"


def assemble(
    leaves: Sequence[Leaf],
    read: Read,
    *,
    dtype: Any,
    shardings: Tree | None = None,
    quantize: str | None = None,
    stored: Stored | None = None,
) -> Tree:
    """Parameters from a checkpoint's tensors, one leaf after the other.

    Without shardings, each leaf goes to the default device: the host holds one leaf beside what is already placed.
    With them, each process reads only the parts that its own devices hold.

    Args:
        shardings: a tree like the parameters', of shardings.
        quantize: "int8" or "int4" for quantised linear layers; their tensors are quantised on the host, one by one.
        stored: where some tensors are stored in that format, and are taken over.
    """
    quantising = None if quantize is None else _Quantising(read, quantize, stored)
    placed = None if shardings is None else flatten(shardings)
    flat = {}
    for leaf in in_parts(leaves, quantize):
        of_leaf: Read = read
        if leaf.part is not None:
            assert quantising is not None
            of_leaf = functools.partial(quantising.read, leaf.part)
        own = np.dtype(leaf.dtype or dtype)
        if placed is None:
            array = jax.device_put(_block(leaf, of_leaf, tuple(slice(0, n) for n in leaf.shape), own))
        else:
            array = _sharded(leaf, of_leaf, placed[leaf.path], own)
        flat[leaf.path] = array.block_until_ready()  # frees the host's copy before the next leaf is read
    return unflatten(flat)


class _Quantising:
    """Reads parts of quantised kernels from float tensors [out, in], or from such as are stored in the same format."""

    def __init__(self, read: Read, kind: str, stored: Stored | None):
        self.tensor, self.kind, self.stored = read, kind, stored
        self.last = "minimum" if kind == "int4" else "scale"
        self.seen: dict[tuple[Any, ...], Quantized] = {}  # scales, which are found with the codes and read after them

    def read(self, part: str, name: str, index: Slices) -> np.ndarray:
        rows, columns = index
        size = 1 if part != "codes" else BLOCK if self.kind == "int8" else BLOCK // 2
        first, last = columns.start // size, -(-columns.stop // size)
        q = self.blocks(part, name, rows, slice(first, last))
        return np.asarray(getattr(q, part)).T[:, columns.start - first * size : columns.stop - first * size]

    def blocks(self, part: str, name: str, rows: slice, blocks: slice) -> Quantized:
        """Some rows of a tensor and some blocks of them, with the blocks along the first axis."""
        key = (name, rows.start, rows.stop, blocks.start, blocks.stop)
        if part != "codes" and key in self.seen:
            return self.seen.pop(key) if part == self.last else self.seen[key]
        q = self.stored(name, rows, blocks, self.kind) if self.stored is not None else None
        if q is None:
            q = quantized.quantize(
                self.tensor(name, (rows, slice(blocks.start * BLOCK, blocks.stop * BLOCK))).T, self.kind
            )
        if part == "codes":
            self.seen[key] = q._replace(codes=np.empty((0, 0), np.int8))
        return q


def _sharded(leaf: Leaf, read: Read, sharding: jax.sharding.Sharding, dtype: np.dtype) -> jax.Array:
    blocks: dict[tuple, np.ndarray] = {}  # replicas of one shard are read once

    def block(index: tuple[slice, ...] | None) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), leaf.shape, strict=True))
        if bounds not in blocks:
            blocks[bounds] = _block(leaf, read, tuple(slice(*b) for b in bounds), dtype)
        return blocks[bounds]

    return jax.make_array_from_callback(leaf.shape, sharding, block, dtype=dtype)


def _block(leaf: Leaf, read: Read, index: Slices, dtype: np.dtype) -> np.ndarray:
    """The part `index` of a parameter."""
    inner = index[1:] if leaf.stacked else index
    wanted = inner[::-1] if leaf.transposed else inner
    layers = range(index[0].start, index[0].stop) if leaf.stacked else range(1)
    names = [leaf.name.format(layer) for layer in layers] if leaf.stacked else [leaf.name]
    out = np.empty((len(names), *(s.stop - s.start for s in inner)), dtype)

    def fill(row: int) -> None:
        part = read(names[row], wanted)
        out[row] = part.T if leaf.transposed else part

    workers = 1 if math.prod(out.shape) < 1 << 20 else min(8, os.cpu_count() or 1, len(names))
    if workers == 1:
        for row in range(len(names)):
            fill(row)
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(fill, range(len(names))))
    return out if leaf.stacked else out.reshape(out.shape[1:])  # an array even where it has no axis
