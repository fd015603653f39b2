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

    experts/a/{kernel [d, d_L], bias [d_L]}                    all experts side by side: by layer, expert, rank
    experts/b/{l}/{kernel [s_l, r_l, d_{l+1}], bias [s_l, d_{l+1}]}
    experts/w/{l}/{kernel [d_l, d_{l+1}], bias [d_{l+1}]}       l >= 1
    experts/proj/{kernel [d_L, d_out], bias [d_out]}
    experts/slope [L]                                          with activation "prelu" only
    router/down/{kernel [d, router_dim], bias [router_dim]}
    router/gate/{l}/hidden/{kernel [in_l, m_l], bias [m_l]}     in_l = router_dim + m_{L-1} + ... + m_{l+1}
    router/gate/{l}/query/{kernel [m_l, m_l], bias [m_l]}
    router/gate/{l}/keys [s_l, m_l]
    router/gate/{l}/noise/kernel [in_l, s_l]                   with gate "noisy_topk" only

Inside, tokens are the last axis: the axes of experts and tree nodes are tiny, so arithmetic runs along the tokens.
Nothing is gathered or sorted: a child is a one-hot row over its pool, which keeps scatters out of the backward pass.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmethods.adapters.base import Call, Result
from jaxmethods.tree import cast, flatten, require_one_of, unflatten

Params = dict[str, Any]
"""The nested dict of an adapter's leaves, as listed above."""

GATES = ("dense", "switch", "noisy_topk")
ACTIVATIONS = ("tanh", "relu", "identity", "prelu")
GATE_ACTIVATIONS = ("relu", "tanh", "identity")
VARIANTS = ("full", "star", "shared", "child")
INITIALIZATIONS = ("w_final_zero", "eq_1_layer")


