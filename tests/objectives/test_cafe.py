"""CAFe's objective: by hand, its laws, devices, chunks, and its embeddings."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, models, sharding, tree
from jaxmethods.data.views import Conversation
from jaxmethods.launch import cost
from jaxmethods.models.decoder import Output
from jaxmethods.objectives import CAFe, Supervised, cafe
from tests import tiny
from tests.objectives.readings import (
    ATOL,
    IMAGE,
    LENGTH,
    ROWS,
    close,
    contrast_by_hand,
    log_softmax,
    readings,
    unit,
)


class Sums(nn.Module):
    """The smallest language model that the objective can train: a state is tanh of a layer on the sum of the tokens so far."""

    config: Any = models.DecoderConfig(
        family="llama", vocab_size=64, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=1, num_kv_heads=1,
        head_dim=16, tie_embeddings=True,
    )  # fmt: skip
    mesh: Any = None

    @nn.compact
    def __call__(self, tokens, mask=None, *, segment_ids=None, positions=None):
        embedding = self.param("model", lambda key: {"embed_tokens": {"embedding": jnp.zeros((64, 16))}})
        x = jnp.where(mask[..., None], embedding["embed_tokens"]["embedding"][tokens], 0.0)
        return Output(jnp.tanh(nn.Dense(16, use_bias=False, name="mix")(jnp.cumsum(x, axis=1))), None)


def sums(objective: CAFe) -> dict:
    """Its parameters and the objective's own, away from where these start."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    own = jax.tree.map(lambda x: np.float32(x + 0.1 * draw(*np.shape(x))), objective.init(16))
    params = {"model": {"embed_tokens": {"embedding": draw(64, 16)}}, "mix": {"kernel": 0.15 * draw(16, 16)}}
    return params | ({"objective": own} if own else {})


SUMS = Sums()


@functools.cache
def gradient(objective: CAFe, module: Any = SUMS) -> Any:
    """Compiled (params, batch, key) -> (loss, its gradient)."""
    loss_fn = objective.loss_fn(module)
    return jax.jit(jax.value_and_grad(lambda params, batch, key: loss_fn(params, batch, key)[0].value()))


@functools.cache
def evaluated(objective: CAFe) -> Any:
    """Compiled (params, batch) -> metrics, as in evaluation."""
    loss_fn = objective.loss_fn(Sums())
    return jax.jit(lambda params, batch: {name: mean.value() for name, mean in loss_fn(params, batch, None)[1].items()})


KEY = jax.random.key(3)


# By hand: the whole of it in numpy, float64


def states_by_hand(params, batch, name):
    real = batch[f"{name}/segment_ids"] > 0
    x = np.where(real[..., None], params["model"]["embed_tokens"]["embedding"][batch[f"{name}/tokens"]], 0.0)
    return np.tanh(np.cumsum(x, axis=1) @ params["mix"]["kernel"])


def embedded_by_hand(params, batch, name):
    last = (batch[f"{name}/segment_ids"] > 0).sum(axis=1) - 1
    state = states_by_hand(params, batch, name)[np.arange(len(last)), last]
    if heads := params.get("objective", {}).get("heads"):
        head = heads["query" if name == "query" else "target"]
        state = state @ head["matrix"] + head["bias"]
    return unit(state)


def by_hand(objective, params, batch):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    total = 0.0
    if objective.alpha_lm:
        logits = states_by_hand(params, batch, "generation") @ params["model"]["embed_tokens"]["embedding"].T
        logps = log_softmax(logits.reshape(-1, 64)).reshape(logits.shape)
        rows, columns = np.nonzero(batch["generation/target_mask"])
        total -= objective.alpha_lm * logps[rows, columns - 1, batch["generation/tokens"][rows, columns]].mean()
    if objective.alpha_con:
        names = [name for name in ("query", "target", "negative") if f"{name}/tokens" in batch]
        embedded = {name: embedded_by_hand(params, batch, name) for name in names}
        total += objective.alpha_con * contrast_by_hand(objective, embedded, params.get("objective"))
    return total


def slope(objective, params, batch, way, step=1e-6):
    """How fast the loss grows along a direction, by differences."""
    at = lambda sign: jax.tree.map(lambda x, d: np.asarray(x, np.float64) + sign * step * d, params, way)
    return (by_hand(objective, at(1), batch) - by_hand(objective, at(-1), batch)) / (2 * step)


