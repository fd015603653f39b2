"""Embeddings of rows: which text and picture is read, in which order, and that batches do not matter."""

import functools
import json

import jax
import numpy as np
import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast

from jaxmethods import data
from jaxmethods.evals.embedding import embed_rows
from jaxmethods.objectives import CAFe, cafe
from tests import tiny
from tests.data.conftest import CHATML, byte_level

LENGTH = 160
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


@pytest.fixture(scope="module")
def model():
    """A tiny VLM, its parameters, and a tokenizer of the ChatML form."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]),
        eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=CHATML,
    )  # fmt: skip
    token_id = tokenizer.convert_tokens_to_ids("<image>")
    return *tiny.vlm(num_layers=2, image_token_id=token_id, vocab_size=len(tokenizer)), tokenizer


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Five rows with pictures of 8 x 8 pixels, which the tower sees as they are; and the file that holds them."""
    folder = tmp_path_factory.mktemp("rows")
    rng, told = np.random.default_rng(0), []
    for i, caption in enumerate(("a cat", "two dogs on a log", "the heart is normal", "no", "a long day in the sun")):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(folder / f"{i}.png")
        told.append({"prompt": f"<image>\nWhat is it, {i}?", "answer": caption, "images": f"{i}.png"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return folder, told


@pytest.fixture(scope="module")
def found(model, rows):
    module, params, tokenizer = model
    return embed_rows(module, params, tokenizer, str(rows[0] / "rows.jsonl"), sequence_length=LENGTH, batch_size=2)


def by_hand(model, text, picture=None):
    """The embedding of a text that is written out, closing token last."""
    module, params, tokenizer = model
    ids = tokenizer(text.replace("<image>", "<image>" * 4), add_special_tokens=False)["input_ids"]
    tokens = np.array([ids + [0] * (LENGTH - len(ids))])
    pixels = None if picture is None else np.asarray(Image.open(picture))[None, None]
    return _embed(module)(params, tokens, np.arange(LENGTH)[None] < len(ids), pixels)[0]


@functools.cache
def _embed(module):
    return jax.jit(functools.partial(cafe.embed, module))


def test_a_picture_and_a_caption_are_read_as_published(model, rows, found):
    folder, told = rows
    for i in (0, 3):
        asked = f"{SYSTEM}<|im_start|>user\n{{}}<|im_end|>\n<|im_start|>assistant\n<|im_end|>"
        query = by_hand(model, asked.format("<image>\nCompress this image in one word:"), folder / f"{i}.png")
        target = by_hand(model, asked.format(told[i]["answer"] + "Compress this sentence in one word:"))
        np.testing.assert_allclose(found["query"][i], query, atol=2e-5)
        np.testing.assert_allclose(found["target"][i], target, atol=2e-5)
    for embedded in found.values():
        assert embedded.shape == (5, 32) and embedded.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1.0, rtol=1e-5)
        assert np.linalg.norm(embedded[:, None] - embedded[None], axis=2)[~np.eye(5, dtype=bool)].min() > 1e-3


def test_files_and_rows_in_memory_in_any_order_give_the_same(model, rows, found):
    module, params, tokenizer = model
    folder, told = rows
    given = [row | {"images": str(folder / row["images"])} for row in told[::-1]]
    embed = functools.partial(embed_rows, module, params, tokenizer, sequence_length=LENGTH, batch_size=2)
    said = []
    backwards = embed(given, views=("target",), progress=said.append)
    assert said == ["target: 2 of 5", "target: 4 of 5", "target: 5 of 5"]
    assert backwards.keys() == {"target"}
    np.testing.assert_allclose(backwards["target"], found["target"][::-1], atol=2e-5)
    for first in (embed(given[::-1], limit=3), embed(data.Source(str(folder / "rows.jsonl")), limit=3)):
        for name, embedded in first.items():
            np.testing.assert_allclose(embedded, found[name][:3], atol=2e-5)


def test_sides_of_pairs_through_heads(model):
    module, params, tokenizer = model
    rows = [{"prompt": "how many?", "answer": "three cats"}, {"prompt": "where?", "answer": "on the mat"}]
    embed = functools.partial(embed_rows, module, rows=rows, tokenizer=tokenizer, sequence_length=LENGTH, batch_size=2)
    plain = embed(params, objective=CAFe(pairs=True), views=("query",))["query"]
    asked = by_hand(model, f"{SYSTEM}<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\n<|im_end|>")
    np.testing.assert_allclose(plain[1], asked, atol=2e-5)
    objective = CAFe(pairs=True, heads=True)
    own = objective.init(32)
    matrix = np.random.default_rng(1).normal(size=(32, 32)).astype(np.float32)
    own["heads"]["query"]["matrix"] = matrix
    headed = embed(params | {"objective": own}, objective=objective, views=("query",))["query"]
    turned = plain @ matrix
    np.testing.assert_allclose(headed, turned / np.linalg.norm(turned, axis=1, keepdims=True), atol=2e-5)


def test_what_cannot_be_embedded_says_why(model, rows):
    module, params, tokenizer = model
    embed = functools.partial(embed_rows, module, params, tokenizer, sequence_length=LENGTH, batch_size=2)
    answers = [{"prompt": "a", "answer": "b"}]
    with pytest.raises(ValueError, match="view 'image' is unknown; the views are query, target"):
        embed(answers, views=("image",))
    with pytest.raises(
        ValueError, match=r"row 1: this row has no picture to embed; its messages are user: 'a', assistant: 'b'"
    ):
        embed(answers, views=("query",))
    with pytest.raises(ValueError, match="empty list"):
        embed([])
    three = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    with pytest.raises(ValueError, match=f"row 0: its target has no token {three}"):
        embed(answers, objective=CAFe(pooling="token", token_id=three), views=("target",))
