"""FactTest's scores against plain numpy, their closed forms and limits; under jit and vmap, whatever the padding."""

import collections
import functools
import math

import jax
import numpy as np
import pytest

from jaxmethods.evals import facttest
from jaxmethods.evals.facttest import samples
from jaxmethods.evals.facttest.scores import plain_answer

RNG = np.random.default_rng(0)
B, N = 6, 8
COUNTS = np.array([8, 1, 2, 5, 7, 3])
MASK = np.arange(N) < COUNTS[:, None]
IDS = RNG.integers(0, 4, (B, N)).astype(np.int32)
LOGPS = RNG.normal(-2, 1, (B, N)).astype(np.float32)


def symmetric(low):
    s = RNG.uniform(low, 1, (B, N, N))
    s = (s + s.swapaxes(1, 2)) / 2
    s[:, np.arange(N), np.arange(N)] = 1
    return s.astype(np.float32)


SIMILARITY = symmetric(0.0)


def by_numpy(of):
    """`of` for each question without padding, in float64."""
    return [of(b, slice(0, COUNTS[b])) for b in range(B)]


def numpy_vanilla(b, real):
    _, counts = np.unique(IDS[b, real], return_counts=True)
    p = counts / counts.sum()
    return (p * np.log(p)).sum()


def cluster_likelihoods(b, real):
    ids, logps = IDS[b, real], LOGPS[b, real].astype(np.float64)
    return np.array([np.log(np.exp(logps[ids == c]).sum()) for c in np.unique(ids)])


def numpy_semantic(b, real):
    return (cluster_likelihoods(b, real) - 5).mean()


def numpy_semantic_entropy(b, real):
    p = np.exp(cluster_likelihoods(b, real))
    p /= p.sum()
    return (p * np.log(p)).sum()


def numpy_kernel(b, real, official=False):
    s = SIMILARITY[b, real, real].astype(np.float64)
    k = np.exp(-0.5 * (1 - s))
    values = np.linalg.eigvalsh(k / np.sqrt(np.outer(np.diag(k), np.diag(k))) / len(k))
    values = values[values > 1e-10]
    values = values if official else values / values.sum()
    return (values * np.log(values)).sum()


def numpy_degree(b, real):
    w = SIMILARITY[b, real, real].astype(np.float64)
    return -(len(w) ** 2 - w.sum()) / len(w) ** 2


