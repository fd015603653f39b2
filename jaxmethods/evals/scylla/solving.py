"""Built-in solvers that read a prompt and answer it, as any `model(prompt) -> text`: their valleys are known beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

from jaxmethods.evals.scylla.prompting import read_prompt, written
from jaxmethods.evals.scylla.task import Answer, Example, Task, numbers

Model = Callable[[str], str]
FAMILIAR = 100
"""The largest number of synthetic ID examples."""
_PROBE_LEVEL = 3


def oracle(prompt: str) -> str:
    """Answers everything rightly."""
    task, example = read_prompt(prompt)
    return _said(task.solve(example))


def memoriser(prompt: str) -> str:
    """Answers rightly if no number of the data is above 100, and wrongly if one is."""
    task, example = read_prompt(prompt)
    return _said(task.solve(example) if is_familiar(task, example) else wrong(task, example))


@dataclasses.dataclass(frozen=True)
class Noisy:
    """Answers rightly with a probability that depends on the task's level, and on whether a number is above 100.

    What is drawn for a prompt depends on the seed and the prompt alone.

    Args:
        inside, outside: probabilities of levels 1 to 5; probes have that of level 3.
    """

    inside: tuple[float, ...]
    outside: tuple[float, ...]
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("inside", "outside"):
            given = getattr(self, name)
            if len(given) != 5 or not all(0 <= p <= 1 for p in given):
                raise ValueError(f"{name}={given} must be five probabilities, of levels 1 to 5.")

    def __call__(self, prompt: str) -> str:
        task, example = read_prompt(prompt)
        chances = self.inside if is_familiar(task, example) else self.outside
        digest = hashlib.blake2b(f"{self.seed} {prompt}".encode(), digest_size=8).digest()
        right = int.from_bytes(digest) / 2**64 < chances[(task.level or _PROBE_LEVEL) - 1]
        return _said(task.solve(example) if right else wrong(task, example))


def is_familiar(task: Task, example: Example) -> bool:
    """Whether no number of the data is above 100; k, targets and ranges are no data."""
    has_parameter = task.data == "list" and isinstance(example[0], list | tuple)
    return max(numbers(example[0] if has_parameter else example)) <= FAMILIAR


def wrong(task: Task, example: Example) -> Answer:
    """An answer near the right one that no grading takes."""
    answer = task.solve(example)
    return answer + 1 if isinstance(answer, int) else answer[:-1]


def _said(answer: Answer) -> str:
    return f"The answer is {written(answer)}"
