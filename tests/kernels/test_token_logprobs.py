"""Log-probabilities of tokens against hand-worked numpy and the reference; what is computed, held and skipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxmethods.kernels.token_logprobs import token_logprobs

STATIC = ("softcap", "transposed", "compact", "implementation")
compiled = jax.jit(token_logprobs, static_argnames=STATIC)


def inputs(tokens, dim, vocab, dtype=jnp.float32, transposed=False):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (tokens, dim), dtype)
    unembedding = jax.random.normal(keys[1], (vocab, dim) if transposed else (dim, vocab), dtype)
    targets = jax.random.randint(keys[2], (tokens,), 0, vocab)
    where = jax.random.bernoulli(keys[3], 0.3, (tokens,))
    return hidden, unembedding, targets, where, jax.random.normal(keys[4], (tokens,))


@functools.partial(jax.jit, static_argnames=("wrt", *STATIC))
def value_and_gradients(hidden, unembedding, targets, weights, wrt=(0, 1), **options):
    """The values, and gradients of their weighted sum in hidden (0) and unembedding (1)."""

    def run(*differentiated):
        arrays = [hidden, unembedding]
        for i, x in zip(wrt, differentiated, strict=True):
            arrays[i] = x
        return token_logprobs(*arrays, targets, **options)

    values, back = jax.vjp(run, *((hidden, unembedding)[i] for i in wrt))
    return values, *back(weights)


def close(got, expected, tolerance=1e-5):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1.0, float(jnp.abs(y).max())))


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_values_by_hand(implementation, softcap):
    hidden, unembedding, targets, where, _ = inputs(6, 3, 7)
    got = compiled(hidden, unembedding, targets, where=where, softcap=softcap, implementation=implementation)
    for n in range(6):
        logits = [sum(float(a) * float(b) for a, b in zip(hidden[n], column, strict=True)) for column in unembedding.T]
        logits = np.array(logits) if softcap is None else softcap * np.tanh(np.array(logits) / softcap)
        p = np.exp(logits) / np.exp(logits).sum()
        np.testing.assert_allclose(got[n], np.log(p[targets[n]]) if where[n] else 0.0, atol=1e-5)


# The vocabulary takes one block; a loop and a rest; without compaction a loop and a rest, with it one block and a rest.
SIZES = [(5, 3, 11), (300, 2, 28_100), (601, 3, 12_001)]


@pytest.mark.parametrize(
    "size, compact, transposed",
    [
        (SIZES[0], False, False),
        (SIZES[1], False, False),
        (SIZES[1], True, True),
        (SIZES[2], False, True),
        (SIZES[2], True, False),
    ],
)
def test_equals_the_reference(size, compact, transposed):
    hidden, unembedding, targets, where, weights = inputs(*size, transposed=transposed)
    run = functools.partial(
        value_and_gradients, hidden, unembedding, targets, weights, transposed=transposed, softcap=3.0
    )
    for wanted in (where,) if transposed else (None, where):
        expected = run(where=wanted, implementation="reference")
        close(run(where=wanted, compact=compact), expected)


@pytest.mark.parametrize("compact, softcap", [(False, None), (True, 3.0)])
def test_each_gradient_alone_equals_both(compact, softcap):
    """The forward pass' shortcut for a frozen unembedding, and the backward pass without the hidden gradient."""
    hidden, unembedding, targets, where, weights = inputs(601, 3, 12_001)
    run = functools.partial(
        value_and_gradients, hidden, unembedding, targets, weights, compact=compact, softcap=softcap
    )
    values, d_hidden, d_unembedding = run(where=where)
    close(run(where=where, wrt=(0,)), (values, d_hidden))
    close(run(where=where, wrt=(1,)), (values, d_unembedding))


