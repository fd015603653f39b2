"""Adapters' training steps and serving on SmolLM2-135M, on the CPU: what each costs beside its neighbours.

    python benchmarks/adapters.py --to docs/adapters_speed.md

Every measurement is a fresh process, and kinds take turns. Three comparisons:

1. full fine-tuning, LoRA and S²FT of equal trained parameters (the paper's recipe for Llama-3, the down projections; and for
   Llama-2, heads of o and channels of down);
2. S'MoRE, MixLoRA of equal parameters, and S'MoRE's equations written down plainly in three ways, with gathers and einsums;
3. a forward pass of 256 rows, each through one of 1, 16 or 256 adapters, LoRA and S²FT of equal size.

Needs the demo model (`make quickstart` installs it).
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
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
    """Threads."""
    remat: str = "dots"
    """What the backward pass computes again: none, dots, full."""
    only: str = ""
    """Only cases that begin with this."""
    to: str | None = None
    """Write the tables to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""


TRAINED = ("full", "lora down", "s2ft down", "lora", "s2ft", "s2ft permuted")
MIXED = ("mixlora", "smore", "smore gathered", "smore tree", "smore literal")
BANKS = (1, 16, 256)
CASES = (
    "imports", *(f"train {name}" for name in (*TRAINED, *MIXED)),
    *(f"serve {name} {size}" for size in BANKS for name in ("lora", "s2ft")),
)  # fmt: skip


def kinds(name: str) -> dict[str, Any]:
    """Adapters of one of the kinds, in equal sizes: 27,456 and 27,648 numbers a layer (3.1% of the channels), then 55,296 twice."""
    from jaxmethods.adapters import S2FT, LoRA, MixLoRA, SMoRE

    spec = dict(experts=(4, 4), fanout=(2, 2), ranks=(8, 8), router_dim=16, gate_dim=16)
    return {
        "full": {},
        "lora down": {"down_proj": LoRA(rank=13)},
        "s2ft down": {"down_proj": S2FT(count=48)},
        "lora": {"(q|k|v|up|down)_proj": LoRA(rank=8)},
        "s2ft": {"o_proj": S2FT(count=1, unit="head"), "down_proj": S2FT(count=32)},
        "s2ft permuted": {"down_proj": S2FT(count=48)},
        "mixlora": {steps.MLP: MixLoRA(experts=4, fanout=2, rank=16, router_dim=16, gate_dim=16)},
        "smore": {steps.MLP: SMoRE(**spec)},
        "smore gathered": {steps.MLP: gathered(spec, "outputs")},
        "smore tree": {steps.MLP: gathered(spec, "b")},
        "smore literal": {steps.MLP: gathered(spec, "a and b")},
    }[name]


