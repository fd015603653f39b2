"""Models in Hugging Face's layout: config.json and .safetensors files, read and written without torch."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmethods import quantization
from jaxmethods.models import architectures, files, weights
from jaxmethods.models.architectures import AnyConfig
from jaxmethods.models.decoder import DecoderConfig
from jaxmethods.models.hf_pooling import read_pooling, write_pooling
from jaxmethods.models.layout import Leaf, Slices, assemble, check_tensors
from jaxmethods.models.text_encoder import TextEncoderConfig
from jaxmethods.tree import Tree, flatten


def read_config(folder: Path) -> AnyConfig:
    """The architecture of the model in a folder.

    Token ids that end a generation are taken from generation_config.json where it names them, as generation does in
    transformers: chat models often list more there than in config.json. A sentence encoder's pooling is what modules.json says.
    """
    told = files.model_config(folder)
    try:
        config = architectures.config_from_hf(told, _preprocessor(folder))
        if isinstance(config, TextEncoderConfig) and config.family == "bert":
            config = dataclasses.replace(config, pooling=read_pooling(folder) or config.pooling)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    generation, decoder = folder / "generation_config.json", architectures.decoder_of(config)
    told = files.read_json(generation) if decoder is not None and generation.is_file() else {}
    if decoder is not None and (eos := told.get("eos_token_id")) is not None:
        decoder = dataclasses.replace(decoder, eos_ids=tuple(eos) if isinstance(eos, list) else (eos,))
        config = architectures.with_decoder(config, decoder)
    return config


def _preprocessor(folder: Path) -> dict[str, Any] | None:
    """How pictures are prepared: preprocessor_config.json, or its part of the processor_config.json of transformers 5."""
    alone, joint = folder / "preprocessor_config.json", folder / "processor_config.json"
    if alone.is_file():
        return files.read_json(alone)
    return files.read_json(joint).get("image_processor") if joint.is_file() else None


def read_params(
    folder: Path, config: AnyConfig, *, dtype: Any, shardings: Tree | None = None, quantize: str | None = None
) -> Tree:
    """The parameters of a model from the safetensors files of a folder.

    Tensors are read one after the other, straight into their shards: see `layout.assemble`.

    Args:
        dtype: of the parameters, whatever the files hold.
        shardings: a tree like the parameters', from `sharding.shardings_for`; the default device when None.
        quantize: "int8" or "int4" for quantised linear layers.

    Raises:
        ValueError: tensors that do not fit the configuration, broken files, pickled weights.
        FileNotFoundError: no weights.
    """
    tensors, prefix = _tensors(folder, config)
    leaves = architectures.leaves(config)
    if prefix != "model.":
        leaves = [dataclasses.replace(leaf, name=leaf.name.replace("model.", prefix, 1)) for leaf in leaves]
    decoder = architectures.decoder_of(config)
    if decoder is not None and decoder.tie_embeddings:
        embedding = next(leaf.name for leaf in leaves if leaf.path == "model/embed_tokens/embedding")
        _drop_tied_head(tensors, embedding, re.sub(r"(model\.)?embed_tokens", "lm_head", embedding))
    check_tensors(leaves, {name: (tensor.shape, str(tensor.file)) for name, tensor in tensors.items()})

    def read(name: str, index: Slices) -> np.ndarray:
        return weights.read_slice(name, tensors[name], index)

    return assemble(leaves, read, dtype=dtype, shardings=shardings, quantize=quantize)


def _tensors(folder: Path, config: AnyConfig) -> tuple[dict[str, weights.Tensor], str]:
    """Every tensor of a folder that the model has a place for, by the names of its layout, and the prefix of a decoder's ("model."
    or, from headless models, "")."""
    where = files.weight_files(folder)
    if isinstance(where, Path):
        tensors, _ = weights.read_header(where)
    else:
        headers = {file: weights.read_header(file)[0] for file in sorted(set(where.values()))}
        tensors = {}
        for name, file in where.items():
            if name not in headers[file]:
                raise ValueError(f"{file}: tensor {name!r} is missing, though the index lists it there.")
            tensors[name] = headers[file][name]
        for header in headers.values():  # what the index forgets is not overlooked
            for name, tensor in header.items():
                tensors.setdefault(name, tensor)
    canonical, ignored = architectures.canonical(config), architectures.ignored(config)
    named = {canonical(name): tensor for name, tensor in tensors.items()}
    tensors = {name: tensor for name, tensor in named.items() if not ignored(name)}
    if not isinstance(config, DecoderConfig):
        return tensors, "model."
    headless = "embed_tokens.weight" in tensors and not any(name.startswith("model.") for name in tensors)
    return tensors, "" if headless else "model."


def _drop_tied_head(tensors: dict[str, weights.Tensor], embedding: str, head: str) -> None:
    """Some files of tied models hold the matrix twice; one is left out when they are equal."""
    if head not in tensors or embedding not in tensors:
        return
    one, two = tensors[embedding], tensors[head]
    rows = max(1, (64 << 20) // max(1, 2 * one.shape[-1]))
    same = one.shape == two.shape and all(
        np.array_equal(weights.read_slice(embedding, one, part), weights.read_slice(head, two, part))
        for part in ((slice(start, start + rows),) for start in range(0, one.shape[0], rows))
    )
    if not same:
        raise ValueError(
            f"{two.file}: config.json ties the output matrix to the embedding, but {head!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false."
        )
    del tensors[head]


_MARK = {"written_by": "jaxmethods"}


def save(
    path: str | os.PathLike[str],
    config: AnyConfig,
    params: Tree,
    tokenizer: Any = None,
    *,
    dtype: Any = None,
    shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that transformers opens, with its tokenizer if one is given.

    One layer at a time comes to the host. The folder appears when it is complete, never in part. In a run of many
    processes all of them call this; the first one writes.

    Args:
        params: arrays of any sharding, or numpy arrays.
        tokenizer: a tokenizer of transformers.
        dtype: of the numbers in the files; the parameters' own when None.
        shard_bytes: the files' largest size.
        overwrite: replace whatever stands at `path`. Without it, only an earlier save is replaced.

    Raises:
        ValueError: adapter leaves, quantised kernels, or parameters that are not those of the configuration.
        FileExistsError: something else stands at `path`.
    """
    target = Path(path).expanduser().absolute()
    flat = _check_params(config, params)
    tensors = [tensor for leaf in architectures.leaves(config) for tensor in _planned(leaf, flat[leaf.path], dtype)]
    tensors += architectures.unread_tensors(config, tensors[0].dtype)
    shards = weights.in_shards(tensors, shard_bytes)
    told = architectures.config_to_hf(config)
    told["torch_dtype"] = told["dtype"] = tensors[0].dtype.name  # transformers 4 reads the first, 5 the second
    _check_target(target, overwrite)
    if jax.process_index() != 0:
        for shard in shards:
            for tensor in shard:
                tensor.make()  # takes part in gathering it
        multihost_utils.sync_global_devices("models.save")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.unfinished")
    try:
        unfinished.mkdir()
        _write_weights(unfinished, shards)
        files.write_json(unfinished / "config.json", told)
        if architectures.decoder_of(config) is not None:
            text, keys = told.get("text_config", told), ("bos_token_id", "eos_token_id", "pad_token_id")
            generation = {key: text[key] for key in keys if text[key] is not None}
            files.write_json(unfinished / "generation_config.json", {"_from_model_config": True, **generation})
        if (preprocessor := architectures.preprocessor_to_hf(config)) is not None:
            files.write_json(unfinished / "preprocessor_config.json", preprocessor)
        if isinstance(config, TextEncoderConfig) and config.family == "bert":
            write_pooling(unfinished, config.pooling, config.encoder.hidden_size)
        if tokenizer is not None:
            from jaxmethods.models.tokenizers import save_tokenizer

            save_tokenizer(unfinished, tokenizer)
        _replace(target, unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    if jax.process_count() > 1:  # nobody goes on before the folder is there
        multihost_utils.sync_global_devices("models.save")


def _check_params(config: AnyConfig, params: Tree) -> dict[str, Any]:
    family = getattr(getattr(config, "sight", config), "family", "encoder")
    flat = flatten(params)
    quantization.require_plain(params, "models.save")
    if adapters := [path for path in flat if "adapter" in path.split("/")]:
        raise ValueError(
            f"the parameters hold an adapter ({adapters[0]}, {len(adapters)} leaves); write what "
            "adapters.merge(...) makes of them, or detach the adapter and write it with adapters.save_peft(...)."
        )
    expected = {leaf.path: leaf.shape for leaf in architectures.leaves(config)}
    for path, shape in expected.items():
        if path not in flat:
            raise ValueError(f"parameter {path!r} {list(shape)} of the {family} model is missing.")
        if flat[path].shape != shape:
            raise ValueError(
                f"parameter {path!r} has shape {list(flat[path].shape)}; the configuration makes it {list(shape)}."
            )
    if unknown := sorted(flat.keys() - expected.keys()):
        raise ValueError(f"parameter {unknown[0]!r} is no part of the {family} model and would be lost.")
    return flat


def _planned(leaf: Leaf, array: Any, dtype: Any) -> list[weights.Planned]:
    """The tensors of one parameter, each made when its turn comes."""
    dtype = np.dtype(array.dtype if dtype is None else dtype)
    if dtype not in weights.DTYPES.values():
        raise ValueError(
            f"parameter {leaf.path!r} is {dtype.name}; write it as float32, bfloat16 or float16 (dtype=...)."
        )

    def make(layer: int | None) -> np.ndarray:
        part = _on_host(array, layer)
        return (part.T if leaf.transposed else part).astype(dtype)

    layers: list[int | None] = list(range(leaf.shape[0])) if leaf.stacked else [None]
    return [
        weights.Planned(name, dtype, leaf.tensor_shape, lambda layer=layer: make(layer))  # type: ignore[misc]
        for name, layer in zip(leaf.names, layers, strict=True)
    ]


def _on_host(array: Any, layer: int | None) -> np.ndarray:
    """A parameter, or one layer of it, as numpy; for arrays spread over processes, all of them must call this."""
    if not isinstance(array, jax.Array):
        return np.asarray(array if layer is None else array[layer])
    with jax.transfer_guard("allow"):
        if array.is_fully_addressable:
            return np.asarray(array if layer is None else _gather(None)(array, layer))
        assert isinstance(array.sharding, jax.sharding.NamedSharding), array.sharding
        everywhere = jax.sharding.NamedSharding(array.sharding.mesh, jax.sharding.PartitionSpec())
        return np.asarray(_gather(everywhere)(array, layer).addressable_data(0))


@functools.cache
def _gather(sharding: Any) -> Any:
    def pick(array: jax.Array, layer: Any) -> jax.Array:
        return array if layer is None else jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)

    return jax.jit(pick, out_shardings=sharding)


