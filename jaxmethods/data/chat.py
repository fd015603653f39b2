"""Rows of text to token ids and target masks, through the tokenizer's own chat template.

What is a target: the assistant's words and the token that ends its turn, in every turn; in plain text,
everything.

Where to cut the text for the tokenizer. A model answers after the tokens of the prompt *alone*, so training
must show exactly these; tokenising the whole conversation at once may merge the end of the prompt with the
start of the answer into a token that never occurs in use. So the text is cut where answers begin, and nowhere
else, each piece is tokenised by itself, and the ids are joined. Where an answer ends is found from the
tokens' offsets in their piece.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from jaxmethods.data.config import Source
from jaxmethods.data.examples import Example
from jaxmethods.data.pictures import MARKER, Picture, expand, pictures_of
from jaxmethods.data.sources import Place, Record, kind_of
from jaxmethods.tree import require_one_of

Tokenizer = Any
"""A `transformers.PreTrainedTokenizerFast` (not imported here: that takes seconds)."""

Message = Mapping[str, Any]

MARKS = ("answers", "last", "published")
_ROWS_AT_ONCE = 512
_ALL = sys.maxsize
# Some templates print today's date into the system prompt; data must be the same tomorrow, so it is fixed.
_TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024"}


class Piece(NamedTuple):
    """A stretch of text that is tokenised by itself; its first `answer` characters are targets."""

    text: str
    answer: int


class Rendering(NamedTuple):
    """A row as text: pieces in order, and whether BOS stands before them and EOS (a target) after them."""

    pieces: Sequence[Piece]
    bos: bool
    eos: bool
    pictures: tuple[Picture, ...] = ()
    where: str = "this row"


def render(row: Record, tokenizer: Tokenizer, source: Source | None = None, *, sight: Any = None) -> Example:
    """One row as an example: its fields are named by `source` (see `Renderer` for many rows).

    Raises ValueError for a row without the fields, with fields of another type, or with an empty answer.
    """
    return Renderer(tokenizer, source, sight=sight)(row)


def prompt_tokens(tokenizer: Tokenizer, prompt: str | Sequence[Message]) -> Int32[np.ndarray, " time"]:
    """The tokens that precede the answer to a question, or to a list of messages: the same as in training."""
    return Renderer(tokenizer).prompt(prompt).tokens


class Renderer:
    """Renders rows with one tokenizer and one naming of the fields.

    - prompt and answer: one exchange in the chat template; without a template, the two joined as they are,
      and EOS.
    - messages: the chat template over the conversation; each assistant turn is a target, up to its
      end-of-turn token. What follows the last of them is left out, since no loss depends on it.
    - text: the text as it is, and EOS; all targets.

    BOS stands in front where the template writes it or, without a template, where the tokenizer itself would
    put it.

    With `sight` (of a model that sees; its `format` and `image_token_id` are read) rows may have pictures, each at a marker
    `<image>` in the text.

    marks: which tokens of a conversation are targets. "answers": the assistant's words and what ends its turn. "last": those of
      its last turn alone.
      "published": as LLaVA-OneVision's code has it, each assistant turn with its header and all that follows it, and anywhere
      the newline and the tokens that begin and end a turn; for templates of the ChatML form.
    empty_answers: let an assistant's turn be empty.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: Source | None = None,
        *,
        sight: Any = None,
        marks: str = "answers",
        empty_answers: bool = False,
    ):
        require_one_of("marks", marks, MARKS)
        self.tokenizer = tokenizer
        self.source = source or Source("rows given in memory")
        self.sight = sight
        self.marks = marks
        self.empty_answers = empty_answers

    def __call__(self, row: Record, place: Place | str = "this row") -> Example:
        form = self._form_of(row, place) if self.source.form == "auto" else self.source.form
        return self._tokenise([self._rendering(row, form, place)])[0]

    def many(self, placed: Iterable[tuple[Place, Record]]) -> Iterator[tuple[str, Example]]:
        """(form, example) of every row, tokenised some hundred at a time; the first row settles the form."""
        form = self.source.form
        for chunk in in_chunks(placed):
            if form == "auto":
                form = self._form_of(chunk[0][1], chunk[0][0])
            for example in self._tokenise([self._rendering(row, form, place) for place, row in chunk]):
                yield form, example

    def prompt(self, prompt: str | Sequence[Message], pictures: Any = None, where: str = "the prompt") -> Example:
        """What precedes the answer to a question, or to a list of messages: the same as in training."""
        seen = self._pictures(pictures, where, ".")
        if self.tokenizer.chat_template:
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
            messages = [{**message, "content": self._marked(_content(message, where), where)} for message in asked]
            rendering = Rendering([Piece(self._template(messages, True, where), 0)], False, False, seen, where)
        elif isinstance(prompt, str):
            rendering = Rendering([Piece(self._marked(prompt, where), 0)], self._puts_bos, False, seen, where)
        else:
            raise ValueError("this tokenizer has no chat template; give the prompt as text, not as messages.")
        return self._tokenise([rendering])[0]

    # Rows to text

    def _form_of(self, row: Record, place: Place | str) -> str:
        fields = {form: self.source.fields(form) for form in ("answer", "chat", "text")}
        fits = [form for form, names in fields.items() if all(name in row for name in names)]
        if len(fits) == 1:
            return fits[0]
        if fits:
            raise ValueError(f"{place} can be read as {' or '.join(fits)}; say which with Source(form=...).")
        wanted = " nor ".join("+".join(map(repr, names)) for names in fields.values())
        raise ValueError(
            f"{place} has neither {wanted}; its fields are {_names(row)}. Name yours, as in Source(answer='...')."
        )

    def _rendering(self, row: Record, form: str, place: Place | str) -> Rendering:
        folder = os.path.dirname(place.source) if isinstance(place, Place) else "."
        pictures = self._pictures(row.get(self.source.images), str(place), folder)
        rendering = self._text_of(row, form, place)
        return rendering._replace(pictures=pictures, where=str(place))

    def _pictures(self, given: Any, where: str, folder: str) -> tuple[Picture, ...]:
        if given is None or (isinstance(given, list | tuple) and not given):
            return ()
        if self.sight is not None:
            return pictures_of(given, where, folder, self.sight.format)
        raise ValueError(f"{where} has pictures and the model reads none; take a model that sees, or leave them out.")

    def _marked(self, text: str, where: Place | str) -> str:
        """The text with the tokenizer's own image token for each marker."""
        if MARKER not in text:
            return text
        if self.sight is None:
            raise ValueError(f"{where}: the text has {MARKER} in it and the model reads no pictures; take it out.")
        return text.replace(MARKER, self.tokenizer.convert_ids_to_tokens(self.sight.image_token_id))

    def _text_of(self, row: Record, form: str, place: Place | str) -> Rendering:
        if form == "text":
            text = _text(row, self.source.text, place)
            _not_blank(text, f"field {self.source.text!r}", place)
            ends = self.tokenizer.eos_token_id is not None
            # Where no model sees, plain text may hold the marker as it is.
            marked = text if self.sight is None else self._marked(text, place)
            return Rendering([Piece(marked, _ALL)], bos=self._puts_bos, eos=ends)
        if form == "chat":
            given = messages_of(row, self.source.messages, place, empty_answers=self.empty_answers)
            messages = [{**message, "content": self._marked(message["content"], place)} for message in given]
            if not self.tokenizer.chat_template:
                raise ValueError(f"{place}: chat rows need a chat template, which this tokenizer lacks; set one.")
            return self._conversation(messages, place)
        prompt, answer = (_text(row, name, place) for name in self.source.fields(form))
        _not_blank(answer, f"field {self.source.answer!r}", place)
        prompt = self._marked(prompt, place)
        answer = answer if self.sight is None else self._marked(answer, place)
        if self.tokenizer.chat_template:
            asked, said = {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}
            return self._conversation([asked, said], place)
        if self.tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has neither chat template nor EOS token, so no answer would end; set one.")
        return Rendering([Piece(prompt, 0), Piece(answer, _ALL)], bos=self._puts_bos, eos=True)

    def _conversation(self, messages: Sequence[Message], place: Place | str) -> Rendering:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ValueError(f"{place}: no message has the role 'assistant' ({roles}), so there is nothing to learn.")
        whole = self._template(messages, False, place)
        starts: list[int] = []
        ends: list[int] = []
        for turn in turns[-1:] if self.marks == "last" else turns:
            if self._end_of_turn in messages[turn]["content"]:
                raise ValueError(
                    f"{place}: message {turn + 1} contains {self._end_of_turn!r}, which ends a turn; remove it."
                )
            before = self._template(messages[:turn], True, place)
            closing = whole.find(self._end_of_turn, len(before))
            if not whole.startswith(before) or closing < 0 or (ends and len(before) < ends[-1]):
                raise ValueError(
                    f"{place}: the chat template changes what precedes message {turn + 1} once that message "
                    "follows, so its tokens cannot be told apart; use a template that only appends."
                )
            starts.append(len(before))
            ends.append(closing + len(self._end_of_turn))
        if self.marks == "published":
            return Rendering([Piece(whole, 0)], bos=False, eos=False)
        pieces = [Piece(whole[: starts[0]], 0)]
        for start, end, stop in zip(starts, ends, [*starts[1:], ends[-1]], strict=True):
            pieces.append(Piece(whole[start:stop], end - start))
        return Rendering(pieces, bos=False, eos=False)

    def _template(self, messages: Sequence[Message], ask: bool, place: Place | str) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=ask, **_TEMPLATE_ARGUMENTS
            )
        except Exception as error:  # a template is a program of its own and may raise anything
            raise ValueError(f"{place}: the chat template refuses this conversation ({error}).") from error

    @cached_property
    def _end_of_turn(self) -> str:
        """The special token that the template writes after an assistant's words."""
        words = "a few words of an answer"
        asked, said = {"role": "user", "content": "a question"}, {"role": "assistant", "content": words}
        whole = self._template([asked, said], False, "a first conversation")
        after = whole[whole.rindex(words) + len(words) :] if words in whole else ""
        special = sorted((token for token in self.tokenizer.get_added_vocab() if token.strip()), key=len)
        found = {after.find(token): token for token in special if token in after}
        if not found:
            raise ValueError(
                f"the chat template ends an answer with {after!r} and no special token, so none would end; "
                "give the tokenizer a template that closes the assistant's turn."
            )
        return found[min(found)]

    # Text to tokens

    @cached_property
    def _puts_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and list(self.tokenizer("a")["input_ids"][:1]) == [bos]

    @cached_property
    def _anchor(self) -> str:
        """What to put before a continuing piece, if the tokenizer begins every text with a space."""
        alone, line, after_line = (encoding[0] for encoding in self._encode(["a", "\n", "\na"]))
        return "" if alone == after_line[len(line) :] else "\n"

    def _tokenise(self, renderings: Sequence[Rendering]) -> list[Example]:
        firsts = iter(self._encode([rendering.pieces[0].text for rendering in renderings]))
        later = [piece.text for rendering in renderings for piece in rendering.pieces[1:]]
        others = iter(self._continue(later))
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        examples = []
        for rendering in renderings:
            tokens, targets = ([bos], [False]) if rendering.bos else ([], [])
            for number, piece in enumerate(rendering.pieces):
                ids, starts = next(others if number else firsts)
                tokens += ids
                targets += [start < piece.answer for start in starts]
            if rendering.eos:
                tokens.append(eos)
                targets.append(True)
            if self.marks == "published":
                targets = self._published(tokens)
            token_id = None if self.sight is None else self.sight.image_token_id
            tokens, targets = expand(tokens, targets, rendering.pictures, token_id, rendering.where)
            targets[:1] = [False] * len(targets[:1])  # nothing precedes the first token
            examples.append(Example(np.array(tokens, np.int32), np.array(targets, bool), rendering.pictures))
        return examples

    def _published(self, tokens: Sequence[int]) -> list[bool]:
        """The targets of a whole conversation by the "published" marks."""
        start, header, anywhere = self._chatml
        targets, inside = [], False
        for index, token in enumerate(tokens):
            if token == start:
                inside = list(tokens[index + 1 : index + 1 + len(header)]) == header
            targets.append(inside or token in anywhere)
        return targets

    @cached_property
    def _chatml(self) -> tuple[int, list[int], set[int]]:
        """The token that begins a turn, those of an assistant's header after it, and those that are targets anywhere."""
        tokens = [ids for ids, _ in self._encode(["<|im_start|>", "assistant", "\n", "<|im_end|>"])]
        if any(len(ids) != 1 for ids in (tokens[0], tokens[2], tokens[3])):
            raise ValueError(
                'marks="published" needs a tokenizer of the ChatML form, with <|im_start|>; use "answers".'
            )
        return tokens[0][0], tokens[1], {tokens[0][0], tokens[2][0], tokens[3][0]}

    def _continue(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """As `_encode`, for texts that stand after others."""
        if not texts or not self._anchor:
            return self._encode(texts)
        (anchor, _), *anchored = self._encode([self._anchor, *(self._anchor + text for text in texts)])
        out = []
        for text, (ids, starts) in zip(texts, anchored, strict=True):
            if ids[: len(anchor)] != anchor:
                raise ValueError(
                    f"this tokenizer joins a line break to what follows in {text[:20]!r}; strip the answers."
                )
            out.append((ids[len(anchor) :], [start - len(self._anchor) for start in starts[len(anchor) :]]))
        return out

    def _encode(self, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """(ids, first character of each) of every text, with no special tokens but those spelt out in it."""
        if not texts:
            return []
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            (ids, [start for start, _ in offsets])
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]


def in_chunks(rows: Iterable[Any]) -> Iterator[list[Any]]:
    """The rows, as many at a time as are tokenised at once."""
    left = iter(rows)
    while chunk := list(islice(left, _ROWS_AT_ONCE)):
        yield chunk


def messages_of(row: Record, field: str, place: Place | str, *, empty_answers: bool = False) -> list[Message]:
    """The messages in a field of a row, the content of each as one text (`_content`).

    Raises:
        ValueError: something else in the field, or (unless `empty_answers`) an assistant that says nothing; names the row.
    """
    given = _field(row, field, place)
    if not isinstance(given, (list, tuple)) or not given:
        what = "an empty list" if isinstance(given, (list, tuple)) else kind_of(given)
        raise ValueError(f"{place}: field {field!r} must be a list of {{'role', 'content'}}, not {what}.")
    messages: list[Message] = []
    for number, message in enumerate(given, 1):
        if not isinstance(message, Mapping):
            what = kind_of(message)
            raise ValueError(f"{place}: message {number} of {field!r} must be {{'role', 'content'}}, not {what}.")
        within = f"{place}, message {number} of {field!r}"
        role, content = _text(message, "role", within), _content(message, within)
        if role == "assistant" and not empty_answers:
            _not_blank(content, "field 'content'", within)
        # Arrow fills fields that other messages have with nulls
        messages.append({name: value for name, value in message.items() if value is not None} | {"content": content})
    return messages


def _content(message: Message, place: str) -> str:
    """A message's text; a list of parts, {"type": "text" | "image"}, becomes lines, with a marker for each picture."""
    parts = _field(message, "content", place)
    if not isinstance(parts, list | tuple):
        return _text(message, "content", place)
    lines = []
    for part in parts:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("text", "image"):
            raise ValueError(f"{place}: a part of the content must have type 'text' or 'image', not {kind!r}.")
        lines.append(MARKER if kind == "image" else _text(part, "text", place))
    return "\n".join(lines)


def _field(row: Record, field: str, place: Place | str) -> Any:
    if field not in row:
        raise ValueError(f"{place}: no field {field!r}; its fields are {_names(row)}.")
    return row[field]


def _text(row: Record, field: str, place: Place | str) -> str:
    value = _field(row, field, place)
    if not isinstance(value, str):
        raise ValueError(f"{place}: field {field!r} must be text, not {kind_of(value)}.")
    return value


def _not_blank(text: str, what: str, place: Place | str) -> None:
    if not text.strip():
        raise ValueError(f"{place}: {what} is empty, so there is nothing to learn; leave the row out.")


def _names(row: Record) -> str:
    return ", ".join(map(str, row)) or "none"
