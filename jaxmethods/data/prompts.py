"""Prompts to batches: padded on the left, so that answers begin at one column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxmethods.data.examples import Example
from jaxmethods.data.packing import Batch
from jaxmethods.data.pictures import seen


def prompt_batch(
    examples: Sequence[Example],
    *,
    length: int | None = None,
    crops: int | None = None,
    sight: Any = None,
    left: bool = True,
) -> Batch:
    """`tokens` int32 and `mask` bool [rows, length]; and the pictures, as `pixels`, `places` and perhaps `place_weights`.

    Args:
        examples: of `Renderer.prompt`, or any others.
        length: tokens a row; the longest example's when None.
        crops: of each row; the most that an example has when None.
        sight: of a model that sees; pictures are opened here.
        left: padding stands on the left; else on the right.

    Raises:
        ValueError: no example, or one that is longer than `length`; and what `images.open_picture` raises.
    """
    if not examples:
        raise ValueError("there are no prompts to make a batch of.")
    width = max(len(example.tokens) for example in examples)
    if length is not None and width > length:
        raise ValueError(f"a prompt has {width} tokens and there is room for {length}; raise the length or shorten it.")
    width = length or width
    tokens, mask = np.zeros((len(examples), width), np.int32), np.zeros((len(examples), width), bool)
    for row, example in enumerate(examples):
        here = slice(width - len(example.tokens), None) if left else slice(len(example.tokens))
        tokens[row, here], mask[row, here] = example.tokens, True
    batch = {"tokens": tokens, "mask": mask}
    if sight is None:
        return batch
    room = crops or max(1, *(sum(picture.crops for picture in example.pictures) for example in examples))
    of_images = (tokens == sight.image_token_id) & mask
    rows = [seen(example.pictures, of_images[i], sight.format, room) for i, example in enumerate(examples)]
    return batch | {name: np.stack([row[name] for row in rows]) for name in rows[0]}
