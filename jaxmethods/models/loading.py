"""Opening and saving whole models: a module with its parameters, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmethods.models import decoder, files, gguf, huggingface
from jaxmethods.models.layout import shapes
from jaxmethods.sharding import shardings_for
from jaxmethods.tree import Tree


def load(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, mesh: Mesh | None = None, quantize: str | None = None
) -> tuple[decoder.Decoder, Tree]:
    """A decoder and its parameters.

    Args:
        path: a folder in Hugging Face's layout, a .gguf file, "package:NAME/FILE.gguf" (a file that the installed
            package NAME brings along), or a name on the hub.
        dtype: of the parameters and of the module's activations.
        mesh: places the parameters by `decoder.RULES`; each process then reads only what its devices hold. The default
            device when None.
        quantize: "int8" or "int4": linear layers are quantised as they are read (`models.quantize` says what that
            means), and a GGUF file's own Q8_0 or Q4_1 is taken over to the bit. Everything else has `dtype`.

    Returns:
        (module, params): `module.apply({"params": params}, tokens, mask)` gives hidden states, `models.logits` logits.

    Raises:
        FileNotFoundError: no model there; the message names what looks similar.
        ValueError: an architecture or a feature that is not supported, broken files, or a layer that cannot be quantised.
        ConnectionError: a hub name, and the hub does not answer.
    """
    found = files.resolve(path)
    if found.suffix == ".gguf":
        file = gguf.open_gguf(found)
        config = gguf.config_from_gguf(file)
        read: Any = functools.partial(gguf.read_params, file)
    else:
        config = huggingface.read_config(found)
        read = functools.partial(huggingface.read_params, found)
    expected = shapes(config, dtype, quantize)
    placed = None if mesh is None else shardings_for(expected, mesh, decoder.RULES)
    module = decoder.Decoder(config, dtype=dtype, param_dtype=dtype, quantization=quantize)
    return module, read(config, dtype=dtype, shardings=placed, quantize=quantize)


def save(
    path: str | os.PathLike[str],
    module: Any,
    params: Tree,
    *,
    tokenizer: Any = None,
    dtype: Any = None,
    shard_bytes: float = 5e9,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder that transformers opens: config.json, .safetensors, and the tokenizer if one is given.

    One layer at a time comes to the host; the folder appears when it is complete, never in part.

    Args:
        module: a `Decoder`.
        params: its parameters, of any sharding. Adapters must be merged or detached before.
        tokenizer: of `load_tokenizer`.
        dtype: of the numbers in the files; the parameters' own when None.
        shard_bytes: the files' largest size.
        overwrite: replace whatever stands at `path`. Without it, only an earlier save is replaced.

    Raises:
        ValueError: parameters that are not those of the module, or with adapters.
        FileExistsError: something else stands at `path`.
    """
    config = getattr(module, "config", None)
    if not isinstance(config, decoder.DecoderConfig):
        raise ValueError(f"{type(module).__name__} is no decoder and has no Hugging Face layout here.")
    huggingface.save(path, config, params, tokenizer, dtype=dtype, shard_bytes=shard_bytes, overwrite=overwrite)
