"""Operations in kernels/: what each implementation costs beside the reference, which holds everything.

    python benchmarks/kernels.py --to docs/kernels.md

On the CPU every measurement is a fresh process, and implementations take turns. Where the TPU compiler is installed (pip
install 'jaxmethods[aot]'), its report for TPUs follows: nothing is run there. An operation is one function in OPERATIONS; those of
adapters are compiled for TPUs only, at the sizes of Llama-3-8B's maps (their CPU times are in docs/adapters_speed.md).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import processes
import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    repeats: int = 5
    """Timed runs a process, after one that is not counted."""
    rounds: int = 3
    """Processes of each case."""
    threads: int = 2
    """Threads."""
    topologies: tuple[str, ...] = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
    """TPUs to compile for; one device is used."""
    only: str = ""
    """Only operations that begin with this."""
    to: str | None = None
    """Write the tables into this file, below its line `<!-- tables -->`."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""


@dataclasses.dataclass(frozen=True)
class Work:
    """A function to compile and the shapes of its arguments."""

    run: Callable[..., Any]
    shapes: tuple[Any, ...]
    """Arrays' shapes, in trees."""
    flops: float | None = None
    """Of its matrix products; None where they are not what matters."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """`make(implementation, step, **size) -> Work`, for each of `steps`; the first implementation is compared with."""

    make: Callable[..., Work]
    steps: tuple[str, ...]
    cpu: Mapping[str, Any] | None
    """Sizes; None: not measured there."""
    tpu: Mapping[str, Any]
    on_cpu: tuple[str, ...] = ("reference", "xla")
    on_tpu: tuple[str, ...] = ("reference", "xla")


def token_logprobs(
    implementation: str, step: str, *, tokens: int, dim: int, vocab: int, dtype: str, transposed: bool = False
) -> Work:
    import jax

    from jaxmethods.kernels import token_logprobs as op

    f = functools.partial(op, transposed=transposed, implementation=implementation)
    run = {
        "values": f,
        "and d hidden": lambda h, u, t: jax.value_and_grad(lambda h: f(h, u, t).sum())(h),
        "and both": lambda h, u, t: jax.value_and_grad(lambda h, u: f(h, u, t).sum(), (0, 1))(h, u),
    }[step]
    hidden = jax.ShapeDtypeStruct((tokens, dim), dtype)
    unembedding = jax.ShapeDtypeStruct((vocab, dim) if transposed else (dim, vocab), dtype)
    products = {"values": 1, "and d hidden": 2, "and both": 3 if implementation == "reference" else 4}[step]
    shapes = hidden, unembedding, jax.ShapeDtypeStruct((tokens,), "int32")
    return Work(run, shapes, 2.0 * tokens * dim * vocab * products)


def info_nce(implementation: str, step: str, *, pairs: int, dim: int) -> Work:
    import jax

    from jaxmethods.kernels import info_nce as op

    f = lambda *arrays: op(*arrays, implementation=implementation).mean()
    run = f if step == "values" else jax.value_and_grad(f, (0, 1, 2, 3))
    rows, column = jax.ShapeDtypeStruct((pairs, dim), "float32"), jax.ShapeDtypeStruct((pairs,), "float32")
    # The reference multiplies for rows and columns apart.
    products = {"xla": (1, 4), "reference": (2, 6)}[implementation][step != "values"]
    return Work(run, (rows, rows, column, column), 2.0 * pairs * pairs * dim * products)


def expand(implementation: str, step: str, *, tokens: int, channels: int, d_out: int) -> Work:
    """The backward pass of an adapter's last product, with a bias."""
    import jax

    from jaxmethods.kernels.expand import expand as op

    def run(state: Any, kernel: Any, bias: Any, g: Any) -> Any:
        return jax.vjp(functools.partial(op, implementation=implementation), state, kernel, bias)[1](g)

    shapes = (
        jax.ShapeDtypeStruct((channels, tokens), "bfloat16"), jax.ShapeDtypeStruct((channels, d_out), "float32"),
        jax.ShapeDtypeStruct((d_out,), "float32"), jax.ShapeDtypeStruct((tokens, d_out), "bfloat16"),
    )  # fmt: skip
    return Work(run, shapes, 2.0 * tokens * d_out * (2 * channels + 1))


