"""Attention against hand-worked numpy and the reference, over shapes and masks; its laws of memory and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxmethods.kernels.attention import attention, xla


def inputs(time, source=None, *, batch=2, heads=4, kv_heads=2, dim=8, segments=None, dtype=jnp.float32, seed=0):
    """Queries are the last `time` of `source` tokens. `segments`: lengths of each row's examples, the rest padding."""
    source = source or time
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (batch, time, heads, dim), dtype)
    k, v = (jax.random.normal(key, (batch, source, kv_heads, dim), dtype) for key in keys[1:])
    positions = np.broadcast_to(np.arange(source, dtype=np.int32), (batch, source))
    places = {"q_positions": positions[:, source - time :], "kv_positions": positions}
    if segments is not None:
        ids = np.zeros((batch, source), np.int32)
        positions = np.zeros((batch, source), np.int32)
        for row, lengths in enumerate(segments):
            at = 0
            for number, length in enumerate(lengths):
                ids[row, at : at + abs(length)] = (number + 1) * (length > 0)  # a negative length is padding
                positions[row, at : at + abs(length)] = np.arange(abs(length))
                at += abs(length)
        places = {
            "q_positions": positions[:, source - time :], "kv_positions": positions,
            "q_segment_ids": ids[:, source - time :], "kv_segment_ids": ids,
        }  # fmt: skip
    return q, k, v, places


STATIC = ("causal", "softcap", "implementation")
compiled = jax.jit(attention, static_argnames=STATIC)


def value_and_gradients(q, k, v, places, **options):
    return _value_and_gradients(q, k, v, **places, **options)


@functools.partial(jax.jit, static_argnames=(*STATIC, "window"))
def _value_and_gradients(q, k, v, **options):
    out, back = jax.vjp(lambda *x: attention(*x, **options), q, k, v)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype)
    return out, *back(weights)


