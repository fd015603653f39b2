"""`jaxmethods evaluate scylla`: how far a model generalises over tasks of rising complexity (`evals.scylla`).

FOLDER/ has items/TASK.jsonl (the questions), answers/SPLIT/TASK.jsonl, with --second second/SPLIT/TASK.jsonl, with
--examples probed probed/TASK.jsonl, with --intrinsic intrinsic/SPLIT/TASK.jsonl; and what they say together: rows.parquet,
results.json, valley.png. What is whole is not made again; the same command goes on after an interrupt or a server that went away.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import tyro
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from jaxmethods.evals import endpoint, scylla
from jaxmethods.evals.answers import Answerer, Failed, Local, silence
from jaxmethods.evals.scylla import intrinsic, measures, prompting, running
from jaxmethods.launch import config as run_config
from jaxmethods.launch.files import require_pyarrow, write_figure, write_json, write_table
from jaxmethods.launch.opening import Opened, open_model
from jaxmethods.launch.phases import Phases, Row, read_rows, write_rows
from jaxmethods.launch.train import RunFailed

SETTING = {"temperature": 0.9, "top_p": 0.95, "top_k": 60}
"""How models are probed. The released code has a repetition penalty of 1.2 and at least 16 tokens besides, which ours has not."""
_SHOTS = 8
_COUNTS = ("items", "probe_samples", "probe_tokens", "max_new_tokens", "second_tokens", "batch_size", "parallel")
_TOLD = ("model", "items", "examples", "universe", "shots", "sizes", "seed", "max_new_tokens", "grading", "denominator")
"""Options that results.json repeats."""


@dataclasses.dataclass(frozen=True)
class Scylla:
    """Measure the gap between familiar and unfamiliar numbers, by complexity. The same command goes on after an interrupt."""

    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name; or URL#MODEL of a chat endpoint; or
    built in: oracle, memoriser, noisy:A1,A2,A3,A4,A5/B1,B2,B3,B4,B5 (right with A on ID and B on OOD, by level)."""
    to: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where everything is written."""
    items: int = 256
    """Questions of each task and split."""
    tasks: tuple[str, ...] = ()
    """Names of tasks, such as TwoSum; all of them by default."""
    examples: Literal["synthetic", "probed"] = "synthetic"
    """What ID examples are: numbers from 0 to 100, or what the model itself invents when it is asked to (the paper)."""
    probe_samples: int = 128 * 50
    """Texts that a probed model writes for each task."""
    probe_tokens: int = 1024
    """Of each of these texts, at most."""
    universe: Literal["released", "paper"] = "released"
    """OOD numbers: 1000 to 9999 (100 to 999 in matrices) as in the released code, or 0 to 9999 as in the paper; without ID ones."""
    shots: int = 0
    """Solved examples in each prompt, up to 8."""
    sizes: Literal["told", "untold"] = "told"
    """Whether prompts say that subsets have 4 to 6 entries. Untold, as in the paper, some questions have many right answers."""
    second: bool = False
    """Ask a second time, with the response and "Therefore, the answer is", and report both accuracies."""
    intrinsic: bool = False
    """Measure likelihoods of the reference answers after prompts with 8 solved examples too; needs a model of this library."""
    max_new_tokens: int = 2048
    """Of each answer."""
    second_tokens: int = 256
    """Of each answer of the second pass."""
    seed: int = 0
    """Of questions and probing."""
    grading: Literal["verifier", "reference"] = "verifier"
    """Which answers are right: all that do what is asked, or the reference alone as in the released code."""
    denominator: Literal["all", "parsed"] = "all"
    """Accuracies are of all answers, as in the paper, or of those that could be read, as in the released code."""
    again: bool = False
    """Ask the questions once more that got no answer."""
    batch_size: int = 16
    """Answers made at once."""
    timeout: float = 60.0
    """Seconds without a byte before a call to an endpoint is given up."""
    retries: int = 4
    """How often such a call is tried again."""
    parallel: int = 4
    """Calls to an endpoint at a time."""
    limit: str = "max_tokens"
    """By what name the server takes the number of tokens. Newer models of OpenAI want max_completion_tokens; they are sent no
    temperature, which they refuse."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    beside: tuple[str, ...] = ()
    """Folders of other models, whose valleys are drawn into the same picture."""
    json: bool = False
    """Print one JSON object instead of tables."""

    command: ClassVar[str] = "evaluate scylla"
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"to", "tasks", "second", "intrinsic", "grading", "denominator", "again", "batch_size", "timeout", "retries", "parallel",
         "limit", "beside", "json"}
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1.")
        if not 0 <= self.shots <= _SHOTS:
            raise ValueError(f"--shots {self.shots} must be between 0 and {_SHOTS}.")
        scylla.require_tasks(self.tasks)
        built_in = self.solver is not None
        if self.intrinsic and not self.is_local:
            raise ValueError(f"--intrinsic needs the weights, and {self.model} gives text alone; leave it out.")
        if self.examples == "probed" and built_in:
            raise ValueError(f"--examples probed asks the model to invent, which {self.model} cannot; take synthetic.")

    @property
    def solver(self) -> Callable[[str], str] | None:
        """The built-in solver that `model` names; None where it names none.

        Raises:
            ValueError: noisy without its accuracies.
        """
        if self.model in ("oracle", "memoriser"):
            return {"oracle": scylla.oracle, "memoriser": scylla.memoriser}[self.model]
        name, _, given = self.model.partition(":")
        if name != "noisy":
            return None
        try:
            inside, outside = (tuple(float(x) for x in side.split(",")) for side in given.split("/"))
            return scylla.Noisy(inside, outside, self.seed)
        except ValueError as error:
            raise ValueError(
                f"{self.model}: give five accuracies for ID and five for OOD, as noisy:.9,.8,.7,.4,.2/.9,.6,.3,.2,.1 ({error})."
            ) from None

    @property
    def is_local(self) -> bool:
        """Whether it is a model of this library."""
        return self.solver is None and not endpoint.is_address(self.model)


