"""What a S'MoRE adapter costs and how many trees it can grow, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxmethods.adapters.smore.spec import VARIANTS, Spec, check_fanout, check_sizes
from jaxmethods.tree import require_one_of


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


def count_parameters(spec: Spec, d_in: int, d_out: int) -> ParameterCount:
    """Size of one adapter; with variant "full" its kernels alone are (d_in + d_out) d_L + sum_l d_l^2."""
    widths, top, down = spec.widths, spec.widths[-1], sum(spec.down_sizes)
    experts = (d_in + 1) * down + (top + 1) * d_out
    experts += sum((spec.sizes[pool] + spec.experts[pool]) * widths[pool + 1] for pool in spec.pools)
    experts += sum((widths[layer] + 1) * widths[layer + 1] for layer in range(1, spec.layers))
    experts += spec.layers if spec.activation.startswith("prelu") else 0
    router = (d_in + 1) * spec.router_dim
    for s, m, context in zip(spec.experts, spec.gate_dims, spec.context_dims, strict=True):
        router += (context + 1) * m + (m + 1) * m + s * m + (s * context if spec.gate == "noisy_topk" else 0)
    return ParameterCount(experts, router)


class MultiplyAdds(NamedTuple):
    """Multiply-adds for one token; a multiply-add is two floating-point operations."""

    ends: int
    """A x and W_proj x_L: for a square map the 2 d d_L of a LoRA of rank d_L."""
    layers: int
    """B and W along the tree, the paper's Delta'."""
    router: int
    """The gates."""

    @property
    def total(self) -> int:
        """All together."""
        return self.ends + self.layers + self.router


def count_multiply_adds(spec: Spec, d_in: int, d_out: int) -> MultiplyAdds:
    """Arithmetic of the forward pass for one token as the paper counts it, biases and activations left out.

    The layers' part, Delta' = sum_l F_l d_{l+1} (d_l + r_l), is the paper's bound of its compute table: each node
    applies B of its expert and W to its own state. `apply` does a little more, since it multiplies by zeros where the
    paper's code gathers; for variants "star" and "child" it does less, since W meets the sum of a parent's children.
    """
    widths, nodes = spec.widths, spec.nodes
    ends = d_in * sum(spec.down_sizes) + widths[-1] * d_out
    layers = sum(nodes[n] * widths[n + 1] * (widths[n] + spec.ranks[n]) for n in range(spec.layers))
    router = d_in * spec.router_dim
    for s, m, context, parents in zip(spec.experts, spec.gate_dims, spec.context_dims, nodes[1:], strict=True):
        router += parents * m * (context + m + s)
    return MultiplyAdds(ends, layers, router)


def count_structures(experts: Sequence[int], fanout: Sequence[int], variant: str = "full") -> int:
    """Structural flexibility: how many different x_L all routings of a token can give, with alpha 0 or 1.

    "full", "shared"  prod_l C(s_l, f_l)^F_{l+1}, the number of trees, which a non-linear sigma tells apart
    "star", "child"   G_L of G_{l+1} = C(s_l, f_l) C(G_l + f_l - 1, f_l), G_0 = 1: the states below are summed, so it
                      does not matter which of the parent's experts each belongs to
    "momor"           a flat mixture over the same experts (eq. 2), an upper bound

    >>> [count_structures((4, 4), (2, 2), variant) for variant in ("momor", "star", "full")]
    [66, 126, 216]

    Raises ValueError for sizes that do not fit together and for unknown variants.
    """
    require_one_of("variant", variant, (*VARIANTS, "momor"))
    experts, fanout = tuple(experts), tuple(fanout)
    check_sizes("experts", experts)
    check_sizes("fanout", fanout)
    if len(experts) != len(fanout):
        raise ValueError(f"experts={experts} and fanout={fanout} need one entry for each layer.")
    check_fanout(experts, fanout)
    if variant == "shared" and len(set(experts)) > 1:
        raise ValueError(f'variant="shared" has one pool of experts, but experts={experts} differ between layers.')
    nodes = [math.prod(fanout[layer:]) for layer in range(len(experts) + 1)]
    picks = [math.comb(s, f) for s, f in zip(experts, fanout, strict=True)]
    if variant in ("star", "child"):
        count = 1
        for pick, f in zip(picks, fanout, strict=True):
            count = pick * math.comb(count + f - 1, f)
        return count
    if variant == "momor":
        lower = zip(experts[:-1], fanout, nodes, strict=False)
        return picks[-1] * math.prod(sum(math.comb(s, i) for i in range(f, min(n, s) + 1)) for s, f, n in lower)
    return math.prod(pick**parents for pick, parents in zip(picks, nodes[1:], strict=True))
