"""`jaxmethods cream`: a model that rewards itself, round after round, with labels as sure as two rankings agree.

    M1 = SFT(M0)
    round t: M_t answers a part of the prompts N times; M_t, M_{t-1} and M_0 score the answers; best and worst make pairs;
    M_{t+1} = DPO from M_t on these, softened by the consistency of M_t's and M_{t-1}'s rankings    (`objectives.cream`)

WORKDIR/round_t/ has what phases made: `answers.jsonl`, `logps_M*.jsonl`, `pairs.jsonl`, `train/`, `model/`, `held_out_M*.jsonl`.
What is whole is not made again; answering and scoring go on from their last block of prompts, training from its last checkpoint.

https://arxiv.org/abs/2410.12735. As in the released code: rewards are differences of summed log-probabilities to M0 in every round;
in round 1, where M_{t-1} is M0, its reward is M0's mean log-probability of a token; the reference of the loss is M_t. Unlike it,
equal answers to a prompt have equal rewards to the bit, as each is scored once; they agree with nothing in a ranking.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from jaxmethods import data, models, sharding, tree
from jaxmethods.evals import completion
from jaxmethods.launch import config as run_config
from jaxmethods.launch.assembly import assemble, load_model, model_shapes
from jaxmethods.launch.config import Run
from jaxmethods.launch.files import write_figure
from jaxmethods.launch.phases import Phases, Row, begin, read_rows, write_rows
from jaxmethods.launch.train import RunFailed
from jaxmethods.objectives import CREAM, cream


@dataclasses.dataclass(frozen=True)
class SelfRewarding:
    """A loop of self-rewarding rounds.

    A work folder belongs to the loop that made it: fields that change the result must be the same to go on.
    """

    workdir: str
    """Where the rounds go."""
    sft: Run
    """The run from M0, its `model`, to M1. Loops that name the same `sft.workdir` share it."""
    round: Run
    """Each round's run. The loop fills in model, workdir, steps, seed, data.train, data.seed and objective.cache; its objective is
    `CREAM`, whose `scope` says whether a pair's label is the round's mean consistency or its prompt's own."""
    prompts: str
    """Rows with `prompt`, and `answer` for reward="oracle"; split evenly over the rounds."""
    held_out: str
    """Rows with `prompt` and `answer`, which each model answers greedily."""
    rounds: int = 2
    """2: from M1 over M2 to M3."""
    samples: int = 5
    """Answers to each prompt. Equal ones are kept."""
    temperature: float = 0.8
    """Of the answers."""
    top_p: float | None = 0.95
    """They are drawn among the likeliest tokens that hold this probability together."""
    max_new_tokens: int = 768
    """At most so many tokens an answer."""
    measure: Literal["kendall", "spearman", "top_order"] = "kendall"
    """Of consistency, as `objectives.cream.consistency` defines them; all three are recorded."""
    label: Literal["cream", "srlm"] | float = "cream"
    """How sure a pair is: by the measure; "srlm": 1, the self-rewarding baseline; or a number in [0, 1]."""
    reward: str = "intrinsic"
    """What ranks the answers. "intrinsic": log p - log p by M0. "oracle": 1 for the row's own answer (but for case, punctuation and
    white space), else 0. "MODULE:FUNCTION": what your function(row, answer) returns, a number."""
    epochs: int = 1
    """Passes of a round over its pairs."""
    seed: int = 0
    """Of the split, the answers, and the rounds' training; `sft` has its own."""
    batch_size: int = 16
    """Answers made or scored at once."""

    command: ClassVar[str] = "cream"
    free_on_resume: ClassVar[frozenset[str]] = frozenset({"workdir", "batch_size"})

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("samples", 2), ("max_new_tokens", 1), ("epochs", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}.")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature} must be positive, or all answers would be the same.")
        tree.require_one_of("measure", self.measure, cream.MEASURES)
        if isinstance(self.label, str):
            tree.require_one_of("label", self.label, ("cream", "srlm"))
        elif not 0 <= self.label <= 1:
            raise ValueError(f"label={self.label} must be in [0, 1], or 'cream' or 'srlm'.")
        if self.reward not in ("intrinsic", "oracle") and ":" not in self.reward:
            raise ValueError(f"reward={self.reward!r} is none of intrinsic, oracle, MODULE:FUNCTION.")
        if self.label == "cream" and self.reward != "intrinsic":
            raise ValueError(
                f"label='cream' compares two models' own rewards, and reward={self.reward!r} is not theirs; take label='srlm' or a "
                "number."
            )
        if not isinstance(self.round.objective, CREAM):
            raise ValueError(f"round.objective is {type(self.round.objective).__name__}; it must be CREAM.")
        for name, given in self._left_to_the_loop().items():
            if given[0] != given[1]:
                raise ValueError(f"round.{name}={given[0]!r} is filled in by the loop; leave it at {given[1]!r}.")
        if self.round.data.pack:
            raise ValueError("round.data.pack=True: pairs cannot share a row; set Data(pack=False).")
        for name, run in (("sft", self.sft), ("round", self.round)):
            if run.vision is not None:
                raise ValueError(f"{name}.vision: the loop reads text alone; leave it None.")
            if run.quantize:
                raise ValueError(
                    f"{name}.quantize={run.quantize!r}: each model is saved whole for the next; leave it None."
                )
            if pattern := next((p for p, a in run.adapters.items() if getattr(a, "token_dependent", False)), None):
                raise ValueError(
                    f"{name}.adapters[{pattern!r}] routes by token and cannot be fused for the next round; take LoRA, DoRA or S2FT."
                )

    @property
    def objective(self) -> CREAM:
        """Of the rounds."""
        return typing.cast(CREAM, self.round.objective)

    def _left_to_the_loop(self) -> dict[str, tuple[Any, Any]]:
        """Name -> (given, as it must be)."""
        steps = next(f.default for f in dataclasses.fields(Run) if f.name == "steps")
        run, rows = self.round, self.round.data
        return {
            "model": (run.model, ""), "workdir": (run.workdir, ""), "steps": (run.steps, steps), "seed": (run.seed, 0),
            "data.train": (rows.train, ()), "data.evaluation": (rows.evaluation, ()), "data.seed": (rows.seed, 0),
            "objective.cache": (self.objective.cache, None),
        }  # fmt: skip


