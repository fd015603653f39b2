"""How well adapters learn and how much they forget, at equal numbers of trained parameters, on SmolLM2-135M.

    python benchmarks/adapters_study.py --to docs/adapters.md               # hours on two CPU cores; stops and goes on
    python benchmarks/adapters_study.py --reduced                           # the same path in minutes

Two real tasks: writing the impression of a chest X-ray report from its findings (score: nats a token of held-out answers), and
arithmetic questions with exactly checkable answers (score: share of held-out answers that greedy decoding gets right in every
token; a pair of numbers is asked once, so that no answer can be remembered). Forgetting is the rise in nats a token on text that
neither task contains: Python's own language reference, which every Python ships.

Several wordings and ranges of the arithmetic were tried before, and number of steps, rows and budget with them; this one was
kept because seeds of LoRA agreed on it. No other adapter was looked at for that, but LoRA's test scores were.

Every method's learning rate is tuned by the same rule: with one seed, by steps of the square root of ten, until both neighbours of
the best one are worse on a validation split. The other seeds run at that rate (a quantised base takes the rate of LoRA over
float32), and scores are of a test split that chose nothing. Every run is a process of its own and appends one row to the
results file; rows that are there are not run again. Step time and memory are measured apart from these runs, one process at a time
on all cores: leave the machine alone meanwhile.

Needs the demo model and reports (`make quickstart` installs both).
"""

from __future__ import annotations

import dataclasses
import json
import math
import queue
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import processes
import steps
import tyro

TASKS = ("reports", "arithmetic")
TIMING = "timing"
"""The task of a process that measures steps and scores nothing."""
TIMED = 10
"""Its steps, of which the first two are not counted."""
WIDE = "mlp/(gate|up|down)_proj"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compared."""

    budgets: tuple[int, ...] = (32,)
    """Ranks of the LoRA (on the three maps of every MLP) whose parameters the others are given."""
    methods: tuple[str, ...] = ()
    """Only these methods."""
    tasks: tuple[str, ...] = TASKS
    """Only these tasks."""
    seeds: int = 3
    """Runs of each method at its best learning rate."""
    stored_seeds: int = 1
    """Runs over each base that is stored otherwise than in float32; run n has the seed and the batches of LoRA's run n."""
    steps: int = 32
    """Optimiser steps a run."""
    rows: int = 2
    """Packed rows a step."""
    length: int = 128
    """Tokens a row."""
    jobs: int = 2
    """Runs at a time, each on cores of its own."""
    threads: int = 1
    """CPU threads a run."""
    results: str = "benchmarks/results/adapters_study.jsonl"
    """Where each run's row is appended."""
    data: str = "build/study"
    """Where the tasks' files are written."""
    reduced: bool = False
    """Three methods, one task, one seed, few steps, a results file of its own: to see that it works."""
    to: str | None = None
    """Write the report, and a figure beside it, here."""
    child: str | None = None
    """(Of the script itself: the run of this process, as JSON.)"""


# Methods --------------------------------------------------------------------------------------------------------


RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
STORED = ("bfloat16", "int8", "int4")
"""How the base is stored under the methods `LoRA over ...`; under all others in float32."""


