"""S²FT: some input or output channels of a linear map are trained, whole and in place, https://arxiv.org/abs/2412.06289.

>>> adapter = S2FT(share=0.5)
>>> leaves = adapter.init(jax.random.key(0), 4, 3)
>>> jax.tree.map(jnp.shape, leaves)
{'delta': (2, 3), 'indices': (2,)}
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxmethods.adapters.base import Call, Result
from jaxmethods.kernels.linear import linear
from jaxmethods.tree import Tree, require_one_of

SIDES = ("in", "out")


@dataclasses.dataclass(frozen=True)
class S2FT:
    """y = x (kernel + delta), where delta is zero outside of a few rows (`side="in"`) or columns (`side="out"`).

    Channels are drawn at random, equally many in each layer (the paper's S²FT-R and its uniform budget); they stay what
    they were drawn as, in the integer leaf `indices`. Nothing is permuted: the channels are gathered (section 3.2 permutes
    them to make them adjacent; the function is the same). The trained leaf is the change and not the new value, so
    weight decay pulls towards the pretrained kernel. Delta starts at zero and is computed with in the dtype of x.

    The paper's recipe: `side="in"` on o_proj (whole heads: `block_size=head_dim`) and on down_proj; with grouped-query
    attention on down_proj alone, `share=0.03`.

    Args:
        side: "in" chooses what the layer reads (o_proj, down_proj), "out" what it writes (v_proj, up_proj).
        share: of the blocks of that side; rounded down, at least one block.
        block_size: adjacent channels that are chosen together.
    """

    side: str = "in"
    share: float = 0.03
    block_size: int = 1

    kind: ClassVar[str] = "s2ft"
    has_loss: ClassVar[bool] = False
    needs_key: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_one_of("S2FT side", self.side, SIDES)
        if not 0 < self.share <= 1:
            raise ValueError(f"S2FT share={self.share} must lie in (0, 1].")
        if self.block_size < 1:
            raise ValueError(f"S2FT block_size={self.block_size} must be at least 1.")

    def init(self, key: Key[Array, ""], d_in: int, d_out: int) -> dict[str, Array]:
        """Leaves `indices` [s], ascending, and `delta` [s, d_out] or [d_in, s].

        Raises:
            ValueError: a block_size that does not divide the side.
        """
        width = d_in if self.side == "in" else d_out
        blocks, rest = divmod(width, self.block_size)
        if rest:
            raise ValueError(f"S2FT block_size={self.block_size} does not divide the layer's {width} channels.")
        chosen = jnp.sort(jax.random.permutation(key, blocks)[: max(int(self.share * blocks), 1)])
        indices = (chosen[:, None] * self.block_size + jnp.arange(self.block_size)).reshape(-1).astype(jnp.int32)
        shape = (len(indices), d_out) if self.side == "in" else (d_in, len(indices))
        return {"delta": jnp.zeros(shape, jnp.float32), "indices": indices}

    def apply(self, leaves: Tree, call: Call) -> Result:
        delta = leaves["delta"].astype(call.x.dtype)
        if self.side == "in":
            return Result(call.y + linear(jnp.take(call.x, leaves["indices"], axis=-1), delta).astype(call.y.dtype))
        return Result(call.y.at[..., leaves["indices"]].add(linear(call.x, delta).astype(call.y.dtype)))

    def merge(self, leaves: Tree, kernel: Float[Array, "d_in d_out"]) -> Float[Array, "d_in d_out"]:
        at: Any = leaves["indices"] if self.side == "in" else (slice(None), leaves["indices"])
        return kernel.astype(jnp.float32).at[at].add(leaves["delta"].astype(jnp.float32)).astype(kernel.dtype)
