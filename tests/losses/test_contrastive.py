"""InfoNCE against hand-worked float64 numpy, its laws, what it holds, and on several devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmethods import kernels
from jaxmethods.kernels.info_nce import xla
from jaxmethods.losses import info_nce
from tests.compiler import TOPOLOGIES, needs_compiler, report

TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}
"""Of the largest value: float32 sums in another order; bfloat16 embeddings and gradients have 8 bits."""


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that few pairs take several."""
    monkeypatch.setattr(xla, "QUERIES", 16)
    monkeypatch.setattr(xla, "TARGETS", 8)


def embeddings(pairs, dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 2)
    return [3.0 * jax.random.normal(key, (pairs, dim), dtype) for key in keys]


@functools.partial(jax.jit, static_argnames=("symmetric",))
def value_and_gradients(queries, targets, temperature, symmetric=True):
    loss = lambda q, t, temperature: info_nce(q, t, temperature=temperature, symmetric=symmetric)
    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(queries, targets, temperature)
    return value, *gradients


def by_hand(queries, targets, temperature, symmetric=True):
    """The value, and gradients in queries, targets and temperature, in float64."""
    q, t = (np.asarray(x, np.float64) for x in (queries, targets))
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (q, t)]
    q, t = q / lengths[0], t / lengths[1]
    cosines = q @ t.T
    z = cosines / temperature

    def log_softmax(axis):
        below = z - z.max(axis, keepdims=True)
        return below - np.log(np.exp(below).sum(axis, keepdims=True))

    softmax = lambda axis: np.exp(log_softmax(axis))
    eye = np.eye(len(q))
    share = 0.5 if symmetric else 1.0
    value, d_z = -share * np.diag(log_softmax(1)).mean(), share * (softmax(1) - eye) / len(q)
    if symmetric:
        value, d_z = value - 0.5 * np.diag(log_softmax(0)).mean(), d_z + 0.5 * (softmax(0) - eye) / len(q)
    project = lambda d, x, length: (d - x * (d * x).sum(1, keepdims=True)) / length
    d_q, d_t = project(d_z @ t / temperature, q, lengths[0]), project(d_z.T @ q / temperature, t, lengths[1])
    return value, d_q, d_t, -(d_z * z).sum() / temperature


def close(got, expected, dtype=jnp.float32):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=TOLERANCE[dtype] * max(0.1, np.abs(y).max())
        )


@pytest.mark.parametrize(
    "pairs, dtype, symmetric",
    [(1, jnp.float32, True), (37, jnp.float32, True), (37, jnp.float32, False), (48, jnp.bfloat16, True)],
)
def test_by_hand(small_blocks, pairs, dtype, symmetric):
    """One pair (0, without gradient), one block and a rest, both directions, bfloat16."""
    queries, targets = embeddings(pairs, 5, dtype)
    got = value_and_gradients(queries, targets, jnp.float32(0.3), symmetric=symmetric)
    assert [x.dtype for x in got] == [jnp.float32, dtype, dtype, jnp.float32]
    close(got, by_hand(queries, targets, 0.3, symmetric), dtype)


def test_the_reference_gives_the_same_for_any_scales(small_blocks):
    """The op alone: loss by pair and all four gradients, with a weight for each pair."""
    queries, targets = embeddings(37, 5)
    scales = jnp.linspace(0.1, 0.5, 37), jnp.linspace(-0.4, 0.3, 37)
    run = lambda name: jax.jit(
        lambda *xs: (lambda out, back: (out, *back(jnp.sin(jnp.arange(37.0)))))(
            *jax.vjp(functools.partial(kernels.info_nce, implementation=name), *xs)
        )
    )(queries, targets, *scales)
    close(run("xla"), [np.asarray(x, np.float64) for x in run("reference")])


def test_laws(small_blocks):
    queries, targets = embeddings(37, 5)
    run = lambda q, t, symmetric=True: value_and_gradients(q, t, jnp.float32(0.2), symmetric=symmetric)
    value, d_q, d_t, d_temperature = run(queries, targets)
    order = np.random.default_rng(0).permutation(37)
    close(run(queries[order], targets[order]), (value, d_q[order], d_t[order], d_temperature))
    close(run(targets, queries), (value, d_t, d_q, d_temperature))
    forth, back = run(queries, targets, symmetric=False)[0], run(targets, queries, symmetric=False)[0]
    close([value], [(forth + back) / 2])
    close([run(7.0 * queries, targets)[0]], [value])
    np.testing.assert_allclose((d_q * queries).sum(1), 0.0, atol=1e-6)  # the length of an embedding does not matter


