"""Retrievers: their loss in numpy and by its laws, what training gives, on several devices, on disk, and on real sentences."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmethods import losses, models, sharding
from jaxmethods.evals.retrieval import recall_at
from jaxmethods.retrieval import Retriever, RetrieverConfig, contrastive_loss, heads, ranks, train
from jaxmethods.retrieval.retriever import _held_out, init
from jaxmethods.training import Optimizer

RNG = np.random.default_rng(0)
GROUPS = np.array([3, 1, 3, 0, 1, 3, 7, 2])
SHORT = RetrieverConfig(
    width=16, batch_size=32, epochs=12, evaluate_every=3, optimizer=Optimizer(learning_rate=1e-2, weight_decay=1e-2)
)


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# The loss


def in_numpy(queries, targets, temperature, groups):
    unit = lambda x: np.float64(x) / np.linalg.norm(x, axis=1, keepdims=True)
    z = unit(queries) @ unit(targets).T / temperature
    total = 0.0
    for i in range(len(z)):
        among = [j for j in range(len(z)) if j == i or groups[j] != groups[i]]
        for row in (z[i], z[:, i]):
            total += math.log(sum(math.exp(row[j]) for j in among)) - z[i, i]
    return total / (2 * len(z))


@pytest.mark.parametrize("groups", [None, GROUPS])
def test_loss_in_numpy(groups):
    queries, targets = draw(8, 5), draw(8, 5, seed=1)
    expected = in_numpy(queries, targets, 0.3, np.arange(8) if groups is None else groups)
    np.testing.assert_allclose(contrastive_loss(queries, targets, temperature=0.3, groups=groups), expected, rtol=1e-5)


def test_loss_laws():
    queries, targets = jnp.asarray(draw(8, 5)), jnp.asarray(draw(8, 5, seed=1))
    loss = lambda q=queries, t=targets, of=GROUPS: contrastive_loss(q, t, temperature=0.2, groups=of)
    np.testing.assert_allclose(loss(targets, queries), loss(), rtol=1e-6)
    order = RNG.permutation(8)
    np.testing.assert_allclose(loss(queries[order], targets[order], GROUPS[order]), loss(), rtol=1e-6)
    for of, count in ((None, 8), (np.arange(8), 8)):
        np.testing.assert_allclose(loss(jnp.ones((8, 5)), jnp.ones((8, 5)), of), math.log(count), rtol=1e-6)
    left = [8 - (g == GROUPS).sum() + 1 for g in GROUPS]  # itself, and the other groups
    np.testing.assert_allclose(loss(jnp.ones((8, 5)), jnp.ones((8, 5))), np.log(left).mean(), rtol=1e-6)
    assert abs(loss(of=np.zeros(8, int))) < 1e-6 and loss(of=None) > loss()  # nothing to choose among; fewer negatives
    value_and_grads = lambda of: jax.value_and_grad(lambda q, t: loss(q, t, of), (0, 1))(queries, targets)
    grouped, plain = value_and_grads(np.arange(8)), value_and_grads(None)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grouped, plain)
    np.testing.assert_allclose(plain[0], losses.info_nce(queries, targets, temperature=0.2))


def test_equal_texts_do_not_push_each_other_away():
    """The gradient of one pair's target is what it is without its copies."""
    queries, targets = draw(6, 4), draw(6, 4, seed=1)
    own = lambda of: jax.grad(lambda t: contrastive_loss(queries, t, temperature=0.2, groups=of))(targets)
    together, apart = own(np.array([0, 0, 1, 2, 3, 4])), own(np.arange(6))
    assert np.abs(together - apart)[:2].max() > 1e-3


# Heads


@pytest.mark.parametrize("hidden", [None, 7])
def test_a_folded_head_reads_plain_features(hidden):
    features = 3 + 5 * draw(50, 6)
    features[:, 2] = 4.0  # says nothing
    mean, inverse = heads.moments(features)
    standard = (features - features.mean(0)) / np.where(np.arange(6) == 2, np.inf, features.std(0))
    head = heads.init(jax.random.key(0), 6, 3, hidden)
    head = jax.tree.map(lambda x: x + 0.1, head)
    np.testing.assert_allclose(
        heads.apply(heads.fold(head, mean, inverse), features), heads.apply(head, standard), atol=1e-4
    )


# Training


