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
from jaxtyping import Bool

from jaxmethods import images
from jaxmethods.images import ImageFormat

MARKER = "<image>"


class Picture(NamedTuple):
    """A picture that a row names: where it is, the row (for messages), and how it is cut; its numbers of tokens and crops."""

    source: Any
    where: str
    format: ImageFormat
    tokens: int
    crops: int

    @classmethod
    def of(cls, source: Any, where: str, format: ImageFormat) -> Picture:
        """Reads the size of the picture, and no more of it.

        Raises:
            ValueError, FileNotFoundError: no such file, or a broken header; names the row.
        """
        size = images.picture_size(source, where)
        return cls(source, where, format, format.tokens_of(*size), format.crops_of(*size))


def pictures_of(given: Any, where: str, folder: str, format: ImageFormat) -> tuple[Picture, ...]:
    """The pictures in a field of a row: none (null), one, or a list; each a path, bytes, or {"bytes", "path"}.

    Relative paths start from `folder`, where the rows lie. Several pictures are one crop each (`ImageFormat.one_crop`).

    Raises:
        ValueError, FileNotFoundError: something else in the field, no such file, or a broken header; names the row.
    """
    listed = [] if given is None else list(given) if isinstance(given, list | tuple) else [given]
    cut = format.one_crop if len(listed) > 1 else format
    return tuple(Picture.of(_located(source, folder), where, cut) for source in listed)


def located(given: Any, path: str) -> Any:
    """What a row's field of pictures holds, relative paths from the folder of the rows' file `path`."""
    listed = given if isinstance(given, list | tuple) else [] if given is None else [given]
    found = [_located(source, os.path.dirname(path)) for source in listed]
    return found if isinstance(given, list | tuple) else found[0] if found else None


def blank(given: Any) -> Any:
    """Grey pictures of the sizes of those that a row's field names."""
    grey = lambda source: np.full((*images.picture_size(source, "a row")[::-1], 3), 127, np.uint8)
    if given is None:
        return None
    return [grey(source) for source in given] if isinstance(given, list | tuple) else grey(given)


def _located(source: Any, folder: str) -> Any:
    if isinstance(source, Mapping) and source.get("bytes") is None:
        source = source.get("path")
    if not isinstance(source, str | os.PathLike):
        return source
    path = epath.Path(source)
    return str(path if path.is_absolute() or "://" in str(source) else epath.Path(folder) / path)


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
        made = images.prepare(images.open_picture(picture.source, picture.where), picture.format)
        if len(made.places) != picture.tokens:
            raise ValueError(
                f"{picture.where}: picture {picture.source} has another size than when the run began; leave files as they are."
            )
        prepared.append(made)
    pixels, places, weights = images.join(prepared, format, crops)
    row = {"pixels": pixels, "places": np.full((len(where), format.corners), images.TEXT, np.int32)}
    row["places"][where] = places
    if format.corners > 1:
        row["place_weights"] = np.zeros((len(where), format.corners), np.float32)
        row["place_weights"][where] = weights
    return row