def test_numerical_gradients():
    hidden, unembedding, targets, where, _ = inputs(4, 3, 5)
    for options in ({}, {"softcap": 2.0, "where": where, "compact": True}):
        run = lambda *x, options=options: compiled(*x, targets, **options)
        check_grads(run, (hidden, unembedding), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_bfloat16_is_near_float32():
    hidden, unembedding, targets, _, weights = inputs(64, 16, 300, jnp.bfloat16)
    for wrt in ((0, 1), (0,)):
        got = value_and_gradients(hidden, unembedding, targets, weights, wrt=wrt)
        assert [x.dtype for x in got] == [jnp.float32, *[jnp.bfloat16] * len(wrt)]
        wide = (hidden.astype(jnp.float32), unembedding.astype(jnp.float32))
        expected = value_and_gradients(*wide, targets, weights, wrt=wrt)
        close([x.astype(jnp.float32) for x in got], expected, tolerance=0.02)


@pytest.mark.parametrize("compact", [False, True])
def test_extreme_logits(compact):
    """Logits of +-1e4: a certain token costs 0, an impossible one 2e4, and nothing is nan."""
    hidden = jnp.array([[1e4], [1e4], [-1e4]])
    unembedding = jnp.array([[1.0, -1.0, 0.0]])
    targets, where = jnp.array([0, 1, 2]), jnp.array([True, True, True])
    with jax.debug_nans(True):
        run = functools.partial(
            value_and_gradients, hidden, unembedding, targets, jnp.ones(3), where=where, compact=compact
        )
        values, d_hidden, d_unembedding = run()
        (_, alone) = run(wrt=(0,))
    np.testing.assert_allclose(values, [0.0, -2e4, -1e4])
    np.testing.assert_allclose(d_hidden[:, 0], [0.0, -2.0, 1.0])  # w[target] - w[certain one]
    np.testing.assert_allclose(alone, d_hidden)
    np.testing.assert_allclose(d_unembedding, [[-1e4, 2e4, -1e4]])


@pytest.mark.parametrize("compact", [False, True])
def test_unwanted_tokens_count_for_nothing(compact):
    """They may hold nan and ids out of range; all, none and some may be wanted."""
    hidden, unembedding, targets, some, weights = inputs(600, 3, 11)
    for where in (some, some & False, some | True):
        run = functools.partial(value_and_gradients, where=where, compact=compact)
        clean = run(hidden, unembedding, targets, weights)
        dirty = run(jnp.where(where[:, None], hidden, jnp.nan), unembedding, jnp.where(where, targets, -100), weights)
        close(dirty, clean, tolerance=0)
        assert not clean[0][~where].any() and not clean[1][~where].any()
        _, alone = run(jnp.where(where[:, None], hidden, jnp.nan), unembedding, targets, weights, wrt=(0,))
        close([alone], [clean[1]])


def test_compaction_loops_over_wanted_blocks_only():
    """All blocks stand in a loop whose count, that of the blocks which wanted tokens fill, is known at run time."""
    hidden, unembedding, targets, where, _ = inputs(1100, 2, 11)
    looped = lambda **options: str(
        jax.make_jaxpr(lambda where: token_logprobs(hidden, unembedding, targets, where=where, **options))(where)
    )
    assert "while[" in looped(compact=True) and "while[" not in looped(compact=False)
    for count in (1, 220, 221, 1100):  # blocks of 220
        where = jnp.zeros(1100, bool).at[np.random.default_rng(0).permutation(1100)[:count]].set(True)
        got = compiled(hidden, unembedding, targets, where=where, compact=True)
        close([got], [compiled(hidden, unembedding, targets, where=where, implementation="reference")])


def test_targets_outside_of_the_vocabulary_are_nan():
    hidden, unembedding, _, _, _ = inputs(3, 3, 5)
    for implementation in ("xla", "reference"):
        got = compiled(hidden, unembedding, jnp.array([-1, 4, 5]), implementation=implementation)
        assert jnp.isnan(got).tolist() == [True, False, True]


# What is computed.


def products(step, *arguments):
    return str(jax.make_jaxpr(step)(*arguments)).count("dot_general[")


WRAPS = {
    "plain": lambda f: f,
    "jit": jax.jit,
    "scan": lambda f: lambda h, u: jax.lax.scan(lambda c, _: (c + f(h, u), None), 0.0, length=2)[0],
    "vmap": lambda f: lambda h, u: jax.vmap(f, (0, None))(jnp.stack([h, h]), u).sum(),
}


@pytest.mark.parametrize("name", WRAPS)
def test_a_frozen_unembedding_costs_two_products(name):
    """Logits and the direction forward, nothing backward; 1 + 3 when both are trained; 1 for values alone."""
    hidden, unembedding, targets, _, _ = inputs(4, 3, 5)
    run = WRAPS[name](lambda h, u: token_logprobs(h, u, targets).sum())
    assert products(run, hidden, unembedding) == 1
    assert products(jax.value_and_grad(run), hidden, unembedding) == 2
    assert products(jax.value_and_grad(run, 1), hidden, unembedding) == 1 + 2
    assert products(jax.value_and_grad(run, (0, 1)), hidden, unembedding) == 1 + 3


@pytest.mark.parametrize("wrt", [(0,), (1,), (0, 1)])
def test_under_scan_and_checkpoint(wrt):
    hidden, unembedding, targets, where, _ = inputs(12, 3, 50)

    def total(h, u, **options):
        def step(carry, x):
            h, targets, where = x
            return carry + token_logprobs(h, u, targets, where=where, **options).sum(), None

        parts = (h.reshape(3, 4, 3), targets.reshape(3, 4), where.reshape(3, 4))
        return jax.lax.scan(jax.checkpoint(step), jnp.float32(0), parts)[0]

    grad = lambda **options: jax.jit(jax.grad(functools.partial(total, **options), wrt))(hidden, unembedding)
    expected = grad(implementation="reference")
    for compact in (False, True):
        close(grad(compact=compact), expected)


# What is held.


@pytest.mark.parametrize("wrt, compact", [((), False), ((0,), True), ((0, 1), False), ((0, 1), True)])
def test_memory_does_not_hold_tokens_by_vocabulary(wrt, compact):
    tokens, dim, vocab = 4096, 8, 60_000
    hidden, unembedding, targets, where, weights = inputs(8, 2, 2)  # dtypes only are used
    shapes = ((tokens, dim), (dim, vocab), (tokens,), (tokens,))
    arrays = [
        jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(shapes, (hidden, unembedding, targets, weights), strict=True)
    ]
    where = jax.ShapeDtypeStruct((tokens,), bool)
    lowered = value_and_gradients.lower(*arrays, wrt=wrt, where=where, compact=compact) if wrt else compiled.lower(
        *arrays[:3], where=where, compact=compact
    )  # fmt: skip
    assert lowered.compile().memory_analysis().temp_size_in_bytes < tokens * vocab * 4 / 8


def test_an_embedding_table_is_not_copied():
    """Rows of a tied table are read as they lie."""
    tokens, dim, vocab = 600, 64, 60_000
    hidden, table, targets, _, _ = inputs(8, 2, 2, transposed=True)
    arrays = [
        jax.ShapeDtypeStruct(s, x.dtype) for s, x in zip(((tokens, dim), (vocab, dim)), (hidden, table), strict=True)
    ]
    targets = jax.ShapeDtypeStruct((tokens,), targets.dtype)
    step = jax.grad(lambda h, table, targets: token_logprobs(h, table, targets, transposed=True).sum())
    used = jax.jit(step).lower(*arrays, targets).compile().memory_analysis().temp_size_in_bytes
    assert used < 3 * 2**21 * 4 + 2**21  # three arrays of one block of logits (of about 2 ** 21), and little else
    copied = jax.grad(lambda h, table, targets: token_logprobs(h, table.T, targets).sum())
    assert jax.jit(copied).lower(*arrays, targets).compile().memory_analysis().temp_size_in_bytes > used


# Where it runs.


def mesh_of(**axes):
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))


