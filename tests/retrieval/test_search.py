"""Ranks and nearest neighbours against sorting in numpy, their laws, what they hold, what is forbidden, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods import sharding
from jaxmethods.retrieval import search as program
from jaxmethods.retrieval.search import ranks, top_k

Q, C, D = 7, 23, 3


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that few rows take several, and the last is not full."""
    monkeypatch.setattr(program, "QUERIES", 3)
    monkeypatch.setattr(program, "CANDIDATES", 5)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def with_ties(queries=Q, candidates=C, seed=0):
    """Small whole numbers, exact in every dtype and order of sums, so that many scores are equal; and ids."""
    rng = np.random.default_rng(seed)
    draw = lambda rows: rng.integers(-2, 3, (rows, D)).astype(np.float32)
    ids = rng.integers(0, 4, candidates)
    ids[:4] = range(4)
    return draw(queries), draw(candidates), rng.integers(0, 4, queries), ids


def by_sorting(queries, candidates, right):
    """Where the first right one stands when candidates are sorted by score, with wrong ones first among equals."""
    scores = np.asarray(queries, np.float64) @ np.asarray(candidates, np.float64).T
    found = []
    for row, is_right in zip(scores, right, strict=True):
        order = sorted(range(len(row)), key=lambda j: (-row[j], is_right[j]))
        found.append(next(place for place, j in enumerate(order) if is_right[j]))
    return found


@pytest.mark.parametrize("queries, candidates, devices", [(Q, C, 1), (6, 10, 1), (2, 4, 1), (Q, C, 8), (2, 4, 8)])
def test_by_sorting_with_many_ties(small_blocks, mesh, queries, candidates, devices):
    """Several blocks and a rest; full blocks alone; less than one block, and devices without a candidate."""
    on = None if devices == 1 else mesh
    q, c, query_ids, ids = with_ties(queries, candidates)
    right = query_ids[:, None] == ids
    expected = by_sorting(q, c, right)
    got = ranks(q, c, (query_ids, ids), mesh=on)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(ranks(q.astype(jnp.bfloat16), jnp.asarray(c), right, mesh=on), expected)

    k = min(8, candidates)  # more than a block
    scores, rows = top_k(q, c, k, mesh=on)
    order = np.argsort(-(q @ c.T), axis=1, kind="stable")[:, :k]
    assert (scores.dtype, rows.dtype) == (jnp.float32, jnp.int32)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(q @ c.T, order, 1))


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("by", ["ids", "mask"])
def test_what_is_forbidden_is_never_found(small_blocks, mesh, devices, by):
    """By sorting what is left in numpy; where too little is left, -inf and row -1."""
    on = None if devices == 1 else mesh
    q, c, query_ids, ids = with_ties()
    query_ids[2], ids[5:] = (
        9,
        np.where(np.arange(5, C) < 18, 1, ids[5:]),
    )  # nothing forbidden to query 2, and much to group 1
    query_ids[3] = 1
    no = query_ids[:, None] == ids
    scores, rows = top_k(q, c, 12, forbidden=(query_ids, ids) if by == "ids" else no, mesh=on)
    allowed = np.where(no, -np.inf, q @ c.T)
    order = np.argsort(-allowed, axis=1, kind="stable")[:, :12]
    np.testing.assert_array_equal(scores, np.take_along_axis(allowed, order, 1))
    np.testing.assert_array_equal(rows, np.where(np.take_along_axis(no, order, 1), -1, order))
    assert (rows[3] == -1).any() and not (rows[2] == -1).any()
    inside = jax.jit(lambda q, c, *ids: top_k(q, c, 12, forbidden=ids, mesh=on))(q, c, query_ids, ids)
    np.testing.assert_array_equal(inside[1], rows)


def test_minus_zero_is_zero():
    scores, rows = top_k(np.array([[-1.0], [1.0]], np.float32), np.array([[0.0], [-0.0], [0.0]], np.float32), 3)
    np.testing.assert_array_equal(rows, [[0, 1, 2]] * 2)


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_devices_give_the_very_numbers_of_one(mesh):
    """Also from arrays that are split over the mesh already, and within the caller's own jit."""
    queries, candidates = normal(9, 33), normal(200, 33, seed=1)
    copies = np.concatenate([candidates, candidates])  # each right one ties with a wrong one, elsewhere in the block
    ids = np.arange(9), np.arange(400)
    alone, k_alone = ranks(queries, copies, ids), top_k(queries, copies, 20)
    np.testing.assert_array_equal(alone, by_sorting(queries, copies, ids[0][:, None] == ids[1]))
    split = jax.device_put(copies, NamedSharding(mesh, P(mesh.axis_names)))
    for given in (copies, split):
        np.testing.assert_array_equal(ranks(queries, given, ids, mesh=mesh), alone)
        jax.tree.map(np.testing.assert_array_equal, top_k(queries, given, 20, mesh=mesh), k_alone)
    np.testing.assert_array_equal(k_alone[1][:, 1::2], k_alone[1][:, ::2] + 200)  # the copy follows, with equal score
    inside = jax.jit(lambda q, c, *ids: ranks(q, c, ids, mesh=mesh))(queries, copies, *ids)
    np.testing.assert_array_equal(inside, alone)


