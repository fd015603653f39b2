"""Routing: a tree of experts for each token, grown from the top layer down.

Nodes of a layer are numbered slot by slot: node `slot * parents + parent`, so that a new level of the tree is a
concatenation of what its slots hold.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from jaxmethods.adapters.smore.activations import activation
from jaxmethods.adapters.smore.compression import compress
from jaxmethods.adapters.smore.leaves import Params
from jaxmethods.adapters.smore.spec import Spec
from jaxmethods.tree import cast


class Routes(NamedTuple):
    """The tree of each token: entry l of both tuples is [tokens, f_{L-1}, ..., f_l], for layer l."""

    indices: tuple[Int[Array, "tokens ..."], ...]
    """Which expert each child is; the children of one parent come by falling logit (dense gate: by index)."""
    scores: tuple[Float[Array, "tokens ..."], ...]
    """alpha of the edge from its parent."""


def route(
    params: Params, x: Float[Array | np.ndarray, "tokens d_in"], spec: Spec, key: Key[Array, ""] | None = None
) -> Routes:
    """Which experts each token goes through, and with which weights (float32); `key=None` means without noise."""
    _, token = compress(params, jnp.asarray(x), spec)
    choices = choose(params["router"], token, spec, None, key)
    shapes = [(*spec.children[layer:], x.shape[0]) for layer in range(spec.layers)]
    return Routes(
        tuple(choice.chosen.argmax(0).reshape(shape).T for choice, shape in zip(choices, shapes, strict=True)),
        tuple(choice.scores().reshape(shape).T for choice, shape in zip(choices, shapes, strict=True)),
    )


class Choice(NamedTuple):
    """What the gate of one layer decided, for each of its parents (nodes of the layer above)."""

    chosen: Float[Array, "experts fanout parents tokens"]  # one-hot over experts
    weights: Float[Array, "experts parents tokens"]  # alpha; 0 where not chosen
    loss: Float[Array, ""]

    def scores(self) -> Float[Array, "fanout parents tokens"]:
        return jnp.stack([(self.chosen[:, slot] * self.weights).sum(0) for slot in range(self.chosen.shape[1])])


def choose(router: Params, token: Array, spec: Spec, valid: Array | None, key: Array | None) -> list[Choice]:
    """The gates' choices, bottom layer first. `token` is x_down, [router_dim, tokens]; `valid` is true at real tokens.

    A gate sees the token and the keys of all ancestors. Its first linear map is applied to the token once, and to each
    possible key once; a node then adds up the rows of its ancestors.
    """
    router = cast(router, token.dtype)
    gates = [router["gate"][str(layer)] for layer in range(spec.layers)]
    noisy = spec.gate == "noisy_topk"
    key = key if noisy else None
    keys = [_unit(gate["keys"], -1) if noisy else gate["keys"] for gate in gates]
    # What is applied to a gate's context, m_l columns and (for its noise) s_l more: a block of rows for x_down, then
    # one for the key of each ancestor, the highest first.
    blocks, bias = [], []
    for layer, gate in enumerate(gates):
        maps, offset = gate["hidden"]["kernel"], gate["hidden"]["bias"]
        if key is not None:
            maps = jnp.concatenate([maps, gate["noise"]["kernel"]], 1)
            offset = jnp.pad(offset, (0, spec.experts[layer]))
        blocks.append(jax.lax.split(maps, (spec.router_dim, *spec.gate_dims[:layer:-1])))
        bias.append(offset)

    act = activation(spec.gate_activation)
    sums = _dot("ic,in->cn", jnp.concatenate([block[0] for block in blocks], 1), token)
    sums = (sums + jnp.concatenate(bias)[:, None])[:, None]  # [columns of all layers, parents = 1, tokens]
    choices: list[Choice] = []
    for layer in reversed(range(spec.layers)):
        gate, m, columns, fanout = gates[layer], spec.gate_dims[layer], bias[layer].shape[0], spec.children[layer]
        sums, own, noise = jax.lax.split(sums, (sums.shape[0] - columns, m, columns - m))
        hidden, query = act(own), gate["query"]
        if noisy:
            queries = _dot("hm,hpn->mpn", query["kernel"], hidden) + query["bias"][:, None, None]
            logits = _dot("sm,mpn->spn", keys[layer], _unit(queries, 0))
            choice = noisy_gate(logits, noise, fanout, valid, None if key is None else jax.random.fold_in(key, layer))
        else:
            to_logits = _dot("hm,sm->hs", query["kernel"], keys[layer])
            offset = _dot("m,sm->s", query["bias"], keys[layer])
            logits = _dot("hs,hpn->spn", to_logits, hidden) + offset[:, None, None]
            choice = dense_gate(logits) if spec.gate == "dense" else switch_gate(logits, fanout, valid)
        choices.append(choice)
        if layer:
            reading = [block[spec.layers - layer] for block in blocks[:layer]]  # the lower gates' rows for this key
            table = _dot("sm,mc->sc", keys[layer], jnp.concatenate(reading, 1))
            chosen = choice.chosen.reshape(spec.experts[layer], -1, token.shape[1])
            sums = jnp.concatenate([sums] * fanout, 1) + _dot("sc,spn->cpn", table, chosen)
    return choices[::-1]


def dense_gate(logits: Array) -> Choice:
    """Every expert, weighted by a softmax."""
    rank = jnp.broadcast_to(jnp.arange(logits.shape[0])[:, None, None], logits.shape)
    return Choice(_slots(rank, logits.shape[0], logits.dtype), jax.nn.softmax(logits, 0), jnp.zeros((), logits.dtype))


def switch_gate(logits: Array, fanout: int, valid: Array | None) -> Choice:
    """The `fanout` best of a softmax, renormalised; a single one keeps its probability, so that it has a gradient.

    Loss: s * sum_e (share of selections)_e * (mean probability)_e over the rows (valid token, parent).
    """
    experts, parents, tokens = logits.shape
    rank = rank_of(logits)
    kept = (rank < fanout).astype(logits.dtype)
    probabilities = jax.nn.softmax(logits, 0)
    weights = probabilities * kept
    if fanout > 1:
        weights = weights / weights.sum(0)
    rows = parents * (tokens if valid is None else valid.sum())
    selections, mass = _sum_rows(kept, valid), _sum_rows(probabilities, valid)
    loss = experts * (selections * mass).sum() / jnp.maximum(rows, 1).astype(logits.dtype) ** 2
    return Choice(_slots(rank, fanout, logits.dtype), weights, loss)


def noisy_gate(clean: Array, noise: Array, fanout: int, valid: Array | None, key: Array | None) -> Choice:
    """Softmax over the `fanout` best cosines, noisy in training; a single one keeps its raw cosine.

    Loss: CV^2(importance) + CV^2(load), https://arxiv.org/abs/1701.06538.
    """
    logits = clean
    if key is not None:
        if fanout == clean.shape[0]:
            raise ValueError(
                f"fanout={fanout} picks every expert of a layer, which leaves noisy_topk nothing to be noisy about in "
                'training; lower fanout, add experts, or use gate="dense".'
            )
        std = jax.nn.softplus(noise) + 0.01
        logits = clean + std * jax.random.normal(key, clean.shape, clean.dtype)
    rank = rank_of(logits)
    kept = rank < fanout
    weights = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), 0) if fanout > 1 else jnp.where(kept, logits, 0)
    if key is not None:
        # The chance to be kept were an expert's noise drawn again: to beat the best of those left out (for an expert
        # that is kept) or the least of those kept (for one that is not).
        left_out = jnp.where(rank == fanout, logits, 0).sum(0)
        least_kept = jnp.where(rank == fanout - 1, logits, 0).sum(0)
        load = jax.scipy.stats.norm.cdf((clean - jnp.where(kept, left_out, least_kept)) / std)
    else:
        load = (kept & (weights > 0)).astype(clean.dtype)
    loss = _squared_variation(_sum_rows(weights, valid)) + _squared_variation(_sum_rows(load, valid))
    return Choice(_slots(rank, fanout, logits.dtype), weights, loss)


def rank_of(logits: Float[Array, "experts parents tokens"]) -> Int[Array, "experts parents tokens"]:
    """Place of each expert by falling logit, the lower index first among equals: top_k's order, without a sort."""
    index = jnp.arange(logits.shape[0])[:, None, None]
    return sum(  # type: ignore[return-value]
        jnp.where(index > other, row >= logits, row > logits).astype(jnp.int32) for other, row in enumerate(logits)
    )


def _slots(rank: Array, fanout: int, dtype: Any) -> Float[Array, "experts fanout parents tokens"]:
    return (rank[:, None] == jnp.arange(fanout)[:, None, None]).astype(dtype)


def _sum_rows(values: Float[Array, "experts parents tokens"], valid: Array | None) -> Float[Array, " experts"]:
    return (values if valid is None else jnp.where(valid, values, 0)).sum((1, 2))


def _squared_variation(values: Float[Array, " experts"]) -> Float[Array, ""]:
    """Unbiased variance over squared mean; 0 for one expert."""
    if values.size == 1:
        return jnp.zeros((), values.dtype)
    return values.var(ddof=1) / (values.mean() ** 2 + 1e-10)


def _unit(vectors: Array, axis: int) -> Array:
    """Vectors of length 1 along `axis`; a zero stays zero, with a finite gradient."""
    return vectors * jax.lax.rsqrt(jnp.maximum((vectors**2).sum(axis, keepdims=True), 1e-24))


def _dot(form: str, a: Array, b: Array) -> Array:
    """Products that decide routes: no bfloat16 passes on accelerators."""
    return jnp.einsum(form, a, b, precision=jax.lax.Precision.HIGHEST)