@pytest.mark.parametrize("wrt", [(0,), (0, 1)])
def test_sharded_tokens_stay_where_they_are(wrt):
    hidden, unembedding, targets, where, weights = inputs(64, 3, 40_000)
    expected = value_and_gradients(hidden, unembedding, targets, weights, wrt=wrt, where=where)
    mesh = mesh_of(data=8)
    rows = NamedSharding(mesh, P("data"))
    put = lambda x: jax.device_put(x, rows)
    whole = jax.device_put(unembedding, NamedSharding(mesh, P()))
    got = value_and_gradients(put(hidden), whole, put(targets), put(weights), wrt=wrt, where=put(where))
    close(got, expected)
    assert got[0].sharding.is_equivalent_to(rows, 1) and got[1].sharding.is_equivalent_to(rows, 2)
    lowered = value_and_gradients.lower(put(hidden), whole, put(targets), put(weights), wrt=wrt, where=put(where))
    assert "all-gather" not in lowered.compile().as_text()


@pytest.mark.parametrize(
    "wrt, transposed, compact", [((0,), False, True), ((0,), True, False), ((1,), True, True), ((0, 1), False, False)]
)
def test_a_vocabulary_split_over_devices(wrt, transposed, compact):
    """In `shard_map`, value and gradients are those of the whole; tokens are split over another axis at once."""
    hidden, unembedding, targets, where, weights = inputs(12, 3, 40, transposed=transposed)
    options = {"softcap": 3.0, "transposed": transposed}
    expected = value_and_gradients(hidden, unembedding, targets, weights, wrt=wrt, where=where, **options)
    mesh = mesh_of(data=2, tensor=4)
    shard, rows = P("tensor") if transposed else P(None, "tensor"), P("data")

    def run(*arrays):
        return jax.shard_map(
            lambda h, u, t, w: token_logprobs(h, u, t, where=w, axis_name="tensor", compact=compact, **options),
            mesh=mesh, in_specs=(rows, shard, rows, rows), out_specs=rows,
        )(*arrays)  # fmt: skip

    @jax.jit
    def both(hidden, unembedding):
        def chosen(*differentiated):
            arrays = [hidden, unembedding]
            for i, x in zip(wrt, differentiated, strict=True):
                arrays[i] = x
            return run(*arrays, targets, where)

        values, back = jax.vjp(chosen, *((hidden, unembedding)[i] for i in wrt))
        return values, *back(weights)

    close(both(hidden, unembedding), expected)


