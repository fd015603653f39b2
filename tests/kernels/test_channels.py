"""Chosen channels, taken and added to: values and gradients in numpy; what the TPU compiler makes of both forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.kernels.channels import add_channels, take_channels
from tests.compiler import TOPOLOGIES, needs_compiler, report

IMPLEMENTATIONS = ("gather", "product", None)
INDICES = np.array([3, 17, 17, 40, 0], np.int32)  # one twice; one past the end of 40


def inputs(dtype):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=(3, 2, width)), dtype) for width in (40, 5, 40, 5))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_taken_to_the_bit(implementation, dtype):
    x, g, *_ = inputs(dtype)
    y, back = jax.vjp(jax.jit(lambda x: take_channels(x, INDICES, implementation=implementation)), x)
    for n, index in enumerate(INDICES):
        np.testing.assert_array_equal(y[..., n], 0 if index == 40 else x[..., index])
    want = np.zeros((3, 2, 40))
    for n, index in enumerate(INDICES):
        want[..., index % 40] += 0 if index == 40 else np.asarray(g[..., n], np.float64)
    np.testing.assert_allclose(np.float64(back(g)[0]), want, rtol=2.0**-7 if dtype == jnp.bfloat16 else 1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_added(implementation, dtype):
    _, values, x, g = inputs(dtype)
    g = jnp.concatenate([g] * 8, -1)
    y, back = jax.vjp(jax.jit(lambda x, v: add_channels(x, v, INDICES, implementation=implementation)), x, values)
    want = np.array(x, np.float64)
    for n, index in enumerate(INDICES):
        if index < 40:
            want[..., index] += np.asarray(values[..., n], np.float64)
    np.testing.assert_allclose(np.float64(y), want, atol=2.0**-6 if dtype == jnp.bfloat16 else 1e-6)
    d_x, d_values = back(g)
    np.testing.assert_array_equal(d_x, g)
    for n, index in enumerate(INDICES):
        np.testing.assert_array_equal(d_values[..., n], 0 if index == 40 else g[..., index])


def test_large_numbers_and_zero_meet_without_rounding():
    x = jnp.array([[3e38, -2e-38, 1.0000001, 0.0]])
    np.testing.assert_array_equal(take_channels(x, np.arange(4), implementation="product"), x)


def test_an_unknown_form_says_so():
    with pytest.raises(ValueError, match="implementation='scatter' is unknown; use None or one of product, gather"):
        take_channels(np.ones((1, 2), np.float32), INDICES, implementation="scatter")
    with pytest.raises(ValueError, match="implementation='xla' is unknown"):
        add_channels(np.ones((1, 2), np.float32), np.ones((1, 5), np.float32), INDICES, implementation="xla")


SIZES = [((4096, 14336), jnp.bfloat16), ((430, 4096), jnp.float32), ((430,), jnp.int32), ((4096, 4096), jnp.bfloat16)]
LEAST = 2 * 2 * 4096 * (14336 + 4096)
"""Bytes of x, its gradient, the result and its cotangent."""


def forward_and_backward(implementation, x, delta, indices, g):
    """S²FT on Llama-3-8B's down projection, 430 channels chosen: its value and all gradients."""
    product = lambda x, delta: take_channels(x, indices, implementation=implementation) @ delta.astype(x.dtype)
    y, back = jax.vjp(product, x, delta)
    return y, *back(g)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "share"), list(zip(TOPOLOGIES, (1.65, 1.15, 1.15), strict=True)))
def test_a_tpu_moves_little_more_than_it_must(topology, share):
    """Of v5e a copy of x onto the chip is counted, too."""
    shapes = [jax.ShapeDtypeStruct(*size) for size in SIZES]
    got = report(topology, functools.partial(forward_and_backward, None), *shapes)  # None: by the target, not this host
    assert got.traffic <= share * LEAST
    assert got.temporaries <= 20e6


@needs_compiler
@pytest.mark.slow
def test_gathering_costs_a_tpu_twice_the_bytes_and_copies_of_x():
    """Why None is "product" there; once this fails, a newer compiler gathers channels better."""
    shapes = [jax.ShapeDtypeStruct(*size) for size in SIZES]
    got = report("v5p:2x2x1", functools.partial(forward_and_backward, "gather"), *shapes)
    assert got.traffic >= 2.3 * LEAST
    assert got.temporaries >= 4096 * 14336 * 2
