"""MMed-RAG's number of reports and kinds of pairs: worked examples, plain loops, and laws."""

import itertools
import math

import jax
import numpy as np
import pytest

from jaxmethods.objectives import mmed_rag
from jaxmethods.objectives.mmed_rag import keep_contexts, preference_subsets

RNG = np.random.default_rng(0)
SORTED = -np.sort(-RNG.uniform(0.05, 1, (64, 6)), axis=1)


def in_a_loop(row, threshold, mode):
    for i in range(len(row) - 1):
        if row[i + 1] <= 0:
            return i + 1
        if mode == "consecutive" and math.log(row[i] / row[i + 1]) > threshold:
            return i + 1
        if mode == "top1" and row[0] / row[i + 1] >= threshold:
            return i + 1
    return len(row)


@pytest.mark.parametrize(
    ("mode", "threshold"), [("consecutive", 0.1), ("consecutive", 0.4), ("top1", 1.5), ("top1", 3.0)]
)
def test_as_a_loop_says(mode, threshold):
    rows = np.concatenate([SORTED, SORTED - 0.4]).astype(np.float32)
    got = keep_contexts(rows, threshold=threshold, mode=mode)
    assert got.tolist() == [in_a_loop(row, threshold, mode) for row in rows.tolist()]
    traced = jax.jit(lambda x: keep_contexts(x, threshold=threshold, mode=mode))(rows.reshape(2, 64, 6))
    np.testing.assert_array_equal(traced.ravel(), got)


def test_worked_examples():
    """Where the two modes part: no single jump, but far from the best."""
    falling, jump = np.array([0.9, 0.7, 0.55, 0.43, 0.33]), np.array([0.9, 0.88, 0.85, 0.4, 0.39])
    assert (
        keep_contexts(falling, threshold=math.log(1.5)) == 5 and keep_contexts(falling, threshold=1.5, mode="top1") == 2
    )
    assert keep_contexts(jump, threshold=math.log(1.5)) == 3 and keep_contexts(jump, threshold=1.5, mode="top1") == 3
    assert keep_contexts(np.array([-0.1, -0.2, -0.3]), threshold=9.0) == 1
    assert keep_contexts(np.array([0.5, -0.2, -0.3]), threshold=9.0, mode="top1") == 1


def test_laws():
    of = lambda threshold, rows=SORTED, **mode: np.asarray(keep_contexts(rows, threshold=threshold, **mode))
    np.testing.assert_array_equal(of(0.2, 7.0 * SORTED), of(0.2))
    np.testing.assert_array_equal(of(np.inf), 6)
    np.testing.assert_array_equal(of(1e-9), 1)
    np.testing.assert_array_equal(of(1e-9, np.full((3, 6), 0.4)), 6)
    counts = np.stack([of(t) for t in (0.05, 0.1, 0.3, 1.0)])
    assert (np.diff(counts, axis=0) >= 0).all() and counts.min() >= 1 and counts.max() <= 6
    two = SORTED[:, :2]
    np.testing.assert_array_equal(of(1.3, two, mode="top1"), of(math.log(1.3), two))
    later = SORTED.copy()
    later[:, -1] = 1e-6  # a later gap changes nothing where an earlier one has stopped
    stopped = of(0.2) < 5
    np.testing.assert_array_equal(of(0.2, later)[stopped], of(0.2)[stopped])


def test_truth_table():
    """(right without, with reports, with reports and noise) -> subsets."""
    cases = list(itertools.product((False, True), repeat=3))
    found = preference_subsets(*np.array(cases).T)
    told = {
        case: "".join(letter for letter, kind in zip("abc", found, strict=True) if kind[i])
        for i, case in enumerate(cases)
    }
    assert told == {
        (0, 0, 0): "", (0, 0, 1): "", (0, 1, 0): "b", (0, 1, 1): "ab",
        (1, 0, 0): "c", (1, 0, 1): "c", (1, 1, 0): "", (1, 1, 1): "a",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(threshold=0.0), "threshold=0.0 must be positive"),
        (dict(threshold=math.nan), "threshold=nan must be positive"),
        (dict(threshold=0.5, mode="first"), "mode='first' is unknown"),
    ],
)
def test_refuses(given, said):
    with pytest.raises(ValueError, match=said):
        keep_contexts(SORTED, **given)
    with pytest.raises(ValueError, match="sorted, the largest first"):
        mmed_rag.keep_contexts(SORTED[:, ::-1], threshold=0.5)
