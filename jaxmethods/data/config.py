"""What to read and how to lay it out: two frozen dataclasses of plain values.

>>> data = Data(train="train.jsonl", sequence_length=512)
>>> data.train[0].path, data.train[0].answer, data.pack
('train.jsonl', 'answer', True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FORMS = ("auto", "answer", "chat", "text")


@dataclass(frozen=True)
class Source:
    """One file, or folder saved by `datasets`, and the names of the fields in it.

    path: `.jsonl`, `.json`, `.parquet`, `.arrow`, a folder of `datasets.save_to_disk`, or a pattern such as
      `gs://bucket/train-*.parquet`.
    weight: share of the training rows drawn from this source, relative to the other sources' weights.
    prompt, answer: fields of question-and-answer rows (text, text).
    messages: field of chat rows (a list of {"role", "content"}).
    text: field of plain rows, where every token is a target.
    chosen, rejected: fields of preference rows: two answers to the prompt. They are text, or lists of messages that end in one;
      these may hold the prompt too, and then no field does.
    images: field of the pictures, for models that see: a path (relative to the file), bytes, or several of these; rows may
      lack it. The text has `<image>` where each of them stands.
    rejected_images: field of the pictures that the rejected answer is given to, where they are others than the chosen answer's.
    form: of the rows, "answer", "chat" or "text"; "auto" takes the one whose fields the first row has.
    """

    path: str
    weight: float = 1.0
    prompt: str = "prompt"
    answer: str = "answer"
    messages: str = "messages"
    text: str = "text"
    chosen: str = "chosen"
    rejected: str = "rejected"
    images: str = "images"
    rejected_images: str = "rejected_images"
    form: str = "auto"

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("a Source needs a path; got ''.")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise ValueError(
                f"{self.path}: weight={self.weight} must be a positive number; leave the source out instead."
            )
        if self.form not in FORMS:
            raise ValueError(f"{self.path}: form={self.form!r} is none of {', '.join(FORMS)}.")
        for field in ("prompt", "answer", "messages", "text", "chosen", "rejected", "images", "rejected_images"):
            if not getattr(self, field):
                raise ValueError(f"{self.path}: the name of the {field} field is empty.")

    def fields(self, form: str) -> tuple[str, ...]:
        """The fields that a row of this form must have."""
        return {"answer": (self.prompt, self.answer), "chat": (self.messages,), "text": (self.text,)}[form]


@dataclass(frozen=True)
class Data:
    """The data of a run.

    train, evaluation: a path, a `Source`, or several; kept as a tuple of `Source`. Training sources are
      mixed by weight; evaluation reads every row once, so weights are refused there.
    sequence_length: tokens a row of a batch; longer examples are cut (`jaxmethods.data.truncate`).
    pack: lay several examples into one row, separated by `segment_ids`; else one example a row.
    evaluation_rows: read only the first so many rows of each evaluation source; None reads all.
    seed: of the order of the training rows.
    crops: for models that see, how many crops of pictures a row has room for; None: as many as its rows need.
    """

    train: Sequence[Source | str] | Source | str = ()
    evaluation: Sequence[Source | str] | Source | str = ()
    sequence_length: int = 1024
    pack: bool = True
    evaluation_rows: int | None = None
    seed: int = 0
    crops: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "train", as_sources(self.train))
        object.__setattr__(self, "evaluation", as_sources(self.evaluation))
        for source in as_sources(self.evaluation):
            if source.weight != 1.0:
                raise ValueError(
                    f"{source.path}: weight={source.weight} has no meaning in evaluation, which reads "
                    "every row once; leave it at 1.0."
                )
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be at least 2: a token and the next.")
        if self.evaluation_rows is not None and self.evaluation_rows < 1:
            raise ValueError(f"evaluation_rows={self.evaluation_rows} must be positive, or None for all rows.")
        if self.crops is not None and self.crops < 1:
            raise ValueError(f"crops={self.crops} must be positive, or None for as many as the rows need.")
        if self.seed < 0:
            raise ValueError(f"seed={self.seed} must not be negative.")


def as_sources(given: Sequence[Source | str] | Source | str) -> tuple[Source, ...]:
    """A path, a Source, or several of these, as a tuple of Source."""
    if isinstance(given, Source):
        return (given,)
    if isinstance(given, str):
        return (Source(given),)
    if not all(isinstance(part, Source | str) for part in given):
        raise ValueError(f"data must be paths or Sources; got {given!r}.")
    return tuple(source for part in given for source in as_sources(part))