class _Stopped(Exception):
    """A signal ended a phase after it saved."""


def run_rounds(loop: SelfRewarding, *, console: Console | None = None) -> list[Row]:
    """Runs the loop, or goes on with what the work folder holds. Returns the rows of rounds.jsonl, one a model.

    Raises:
        ValueError, FileNotFoundError: the config asks for something that cannot be.
        RunFailed: a training failed, or a round has no pair.
    """
    console, workdir = begin(loop, loop.sft.compilation_cache, console)
    prompts = _rows(loop.prompts, "prompts", answers=loop.reward == "oracle")
    held_out = _rows(loop.held_out, "held_out", answers=True)
    if len(prompts) < loop.rounds:
        raise ValueError(
            f"{loop.prompts} has {len(prompts)} rows for rounds={loop.rounds}; give each round at least one."
        )
    _reward_of(loop)
    mesh = sharding.make_mesh(dataclasses.asdict(loop.round.mesh))
    assemble(
        dataclasses.replace(loop.round, model=loop.sft.model), *model_shapes(loop.sft), mesh
    )  # refuses what cannot be

    program = _Program(loop, workdir, console, held_out)
    rows: list[Row] = []
    try:
        paths = [loop.sft.model, program.fine_tuned()]
        run_config.claim(workdir, loop)
        for number, path in enumerate(paths):
            accuracy = program.accuracy(0, number, path)
            rows.append({"round": 0, "model": f"M{number}", "accuracy": accuracy})
        program.write(rows)
        for number, part in enumerate(_split(prompts, loop.rounds, loop.seed), 1):
            answers = program.answers(number, part, paths[number])
            logps = [program.logps(number, answers, m, paths[m]) for m in sorted({number, number - 1, 0}, reverse=True)]
            pairs, told = select(loop, number, part, answers, logps[0], logps[1] if number > 1 else None, logps[-1])
            paths.append(program.trained(number, pairs, told, paths[number]))
            accuracy = program.accuracy(number, number + 1, paths[number + 1])
            rows.append({"round": number, "model": f"M{number + 1}", "accuracy": accuracy, **told})
            program.write(rows)
    except _Stopped:
        program.say("stopped and saved; the same command goes on from there.")
        return rows
    console.print(_table(rows))
    program.say(f"accuracy and consistency by round: {workdir / 'rounds.png'}; the last model: {paths[-1]}")
    return rows


