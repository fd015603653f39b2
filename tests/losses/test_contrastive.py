"""Contrastive losses against hand-worked float64 numpy, their laws, what they hold, and on several devices."""

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
from jaxmethods.losses import contrastive, gather_without_gradient, info_nce, sigmoid_loss
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


def split_over(devices, function, specs, out_specs):
    """The function on so many devices."""
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out_specs)


@functools.partial(jax.jit, static_argnames=("symmetric",))
def value_and_gradients(queries, targets, temperature, symmetric=True):
    loss = lambda q, t, temperature: info_nce(q, t, temperature=temperature, symmetric=symmetric)
    value, gradients = jax.value_and_grad(loss, (0, 1, 2))(queries, targets, temperature)
    return value, *gradients


def by_hand(queries, targets, temperature, symmetric=True, negatives=None):
    """The value, and gradients in queries, targets, negatives (if given) and temperature, in float64."""
    pairs, dim = queries.shape
    columns = targets if negatives is None else np.concatenate([targets, negatives.reshape(-1, dim)])
    q, t = (np.asarray(x, np.float64) for x in (queries, columns))
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (q, t)]
    q, t = q / lengths[0], t / lengths[1]
    z = q @ t.T / temperature

    def log_softmax(z, axis):
        below = z - z.max(axis, keepdims=True)
        return below - np.log(np.exp(below).sum(axis, keepdims=True))

    def one_way(z, axis):
        found = log_softmax(z, axis)
        return -np.diag(found).mean(), (np.exp(found) - np.eye(*z.shape)) / pairs

    value, d_z = one_way(z, 1)
    if symmetric:
        back, d_back = one_way(z[:, :pairs], 0)
        value, d_z = (value + back) / 2, d_z / 2
        d_z[:, :pairs] += d_back / 2
    project = lambda d, x, length: (d - x * (d * x).sum(1, keepdims=True)) / length
    d_q, d_t = project(d_z @ t / temperature, q, lengths[0]), project(d_z.T @ q / temperature, t, lengths[1])
    d_negatives = () if negatives is None else (d_t[pairs:].reshape(negatives.shape),)
    return value, d_q, d_t[:pairs], *d_negatives, -(d_z * z).sum() / temperature


def close(got, expected, dtype=jnp.float32):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=TOLERANCE[dtype] * max(0.1, np.abs(y).max())
        )


@pytest.mark.parametrize(
    "pairs, dtype, symmetric",
    [(2, jnp.float32, True), (37, jnp.float32, True), (37, jnp.float32, False), (48, jnp.bfloat16, True)],
)
def test_by_hand(small_blocks, pairs, dtype, symmetric):
    """Two pairs, one block and a rest, both directions, bfloat16."""
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


def test_an_embedding_without_length(small_blocks):
    """Where values are known an error; else cosines 0 and no gradient, as if its logits were constants."""
    queries, targets = embeddings(37, 5)
    broken = queries.at[3].set(0.0)
    with pytest.raises(ValueError, match="row 3 of queries has length 0"):
        info_nce(broken, targets, temperature=0.1)
    with pytest.raises(ValueError, match="row 3 of targets has length 0"):
        sigmoid_loss(np.asarray(targets), np.asarray(broken), scale=1.0, bias=0.0)
    with pytest.raises(ValueError, match="row 4 of negatives has length 0"):
        info_nce(queries, targets, temperature=0.1, negatives=queries.at[4].set(1e-15))
    value, d_q, d_t, d_temperature = value_and_gradients(broken, targets, jnp.float32(0.3))
    q, t = (np.asarray(x, np.float64) for x in (broken, targets))
    z = q @ t.T / (np.linalg.norm(q, axis=1).clip(1e-9)[:, None] * np.linalg.norm(t, axis=1)) / 0.3
    lse = lambda axis: np.log(np.exp(z).sum(axis))
    np.testing.assert_allclose(value, (lse(1) + lse(0) - 2 * np.diag(z)).mean() / 2, rtol=1e-5)
    np.testing.assert_array_equal(d_q[3], 0.0)
    assert all(np.isfinite(x).all() and np.abs(x).max() < 10 for x in (d_q, d_t, d_temperature))
    sigmoid = jax.jit(jax.value_and_grad(lambda q: sigmoid_loss(q, targets, scale=5.0, bias=-1.0)))(broken)
    assert np.isfinite(sigmoid[0]) and np.isfinite(sigmoid[1]).all() and not sigmoid[1][3].any()


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


@pytest.mark.parametrize("pairs, more, symmetric", [(37, (37, 2), True), (1, (3,), False)])
def test_hard_negatives(small_blocks, pairs, more, symmetric):
    """For each query or for all; with them a single pair has a loss."""
    queries, targets = embeddings(pairs, 5)
    negatives = 2.0 * jax.random.normal(jax.random.key(2), (*more, 5))
    loss = lambda q, t, n, temperature: info_nce(q, t, temperature=temperature, symmetric=symmetric, negatives=n)
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(queries, targets, negatives, jnp.float32(0.3))
    close((value, *gradients), by_hand(queries, targets, 0.3, symmetric, negatives))


