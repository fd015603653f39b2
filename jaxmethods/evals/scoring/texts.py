"""From texts to the tokens that are scored, as lm-evaluation-harness cuts them.

>>> [(list(pair.context), list(pair.continuation)) for pair in rolling([5, 6, 7, 8, 9], prefix=0, limit=3)]
[([0], [5, 6, 7]), ([6, 7], [8, 9])]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxmethods.evals.scoring.likelihoods import Pair


def pair_of(tokenizer: Any, context: str, continuation: str) -> Pair:
    """Context and continuation as the tokens of the whole text; white space at the context's end belongs to the continuation.

    A text without context follows `prefix_of` the tokenizer.

    Raises:
        ValueError: an empty continuation, or one that adds no token to the context's.
    """
    if not continuation:
        raise ValueError("the continuation is empty")
    prefix = prefix_of(tokenizer)
    if not context:
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        made = Pair([prefix], tokens) if tokens[:1] != [prefix] else Pair(tokens[:1], tokens[1:])
    else:
        bare = context.rstrip()
        whole, before = encoded(tokenizer, context + continuation), encoded(tokenizer, bare)
        made = Pair(before, whole[len(before) :])
    if not made.context or not made.continuation:
        raise ValueError(f"there is no token of its own for {(continuation if made.context else context)[:40]!r}")
    return made


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text; one that begins with the tokenizer's prefix gets no second one."""
    told = {"add_special_tokens": False} if text.startswith(tokenizer.decode(prefix_of(tokenizer))) else {}
    return tokenizer.encode(text, **told)


def prefix_of(tokenizer: Any) -> int:
    """The token before a text without context: BOS, or EOS where there is none.

    Raises:
        ValueError: the tokenizer has neither.
    """
    found = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if found is None:
        raise ValueError("the tokenizer names neither a BOS nor an EOS token, so that nothing can stand before a text.")
    return found


def rolling(tokens: Sequence[int], *, prefix: int, limit: int) -> Iterator[Pair]:
    """All tokens of a text, each once, in windows of `limit`, each with as much before it as fits."""
    for start in range(0, len(tokens), limit):
        end = min(start + limit, len(tokens))
        context = [prefix] if not start else tokens[end - limit - 1 : start]
        yield Pair(context, tokens[start:end])