def select(
    loop: SelfRewarding,
    number: int,
    prompts: Sequence[Row],
    answers: Sequence[Row],
    current: Sequence[Row],
    previous: Sequence[Row] | None,
    start: Sequence[Row],
) -> tuple[list[Row], Row]:
    """(rows of pairs, what is told of round `number`): no model is asked, so that it is done again rather than read.

    Args:
        answers: rows of answers.jsonl, those to `prompts`.
        current, previous, start: rows of logps_M*.jsonl by M_t, M_{t-1} and M_0; previous is None where it is M_0.
    """
    of = lambda rows, name: np.array([row[name] for row in rows], np.float64)  # None becomes nan
    now, first, lengths = of(current, "logps"), of(start, "logps"), of(current, "lengths")
    own = np.asarray(cream.intrinsic_rewards(now, first))
    before = np.asarray(
        cream.intrinsic_rewards(first, first, lengths)
        if previous is None
        else cream.intrinsic_rewards(of(previous, "logps"), first)
    )
    judge = _reward_of(loop)
    texts = [row["answers"] for row in answers]
    rewards = own
    if judge is not None:
        rewards = np.array(
            [[judge(row, said) for said in some] for row, some in zip(prompts, texts, strict=True)], np.float32
        )

    unusable, finite = (lengths == 0).any(axis=1), np.isfinite(own).all(axis=1) & np.isfinite(before).all(axis=1)
    best, worst, differ = (np.asarray(x) for x in cream.select_pairs(rewards))
    chosen, rejected = ([some[i] for some, i in zip(texts, places, strict=True)] for places in (best, worst))
    differ = differ & [one != other for one, other in zip(chosen, rejected, strict=True)]
    kept = np.flatnonzero(~unusable & finite & differ)

    rates = {m: np.asarray(cream.consistency(own[kept], before[kept], measure=m), np.float64) for m in cream.MEASURES}
    fixed = 1.0 if loop.label == "srlm" else loop.label
    labels = rates[loop.measure] if loop.label == "cream" else np.full(len(kept), fixed)
    field = loop.objective.rate
    pairs = [
        {"prompt": prompts[j]["prompt"], "chosen": chosen[j], "rejected": rejected[j], field: label}
        for j, label in zip(kept.tolist(), labels.tolist(), strict=True)
    ]
    told: Row = {
        "prompts": len(prompts), "pairs": len(kept),
        "skipped": {"equal": int((~unusable & finite & ~differ).sum()), "unusable": int(unusable.sum()),
                    "too_long": int((~unusable & ~finite).sum())},
        "distinct_answers": float(np.mean([len(set(some)) for some in texts])),
        "label": float(labels.mean()) if len(kept) else None,
        "consistency": {m: {"mean": float(x.mean()), "std": float(x.std())} for m, x in rates.items()} if len(kept) else {},
    }  # fmt: skip
    if all("answer" in row for row in prompts):
        right = np.array([[_agrees(row, said) for said in some] for row, some in zip(prompts, texts, strict=True)])
        told["right"] = {"answers": float(right.mean())}
        if len(kept):
            sides = {"chosen": best, "rejected": worst}
            told["right"] |= {side: float(right[kept, places[kept]].mean()) for side, places in sides.items()}
    return pairs, told