JOINT = CAFe(alpha_lm=0.7, alpha_con=1.3, temperature=0.2, pairs=True)
CONTRASTS = {
    "joint": (JOINT, {"fsdp": 8}),
    "one_way, heads": (
        CAFe(alpha_lm=0, contrast="one_way", heads=True, pairs=True, learn_temperature=True, temperature=0.1),
        {"data": 2, "fsdp": 4},
    ),
    "sigmoid": (
        CAFe(alpha_lm=0, contrast="sigmoid", temperature=0.2, bias=-3.0, learn_temperature=True, pairs=True),
        {"data": 2, "fsdp": 2, "tensor": 2},
    ),
    "negatives": (CAFe(alpha_lm=0, temperature=0.2, negatives=True, pairs=True), {"fsdp": 8}),
}


def batch_of(objective):
    return readings(*objective.views())


@pytest.mark.parametrize("name", CONTRASTS)
def test_the_loss_and_its_gradient_by_hand_and_on_eight_devices(name):
    """The gradient against differences of the loss in numpy along two directions, temperature, bias and heads included."""
    objective, axes = CONTRASTS[name]
    params, batch = sums(objective), batch_of(objective)
    alone = gradient(objective)(params, batch, KEY)
    np.testing.assert_allclose(alone[0], by_hand(objective, params, batch), rtol=1e-5)
    rng = np.random.default_rng(5)
    for _ in range(2):
        way = jax.tree.map(lambda x: rng.normal(size=np.shape(x)), params)
        along = sum(jax.tree.leaves(jax.tree.map(lambda g, d: float((np.asarray(g) * d).sum()), alone[1], way)))
        np.testing.assert_allclose(along, slope(objective, params, batch, way), rtol=1e-4, atol=1e-5)
    for path, leaf in tree.flatten(alone[1].get("objective", {})).items():
        assert float(jnp.abs(leaf).max()) > 1e-4, path

    mesh = sharding.make_mesh(axes)
    placed = jax.device_put(params, sharding.shardings_for(params, mesh, models.RULES))
    found = gradient(objective, Sums(mesh=mesh))(placed, sharding.place_rows(batch, ROWS, mesh), KEY)
    close(found, alone)


def test_the_official_gather_gives_the_contrastive_gradient_over_the_number_of_devices():
    params, batch, mesh = sums(JOINT), batch_of(JOINT), sharding.make_mesh({"fsdp": 8})
    official = gradient(dataclasses.replace(JOINT, gather="official"), Sums(mesh=mesh))
    value, found = official(params, sharding.place_rows(batch, ROWS, mesh), KEY)
    exact_value, exact = gradient(JOINT)(params, batch, KEY)
    contrastive = gradient(dataclasses.replace(JOINT, alpha_lm=0.0))(params, batch, KEY)[1]
    np.testing.assert_allclose(value, exact_value, rtol=1e-5)
    close(found, jax.tree.map(lambda g, c: g - 7 / 8 * c, exact, contrastive))


# Laws


@pytest.fixture(scope="module")
def contrast():
    """(params, batch) -> (loss, gradient) of the contrastive loss alone, and parameters."""
    objective = dataclasses.replace(JOINT, alpha_lm=0.0)
    return lambda params, batch: gradient(objective)(params, batch, KEY), sums(objective)


def test_without_the_contrastive_term_it_is_supervised_training_to_the_bit():
    objective, params = CAFe(alpha_con=0), sums(JOINT)
    batch = readings("generation")
    plain = {name.partition("/")[2]: x for name, x in batch.items()}
    supervised = Supervised().loss_fn(Sums())
    expected = jax.jit(jax.value_and_grad(lambda params: supervised(params, plain, KEY)[0].value()))(params)
    jax.tree.map(np.testing.assert_array_equal, gradient(objective)(params, batch, KEY), expected)


def test_without_the_language_term_it_is_the_contrastive_loss(contrast):
    loss, params = contrast
    batch = batch_of(JOINT)
    np.testing.assert_allclose(
        loss(params, batch)[0], by_hand(dataclasses.replace(JOINT, alpha_lm=0.0), params, batch), rtol=1e-5
    )
    assert not any(name.startswith("generation") for name in dataclasses.replace(JOINT, alpha_lm=0.0).views())


