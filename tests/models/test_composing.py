"""A tiny decoder given the eyes of tiny towers, from folders that this library wrote."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from jaxmethods import adapters, models, sharding, tree
from jaxmethods.images import prepare
from jaxmethods.models import architectures, composing, efficientnet
from jaxmethods.models.text_encoder import TextEncoderConfig
from jaxmethods.models.vision import MEAN_AND_STD
from tests import tiny

TOKEN, WIDE = 60, dict(hidden_size=64, intermediate_size=96)  # widths that can be quantised
LAYERS = models.EncoderConfig(hidden_size=16, intermediate_size=24, num_layers=3, num_heads=2, activation="quick_gelu")


def random(config, seed=0):
    """Random parameters of an architecture."""
    rng = np.random.default_rng(seed)
    shapes = tree.flatten(architectures.shapes(config, np.float32))
    size = lambda path, x: x.shape[-2] ** -0.5 if path.endswith("kernel") and x.ndim < 4 else 0.1
    return tree.unflatten(
        {p: (p.endswith("scale") + size(p, x) * rng.normal(size=x.shape)).astype(np.float32) for p, x in shapes.items()}
    )


def tower(folder, family):
    """A folder with a whole vision model, as the hub has them: its pooling and the layer that no one reads are in it."""
    mean, std = MEAN_AND_STD[family]
    told = {"class_token": True} if family == "clip" else {"norm_features": True}
    config = models.VisionConfig(family, LAYERS, image_size=8, patch_size=4, mean=mean, std=std, **told)
    params = random(config)
    models.save(folder, models.VisionTower(config), params)
    return config, params


def pictured(sight, rows=2):
    """(tokens, pixels) of rows with one picture."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(3, TOKEN, (rows, 10)).astype(np.int32)
    tokens[:, 2 : 2 + sight.format.features_per_crop] = TOKEN
    size = sight.format.size
    return tokens, rng.integers(0, 256, (rows, 1, size, size, 3)).astype(np.uint8)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_decoder_with_the_eyes_of_a_folder(tmp_path, family):
    config, weights = tower(tmp_path / "tower", family)
    decoder, base = tiny.decoder(**WIDE)
    key = jax.random.key(3)
    module, params = models.with_eyes(decoder, base, tmp_path / "tower", image_token_id=TOKEN, key=key)
    assert isinstance(module, models.VLM) and module.config == decoder.config
    # The layer before the last is read, without class token; pictures are cut as the family cuts them.
    assert (module.sight.family, module.sight.tower) == ("llava", config.reading(-2))
    assert module.sight.format.resize == {"clip": "crop", "siglip": "squash"}[family]
    assert module.sight.format.features_per_crop == 4 and module.sight.image_token_id == TOKEN

    flat, given, old = (tree.flatten(x) for x in (params, weights, base))
    for path, x in flat.items():
        part = models.part_of(path)
        if part == "decoder":
            assert x is old[path]
        elif part == "vision_tower":
            whole = given[path.removeprefix("vision_tower/")]
            np.testing.assert_array_equal(x, whole[:2] if "/layers/" in path else whole, err_msg=path)
    assert flat.keys() == tree.flatten(jax.eval_shape(module.init, key, np.zeros((1, 2), np.int32))["params"]).keys()

    # The projector is drawn so that what goes through keeps its size, and by the key alone.
    for layer, into in (("linear_1", 16), ("linear_2", 64)):
        kernel = np.asarray(params["projector"][layer]["kernel"])
        assert abs(kernel.std() * into**0.5 - 1) < 0.15 and not np.asarray(params["projector"][layer]["bias"]).any()
    again, other = (
        models.with_eyes(decoder, base, tmp_path / "tower", image_token_id=TOKEN, key=jax.random.key(seed))[1]
        for seed in (3, 4)
    )
    for path, x in flat.items():
        np.testing.assert_array_equal(tree.flatten(again)[path], x)
        drawn = path.startswith("projector/") and path.endswith("kernel")
        assert np.array_equal(tree.flatten(other)[path], x) != drawn, path

    shaped, shapes = models.with_eyes_shapes(decoder, tmp_path / "tower", image_token_id=TOKEN)
    assert shaped == module
    assert {p: (x.shape, x.dtype) for p, x in tree.flatten(shapes).items()} == {
        p: (x.shape, x.dtype) for p, x in flat.items()
    }

    tokens, pixels = pictured(module.sight)
    wanted = models.logits(module, params, tokens, images=pixels)
    models.save(tmp_path / "vlm", module, params)
    loaded, read = models.load(tmp_path / "vlm")
    np.testing.assert_array_equal(models.logits(loaded, read, tokens, images=pixels), wanted)
    assert loaded.sight.format == module.sight.format
    assert tree.flatten(read).keys() == flat.keys()