def two_views(rows, seed, directions=6, noise=0.2):
    """Two kinds of features of the same hidden things, by mappings that are not linear, with noise and a large constant part."""
    mapping = np.random.default_rng(99)
    of_queries, of_targets = (mapping.normal(size=(directions, width)) for width in (24, 20))
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(rows, directions))
    noisy = lambda x: (5 + np.tanh(x) + noise * rng.normal(size=x.shape)).astype(np.float32)
    return noisy(hidden @ of_queries), noisy(hidden @ of_targets)


def recall(retriever, queries, targets, k=1):
    ids = np.arange(len(queries))
    found = ranks(retriever.embed_queries(queries), retriever.embed_targets(targets), (ids, ids))
    return float(recall_at(found, k))


@pytest.mark.parametrize("hidden", [None, 32])
def test_training_beats_no_training(hidden):
    """On pairs that training never saw; chance is 0.01."""
    config = dataclasses.replace(SHORT, hidden=hidden)
    retriever = train(*two_views(320, 0), config=config, key=jax.random.key(0))
    fresh = two_views(100, 1)
    assert recall(retriever, *fresh) > 0.6
    assert recall(init(jax.random.key(0), 24, 20, config), *fresh) < 0.1
    assert retriever.history.held_out_recall[-1] > 0.8 and retriever.history.loss[-1] < 0.2 * retriever.history.loss[0]
    np.testing.assert_allclose(np.linalg.norm(retriever.embed_queries(fresh[0]), axis=1), 1, rtol=1e-5)
    assert 0.01 <= retriever.temperature <= 1


def test_what_is_best_on_held_out_pairs_is_kept():
    """On pairs that belong to nothing, held-out loss rises while the heads learn them by heart; training ends early."""
    queries, targets = draw(80, 24), draw(80, 20, seed=1)
    config = dataclasses.replace(SHORT, epochs=40, evaluate_every=2, held_out=0.25, patience=3)
    ended = train(queries, targets, config=config, key=jax.random.key(0))
    looks = int(np.isfinite(ended.history.loss).sum())
    best = int(np.nanargmin(ended.history.held_out_loss))
    assert looks == best + 4 < 20 and np.isnan(ended.history.held_out_loss[looks:]).all()
    whole = train(queries, targets, config=dataclasses.replace(config, patience=None), key=jax.random.key(0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole.params, ended.params)
    np.testing.assert_allclose(whole.history.loss[:looks], ended.history.loss[:looks], rtol=1e-4)
    assert whole.history.held_out_loss[-1] > whole.history.held_out_loss[best]
    np.testing.assert_allclose(ended.temperature, ended.history.temperature[best], rtol=1e-6)
    last = train(queries, targets, config=dataclasses.replace(config, held_out=0.0), key=jax.random.key(0))
    np.testing.assert_allclose(last.temperature, last.history.temperature[-1], rtol=1e-6)
    assert np.isnan(last.history.held_out_loss).all() and np.isfinite(last.history.loss).all()


def test_groups_stay_on_one_side():
    groups = np.repeat(np.arange(20), 5)
    out = _held_out(groups, 0.3, jax.random.key(0))
    assert out.sum() == 30 and not set(groups[out]) & set(groups[~out])


def test_equal_texts_are_learnt_as_one():
    """Ten texts, each of many queries: a text's other queries are right answers, and no negatives."""
    queries, targets = two_views(10, 0)
    of = np.repeat(np.arange(10), 20)
    queries = queries[of] + 0.5 * draw(200, 24)
    config = dataclasses.replace(SHORT, held_out=0.2)
    grouped = train(queries, targets[of], config=config, key=jax.random.key(0), groups=of)
    assert grouped.history.held_out_recall[-1] == 1  # all five first are of two groups of twenty
    # Three of 31 others have a pair's own text: as negatives that cannot be told apart they alone would cost log(1 + 3) nats.
    assert grouped.history.loss[-1] < 0.5


def test_devices_give_the_numbers_of_one():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    queries, targets = two_views(96, 0)
    config = dataclasses.replace(SHORT, epochs=4, evaluate_every=2)
    told = dict(config=config, key=jax.random.key(1))
    alone, split = train(queries, targets, **told), train(queries, targets, **told, mesh=mesh)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), split.history, alone.history)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), split.params, alone.params)
    assert all(x.sharding.is_fully_replicated for x in jax.tree.leaves(split.params))


def test_a_retriever_is_a_pytree():
    retriever = init(jax.random.key(0), 4, 3, SHORT)
    doubled = jax.tree.map(lambda x: 2 * x, retriever)
    np.testing.assert_allclose(
        jax.jit(lambda r, x: r.embed_queries(x))(doubled, draw(2, 4)), retriever.embed_queries(draw(2, 4)), rtol=1e-5
    )


