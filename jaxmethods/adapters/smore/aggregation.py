"""Aggregation: the states of each token's tree, from the bottom layer up; `Spec.variant` lists the equations."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxmethods.adapters.smore.activations import activation
from jaxmethods.adapters.smore.compression import compress
from jaxmethods.adapters.smore.leaves import Params
from jaxmethods.adapters.smore.routing import Choice, choose
from jaxmethods.adapters.smore.spec import Spec
from jaxmethods.kernels.expand import expand
from jaxmethods.tree import cast


def apply(
    params: Params,
    x: Float[Array | np.ndarray, "tokens d_in"],
    spec: Spec,
    *,
    token_mask: Bool[Array | np.ndarray, " tokens"] | None = None,
    key: Key[Array, ""] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "tokens d_out"], Float[Array, ""]]:
    """What the adapter adds to the frozen map's output, and the gates' loss times `balance_weight`.

    `delta` has x's dtype; routing and loss are computed in float32. `token_mask` is true at real tokens; padded ones
    are left out of the loss only, which is 0 without a real token. `key=None` means inference: no noise. `implementation`
    is of the last product, see `kernels.expand`. Differentiable in reverse mode only. Raises ValueError when noise is asked
    for but a layer picks all its experts.
    """
    x = jnp.asarray(x)
    compressed, token = compress(params, x, spec)
    # What lies between the big products is wide but cheap: the backward pass computes it again, so that a scan over a
    # model's layers keeps d_L + router_dim numbers a token and not twenty times as many.
    recomputed = jax.checkpoint(functools.partial(grow, spec=spec), prevent_cse=False)
    valid = None if token_mask is None else jnp.asarray(token_mask)
    state, aux_loss = recomputed(params, compressed, token, valid, key)
    proj = params["experts"]["proj"]
    return expand(state, proj["kernel"], proj["bias"], implementation=implementation), aux_loss


def grow(
    params: Params, compressed: list[Array], token: Array, valid: Array | None, key: Array | None, *, spec: Spec
) -> tuple[Array, Array]:
    """The root's state x_L, [d_L, tokens], and the gates' weighted losses, from what `compress` gives."""
    choices = choose(params["router"], token, spec, valid, key)
    aux_loss = spec.balance_weight * _add(choice.loss for choice in choices)

    dtype, tokens = compressed[0].dtype, token.shape[1]
    experts = cast(params["experts"], dtype)
    slopes = jnp.unstack(experts["slope"]) if "slope" in experts else (None,) * spec.layers
    outside = spec.variant in ("full", "shared")  # sigma of an expert's whole term, not of the state from below alone
    state = jnp.zeros((0, 1, tokens), dtype)  # x_l of each node of layer l, [d_l, nodes, tokens]
    for layer, choice in enumerate(cast(choices, dtype)):
        s, r, pool = spec.experts[layer], spec.ranks[layer], spec.pool(layer)
        own = jnp.broadcast_to(compressed[pool].reshape(-1, r, tokens), (s, r, tokens))
        b = jax.tree.map(lambda leaf, scale=spec.scales[layer]: scale * leaf, experts["b"][str(pool)])
        act = activation(spec.activation, slopes[layer])
        if layer == 0:
            # The lowest nodes have no state of their own: each expert is computed once, then mixed for every parent.
            terms = jnp.einsum("srd,srn->sdn", b["kernel"], own) + b["bias"][..., None]
            terms = act(terms) if outside else terms
            state = _mix(choice.weights, terms[:, :, None])
            continue
        w = experts["w"][str(layer)]
        kernel = jnp.concatenate([w["kernel"], b["kernel"].reshape(s * r, -1), b["bias"]])
        if outside:
            state = _map_then_mix(choice, own, state, kernel, w["bias"], act)
        else:
            edges = choice.scores()
            edges = edges if spec.variant == "star" else jnp.ones_like(edges)
            state = _mix_then_map(choice, own, act(state), edges, kernel, w["bias"])
    return state.squeeze(1), aux_loss.astype(jnp.float32)


def _map_then_mix(
    choice: Choice, own: Array, state: Array, kernel: Array, bias: Array, act: Callable[[Array], Array]
) -> Array:
    """sum_n alpha_n sigma(B_n own_n + b_n + W state_n + bias) of each parent, with W, B and b side by side in `kernel`."""
    s, fanout, parents, tokens = choice.chosen.shape
    # Both products in one: A x is set to zero but for the node's expert.
    chosen = choice.chosen.reshape(s, -1, tokens)
    picked = jnp.stack([chosen[:, node, None] * own for node in range(fanout * parents)], 2)
    inputs = jnp.concatenate([state, picked.reshape(-1, fanout * parents, tokens), chosen])
    terms = act(jnp.einsum("kd,kmn->dmn", kernel, inputs) + bias[:, None, None])
    return _mix(choice.scores(), terms.reshape(-1, fanout, parents, tokens).swapaxes(0, 1))


def _mix_then_map(choice: Choice, own: Array, state: Array, edges: Array, kernel: Array, bias: Array) -> Array:
    """sum_n alpha_n (B_n own_n + b_n) + edge_n (W state_n + bias) of each parent.

    All this is linear, so that the children are summed first and one product serves each parent.
    """
    _, fanout, parents, tokens = choice.chosen.shape
    below = _mix(edges, state.reshape(-1, fanout, parents, tokens).swapaxes(0, 1))
    mixed = (choice.weights[:, None] * own[:, :, None]).reshape(-1, parents, tokens)
    mapped = jnp.einsum("kd,kpn->dpn", kernel, jnp.concatenate([below, mixed, choice.weights]))
    return mapped + bias[:, None, None] * _add(edges)


@jax.custom_vjp
def _mix(weights: Array, terms: Array) -> Array:
    """sum_c weights[c, p, n] terms[c, d, p, n], as [d, p, n]; an axis p of size 1 in `terms` is shared by all parents.

    Written out over the tiny axes c and p, in both directions, since XLA's CPU reductions over them take ten times as
    long as the additions.
    """
    return _add(weight * term for weight, term in zip(weights, terms, strict=True))


def _mix_forward(weights: Array, terms: Array) -> tuple[Array, tuple[Array, Array]]:
    return _mix(weights, terms), (weights, terms)


def _mix_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    weights, terms = saved
    for_weights = terms * cotangent
    while for_weights.shape[1] % 2 == 0:
        for_weights = _add(jax.lax.split(for_weights, (for_weights.shape[1] // 2,) * 2, 1))
    if terms.shape[2] == 1:
        for_terms = _add(weights[:, None, p] * cotangent[:, p] for p in range(weights.shape[1]))[:, :, None]
    else:
        for_terms = weights[:, None] * cotangent
    return for_weights.sum(1), for_terms


_mix.defvjp(_mix_forward, _mix_backward)


def _add(arrays: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, arrays)
