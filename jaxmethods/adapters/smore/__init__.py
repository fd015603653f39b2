"""S'MoRE: structural mixture of residual experts, https://arxiv.org/abs/2504.06426.

An adapter of a linear map whose low-rank experts stand in L small layers. A router grows, for every token, a tree of
experts from the top layer (L-1) down to the bottom one (0); the experts' outputs are then joined from the bottom up,
and one last map brings the root to the output width:

    x_{l+1}^i = sum_{n in children(i)} alpha^{i,n} sigma(B_l^n A_l^n x + W_l x_l^n),      delta = W_proj x_L     (eq. 3)

The functions here work on plain arrays and nested dicts:

>>> import jax, jax.numpy as jnp
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

With variant "shared" there is only the pool b/0, A has its s r columns, and d_l = s r for l >= 1; with `tied_down` A has
the r columns that all experts share.

Inside, tokens are the last axis: the axes of experts and tree nodes are tiny, so arithmetic runs along the tokens.
Nothing is gathered or sorted: a child is a one-hot row over its pool, which keeps scatters out of the backward pass.
"""

from jaxmethods.adapters.smore.activations import ACTIVATIONS, GATE_ACTIVATIONS
from jaxmethods.adapters.smore.adapter import HydraLoRA, MixLoRA, SMoRE
from jaxmethods.adapters.smore.aggregation import apply
from jaxmethods.adapters.smore.counts import (
    MultiplyAdds,
    ParameterCount,
    count_multiply_adds,
    count_parameters,
    count_structures,
)
from jaxmethods.adapters.smore.leaves import Params, init
from jaxmethods.adapters.smore.official import (
    config_from_spec,
    from_official,
    join_state,
    spec_from_config,
    split_state,
    to_official,
)
from jaxmethods.adapters.smore.routing import Routes, route
from jaxmethods.adapters.smore.spec import GATES, INITIALIZATIONS, VARIANTS, Spec

__all__ = [
    "ACTIVATIONS", "GATES", "GATE_ACTIVATIONS", "INITIALIZATIONS", "VARIANTS", "HydraLoRA", "MixLoRA", "MultiplyAdds",
    "ParameterCount", "Params", "Routes", "SMoRE", "Spec", "apply", "config_from_spec", "count_multiply_adds", "count_parameters",
    "count_structures", "from_official", "init", "join_state", "route", "spec_from_config", "split_state", "to_official",
]  # fmt: skip
