"""Encoders by hand and by their laws; `test_encoders_parity.py` compares them with transformers."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods import adapters, tree
from jaxmethods.models import weights
from jaxmethods.models.dual import DualConfig, DualEncoder
from jaxmethods.models.encoder import ACTIVATIONS, RULES, Encoder, EncoderConfig
from jaxmethods.models.files import read_json
from jaxmethods.models.hf_encoders import (
    canonical,
    encoder_config_from_hf,
    encoder_config_to_hf,
    encoder_layout,
    ignored_tensors,
    preprocessor_to_hf,
)
from jaxmethods.models.layout import assemble
from jaxmethods.models.text_encoder import TextEncoder, TextEncoderConfig, pool
from jaxmethods.models.tokenizers import load_tokenizer
from jaxmethods.models.vision import MEAN_AND_STD, PatchEmbedding, VisionConfig, VisionTower
from jaxmethods.sharding import make_mesh, shardings_for

LAYERS = EncoderConfig(hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, activation="quick_gelu")
EOS = 7


def vision(family: str, **changes) -> VisionConfig:
    """15 pixels a side: the last column and row stand in no patch."""
    mean, std = MEAN_AND_STD[family]
    told = {"class_token": family == "clip", "norm_features": family == "siglip"} | changes
    return VisionConfig(family, LAYERS, image_size=15, patch_size=7, mean=mean, std=std, **told)


def text(family: str, **changes) -> TextEncoderConfig:
    encoder = dataclasses.replace(LAYERS, causal=family == "clip", post_norm=family == "bert")
    own = {"clip": {"eos_id": EOS}, "siglip": {"head_width": 16}, "bert": {"token_types": 2}}[family]
    return TextEncoderConfig(family, vocab_size=31, max_positions=9, **{"encoder": encoder} | own | changes)


def dual(family: str) -> DualConfig:
    own = {"clip": {"projection": 12}, "siglip": {"initial_bias": -10.0, "initial_scale": 2.0}}[family]
    return DualConfig(vision(family), text(family), **own)


def build(config, **settings):
    kind = {VisionConfig: VisionTower, TextEncoderConfig: TextEncoder, DualConfig: DualEncoder}[type(config)]
    return kind(config, **settings)


def shapes(config, **settings):
    """The parameters' shapes, as `init` would make them."""
    module = build(config, **settings)
    pixels, tokens = jnp.zeros((1, 15, 15, 3), jnp.uint8), jnp.zeros((1, 3), jnp.int32)
    inputs = {VisionConfig: (pixels,), TextEncoderConfig: (tokens,), DualConfig: (pixels, tokens)}[type(config)]
    return jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]


@functools.cache
def params_of(config):
    """Large random parameters, norms and biases too: at a usual start most mistakes would not show."""
    rng = np.random.default_rng(0)

    def draw(path, shape):
        size = 0.3 if path.endswith(("bias", "scale")) else 1.5 * math.prod(shape[-2:-1] or (1,)) ** -0.5
        return jnp.asarray(size * rng.normal(size=shape) + path.endswith("/scale"), jnp.float32)

    flat = tree.flatten(shapes(config))
    return tree.unflatten({path: draw(path, leaf.shape) for path, leaf in flat.items()})


@functools.partial(jax.jit, static_argnums=0, static_argnames="method")
def run(module, params, *inputs, method=None, **named):
    return module.apply({"params": params}, *inputs, method=method, **named)


