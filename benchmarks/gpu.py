"""On one NVIDIA GPU: operations in their forms, and a LoRA step of an 8B decoder beside transformers + peft.

    python benchmarks/gpu.py --to docs/gpu.md

Every measurement is a fresh process. Weights are random: times and memory do not ask what they are. Needs `jaxmethods[cuda13]`
and, for the comparison, torch, transformers and peft.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import processes
import steps
import tyro

MODEL = "meta-llama/Meta-Llama-3-8B-Instruct"
"""Its shape alone."""
MAPS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "token_logprobs": "4096 tokens of 4096, 128256 words, bfloat16; values and both gradients",
    "attention": "4 rows of 4096 tokens, 32 heads of 128, 8 of keys and values, bfloat16, causal; values and all gradients",
    "info_nce": "32768 pairs of 768, float32; values and all gradients",
}
FORMS = {
    "token_logprobs": ("reference", "xla"),
    "attention": ("reference", "xla", "cudnn"),
    "info_nce": ("reference", "xla"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured."""

    rows: int = 4
    """Rows of a step."""
    length: int = 2048
    """Tokens a row."""
    rank: int = 64
    """Of LoRA on every linear map."""
    count: int = 8
    """Timed runs, or steps, after two that are not counted."""
    only: str = ""
    """Only cases that begin with this."""
    to: str | None = None
    """Write the page to this file too."""
    child: str | None = None
    """(Of the script itself: what this process measures.)"""


def operation(name: str, form: str) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """The function to time, and its arrays."""
    import jax
    import jax.numpy as jnp

    from jaxmethods import kernels

    normal = lambda i, *shape, dtype="bfloat16": jax.random.normal(jax.random.key(i), shape, dtype)
    if name == "token_logprobs":
        targets = jax.random.randint(jax.random.key(2), (4096,), 0, 128256)
        of = lambda h, u: kernels.token_logprobs(h, u, targets, implementation=form).sum()
        return jax.value_and_grad(of, (0, 1)), (normal(0, 4096, 4096), 0.02 * normal(1, 4096, 128256))
    if name == "info_nce":
        of = lambda *arrays: kernels.info_nce(*arrays, implementation=form).mean()
        rows = [normal(i, 32768, 768, dtype="float32") for i in (0, 1)]
        rows = [x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in rows]
        return jax.value_and_grad(of, (0, 1, 2, 3)), (*rows, jnp.ones(32768), jnp.ones(32768))
    places = jnp.tile(jnp.arange(4096), (4, 1))
    q, k, v = normal(0, 4, 4096, 32, 128), normal(1, 4, 4096, 8, 128), normal(2, 4, 4096, 8, 128)
    of = lambda *qkv: kernels.attention(*qkv, q_positions=places, kv_positions=places, implementation=form)
    return jax.value_and_grad(lambda *qkv: of(*qkv).astype("float32").sum(), (0, 1, 2)), (q, k, v)


def time_operation(o: Options, name: str, form: str) -> dict[str, float]:
    import jax

    function, arrays = operation(name, form)
    program = jax.jit(function).lower(*arrays).compile()
    seconds = []
    for _ in range(o.count + 2):
        start = time.perf_counter()
        jax.block_until_ready(program(*arrays))
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[2:]),
        "temporaries": program.memory_analysis().temp_size_in_bytes,
    }


def step_here(o: Options, attention: str | None) -> dict[str, float]:
    import jax
    import jax.numpy as jnp

    from jaxmethods import adapters, models, tree

    module, shapes = models.shapes(MODEL, dtype=jnp.bfloat16)
    draw = jax.jit(lambda i, like: 0.02 * jax.random.normal(jax.random.key(i), like, jnp.bfloat16), static_argnums=1)
    one = lambda i, path, leaf: jnp.ones(leaf.shape, leaf.dtype) if path.endswith("scale") else draw(i, leaf.shape)
    params = tree.unflatten({path: one(i, path, leaf) for i, (path, leaf) in enumerate(tree.flatten(shapes).items())})
    module = module.clone(remat="full", attention=attention)
    chosen = {"(" + "|".join(MAPS) + ")": adapters.LoRA(rank=o.rank, alpha=2 * o.rank)}
    found = steps.timed_of(module, params, chosen, o.rows, o.length, o.count)
    return found | {"memory": jax.devices()[0].memory_stats()["peak_bytes_in_use"]}


