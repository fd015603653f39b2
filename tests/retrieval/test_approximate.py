"""Graph search against the exact one: all of a small base, most of a larger one, and never what is forbidden."""

import builtins

import numpy as np
import pytest

from jaxmethods.retrieval import approximate, search


def unit(rows, dim, seed):
    x = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def graph():
    pytest.importorskip("hnswlib", reason="needs hnswlib: pip install 'jaxmethods[retrieval]'")
    return approximate.graph_of(unit(2000, 24, 1), threads=1)


@pytest.mark.parametrize("by", ["nothing", "ids", "mask"])
def test_looking_at_everything_is_exact(graph, by):
    queries, candidates = unit(9, 24, 2), unit(2000, 24, 1)
    ids = np.arange(9) % 4, np.arange(2000) % 40
    ids[0][8] = 99  # of no candidate's group
    no = {"nothing": None, "ids": ids, "mask": ids[0][:, None] == ids[1]}[by]
    scores, rows = approximate.top_k(queries, graph, 7, forbidden=no, breadth=2000, threads=1)
    exact = search.top_k(queries, candidates, 7, forbidden=no)
    np.testing.assert_array_equal(rows, exact[1])
    np.testing.assert_allclose(scores, exact[0], atol=1e-6)
    if by != "nothing":
        assert not (ids[0][:, None] == ids[1][rows]).any()


def test_most_of_what_is_near_is_found(graph):
    queries, candidates = unit(64, 24, 3), unit(2000, 24, 1)
    right = np.asarray(search.top_k(queries, candidates, 10)[1])
    share = lambda breadth: np.mean(
        [
            len(np.intersect1d(a, b)) / 10
            for a, b in zip(approximate.top_k(queries, graph, 10, breadth=breadth)[1], right, strict=True)
        ]
    )
    assert share(10) < share(400) and share(400) > 0.98


def test_too_few_are_allowed():
    pytest.importorskip("hnswlib", reason="needs hnswlib: pip install 'jaxmethods[retrieval]'")
    candidates = unit(6, 5, 0)
    scores, rows = approximate.top_k(
        candidates[:2], candidates, 4, forbidden=(np.array([7, 8]), np.array([7] * 4 + [8, 1]))
    )
    exact = search.top_k(candidates[:2], candidates, 4, forbidden=(np.array([7, 8]), np.array([7] * 4 + [8, 1])))
    np.testing.assert_array_equal(rows, exact[1])
    np.testing.assert_allclose(scores, exact[0], atol=1e-6)
    assert (rows[0, 2:] == -1).all() and np.isneginf(scores[0, 2:]).all()


def test_wrong_arguments_say_so(graph):
    with pytest.raises(ValueError, match="queries have width 5 and candidates 24"):
        approximate.top_k(unit(2, 5, 0), graph, 1)
    with pytest.raises(ValueError, match="k=2001 must be between 1 and the number of candidates, 2000"):
        approximate.top_k(unit(2, 24, 0), graph, 2001)
    with pytest.raises(ValueError, match="forbidden is of 3 queries and 2000 candidates; there are 2 and 2000"):
        approximate.top_k(unit(2, 24, 0), graph, 1, forbidden=(np.zeros(3, int), np.zeros(2000, int)))
    with pytest.raises(ValueError, match="0 candidates"):
        approximate.graph_of(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match=r"candidates\[1\] has a value that is not finite"):
        approximate.graph_of(np.array([[1.0], [np.nan]], np.float32))


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__
    refuse = lambda name, *more, **named: (
        (_ for _ in ()).throw(ImportError()) if name == "hnswlib" else real(name, *more, **named)
    )
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=r"pip install 'jaxmethods\[retrieval\]'"):
        approximate.graph_of(unit(3, 4, 0))
