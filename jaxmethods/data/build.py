"""From a `Data` config and a tokenizer to rows that training can draw at random."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import grain
import numpy as np

from jaxmethods.data.chat import Renderer, Tokenizer
from jaxmethods.data.config import Data, Source, as_sources
from jaxmethods.data.examples import Example, Examples, split_text, truncate
from jaxmethods.data.packing import PackedRows, best_fit, one_each
from jaxmethods.data.pipeline import Mixture
from jaxmethods.data.sources import Record, Records, open_records, records_in_memory


@dataclass(frozen=True)
class Report:
    """What became of the data; reports of several sources add up, and print as one line.

    examples: what was laid into rows, `tokens` and `target_tokens` long in all. dropped: had no target.
    prompts_cut, answers_cut: lost their beginning, their end. texts_split: make several examples.
    """

    sequence_length: int
    examples: int = 0
    dropped: int = 0
    prompts_cut: int = 0
    answers_cut: int = 0
    texts_split: int = 0
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
) -> tuple[grain.MapDataset, Report]:
    """Reads, tokenises (once), shortens and packs: (random-access rows, what became of the data).

    A row is a `Batch` without the batch axis. `rows`: dicts given in memory, in place of the paths in `data`.
    Training rows of several sources come as a `Mixture`, evaluation rows one source after the other; hand
    them to `batches` or `evaluation_batches`.

    Raises ValueError where data are missing or come from both; and what `open_records` and `Renderer` raise.
    """
    sources = as_sources(data.train if split == "train" else data.evaluation)
    if rows is not None and sources:
        raise ValueError(f"{split} data come both from {sources[0].path} and from rows in memory; give one of them.")
    if rows is None and not sources:
        raise ValueError(f"no {split} data: set Data({split}='FILE.jsonl'), or give rows in memory.")
    limit = data.evaluation_rows if split == "evaluation" else None
    if rows is not None:
        parts = [_lay_out(records_in_memory(rows), Source("rows given in memory"), data, tokenizer, limit)]
    else:
        parts = [_lay_out(open_records(source.path), source, data, tokenizer, limit) for source in sources]
    laid_out = [grain.MapDataset.source(part) for part, _ in parts]
    report = sum((part_report for _, part_report in parts), start=Report(data.sequence_length))
    if len(laid_out) == 1:
        return laid_out[0], report
    if split == "train":
        return Mixture(laid_out, [source.weight for source in sources]), report
    return grain.MapDataset.concatenate(laid_out), report


def _lay_out(
    records: Records, source: Source, data: Data, tokenizer: Tokenizer, limit: int | None
) -> tuple[PackedRows, Report]:
    """The rows of one source."""
    counts = dict.fromkeys(("dropped", "prompts_cut", "answers_cut", "texts_split"), 0)
    rendered = Renderer(tokenizer, source).many(islice(records.placed(), limit))
    examples = Examples.of(_fitting(rendered, data.sequence_length, tokenizer.bos_token_id, counts))
    if not len(examples):
        raise ValueError(f"{records.source}: no row has a token to predict; all {counts['dropped']} were dropped.")
    plan = best_fit(examples.lengths, data.sequence_length) if data.pack else one_each(len(examples))
    rows = PackedRows(examples, plan, data.sequence_length)
    return rows, Report(
        data.sequence_length,
        examples=len(examples),
        tokens=len(examples.tokens),
        target_tokens=int(np.count_nonzero(examples.target_mask)),
        rows=len(rows),
        **counts,
    )


def _fitting(
    rendered: Iterable[tuple[str, Example]], length: int, bos_id: int | None, counts: dict[str, int]
) -> Iterator[Example]:
    """The examples in at most `length` tokens; counts what was done to them."""
    for form, example in rendered:
        if form == "text":
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
