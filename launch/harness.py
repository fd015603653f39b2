"""`jaxmethods evaluate harness`: tasks of lm-evaluation-harness on a run's model, or any other.

Answers are kept as they come, by the hash of their requests, and are not asked for again when the command is interrupted and given
once more.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from jaxmethods import models
from jaxmethods.evals.scoring.likelihoods import BATCH_TOKENS
from jaxmethods.launch.files import require_pyarrow, require_same, write_json, write_table, write_whole
from jaxmethods.launch.opening import open_model


@dataclasses.dataclass(frozen=True)
class Harness:
    """Run tasks of lm-evaluation-harness. The same command goes on after an interrupt."""

    model: tyro.conf.Positional[str]
    """A run's work folder, or a model: folder, .gguf file, package:DIST/FILE, hub name."""
    tasks: Annotated[str, tyro.conf.arg(metavar="NAME,...")]
    """Names of tasks or groups, with commas between them."""
    to: Annotated[str, tyro.conf.arg(metavar="FOLDER")]
    """results.json, TASK.parquet with a row for each document, answers.jsonl and settings.json."""
    include_path: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """A folder with task files (YAML) of your own."""
    num_fewshot: int | None = None
    """Examples before each question; by default what the task says."""
    limit: int | None = None
    """The first so many documents of each task."""
    chat: bool = False
    """Put prompts into the tokenizer's chat template."""
    system: str | None = None
    """What a message of the system says first."""
    generation: Annotated[str | None, tyro.conf.arg(metavar="KEY=VALUE,...")] = None
    """Options of generation in place of the tasks' own, such as max_gen_toks=64."""
    max_length: int | None = None
    """Tokens that the model reads; by default its configuration's `max_position_embeddings`."""
    add_bos: bool | None = None
    """Whether text begins with the BOS token; by default the tokenizer says."""
    seed: int = 1234
    """Of few-shot examples and of what is drawn."""
    bootstrap: int = 1000
    """Samples for standard errors of metrics that have no formula for them."""
    batch_tokens: int = BATCH_TOKENS
    """Places of a batch, about."""
    best: bool = False
    """The checkpoint with the lowest evaluation loss instead of the latest."""
    json: bool = False
    """Print one JSON object instead of a table."""


_SETTINGS = (
    "model", "tasks", "include_path", "num_fewshot", "limit", "chat", "system", "generation", "max_length", "add_bos", "seed",
    "bootstrap", "best",
)  # fmt: skip
"""Options that tell what comes out; the others tell how fast."""


