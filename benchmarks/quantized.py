"""A frozen base in float32, bfloat16, int8 and int4: its bytes, the memory of a LoRA step over it, and what is lost.

    python benchmarks/quantized.py --to docs/quantized.md

Memory is the compiler's report of one step on the CPU. The loss is nats a token on Python's language reference, which every Python
ships. Needs the demo model (`make quickstart` installs it).
"""

from __future__ import annotations

import dataclasses
import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import processes
import steps
import tyro

BASES = ("float32", "bfloat16", "int8", "int4")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: int = 4
    """Rows of the step's batch."""
    length: int = 128
    """Tokens a row."""
    text: int = 4096
    """Tokens of text."""
    threads: int = 2
    """CPU threads."""
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: the base of this process.)"""


def measure(o: Options, base: str) -> dict[str, Any]:
    from pydoc_data.topics import topics

    import jax

    from jaxmethods import adapters, models, quantization, tree

    how = {"dtype": jax.numpy.bfloat16} if base == "bfloat16" else {"quantize": None if base == "float32" else base}
    module, params = models.load(steps.MODEL, **how)
    size = lambda keep: sum(x.nbytes for path, x in tree.flatten(params).items() if keep(path))
    linear = lambda path: "/layers/" in path and "_proj/" in path
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    tokens = np.asarray(models.load_tokenizer(steps.MODEL)(text[: 8 * o.text])["input_ids"][: o.text], np.int32)
    tokens = tokens.reshape(-1, 512)
    logps = models.sequence_logps(module, params, tokens, np.arange(512)[None] > np.zeros((len(tokens), 1)))
    compiled = steps.compiled(
        module.clone(remat="dots"), params, {steps.EVERY_LINEAR: adapters.LoRA(rank=16)}, o.rows, o.length
    )
    memory = compiled.memory_analysis()
    return {
        "parameters": quantization.count(params), "bytes": size(lambda path: True), "linear": size(linear),
        "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes,
        "nll": -float(np.sum(logps)) / (tokens.size - len(tokens)),
    }  # fmt: skip


def main(o: Options) -> None:
    if o.child:
        print(json.dumps(measure(o, o.child)))
        return
    given = [f"--{name}={getattr(o, name)}" for name in ("rows", "length", "text", "threads")]
    results = {base: processes.run(__file__, [*given, "--child", base], o.threads, {}) for base in BASES}
    text = table(o, results)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, dict[str, Any]]) -> str:
    from importlib.metadata import version

    lines = [
        "# A quantised frozen base",
        "",
        f"`python benchmarks/quantized.py`, {date.today()}, {processes.cpu()}, jax {version('jax')}. SmolLM2-135M, whose file "
        f"holds 4-bit values; LoRA of rank 16 on every linear layer, {o.rows} x {o.length} tokens, remat dots; {o.text} tokens "
        "of text.",
        "",
        "| base | MB | linear layers, MB | bits a weight there | LoRA step: arguments, MB | temporaries, MB | nats a token |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    weights = results["float32"]["linear"] / 4
    for base, r in results.items():
        mb = {name: f"{r[name] / 1e6:.1f}" for name in ("bytes", "linear", "arguments", "temporaries")}
        lines.append(
            f"| {base} | {mb['bytes']} | {mb['linear']} | {8 * r['linear'] / weights:.1f} | {mb['arguments']} "
            f"| {mb['temporaries']} | {r['nll']:.4f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
