"""`jaxmethods train`: the run from its config to its last checkpoint, read from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.experimental import multihost_utils
from rich.console import Console

from jaxmethods import adapters, data, models, quantization, sharding, training, tree
from jaxmethods.launch import config as run_config
from jaxmethods.launch import cost, distributed, plot, progress, reference, targets
from jaxmethods.launch.assembly import Assembly, assemble, load_model, model_shapes
from jaxmethods.launch.config import Run
from jaxmethods.launch.metrics import MetricsFile
from jaxmethods.objectives import preference


class RunFailed(RuntimeError):
    """A run that could not go on; the message is all its user needs."""


def train(run: Run, *, console: Console | None = None) -> dict[str, float]:
    """Trains, or goes on with what the work folder holds. Returns the last step's metrics.

    Where processes were joined (`distributed.join`) all of them call this, with the same run and a work folder that all see.

    Raises:
        ValueError, FileNotFoundError: the config asks for something that cannot be; nothing was run.
        RunFailed: the run had to stop, such as for a loss that is not finite.
        distributed.OthersFailed: another process could not go on, so this one ends too.
    """
    main = jax.process_index() == 0
    console = progress.tolerant(console or Console(quiet=not main))
    say = functools.partial(console.print, soft_wrap=True, markup=False, highlight=False)
    workdir = epath.Path(run.workdir)
    if run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(run.compilation_cache))

    # Devices, model, data. What one process cannot find ends all of them.
    with distributed.together("reading config, data and model"):
        run_config.check_folder(workdir, run)
        if run.tensorboard:
            _summary_writer()
        mesh = sharding.make_mesh(dataclasses.asdict(run.mesh))
        assembly = assemble(run, *model_shapes(run), mesh)
        tokenizer = models.load_tokenizer(run.model)
        read: Any = functools.partial(data.build, run.data, tokenizer, sight=assembly.sight, views=assembly.views)
        rows, report = read()
        held_out = read(split="evaluation")[0] if run.data.evaluation else None
        stream = _training_batches(assembly, rows)
        _, base = load_model(run, mesh)
        if cache := getattr(run.objective, "cache", None):
            start = preference.start_of(assembly.module, base)
            made_by = reference.fingerprint(*start, tokenizer)
            known = reference.read(cache, made_by)  # another's file is refused here

    # What could be wrong with config, model or data has been said by now: the folder becomes this run's.
    with distributed.together(f"making {workdir}"):
        if main:
            run_config.claim(workdir, run)
    with distributed.together(f"looking at {workdir}"):
        _find_claim(workdir, run)

    if cache:
        size = run.evaluation_batch_size or run.batch_size
        told: Any = dict(known=known, made_by=made_by, mesh=mesh, batch_size=size, say=say)
        rows, held_out = reference.kept(cache, (rows, held_out), module=start[0], params=start[1], **told)
        stream = _training_batches(assembly, rows)
        del start
    batches = iter(stream)

    # State: fresh, or from the latest good checkpoint.
    init_key, run_key = jax.random.split(jax.random.key(run.seed))
    checkpoints = training.Checkpoints(workdir / "checkpoints", keep_latest=run.keep_latest, keep_best=run.keep_best)
    restored = checkpoints.restore(assembly.state, assembly.fixed, batches, say=say)
    if restored is None:
        scores = _scores(assembly, base, rows, say)
        trained, frozen = _split(
            assembly, base, assembly.initial_own() | assembly.initial_adapters(base, init_key, scores)
        )
        state = assembly.initial_state(trained, run_key)
        fixed = tree.partition(frozen, lambda path: path in tree.flatten(assembly.fixed))[0]
    else:
        state, fixed = restored
        _, frozen = _split(assembly, base, fixed)
    del base
    first = int(state.step)
    metrics_file = MetricsFile(workdir / "metrics.jsonl")
    with distributed.together(f"opening {metrics_file.path}"):
        if main:
            metrics_file.cut_after(first)
    _announce(console, assembly, report, resumed=first)
    if first >= run.steps:
        say(f"{workdir} already holds all {run.steps} steps; nothing to do.")
        return metrics_file.last() if main else {}

    # The loop. Step n is dispatched before the metrics of step n - 1 are read: the device never waits for the host.
    stop = _stop_on_signals(console)
    rate = run.optimizer.learning_rates(run.steps)
    share_at_one_second = _share_at_one_second(assembly)
    row: dict[str, Any] = {}
    with (
        stop as stopped,
        progress.Progress(run.steps, start=first, console=console, main=main) as bar,
        contextlib.ExitStack() as stack,
    ):
        board = stack.enter_context(_tensorboard(workdir)) if run.tensorboard and main else None
        clock = time.perf_counter()
        pending: tuple[int, Any] | None = None

        def finish(pending: tuple[int, Any], extra: dict[str, float] | None = None) -> dict[str, Any]:
            """Reads a step's metrics, judges and records them."""
            nonlocal clock
            n, metrics = pending
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            now = time.perf_counter()
            seconds, clock = now - clock, now
            _judge(run, n, values, bar)
            row = {
                "step": n, "loss": values.pop("loss"), "tokens_per_second": values["tokens"] / seconds, "step_seconds": seconds,
                "learning_rate": float(rate(n - 1)), **values, **(extra or {}),
            }  # fmt: skip
            if share_at_one_second is not None:
                row["mfu"] = share_at_one_second / seconds
            if main:
                metrics_file.append(row)
                if board is not None:
                    for name, value in row.items():
                        board.add_scalar(name, value, n)
            bar.update(n, row)
            return row

        for n in range(first + 1, run.steps + 1):
            if run.profile and n == run.profile[0]:
                jax.profiler.start_trace(str(workdir / "profile"))
            batch = sharding.place_rows(next(batches), run.batch_size, mesh)
            state, metrics = assembly.step(state, frozen, batch)
            if pending is not None:
                row = finish(pending)
            pending = (n, metrics)
            if run.profile and n == run.profile[1]:
                jax.block_until_ready(metrics)
                jax.profiler.stop_trace()

            last = n == run.steps or stopped(n - first)
            evaluating = held_out is not None and (
                (run.evaluate_every and n % run.evaluate_every == 0) or n == run.steps
            )
            if not (last or evaluating or n % run.checkpoint_every == 0):
                continue
            jax.block_until_ready(metrics)
            done = time.perf_counter()
            extra = evaluate(assembly, state.trained, frozen, held_out) if evaluating else {}
            clock += time.perf_counter() - done  # a step's seconds leave out the evaluation
            row = finish(pending, extra)
            pending = None
            if last or n % run.checkpoint_every == 0:
                done = time.perf_counter()
                metrics_file.sync()
                checkpoints.save(state, fixed, batches, extra)
                clock += time.perf_counter() - done
            if last:
                break
    checkpoints.close()
    metrics_file.close()
    if row["step"] < run.steps:
        say(f"stopped after step {row['step']} and saved; the same command goes on from there.")
    with distributed.together("drawing the losses"):
        if main:
            plot.draw_losses(workdir / "metrics.jsonl", workdir / "loss.png", title=workdir.name)
    return row