def test_swapping_sides_permuting_pairs_and_scaling_states_change_nothing(contrast):
    loss, params = contrast
    batch = readings("query", "target")
    plain = loss(params, batch)
    order = np.random.default_rng(2).permutation(ROWS)
    close(loss(params, {name: x[order] for name, x in batch.items()}), plain)
    other = {"query": "target", "target": "query"}
    swapped = {f"{other[name.partition('/')[0]]}/{name.partition('/')[2]}": x for name, x in batch.items()}
    close(loss(params, swapped), plain)
    # Heads of 3 and of 1/2 the identity scale the states.
    objective = CAFe(alpha_lm=0, alpha_con=1.3, temperature=0.2, pairs=True, heads=True)
    own = objective.init(16)
    scaled = jax.tree.map(lambda x: x, own)
    scaled["heads"]["query"]["matrix"] *= 3.0
    scaled["heads"]["target"]["matrix"] *= 0.5
    for start in (own, scaled):
        value, found = gradient(objective)(params | {"objective": start}, batch, KEY)
        np.testing.assert_allclose(value, plain[0], rtol=1e-5)
        close(found["mix"], plain[1]["mix"])


def test_equal_embeddings_cost_the_logarithm_of_the_batch(contrast):
    loss, params = contrast
    one = {name: x[:1] for name, x in readings("query").items()}
    same = {
        f"{side}/{name.partition('/')[2]}": x.repeat(ROWS, 0) for name, x in one.items() for side in ("query", "target")
    }
    np.testing.assert_allclose(loss(params, same)[0] / 1.3, np.log(ROWS), rtol=1e-5)


def test_a_pair_alone_has_no_loss_and_is_refused_in_training():
    objective = dataclasses.replace(JOINT, alpha_lm=0.0)
    params, batch = sums(objective), readings("query", "target", rows=1)
    assert float(evaluated(objective)(params, batch)["contrastive_loss"]) == 0
    with pytest.raises(ValueError, match="at least two pairs"):
        jax.eval_shape(objective.loss_fn(Sums()), params, batch, KEY)
    assert (objective.least_rows, CAFe(alpha_con=0).least_rows, CAFe(negatives=True).least_rows) == (2, 1, 1)


def test_labels_outside_the_counted_ones_do_not_matter():
    """The last token is nobody's input: changed, it is a label alone."""
    objective, params = CAFe(alpha_con=0), sums(JOINT)
    batch = readings("generation")
    last = batch["generation/segment_ids"].sum(axis=1) - 1
    rows = np.arange(ROWS)
    tokens = batch["generation/tokens"].copy()
    tokens[rows, last] = (tokens[rows, last] + 1) % 40 + 3
    for counted in (False, True):
        mask = batch["generation/target_mask"].copy()
        mask[rows, last] = counted
        value = lambda tokens, mask=mask: gradient(objective)(
            params, batch | {"generation/tokens": tokens, "generation/target_mask": mask}, KEY
        )[0]
        assert (float(value(tokens)) != float(value(batch["generation/tokens"]))) == counted


def test_a_term_that_is_off_costs_nothing():
    operations = lambda objective: cost.count(
        lambda params, batch: objective.loss_fn(Sums())(params, batch, KEY)[0].value(),
        sums(objective), batch_of(objective),
    ).matmul_flops  # fmt: skip
    states = 2 * ROWS * LENGTH * 16 * 16  # of one view
    logits, cosines = 2 * ROWS * LENGTH * 16 * 64, 2 * ROWS * ROWS * 16
    language, contrastive = operations(CAFe(alpha_con=0)), operations(CAFe(alpha_lm=0, pairs=True))
    assert states + logits <= language < states + 1.1 * logits
    assert 2 * states + cosines <= contrastive < 3 * states
    assert operations(CAFe(pairs=True)) == language + contrastive