def test_the_reference_splits_the_vocabulary_too():
    hidden, unembedding, targets, _, weights = inputs(6, 3, 40)
    run = jax.shard_map(
        lambda h, u, t: token_logprobs(h, u, t, axis_name="tensor", implementation="reference"),
        mesh=mesh_of(tensor=8), in_specs=(P(), P(None, "tensor"), P()), out_specs=P(),
    )  # fmt: skip
    values, back = jax.vjp(jax.jit(lambda h, u: run(h, u, targets)), hidden, unembedding)
    close((values, *back(weights)), value_and_gradients(hidden, unembedding, targets, weights))


def test_a_frozen_split_unembedding_costs_two_products():
    hidden, unembedding, targets, _, _ = inputs(4, 3, 8)
    run = jax.shard_map(
        lambda h, u: token_logprobs(h, u, targets, axis_name="tensor"),
        mesh=mesh_of(tensor=8), in_specs=(P(), P(None, "tensor")), out_specs=P(),
    )  # fmt: skip
    assert products(jax.value_and_grad(lambda h, u: run(h, u).sum()), hidden, unembedding) == 2


def test_wrong_arguments_say_so():
    hidden, unembedding, targets, _, _ = inputs(4, 3, 5)
    with pytest.raises(ValueError, match="transposed=True"):
        token_logprobs(hidden, unembedding.T, targets)
    with pytest.raises(ValueError, match="transposed=False"):
        token_logprobs(hidden, unembedding, targets, transposed=True)
    with pytest.raises(ValueError, match="softcap=-1"):
        token_logprobs(hidden, unembedding, targets, softcap=-1.0)
    with pytest.raises(ValueError, match="xla, pallas_tpu, reference"):
        token_logprobs(hidden, unembedding, targets, implementation="pallas")
