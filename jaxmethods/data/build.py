"""From a `Data` config and a tokenizer to rows that training can draw at random."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import grain
import numpy as np

from jaxmethods.data.chat import Renderer, Tokenizer, in_chunks
from jaxmethods.data.config import Data, Source, as_sources
from jaxmethods.data.examples import Example, Examples, split_text, truncate
from jaxmethods.data.packing import Batch, PackedRows, best_fit, one_each
from jaxmethods.data.pipeline import Mixture
from jaxmethods.data.sources import Place, Record, Records, open_records, records_in_memory
from jaxmethods.data.views import Conversation, Number, View, Views, conversation_of


@dataclass(frozen=True)
class Report:
    """What became of the data; reports of several sources add up, and print as one line.

    examples: what was laid into rows, `tokens` and `target_tokens` long in all. dropped: had no target.
    prompts_cut, answers_cut: lost their beginning, their end. texts_split: make several examples. pictures_dropped: their
    pictures (by tokens, or by `Data.crops`), or all of their answer behind these, do not fit into a row. too_long: rows of which
    a view that is not to be shortened does not fit. equal_pairs: have the same answer twice.
    """

    sequence_length: int
    examples: int = 0
    dropped: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    texts_split: int = 0
    pictures_dropped: int = 0
    too_long: int = 0
    equal_pairs: int = 0
    tokens: int = 0
    target_tokens: int = 0
    rows: int = 0

    @property
    def fill(self) -> float:
        """The share of the rows' places that hold tokens."""
        return self.tokens / max(self.rows * self.sequence_length, 1)

    def __add__(self, other: Report) -> Report:
        if self.sequence_length != other.sequence_length:
            raise ValueError(
                f"reports of sequence_length {self.sequence_length} and {other.sequence_length} do not add "
                "up; keep them apart."
            )
        sums = {name: count + getattr(other, name) for name, count in vars(self).items()}
        return Report(**(sums | {"sequence_length": self.sequence_length}))

    def __str__(self) -> str:
        notes = [
            f"{count:,} {what}"
            for count, what in (
                (self.dropped, "dropped"),
                (self.prompts_cut, "prompts cut"),
                (self.answers_cut, "answers cut"),
                (self.texts_split, "texts split"),
                (self.pictures_dropped, "dropped with pictures that do not fit"),
                (self.too_long, "dropped because an answer with its prompt does not fit"),
                (self.equal_pairs, "dropped because both answers are the same"),
            )
            if count
        ]
        return (
            f"{self.examples:,} examples ({', '.join(notes) or 'none cut or dropped'}), "
            f"{self.tokens:,} tokens ({self.target_tokens:,} targets), "
            f"{self.rows:,} rows of {self.sequence_length:,} ({self.fill:.0%} full)"
        )


def build(
    data: Data,
    tokenizer: Tokenizer,
    *,
    split: Literal["train", "evaluation"] = "train",
    rows: Sequence[Record] | None = None,
    sight: Any = None,
    views: Views | None = None,
) -> tuple[grain.MapDataset, Report]:
    """Reads, tokenises (once), shortens and packs: (random-access rows, what became of the data).

    A row is a `Batch` without the batch axis. `rows`: dicts given in memory, in place of the paths in `data`.
    Training rows of several sources come as a `Mixture`, evaluation rows one source after the other; hand
    them to `batches` or `evaluation_batches`.

    sight: of a model that sees, such as `models.VLM.sight`; pictures are opened when a row is drawn.
    views: readings of each row by name; arrays are then called "NAME/tokens" and so on (those of a `Number` NAME), and no two rows
      are packed into one.

    Raises ValueError where data are missing or come from both, are to be packed and have views, or make rows of more pictures
    than `Data.crops`; and what `open_records` and `Renderer` raise.
    """
    sources = as_sources(data.train if split == "train" else data.evaluation)
    if rows is not None and sources:
        raise ValueError(f"{split} data come both from {sources[0].path} and from rows in memory; give one of them.")
    if rows is None and not sources:
        raise ValueError(f"no {split} data: set Data({split}='FILE.jsonl'), or give rows in memory.")
    if views and data.pack:
        raise ValueError(
            "this objective reads each row in several ways, so rows cannot share one; set Data(pack=False)."
        )
    limit = data.evaluation_rows if split == "evaluation" else None
    given = [(records_in_memory(rows), Source("rows given in memory"))] if rows is not None else None
    lay_out = functools.partial(_lay_out_views, readings=views) if views else _lay_out
    parts = [
        lay_out(records, source, data, tokenizer, limit, sight)
        for records, source in given or ((open_records(source.path), source) for source in sources)
    ]
    made = [part for part, _ in parts]
    laid_out = [grain.MapDataset.source(part) for part in (made if sight is None else _with_one_room(made))]
    report = sum((part_report for _, part_report in parts), start=Report(data.sequence_length))
    if len(laid_out) == 1:
        return laid_out[0], report
    if split == "train":
        return Mixture(laid_out, [source.weight for source in sources]), report
    return grain.MapDataset.concatenate(laid_out), report


