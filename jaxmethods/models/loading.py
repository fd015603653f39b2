"""Opening and saving whole models: a module with its parameters, from a folder, a GGUF file or the hub."""

from __future__ import annotations

import functools
import os
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxmethods.models import architectures, files, gguf, huggingface
from jaxmethods.sharding import shardings_for
from jaxmethods.tree import Tree


def load(
    path: str | os.PathLike[str], *, dtype: Any = jnp.float32, mesh: Mesh | None = None, quantize: str | None = None
) -> tuple[Any, Tree]:
    """A model and its parameters: a `Decoder`, a `VLM`, or an encoder.

    Args:
        path: a folder in Hugging Face's layout, a .gguf file, "package:NAME/FILE.gguf" (a file that the installed
            package NAME brings along), or a name on the hub.
        dtype: of the parameters and of the module's activations.
        mesh: places the parameters by the rules of the architecture; each process then reads only what its devices hold. The
            default device when None.
        quantize: "int8" or "int4": linear layers are quantised as they are read (`models.quantize` says what that
            means), and a GGUF file's own Q8_0 or Q4_1 is taken over to the bit. Everything else has `dtype`.

    Returns:
        (module, params): of a language model `module.apply({"params": params}, tokens, mask)` gives hidden states, `models.logits`
        logits.

    Raises:
        FileNotFoundError: no model there; the message names what looks similar.
        ValueError: an architecture or a feature that is not supported, broken files, or a layer that cannot be quantised.
        ConnectionError: a hub name, and the hub does not answer.
    """
    found = files.resolve(path)
    if found.suffix == ".gguf":
        file = gguf.open_gguf(found)
        config: architectures.AnyConfig = gguf.config_from_gguf(file)
        read: Any = functools.partial(gguf.read_params, file)
    else:
        config = huggingface.read_config(found)
        read = functools.partial(huggingface.read_params, found)
    module = architectures.build(config, dtype=dtype, quantize=quantize)
    expected = architectures.shapes(config, dtype, quantize)
    placed = None if mesh is None else shardings_for(expected, mesh, architectures.rules(config))
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
        module: a `Decoder`, a `VLM`, or an encoder.
        params: its parameters, of any sharding. Adapters must be merged or detached before.
        tokenizer: of `load_tokenizer`.
        dtype: of the numbers in the files; the parameters' own when None.
        shard_bytes: the files' largest size.
        overwrite: replace whatever stands at `path`. Without it, only an earlier save is replaced.

    Raises:
        ValueError: parameters that are not those of the module, or with adapters.
        FileExistsError: something else stands at `path`.
    """
    config = architectures.config_of(module)
    huggingface.save(path, config, params, tokenizer, dtype=dtype, shard_bytes=shard_bytes, overwrite=overwrite)