def test_views_are_those_of_the_terms():
    names = lambda **options: tuple(CAFe(**options).views())
    assert names(alpha_con=0, negatives=True) == ("generation",)
    assert names(alpha_lm=0) == ("query", "target")
    assert names(negatives=True) == ("generation", "query", "target", "negative")
    one, other = (
        Conversation(
            [{"role": "user", "content": f"<image>\n{asked}"}, {"role": "assistant", "content": said}],
            ["a.png"], {"negative": "a dog"},
        )
        for asked, said in (("What is it?", "A cat."), ("Describe.", "Two cats."))
    )  # fmt: skip
    views = CAFe(negatives=True, embedding_length=7).views()
    assert views["query"].make(one, None) == views["query"].make(other, None)  # whatever was asked and said
    assert views["target"].make(one, None).messages[1]["content"] == f"A cat.{cafe.OF_TEXT}"
    assert not views["target"].make(one, None).images and not views["target"].pictures  # nothing of the picture
    assert views["negative"].make(one, None).messages[1]["content"] == f"a dog{cafe.OF_TEXT}"
    assert {name: view.length for name, view in views.items()} == dict.fromkeys(views, 7) | {"generation": None}
    # The sides of a pair are read as they are, and so is what is not one's target.
    sides = CAFe(pairs=True, negatives=True).views()
    read = {name: sides[name].make(one, 5).messages[1]["content"] for name in ("target", "negative")}
    assert read == {"target": "A cat", "negative": "a dog"}
    # What is cut is text, never the marker that a picture stands at.
    behind = Conversation([{"role": "user", "content": "What is in this: <image>?"}, one.messages[1]], ["a.png"])
    cut = {most: sides["query"].make(behind, most).messages[1]["content"].strip() for most in (4, 17, None)}
    assert cut == {4: "What<image>", 17: "What is in this: <image>", None: "What is in this: <image>?"}
    with pytest.raises(ValueError, match="no text in its field 'negative'; its fields are text"):
        cafe.negative_view(Conversation([], [], {"text": "a"}))


# What a learned temperature and heads do


def test_what_an_objective_owns_starts_as_if_it_were_not_there():
    own = CAFe(heads=True, learn_temperature=True, temperature=0.05, contrast="sigmoid", bias=-7.0).init(3)
    np.testing.assert_allclose(np.exp(own["log_scale"]), 20.0, rtol=1e-6)
    assert own["bias"] == -7.0 and own["heads"].keys() == {"query", "target"}
    for head in own["heads"].values():
        np.testing.assert_array_equal(head["matrix"], np.eye(3))
        np.testing.assert_array_equal(head["bias"], np.zeros(3))
    assert CAFe().init(3) == {} and CAFe(learn_temperature=True).init(3).keys() == {"log_scale"}


def test_a_learned_scale_is_held_at_a_hundred_and_comes_back():
    objective = CONTRASTS["one_way, heads"][0]
    params, batch = sums(objective), batch_of(objective)
    params["objective"]["log_scale"] = np.float32(7.0)
    value, found = gradient(objective)(params, batch, KEY)
    np.testing.assert_allclose(value, by_hand(objective, params, batch), rtol=1e-4)  # which takes 100
    assert float(found["objective"]["log_scale"]) > 1  # these embeddings are wrong, which a smaller scale would forgive
    rise = lambda sign: jax.grad(lambda x: sign * cafe._held(x))(jnp.float32(7.0))
    assert float(rise(1.0)) == 1 and float(rise(-1.0)) == 0


# Chunks


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_have_the_loss_and_gradient_of_the_whole_batch(chunk):
    """Eight rows with unequal numbers of counted tokens, also in chunks that do not come out even."""
    params, batch = sums(JOINT), batch_of(JOINT)
    assert len(set(batch["generation/target_mask"].sum(axis=1).tolist())) > 2
    found = gradient(dataclasses.replace(JOINT, chunk=chunk))(params, batch, KEY)
    close(found, gradient(JOINT)(params, batch, KEY))


def test_chunks_on_eight_devices():
    """Two chunks of four rows, one on each of the four devices that hold rows."""
    params, batch, mesh = sums(JOINT), batch_of(JOINT), sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    chunked = gradient(dataclasses.replace(JOINT, chunk=4), Sums(mesh=mesh))
    close(chunked(params, sharding.place_rows(batch, ROWS, mesh), KEY), gradient(JOINT)(params, batch, KEY))