def pixels(rows: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (rows, 15, 15, 3)).astype(np.uint8)


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Full, padded on the right, padded on the left; padding holds any id, the token that ends a text too."""
    tokens = np.random.default_rng(2).integers(8, 31, (3, 9)).astype(np.int32)
    mask = np.ones((3, 9), bool)
    mask[1, 5:] = False
    mask[2, :4] = False
    tokens[:, 0] = tokens[1, -1] = EOS
    tokens[[0, 1, 2], [0, 0, 0]] = 20, 21, EOS
    tokens[[0, 1, 2], [7, 4, 8]] = EOS
    return tokens, mask


CONFIGS = [vision("clip"), vision("siglip"), text("clip"), text("siglip"), text("bert"), dual("clip"), dual("siglip")]
CONFIGS += [vision("clip").reading(-2), vision("siglip", pooled=False), vision("siglip").reading(-3)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_the_layout_is_of_the_parameters_that_the_module_has(config):
    leaves = encoder_layout(config, at="here/")
    mine = {leaf.path.removeprefix("here/"): (leaf.shape, leaf.dtype or jnp.bfloat16) for leaf in leaves}
    module = tree.flatten(shapes(config, param_dtype=jnp.bfloat16))
    assert mine == {path: (leaf.shape, leaf.dtype) for path, leaf in module.items()}
    names = [name for leaf in leaves for name in leaf.names]
    assert len(names) == len(set(names))
    ignored = [re.compile(pattern) for pattern in ignored_tensors(config)]
    assert not [name for name in names if any(pattern.search(name) for pattern in ignored)]


@pytest.mark.parametrize("config", CONFIGS[:7], ids=lambda c: type(c).__name__)
def test_config_json_and_back(config):
    preprocessor = None if isinstance(config, TextEncoderConfig) else preprocessor_to_hf(config)
    again = encoder_config_from_hf(encoder_config_to_hf(config), preprocessor)
    if isinstance(config, DualConfig) and config.vision.family == "siglip":  # has no place for them
        again = dataclasses.replace(again, initial_scale=config.initial_scale)
    assert again == config


def test_a_shorter_tower_is_written_as_one():
    told = encoder_config_to_hf(vision("siglip").reading(-2))
    assert (told["num_hidden_layers"], told["vision_use_head"]) == (2, False)


# Equations


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_by_hand(name):
    x = np.linspace(-4, 4, 17)
    want = {
        "gelu": [0.5 * y * (1 + math.erf(y / math.sqrt(2))) for y in x],
        "gelu_tanh": 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "quick_gelu": x / (1 + np.exp(-1.702 * x)),
    }[name]
    np.testing.assert_allclose(ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), want, atol=1e-6)


@pytest.mark.parametrize("post_norm, causal", [(False, False), (False, True), (True, False)])
def test_one_layer_by_hand(post_norm, causal):
    config = dataclasses.replace(LAYERS, num_layers=1, post_norm=post_norm, causal=causal, layer_norm_eps=0.1)
    rng = np.random.default_rng(0)
    x, mask = rng.normal(size=(2, 5, 16)).astype(np.float32), np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], bool)
    start = jax.eval_shape(lambda: Encoder(config).init(jax.random.key(0), x))["params"]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.3 * rng.normal(size=leaf.shape), jnp.float32), start)
    p = {path.removeprefix("layers/"): np.float64(leaf[0]) for path, leaf in tree.flatten(params).items()}

    def linear(y, name):
        return y @ p[f"{name}/kernel"] + p[f"{name}/bias"]

    def norm(y, name):
        y = y - y.mean(-1, keepdims=True)
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + 0.1) * p[f"{name}/scale"] + p[f"{name}/bias"]

    def attend(y):
        out = np.zeros_like(y)
        for row in range(2):
            q, k, v = (linear(y[row], f"self_attn/{part}_proj") for part in "qkv")
            for head in (slice(0, 8), slice(8, 16)):
                for token in range(5):
                    seen = mask[row] & (np.arange(5) <= token) if causal else mask[row]
                    scores = np.exp(k[seen][:, head] @ q[token, head] / np.sqrt(8))
                    out[row, token, head] = scores @ v[seen][:, head] / scores.sum()
        return linear(out, "self_attn/out_proj")

    def mlp(y):
        y = linear(y, "mlp/fc1")
        return linear(y / (1 + np.exp(-1.702 * y)), "mlp/fc2")

    if post_norm:
        want = norm(x + attend(x), "layer_norm1")
        want = norm(want + mlp(want), "layer_norm2")
    else:
        want = x + attend(norm(x, "layer_norm1"))
        want = want + mlp(norm(want, "layer_norm2"))
    got = run(Encoder(config), params, x, mask)
    assert np.abs(want).max() > 0.5
    np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_patches_are_embedded_as_by_a_convolution(family):
    config = vision(family)
    x = np.random.default_rng(0).normal(size=(2, 15, 15, 3)).astype(np.float32)
    params = params_of(config)["embeddings"]["patch_embedding"]
    kernel = params["kernel"].transpose(1, 0, 2, 3)  # [height, width, colours, out]
    numbers = ("NHWC", "HWIO", "NHWC")
    want = jax.lax.conv_general_dilated(x, kernel, (7, 7), "VALID", dimension_numbers=numbers) + params.get("bias", 0)
    got = PatchEmbedding(config).apply({"params": params}, jnp.asarray(x))
    np.testing.assert_allclose(got, want.reshape(2, 4, 16), atol=1e-5)


def test_pixels_are_bytes_or_numbers_and_normalised():
    """A tower with another mean and standard deviation sees the same where the pixels make up for them."""
    config = dataclasses.replace(vision("clip"), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    params, x = params_of(vision("clip")), pixels()
    want = run(build(vision("clip")), params, x).features
    mean, std = MEAN_AND_STD["clip"]
    moved = 255 * (x.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(run(build(config), params, moved.astype(np.float32)).features, want, atol=2e-5)


@pytest.mark.parametrize(
    "pooling, eos_id, want",
    [("mean", None, [4.5, 3.0, 1.0]), ("first", None, [4.0, 2.0, 1.0]), ("last", None, [5.0, 5.0, 5.0]),
     ("eos", 9, [5.0, 3.0, 0.0]), ("eos", 2, [5.0, 3.0, 1.0])],
)  # fmt: skip
def test_pooling_by_hand(pooling, eos_id, want):
    hidden = jnp.broadcast_to(jnp.arange(6.0)[None, :, None], (3, 6, 2))
    tokens = jnp.array([[9, 9, 9, 9, 8, 9], [9, 9, 3, 9, 9, 9], [9, 4, 9, 9, 9, 9]])
    mask = jnp.array([[0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0]], bool)
    got = pool(hidden, tokens, mask, pooling=pooling, eos_id=eos_id)
    np.testing.assert_array_equal(got, np.tile(np.array(want)[:, None], 2))
    assert not np.isnan(pool(hidden, tokens, jnp.zeros_like(mask), pooling=pooling, eos_id=eos_id)).any()


# Laws


@pytest.mark.parametrize("family", ["clip", "bert"])
def test_padding_on_either_side_changes_nothing(family):
    config = text(family)
    tokens, mask = texts()
    together = run(build(config), params_of(config), tokens, mask)
    for row in (1, 2):
        alone = run(build(config), params_of(config), tokens[row : row + 1, mask[row]])
        np.testing.assert_allclose(together.hidden[row][mask[row]], alone.hidden[0], atol=1e-5)
        np.testing.assert_allclose(together.pooled[row], alone.pooled[0], atol=1e-5)
    other = np.where(mask, tokens, 3)  # padding may hold anything
    np.testing.assert_allclose(run(build(config), params_of(config), other, mask).pooled, together.pooled, atol=1e-6)
    seen = run(build(config), params_of(config), tokens, np.ones_like(mask))
    assert np.abs(seen.pooled - together.pooled)[1:].max() > 0.1


def test_siglip_pools_the_last_place_and_sees_padding_unless_told():
    config = text("siglip")
    tokens, mask = texts()
    params = params_of(config)
    free, masked = run(build(config), params, tokens), run(build(config), params, tokens, mask)
    head = params["head"]
    for out in (free, masked):
        np.testing.assert_allclose(out.pooled, out.hidden[:, -1] @ head["kernel"] + head["bias"], atol=1e-5)
    assert np.abs(free.pooled - masked.pooled)[1:].min(axis=1).max() > 1e-3
    np.testing.assert_allclose(free.pooled[0], masked.pooled[0], atol=1e-6)


def test_token_types_count():
    config = text("bert")
    tokens, mask = texts()
    plain = run(build(config), params_of(config), tokens, mask).hidden
    types = np.zeros_like(tokens)
    np.testing.assert_array_equal(
        run(build(config), params_of(config), tokens, mask, token_type_ids=types).hidden, plain
    )
    types[0] = 1
    moved = run(build(config), params_of(config), tokens, mask, token_type_ids=types).hidden
    assert np.abs(moved - plain)[0].min(axis=-1).max() > 1e-3
    np.testing.assert_array_equal(moved[1:], plain[1:])


def test_embeddings_are_unit_vectors_of_their_own_rows():
    config = dual("clip")
    module, params = build(config), params_of(config)
    tokens, mask = texts()
    images = run(module, params, pixels(), method="images")
    words = run(module, params, tokens, mask, method="texts")
    assert images.shape == words.shape == (3, config.width)
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(words, axis=1), 1, atol=1e-6)
    scale, bias = module.apply({"params": params}, method="scale_and_bias")
    np.testing.assert_allclose(scale, np.exp(np.float64(params["logit_scale"])), rtol=1e-6)
    assert bias is None
    want = float(scale) * np.float64(images) @ np.float64(words).T
    np.testing.assert_allclose(run(module, params, pixels(), tokens, mask), want, atol=2e-5)
    order = np.array([2, 0, 1])
    np.testing.assert_allclose(run(module, params, pixels()[order], method="images"), images[order], atol=1e-6)
    words_of = lambda rows: run(module, params, tokens[rows], mask[rows], method="texts")
    np.testing.assert_allclose(words_of(np.array([0, 0, 2])), words[np.array([0, 0, 2])], atol=1e-6)


def test_the_start_of_training():
    module = build(dual("siglip"))
    start = module.init(jax.random.key(0), method="scale_and_bias")
    np.testing.assert_allclose(module.apply(start, method="scale_and_bias"), [np.exp(2.0), -10.0], rtol=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_an_inner_layer_is_that_of_the_whole_tower(family):
    """The parameters of the first layers, in a tower that has no others, give the hidden state that the whole tower had there."""
    whole = params_of(vision(family))
    cut = vision(family).reading(-2, class_token=True)
    params = {"embeddings": whole["embeddings"], "encoder": jax.tree.map(lambda x: x[:2], whole["encoder"])}
    if family == "clip":
        params["pre_layrnorm"] = whole["pre_layrnorm"]
    got = run(build(cut), params, pixels())
    assert got.pooled is None
    assert got.features.shape == (3, cut.tokens, cut.width) == (3, 4 + (family == "clip"), 16)

    # One more layer whose attention and MLP give nothing: the last state is then the one before it.
    last = jax.tree_util.tree_map_with_path(
        lambda path, x: x.at[2].set(0) if path[-2].key in ("out_proj", "fc2") else x, whole["encoder"]
    )
    silent = run(build(vision(family).reading(-1, class_token=True)), whole | {"encoder": last}, pixels())
    np.testing.assert_allclose(silent.features, got.features, atol=1e-6)
    if family == "clip":
        patches = run(build(vision(family).reading(-2)), params, pixels()).features
        np.testing.assert_array_equal(patches, got.features[:, 1:])


def test_bfloat16_is_finite_and_pools_in_float32():
    config = dual("siglip")
    module = build(config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = params_of(config)
    cast = jax.tree.map(lambda x, s: x.astype(s.dtype), params, shapes(config, param_dtype=jnp.bfloat16))
    tokens, mask = texts()
    for method, inputs in (("images", (pixels(),)), ("texts", (tokens, mask))):
        got, want = run(module, cast, *inputs, method=method), run(build(config), params, *inputs, method=method)
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-6)
        assert (got * want).sum(axis=1).min() > 0.98  # bfloat16 has eight bits
    for part, inputs in (("vision", (pixels(),)), ("text", (tokens, mask))):
        tower = build(getattr(config, part), dtype=jnp.bfloat16)
        states, pooled = jax.eval_shape(functools.partial(run, tower), params[part], *inputs)
        assert (states.dtype, pooled.dtype) == (jnp.bfloat16, jnp.float32)


def test_adapters_on_a_tower_start_unseen_and_learn():
    config = dual("clip")
    module, base = build(config), params_of(config)
    adapted = adapters.attach(module, {"vision/encoder/layers/.*q_proj": adapters.LoRA(rank=2)})
    params = adapters.init(adapted, base, jax.random.key(0))
    trained, frozen = adapters.partition(params)
    assert tree.flatten(jax.tree.map(jnp.shape, trained)) == {
        "vision/encoder/layers/self_attn/q_proj/adapter/lora/a": (3, 16, 2),
        "vision/encoder/layers/self_attn/q_proj/adapter/lora/b": (3, 2, 16),
    }
    inputs = pixels(), *texts()
    np.testing.assert_array_equal(run(adapted, params, *inputs), run(module, base, *inputs))

    @jax.jit
    def gradient(trained):
        loss = lambda t: jnp.square(adapted.apply({"params": tree.combine(t, frozen)}, *inputs)).mean()
        return jax.grad(loss)(trained)

    leaf = lambda gradients: tree.flatten(gradients)["vision/encoder/layers/self_attn/q_proj/adapter/lora/b"]
    assert np.abs(leaf(gradient(trained))).max(axis=(1, 2)).min() > 0  # in every layer


def test_rematerialisation_changes_no_gradient():
    config = text("bert")

    def gradient(remat):
        module = build(config, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.square(module.apply({"params": p}, *texts()).pooled).sum()))

    want, got = (gradient(remat)(params_of(config)) for remat in ("none", "full"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), got, want)
    assert all(np.abs(leaf).max() > 0 for path, leaf in tree.flatten(got).items() if "k_proj/bias" not in path)
    with pytest.raises(ValueError, match="remat='dots' is unknown"):
        jax.eval_shape(gradient("dots"), params_of(config))


def test_on_a_mesh_as_on_one_device():
    config, mesh = dual("siglip"), make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    tokens, mask = (np.concatenate([x, x[:1]]) for x in texts())
    want = run(build(config), params_of(config), pixels(4), tokens, mask)
    placed = shardings_for(params_of(config), mesh, RULES)
    specs = {path: sharding.spec for path, sharding in tree.flatten(placed).items()}
    assert specs["vision/encoder/layers/self_attn/q_proj/kernel"] == P(None, "fsdp", "tensor")
    assert specs["text/encoder/layers/mlp/fc2/kernel"] == P(None, "tensor", "fsdp")
    assert specs["text/encoder/layers/self_attn/out_proj/kernel"] == P(None, "tensor", "fsdp")
    assert specs["vision/embeddings/patch_embedding/kernel"] == P(None, None, None, "fsdp")
    params = jax.device_put(params_of(config), placed)
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    inputs = jax.device_put((pixels(4), tokens, mask), rows)
    np.testing.assert_allclose(run(build(config, mesh=mesh), params, *inputs), want, atol=2e-5)


# What is refused


def test_inputs_that_do_not_fit():
    with pytest.raises(ValueError, match=r"pixels are \[2, 14, 15, 3\] and the tower reads \[n, 15, 15, 3\]"):
        run(build(vision("clip")), {}, np.zeros((2, 14, 15, 3), np.uint8))
    with pytest.raises(ValueError, match=r"tokens are \[1, 10\] and the encoder has 9 positions"):
        run(build(text("bert")), {}, np.zeros((1, 10), np.int32))
    with pytest.raises(ValueError, match="token_type_ids are BERT's, and this is a clip encoder"):
        run(build(text("clip")), {}, np.zeros((1, 4), np.int32), token_type_ids=np.zeros((1, 4), np.int32))
    with pytest.raises(ValueError, match="skip_last=3 must leave at least one of 3 layers"):
        Encoder(LAYERS, skip_last=3).init(jax.random.key(0), jnp.zeros((1, 2, 16)))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dataclasses.replace(LAYERS, num_heads=3), "hidden_size=16 must be a multiple of num_heads=3"),
        (lambda: dataclasses.replace(LAYERS, activation="relu"), "activation 'relu' is unknown"),
        (lambda: dataclasses.replace(LAYERS, num_layers=0), "num_layers=0 must be at least 1"),
        (lambda: vision("clip", features=-2), "features=-2 leaves out the last layer"),
        (lambda: vision("clip").reading(-4), "features=-4 must count from the end"),
        (lambda: vision("siglip", class_token=True), "SigLIP has no class token"),
        (lambda: vision("clip", norm_features=True), "CLIP norms its pooled class token alone"),
        (lambda: dataclasses.replace(vision("clip"), patch_size=16), "image_size=15 must hold at least one patch of 16"),
        (lambda: dataclasses.replace(vision("clip"), family="vit"), "family 'vit' is unknown"),
        (lambda: text("clip", pooling="mean"), "pooling='mean' is not clip's; choose of eos"),
        (lambda: text("clip", eos_id=None), "eos_id=None"),
        (lambda: text("clip", encoder=LAYERS), "causal=False is not how clip encodes text; set it to True"),
        (lambda: text("siglip", head_width=None), "SigLIP has a head"),
        (lambda: text("bert", token_types=0), "token_types=0 with family 'bert'"),
        (lambda: DualConfig(vision("clip"), text("siglip")), "a clip vision tower and a siglip text tower"),
        (lambda: DualConfig(vision("clip"), text("clip")), "CLIP has a projection and no bias"),
        (lambda: DualConfig(vision("clip").reading(-2), text("clip"), 12), "the vision tower gives no vector an image"),
        (lambda: DualConfig(vision("siglip"), text("siglip", head_width=8), initial_bias=0.0), "set the text tower's head_width"),
    ],
)  # fmt: skip
def test_configurations_that_contradict_themselves(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "config, preprocessor, message",
    [
        ({"model_type": "vit"}, None, "model_type 'vit' is no encoder that is supported"),
        (
            {"model_type": "bert", "position_embedding_type": "relative_key"},
            None,
            "position_embedding_type='relative_key'",
        ),
        ({"model_type": "bert", "is_decoder": True}, None, "is_decoder=True"),
        ({"model_type": "bert", "hidden_act": "relu"}, None, "hidden_act 'relu' is not supported"),
        ({"model_type": "bert", "hidden_size": "384"}, None, "hidden_size as a whole number, not '384'"),
        ({"model_type": "clip", "vision_config": {"num_channels": 1}}, None, "num_channels=1"),
        ({"model_type": "clip_text_model", "eos_token_id": [2, 3]}, None, "eos_token_id=[2, 3]"),
        ({"model_type": "clip_vision_model", "image_size": [224, 336]}, None, "image_size=[224, 336]"),
        ({"model_type": "clip_vision_model"}, {"rescale_factor": 1}, "scales pixels by 1"),
        ({"model_type": "clip_vision_model"}, {"image_std": [0, 1, 1]}, "image_std=[0, 1, 1]"),
    ],
)
def test_files_that_are_refused(config, preprocessor, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encoder_config_from_hf(config, preprocessor)


def test_mean_and_std_of_pixels():
    read = lambda kind, told=None: encoder_config_from_hf({"model_type": kind}, told)
    assert read("clip_vision_model").mean == (0.48145466, 0.4578275, 0.40821073)
    assert read("siglip_vision_model").std == (0.5, 0.5, 0.5)
    own = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "rescale_factor": 0.00392156862745098}
    assert (read("clip", own).vision.mean, read("clip", own).vision.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert read("siglip_vision_model", {"do_normalize": False}).std == (1.0, 1.0, 1.0)


def test_names_of_tensors_in_old_and_new_files():
    name = canonical(vision("clip"))
    assert name("encoder.layers.0.mlp.fc1.bias") == "vision_model.encoder.layers.0.mlp.fc1.bias"
    assert name("vision_model.post_layernorm.bias") == "vision_model.post_layernorm.bias"
    assert name("visual_projection.weight") == "visual_projection.weight"
    assert canonical(text("siglip"))("head.weight") == "text_model.head.weight"
    assert canonical(dual("clip"))("text_model.final_layer_norm.bias") == "text_model.final_layer_norm.bias"
    bert = canonical(text("bert"))
    assert bert("bert.embeddings.LayerNorm.gamma") == "embeddings.LayerNorm.weight"
    assert bert("encoder.layer.3.output.LayerNorm.beta") == "encoder.layer.3.output.LayerNorm.bias"

    def ignored(config, name):
        return any(re.search(pattern, name) for pattern in ignored_tensors(config, "tower."))

    cut = vision("siglip").reading(-2)
    for told in ("embeddings.position_ids", "encoder.layers.2.mlp.fc1.bias", "post_layernorm.weight", "head.probe"):
        assert ignored(cut, f"tower.vision_model.{told}")
    for told in (
        "encoder.layers.1.mlp.fc1.bias",
        "encoder.layers.20.mlp.fc1.bias",
        "embeddings.position_embedding.weight",
    ):
        assert not ignored(cut, f"tower.vision_model.{told}")
    assert not ignored(vision("siglip"), "tower.vision_model.head.probe")
    assert ignored(text("bert"), "tower.pooler.dense.weight") and not ignored(text("bert"), "tower.classifier.weight")
    assert ignored(dual("clip"), "tower.text_model.embeddings.position_ids")


# A real model


def test_a_real_sentence_encoder_tells_what_is_alike(minilm_folder):
    folder = minilm_folder
    config = encoder_config_from_hf(read_json(folder / "config.json"))
    tensors, _ = weights.read_header(folder / "model.safetensors")
    leaves = encoder_layout(config)
    params = assemble(leaves, lambda name, at: weights.read_slice(name, tensors[name], at), dtype=jnp.float32)
    left = tensors.keys() - {name for leaf in leaves for name in leaf.names}
    assert left and all(any(re.search(p, name) for p in ignored_tensors(config)) for name in left)

    words = load_tokenizer(folder)(
        ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."],
        padding=True, return_tensors="np",
    )  # fmt: skip
    out = run(build(config), params, words["input_ids"], words["attention_mask"] > 0)
    unit = out.pooled / np.linalg.norm(out.pooled, axis=1, keepdims=True)
    cosines = unit @ unit.T
    assert cosines[0, 1] == pytest.approx(0.655, abs=2e-3)
    assert cosines[0, 2] < 0.1
