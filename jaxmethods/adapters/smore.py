"""S'MoRE: structural mixture of residual experts, https://arxiv.org/abs/2504.06426.

An adapter of a linear map whose low-rank experts stand in L small layers. A router grows, for every token, a tree of
experts from the top layer (L-1) down to the bottom one (0); the experts' outputs are then joined from the bottom up,
and one last map brings the root to the output width:

    x_{l+1}^i = sum_{n in children(i)} alpha^{i,n} sigma(B_l^n A_l^n x + W_l x_l^n),      delta = W_proj x_L     (eq. 3)

The functions here work on plain arrays and nested dicts:

>>> spec = SMoRE(experts=(4, 4), fanout=(2, 2), ranks=(2, 4))
>>> params = init(jax.random.key(0), 16, 12, spec)
>>> delta, aux_loss = apply(params, jnp.ones((5, 16)), spec)
>>> delta.shape, bool((delta == 0).all())      # at the start the adapted map equals the frozen one
((5, 12), True)

Leaves (kernels are [in, out]; every list of a spec and every index l runs from the bottom layer up; d_0 = 0 and
d_{l+1} = d_l + s_l r_l, with s_l experts of rank r_l):

    experts/a/{kernel [d, d_L], bias [d_L]}                    all experts of all layers side by side: layer, expert, rank
    experts/b/L/{kernel [s_l, r_l, d_{l+1}], bias [s_l, d_{l+1}]}
    experts/w/L/{kernel [d_l, d_{l+1}], bias [d_{l+1}]}         l >= 1
    experts/proj/{kernel [d_L, d_out], bias [d_out]}
    experts/slope [L]                                          with activation "prelu" only
    router/down/{kernel [d, router_dim], bias [router_dim]}
    router/gate/L/hidden/{kernel [in_l, m_l], bias [m_l]}       in_l = router_dim + m_{L-1} + ... + m_{l+1}, in this order
    router/gate/L/query/{kernel [m_l, m_l], bias [m_l]}
    router/gate/L/keys [s_l, m_l]
    router/gate/L/noise/kernel [in_l, s_l]                     with gate "noisy_topk" only

Inside, tokens are the last axis: the axes of experts and tree nodes are tiny, so arithmetic runs along the tokens.
Nothing is gathered or sorted: a child is a one-hot row over its pool, which keeps scatters out of the backward pass.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

Params = dict[str, Any]
"""The nested dict of an adapter's leaves, as listed above."""

GATES = ("dense", "switch", "noisy_topk")
ACTIVATIONS = ("tanh", "relu", "identity", "prelu")
GATE_ACTIVATIONS = ("relu", "tanh", "identity")
VARIANTS = ("full", "star", "shared", "child")
INITIALIZATIONS = ("w_final_zero", "eq_1_layer")

_EXACT = jax.lax.Precision.HIGHEST  # routes are decided by small differences: no bfloat16 passes on accelerators