def evaluate_scylla(options: Scylla) -> None:
    """Asks, grades, writes and prints.

    Raises:
        ValueError: the folder holds another evaluation.
        ConnectionError: the endpoint does not answer at all.
        RunFailed: it stopped answering; what came before is kept.
    """
    console = Console(stderr=options.json)
    folder = epath.Path(options.to)
    require_pyarrow(folder / "rows.parquet")
    others = [_read_results(name) for name in options.beside]
    run_config.check_folder(folder, options, "--to")
    run_config.claim(folder, options)
    program = _Program(options, folder, console)
    made = {name: program.task(name) for name in scylla.require_tasks(options.tasks)}
    record = _record(options, made)
    _write_parquet(folder / "rows.parquet", made)
    write_json(folder / "results.json", record)
    draw_valley([record, *others], folder / "valley.png")
    if options.json:
        print(json.dumps(record))
    else:
        _show(console, options, record)


class _Program:
    """The phases; each gives what its file holds, and makes the file where there is none."""

    def __init__(self, options: Scylla, folder: Any, console: Console):
        self._options, self._folder = options, folder
        self._phases = Phases(folder, console, options.batch_size)

    def task(self, name: str) -> dict[str, list[Row]]:
        """Split -> rows: what was asked, said, and read, and whether it is right."""
        options, task = self._options, scylla.TASKS[name]
        made: dict[str, list[Row]] = {}
        for split, (shots, items) in self._questions(name).items():
            prompts = [
                scylla.prompt(task, item.example, shots=shots[: options.shots], sizes=options.sizes) for item in items
            ]
            first = self._asked(f"answers/{split}/{name}", prompts, options.max_new_tokens)
            passes = {"": first}
            if options.second:
                more = [prompting.second(row["prompt"], row["said"] or "") for row in first]
                lost = {i for i, row in enumerate(first) if row["said"] is None}
                passes["second_"] = self._asked(f"second/{split}/{name}", more, options.second_tokens, lost)
            measured = self._measured(name, split, shots, items) if options.intrinsic else [{} for _ in items]
            made[split] = []
            for number, item in enumerate(items):
                row: Row = {
                    "task": name,
                    "level": task.level,
                    "split": split,
                    "number": number,
                    "reference": item.answer,
                }
                for prefix, rows in passes.items():
                    row |= _graded_row(options, item, rows[number], prefix)
                made[split].append(row | measured[number])
        return made

    def _questions(self, name: str) -> dict[str, scylla.Questions]:
        """Those of items/TASK.jsonl."""
        options, file = self._options, self._folder / "items" / f"{name}.jsonl"
        if not file.exists():
            with self._phases.timed(f"items/{name}"):
                made = scylla.questions(
                    scylla.TASKS[name], self._inside(name), items=options.items, shots=_SHOTS, seed=options.seed,
                    universe=options.universe,
                )  # fmt: skip
            rows = [
                {"shot": shot} | dataclasses.asdict(item)
                for of in made.values()
                for shot, items in ((True, of.shots), (False, of.items))
                for item in items
            ]
            file.parent.mkdir(parents=True, exist_ok=True)
            write_rows(file, rows)
        found: dict[str, scylla.Questions] = {split: scylla.Questions([], []) for split in running.SPLITS}
        for row in read_rows(file):
            of = found[row["split"]]
            (of.shots if row.pop("shot") else of.items).append(scylla.Item(**row))
        return found

    def _inside(self, name: str) -> scylla.Distribution:
        """ID elements and data: made, or read from what the model wrote."""
        options, task = self._options, scylla.TASKS[name]
        rng = running.rng_of(options.seed, name)
        if options.examples == "synthetic":
            return scylla.synthetic(task, rng, options.items + _SHOTS)
        prompts = [scylla.probing(task)] * options.probe_samples
        rows = self._asked(f"probed/{name}", prompts, options.probe_tokens, drawn=True)
        found = scylla.probed(task, rng, (row["said"] or "" for row in rows))
        self._phases.say(f"{name}: {len(found.elements)} elements and {len(found.data)} inputs were invented")
        if len(found.data) < options.items + _SHOTS:
            self._phases.say(
                f"{name}: fewer than {options.items} questions can be made of these; --probe-samples gives more"
            )
        return found

    def _asked(
        self,
        name: str,
        prompts: Sequence[str],
        tokens: int,
        lost: set[int] | frozenset[int] = frozenset(),
        *,
        drawn: bool = False,
    ) -> list[Row]:
        """Rows {prompt, said, failed} of FOLDER/NAME.jsonl. What is `lost` is not asked; what was asked otherwise is asked anew."""
        options, file = self._options, self._folder / f"{name}.jsonl"

        def make(numbers: Sequence[int]) -> list[Row]:
            wanted = [i for i in numbers if i not in lost]
            said = dict(
                zip(wanted, self._ask([prompts[i] for i in wanted], tokens, numbers[0] if drawn else None), strict=True)
            )
            return [_answer_row(prompts[i], said.get(i, Failed("the first pass failed"))) for i in numbers]

        rows = self._phases.rows(name, len(prompts), make)
        stale = [i for i, row in enumerate(rows) if row["prompt"] != prompts[i]]
        if options.again:
            stale = sorted({*stale, *(i for i, row in enumerate(rows) if row["failed"])} - set(lost))
        for start in range(0, len(stale), options.batch_size):
            some = stale[start : start + options.batch_size]
            for i, row in zip(some, make(some), strict=True):
                rows[i] = row
            write_rows(file, rows)
        return rows

    def _ask(self, prompts: Sequence[str], tokens: int, drawn: int | None) -> Sequence[str | Failed]:
        """Answers, greedy or, from a place on, drawn.

        Raises:
            RunFailed: one did not come, nor one to an easy question: the server is gone, and none of these is kept.
        """
        if not prompts:
            return []
        ask = self._answerer(tokens, drawn)
        said = ask(prompts)
        if self._options.solver is None and any(isinstance(one, Failed) for one in said) and (silent := silence(ask)):
            raise RunFailed(
                f"{self._options.model} answers nothing more: {silent.reason}. What came before is kept; the same command "
                "goes on."
            )
        return said

    def _answerer(self, tokens: int, drawn: int | None) -> Answerer:
        options = self._options
        if options.solver is not None:
            return scylla.one_by_one(options.solver)
        if not options.is_local:
            temperature = None if options.limit != "max_tokens" else 0.0 if drawn is None else SETTING["temperature"]
            return dataclasses.replace(self._endpoint, max_new_tokens=tokens, temperature=temperature)
        opened = self._opened
        how: dict[str, Any] = {} if drawn is None else {**SETTING, "seed": options.seed * options.probe_samples + drawn}
        return Local(
            opened.module, opened.params, opened.tokenizer, max_new_tokens=tokens, batch_size=options.batch_size, **how
        )

    @functools.cached_property
    def _endpoint(self) -> endpoint.Endpoint:
        """The endpoint, which has answered a first question.

        Raises:
            ConnectionError: it does not.
        """
        options = self._options
        found = endpoint.named(
            options.model,
            timeout=options.timeout,
            retries=options.retries,
            parallel=options.parallel,
            limit=options.limit,
        )
        if silent := silence(found):
            raise ConnectionError(f"{options.model}: {silent.reason}.")
        return found

    @functools.cached_property
    def _opened(self) -> Opened:
        return open_model(self._options.model, best=self._options.best)

    def _measured(self, name: str, split: str, shots: Sequence[scylla.Item], items: Sequence[scylla.Item]) -> list[Row]:
        """Likelihood and Min-K% of each reference answer, in its likeliest order."""
        task, opened = scylla.TASKS[name], self._opened

        def make(numbers: Sequence[int]) -> list[Row]:
            asked = [
                (i, {"prompt": scylla.prompt(task, items[i].example, shots=shots, sizes=self._options.sizes),
                     "answer": f"The answer is {prompting.written(order)}"})
                for i in numbers
                for order in intrinsic.orders(task, items[i].answer)
            ]  # fmt: skip
            logps = intrinsic.token_logps(
                opened.module,
                opened.params,
                opened.tokenizer,
                [row for _, row in asked],
                batch_size=self._options.batch_size,
            )
            found: list[Row] = []
            for number in numbers:
                of = [one for (i, _), one in zip(asked, logps, strict=True) if i == number]
                best = max(of, key=lambda one: intrinsic.likelihood(one).prob)
                kept = {f"min_{k}": intrinsic.min_k(best, k) for k in intrinsic.PERCENTS}
                found.append({**intrinsic.likelihood(best)._asdict(), **kept})
            return found

        return self._phases.rows(f"intrinsic/{split}/{name}", len(items), make)


