"""S'MoRE as an adapter of linear layers, and the one-layer mixtures that its paper compares with."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Key

from jaxmethods.adapters.base import Call, Result
from jaxmethods.adapters.smore.aggregation import apply
from jaxmethods.adapters.smore.leaves import Params, init
from jaxmethods.adapters.smore.spec import Spec
from jaxmethods.sharding import join_tokens, part_tokens


@dataclasses.dataclass(frozen=True)
class SMoRE(Spec):
    __doc__ = Spec.__doc__

    kind: ClassVar[str] = "smore"

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
        """`init` in float32; it reads neither the frozen kernel nor scores of its channels."""
        return init(key, d_in, d_out, self)

    def apply(self, leaves: Params, call: Call) -> Result:
        """y + delta, and the balance loss over the tokens that `call.token_mask` marks as real."""
        delta, aux_loss = self.delta(leaves, call.x, token_mask=call.token_mask, key=call.key, mesh=call.mesh)
        return Result(call.y + delta.astype(call.y.dtype), aux_loss if self.has_loss else None)

    def merge(self, leaves: Params, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        """Raises ValueError: each token has a tree of its own, so no kernel gives the same output."""
        raise ValueError(
            "S'MoRE depends on the token and cannot be merged into a kernel; export the adapter itself (--format peft)."
        )

    def delta(
        self,
        leaves: Params,
        x: Float[Array | np.ndarray, "*batch d_in"],
        *,
        token_mask: Bool[Array | np.ndarray, "*batch"] | None = None,
        key: Key[Array, ""] | None = None,
        mesh: Any = None,
    ) -> tuple[Float[Array, "*batch d_out"], Float[Array, ""]]:
        """`apply` for tokens in any number of axes; with a mesh, x [rows, tokens, d_in] is taken to lie as its batches do.

        Where the mesh splits both rows and tokens, the noise of "noisy_topk" is drawn in another order of tokens.
        """
        shape = x.shape[:-1]
        rows = shape if len(shape) == 2 else (1, math.prod(shape))
        join = lambda a: join_tokens(jnp.asarray(a).reshape(*rows, *a.shape[len(shape) :]), mesh)
        mask = None if token_mask is None else join(token_mask)
        delta, aux_loss = apply(leaves, join(x), self, token_mask=mask, key=key)
        return part_tokens(delta, rows, mesh).reshape(*shape, -1), aux_loss


def MixLoRA(experts: int = 8, fanout: int = 2, rank: int = 8, gate: str = "switch", **options: Any) -> SMoRE:
    """A mixture of LoRAs, delta = sum_e alpha_e W_proj B_e A_e x: the baseline of S'MoRE's paper, one linear layer of it.

    Differs from MixLoRA's own paper, https://arxiv.org/abs/2404.15159, in two ways. There expert e is B_e A_e with B_e
    [rank, d_out], and one linear router serves a whole feed-forward block; here each map has its own router, an MLP with
    keys, and all B_e write into experts * rank channels that W_proj brings to d_out. This costs (experts * rank)^2
    parameters more and loses nothing: where B_e copies (`initialization="eq_1_layer"`), W_proj's rows are the paper's B_e.

    Args:
        options: other fields of `SMoRE`.
    """
    return SMoRE(experts=(experts,), fanout=(fanout,), ranks=(rank,), gate=gate, activation="identity", **options)


def HydraLoRA(experts: int = 4, rank: int = 8, *, tied_down: bool = True, **options: Any) -> SMoRE:
    """LoRA with one A and several heads: delta = sum_e alpha_e W_proj B_e A x, alpha a softmax over all heads.

    Differs from HydraLoRA's own paper, https://arxiv.org/abs/2404.19245, as `MixLoRA` does from its own: by the space
    between B_e and W_proj, and by a router that is no single linear map. (The code of S'MoRE's paper names its HydraLoRA
    without including it.)

    Args:
        tied_down: False gives each head an A of its own.
        options: other fields of `SMoRE`.
    """
    return SMoRE(
        experts=(experts,), fanout=(experts,), ranks=(rank,), gate="dense", activation="identity", tied_down=tied_down,
        **options,
    )  # fmt: skip