@functools.cache
def dropping() -> tuple[Any, dict]:
    module = adapters.attach(Sums(), {"mix": adapters.LoRA(rank=4, dropout=0.5)})
    params = adapters.init(module, sums(JOINT), jax.random.key(1))
    params["mix"]["adapter"]["lora"]["b"] += 0.3
    return module, params


def test_a_chunk_of_all_rows_is_the_plain_program():
    module, params = dropping()
    text = lambda objective: gradient(objective, module).lower(params, batch_of(JOINT), KEY).as_text()
    assert text(dataclasses.replace(JOINT, chunk=ROWS)) == text(dataclasses.replace(JOINT, chunk=99)) == text(JOINT)


def test_chunks_with_dropout_draw_the_same_numbers_when_they_are_computed_again():
    """Against the whole batch at once, whose chunks stand on an axis of their own and are given the keys of theirs.

    Row i is in chunk i % 3, which draws by the key of its first row; views are counted in the order of their names.
    """
    module, params = dropping()
    batch = batch_of(JOINT)
    rows = np.arange(9).reshape(3, 3).T % ROWS  # [chunk, row]; the last is filled up with row 0
    back = np.argsort(np.arange(9).reshape(3, 3).T.ravel())[:ROWS]

    def whole(params, key):
        firsts = jax.random.split(key, ROWS)[rows[:, 0]]

        def states(number, name):
            def of_chunk(rows, first):
                tokens, mask = (jnp.asarray(batch[f"{name}/{x}"])[rows] for x in ("tokens", "segment_ids"))
                return models.hidden_states(module, params, tokens, mask > 0, key=jax.random.fold_in(first, number))[0]

            return jax.vmap(of_chunk)(rows, firsts).reshape(9, LENGTH, 16)[back]

        logits = states(0, "generation") @ params["model"]["embed_tokens"]["embedding"].T
        at, columns = np.nonzero(batch["generation/target_mask"])
        logps = jax.nn.log_softmax(logits)[at, columns - 1, batch["generation/tokens"][at, columns]]
        query, target = (
            cafe.unit(states(number, name)[np.arange(ROWS), batch[f"{name}/segment_ids"].sum(1) - 1])
            for number, name in enumerate(("query", "target"), 1)
        )
        cosines = query @ target.T / 0.2
        lse = [jax.nn.logsumexp(cosines, axis=axis) - jnp.diagonal(cosines) for axis in (0, 1)]
        return -0.7 * logps.mean() + 1.3 * (lse[0] + lse[1]).mean() / 2

    expected = jax.jit(jax.value_and_grad(whole))(params, KEY)
    found = gradient(dataclasses.replace(JOINT, chunk=3), module)(params, batch, KEY)
    close(found, expected)
    without = gradient(dataclasses.replace(JOINT, chunk=3))(sums(JOINT), batch, KEY)
    assert abs(float(found[0] - without[0])) > 1e-3  # dropout was there


# Evaluation


@pytest.mark.parametrize("name", ["symmetric", "one_way", "sigmoid", "negatives", "chunks"])
def test_evaluation_is_of_the_real_rows(name):
    """Filled rows are as if they were not there; what is evaluated is what is trained; a negative can be nearest too."""
    options = {
        "one_way": {"contrast": "one_way"}, "sigmoid": {"contrast": "sigmoid", "bias": -2.0},
        "negatives": {"negatives": True, "contrast": "one_way"}, "chunks": {"chunk": 3},
    }.get(name, {})  # fmt: skip
    objective = dataclasses.replace(JOINT, **options)
    params, batch = sums(objective), batch_of(objective)
    for x in batch.values():
        x[5:] = 0
    real = {key: x[:5] for key, x in batch.items()}
    found = evaluated(objective)(params, batch)
    np.testing.assert_allclose(found["loss"], by_hand(objective, params, real), rtol=1e-5)
    language = by_hand(dataclasses.replace(objective, alpha_con=0.0, negatives=False), params, real) / 0.7
    np.testing.assert_allclose(found["language_loss"], language, rtol=1e-5)
    np.testing.assert_allclose(
        found["contrastive_loss"], by_hand(dataclasses.replace(objective, alpha_lm=0.0), params, real) / 1.3, rtol=1e-5
    )
    embedded = {side: embedded_by_hand(params, real, side) for side in objective.views() if side != "generation"}
    candidates = np.concatenate([embedded["target"], embedded.get("negative", np.zeros((0, 16)))])
    nearest = (embedded["query"] @ candidates.T).argmax(axis=1)
    np.testing.assert_allclose(found["recall"], (nearest == np.arange(5)).mean())