def _answer_row(prompt: str, said: str | Failed) -> Row:
    if isinstance(said, Failed):
        return {"prompt": prompt, "said": None, "failed": said.reason}
    return {"prompt": prompt, "said": said, "failed": ""}


def _graded_row(options: Scylla, item: scylla.Item, row: Row, prefix: str) -> Row:
    said = row["said"]
    heard = Failed(row["failed"]) if said is None else f"the answer is {said}" if prefix else said
    graded = scylla.grade(item, heard, grading=options.grading)
    told = {
        "prompt": row["prompt"],
        "said": said,
        "failed": row["failed"],
        "parsed": graded.parsed,
        "right": graded.right,
    }
    return {f"{prefix}{name}": value for name, value in told.items()}


# What comes of it


def _record(options: Scylla, made: Mapping[str, Mapping[str, list[Row]]]) -> Row:
    record: Row = {name: getattr(options, name) for name in _TOLD} | _summary(options, made, "")
    if options.second:
        record["second"] = _summary(options, made, "second_")
    if options.intrinsic:
        record["intrinsic"] = {name: _intrinsic(of, record["tasks"][name]) for name, of in made.items()}
    return record


def _summary(options: Scylla, made: Mapping[str, Mapping[str, list[Row]]], prefix: str) -> Row:
    """Accuracies, gaps and scores of tasks and levels, in JSON's types."""
    least = running.SECOND_PARSED if prefix else 0.1
    graded = lambda row: scylla.Graded(row[f"{prefix}parsed"], row[f"{prefix}right"], row[f"{prefix}failed"])
    tallies = {
        name: {
            split: scylla.tally([graded(row) for row in rows], denominator=options.denominator, least_parsed=least)
            for split, rows in of.items()
        }
        for name, of in made.items()
    }
    result = scylla.summed_up(tallies)
    tasks: Row = {}
    for name, of in tallies.items():
        tasks[name] = {"level": scylla.TASKS[name].level} | {
            split: dataclasses.asdict(one) for split, one in of.items()
        }
        if all(of[split].accuracy is not None for split in running.SPLITS):
            quantities: tuple[Callable[[Any, Any], Any], ...] = (
                measures.gap,
                measures.score,
                measures.ratio,
                measures.relative_gap,
            )
            tasks[name] |= {
                quantity.__name__: quantity(of["id"].accuracy, of["ood"].accuracy) for quantity in quantities
            }
    return {
        "tasks": tasks, "levels": [level._asdict() for level in result.levels],
        "critical_complexity": result.critical_complexity, "probes": dict(result.probes), "failed": result.failed,
    }  # fmt: skip