@dataclasses.dataclass(frozen=True)
class SMoRE:
    """Shape and options of one S'MoRE adapter. Its sequences run from the bottom layer up and become tuples.

    Raises ValueError for lengths that differ, numbers out of range and unknown names.
    """

    kind: ClassVar[str] = "smore"

    experts: Sequence[int] = (4, 4)
    """s_l: how many experts each layer has."""
    fanout: Sequence[int] = (2, 2)
    """f_l: how many children each parent picks from layer l. The dense gate picks all and does not read this."""
    ranks: Sequence[int] = (8, 8)
    """r_l: the rank of each expert of a layer."""
    gate: str = "switch"
    """How children are picked and weighted: "dense" (softmax over all), "switch" (the best of a softmax,
    renormalised) or "noisy_topk" (softmax over the best noisy cosines)."""
    gate_dim: int | Sequence[int] = 32
    """m_l: width of the router's queries and keys, one for all layers or one a layer."""
    router_dim: int = 24
    """Width to which the router first brings the token."""
    activation: str = "tanh"
    """sigma of eq. 3: "tanh", "relu", "identity", or "prelu" with a learned slope for each layer, which starts at 0.25
    ("prelu|0.1": at 0.1)."""
    variant: str = "full"
    """"full" is eq. 3. ("star", "shared" and "child" are known names without an implementation.)"""
    scale: Sequence[float] | None = None
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
        require_one_of("gate", self.gate, GATES)
        require_one_of("variant", self.variant, VARIANTS)
        require_one_of("initialization", self.initialization, INITIALIZATIONS)
        require_one_of("gate_activation", self.gate_activation, GATE_ACTIVATIONS)
        require_one_of("activation", self.activation.split("|")[0], ACTIVATIONS)
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
            if not isinstance(value := getattr(self, name), tuple) and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number from 1 up.")
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
        return tuple(self.experts if self.gate == "dense" else self.fanout)

    @property
    def sizes(self) -> tuple[int, ...]:
        """s_l r_l: the ranks of a layer's experts together."""
        return tuple(s * r for s, r in zip(self.experts, self.ranks, strict=True))

    @property
    def widths(self) -> tuple[int, ...]:
        """d_0 = 0, d_1, ..., d_L."""
        return tuple(sum(self.sizes[:layer]) for layer in range(self.layers + 1))

    @property
    def gate_dims(self) -> tuple[int, ...]:
        """m_l of each layer."""
        return (self.gate_dim,) * self.layers if isinstance(self.gate_dim, int) else tuple(self.gate_dim)

    @property
    def context_dims(self) -> tuple[int, ...]:
        """in_l: width of what the gate of layer l sees, the token and the keys of all ancestors."""
        return tuple(self.router_dim + sum(self.gate_dims[layer + 1 :]) for layer in range(self.layers))

    @property
    def scales(self) -> tuple[float, ...]:
        """The scale of each layer."""
        return (1.0,) * self.layers if self.scale is None else tuple(self.scale)

    # What attaching it to a model reads ------------------------------------------------------------------------

    @property
    def token_dependent(self) -> bool:
        """Always true: each token has its own tree, so the adapter cannot be merged into the kernel."""
        return True

    @property
    def has_loss(self) -> bool:
        """Whether `apply` reports a balance loss."""
        return self.gate != "dense"

    @property
    def needs_key(self) -> bool:
        """Whether training draws random numbers."""
        return self.gate == "noisy_topk"

    def init(self, key: Key[Array, ""], d_in: int, d_out: int, *, kernel: Any = None, scores: Any = None) -> Params:
        """`init` in float32."""
        return init(key, d_in, d_out, self)

    def apply(self, leaves: Params, call: Call) -> Result:
        """y + delta, and the balance loss over the tokens that `call.token_mask` marks as real."""
        delta, aux_loss = self.delta(leaves, call.x, token_mask=call.token_mask, key=call.key)
        return Result(call.y + delta.astype(call.y.dtype), aux_loss if self.has_loss else None)

    def merge(self, leaves: Params, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Raises ValueError: each token has a tree of its own, so no kernel gives the same output."""
        raise ValueError(
            "S'MoRE depends on the token and cannot be merged into a kernel; "
            "export the adapter itself (--format adapter)."
        )

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


def _check_sizes(field: str, value: Any) -> None:
    if not isinstance(value, tuple) or not value or any(not isinstance(n, int) or n < 1 for n in value):
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
    # All random numbers are drawn at once and then handed out: one generator to compile, not one for each leaf.
    drawn = jax.random.uniform(key, (count_parameters(spec, d_in, d_out).total - top * d_out,), dtype)
    taken = 0

    def take(*shape: int) -> Array:
        nonlocal taken
        taken += math.prod(shape)
        return drawn[taken - math.prod(shape) : taken].reshape(shape)

    def uniform(fan_in: int, *shape: int) -> Array:
        return (2 * take(*shape) - 1) / math.sqrt(fan_in)

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
            "keys": take(s, m),
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


class ParameterCount(NamedTuple):
    """How many numbers an adapter holds."""

    experts: int
    """A, B, W, W_proj, their biases and slopes."""
    router: int
    """The router's linear maps and keys."""

    @property
    def total(self) -> int:
        """Both together."""
        return self.experts + self.router


def count_parameters(spec: SMoRE, d_in: int, d_out: int) -> ParameterCount:
    """Size of one adapter in closed form: its kernels alone are (d_in + d_out) d_L + sum_l d_l^2."""
    widths, top = spec.widths, spec.widths[-1]
    kernels = (d_in + d_out) * top + sum(width**2 for width in widths)
    biases = top + sum(s * d for s, d in zip(spec.experts, widths[1:], strict=True)) + sum(widths[2:]) + d_out
    slopes = spec.layers if spec.activation.startswith("prelu") else 0
    router = (d_in + 1) * spec.router_dim
    for s, m, context in zip(spec.experts, spec.gate_dims, spec.context_dims, strict=True):
        router += (context + 1) * m + (m + 1) * m + s * m + (s * context if spec.gate == "noisy_topk" else 0)
    return ParameterCount(kernels + biases + slopes, router)


# The released code's weights -------------------------------------------------------------------------------------


def from_official(state: Mapping[str, Any], spec: SMoRE) -> Params:
    """Leaves from the arrays that the released code (ZimpleX/SMoRE-LLM) stores for one linear map.

    `state` maps its names, "moe_A.0" (or "moe_A.default.0", as in its live modules) and so on, to arrays whose matrices
    are [out, in]. Raises ValueError for names that are missing or unknown, and for shapes other than `spec` gives.
    """
    arrays = {name.replace(".default", "", 1): jnp.asarray(value) for name, value in state.items()}
    names = _official_names(spec)
    known = [name for parts in names.values() for name in parts]
    if missing := [name for name in known if name not in arrays]:
        raise ValueError(
            f"the S'MoRE state lacks {missing[0]!r} ({len(missing)} arrays in all), which a spec with "
            f"experts={spec.experts}, gate={spec.gate!r} and activation={spec.activation!r} needs."
        )
    if unknown := [name for name in arrays if name not in known]:
        raise ValueError(
            f"the S'MoRE state holds {unknown[0]!r} ({len(unknown)} such arrays in all), which a spec with "
            f"experts={spec.experts}, gate={spec.gate!r} and activation={spec.activation!r} has no place for."
        )
    d_in, d_out = arrays["moe_A.0"].shape[-1], arrays["moe_W_final"].shape[0]
    fresh = jax.eval_shape(lambda: to_official(init(jax.random.key(0), d_in, d_out, spec), spec))
    for name, expected in fresh.items():
        if arrays[name].shape != expected.shape:
            raise ValueError(f"{name!r} has shape {arrays[name].shape}, but the spec gives {expected.shape}: {spec}")

    flat = {}
    for path, parts in names.items():
        leaves = [arrays[name] for name in parts]
        if path.startswith("experts/a/"):  # [s_l, r_l, ...] of each layer
            leaves = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
        leaf = jnp.concatenate(leaves) if len(leaves) > 1 else leaves[0]
        flat[path] = leaf.swapaxes(-1, -2) if path.endswith("kernel") else leaf
    return unflatten(flat)


def to_official(params: Params, spec: SMoRE) -> dict[str, Array]:
    """Undoes `from_official`."""
    flat, state = flatten(params), dict[str, Array]()
    for path, parts in _official_names(spec).items():
        leaf = flat[path].swapaxes(-1, -2) if path.endswith("kernel") else flat[path]
        leaves = [leaf]
        if path.startswith("experts/a/"):
            experts = zip(jnp.split(leaf, spec.widths[1:-1]), spec.experts, spec.ranks, strict=True)
            leaves = [rows.reshape(s, r, *rows.shape[1:]) for rows, s, r in experts]
        elif path == "experts/slope":
            leaves = jnp.split(leaf, spec.layers)
        state |= dict(zip(parts, leaves, strict=True))
    return state


def _official_names(spec: SMoRE) -> dict[str, list[str]]:
    """For each of our leaves the official arrays it is made of, one or one a layer."""
    every = range(spec.layers)
    names = {
        "experts/a/kernel": [f"moe_A.{layer}" for layer in every],
        "experts/a/bias": [f"moe_A_bias.{layer}" for layer in every],
        "experts/proj/kernel": ["moe_W_final"],
        "experts/proj/bias": ["moe_W_final_bias"],
        "router/down/kernel": ["moe_downproj_x.weight"],
        "router/down/bias": ["moe_downproj_x.bias"],
    }
    for layer in every:
        gate, official = f"router/gate/{layer}", f"moe_gate.{layer}"
        names |= {
            f"experts/b/{layer}/kernel": [f"moe_B.{layer}"],
            f"experts/b/{layer}/bias": [f"moe_B_bias.{layer}"],
            f"{gate}/hidden/kernel": [f"{official}.mlp.0.weight"],
            f"{gate}/hidden/bias": [f"{official}.mlp.0.bias"],
            f"{gate}/query/kernel": [f"{official}.mlp.2.weight"],
            f"{gate}/query/bias": [f"{official}.mlp.2.bias"],
            f"{gate}/keys": [f"{official}.keys"],
        }
        if layer:
            names[f"experts/w/{layer}/kernel"] = [f"moe_W.{layer}"]
            names[f"experts/w/{layer}/bias"] = [f"moe_W_bias.{layer}"]
        if spec.gate == "noisy_topk":
            names[f"{gate}/noise/kernel"] = [f"{official}.weight_noise.weight"]
    if spec.activation.startswith("prelu"):
        names["experts/slope"] = [f"moe_expert_act_param.{layer}" for layer in every]
    return names


# Routing: from the top layer down -------------------------------------------------------------------------------
#
# Nodes of a layer are numbered slot by slot: node `slot * parents + parent`, so that a new level of the tree is a
# concatenation of what its slots hold.


class Routes(NamedTuple):
    """The tree of each token: entry l of both tuples is [tokens, f_{L-1}, ..., f_l], for layer l."""

    indices: tuple[Int[Array, "tokens ..."], ...]
    """Which expert each child is; the children of one parent come by falling logit (dense gate: by index)."""
    scores: tuple[Float[Array, "tokens ..."], ...]
    """alpha of the edge from its parent."""


def route(
    params: Params, x: Float[Array | np.ndarray, "tokens d_in"], spec: SMoRE, key: Key[Array, ""] | None = None
) -> Routes:
    """Which experts each token goes through, and with which weights (float32); `key=None` means without noise."""
    _, token = _compress(params, jnp.asarray(x), spec)
    choices = _choose(params["router"], token, spec, None, key)
    shapes = [(*spec.children[layer:], x.shape[0]) for layer in range(spec.layers)]
    return Routes(
        tuple(choice.chosen.argmax(0).reshape(shape).T for choice, shape in zip(choices, shapes, strict=True)),
        tuple(choice.scores().reshape(shape).T for choice, shape in zip(choices, shapes, strict=True)),
    )


class _Choice(NamedTuple):
    """What the gate of one layer decided, for each of its parents (nodes of the layer above)."""

    chosen: Float[Array, "experts fanout parents tokens"]  # one-hot over experts
    weights: Float[Array, "experts parents tokens"]  # alpha; 0 where not chosen
    loss: Float[Array, ""]

    def scores(self) -> Float[Array, "fanout parents tokens"]:
        return jnp.stack([(self.chosen[:, slot] * self.weights).sum(0) for slot in range(self.chosen.shape[1])])


def _choose(router: Params, token: Array, spec: SMoRE, valid: Array | None, key: Array | None) -> list[_Choice]:
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

    act = _activation(spec.gate_activation)
    sums = _dot("ic,in->cn", jnp.concatenate([block[0] for block in blocks], 1), token)
    sums = (sums + jnp.concatenate(bias)[:, None])[:, None]  # [columns of all layers, parents = 1, tokens]
    choices: list[_Choice] = []
    for layer in reversed(range(spec.layers)):
        gate, m, columns, fanout = gates[layer], spec.gate_dims[layer], bias[layer].shape[0], spec.children[layer]
        sums, own, noise = jax.lax.split(sums, (sums.shape[0] - columns, m, columns - m))
        hidden, query = act(own), gate["query"]
        if noisy:
            queries = _dot("hm,hpn->mpn", query["kernel"], hidden) + query["bias"][:, None, None]
            logits = _dot("sm,mpn->spn", keys[layer], _unit(queries, 0))
            choice = _noisy_gate(logits, noise, fanout, valid, None if key is None else jax.random.fold_in(key, layer))
        else:
            to_logits = _dot("hm,sm->hs", query["kernel"], keys[layer])
            offset = _dot("m,sm->s", query["bias"], keys[layer])
            logits = _dot("hs,hpn->spn", to_logits, hidden) + offset[:, None, None]
            choice = _dense_gate(logits) if spec.gate == "dense" else _switch_gate(logits, fanout, valid)
        choices.append(choice)
        if layer:
            reading = [block[spec.layers - layer] for block in blocks[:layer]]  # the lower gates' rows for this key
            table = _dot("sm,mc->sc", keys[layer], jnp.concatenate(reading, 1))
            chosen = choice.chosen.reshape(spec.experts[layer], -1, token.shape[1])
            sums = jnp.concatenate([sums] * fanout, 1) + _dot("sc,spn->cpn", table, chosen)
    return choices[::-1]


def _dense_gate(logits: Array) -> _Choice:
    """Every expert, weighted by a softmax."""
    rank = jnp.broadcast_to(jnp.arange(logits.shape[0])[:, None, None], logits.shape)
    return _Choice(_slots(rank, logits.shape[0], logits.dtype), jax.nn.softmax(logits, 0), jnp.zeros((), logits.dtype))


def _switch_gate(logits: Array, fanout: int, valid: Array | None) -> _Choice:
    """The `fanout` best of a softmax, renormalised; a single one keeps its probability, so that it has a gradient.

    Loss: s * sum_e (share of selections)_e * (mean probability)_e over the rows (valid token, parent).
    """
    experts, parents, tokens = logits.shape
    rank = _rank(logits)
    kept = (rank < fanout).astype(logits.dtype)
    probabilities = jax.nn.softmax(logits, 0)
    weights = probabilities * kept
    if fanout > 1:
        weights = weights / weights.sum(0)
    rows = parents * (tokens if valid is None else valid.sum())
    selections, mass = _sum_rows(kept, valid), _sum_rows(probabilities, valid)
    loss = experts * (selections * mass).sum() / jnp.maximum(rows, 1).astype(logits.dtype) ** 2
    return _Choice(_slots(rank, fanout, logits.dtype), weights, loss)


def _noisy_gate(clean: Array, noise: Array, fanout: int, valid: Array | None, key: Array | None) -> _Choice:
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
    rank = _rank(logits)
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
    return _Choice(_slots(rank, fanout, logits.dtype), weights, loss)


def _rank(logits: Float[Array, "experts parents tokens"]) -> Int[Array, "experts parents tokens"]:
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


def _activation(name: str, slope: Array | None = None) -> Callable[[Array], Array]:
    if slope is not None:
        return lambda x: jnp.where(x > 0, x, slope * x)
    return {"tanh": jnp.tanh, "relu": jax.nn.relu, "identity": lambda x: x}[name]


# Aggregation: from the bottom layer up --------------------------------------------------------------------------


def apply(
    params: Params,
    x: Float[Array | np.ndarray, "tokens d_in"],
    spec: SMoRE,
    *,
    token_mask: Bool[Array | np.ndarray, " tokens"] | None = None,
    key: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "tokens d_out"], Float[Array, ""]]:
    """What the adapter adds to the frozen map's output, and the gates' loss times `balance_weight`.

    `delta` has x's dtype; routing and loss are computed in float32. `token_mask` is true at real tokens; padded ones
    are left out of the loss only, which is 0 without a real token. `key=None` means inference: no noise.
    Differentiable in reverse mode only. Raises ValueError when noise is asked for but a layer picks all its experts.
    """
    x = jnp.asarray(x)
    compressed, token = _compress(params, x, spec)
    # What lies between the big products is wide but cheap: the backward pass computes it again, so that a scan over a
    # model's layers keeps d_L + router_dim numbers a token and not twenty times as many.
    grow = jax.checkpoint(functools.partial(_grow, spec=spec), prevent_cse=False)
    valid = None if token_mask is None else jnp.asarray(token_mask)
    state, aux_loss = grow(params, compressed, token, valid, key)
    proj = cast(params["experts"]["proj"], x.dtype)
    return jnp.einsum("kn,ko->no", state, proj["kernel"]) + proj["bias"], aux_loss


