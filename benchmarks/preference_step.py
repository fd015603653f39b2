"""A DPO step with LoRA on SmolLM2-135M, here and by TRL's DPOTrainer on torch, on the CPU, side by side.

    python -m jaxmethods.data.reports --to build/reports
    python benchmarks/preference_step.py --to docs/preference_step.md

Both take the same real pairs, weights, precision and threads, with the reference computed in every step (adapters off) and with its
log-probabilities at hand. TRL pads to the longest row of the batch; so do we here. It runs without gradient checkpointing, which
would cost it time, and with it ("checkpointed"), which saves memory. Every measurement is a fresh process; the cases take turns.
Peak memory is the process' largest resident size less that of a process that only imports.

Needs the demo model (`make quickstart` installs it), torch, transformers, peft, accelerate and trl.
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
from typing import Any

import numpy as np
import processes
import steps
import tyro


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    pairs: int = 4
    """Of the batch."""
    data: str = "build/reports/pairs_train.jsonl"
    """Rows with prompt, chosen and rejected; the first so many whose longer side has nearly `length` tokens."""
    length: int = 160
    """Tokens of the longest row, about."""
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
    to: str | None = None
    """Write the table to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""
    folder: str = ""
    """(Of the script itself: the model as transformers reads it, and the chosen pairs.)"""


CASES = ("jax imports", "torch imports", "jax live", "torch live", "jax cached", "torch cached", "torch checkpointed")


def in_jax(o: Options, case: str) -> dict[str, Any]:
    import jax

    from jaxmethods import adapters, data, models, training
    from jaxmethods.objectives import Preference

    if case == "imports":
        jax.numpy.zeros(1).block_until_ready()
        return {}
    module, params = models.load(steps.MODEL)
    objective = Preference(cache="measured.parquet" if case == "cached" else None)
    rows = [json.loads(line) for line in Path(o.folder, "pairs.jsonl").read_text().splitlines()]
    length = max(row["tokens"] for row in rows)
    laid_out, _ = data.build(
        data.Data(sequence_length=length, pack=False), models.load_tokenizer(steps.MODEL), rows=rows, views=objective.views()
    )  # fmt: skip
    batch = data.evaluation_batches(laid_out, o.pairs)[0]
    if case == "cached":  # what they are does not matter to the time
        batch |= dict.fromkeys(objective.precomputed, np.full(o.pairs, -50.0, np.float32))
    adapted = adapters.attach(module.clone(remat=o.remat), {steps.EVERY_LINEAR: adapters.LoRA(rank=o.rank)})
    init = jax.jit(lambda p, key: adapters.init(adapted, p, key), donate_argnums=0)
    trained, frozen = adapters.partition(init(params, jax.random.key(0)))
    tx = training.Optimizer(schedule="constant", warmup=0).transformation(100)
    state = training.init_state(trained, tx, jax.random.key(0))
    step = jax.jit(training.make_train_step(objective.loss_fn(adapted), tx), donate_argnums=0)
    compiled = step.lower(state, frozen, batch).compile()
    seconds, first = [], None
    for _ in range(o.steps + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, batch)
        loss = float(metrics["loss"])
        first = loss if first is None else first
        seconds.append(time.perf_counter() - start)
    real = sum(int((batch[f"{side}/segment_ids"] > 0).sum()) for side in ("chosen", "rejected"))
    return {"seconds": statistics.median(seconds[2:]), "loss": first, "tokens": real}


