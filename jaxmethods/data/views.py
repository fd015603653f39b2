"""Several readings of one row, each with tokens of its own: what contrastive and preference methods train on.

A `View` is made of the row's conversation. In a batch the arrays of a view stand under its name, "query/tokens" and so on;
`tree.unflatten(batch)` gives one batch a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxmethods.data.chat import messages_of
from jaxmethods.data.config import Data, Source
from jaxmethods.data.sources import Place, Record


class Conversation(NamedTuple):
    """The turns of a row, {"role", "content"} each; its pictures in the order of their markers; and the row with all its fields."""

    messages: Sequence[Record]
    images: Sequence[Any] = ()
    row: Record = MappingProxyType({})


@dataclass(frozen=True)
class View:
    """One reading of a row.

    make: from the row's conversation and the most characters of free text that may be kept (None: all) to what is read.
    marks: which tokens are targets (`Renderer`).
    embeds: it ends in an assistant's turn that is empty and closed, whose last token is read. Where it is too long, free text is
      cut at its end, so that what follows the text stays. Otherwise it is shortened as training rows are.
    pictures: it may have some; false spares their room, and the vision tower.
    length: tokens of its rows; None: the data's `sequence_length`.
    """

    make: Callable[[Conversation, int | None], Conversation] = lambda conversation, most: conversation
    marks: str = "answers"
    embeds: bool = False
    pictures: bool = True
    length: int | None = None


def conversation_of(row: Record, source: Source, place: Place | str) -> Conversation:
    """The conversation of a row with `messages`, or with a prompt and an answer.

    Raises:
        ValueError: a row with neither, or messages that are none.
    """
    images = row.get(source.images)
    listed = [] if images is None else list(images) if isinstance(images, list | tuple) else [images]
    if source.messages in row:
        return Conversation(messages_of(row, source.messages, place, empty_answers=True), listed, row)
    if source.prompt in row and source.answer in row:
        asked, said = (
            {"role": role, "content": row[name]}
            for role, name in (("user", source.prompt), ("assistant", source.answer))
        )
        return Conversation([asked, said], listed, row)
    names = ", ".join(map(str, row)) or "none"
    raise ValueError(
        f"{place} has neither {source.messages!r} nor {source.prompt!r}+{source.answer!r}, which views are made of; its "
        f"fields are {names}."
    )


def batch_shapes(
    data: Data, rows: int, *, sight: Any = None, views: Mapping[str, View] | None = None
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> (shape, dtype) of the arrays of a batch, before any data are read.

    Of pictures the room is `data.crops`, or what the largest picture takes.
    """
    named = {f"{name}/": view for name, view in views.items()} if views else {"": View()}
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {}
    for prefix, view in named.items():
        length = view.length or data.sequence_length
        kinds = {"tokens": np.int32, "target_mask": np.bool_, "segment_ids": np.int32, "positions": np.int32}
        shapes |= {f"{prefix}{name}": ((rows, length), dtype) for name, dtype in kinds.items()}
        if sight is not None and view.pictures:
            form = sight.format
            shapes[f"{prefix}pixels"] = (rows, data.crops or form.most_crops, form.size, form.size, 3), np.uint8
            shapes[f"{prefix}places"] = (rows, length, form.corners), np.int32
            if form.corners > 1:
                shapes[f"{prefix}place_weights"] = (rows, length, form.corners), np.float32
    return shapes
