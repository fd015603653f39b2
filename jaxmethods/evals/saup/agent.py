"""An agent that thinks, acts and observes (ReAct, https://arxiv.org/abs/2210.03629), for many questions at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxmethods.data import trajectories
from jaxmethods.evals.answers import Answerer, Failed
from jaxmethods.evals.completion import same

Environment = Callable[[str], str]
"""What is observed after an action; "" after finish[...], which ends the trajectory."""


def rollout(
    answerer: Callable[[int], Answerer],
    questions: Sequence[Mapping[str, Any]],
    environment: Environment,
    *,
    steps: int = 8,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any] | Failed]:
    """A trajectory for each question: {"id", "question", "answer", "system", "steps", "correct"}; with "path" and states.

    It ends with finish[...], or is wrong after so many steps. Where the agent names no action, all that it says is thought.
    `Failed` where an answer did not come.

    Args:
        answerer: the number of a step, from 0 -> who answers then; a seed of its own draws afresh at each step.
        questions: {"id", "question", "answer"}, and perhaps "system", "kind", and "path" (the gold actions).
        steps: at most.

    Raises:
        ValueError: no step.
    """
    if steps < 1:
        raise ValueError(f"{steps=} must be at least 1.")
    taken: list[list[dict[str, str]]] = [[] for _ in questions]
    failed: dict[int, Failed] = {}
    open_ones = list(range(len(questions)))
    for number in range(steps):
        if not open_ones:
            break
        progress(f"step {number + 1} of {len(open_ones)} trajectories")
        said = answerer(number)([trajectories.conversation({**questions[i], "steps": taken[i]}) for i in open_ones])
        for i, text in zip(open_ones, said, strict=True):
            if isinstance(text, Failed):
                failed[i] = text
                continue
            thought, action = trajectories.heard(text)
            taken[i].append({"thought": thought, "action": action, "observation": environment(action)})
        going = lambda i: i not in failed and trajectories.answered(taken[i]) is None
        open_ones = [i for i in open_ones if going(i)]
    return [failed.get(i) or _row(question, taken[i]) for i, question in enumerate(questions)]


def _row(question: Mapping[str, Any], steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    said = trajectories.answered(steps)
    if "path" in question:
        marked = trajectories.states(steps, question["path"])
        steps = [step | {"state": state} for step, state in zip(steps, marked, strict=True)]
    kept = {name: question[name] for name in ("id", "question", "answer", "system", "kind") if name in question}
    return kept | {"steps": list(steps), "correct": said is not None and same(said, question["answer"])}
