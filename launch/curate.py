"""`jaxmethods curate`: preference pairs from rows with known answers, by the model that is to be trained and by judges.

For `mmedpo` each row gives a text pair (its answer, and one that contradicts it) and, where it has a heat map, a visual pair (its
picture, and the same with noise where the map is). They go to two files, since MMedPO normalises relevance over a source.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from PIL import Image
from rich.console import Console

from jaxmethods import data, images
from jaxmethods.data import heat_maps, reports
from jaxmethods.evals import answers, completion, endpoint, judges
from jaxmethods.evals.answers import Failed
from jaxmethods.launch.files import require_same, write_json, write_whole
from jaxmethods.launch.opening import Opened, open_model
from jaxmethods.launch.train import RunFailed
from jaxmethods.models.vision import MEAN_AND_STD
from jaxmethods.objectives import mmedpo


@dataclasses.dataclass(frozen=True)
class Curate:
    """Make preference pairs of rows with known answers. The same command goes on after an interrupt."""

    name: tyro.conf.Positional[Literal["mmedpo"]]
    """mmedpo: hallucinated answers, and pictures with the lesion noised away, each with its clinical relevance."""
    model: tyro.conf.Positional[str]
    """The model that candidates are drawn from, which is to be trained: a run's work folder, or a folder, .gguf file,
    package:DIST/FILE, hub name."""
    data: Annotated[str, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with `prompt` and `answer`, and perhaps `images`, `heat_map` (a grey picture or a .npy file, in [0, 1] or 8 bits),
    `confidence` (of the map, in [0, 1]; 1 where it is missing), `id`, `labels` (of a report), `choices` (all answers there are)."""
    to: Annotated[str, tyro.conf.arg(metavar="PAIRS.jsonl")]
    """What is written: PAIRS.text.jsonl, PAIRS.visual.jsonl, PAIRS.skipped.jsonl and PAIRS.settings.json."""
    judge: tuple[str, ...] = ("built-in",)
    """built-in (rules, for labelled data), local:MODEL, or URL#MODEL of a chat endpoint. The first one picks and writes the
    contradicting answers; all of them debate the relevance, in this order."""
    samples: int = 4
    """Candidates drawn from the model for each row."""
    temperature: float = 1.0
    """Of drawing."""
    top_p: float | None = None
    """Draw among the likeliest tokens that hold this probability together."""
    max_new_tokens: int = 64
    """Of each candidate."""
    rounds: int = 5
    """Of the debate, at most."""
    noise_step: int = 500
    """How far diffusion goes on the lesion, 0 to 999."""
    pictures: str | None = None
    """The folder of noised pictures; by default PAIRS.pictures."""
    seed: int = 0
    """Of drawing, of noise, and of the built-in judge."""
    batch_size: int = 16
    """Rows at a time, and answers made at once."""
    judge_tokens: int = 256
    """Of each answer of a judge."""
    judge_retries: int = 2
    """How often a judge is asked again whose answer cannot be read."""
    timeout: float = 60.0
    """Seconds without a byte before a call to an endpoint is given up."""
    retries: int = 4
    """How often such a call is tried again."""
    parallel: int = 4
    """Calls to an endpoint at a time."""
    again: bool = False
    """Try the rows once more that were skipped since a judge failed."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""

    def __post_init__(self) -> None:
        if not self.judge:
            raise ValueError("--judge is empty; give built-in, local:MODEL or URL#MODEL.")
        if "://" in self.to:
            raise ValueError(f"--to {self.to}: lines are appended, which a bucket cannot; give a local path.")
        if not 0 <= self.noise_step < mmedpo.STEPS:
            raise ValueError(f"--noise-step {self.noise_step} must be between 0 and {mmedpo.STEPS - 1}.")
        if not self.temperature > 0:
            raise ValueError(f"--temperature {self.temperature} must be positive: candidates are drawn.")
        for field in ("samples", "rounds", "batch_size", "max_new_tokens", "judge_tokens"):
            if getattr(self, field) < 1:
                raise ValueError(f"--{field.replace('_', '-')} {getattr(self, field)} must be at least 1.")


_SETTINGS = (
    "name", "model", "judge", "samples", "temperature", "top_p", "max_new_tokens", "rounds", "noise_step", "pictures", "seed",
    "judge_tokens", "judge_retries", "best",
)  # fmt: skip
"""Options that tell what is made; the others tell how fast."""


@dataclasses.dataclass(frozen=True)
class _Row:
    """A row of the data: where it stands, its id, itself, its pictures with paths from here, and its report's labels."""

    place: str
    id: str
    row: Mapping[str, Any]
    images: Any
    labels: frozenset[str] = frozenset()

    @property
    def case(self) -> judges.Case:
        return judges.Case(
            self.id, _question(self.row["prompt"]), self.row["answer"], self.labels, tuple(self.row.get("choices") or ())
        )  # fmt: skip