def evaluate(assembly: Assembly, trained: tree.Tree, frozen: tree.Tree, rows: Any) -> dict[str, float]:
    """The loss on held-out rows, each once: {"evaluation_loss": nats a target token, ...}."""
    sums: dict[str, tree.Mean] = {}
    size, mesh = assembly.run.evaluation_batch_size or assembly.run.batch_size, assembly.mesh
    for batch in data.evaluation_batches(rows, size, share=sharding.rows_here(size, mesh)):
        for name, mean in assembly.evaluate(trained, frozen, sharding.place_rows(batch, size, mesh)).items():
            sums[name] = sums[name] + mean if name in sums else mean
    return {f"evaluation_{name}": float(mean.value()) for name, mean in jax.device_get(sums).items()}


def _scores(assembly: Assembly, base: tree.Tree, rows: Any, say: Callable[[str], None]) -> tree.Tree:
    """What adapters that choose by data choose by, from the first rows of the training set."""
    run = assembly.run
    chosen = [a for a in run.adapters.values() if isinstance(a, adapters.S2FT) and a.needs_scores]
    if not chosen:
        return {}
    count = max(math.ceil(max(a.calibration for a in chosen) * len(rows) / run.batch_size), 1)
    by = ", ".join(sorted({a.selection for a in chosen}))
    say(f"choosing channels by {by} over {count * run.batch_size} of {len(rows)} rows")
    batches = itertools.islice(iter(_training_batches(assembly, rows)), count)
    placed = (sharding.place_rows(batch, run.batch_size, assembly.mesh) for batch in batches)
    return adapters.s2ft.calibrate(assembly.module, base | assembly.initial_own(), placed, run.objective.loss_fn)