class _Program:
    """The phases; each gives what its file holds, and makes the file where there is none."""

    def __init__(self, loop: SelfRewarding, workdir: Any, console: Console, held_out: Sequence[Row]):
        self.loop, self.workdir, self.console, self.held_out = loop, workdir, console, held_out
        self.phases = Phases(workdir, console, loop.batch_size)
        self.say = self.phases.say
        self.tokenizer = models.load_tokenizer(loop.sft.model)
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"sft.model={loop.sft.model}: its tokenizer has no chat template, by which answers are told from prompts."
            )
        self._renderer = data.Renderer(self.tokenizer)
        self._opened: tuple[str, Any, tree.Tree] | None = None

    def fine_tuned(self) -> str:
        """M1, beside its run."""
        run = self.loop.sft
        run_config.check_folder(epath.Path(run.workdir), run)
        return self._merged(run, epath.Path(run.workdir) / "model")

    def accuracy(self, number: int, model: int, path: str) -> float:
        """The share of held-out rows that a model answers rightly, greedily."""
        prompts = [row["prompt"] for row in self.held_out]
        width = self._width(prompts)

        def make(block: range) -> list[Row]:
            some = [self.held_out[i] for i in block]
            said = completion.complete(
                *self._open(path), self.tokenizer, [row["prompt"] for row in some], length=width,
                max_new_tokens=self.loop.max_new_tokens, batch_size=self.loop.batch_size,
            )  # fmt: skip
            return [
                {"prompt": row["prompt"], "answer": row["answer"], "said": text, "right": _agrees(row, text)}
                for row, text in zip(some, said, strict=True)
            ]

        made = self._phase(number, f"held_out_M{model}", len(prompts), make, prompts)
        return sum(row["right"] for row in made) / len(made)

    def answers(self, number: int, part: Sequence[Row], path: str) -> list[Row]:
        """N answers of M_t to each prompt of its part. A prompt's are keyed by the seed, the round and its place."""
        loop, prompts = self.loop, [row["prompt"] for row in part]
        width = self._width(prompts)
        key = jax.random.fold_in(jax.random.key(loop.seed), number)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.arange(len(prompts)))

        def make(block: range) -> list[Row]:
            asked = [prompts[i] for i in block]
            said = completion.complete(
                *self._open(path), self.tokenizer, asked, samples=loop.samples, temperature=loop.temperature, top_p=loop.top_p,
                max_new_tokens=loop.max_new_tokens, batch_size=loop.batch_size, key=keys[np.array(block)], length=width,
            )  # fmt: skip
            return [{"prompt": prompt, "answers": some} for prompt, some in zip(asked, said, strict=True)]

        return self._phase(number, "answers", len(prompts), make, prompts)

    def logps(self, number: int, answers: Sequence[Row], model: int, path: str) -> list[Row]:
        """log p of each answer by a model, and its tokens; None and 0 where it cannot be an answer, None where it is too long."""
        loop = self.loop
        marks = (data.MARKER, *self.tokenizer.all_special_tokens)
        usable = lambda text: bool(text) and not any(mark in text for mark in marks)

        def make(block: range) -> list[Row]:
            distinct = [(i, text) for i in block for text in dict.fromkeys(answers[i]["answers"]) if usable(text)]
            found: dict[tuple[int, str], tuple[float, int]] = {}
            if distinct:
                rows = [_answered(answers[i]["prompt"], text) for i, text in distinct]
                sums, lengths = completion.answer_logps(
                    *self._open(path), self.tokenizer, rows, sequence_length=loop.round.data.sequence_length,
                    batch_size=loop.batch_size,
                )  # fmt: skip
                found = dict(zip(distinct, zip(sums.tolist(), lengths.tolist(), strict=True), strict=True))
            scores = [[found.get((i, text), (math.nan, 0)) for text in answers[i]["answers"]] for i in block]
            return [
                {"logps": [x if math.isfinite(x) else None for x, _ in some], "lengths": [n for _, n in some]}
                for some in scores
            ]

        return self._phase(number, f"logps_M{model}", len(answers), make)

    def trained(self, number: int, pairs: Sequence[Row], told: Row, path: str) -> str:
        """M_{t+1}: M_t trained on the round's pairs."""
        folder, loop = self._folder(number), self.loop
        if not pairs:
            raise RunFailed(
                f"round {number}: none of {told['prompts']} prompts has a pair ({_skipped(told)}); raise temperature or samples, "
                "or give more prompts."
            )
        file = folder / "pairs.jsonl"
        if not file.exists():
            write_rows(file, pairs)
        run = dataclasses.replace(
            loop.round, model=path, workdir=str(folder / "train"), steps=-(-len(pairs) * loop.epochs // loop.round.batch_size),
            seed=loop.seed, data=dataclasses.replace(loop.round.data, train=str(file), seed=loop.seed),
            objective=dataclasses.replace(loop.objective, cache=str(folder / "reference.parquet")),
        )  # fmt: skip
        self.say(
            f"round {number}: {len(pairs)} pairs of {told['prompts']} prompts ({_skipped(told)}), label {told['label']:.3f}"
        )
        return self._merged(run, folder / "model", number)

    def write(self, rows: Sequence[Row]) -> None:
        """rounds.jsonl and its picture, with the seconds that phases took so far; what tells of later rounds already stays."""
        file = self.workdir / "rounds.jsonl"
        if file.exists() and len(read_rows(file)) > len(rows):
            return
        seconds = self.phases.seconds()
        of_round = lambda number: {
            p.partition("/")[2]: s for p, s in seconds.items() if p.startswith(f"round_{number}/")
        }
        write_rows(file, [row | {"seconds": of_round(row["round"])} for row in rows])
        draw_rounds(rows, self.workdir / "rounds.png", title=self.workdir.name)

    def _merged(self, run: Run, target: Any, number: int = 0) -> str:
        """Trains a run, or goes on with it, and saves its model with adapters fused."""
        if not target.exists():
            self._opened = None  # its memory is wanted
        path = self.phases.trained(f"round_{number}/train", run, target)
        if path is None:
            raise _Stopped
        return path

    def _open(self, path: str) -> tuple[Any, tree.Tree]:
        """A model, on one device, in the rounds' precision; the last one is kept."""
        if self._opened is None or self._opened[0] != path:
            self._opened = None
            run = dataclasses.replace(self.loop.round, model=path)
            module, params = load_model(run)
            self._opened = path, module.clone(dtype=np.dtype(run.compute_dtype)), params
        return self._opened[1:]

    def _phase(
        self, number: int, name: str, count: int, make: Callable[[range], list[Row]], prompts: Sequence[Any] = ()
    ) -> list[Row]:
        return self.phases.rows(f"round_{number}/{name}", count, make, prompts=prompts, title=f"round {number}, {name}")

    def _folder(self, number: int) -> Any:
        return self.workdir / f"round_{number}"

    def _width(self, prompts: Sequence[Any]) -> int:
        return max(len(self._renderer.prompt(prompt).tokens) for prompt in prompts)


def _rows(path: str, field: str, *, answers: bool) -> list[Row]:
    """The rows of a file, as `prompt` and perhaps `answer`."""
    rows = []
    for place, row in data.open_records(path).placed():
        if missing := next((n for n in ("prompt", *(["answer"] if answers else [])) if row.get(n) is None), None):
            why = "; reward='oracle' needs one in every row" if missing == "answer" and field == "prompts" else ""
            raise ValueError(
                f"{place}: a row of {field} has no field {missing!r}; its fields are {', '.join(row)}{why}."
            )
        if row.get("images") is not None:
            raise ValueError(f"{place}: the row has pictures, and the loop reads text alone; leave them out.")
        rows.append(dict(row))
    return rows


def _split(rows: Sequence[Row], parts: int, seed: int) -> list[list[Row]]:
    """Parts of sizes that differ by one at most, drawn without replacement, each in the order of the file."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [[rows[i] for i in sorted(part)] for part in np.array_split(order, parts)]


def _reward_of(loop: SelfRewarding) -> Callable[[Row, str], float] | None:
    """function(row, answer) -> a number; None for the models' own reward."""
    if loop.reward == "intrinsic":
        return None
    if loop.reward == "oracle":
        return lambda row, said: float(_agrees(row, said))
    module, _, name = loop.reward.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"reward={loop.reward!r}: {error}; give MODULE:FUNCTION that Python can import.") from error