def curate(options: Curate) -> None:
    """Writes the files, going on where they end, and says what was made and what was left out."""
    console = Console(stderr=True)
    stem = options.to.removesuffix(".jsonl")
    folder = Path(stem).absolute().parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{options.to}: there is no folder {folder}.")
    options = dataclasses.replace(options, pictures=options.pictures or f"{stem}.pictures")
    rows = _rows(options)
    settings = _settings(options, rows)
    begun = _is_begun(options, settings, stem)
    opened = open_model(options.model, best=options.best)
    maker = _Maker(options, opened, rows)
    if not begun:
        write_json(f"{stem}.settings.json", settings)
    text, visual, skipped = (_Lines(f"{stem}.{kind}.jsonl") for kind in ("text", "visual", "skipped"))
    if options.again:
        skipped.keep(lambda row: row["why"] != "judge")
    if text.rows or visual.rows or skipped.rows:
        there = f"{len(text.rows)} text pairs, {len(visual.rows)} visual pairs and {len(skipped.rows)} skipped ones"
        console.print(f"goes on: {there} were there", highlight=False)
    done = {(row["kind"], row["id"]) for row in (*text.rows, *visual.rows, *skipped.rows)}
    wanted = lambda row: ("text", "visual") if row.row.get("heat_map") is not None else ("text",)
    left = {row.id: [kind for kind in wanted(row) if (kind, row.id) not in done] for row in rows}
    made: dict[str, Any] | Failed | None
    with console.status("curating") as status:
        for start in range(0, len(rows), options.batch_size):
            chunk = rows[start : start + options.batch_size]
            say = lambda what, start=start: status.update(f"from row {start + 1} of {len(rows)}: {what}")
            # All of a chunk or nothing, so that what is drawn does not depend on where an interrupt came.
            asks = any("text" in left[row.id] for row in chunk)
            pairs = maker.text(chunk, say) if asks else [None] * len(chunk)
            for row, pair in zip(chunk, pairs, strict=True):
                for kind in left[row.id]:
                    made = pair if kind == "text" else maker.visual(row)
                    if isinstance(made, Failed):
                        about = {"id": row.id, "kind": kind, "row": row.place}
                        skipped.append(about | {"why": _why(made), "reason": made.reason})
                    elif made is not None:
                        (text if kind == "text" else visual).append(made)
    _report(console, stem, text.rows, visual.rows, skipped.rows)


class _Unfit(Failed):
    """A row of which no pair can be made, whoever judges."""