def _training_batches(assembly: Assembly, rows: Any) -> data.Batches:
    """Each process' part of the batches: the rows that its devices hold."""
    run = assembly.run
    share = sharding.rows_here(run.batch_size, assembly.mesh)
    return data.batches(
        rows, batch_size=run.batch_size, seed=run.data.seed, share=share, writes=jax.process_index() == 0,
        threads=1 if assembly.sight is None else 4,
    )  # fmt: skip


def _share_at_one_second(assembly: Assembly) -> float | None:
    """The share of the devices' peak that a step of one second would reach; None where the peak is not known.

    Counts matrix products, without what rematerialisation repeats.
    """
    devices = list(assembly.mesh.devices.flat)
    if targets.peak_flops(devices[0]) is None:  # nothing is traced in vain
        return None
    loss_fn = assembly.run.objective.loss_fn(assembly.module.clone(remat="none"))
    step = training.make_train_step(loss_fn, assembly.tx, accumulate=assembly.run.accumulate)
    return targets.mfu(cost.count(step, assembly.state, assembly.frozen, assembly.batch()).matmul_flops, 1.0, devices)


def _split(assembly: Assembly, base: tree.Tree, leaves: tree.Tree) -> tuple[tree.Tree, tree.Tree]:
    """(trained, frozen) arrays; trained ones in float32."""
    flat = tree.flatten(base) | tree.flatten(leaves)
    wanted = tree.flatten(assembly.state.trained)
    start = jax.tree.map(jnp.copy, assembly.start_of(flat))  # what is trained is given away to the step
    trained, frozen = tree.partition(tree.unflatten(flat | start), lambda path: path in wanted)
    return tree.cast(trained, jnp.float32), frozen


def _find_claim(workdir: Any, run: Run, *, patience: float = 60.0) -> None:
    """Refuses a process whose work folder is another one than process 0's, or that was given another run.

    patience: seconds after which a network file system must have shown the file, or what is new in it.
    """
    file, wanted, end = workdir / "config.json", run_config.to_json(run), time.monotonic() + patience
    while not (found := file.exists()) or run_config.to_json(run_config.read_json(file)) != wanted:
        if time.monotonic() > end:
            process = f"process {jax.process_index()}"
            raise ValueError(
                f"{file} is not the run of {process}; give all processes the same config and flags."
                if found
                else f"{file}, which process 0 wrote, is not to be seen from {process}; choose a --workdir on a file system "
                "that all hosts share, or in a bucket."
            )
        time.sleep(0.5)


