"""The TPU kernels of token log-probabilities: interpreted, against float64 numpy; and compiled by the TPU compiler where it is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the findings have no public name
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods.kernels.token_logprobs import implementation_for, pallas_tpu, token_logprobs, token_statistics
from jaxmethods.launch import cost, targets
from tests.compiler import TOPOLOGIES, needs_compiler, report

TOLERANCE = {jnp.float32: 2e-5, jnp.bfloat16: 2e-2}
"""Of the largest value: float32 sums in another order; bfloat16 results are rounded to 8 bits."""


def inputs(tokens, dim, vocab, dtype=jnp.float32, transposed=False):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (tokens, dim), dtype)
    unembedding = jax.random.normal(keys[1], (vocab, dim) if transposed else (dim, vocab), dtype)
    where = jax.random.bernoulli(keys[3], 0.6, (tokens,))
    return (
        hidden,
        unembedding,
        jax.random.randint(keys[2], (tokens,), 0, vocab),
        where,
        jax.random.normal(keys[4], (tokens,)),
    )


def by_hand(hidden, unembedding, targets, where, weights, softcap, transposed):
    """Log-probabilities, log-sum-exp, entropy; gradients of the weighted sum of log-probabilities. All in float64."""
    h, u, g = (np.asarray(x, np.float64) for x in (hidden, unembedding, weights))
    u = u.T if transposed else u
    raw = h @ u
    z = raw if softcap is None else softcap * np.tanh(raw / softcap)
    lse = np.log(np.exp(z - z.max(1, keepdims=True)).sum(1)) + z.max(1)
    p, rows = np.exp(z - lse[:, None]), np.arange(len(h))
    keep = np.ones(len(h), bool) if where is None else np.asarray(where)
    d_z = -p * (g * keep)[:, None]
    d_z[rows, targets] += g * keep
    d_z = d_z if softcap is None else d_z / np.cosh(raw / softcap) ** 2
    d_u = h.T @ d_z
    values = (z[rows, targets] - lse, lse, lse - (p * z).sum(1))
    return [np.where(keep, x, 0.0) for x in values], (d_z @ u.T, d_u.T if transposed else d_u)


def close(got, expected, dtype=jnp.float32):
    for x, y in zip(got, expected, strict=True):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(np.abs(y).max())))


@pytest.fixture
def small_tiles(monkeypatch):
    """Blocks so small that small arrays take several."""
    monkeypatch.setattr(pallas_tpu, "TOKENS", 32)
    monkeypatch.setattr(pallas_tpu, "VOCAB", 128)
    monkeypatch.setattr(pallas_tpu, "WIDTH", 128)


def run(wrt, hidden, unembedding, targets, weights, mode=True, **options):
    """The values, and the asked gradients of their weighted sum, with the kernels interpreted."""

    def values(*differentiated):
        arrays = [hidden, unembedding]
        for i, x in zip(wrt, differentiated, strict=True):
            arrays[i] = x
        return token_logprobs(*arrays, targets, implementation="pallas_tpu", **options)

    with pltpu.force_tpu_interpret_mode(mode):
        return jax.jit(lambda xs: (lambda out, back: (out, *back(weights)))(*jax.vjp(values, *xs)))(
            [(hidden, unembedding)[i] for i in wrt]
        )


# (tokens, width, vocabulary): one tile; several with a rest, the width in one part; the same, the width in two parts.
@pytest.mark.parametrize(
    "size, dtype, transposed, softcap, masked",
    [
        ((5, 3, 11), jnp.float32, False, None, False),
        ((70, 24, 300), jnp.float32, False, 3.0, True),
        ((70, 256, 300), jnp.float32, True, None, True),
        ((64, 256, 256), jnp.bfloat16, False, 20.0, False),
        ((45, 40, 261), jnp.bfloat16, True, None, True),
    ],
)
def test_value_and_gradients_by_hand(small_tiles, size, dtype, transposed, softcap, masked):
    hidden, unembedding, targets, where, weights = inputs(*size, dtype, transposed)
    where = where if masked else None
    (logps, _, _), gradients = by_hand(hidden, unembedding, targets, where, weights, softcap, transposed)
    dirty = hidden if where is None else jnp.where(where[:, None], hidden, jnp.nan)
    options = {"softcap": softcap, "transposed": transposed, "where": where}
    got = run((0, 1), dirty, unembedding, targets, weights, **options)
    assert [x.dtype for x in got] == [jnp.float32, dtype, dtype]
    close(got, (logps, *gradients), dtype)


@pytest.mark.parametrize("wrt", [(0,), (1,)])
def test_each_gradient_alone(small_tiles, wrt):
    hidden, unembedding, targets, where, weights = inputs(70, 24, 300)
    (logps, _, _), gradients = by_hand(hidden, unembedding, targets, where, weights, None, False)
    close(run(wrt, hidden, unembedding, targets, weights, where=where), (logps, gradients[wrt[0]]))


def test_no_token_wanted_and_targets_outside(small_tiles):
    hidden, unembedding, targets, where, weights = inputs(70, 24, 300)
    got = run((0, 1), hidden, unembedding, targets, weights, where=where & False)
    assert not any(np.asarray(x).any() for x in got)
    values, *_ = run((0,), hidden, unembedding, targets.at[:2].set(jnp.array([-1, 300])), weights)
    assert np.isnan(values).tolist() == [True, True, *[False] * 68]


def test_in_a_simulated_tpu_nothing_races_and_nothing_unset_is_read(small_tiles):
    """Memory of the simulation starts as nan, and copies between memories are checked for races."""
    hidden, unembedding, targets, where, weights = inputs(40, 24, 150)
    (logps, _, _), gradients = by_hand(hidden, unembedding, targets, where, weights, None, False)
    mode = pltpu.InterpretParams(detect_races=True, out_of_bounds_reads="uninitialized")
    got = run((0, 1), hidden, unembedding, targets, weights, mode=mode, where=where)
    close(got, (logps, *gradients))
    races = interpret_pallas_call.races
    assert races is not None and not races.races_found


@pytest.mark.parametrize("transposed", [False, True])
def test_a_vocabulary_split_over_an_axis(small_tiles, transposed):
    """By `vmap` with a named axis: interpreted kernels know no `shard_map` with check_vma. Hidden's gradient is summed here."""
    hidden, unembedding, targets, where, weights = inputs(40, 24, 2 * 150, transposed=transposed)
    expected = by_hand(hidden, unembedding, targets, where, weights, 3.0, transposed)
    options = {"axis_name": "tensor", "transposed": transposed, "softcap": 3.0, "implementation": "pallas_tpu"}
    split = jax.vmap(
        lambda h, u: token_logprobs(h, u, targets, where=where, **options), axis_name="tensor", out_axes=None
    )
    shards = jnp.stack(jnp.split(unembedding, 2, axis=0 if transposed else 1))
    with pltpu.force_tpu_interpret_mode(True):
        out, back = jax.vjp(jax.jit(split), jnp.stack([hidden] * 2), shards)
        d_hidden, d_shards = back(weights)
    d_unembedding = jnp.concatenate(list(d_shards), axis=0 if transposed else 1)
    close((out, d_hidden.sum(0), d_unembedding), (expected[0][0], *expected[1]))


