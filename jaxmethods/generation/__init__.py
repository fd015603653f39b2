"""Text from a language model: sampling with a key-value cache, compiled once for each shape."""

from jaxmethods.generation.generate import Generation, generate
from jaxmethods.generation.sampling import filter_logits, sample

__all__ = ["Generation", "filter_logits", "generate", "sample"]
