"""Memory of a training step of Llama-3-8B by the TPU compiler's report: full fine-tuning, LoRA and S²FT of equal size.

    pip install libtpu                                  # the compiler; no TPU is needed
    python benchmarks/adapters_memory.py --to docs/adapters_memory.md

The setting is that of the S²FT paper's efficiency figure: one device, lengths 512 and 1024, one or two rows, no rematerialisation,
weights in bfloat16; trained parameters and Adam's moments are float32 here. S²FT is its recipe for Llama-3-8B (down
projections, 3% of the channels), LoRA that of the paper (rank 32 on q, k, v, up and down). S'MoRE and MixLoRA are of equal size, on
the three maps of every MLP. Nothing is run: bytes are the compiler's own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path

import tyro

MODEL = "meta-llama/Meta-Llama-3-8B"
CASES = ("full", "lora", "s2ft", "mixlora", "smore")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled."""

    lengths: tuple[int, ...] = (512, 1024)
    """Tokens a row."""
    rows: tuple[int, ...] = (1, 2)
    """Rows of the batch."""
    topology: str = "v5p:2x2x1"
    """The TPU. One chip is used, but four for full fine-tuning, which one cannot hold: `tensor=4`, and the report times four."""
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: what this process compiles.)"""


def compile_step(o: Options, case: str, rows: int, length: int) -> dict[str, float]:
    import jax
    from jax.experimental import topologies

    from jaxmethods import adapters, models, sharding
    from jaxmethods.data import Data
    from jaxmethods.launch import Mesh, Run
    from jaxmethods.launch.assembly import assemble

    chosen = {
        "full": {},
        "lora": {"(q|k|v|up|down)_proj": adapters.LoRA(rank=32, alpha=64)},
        "s2ft": {"down_proj": adapters.S2FT(fraction=0.03)},
        "mixlora": {"mlp/(gate|up|down)_proj": adapters.MixLoRA(experts=4, fanout=2, rank=32)},
        "smore": {"mlp/(gate|up|down)_proj": adapters.SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(16, 16))},
    }[case]
    chips = 4 if case == "full" else 1
    run = Run(
        model=MODEL, data=Data(train="none.jsonl", sequence_length=length), workdir="none", adapters=chosen, steps=100,
        batch_size=rows, mesh=Mesh(data=1, fsdp=1, tensor=chips), compute_dtype="bfloat16", param_dtype="bfloat16", remat="none",
    )  # fmt: skip
    devices = topologies.get_topology_desc(platform="tpu", topology_name=o.topology).devices[:chips]
    mesh = sharding.make_mesh({"tensor": chips}, devices)
    module, params = models.shapes(MODEL, dtype=jax.numpy.bfloat16)
    made = assemble(run, module, params, mesh)
    trained = sum(x.size for x in jax.tree.leaves(made.state.trained))
    memory = made.step.lower(made.state, made.frozen, made.batch()).compile().memory_analysis()
    output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes + output
    return {"trained": trained, "peak": chips * peak, "temporaries": chips * memory.temp_size_in_bytes, "chips": chips}


def main(o: Options) -> None:
    if o.child:
        case, rows, length = o.child.split()
        print(json.dumps(compile_step(o, case, int(rows), int(length))))
        return
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "HF_HUB_OFFLINE": "1"}
    results = {}
    for length in o.lengths:
        for rows in o.rows:
            for case in CASES:
                child = [f"--topology={o.topology}", f"--child={case} {rows} {length}"]
                done = subprocess.run(
                    [sys.executable, __file__, *child], env=environment, capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(f"{case} failed:\n{done.stderr[-3000:]}")
                results[length, rows, case] = json.loads(done.stdout.splitlines()[-1])
                print(length, rows, case, results[length, rows, case], file=sys.stderr, flush=True)
    text = table(o, results)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[tuple[int, int, str], dict[str, float]]) -> str:
    from importlib.metadata import version

    lines = [
        "# Memory of a training step of Llama-3-8B",
        "",
        f"`python benchmarks/adapters_memory.py`, {date.today()}, the TPU compiler's report for {o.topology.split(':')[0]} "
        f"(libtpu {version('libtpu')}, jax {version('jax')}); bfloat16 weights, float32 trained leaves and moments, no "
        "rematerialisation.",
        "",
        "| length | rows | step | trained | GiB | of full | of LoRA | of MixLoRA |",
        "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for (length, rows, case), result in results.items():
        peak = lambda name, length=length, rows=rows: results[length, rows, name]["peak"]
        ratios = " | ".join(f"{result['peak'] / peak(other):.2f}" for other in ("full", "lora", "mixlora"))
        star = "*" if result["chips"] > 1 else ""
        lines.append(
            f"| {length} | {rows} | {case}{star} | {result['trained']:,} | {result['peak'] / 2**30:.1f} | {ratios} |"
        )
    lines += ["", "\\* One chip cannot hold it: four with `tensor=4`, their bytes added up."]
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
