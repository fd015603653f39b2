"""`jaxmethods export`: a run's model in a layout that others load."""

from __future__ import annotations

import dataclasses
import json
from typing import Literal

import numpy as np
import tyro
from etils import epath
from safetensors.numpy import save_file

from jaxmethods import adapters, models, tree
from jaxmethods.launch import config as run_config
from jaxmethods.launch.opening import Opened, open_model


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's model for others to load."""

    run: tyro.conf.Positional[str]
    """The run's work folder."""
    to: str
    """The folder to write; it must not exist."""
    format: Literal["hf", "adapter"] = "hf"
    """hf: the whole model with adapters fused, as transformers opens it. adapter: only the adapter's leaves, as one
    safetensors file named by their paths, with the config that rebuilds them."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""


def export(options: Export) -> None:
    """Writes the folder and says what is in it."""
    target = epath.Path(options.to)
    if target.exists():
        raise ValueError(f"{options.to} exists already; choose another --to.")
    opened = open_model(options.run, best=options.best)
    if opened.run is None:
        raise ValueError(f"{options.run} is no run's work folder; export takes what `jaxmethods train` wrote.")
    if options.format == "adapter":
        _write_adapter(target, opened)
    else:
        module, params = opened.module, opened.params
        if opened.run.adapters:
            module, params = adapters.merge(module, params)
        models.save(str(target), module, params, tokenizer=opened.tokenizer)
    size = sum(f.stat().length for f in target.iterdir())
    print(f"wrote {options.to} ({options.format}, {size / 1e6:.1f} MB, step {opened.step} of {options.run})")


def _write_adapter(target: epath.Path, opened: Opened) -> None:
    assert opened.run is not None
    if not opened.run.adapters:
        raise ValueError("this run has no adapter: it trained the model itself; use --format hf.")
    leaves, _ = tree.partition(opened.params, adapters.is_adapter)
    partial = target.with_name(target.name + ".partial")
    partial.mkdir(parents=True)
    save_file({path: np.asarray(x) for path, x in tree.flatten(leaves).items()}, str(partial / "adapter.safetensors"))
    described = {
        "base_model": opened.run.model,
        "adapters": run_config.to_json(opened.run.adapters),
        "step": opened.step,
    }
    (partial / "adapter.json").write_text(json.dumps(described, indent=2) + "\n")
    partial.rename(target)