def test_corners_are_finite(small_blocks):
    """Rows that are all the same, temperatures far from 1, embeddings of no length."""
    queries, targets = embeddings(37, 5)
    same = jnp.broadcast_to(queries[:1], queries.shape)
    value, *gradients = value_and_gradients(same, same, jnp.float32(0.05))
    np.testing.assert_allclose(value, np.log(37), rtol=1e-6)
    np.testing.assert_allclose(gradients[0], 0.0, atol=1e-5)
    for temperature in (1e-6, 1e6):
        got = value_and_gradients(queries, targets, jnp.float32(temperature))
        assert all(np.isfinite(x).all() for x in got)
        np.testing.assert_allclose(got[0], by_hand(queries, targets, temperature)[0], rtol=1e-5)
    assert all(np.isfinite(x).all() for x in value_and_gradients(queries.at[3].set(0.0), targets, jnp.float32(0.1)))


@pytest.mark.parametrize("axes", [{"data": 2}, {"data": 8}, {"data": 2, "fsdp": 4}])
def test_devices_give_what_one_gives(small_blocks, axes):
    """Value and gradients over a ring, also over two mesh axes at once, and with the temperature on every device."""
    queries, targets = embeddings(72, 5)
    sizes = tuple(axes.values())
    mesh = jax.make_mesh(sizes, tuple(axes), (AxisType.Auto,) * len(axes), devices=jax.devices()[: math.prod(sizes)])
    names = tuple(axes) if len(axes) > 1 else "data"
    split = jax.shard_map(
        lambda q, t, temperature: info_nce(q, t, temperature=temperature, axis_name=names),
        mesh=mesh, in_specs=(P(names), P(names), P()), out_specs=P(),
    )  # fmt: skip
    value, gradients = jax.jit(jax.value_and_grad(split, (0, 1, 2)))(queries, targets, jnp.float32(0.3))
    close((value, *gradients), by_hand(queries, targets, 0.3))


def test_a_gradient_taken_on_the_devices_is_the_whole_one(small_blocks):
    """`jax.grad` inside of `shard_map`: each device gets the whole gradient of its rows."""
    queries, targets = embeddings(72, 5)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    loss = lambda q, t: info_nce(q, t, temperature=0.3, axis_name="data")
    split = jax.shard_map(
        jax.grad(loss, (0, 1)), mesh=mesh, in_specs=(P("data"), P("data")), out_specs=(P("data"), P("data"))
    )
    close(jax.jit(split)(queries, targets), by_hand(queries, targets, 0.3)[1:3])


MANY = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32_768, 768), (32_768, 768), ()))
"""Shapes of queries, targets and temperature."""


def test_pairs_by_pairs_is_never_held():
    compiled = value_and_gradients.lower(*MANY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32_768**2 * 4 / 20


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_nor_by_the_kernel_on_a_tpu(topology):
    """A bfloat16 copy of one side, 48 MiB; on v5p another 63. (The loss adds the norms' gradients in a copy of both sides.)"""
    loss = lambda *arrays: kernels.info_nce(*arrays).mean()
    scale = jax.ShapeDtypeStruct((32_768,), jnp.float32)
    found = report(topology, jax.value_and_grad(loss, (0, 1, 2, 3)), *MANY[:2], scale, scale)
    assert found.temporaries < 32_768**2 * 4 / 30


def test_wrong_arguments_say_so():
    queries, targets = embeddings(4, 5)
    with pytest.raises(ValueError, match="row i of both is one pair"):
        info_nce(queries, targets[:3], temperature=0.1)
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        info_nce(queries, targets, temperature=0)
    with pytest.raises(ValueError, match="no pairs"):
        info_nce(queries[:0], targets[:0], temperature=0.1)
    with pytest.raises(ValueError, match="xla, reference"):
        kernels.info_nce(queries, targets, jnp.ones(4), jnp.ones(4), implementation="pallas_tpu")