# Statistics, by every implementation.


def statistics(hidden, unembedding, targets, cotangents, **options):
    """The three values, and gradients of their weighted sum."""

    def values(h, u):
        return tuple(token_statistics(h, u, targets, **options))

    out, back = jax.jit(lambda h, u: jax.vjp(values, h, u))(hidden, unembedding)
    return *out, *back(cotangents)


@pytest.mark.parametrize("implementation", ["reference", "xla", "pallas_tpu"])
def test_statistics_by_hand(small_tiles, implementation):
    """Values, and gradients by numerical differences of the float64 values."""
    hidden, unembedding, targets, where, weights = inputs(40, 4, 150)
    options = {"where": where, "softcap": 3.0, "implementation": implementation}
    cotangents = (weights, jnp.cos(weights), jnp.sin(weights))
    with pltpu.force_tpu_interpret_mode(True):
        *values, d_hidden, d_unembedding = statistics(hidden, unembedding, targets, cotangents, **options)
    hand = lambda h, u: by_hand(h, u, targets, where, weights, 3.0, False)[0]
    close(values, hand(hidden, unembedding))
    total = lambda h, u: sum((np.asarray(c, np.float64) * x).sum() for c, x in zip(cotangents, hand(h, u), strict=True))
    h, u = (np.asarray(x, np.float64) for x in (hidden, unembedding))
    way, step = np.random.default_rng(0).normal(size=h.shape), 1e-5
    slope = (total(h + step * way, u) - total(h - step * way, u)) / (2 * step)
    np.testing.assert_allclose((d_hidden * way).sum(), slope, rtol=1e-4, atol=1e-3)
    way = np.random.default_rng(1).normal(size=u.shape)
    slope = (total(h, u + step * way) - total(h, u - step * way)) / (2 * step)
    np.testing.assert_allclose((d_unembedding * way).sum(), slope, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_statistics_of_a_split_vocabulary(implementation):
    hidden, unembedding, targets, where, weights = inputs(12, 4, 80)
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    options = {"axis_name": "tensor", "implementation": implementation}
    split = jax.shard_map(
        lambda h, u: tuple(token_statistics(h, u, targets, where=where, **options)),
        mesh=mesh, in_specs=(P(), P(None, "tensor")), out_specs=P(),
    )  # fmt: skip
    got, back = jax.vjp(jax.jit(split), hidden, unembedding)
    close(got, by_hand(hidden, unembedding, targets, where, weights, None, False)[0])
    cotangents = (weights, jnp.cos(weights), jnp.sin(weights))
    expected = statistics(hidden, unembedding, targets, cotangents, where=where, implementation="reference")[3:]
    close(back(cotangents), [np.asarray(x, np.float64) for x in expected])


# Which implementation, and what a TPU's compiler says.


class Device:
    def __init__(self, kind):
        self.device_kind = kind


def test_the_device_compiled_for_chooses():
    of = lambda kind, *shape, dtype=jnp.bfloat16: implementation_for(
        Device(kind), jax.ShapeDtypeStruct(shape[:2], dtype), jax.ShapeDtypeStruct(shape[1:], dtype)
    )
    hidden, table = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 4096), (128256, 4096)))
    tied = [
        implementation_for(Device(kind), hidden, table, transposed=True)
        for kind in ("TPU v5 lite", "TPU v5", "TPU v6e")
    ]
    assert tied == ["xla", "pallas_tpu", "pallas_tpu"]
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite"):
        assert of(kind, 4096, 4096, 128256) == "pallas_tpu"
        assert of(kind, 4096, 8192, 128256, dtype=jnp.float32) == "pallas_tpu"
        assert of(kind, 4096, 4096, 128256, dtype=jnp.float16) == "xla"
    assert of("TPU v5", 4096, 1 << 16, 128256) == "xla"  # no block fits
    for kind in ("cpu", "TPU v4", "NVIDIA H100 80GB HBM3"):
        assert of(kind, 4096, 4096, 128256) == "xla"


