"""Plans: each example in one row, no row too full, few rows; and rows laid out by hand."""

import numpy as np
import pytest

from jaxmethods.data import Example, Examples, PackedRows, best_fit, one_each


def test_a_plan_by_hand():
    """Longest first: 7 opens row 0; 5 row 1; 4 row 2; 3 fits best where 5 is (8 full), 2 with 4, 1 with 7."""
    plan = best_fit(np.array([1, 5, 3, 7, 2, 4]), 8)
    assert [row.tolist() for row in plan] == [[3, 0], [1, 2], [5, 4]]


def test_laws_of_plans():
    rng = np.random.default_rng(0)
    for _ in range(100):
        capacity = int(rng.integers(1, 60))
        lengths = rng.integers(1, capacity + 1, rng.integers(0, 80))
        plan = best_fit(lengths, capacity)
        assert sorted(plan.examples.tolist()) == list(range(len(lengths)))  # each example exactly once
        fills = np.array([lengths[row].sum() for row in plan])
        assert (fills <= capacity).all() and all(len(row) for row in plan)
        fewest = max(-(-int(lengths.sum()) // capacity), int((lengths > capacity / 2).sum()))  # a lower bound
        assert len(plan) <= 11 / 9 * max(fewest, 1) * 1.5
        if len(fills) > 1:  # no two rows could have been one
            two = np.sort(fills)[:2]
            assert two.sum() > capacity
        again = best_fit(lengths, capacity)
        assert np.array_equal(plan.examples, again.examples) and np.array_equal(plan.starts, again.starts)


def test_pieces_that_fit_exactly_leave_no_gap():
    """Rows cut at random into pieces are put together again with nothing to spare, where sizes are powers of two."""
    rng = np.random.default_rng(1)
    lengths = rng.choice([1, 2, 4, 8, 16], 400)
    lengths = np.r_[lengths, np.ones(-lengths.sum() % 32, int)]
    assert len(best_fit(lengths, 32)) == lengths.sum() // 32


def test_plans_refuse_what_cannot_be_packed():
    with pytest.raises(ValueError, match=r"lengths must lie in 1..4 to be packed; got 2..5"):
        best_fit(np.array([2, 5]), 4)
    with pytest.raises(ValueError, match="got 0"):
        best_fit(np.array([0, 3]), 4)
    with pytest.raises(IndexError, match="the plan has 2 rows; none has index 2"):
        one_each(2)[2]


def test_a_packed_row_by_hand():
    examples = Examples.of(
        Example(np.array(tokens, np.int32), np.array(mask, bool))
        for tokens, mask in (([5, 6, 7], [0, 1, 1]), ([8, 9], [0, 1]))
    )
    rows = PackedRows(examples, best_fit(examples.lengths, 6), 6)
    assert len(rows) == 1
    expected = {
        "tokens": [5, 6, 7, 8, 9, 0],
        "target_mask": [False, True, True, False, True, False],
        "segment_ids": [1, 1, 1, 2, 2, 0],
        "positions": [0, 1, 2, 0, 1, 0],
    }
    assert {name: array.tolist() for name, array in rows[0].items()} == expected
    dtypes = {name: array.dtype for name, array in rows[0].items()}
    assert dtypes == {"tokens": np.int32, "target_mask": bool, "segment_ids": np.int32, "positions": np.int32}
    alone = PackedRows(examples, one_each(2), 6)
    assert [alone[i]["tokens"].tolist() for i in (0, 1)] == [[5, 6, 7, 0, 0, 0], [8, 9, 0, 0, 0, 0]]
    assert alone[1]["segment_ids"].tolist() == [1, 1, 0, 0, 0, 0]


def test_rows_hold_every_example_whole():
    rng = np.random.default_rng(2)
    given = [Example(rng.integers(1, 99, n).astype(np.int32), np.arange(n) > n // 2) for n in rng.integers(1, 17, 60)]
    examples = Examples.of(given)
    rows = PackedRows(examples, best_fit(examples.lengths, 16), 16)
    found = []
    for row in (rows[i] for i in range(len(rows))):
        for segment in range(1, row["segment_ids"].max() + 1):
            at = row["segment_ids"] == segment
            assert (row["positions"][at] == np.arange(at.sum())).all()
            found.append((tuple(row["tokens"][at]), tuple(row["target_mask"][at])))
        padding = row["segment_ids"] == 0
        assert not row["target_mask"][padding].any() and not row["tokens"][padding].any()
    assert sorted(found) == sorted((tuple(one.tokens), tuple(one.target_mask)) for one in given)