def methods(rank: int) -> dict[str, tuple[dict[str, Any], float]]:
    """Name -> (adapters, the learning rate that is tried first).

    Each has at most the parameters of LoRA at `rank`, and nearly as many.
    """
    from jaxmethods.adapters import S2FT, DoRA, HydraLoRA, LoRA, MixLoRA, SMoRE

    router = dict(router_dim=8, gate_dim=8)
    fitted = lambda make: {WIDE: _largest(make, rank)}

    def tree(*experts: int) -> Any:
        fanout = tuple(count // 2 for count in experts)
        ranks = lambda total: tuple((total + layer) // len(experts) for layer in range(len(experts)))
        return lambda total: SMoRE(experts=experts, fanout=fanout, ranks=ranks(total + len(experts) - 1), **router)

    channels = rank * (576 + 1536) // 576  # of the down projection: a LoRA there alone would have a third
    return {
        "full": ({}, 1e-4),
        "LoRA": ({WIDE: LoRA(rank=rank)}, 3e-3),
        "DoRA": (fitted(lambda r: DoRA(rank=r)), 3e-3),
        "MixLoRA": (fitted(lambda r: MixLoRA(experts=4, fanout=2, rank=r, **router)), 3e-3),
        "HydraLoRA": (fitted(lambda r: HydraLoRA(experts=4, rank=r, **router)), 3e-3),
        "S'MoRE 2-2": (fitted(tree(2, 2)), 3e-3),
        "S'MoRE 4-4": (fitted(tree(4, 4)), 3e-3),
        "S'MoRE 2-2-2": (fitted(tree(2, 2, 2)), 3e-3),
        "S²FT-R": ({"down_proj": S2FT(count=3 * channels)}, 1e-3),
        "S²FT-A small": ({"down_proj": S2FT(count=3 * channels, selection="activation", calibration=0.01)}, 1e-3),
        **{f"LoRA over {stored}": ({WIDE: LoRA(rank=rank)}, 3e-3) for stored in STORED},
    }


def _largest(make: Any, rank: int) -> Any:
    """The adapter of the largest rank that has at most the parameters of LoRA at `rank`."""
    import jax

    sizes = ((576, 1536), (576, 1536), (1536, 576))

    def count(adapter: Any) -> int:
        kernel = lambda d_in, d_out: jax.ShapeDtypeStruct((d_in, d_out), np.float32)
        start = lambda kernel: adapter.init(jax.random.key(0), *kernel.shape, kernel=kernel)
        leaves = [jax.tree.leaves(jax.eval_shape(start, kernel(*size))) for size in sizes]
        return sum(leaf.size for each in leaves for leaf in each)

    from jaxmethods.adapters import LoRA

    budget = count(LoRA(rank=rank))
    found = None
    for r in range(1, 4 * rank):
        adapter = make(r)
        if count(adapter) > budget:
            break
        found = adapter
    if found is None:
        raise SystemExit(f"a budget of LoRA rank {rank} is too small for {make(1)}.")
    return found


# Tasks ----------------------------------------------------------------------------------------------------------


def arithmetic(seed: int = 0) -> list[dict[str, str]]:
    """Sums, differences and products in words; every pair of numbers occurs once."""
    rows = [(f"What is {a} plus {b}?", a + b) for a in range(2, 60) for b in range(2, 60)]
    rows += [(f"What is {a} minus {b}?", a - b) for a in range(5, 80) for b in range(2, a - 1)]
    rows += [(f"What is {a} times {b}?", a * b) for a in range(2, 21) for b in range(2, 13)]
    random.Random(seed).shuffle(rows)
    return [{"prompt": prompt, "answer": f" {answer}"} for prompt, answer in rows]


def other_text() -> list[dict[str, str]]:
    """Sections of Python's language reference, as plain rows."""
    from pydoc_data.topics import topics

    return [{"text": " ".join(text.split())[:500]} for _, text in sorted(topics.items()) if len(text) > 2000][:12]


def write_data(folder: Path) -> None:
    """The splits of both tasks, and the other text, as JSON lines."""
    from jaxmethods.data.reports import chest_xray_reports

    folder.mkdir(parents=True, exist_ok=True)
    findings = lambda row: row["prompt"].partition("\n\n")[2]
    made = {
        "reports": [
            {"prompt": f"{findings(row)}\nImpression:", "answer": f" {row['answer']}"} for row in chest_xray_reports()
        ],
        "arithmetic": arithmetic(),
    }
    files: dict[str, list[dict[str, str]]] = {"other": other_text()}
    for task, rows in made.items():
        random.Random(1).shuffle(rows)
        size = {"reports": 24, "arithmetic": 200}[task]
        splits = {"validation": rows[:size], "test": rows[size : 3 * size], "train": rows[3 * size :]}
        files |= {f"{task}-{split}": of for split, of in splits.items()}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# One run --------------------------------------------------------------------------------------------------------


def run(o: Options, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Trains once and measures; what a child process does."""
    import jax
    import jax.numpy as jnp

    from jaxmethods import adapters, models, objectives, training, tree
    from jaxmethods.data import Data, batches, build, evaluation_batches

    jax.config.update("jax_compilation_cache_dir", str(Path(o.data) / "compiled"))
    chosen, _ = methods(wanted["budget"])[wanted["method"]]
    stored = wanted["method"].partition(" over ")[2] or "float32"
    how = {"dtype": jnp.bfloat16} if stored == "bfloat16" else {"quantize": None if stored == "float32" else stored}
    module, params = models.load(steps.MODEL, **how)
    tokenizer = models.load_tokenizer(steps.MODEL)
    tokenizer.chat_template = None  # its system prompt would be half of a short row
    objective = objectives.Supervised()
    read = lambda name: build(Data(train=f"{o.data}/{name}.jsonl", sequence_length=o.length), tokenizer)[0]
    timing = wanted["task"] == TIMING
    rows = read(f"{TASKS[-1] if timing else wanted['task']}-train")
    stream = lambda: iter(batches(rows, batch_size=o.rows, seed=wanted["seed"]))

    if chosen:
        module = adapters.attach(module, chosen)
        some = (next(stream()) for _ in range(8))
        scores = adapters.s2ft.calibrate(module, params, some, objective.loss_fn)
        params = adapters.init(module, params, jax.random.key(wanted["seed"]), scores=scores)
    trained, frozen = adapters.partition(params, None if chosen else lambda path: True)
    del params
    before_training = not wanted["learning_rate"]
    tx = training.Optimizer(learning_rate=wanted["learning_rate"], schedule="cosine", warmup=0.1).transformation(
        o.steps
    )
    state = training.init_state(trained, tx, jax.random.key(wanted["seed"]))
    del trained
    step = jax.jit(training.make_train_step(objective.loss_fn(module), tx), donate_argnums=0)

    @partial(jax.jit, static_argnums=3)
    def judge(trained: Any, frozen: Any, batch: Any, size: int) -> dict[str, Any]:
        """Sums over the (at most `size`) target tokens, and over answers: right in every token."""
        params = tree.combine(trained, frozen)
        hidden, _ = models.hidden_states(
            module, params, batch["tokens"], batch["segment_ids"] > 0,
            segment_ids=batch["segment_ids"], positions=batch["positions"],
        )  # fmt: skip
        mask = batch["target_mask"][:, 1:]
        at = jnp.nonzero(mask.ravel(), size=size, fill_value=mask.size)[0]
        pick = lambda x: x.reshape(-1, *x.shape[2:]).at[at].get(mode="fill", fill_value=0)
        logits, targets = models.logits_of(module, params, pick(hidden[:, :-1])), pick(batch["tokens"][:, 1:])
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], -1)[:, 0]
        wrong = jnp.zeros(mask.size, bool).at[at].set(logits.argmax(-1) != targets, mode="drop").reshape(mask.shape)
        answer = batch["segment_ids"][:, 1:]
        each = jnp.arange(1, o.length + 1)
        of = lambda where: (where[:, None] & (answer[:, None] == each[:, None])).any(-1)
        return {
            "nats": -(logps * pick(mask)).sum(), "tokens": mask.sum(),
            "right": (of(mask) & ~of(wrong)).sum(), "answers": of(mask).sum(),
        }  # fmt: skip

    def judged(name: str) -> dict[str, float]:
        sums: dict[str, float] = {}
        found = list(evaluation_batches(read(name), 4))
        size = max(int(batch["target_mask"][:, 1:].sum()) for batch in found)
        for batch in found:
            for field, value in jax.device_get(judge(state.trained, frozen, batch, size)).items():
                sums[field] = sums.get(field, 0.0) + float(value)
        return {"nll": sums["nats"] / sums["tokens"], "accuracy": sums["right"] / sums["answers"]}

    seconds, losses, source = [], [], stream()
    for _ in range(0 if before_training else TIMED if timing else o.steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, next(source))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    if timing:
        trained = sum(x.size for x in jax.tree.leaves(state.trained))
        return {
            "trained": trained,
            "step_seconds": statistics.median(seconds[2:]),
            "peak": processes.peak_bytes(),
        }
    validation, test = (judged(f"{wanted['task']}-{split}") for split in ("validation", "test"))
    return {
        "trained": 0 if before_training else sum(x.size for x in jax.tree.leaves(state.trained)),
        "validation_nll": validation["nll"], "nll": test["nll"], "accuracy": test["accuracy"],
        "other_nll": judged("other")["nll"], "loss": losses[-1] if losses else None,
    }  # fmt: skip


# All runs -------------------------------------------------------------------------------------------------------

TREES = ("2-2", "4-4", "2-2-2")
KEY = ("task", "budget", "method", "learning_rate", "seed", "steps", "rows", "length")


class Study:
    """Rows of the results file, and the runs that are still to be made."""

    def __init__(self, o: Options) -> None:
        self.o, self.path = o, Path(o.results)
        self.rows = [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []
        self.lanes: queue.Queue[int] = queue.Queue()
        for lane in range(o.jobs):
            self.lanes.put(lane)

    def result(self, **wanted: Any) -> dict[str, Any]:
        """The row of a run, which is made if it is not there."""
        wanted |= {"steps": self.o.steps, "rows": self.o.rows, "length": self.o.length}
        for row in self.rows:
            if all(row[name] == wanted[name] for name in KEY):
                return row
        threads = self.o.threads * (self.o.jobs if wanted["task"] == TIMING else 1)
        given = {name: getattr(self.o, name) for name in ("steps", "rows", "length", "data")}
        arguments = [*(f"--{name}={value}" for name, value in given.items()), "--child", json.dumps(wanted)]
        lane = self.lanes.get() if wanted["task"] != TIMING else 0
        try:
            found = processes.run(__file__, arguments, threads, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, lane=lane)
        finally:
            if wanted["task"] != TIMING:
                self.lanes.put(lane)
        row = wanted | found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:  # a row is one short write, so two threads' rows do not mix
            file.write(json.dumps(row) + "\n")
        self.rows.append(row)
        shown = ("nll", "accuracy", "other_nll", "step_seconds")
        print({name: row[name] for name in (*KEY[:5], *shown) if name in row}, file=sys.stderr, flush=True)
        return row

    def tuned(self, first: float, **of: Any) -> float:
        """The learning rate whose neighbours are both worse on the validation split."""

        def loss(at: int) -> float:
            found = self.result(learning_rate=RATES[at], seed=0, **of)["validation_nll"]
            return found if math.isfinite(found) else math.inf

        best = RATES.index(first)
        if self.o.reduced:
            return first
        while True:
            near = (at for at in (best, best - 1, best + 1) if 0 <= at < len(RATES))
            if (found := min(near, key=loss)) == best:
                return RATES[best]
            best = found

    def runs(self, task: str, budget: int, method: str) -> list[dict[str, Any]]:
        """The rows of all seeds at the tuned learning rate."""
        rate = self.tuned(methods(budget)[method][1], task=task, budget=budget, method=method.partition(" over ")[0])
        return [
            self.result(task=task, budget=budget, method=method, learning_rate=rate, seed=seed)
            for seed in range(self.o.stored_seeds if " over " in method else self.o.seeds)
        ]


def main(o: Options) -> None:
    if o.child:
        print(json.dumps(run(o, json.loads(o.child))))
        return
    if o.reduced:
        changes: dict[str, Any] = dict(
            methods=("LoRA", "S'MoRE 2-2", "S²FT-R"), tasks=("arithmetic",), seeds=1, steps=8
        )
        o = dataclasses.replace(o, results=o.results.replace(".jsonl", "_reduced.jsonl"), **changes)
    if unknown := set(o.methods) - set(methods(o.budgets[0])):
        raise SystemExit(f"--methods: {sorted(unknown)} are none of {', '.join(methods(o.budgets[0]))}.")
    write_data(Path(o.data))
    study = Study(o)
    # Quantised bases come last, when LoRA's learning rate is known.
    names = sorted(o.methods or methods(o.budgets[0]), key=lambda name: " over " in name)
    wanted = [(task, budget, name) for name in names for budget in o.budgets for task in o.tasks]
    with ThreadPoolExecutor(o.jobs) as pool:
        start = lambda task: study.result(task=task, budget=o.budgets[0], method="full", learning_rate=0.0, seed=0)
        base = dict(zip(o.tasks, pool.map(start, o.tasks), strict=True))
        table = dict(zip(wanted, pool.map(lambda of: study.runs(*of), wanted), strict=True))
    costs = {
        (budget, name): study.result(
            task=TIMING, budget=budget, method=name, learning_rate=methods(budget)[name][1], seed=0
        )
        for name in names
        for budget in o.budgets
    }
    for (task, _, _), rows in table.items():
        for row in rows:
            row["forgetting"] = row["other_nll"] - base[task]["other_nll"]
    text = report(o, base, table, costs)
    print(text)
    if o.to:
        target = Path(o.to)
        target.write_text(text + f"\n\n![scores against parameters and forgetting]({target.stem}.png)\n")
        draw(target.with_suffix(".png"), base, table)


SCORES = {"reports": ("nll", "nats a token", -1), "arithmetic": ("accuracy", "answers right", 1)}
"""Task -> (field, what it is, 1 where larger is better). Test nats a token are compared on every task."""


def _spread(rows: list[dict[str, Any]], field: str) -> tuple[float, float]:
    values = [row[field] for row in rows]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _cell(rows: list[dict[str, Any]], field: str) -> str:
    mean, deviation = _spread(rows, field)
    return f"{mean:.3f} ± {deviation:.3f}" if len(rows) > 1 else f"{mean:.3f}"


def report(
    o: Options, base: Mapping[str, Any], table: Mapping[Any, list[dict[str, Any]]], costs: Mapping[Any, dict[str, Any]]
) -> str:
    from importlib.metadata import version

    lines = [
        "# Adapters compared",
        "",
        f"`python benchmarks/adapters_study.py`, {date.today()}, {processes.cpu()}, float32, jax {version('jax')}. "
        f"SmolLM2-135M-Instruct, {o.steps} steps of {o.rows} x {o.length} tokens; mean ± standard deviation of {o.seeds} seeds "
        f"({o.stored_seeds} over a stored base), at the learning rate (of {', '.join(f'{r:g}' for r in RATES)}) "
        "whose neighbours are both worse on a validation split. Forgetting: rise in nats a token on Python's language reference. "
        f"Step and peak: the median of {TIMED - 2} steps and the largest resident size of a process alone on "
        f"{o.threads * o.jobs} cores.",
    ]
    for task in o.tasks:
        field, what, _ = SCORES[task]
        shown = {field: f"test {what}"} | {"nll": "test nats a token", "forgetting": "forgetting"}
        lines += [
            "", f"## {task.capitalize()}", "",
            f"| method | trained | learning rate | {' | '.join(shown.values())} | step s | peak MiB |",
            f"| --- | ---: | ---: | {'---: | ' * len(shown)}---: | ---: |",
            f"| before training | | | {' | '.join(f'{base[task].get(name, 0.0):.3f}' for name in shown)} | | |",
        ]  # fmt: skip
        for (of, budget, name), rows in table.items():
            if of == task:
                cells = " | ".join(_cell(rows, name) for name in shown)
                seconds, peak = (costs[budget, name][f] for f in ("step_seconds", "peak"))
                start = f"| {name} | {rows[0]['trained']:,} | {rows[0]['learning_rate']:g}"
                lines.append(f"{start} | {cells} | {seconds:.2f} | {peak / 2**20:.0f} |")
    lines += ["", "## The papers' claims", "", *claims(o, table)]
    return "\n".join(lines)


def claims(o: Options, table: Mapping[Any, list[dict[str, Any]]]) -> Iterator[str]:
    """One line for each claim, task and budget: the difference of the means, with its standard error."""
    pairs = [(s2ft, other) for s2ft in ("S²FT-R", "S²FT-A small") for other in ("LoRA", "full")]
    tested = [
        *((f"S'MoRE {tree}", "MixLoRA", "score", f"S'MoRE {tree} is at least as good as MixLoRA") for tree in TREES),
        ("MixLoRA", "LoRA", "score", "MixLoRA is at least as good as LoRA"),
        *((one, other, "score", f"{one} learns as well as {other}") for one, other in pairs),
        *((one, other, "forgetting", f"{one} forgets less than {other}") for one, other in pairs),
    ]
    yield (
        f"Differences are signed so that above zero speaks for the claim, and decided by two standard errors. With {o.seeds} seeds "
        "and so many comparisons, about one line in ten would speak for or against a claim by chance."
    )
    yield ""
    for task in o.tasks:
        for budget in o.budgets:
            for one, other, what, claim in tested:
                a, b = table.get((task, budget, one)), table.get((task, budget, other))
                if not a or not b:
                    continue
                forgetting, nats = ("forgetting", "nats a token of other text", -1), ("nll", "nats a token", -1)
                for field, unit, sign in dict.fromkeys((SCORES[task], nats)) if what == "score" else (forgetting,):
                    (mean_a, dev_a), (mean_b, dev_b) = _spread(a, field), _spread(b, field)
                    difference, error = sign * (mean_a - mean_b), (dev_a**2 / len(a) + dev_b**2 / len(b)) ** 0.5
                    clear = abs(difference) > 2 * error
                    verdict = ("holds" if difference > 0 else "does not hold") if clear else "no difference seen"
                    yield f"- {task}: {claim}: {difference:+.3f} ± {error:.3f} {unit}: **{verdict}**."


def draw(path: Path, base: Mapping[str, Any], table: Mapping[Any, list[dict[str, Any]]]) -> None:
    """Score against trained parameters, and against forgetting, for each task; over float32 bases."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = list(dict.fromkeys(task for task, _, _ in table))
    figure = Figure(figsize=(11, 4.2 * len(tasks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(tasks), 2, squeeze=False)
    table = {of: rows for of, rows in table.items() if " over " not in of[2]}
    names = list(dict.fromkeys(name for _, _, name in table))
    for row, task in zip(axes, tasks, strict=True):
        field, what, _ = SCORES[task]
        for (of, _, name), runs in table.items():
            if of != task:
                continue
            score, forgetting = _spread(runs, field), _spread(runs, "forgetting")
            style: dict[str, Any] = dict(fmt="o", color=f"C{names.index(name) % 10}", capsize=3)
            row[0].errorbar(runs[0]["trained"], score[0], score[1], label=name, **style)
            row[1].errorbar(forgetting[0], score[0], score[1], forgetting[1], **style)
            row[1].annotate(name, (forgetting[0], score[0]), textcoords="offset points", xytext=(5, 4), fontsize=8)
        before = f"{base[task][field]:.2f} before training"
        row[0].set(xscale="log", xlabel="trained parameters", ylabel=f"{task}: {what} ({before})")
        row[1].set(xlabel="forgetting, nats a token")
        row[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main(tyro.cli(Options))
