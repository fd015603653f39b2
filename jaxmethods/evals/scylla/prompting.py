"""What a model is told: a task, its input, and in what form to answer; and how it is asked to invent inputs.

The words are this project's; the parts are the paper's (appendix C of https://arxiv.org/abs/2410.01769). A prompt can be read back,
which is what the built-in solvers do.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from jaxmethods import tree
from jaxmethods.evals.scylla.generating import Item
from jaxmethods.evals.scylla.task import Answer, Example, Task
from jaxmethods.evals.scylla.tasks import TASKS

CUE = "Therefore, the answer is"
"""What the second pass appends to a response."""
_FORMS = {
    "number": "one whole number",
    "ordered": "a list of whole numbers in square brackets, separated by commas, such as [3, 1, 2]",
    "unordered": "a list of whole numbers in square brackets, separated by commas, such as [3, 1, 2]",
    "tour": "the list of cities in the order of the tour, in square brackets and separated by commas, such as [0, 2, 1, 0]",
}
_INVENTED = {
    "list": "Write each input as a list of non-negative integers in square brackets, such as [3, 1, 2]",
    "pair": "Write each input as a pair of lists of non-negative integers in square brackets, such as [[3, 1, 2], [1, 2, 4]]",
    "matrix": "Write each input as a symmetric matrix of non-negative integers with a zero diagonal, such as [[0, 3], [3, 0]]",
}


def render(task: Task, example: Example) -> str:
    """An example as a prompt shows it."""
    if task.data == "matrix":
        rows = r" \\ ".join(" & ".join(map(str, row)) for row in example)
        return rf"$n$ = {len(example)}, $D$ = \begin{{bmatrix}} {rows} \end{{bmatrix}}"
    if task.data == "pair":
        return f"$l_1$ = {_joined(example[0])}, $l_2$ = {_joined(example[1])}"
    if not isinstance(example[0], list | tuple):
        return _joined(example)
    values, asked = example
    if isinstance(asked, list | tuple):
        return f"$l$ = {_joined(values)}, $a$ = {asked[0]}, $b$ = {asked[1]}"
    return f"$l$ = {_joined(values)}, $k$ = {asked}"


def prompt(task: Task, example: Example, *, shots: Sequence[Item] = (), sizes: str = "told") -> str:
    """A question: zero-shot chain of thought, or with solved examples before it.

    Args:
        shots: questions of the same task, shown with their answers.
        sizes: "told" says that subsets have 4 to 6 entries, without which SubsetSumInRange and SubsetSumMultipleTen have many right
            answers; "untold" does not, as in the paper.
    """
    tree.require_one_of("sizes", sizes, ("told", "untold"))
    instruction = (sizes == "untold" and task.untold) or task.instruction
    solved = "".join(f"Input: {render(task, s.example)}\nThe answer is {written(s.answer)}\n\n" for s in shots)
    solved = f"Some inputs with their answers:\n\n{solved}Now the input to answer.\n\n" if solved else ""
    return (
        f"Task: {task.name}. {instruction}\n\n{solved}Input: {render(task, example)}\n\n"
        f'Finish with a line of the form "The answer is <ANSWER>", where <ANSWER> is {_FORMS[task.answer]}, '
        "and nothing follows it.\n"
        "Let us think step by step."
    )


def second(first: str, response: str) -> str:
    """The prompt of the second pass: the first one, its response, and the cue."""
    return f"{first}\n\n{response}\n\n{CUE}"


def probing(task: Task) -> str:
    """Asks for inputs, so that a model shows what it takes numbers from."""
    return (
        f"Somebody has written a program for this task: {task.name}. {task.untold or task.instruction}\n\n"
        "Invent as many test inputs for it as you can. "
        f"{_INVENTED[task.data]}. Do not make them too long. Write neither outputs nor explanations nor code."
    )


def written(answer: Answer) -> str:
    """An answer as a prompt shows it."""
    return str(answer) if isinstance(answer, int) else f"[{', '.join(map(str, answer))}]"


def read_prompt(text: str) -> tuple[Task, Example]:
    """The task and the example of a prompt (the last one, after solved ones).

    Raises:
        ValueError: it is none.
    """
    name = re.match(r"Task: (\w+)\.", text)
    inputs = re.findall(r"^Input: (.*)$", text, re.MULTILINE)
    if not name or name[1] not in TASKS or not inputs:
        raise ValueError(f"{' '.join(text.split())[:80]!r} is no prompt of these tasks.")
    task = TASKS[name[1]]
    if task.data == "matrix":
        rows = re.findall(r"\\begin\{bmatrix\} (.*) \\end\{bmatrix\}", inputs[-1])[0].split(r" \\ ")
        return task, [[int(x) for x in row.split(" & ")] for row in rows]
    parts: list[Any] = [[int(x) for x in part.split()] for part in re.sub(r"\$\w+\$ =", "", inputs[-1]).split(",")]
    if len(parts) == 1:
        return task, parts[0]
    if task.data == "pair":
        return task, parts
    asked = [part[0] for part in parts[1:]]
    return task, [parts[0], asked if len(asked) == 2 else asked[0]]


def _joined(values: Sequence[int]) -> str:
    return " ".join(map(str, values))
