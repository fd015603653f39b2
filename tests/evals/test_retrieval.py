"""What is made of ranks, and precision at 1, by hand and in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.evals import retrieval as program
from jaxmethods.evals.retrieval import (
    mean_reciprocal_rank,
    median_rank,
    modality_gap,
    precision_at_1,
    ranks,
    recall_at,
    retrieval,
)


def normal(*shape, seed=0):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


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
    recalls = [float(recall_at(found, k)) for k in range(1, 12)]
    assert recalls == sorted(recalls) and recalls[-1] == 1
    assert float(median_rank(found)) == 2.0
    assert float(median_rank(found[:4])) == 1.5
    with pytest.raises(ValueError, match="k=0"):
        recall_at(found, 0)


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


def test_precision_compiles_once_and_traced_arrays_are_not_checked():
    queries = normal(3, 5)
    before = program._first_is_best._cache_size()
    for seed in range(3):
        precision_at_1(normal(13, 5, seed=seed), normal(13, 4, 5, seed=seed + 1))
    assert program._first_is_best._cache_size() - before == 1
    nan = queries * np.nan
    assert not jax.jit(precision_at_1)(queries, np.stack([nan, nan], 1)).any()


def test_wrong_arguments_say_so():
    queries, candidates, mask = normal(2, 3), normal(2, 4, 3), np.ones((2, 4), bool)
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
