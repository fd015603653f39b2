"""Asking a model the questions, grading what it says, and summing up.

from jaxmethods.evals import scylla

result = scylla.evaluate(model, items=32)           # model(prompt) -> text
result.critical_complexity, result.levels, result.tasks["TwoSum"]["id"].accuracy
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmethods.evals.answers import Answerer, Failed, Prompt
from jaxmethods.evals.scylla import measures
from jaxmethods.evals.scylla.generating import Item, Questions, questions, synthetic
from jaxmethods.evals.scylla.measures import Level
from jaxmethods.evals.scylla.prompting import prompt, second
from jaxmethods.evals.scylla.reading import extract
from jaxmethods.evals.scylla.task import Answer
from jaxmethods.evals.scylla.tasks import ANCHORS, TASKS, require_tasks

SPLITS = ("id", "ood")
SECOND_PARSED = 0.5
"""The share of answers of the second pass that must be parsed, with denominator="parsed"."""


@dataclasses.dataclass(frozen=True)
class Graded:
    """What became of an answer. parsed: as read; None: it could not be. failed: why none came, else ""."""

    parsed: Answer | None
    right: bool
    failed: str = ""


@dataclasses.dataclass(frozen=True)
class Tally:
    """Of one task and split. accuracy: of the answers that came; None where none did. parsed, failed: of how many `items`."""

    accuracy: float | None
    items: int
    parsed: int
    failed: int


@dataclasses.dataclass(frozen=True)
class Result:
    """What a model was found to do.

    tasks: name -> {"id", "ood"} -> tally. levels: means over anchors. probes: name -> the level that its A_ood shows.
    failed: questions without an answer, which count nowhere.
    """

    tasks: Mapping[str, Mapping[str, Tally]]
    levels: list[Level]
    critical_complexity: int | None
    probes: Mapping[str, float | None]
    failed: int

    def accuracies(self, split: str) -> dict[str, float]:
        """Of the tasks that have answers in both splits."""
        return {
            name: of[split].accuracy  # type: ignore[misc]
            for name, of in self.tasks.items()
            if all(of[one].accuracy is not None for one in SPLITS)
        }


def one_by_one(model: Callable[[str], str]) -> Answerer:
    """`model(prompt) -> text` as an `Answerer`. What it raises stands as `Failed`; an interrupt goes through."""

    def ask(prompts: Sequence[Prompt]) -> list[str | Failed]:
        return [_asked(model, one) for one in prompts]

    return ask


def _asked(model: Callable[[str], str], one: Any) -> str | Failed:
    try:
        said = model(one)
    except Exception as error:  # a model may be anything, and the other answers are not to be lost
        return Failed(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return said if isinstance(said, str) else Failed(f"the model returned {type(said).__name__}, and no text")


def grade(item: Item, said: str | Failed, *, grading: str = "verifier") -> Graded:
    """Reads an answer and says whether it is right."""
    if isinstance(said, Failed):
        return Graded(None, False, said.reason)
    answer = extract(item.task, said)
    return Graded(answer, answer is not None and TASKS[item.task].check(item.example, answer, grading=grading))


def tally(graded: Sequence[Graded], *, denominator: str = "all", least_parsed: float = 0.1) -> Tally:
    """Sums up one task and split."""
    came = [one for one in graded if not one.failed]
    parsed = [one.parsed is not None for one in came]
    rate = None
    if came:
        rate = measures.accuracy(
            [one.right for one in came], parsed, denominator=denominator, least_parsed=least_parsed
        )
    return Tally(rate, len(graded), sum(parsed), len(graded) - len(came))


def summed_up(tasks: Mapping[str, Mapping[str, Tally]]) -> Result:
    """The result of all tasks."""
    failed = sum(tally.failed for of in tasks.values() for tally in of.values())
    bare = Result(tasks, [], None, {}, failed)
    inside, outside = bare.accuracies("id"), bare.accuracies("ood")
    levels = measures.valley(inside, outside)
    line = {level.level: level.outside for level in levels}
    probes = {name: measures.complexity_used(line, outside[name]) for name in outside if name not in ANCHORS}
    return Result(tasks, levels, measures.critical_complexity(inside, outside), probes, failed)


def benchmark(
    tasks: Sequence[str] = (), *, items: int = 256, shots: int = 8, seed: int = 0, universe: str = "released"
) -> dict[str, dict[str, Questions]]:
    """Task -> {"id", "ood"} -> questions, of synthetic ID data; the same for the same seed, whatever other tasks are asked for.

    Args:
        tasks: names; none stands for all.
        shots: solved examples that are kept beside the items.
        universe: of OOD numbers, "released" or "paper".

    Raises:
        ValueError: an unknown task; fewer than one item.
    """
    if items < 1 or shots < 0:
        raise ValueError(f"items={items} must be at least 1, and shots={shots} not negative.")
    made = {}
    for name in require_tasks(tasks):
        inside = synthetic(TASKS[name], rng_of(seed, name), items + shots)
        made[name] = questions(TASKS[name], inside, items=items, shots=shots, seed=seed, universe=universe)
    return made


def rng_of(seed: int, task: str) -> np.random.Generator:
    """The generator of a task's ID data, that no other task shares."""
    return np.random.default_rng([seed, *f"data/{task}".encode()])


def evaluate(
    model: Callable[[str], str] | Answerer,
    tasks: Sequence[str] = (),
    *,
    items: int = 256,
    shots: int = 0,
    seed: int = 0,
    grading: str = "verifier",
    denominator: str = "all",
    batched: bool = False,
    passes: int = 1,
) -> Result:
    """Asks a model synthetic questions, ID and OOD, and sums up. The program `jaxmethods evaluate scylla` resumes, this does not.

    Args:
        model: prompt -> text; with `batched`, an `Answerer` (prompts -> texts).
        shots: solved examples in each prompt.
        grading: of `Task.check`. denominator: of `measures.accuracy`.
        passes: 2 asks once more with the response and "Therefore, the answer is", and grades that.
    """
    ask: Any = model if batched else one_by_one(model)  # type: ignore[arg-type]
    tallies: dict[str, dict[str, Tally]] = {}
    for name, splits in benchmark(tasks, items=items, shots=max(shots, 8), seed=seed).items():
        tallies[name] = {}
        for split, asked in splits.items():
            prompts = [prompt(TASKS[name], item.example, shots=asked.shots[:shots]) for item in asked.items]
            said = ask(prompts)
            if passes == 2:
                said = ask_again(ask, prompts, said)
            graded = [grade(item, one, grading=grading) for item, one in zip(asked.items, said, strict=True)]
            least = SECOND_PARSED if passes == 2 else 0.1
            tallies[name][split] = tally(graded, denominator=denominator, least_parsed=least)
    return summed_up(tallies)


def ask_again(ask: Answerer, prompts: Sequence[str], said: Sequence[str | Failed]) -> list[str | Failed]:
    """The second pass; what failed in the first stays so. The cue is put before each answer, as it is read by it."""
    came = [i for i, one in enumerate(said) if not isinstance(one, Failed)]
    more = ask([second(prompts[i], str(said[i])) for i in came]) if came else []
    found = list(said)
    for i, one in zip(came, more, strict=True):
        found[i] = one if isinstance(one, Failed) else f"the answer is {one}"
    return found
