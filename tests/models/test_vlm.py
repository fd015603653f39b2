"""Models that see, by their laws: what stands at image tokens, and what changes nothing."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, generation, models, sharding, tree
from jaxmethods.images import NEWLINE, TEXT
from jaxmethods.models import Decoder, Images, VisionTower
from jaxmethods.models.decoder import Given
from jaxmethods.models.vlm import as_images
from jaxmethods.objectives import Supervised
from tests import tiny

WIDE = dict(hidden_size=64, intermediate_size=96)  # widths that can be quantised
FEATURES, TOKEN, LENGTH, CROPS = 4, 60, 20, 3
SMORE = adapters.SMoRE(experts=(2, 3), fanout=(1, 2), ranks=(2, 2), router_dim=6, gate_dim=4)


def crops(rows, count=CROPS, seed=3):
    return np.random.default_rng(seed).integers(0, 256, (rows, count, 8, 8, 3)).astype(np.uint8)


def batch(rows=3, counts=(2, 0, 1), length=LENGTH, count=CROPS):
    """(tokens, mask, images): rows of words with pictures between them, padded on the right; every place has one feature."""
    rng = np.random.default_rng(4)
    tokens, mask = rng.integers(3, TOKEN, (rows, length)).astype(np.int32), np.zeros((rows, length), bool)
    places, pixels = np.full((rows, length, 1), TEXT, np.int32), crops(rows, count)
    for row in range(rows):
        at = 2
        for picture in range(counts[row % len(counts)]):
            here = slice(at, at + FEATURES)
            tokens[row, here], places[row, here, 0] = TOKEN, picture * FEATURES + np.arange(FEATURES)
            at += FEATURES + 1
        mask[row, : at + 1 + row % 3] = True
        pixels[row, counts[row % len(counts)] :] = 0
    return tokens, mask, Images(pixels, places)


def logits(images, tokens=None, mask=None):
    """Logits at the real tokens of `batch`, and one program for all that only differ in values."""
    module, params = tiny.vlm(**WIDE)
    given_tokens, given_mask, _ = batch()
    tokens, mask = given_tokens if tokens is None else tokens, given_mask if mask is None else mask
    return np.asarray(models.logits(module, params, tokens, mask, images=images))[mask]


# What stands where


def test_without_pictures_it_is_its_decoder_bit_for_bit():
    module, params = tiny.vlm(**WIDE)
    tokens, mask, _ = batch()
    plain = Decoder(module.config)
    of_decoder = {name: params[name] for name in ("model", "lm_head")}
    one, two = models.logits(module, params, tokens, mask), models.logits(plain, of_decoder, tokens, mask)
    np.testing.assert_array_equal(one, two)
    assert {models.part_of(path) for path in tree.flatten(of_decoder)} == {"decoder"}
    assert {models.part_of(path) for path in tree.flatten(params)} == set(models.PARTS)


def projected(module, params, pixels):
    """Features of crops [n, 8, 8, 3] in the decoder's width: the tower by itself, the projector in numpy and in float64."""
    tower, weights = VisionTower(module.sight.tower), tree.flatten(params["projector"])
    features = jax.jit(tower.apply)({"params": params["vision_tower"]}, pixels).features
    x = np.asarray(features, np.float64) @ np.asarray(weights["linear_1/kernel"], np.float64) + weights["linear_1/bias"]
    x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x @ np.asarray(weights["linear_2/kernel"], np.float64) + weights["linear_2/bias"]


def interpolated():
    """(tokens, `Images`) of four corners, any features with any weights, and newlines."""
    rng = np.random.default_rng(6)
    places = rng.integers(0, CROPS * FEATURES, (3, LENGTH, 4)).astype(np.int32)
    weights = rng.dirichlet(np.ones(4), (3, LENGTH)).astype(np.float32)
    places[:, [0, 1, 9, 11, 19]] = TEXT
    places[0, [5, 8]], weights[0, [5, 8]] = NEWLINE, [1, 0, 0, 0]
    places[1, 2:] = TEXT
    tokens = np.where(places[:, :, 0] == TEXT, rng.integers(3, TOKEN, (3, LENGTH)), TOKEN).astype(np.int32)
    return tokens, Images(crops(3), places, weights)


