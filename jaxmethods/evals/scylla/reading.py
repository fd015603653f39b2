"""Reading answers: the last number or list after a cue phrase, or the last of all.

Two differences from the released code, whose pattern of a number has neither: signs are read (-5 is not 5), and commas that part
thousands ("9,999" is no 9), which only the larger OOD numbers have.
"""

from __future__ import annotations

import re

from jaxmethods.evals.scylla.task import Answer
from jaxmethods.evals.scylla.tasks import TASKS

CUES = ("answer is", "answers are", "answer:", "answer =", "result is", "result:", "output is", "output:")
"""Tried in this order."""
_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?"
_LIST = r"\[[^\[\]]*\]"


def extract(task: str, text: str) -> Answer | None:
    """The answer in a response; None where there is none that can be read.

    >>> extract("FindMinimum", "I compare 3 and 9. The answer is **3**."), extract("SortNumbers", "so [1, 2] is the order")
    (3, [1, 2])
    """
    plain = re.sub(r"```\w*|[`\"'“”*]", "", text).replace("\n", " ")
    number = TASKS[task].answer == "number"
    pattern = _NUMBER if number else _LIST
    for cue in CUES:
        if found := re.findall(rf"{cue}.*?({pattern})", plain, re.IGNORECASE):
            break
    else:
        found = re.findall(pattern, plain)
    if not found:
        return None
    return _number(found[-1]) if number else _list(found[-1])


def _number(text: str) -> int | None:
    value = text.replace(",", "")
    whole, _, fraction = value.partition(".")
    return int(whole) if not fraction.strip("0") and len(whole) < 20 else None


def _list(text: str) -> list[int] | None:
    """The whole numbers of a bracketed list, parted by commas or white space; None if anything else is in it."""
    words = re.split(r"\s*,\s*|\s+", text[1:-1].strip()) if text[1:-1].strip() else []
    found = [_number(word) if re.fullmatch(r"-?\d+(?:\.\d+)?", word) else None for word in words]
    return None if None in found else [x for x in found if x is not None]
