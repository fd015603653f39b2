"""Several readings of one row, each with tokens of its own: what contrastive and preference methods train on.

A `View` is made of the row's conversation. In a batch the arrays of a view stand under its name, "query/tokens" and so on;
`tree.unflatten(batch)` gives one batch a view. A `Number` of the row stands there by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxmethods.data.chat import messages_of
from jaxmethods.data.config import Data, Source
from jaxmethods.data.sources import Place, Record


class Conversation(NamedTuple):
    """The turns of a row, {"role", "content"} each; its pictures in the order of their markers; and the row with all its fields.

    Of a preference row the turns are those of the prompt, and `pair` has the answers.
    """

    messages: Sequence[Record]
    images: Sequence[Any] = ()
    row: Record = MappingProxyType({})
    pair: Pair | None = None


class Pair(NamedTuple):
    """Two answers to one prompt; `rejected_images` are None where both see the same."""

    chosen: str
    rejected: str
    rejected_images: Sequence[Any] | None = None

    @property
    def equal(self) -> bool:
        """Whether nothing tells the answers apart."""
        return self.chosen == self.rejected and self.rejected_images is None


@dataclass(frozen=True)
class View:
    """One reading of a row.

    make: from the row's conversation and the most characters of free text that may be kept (None: all) to what is read.
    marks: which tokens are targets (`Renderer`).
    embeds: it ends in an assistant's turn that is empty and closed, whose last token is read. Where it is too long, free text is
      cut at its end, so that what follows the text stays. Otherwise it is shortened as training rows are.
    pictures: it may have some; false spares their room, and the vision tower.
    length: tokens of its rows; None: the data's `sequence_length`.
    whole: a row that does not fit is left out, and counted, rather than shortened.
    """

    make: Callable[[Conversation, int | None], Conversation] = lambda conversation, most: conversation
    marks: str = "answers"
    embeds: bool = False
    pictures: bool = True
    length: int | None = None
    whole: bool = False


@dataclass(frozen=True)
class Number:
    """A number that each row has, as an array [rows] of a batch, float32.

    field: of the row.
    least: the smallest that makes sense.
    boolean: it is true or false in the row, and 1 or 0 in the batch.
    of_all: from those of all rows of a source to what stands in the batch.
    """

    field: str
    least: float = -math.inf
    boolean: bool = False
    of_all: Callable[[np.ndarray], np.ndarray] = lambda values: values

    def read(self, row: Record, place: Place | str) -> float:
        """The number of a row.

        Raises:
            ValueError: it has none, or one that is not finite, too small, or neither true nor false where it must be.
        """
        value = row.get(self.field)
        if self.boolean:
            if value in (True, False):  # 1 and 0 too
                return float(value)
            raise ValueError(f"{place}: field {self.field!r} must be true or false, not {value!r}.")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and value >= self.least:  # type: ignore[arg-type, operator]  # a number by now
            return float(value)  # type: ignore[arg-type]
        at_least = "" if self.least == -math.inf else f" of at least {self.least:g}"
        raise ValueError(f"{place}: field {self.field!r} must be a finite number{at_least}, not {value!r}.")


Views = Mapping[str, View | Number]


def conversation_of(row: Record, source: Source, place: Place | str) -> Conversation:
    """The conversation of a row with `messages`, with a prompt and an answer, or with a pair of answers.

    Raises:
        ValueError: a row with none of these, or messages that are none.
    """
    listed = _listed(row.get(source.images))
    if source.chosen in row or source.rejected in row:
        return _pair_of(row, source, place, listed)
    if source.messages in row:
        return Conversation(messages_of(row, source.messages, place, empty_answers=True), listed, row)
    if source.prompt in row and source.answer in row:
        asked, said = (
            {"role": role, "content": row[name]}
            for role, name in (("user", source.prompt), ("assistant", source.answer))
        )
        return Conversation([asked, said], listed, row)
    raise ValueError(
        f"{place} has neither {source.messages!r} nor {source.prompt!r}+{source.answer!r}, which views are made of; its "
        f"fields are {_names(row)}."
    )


def _listed(images: Any) -> list[Any]:
    return [] if images is None else list(images) if isinstance(images, list | tuple) else [images]


def _pair_of(row: Record, source: Source, place: Place | str, images: Sequence[Any]) -> Conversation:
    """The prompt of a preference row, and its two answers."""
    prompt = row.get(source.prompt)
    turns = [] if prompt is None else [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    before: list[list[Record]] = []
    answers: list[str] = []
    for name in (source.chosen, source.rejected):
        given = row.get(name)
        if isinstance(given, str):
            given = [{"role": "assistant", "content": given}]
        elif name not in row:
            raise ValueError(
                f"{place}: no field {name!r}, and a pair needs both answers; its fields are {_names(row)}."
            )
        *own, answer = messages_of({name: given}, name, place)
        if answer["role"] != "assistant":
            raise ValueError(f"{place}: field {name!r} ends with a message of {answer['role']!r}, not with an answer.")
        before.append([*turns, *own])
        answers.append(answer["content"])
    if before[0] != before[1]:
        raise ValueError(f"{place}: {source.chosen!r} and {source.rejected!r} answer different prompts.")
    if not before[0]:
        raise ValueError(
            f"{place}: no field {source.prompt!r}, and no messages before the answers; its fields are {_names(row)}."
        )
    other = row.get(source.rejected_images)
    chosen, rejected = answers
    return Conversation(before[0], images, row, Pair(chosen, rejected, None if other is None else _listed(other)))


def _names(row: Record) -> str:
    return ", ".join(map(str, row)) or "none"


def batch_shapes(
    data: Data, rows: int, *, sight: Any = None, views: Views | None = None
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> (shape, dtype) of the arrays of a batch, before any data are read.

    Of pictures the room is `data.crops`, or what the largest picture takes.
    """
    named = {f"{name}/": view for name, view in (views or {}).items() if isinstance(view, View)} or {"": View()}
    numbers = [name for name, view in (views or {}).items() if isinstance(view, Number)]
    shapes: dict[str, tuple[tuple[int, ...], Any]] = dict.fromkeys(numbers, ((rows,), np.float32))
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