class _Maker:
    """Makes the pairs of rows."""

    def __init__(self, options: Curate, opened: Opened, rows: Sequence[_Row]):
        self._options, self._opened = options, opened
        self._folder = Path(options.to).absolute().parent
        self._judges, self._watched = _judges(options, opened, rows)
        renderer = data.Renderer(opened.tokenizer, sight=getattr(opened.module, "sight", None))
        readable = [row for row in rows if _unreadable(row) is None]
        asked = (renderer.prompt(row.row["prompt"], row.images, row.place) for row in readable)
        self._length = max((len(example.tokens) for example in asked), default=0)
        self._drawing, self._noise = jax.random.split(jax.random.key(options.seed))
        self._numbers = {row.id: number for number, row in enumerate(rows)}

    def text(self, rows: Sequence[_Row], say: Any) -> list[dict[str, Any] | Failed]:
        """A text pair of each row.

        Raises:
            RunFailed: a judge answered none of its questions about them, as where its server is gone.
        """
        options, opened = self._options, self._opened
        found: dict[str, dict[str, Any] | Failed] = {
            row.id: problem for row in rows if (problem := _unreadable(row)) is not None
        }
        asked = [row for row in rows if row.id not in found]
        if not asked:
            return [found[row.id] for row in rows]
        say("drawing candidates")
        drawn = completion.complete(
            opened.module, opened.params, opened.tokenizer, [row.row["prompt"] for row in asked],
            images=[row.images for row in asked], max_new_tokens=options.max_new_tokens, batch_size=options.batch_size,
            samples=options.samples, temperature=options.temperature, top_p=options.top_p, length=self._length,
            key=jax.vmap(jax.random.fold_in, (None, 0))(self._drawing, np.array([self._numbers[row.id] for row in asked])),
        )  # fmt: skip
        candidates = [[one] if isinstance(one, str) else one for one in drawn]
        say("looking for contradictions")
        picked = judges.contradictions(self._judges[0], [row.case for row in asked], candidates)
        pairs = [(row, one) for row, one in zip(asked, picked, strict=True) if not isinstance(one, Failed)]
        say("debating their relevance")
        debates = judges.debates(
            self._judges, [row.case for row, _ in pairs], [one.answer for _, one in pairs], rounds=options.rounds
        )
        for judge in self._watched:
            judge.require_answers()
        found |= {row.id: one for row, one in zip(asked, picked, strict=True) if isinstance(one, Failed)}
        for (row, one), debate in zip(pairs, debates, strict=True):
            found[row.id] = debate if isinstance(debate, Failed) else self._head(row, "text") | {
                "chosen": row.row["answer"], "rejected": one.answer, "relevance": debate.score, "origin": one.origin,
                "agreed": debate.agreed,
            }  # fmt: skip
        return [found[row.id] for row in rows]

    def visual(self, row: _Row) -> dict[str, Any] | Failed:
        """The visual pair of a row, its noised picture written."""
        given = row.row.get("confidence")
        confidence = 1.0 if given is None else given
        if isinstance(confidence, bool) or not isinstance(confidence, int | float) or not 0 <= confidence <= 1:
            return _Unfit(f"{row.place}: confidence is {confidence!r}; it must be a number in [0, 1]")
        listed = row.images if isinstance(row.images, list) else [] if row.images is None else [row.images]
        if len(listed) != 1:
            return _Unfit(f"{row.place}: a heat map and {len(listed)} pictures; give one picture, or no heat map")
        try:
            pixels = np.asarray(images.open_picture(listed[0], row.place))
            heat = heat_maps.fitted(
                heat_maps.read_heat_map(data.located(row.row["heat_map"], self._options.data), row.place),
                pixels.shape,
                row.place,
            )
        except (ValueError, FileNotFoundError) as error:
            return _Unfit(str(error))
        sight = getattr(self._opened.module, "sight", None)
        mean, std = (sight.tower.mean, sight.tower.std) if sight else MEAN_AND_STD["clip"]
        key = jax.random.fold_in(self._noise, self._numbers[row.id])
        noised = mmedpo.noised_pixels(pixels, heat, self._options.noise_step, key, mean=mean, std=std)
        if (noised == pixels).all():
            return _Unfit(f"{row.place}: the noise changes no pixel; the heat map is 0 everywhere, or nearly so")
        target = Path(str(self._options.pictures)) / f"{_file_name(row.id)}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        Image.fromarray(noised).save(partial, "PNG")
        partial.replace(target)
        return self._head(row, "visual") | {
            "rejected_images": self._from_here(str(target)), "chosen": row.row["answer"], "rejected": row.row["answer"],
            "relevance": confidence,
        }  # fmt: skip

    def _head(self, row: _Row, kind: str) -> dict[str, Any]:
        shown = row.images
        if shown is not None:
            shown = [self._from_here(one) for one in shown] if isinstance(shown, list) else self._from_here(shown)
        return {"id": row.id, "kind": kind, "prompt": row.row["prompt"]} | ({} if shown is None else {"images": shown})

    def _from_here(self, path: str) -> str:
        """A path as the rows of the pairs have it: from their folder."""
        return path if "://" in path else os.path.relpath(path, self._folder)


