"""What the TPU compiler makes of the adapters' ops: bytes of main memory and temporaries of each implementation.

    pip install libtpu                                  # the compiler; no TPU is needed
    python benchmarks/kernels_adapters.py --to docs/kernels_adapters.md

Nothing is run. Bytes are read from the compiled program (`launch.hlo.memory_traffic`), kernels included; of `banked_linear`, which
reads a few entries of a bank, those entries are counted. Sizes are those of Llama-3-8B's maps at
4096 tokens in bfloat16, parameters in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import tyro

TOKENS = 4096


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled."""

    topologies: tuple[str, ...] = ("v5e:1x1", "v5p:2x2x1", "v6e:1x1")
    """One device of each."""
    ops: tuple[str, ...] = ("expand", "smore", "channels", "banked")
    """Which ops; "smore" takes a minute for each case."""
    to: str | None = None
    """Put the table into this file, below its line `<!-- table -->`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One function of arrays, in some implementations."""

    op: str
    shape: str
    forms: dict[str, Callable[..., Any]]
    shapes: tuple[Any, ...]


def expand_cases() -> Iterator[Case]:
    """The backward pass of S'MoRE's last product, 96 channels and a bias, and of one as wide as S²FT's."""
    import jax
    import jax.numpy as jnp

    from jaxmethods.kernels.expand import expand

    def backward(implementation: str, state: Any, kernel: Any, bias: Any, g: Any) -> Any:
        return jax.vjp(functools.partial(expand, implementation=implementation), state, kernel, bias)[1](g)

    for channels, d_out in ((96, 4096), (96, 14336), (430, 4096)):
        shapes = (
            _shape((channels, TOKENS)), _shape((channels, d_out), jnp.float32), _shape((d_out,), jnp.float32),
            _shape((TOKENS, d_out)),
        )  # fmt: skip
        forms = {name: functools.partial(backward, name) for name in ("xla", "pallas_tpu")}
        yield Case("expand, backward", f"{channels} to {d_out}", forms, shapes)


def smore_cases() -> Iterator[Case]:
    """S'MoRE s (4, 4), f (2, 2), r (8, 16): value and all gradients of one adapted map."""
    import jax
    import jax.numpy as jnp

    from jaxmethods.adapters import SMoRE, smore

    spec = SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(8, 16))

    def both(implementation: str, params: Any, x: Any, g: Any) -> Any:
        run = lambda params, x: smore.apply(params, x, spec, implementation=implementation)
        value, back = jax.vjp(run, params, x)
        return value, back((g, jnp.ones((), jnp.float32)))

    for d_out in (4096, 14336):
        params = jax.eval_shape(lambda d_out=d_out: smore.init(jax.random.key(0), 4096, d_out, spec))
        forms = {name: functools.partial(both, name) for name in ("xla", "pallas_tpu")}
        yield Case(
            "smore.apply, value and gradients", f"4096 to {d_out}", forms,
            (params, _shape((TOKENS, 4096)), _shape((TOKENS, d_out))),
        )  # fmt: skip


def channels_cases() -> Iterator[Case]:
    """S²FT's product with 3% of a down projection's input: forward, and with all gradients."""
    import jax
    import jax.numpy as jnp

    from jaxmethods.kernels.channels import take_channels
    from jaxmethods.kernels.linear import linear

    def forward(implementation: str, x: Any, delta: Any, indices: Any) -> Any:
        return linear(take_channels(x, indices, implementation=implementation), delta.astype(x.dtype))

    def both(implementation: str, x: Any, delta: Any, indices: Any, g: Any) -> Any:
        value, back = jax.vjp(lambda x, delta: forward(implementation, x, delta, indices), x, delta)
        return value, back(g)

    shapes = (_shape((TOKENS, 14336)), _shape((430, 4096), jnp.float32), _shape((430,), jnp.int32))
    names = ("gather", "product")
    yield Case(
        "S²FT's input side, value", "430 of 14336 to 4096", {n: functools.partial(forward, n) for n in names}, shapes
    )
    yield Case(
        "S²FT's input side, value and gradients", "430 of 14336 to 4096", {n: functools.partial(both, n) for n in names},
        (*shapes, _shape((TOKENS, 4096))),
    )  # fmt: skip


def banked_cases() -> Iterator[Case]:
    """32 rows decode, each with one of 256 adapters: S²FT's 432 channels, and each product of LoRA's pair of rank 16."""
    import jax.numpy as jnp

    from jaxmethods.kernels.banked import banked_linear

    for d_in, d_out, transposed in ((432, 4096, False), (4096, 16, True), (16, 4096, False)):
        forms = {
            name: functools.partial(banked_linear, transposed=transposed, implementation=name)
            for name in ("xla", "pallas_tpu")
        }
        entry = (d_out, d_in) if transposed else (d_in, d_out)
        yield Case(
            "banked_linear", f"32 rows, {d_in} to {d_out}", forms,
            (_shape((32, 1, d_in)), _shape((256, *entry), jnp.float32), _shape((32,), jnp.int32)),
        )  # fmt: skip


CASES = {"expand": expand_cases, "smore": smore_cases, "channels": channels_cases, "banked": banked_cases}


def _shape(shape: tuple[int, ...], dtype: Any = "bfloat16") -> Any:
    import jax

    return jax.ShapeDtypeStruct(shape, dtype)


def compile_for(topology: str, function: Callable[..., Any], shapes: tuple[Any, ...]) -> tuple[float, float]:
    """(bytes of main memory, of temporaries) of one run, in MB."""
    from jaxmethods.launch import hlo, targets

    compiled, text = targets.compile_on_one(topology, function, *shapes)
    program = hlo.parse(text)
    traffic = hlo.memory_traffic(program)
    for call, computation, times in hlo.runs(program):
        if call.opcode == "custom-call" and call.name.startswith("banked_linear"):
            # The text says that the bank is read whole: of the blocks a kernel reads only its grid tells.
            bank = computation[call.operands[2]]
            entry = bank.bytes // int(bank.shape.split("[")[1].split(",")[0])
            rows = int(call.shape.split("[")[1].split(",")[0])
            traffic += times * (rows * entry - bank.bytes)
    return traffic / 1e6, compiled.memory_analysis().temp_size_in_bytes / 1e6


def main(o: Options) -> None:
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1"}
    from importlib.metadata import version

    lines = [
        f"`python benchmarks/kernels_adapters.py`, {date.today()}, libtpu {version('libtpu')}, jax {version('jax')}.",
        "",
        "| op | shape | target | form | MB moved | MB of temporaries |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for name in o.ops:
        for case in CASES[name]():
            for topology in o.topologies:
                for form, function in case.forms.items():
                    moved, temporaries = compile_for(topology, function, case.shapes)
                    target = topology.split(":")[0]
                    lines.append(f"| {case.op} | {case.shape} | {target} | {form} | {moved:.1f} | {temporaries:.1f} |")
                    print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if o.to:
        head = Path(o.to).read_text().split("<!-- table -->")[0]
        Path(o.to).write_text(f"{head}<!-- table -->\n\n{text}")


if __name__ == "__main__":
    main(tyro.cli(Options))