def test_recall_is_one_where_each_finds_its_own_and_less_where_a_negative_is_as_near():
    objective = dataclasses.replace(JOINT, negatives=True, contrast="one_way")
    params, batch = sums(objective), batch_of(objective)
    batch |= {name.replace("query", "target"): x for name, x in batch.items() if name.startswith("query")}
    assert float(evaluated(objective)(params, batch)["recall"]) == 1
    mine = {name.replace("query", "negative"): x.copy() for name, x in batch.items() if name.startswith("query")}
    for x in mine.values():
        x[6:] = 0
    batch |= mine
    assert float(evaluated(objective)(params, batch)["recall"]) == 2 / 8


# Embeddings


def test_pooling_by_hand():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(5, 6, 4)), jnp.float32)
    tokens = rng.integers(10, 20, (5, 6))
    tokens[:, 2] = 7
    tokens[0, 4] = tokens[3, 0] = 7
    mask = jnp.array(
        [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]], bool
    )
    last = np.stack([hidden[0, 5], hidden[1, 3], hidden[2, 5], hidden[3, 1], np.zeros(4)])
    np.testing.assert_array_equal(cafe.pool(hidden, tokens, mask), last)
    # The token in padding is not read; the last of several is.
    seen = np.stack([hidden[0, 4], hidden[1, 2], hidden[2, 2], hidden[3, 0], np.zeros(4)])
    np.testing.assert_array_equal(cafe.pool(hidden, tokens, mask, pooling="token", token_id=7), seen)
    means = np.stack(
        [np.asarray(hidden)[i, np.asarray(mask)[i]].mean(0) if mask[i].any() else np.zeros(4) for i in range(5)]
    )
    np.testing.assert_allclose(cafe.pool(hidden, tokens, mask, pooling="mean"), means, atol=1e-6)
    ones = jnp.full((1, 1000, 1), 1.001, jnp.bfloat16)  # summed in bfloat16 it would stop at 256
    assert float(cafe.pool(ones, np.zeros((1, 1000)), jnp.ones((1, 1000), bool), pooling="mean")[0, 0]) == 1.0


def test_unit_rows_and_rows_of_zeros():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)) * [[1e-6], [1.0], [1e6]], jnp.float32).at[1].set(0)
    np.testing.assert_allclose(jnp.linalg.norm(cafe.unit(x), axis=1), [1, 0, 1], rtol=1e-5)
    assert cafe.unit(x.astype(jnp.bfloat16)).dtype == jnp.float32
    for objective in (CAFe(alpha_lm=0, pairs=True), CAFe(alpha_lm=0, pairs=True, contrast="sigmoid")):
        loss = lambda x, objective=objective: objective._contrast(
            {}, {"query": cafe.unit(x), "target": cafe.unit(x[::-1])}, None
        )
        value, found = jax.jit(jax.value_and_grad(loss))(x)
        assert np.isfinite(value) and np.isfinite(found).all() and not found[1].any()


@pytest.fixture(scope="module")
def seeing():
    """A VLM with its parameters, and the hidden states it gives, compiled once for [4, 16] tokens."""
    module, params = tiny.vlm(num_layers=2)

    @jax.jit
    def hidden(tokens, mask, pixels, places):
        images = models.Images(pixels, places)
        return models.hidden_states(module, params, tokens, mask, images=images)[0]

    return module, params, hidden


def placed(rows, before):
    """Rows of (tokens, picture) in 16 columns, so many of padding in front; a picture's features stand at tokens 1 to 4."""
    tokens, mask = np.full((4, 16), 9, np.int32), np.zeros((4, 16), bool)
    places, pixels = np.full((4, 16, 1), -1, np.int32), np.zeros((4, 1, 8, 8, 3), np.uint8)
    for i, (row, picture) in enumerate(rows):
        here = slice(before[i], before[i] + len(row))
        tokens[i, here], mask[i, here] = row, True
        places[i, here.start + 1 : here.start + 5, 0], pixels[i] = np.arange(4), picture
    return tokens, mask, pixels, places