def by_hand(q, k, v, places, causal=True, window=None, softcap=None):
    """One query, one head at a time, over the list of keys it sees; float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros(q.shape)
    for b, t, head in np.ndindex(*q.shape[:3]):
        group = head // (q.shape[2] // k.shape[2])
        seen = []
        for s in range(k.shape[1]):
            distance = places["q_positions"][b, t] - places["kv_positions"][b, s]
            same = True
            if "q_segment_ids" in places:
                same = places["q_segment_ids"][b, t] == places["kv_segment_ids"][b, s] != 0
            if same and (not causal or (distance >= 0 and (window is None or distance < window))):
                seen.append(s)
        if seen:
            scores = k[b, seen, group] @ q[b, t, head] / q.shape[3] ** 0.5
            scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
            p = np.exp(scores - scores.max())
            out[b, t, head] = p / p.sum() @ v[b, seen, group]
    return out


OPTIONS = [
    {},
    {"causal": False},
    {"window": 3},
    {"softcap": 1.5},
    {"window": 2, "softcap": 0.7},
]
SEGMENTS = [[[4, 3], [7]], [[-2, 5], [3, -4]], [[-7], [7]]]  # packed, padded left and right, a row of padding


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("options", OPTIONS)
def test_values_by_hand(implementation, options):
    for segments in SEGMENTS:
        q, k, v, places = inputs(7, heads=6, kv_heads=2, dim=5, segments=segments)
        out = compiled(q, k, v, **places, **options, implementation=implementation)
        np.testing.assert_allclose(out, by_hand(q, k, v, places, **options), atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_by_hand_without_segments(implementation, causal):
    q, k, v, places = inputs(5, 7, heads=6, kv_heads=2, dim=5)
    out = compiled(q, k, v, **places, causal=causal, implementation=implementation)
    np.testing.assert_allclose(out, by_hand(q, k, v, places, causal=causal), atol=2e-6)


BLOCKED = {  # 1100 tokens make five blocks of queries and of keys
    "causal": {},
    "bidirectional": {"causal": False},
    "packed": {"segments": [[300, 200, 500, 100], [1100]], "window": 250, "softcap": 2.0},
    "left padded": {"segments": [[-700, 400], [-90, 1000]], "window": 250, "softcap": 2.0},
    "right padded": {"segments": [[350, -750], [900, -200]], "window": 250, "softcap": 2.0},
    "padding": {"segments": [[-1100], [5, -1095]], "window": 250, "softcap": 2.0},
}


@pytest.mark.parametrize("name", BLOCKED)
def test_many_blocks_equal_the_reference(name):
    options = dict(BLOCKED[name])
    q, k, v, places = inputs(1100, heads=2, kv_heads=1, dim=4, segments=options.pop("segments", None))
    assert q.shape[1] * k.shape[1] > xla.SINGLE
    got = value_and_gradients(q, k, v, places, **options)
    expected = value_and_gradients(q, k, v, places, **options, implementation="reference")
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize(
    "heads, kv_heads, options", [(6, 2, options) for options in OPTIONS[1:4]] + [(4, 4, OPTIONS[-1]), (3, 1, {})]
)
def test_one_block_gradients_equal_the_reference(heads, kv_heads, options):
    q, k, v, places = inputs(13, 29, heads=heads, kv_heads=kv_heads, dim=4, segments=[[11, 18], [-5, 24]])
    got = value_and_gradients(q, k, v, places, **options)
    expected = value_and_gradients(q, k, v, places, **options, implementation="reference")
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=5e-6)


def test_numerical_gradients():
    q, k, v, places = inputs(5, dim=3, segments=[[3, 2], [-1, 4]])
    run = functools.partial(compiled, **places, window=3, softcap=2.0)
    check_grads(run, (q, k, v), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_bfloat16_is_near_float32(time=520):
    q, k, v, places = inputs(time, heads=2, kv_heads=1, dim=4, segments=[[time], [time]], dtype=jnp.bfloat16)
    got = value_and_gradients(q, k, v, places)
    assert all(x.dtype == jnp.bfloat16 for x in got)
    expected = value_and_gradients(*(x.astype(jnp.float32) for x in (q, k, v)), places)
    for x, y in zip(got, expected, strict=True):
        scale = float(jnp.abs(y).max())  # bfloat16 has 8 bits: errors of some 2 ** -8 of the largest entry
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.02 * scale)


@pytest.mark.parametrize("source", [300, 300_000])
def test_one_query_against_a_cache(source):
    """Places that are not filled yet (segment 0) hold anything; only the filled ones count."""
    q, k, v, places = inputs(1, source, heads=4, kv_heads=2, dim=4)
    filled = 37
    places["q_positions"] = np.full((2, 1), filled - 1, np.int32)
    places["q_segment_ids"] = np.ones((2, 1), np.int32)
    places["kv_segment_ids"] = np.broadcast_to((np.arange(source) < filled).astype(np.int32), (2, source))
    short = dict(places, kv_positions=places["kv_positions"][:, :filled], kv_segment_ids=np.ones((2, filled), np.int32))
    unfilled = places["kv_segment_ids"][..., None, None] == 0
    out = compiled(q, np.where(unfilled, 1e4, k), v, **places)
    np.testing.assert_allclose(out, by_hand(q, k[:, :filled], v[:, :filled], short), atol=2e-6)


@pytest.mark.parametrize("time", [6, 520])
def test_queries_that_see_nothing_give_zero_and_no_gradient(time):
    q, k, v, places = inputs(time, heads=2, kv_heads=1, dim=4, segments=[[-time], [time]])
    with jax.debug_nans(True):
        out, dq, dk, dv = value_and_gradients(3 * q, 3 * k, v, places)
    for x in (out, dq, dk, dv):
        assert not x[0].any() and x[1].any() and jnp.isfinite(x).all()


def test_a_traced_window_equals_a_static_one_and_none():
    q, k, v, places = inputs(12)
    static = jax.jit(attention, static_argnames="window")
    for window, same in [(3, 3), (0, None), (-1, None), (100, None)]:
        traced = compiled(q, k, v, **places, window=jnp.int32(window))
        np.testing.assert_allclose(traced, static(q, k, v, **places, window=same), atol=1e-6)


def test_segments_do_not_leak():
    """A packed row gives what its examples give alone."""
    q, k, v, places = inputs(10, batch=1, segments=[[6, 4]])
    packed = compiled(q, k, v, **places)
    for part in (slice(0, 6), slice(6, 10)):
        alone = {name: x[:, part] for name, x in places.items()}
        expected = compiled(q[:, part], k[:, part], v[:, part], **alone)
        np.testing.assert_allclose(packed[:, part], expected, atol=1e-6)


def test_under_vmap(time=520):
    """A batch axis of vmap acts like the batch axis itself, also where its members need different blocks."""
    q, k, v, places = inputs(
        time, heads=2, kv_heads=1, dim=4, segments=[[time // 2, -time // 2], [-time // 3, time // 2]]
    )
    expected = value_and_gradients(q, k, v, places)

    def one(q, k, v, places):
        return value_and_gradients(*(x[None] for x in (q, k, v)), {name: x[None] for name, x in places.items()})[0]

    got = jax.vmap(one)(q, k, v, {name: jnp.asarray(x) for name, x in places.items()})
    np.testing.assert_allclose(got[:, 0], expected[0], atol=1e-6)


def test_under_scan_and_checkpoint(time=520):
    q, k, v, places = inputs(time, heads=2, kv_heads=1, dim=4)
    windows = jnp.array([0, 5, 3])

    def layer(q, window):
        return q + attention(q, k, v, **places, window=window), None

    def scanned(q):
        return jax.lax.scan(jax.checkpoint(layer), q, windows)[0].sum()

    def unrolled(q):
        for window in (None, 5, 3):
            q = q + attention(q, k, v, **places, window=window, implementation="reference")
        return q.sum()

    np.testing.assert_allclose(jax.jit(jax.grad(scanned))(q), jax.jit(jax.grad(unrolled))(q), atol=2e-5)


def test_a_checkpoint_policy_can_save_the_result():
    """Two products forward, five backward; a second forward pass, of two, only where its results were not saved."""
    q, k, v, places = inputs(6)

    def products(policy):
        run = jax.checkpoint(lambda q, k, v: attention(q, k, v, **places).sum(), policy=policy)
        return str(jax.make_jaxpr(jax.value_and_grad(run, (0, 1, 2)))(q, k, v)).count("dot_general[")

    policies = jax.checkpoint_policies
    assert products(policies.save_only_these_names("attention_out", "attention_lse")) == 7
    assert products(policies.nothing_saveable) == 9


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_does_not_hold_time_by_source(gradient):
    time = 8192
    q, k, v, _ = inputs(8, batch=1, heads=2, kv_heads=1, dim=4)  # shapes only are used
    shapes = [jax.ShapeDtypeStruct((1, time, *x.shape[2:]), x.dtype) for x in (q, k, v)]
    positions = jax.ShapeDtypeStruct((1, time), jnp.int32)

    def run(q, k, v, positions):
        return attention(q, k, v, q_positions=positions, kv_positions=positions).sum()

    step = jax.grad(run, (0, 1, 2)) if gradient else run
    used = jax.jit(step).lower(*shapes, positions).compile().memory_analysis().temp_size_in_bytes
    assert used < 2 * time * time / 4  # a bool mask alone, of one head, would take time * time


@pytest.mark.parametrize("time", [16, 520])
def test_sharded_equals_single_device(time):
    q, k, v, places = inputs(time, batch=4, heads=4, kv_heads=2, dim=4, segments=[[time - 3, 3]] * 4)
    expected = value_and_gradients(q, k, v, places)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    sharded = [put(x, "data", None, "tensor") for x in (q, k, v)]
    got = value_and_gradients(*sharded, {name: put(x, "data") for name, x in places.items()})
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


@pytest.mark.parametrize("time", [16, 520])
def test_inside_shard_map(time):
    """Keys and values replicated over a mesh axis: their gradients are summed over it."""
    q, k, v, places = inputs(time, batch=2, heads=4, kv_heads=1, dim=4)
    expected = value_and_gradients(q, k, v, places)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def run(q, k, v, q_positions, kv_positions):
        return attention(q, k, v, q_positions=q_positions, kv_positions=kv_positions)

    heads, rows = P("data", None, "tensor"), P("data")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(heads, rows, rows, rows, rows), out_specs=heads)
    out, back = jax.vjp(lambda *x: jax.jit(mapped)(*x, places["q_positions"], places["kv_positions"]), q, k, v)
    got = out, *back(jnp.cos(jnp.arange(out.size)).reshape(out.shape))
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_wrong_arguments_say_so():
    q, k, v, places = inputs(4)
    run = functools.partial(attention, q, k, v, **places)
    with pytest.raises(ValueError, match="multiple of"):
        attention(q[:, :, :3], k, v, **places)
    with pytest.raises(ValueError, match="causal=True"):
        run(causal=False, window=2)
    with pytest.raises(ValueError, match="without kv_segment_ids"):
        run(q_segment_ids=np.ones((2, 4), np.int32))
    with pytest.raises(ValueError, match=r"softcap=0\.0"):
        run(softcap=0.0)
    with pytest.raises(ValueError, match="xla, splash, cudnn, reference"):
        run(implementation="flash")
