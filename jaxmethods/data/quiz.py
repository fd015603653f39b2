"""Small questions whose answers can be checked: sums, differences, comparisons, order, numbers in words.

Every question is made from a seed, and none occurs twice: rows to learn from, rows to ask without an answer at hand, and held-out
rows are disjoint. A row is {"prompt", "answer", "kind"}; an answer is one word or one number.

    python -m jaxmethods.data.quiz --to build/quiz

>>> quiz = make(seed=0, sft=2, prompts=2, held_out=2)
>>> sorted(quiz.held_out[0])
['answer', 'kind', 'prompt']
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from jaxmethods.data.sources import one_line_errors, write_all

_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = (
    "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
)  # fmt: skip
_WORDS = (
    "apple", "banana", "cherry", "lemon", "melon", "orange", "peach", "pepper", "potato", "tomato", "carrot", "onion",
    "garlic", "butter", "coffee", "cheese", "bottle", "kettle", "window", "garden", "mirror", "ladder", "hammer",
    "pencil", "paper", "letter", "ribbon", "button", "pocket", "jacket", "summer", "winter", "river", "valley",
    "meadow", "forest", "desert", "island", "harbour", "village", "castle", "tower", "bridge", "tunnel", "station",
    "railway", "balloon", "rocket", "planet", "comet", "rabbit", "turtle", "parrot", "penguin", "leopard", "elephant",
    "giraffe", "kangaroo", "squirrel", "dolphin",
)  # fmt: skip


class Quiz(NamedTuple):
    """Rows to learn from, rows to ask, and rows held out."""

    sft: list[dict[str, str]]
    prompts: list[dict[str, str]]
    held_out: list[dict[str, str]]


def in_words(number: int) -> str:
    """A number from 0 to 99 in English.

    >>> in_words(7), in_words(40), in_words(83)
    ('seven', 'forty', 'eighty-three')
    """
    if number < 20:
        return _UNITS[number]
    ten, unit = divmod(number, 10)
    return _TENS[ten - 2] + (f"-{_UNITS[unit]}" if unit else "")


def _sum(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(2, 49), rng.randint(2, 49)
    shown = rng.choice((str, in_words))
    return f"What is {shown(a)} plus {shown(b)}?", str(a + b)


def _difference(rng: random.Random) -> tuple[str, str]:
    b, rest = rng.randint(2, 39), rng.randint(1, 59)
    shown = rng.choice((str, in_words))
    return f"What is {shown(b + rest)} minus {shown(b)}?", str(rest)


def _larger(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(range(100, 1000), 2)
    return f"Which number is larger, {a} or {b}?", str(max(a, b))


def _first(rng: random.Random) -> tuple[str, str]:
    a, b = rng.sample(_WORDS, 2)
    return f"Which word comes first in the alphabet, {a} or {b}?", min(a, b)


def _digits(rng: random.Random) -> tuple[str, str]:
    hundreds, rest = rng.randint(1, 9), rng.randint(1, 99)
    return f"Write {_UNITS[hundreds]} hundred and {in_words(rest)} in digits.", str(100 * hundreds + rest)


KINDS: Mapping[str, Callable[[random.Random], tuple[str, str]]] = MappingProxyType(
    {"sum": _sum, "difference": _difference, "larger": _larger, "first": _first, "digits": _digits}
)


def make(*, seed: int = 0, sft: int = 480, prompts: int = 240, held_out: int = 120) -> Quiz:
    """So many rows of each part, the kinds in turn; the same for the same arguments.

    Raises:
        ValueError: a part without rows.
    """
    for name, count in (("sft", sft), ("prompts", prompts), ("held_out", held_out)):
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1.")
    rng, seen, rows = random.Random(seed), set[str](), list[dict[str, str]]()
    while len(rows) < sft + prompts + held_out:
        kind = list(KINDS)[len(rows) % len(KINDS)]
        prompt, answer = KINDS[kind](rng)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "answer": answer, "kind": kind})
    return Quiz(rows[:sft], rows[sft : sft + prompts], rows[sft + prompts :])


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes sft.jsonl, prompts.jsonl and heldout.jsonl.")
    parser.add_argument("--to", required=True, type=Path, help="folder for the three files")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes other questions")
    for name, default in (("sft", 480), ("prompts", 240), ("held-out", 120)):
        parser.add_argument(f"--{name}", type=int, default=default, help="rows of this part")
    options = parser.parse_args()
    quiz = make(seed=options.seed, sft=options.sft, prompts=options.prompts, held_out=options.held_out)
    write_all(options.to, dict(zip(("sft.jsonl", "prompts.jsonl", "heldout.jsonl"), quiz, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