def _lay_out(
    records: Records, source: Source, data: Data, tokenizer: Tokenizer, limit: int | None, sight: Any
) -> tuple[PackedRows, Report]:
    """The rows of one source."""
    counts = _no_counts()
    rendered = Renderer(tokenizer, source, sight=sight).many(islice(records.placed(), limit))
    examples = Examples.of(_fitting(rendered, data.sequence_length, tokenizer.bos_token_id, sight, data.crops, counts))
    _require_some(examples, records, counts)
    plan = best_fit(examples.lengths, data.sequence_length) if data.pack else one_each(len(examples))
    rows = PackedRows(examples, plan, data.sequence_length, sight, data.crops)
    return rows, _report(data, [examples], len(rows), counts)


@dataclass(frozen=True)
class ViewedRows:
    """Rows of several views: a random-access source of rows whose arrays are called VIEW/ARRAY, and of numbers by their names."""

    views: Mapping[str, PackedRows]
    numbers: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    def __getitem__(self, row: int) -> Batch:
        arrays = {f"{name}/{array}": x for name, rows in self.views.items() for array, x in rows[row].items()}
        return arrays | {name: values[row] for name, values in self.numbers.items()}


def _lay_out_views(
    records: Records,
    source: Source,
    data: Data,
    tokenizer: Tokenizer,
    limit: int | None,
    sight: Any,
    *,
    readings: Views,
) -> tuple[ViewedRows, Report]:
    """The rows of one source, each view apart."""
    counts = _no_counts()
    numbers = {name: reading for name, reading in readings.items() if isinstance(reading, Number)}
    views = {name: reading for name, reading in readings.items() if isinstance(reading, View)}
    chat = dataclasses.replace(source, form="chat", messages="messages", images="images")
    eyes = {name: sight if view.pictures else None for name, view in views.items()}
    renderers = {
        name: Renderer(tokenizer, chat, sight=eyes[name], marks=view.marks, empty_answers=view.embeds)
        for name, view in views.items()
    }
    kept: dict[str, list[Example]] = {name: [] for name in views}
    told: dict[str, list[float]] = {name: [] for name in numbers}
    for chunk in in_chunks(islice(records.placed(), limit)):
        conversations = [(place, conversation_of(row, source, place)) for place, row in chunk]
        rendered = [
            list(renderers[name].many([(place, _read(view, read, place)) for place, read in conversations]))
            for name, view in views.items()
        ]
        for (place, conversation), *examples_of in zip(conversations, *rendered, strict=True):
            if conversation.pair is not None and conversation.pair.equal:
                counts["equal_pairs"] += 1
                continue
            values = {name: number.read(conversation.row, place) for name, number in numbers.items()}
            made: dict[str, Example] = {}
            for (name, view), (_, example) in zip(views.items(), examples_of, strict=True):
                shortened = _shortened(example, renderers[name], view, conversation, place, data, counts)
                if shortened is None:  # which `_shortened` has counted
                    break
                made[name] = shortened
            else:
                for name, example in made.items():
                    kept[name].append(example)
                for name, value in values.items():
                    told[name].append(value)
    examples = {name: Examples.of(of_view) for name, of_view in kept.items()}
    _require_some(next(iter(examples.values())), records, counts)
    rows = ViewedRows(
        {
            name: PackedRows(
                of_view, one_each(len(of_view)), views[name].length or data.sequence_length, eyes[name], data.crops
            )
            for name, of_view in examples.items()
        },
        {name: _of_all(numbers[name], values, records) for name, values in told.items()},
    )
    return rows, _report(data, list(examples.values()), len(rows), counts)


def _read(view: View, conversation: Conversation, place: Place, most: int | None = None) -> Record:
    """One reading of a row, as a row of the chat form."""
    try:
        made = view.make(conversation, most)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return {"messages": made.messages, "images": made.images}


