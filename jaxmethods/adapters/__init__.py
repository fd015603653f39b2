"""How a linear map learns while the model stays frozen: adapters, and attaching them to any Flax module."""

from jax.sharding import PartitionSpec as P

from jaxmethods.adapters import s2ft, smore
from jaxmethods.adapters.attach import (
    adapted_layers,
    attach,
    detach,
    init,
    init_shapes,
    is_adapter,
    layers,
    leaves_of,
    merge,
    partition,
    score_shapes,
)
from jaxmethods.adapters.base import Adapter, Call, Result
from jaxmethods.adapters.files import load, save
from jaxmethods.adapters.lora import DoRA, LoRA
from jaxmethods.adapters.peft import load_peft, save_peft
from jaxmethods.adapters.s2ft import S2FT
from jaxmethods.adapters.serving import bank, for_rows
from jaxmethods.adapters.smore import HydraLoRA, MixLoRA, SMoRE

RULES = (
    (r"adapter/((lora|dora)/a|smore/(experts/a|router/down)/kernel)$", P(("fsdp", "tensor"), None)),
    (r"adapter/((lora|dora)/b|smore/experts/proj/kernel|s2ft/delta)$", P(None, ("tensor", "fsdp"))),
    (r"/adapter/", P()),
)
"""Where adapter leaves lie: those with one of the layer's own widths are split along it, over all that holds parameters; the
small ones are whole on each device."""

__all__ = [
    "RULES", "S2FT", "Adapter", "Call", "DoRA", "HydraLoRA", "LoRA", "MixLoRA", "Result", "SMoRE", "adapted_layers", "attach",
    "bank", "detach", "for_rows", "init", "init_shapes", "is_adapter", "layers", "leaves_of", "load", "load_peft", "merge",
    "partition", "s2ft", "save", "save_peft", "score_shapes", "smore",
]  # fmt: skip
