"""Adapters of any kind in files of our own: each leaf by its path, and the adapters' fields. The compact form of S²FT, whose
selection is a list of numbers here and a whole factor as a LoRA."""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from safetensors.numpy import load as parse
from safetensors.numpy import save as serialise

from jaxmethods import tree
from jaxmethods.adapters.attach import attach, init_shapes, is_adapter
from jaxmethods.adapters.lora import DoRA, LoRA
from jaxmethods.adapters.s2ft import S2FT
from jaxmethods.adapters.smore import SMoRE
from jaxmethods.tree import Tree

CONFIG, WEIGHTS = "adapter.json", "adapter.safetensors"
KINDS = {kind.__name__: kind for kind in (LoRA, DoRA, SMoRE, S2FT)}


def save(path: Any, adapted: Any, params: Tree, *, base_model: str | None = None, revision: str | None = None) -> None:
    """Writes the adapters' leaves, as they are, with what is needed to attach them again; never the base.

    Args:
        path: a new folder.
        base_model: name or path of the base model, for whoever opens the folder.

    Raises:
        FileExistsError: `path` exists.
        ValueError: an adapter that is not of this library, or leaves of permuted kernels.
    """
    for _, adapter in adapted.adapters:
        if type(adapter).__name__ not in KINDS:
            raise ValueError(f"{type(adapter).__name__} is none of this library's adapters: {', '.join(KINDS)}.")
    described = {
        "base_model": base_model,
        "revision": revision,
        "adapters": {
            pattern: {"kind": type(adapter).__name__} | dataclasses.asdict(adapter)
            for pattern, adapter in adapted.adapters
        },
    }
    flat = tree.flatten(params)
    leaves = {name: np.asarray(x) for name, x in flat.items() if is_adapter(name)}
    check(leaves, adapted, tree.unflatten({name: x for name, x in flat.items() if name not in leaves}), "adapters.save")
    write_folder(path, {CONFIG: (json.dumps(described, indent=2) + "\n").encode(), WEIGHTS: serialise(leaves)})


def load(path: Any, module: Any, base_params: Tree) -> tuple[Any, Tree]:
    """The module with the adapters attached that `save` wrote, and its parameters.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: an adapter of another base, naming the first leaf whose name or shape differs.
    """
    described, leaves = read_folder(path, CONFIG, WEIGHTS, f"adapters.save writes {CONFIG} and {WEIGHTS}")
    pairs = {}
    for pattern, fields in described["adapters"].items():
        tree.require_one_of(f"{CONFIG}: kind", fields["kind"], tuple(KINDS))
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name != "kind"}
        pairs[pattern] = KINDS[described["adapters"][pattern]["kind"]](**fields)
    adapted = attach(module, pairs)
    check(leaves, adapted, base_params, str(path))
    flat = tree.flatten(base_params) | {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    return adapted, tree.unflatten(flat)


def check(leaves: dict[str, Any], adapted: Any, base_params: Tree, where: str) -> None:
    """Raises ValueError for the first leaf that these adapters on this base would not have."""
    wanted = {name: x for name, x in tree.flatten(init_shapes(adapted, base_params)).items() if is_adapter(name)}
    for name in (*leaves, *wanted):
        found, fits = (f"shape {side[name].shape}" if name in side else "nothing" for side in (leaves, wanted))
        if found != fits:
            raise ValueError(
                f"{where}: leaf {name!r} has {found} and the model makes it {fits}; it is an adapter of another base, or "
                "of permuted kernels (s2ft.unpermute)."
            )


def read_folder(path: Any, config: str, weights: str, hint: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of a folder's JSON and safetensors files.

    Raises:
        FileNotFoundError: one of them is not there; `hint` says what should be.
        ValueError: one that cannot be read.
    """
    folder = epath.Path(path)
    for name in (config, weights):
        if not (folder / name).exists():
            raise FileNotFoundError(f"{path} holds no {name}; {hint}.")
    try:
        return json.loads((folder / config).read_text()), parse((folder / weights).read_bytes())
    except Exception as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


def write_folder(path: Any, files: dict[str, bytes]) -> None:
    """Writes a new folder as a whole: it appears under its name when all files are there.

    Raises:
        FileExistsError: `path` exists.
    """
    target = epath.Path(path)
    if target.exists():
        raise FileExistsError(f"{path} exists already; choose another folder, or remove it.")
    partial = target.with_name(f"{target.name}.partial-{secrets.token_hex(4)}")
    partial.mkdir(parents=True)
    try:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.rename(target)
    except BaseException:
        partial.rmtree(missing_ok=True)
        raise
