"""The gradient of InfoNCE through an encoder: direct, streamed and cached, and in torch, by batch size, on the CPU.

    python benchmarks/contrastive.py --to docs/contrastive.md

Direct encodes the whole batch and holds all logits; streaming encodes the whole batch and holds blocks of logits (`info_nce`);
cached encodes chunks (`cached_info_nce`). In torch: direct, and GradCache's three steps by hand. Every measurement is a fresh
process; forms take turns; all use the same weights, token ids, float32 and threads, and must find the same loss and gradient
norm. Memory is the process' largest resident size during the calls less its size before them, and what XLA's compiler reserves.

Torch's rows need torch and transformers, and are left out without them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import processes
import tyro

TEMPERATURE = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    batches: tuple[int, ...] = (256, 1024, 4096)
    """Pairs of a batch; each is a case."""
    chunks: tuple[int, ...] = (16, 64, 256)
    """Rows of a chunk, of the cached form; smaller than the batch."""
    torch_chunks: tuple[int, ...] = (64,)
    """The same, of GradCache in torch."""
    length: int = 8
    """Tokens of a row."""
    layers: int = 2
    """Of the encoder, a Llama of width 256, whose last hidden state is the embedding."""
    calls: int = 1
    """Timed calls a process, after one that is not counted."""
    rounds: int = 2
    """Processes of each kind."""
    threads: int = 2
    """Threads of both libraries."""
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""
    folder: str = ""
    """(Of the script itself: the encoder.)"""


def tokens(o: Options, pairs: int) -> np.ndarray:
    """[2, pairs, length]: queries and targets."""
    return np.random.default_rng(0).integers(0, 4096, (2, pairs, o.length)).astype(np.int32)


def save_encoder(o: Options, folder: str) -> None:
    import jax

    from jaxmethods import models

    config = models.DecoderConfig(
        family="llama", vocab_size=4096, hidden_size=256, intermediate_size=512, num_layers=o.layers, num_heads=4,
        num_kv_heads=4, head_dim=64, tie_embeddings=True,
    )  # fmt: skip
    module = models.Decoder(config)
    models.save(folder, module, module.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"])


def in_jax(o: Options, form: str, pairs: int, chunk: int) -> tuple[Callable[[], tuple[float, float]], int]:
    """A call that gives the loss and the gradient's norm, and the bytes that the compiler reserves for it."""
    import jax
    import jax.numpy as jnp
    import optax

    from jaxmethods import kernels, losses, models

    module, params = models.load(o.folder)
    encode = lambda params, rows: module.apply({"params": params}, rows).hidden[:, -1]

    def direct(params: Any, q: Any, t: Any) -> Any:
        q, t = (encode(params, x) for x in (q, t))
        scales = 1 / (TEMPERATURE * jnp.linalg.norm(q, axis=1)), 1 / jnp.linalg.norm(t, axis=1)
        return kernels.info_nce(q, t, *scales, implementation="reference").mean()

    def loss(params: Any, q: Any, t: Any) -> Any:
        if form == "direct":
            return direct(params, q, t)
        if form == "streaming":
            return losses.info_nce(encode(params, q), encode(params, t), temperature=TEMPERATURE)
        return losses.cached_info_nce(encode, params, q, t, chunk=chunk, temperature=TEMPERATURE)

    given = params, *map(jnp.asarray, tokens(o, pairs))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(*given).compile()

    def call() -> tuple[float, float]:
        value, gradient = compiled(*given)
        return float(value), float(optax.global_norm(gradient))

    return call, compiled.memory_analysis().temp_size_in_bytes


def in_torch(o: Options, form: str, pairs: int, chunk: int) -> tuple[Callable[[], tuple[float, float]], int]:
    import torch
    import transformers

    torch.set_num_threads(o.threads)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModel.from_pretrained(o.folder, dtype=torch.float32)
    queries, targets = torch.from_numpy(tokens(o, pairs)).long()
    labels = torch.arange(pairs)
    encode = lambda rows: model(input_ids=rows, use_cache=False).last_hidden_state[:, -1]

    def loss(q: Any, t: Any) -> Any:
        q, t = (torch.nn.functional.normalize(x, dim=1) for x in (q, t))
        logits = q @ t.T / TEMPERATURE
        cross_entropy = torch.nn.functional.cross_entropy
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    def direct() -> Any:
        value = loss(encode(queries), encode(targets))
        value.backward()
        return value

    def cached() -> Any:
        parts = [x.split(chunk) for x in (queries, targets)]
        with torch.no_grad():
            embeddings = [torch.cat([encode(rows) for rows in side]) for side in parts]
        q, t = (x.requires_grad_() for x in embeddings)
        value = loss(q, t)
        value.backward()
        for side, gradient in zip(parts, (q.grad, t.grad), strict=True):
            for rows, part in zip(side, gradient.split(chunk), strict=True):
                (encode(rows) * part).sum().backward()
        return value

    def call() -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        value = {"direct": direct, "cached": cached}[form]()
        return value.item(), torch.sqrt(sum(p.grad.square().sum() for p in model.parameters())).item()

    return call, 0


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    library, form, pairs, chunk = str(o.child).split()
    call, temporaries = {"jax": in_jax, "torch": in_torch}[library](o, form, int(pairs), int(chunk))
    with contextlib.suppress(
        OSError
    ):  # Linux: the largest size so far, in which loading and compiling were, starts anew
        Path("/proc/self/clear_refs").write_text("5")
    before = processes.peak_bytes()
    clocks = []
    for _ in range(o.calls + 1):
        start = time.perf_counter(), time.process_time()
        loss, norm = call()
        clocks.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    seconds, cpu_seconds = (min(times) for times in zip(*clocks[1:], strict=True))
    peak = processes.peak_bytes() - before
    result = {
        "seconds": seconds,
        "cpu": cpu_seconds,
        "peak": peak,
        "temporaries": temporaries,
        "loss": loss,
        "norm": norm,
    }
    print(json.dumps(result))


