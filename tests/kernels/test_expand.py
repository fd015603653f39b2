"""The last product of a low-rank adapter, its gradients against float64 numpy; the TPU kernel interpreted and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmethods.kernels.expand import expand, pallas_tpu
from jaxmethods.launch import cost
from tests.compiler import TOPOLOGIES, needs_compiler, report

CASES = [  # channels, tokens, d_out: one block; two and a rest of tokens, 17 of outputs; no whole lanes
    (6, 40, 256, jnp.float32),
    (5, 1030, 17 * 128, jnp.bfloat16),
    (3, 600, 40, jnp.float32),
]


def inputs(channels, tokens, d_out, dtype):
    rng = np.random.default_rng(0)
    shapes = {"state": (channels, tokens), "kernel": (channels, d_out), "bias": (d_out,), "g": (tokens, d_out)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


@functools.partial(jax.jit, static_argnames="implementation")
def value_and_gradients(state, kernel, bias, g, implementation):
    y, back = jax.vjp(functools.partial(expand, implementation=implementation), state, kernel, bias)
    return y, *back(g)


def assert_near(got, want, dtype, terms):
    """Rounding: of the product, and of its sum with the bias, to `dtype`; and of float32 sums of `terms` numbers of size 1."""
    result = {jnp.float32: 2.0**-22, jnp.bfloat16: 2.0**-7}[dtype]
    atol = 2e-6 * terms**0.5 + result * np.abs(want).max()
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=result, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_value_and_gradients_by_numpy(implementation, case):
    channels, tokens, d_out, dtype = case
    arrays = inputs(*case)
    state, kernel, bias, g = (np.asarray(x, np.float64) for x in arrays.values())
    # The gradients of float32 parameters are float32, whatever the dtype of the state.
    arrays |= {name: arrays[name].astype(jnp.float32) for name in ("kernel", "bias")}
    y, d_state, d_kernel, d_bias = value_and_gradients(**arrays, implementation=implementation)
    assert (y.dtype, d_state.dtype, d_kernel.dtype, d_bias.dtype) == (dtype, dtype, jnp.float32, jnp.float32)
    assert_near(y, state.T @ kernel + bias, dtype, channels)
    assert_near(d_state, kernel @ g.T, dtype, d_out)
    assert_near(d_kernel, state @ g, jnp.float32, tokens)
    assert_near(d_bias, g.sum(0), jnp.float32, tokens)


def test_without_a_bias():
    arrays = inputs(4, 9, 12, jnp.float32)
    bias = arrays.pop("bias")
    without = jax.grad(lambda s, k: (expand(s, k) * arrays["g"]).sum(), (0, 1))(arrays["state"], arrays["kernel"])
    with_zero = jax.grad(lambda s, k: (expand(s, k, 0 * bias) * arrays["g"]).sum(), (0, 1))(
        arrays["state"], arrays["kernel"]
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), without, with_zero)


def test_the_simulated_tpu_finds_no_race_and_nothing_uninitialised(capfd):
    """Memory starts as nan there, and what lies past the last token is nan too."""
    arrays = inputs(3, 700, 256, jnp.float32)
    state, g = arrays["state"], arrays["g"]
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    d_state, d_kernel = pallas_tpu.cotangents(state, arrays["kernel"], g, interpret=simulated)
    assert_near(d_state, np.float64(arrays["kernel"]) @ np.float64(g).T, jnp.float32, 256)
    assert_near(d_kernel, np.float64(state) @ np.float64(g), jnp.float32, 700)
    assert "race" not in "".join(capfd.readouterr()).lower()


def test_each_device_on_its_own_tokens():
    """Under `shard_map` the gradients of the parameters are summed over devices."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    arrays = inputs(4, 32, 24, jnp.float32)
    g = arrays.pop("g")

    def loss(implementation, state, kernel, bias, g):
        one = lambda *local: jax.lax.psum((expand(*local[:3], implementation=implementation) * local[3]).sum(), "data")
        specs = (P(None, "data"), P(), P(), P("data"))
        return jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=P())(state, kernel, bias, g)

    want = jax.grad(lambda *a: (expand(*a) * g).sum(), (0, 1, 2))(*arrays.values())
    got = jax.jit(jax.grad(functools.partial(loss, "xla"), (0, 1, 2)))(*arrays.values(), g)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_what_does_not_fit_says_so():
    with pytest.raises(ValueError, match="implementation='fast' is unknown; use None or one of xla, pallas_tpu"):
        expand(np.ones((2, 3), np.float32), np.ones((2, 4), np.float32), implementation="fast")
    with pytest.raises(ValueError, match=r"float16 of 2 channels to 4 does not: use 'xla'"):
        expand(np.ones((2, 3), np.float16), np.ones((2, 4), np.float16), implementation="pallas_tpu")
    assert pallas_tpu.tiles(1024, 4096, 131_072, jnp.bfloat16) is None  # the gradient alone is 512 MiB


def test_bytes_by_hand():
    """S'MoRE's s (4, 4), r (8, 16) with a bias, 4096 tokens to 14336 channels: g is all but a tenth of it."""
    by_hand = 2 * 4096 * 14336 + 2 * 97 * 4096 + 2 * 96 * 14336 + 2 * 96 * 4096 + 4 * 97 * 14336
    assert pallas_tpu.hbm_bytes(96, 97, 4096, 14336, jnp.bfloat16) == by_hand < 1.12 * 2 * 4096 * 14336
    arrays = [
        ((96, 4096), jnp.bfloat16),
        ((96, 14336), jnp.float32),
        ((14336,), jnp.float32),
        ((4096, 14336), jnp.bfloat16),
    ]
    backward = lambda *a: jax.vjp(functools.partial(expand, implementation="pallas_tpu"), *a[:3])[1](a[3])
    in_whole_tiles = cost.count(backward, *(jax.ShapeDtypeStruct(*a) for a in arrays)).kernel_bytes
    assert by_hand <= in_whole_tiles <= 1.01 * by_hand


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "share"), list(zip(TOPOLOGIES, (0.95, 0.7, 0.7), strict=True)))
def test_the_tpu_compiler_takes_it_and_it_moves_fewer_bytes(topology, share):
    """96 channels and a bias to 14336, 4096 tokens: S'MoRE's up projection of Llama-3-8B. (v5e holds part of g on the chip.)"""
    sizes = {(96, 4096): jnp.bfloat16, (96, 14336): jnp.float32, (14336,): jnp.float32, (4096, 14336): jnp.bfloat16}

    def backward(implementation, state, kernel, bias, g):
        return jax.vjp(functools.partial(expand, implementation=implementation), state, kernel, bias)[1](g)

    shapes = [jax.ShapeDtypeStruct(*size) for size in sizes.items()]
    kernel, xla = (report(topology, functools.partial(backward, name), *shapes) for name in ("pallas_tpu", "xla"))
    assert "expand_cotangents" in kernel.text
    assert kernel.traffic <= share * xla.traffic
    alone = pallas_tpu.hbm_bytes(96, 97, 4096, 14336, jnp.bfloat16)
    around = 5 * 96 * 14336 * 4  # the kernel's cast, the bias' row cut off its gradient
    assert 0.95 * alone <= kernel.traffic <= alone + around  # less where XLA hands over small arrays on the chip
    assert kernel.temporaries <= xla.temporaries + around
