"""Prompts as batches: the same tokens and pictures on either side of the padding."""

import dataclasses

import numpy as np
import pytest

from jaxmethods.data import Example, Renderer, prompt_batch
from tests.data.test_pictures import BLUE, GREEN, RED, colours, flat, ids, sight, tokenizer


def examples(kind="llava"):
    one, *two = flat(RED, (16, 16)), flat(GREEN), flat(BLUE)  # the first fills five crops where a model has crops
    prompt = Renderer(tokenizer(), sight=sight(kind)).prompt
    return [prompt("<image>\nhow many cats?", one), prompt("the dog"), prompt("<image> and <image> now?", two)]


def test_prompts_end_at_one_column_or_begin_at_one():
    given = examples()
    text = lambda content: ids(f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n")
    picture = "<|picture|>" * 4
    wanted = [
        text(f"{picture}\nhow many cats?"), text("the dog"), text(f"{picture} and {picture} now?"),
    ]  # fmt: skip
    width = max(map(len, wanted))
    for length in (None, width + 3):
        for left in (True, False):
            batch = prompt_batch(given, sight=sight(), left=left, length=length)
            assert batch["tokens"].shape == batch["mask"].shape == (3, length or width)
            for row, tokens in enumerate(wanted):
                padding = (length or width) - len(tokens)
                here = slice(padding, None) if left else slice(len(tokens))
                assert batch["tokens"][row, here].tolist() == tokens
                assert batch["mask"][row].sum() == len(tokens) and batch["mask"][row, here].all()
                assert not batch["tokens"][row][~batch["mask"][row]].any()
    text_only = prompt_batch([given[1]])
    assert text_only["tokens"].tolist() == [wanted[1]] and text_only.keys() == {"tokens", "mask"}


@pytest.mark.parametrize("kind", ["llava", "llava_onevision"])
def test_pictures_stand_at_their_tokens(kind):
    given, eyes = examples(kind), sight(kind)
    batches = {left: prompt_batch(given, sight=eyes, left=left) for left in (True, False)}
    for batch in batches.values():
        assert batch["pixels"].shape == (3, {"llava": 2, "llava_onevision": 5}[kind], 8, 8, 3)
        for row, wanted in enumerate(([RED], [], [GREEN, BLUE])):
            arrays = {name: x[row] for name, x in batch.items()}
            seen = [colour for colour in colours(arrays, arrays["mask"], eyes) if colour]
            assert list(dict.fromkeys(seen)) == wanted and len(seen) % 4 == 0
    for row in range(3):  # the sides differ by the padding alone
        left, right = ({name: x[row] for name, x in batches[side].items()} for side in (True, False))
        for name in left.keys() - {"pixels", "mask"}:
            np.testing.assert_array_equal(left[name][left["mask"]], right[name][right["mask"]])
        np.testing.assert_array_equal(left["pixels"], right["pixels"])


def test_a_token_of_padding_is_no_picture():
    """Padding is token 0, which may be the image token."""
    eyes = dataclasses.replace(sight(), image_token_id=0)
    (one, two, _) = examples()
    turned = one._replace(tokens=np.where(one.tokens == sight().image_token_id, 0, one.tokens).astype(np.int32))
    for left in (True, False):
        batch = prompt_batch([turned, Example(two.tokens, two.target_mask)], sight=eyes, left=left, length=40)
        assert (batch["places"][:, :, 0] >= 0).sum(axis=1).tolist() == [4, 0]


def test_room_for_crops_and_tokens():
    given = examples()
    assert prompt_batch(given, sight=sight(), crops=5)["pixels"].shape == (3, 5, 8, 8, 3)
    batch = prompt_batch(given[1:2], sight=sight())
    assert batch["pixels"].shape == (1, 1, 8, 8, 3) and (batch["places"] == -1).all()
    with pytest.raises(ValueError, match="2 pictures of a row make 2 crops, and the batch holds 1 a row"):
        prompt_batch(given, sight=sight(), crops=1)
    longest = max(len(example.tokens) for example in given)
    with pytest.raises(ValueError, match=f"a prompt has {longest} tokens and there is room for {longest - 1}; raise"):
        prompt_batch(given, length=longest - 1)
    with pytest.raises(ValueError, match="there are no prompts to make a batch of"):
        prompt_batch([])