def test_what_the_kernels_do_not_take_is_told():
    hidden, unembedding, targets, _, _ = inputs(4, 3, 5)
    with pytest.raises(ValueError, match="of one dtype"):
        token_logprobs(hidden, unembedding.astype(jnp.bfloat16), targets, implementation="pallas_tpu")
    with pytest.raises(ValueError, match="Only interpret mode is supported on CPU"):
        token_logprobs(hidden, unembedding, targets, implementation="pallas_tpu")


def test_bytes_are_grid_times_blocks():
    """Llama-3-8B's: 4096 tokens of width 4096, 128256 of the vocabulary, two bytes each."""
    hidden, unembedding = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((4096, 4096), (4096, 128256)))
    bytes_of = functools.partial(pallas_tpu.hbm_bytes, hidden, unembedding, transposed=False)
    sizes = functools.partial(pallas_tpu.tiles, hidden, unembedding, transposed=False)
    matrix = 4096 * 128256 * 2
    assert sizes(kernel="values") == (1024, 256)
    assert bytes_of(kernel="values") == 4 * matrix + 4096 * 4096 * 2 + 5 * 4096 * 128 * 4
    n, _ = sizes(kernel="direction")
    rows = -(-4096 // n) * n
    assert bytes_of(kernel="direction") == -(-4096 // n) * matrix + 3 * rows * 4096 * 2 + 5 * rows * 128 * 4
    n, v = sizes(kernel="unembedding")
    assert 4096 % n == 0
    assert bytes_of(kernel="unembedding") == 2 * matrix + -(-128256 // v) * 4096 * (4096 * 2 + 3 * 128 * 4)
    # Another way to the same bytes: from the kernels themselves, as `plan` counts them in a training step.
    targets = jax.ShapeDtypeStruct((4096,), jnp.int32)
    value = lambda h, u, t: token_logprobs(h, u, t, implementation="pallas_tpu")
    both = lambda h, u, t: jax.vjp(lambda h, u: value(h, u, t), h, u)[1](jnp.ones(4096, jnp.float32))
    assert cost.count(value, hidden, unembedding, targets).kernel_bytes == bytes_of(kernel="values")
    gradients = bytes_of(kernel="direction") + bytes_of(kernel="unembedding")
    assert cost.count(both, hidden, unembedding, targets).kernel_bytes == gradients


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_at_production_size_and_holds_no_logits(topology, transposed):
    """Temporaries of values and of both gradients under an eighth of what float32 logits would take."""
    tokens, dim, vocab = 4096, 4096, 128256
    shapes = ((tokens, dim), (vocab, dim) if transposed else (dim, vocab))
    arrays = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes]
    columns = [jax.ShapeDtypeStruct((tokens,), t) for t in (jnp.int32, jnp.float32)]
    options = {"transposed": transposed, "implementation": "pallas_tpu"}

    def step(h, u, t, g):
        out, back = jax.vjp(lambda h, u: token_logprobs(h, u, t, **options), h, u)
        return out, back(g)

    assert report(topology, step, *arrays, *columns).temporaries < tokens * vocab * 4 / 8


@needs_compiler
@pytest.mark.slow
def test_compiles_inside_of_shard_map():
    """Tokens over one axis, the vocabulary over another, as a training step has them."""
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=targets.devices_of("v5e:2x2")
    )
    specs = (P("data"), P(None, "tensor"), P("data"))
    run = jax.shard_map(
        lambda h, u, t: token_logprobs(h, u, t, axis_name="tensor", implementation="pallas_tpu"),
        mesh=mesh, in_specs=specs, out_specs=P("data"),
    )  # fmt: skip
    shapes = (((512, 256), jnp.bfloat16), ((256, 2000), jnp.bfloat16), ((512,), jnp.int32))
    arrays = [jax.ShapeDtypeStruct(*x, sharding=NamedSharding(mesh, s)) for x, s in zip(shapes, specs, strict=True)]
    step = jax.jit(jax.grad(lambda h, u, t: run(h, u, t).sum(), (0, 1)))
    _, text = targets.compile_for(step.lower(*arrays), "tpu")
    assert text.count('custom_call_target="tpu_custom_call"') == 2
