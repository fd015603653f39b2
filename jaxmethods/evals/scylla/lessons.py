"""Questions on familiar numbers with their answers, to train a model on: what it then knows of them shows over others.

    python -m jaxmethods.evals.scylla.lessons --to build/scylla

The recipe configs/scylla_smollm2.py trains on them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxmethods.data.sources import one_line_errors, write_all
from jaxmethods.evals.scylla.generating import synthetic
from jaxmethods.evals.scylla.prompting import prompt, written
from jaxmethods.evals.scylla.running import rng_of
from jaxmethods.evals.scylla.tasks import TASKS, require_tasks

_ASKED = 256 + 8
"""Inputs of a task that `evaluate scylla` draws from the same numbers, shots included."""


def lessons(
    tasks: Sequence[str] = (), *, count: int = 2500, seed: int = 1, asked_seed: int = 0
) -> Iterator[dict[str, str]]:
    """Rows {"prompt", "answer", "kind"}: `count` inputs of each task, of numbers from 0 to 100, the answer without any reasoning.

    Args:
        tasks: names; none stands for all.
        asked_seed: the inputs that an evaluation with this seed asks by default are left out; so there may be fewer than `count`.

    Raises:
        ValueError: an unknown task; `count` below 1, or more than the numbers make; both seeds equal.
    """
    if count < 1 or seed == asked_seed:
        raise ValueError(f"count={count} must be at least 1, and seed={seed} another than asked_seed={asked_seed}.")
    for name in require_tasks(tasks):
        task = TASKS[name]
        asked = {json.dumps(data) for data in synthetic(task, rng_of(asked_seed, name), _ASKED).data}
        rng = np.random.default_rng([seed, *f"lessons/{name}".encode()])
        for data in synthetic(task, rng_of(seed, name), count).data:
            if json.dumps(data) not in asked:
                example = task.pose(rng, data)
                answer = f"The answer is {written(task.solve(example))}"
                yield {"prompt": prompt(task, example), "answer": answer, "kind": name}


@one_line_errors
def main() -> None:
    parser = argparse.ArgumentParser(description="Writes lessons.jsonl.")
    parser.add_argument("--to", required=True, type=Path, help="folder for the file")
    parser.add_argument("--count", type=int, default=2500, help="questions of each task")
    parser.add_argument("--seed", type=int, default=1, help="another seed makes other questions")
    options = parser.parse_args()
    write_all(options.to, {"lessons.jsonl": list(lessons(count=options.count, seed=options.seed))})


if __name__ == "__main__":
    raise SystemExit(main())