def test_embeddings_depend_on_nothing_but_what_stands_before_them_in_their_row(seeing):
    module, params, hidden = seeing
    rng = np.random.default_rng(0)
    rows = [
        (np.array([5, *[IMAGE] * 4, *rng.integers(10, 50, size)]), rng.integers(0, 256, (1, 8, 8, 3)))
        for size in (2, 4, 7, 9)
    ]
    right = placed(rows, [0, 0, 0, 0])
    states = np.asarray(hidden(*right))
    expected = unit(np.stack([states[i, len(row) - 1] for i, (row, _) in enumerate(rows)]))
    embed = jax.jit(functools.partial(cafe.embed, module, params))
    asked = lambda tokens, mask, pixels, places: embed(tokens, mask, models.Images(pixels, places))
    found = asked(*right)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=ATOL)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, rtol=1e-5)
    for before in ([16 - len(row) for row, _ in rows], [3, 2, 1, 0]):  # on the left, on both sides
        np.testing.assert_allclose(asked(*placed(rows, before)), expected, atol=ATOL)
    others = asked(*placed([rows[0], rows[2], rows[1], rows[3]], [0, 4, 0, 2]))  # other neighbours
    np.testing.assert_allclose(others, expected[[0, 2, 1, 3]], atol=ATOL)
    tokens, mask, pixels, places = right
    tokens = np.where(mask, tokens, 33)
    np.testing.assert_array_equal(asked(tokens, mask, pixels, places), found)  # what padding holds
    # What follows the token that is read changes nothing; what precedes it and the picture do.
    read = lambda tokens, pixels=pixels: cafe.unit(
        cafe.pool(hidden(tokens, mask, pixels, places), tokens, jnp.asarray(mask), pooling="token", token_id=51)
    )
    tokens[:, 6] = 51
    later, earlier = tokens.copy(), tokens.copy()
    later[:, 7:], earlier[:, 5] = 44, 44
    np.testing.assert_allclose(read(later), read(tokens), atol=ATOL)
    assert float(jnp.abs(read(earlier) - read(tokens)).max()) > 1e-3
    assert float(jnp.abs(read(tokens, 255 - pixels) - read(tokens)).max()) > 1e-3


def test_what_cannot_be_embedded_says_why():
    module, params = tiny.decoder(num_layers=2)
    tokens = np.array([[5, 7, 6], [5, 6, 8]])
    embed = functools.partial(cafe.embed, module, params, tokens)
    for options, says in (
        ({"pooling": "first"}, "pooling='first' is unknown"),
        ({"pooling": "token"}, "pooling='token' with token_id=None"),
        ({"token_id": 3}, "pooling='last' with token_id=3"),
        ({"pooling": "token", "token_id": 7}, "row 1 has no real token 7"),
        ({"mask": np.array([[True] * 3, [False] * 3])}, "row 1 has no real token"),
        ({"images": np.zeros((2, 1, 8, 8, 3))}, "Decoder reads no images"),
    ):
        with pytest.raises(ValueError, match=says):
            embed(**options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"contrast": "symetric"}, "did you mean 'symmetric'"),
        ({"pooling": "max"}, "pooling='max' is unknown"),
        ({"gather": "offical"}, "did you mean 'official'"),
        ({"alpha_lm": -1.0}, "alpha_lm=-1.0 and alpha_con=1.0 must not be negative"),
        ({"alpha_lm": 0.0, "alpha_con": 0.0}, "nor both 0"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"temperature": 0.002, "learn_temperature": True}, "a learned one is held above 0.01"),
        ({"pooling": "token"}, "'token' needs one"),
        ({"token_id": 4}, "pooling='last' with token_id=4"),
        ({"contrast": "sigmoid", "negatives": True}, "no columns to add"),
        ({"chunk": 0}, "chunk=0 must be at least 1"),
        ({"embedding_length": 1}, "embedding_length=1 must be at least 2"),
    ],
)
def test_options_that_cannot_be(options, says):
    with pytest.raises(ValueError, match=says):
        CAFe(**options)