def smore(implementation: str, step: str, *, tokens: int, d_in: int, d_out: int) -> Work:
    """S'MoRE of one map, s (4, 4), f (2, 2), r (8, 16): d_L = 96."""
    import jax

    from jaxmethods.adapters import SMoRE
    from jaxmethods.adapters import smore as op

    spec = SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(8, 16))

    def run(params: Any, x: Any, g: Any) -> Any:
        value, back = jax.vjp(lambda p, x: op.apply(p, x, spec, implementation=implementation), params, x)
        return value, back((g, jax.numpy.ones((), "float32")))

    params = jax.eval_shape(lambda: op.init(jax.random.key(0), d_in, d_out, spec))
    x, g = (jax.ShapeDtypeStruct((tokens, width), "bfloat16") for width in (d_in, d_out))
    return Work(run, (params, x, g))


def channels(implementation: str, step: str, *, tokens: int, d_in: int, chosen: int, d_out: int) -> Work:
    """S²FT's product with chosen channels of a down projection's input."""
    import jax

    from jaxmethods.kernels.channels import take_channels
    from jaxmethods.kernels.linear import linear

    def value(x: Any, delta: Any, indices: Any) -> Any:
        return linear(take_channels(x, indices, implementation=implementation), delta.astype(x.dtype))

    def both(x: Any, delta: Any, indices: Any, g: Any) -> Any:
        found, back = jax.vjp(lambda x, delta: value(x, delta, indices), x, delta)
        return found, back(g)

    shapes = (
        jax.ShapeDtypeStruct((tokens, d_in), "bfloat16"), jax.ShapeDtypeStruct((chosen, d_out), "float32"),
        jax.ShapeDtypeStruct((chosen,), "int32"), jax.ShapeDtypeStruct((tokens, d_out), "bfloat16"),
    )  # fmt: skip
    own = d_out + (d_in if implementation == "product" else 0)
    if step == "values":
        return Work(value, shapes[:3], 2.0 * tokens * chosen * own)
    return Work(both, shapes, 2.0 * tokens * chosen * (own + d_out + own))


def banked(
    implementation: str, step: str, *, rows: int, adapters: int, d_in: int, d_out: int, transposed: bool = False
) -> Work:
    """One token in each row, each row by an adapter of its own."""
    import jax

    from jaxmethods.kernels.banked import banked_linear

    run = functools.partial(banked_linear, transposed=transposed, implementation=implementation)
    entry = (d_out, d_in) if transposed else (d_in, d_out)
    shapes = (
        jax.ShapeDtypeStruct((rows, 1, d_in), "bfloat16"), jax.ShapeDtypeStruct((adapters, *entry), "float32"),
        jax.ShapeDtypeStruct((rows,), "int32"),
    )  # fmt: skip
    return Work(run, shapes, 2.0 * rows * d_in * d_out)