def _shortened(
    example: Example,
    renderer: Renderer,
    view: View,
    conversation: Conversation,
    place: Place,
    data: Data,
    counts: dict[str, int],
) -> Example | None:
    """A rendered reading of a row in at most the view's length; None where it is left out, which is counted."""
    length = view.length or data.sequence_length
    if view.whole and len(example.tokens) > length:
        counts["too_long"] += 1
        return None
    if not view.embeds:
        told = renderer.tokenizer.bos_token_id, renderer.sight, data.crops
        return next(_fitting([("chat", example)], length, *told, counts), None)
    if _crops(example) > (data.crops or _crops(example)):
        counts["pictures_dropped"] += 1
        return None
    if len(example.tokens) <= length:
        return example
    counts["answers_cut"] += 1
    most = sum(len(message["content"]) for message in _read(view, conversation, place)["messages"])
    while len(example.tokens) > length:
        if not most:
            raise ValueError(
                f"{place}: what stands around the text takes {len(example.tokens)} tokens and a row has {length}; raise "
                "data.sequence_length."
            )
        most = most * length // (len(example.tokens) + 1)
        example = renderer(_read(view, conversation, place, most), place)
    return example


def _no_counts() -> dict[str, int]:
    names = "dropped", "prompts_cut", "answers_cut", "texts_split", "pictures_dropped", "too_long", "equal_pairs"
    return dict.fromkeys(names, 0)


def _of_all(number: Number, values: Sequence[float], records: Records) -> np.ndarray:
    """What stands in batches for a number of each row."""
    try:
        return np.asarray(number.of_all(np.asarray(values)), np.float32)
    except ValueError as error:
        raise ValueError(f"{records.source}, field {number.field!r}: {error}") from None


def _require_some(examples: Examples, records: Records, counts: Mapping[str, int]) -> None:
    if len(examples):
        return
    if big := counts["pictures_dropped"]:
        raise ValueError(
            f"{records.source}: no row is left; {big} have pictures that do not fit, and {counts['dropped']} no token to "
            "predict. Raise data.sequence_length (and data.crops where it is set)."
        )
    if counts["too_long"] or counts["equal_pairs"]:
        raise ValueError(
            f"{records.source}: no pair is left; of {counts['too_long']} an answer with its prompt does not fit, and "
            f"{counts['equal_pairs']} have the same answer twice. Raise data.sequence_length."
        )
    raise ValueError(f"{records.source}: no row has a token to predict; all {counts['dropped']} were dropped.")


def _with_one_room(parts: Sequence[Any]) -> list[Any]:
    """The rows of all sources with room for as many crops as any of them needs, so that they can stand in one batch."""
    if isinstance(parts[0], ViewedRows):
        of_views = {name: _with_one_room([part.views[name] for part in parts]) for name in parts[0].views}
        return [
            dataclasses.replace(part, views={name: rows[i] for name, rows in of_views.items()})
            for i, part in enumerate(parts)
        ]
    room = max(part.crops for part in parts)
    return [dataclasses.replace(part, room=room) for part in parts]


def _crops(example: Example) -> int:
    return sum(picture.crops for picture in example.pictures)


def _report(data: Data, examples: Sequence[Examples], rows: int, counts: dict[str, int]) -> Report:
    return Report(
        data.sequence_length,
        examples=sum(map(len, examples)),
        tokens=sum(len(of_view.tokens) for of_view in examples),
        target_tokens=sum(int(np.count_nonzero(of_view.target_mask)) for of_view in examples),
        rows=rows * len(examples),
        **counts,
    )


def _fitting(
    rendered: Iterable[tuple[str, Example]],
    length: int,
    bos_id: int | None,
    sight: Any,
    crops: int | None,
    counts: dict[str, int],
) -> Iterator[Example]:
    """The examples in at most `length` tokens and `crops` crops; counts what was done to them."""
    for form, example in rendered:
        if crops is not None and _crops(example) > crops:
            counts["pictures_dropped"] += 1
            continue
        if example.pictures and len(example.tokens) > length:
            of_images = np.flatnonzero(example.tokens == sight.image_token_id)
            shorter = Example(example.tokens[:length], example.target_mask[:length], example.pictures)
            if of_images[-1] >= length or not shorter.target_mask.any():
                counts["pictures_dropped"] += 1
                continue
            counts["answers_cut"] += 1
            pieces = [shorter]  # a prompt with pictures is not cut: a part of a picture means nothing
        elif form == "text" and not example.pictures:
            pieces = split_text(example, length)
            counts["texts_split"] += len(pieces) > 1
        else:
            cut = truncate(example, length, bos_id=bos_id)
            counts["prompts_cut"] += cut.prompt > 0
            counts["answers_cut"] += cut.answer > 0
            pieces = [cut.example]
        for piece in pieces:
            if piece.target_mask.any():
                yield piece
            else:
                counts["dropped"] += 1
