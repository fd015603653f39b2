"""How a linear map learns while the model stays frozen: adapters, and attaching them to any Flax module."""

from jaxmethods.adapters.attach import attach, detach, init, is_adapter, layers, merge, partition
from jaxmethods.adapters.base import Adapter, Call, Result
from jaxmethods.adapters.lora import LoRA

__all__ = ["Adapter", "Call", "LoRA", "Result", "attach", "detach", "init", "is_adapter", "layers", "merge", "partition"]
