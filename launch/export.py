"""`jaxmethods export`: a run's model in a layout that others load."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import tyro
from etils import epath

from jaxmethods import adapters, models, tree
from jaxmethods.launch.opening import Opened, open_model


@dataclasses.dataclass(frozen=True)
class Export:
    """Write a run's model for others to load."""

    run: tyro.conf.Positional[str]
    """The run's work folder."""
    to: str
    """The folder to write; it must not exist."""
    format: Literal["hf", "peft", "adapter"] = "hf"
    """hf: the whole model with adapters fused, as transformers opens it. peft: the adapters alone, as PEFT opens them (S²FT as the
    LoRA it equals, S'MoRE as its released code writes it). adapter: the adapters alone in our own, compact layout."""
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
    if options.format == "hf":
        module, params = fused(opened)
        if "objective" in opened.params:
            print(
                f"left out: the objective's own {', '.join(opened.params['objective'])}, for which that layout has no place"
            )
        models.save(str(target), module, params, tokenizer=opened.tokenizer)
    else:
        if not opened.run.adapters:
            raise ValueError("this run has no adapter: it trained the model itself; use --format hf.")
        write = adapters.save_peft if options.format == "peft" else adapters.save
        base = {"base_model": opened.run.model, "revision": models.revision(opened.run.model)}
        write(target, opened.module, opened.params, **base)
    size = sum(f.stat().length for f in target.iterdir())
    print(f"wrote {options.to} ({options.format}, {size / 1e6:.1f} MB, step {opened.step} of {options.run})")


def fused(opened: Opened) -> tuple[Any, tree.Tree]:
    """(module, parameters) of a run's model with adapters fused, without the objective's own."""
    module, params = opened.module, {name: x for name, x in opened.params.items() if name != "objective"}
    if opened.run is not None and opened.run.adapters:
        return adapters.merge(module, params)
    return module, params
