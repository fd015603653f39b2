"""A training step on SmolLM2-135M, here and in transformers + peft on torch, on the CPU, side by side.

    python benchmarks/train_step.py --to docs/train_step.md

Every measurement is a fresh process; the two libraries take turns; both use the same weights, batch, float32 and threads.
Peak memory is the process' largest resident size less that of a process that only imports. Also measured: S'MoRE against
LoRA at (nearly) equal trained parameters, the plain matmul rate of the machine, and compile times at two depths.

Needs the demo model (`make quickstart` installs it) and, for the comparison, torch, transformers, peft and accelerate.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import processes
import steps
import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: int = 4
    """Rows of the batch."""
    length: int = 128
    """Tokens a row."""
    steps: int = 4
    """Timed steps a process, after two that are not counted."""
    rounds: int = 3
    """Processes of each kind."""
    threads: int = 2
    """Threads of both libraries."""
    rank: int = 16
    """Of LoRA on every linear map."""
    remat: str = "dots"
    """What our backward pass computes again: none, dots, full."""
    huge_pages: bool = True
    """Let glibc ask for huge pages for large blocks, in both libraries: most of XLA's page faults go."""
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""
    folder: str = ""
    """(Of the script itself: the model as transformers reads it.)"""


CASES = (
    "jax imports",
    "torch imports",
    "jax lora",
    "torch lora",
    "jax full",
    "torch full",
    "jax lora mlp",
    "jax smore mlp",
    "jax depth 4",
    "jax depth 32",
    "rate matmul",
)


def in_jax(o: Options, case: str) -> dict[str, float]:
    from jaxmethods import adapters

    chosen = {
        "full": {},
        "lora mlp": {steps.MLP: adapters.LoRA(rank=18)},
        "smore mlp": {
            steps.MLP: adapters.SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(1, 2), router_dim=16, gate_dim=16)
        },
    }.get(case, {steps.EVERY_LINEAR: adapters.LoRA(rank=o.rank)})
    if case == "imports":
        import jax

        jax.numpy.zeros(1).block_until_ready()
        return {}
    if case.startswith("depth"):
        return steps.compile_at_depth(chosen, int(case.split()[1]), o.rows, o.length, o.remat)
    return steps.timed(chosen, o.rows, o.length, o.steps, o.remat)


def in_torch(o: Options, case: str) -> dict[str, float]:
    import peft
    import torch
    import transformers

    torch.set_num_threads(o.threads)
    if case == "imports":
        return {}
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(o.folder, dtype=torch.float32)
    if case == "lora":
        names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules=names))
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokens = torch.from_numpy(steps.batch(o.rows, o.length)).long()
    seconds = []
    for n in range(o.steps + 2):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        if n > 1:
            seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "loss": value, "trained": sum(p.numel() for p in trained)}


def matmul_rate(o: Options) -> float:
    """Operations a second of a plain float32 product of the MLP's shape, in JAX."""
    import jax

    x, w = (
        jax.random.normal(jax.random.key(0), (o.rows * o.length, 576)),
        jax.random.normal(jax.random.key(1), (576, 1536)),
    )
    many = jax.jit(lambda x, w: jax.lax.fori_loop(0, 200, lambda _, x: (x @ w)[:, :576] * 0.02, x))
    many(x, w).block_until_ready()
    start = time.perf_counter()
    many(x, w).block_until_ready()
    return 200 * 2 * x.shape[0] * 576 * 1536 / (time.perf_counter() - start)


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    library, case = str(o.child).split(" ", 1)
    measures = {"jax": in_jax, "torch": in_torch, "rate": lambda o, case: {"rate": matmul_rate(o)}}
    result = measures[library](o, case)
    print(json.dumps(result | {"peak": processes.peak_bytes()}))


def run(o: Options, child: str, folder: str) -> dict[str, float]:
    given = dataclasses.asdict(dataclasses.replace(o, child=child, folder=folder, to=None))
    arguments = [f"--{name}={value}" for name, value in given.items() if name != "huge_pages" and value is not None]
    environment = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"} if o.huge_pages else {}
    return processes.run(__file__, arguments, o.threads, environment)


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(f"the comparison needs torch, transformers, peft and accelerate ({error}).")
    from jaxmethods import models

    with tempfile.TemporaryDirectory() as folder:
        module, params = models.load(steps.MODEL)
        models.save(f"{folder}/model", module, params)
        del params
        results: dict[str, list[dict[str, float]]] = {case: [] for case in CASES}
        for turn in range(o.rounds):
            for case in results:
                results[case].append(run(o, case, f"{folder}/model"))
                print(f"round {turn + 1} of {o.rounds}: {case} {results[case][-1]}", file=sys.stderr, flush=True)
    text = table(o, results)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, list[dict[str, float]]]) -> str:
    middle = lambda case, name: statistics.median(r[name] for r in results[case])
    fastest = lambda case: min(r["seconds"] for r in results[case])
    tokens = o.rows * o.length
    over = lambda case: (middle(case, "peak") - middle(case.split(" ")[0] + " imports", "peak")) / 2**20
    rate = max(r["rate"] for r in results["rate matmul"])
    lines = [
        "# A training step on SmolLM2-135M, on the CPU",
        "",
        f"`python benchmarks/train_step.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, float32, remat {o.remat}, "
        f"{'GLIBC_TUNABLES=glibc.malloc.hugetlb=1, ' if o.huge_pages else ''}"
        f"{o.rows} x {o.length} tokens, medians of {o.rounds} processes of {o.steps} steps.",
        "",
        "| step | library | trained | tokens/s | ratio | ratio of the fastest processes | MiB over imports | ratio "
        "| share of matmul rate | compile s |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in ("lora", "full"):
        ours, theirs = f"jax {case}", f"torch {case}"
        for name, label in ((ours, "jaxmethods"), (theirs, "torch + transformers + peft")):
            own = name == ours
            share = middle(ours, "matmul_flops") / middle(name, "seconds") / rate if own else None
            lines.append(
                f"| {case} | {label} | {middle(name, 'trained'):,.0f} | {tokens / middle(name, 'seconds'):.0f} "
                f"| {middle(theirs, 'seconds') / middle(ours, 'seconds') if own else 1:.2f} "
                f"| {fastest(theirs) / fastest(ours) if own else 1:.2f} | {over(name):.0f} "
                f"| {over(ours) / over(theirs) if own else 1:.2f} | {f'{share:.0%}' if share else ''} "
                f"| {format(middle(ours, 'compile'), '.1f') if own else ''} |"
            )
    smore, lora = "jax smore mlp", "jax lora mlp"
    lines += [
        "",
        f"S'MoRE's step on the MLPs ({middle(smore, 'trained'):,.0f} trained) takes "
        f"{middle(smore, 'seconds') / middle(lora, 'seconds'):.2f} x the time of LoRA's ({middle(lora, 'trained'):,.0f} trained); "
        f"it compiles in {middle(smore, 'compile'):.1f} s, LoRA's in {middle(lora, 'compile'):.1f} s.",
        "",
        f"Compiling the LoRA step takes {middle('jax depth 4', 'compile'):.1f} s at 4 layers, "
        f"{middle('jax depth 32', 'compile'):.1f} s at 32: "
        f"{middle('jax depth 32', 'compile') / middle('jax depth 4', 'compile'):.2f} x.",
        "",
        f"Plain matmul rate: {rate / 1e9:.0f} GFLOP/s ({tokens} x 576 by 576 x 1536, float32, in JAX).",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
