"""Does a model keep its language while it learns to retrieve? CAFe's three arms on captions of real pictures.

    make vlm                                                      # the model that is tuned, and the pictures
    python benchmarks/cafe_study.py --to docs/cafe.md             # an hour or two on two CPU cores; stops and goes on

Arms: the language loss alone, the contrastive loss alone, both. Each is trained by `jaxmethods train configs/cafe_small.py` for the
same number of steps from the same model, and measured on held-out captions by `jaxmethods evaluate`: recall among all of them, both
ways, and nats a token of the captions. The model before is measured the same way. No number here chose a setting: these are the
recipe's. Every run appends one row to the results; rows that are there are not run again.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import processes
import tyro

ARMS = {"language": {"alpha-con": 0}, "contrastive": {"alpha-lm": 0}, "both": {}}
CONFIG = "configs/cafe_small.py"
SHEET = "build/cafe_retrieval.png"
"""Pictures with the captions found for them; it stays out of the repository, as Tux Paint's pictures (GPL-2) do."""
MARK = "<!-- python benchmarks/cafe_study.py writes what follows -->"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run, and where its results go."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the adapters' start and of the order of the rows."""
    arms: tuple[str, ...] = ("before", "language", "contrastive", "both")
    """Some of these; "before" with the first seed alone."""
    results: Path = Path("benchmarks/results/cafe_study.jsonl")
    """One row a run."""
    to: Path | None = None
    """The page whose tables are replaced; its picture is written beside it."""
    steps: int | None = None
    """Instead of the recipe's."""


def main() -> None:
    options = tyro.cli(Options)
    if unknown := [arm for arm in options.arms if arm not in ("before", *ARMS)]:
        sys.exit(f"arms {', '.join(unknown)} are none of before, {', '.join(ARMS)}.")
    for seed in options.seeds:
        for arm in options.arms:
            if arm == "before" and seed != options.seeds[0]:
                continue
            if not any((row["arm"], row["seed"]) == (arm, seed) for row in _rows(options)):
                row = _measured(arm, seed, options)
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    f"{arm}, seed {seed}: {row['recall']['image_to_text']}, {row['nll']:.3f} nats a token", flush=True
                )
    if options.to is not None:
        _write(options.to, _rows(options))


def _rows(options: Options) -> list[dict[str, Any]]:
    return [json.loads(line) for line in options.results.read_text().splitlines()] if options.results.is_file() else []


def _measured(arm: str, seed: int, options: Options) -> dict[str, Any]:
    """One run, trained and measured; the model before any where the arm is "before"."""
    with tempfile.TemporaryDirectory() as folder:
        workdir = f"{folder}/run"
        steps = () if options.steps is None else ("--steps", str(options.steps))
        if arm == "before":  # one step at a rate of 0: the same model, read as a run is
            own: tuple[str, ...] = ("--steps", "1", "--optimizer.learning-rate", "0")
        else:
            own = (*steps, *(word for name, value in ARMS[arm].items() for word in (f"--objective.{name}", str(value))))
        seeds = ("--seed", str(seed), "--data.seed", str(seed))
        _program("train", CONFIG, "--workdir", workdir, *seeds, *own)
        rows = ("--rows", "1000")
        retrieval = json.loads(_program("evaluate", "retrieval", workdir, "--json", *rows))
        captions = json.loads(_program("evaluate", "completion", workdir, "--json", "--max-new-tokens", "16", *rows))
        if arm == "both" and seed == options.seeds[0]:
            _program("evaluate", "retrieval", workdir, *rows, "--sheet", SHEET)
        last = json.loads(Path(workdir, "metrics.jsonl").read_text().splitlines()[-1])
    found = retrieval["after"]
    ways = ("image_to_text", "text_to_image")
    return {
        "arm": arm, "seed": seed, "steps": last["step"], "images": retrieval["images"], "captions": retrieval["rows"],
        "recall": {way: found[way]["recall"] for way in ways},
        "mean_reciprocal_rank": {way: found[way]["mean_reciprocal_rank"] for way in ways},
        "modality_gap": found["modality_gap"], "nll": captions["after"]["nll"], "rouge_l": captions["after"]["rouge_l"],
        "date": str(date.today()), "machine": processes.machine(),
    }  # fmt: skip


def _program(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "jaxmethods.launch.cli", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


def _write(page: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The table into the page, and the picture beside it."""
    columns = {
        "recall@1, picture to caption": lambda r: r["recall"]["image_to_text"]["1"],
        "recall@5": lambda r: r["recall"]["image_to_text"]["5"],
        "recall@1, caption to picture": lambda r: r["recall"]["text_to_image"]["1"],
        "recall@5 ": lambda r: r["recall"]["text_to_image"]["5"],
        "nats a token of captions": lambda r: r["nll"],
        "ROUGE-L of its own": lambda r: r["rouge_l"],
        "modality gap": lambda r: r["modality_gap"],
    }
    first = rows[0]
    lines = [
        f"{first['date']}, {first['machine']}: {first['images']} held-out pictures, {first['captions']} captions; mean over seeds "
        "and, in brackets, standard deviation.",
        "",
        "| arm | seeds | " + " | ".join(name.strip() for name in columns) + " |",
        "| --- | ---: |" + " ---: |" * len(columns),
    ]
    for arm in ("before", *ARMS):
        of_arm = [row for row in rows if row["arm"] == arm]
        if of_arm:
            cells = [_cell([value(row) for row in of_arm]) for value in columns.values()]
            lines.append(f"| {arm} | {len(of_arm)} | " + " | ".join(cells) + " |")
    text = page.read_text() if page.is_file() else ""
    head = text.split(MARK)[0].rstrip()
    picture = page.with_name("cafe_study.png")
    _draw(picture, rows)
    lines += ["", f"![recall among the held-out captions over nats a token, each run]({picture.name})"]
    page.write_text(f"{head}\n\n{MARK}\n\n" + "\n".join(lines) + "\n")


def _draw(picture: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Each run as a point: what it forgot of language to the right, what it finds upwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for arm in ("before", *ARMS):
        points = [(row["nll"], row["recall"]["image_to_text"]["10"]) for row in rows if row["arm"] == arm]
        if points:
            axes.scatter(*zip(*points, strict=True), label=arm)
    axes.set(xlabel="nats a token of held-out captions", ylabel="recall@10, picture to caption", ylim=(0, None))
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


def _cell(values: Sequence[float]) -> str:
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
