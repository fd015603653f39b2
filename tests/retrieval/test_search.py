"""Exact search against numpy's full sort, over blocks and devices, with equal and forbidden vectors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmethods.retrieval import search, top_k

RNG = np.random.default_rng(0)
QUERIES, BASE = RNG.normal(size=(5, 7)).astype(np.float32), RNG.normal(size=(40, 7)).astype(np.float32)


def by_hand(queries, base, k, similarity="cosine", where=None):
    """(similarities, indices) by a full, stable sort in float64."""
    q, b = queries.astype(np.float64), base.astype(np.float64)
    if similarity == "cosine":
        q, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-300) for x in (q, b))
    products = q @ b.T
    if where is not None:
        products = np.where(where, products, -np.inf)
    order = np.argsort(-products, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(products, order, axis=1)
    return values, np.where(np.isinf(values), -1, order)


@pytest.fixture(params=[search.BLOCK, 16, 7], ids=["one block", "blocks", "blocks smaller than k"])
def block(request, monkeypatch):
    monkeypatch.setattr(search, "BLOCK", request.param)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("k", [1, 10, 40])
def test_as_a_full_sort_says(block, similarity, k):
    values, order = by_hand(QUERIES, BASE, k, similarity)
    found = jax.jit(lambda q, b: top_k(q, b, k, similarity=similarity))(QUERIES, BASE)
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.similarities, values, atol=1e-5)


def test_forbidden_vectors_are_never_found(block):
    for where in (RNG.random(40) < 0.3, RNG.random((5, 40)) < 0.1):
        values, order = by_hand(QUERIES, BASE, 12, where=where)
        found = top_k(QUERIES, BASE, 12, where=where)
        np.testing.assert_array_equal(found.indices, order)
        np.testing.assert_allclose(found.similarities, values, atol=1e-5)
    assert (top_k(QUERIES, BASE, 12, where=np.zeros(40, bool)).indices == -1).all()


def test_of_equal_vectors_the_first_is_found(block):
    twice = np.concatenate([BASE[:9], BASE[:9], BASE[:9]])
    found = np.asarray(top_k(BASE[:9], twice, 3).indices)
    np.testing.assert_array_equal(found, np.arange(9)[:, None] + [0, 9, 18])


def test_no_length_no_similarity():
    found = top_k(np.zeros((1, 7), np.float32), BASE, 2)
    np.testing.assert_array_equal(found.similarities, 0)
    np.testing.assert_array_equal(found.indices, [[0, 1]])


@pytest.mark.parametrize("forbids", [False, True])
def test_split_over_devices(block, forbids):
    """Each device holds a part of the base; the indices are of the whole."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    where = RNG.random(40) < (0.5 if forbids else 2)
    split = jax.shard_map(
        lambda q, b, w: top_k(q, b, 6, where=w, axis_name="data"),
        mesh=mesh, in_specs=(P(), P("data"), P("data")), out_specs=P(),
    )  # fmt: skip
    found = jax.jit(split)(QUERIES, BASE, jnp.asarray(where))
    values, order = by_hand(QUERIES, BASE, 6, where=where)
    np.testing.assert_array_equal(found.indices, order)
    np.testing.assert_allclose(found.similarities, values, atol=1e-5)


def test_all_similarities_are_never_held(monkeypatch):
    monkeypatch.setattr(search, "BLOCK", 8)
    jaxpr = str(jax.make_jaxpr(lambda q, b: top_k(q, b, 3))(QUERIES, BASE))
    assert "f32[5,8]" in jaxpr and "f32[5,40]" not in jaxpr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(k=0), "k=0 must be between 1 and the 40 vectors"),
        (dict(k=41), "k=41 must be between 1 and the 40 vectors"),
        (dict(k=1, similarity="cosin"), "did you mean 'cosine'"),
    ],
)
def test_refuses(options, said):
    with pytest.raises(ValueError, match=said):
        top_k(QUERIES, BASE, **options)
    with pytest.raises(ValueError, match="queries have width 6 and the base 7"):
        top_k(QUERIES[:, :6], BASE, 1)