CASES = {
    "vanilla": (facttest.vanilla_entropy, (IDS,), numpy_vanilla),
    "semantic": (facttest.mean_cluster_likelihood, (LOGPS, IDS), numpy_semantic),
    "semantic_entropy": (facttest.semantic_entropy, (LOGPS, IDS), numpy_semantic_entropy),
    "kernel": (facttest.kernel_entropy, (SIMILARITY,), numpy_kernel),
    "kernel, official": (
        functools.partial(facttest.kernel_entropy, official=True), (SIMILARITY,), functools.partial(numpy_kernel, official=True),
    ),
    "degree": (facttest.degree, (SIMILARITY,), numpy_degree),
    "self_check": (facttest.self_check, (np.exp(LOGPS),), lambda b, r: -np.exp(LOGPS[b, r].astype(np.float64)).mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_scores_agree_with_numpy(name):
    of, given, by = CASES[name]
    of, expected = jax.jit(of), by_numpy(by)
    found = of(*given, MASK)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=1e-6)
    twice = jax.jit(jax.vmap(of))(*(np.stack([x, x[::-1]]) for x in (*given, MASK)))
    np.testing.assert_allclose(twice, np.stack([expected, expected[::-1]]), atol=1e-6, rtol=1e-6)
    # What stands behind the mask counts for nothing, not even where it is no number.
    square = given[0].ndim == 3
    both = MASK[:, :, None] & MASK[:, None, :] if square else MASK
    if given[0].dtype == np.float32:
        hidden = np.where(both, given[0], np.nan).astype(np.float32)
        np.testing.assert_array_equal(of(hidden, *given[1:], MASK), found)
    whole = of(*given)
    np.testing.assert_allclose(whole[0], expected[0], atol=1e-6)  # a full row needs no mask
    order = RNG.permutation(N)
    shuffled = [x[:, order][:, :, order] if x.ndim == 3 else x[:, order] for x in given]
    np.testing.assert_allclose(of(*shuffled), whole, atol=1e-6)


def test_closed_forms():
    vanilla = jax.jit(facttest.vanilla_entropy)
    partitions = [
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 1],
        [0, 0, 0, 1, 1],
        [0, 0, 0, 1, 2],
        [0, 0, 1, 1, 2],
        [0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4],
    ]
    orders = np.array([[RNG.permutation(ids) for ids in partitions] for _ in range(20)], np.int32)
    values = np.asarray(vanilla(orders.reshape(-1, 5))).reshape(20, -1)
    np.testing.assert_allclose(values[0], [0, -0.5004, -0.6730, -0.9503, -1.0549, -1.3322, -1.6094], atol=5e-5)
    np.testing.assert_allclose(values[0, [0, -1]], [0, -math.log(5)], atol=1e-6)
    np.testing.assert_array_equal(values, values[:1].repeat(20, axis=0))  # to the bit: seven values are seven atoms

    # One answer; six alike; six that have nothing in common; three whose d is no metric: their kernel has an eigenvalue below 0.
    similar, mask = np.zeros((4, 6, 6), np.float32), np.zeros((4, 6), bool)
    odd = np.array([[1, 1, 0], [1, 1, 1], [0, 1, 1]], np.float32)
    for at, one in enumerate((np.ones((1, 1)), np.ones((6, 6)), np.eye(6), odd)):
        similar[at, : len(one), : len(one)], mask[at, : len(one)] = one, True
    kernel = jax.jit(facttest.kernel_entropy, static_argnames=("scale", "official"))
    alone, alike, apart, _ = np.asarray(kernel(similar, mask))
    assert alone == pytest.approx(0, abs=1e-6) and alike == pytest.approx(0, abs=1e-5)
    off = math.exp(-0.5) / 6  # one large eigenvalue, and five equal ones
    values = np.r_[1 / 6 + 5 * off, [1 / 6 - off] * 5]
    assert values.sum() == pytest.approx(1) and apart == pytest.approx((values * np.log(values)).sum(), abs=1e-6)
    assert float(kernel(similar, mask, scale=60.0)[2]) == pytest.approx(-math.log(6), abs=1e-6)
    values = np.linalg.eigvalsh(np.exp(-4 * (1 - odd)) / 3)
    assert values[0] < 0
    for official, kept in ((True, values[1:]), (False, values[1:] / values[1:].sum())):
        found = kernel(similar, mask, scale=4.0, official=official)[3]
        assert float(found) == pytest.approx((kept * np.log(kept)).sum(), abs=1e-6)

    degrees = np.asarray(facttest.degree(similar, mask))
    np.testing.assert_allclose(degrees[:3], [0, 0, -5 / 6], atol=1e-6)
    logps, ids = np.full((2, 4), -2, np.float32), np.array([[0, 1, 2, 3], [0, 0, 0, 0]], np.int32)
    np.testing.assert_allclose(facttest.semantic_entropy(logps, ids), [-math.log(4), 0], atol=1e-6)
    nothing = facttest.mean_cluster_likelihood(logps, ids, np.zeros((2, 4), bool))
    assert (np.asarray(nothing) == -math.inf).all()


def test_inference_to_similarity_and_clusters():
    p = np.zeros((3, 3, 3), np.float32)
    p[..., 2] = 1  # all contradict
    p[0, 1], p[1, 0], p[1, 2] = [0.8, 0.2, 0], [0.6, 0.1, 0.3], [0.9, 0.1, 0]  # 0 and 1 entail each other; 1 entails 2
    similar = np.asarray(facttest.nli_similarity(p))
    assert similar[0, 1] == similar[1, 0] == pytest.approx(((0.56 + 0.06) + (0.42 + 0.03)) / 2)
    assert similar[1, 2] == pytest.approx((0.63 + 0.03) / 2) and similar[0, 2] == 0
    same, official = (np.asarray(facttest.nli_equivalent(p, official=o)) | np.eye(3, dtype=bool) for o in (False, True))
    assert facttest.clusters(same).tolist() == [0, 0, 1]
    assert facttest.clusters(official).tolist() == [0, 0, 1]  # greedy: 2 is held against 0, the first of the cluster
    assert facttest.clusters(official[1:, 1:]).tolist() == [0, 0] and facttest.clusters(same[1:, 1:]).tolist() == [0, 1]
    cosines = np.asarray(facttest.cosine_similarity(np.array([[3, 0], [1, 1], [-2, 0.0], [0, 0]], np.float32)))
    np.testing.assert_allclose(cosines[:2], [[1, 2**-0.5, 0, 0], [2**-0.5, 1, 0, 0]], atol=1e-6)