def run(o: Options, child: str, folder: str) -> dict[str, float]:
    arguments = ["--child", child, "--folder", folder]
    for name in ("length", "layers", "calls", "threads"):
        arguments += [f"--{name}", str(getattr(o, name))]
    return processes.run(__file__, arguments, o.threads, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def cases(o: Options, pairs: int, with_torch: bool) -> list[str]:
    """'library form pairs chunk' of one batch size."""
    forms = [("jax direct", 0), ("jax streaming", 0), *(("jax cached", chunk) for chunk in o.chunks)]
    if with_torch:
        forms += [("torch direct", 0), *(("torch cached", chunk) for chunk in o.torch_chunks)]
    return [f"{form} {pairs} {chunk}" for form, chunk in forms if chunk < pairs]


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    versions, with_torch = f"jax {metadata.version('jax')}", True
    try:
        versions += f", torch {metadata.version('torch')}, transformers {metadata.version('transformers')}"
    except metadata.PackageNotFoundError:
        with_torch = False
        print("torch is not installed: its rows are left out.", file=sys.stderr)
    results: dict[str, list[dict[str, float]]] = {c: [] for pairs in o.batches for c in cases(o, pairs, with_torch)}
    with tempfile.TemporaryDirectory() as folder:
        save_encoder(o, folder)
        for turn in range(o.rounds):
            for case, found in results.items():
                found.append(run(o, case, folder))
                print(f"round {turn + 1} of {o.rounds}: {case} {found[-1]}", file=sys.stderr, flush=True)
    for pairs in o.batches:
        same = [results[case][0] for case in cases(o, pairs, with_torch)]
        for name in ("loss", "norm"):
            values = [found[name] for found in same]
            if not np.allclose(values, values[0], rtol=1e-3):
                sys.exit(f"the forms do not agree on the {name} of {pairs} pairs: {values}")
    text = table(o, results, versions)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, list[dict[str, float]]], versions: str) -> str:
    lines = [
        "# The gradient of InfoNCE through an encoder, by batch size, on the CPU",
        "",
        f"`python benchmarks/contrastive.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, float32, "
        f"GLIBC_TUNABLES=glibc.malloc.hugetlb=1; {versions}. The encoder is a Llama of {o.layers} layers and width 256, rows have "
        f"{o.length} tokens; medians over {o.rounds} process{'es' if o.rounds > 1 else ''}. Temporaries are what XLA's compiler "
        "reserves; peak is the largest resident size during the calls less that before. CPU seconds are of all threads, and suffer "
        "less from what else the machine does. Ratios are to the direct form of the same library.",
        "",
        "| pairs | form | chunk | seconds | ratio | CPU seconds | ratio | temporaries MiB | ratio | peak MiB | ratio |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    middle = lambda case, name: statistics.median(found[name] for found in results[case])

    def cells(case: str, base: str, name: str, unit: int, digits: int) -> str:
        value, of_base = middle(case, name), middle(base, name)
        return f"{value / unit:.{digits}f} | {value / of_base:.2f}" if of_base else " | "

    for case in results:
        library, form, pairs, chunk = case.split()
        base = f"{library} direct {pairs} 0"
        label = form if library == "jax" else {"direct": "direct, torch", "cached": "GradCache, torch"}[form]
        measured = ("seconds", 1, 2), ("cpu", 1, 2), ("temporaries", 2**20, 0), ("peak", 2**20, 0)
        values = " | ".join(cells(case, base, *how) for how in measured)
        lines.append(f"| {pairs} | {label} | {chunk if form == 'cached' else ''} | {values} |")
    most = max(o.batches)
    cached = [(chunk, f"jax cached {most} {chunk}") for chunk in o.chunks if chunk < most]
    over = lambda name, form: ", ".join(
        f"{middle(c, name) / middle(f'jax {form} {most} 0', name):.2f}" for _, c in cached
    )
    lines += [
        "",
        f"{most} pairs in chunks of {', '.join(str(chunk) for chunk, _ in cached)} take {over('seconds', 'direct')} of the direct "
        f"form's seconds, and {over('seconds', 'streaming')} of the streaming form's, whose loss is computed alike (a second "
        f"forward pass is a third more), in {over('temporaries', 'direct')} of the direct form's temporaries. The streaming form "
        f"takes {middle(f'jax streaming {most} 0', 'temporaries') / middle(f'jax direct {most} 0', 'temporaries'):.2f} of them: "
        "it saves logits, not activations.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