@dataclasses.dataclass(frozen=True)
class SMoRE:
    """Shape and options of one S'MoRE adapter. Lists run from the bottom layer up, and may be given for tuples.

    Raises ValueError for lengths that differ, numbers out of range and unknown names.
    """

    kind: ClassVar[str] = "smore"

    experts: tuple[int, ...] = (4, 4)
    """s_l: how many experts each layer has."""
    fanout: tuple[int, ...] = (2, 2)
    """f_l: how many children each parent picks from layer l. The dense gate picks all and does not read this."""
    ranks: tuple[int, ...] = (8, 8)
    """r_l: the rank of each expert of a layer."""
    gate: str = "switch"
    """How children are picked and weighted: "dense" (softmax over all), "switch" (the best of a softmax,
    renormalised) or "noisy_topk" (softmax over the best noisy cosines)."""
    gate_dim: int | tuple[int, ...] = 32
    """m_l: width of the router's queries and keys, one for all layers or one a layer."""
    router_dim: int = 24
    """Width to which the router first brings the token."""
    activation: str = "tanh"
    """sigma of eq. 3: "tanh", "relu", "identity", or "prelu" with a learned slope a layer ("prelu|0.1" starts at 0.1)."""
    variant: str = "full"
    """"full" is eq. 3. ("star", "shared" and "child" are known names without an implementation.)"""
    scale: tuple[float, ...] | None = None
    """Factor of each layer's B(Ax + a) + b; None is 1 everywhere."""
    initialization: str = "w_final_zero"
    """"w_final_zero" (B and W random) or "eq_1_layer" (B and W copy, so that with sigma = identity the layers equal one
    flat mixture). Both start with W_proj = 0."""
    balance_weight: float = 0.01
    """gamma: the weight of the gates' losses, included in `aux_loss`."""
    gate_activation: str = "relu"
    """Between the two linear maps of a gate: "relu", "tanh" or "identity"."""

    def __post_init__(self) -> None:
        for name in ("experts", "fanout", "ranks", "gate_dim", "scale"):
            if isinstance(value := getattr(self, name), list):
                object.__setattr__(self, name, tuple(value))
        _check_name("gate", self.gate, GATES)
        _check_name("variant", self.variant, VARIANTS)
        _check_name("initialization", self.initialization, INITIALIZATIONS)
        _check_name("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        _check_name("activation", self.activation.split("|")[0], ACTIVATIONS)
        if "|" in self.activation:
            _initial_slope(self.activation)
        if self.variant != "full":
            raise ValueError(f'variant={self.variant!r} is not implemented yet; only variant="full" is.')

        _check_sizes("experts", self.experts)
        layers = len(self.experts)
        per_layer: dict[str, Any] = {"ranks": self.ranks}
        if self.gate != "dense":
            per_layer["fanout"] = self.fanout
        if isinstance(self.gate_dim, tuple):
            per_layer["gate_dim"] = self.gate_dim
        for name, value in per_layer.items():
            _check_sizes(name, value)
        if self.scale is not None:
            per_layer["scale"] = self.scale
        for name, value in per_layer.items():
            if len(value) != layers:
                raise ValueError(
                    f"{name}={value} has {len(value)} entries but experts={self.experts} has {layers}; "
                    "give one entry for each layer, the bottom layer first."
                )
        if self.gate != "dense" and any(f > s for f, s in zip(self.fanout, self.experts, strict=True)):
            raise ValueError(
                f"fanout={self.fanout} exceeds experts={self.experts}: a parent's children are distinct; "
                "lower fanout or add experts."
            )
        for name in ("gate_dim", "router_dim"):
            if not isinstance(value := getattr(self, name), tuple) and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if not self.balance_weight >= 0:
            raise ValueError(f"balance_weight={self.balance_weight} must not be negative; 0 turns the loss off.")

    # What the math reads ---------------------------------------------------------------------------------------

    @property
    def layers(self) -> int:
        """L."""
        return len(self.experts)

    @property
    def children(self) -> tuple[int, ...]:
        """f_l as used: `fanout`, or all experts with the dense gate."""
        return self.experts if self.gate == "dense" else self.fanout

    @property
    def widths(self) -> tuple[int, ...]:
        """d_0 = 0, d_1, ..., d_L."""
        sizes = [s * r for s, r in zip(self.experts, self.ranks, strict=True)]
        return tuple(sum(sizes[:layer]) for layer in range(self.layers + 1))

    @property
    def gate_dims(self) -> tuple[int, ...]:
        """m_l of each layer."""
        return self.gate_dim if isinstance(self.gate_dim, tuple) else (self.gate_dim,) * self.layers

    @property
    def context_dims(self) -> tuple[int, ...]:
        """in_l: width of what the gate of layer l sees, the token and the keys of all ancestors."""
        return tuple(self.router_dim + sum(self.gate_dims[layer + 1 :]) for layer in range(self.layers))

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale of each layer."""
        return (1.0,) * self.layers if self.scale is None else self.scale

    # What attaching it to a model reads ------------------------------------------------------------------------

    @property
    def token_dependent(self) -> bool:
        """Always true: each token has its own tree, so the adapter cannot be merged into the kernel."""
        return True

    @property
    def has_aux(self) -> bool:
        """Whether `aux_loss` can differ from zero."""
        return self.gate != "dense"

    @property
    def needs_rng(self) -> bool:
        """Whether training draws random numbers."""
        return self.gate == "noisy_topk"

    def init_leaves(self, key: Key[Array, ""], d_in: int, d_out: int) -> Params:
        """`init` in float32."""
        return init(key, d_in, d_out, self)

    def delta(
        self,
        leaves: Params,
        x: Float[Array | np.ndarray, "*batch d_in"],
        *,
        token_mask: Bool[Array | np.ndarray, "*batch"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> tuple[Float[Array, "*batch d_out"], Float[Array, ""]]:
        """`apply` for tokens in any number of axes."""
        flat = x.reshape(-1, x.shape[-1])
        mask = None if token_mask is None else token_mask.reshape(-1)
        delta, aux_loss = apply(leaves, flat, self, token_mask=mask, key=key)
        return delta.reshape(*x.shape[:-1], delta.shape[-1]), aux_loss


def _check_name(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        nearest = difflib.get_close_matches(value, known, n=1)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"{field}={value!r} is not one of {', '.join(map(repr, known))}{hint}")


def _check_sizes(field: str, value: Any) -> None:
    if not isinstance(value, tuple) or not value or any(not isinstance(n, int | np.integer) or n < 1 for n in value):
        raise ValueError(f"{field}={value!r} must be a tuple of whole numbers from 1 up, one for each layer.")


def _initial_slope(activation: str) -> float:
    """0.25 of "prelu|0.25", which is also the default."""
    name, _, number = activation.partition("|")
    try:
        slope = float(number or 0.25)
    except ValueError:
        slope = math.nan
    if name != "prelu" or not math.isfinite(slope):
        raise ValueError(f'activation={activation!r}: only "prelu" takes a number after "|", like "prelu|0.25".')
    return slope


# Leaves ---------------------------------------------------------------------------------------------------------


def init(key: Key[Array, ""], d_in: int, d_out: int, spec: SMoRE, dtype: Any = jnp.float32) -> Params:
    """Fresh leaves in `dtype`; with them `apply` gives exactly zero.

    A is Kaiming-uniform (a = sqrt 5) per expert, W_proj and the experts' biases are 0, B and W as `spec.initialization`
    says. The router's linear maps and their biases are U(-1/sqrt(in), 1/sqrt(in)), keys U[0, 1), the noise map 0.
    """
    widths, top = spec.widths, spec.widths[-1]
    keys = iter(jax.random.split(key, 3 + 7 * spec.layers))

    def uniform(fan_in: int, *shape: int) -> Array:
        bound = 1 / math.sqrt(fan_in)
        return jax.random.uniform(next(keys), shape, dtype, -bound, bound)

    def linear(n_in: int, n_out: int) -> Params:
        return {"kernel": uniform(n_in, n_in, n_out), "bias": uniform(n_in, n_out)}

    copies = spec.initialization == "eq_1_layer"
    b, w, gate = {}, {}, {}
    for layer, (s, r, m, context) in enumerate(
        zip(spec.experts, spec.ranks, spec.gate_dims, spec.context_dims, strict=True)
    ):
        below, width = widths[layer], widths[layer + 1]
        b_kernel = jnp.eye(s * r, width, dtype=dtype).reshape(s, r, width) if copies else uniform(r, s, r, width)
        b[str(layer)] = {"kernel": b_kernel, "bias": jnp.zeros((s, width), dtype)}
        if layer:
            w_kernel = jnp.eye(below, width, width - below, dtype) if copies else uniform(below, below, width)
            w[str(layer)] = {"kernel": w_kernel, "bias": jnp.zeros(width, dtype)}
        gate[str(layer)] = {
            "hidden": linear(context, m),
            "query": linear(m, m),
            "keys": jax.random.uniform(next(keys), (s, m), dtype),
        }
        if spec.gate == "noisy_topk":
            gate[str(layer)]["noise"] = {"kernel": jnp.zeros((context, s), dtype)}
    experts: Params = {
        "a": {"kernel": uniform(d_in, d_in, top), "bias": jnp.zeros(top, dtype)},
        "b": b,
        "proj": {"kernel": jnp.zeros((top, d_out), dtype), "bias": jnp.zeros(d_out, dtype)},
    }
    if w:
        experts["w"] = w
    if spec.activation.startswith("prelu"):
        experts["slope"] = jnp.full(spec.layers, _initial_slope(spec.activation), dtype)
    return {"experts": experts, "router": {"down": linear(d_in, spec.router_dim), "gate": gate}}


# Routing: from the top layer down -------------------------------------------------------------------------------


class Routes(NamedTuple):
    """The tree of each token: entry l of both tuples is [tokens, f_{L-1}, ..., f_l], for layer l."""

    indices: tuple[Int[Array, "tokens ..."], ...]
    """Which expert each child is; the children of one parent come by falling logit (dense: by index)."""
    scores: tuple[Float[Array, "tokens ..."], ...]
    """alpha of the edge from the parent."""


class _Choice(NamedTuple):
    """What the gate of one layer decided, for each of its `parents` nodes."""

    chosen: Float[Array, "experts parents fanout tokens"]  # one-hot over experts
    weights: Float[Array, "experts parents tokens"]  # alpha; 0 where not chosen
    loss: Float[Array, ""]

    def scores(self) -> Float[Array, "parents fanout tokens"]:
        return (self.chosen * self.weights[:, :, None]).sum(0)


def _choose(router: Params, token: Array, spec: SMoRE, valid: Array | None, key: Array | None) -> list[_Choice]:
    """The gates' choices, bottom layer first. `token` is x_down, [router_dim, tokens]; `valid` is 1 at real tokens.

    A gate sees the token and the keys of all ancestors. Its first linear map is applied to the token once, and to each
    possible key once; a node then adds up the rows of its ancestors.
    """
    gates = [router["gate"][str(layer)] for layer in range(spec.layers)]
    noisy = spec.gate == "noisy_topk"
    first = [
        jnp.concatenate([g["hidden"]["kernel"], g["noise"]["kernel"]], 1) if noisy and key is not None else g["hidden"]["kernel"]
        for g in gates
    ]
    keys = [_unit(g["keys"], -1) if noisy else g["keys"] for g in gates]
    act = _activation(spec.gate_activation)

    from_token = jnp.concatenate([kernel[: spec.router_dim] for kernel in first], 1)
    sums = _dot("ic,in->cn", from_token, token)[:, None]  # [columns of all layers, parents = 1, tokens]
    choices: list[_Choice] = []
    for layer in reversed(range(spec.layers)):
        gate, columns = gates[layer], first[layer].shape[1]
        sums, own = sums[: sums.shape[0] - columns], sums[sums.shape[0] - columns :]
        m = spec.gate_dims[layer]
        hidden = act(own[:m] + gate["hidden"]["bias"][:, None, None])
        query = gate["query"]
        if noisy:
            q = _dot("hm,hpn->mpn", query["kernel"], hidden) + query["bias"][:, None, None]
            logits = _dot("sm,mpn->spn", keys[layer], _unit(q, 0))
            noise_key = None if key is None else jax.random.fold_in(key, layer)
            choice = _noisy_gate(logits, own[m:], spec.children[layer], valid, noise_key)
        else:
            to_logits = _dot("hm,sm->hs", query["kernel"], keys[layer])
            offset = _dot("m,sm->s", query["bias"], keys[layer])
            logits = _dot("hs,hpn->spn", to_logits, hidden) + offset[:, None, None]
            choice = (_dense_gate if spec.gate == "dense" else _switch_gate)(logits, spec.children[layer], valid)
        choices.append(choice)
        if layer:
            # Rows of the lower gates' first maps that read this layer's key.
            start = [spec.router_dim + sum(spec.gate_dims[layer + 1 :])] * layer
            rows = [kernel[i : i + m] for kernel, i in zip(first[:layer], start, strict=True)]
            table = _dot("sm,mc->sc", keys[layer], jnp.concatenate(rows, 1))
            sums = sums[:, :, None] + _dot("sc,spfn->cpfn", table, choice.chosen)
            sums = sums.reshape(sums.shape[0], -1, sums.shape[-1])
    return choices[::-1]


def _dense_gate(logits: Array, fanout: int, valid: Array | None) -> _Choice:
    """Every expert, weighted by a softmax."""
    experts, parents, tokens = logits.shape
    chosen = jnp.broadcast_to(jnp.eye(experts, dtype=logits.dtype)[:, None, :, None], (experts, parents, experts, tokens))
    return _Choice(chosen, jax.nn.softmax(logits, axis=0), jnp.zeros((), logits.dtype))


def _switch_gate(logits: Array, fanout: int, valid: Array | None) -> _Choice:
    """The `fanout` best of a softmax, renormalised; a single one keeps its probability, so that it has a gradient.

    Loss: s * sum_e (share of selections)_e * (mean probability)_e over the rows (valid token, parent).
    """
    experts, parents, _ = logits.shape
    rank = _rank(logits)
    kept = (rank < fanout).astype(logits.dtype)
    probabilities = jax.nn.softmax(logits, axis=0)
    weights = probabilities * kept
    if fanout > 1:
        weights = weights / weights.sum(0)
    rows = _rows(logits, valid)
    selections, mass = _sum_rows(kept, valid), _sum_rows(probabilities, valid)
    return _Choice(_slots(rank, fanout, logits.dtype), weights, experts * (selections * mass).sum() / rows**2)


def _noisy_gate(clean: Array, noise: Array, fanout: int, valid: Array | None, key: Array | None) -> _Choice:
    """Softmax over the `fanout` best cosines, noisy in training; a single one keeps its raw cosine.

    Loss: CV^2(importance) + CV^2(load), https://arxiv.org/abs/1701.06538.
    """
    logits = clean
    if key is not None:
        std = jax.nn.softplus(noise) + 0.01
        logits = clean + std * jax.random.normal(key, clean.shape, clean.dtype)
    rank = _rank(logits)
    kept = rank < fanout
    if fanout > 1:
        weights = jax.nn.softmax(jnp.where(kept, logits, -jnp.inf), axis=0)
    else:
        weights = jnp.where(kept, logits, 0)
    if key is not None:
        # Chance to be kept were an expert's noise drawn again: above the best of those left out, or the least kept.
        left_out = jnp.where(rank == fanout, logits, 0).sum(0)
        least_kept = jnp.where(rank == fanout - 1, logits, 0).sum(0)
        load = jax.scipy.stats.norm.cdf((clean - jnp.where(kept, left_out, least_kept)) / std)
    else:
        load = (kept & (weights > 0)).astype(clean.dtype)
    loss = _squared_variation(_sum_rows(weights, valid)) + _squared_variation(_sum_rows(load, valid))
    return _Choice(_slots(rank, fanout, logits.dtype), weights, loss)


def _rank(logits: Float[Array, "experts *rest"]) -> Int[Array, "experts *rest"]:
    """Place of each expert by falling logit, the lower index first among equals: what top_k gives, without a sort."""
    index = jnp.arange(logits.shape[0]).reshape(-1, *[1] * (logits.ndim - 1))
    ahead = (logits[:, None] > logits[None]) | ((logits[:, None] == logits[None]) & (index[:, None] < index[None]))
    return ahead.sum(0, dtype=jnp.int32)


def _slots(rank: Array, fanout: int, dtype: Any) -> Float[Array, "experts parents fanout tokens"]:
    return (rank[:, :, None] == jnp.arange(fanout)[:, None]).astype(dtype)


def _rows(logits: Array, valid: Array | None) -> Array | float:
    """How many (valid token, parent) rows there are, at least 1."""
    parents, tokens = logits.shape[1:]
    return float(max(parents * tokens, 1)) if valid is None else jnp.maximum(parents * valid.sum(), 1)


def _sum_rows(values: Float[Array, "experts parents tokens"], valid: Array | None) -> Float[Array, "experts"]:
    return (values if valid is None else jnp.where(valid, values, 0)).sum((1, 2))


def _squared_variation(values: Float[Array, "experts"]) -> Float[Array, ""]:
    """Unbiased variance over squared mean; 0 for one expert."""
    if values.size == 1:
        return jnp.zeros((), values.dtype)
    return values.var(ddof=1) / (values.mean() ** 2 + 1e-10)


def _unit(vectors: Array, axis: int) -> Array:
    """Vectors of length 1 along `axis`; tiny ones stay tiny, with a finite gradient."""
    return vectors * jax.lax.rsqrt(jnp.maximum((vectors**2).sum(axis, keepdims=True), 1e-24))


def _dot(form: str, a: Array, b: Array) -> Array:
    return jnp.einsum(form, a, b, precision=_EXACT)


def _activation(name: str, slope: Array | None = None) -> Callable[[Array], Array]:
    if slope is not None:
        return lambda x: jnp.where(x > 0, x, slope * x)
    return {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda x: x}[name]


# Aggregation: from the bottom layer up ---------------------------------------------------------------------------


def apply(
    params: Params,
    x: Float[Array | np.ndarray, "tokens d_in"],
    spec: SMoRE,
    *,
    token_mask: Bool[Array | np.ndarray, "tokens"] | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "tokens d_out"], Float[Array, ""]]:
    """What the adapter adds to the frozen map's output, and the gates' loss times `balance_weight` (float32).

    `delta` has x's dtype; routing and loss are computed in float32. `token_mask` is true at real tokens; padded ones
    are left out of the loss only. `key=None` means inference: no noise. The loss is 0 without a real token.
    Raises ValueError when noise is asked for and every expert of a layer is picked.
    """
    x = jnp.asarray(x)
    h, token = _compress(params, x)
    valid = None if token_mask is None else jnp.asarray(token_mask)
    choices = _choose(params["router"], token, spec, valid, key)
    aux_loss = spec.balance_weight * sum(choice.loss for choice in choices)

    experts = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params["experts"])
    widths, tokens = spec.widths, x.shape[0]
    state: Any = None  # x_l of each node, [d_l, nodes of layer l, tokens]
    for layer, (s, r, choice) in enumerate(zip(spec.experts, spec.ranks, choices, strict=True)):
        act = _activation(spec.activation, experts["slope"][layer] if "slope" in experts else None)
        own = h[widths[layer] : widths[layer + 1]]
        b_kernel, b_bias = (spec.scales[layer] * experts["b"][str(layer)][name] for name in ("kernel", "bias"))
        if layer == 0:
            # The lowest nodes have no state of their own: each expert is computed once, then mixed for every parent.
            terms = act(jnp.einsum("srd,srn->sdn", b_kernel, own.reshape(s, r, tokens)) + b_bias[..., None])
            state = (terms[:, :, None] * choice.weights.astype(x.dtype)[:, None]).sum(0)
        else:
            parents, fanout = choice.chosen.shape[1:3]
            chosen = choice.chosen.astype(x.dtype).reshape(s, -1, tokens)
            picked = (chosen[:, None] * own.reshape(s, r, 1, tokens)).reshape(s * r, -1, tokens)
            inputs = jnp.concatenate([state, picked, chosen])
            w = experts["w"][str(layer)]
            kernel = jnp.concatenate([w["kernel"], b_kernel.reshape(s * r, -1), b_bias])
            terms = act(jnp.einsum("kd,kmn->dmn", kernel, inputs) + w["bias"][:, None, None])
            terms = terms.reshape(-1, parents, fanout, tokens)
            state = (terms * choice.scores().astype(x.dtype)).sum(2)
    delta = jnp.einsum("kn,ko->no", state[:, 0], experts["proj"]["kernel"]) + experts["proj"]["bias"]
    return delta, aux_loss.astype(jnp.float32)


def _compress(params: Params, x: Array) -> tuple[Array, Array]:
    """A x + a of all experts [d_L, tokens] in x's dtype, and x_down [router_dim, tokens] in float32."""
    a, down = params["experts"]["a"], params["router"]["down"]
    both = jnp.concatenate([a["kernel"], down["kernel"]], 1)
    out = jnp.einsum("dc,nd->cn", both, x) + jnp.concatenate([a["bias"], down["bias"]])[:, None]
    return out[: a["kernel"].shape[1]], out[a["kernel"].shape[1] :]
