"""Checkpoints of a run: one atomic save of everything that changes, restored onto any mesh.

A checkpoint holds arrays and a line of JSON (Orbax v1; nothing is ever unpickled): trained parameters, the adapters'
non-trained leaves, optimiser, step, key, and the data iterator's position. The frozen base model is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from jaxmethods import tree
from jaxmethods.training.step import State

_policies = ocp.training.preservation_policies


class Checkpoints:
    """The checkpoints of one folder: the latest `keep_latest`, and the `keep_best` with the lowest `best_metric`.

    Saving is asynchronous and atomic: a folder appears under its final name when it is complete.
    """

    def __init__(
        self, directory: Any, *, keep_latest: int = 2, keep_best: int = 1, best_metric: str = "evaluation_loss"
    ) -> None:
        policies: list[Any] = [_policies.LatestN(keep_latest)]
        if keep_best:
            value = lambda metrics: (metrics or {}).get(best_metric, float("inf"))
            policies.append(
                _policies.BestN(get_metric_fn=value, reverse=True, n=keep_best, keep_checkpoints_without_metrics=False)
            )
        self._directory = epath.Path(directory)
        self._best_metric = best_metric
        self._checkpointer = ocp.training.Checkpointer(
            self._directory.resolve(),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=_policies.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    def steps(self) -> list[int]:
        """The steps that are kept, oldest first."""
        return sorted(c.step for c in self._checkpointer.checkpoints)

    def best(self) -> int | None:
        """The kept step with the lowest metric; None when none was measured."""
        measured = {c.step: (c.metrics or {}).get(self._best_metric) for c in self._checkpointer.checkpoints}
        known = {step: value for step, value in measured.items() if value is not None}
        return min(known, key=lambda step: known[step]) if known else None

    def save(
        self, state: State, fixed: tree.Tree, batches: Any = None, metrics: dict[str, float] | None = None
    ) -> None:
        """Begins a save of the state after `state.step` steps; returns when the arrays are copied.

        Args:
            fixed: leaves that never change but belong to the run (integer leaves of adapters).
            batches: the data iterator, a checkpointable of its own.
            metrics: measured after this step, for keeping the best.
        """
        kept = {k: float(v) for k, v in (metrics or {}).items() if k == self._best_metric}
        parts = {"state": _pack(state, fixed)} | ({} if batches is None else {"data": batches})
        # The next save, or `close`, waits for this one and raises what it raised.
        self._checkpointer.save_checkpointables_async(int(state.step), parts, metrics=kept or None, overwrite=True)

    def restore(
        self,
        state: State,
        fixed: tree.Tree,
        batches: Any = None,
        *,
        say: Callable[[str], None] = print,
        step: int | None = None,
    ) -> tuple[State, tree.Tree] | None:
        """(state, fixed) of the latest checkpoint that can be read, or None where there is none; `batches` is set to its position.

        A damaged checkpoint is left aside, said so, and the one before it is tried; by all processes, where one of them cannot
        read its part.

        Args:
            state, fixed: trees of arrays or ShapeDtypeStructs with the shardings that the result shall have.
            batches: the data iterator; None reads the state alone.
            step: this checkpoint and no other.

        Raises:
            ValueError: there are checkpoints, and none can be read.
        """
        describe = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
        like = {"state": jax.tree.map(describe, _pack(state, fixed))} | ({} if batches is None else {"data": batches})
        steps = self.steps() if step is None else [step]
        for tried in reversed(steps):
            failure = None
            try:
                with _alone():
                    packed = ocp.load_checkpointables(self._directory.resolve() / str(tried), like)["state"]
            except Exception as error:  # Orbax raises many kinds for a damaged file
                failure = _root_cause(error)
            failed = _on_any_process(failure is not None)
            if failed:
                why = failure or f"by process {', '.join(map(str, failed))}"
                say(f"checkpoint of step {tried} in {self._directory} cannot be read ({why}); left aside.")
                continue
            if batches is not None:  # the run goes on from here: a later, damaged step must not meet its new save
                for later in steps:
                    if later > tried:
                        self._checkpointer.delete(later)
            key = jax.random.wrap_key_data(packed["key"])
            return State(packed["step"], packed["trained"], packed["opt"], key), packed["fixed"]
        if steps:
            raise ValueError(
                f"none of the checkpoints {steps} in {self._directory} can be read; move the folder away to start anew."
            )
        return None

    def close(self) -> None:
        """Waits for the save under way."""
        self._checkpointer.close()


def _pack(state: State, fixed: tree.Tree) -> dict[str, Any]:
    abstract = isinstance(state.key, jax.ShapeDtypeStruct)
    key: Any = jax.eval_shape(jax.random.key_data, state.key) if abstract else jax.random.key_data(state.key)
    if abstract:
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=state.step.sharding)
    return {"step": state.step, "trained": state.trained, "opt": state.opt, "key": key, "fixed": fixed}


def _alone() -> ocp.Context:
    """Orbax' own barrier behind a load would hold the processes that can read for ever, where one cannot."""
    context = ocp.Context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    return context


def _on_any_process(failed: bool) -> list[int]:
    """The processes where it is true. A single one needs no device for it."""
    everywhere = multihost_utils.process_allgather(np.array(failed)) if jax.process_count() > 1 else np.array([failed])
    return np.flatnonzero(everywhere).tolist()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
