"""Asking models: a function from prompts to answers, whatever gives them, and what stands for an answer that did not come.

`Local` asks a model of this library, `jaxmethods.evals.endpoint.Endpoint` one behind a server. An evaluator or a judge that takes
an `Answerer` works with both, and with any function of yours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from jaxmethods import data
from jaxmethods.evals.completion import complete
from jaxmethods.tree import Tree

Message = Mapping[str, Any]
"""A turn: {"role", "content"}, the content text."""


@dataclasses.dataclass(frozen=True)
class Pictured:
    """A prompt with pictures.

    prompt: text, or messages.
    images: what `images.open_picture` opens, or a list of these, one for each marker `<image>` of the prompt.
    """

    prompt: str | Sequence[Message]
    images: Any


Prompt = str | Sequence[Message] | Pictured


@dataclasses.dataclass(frozen=True)
class Failed:
    """Stands where an answer would.

    reason: why there is none, in one line.
    """

    reason: str


Answerer = Callable[[Sequence[Prompt]], Sequence[str | Failed]]
"""Answers in the order of the prompts. It does not raise for one of them: then the others' would be lost."""

_EASY = "Answer with the word ready."


def silence(ask: Answerer) -> Failed | None:
    """Why an easy question gets no answer, as where a server is gone; None where it gets one."""
    (answer,) = ask([_EASY])
    return answer if isinstance(answer, Failed) else None


_ROOM = 64  # tokens: the lengths of prompts are rounded up to a multiple of it


@dataclasses.dataclass(frozen=True)
class Local:
    """A model of this library as an `Answerer`: the same prompts have the same answers.

    Prompts are given room for a multiple of 64 tokens, so that calls share their compiled programs. A picture that cannot be
    read, or a prompt that the chat template refuses, is an error before anything is asked.

    Args:
        max_new_tokens: of each answer.
        batch_size: answers made at once.
        temperature, top_k, top_p: as of `generation.generate`; 0 is greedy.
        seed: of what is drawn.
    """

    module: Any
    params: Tree
    tokenizer: Any
    max_new_tokens: int = 256
    batch_size: int = 16
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[str | Failed]:
        if not prompts:
            return []
        texts, pictures = zip(*(taken_apart(prompt) for prompt in prompts), strict=True)
        return complete(
            self.module, self.params, self.tokenizer, texts, images=pictures, max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size, temperature=self.temperature, top_k=self.top_k, top_p=self.top_p,
            key=jax.random.key(self.seed) if self.temperature else None,
            length=_room(self.module, self.tokenizer, texts, pictures),
        )  # fmt: skip


def taken_apart(prompt: Prompt) -> tuple[str | Sequence[Message], Any]:
    """(text or messages, pictures or None) of a prompt."""
    return (prompt.prompt, prompt.images) if isinstance(prompt, Pictured) else (prompt, None)


def _room(module: Any, tokenizer: Any, prompts: Sequence[str | Sequence[Message]], images: Sequence[Any]) -> int:
    """The `length` of `completion.complete` for these prompts: that of the longest, rounded up to a multiple of 64 tokens."""
    renderer = data.Renderer(tokenizer, sight=getattr(module, "sight", None))
    longest = max(
        len(renderer.prompt(*one, f"prompt {i}").tokens) for i, one in enumerate(zip(prompts, images, strict=True), 1)
    )
    return -(-longest // _ROOM) * _ROOM