def test_bfloat16_embeddings_are_scored_in_float32():
    """In bfloat16 these scores would have about a hundred values for two thousand candidates."""
    queries, candidates = (normal(n, 64, seed=n).astype(jnp.bfloat16) for n in (5, 2000))
    ids = np.arange(5), np.arange(2000)
    np.testing.assert_array_equal(
        ranks(queries, candidates, ids), by_sorting(queries, candidates, ids[0][:, None] == ids[1])
    )


def test_laws(small_blocks):
    queries, candidates, query_ids, ids = with_ties()
    found = np.asarray(ranks(queries, candidates, (query_ids, ids)))
    rng = np.random.default_rng(1)
    order, of_queries = rng.permutation(C), rng.permutation(Q)
    np.testing.assert_array_equal(ranks(queries, candidates[order], (query_ids, ids[order])), found)
    np.testing.assert_array_equal(
        ranks(queries[of_queries], candidates, (query_ids[of_queries], ids)), found[of_queries]
    )
    np.testing.assert_array_equal(ranks(4 * queries, candidates, (query_ids, ids)), found)
    np.testing.assert_array_equal(ranks(queries, candidates, (query_ids + 2**40, ids + 2**40)), found)
    assert len(set(found.tolist())) > 3
    equal = ranks(np.ones_like(queries), np.ones_like(candidates), (query_ids, ids))
    np.testing.assert_array_equal(equal, [(ids != i).sum() for i in query_ids])  # all wrong ones before


def test_ids_that_differ_by_two_to_the_32_differ():
    same = np.eye(2, dtype=np.float32)
    ids = np.array([7, 7 + 2**32])
    np.testing.assert_array_equal(ranks(same[:1], same[::-1], (ids[:1], ids)), [1])


def test_the_same_shapes_compile_once(mesh):
    # Numbers of rows that no other test has.
    before = program._ranks._cache_size(), program._top_k._cache_size()
    for seed in range(3):
        queries, candidates, query_ids, ids = with_ties(11, 19, seed)
        for on in (None, mesh):
            ranks(queries, candidates, (query_ids, ids), mesh=on)
            top_k(queries, candidates, 2, mesh=on)
            top_k(queries, candidates, 2, forbidden=(query_ids, ids), mesh=on)
    after = program._ranks._cache_size(), program._top_k._cache_size()
    assert np.subtract(after, before).tolist() == [2, 4]


def test_queries_by_candidates_are_never_held():
    """Three blocks of scores at most for ranks, and twice that to sort them; of 800 MB."""
    queries, candidates = (jax.ShapeDtypeStruct((rows, 64), jnp.float32) for rows in (4000, 50_000))
    ids = tuple(jax.ShapeDtypeStruct((rows,), jnp.int32) for rows in (4000, 50_000))
    block = program._block(queries, candidates)
    told = dict(count=50_000, block=block, mesh=None)
    scores = block[0] * block[1] * 4
    held = lambda lowered: lowered.compile().memory_analysis().temp_size_in_bytes
    assert held(program._ranks.lower(queries, candidates, ids, **told)) < 3 * scores
    assert held(program._top_k.lower(queries, candidates, None, k=10, **told)) < 6 * scores


def test_traced_arrays_are_not_checked():
    queries, candidates = np.eye(3, dtype=np.float32), np.eye(4, 3, dtype=np.float32)
    candidates[0] = np.nan
    found = jax.jit(lambda *x: ranks(*x[:2], x[2:]))(queries, candidates, np.array([0, 1, 9]), np.arange(4))
    np.testing.assert_array_equal(found, [3, 0, 4])  # its right one is nan: last; first; nothing to find
    scores, rows = jax.jit(lambda *x: top_k(*x, 4))(queries[1:2], candidates)
    np.testing.assert_array_equal(rows, [[1, 2, 3, 0]])


def test_wrong_arguments_say_so():
    queries, candidates, query_ids, ids = with_ties()
    with pytest.raises(ValueError, match=r"query 2 has no relevant candidate \(1 of 7"):
        ranks(queries, candidates, (np.where(np.arange(Q) == 2, 9, query_ids), ids))
    with pytest.raises(ValueError, match="query 0 has no relevant candidate"):
        ranks(queries, candidates, np.zeros((Q, C), bool))
    with pytest.raises(ValueError, match="relevant is of 6 queries and 23 candidates; there are 7 and 23"):
        ranks(queries, candidates, (query_ids[:6], ids))
    with pytest.raises(ValueError, match="width 3 and candidates 2"):
        ranks(queries, candidates[:, :2], (query_ids, ids))
    with pytest.raises(ValueError, match="0 candidates"):
        top_k(queries, candidates[:0], 1)
    with pytest.raises(ValueError, match="k=24 must be between 1 and the number of candidates, 23"):
        top_k(queries, candidates, 24)
    with pytest.raises(ValueError, match="k=0 must be between 1 and"):
        top_k(queries, candidates, 0)
    with pytest.raises(ValueError, match="forbidden is of 7 queries and 22 candidates; there are 7 and 23"):
        top_k(queries, candidates, 1, forbidden=(query_ids, ids[1:]))
    candidates[17, 1] = np.inf
    with pytest.raises(ValueError, match=r"candidates\[17\] has a value that is not finite"):
        ranks(queries, candidates, (query_ids, ids))
    queries[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"queries\[3\] has"):
        top_k(queries, candidates, 1)