@pytest.mark.parametrize("hidden", [None, 5])
def test_saved_and_loaded(tmp_path, hidden):
    retriever = init(jax.random.key(0), 4, 3, dataclasses.replace(SHORT, hidden=hidden))
    retriever.save(tmp_path / "r.safetensors")
    again = Retriever.load(tmp_path / "r.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, retriever.params)
    stored = load_file(tmp_path / "r.safetensors")
    assert "queries/last/kernel" in stored and len(stored) == (5 if hidden is None else 9)
    save_file({name: x for name, x in stored.items() if name != "log_scale"}, tmp_path / "cut.safetensors")
    with pytest.raises(ValueError, match="is no retriever: it holds queries"):
        Retriever.load(tmp_path / "cut.safetensors")
    (tmp_path / "r.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="cannot be read as safetensors"):
        Retriever.load(tmp_path / "r.safetensors")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Retriever.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (dict(keep="recal"), "did you mean 'recall'"),
        (dict(width=0), "width=0 must be at least 1"),
        (dict(batch_size=1), "batch_size=1 must be at least 2"),
        (dict(temperature=0.001), "temperature=0.001 must be at least 0.01"),
        (dict(held_out=1.0), "held_out=1.0 is a share"),
        (dict(epochs=25, evaluate_every=10), "try epochs=30"),
    ],
)
def test_refuses_configs(given, said):
    with pytest.raises(ValueError, match=said):
        RetrieverConfig(**given)


def test_refuses_data():
    queries, targets, key = draw(20, 4), draw(20, 3), jax.random.key(0)
    with pytest.raises(ValueError, match="20 queries, 19 targets; row i"):
        train(queries, targets[1:], key=key)
    with pytest.raises(ValueError, match="20 targets and 19 groups"):
        train(queries, targets, key=key, groups=np.arange(19))
    with pytest.raises(
        ValueError, match="batch_size=32 and there are 18 training pairs; choose batch_size of at most 18"
    ):
        train(queries, targets, key=key)
    with pytest.raises(ValueError, match=r"held_out=0\.1 of 10 groups is 1"):
        train(queries, targets, key=key, groups=np.arange(20) // 2)
    with pytest.raises(ValueError, match=r"of queries have shape \(2, 3\); this retriever reads \[N, 4\]"):
        init(key, 4, 3).embed_queries(targets[:2])
    wild = dataclasses.replace(SHORT, batch_size=8, optimizer=Optimizer(learning_rate=1e30, clip_norm=None))
    with pytest.raises(ValueError, match=r"the loss is not finite by epoch 3; lower optimizer\.learning_rate"):
        train(queries, targets, config=wild, key=key)
    targets[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"targets\[3\] has a value that is not finite"):
        train(queries, targets, key=key)


# Real sentences


def test_real_sentences_find_their_other_half(minilm_folder):
    """MiniLM's vectors of the two halves of sentences: trained heads against untrained ones, on sentences never seen."""
    folder = minilm_folder
    module, params = models.load(str(folder))
    tokenizer = models.load_tokenizer(folder)
    things = ["red", "cheap", "old", "small", "loud"], ["car", "violin", "house", "apple", "dog", "coat"]
    places = ["in Paris", "at sea", "on the moon", "at school", "in a bank", "under snow"]
    chosen = [(a, b, c) for a in things[0] for b in things[1] for c in places]
    firsts, seconds = [f"a {a} {b} {c}" for a, b, c in chosen], [f"{c}, this {b} is {a}." for a, b, c in chosen]
    run = jax.jit(lambda tokens, mask: module.apply({"params": params}, tokens, mask).pooled)

    def vectors(texts):
        words = tokenizer(texts, padding="max_length", max_length=14, return_tensors="np")
        return np.asarray(run(words["input_ids"], words["attention_mask"] > 0))

    queries, targets = vectors(firsts)[:, ::2], vectors(seconds)[:, 1::2]  # no number in common: they must be matched
    order = np.random.default_rng(0).permutation(len(chosen))
    seen, fresh = order[50:], order[:50]
    retriever = train(queries[seen], targets[seen], config=SHORT, key=jax.random.key(0))
    start = init(jax.random.key(0), queries.shape[1], targets.shape[1], SHORT)
    assert recall(start, queries[fresh], targets[fresh], 5) < 0.2
    assert recall(retriever, queries[fresh], targets[fresh], 5) > 0.8
