"""Optimisers as chains of optax transformations, described by one small config."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import optax

from jaxmethods import tree

SCHEDULES = ("constant", "cosine", "linear")
OPTIMIZERS = ("adamw", "sgd")


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """An optimiser with its schedule.

    Args:
        name: "adamw" or "sgd".
        learning_rate: the highest rate of the schedule.
        schedule: "constant", "cosine" (to `final_fraction` of the rate) or "linear" (likewise).
        warmup: steps of linear warm-up, or a share of all steps when below 1.
        final_fraction: the rate at the last step as a share of `learning_rate`.
        weight_decay: decoupled; matrices only (leaves that are vectors in a layer, such as norms and biases, are spared).
        b1, b2, eps: AdamW's; `b1` is sgd's momentum.
        clip_norm: gradients are scaled down to this global norm; None leaves them.
        groups: (regex, factor): the learning rate of leaves whose '/'-joined path the regex finds is multiplied; the
            first that matches counts.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup: float = 0.03
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = 1.0
    groups: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        tree.require_one_of("optimizer.name", self.name, OPTIMIZERS)
        tree.require_one_of("optimizer.schedule", self.schedule, SCHEDULES)
        for field in ("learning_rate", "weight_decay", "warmup"):
            if getattr(self, field) < 0:
                raise ValueError(f"optimizer.{field}={getattr(self, field)} must not be negative.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(f"optimizer.clip_norm={self.clip_norm} must be positive; None switches clipping off.")

    def learning_rates(self, steps: int) -> optax.Schedule:
        """Step -> learning rate, for a run of `steps` steps."""
        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        rest, final = max(steps - warmup, 1), self.final_fraction
        after: optax.Schedule = {
            "constant": lambda: optax.constant_schedule(self.learning_rate),
            "cosine": lambda: optax.cosine_decay_schedule(self.learning_rate, rest, final),
            "linear": lambda: optax.linear_schedule(self.learning_rate, final * self.learning_rate, rest),
        }[self.schedule]()
        if not warmup:
            return after
        # The first step already moves: warm-up runs over 1/warmup, 2/warmup, ... and not from 0.
        rise = lambda step: self.learning_rate * (step + 1) / warmup
        return optax.join_schedules([rise, after], [warmup])

    def rate_of(self, path: str) -> float:
        """The highest learning rate of a leaf."""
        return self.learning_rate * _factor(self.groups, path)

    def transformation(self, steps: int) -> optax.GradientTransformation:
        """The chain: clip, precondition, decay, scale by group, scale by the schedule."""
        parts = [] if self.clip_norm is None else [optax.clip_by_global_norm(self.clip_norm)]
        if self.name == "adamw":
            parts.append(optax.scale_by_adam(self.b1, self.b2, self.eps, mu_dtype=jnp.float32))
        elif self.b1:
            parts.append(optax.trace(self.b1, accumulator_dtype=jnp.float32))
        if self.weight_decay:
            parts.append(optax.add_decayed_weights(self.weight_decay, mask=_is_matrix))
        if self.groups:
            parts.append(_scale_by_group(self.groups))
        return optax.chain(*parts, optax.scale_by_learning_rate(self.learning_rates(steps)))


_VECTORS = re.compile(r"(^|/)(bias|scale)$|_bias(/\d+)?$|_norm/|layernorm/")


def _is_matrix(params: tree.Tree) -> tree.Tree:
    return tree.unflatten({p: not _VECTORS.search(p) and x.ndim > 1 for p, x in tree.flatten(params).items()})


def _factor(groups: tuple[tuple[str, float], ...], path: str) -> float:
    return next((factor for pattern, factor in groups if re.search(pattern, path)), 1.0)


def _scale_by_group(groups: tuple[tuple[str, float], ...]) -> optax.GradientTransformation:
    def scale(updates: tree.Tree, params: tree.Tree = None) -> tree.Tree:
        flat = tree.flatten(updates)
        for pattern, _ in groups:
            if not any(re.search(pattern, path) for path in flat):
                raise ValueError(f"optimizer.groups: {pattern!r} matches no trained parameter.")
        return tree.unflatten({path: x * _factor(groups, path) for path, x in flat.items()})

    return optax.stateless(scale)


def global_norm(grads: tree.Tree) -> jax.Array:
    """The Euclidean norm of all leaves together, float32."""
    return optax.tree.norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))
