"""How a linear map learns while the model stays frozen: adapters, and attaching them to any Flax module."""

from jax.sharding import PartitionSpec as P

from jaxmethods.adapters import smore
from jaxmethods.adapters.attach import attach, detach, init, is_adapter, layers, merge, partition
from jaxmethods.adapters.base import Adapter, Call, Result
from jaxmethods.adapters.lora import LoRA
from jaxmethods.adapters.s2ft import S2FT
from jaxmethods.adapters.smore import HydraLoRA, MixLoRA, SMoRE

RULES = (
    (r"adapter/lora/a$", P("fsdp", None)),
    (r"adapter/lora/b$", P(None, "tensor")),
    (r"/adapter/", P()),
)
"""Where adapter leaves lie."""

__all__ = [
    "RULES", "S2FT", "Adapter", "Call", "HydraLoRA", "LoRA", "MixLoRA", "Result", "SMoRE", "attach", "detach", "init",
    "is_adapter", "layers", "merge", "partition", "smore",
]  # fmt: skip