def _judge(run: Run, step: int, values: dict[str, Any], bar: Any) -> None:
    """Stops, or tells, when a step's loss or gradient was not finite; its update was not made."""
    if values.pop("finite"):
        return
    what = f"loss {values['loss']}, gradient norm {values['gradient_norm']}"
    batch = f"batch {step - 1} of data seed {run.data.seed}"
    text = f"step {step} ({batch}) gave a value that is not finite: {what}; its update was not made."
    if run.on_nonfinite == "stop":
        raise RunFailed(f"{text} Lower optimizer.learning-rate, or go on over such steps with --on-nonfinite skip.")
    bar.say(text)


@contextlib.contextmanager
def _stop_on_signals(console: Console) -> Iterator[Callable[[int], bool]]:
    """Yields a function of the steps done since the start that tells whether SIGTERM or Ctrl-C came; a second Ctrl-C interrupts at
    once, and so does a second SIGTERM to a process that is alone.

    Processes that were joined stop after the same step, whichever of them the signal came to: the runtime has taken SIGTERM and
    agrees on the step, and Ctrl-C is handed to it. It counts the calls from 0, so that a notice from before the first of them is
    answered by the first.
    """
    came: list[int] = []
    joined = jax.distributed.is_initialized()

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        if joined:
            signal.raise_signal(signal.SIGTERM)
        console.print("stopping after this step; once more to stop at once.")

    numbers = (signal.SIGINT,) if joined else (signal.SIGTERM, signal.SIGINT)
    old = {number: signal.signal(number, note) for number in numbers}
    try:
        yield multihost_utils.reached_preemption_sync_point if joined else lambda step: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _announce(console: Console, assembly: Assembly, report: Any, *, resumed: int) -> None:
    """Says once what will happen."""
    run, trained = assembly.run, tree.flatten(assembly.state.trained)
    share = tree.count(assembly.state.trained)
    total = quantization.count(assembly.frozen) + share
    paths = sorted({path.split("/adapter/")[0] for path in trained})
    shown = ", ".join(paths[:4]) + (f", and {len(paths) - 4} more" if len(paths) > 4 else "")
    parts = {} if assembly.sight is None else {"parts": _parts(assembly)}
    mesh = " x ".join(f"{name}={size}" for name, size in assembly.mesh.shape.items())
    progress.announce(
        console,
        f"{run.workdir}: {'resumes after step ' + str(resumed) if resumed else 'starts'}",
        {
            "model": f"{run.model} ({total / 1e6:,.1f} M parameters"
            + (f", linear layers frozen in {run.quantize})" if run.quantize else ")"),
            "trained": f"{share:,} parameters ({share / total:.2%}) in {shown}",
            **parts,
            "devices": f"{assembly.mesh.size} x {assembly.mesh.devices.flat[0].device_kind} ({mesh})"
            + (f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            "data": str(report),
            "step": f"{run.batch_size} rows x {run.data.sequence_length} tokens"
            + (f" in {run.accumulate} parts" if run.accumulate > 1 else "")
            + f", {run.compute_dtype}; {run.steps} steps",
        },
    )


def _parts(assembly: Assembly) -> str:
    """What of a model that sees is trained, part by part, and how fast."""
    told = []
    for part in models.PARTS:
        inside = {p: x for p, x in tree.flatten(assembly.state.trained).items() if models.part_of(p) == part}
        if not inside:
            told.append(f"{part} frozen")
            continue
        rates = sorted({assembly.run.optimizer.rate_of(path) for path in inside})
        at = " and ".join(f"{rate:g}" for rate in rates)
        adapted = " by adapters" if all(adapters.is_adapter(path) for path in inside) else ""
        told.append(f"{part} {tree.count(inside):,}{adapted} at {at}")
    return ", ".join(told)


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise ValueError("tensorboard=True needs a package: pip install tensorboardX") from None
    return SummaryWriter


@contextlib.contextmanager
def _tensorboard(workdir: Any) -> Iterator[Any]:
    writer = _summary_writer()(str(workdir / "tensorboard"))
    try:
        yield writer
    finally:
        writer.close()


__all__ = ["RunFailed", "evaluate", "train"]