def _intrinsic(of: Mapping[str, list[Row]], task: Row) -> Row:
    """Means of a task's measurements in both splits, how far these are apart, and normalised accuracies."""
    names = ("prob", "ppl", *(f"min_{k}" for k in intrinsic.PERCENTS))
    found: Row = {
        split: {name: float(np.mean([row[name] for row in rows])) for name in names} for split, rows in of.items()
    }
    for split in running.SPLITS:
        rate = task[split]["accuracy"]
        found[split]["normalised_accuracy"] = {
            str(k): None if rate is None else intrinsic.normalised_accuracy(rate, found[split][f"min_{k}"])
            for k in intrinsic.PERCENTS
        }
    probs = [[row["prob"] for row in of[split]] for split in running.SPLITS]
    spread = all(len(set(some)) > 1 for some in probs)
    return found | {"divergence": intrinsic.divergences(*probs)._asdict() if spread else None}


def _write_parquet(file: Any, made: Mapping[str, Mapping[str, list[Row]]]) -> None:
    as_text = lambda name, value: (
        json.dumps(value) if name.endswith(("reference", "parsed")) and value is not None else value
    )
    rows = [{n: as_text(n, v) for n, v in row.items()} for of in made.values() for some in of.values() for row in some]
    write_table(file, rows)


