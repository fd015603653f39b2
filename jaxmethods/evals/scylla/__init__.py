"""Scylla: how far a model generalises, over tasks of rising complexity (https://arxiv.org/abs/2410.01769).

from jaxmethods.evals import scylla

task = scylla.TASKS["TSP"]
example = task.sample(np.random.default_rng(0), range(101))
task.check(example, task.solve(example))                            # True
result = scylla.evaluate(model, items=32)                           # model(prompt) -> text
scylla.critical_complexity(result.accuracies("id"), result.accuracies("ood"))
"""

from jaxmethods.evals.scylla import intrinsic
from jaxmethods.evals.scylla.generating import (
    Distribution,
    Item,
    Questions,
    out_of_distribution,
    probed,
    questions,
    synthetic,
    universe_of,
)
from jaxmethods.evals.scylla.measures import (
    Level,
    accuracy,
    complexity_used,
    critical_complexity,
    gap,
    ratio,
    relative_gap,
    score,
    valley,
)
from jaxmethods.evals.scylla.prompting import CUE, probing, prompt, read_prompt, render
from jaxmethods.evals.scylla.reading import extract
from jaxmethods.evals.scylla.running import (
    Graded,
    Result,
    Tally,
    ask_again,
    benchmark,
    evaluate,
    grade,
    one_by_one,
    summed_up,
    tally,
)
from jaxmethods.evals.scylla.solving import Noisy, memoriser, oracle
from jaxmethods.evals.scylla.task import Task
from jaxmethods.evals.scylla.tasks import ANCHORS, TASKS, require_tasks

__all__ = [
    "ANCHORS", "CUE", "Distribution", "Graded", "Item", "Level", "Noisy", "Questions", "Result", "TASKS", "Tally", "Task",
    "accuracy", "ask_again", "benchmark", "complexity_used", "critical_complexity", "evaluate", "extract", "gap", "grade",
    "intrinsic", "memoriser", "one_by_one", "oracle", "out_of_distribution", "probed", "probing", "prompt", "questions", "ratio",
    "read_prompt", "relative_gap", "render", "require_tasks", "score", "summed_up", "synthetic", "tally", "universe_of", "valley",
]  # fmt: skip
