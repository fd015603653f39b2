"""Small real models for tests: random weights, every feature of a family, nothing downloaded."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxmethods import adapters, models, tree
from jaxmethods.images import ImageFormat
from jaxmethods.models import architectures
from jaxmethods.models.vision import MEAN_AND_STD


def decoder(family: str = "llama", **changes) -> tuple[models.Decoder, dict]:
    """A three-layer decoder of width 32 and 61 tokens, with random parameters (norms and biases too)."""
    module, params = _decoder(family, **changes)
    return module, jax.tree.map(lambda x: x, params)


@functools.cache
def _decoder(family: str, **changes) -> tuple[models.Decoder, dict]:
    switches = {
        "llama": {"rope_scaling": models.RopeScaling(8.0, 1.0, 4.0, 16)},
        "mistral": {"sliding_window": 5},
        "qwen2": {"attention_bias": True, "tie_embeddings": True},
        "qwen3": {"qk_norm": True, "head_dim": 12},
        "gemma2": {
            "activation": "gelu_tanh", "sliding_window": 4, "window_layers": (True, False, True), "attention_softcap": 5.0,
            "final_softcap": 3.0, "query_scale": 0.2, "post_norms": True, "embedding_scale": True, "norm_plus_one": True,
            "tie_embeddings": True,
        },
    }[family]  # fmt: skip
    config = models.DecoderConfig(
        **dict(
            family=family, vocab_size=61, hidden_size=32, intermediate_size=48, num_layers=3, num_heads=4, num_kv_heads=2,
            head_dim=8, eos_ids=(2,),
        ) | switches | changes
    )  # fmt: skip
    module = models.Decoder(config)
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]
    leaves, structure = jax.tree.flatten(params)

    @jax.jit
    def noisy(leaves):
        keys = jax.random.split(jax.random.key(1), len(leaves))
        return [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]

    return module, jax.tree.unflatten(structure, noisy(leaves))


def sight(kind: str = "llava", image_token_id: int = 60) -> models.Sight:
    """How `vlm` sees: crops of 8 x 8 pixels, four features each; "llava_onevision" cuts pictures into crops and has a newline."""
    family, cut = {
        "llava": ("clip", {"resize": "crop"}),
        "llava_onevision": (
            "siglip",
            {"resize": "anyres", "resolutions": ((8, 16), (16, 8), (16, 16)), "max_crops": 2, "newline": True},
        ),
    }[kind]
    mean, std = MEAN_AND_STD[family]
    layers = models.EncoderConfig(
        hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, activation="quick_gelu"
    )
    tower = models.VisionConfig(family, layers, image_size=8, patch_size=4, mean=mean, std=std).reading(-2)
    return models.Sight(kind, tower, ImageFormat(size=8, grid=2, **cut), image_token_id)


def vlm(kind: str = "llava", family: str = "llama", *, image_token_id: int = 60, **changes) -> tuple[models.VLM, dict]:
    """`decoder(family, **changes)` behind a vision tower of two layers and a projector, with random parameters."""
    module, params = _vlm(kind, family, image_token_id, **changes)
    return module, jax.tree.map(lambda x: x, params)


@functools.cache
def _vlm(kind: str, family: str, image_token_id: int, **changes) -> tuple[models.VLM, dict]:
    module, params = decoder(family, **changes)
    whole = models.VLM(module.config, sight=sight(kind, image_token_id))
    rng = np.random.default_rng(2)
    eyes = {}
    for path, shape in tree.flatten(architectures.shapes(whole.whole, np.float32)).items():
        if models.part_of(path) != "decoder":
            size = shape.shape[-2] ** -0.5 if path.endswith("/kernel") and "patch" not in path else 0.1
            eyes[path] = jnp.asarray(path.endswith("scale") + size * rng.normal(size=shape.shape), jnp.float32)
    return whole, params | tree.unflatten(eyes)


def adapted(pairs, family: str = "llama", *, seed: int = 2, moved: float = 0.2, **changes):
    """(module, its parameters, the module with adapters, its parameters), the adapters moved by noise of size `moved`."""
    module, base = decoder(family, **changes)
    made, params = _adapted(tuple(pairs.items()), family, seed, moved, tuple(changes.items()))
    return module, base, made, jax.tree.map(lambda x: x, params)


@functools.cache
def _adapted(pairs, family, seed, moved, changes):
    module, base = decoder(family, **dict(changes))
    made = adapters.attach(module, dict(pairs))
    params = jax.jit(lambda base, key: adapters.init(made, base, key))(base, jax.random.key(seed))
    if not moved:
        return made, params
    trained, frozen = adapters.partition(params)
    leaves, structure = jax.tree.flatten(trained)
    rng = np.random.default_rng(seed + 1)
    noisy = [x + jnp.asarray(moved * rng.normal(size=x.shape), x.dtype) for x in leaves]
    return made, tree.combine(jax.tree.unflatten(structure, noisy), frozen)


def batch(rows: int = 4, length: int = 16, seed: int = 0, vocab: int = 61) -> dict[str, np.ndarray]:
    """Rows of one to three segments with padding behind, as the data room lays them out."""
    rng = np.random.default_rng(seed)
    made = {
        "tokens": rng.integers(3, vocab, (rows, length)).astype(np.int32),
        "target_mask": np.zeros((rows, length), bool),
        "segment_ids": np.zeros((rows, length), np.int32),
        "positions": np.zeros((rows, length), np.int32),
    }
    for row in range(rows):
        start = 0
        for segment, size in enumerate(rng.integers(4, 7, rng.integers(1, 4)), 1):
            place = slice(start, min(start + size, length))
            made["segment_ids"][row, place] = segment
            made["positions"][row, place] = np.arange(place.stop - place.start)
            made["target_mask"][row, place] = np.arange(place.stop - place.start) >= 2
            start = place.stop
    return made
