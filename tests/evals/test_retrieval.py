"""Ranks and nearest neighbours against sorting in numpy, their laws, what they hold, and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmethods import sharding
from jaxmethods.evals import retrieval as program
from jaxmethods.evals.retrieval import (
    mean_reciprocal_rank,
    median_rank,
    modality_gap,
    precision_at_1,
    ranks,
    recall_at,
    retrieval,
    top_k,
)

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
    recalls = [float(recall_at(found, k)) for k in range(1, C + 1)]
    assert recalls == sorted(recalls) and recalls[-1] == 1 and recalls[0] < 1
    equal = ranks(np.ones_like(queries), np.ones_like(candidates), (query_ids, ids))
    np.testing.assert_array_equal(equal, [(ids != i).sum() for i in query_ids])  # all wrong ones before


def test_ids_that_differ_by_two_to_the_32_differ():
    same = np.eye(2, dtype=np.float32)
    ids = np.array([7, 7 + 2**32])
    np.testing.assert_array_equal(ranks(same[:1], same[::-1], (ids[:1], ids)), [1])


def test_five_captions_an_image_by_hand():
    """One number an embedding: scores are the captions' own for image 0, and their negatives for image 1."""
    images = np.array([[1.0], [-1.0]], np.float32)
    captions = np.array([[0.3, -0.9, -0.8, 0.1, 0.2], [0.9, 0.5, 0.4, -0.1, 0.8]], np.float32).reshape(10, 1)
    ids = np.repeat([0, 1], 5)
    # Image 0: 0.9, 0.8, 0.5, 0.4 of image 1 come before its best caption, 0.3. Image 1: 0.9 and 0.8 before its 0.1.
    np.testing.assert_array_equal(ranks(images, captions, (np.arange(2), ids)), [4, 2])
    found = retrieval(images, captions, np.arange(2), ids, ks=(1, 2, 3, 5))
    assert found.image_to_text.recall == {1: 0.0, 2: 0.0, 3: 0.5, 5: 1.0}
    assert found.image_to_text.mean_reciprocal_rank == pytest.approx((1 / 5 + 1 / 3) / 2)
    assert found.image_to_text.median_rank == 4.0
    # A caption finds its image first where its sign is the image's: three of five, and one of five.
    assert found.text_to_image.recall == pytest.approx({1: 0.4, 2: 1.0, 3: 1.0, 5: 1.0})
    assert found.text_to_image.mean_reciprocal_rank == pytest.approx(0.7)
    assert found.text_to_image.median_rank == 2.0
    assert found.modality_gap == pytest.approx(abs(captions.mean()))


def test_each_its_own_is_found_first():
    found = retrieval(np.eye(5), np.eye(5), np.arange(5), np.arange(5), ks=(1,))
    assert found.image_to_text == found.text_to_image == ({1: 1.0}, 1.0, 1.0)
    assert found.modality_gap == 0.0


def test_the_gap_is_the_distance_of_the_means():
    images, texts = normal(40, 6).astype(jnp.bfloat16), normal(30, 6, seed=1)
    gap = np.linalg.norm(np.asarray(images, np.float64).mean(0) - texts.mean(0))
    np.testing.assert_allclose(modality_gap(images, texts), gap, rtol=1e-5)


def test_what_is_made_of_ranks():
    found = np.array([0, 3, 1, 0, 9])
    assert [float(recall_at(found, k)) for k in (1, 2, 4, 10)] == pytest.approx([2 / 5, 3 / 5, 4 / 5, 1])
    assert float(mean_reciprocal_rank(found)) == pytest.approx((1 + 1 / 4 + 1 / 2 + 1 + 1 / 10) / 5)
    assert float(median_rank(found)) == 2.0
    assert float(median_rank(found[:4])) == 1.5


@pytest.mark.parametrize("padding", [0, 6])
def test_precision_at_1(padding):
    """Scores and their order in numpy, a copy of the right candidate, padding that would score highest."""
    queries, candidates = normal(20, 33), normal(20, 37, 33, seed=1)
    candidates[:8, 0] = queries[:8]
    candidates[:4, 36] = candidates[:4, 0]
    mask = None
    if padding:
        candidates = np.concatenate([candidates, np.repeat(9 * queries[:, None], padding, 1)], 1)
        mask = np.arange(37 + padding) < np.full((20, 1), 37)
    expected = [4 <= row < 8 or (row >= 8 and np.argmax(candidates[row, :37] @ queries[row]) == 0) for row in range(20)]
    np.testing.assert_array_equal(precision_at_1(queries, candidates, mask), expected)
    np.testing.assert_array_equal(jax.jit(precision_at_1)(queries, candidates, mask), expected)
    assert precision_at_1(queries, candidates[:, :1]).all()  # nobody else is there


def test_the_same_shapes_compile_once(mesh):
    # Numbers of rows that no other test has.
    before = program._ranks._cache_size(), program._top_k._cache_size(), program._first_is_best._cache_size()
    for seed in range(3):
        queries, candidates, query_ids, ids = with_ties(11, 19, seed)
        for on in (None, mesh):
            ranks(queries, candidates, (query_ids, ids), mesh=on)
            top_k(queries, candidates, 2, mesh=on)
        precision_at_1(queries, candidates[None, :5].repeat(11, 0))
    after = program._ranks._cache_size(), program._top_k._cache_size(), program._first_is_best._cache_size()
    assert np.subtract(after, before).tolist() == [2, 2, 1]


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
    nan = queries * np.nan
    assert not jax.jit(precision_at_1)(queries, np.stack([nan, nan], 1)).any()


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
    with pytest.raises(ValueError, match="k=0"):
        recall_at(np.zeros(3, int), 0)
    candidates[17, 1] = np.inf
    with pytest.raises(ValueError, match=r"candidates\[17\] has a value that is not finite"):
        ranks(queries, candidates, (query_ids, ids))
    queries[3, 0] = np.nan
    with pytest.raises(ValueError, match=r"queries\[3\] has"):
        top_k(queries, candidates, 1)

    queries, candidates, mask = normal(2, D), normal(2, 4, D), np.ones((2, 4), bool)
    with pytest.raises(ValueError, match=r"must be \[Q, D\] and \[Q, C, D\]"):
        precision_at_1(queries, candidates[:1])
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\)"):
        precision_at_1(queries, candidates, mask[:, :3])
    mask[1, 3], candidates[1, 3] = False, np.nan  # padding may hold anything
    precision_at_1(queries, candidates, mask)
    with pytest.raises(ValueError, match=r"candidates\[1\] has"):
        precision_at_1(queries, candidates)
    mask[1, 0] = False
    with pytest.raises(ValueError, match="candidate 0 of row 1"):
        precision_at_1(queries, candidates, mask)