def _agrees(row: Mapping[str, Any], said: str) -> bool:
    return completion.same(said, str(row["answer"]))


def _answered(prompt: Any, answer: str) -> Row:
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def _skipped(told: Row) -> str:
    """What became of the prompts without a pair, in words."""
    words = {"equal": "without a difference", "unusable": "with an answer that is none", "too_long": "too long"}
    return ", ".join(f"{count} {words[why]}" for why, count in told["skipped"].items() if count) or "none skipped"


def _table(rows: Sequence[Row]) -> Table:
    table = Table(title="rounds")
    for heading in ("model", "accuracy", "prompts", "pairs", "label", *(m.replace("_", " ") for m in cream.MEASURES)):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        rates = row.get("consistency", {})
        told = [f"{rates[m]['mean']:.2f} ({rates[m]['std']:.2f})" if m in rates else "" for m in cream.MEASURES]
        label = "" if row.get("label") is None else f"{row['label']:.3f}"
        table.add_row(
            row["model"], f"{row['accuracy']:.3f}", *(str(row.get(n, "")) for n in ("prompts", "pairs")), label, *told
        )
    return table


def draw_rounds(rows: Sequence[Row], png_path: Any, *, title: str = "") -> None:
    """Draws the accuracy of each model, and how consistent each round's two rankings are (mean and deviation over pairs)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([row["model"] for row in rows], [row["accuracy"] for row in rows], marker="o", color="#2f6fb3")
    left.set(ylabel="held-out accuracy, greedy", ylim=(0, 1))
    measured = [row for row in rows if row.get("consistency")]
    for at, measure in enumerate(cream.MEASURES if measured else ()):
        of = [row["consistency"][measure] for row in measured]
        places = [row["round"] + 0.08 * (at - 1) for row in measured]
        right.errorbar(
            places,
            [x["mean"] for x in of],
            [x["std"] for x in of],
            marker="o",
            capsize=3,
            label=measure.replace("_", " "),
        )
    right.set(
        ylabel="consistency with the model before",
        xlabel="round",
        ylim=(-0.05, 1.05),
        xticks=[row["round"] for row in measured],
    )
    if measured:
        right.set(xlim=(0.5, measured[-1]["round"] + 0.5))
        right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#8a929b", alpha=0.25, linewidth=0.6)
    if title:
        figure.suptitle(title, fontsize=11, parse_math=False)
    write_figure(png_path, figure)


__all__ = ["SelfRewarding", "draw_rounds", "run_rounds", "select"]