def _compress(params: Params, x: Array, spec: SMoRE) -> tuple[list[Array], Array]:
    """A x + a of each layer's experts, [s_l r_l, tokens], in x's dtype; x_down [router_dim, tokens] in float32."""
    a, down = params["experts"]["a"], params["router"]["down"]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    if x.dtype == wide:  # one product reads x once
        kernel, bias = (jnp.concatenate([p[n].astype(wide) for p in (a, down)], -1) for n in ("kernel", "bias"))
        terms = jnp.einsum("dc,nd->cn", kernel, x) + bias[:, None]
        *own, token = jax.lax.split(terms, (*spec.sizes, spec.router_dim))
        return own, token
    terms = jnp.einsum("dc,nd->cn", a["kernel"].astype(x.dtype), x) + a["bias"].astype(x.dtype)[:, None]
    # Three bfloat16 passes lose nothing that matters of a product with a bfloat16 x.
    token = jnp.einsum("dc,nd->cn", down["kernel"].astype(wide), x.astype(wide), precision=jax.lax.Precision.HIGH)
    return list(jax.lax.split(terms, spec.sizes)), token + down["bias"].astype(wide)[:, None]


def _grow(
    params: Params, compressed: list[Array], token: Array, valid: Array | None, key: Array | None, *, spec: SMoRE
) -> tuple[Array, Array]:
    """The root's state x_L, [d_L, tokens], and the gates' weighted losses, from what `_compress` gives."""
    choices = _choose(params["router"], token, spec, valid, key)
    aux_loss = spec.balance_weight * _add(choice.loss for choice in choices)

    dtype, tokens = compressed[0].dtype, token.shape[1]
    experts = cast(params["experts"], dtype)
    slopes = jnp.unstack(experts["slope"]) if "slope" in experts else (None,) * spec.layers
    state = jnp.zeros((0, 1, tokens), dtype)  # x_l of each node of layer l, [d_l, nodes, tokens]
    for layer, (own, choice) in enumerate(zip(compressed, choices, strict=True)):
        s, fanout, parents, _ = choice.chosen.shape
        own = own.reshape(s, -1, tokens)
        b = jax.tree.map(lambda leaf, scale=spec.scales[layer]: scale * leaf, experts["b"][str(layer)])
        act = _activation(spec.activation, slopes[layer])
        if layer == 0:
            # The lowest nodes have no state of their own: each expert is computed once, then mixed for every parent.
            terms = act(jnp.einsum("srd,srn->sdn", b["kernel"], own) + b["bias"][..., None])
            state = _mix(choice.weights.astype(dtype), terms[:, :, None])
        else:
            # B A x of a node's expert and W x_l in one product: A x is set to zero but for the node's expert.
            chosen = choice.chosen.astype(dtype).reshape(s, -1, tokens)
            picked = jnp.stack([chosen[:, node, None] * own for node in range(fanout * parents)], 2)
            inputs = jnp.concatenate([state, picked.reshape(spec.sizes[layer], -1, tokens), chosen])
            w = experts["w"][str(layer)]
            kernel = jnp.concatenate([w["kernel"], b["kernel"].reshape(spec.sizes[layer], -1), b["bias"]])
            terms = act(jnp.einsum("kd,kmn->dmn", kernel, inputs) + w["bias"][:, None, None])
            terms = terms.reshape(-1, fanout, parents, tokens).swapaxes(0, 1)
            state = _mix(choice.scores().astype(dtype), terms)
    return state.squeeze(1), aux_loss.astype(jnp.float32)


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