def in_torch(o: Options, case: str) -> dict[str, Any]:
    import datasets
    import peft
    import torch
    import transformers
    import trl

    torch.set_num_threads(o.threads)
    if case == "imports":
        return {}
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    turn = lambda role, text: [{"role": role, "content": text}]
    rows = [json.loads(line) for line in Path(o.folder, "pairs.jsonl").read_text().splitlines()]
    rows = [
        {"prompt": turn("user", row["prompt"])} | {s: turn("assistant", row[s]) for s in ("chosen", "rejected")} for row in rows
    ]  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    seconds: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *given: Any, **more: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, *given: Any, **more: Any) -> None:
            seconds.append(time.perf_counter() - self.start)

    settings = trl.DPOConfig(
        output_dir=f"{o.folder}/trl", per_device_train_batch_size=o.pairs, max_steps=o.steps + 2, report_to=[], use_cpu=True,
        bf16=False, gradient_checkpointing=case == "checkpointed", max_length=None, save_strategy="no", logging_steps=1,
        precompute_ref_log_probs=case == "cached", learning_rate=1e-4, disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(f"{o.folder}/model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(f"{o.folder}/model")
    trainer = trl.DPOTrainer(
        model, args=settings, train_dataset=datasets.Dataset.from_list(rows * (o.steps + 2)), processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules=names), callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return {"seconds": statistics.median(seconds[2:]), "loss": trainer.state.log_history[0]["loss"]}


def measure(o: Options) -> None:
    """What a child process does: prints one JSON object."""
    library, case = str(o.child).split(" ", 1)
    result = {"jax": in_jax, "torch": in_torch}[library](o, case)
    print(json.dumps(result | {"peak": processes.peak_bytes()}))


def run(o: Options, child: str, folder: str) -> dict[str, Any]:
    given = dataclasses.asdict(dataclasses.replace(o, child=child, folder=folder, to=None))
    arguments = [f"--{name}={value}" for name, value in given.items() if value is not None]
    return processes.run(__file__, arguments, o.threads, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})


def choose(o: Options, folder: str) -> None:
    """Writes the model and the pairs that are measured."""
    from jaxmethods import data, models

    module, params = models.load(steps.MODEL)
    tokenizer = models.load_tokenizer(steps.MODEL)
    models.save(f"{folder}/model", module, params, tokenizer=tokenizer)
    render, kept = data.Renderer(tokenizer), []
    for row in (json.loads(line) for line in Path(o.data).read_text().splitlines()):
        sides = [len(render({"prompt": row["prompt"], "answer": row[side]}).tokens) for side in ("chosen", "rejected")]
        if 0.9 * o.length <= max(sides) <= o.length:
            kept.append(row | {"tokens": max(sides)})
    if len(kept) < o.pairs:
        sys.exit(f"{o.data} has {len(kept)} pairs of about {o.length} tokens, and --pairs asks for {o.pairs}.")
    Path(folder, "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept[: o.pairs]))


def main(o: Options) -> None:
    if o.child:
        measure(o)
        return
    with tempfile.TemporaryDirectory() as folder:
        choose(o, folder)
        results: dict[str, list[dict[str, Any]]] = {case: [] for case in CASES}
        for turn in range(o.rounds):
            for case in results:
                results[case].append(run(o, case, folder))
                print(f"round {turn + 1} of {o.rounds}: {case} {results[case][-1]}", file=sys.stderr, flush=True)
    text = table(o, results)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def table(o: Options, results: dict[str, list[dict[str, Any]]]) -> str:
    middle = lambda case, name: statistics.median(r[name] for r in results[case])
    over = lambda case: (middle(case, "peak") - middle(f"{case.split(' ')[0]} imports", "peak")) / 2**20
    tokens = results["jax live"][0]["tokens"]
    lines = [
        "# A DPO step on SmolLM2-135M, on the CPU",
        "",
        f"`python benchmarks/preference_step.py`, {date.today()}, {processes.cpu()}, {o.threads} threads, float32, LoRA of rank "
        f"{o.rank} on every linear map, {o.pairs} real pairs of {tokens} tokens together, our remat {o.remat}, medians of "
        f"{o.rounds} processes of {o.steps} steps. Where the reference is at hand for us, its numbers are made up.",
        "",
        "| step | library | loss of the first | tokens/s | ratio | MiB over imports | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in CASES[2:]:
        library, kind = case.split(" ")
        peer = f"torch {'live' if kind == 'checkpointed' else kind}"
        label = "jaxmethods" if library == "jax" else "TRL"
        what = {"live": "reference in the step", "cached": "reference at hand"}.get(
            kind, "reference in the step, checkpointed"
        )
        lines.append(
            f"| {what} | {label} | {middle(case, 'loss'):.4f} | {tokens / middle(case, 'seconds'):.0f} "
            f"| {middle(peer, 'seconds') / middle(case, 'seconds'):.2f} | {over(case):.0f} | {over(case) / over(peer):.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
