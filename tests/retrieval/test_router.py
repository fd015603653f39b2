"""The choice of a domain: against the conditions of a minimum in numpy and CLIP's scoring, and search in one base only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import sharding
from jaxmethods.retrieval import Base, RetrieverConfig, Router, find, search, train_router, zero_shot
from jaxmethods.retrieval.retriever import init

RNG = np.random.default_rng(0)
DOMAINS = np.repeat(np.arange(3), 30)
FEATURES = (4 + 2 * RNG.normal(size=(90, 6)) + np.eye(3, 6)[DOMAINS] * 4).astype(np.float32)


def test_the_trained_router_is_at_the_minimum():
    """At the minimum of a convex function its gradient, written out in numpy, is 0; and it is one of standardised features."""
    router = train_router(FEATURES, DOMAINS, decay=0.05)
    mean, std = FEATURES.mean(0), FEATURES.std(0)
    x = np.float64(FEATURES - mean) / std
    kernel = np.float64(router.params["last"]["kernel"]) * std[:, None]
    logits = np.float64(FEATURES) @ np.float64(router.params["last"]["kernel"]) + np.float64(
        router.params["last"]["bias"]
    )
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(3)[DOMAINS]) / 90
    np.testing.assert_allclose(x.T @ error + 0.05 * kernel, 0, atol=1e-4)
    np.testing.assert_allclose(error.sum(0), 0, atol=1e-4)
    route = router(FEATURES)
    np.testing.assert_allclose(route.probabilities, p, atol=1e-4)
    np.testing.assert_array_equal(route.domain, p.argmax(1))
    assert (route.domain == DOMAINS).mean() > 0.8
    order = RNG.permutation(90)
    again = train_router(FEATURES[order], DOMAINS[order], decay=0.05)(FEATURES)
    np.testing.assert_allclose(again.probabilities, p, atol=1e-3)


def test_one_domain_is_no_choice():
    route = train_router(FEATURES, np.zeros(90, int), steps=3)(FEATURES)
    assert (route.domain == 0).all() and (route.probabilities == 1).all()
    route = zero_shot([FEATURES[:2]])(FEATURES)
    assert (route.domain == 0).all() and (route.probabilities == 1).all()


def test_zero_shot_in_numpy():
    prompts = [RNG.normal(size=(count, 6)).astype(np.float32) for count in (1, 3, 2)]
    route = zero_shot(prompts, temperature=0.07)(FEATURES)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    directions = np.stack([unit(unit(of).mean(0)) for of in prompts])
    logits = unit(FEATURES) @ directions.T / 0.07
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(route.probabilities, p, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(route.domain, logits.argmax(1))
    longer = zero_shot([9 * of for of in prompts], temperature=0.07)(3 * FEATURES)
    np.testing.assert_allclose(longer.probabilities, p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "make", [lambda: zero_shot([FEATURES[:2], FEATURES[2:3]]), lambda: train_router(FEATURES, DOMAINS, steps=2)]
)
def test_saved_and_loaded(tmp_path, make):
    router = make()
    router.save(tmp_path / "r.safetensors")
    again = Router.load(tmp_path / "r.safetensors")
    assert again.cosine == router.cosine
    np.testing.assert_array_equal(again(FEATURES).probabilities, router(FEATURES).probabilities)
    init(jax.random.key(0), 4, 3).save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is no router"):
        Router.load(tmp_path / "other.safetensors")


SIZES = 40, 3, 25


@pytest.fixture(scope="module")
def bases():
    """Three domains with retrievers of different widths; the second base is smaller than k."""
    made = []
    for number, (size, width) in enumerate(zip(SIZES, (5, 4, 7), strict=True)):
        retriever = init(jax.random.key(number), 6, 8, RetrieverConfig(width=width))
        reports = retriever.embed_targets(RNG.normal(size=(size, 8)).astype(np.float32))
        made.append(Base(retriever, reports, np.arange(size) // 2))
    return made


@pytest.mark.parametrize("devices", [1, 8])
def test_a_query_sees_its_domain_only(bases, devices):
    mesh = None if devices == 1 else sharding.make_mesh({"data": 8})
    domain = RNG.integers(0, 3, 90)
    found = find(FEATURES, domain, bases, 5, mesh=mesh)
    for i in range(90):
        base = bases[domain[i]]
        scores = np.asarray(base.reports) @ np.asarray(base.retriever.embed_queries(FEATURES[i : i + 1]))[0]
        best = np.argsort(-scores)[:5]
        np.testing.assert_array_equal(found.rows[i, : len(best)], best)
        np.testing.assert_allclose(found.scores[i, : len(best)], scores[best], atol=1e-5)
        assert (found.rows[i, len(best) :] == -1).all() and np.isneginf(found.scores[i, len(best) :]).all()
    # What stands in the other bases is of no consequence.
    other = [bases[0], *(base._replace(reports=jnp.ones_like(base.reports)) for base in bases[1:])]
    again = find(FEATURES, domain, other, 5, mesh=mesh)
    np.testing.assert_array_equal(again.rows[domain == 0], found.rows[domain == 0])
    assert (again.rows != found.rows).any()


def test_one_base_is_plain_search(bases):
    found = find(FEATURES, np.zeros(90, int), bases[:1], 4)
    scores, rows = search.top_k(bases[0].retriever.embed_queries(FEATURES), bases[0].reports, 4)
    np.testing.assert_array_equal(found.rows, rows)
    np.testing.assert_allclose(found.scores, scores, atol=1e-6)


def test_no_query_gets_its_own_group(bases):
    groups, domain = RNG.integers(0, 12, 90), RNG.integers(0, 3, 90)
    found = find(FEATURES, domain, bases, 40, groups=groups)
    for i in range(90):
        rows = found.rows[i][found.rows[i] >= 0]
        allowed = np.flatnonzero(np.asarray(bases[domain[i]].groups) != groups[i])
        assert sorted(rows) == allowed.tolist()


def test_wrong_arguments_say_so(bases):
    with pytest.raises(ValueError, match="decay=0 must be positive"):
        train_router(FEATURES, DOMAINS, decay=0)
    with pytest.raises(ValueError, match=r"domains go from 0 to 2 without \[1\]"):
        train_router(FEATURES, np.where(DOMAINS == 1, 0, DOMAINS))
    with pytest.raises(ValueError, match="90 rows of features and 89 domains"):
        train_router(FEATURES, DOMAINS[1:])
    with pytest.raises(ValueError, match=r"the domains have \[2, 0\] prompts"):
        zero_shot([FEATURES[:2], FEATURES[:0]])
    with pytest.raises(ValueError, match="temperature=0 must be positive"):
        zero_shot([FEATURES[:2]], temperature=0)
    with pytest.raises(ValueError, match=r"this router reads \[N, 6\]"):
        zero_shot([FEATURES[:2]])(FEATURES[:, :5])
    with pytest.raises(ValueError, match="domains go from 0 to 2 and there are 2 bases"):
        find(FEATURES, DOMAINS, bases[:2], 3)
    with pytest.raises(ValueError, match="90 queries, 89 domains; give one"):
        find(FEATURES, DOMAINS[1:], bases, 3)
    with pytest.raises(ValueError, match="no base has groups"):
        find(FEATURES, DOMAINS, [base._replace(groups=None) for base in bases], 3, groups=DOMAINS)
    with pytest.raises(ValueError, match="k=0 must be at least 1"):
        find(FEATURES, DOMAINS, bases, 0)