def test_texts():
    assert plain_answer(" The  Eiffel-Tower, Paris\nand more") == "eiffel tower paris"
    assert (
        plain_answer("Paris") == plain_answer("paris. It is") == "paris"
    )  # with and without a full stop: trap 3 of the code
    overlap = facttest.word_overlap(["a cat sat", "A cat", "", ""])
    np.testing.assert_allclose(overlap[0], [1, 2 / 3, 0, 0], atol=1e-6)
    assert overlap[2, 3] == 1
    assert (
        samples.right_answer("It is a St. Bernard", ["Bernard"]) is False
    )  # cut at the first full stop, as in the paper
    assert (
        samples.right_answer("paris", ["Paris"]) is False and samples.right_answer("paris", ["Paris"], "words") is True
    )
    assert samples.right_answer("New York City", ["Boston", "new york"], "words") is True


SAID = [
    {"said": "Paris", "samples": ["Paris.", "paris", "Rome", "the Paris"]},
    {"said": "art", "samples": ["", "one", "two words", "one"]},
]


def test_scores_of_rows():
    distinct = [samples.distinct(row["samples"]) for row in SAID]
    assert distinct[0][0] == ["Paris.", "Rome"] and distinct[0][1].tolist() == [0, 0, 1, 0]
    third = 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    np.testing.assert_allclose(
        samples.scored("vanilla", SAID), [third, 0.5 * math.log(0.5) + 0.5 * math.log(0.25)], atol=1e-6
    )
    compared = [samples.by_words(texts) for texts, _ in distinct]
    assert compared[0]["clusters"] == [0, 1] and compared[1]["clusters"] == [0, 1, 2]
    np.testing.assert_allclose(samples.scored("discrete", SAID, (), compared), samples.scored("vanilla", SAID))
    logps = [
        {"logps": [[-1.0, 2], [-3.0, 2], [-8.0, 4]]},
        {"logps": [None, None, [-2.0, 2], [-9.0, 3]]},
    ]
    np.testing.assert_allclose(samples.scored("likelihood", SAID, logps), [-0.5, -math.inf])
    np.testing.assert_allclose(samples.scored("semantic", SAID, logps, compared), [-1.75 - 5, -2 - 5], atol=1e-6)
    assert samples.scored("semantic", SAID[1:], [{"logps": [None] * 4}], compared[1:])[0] == -math.inf
    vectors = np.array([[1, 0], [0.95, 0.3]], np.float32)
    near = samples.by_embeddings(vectors, 0.9)
    assert near["clusters"] == [0, 0] and samples.by_embeddings(vectors, 0.99)["clusters"] == [0, 1]
    assert samples.scored("discrete", SAID[:1], (), [near])[0] == 0
    assert -math.log(2) < samples.scored("kernel", SAID[:1], (), [near])[0] < 0

    asked = []

    def nli(premises, hypotheses):
        asked.append((list(premises), list(hypotheses)))
        same = [plain_answer(a) == plain_answer(b) for a, b in zip(premises, hypotheses, strict=True)]
        return np.array([[0.9, 0.1, 0.0] if x else [0.0, 0.2, 0.8] for x in same])

    told = samples.by_inference(nli, distinct[0][0], SAID[0])
    assert asked[0][0] == ["Paris.", "Paris.", "Rome", "Rome", *["Paris"] * 4]
    assert told["clusters"] == [0, 1] and told["similarity"][0][1] == pytest.approx(0.06)
    assert samples.scored("self_check", SAID[:1], (), [told])[0] == pytest.approx(-0.2)
    with pytest.raises(ValueError, match=r"gives shape \(8, 2\)"):
        samples.by_inference(lambda a, b: np.ones((len(a), 2)), distinct[0][0], SAID[0])


def test_a_score_knows_no_other_question():
    """To the bit: a threshold from one set of questions lies on values that another set's scores must meet or not."""
    rng, words = np.random.default_rng(5), ["paris", "rome", "oslo", "the old town", "a town"]
    said = [{"said": "x", "samples": [words[i] for i in rng.integers(0, 1 + at % 5, 10)]} for at in range(700)]
    distinct = [samples.distinct(row["samples"]) for row in said]
    compared = [samples.by_words(texts) for texts, _ in distinct]
    logps = [{"logps": [[-1.0, 2]] * (1 + len(texts))} for texts, _ in distinct]
    for name in ("vanilla", "degree", "discrete", "kernel", "semantic", "semantic_entropy"):
        whole = samples.scored(name, said, logps, compared)
        for part in (slice(3, 5), slice(100, 431)):
            np.testing.assert_array_equal(samples.scored(name, said[part], logps[part], compared[part]), whole[part])
        if name == "vanilla":  # as many values as products of n^n, of which the entropy is the logarithm
            counts = [collections.Counter(ids.tolist()).values() for _, ids in distinct]
            assert len(np.unique(whole)) == len({math.prod(n**n for n in some) for some in counts})
