"""Quantised kernels: codes against the `gguf` package's, error bounds, gradients, and what a backward pass keeps."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmethods import sharding
from jaxmethods.kernels.linear import linear
from jaxmethods.kernels.quantized import KINDS, Quantized, dequantize, draw, quantize, quantized_linear

each_kind = pytest.mark.parametrize("kind", KINDS)
FORMATS = {"int8": gguf.GGMLQuantizationType.Q8_0, "int4": gguf.GGMLQuantizationType.Q4_1}
BITS = {"int8": 8.5, "int4": 5.0}


def kernel_of(*shape, seed=0):
    """Blocks of very different sizes, one of zeros, and one of equal weights."""
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    kernel *= np.exp(np.random.default_rng(1).normal(size=shape[-1])).astype(np.float32)
    kernel[..., :32, 0], kernel[..., :32, 1] = 0, -0.25
    return kernel


def bytes_of(q: Quantized) -> np.ndarray:
    """The rows of a GGUF tensor [out, in] that holds this kernel."""
    rows = lambda x, size: np.ascontiguousarray(x.T).reshape(x.shape[1], -1, size).view(np.uint8)
    parts = [rows(x, 1) for x in (q.scale, q.minimum) if x is not None]
    parts.append(rows(q.codes, 32 if q.kind == "int8" else 16))
    return np.concatenate(parts, -1).reshape(q.codes.shape[1], -1)


@each_kind
def test_the_bytes_are_those_of_the_gguf_package(kind):
    kernel = kernel_of(96, 50)
    q = quantize(kernel, kind)
    theirs = gguf.quants.quantize(np.ascontiguousarray(kernel.T), FORMATS[kind])
    np.testing.assert_array_equal(bytes_of(q), theirs)
    np.testing.assert_array_equal(dequantize(q).T, gguf.quants.dequantize(theirs, FORMATS[kind]))
    assert sum(x.nbytes for x in q if x is not None) * 8 == BITS[kind] * kernel.size


@each_kind
def test_compiled_it_differs_by_one_code_at_most_where_a_division_rounds_otherwise(kind):
    kernel = kernel_of(3, 96, 50)
    host, device = quantize(kernel, kind), jax.jit(functools.partial(quantize, kind=kind))(kernel)
    assert device.shape == host.shape == kernel.shape and device.kind == kind
    assert [x.dtype for x in device if x is not None] == [x.dtype for x in host if x is not None]
    np.testing.assert_allclose(device.scale, host.scale, rtol=2e-3)
    off = np.abs(np.asarray(dequantize(device)) - np.asarray(dequantize(host)))
    step = np.repeat(np.asarray(host.scale, np.float32), 32, -2)
    assert (off <= 1.01 * step + 1e-7).all() and (off > 0.01 * step + 1e-7).mean() < 1e-3


@each_kind
def test_the_error_of_a_weight_is_bounded_by_its_block(kind):
    kernel = kernel_of(64, 50)
    blocks = kernel.reshape(2, 32, 50)
    largest = np.abs(blocks).max(1, keepdims=True)
    half = largest / 127 / 2 if kind == "int8" else (blocks.max(1) - blocks.min(1))[:, None] / 15 / 2
    error = np.abs(np.asarray(dequantize(quantize(kernel, kind))).reshape(blocks.shape) - blocks)
    assert (error <= half * 1.0001 + 2 * largest * 2**-11).all()
    assert error[0, :, 0].max() == 0  # zeros stay zeros


@each_kind
def test_quantising_what_was_quantised_changes_nothing(kind):
    q = quantize(kernel_of(64, 50), kind)
    again = quantize(np.asarray(dequantize(q)), kind)
    for one, two in zip(q, again, strict=True):
        np.testing.assert_array_equal(one, two)


@each_kind
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_value_and_gradient_are_those_of_the_opened_kernel(kind, dtype):
    q = jax.tree.map(jnp.asarray, quantize(kernel_of(64, 50), kind))
    x, g = (jax.random.normal(jax.random.key(n), (2, 5, d), dtype) for n, d in enumerate((64, 50)))
    y, pull = jax.vjp(lambda x: quantized_linear(x, q), x)
    want, pull_plain = jax.vjp(lambda x: linear(x, dequantize(q, dtype)), x)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(pull(g)[0], pull_plain(g)[0])
    assert y.dtype == pull(g)[0].dtype == dtype


@each_kind
def test_gradients_under_shard_map_are_those_of_the_whole(kind):
    q = jax.tree.map(jnp.asarray, quantize(kernel_of(64, 50), kind))
    x, g = (jax.random.normal(jax.random.key(n), (2, 5, d)) for n, d in enumerate((64, 50)))
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])
    gradient = lambda x, q, g: jax.vjp(lambda x: quantized_linear(x, q), x)[1](g)[0]
    parts = jax.shard_map(gradient, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P("data"))
    np.testing.assert_allclose(parts(x, q, g), gradient(x, q, g), rtol=1e-5, atol=1e-5)


@each_kind
def test_across_a_scan_over_layers_nothing_is_kept_beside_the_codes(kind):
    layers, width, rows = 6, 64, 8
    q = jax.tree.map(jnp.asarray, quantize(np.random.default_rng(0).normal(size=(layers, width, width)) / 8, kind))

    def total(x, q):
        body = lambda x, q: (jnp.tanh(quantized_linear(x, q)), None)
        return jax.lax.scan(body, x, q)[0].sum()

    kept = jax.eval_shape(lambda x, q: jax.vjp(lambda x: total(x, q), x)[1], jnp.ones((rows, width)), q)
    floats = [x for x in jax.tree.leaves(kept) if x.dtype == jnp.float32]
    assert floats and max(x.size for x in floats) <= layers * rows * width  # activations
    scans = [e for e in jax.make_jaxpr(jax.grad(total))(jnp.ones((rows, width)), q).eqns if e.primitive.name == "scan"]
    assert len(scans) == 2
    for scan in scans:
        assert max(v.aval.size for v in scan.outvars) <= layers * rows * width  # nor a second copy of the codes


@each_kind
def test_random_kernels_have_the_variance_of_a_linear_layer(kind):
    q = draw(jax.random.key(0), 256, 300, kind)
    kernel = np.asarray(dequantize(q))
    assert kernel.shape == (256, 300)
    assert abs(kernel.mean()) < 1e-3 and kernel.std() * 16 == pytest.approx(1, rel=0.01)


def test_what_cannot_be_quantised_says_why():
    with pytest.raises(ValueError, match="48 inputs does not divide into blocks of 32"):
        quantize(np.zeros((48, 3), np.float32), "int8")
    with pytest.raises(ValueError, match="did you mean 'int8'"):
        quantize(np.zeros((32, 3), np.float32), "int9")
