"""What is trained: models as Flax modules, and the ways in and out of them."""

from jaxmethods.models.decoder import RULES, Decoder, DecoderConfig, KVCache, Output, RopeScaling
from jaxmethods.models.files import revision
from jaxmethods.models.functional import hidden_states, logits, logits_of, sequence_logps, target_logps, unembedding
from jaxmethods.models.loading import load, save
from jaxmethods.models.shapes import shapes
from jaxmethods.models.tokenizers import load_tokenizer
from jaxmethods.quantization import dequantize, quantize

__all__ = [
    "RULES", "Decoder", "DecoderConfig", "KVCache", "Output", "RopeScaling", "dequantize", "hidden_states", "load",
    "load_tokenizer", "logits", "logits_of", "quantize", "revision", "save", "sequence_logps", "shapes", "target_logps",
    "unembedding",
]  # fmt: skip
