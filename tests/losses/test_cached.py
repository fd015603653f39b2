"""The gradient cache against the whole batch: values, gradients, dropout, devices, and what it holds."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods.losses import cached_info_nce, in_chunks, info_nce

ATOL = 1e-5
"""float32 sums in another order; gradients here are of order 0.1."""


def encode(params, rows):
    """Two layers with dropout by the rows' keys. `rows`: [n, 6] and keys, or only [n, 6]."""
    x, keys = rows if isinstance(rows, tuple) else (rows, None)
    hidden = jnp.tanh(x @ params["in"])
    if keys is not None:
        hidden *= 2.0 * jax.vmap(lambda key: jax.random.bernoulli(key, shape=(16,)))(keys)
    return hidden @ params["out"]


@pytest.fixture(scope="module")
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"in": (6, 16), "out": (16, 4), "other": (9, 4)}
    return {name: jax.random.normal(key, shape) for (name, shape), key in zip(shapes.items(), keys, strict=True)}


def rows(count, seed=1):
    """Inputs and keys of so many rows."""
    a, b = jax.random.split(jax.random.key(seed))
    return jax.random.normal(a, (count, 6)), jax.random.split(b, count)


def close(found, expected):
    assert np.abs(jax.tree.leaves(expected)[-1]).max() > 0.01
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=ATOL), found, expected)


def direct(encode, params, queries, targets, *, temperature, **options):
    return info_nce(encode(params, queries), encode(params, targets), temperature=temperature, **options)


@pytest.mark.parametrize("chunk", [1, 3, 99])
def test_value_and_gradients_are_those_of_the_whole_batch(params, chunk):
    """In parameters, temperature and inputs; with dropout; for chunks that come out even and that do not."""
    queries, targets = rows(10), rows(10, seed=2)
    with_x = lambda x, pair: (x, pair[1])

    def run(loss, **more):
        f = lambda params, x, temperature: loss(
            encode, params, with_x(x, queries), targets, temperature=temperature, **more
        )
        return jax.jit(jax.value_and_grad(f, (0, 1, 2)))(params, queries[0], jnp.float32(0.2))

    close(run(cached_info_nce, chunk=chunk), run(direct))


def test_two_encoders_and_hard_negatives(params):
    """Rows of different trees; negatives are encoded like targets, 7 of them in chunks of 3."""
    queries = rows(10)
    tokens = [jax.random.randint(jax.random.key(seed), (count, 5), 0, 9) for seed, count in ((3, 10), (4, 7))]
    targets, negatives = ({"tokens": x, "mask": x > 1} for x in tokens)
    encode_target = lambda params, t: (params["other"][t["tokens"]] * t["mask"][..., None]).sum(1)

    def whole(params):
        given = {"temperature": 0.2, "symmetric": False, "negatives": encode_target(params, negatives)}
        return info_nce(encode(params, queries), encode_target(params, targets), **given)

    cached = lambda params: cached_info_nce(
        (encode, encode_target), params, queries, targets, chunk=3, temperature=0.2, symmetric=False, negatives=negatives
    )  # fmt: skip
    close(*(jax.jit(jax.value_and_grad(f))(params) for f in (cached, whole)))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def of_24_rows(params):
    """Queries and targets, and the direct form's value and gradient."""
    queries, targets = rows(24), rows(24, seed=2)
    run = jax.jit(jax.value_and_grad(functools.partial(direct, encode, temperature=0.2)))
    return queries, targets, run(params, queries, targets)


def test_inside_shard_map(params, mesh, of_24_rows):
    """Three rows on each of eight devices in chunks of two, the gradient taken inside and outside."""
    queries, targets, expected = of_24_rows
    loss = functools.partial(cached_info_nce, encode, chunk=2, temperature=0.2, axis_name="data")
    split = functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data"), P("data")))
    for found in (
        jax.value_and_grad(split(loss, out_specs=P())),
        split(jax.value_and_grad(loss), out_specs=(P(), P())),
    ):
        close(jax.jit(found)(params, queries, targets), expected)


def test_gradients_are_summed_over_devices_once(params, mesh):
    """Not for every chunk: no sum over devices stands in a loop."""
    loss = functools.partial(cached_info_nce, encode, chunk=2, temperature=0.2, axis_name="data")
    split = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P())
    program = jax.make_jaxpr(split)(params, rows(64), rows(64, seed=2))

    def loops(jaxpr, inside=False):
        for equation in jaxpr.eqns:
            here = inside or equation.primitive.name == "scan"
            if here and equation.primitive.name.startswith("psum"):
                yield equation
            for inner in jaxprs_in_params(equation.params):
                yield from loops(inner, here)

    assert "psum" in str(program) and not list(loops(program.jaxpr))