_KERNEL = ("xla", "pallas_tpu")
_TOKENS = dict(tokens=4096, dim=4096, vocab=128256, dtype="bfloat16")
OPERATIONS = {
    "token_logprobs": Operation(
        token_logprobs, ("values", "and d hidden", "and both"),
        cpu=dict(tokens=1024, dim=576, vocab=49152, dtype="float32"), tpu=_TOKENS, on_tpu=("reference", "xla", "pallas_tpu"),
    ),
    "token_logprobs, tied": Operation(
        token_logprobs, ("values", "and d hidden", "and both"),
        cpu=dict(tokens=1024, dim=576, vocab=49152, dtype="float32", transposed=True), tpu=_TOKENS | {"transposed": True},
        on_tpu=("reference", "xla", "pallas_tpu"),
    ),
    "info_nce": Operation(info_nce, ("values", "and all gradients"), cpu=dict(pairs=4096, dim=768), tpu=dict(pairs=32768, dim=768)),
    **{
        f"expand, {inner} to {d_out}": Operation(
            expand, ("backward",), cpu=None, tpu=dict(tokens=4096, channels=inner, d_out=d_out), on_tpu=_KERNEL,
        )
        for inner, d_out in ((96, 4096), (96, 14336), (430, 4096))
    },
    **{
        f"S'MoRE, 4096 to {d_out}": Operation(
            smore, ("values and all gradients",), cpu=None, tpu=dict(tokens=4096, d_in=4096, d_out=d_out), on_tpu=_KERNEL,
        )
        for d_out in (4096, 14336)
    },
    "channels": Operation(
        channels, ("values", "and all gradients"), cpu=None, tpu=dict(tokens=4096, d_in=14336, chosen=430, d_out=4096),
        on_tpu=("gather", "product"),
    ),
    "banked_linear, S²FT": Operation(
        banked, ("values",), cpu=None, tpu=dict(rows=32, adapters=256, d_in=432, d_out=4096), on_tpu=_KERNEL
    ),
    "banked_linear, LoRA's a": Operation(
        banked, ("values",), cpu=None, tpu=dict(rows=32, adapters=256, d_in=4096, d_out=16, transposed=True), on_tpu=_KERNEL
    ),
    "banked_linear, LoRA's b": Operation(
        banked, ("values",), cpu=None, tpu=dict(rows=32, adapters=256, d_in=16, d_out=4096), on_tpu=_KERNEL
    ),
}  # fmt: skip


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    import jax

    where, name, *case = str(o.child).split("|")
    operation = OPERATIONS[name]
    if where != "cpu":
        cases = [(form, step) for step in operation.steps for form in operation.on_tpu]
        made = {f"{form}|{step}": compiled(operation.make(form, step, **operation.tpu), where) for form, step in cases}
        print(json.dumps(made))
        return
    implementation, step = case
    work = operation.make(implementation, step, **operation.cpu)
    draw = lambda i, x: (
        jax.random.normal(jax.random.key(i), x.shape, x.dtype)
        if jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
        else jax.random.randint(jax.random.key(i), x.shape, 0, 1000, x.dtype)
    )
    arrays = [draw(i, x) for i, x in enumerate(work.shapes)]
    program = jax.jit(work.run).lower(*arrays).compile()
    before = processes.peak_bytes()
    seconds = []
    for _ in range(o.repeats + 1):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - start)
    found = {"seconds": statistics.median(seconds[1:]), "grown": processes.peak_bytes() - before, "flops": work.flops}
    print(json.dumps(found | {"temporaries": program.memory_analysis().temp_size_in_bytes}))


def compiled(work: Work, topology: str) -> dict[str, float]:
    """The TPU compiler's report, and the seconds that published rates allow: of matrix units and of HBM."""
    from jaxmethods.launch import cost, hlo, targets

    program, text = targets.compile_on_one(topology, work.run, *work.shapes)
    kernels = cost.count(work.run, *work.shapes).kernel_bytes
    moved = hlo.memory_traffic(hlo.parse(text), kernels=False) + kernels
    chip = targets.chip_of(targets.devices_of(topology)[0])
    return {
        "temporaries": program.memory_analysis().temp_size_in_bytes, "moved": moved,
        "compute": None if work.flops is None else work.flops / chip.flops, "memory": moved / chip.memory_rate,
    }  # fmt: skip