def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file; a model is written as a folder, choose another path.")
    if overwrite or not any(target.iterdir()):
        return
    strange = sorted(entry.name for entry in target.iterdir() if not _WRITTEN.fullmatch(entry.name))
    first = next(iter(sorted(target.glob("model*.safetensors"))), None)
    try:
        ours = first is not None and _MARK.items() <= weights.read_header(first)[1].items()
    except ValueError:
        ours = False
    if strange or not ours:
        what = f"holds {strange[0]}" if strange else "is not an earlier save"
        raise FileExistsError(f"{target} {what}; choose another path, or overwrite=True to replace the whole folder.")


_WRITTEN = re.compile(
    r"((generation|preprocessor)_)?config\.json|model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|tokenizer(_config)?\.json|tokenizer\.model"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.json|merges\.txt|chat_template\.jinja|additional_chat_templates"
)
"""The names that `save` itself, and tokenizers, write."""


def _write_weights(folder: Path, shards: list[list[weights.Planned]]) -> None:
    metadata = {"format": "pt"} | _MARK  # transformers asks for a format and takes "pt" for [out, in] matrices
    if len(shards) == 1:
        weights.write(folder / "model.safetensors", shards[0], metadata)
        return
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights.write(folder / name, shard, metadata)
        where |= {tensor.name: name for tensor in shard}
    size = sum(tensor.nbytes for shard in shards for tensor in shard)
    files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})


def _replace(target: Path, finished: Path) -> None:
    """Puts the finished folder in place; what stood there is removed once the new one stands."""
    if not target.exists():
        finished.rename(target)
        return
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    target.rename(old)
    try:
        finished.rename(target)
    except OSError:
        old.rename(target)
        raise
    shutil.rmtree(old)
