"""The product of linear layers: its own gradient against JAX's, and what remat keeps of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmethods import sharding
from jaxmethods.kernels.linear import dot_general, linear


def operands(d_in, d_out, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((2, 5, d_in), (d_in, d_out), (2, 5, d_out))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize(("d_in", "d_out"), [(3, 7), (7, 3)])
def test_value_and_gradients_by_hand(d_in, d_out):
    x, kernel, g = operands(d_in, d_out)
    y, pull = jax.vjp(linear, x, kernel)
    dx, dkernel = pull(g)
    x, kernel, g = (np.asarray(a, np.float64) for a in (x, kernel, g))
    np.testing.assert_allclose(y, x @ kernel, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, g @ kernel.T, rtol=1e-5, atol=1e-6)
    outer = [np.outer(a, b) for a, b in zip(x.reshape(-1, d_in), g.reshape(-1, d_out), strict=True)]
    np.testing.assert_allclose(dkernel, sum(outer), rtol=1e-5, atol=1e-6)


def test_dtypes_are_kept():
    x, kernel, g = operands(4, 6, jnp.bfloat16)
    y, pull = jax.vjp(linear, x, kernel)
    assert {a.dtype for a in (y, *pull(g))} == {jnp.dtype(jnp.bfloat16)}


def test_whatever_is_no_plain_linear_layer_goes_to_jax():
    x, kernel, _ = operands(4, 6)
    dims = (((2,), (1,)), ((), ()))
    np.testing.assert_array_equal(dot_general(x, kernel.T, dims), jax.lax.dot_general(x, kernel.T, dims))
    plain = (((2,), (0,)), ((), ()))
    wide = dot_general(x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16), plain, preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32


def test_gradients_under_shard_map_are_those_of_the_whole():
    x, kernel, g = operands(3, 7)
    mesh = sharding.make_mesh({"data": 2}, jax.devices()[:2])

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=(P("data"), P()))
    def gradients(x, kernel, g):
        return jax.vjp(linear, x, kernel)[1](g)

    for got, want in zip(gradients(x, kernel, g), jax.vjp(jnp.matmul, x, kernel)[1](g), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