class _Watched:
    """An `Answerer` that counts the failures among its answers."""

    def __init__(self, name: str, ask: answers.Answerer):
        self._name, self._ask = name, ask
        self._asked, self._failed, self._reason = 0, 0, ""

    def __call__(self, prompts: Sequence[answers.Prompt]) -> Sequence[str | Failed]:
        found = self._ask(prompts)
        failed = [one.reason for one in found if isinstance(one, Failed)]
        self._asked, self._failed = self._asked + len(found), self._failed + len(failed)
        self._reason = failed[-1] if failed else self._reason
        return found

    def require_answers(self) -> None:
        """Counts anew.

        Raises:
            RunFailed: it was asked since the last count, no answer came, and none comes to an easy question.
        """
        asked, failed = self._asked, self._failed
        self._asked = self._failed = 0
        if asked and failed == asked and answers.silence(self._ask):
            raise RunFailed(
                f"judge {self._name} failed on all of {asked} questions: {self._reason}. Nothing is recorded of these rows; "
                "the same command goes on."
            )


def _unreadable(row: _Row) -> _Unfit | None:
    """What is wrong with the pictures of a row."""
    try:
        for one in row.images if isinstance(row.images, list) else [] if row.images is None else [row.images]:
            images.picture_size(one, row.place)
    except (ValueError, FileNotFoundError) as error:
        return _Unfit(str(error))
    return None


def _why(failed: Failed) -> str:
    """What kind of failure: "row" (it is unfit), "none" (nothing contradicts its answer), "judge"."""
    return "row" if isinstance(failed, _Unfit) else "none" if isinstance(failed, judges.NoContradiction) else "judge"


# Rows, settings, files


def _rows(options: Curate) -> list[_Row]:
    """All rows, checked, with ids: their own, or a hash of their fields."""
    found: list[_Row] = []
    places: dict[str, str] = {}
    repeated: collections.Counter[str] = collections.Counter()
    for place, row in data.open_records(options.data).placed():
        if not isinstance(row.get("answer"), str) or not row["answer"].strip():
            raise ValueError(f"{place}: field 'answer' must be text; its fields are {', '.join(row)}.")
        if not row.get("prompt"):
            raise ValueError(f"{place}: field 'prompt' must be text or messages; its fields are {', '.join(row)}.")
        seen = data.located(row.get("images"), options.data)
        if not all(one is None or isinstance(one, str) for one in (seen if isinstance(seen, list) else [seen])):
            raise ValueError(f"{place}: pictures must be paths, so that pairs can name them; write them to files.")
        name = _hash(row)[:16] if row.get("id") is None else str(row["id"])
        if row.get("id") is None:
            repeated[name] += 1
            name += f"-{repeated[name]}" if repeated[name] > 1 else ""
        if name in places:
            raise ValueError(f"{place}: its id {name!r} is also that of {places[name]}; ids must differ.")
        places[name] = str(place)
        found.append(_Row(str(place), name, row, seen, frozenset(row.get("labels") or ())))
    return _labelled(found) if "built-in" in options.judge else found


def _labelled(rows: list[_Row]) -> list[_Row]:
    """Rows of `data.reports` with the labels that their reports have, which are not in the rows."""
    bare = {row.id for row in rows if not row.labels and str(row.row["prompt"]).startswith(reports.INSTRUCTION)}
    if not bare:
        return rows
    labels = reports.read_archive(reports.archive_path()).labels
    return [dataclasses.replace(row, labels=labels.get(row.id, frozenset())) if row.id in bare else row for row in rows]


def _question(prompt: Any) -> str:
    """What is asked last, in words."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return text.replace(data.MARKER, "").strip()


def _hash(value: Any) -> str:
    whole = json.dumps(value, sort_keys=True, default=repr)
    return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()


def _file_name(name: str) -> str:
    """An id as the name of a file."""
    return name if re.fullmatch(r"[\w-]{1,80}", name, re.ASCII) else _hash(name)


def _settings(options: Curate, rows: Sequence[_Row]) -> dict[str, Any]:
    """What tells how pairs are made, in JSON's types."""
    made: dict[str, Any] = {name: getattr(options, name) for name in _SETTINGS} | {"judge": list(options.judge)}
    made["pictures"] = os.path.relpath(str(options.pictures), Path(options.to).absolute().parent)
    return made | {"rows": _hash([row.row for row in rows])}


