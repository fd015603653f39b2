"""The parameters of a S'MoRE adapter at the start."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from jaxmethods.adapters.smore.activations import initial_slope
from jaxmethods.adapters.smore.counts import count_parameters
from jaxmethods.adapters.smore.spec import Spec

Params = dict[str, Any]
"""The nested dict of an adapter's leaves, as listed in the package's docstring."""


def init(key: Key[Array, ""], d_in: int, d_out: int, spec: Spec, dtype: Any = jnp.float32) -> Params:
    """Fresh leaves in `dtype`; with them `apply` gives exactly zero, unless `spec.initialization` is "normal".

    A, and what the initialization leaves random of B, W and W_proj, are Kaiming-uniform (a = sqrt 5): U(-1/sqrt(in),
    1/sqrt(in)), for A and B per expert. So are the router's linear maps and their biases; keys are U[0, 1), the noise
    map and the experts' biases 0.
    """
    widths, top = spec.widths, spec.widths[-1]
    mode, copies = spec.initialization, spec.initialization == "eq_1_layer"
    ends_at_zero = mode in ("w_final_zero", "eq_1_layer")
    # All random numbers are drawn at once and then handed out: one generator to compile, not one for each leaf.
    count = count_parameters(spec, d_in, d_out).total - ends_at_zero * top * d_out
    drawn = jax.random.uniform(key, (count,), dtype)
    taken = 0

    def take(*shape: int) -> Array:
        nonlocal taken
        taken += math.prod(shape)
        return drawn[taken - math.prod(shape) : taken].reshape(shape)

    def uniform(fan_in: int, *shape: int) -> Array:
        return (2 * take(*shape) - 1) / math.sqrt(fan_in)

    def linear(n_in: int, n_out: int) -> Params:
        return {"kernel": uniform(n_in, n_in, n_out), "bias": uniform(n_in, n_out)}

    def up(s: int, r: int, width: int) -> Array:
        if copies:
            return jnp.eye(s * r, width, dtype=dtype).reshape(s, r, width)
        return jnp.zeros((s, r, width), dtype) if mode in ("b_zero", "bw_zero") else uniform(r, s, r, width)

    def from_below(below: int, width: int) -> Array:
        if copies:
            return jnp.eye(below, width, width - below, dtype)
        return jnp.zeros((below, width), dtype) if mode == "bw_zero" else uniform(below, below, width)

    b, w, gate = {}, {}, {}
    for layer, (s, r, m, context) in enumerate(
        zip(spec.experts, spec.ranks, spec.gate_dims, spec.context_dims, strict=True)
    ):
        below, width = widths[layer], widths[layer + 1]
        if layer in spec.pools:
            b[str(layer)] = {"kernel": up(s, r, width), "bias": jnp.zeros((s, width), dtype)}
        if layer:
            w[str(layer)] = {"kernel": from_below(below, width), "bias": jnp.zeros(width, dtype)}
        gate[str(layer)] = {
            "hidden": linear(context, m),
            "query": linear(m, m),
            "keys": take(s, m),
        }
        if spec.gate == "noisy_topk":
            gate[str(layer)]["noise"] = {"kernel": jnp.zeros((context, s), dtype)}
    down = sum(spec.down_sizes)
    experts: Params = {
        "a": {"kernel": uniform(d_in, d_in, down), "bias": jnp.zeros(down, dtype)},
        "b": b,
        "proj": {
            "kernel": jnp.zeros((top, d_out), dtype) if ends_at_zero else uniform(top, top, d_out),
            "bias": jnp.zeros(d_out, dtype),
        },
    }
    if w:
        experts["w"] = w
    if spec.activation.startswith("prelu"):
        experts["slope"] = jnp.full(spec.layers, initial_slope(spec.activation), dtype)
    return {"experts": experts, "router": {"down": linear(d_in, spec.router_dim), "gate": gate}}