class GivenEmbeddings(Decoder):
    """A decoder whose pictures are what stands in their place."""

    def _see(self, tokens, images):
        return images


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_image_tokens_are_features_of_the_tower_through_the_projector(kind):
    """By the decoder itself, given embeddings that are put together by loops; with newlines and averaged features too."""
    module, params = tiny.vlm(kind, **WIDE)
    tokens, images = interpolated() if kind == "llava_onevision" else (batch()[0], batch()[2])
    embeddings = np.zeros((*tokens.shape, WIDE["hidden_size"]))
    for row, pixels in enumerate(images.pixels):
        features = projected(module, params, pixels).reshape(CROPS * FEATURES, -1)
        for token, places in enumerate(images.places[row]):
            for corner, place in enumerate(places):
                weight = 1.0 if images.weights is None else images.weights[row, token, corner]
                if place == NEWLINE:
                    embeddings[row, token] += weight * np.asarray(params["image_newline"])
                elif place != TEXT:
                    embeddings[row, token] += weight * features[place]
    of_decoder = {name: params[name] for name in ("model", "lm_head")}

    @jax.jit
    def decoded(embeddings):
        plain, given = GivenEmbeddings(module.config), Given(embeddings, jnp.asarray(tokens == TOKEN))
        return models.logits_of(plain, of_decoder, models.hidden_states(plain, of_decoder, tokens, images=given)[0])

    wanted, blind = decoded(jnp.asarray(embeddings, jnp.float32)), decoded(jnp.zeros(embeddings.shape))
    np.testing.assert_allclose(models.logits(module, params, tokens, images=images), wanted, atol=2e-5)
    assert np.abs(np.asarray(blind) - wanted).max() > 0.1  # the pictures are not lost in the rest


# What changes nothing, and what does


