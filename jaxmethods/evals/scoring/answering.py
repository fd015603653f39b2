"""Texts that continue prompts of mixed lengths, from a stream, up to stop strings: few compiled programs.

A program makes a piece of each answer. Rows that are not at their end go on in the next one, with what they have said as part of
their prompt, beside others that are as long; so a row that stops early costs a piece and not the longest answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxmethods import generation
from jaxmethods.evals.scoring.likelihoods import BATCH_TOKENS, WINDOW, on_mesh, place, ways
from jaxmethods.evals.scoring.planning import UNPACKED, Shape, Work, plan, shapes_for, windows
from jaxmethods.tree import Tree

PIECES = (16, 64)
"""New tokens of a program: the least of these that is enough, or the last."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is continued, and how.

    tokens: ids, at least one. stops: the text ends before the first of these; a stop that is one special token ends it where it is
    said. temperature, top_k, top_p: as of `generation.generate`; 0 is greedy.
    """

    tokens: Sequence[int]
    max_new_tokens: int = 256
    stops: tuple[str, ...] = ()
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    @property
    def drawing(self) -> tuple[Any, ...]:
        """What rows of one batch have in common."""
        return self.temperature, self.top_k, self.top_p


class Continuation(NamedTuple):
    """The text, cut at the first stop; how many tokens were made; whether it ended by itself; tokens that the prompt lost."""

    text: str
    tokens: int
    ended: bool
    cut: int


@dataclasses.dataclass
class _Row:
    prompt: Prompt
    number: int
    tokens: np.ndarray
    cut: int
    ends: frozenset[int]
    said: list[int] = dataclasses.field(default_factory=list)
    pieces: int = 0
    ended: bool = False

    @property
    def left(self) -> int:
        return self.prompt.max_new_tokens - len(self.said)

    @property
    def piece(self) -> int:
        return next((piece for piece in PIECES if piece >= self.left), PIECES[-1])


def continuations(
    module: Any,
    params: Tree,
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    limit: int | None = None,
    seed: int = 0,
    batch_tokens: int = BATCH_TOKENS,
    window: int = WINDOW,
    mesh: Mesh | None = None,
    work: Work | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Continuation]:
    """Continuations in the order of the prompts; the stream is read a window at a time.

    A prompt that leaves no room for its new tokens loses its beginning. What is drawn for prompt number i depends on the seed, on i
    and on what was said before, and but for rounding on nothing else.

    Args:
        limit: tokens of a prompt with its continuation, at most; by default the configuration's `max_position_embeddings`.
        batch_tokens: places of prompts in a batch, about.
        window, mesh, work, progress: as of `log_likelihoods`.

    Raises:
        ValueError: an empty prompt, `max_new_tokens` below 1 or not below `limit`; options that `generation.generate` refuses.
    """
    module, mesh = on_mesh(module, mesh)
    limit = limit or module.config.max_position_embeddings
    shapes = shapes_for(limit, batch_tokens, shortest=UNPACKED, multiple=ways(mesh))
    work = Work() if work is None else work
    start, done = jax.random.key(seed), 0
    for some in windows(prompts, window):
        rows = [_row(module, tokenizer, prompt, done + number, limit) for number, prompt in enumerate(some)]
        while open_rows := [row for row in rows if not row.ended and row.left]:
            # The programs of one turn differ in shape, piece, and in how tokens are drawn.
            kinds = dict.fromkeys((row.prompt.drawing, row.piece, row.ends) for row in open_rows)
            for kind in kinds:
                group = [row for row in open_rows if (row.prompt.drawing, row.piece, row.ends) == kind]
                lengths = np.array([len(row.tokens) + len(row.said) for row in group])
                for shape, laid in plan(lengths, shapes, pack=False):
                    batch = [group[int(i)] for (i,) in laid]
                    _go_on(module, params, batch, shape, mesh, start)
                    options = tuple(x is not None for x in kind[0][1:])
                    program = ("continuations", *shape, kind[1], kind[0][0] > 0, *options, len(kind[2]))
                    work.count(program, shape.places, int(sum(len(row.tokens) for row in batch)))
                    for row in batch:
                        row.ended = row.ended or any(stop in _text(tokenizer, row) for stop in row.prompt.stops if stop)
            progress(done + sum(row.ended or not row.left for row in rows))
        done += len(some)
        work.requests += len(some)
        for row in rows:
            text = _text(tokenizer, row)
            for stop in filter(None, row.prompt.stops):
                text = text.split(stop)[0]
            yield Continuation(text, len(row.said), row.ended, row.cut)


def _row(module: Any, tokenizer: Any, prompt: Prompt, number: int, limit: int) -> _Row:
    room = limit - prompt.max_new_tokens
    if not len(prompt.tokens):
        raise ValueError(f"request {number + 1} has an empty prompt; give at least one token.")
    if prompt.max_new_tokens < 1 or room < 1:
        raise ValueError(
            f"request {number + 1} asks for {prompt.max_new_tokens} new tokens; give 1 to {limit - 1}: the model's {limit} less "
            "a token of the prompt."
        )
    kept = np.asarray(prompt.tokens, np.int32)[-room:]
    # Special tokens are left out of the text, so that stops among them must be found as tokens.
    special = set(tokenizer.all_special_tokens) & set(prompt.stops)
    ends = {*module.config.eos_ids, *tokenizer.convert_tokens_to_ids(sorted(special))}
    if tokenizer.eos_token_id is not None:
        ends.add(tokenizer.eos_token_id)
    return _Row(prompt, number, kept, len(prompt.tokens) - len(kept), frozenset(ends))


def _text(tokenizer: Any, row: _Row) -> str:
    return tokenizer.decode(row.said, skip_special_tokens=True)


def _go_on(module: Any, params: Tree, rows: Sequence[_Row], shape: Shape, mesh: Mesh | None, start: Any) -> None:
    """A piece of each row's answer."""
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    filled = [*rows, *[rows[-1]] * (shape.rows - len(rows))]
    for i, row in enumerate(filled):
        whole = [*row.tokens, *row.said]
        tokens[i, -len(whole) :], mask[i, -len(whole) :] = whole, True
    prompt, keys = rows[0].prompt, None
    if prompt.temperature:
        numbers, pieces = (np.array([getattr(row, name) for row in filled]) for name in ("number", "pieces"))
        fold = jax.vmap(jax.random.fold_in)
        keys = fold(jax.vmap(jax.random.fold_in, (None, 0))(start, numbers), pieces)
    placed = place({"tokens": tokens, "mask": mask}, mesh)
    made = generation.generate(
        module, params, placed["tokens"], placed["mask"], max_new_tokens=rows[0].piece, temperature=prompt.temperature,
        top_k=prompt.top_k, top_p=prompt.top_p, eos_id=tuple(sorted(rows[0].ends)) or None, key=keys,
    )  # fmt: skip
    new, kept = np.asarray(made.tokens), np.asarray(made.mask)
    for i, row in enumerate(rows):
        said = new[i][kept[i]].tolist()[: row.left]
        row.said += said
        row.pieces += 1
        row.ended = bool(said) and said[-1] in row.ends