def test_rows_that_jit_splits_stay_where_they_are(params, mesh, of_24_rows):
    """Rows over eight devices, chunks of 8: each device computes one row of each, and only embeddings are sent."""
    queries, targets, expected = of_24_rows
    placed = jax.device_put((queries, targets), NamedSharding(mesh, P("data")))
    loss = functools.partial(cached_info_nce, encode, chunk=8, temperature=0.2)
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, *placed).compile()
    close(compiled(params, *placed), expected)
    text = compiled.as_text()
    assert "f32[1,16]" in text  # activations of one row
    assert set(re.findall(r"= (\S*?\])\S* all-gather\(", text)) == {"f32[24,4]", "f32[24]"}
    assert not re.search("all-to-all|collective-permute", text)


def test_what_is_held_is_a_chunk(params):
    """Chunks of 8 of 256 rows, in an encoder whose activations are large: a small part of the direct form's temporaries."""

    def wide(params, x):
        for _ in range(4):
            x = jnp.sin(x[:, :, None] * jnp.linspace(0.5, 1.0, 256)).sum(1) @ params
        return x

    x = jax.ShapeDtypeStruct((256, 64), jnp.float32)
    run = lambda loss, **more: (
        jax.jit(jax.grad(lambda params, q, t: loss(wide, params, q, t, temperature=0.2, **more)))
        .lower(jax.ShapeDtypeStruct((256, 64), jnp.float32), x, x)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
    )
    assert run(cached_info_nce, chunk=8) < run(direct) / 10


def test_rows_are_not_copied():
    """Not even once, also where they are differentiated: 2 MiB of each side, 8 chunks."""
    rows, params = (jax.ShapeDtypeStruct((side, 4096), jnp.float32) for side in (128, 4))
    loss = lambda params, q, t: cached_info_nce(lambda p, x: x @ p.T, params, q, t, chunk=16, temperature=0.2)
    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(params, rows, rows).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 128 * 4096 * 4 / 2


def test_chunks_keep_the_order_of_rows_and_any_results():
    x = jnp.arange(7.0)
    found = in_chunks(lambda r: {"twice": 2 * r["x"], "pair": jnp.stack([r["x"], -r["x"]], 1)}, {"x": x}, 3)
    np.testing.assert_array_equal(found["twice"], 2 * x)
    np.testing.assert_array_equal(found["pair"], np.stack([x, -x], 1))


def test_jointly_with_a_mean_over_tokens(params):
    """One pass gives embeddings and sums over unequally many tokens of each row; chunks of 3 of 10 rows."""
    tokens = jax.random.randint(jax.random.key(5), (10, 7), 0, 9)
    batch = {"tokens": tokens, "counted": jnp.arange(7) < jnp.arange(1, 11)[:, None] % 7}

    def both(params, rows):
        vectors = params["other"][rows["tokens"]]
        nll = -jax.nn.log_softmax(vectors @ params["out"].T)[..., 0]
        return vectors.mean(1), jnp.where(rows["counted"], nll, 0.0).sum(1)

    def loss(params, run):
        embeddings, nll = run(lambda rows: both(params, rows))
        contrastive = info_nce(embeddings, jnp.roll(embeddings, 1, axis=1), temperature=0.2)
        return 0.7 * nll.sum() / batch["counted"].sum() + contrastive

    whole = lambda function: function(batch)
    close(
        *(
            jax.jit(jax.value_and_grad(functools.partial(loss, run=run)))(params)
            for run in (lambda function: in_chunks(function, batch, 3), whole)
        )
    )


def test_a_row_that_is_computed_twice_counts_once():
    """7 rows in chunks of at most 3: two rows fill up the last."""
    weights = jnp.arange(1.0, 8.0)
    total = jax.jit(lambda w: (in_chunks(lambda r: w * r**2, weights, 3) * weights).sum())
    np.testing.assert_allclose(jax.grad(total)(1.0), (weights**3).sum())


def test_wrong_arguments_say_so(params):
    x = jnp.ones((4, 6))
    with pytest.raises(ValueError, match="chunk=0 must be at least 1"):
        in_chunks(lambda r: r, x, 0)
    with pytest.raises(ValueError, match=r"theirs are \[3, 4\]"):
        in_chunks(lambda r: r, (x, x[:3]), 2)
    for chunk in (2, 4):
        with pytest.raises(ValueError, match=rf"shape \(\) for {chunk} rows"):
            in_chunks(lambda r: r.sum(), x, chunk)
    with pytest.raises(ValueError, match="row i of both is one pair"):
        cached_info_nce(encode, params, x, x[:3], chunk=2, temperature=0.1)
    with pytest.raises(ValueError, match="at least two pairs"):
        cached_info_nce(encode, params, x[:1], x[:1], chunk=2, temperature=0.1)