def test_two_pictures_swapped_with_their_places_change_nothing():
    tokens, mask, images = batch()
    pixels = images.pixels[:, [1, 0, 2]]
    swap = np.array([FEATURES, 0, 2 * FEATURES])  # where each crop's features begin now
    moved = np.where(images.places < 0, images.places, swap[images.places // FEATURES] + images.places % FEATURES)
    plain = logits(images)
    np.testing.assert_allclose(logits(Images(pixels, moved.astype(np.int32))), plain, atol=1e-5)
    assert np.abs(logits(Images(pixels, images.places)) - plain).max() > 0.1  # without their places they do


def test_crops_that_no_token_names_change_nothing():
    tokens, mask, images = batch()
    plain = logits(images)
    unused = images.pixels.copy()
    unused[0, 2:], unused[1], unused[2, 1:] = 255, 99, 7
    np.testing.assert_allclose(logits(images._replace(pixels=unused)), plain, atol=1e-5)
    more = np.concatenate([images.pixels, np.zeros_like(images.pixels[:, :2])], axis=1)
    np.testing.assert_allclose(logits(images._replace(pixels=more)), plain, atol=1e-5)


def test_padding_may_stand_on_either_side():
    tokens, mask, images = batch()
    left = lambda x: np.stack([np.roll(row, (~m).sum(), axis=0) for row, m in zip(x, mask, strict=True)])
    turned = logits(images._replace(places=left(images.places)), left(tokens), left(mask))
    np.testing.assert_allclose(turned, logits(images), atol=1e-5)


def test_rows_see_their_own_pictures_alone():
    tokens, mask, images = batch()
    owner = np.nonzero(mask)[0]
    plain, other = logits(images), images.pixels.copy()
    other[0] = crops(1, seed=8)[0]
    changed = logits(images._replace(pixels=other))
    np.testing.assert_allclose(changed[owner > 0], plain[owner > 0], atol=1e-6)
    assert np.abs(changed - plain)[owner == 0].max() > 0.1
    alone = models.logits(*tiny.vlm(**WIDE), tokens, mask)  # the row of text needs no tower
    np.testing.assert_allclose(plain[owner == 1], np.asarray(alone)[1][mask[1]], atol=1e-5)
    text = np.arange(3, 3 + LENGTH)[None] + tokens * 0  # and no place takes what stands beside the pictures
    nothing = Images(images.pixels, np.full_like(images.places, TEXT))
    module, params = tiny.vlm(**WIDE)
    blind, seeing = models.logits(module, params, text, mask), models.logits(module, params, text, mask, images=nothing)
    np.testing.assert_allclose(seeing, blind, atol=1e-5)


def test_pixels_alone_stand_in_order():
    tokens, mask, images = batch(counts=(3, 0, 3))
    images = images._replace(pixels=crops(3))
    np.testing.assert_array_equal(logits(images.pixels, tokens, mask), logits(images, tokens, mask))
    module, params = tiny.vlm(**WIDE)
    targets = mask & (tokens != TOKEN)
    scored = [models.sequence_logps(module, params, tokens, targets, mask, images=x) for x in (images, images.pixels)]
    np.testing.assert_array_equal(*scored)
    logps = jax.nn.log_softmax(models.logits(module, params, tokens, mask, images=images))
    each = np.take_along_axis(np.asarray(logps)[:, :-1], tokens[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(scored[0], np.where(targets[:, 1:], each, 0).sum(axis=1), rtol=1e-5)


def test_wrong_images_are_told_of():
    module, _ = tiny.vlm(**WIDE)
    tokens, _, images = batch(counts=(3, 0, 3))
    assert as_images(module, tokens, None) is None
    cases = [
        (module, tokens, crops(3, 2), r"row 0 has 12 image tokens and 2 pictures of 4 features; it needs one token for each"),
        (module, tokens, crops(2), r"pixels have shape \(2, 3, 8, 8, 3\); these rows want \(3, crops, 8, 8, 3\)"),
        (module, tokens, crops(3)[:, :, :4], r"pixels have shape \(3, 3, 4, 8, 3\); these rows want \(3, crops, 8, 8, 3\)"),
        (module, tokens, crops(3)[:, 0], r"pixels have shape \(3, 8, 8, 3\)"),
        (module, np.where(tokens == TOKEN, 5, tokens), images, r"row 0 has 0 image tokens and 12 features"),
        (module, tokens, images._replace(places=np.roll(images.places, 1, axis=1)), "or they stand at different places"),
        (module, tokens, images._replace(places=images.places[:, :-1]), r"row 0 has 12 image tokens and 12 features"),
        (tiny.decoder(**WIDE)[0], tokens, images, "Decoder reads no images; leave images=None"),
        (tiny.vlm("llava_onevision", **WIDE)[0], tokens, crops(3), "cuts pictures into crops; give images as .*Images"),
    ]  # fmt: skip
    for model, given, pixels, message in cases:
        with pytest.raises(ValueError, match=message):
            as_images(model, given, pixels)
    with pytest.raises(ValueError, match="reads no images"):
        models.logits(*tiny.decoder(**WIDE), tokens, images=images)
    with pytest.raises(ValueError, match="it needs one token for each"):
        generation.generate(*tiny.vlm(**WIDE), tokens, max_new_tokens=2, temperature=0, images=crops(3, 2))


def test_a_wrong_architecture_is_refused():
    module, _ = tiny.vlm(**WIDE)
    whole, sight = module.whole, module.sight
    with pytest.raises(ValueError, match="image_token_id=61 is no token of a vocabulary of 61"):
        models.VLMConfig(whole.decoder, tiny.sight(image_token_id=61))
    with pytest.raises(ValueError, match="the tower gives 4 features a crop and the image format counts 9"):
        models.Sight("llava", sight.tower, sight.format.__class__(size=8, grid=3), TOKEN)
    for told, message in (
        ({"family": "flamingo"}, "family 'flamingo' is unknown"),
        ({"activation": "relu"}, "'relu' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            models.Sight(**{**vars(sight), **told})


# Generation, adapters, quantisation


def test_greedy_generation_is_the_argmax_of_logits_step_by_step():
    module, params = tiny.vlm(**WIDE)
    tokens, mask, images = batch()
    left = lambda x: np.stack([np.roll(row, (~m).sum(), axis=0) for row, m in zip(x, mask, strict=True)])
    prompt, seen, places = left(tokens), left(mask), left(images.places)
    new = 4
    made = generation.generate(
        module, params, prompt, seen, max_new_tokens=new, temperature=0.0, images=images._replace(places=places)
    )
    # All steps in rows of one width: what is not written yet is padding.
    wide = lambda x, filler: np.concatenate([x, np.full((3, new, *x.shape[2:]), filler, x.dtype)], axis=1)
    tokens, mask, images = wide(prompt, 0), wide(seen, False), images._replace(places=wide(places, TEXT))
    for step in range(new):
        column = LENGTH + step
        here = models.logits(module, params, tokens, mask, images=images)[:, column - 1]
        tokens[:, column], mask[:, column] = np.argmax(here, axis=-1), True
    np.testing.assert_array_equal(made.tokens, tokens[:, LENGTH:])
    assert len(set(made.tokens.ravel().tolist())) > 1


def test_adapters_of_any_part():
    module, base = tiny.vlm(**WIDE)
    tokens, mask, images = batch()
    lora = adapters.LoRA(rank=2)
    patterns = {
        "vision_tower/.*q_proj": lora, "projector/linear": lora, "model/layers/mlp/up_proj": lora,
        "vision_tower/.*fc1": SMORE, "projector/linear_1": SMORE,
    }  # fmt: skip
    adapted = adapters.attach(module, patterns)
    start = jax.jit(functools.partial(adapters.init, adapted))
    trained, frozen = adapters.partition(start(base, jax.random.key(0)))
    layers = {path.split("/adapter/")[0] for path in tree.flatten(trained)}
    assert layers == {
        "vision_tower/encoder/layers/self_attn/q_proj", "vision_tower/encoder/layers/mlp/fc1", "projector/linear_1",
        "projector/linear_2", "model/layers/mlp/up_proj",
    }  # fmt: skip
    assert not any(adapters.is_adapter(path) for path in tree.flatten(frozen))

    @jax.jit
    def compute(trained, mask):
        """Gradient of one token's log-probability at all real words, the balance loss, and the logits."""

        def loss(trained):
            params = tree.combine(trained, frozen)
            hidden, aux = models.hidden_states(adapted, params, tokens, mask, images=images)
            logits = models.logits_of(adapted, params, hidden)
            return jnp.where(mask, jax.nn.log_softmax(logits)[:, :, 5], 0).sum() + aux, (aux, logits)

        return jax.grad(loss, has_aux=True)(trained)

    gradient, (balance, found) = compute(trained, mask)
    np.testing.assert_allclose(np.asarray(found)[mask], logits(images), atol=1e-5)  # nothing has changed at the start
    gradient = tree.flatten(gradient)
    assert gradient.keys() == tree.flatten(trained).keys() and all(np.isfinite(x).all() for x in gradient.values())
    first = [path for path in gradient if path.endswith("lora/b") or path.endswith("experts/proj/kernel")]
    assert len(first) == 6
    for path in first:  # what is zero at the start learns first, in every layer of a stack
        size = np.abs(gradient[path]).max(axis=(-2, -1))
        assert (size > 1e-6).all(), path
    # Layers that see crops have no padding, and the mask of the tokens says nothing of them.
    assert float(balance) > 0
    np.testing.assert_array_equal(compute(trained, np.ones_like(mask))[1][0], balance)


def test_the_tower_and_the_projector_stay_in_float(tmp_path):
    module, params = tiny.vlm(**WIDE)
    models.save(tmp_path / "model", module, params)
    tokens, mask, images = batch()
    loaded, read = models.load(tmp_path / "model", quantize="int8")
    quantised, made = models.quantize(module, params, "int8")
    assert loaded.quantization == quantised.quantization == "int8"
    for flat in (tree.flatten(read), tree.flatten(made)):
        for path, x in flat.items():
            codes = path.startswith("model/layers") and path.endswith("/kernel")
            scales = path.endswith("kernel_scale") and path.startswith("model/layers")
            assert x.dtype == (jnp.int8 if codes else jnp.float16 if scales else jnp.float32), path
    of_eyes = {path: x for path, x in tree.flatten(params).items() if models.part_of(path) != "decoder"}
    for path, x in of_eyes.items():
        np.testing.assert_array_equal(tree.flatten(made)[path], x, err_msg=path)
    float_module, opened = models.dequantize(quantised, made)
    assert float_module == module
    wanted = models.logits(module, opened, tokens, mask, images=images)
    np.testing.assert_allclose(
        np.asarray(models.logits(quantised, made, tokens, mask, images=images))[mask],
        np.asarray(wanted)[mask],
        atol=1e-4,
    )
    assert models.shapes(tmp_path / "model", quantize="int8")[0].sight == loaded.sight


# Devices


@functools.cache
def pictured(rows=8, length=32):
    """A batch as the data room makes it, of rows of no, one and three pictures."""
    tokens, mask, images = batch(rows, counts=(1, 0, 3), length=length)
    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0).astype(np.int32)
    target = mask & (tokens != TOKEN) & (positions > 0)
    arrays = {"tokens": tokens, "target_mask": target, "segment_ids": mask.astype(np.int32), "positions": positions}
    return arrays | {"pixels": images.pixels, "places": images.places}


@functools.cache
def compiled(axes):
    """(loss, gradient) of supervised training on `pictured`, and the program's text."""
    module, params = tiny.vlm(**WIDE)
    given = pictured()
    if axes:
        mesh = sharding.make_mesh(dict(axes))
        module = module.clone(mesh=mesh)
        params = jax.device_put(params, sharding.shardings_for(params, mesh, models.RULES))
        given = sharding.place_rows(given, len(given["tokens"]), mesh)
    loss_fn = Supervised().loss_fn(module)
    step = jax.jit(jax.value_and_grad(lambda params, batch: loss_fn(params, batch, None)[0].value()))
    program = step.lower(params, given).compile()
    value, gradient = program(params, given)
    return float(value), jax.tree.map(np.asarray, gradient), program.as_text()


@pytest.mark.parametrize(
    "axes", [(("data", 2), ("fsdp", 2), ("sequence", 2)), (("fsdp", 8),)], ids=["data-fsdp-sequence", "fsdp"]
)
def test_eight_devices_are_one(axes):
    value, gradient, one_text = compiled(())
    spread, spread_gradient, text = compiled(axes)
    assert abs(spread - value) < 1e-5
    for (path, one), two in zip(tree.flatten(gradient).items(), tree.flatten(spread_gradient).values(), strict=True):
        np.testing.assert_allclose(two, one, atol=1e-5, err_msg=path)
        assert np.abs(one).max() > 1e-4 or not path.endswith("kernel"), path
    # No device holds the pictures of all rows, or what the tower, the projector or the decoder makes of them.
    (rows, length), width = pictured()["tokens"].shape, WIDE["hidden_size"]
    own, tokens = (
        rows // math.prod(size for name, size in axes if name != "sequence"),
        length // dict(axes).get("sequence", 1),
    )
    for shape in ((own * CROPS, 8, 8, 3), (own * CROPS, 5, 16), (own * CROPS, FEATURES, width), (own, tokens, width)):
        assert f"[{','.join(map(str, shape))}]" in text, shape
    whole = {shape for shape in shapes(one_text) if shape[0] in (rows, rows * CROPS) and math.prod(shape) >= 1000}
    features = rows * CROPS, FEATURES, width
    assert {(rows, CROPS, 8, 8, 3), (rows * CROPS, 5, 16), features, (rows, length, width)} <= whole
    assert not whole & shapes(text)


def shapes(text):
    """Of the arrays of a program, without leading ones."""
    found = {tuple(map(int, dims.split(","))) for dims in re.findall(r"(?:f32|u8)\[([\d,]+)\]", text)}
    return {shape[next((i for i, size in enumerate(shape) if size > 1), 0) :] for shape in found}
