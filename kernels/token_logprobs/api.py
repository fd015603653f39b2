"""Log-probabilities of given tokens under a softmax over the vocabulary, without ever holding [tokens, vocab].

>>> hidden, unembedding = jnp.eye(2, 3), jnp.zeros((3, 4))
>>> token_logprobs(hidden, unembedding, jnp.array([0, 3])).round(3).tolist()  # -log(4)
[-1.3860000371932983, -1.3860000371932983]
>>> token_statistics(hidden, unembedding, jnp.array([0, 3])).entropy.round(3).tolist()
[1.3860000371932983, 1.3860000371932983]
"""

import re
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.one_device import one_device
from jaxmethods.kernels.token_logprobs import pallas_tpu, reference, xla
from jaxmethods.kernels.token_logprobs.reference import TokenStatistics

IMPLEMENTATIONS = {
    "xla": xla.token_statistics,
    "pallas_tpu": pallas_tpu.token_statistics,
    "reference": reference.token_statistics,
}


def token_logprobs(
    hidden: Float[Array | np.ndarray, "tokens dim"],
    unembedding: Float[Array | np.ndarray, "dim vocab"] | Float[Array | np.ndarray, "vocab dim"],
    targets: Int[Array | np.ndarray, "tokens"],
    *,
    softcap: float | None = None,
    where: Bool[Array | np.ndarray, "tokens"] | None = None,
    axis_name: str | None = None,
    transposed: bool = False,
    compact: bool | None = None,
    implementation: str | None = None,
) -> Float[Array, "tokens"]:
    """log softmax(cap(hidden @ unembedding))[target] of each token, float32; cap(z) = softcap * tanh(z / softcap).

    The product is in the inputs' dtype with float32 sums, the softmax in float32. Differentiable once, in reverse mode,
    in hidden and unembedding. With N wanted tokens, width D and vocabulary V it costs 2NDV operations, and in training

    - 4NDV in all when the unembedding is frozen: the gradient of a log-probability in its hidden state scales with the
      cotangent, so the forward pass computes it while it holds the logits, and the backward pass multiplies;
    - 8NDV in all when the unembedding is trained: the backward pass computes the logits again.

    Holding all logits would cost 4NDV and 6NDV.

    Args:
        targets: the token whose log-probability is asked at each place; the result is nan where a wanted one lies
            outside of the vocabulary.
        softcap: soft limit on logits (Gemma-2, https://arxiv.org/abs/2408.00118, section 2).
        where: true at wanted tokens. The others give 0 and no gradient, whatever they hold.
        axis_name: inside `jax.shard_map` (with `check_vma`, its default), the mesh axis over which the vocabulary is
            split: `unembedding` is this device's shard in the axis' order, targets are ids in the whole vocabulary.
            Value and gradients are those of the whole.
        transposed: `unembedding` is [vocab, dim], as embedding tables are. `table.T` without it gives the same numbers,
            but a compiler may copy the whole table.
        compact: move the tokens that `where` wants to the front and compute only their blocks. This gathers rows over
            the whole token axis, so it should stay off where `jax.jit` splits that axis over devices. None: on, on a
            CPU when there is one device or the call stands inside a `shard_map` over all mesh axes; else off.
        implementation: "xla" (blocks of the vocabulary, and of tokens when compact), "pallas_tpu" (kernels for one TPU device:
            alone, or inside a `shard_map` over all mesh axes; always compact) or "reference" (holds all logits). None
            chooses for the default backend; who compiles for another device passes what `implementation_for` gives.

    Raises:
        ValueError: shapes that do not fit together, a softcap <= 0, an unknown implementation, or arrays that "pallas_tpu"
            does not take (see `pallas_tpu.tiles`).
    """
    return _statistics(
        hidden, unembedding, targets, softcap=softcap, where=where, axis_name=axis_name, transposed=transposed,
        compact=compact, implementation=implementation, everything=False,
    ).logps  # fmt: skip


def token_statistics(
    hidden: Float[Array | np.ndarray, "tokens dim"],
    unembedding: Float[Array | np.ndarray, "dim vocab"] | Float[Array | np.ndarray, "vocab dim"],
    targets: Int[Array | np.ndarray, "tokens"],
    *,
    softcap: float | None = None,
    where: Bool[Array | np.ndarray, "tokens"] | None = None,
    axis_name: str | None = None,
    transposed: bool = False,
    compact: bool | None = None,
    implementation: str | None = None,
) -> TokenStatistics:
    """`token_logprobs` with the log-sum-exp of each token's logits and the entropy of its distribution, all [tokens], float32.

    Differentiable like `token_logprobs`, which documents arguments and errors, in each of the three. A backward pass always
    computes the logits again: 6NDV operations in all when the unembedding is frozen, 8NDV when it is trained; that of
    "pallas_tpu" is the "xla" form's.
    """
    return _statistics(
        hidden, unembedding, targets, softcap=softcap, where=where, axis_name=axis_name, transposed=transposed,
        compact=compact, implementation=implementation, everything=True,
    )  # fmt: skip


def implementation_for(device: Any, hidden: Any, unembedding: Any, *, transposed: bool = False) -> str:
    """The implementation that None stands for on a device, which need not be present, for arrays or their shapes.

    The caller answers for it that each device computes on its own: a kernel cannot be split by `jax.jit`.
    """
    better = _BETTER_TRANSPOSED if transposed else _BETTER
    if re.match(better, device.device_kind) and pallas_tpu.fits(hidden, unembedding, transposed=transposed):
        return "pallas_tpu"
    return "xla"


_BETTER, _BETTER_TRANSPOSED = r"TPU v[56]", r"TPU (v5p?$|v6)"
"""Where the kernels take less memory or fewer bytes by the compiler's report (docs/kernels.md); older ones have too little VMEM."""


def _statistics(
    hidden: Any,
    unembedding: Any,
    targets: Any,
    *,
    where: Any,
    transposed: bool,
    implementation: str | None,
    **options: Any,
) -> TokenStatistics:
    dim = unembedding.shape[1 if transposed else 0]
    if hidden.shape[1] != dim:
        names = "[vocab, dim]" if transposed else "[dim, vocab]"
        raise ValueError(
            f"hidden has width {hidden.shape[1]} and unembedding {names} has shape {tuple(unembedding.shape)}; "
            f"pass transposed={not transposed} if its axes are the other way round."
        )
    softcap = options["softcap"]
    if softcap is not None and softcap <= 0:
        raise ValueError(f"{softcap=} must be positive; use None for no cap.")
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{implementation=} is unknown; use None or one of {', '.join(IMPLEMENTATIONS)}.")
    hidden, unembedding = jnp.asarray(hidden), jnp.asarray(unembedding)
    if implementation is None:
        device = one_device()
        implementation = implementation_for(device, hidden, unembedding, transposed=transposed) if device else "xla"
    where = None if where is None else jnp.asarray(where)
    return IMPLEMENTATIONS[implementation](
        hidden, unembedding, jnp.asarray(targets), where, transposed=transposed, **options
    )