def _is_begun(options: Curate, settings: Mapping[str, Any], stem: str) -> bool:
    """Whether there are files of these settings.

    Raises:
        ValueError: there are files of others, or of unknown ones.
    """
    file = Path(f"{stem}.settings.json")
    if file.exists():
        require_same(options.to, json.loads(file.read_text()), settings)
        return True
    for kind in ("text", "visual", "skipped"):
        if Path(f"{stem}.{kind}.jsonl").exists():
            raise ValueError(f"{stem}.{kind}.jsonl exists, and no {file} says how it was made; choose another --to.")
    return False


class _Lines:
    """A JSONL file that rows are appended to, a line at a time; it appears with the first. A half-written last line is cut off."""

    def __init__(self, path: str):
        self._path = path
        self.rows: list[dict[str, Any]] = []
        before = Path(self._path).read_bytes() if Path(self._path).exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        if whole != before:
            write_whole(self._path, whole)
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.rows.append(json.loads(line))
            except ValueError:
                raise ValueError(f"{self._path}, line {number} is no JSON object; mend or delete that line.") from None

    def append(self, row: Mapping[str, Any]) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(dict(row))

    def keep(self, wanted: Any) -> None:
        """Leaves out the rows that are not wanted."""
        kept = [row for row in self.rows if wanted(row)]
        if len(kept) < len(self.rows):
            write_whole(self._path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept).encode())
        self.rows = kept


def _report(console: Console, stem: str, text: Sequence[Any], visual: Sequence[Any], skipped: Sequence[Any]) -> None:
    """What was made, and what was left out.

    Raises:
        RunFailed: nothing was made.
    """
    say = lambda line: console.print(line, highlight=False, soft_wrap=True, markup=False)
    written = sum(row["origin"] == "written" for row in text)
    if text:
        say(f"{stem}.text.jsonl: {len(text)} pairs, {written} of them with an answer that the judge wrote")
    if visual:
        say(f"{stem}.visual.jsonl: {len(visual)} pairs")
    if skipped:
        whys = {"judge": "a judge failed", "none": "nothing contradicts the answer", "row": "the row is unfit"}
        counts = collections.Counter(whys[row["why"]] for row in skipped)
        told = "; ".join(f"{why}: {count}" for why, count in counts.items())
        say(f"{stem}.skipped.jsonl: {len(skipped)} were skipped ({told})")
    if not text and not visual:
        raise RunFailed(f"no pair could be made; {stem}.skipped.jsonl has the reasons.")


def _judges(options: Curate, opened: Opened, rows: Sequence[_Row]) -> tuple[list[judges.Judge], list[_Watched]]:
    """The judges by name, and what those ask that are models; an endpoint is asked a first question.

    Raises:
        ConnectionError: an endpoint does not answer.
    """
    made: list[judges.Judge] = []
    watched: list[_Watched] = []
    for name in options.judge:
        if name == "built-in":
            labels = {row.id: row.labels for row in rows if row.labels}
            labelled = [{"id": row.id, "prompt": "", "answer": row.row["answer"]} for row in rows if row.labels]
            pairs = reports.contradicted_pairs(labelled, labels, options.seed)
            made.append(judges.Labelled(options.seed, {pair["id"]: pair["rejected"] for pair in pairs}))
            continue
        ask: answers.Answerer
        if name.startswith("local:"):
            path = name.removeprefix("local:")
            other = opened if path == options.model else open_model(path)
            ask = answers.Local(
                other.module, other.params, other.tokenizer, max_new_tokens=options.judge_tokens,
                batch_size=options.batch_size,
            )  # fmt: skip
        elif endpoint.is_address(name):
            ask = endpoint.named(
                name, flag="--judge", timeout=options.timeout, retries=options.retries, max_new_tokens=options.judge_tokens,
                parallel=options.parallel,
            )  # fmt: skip
            if silent := answers.silence(ask):
                raise ConnectionError(f"--judge {name}: {silent.reason}.")
        else:
            raise ValueError(f"--judge {name} is unknown; give built-in, local:MODEL or URL#MODEL.")
        watched.append(_Watched(name, ask))
        made.append(judges.ModelJudge(watched[-1], retries=options.judge_retries))
    return made, watched


__all__ = ["Curate", "curate"]
