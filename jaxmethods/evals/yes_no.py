"""How well a model answers questions by yes or no, as POPE measures whether it sees objects that are not there.

>>> yes_no(["Yes, there is a dog.", "No.", "There is not."], np.array([True, False, True])).accuracy.__round__(3)
0.667
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool

UNPARSED = ("yes", "wrong")


class YesNo(NamedTuple):
    """Shares of the questions, 0..1, "yes" being the positive class; and how many answers said neither."""

    accuracy: float
    precision: float
    """Of those answered by yes, how many are true; 0 where none is."""
    recall: float
    """Of those that are true, how many are answered by yes; 0 where none is."""
    f1: float
    yes_ratio: float
    unparsed: int


def yes_no(
    answers: Sequence[str] | Sequence[bool] | Bool[Array | np.ndarray, "questions"],
    truth: Sequence[Any] | Bool[Array | np.ndarray, "labels"],
    *,
    unparsed: str = "yes",
) -> YesNo:
    """Accuracy, precision, recall, F1 and the share of "yes" (https://arxiv.org/abs/2305.10355, section 4.1).

    Args:
        answers: texts, read by `says_yes`; or true where the model says yes.
        truth: booleans, true where "yes" is right.
        unparsed: what texts count as that say neither: "yes" as in POPE's own program, so that numbers compare with
            published ones; or "wrong": neither yes nor no, and never right.

    Raises:
        ValueError: no answers, another number of labels, labels that are not booleans, or an unknown `unparsed`.
    """
    if unparsed not in UNPARSED:
        raise ValueError(f"{unparsed=} is unknown; choose of {', '.join(UNPARSED)}.")
    labels = np.asarray(truth)
    if len(answers) != len(labels) or not len(labels):
        raise ValueError(f"there are {len(answers)} answers and {len(labels)} labels; give one label for each answer.")
    if labels.dtype != bool:  # "no" is true as a boolean
        raise ValueError(f"truth has dtype {labels.dtype}; give booleans, [label == 'yes' for label in labels].")
    said = [says_yes(answer) if isinstance(answer, str) else bool(answer) for answer in answers]
    yes, no, neither = (np.array([s is meant for s in said]) for meant in (True, False, None))
    if unparsed == "yes":
        yes = yes | neither
    hits, all_yes, all_true = int((yes & labels).sum()), int(yes.sum()), int(labels.sum())
    return YesNo(
        accuracy=(hits + int((no & ~labels).sum())) / len(labels),
        precision=hits / max(1, all_yes),
        recall=hits / max(1, all_true),
        f1=2 * hits / max(1, all_yes + all_true),  # the harmonic mean of both
        yes_ratio=all_yes / len(labels),
        unparsed=int(neither.sum()),
    )


def says_yes(answer: str) -> bool | None:
    """What a free answer says: False: no; True: yes; None: neither, which POPE's own program takes for yes.

    Its rule: of the text before the first full stop, without commas and split at spaces, "No", "no" or "not" among the words
    is a no, whatever else there is. Words must match in full: "No!" and "isn't" are none. Looking for "yes", in any case, is
    ours; it only tells those who say yes from those who say neither.
    """
    sentence = answer.split(".")[0]
    if {"No", "no", "not"} & set(sentence.replace(",", "").split(" ")):
        return False
    return True if re.search(r"\byes\b", sentence, re.IGNORECASE) else None
