"""How a training step of Llama-3 grows: memory, FLOPs, collectives and the roofline against chips, depth, batch and length.

    pip install 'jaxmethods[aot]'                       # the TPU compiler; no TPU is needed
    python benchmarks/scaling.py --to docs/pods.md

Each row is one `jaxmethods plan CONFIG --topology ... --json` in a process of its own, kept in `--rows` with its date, the
compiler's version and the processor, and the processor's seconds that the whole process took: what other work on the machine
stretches least. The same command goes on where it stopped and compiles only rows that are missing;
`--only NAME` takes one table. Of the file `--to`, what stands under the line that `MARK` names is written anew, and the picture
beside it; the words above it are kept. Nothing is run: bytes and programs are the compiler's own, rates are published ones.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import processes
import tyro

ROOT = Path(__file__).parents[1]
MARK = "<!-- python benchmarks/scaling.py writes what follows -->"

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_theta": 500_000.0,
}  # fmt: skip
_8B = _LLAMA | {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {f"llama3_8b_{n}_layers": _8B | {"num_hidden_layers": n} for n in (8, 64)} | {
    "llama2_70b": _LLAMA | {
        "vocab_size": 32_000, "hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_hidden_layers": 80, "rope_theta": 10_000.0,
    },
}  # fmt: skip
"""Architectures that no recipe names, by the name of a folder that holds nothing but their config.json."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One compilation: `jaxmethods plan configs/RECIPE.py --topology TOPOLOGY` with overrides."""

    recipe: str
    topology: str
    batch_size: int | None = None
    """Rows a step; None: the recipe's own."""
    length: int | None = None
    model: str | None = None
    """A key of `MODELS`; None: the recipe's own."""
    mesh: str | None = None
    """As the command line takes it; None: the recipe's own, all devices on `fsdp`."""

    def arguments(self, folder: Path) -> list[str]:
        found = [f"configs/{self.recipe}.py", "--topology", self.topology]
        for flag, value in (
            ("--batch-size", self.batch_size),
            ("--data.sequence-length", self.length),
            ("--mesh", self.mesh),
        ):
            found += [] if value is None else [flag, str(value)]
        return found + ([] if self.model is None else ["--model", str(folder / self.model)])