MARK = "<!-- tables -->"


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    chosen = {name: operation for name, operation in OPERATIONS.items() if name.startswith(o.only)}
    results: dict[str, list[dict[str, float]]] = {}
    run = lambda case: processes.run(
        __file__, [f"--repeats={o.repeats}", f"--child={case}"], o.threads, {"TPU_SKIP_MDS_QUERY": "1"}
    )

    def keep(case: str, found: dict[str, float], turn: int = 0) -> None:
        results.setdefault(case, []).append(found)
        print(f"round {turn + 1} of {o.rounds}: {case} {found}", file=sys.stderr, flush=True)

    for topology in o.topologies if importlib.util.find_spec("libtpu") else ():
        for name in chosen:  # nothing is timed there: one process compiles all forms
            for case, found in run(f"{topology}|{name}").items():
                keep(f"{topology}|{name}|{case}", found)
    measured = [
        f"cpu|{name}|{form}|{step}"
        for name, operation in chosen.items()
        for step in operation.steps
        for form in operation.on_cpu
        if operation.cpu is not None
    ]
    for turn in range(o.rounds):
        for case in measured:
            keep(case, run(case), turn)
    text = table(o, chosen, results)
    print(text)
    if o.to:
        head = Path(o.to).read_text().split(MARK)[0] if Path(o.to).exists() else ""
        Path(o.to).write_text(f"{head}{MARK}\n\n{text}\n")


def table(o: Options, chosen: Mapping[str, Operation], results: dict[str, list[dict[str, float]]]) -> str:
    from importlib.metadata import version

    middle = lambda case, name: statistics.median(found[name] for found in results[case])
    fastest = lambda case: min(found["seconds"] for found in results[case])
    size_of = lambda size: ", ".join(f"{name} {value}" for name, value in size.items())
    lines = [
        "# Tables",
        "",
        f"`python benchmarks/kernels.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, jax {version('jax')}; "
        f"medians of {o.rounds} processes of {o.repeats} runs. The reference holds everything; ratios are of times, in brackets "
        "of the fastest processes. Temporaries are the compiler's report.",
    ]
    for name, operation in chosen.items():
        lines += ["", f"## {name}"]
        if operation.cpu is not None:
            lines += [
                "", f"CPU: {size_of(operation.cpu)}.", "",
                "| step | form | ms | of the reference | temporaries MiB | memory grown MiB |",
                "| --- | --- | ---: | ---: | ---: | ---: |",
            ]  # fmt: skip
        for step in operation.steps if operation.cpu is not None else ():
            base = f"cpu|{name}|{operation.on_cpu[0]}|{step}"
            for form in operation.on_cpu:
                case = f"cpu|{name}|{form}|{step}"
                ratio = f"{middle(case, 'seconds') / middle(base, 'seconds'):.2f} ({fastest(case) / fastest(base):.2f})"
                memory = " | ".join(f"{middle(case, kind) / 2**20:.0f}" for kind in ("temporaries", "grown"))
                lines.append(f"| {step} | {form} | {1e3 * middle(case, 'seconds'):.0f} | {ratio} | {memory} |")
        if any(case.startswith(o.topologies) for case in results):
            lines += ["", f"TPU compiler (libtpu {version('libtpu')}): {size_of(operation.tpu)}.", ""]
            lines += [
                "| TPU | step | form | temporaries MiB | HBM GB | matrix units ms | HBM ms |",
                "| --- | --- | --- | ---: | ---: | ---: | ---: |",
            ]
        for topology in o.topologies:
            for step in operation.steps:
                for form in operation.on_tpu:
                    if found := results.get(f"{topology}|{name}|{form}|{step}"):
                        r = found[0]
                        memory = f"{r['temporaries'] / 2**20:.0f} | {r['moved'] / 1e9:.3f}"
                        compute = "" if r["compute"] is None else f"{1e3 * r['compute']:.2f}"
                        times = f"{compute} | {1e3 * r['memory']:.2f}"
                        lines.append(f"| {topology.split(':')[0]} | {step} | {form} | {memory} | {times} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