def step_in_torch(o: Options) -> dict[str, float]:
    import peft
    import torch
    import transformers

    from jaxmethods import models

    c = models.shapes(MODEL)[0].config
    config = transformers.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads, max_position_embeddings=8192, use_cache=False,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model = peft.get_peft_model(model, peft.LoraConfig(r=o.rank, lora_alpha=2 * o.rank, target_modules=list(MAPS)))
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    tokens = torch.from_numpy(steps.batch(o.rows, o.length)).long().cuda()
    seconds = []
    for _ in range(o.count + 2):
        start = time.perf_counter()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[2:]), "loss": value, "memory": torch.cuda.max_memory_allocated(),
        "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


STEPS: dict[str, Callable[[Options], dict[str, float]]] = {
    "jaxmethods, rows that may be packed": lambda o: step_here(o, None),
    "jaxmethods, rows of one example": lambda o: step_here(o, "cudnn"),
    "torch + transformers + peft": step_in_torch,
}


def main(o: Options) -> None:
    if o.child:
        name, form = o.child.split("|")
        print(json.dumps(STEPS[form](o) if name == "step" else time_operation(o, name, form)))
        return
    cases = [f"{name}|{form}" for name, forms in FORMS.items() for form in forms] + [f"step|{name}" for name in STEPS]
    found = {case: _run(o, case) for case in cases if case.startswith(o.only)}
    text = _page(o, found)
    print(text)
    if o.to:
        Path(o.to).write_text(text + "\n")


def _run(o: Options, case: str) -> dict[str, float] | None:
    given = dataclasses.asdict(dataclasses.replace(o, child=case, to=None, only=""))
    line = [sys.executable, __file__, *(f"--{name}={value}" for name, value in given.items() if value is not None)]
    line = [word for word in line if word != "--only="]
    done = subprocess.run(line, env=os.environ | {"JAX_PLATFORMS": "cuda"}, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{case} failed:\n{done.stderr[-1500:]}", file=sys.stderr, flush=True)
        return None
    result = json.loads(done.stdout.splitlines()[-1])
    print(case, result, file=sys.stderr, flush=True)
    return result


def _page(o: Options, found: dict[str, dict[str, float] | None]) -> str:
    lines = [
        "# On one GPU",
        "",
        f"`python benchmarks/gpu.py`, {date.today()}, {processes.machine()}, jax {version('jax')}; medians of {o.count} runs. "
        "Memory of operations: the compiler's temporaries; of steps: the most that was held.",
        "",
        "| operation | form | ms | of the first | temporaries MiB |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for name, forms in FORMS.items():
        first = found.get(f"{name}|{forms[0]}")
        for form in forms:
            if r := found.get(f"{name}|{form}"):
                ratio = f"{r['seconds'] / first['seconds']:.2f}" if first else ""
                lines.append(
                    f"| {name} | {form} | {1e3 * r['seconds']:.2f} | {ratio} | {r['temporaries'] / 2**20:.0f} |"
                )
    lines += ["", *(f"- {name}: {size}" for name, size in SIZES.items()), ""]
    lines += [
        f"A LoRA step (rank {o.rank}, every linear map) of a decoder of Llama-3-8B's shape, {o.rows} x {o.length} tokens, "
        "bfloat16, every layer computed again in the backward pass:",
        "",
        "| library | trained | tokens/s | ratio | GiB | share of the GPU's rate |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    theirs = found.get("step|torch + transformers + peft")
    for name in STEPS:
        if r := found.get(f"step|{name}"):
            ratio = f"{theirs['seconds'] / r['seconds']:.2f}" if theirs else ""
            share = f"{r['matmul_flops'] / r['seconds'] / 989e12:.0%}" if "matmul_flops" in r else ""
            rate, memory = o.rows * o.length / r["seconds"], r["memory"] / 2**30
            lines.append(f"| {name} | {r['trained']:,.0f} | {rate:,.0f} | {ratio} | {memory:.1f} | {share} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Options))
