"""State, and the step that takes it forward: pure functions that a program compiles once.

A method is trained through one function, `loss_fn(params, batch, key) -> (Mean, metrics)`. Only the trained part of the
parameters is differentiated and enters the optimiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from jaxmethods.training.optimizer import global_norm
from jaxmethods.tree import Mean, Tree, combine

Batch = Mapping[str, Any]
Metrics = dict[str, Any]
LossFn = Callable[[Tree, Batch, Key[Array, ""]], tuple[Mean, dict[str, Mean]]]
"""(params, batch, key) -> (loss as sum and weight, metrics as sums and weights)."""


class State(NamedTuple):
    """All that changes from step to step."""

    step: Int[Array, ""]
    trained: Tree
    opt: Any
    key: Key[Array, ""]
    """The run's key; a step uses `fold_in(key, step)`, so a resumed run draws the same numbers."""


Step = Callable[[State, Tree, Batch], tuple[State, Metrics]]


def init_state(trained: Tree, tx: optax.GradientTransformation, key: Key[Array, ""]) -> State:
    """The state before the first step."""
    return State(jnp.int32(0), trained, tx.init(trained), key)


def make_train_step(loss_fn: LossFn, tx: optax.GradientTransformation, *, accumulate: int = 1) -> Step:
    """`step(state, frozen, batch) -> (state, metrics)`, to be jitted by the caller with shardings and donation.

    The batch is cut into `accumulate` parts along its rows; sums and weights of their losses are added, so that a loss
    that is a mean over tokens or pairs has the gradient of the whole batch. When the loss or a gradient is not finite,
    parameters and optimiser stay as they were (the step still counts) and `metrics["finite"]` is False.

    Metrics: `loss` (what is minimised, unless `loss_fn` reports another by that name), `gradient_norm`, `finite`, and
    what `loss_fn` reports, averaged.
    """

    def total(trained: Tree, frozen: Tree, batch: Batch, key: Array) -> tuple[Array, Any]:
        loss, metrics = loss_fn(combine(trained, frozen), batch, key)
        return loss.total, (loss, {"loss": loss} | metrics)

    def step(state: State, frozen: Tree, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        differentiate = jax.grad(total, has_aux=True)
        if accumulate == 1:
            grads, (loss, metrics) = differentiate(state.trained, frozen, batch, key)
        else:
            grads, (loss, metrics) = _accumulated(
                lambda part, key: differentiate(state.trained, frozen, part, key), batch, key, accumulate
            )
        weight = jnp.where(loss.weight == 0, 1.0, loss.weight)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        norm = global_norm(grads)
        finite = jnp.isfinite(loss.total) & jnp.isfinite(norm)

        def update(grads: Tree, opt: Any, trained: Tree) -> tuple[Any, Tree]:
            updates, opt = tx.update(grads, opt, trained)
            return opt, optax.apply_updates(trained, updates)

        # A branch, not a choice between old and new leaves: the old ones are then free to be overwritten.
        stay = lambda grads, opt, trained: (opt, trained)
        opt, trained = jax.lax.cond(finite, update, stay, grads, state.opt, state.trained)
        new = State(state.step + 1, trained, opt, state.key)
        values = {name: mean.value() for name, mean in metrics.items()}
        return new, {"gradient_norm": norm, "finite": finite} | values

    return step


def _accumulated(gradient: Callable[..., Any], batch: Batch, key: Array, parts: int) -> Any:
    """Sums gradient(part, key) over the parts of a batch, one at a time."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % parts:
        raise ValueError(f"accumulate={parts} must divide the batch's {rows} rows.")
    # Row i goes to part i % parts: each device keeps its own rows when rows are sharded.
    split = lambda x: jnp.moveaxis(x.reshape(rows // parts, parts, *x.shape[1:]), 1, 0)
    cut = jax.tree.map(split, dict(batch)), jax.random.split(key, parts)
    sums = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], cut)))
    add = lambda sums, part: (jax.tree.map(jnp.add, sums, gradient(*part)), None)
    return jax.lax.scan(add, sums, cut)[0]


def make_evaluation_step(loss_fn: LossFn) -> Callable[[Tree, Tree, Batch], dict[str, Mean]]:
    """`evaluate(trained, frozen, batch) -> {"loss": Mean, ...}`: sums and weights, to be added over batches."""

    def evaluate(trained: Tree, frozen: Tree, batch: Batch) -> dict[str, Mean]:
        loss, metrics = loss_fn(combine(trained, frozen), batch, None)  # type: ignore[arg-type]
        return {"loss": loss} | metrics

    return evaluate
