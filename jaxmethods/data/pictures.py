"""Pictures of rows: named in a field of the row, marked in its text, opened when the row is drawn.

A text has the marker `<image>` where a picture stands. A model that sees has a token for it, which stands in the row of tokens
once for each feature of the picture; how many these are is known from the picture's size, so that files are read only when
a batch is made.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Int32

from jaxmethods import images
from jaxmethods.images import ImageFormat

MARKER = "<image>"


class Picture(NamedTuple):
    """A picture that a row names: where it is, the row (for messages), and its numbers of tokens and crops."""

    source: Any
    where: str
    tokens: int
    crops: int


def pictures_of(given: Any, where: str, folder: str, format: ImageFormat) -> tuple[Picture, ...]:
    """The pictures in a field of a row: none (null), one, or a list; each a path, bytes, or {"bytes", "path"}.

    Relative paths start from `folder`, where the rows lie.

    Raises:
        ValueError, FileNotFoundError: something else in the field, no such file, or a broken header; names the row.
    """
    listed = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    return tuple(_picture(source, where, folder, format) for source in listed)


def _picture(source: Any, where: str, folder: str, format: ImageFormat) -> Picture:
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    if isinstance(source, str | os.PathLike):
        path = epath.Path(source)
        source = str(path if path.is_absolute() or "://" in str(source) else epath.Path(folder) / path)
    size = images.picture_size(source, where)
    return Picture(source, where, format.tokens_of(*size), format.crops_of(*size))


def expand(
    tokens: Sequence[int], targets: Sequence[bool], pictures: Sequence[Picture], token_id: int | None, where: str
) -> tuple[list[int], list[bool]]:
    """Each image token as often as its picture has features; none of them is a target.

    Raises:
        ValueError: as many markers as pictures are needed.
    """
    if token_id is None:
        return list(tokens), list(targets)
    marks = sum(token == token_id for token in tokens)
    if marks != len(pictures):
        raise ValueError(
            f"{where}: the text has {marks} {MARKER} markers and the row {len(pictures)} pictures; give one marker for each."
        )
    left = iter(pictures)
    out: list[int] = []
    kept: list[bool] = []
    for token, target in zip(tokens, targets, strict=True):
        here = next(left).tokens if token == token_id else 1
        out += [token] * here
        kept += [target and token != token_id] * here
    return out, kept


def seen(
    pictures: Sequence[Picture], where: Bool[np.ndarray, " time"], format: ImageFormat, crops: int
) -> dict[str, np.ndarray]:
    """The pictures of a row of tokens, opened: `pixels` [crops, S, S, 3], `places` [time, corners] and perhaps `place_weights`.

    Args:
        where: the row's image tokens.
        crops: how many there is room for.

    Raises:
        ValueError, FileNotFoundError: a picture that cannot be read or has another size than when the rows were laid out.
    """
    prepared = []
    for picture in pictures:
        made = images.prepare(images.open_picture(picture.source, picture.where), format)
        if len(made.places) != picture.tokens:
            raise ValueError(
                f"{picture.where}: picture {picture.source} has another size than when the run began; leave files as they are."
            )
        prepared.append(made)
    pixels, places, weights = images.join(prepared, format, crops)
    row = {"pixels": pixels, "places": np.full((len(where), format.corners), -1, np.int32)}
    row["places"][where] = places
    if format.corners > 1:
        row["place_weights"] = np.zeros((len(where), format.corners), np.float32)
        row["place_weights"][where] = weights
    return row


def count_images(tokens: Int32[np.ndarray, " time"], token_id: int) -> int:
    """How many of the tokens are image tokens."""
    return int((tokens == token_id).sum())