def test_pictures_whiten_the_first_layer(tmp_path):
    """Behind it, (C + d)^(1/2) of the features gives the drawn layer back; by scipy, from features of the tower alone."""
    config, weights = tower(tmp_path / "tower", "clip")
    decoder, base = tiny.decoder(**WIDE)
    rng = np.random.default_rng(5)
    shown = [Image.fromarray(rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(40)]
    eyes = dict(image_token_id=TOKEN, key=jax.random.key(3))
    module, drawn = models.with_eyes(decoder, base, tmp_path / "tower", **eyes)
    _, params = models.with_eyes(decoder, base, tmp_path / "tower", pictures=shown, **eyes)
    for path, x in tree.flatten(params).items():
        assert np.array_equal(x, tree.flatten(drawn)[path]) != ("linear_1" in path), path

    seen = models.VisionTower(module.sight.tower)
    pixels = np.concatenate([prepare(picture, module.sight.format).crops for picture in shown])
    features = np.asarray(seen.apply({"params": params["vision_tower"]}, pixels).features, np.float64).reshape(-1, 16)
    layer = {name: np.asarray(x, np.float64) for name, x in params["projector"]["linear_1"].items()}
    covariance = np.cov(features.T, bias=True)
    damped = covariance + 0.02 * np.linalg.eigvalsh(covariance)[-1] * np.eye(16)
    back = scipy.linalg.sqrtm(damped) @ layer["kernel"]
    scale = back / np.asarray(drawn["projector"]["linear_1"]["kernel"])
    np.testing.assert_allclose(scale, scale.mean(), rtol=1e-3)
    out = features @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(out.mean(0), 0, atol=1e-5)
    assert out.std() == pytest.approx(1, rel=1e-5)

    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    on_mesh = models.with_eyes(decoder, base, tmp_path / "tower", pictures=shown, mesh=mesh, **eyes)[1]
    for path, x in tree.flatten(params).items():
        np.testing.assert_array_equal(x, tree.flatten(on_mesh)[path], err_msg=path)
    with pytest.raises(ValueError, match="features of 12 places are all equal; give pictures that differ"):
        composing._whitened(drawn["projector"]["linear_1"], np.ones((12, 16)))


def test_settings_of_the_decoder_stay(tmp_path):
    tower(tmp_path / "tower", "clip")
    decoder, base = tiny.decoder(**WIDE)
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    settings = dict(dtype=jnp.bfloat16, remat="full", unroll=3, mesh=mesh, attention="reference")
    decoder, base = models.quantize(decoder.clone(**settings), base, "int8")
    eyes = dict(image_token_id=TOKEN, key=jax.random.key(0), mesh=mesh)
    module, params = models.with_eyes(decoder, base, tmp_path / "tower", **eyes)
    assert module.quantization == "int8" and all(getattr(module, name) == x for name, x in settings.items())
    assert params["projector"]["linear_1"]["kernel"].dtype == np.float32
    shaped, shapes = models.with_eyes_shapes(decoder, tmp_path / "tower", image_token_id=TOKEN)
    assert shaped == module
    told = {path: (x.shape, x.dtype) for path, x in tree.flatten(shapes).items()}
    assert told == {path: (x.shape, x.dtype) for path, x in tree.flatten(params).items()}
    # What is new lies on the mesh by the rules; numbers do not depend on it.
    alone = models.with_eyes(decoder, base, tmp_path / "tower", image_token_id=TOKEN, key=jax.random.key(0))[1]
    placed = sharding.shardings_for(params, mesh, models.RULES)
    for path, x in tree.flatten(params).items():
        np.testing.assert_array_equal(x, tree.flatten(alone)[path], err_msg=path)
        if models.part_of(path) != "decoder":
            assert x.sharding.is_equivalent_to(tree.flatten(placed)[path], x.ndim), path
    for path in ("projector/linear_2/kernel", "vision_tower/encoder/layers/mlp/fc1/kernel"):
        x = tree.flatten(params)[path]
        assert x.sharding.shard_shape(x.shape) != x.shape


def test_the_shapes_of_a_decoder_with_efficientnet(tmp_path):
    """The real architecture: shapes alone, and what its folder says once it is written."""
    (tmp_path / "tower").mkdir()
    told = efficientnet.config_to_json(models.EfficientNetConfig())
    (tmp_path / "tower" / "config.json").write_text(json.dumps(told))
    decoder, _ = tiny.decoder(**WIDE)
    for pool, features in ((None, 49), (3, 9)):
        module, shapes = models.with_eyes_shapes(decoder, tmp_path / "tower", image_token_id=TOKEN, pool=pool)
        flat = tree.flatten(shapes)
        assert module.sight.format.features_per_crop == module.sight.tower.tokens == features
        assert module.sight.format.resize == "squash" and module.sight.format.size == 224
        assert flat["projector/linear_1/kernel"].shape == (1280, 64) and flat["projector/linear_2/kernel"].shape == (
            64,
            64,
        )
        assert not any("classifier" in path for path in flat)
        # As a file says it: the same architecture, for who reads it here.
        written = architectures.config_to_hf(module.whole), architectures.preprocessor_to_hf(module.whole)
        assert architectures.config_from_hf(*json.loads(json.dumps(written))) == module.whole
    made = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 2), np.int32))["params"]
    assert {p: x.shape for p, x in tree.flatten(made).items()} == {p: x.shape for p, x in flat.items()}
    models.save(tmp_path / "vlm", module, random(module.whole))
    loaded, params = models.load(tmp_path / "vlm")
    assert loaded == module and {p: x.shape for p, x in tree.flatten(params).items()} == {
        p: x.shape for p, x in flat.items()
    }


