"""The engine: the same numbers as each request alone, in the stream's order, by a bounded number of programs."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import generation, models, sharding
from jaxmethods.adapters import LoRA, SMoRE
from jaxmethods.evals import scoring
from jaxmethods.evals.scoring import Pair, Prompt, answering, likelihoods, planning
from jaxmethods.models import decoder as decoder_file
from jaxmethods.objectives import cafe
from tests import tiny
from tests.launch.conftest import chatml_tokenizer

LIMIT = 96


def questions(count=9, seed=0, vocab=61):
    """Contexts of mixed lengths with one to four continuations each; some continuations differ in their last token alone."""
    rng = np.random.default_rng(seed)
    tokens = lambda low, high: rng.integers(3, vocab, rng.integers(low, high)).tolist()
    made = []
    for i in range(count):
        context, first = tokens(1, 70), tokens(1, 20)
        made.append(Pair(context, first))
        made += [Pair(context, [*first[:-1], 4]), Pair(context, tokens(1, 20))][: i % 3]
        made += [Pair(context, tokens(1, 20))] * (i % 2)
    return made


@functools.cache
def model(family="llama", **changes):
    layers = {"window_layers": (True, False)} if family == "gemma2" else {}
    return tiny.decoder(family, num_layers=2, max_position_embeddings=LIMIT, **layers, **changes)


def padded(tokens):
    """[1, LIMIT + 16] and its mask, so that everything alone is one program."""
    row = np.pad(np.array([tokens], np.int32), ((0, 0), (0, LIMIT + 16 - len(tokens))))
    return row, np.arange(LIMIT + 16)[None] < len(tokens)


def logits_of(module, params, tokens):
    return np.asarray(models.logits(module, params, *padded(tokens)))[0, : len(tokens)]


def alone(module, params, pair):
    """(log p, greedy) of one request by itself, the latter by the whole of its logits."""
    whole = [*pair.context, *pair.continuation]
    tokens, mask = padded(whole)
    logits = logits_of(module, params, whole)
    target = np.zeros_like(mask)
    target[0, len(pair.context) : len(whole)] = True
    places = np.arange(len(pair.context) - 1, len(whole) - 1)
    greedy = (logits[places].argmax(-1) == pair.continuation).all()
    return float(models.sequence_logps(module, params, tokens, target, mask)[0]), bool(greedy)


def same(found, expected):
    np.testing.assert_allclose([one.logp for one in found], [logp for logp, _ in expected], rtol=1e-5, atol=2e-5)
    assert [one.greedy for one in found] == [greedy for _, greedy in expected]


def score(module, params, pairs, **options):
    return list(scoring.log_likelihoods(module, params, pairs, **{"batch_tokens": 2 * LIMIT} | options))


# Windows, soft-caps and a tied table in the latter.
@pytest.mark.parametrize("family", ["llama", pytest.param("gemma2", marks=pytest.mark.ci)])
def test_mixed_lengths_have_the_numbers_of_each_alone(family):
    module, params = model(family)
    pairs = questions()
    for pair in pairs[::4]:  # some continuations that greedy decoding gives
        said = list(pair.context)
        for _ in range(3):
            said.append(int(logits_of(module, params, said)[-1].argmax()))
        pairs.append(Pair(pair.context, said[-3:]))
        pairs.append(Pair(pair.context, [*said[-3:-1], said[-1] ^ 1]))  # until its last token
    expected = [alone(module, params, pair) for pair in pairs]
    assert {greedy for _, greedy in expected} == {True, False}
    work = scoring.Work()
    same(score(module, params, iter(pairs), work=work), expected)
    assert work.reused > 0 and work.requests == len(pairs) and {name for name, *_ in work.programs} == {
        "likelihoods", "contexts", "continuations",
    }  # fmt: skip
    if family == "llama":
        same(score(module, params, pairs, window=5), expected)  # other batches, the same order
        same(score(module, params, pairs, share=False), expected)
        same(score(module, params, pairs, pack=False), expected)
        assert all(one.greedy is None for one in score(module, params, pairs[:2], greedy=False))


def test_what_is_equal_is_read_once():
    module, params = model()
    context = list(range(3, 40))
    letters = [Pair(context, [letter]) for letter in range(3, 60)]  # as of a question with lettered answers
    work = scoring.Work()
    found = score(module, params, [*letters, letters[0]], work=work)
    logps = jax.nn.log_softmax(logits_of(module, params, context)[-1])
    np.testing.assert_allclose([one.logp for one in found[:-1]], logps[3:60], rtol=1e-5)
    assert found[-1] == found[0] and sum(one.greedy for one in found[:-1]) <= 1
    assert work.tokens == len(context) and work.batches == 1
    same(
        score(module, params, letters, limit=40), [(one.logp, one.greedy) for one in found[:-1]]
    )  # more targets than places


def test_long_contexts_lose_their_beginning_and_wrong_requests_are_refused():
    module, params = model()
    rng = np.random.default_rng(1)
    long = rng.integers(3, 61, 300).tolist()
    (found,) = score(module, params, [Pair(long[:280], long[280:])])
    assert found.cut == 300 - 1 - LIMIT
    logp, greedy = alone(module, params, Pair(long[300 - LIMIT - 1 : 280], long[280:]))
    same([found], [(logp, greedy)])
    (found,) = score(module, params, [Pair([5], long[:LIMIT])])  # as long as can be
    assert found.cut == 0 and found.tokens == LIMIT
    for pair, words in (
        (Pair([], [1]), "request 2 has an empty context"),
        (Pair([1], []), "request 2 has an empty continuation"),
        (Pair([1], long), "request 2 has a continuation of 300 tokens, and the model reads 96"),
    ):
        with pytest.raises(ValueError, match=words):
            score(module, params, [Pair([1], [2]), pair])


def test_adapters_change_the_numbers_as_they_do_elsewhere():
    layers = {
        "q_proj": LoRA(rank=2),
        "up_proj": SMoRE(experts=(2, 3), fanout=(1, 2), ranks=(1, 2), router_dim=6, gate_dim=4),
    }
    *_, module, params = tiny.adapted(layers, num_layers=2, max_position_embeddings=LIMIT)
    pairs = questions(4)
    same(score(module, params, pairs), [alone(module, params, pair) for pair in pairs])


def test_programs_are_as_many_as_shapes_however_lengths_vary():
    module, params = tiny.decoder("llama", num_layers=1, max_position_embeddings=1024)
    rng = np.random.default_rng(2)
    before, work = likelihoods._scored._cache_size(), scoring.Work()
    for length in rng.integers(2, 1024, 12):
        list(scoring.log_likelihoods(
            module, params, [Pair([3], rng.integers(3, 61, n).tolist()) for n in (length, 1 + length // 3)], work=work
        ))  # fmt: skip
    assert len(work.programs) == 2 == likelihoods._scored._cache_size() - before


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("multiple", [1, 4])
def test_plans_lay_each_request_once_into_a_row_that_holds_it(pack, multiple):
    rng = np.random.default_rng(3)
    shapes = planning.shapes_for(5000, 2048, shortest=planning.PACKED if pack else planning.UNPACKED, multiple=multiple)
    assert [shape.length for shape in shapes] == ([] if pack else [64, 128, 256]) + [512, 1024, 2048, 4096, 5120]
    assert all(shape.rows % multiple == 0 for shape in shapes)
    for count in (0, 1, 3, 40, 400):
        lengths = np.minimum(rng.lognormal(4, 1.2, count).astype(np.int64) + 1, 5000)
        batches = planning.plan(lengths, shapes, pack=pack)
        rows = [row for batch in batches for row in batch.rows]
        assert sorted(itertools.chain(*rows)) == list(range(count))
        for batch in batches:
            assert 1 <= len(batch.rows) <= batch.shape.rows
            assert all(lengths[row].sum() <= batch.shape.length and (pack or len(row) == 1) for row in batch.rows)
        assert sum(len(batch.rows) < batch.shape.rows for batch in batches) <= 1  # the last of all
    if pack and multiple == 1:
        full = lengths.sum() / sum(batch.shape.places for batch in batches)
        assert full > 0.9
    for lengths, words in ((np.array([0, 4]), "got 0..4"), (np.array([6000]), "got 6000..6000")):
        with pytest.raises(ValueError, match=words):
            planning.plan(lengths, shapes)
    with pytest.raises(ValueError, match="batch_tokens=0"):
        planning.shapes_for(10, 0)


def test_the_stream_is_read_a_window_at_a_time():
    module, params = model()
    taken = []
    stream = (taken.append(i) or pair for i, pair in enumerate(questions()))
    told = []
    found = scoring.log_likelihoods(module, params, stream, window=4, batch_tokens=2 * LIMIT, progress=told.append)
    assert not taken
    next(found)
    assert len(taken) == 4 and told == [4]


@pytest.fixture(scope="module")
def on_eight():
    module, params = model("qwen2", vocab_size=64)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    return jax.device_put(params, sharding.shardings_for(params, mesh, decoder_file.RULES)), mesh


def test_eight_devices_give_what_one_gives(on_eight):
    module, params = model("qwen2", vocab_size=64)
    placed, mesh = on_eight
    pairs = questions(6)
    one = score(module, params, pairs)
    eight = score(module, placed, pairs, mesh=mesh, batch_tokens=4 * LIMIT)
    same(eight, [(x.logp, x.greedy) for x in one])


@pytest.mark.parametrize("transposed", [True, False])
def test_the_likeliest_of_several_is_the_first(transposed, monkeypatch):
    monkeypatch.setattr(likelihoods, "LOGITS", 1)  # blocks of the least size
    rng = np.random.default_rng(4)
    hidden, matrix = rng.integers(-2, 3, (70, 4)).astype(np.float32), rng.integers(-2, 3, (4, 50)).astype(np.float32)
    where = rng.random(70) < 0.7
    given = map(jnp.asarray, (hidden, matrix.T if transposed else matrix, where))
    found = likelihoods.likeliest(*given, softcap=3.0, transposed=transposed)
    expected = (3.0 * np.tanh(hidden @ matrix / np.float32(3.0))).argmax(-1)
    np.testing.assert_array_equal(np.asarray(found)[where], expected[where])


def test_pairs_are_greedy_where_all_of_their_tokens_are_and_few_are_looked_at():
    rng = np.random.default_rng(0)
    rows, slots, vocab = 3, 40, 8
    logits = rng.normal(size=(rows, slots, vocab)) * rng.choice([0.5, 8.0], (rows, slots, 1))  # flat and peaked ones
    targets = np.where(rng.random((rows, slots)) < 0.85, logits.argmax(-1), rng.integers(0, vocab, (rows, slots)))
    logps = np.log(np.exp(logits).sum(-1))
    logps = np.take_along_axis(logits, targets[..., None], -1)[..., 0] - logps
    ids = np.sort(rng.integers(0, 8, (rows, slots)), axis=1)
    pairs = np.stack([np.searchsorted(row, row) for row in ids]).astype(np.int32)  # the first column of each
    wanted = np.arange(slots) < 36
    wanted = np.broadcast_to(wanted, ids.shape)
    right, asked = targets == logits.argmax(-1), []

    def look(places):
        asked.append(np.asarray(places))
        return jnp.asarray(np.where(asked[-1], right, rng.random(right.shape) < 0.5))  # anything elsewhere

    found = likelihoods._said_greedily(jnp.asarray(logps, jnp.float32), jnp.asarray(wanted), jnp.asarray(pairs), look)
    said = np.array([[right[r][(ids[r] == ids[r, c]) & wanted[r]].all() for c in range(slots)] for r in range(rows)])
    np.testing.assert_array_equal(np.asarray(found)[wanted], said[wanted])
    assert np.asarray(found)[~wanted].all() and {True, False} == set(said[wanted].tolist())
    assert not (asked[0] & asked[1]).any() and asked[1].any() and sum(x.sum() for x in asked) < wanted.sum() / 2


# Texts.


@pytest.fixture(scope="module")
def talker():
    tokenizer = chatml_tokenizer()
    module, params = tiny.decoder(
        "llama", num_layers=2, vocab_size=len(tokenizer), rope_scaling=None, max_position_embeddings=128
    )
    return module, params, tokenizer


PROMPTS = ["how many cats?", "and dogs", "which mat is it, and why is it there, of all places, on that one log?", "a"]


def greedy_text(module, params, tokenizer, tokens, new):
    ends = (*module.config.eos_ids, tokenizer.eos_token_id)
    row = np.pad(np.array([tokens], np.int32), ((0, 0), (112 - len(tokens), 0)))
    there = np.arange(112)[None] >= 112 - len(tokens)
    made = generation.generate(module, params, row, there, max_new_tokens=new, temperature=0, eos_id=ends)
    return tokenizer.decode(np.asarray(made.tokens)[0][np.asarray(made.mask)[0]], skip_special_tokens=True)


def test_texts_are_cut_at_their_stops_and_made_in_pieces(talker, monkeypatch):
    module, params, tokenizer = talker
    monkeypatch.setattr(answering, "PIECES", (4, 8))
    tokens = [tokenizer.encode(prompt) for prompt in PROMPTS]
    whole = [greedy_text(module, params, tokenizer, ids, 18) for ids in tokens]
    work = scoring.Work()
    run = functools.partial(scoring.continuations, module, params, tokenizer, batch_tokens=256, work=work)
    found = list(run([Prompt(ids, 18) for ids in tokens]))
    assert [one.text for one in found] == whole and [one.tokens for one in found] == [18] * 4
    stop = whole[2][9:12]
    (one,) = run([Prompt(tokens[2], 18, (stop, "not there"))])
    assert one.text == whole[2].split(stop)[0] and one.ended and one.tokens < 18
    # Some of all kinds in one stream, each as alone; 18 tokens are pieces of 8, 8 and 4, of which 2 are kept.
    mixed = [Prompt(tokens[0], 3), Prompt(tokens[1], 18), Prompt(tokens[3], 18, (stop,))]
    assert [one.text for one in run(mixed)] == [next(run([prompt])).text for prompt in mixed]
    assert {name[3] for name in work.programs} == {4, 8}


def test_a_stop_that_is_a_special_token_ends_the_text(talker):
    module, params, tokenizer = talker
    tokens = tokenizer.encode(PROMPTS[0])
    first = int(np.argmax(models.logits(module, params, np.array([tokens]))[0, -1]))
    word = tokenizer.convert_ids_to_tokens(first)
    special = chatml_tokenizer()
    special.add_special_tokens({"additional_special_tokens": [word]})
    assert special.convert_tokens_to_ids(word) == first
    (found,) = scoring.continuations(module, params, special, [Prompt(tokens, 16, (word,))], batch_tokens=128)
    assert found.text == "" and found.tokens == 1 and found.ended


def test_draws_depend_on_the_seed_and_the_place_in_the_stream(talker):
    module, params, tokenizer = talker
    prompts = [Prompt(tokenizer.encode(prompt), 12, temperature=1.0, top_p=0.9) for prompt in PROMPTS]
    run = lambda **options: [x.text for x in scoring.continuations(module, params, tokenizer, prompts, **options)]
    once = run(batch_tokens=256, window=2)
    assert once == run(batch_tokens=512) != run(batch_tokens=512, seed=1)


def test_prompts_that_leave_no_room(talker):
    module, params, tokenizer = talker
    long = tokenizer.encode("the cat sat on the mat. " * 40)
    (found,) = scoring.continuations(module, params, tokenizer, [Prompt(long, 16)], batch_tokens=128)
    assert found.cut == len(long) - (128 - 16)
    assert found.text == greedy_text(module, params, tokenizer, long[-112:], 16)
    for prompt, words in (
        (Prompt([], 4), "empty prompt"),
        (Prompt([1], 128), "asks for 128 new tokens; give 1 to 127"),
    ):
        with pytest.raises(ValueError, match=words):
            list(scoring.continuations(module, params, tokenizer, [prompt]))


# Embeddings.


@functools.partial(jax.jit, static_argnums=0)
def _hidden(module, params, tokens, mask):
    return models.hidden_states(module, params, tokens, mask)[0]


def hidden(module, params, text):
    tokens, mask = map(jnp.asarray, padded(text))
    return _hidden(module, params, tokens, mask), tokens, mask


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_are_those_of_each_text_alone(pooling):
    module, params = model()
    texts = [[*pair.context, *pair.continuation] for pair in questions(5)]
    work = scoring.Work()
    found = list(scoring.embeddings(module, params, texts, pooling=pooling, batch_tokens=256, window=4, work=work))
    for text, one in zip(texts, found, strict=True):
        expected = cafe.unit(cafe.pool(*hidden(module, params, text), pooling=pooling))[0]
        np.testing.assert_allclose(one, expected, atol=2e-6)
    assert len(work.programs) <= 2
    with pytest.raises(ValueError, match="request 2 has no tokens"):
        list(scoring.embeddings(module, params, [[3], []]))
    with pytest.raises(ValueError, match="pooling 'token'"):
        list(scoring.embeddings(module, params, [[3]], pooling="token"))