def _read_results(folder: str) -> Row:
    file = epath.Path(folder) / "results.json"
    if not file.exists():
        raise FileNotFoundError(f"--beside {folder}: there is no {file}; evaluate that model first.")
    return json.loads(file.read_text())


def _show(console: Console, options: Scylla, record: Row) -> None:
    """Tables of tasks and of levels, and what is concluded."""
    passes = {"": record} | ({"second pass, ": record["second"]} if options.second else {})
    for title, of in passes.items():
        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            title=f"{title}{options.items} questions of each task and split, {options.examples} examples",
        )
        table.add_column("task", no_wrap=True)
        for heading in ("level", "ID", "OOD", "gap", "score", "parsed"):
            table.add_column(heading, justify="right")
        for name, task in of["tasks"].items():
            splits = [task[split] for split in running.SPLITS]
            numbers = [*(one["accuracy"] for one in splits), task.get("gap"), task.get("score")]
            parsed = " ".join(str(one["parsed"]) for one in splits)
            table.add_row(name, str(task["level"] or "probe"), *map(_number, numbers), parsed)
        table.add_section()
        for level in of["levels"]:
            shown = [level[name] for name in ("inside", "outside", "gap", "score")]
            table.add_row("mean", str(level["level"]), *map(_number, shown))
        console.print(table)
    say = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    critical = record["critical_complexity"]
    say(f"critical complexity: {'none, as no task has a gap' if critical is None else f'level {critical}'}")
    for name, level in record["probes"].items():
        say(f"{name} is as hard as level {'?' if level is None else f'{level:.2f}'}")
    if record["failed"]:
        say(f"{record['failed']} questions got no answer and count nowhere; --again asks them once more")
    say(f"written to {options.to}: rows.parquet, results.json{', valley.png' if record['levels'] else ''}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


_INK, _FAINT = "#22262b", "#8a929b"
_COLOURS = ("#2f6fb3", "#d9662b", "#2f7d3b", "#7a4fa3", "#b3261e", "#8a6d1b")
_ORDERS = ("O(N)", "to O(N²)", "to O(N³)", "to O(N⁴)", "O(2ᴺ)")


def draw_valley(records: Sequence[Row], png_path: Any) -> None:
    """Draws ID and OOD accuracies over levels, and the gap between them, whose peak is the critical complexity.

    Args:
        records: what the results.json of each model holds. Where none has a level, nothing is drawn.
    """
    if not any(record["levels"] for record in records):
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for number, record in enumerate(records):
        colour, levels = _COLOURS[number % len(_COLOURS)], record["levels"]
        at = [level["level"] for level in levels]
        inside, outside, gaps = ([level[one] for level in levels] for one in ("inside", "outside", "gap"))
        left.plot(at, inside, color=colour, marker="o", markersize=4, label=_short(record["model"]))
        left.plot(at, outside, color=colour, marker="o", markersize=4, linestyle="--")
        left.fill_between(at, inside, outside, color=colour, alpha=0.12, linewidth=0)
        right.plot(at, gaps, color=colour, marker="o", markersize=4)
        if (critical := record["critical_complexity"]) is not None:
            right.plot(
                critical, gaps[at.index(critical)], color=colour, marker="o", markersize=11, markerfacecolor="none"
            )
    left.set(ylabel="accuracy (solid: ID, dashed: OOD)", ylim=(-0.03, 1.03))
    right.set(ylabel="gap (ring: critical complexity)")
    right.set_ylim(bottom=-0.01)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9, labelcolor=_INK)
    for axes in (left, right):
        axes.set_xticks(range(1, 6), [f"{i}\n{order}" for i, order in enumerate(_ORDERS, 1)], fontsize=8)
        axes.set_xlabel("complexity level", color=_INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_FAINT, alpha=0.25, linewidth=0.6)
        axes.tick_params(length=0, colors=_INK)
    write_figure(png_path, figure)


def _short(name: str) -> str:
    """The last part of a model's name."""
    return name.partition(":")[0] if name.startswith("noisy:") else name.rstrip("/").rpartition("/")[2].replace("$", "")


__all__ = ["Scylla", "draw_valley", "evaluate_scylla"]