def test_hard_negatives_on_devices(small_blocks):
    """Split like the pairs, here one on each device, or the same on every device."""
    queries, targets = embeddings(8, 5)
    own, shared = jax.random.normal(jax.random.key(2), (8, 2, 5)), jax.random.normal(jax.random.key(3), (3, 5))
    loss = lambda q, t, n, temperature: info_nce(q, t, temperature=temperature, axis_name="data", negatives=n)
    for negatives, spec in ((own, P("data")), (shared, P())):
        split = split_over(8, loss, (P("data"), P("data"), spec, P()), P())
        run = jax.jit(jax.value_and_grad(split, (0, 1, 2, 3)))
        value, gradients = run(queries, targets, negatives, jnp.float32(0.3))
        close((value, *gradients), by_hand(queries, targets, 0.3, negatives=negatives))


def test_negatives_that_are_far_away_change_nothing():
    queries, targets = embeddings(6, 5)
    queries, targets = jnp.abs(queries), jnp.abs(targets)
    run = jax.jit(lambda negatives: info_nce(queries, targets, temperature=0.02, negatives=negatives))
    np.testing.assert_allclose(run(-jnp.ones((4, 5))), by_hand(queries, targets, 0.02)[0], rtol=1e-5)


def sigmoid_by_hand(queries, targets, scale, bias):
    """The value, and gradients in queries, targets, scale and bias, in float64."""
    scale, bias = float(scale), float(bias)
    q, t = (np.asarray(x, np.float64) for x in (queries, targets))
    lengths = [np.linalg.norm(x, axis=1, keepdims=True) for x in (q, t)]
    q, t = q / lengths[0], t / lengths[1]
    sign = 2 * np.eye(len(q)) - 1
    wrong = 1 / (1 + np.exp(sign * (scale * q @ t.T + bias)))
    d_z = -sign * wrong / len(q)
    project = lambda d, x, length: (d - x * (d * x).sum(1, keepdims=True)) / length
    d_q, d_t = project(scale * d_z @ t, q, lengths[0]), project(scale * d_z.T @ q, t, lengths[1])
    return -np.log1p(-wrong).sum() / len(q), d_q, d_t, (d_z * (q @ t.T)).sum(), d_z.sum()


def test_sigmoid_loss(monkeypatch):
    """In blocks that do not come out even, also on devices."""
    monkeypatch.setattr(contrastive, "LOGITS", 7 * 40)
    queries, targets = embeddings(40, 5)
    at = queries, targets, jnp.float32(np.exp(2.3)), jnp.float32(-10.0)
    loss = lambda q, t, scale, bias, **names: sigmoid_loss(q, t, scale=scale, bias=bias, **names)
    expected = sigmoid_by_hand(*at)
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*at)
    close((value, *gradients), expected)
    split = split_over(8, functools.partial(loss, axis_name="data"), (P("data"), P("data"), P(), P()), P())
    value, gradients = jax.jit(jax.value_and_grad(split, (0, 1, 2, 3)))(*at)
    close((value, *gradients), expected)


def test_gathering_without_gradient_gives_the_gradient_over_the_number_of_devices():
    """Through an encoder's parameters, averaged over four devices as an optimiser of many processes does."""
    queries, targets = embeddings(8, 5)
    kernel = jax.random.normal(jax.random.key(4), (5, 3))

    def official(kernel, q, t):
        q, t = (gather_without_gradient(x @ kernel, "data") for x in (q, t))
        return jax.lax.pmean(info_nce(q, t, temperature=0.3), "data")

    exact = lambda kernel, q, t: info_nce(q @ kernel, t @ kernel, temperature=0.3, axis_name="data")
    (value, theirs), (same, whole) = (
        jax.jit(split_over(4, jax.value_and_grad(f), (P(), P("data"), P("data")), (P(), P())))(kernel, queries, targets)
        for f in (official, exact)
    )
    np.testing.assert_allclose(value, same, rtol=1e-6)
    assert np.abs(whole).max() > 0.01
    np.testing.assert_allclose(4 * theirs, whole, rtol=1e-5, atol=1e-6)


MANY = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((32_768, 768), (32_768, 768), ()))
"""Shapes of queries, targets and temperature."""


def test_pairs_by_pairs_is_never_held():
    compiled = value_and_gradients.lower(*MANY).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 32_768**2 * 4 / 20
    negatives = lambda q, t, n: info_nce(q, t, temperature=0.1, negatives=n)
    sigmoid = lambda q, t, scale: sigmoid_loss(q, t, scale=scale, bias=-10.0)
    # Beside a few copies of the embeddings (96 MiB each): among several devices hard negatives come 2048 at once for all queries.
    for loss, shapes, share in ((negatives, (MANY[0],) * 3, 3), (sigmoid, MANY, 10)):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 32_768**2 * 4 / share


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
    with pytest.raises(ValueError, match="scale=-1 must be positive"):
        sigmoid_loss(queries, targets, scale=-1, bias=0.0)
    with pytest.raises(ValueError, match="at least two pairs"):
        info_nce(queries[:1], targets[:1], temperature=0.1)
    for wrong in ((3, 2, 5), (3, 4), (5,)):
        with pytest.raises(ValueError, match=r"give \[4, K, 5\] or \[M, 5\]"):
            info_nce(queries, targets, temperature=0.1, negatives=jnp.ones(wrong))
    with pytest.raises(ValueError, match="give None for none"):
        info_nce(queries, targets, temperature=0.1, negatives=jnp.ones((0, 5)))
    with pytest.raises(ValueError, match="xla, reference"):
        kernels.info_nce(queries, targets, jnp.ones(4), jnp.ones(4), implementation="pallas_tpu")
