"""Do softened labels keep a self-rewarding model from going wrong? Three arms on questions whose answers can be checked.

    python -m jaxmethods.data.quiz --to build/quiz
    python benchmarks/cream_study.py --to docs/cream.md      # an hour or two on two CPU cores; stops and goes on

Arms: `srlm`, labels of 1; `cream`, labels as sure as two models' rankings agree; `oracle`, labels of 1 on pairs of a right and
a wrong answer; and where it is asked for `clamped`, `cream` with labels of 1/2 at least. The arms of a seed share M1; another
seed has another M1, split and samples. Each is `jaxmethods cream configs/cream_smollm2.py`; no number of the study chose a
setting. Every arm that ends appends its rows, one a model, to the results; arms that are there are not run again, and one that
was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import processes
import tyro

ARMS = {
    "srlm": ("--label", "srlm"),
    "cream": (),
    "clamped": ("--round.objective.clamp", "True"),
    "oracle": ("--label", "srlm", "--reward", "oracle"),
}
CONFIG = "configs/cream_smollm2.py"
MARK = "<!-- python benchmarks/cream_study.py writes what follows -->"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run, and where its results go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of SFT, the split of the prompts, the answers, and the rounds' training."""
    arms: tuple[str, ...] = ("srlm", "cream", "oracle")
    """Some of srlm, cream, clamped, oracle."""
    results: Path = Path("benchmarks/results/cream_study.jsonl")
    """One row a model of a run."""
    to: Path | None = None
    """The page whose tables are replaced; its picture is written beside it."""
    build: Path = Path("build/cream_study")
    """Work folders; an arm's is removed when its rows are in the results."""


def main() -> None:
    options = tyro.cli(Options)
    if unknown := [arm for arm in options.arms if arm not in ARMS]:
        sys.exit(f"arms {', '.join(unknown)} are none of {', '.join(ARMS)}.")
    for seed in options.seeds:
        for arm in options.arms:
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in _rows(options)):
                rows = _measured(arm, seed, options)
                with options.results.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in rows)
                print(
                    f"{arm}, seed {seed}: " + ", ".join(f"{r['model']} {r['accuracy']:.3f}" for r in rows), flush=True
                )
                shutil.rmtree(options.build / f"{arm}_{seed}")
    if options.to is not None:
        _write(options.to, _rows(options))


def _rows(options: Options) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.is_file() else []


def _measured(arm: str, seed: int, options: Options) -> list[dict[str, Any]]:
    """The rows of one run, one a model."""
    workdir, sft = options.build / f"{arm}_{seed}", options.build / f"sft_{seed}"
    folders = ("--workdir", str(workdir), "--sft.workdir", str(sft))
    seeds = ("--seed", str(seed), "--sft.seed", str(seed), "--sft.data.seed", str(seed))
    line = [sys.executable, "-m", "jaxmethods.launch.cli", "cream", CONFIG, *folders, *seeds, *ARMS[arm]]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{arm}, seed {seed} failed:\n{done.stderr[-2000:]}")
    told = {"arm": arm, "seed": seed, "date": str(date.today()), "machine": processes.machine()}
    return [told | json.loads(row) for row in (workdir / "rounds.jsonl").read_text().splitlines()]


def _write(page: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The tables into the page, and the picture beside it."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    arms = [arm for arm in ARMS if any(row["arm"] == arm for row in rows)]
    seeds = len({row["seed"] for row in rows})
    lines = [
        f"{rows[0]['date']}, {rows[0]['machine']}: held-out accuracy, greedy; mean over {seeds} seeds and, in brackets, standard "
        "deviation.",
        "",
        "| arm | " + " | ".join(models) + " | minutes without SFT |",
        "| --- |" + " ---: |" * (len(models) + 1),
    ]
    for arm in arms:
        cells = [_cell(_of(rows, arm, model, lambda r: r["accuracy"])) for model in models]
        minutes = [
            sum(sum(r["seconds"].values()) for r in _last_of_each_round(rows, arm, s)) / 60 for s in _seeds(rows, arm)
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + f" | {_cell(minutes, '.1f')} |")
    columns: dict[str, Callable[[dict[str, Any]], float | None]] = {
        "pairs": lambda r: r["pairs"],
        "label": lambda r: r["label"],
        "Kendall": lambda r: r["consistency"]["kendall"]["mean"],
        "Spearman": lambda r: r["consistency"]["spearman"]["mean"],
        "top order": lambda r: r["consistency"]["top_order"]["mean"],
        "right: answers": lambda r: r["right"]["answers"],
        "chosen": lambda r: r["right"]["chosen"],
        "rejected": lambda r: r["right"]["rejected"],
    }
    lines += [
        "",
        "The pairs of each round, the consistency of the rankings they came from (as C, in [0, 1]), and how many of the drawn, the "
        "chosen and the rejected answers were right:",
        "",
        "| arm | made | " + " | ".join(columns) + " |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    for arm in arms:
        for model in models[2:]:
            cells = [
                _cell(_of(rows, arm, model, value), ".1f" if name == "pairs" else ".3f")
                for name, value in columns.items()
            ]
            lines.append(f"| {arm} | {model} | " + " | ".join(cells) + " |")
    picture = page.with_name("cream_study.png")
    _draw(picture, rows, arms, models)
    lines += ["", f"![held-out accuracy and consistency over the rounds, each arm]({picture.name})"]
    head = (page.read_text() if page.is_file() else "").split(MARK)[0].rstrip()
    page.write_text(f"{head}\n\n{MARK}\n\n" + "\n".join(lines) + "\n")


def _of(rows: Sequence[dict[str, Any]], arm: str, model: str, value: Callable[[dict[str, Any]], Any]) -> list[Any]:
    return [value(row) for row in rows if (row["arm"], row["model"]) == (arm, model)]


def _seeds(rows: Sequence[dict[str, Any]], arm: str) -> list[int]:
    return sorted({row["seed"] for row in rows if row["arm"] == arm})


def _last_of_each_round(rows: Sequence[dict[str, Any]], arm: str, seed: int) -> list[dict[str, Any]]:
    """Rows of one round have the round's seconds each."""
    return list({row["round"]: row for row in rows if (row["arm"], row["seed"]) == (arm, seed)}.values())


def _draw(picture: Path, rows: Sequence[dict[str, Any]], arms: Sequence[str], models: Sequence[str]) -> None:
    """Accuracy of each model, and consistency of each round: means over seeds as lines, each run as a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    kendall = lambda r: r["consistency"]["kendall"]["mean"]
    for panel, names, value in ((axes[0], models, lambda r: r["accuracy"]), (axes[1], models[2:], kendall)):
        for number, arm in enumerate(arms):
            found = [_of(rows, arm, model, value) for model in names]
            panel.plot(names, [statistics.mean(x) for x in found], color=f"C{number}", label=arm)
            for name, some in zip(names, found, strict=True):
                panel.scatter([name] * len(some), some, color=f"C{number}", s=12, alpha=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="held-out accuracy, greedy")
    axes[1].set(ylabel="C (Kendall) of the rankings its pairs came from", ylim=(0, 1))
    axes[0].legend(frameon=False)
    figure.savefig(picture, dpi=120)


def _cell(values: Sequence[float], form: str = ".3f") -> str:
    spread = f" ({format(statistics.stdev(values), form)})" if len(values) > 1 else ""
    return f"{format(statistics.mean(values), form)}{spread}"


if __name__ == "__main__":
    main()