LORA, FULL = "llama3_8b_lora", "llama3_8b_full"
TABLES: dict[str, tuple[Case, ...]] = {
    "required": (
        *(
            Case(recipe, topology, batch_size)
            for topology, batch_size in (
                ("v5p:4x4x4", None),
                ("v5p:8x8x8", 512),
                ("v5e:16x16", 256),
                ("v6e:16x16", 256),
            )
            for recipe in (LORA, FULL, "llama3_8b_smore", "llama3_8b_s2ft")
        ),
        Case("llama3_70b_lora", "v5p:8x8x8"),
        Case("llama3_70b_full", "v5p:8x8x8"),
    ),
    "chips": tuple(
        Case(recipe, topology, 512) for recipe in (LORA, FULL) for topology in ("v5p:4x4x4", "v5p:4x8x8", "v5p:8x8x8")
    ),
    "published": (
        Case(FULL, "v6e:16x16", 1024, 8192),
        Case(FULL, "v5p:4x8x8", 1024, 4096, "llama2_70b"),
    ),
    "length": tuple(Case(LORA, "v5p:4x4x4", None, length) for length in (2048, None, 8192)),
    "batch": tuple(Case(LORA, "v5p:4x4x4", rows) for rows in (None, 256, 512)),
    "mesh": tuple(Case(LORA, "v5p:8x8x8", 512, mesh=mesh) for mesh in (None, "data=8,fsdp=64")),
    "depth": tuple(
        Case(LORA, "v5p:4x4x4", model=model) for model in ("llama3_8b_8_layers", None, "llama3_8b_64_layers")
    ),
}
SAYS = {
    "required": "The recipes on pods",
    "chips": "More chips, 512 rows of 4096",
    "published": "As MaxText's recipes",
    "length": "Longer rows, 128 of them",
    "batch": "More rows of 4096",
    "mesh": "Parameters over two of the torus' axes, and over all three",
    "depth": "More layers (the recipe has 32)",
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is compiled."""

    only: str | None = None
    """One of the tables; by default all."""
    rows: str = "benchmarks/results/scaling.jsonl"
    """Where finished rows are kept."""
    to: str | None = None
    """Write the tables to this Markdown file, and the picture beside it."""


def main(o: Options) -> None:
    os.chdir(ROOT)
    if o.only is not None and o.only not in TABLES:
        sys.exit(f"--only {o.only}: the tables are {', '.join(TABLES)}.")
    done = read(Path(o.rows))
    wanted = dict.fromkeys(case for name, cases in TABLES.items() if o.only in (None, name) for case in cases)
    with tempfile.TemporaryDirectory() as folder:
        for name, config in MODELS.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config))
        for case in wanted:
            if case not in done:
                done[case] = row = compiled(case, Path(folder))
                with open(o.rows, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(
                    case, row["compile_seconds"], "s,", row["bytes_per_device"]["total"] / 2**30, "GiB", file=sys.stderr
                )
    text = "\n".join(
        table(name, [done[case] for case in cases if case in done], len(cases)) for name, cases in TABLES.items()
    )
    print(text)
    if o.to:
        page = Path(o.to)
        kept = page.read_text().split(MARK)[0] if page.is_file() else ""
        page.write_text(f"{kept}{MARK}\n\n{text}")
        draw(done, page.with_suffix(".png"))


def read(path: Path) -> dict[Case, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines]
    return {Case(**row["case"]): row for row in rows}


def compiled(case: Case, folder: Path) -> dict[str, Any]:
    """Plans one case in a process of its own."""
    line = [sys.executable, "-m", "jaxmethods.launch.cli", "plan", *case.arguments(folder), "--json"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = used()
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout)
    kept = (
        "fits", "bytes_per_device", "state_bytes_per_device", "flops_per_device", "collectives", "roofline",
        "step_seconds_roofline", "bound", "compile_seconds", "processor_seconds", "tokens_per_step", "devices",
        "memory_traffic_per_device",
    )  # fmt: skip
    found["processor_seconds"] = round(used() - before, 1)
    made = {"date": str(date.today()), "libtpu": version("libtpu"), "jax": version("jax"), "cpu": processes.cpu()}
    return {"case": dataclasses.asdict(case), "made": made} | {name: found[name] for name in kept}


def table(name: str, rows: list[dict[str, Any]], planned: int) -> str:
    if not rows:
        return f"## {SAYS[name]}\n\nNone of {planned} rows has been compiled yet.\n"
    missing = f" {planned - len(rows)} of {planned} rows have not been compiled yet." if len(rows) < planned else ""
    made = [row["made"] for row in rows]
    each = lambda key: ", ".join(sorted({m[key] for m in made}))
    lines = [
        f"## {SAYS[name]}",
        "",
        f"{each('date')}, libtpu {each('libtpu')}, jax {each('jax')}, compiled on two cores of: {each('cpu')}.{missing}",
        "",
        "| step | target | rows x length | fits | state, GiB | temporaries, GiB | total of limit, GiB | TFLOPs | sent, GiB: "
        "all-gather, all-reduce, reduce-scatter, other | seconds: compute, memory, links | bound | compiled in, processor s |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | --- | ---: |",
    ]
    return "\n".join(lines + [_line(row) for row in rows]) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    case, needs = row["case"], row["bytes_per_device"]
    gib = lambda n: f"{n / 2**30:.2f}"
    state = sum(row["state_bytes_per_device"].values())
    rows = case["batch_size"] or _own(case["recipe"]).batch_size
    sent = {kind: found["bytes_sent"] for kind, found in (row["collectives"] or {}).items()}
    kinds = ("all-gather", "all-reduce", "reduce-scatter")
    told = [sent.get(kind, 0) for kind in kinds] + [sum(n for kind, n in sent.items() if kind not in kinds)]
    rates = ", ".join(
        f"{row['roofline'][part]:.2f}" for part in ("compute", "memory", "interconnect") if part in row["roofline"]
    )
    cells = (
        " ".join(filter(None, (case["model"] or case["recipe"], case["mesh"]))), case["topology"],
        f"{rows} x {row['tokens_per_step'] // rows}",
        "yes" if row["fits"] else "no",
        gib(state), gib(needs["total"] - state), f"{gib(needs['total'])} of {gib(needs['limit'])}",
        f"{row['flops_per_device'] / 1e12:.0f}", ", ".join(map(gib, told)), rates, row["bound"],
        f"{row['processor_seconds']:.0f}",
    )  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def _own(recipe: str) -> Any:
    from jaxmethods.launch.config import load_config

    return load_config(f"configs/{recipe}.py")


def draw(done: Mapping[Case, Mapping[str, Any]], path: Path) -> None:
    """Memory of a device, and seconds of a step, as the pod grows and the batch does not; of recipes with rows to compare."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    from jaxmethods.launch import plan

    colours = {"frozen": "#9aa5b1", "trained": "#2f6fb3", "optimizer": "#7fb0de", "temporaries": "#e9b44c"}
    lines = {"compute": ("#22262b", "o"), "memory": ("#e9b44c", "s"), "interconnect": ("#b3261e", "^")}
    grown = {
        recipe: [case for case in TABLES["chips"] if case.recipe == recipe and case in done] for recipe in (LORA, FULL)
    }
    grown = {recipe: cases for recipe, cases in grown.items() if len(cases) > 1}
    if not grown:
        return
    figure = Figure(figsize=(4.7 * len(grown), 6.4), dpi=150, layout="constrained")
    panels = figure.subplots(2, len(grown), sharex=True, squeeze=False)
    for column, (recipe, cases) in enumerate(grown.items()):
        chips = [str(done[case]["devices"]["count"]) for case in cases]
        top, bottom = panels[:, column]
        under = [0.0] * len(cases)
        for part, colour in colours.items():
            sizes = [plan.parts(dict(done[case]))[part] / 2**30 for case in cases]
            top.bar(chips, sizes, bottom=under, width=0.6, color=colour, edgecolor="white", linewidth=0.6, label=part)
            under = [a + b for a, b in zip(under, sizes, strict=True)]
        for at, total in zip(chips, under, strict=True):
            top.text(at, total, f"{total:.3g}", ha="center", va="bottom", fontsize=8)
        for part, (colour, marker) in lines.items():
            seconds = [done[case]["roofline"][part] for case in cases]
            bottom.plot(chips, seconds, color=colour, marker=marker, markersize=4, linewidth=1.5, label=part)
        bottom.set_yscale("log", subs=(2, 5))
        bottom.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        bottom.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
        top.set_title(f"configs/{recipe}.py", loc="left", fontsize=10, fontweight="bold")
        bottom.set_xlabel("v5p chips")
        for axes in (top, bottom):
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0, labelsize=9)
    panels[0, 0].set_ylabel("Memory of a device (GiB)")
    panels[1, 0].set_ylabel("Seconds at published rates, log scale")
    panels[0, -1].legend(frameon=False, fontsize=8.5)
    panels[1, -1].legend(frameon=False, fontsize=8.5)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Options))
