"""What is trained: models as Flax modules, and the ways in and out of them."""

from jaxmethods.models.architectures import RULES
from jaxmethods.models.composing import tower_features, vlm_config, with_eyes, with_eyes_shapes
from jaxmethods.models.decoder import Decoder, DecoderConfig, KVCache, Output, RopeScaling
from jaxmethods.models.dual import DualConfig, DualEncoder
from jaxmethods.models.efficientnet import EfficientNet, EfficientNetConfig
from jaxmethods.models.encoder import EncoderConfig
from jaxmethods.models.files import first_installed, revision
from jaxmethods.models.functional import hidden_states, logits, logits_of, sequence_logps, target_logps, unembedding
from jaxmethods.models.loading import load, save
from jaxmethods.models.shapes import shapes
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig
from jaxmethods.models.tokenizers import load_tokenizer
from jaxmethods.models.vision import VisionConfig, VisionTower
from jaxmethods.models.vlm import PARTS, VLM, Images, Sight, VLMConfig, part_of, pictures
from jaxmethods.quantization import dequantize, quantize

__all__ = [
    "PARTS", "RULES", "VLM", "Decoder", "DecoderConfig", "DualConfig", "DualEncoder", "EfficientNet", "EfficientNetConfig",
    "EncoderConfig", "Images", "KVCache", "Output", "RopeScaling", "Sight", "TextEncoder", "TextEncoderConfig", "VLMConfig",
    "VisionConfig", "VisionTower", "dequantize", "first_installed", "hidden_states", "load",
    "load_tokenizer", "logits", "logits_of", "part_of",
    "pictures", "quantize", "revision", "save", "sequence_logps", "shapes", "target_logps", "unembedding", "vlm_config",
    "with_eyes", "with_eyes_shapes", "tower_features",
]  # fmt: skip
