"""`jaxmethods rag`: a model that sees answers with retrieved reports, and learns by preference when to trust them (MMed-RAG).

    features of pictures and reports -> a retriever a domain, a router -> reports of each question
    answers alone, with reports, with reports and noise -> pairs of three kinds -> DPO (RAG-PT)
    held-out questions: alone, with k reports, with as many as their similarities say; before and after

WORKDIR has what the phases made: `features/`, `retrievers/`, `router.safetensors`, `contexts/`, `answers/`, `noise/`,
`pairs.jsonl`, `train/`, `model/`, `held_out/`, `results.jsonl`. What is whole is not made again.

https://arxiv.org/abs/2410.13085. The authors train whole encoders a domain; here they are frozen (the model's own tower, and a
sentence encoder) under trained heads. Their code for the router, the threshold and the pairs is not released.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from jaxmethods import data, images, models, retrieval, tree
from jaxmethods.evals import answers, completion, reliance
from jaxmethods.launch import config as run_config
from jaxmethods.launch.config import Run
from jaxmethods.launch.opening import open_encoder, open_model
from jaxmethods.launch.phases import Phases, Row, begin, write_rows
from jaxmethods.launch.train import RunFailed
from jaxmethods.models.text_encoder import TextEncoder
from jaxmethods.objectives import Preference, mmed_rag

CONTEXTS = ("alone", "fixed", "adaptive")
"""How held-out questions are asked: without reports, with `k`, with `mmed_rag.keep_contexts` of `k`."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """What one retriever knows."""

    name: str
    """As the rows of questions call it, and files of the work folder."""
    reports: str
    """Rows with `images` (one picture) and `report`: the retriever learns from them, and they are what can be found."""
    role: str
    """A sentence or two on the part that the model plays."""


@dataclasses.dataclass(frozen=True)
class RetrievalAugmented:
    """Retrieval, preference pairs, training, and what it changed.

    A work folder belongs to the config that made it: fields that change the result must be the same to go on.
    """

    workdir: str
    """Where phases leave their files."""
    model: str
    """A folder with a model that sees; a run's is made by `jaxmethods export`."""
    domains: tuple[Domain, ...]
    """One or more; with one it is plain RAG."""
    text_encoder: str
    """A BERT-style sentence encoder for the reports: a folder or hub name."""
    questions: str
    """Rows with `images`, `question`, `answer`, `domain`, perhaps `options`, one of which is the answer. Pairs come from them."""
    held_out: str
    """Rows of the same form."""
    training: Run
    """RAG-PT. The program fills in model, workdir, steps and data.train; its objective is `Preference`."""
    retriever: retrieval.RetrieverConfig = dataclasses.field(default_factory=retrieval.RetrieverConfig)
    """Of each domain."""
    k: int = 5
    """Reports at most."""
    threshold: float = 0.2
    """Of `mmed_rag.keep_contexts`."""
    mode: Literal["consecutive", "top1"] = "consecutive"
    """Of the same."""
    noise: Literal["code", "paper"] = "code"
    """The picture of the third answer: "code", noise alone; "paper", the least similar other picture under diffusion noise."""
    noise_step: int = 500
    """Of noise="paper", 0..999."""
    right_above: float = 0.5
    """An answer without options is right from this ROUGE-L on."""
    epochs: int = 1
    """Passes over the pairs."""
    max_new_tokens: int = 64
    """At most so many tokens an answer."""
    batch_size: int = 16
    """Questions, or pictures, at once."""
    seed: int = 0
    """Of retrievers, noise and training."""

    command: ClassVar[str] = "rag"
    free_on_resume: ClassVar[frozenset[str]] = frozenset({"workdir", "batch_size"})

    def __post_init__(self) -> None:
        if not self.domains or len({domain.name for domain in self.domains}) != len(self.domains):
            raise ValueError(
                f"domains={[d.name for d in self.domains]}: give at least one, each with a name of its own."
            )
        for domain in self.domains:
            if not domain.name.isidentifier():
                raise ValueError(f"domain {domain.name!r}: its name becomes a file's; use letters, digits and _.")
        for name in ("k", "epochs", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if not self.threshold > 0:
            raise ValueError(f"threshold={self.threshold} must be positive.")
        tree.require_one_of("mode", self.mode, mmed_rag.MODES)
        tree.require_one_of("noise", self.noise, ("code", "paper"))
        if not 0 <= self.noise_step < 1000:
            raise ValueError(f"noise_step={self.noise_step} must be between 0 and 999.")
        if not isinstance(self.training.objective, Preference):
            raise ValueError(f"training.objective is {type(self.training.objective).__name__}; it must be Preference.")
        if self.training.model or self.training.workdir or self.training.data.train:
            raise ValueError(
                "training.model, training.workdir and training.data.train are filled in; leave them empty."
            )
        if self.training.data.pack:
            raise ValueError("training.data.pack=True: pairs cannot share a row; set Data(pack=False).")


def run_rag(config: RetrievalAugmented, *, console: Console | None = None) -> list[Row]:
    """Runs all phases, or goes on with what the work folder holds. Returns the rows of results.jsonl.

    Raises:
        ValueError, FileNotFoundError: the config asks for something that cannot be.
        RunFailed: the training failed, or no question makes a pair.
    """
    console, workdir = begin(config, config.training.compilation_cache, console)
    names = [domain.name for domain in config.domains]
    asked = {name: _questions(getattr(config, name), names) for name in ("questions", "held_out")}
    reports = {domain.name: _reports(domain.reports) for domain in config.domains}
    program = _Program(config, workdir, console, reports)
    run_config.claim(workdir, config)  # what could be wrong has been said

    found = {name: program.contexts(name, rows) for name, rows in asked.items()}
    noise = program.noise(asked["questions"])
    before = {
        kind: program.answers(config.model, f"answers/{kind}", asked["questions"], found["questions"], kind, noise)
        for kind in ("alone", "adaptive", "noised")
    }
    path = program.trained(asked["questions"], found["questions"], before, noise)
    if path is None:
        program.say("stopped and saved; the same command goes on from there.")
        return []
    results: list[Row] = []
    for name, model in (("before", config.model), ("after", path)):
        kinds = {
            kind: program.answers(model, f"held_out/{name}_{kind}", asked["held_out"], found["held_out"], kind, None)
            for kind in CONTEXTS
        }
        results += _measured(name, asked["held_out"], found["held_out"], kinds)
    write_rows(workdir / "results.jsonl", results)
    console.print(_table(results, names))
    return results


class _Program:
    """The phases; each gives what its file holds, and makes the file where there is none."""

    def __init__(self, config: RetrievalAugmented, workdir: Any, console: Console, reports: Mapping[str, list[Row]]):
        self.config, self.workdir, self.console, self.reports = config, workdir, console, reports
        self.phases = Phases(workdir, console, config.batch_size)
        self.say = self.phases.say
        self.roles = {domain.name: domain.role for domain in config.domains}
        self._opened: tuple[str, Any] | None = None
        if getattr(self._open(config.model).module, "sight", None) is None:
            raise ValueError(f"model={config.model} reads text alone; MMed-RAG asks about pictures.")
        encoder, _ = models.shapes(config.text_encoder)
        if not isinstance(encoder, TextEncoder):
            raise ValueError(
                f"text_encoder={config.text_encoder} holds a {type(encoder).__name__}; give a sentence encoder."
            )
        _ = self._room

    def _open(self, path: str) -> Any:
        if self._opened is None or self._opened[0] != path:
            self._opened = None  # its memory is wanted
            self._opened = path, open_model(path)
        return self._opened[1]

    # Retrieval

    @functools.cached_property
    def seen(self) -> dict[str, np.ndarray]:
        """Name of a domain -> features of its reports' pictures."""
        return {name: self._pictures(f"reports_{name}", rows) for name, rows in self.reports.items()}

    @functools.cached_property
    def bases(self) -> list[retrieval.Base]:
        """Each domain's retriever and its reports."""
        made = []
        for number, (name, rows) in enumerate(self.reports.items()):
            read = self._texts(f"texts_{name}", [row["report"] for row in rows])
            file = self.workdir / "retrievers" / f"{name}.safetensors"
            texts = {text: i for i, text in enumerate(dict.fromkeys(row["report"] for row in rows))}
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                with self.phases.timed(f"retrievers/{name}"):
                    key = jax.random.fold_in(jax.random.key(self.config.seed), number)
                    groups = np.array([texts[row["report"]] for row in rows])
                    one = retrieval.train(self.seen[name], read, key=key, groups=groups, config=self.config.retriever)
                one.save(file)
                recalls = [] if one.history is None else [x for x in np.asarray(one.history.held_out_recall) if x >= 0]
                best = f", recall@5 of held-out pairs {max(recalls):.2f} at best" if recalls else ""
                self.say(f"retriever of {name}: {len(rows)} pairs{best}")
            one = retrieval.Retriever.load(file)
            made.append(retrieval.Base(one, one.embed_targets(read), np.array([_group(row) for row in rows])))
        return made

    @functools.cached_property
    def router(self) -> retrieval.Router:
        """Learned from the pictures of all reports."""
        file = self.workdir / "router.safetensors"
        if not file.exists():
            domains = np.repeat(np.arange(len(self.seen)), [len(x) for x in self.seen.values()])
            retrieval.train_router(np.concatenate(list(self.seen.values())), domains).save(file)
        return retrieval.Router.load(file)

    def contexts(self, name: str, rows: Sequence[Row]) -> list[Row]:
        """Of each question the domain it was routed to, its reports, their similarities, and how many to keep."""
        features: list[np.ndarray] = []  # read when the first block is made
        names = list(self.reports)

        def make(block: range) -> list[Row]:
            if not features:
                features.append(self._pictures(name, rows))
            own = features[0][np.array(block)]
            domain = np.asarray(self.router(own).domain)
            groups = np.array([_group(rows[i]) for i in block])
            found = retrieval.find(own, domain, self.bases, self.config.k, groups=groups)
            kept = mmed_rag.keep_contexts(found.scores, threshold=self.config.threshold, mode=self.config.mode)
            made = []
            for i, d, scores, places, count in zip(
                block, domain, found.scores, found.rows, np.asarray(kept), strict=True
            ):
                real = [int(place) for place in places if place >= 0]
                texts = [self.reports[names[d]][place]["report"] for place in real]
                made.append(
                    {"prompt": rows[i]["question"], "domain": names[d], "reports": texts,
                     "similarities": scores[: len(real)].tolist(), "kept": min(int(count), len(real))}
                )  # fmt: skip
            return made

        return self.phases.rows(f"contexts/{name}", len(rows), make, prompts=[row["question"] for row in rows])

    def _pictures(self, name: str, rows: Sequence[Row]) -> np.ndarray:
        """The tower's features of each row's picture, a mean over places: [N, F] float32."""
        return self._kept(name, lambda: self._seen_by_tower([row["images"] for row in rows]))

    def _seen_by_tower(self, pictures: Sequence[str]) -> np.ndarray:
        opened = self._open(self.config.model)
        tower = opened.params["vision_tower"]
        seen = models.tower_features(opened.module.sight, tower, pictures, batch_size=self.config.batch_size)
        return np.concatenate([some.mean(axis=1) for some in seen])

    def _texts(self, name: str, texts: Sequence[str]) -> np.ndarray:
        return self._kept(
            name, lambda: open_encoder(self.config.text_encoder, batch_size=self.config.batch_size)(texts)
        )

    def _kept(self, name: str, make: Any) -> np.ndarray:
        """An array of the folder `features`."""
        file = Path(self.workdir) / "features" / f"{name}.npy"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            with self.phases.timed(f"features/{name}"):
                made = make()
            partial = file.with_suffix(".partial.npy")
            np.save(partial, made)
            partial.replace(file)
        return np.load(file, allow_pickle=False)

    # Answers and pairs

    def prompts(self, rows: Sequence[Row], found: Sequence[Row], kind: str) -> list[str]:
        """What is asked: "alone" without reports, "fixed" with k, otherwise with those kept; cut to what training has room for."""
        opened, limit = self._open(self.config.model), self._room
        renderer = data.Renderer(opened.tokenizer, sight=opened.module.sight)
        made = []
        for row, context in zip(rows, found, strict=True):
            count = {"alone": 0, "fixed": self.config.k}.get(kind, context["kept"])
            length = lambda text, row=row: len(renderer.prompt(text, row["images"], "a question").tokens)
            made.append(
                mmed_rag.prompt(
                    row["question"], context["reports"][:count], domain=context["domain"], options=row.get("options"),
                    domains=self.roles, limit=limit, length=length,
                )
            )  # fmt: skip
        return made

    @property
    def _room(self) -> int:
        """Tokens of a prompt, so that an answer fits behind it in a row."""
        room = self.config.training.data.sequence_length - self.config.max_new_tokens - 2
        if room < 1:
            raise ValueError(
                f"training.data.sequence_length={self.config.training.data.sequence_length} has no room for prompts before "
                f"max_new_tokens={self.config.max_new_tokens}."
            )
        return room

    def answers(
        self, path: str, name: str, rows: Sequence[Row], found: Sequence[Row], kind: str, noise: Sequence[str] | None
    ) -> list[Row]:
        """Greedy answers of a model, and which are right; of kind "noised" to the pictures of `noise`."""
        prompts = self.prompts(rows, found, kind)
        shown = noise if kind == "noised" and noise is not None else [row["images"] for row in rows]

        def make(block: range) -> list[Row]:
            opened = self._open(path)
            ask = answers.Local(
                opened.module, opened.params, opened.tokenizer, max_new_tokens=self.config.max_new_tokens,
                batch_size=self.config.batch_size,
            )  # fmt: skip
            said = ask([answers.Pictured(prompts[i], shown[i]) for i in block])
            return [
                {"prompt": prompts[i], "said": text, "right": self._right(rows[i], str(text))}
                for i, text in zip(block, said, strict=True)
            ]

        return self.phases.rows(name, len(rows), make, prompts=prompts)

    def _right(self, row: Row, said: str) -> bool:
        if row.get("options"):
            return completion.same(said, row["answer"])
        return completion.rouge_l(said, row["answer"]) >= self.config.right_above

    def noise(self, rows: Sequence[Row]) -> list[str]:
        """The picture of noise of each question, as PNG."""
        folder = Path(self.workdir) / "noise"
        folder.mkdir(parents=True, exist_ok=True)
        key = jax.random.fold_in(jax.random.key(self.config.seed), len(self.reports))
        files = [folder / f"{i}.png" for i in range(len(rows))]
        missing = [i for i, file in enumerate(files) if not file.exists()]
        farthest: Any = None
        if missing and self.config.noise == "paper":
            features = self._pictures("questions", rows)
            unit = features / np.linalg.norm(features, axis=1, keepdims=True)
            farthest = np.asarray(retrieval.top_k(-unit, unit, 1)[1])[:, 0]
        for i in missing:
            of, picture = jax.random.fold_in(key, i), rows[i if farthest is None else int(farthest[i])]["images"]
            pixels = np.asarray(images.open_picture(picture, picture))
            noised = (
                mmed_rag.noise_picture(pixels.shape, of)
                if farthest is None
                else mmed_rag.noised_other(pixels, self.config.noise_step, of)
            )
            partial = files[i].with_suffix(".partial")
            Image.fromarray(noised).save(partial, "PNG")
            partial.replace(files[i])
        return [str(file.absolute()) for file in files]

    def trained(
        self, rows: Sequence[Row], found: Sequence[Row], told: Mapping[str, Sequence[Row]], noise: Sequence[str]
    ) -> str | None:
        """The model after RAG-PT on the pairs of these answers; None where a signal ended its training."""
        target, file = self.workdir / "model", self.workdir / "pairs.jsonl"
        of = {"alone": told["alone"], "with_reports": told["adaptive"], "noised": told["noised"]}
        cases = [
            mmed_rag.Case(
                prompt=told["adaptive"][i]["prompt"], images=os.path.abspath(row["images"]), noise=noise[i],
                truth=None if row.get("options") else row["answer"],
                **{kind: some[i]["said"] for kind, some in of.items()},
            )
            for i, row in enumerate(rows)
        ]  # fmt: skip
        pairs = mmed_rag.preference_rows(
            cases, {kind: np.array([x["right"] for x in some]) for kind, some in of.items()}
        )
        counts = {subset: sum(pair["subset"] == subset for pair in pairs) for subset in mmed_rag.Subsets._fields}
        if not pairs:
            raise RunFailed("no question makes a pair: none is answered rightly in one way and wrongly in another.")
        if not file.exists():
            write_rows(file, pairs)
        self.say(f"{len(pairs)} pairs: " + ", ".join(f"{n} {subset}" for subset, n in counts.items()))
        if not target.exists():
            self._opened = None  # its memory is wanted
        run = dataclasses.replace(
            self.config.training, model=self.config.model, workdir=str(self.workdir / "train"),
            steps=-(-len(pairs) * self.config.epochs // self.config.training.batch_size),
            data=dataclasses.replace(self.config.training.data, train=str(file)),
        )  # fmt: skip
        return self.phases.trained("train", run, target)


def _questions(path: str, domains: Sequence[str]) -> list[Row]:
    """The rows of a file of questions, checked."""
    rows = []
    for place, row in data.open_records(path).placed():
        for field in ("images", "question", "answer", "domain"):
            if not isinstance(row.get(field), str):
                raise ValueError(f"{place}: field {field!r} must be text; the fields are {', '.join(row)}.")
        if row["domain"] not in domains:
            raise ValueError(f"{place}: domain {row['domain']!r} is none of {', '.join(domains)}.")
        if (options := row.get("options")) and row["answer"] not in options:
            raise ValueError(f"{place}: the answer {row['answer']!r} is none of its options {options}.")
        rows.append({**row, "images": data.located(row["images"], path)})
    return rows


def _reports(path: str) -> list[Row]:
    """The rows of a file of reports, checked."""
    rows = []
    for place, row in data.open_records(path).placed():
        for field in ("images", "report"):
            if not isinstance(row.get(field), str) or not row[field].strip():
                raise ValueError(f"{place}: field {field!r} must be text; the fields are {', '.join(row)}.")
        rows.append({**row, "images": data.located(row["images"], path)})
    return rows


def _group(row: Row) -> int:
    """What must never be found for a question: reports of its own picture."""
    digest = hashlib.blake2b(os.path.abspath(row["images"]).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def _measured(name: str, rows: Sequence[Row], found: Sequence[Row], kinds: Mapping[str, Sequence[Row]]) -> list[Row]:
    """A row for each way to ask: the share of right answers, of all and by domain, and how reports misled."""
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    of = {kind: np.array([x["right"] for x in some]) for kind, some in kinds.items()}
    routed = np.mean([row["domain"] == context["domain"] for row, context in zip(rows, found, strict=True)])
    made = []
    for kind, right in of.items():
        by = {d: float(right[[row["domain"] == d for row in rows]].mean()) for d in domains}
        kept = {"alone": 0.0, "fixed": float(np.mean([len(x["reports"]) for x in found]))}
        lost = reliance.over_reliance(of["alone"], right)
        made.append(
            {"model": name, "contexts": kind, "right": float(right.mean()), "by_domain": by, "questions": len(rows),
             "reports": kept.get(kind, float(np.mean([x["kept"] for x in found]))), "routed": float(routed),
             "over_reliance": None if kind == "alone" else float(lost.value())}
        )  # fmt: skip
    return made


def _table(results: Sequence[Row], domains: Sequence[str]) -> Table:
    table = Table(title="held-out questions answered rightly")
    for heading in ("model", "contexts", "reports", "right", *domains, "over-\nreliance"):
        table.add_column(heading, justify="left" if heading in ("model", "contexts") else "right")
    for row in results:
        by = [f"{row['by_domain'][d]:.3f}" if d in row["by_domain"] else "" for d in domains]
        lost = "" if row["over_reliance"] is None else f"{row['over_reliance']:.3f}"
        table.add_row(row["model"], row["contexts"], f"{row['reports']:.1f}", f"{row['right']:.3f}", *by, lost)
    return table


__all__ = ["Domain", "RetrievalAugmented", "run_rag"]
