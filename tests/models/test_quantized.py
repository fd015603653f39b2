"""Models that are quantised as they are read, from safetensors and from GGUF files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import models, quantization, tree
from jaxmethods.models import gguf
from jaxmethods.sharding import make_mesh
from tests import tiny
from tests.kernels.test_quantized import FORMATS
from tests.models.test_gguf import CONFIGS, random_params, write

each_kind = pytest.mark.parametrize("kind", FORMATS)


def same(one, two):
    one, two = tree.flatten(one), tree.flatten(two)
    assert one.keys() == two.keys()
    for path in one:
        assert one[path].dtype == two[path].dtype, path
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(two[path]), err_msg=path)


@each_kind
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_files_own_codes_are_taken_over_to_the_bit(name, kind, tmp_path, monkeypatch):
    path = write(tmp_path / "m.gguf", CONFIGS[name], random_params(CONFIGS[name]), FORMATS[kind])
    module, plain = models.load(path)
    monkeypatch.setattr("jaxmethods.kernels.quantized.quantize", None)  # nothing is quantised anew
    quantised_module, params = models.load(path, quantize=kind)
    assert quantised_module == module.clone(quantization=kind)
    assert quantization.count(params) == tree.count(plain)
    opened_module, opened = models.dequantize(quantised_module, params)
    assert opened_module == module
    same(opened, plain)
    empty = lambda shapes: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    same(empty(params), empty(models.shapes(path, quantize=kind)[1]))


@each_kind
@pytest.mark.parametrize("onto", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}])
def test_onto_a_mesh_the_same_codes(kind, onto, tmp_path):
    """Ninety-six channels are three blocks: eight devices cut through them."""
    files = [write(tmp_path / f"{k}.gguf", CONFIGS["llama"], random_params(CONFIGS["llama"]), f)
             for k, f in (("own", FORMATS[kind]), ("other", None))]  # fmt: skip
    for path in files:
        placed = models.load(path, quantize=kind, mesh=make_mesh(onto))[1]
        same(placed, models.load(path, quantize=kind)[1])
        kernel = placed["model"]["layers"]["mlp"]["up_proj"]["kernel"]
        assert len({str(s.index) for s in kernel.addressable_shards}) == 8


@each_kind
def test_read_from_safetensors_as_quantised_afterwards(kind, tmp_path):
    module, params = tiny.decoder(hidden_size=64, intermediate_size=96)
    models.save(tmp_path / "model", module, params)
    read = tree.flatten(models.load(tmp_path / "model", quantize=kind)[1])
    made = tree.flatten(models.quantize(module, params, kind)[1])
    assert {p: (x.shape, x.dtype) for p, x in read.items()} == {p: (x.shape, x.dtype) for p, x in made.items()}
    for path in read:  # the compiler divides otherwise than numpy, by a rounding
        off = np.asarray(read[path], np.float32) - np.asarray(made[path], np.float32)
        assert (off != 0).mean() < 2e-2 if "kernel" in path else not off.any(), path


def test_a_layer_that_does_not_divide_is_named_before_anything_is_read(tmp_path, monkeypatch):
    module, params = tiny.decoder()
    models.save(tmp_path / "model", module, params)
    monkeypatch.setattr("jaxmethods.models.weights.read_slice", None)
    with pytest.raises(ValueError, match=r"'model/layers/mlp/down_proj' reads 48 channels"):
        models.load(tmp_path / "model", quantize="int8")


@pytest.mark.slow
@pytest.mark.ci
def test_the_real_model_loses_nothing_in_four_bits_and_next_to_nothing_in_eight(smollm2_file):
    module, plain = models.load(smollm2_file)
    tokens = np.random.default_rng(0).integers(0, 40_000, (2, 32)).astype(np.int32)
    exact = models.logits(module, plain, tokens)
    layers = [
        t for name, t in gguf.open_gguf(smollm2_file).tensors.items() if name.startswith("blk.") and len(t.shape) == 2
    ]
    taken = [t.format == FORMATS["int4"] for t in layers]
    assert all(taken)
    four = models.load(smollm2_file, quantize="int4")
    same(models.dequantize(*four)[1], plain)
    np.testing.assert_allclose(models.logits(*four, tokens), exact, atol=2e-3)
    eight = models.logits(*models.load(smollm2_file, quantize="int8"), tokens)
    divergence = (jax.nn.softmax(exact) * (jax.nn.log_softmax(exact) - jax.nn.log_softmax(eight))).sum(-1)
    assert float(jnp.abs(divergence).mean()) < 1e-2