def harness(options: Harness) -> None:
    """Writes the files and prints the results.

    Raises:
        ImportError: the harness is missing.
        ValueError: an unknown task, or a folder with other results.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ImportError("lm-evaluation-harness is missing: pip install 'jaxmethods[harness]'") from None
    from jaxmethods.evals.harness import HarnessLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    folder, console = Path(options.to), Console(stderr=options.json)
    names = [name.strip() for name in options.tasks.split(",") if name.strip()]
    _require_own(folder, options)
    require_pyarrow(folder)
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise FileNotFoundError(f"--include-path {options.include_path}: there is no such folder.")
    manager, unknown = None, names
    # The harness reads thousands of files for its own tasks: only where the given folder has not got them all.
    for whose in (False, True) if options.include_path else (True,):
        if unknown:
            manager = TaskManager(include_path=options.include_path, include_defaults=whose)
            unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"task {unknown[0]!r} is unknown to lm-evaluation-harness; --include-path DIR adds tasks of your own."
        )
    if not names:
        raise ValueError(f"--tasks {options.tasks!r} names none; give names with commas between them.")
    opened = open_model(options.model, best=options.best)
    settings = _settings(options) | {"step": opened.step}
    _require_own(folder, options, settings)
    folder.mkdir(exist_ok=True)
    write_json(folder / "settings.json", settings)
    begin = time.monotonic()
    with _Answers(folder / "answers.jsonl") as answers, console.status("building requests") as status:
        lm = HarnessLM(
            opened.module, opened.params, opened.tokenizer, max_length=options.max_length, add_bos_token=options.add_bos,
            seed=options.seed, batch_tokens=options.batch_tokens, done=answers, name=options.model,
            progress=lambda kind, done, total: status.update(f"{kind}: {done} of {total} requests"),
        )  # fmt: skip
        results: Any = lm_eval.simple_evaluate(
            lm, tasks=names, num_fewshot=options.num_fewshot, limit=options.limit, apply_chat_template=options.chat,
            system_instruction=options.system, gen_kwargs=options.generation, task_manager=manager,
            bootstrap_iters=options.bootstrap, random_seed=options.seed, numpy_random_seed=options.seed,
            torch_random_seed=options.seed, fewshot_random_seed=options.seed,
        )  # fmt: skip
    samples = results.pop("samples")
    for task, rows in samples.items():
        _write_rows(folder / f"{task.replace('/', '_')}.parquet", rows)
    work = {
        "seconds": round(time.monotonic() - begin, 1), "requests": lm.work.requests, "tokens": lm.work.tokens,
        "reused": lm.work.reused, "batches": lm.work.batches, "fill": round(lm.work.fill, 3), "programs": len(lm.work.programs),
    }  # fmt: skip
    write_whole(folder / "results.json", (_json(results, indent=2) + "\n").encode())
    if options.json:
        print(_json({"results": results["results"], "work": work}))
        return
    _show(console, options, results, samples)
    console.print(f"{lm.work}; {work['seconds']} s\nresults: {options.to}", highlight=False)


def _settings(options: Harness) -> dict[str, Any]:
    return {name: getattr(options, name) for name in _SETTINGS} | {"revision": models.revision(options.model)}


def _require_own(folder: Path, options: Harness, settings: Mapping[str, Any] | None = None) -> None:
    """Refuses a folder with results of other settings, or with anything else; without `settings`, as far as can be seen by then."""
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"{options.to}: there is no folder {folder.absolute().parent}.")
    file, settings = folder / "settings.json", settings or _settings(options)
    if file.exists():
        require_same(options.to, json.loads(file.read_text()), settings)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{options.to} exists and holds no settings.json; choose another --to.")


class _Answers(dict[str, Any]):
    """Answers by the hash of their request, each appended to a file as a line; a half-written last line is cut off."""

    def __init__(self, file: Path):
        before = file.read_bytes() if file.exists() else b""
        whole = before[: before.rfind(b"\n") + 1]
        if whole != before:
            write_whole(file, whole)
        super().__init__(json.loads(line) for line in whole.splitlines())
        self._file = file.open("a")

    def __setitem__(self, key: str, answer: Any) -> None:
        super().__setitem__(key, answer)
        self._file.write(json.dumps([key, answer]) + "\n")
        self._file.flush()

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()


def _write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    """Documents of a task, in their order: numbers and texts as they are, everything else as JSON."""
    import pyarrow as pa

    plain = lambda value: value is None or isinstance(value, str | int | float)
    columns = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values} - {type(None)}
        as_is = all(map(plain, values)) and (len(kinds) < 2 or kinds <= {int, float})
        columns[name] = pa.array(values if as_is else [_json(value) for value in values])
    write_table(file, columns)


def _json(value: Any, **options: Any) -> str:
    from lm_eval.utils import handle_non_serializable

    return json.dumps(value, default=handle_non_serializable, ensure_ascii=False, **options)


def _show(console: Console, options: Harness, results: Mapping[str, Any], samples: Mapping[str, Any]) -> None:
    table = Table(title=options.model)
    for heading in ("task", "documents", "shots", "metric", "value", "standard error"):
        table.add_column(heading, justify="left" if heading in ("task", "metric") else "right")
    for task, found in results["results"].items():
        for name, value in found.items():
            metric, _, filtered = name.partition(",")
            if not isinstance(value, int | float) or not filtered or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            table.add_row(
                task, str(len(samples.get(task, ()))), str(results.get("n-shot", {}).get(task, "")),
                metric if filtered == "none" else f"{metric} ({filtered})", f"{value:.4f}",
                f"{error:.4f}" if isinstance(error, int | float) else "",
            )  # fmt: skip
    console.print(table)


__all__ = ["Harness", "harness"]