def test_wrong_folders_are_told_of(tmp_path):
    decoder, base = tiny.decoder(**WIDE)
    models.save(tmp_path / "decoder", decoder, base)
    text = TextEncoderConfig(
        "clip", vocab_size=31, max_positions=9, encoder=dataclasses.replace(LAYERS, causal=True), eos_id=7
    )
    models.save(tmp_path / "text", models.TextEncoder(text), random(text))
    tower(tmp_path / "clip", "clip")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "resnet"}')
    vlm, params = tiny.vlm(**WIDE)
    models.save(tmp_path / "vlm", vlm, params)
    cases = [
        ("decoder", {}, ValueError, "decoder holds a Decoder, not a vision tower"),
        ("text", {}, ValueError, "text holds a TextEncoder, not a vision tower"),
        ("vlm", {}, ValueError, "vlm holds a VLM, not a vision tower"),
        ("clip", {"pool": 3}, ValueError, "pool=3 is for EfficientNet; the features of .*clip stay as they are"),
        ("empty", {}, FileNotFoundError, "empty has no config.json"),
        ("other", {}, ValueError, "model_type 'resnet' is not supported"),
        ("clup", {}, FileNotFoundError, "clup: no such folder .*near it: .*clip"),
        ("clip", {"image_token_id": 61}, ValueError, "image_token_id=61 is no token of a vocabulary of 61"),
    ]
    for name, told, error, message in cases:
        eyes = {"image_token_id": TOKEN} | told
        with pytest.raises(error, match=message):
            models.with_eyes_shapes(decoder, tmp_path / name, **eyes)
        with pytest.raises(error, match=message):
            models.with_eyes(decoder, base, tmp_path / name, key=jax.random.key(0), **eyes)
    adapted = adapters.attach(decoder, {"q_proj": adapters.LoRA(rank=2)})
    for module, name in ((vlm, "VLM"), (adapted, "AdaptedDecoder")):
        with pytest.raises(
            ValueError, match=f"{name} cannot be given eyes: it must be a Decoder, without eyes and before"
        ):
            models.with_eyes(module, params, tmp_path / "clip", image_token_id=TOKEN, key=jax.random.key(0))
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        models.with_eyes(decoder, base, tmp_path / "clip", image_token_id=TOKEN, key=jax.random.key(0))


def test_what_a_picture_becomes_fits_the_model(tmp_path):
    """The crops that the data room makes are those that the tower reads."""
    tower(tmp_path / "tower", "siglip")
    config = models.vlm_config(tiny.decoder(**WIDE)[0].config, tmp_path / "tower", image_token_id=TOKEN)
    made = prepare(Image.new("RGB", (30, 20), "red"), config.sight.format)
    assert made.crops.shape == (1, 8, 8, 3) and made.places.shape == (config.sight.tower.tokens, 1)