def gathered(spec: dict[str, Any], form: str) -> Any:
    """S'MoRE as one would first write it, tokens first: top-k, gathers by index, einsums.

    What is gathered for the nodes of each token's tree:
        outputs: every expert is computed for every token first (the released code's "subgraph" mode).
        b: the experts' matrices B; A of all experts is still one product (its "tree" mode).
        a and b: the experts' matrices A and B, which is the sum over a node's children as the paper prints it.
    """
    import jax
    import jax.numpy as jnp

    from jaxmethods.adapters import Result, SMoRE

    @dataclasses.dataclass(frozen=True)
    class Gathered(SMoRE):
        def apply(self, leaves: Any, call: Any) -> Any:
            x = call.x.reshape(-1, call.x.shape[-1])
            experts, router = leaves["experts"], leaves["router"]
            valid = jnp.ones(len(x), bool) if call.token_mask is None else call.token_mask.reshape(-1)
            context = x @ router["down"]["kernel"] + router["down"]["bias"]
            routes, loss = {}, 0.0
            for layer in reversed(range(self.layers)):
                gate = router["gate"][str(layer)]
                hidden = jax.nn.relu(context @ gate["hidden"]["kernel"] + gate["hidden"]["bias"])
                query = hidden @ gate["query"]["kernel"] + gate["query"]["bias"]
                probabilities = jax.nn.softmax(jnp.einsum("...m,sm->...s", query, gate["keys"]), -1)
                scores, indices = jax.lax.top_k(probabilities, self.children[layer])
                routes[layer] = indices, scores / scores.sum(-1, keepdims=True)
                mask = valid.reshape(-1, *[1] * (probabilities.ndim - 1))
                share = (
                    (jax.nn.one_hot(indices, self.experts[layer]).sum(-2) * mask)
                    .reshape(-1, self.experts[layer])
                    .sum(0)
                )
                mass = (probabilities * mask).reshape(-1, self.experts[layer]).sum(0)
                rows = jnp.maximum(valid.sum(), 1) * (probabilities[0].size // self.experts[layer])
                loss += self.balance_weight * self.experts[layer] * (share * mass).sum() / rows**2
                context = jnp.broadcast_to(context[..., None, :], (*indices.shape, context.shape[-1]))
                context = jnp.concatenate([context, gate["keys"][indices]], -1)
            ends = np.cumsum([s * r for s, r in zip(self.experts, self.ranks, strict=True)])[:-1]
            if form == "a and b":
                down = [jnp.split(experts["a"][name], ends, -1) for name in ("kernel", "bias")]
            else:
                terms = jnp.split(x @ experts["a"]["kernel"] + experts["a"]["bias"], ends, -1)
            state = None
            for layer in range(self.layers):
                (indices, scores), b, s = routes[layer], experts["b"][str(layer)], self.experts[layer]
                nodes = indices.reshape(len(x), -1)
                if form == "a and b":
                    kernel, bias = (part[layer].reshape(-1, s, part[layer].shape[-1] // s) for part in down)
                    chosen = jnp.einsum("nc,nkcr->nkr", x, kernel.swapaxes(0, 1)[nodes]) + bias[0][nodes]
                else:
                    own = terms[layer].reshape(len(x), s, -1)
                if form == "b":
                    chosen = jnp.take_along_axis(own, nodes[..., None], 1)
                if form != "outputs":
                    flat = jnp.einsum("nkr,nkrd->nkd", chosen, b["kernel"][nodes]) + b["bias"][nodes]
                else:
                    outputs = jnp.einsum("nsr,srd->nsd", own, b["kernel"]) + b["bias"]
                    flat = jnp.take_along_axis(outputs, nodes[..., None], 1)
                picked = flat.reshape(*indices.shape, -1)
                if state is not None:
                    w = experts["w"][str(layer)]
                    picked = picked + state @ w["kernel"] + w["bias"]
                state = (scores[..., None] * jnp.tanh(picked)).sum(-2)
            delta = state @ experts["proj"]["kernel"] + experts["proj"]["bias"]
            return Result(call.y + delta.reshape(call.y.shape), loss)

    return Gathered(**spec)


def serve(name: str, size: int, count: int) -> dict[str, float]:
    """Seconds of a forward pass of one token in each of 256 rows, row n by adapter n % size."""
    import jax

    from jaxmethods import adapters, models
    from jaxmethods.adapters import S2FT, LoRA

    adapter = {"lora": LoRA(rank=8), "s2ft": S2FT(count=29)}[name]  # 16,896 and 16,704 numbers a layer
    module, base = models.load(steps.MODEL)
    adapted = adapters.attach(module, {"down_proj": adapter})
    made = adapters.init(adapted, base, jax.random.key(0))
    trained = sum(x.size for x in jax.tree.leaves(adapters.partition(made)[0]))
    served, params = adapters.bank(adapted, [made] * size)
    del made
    rows = np.arange(256, dtype=np.int32) % size
    tokens = steps.batch(256, 1)
    run = jax.jit(lambda params, rows: models.hidden_states(served, adapters.for_rows(params, rows), tokens)[0])
    seconds = []
    for _ in range(count + 2):
        start = time.perf_counter()
        jax.block_until_ready(run(params, rows))
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds[2:]), "trained": trained}


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    work, *rest = str(o.child).split()
    if work == "serve":
        result = serve(rest[0], int(rest[1]), 4 * o.steps)
    elif work == "train":
        prepare = None
        if rest[-1] == "permuted":
            from jaxmethods import adapters

            prepare = adapters.s2ft.permute
        result = steps.timed(kinds(" ".join(rest)), o.rows, o.length, o.steps, o.remat, prepare)
    else:
        import jax

        jax.numpy.zeros(1).block_until_ready()
        result = {}
    print(json.dumps(result | {"peak": processes.peak_bytes()}))


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    cases = [case for case in CASES if case == "imports" or case.startswith(o.only)]
    results: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for turn in range(o.rounds):
        for case in cases:
            given = dataclasses.asdict(dataclasses.replace(o, child=case, to=None))
            arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
            results[case].append(
                processes.run(__file__, arguments, o.threads, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
            )
            print(f"round {turn + 1} of {o.rounds}: {case} {results[case][-1]}", file=sys.stderr, flush=True)
    text = table(o, results)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, list[dict[str, float]]]) -> str:
    from importlib.metadata import version

    middle = lambda case, name: statistics.median(r[name] for r in results[case])
    fastest = lambda case: min(r["seconds"] for r in results[case])
    lines = [
        "# What adapters cost, on the CPU",
        "",
        f"`python benchmarks/adapters.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, float32, "
        f"jax {version('jax')}, remat {o.remat}, GLIBC_TUNABLES=glibc.malloc.hugetlb=1, SmolLM2-135M, "
        f"{o.rows} x {o.length} tokens, medians of {o.rounds} processes of {o.steps} steps. "
        "Ratios are of times: above 1 is slower than what it is compared with; in brackets those of the fastest processes.",
    ]

    def section(title: str, names: tuple[str, ...], against: tuple[str, ...]) -> None:
        found = [f"train {name}" for name in names if f"train {name}" in results]
        if not found:
            return
        to = [f"train {name}" for name in against if f"train {name}" in results]
        lines.extend(
            [
                "",
                f"## {title}",
                "",
                f"| step | trained | seconds | {' | '.join(f'of {t[6:]}' for t in to)} | MiB over imports | matmul GFLOP |",
            ]
        )
        lines.append(f"| --- | ---: | ---: | {' | '.join('---:' for _ in to)} | ---: | ---: |")
        for case in found:
            ratios = [
                f"{middle(case, 'seconds') / middle(t, 'seconds'):.2f} ({fastest(case) / fastest(t):.2f})" for t in to
            ]
            over = (middle(case, "peak") - middle("imports", "peak")) / 2**20
            lines.append(
                f"| {case[6:]} | {middle(case, 'trained'):,.0f} | {middle(case, 'seconds'):.2f} | {' | '.join(ratios)} "
                f"| {over:.0f} | {middle(case, 'matmul_flops') / 1e9:.0f} |"
            )

    section("S²FT, LoRA and full fine-tuning", TRAINED, ("full", "lora down", "lora"))
    section(
        "S'MoRE, MixLoRA, and S'MoRE written down plainly",
        MIXED,
        ("mixlora", "smore gathered", "smore tree", "smore literal"),
    )
    served = [size for size in BANKS if f"serve s2ft {size}" in results]
    if served:
        lines += [
            "", "## Many adapters in a batch", "", "256 rows of one token, on the down projections.", "",
            "| adapters | LoRA s | S²FT s | S²FT of LoRA |", "| ---: | ---: | ---: | ---: |",
        ]  # fmt: skip
    for size in served:
        ours, theirs = f"serve s2ft {size}", f"serve lora {size}"
        ratio = f"{middle(ours, 'seconds') / middle(theirs, 'seconds'):.2f} ({fastest(ours) / fastest(theirs):.2f})"
        lines.append(f"| {size} | {middle(theirs, 'seconds'):.3f} | {middle(ours, 'seconds'):.3f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
