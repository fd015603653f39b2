"""The cotangents of `expand` by a TPU kernel: both products from one tile of g, which is read once.

Names of dimensions: N tokens, n of them in one block; O output channels, o of them in one block; k channels (16 to some
hundreds). The grid is (N / n, O / o). On the chip stay, all the time, the kernel [k, O] and the sum for its gradient [k, O], and
for a block of tokens the sum [k, n]; only g is streamed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from jaxmethods.kernels.one_device import VMEM, VMEM_LIMIT

TOKENS, OUTPUTS = 512, 2048
"""Most tokens and output channels of one block."""
_LANES = 128


class Tiles(NamedTuple):
    """Lengths of blocks."""

    tokens: int
    d_out: int


def tiles(rows: int, tokens: int, d_out: int, dtype: Any) -> Tiles | None:
    """The blocks for these sizes; None where there are none: another dtype, no token, or gradients too large for the chip."""
    if dtype not in (jnp.float32, jnp.bfloat16) or not tokens:
        return None
    widths = range(OUTPUTS, 0, -_LANES)
    found = Tiles(min(TOKENS, tokens), next((o for o in widths if d_out % o == 0), d_out))
    return found if vmem(rows, d_out, found, dtype) <= VMEM else None


def vmem(rows: int, d_out: int, sizes: Tiles, dtype: Any) -> int:
    """Bytes of VMEM that the blocks take: g, rows, the kernel and both results, each twice, and the sum for the state."""
    size, k = jnp.dtype(dtype).itemsize, -(-rows // 16) * 16
    streamed = size * (sizes.tokens * sizes.d_out + 2 * k * sizes.tokens)
    return 2 * (streamed + size * k * d_out + 4 * k * d_out) + 4 * k * sizes.tokens


def hbm_bytes(channels: int, rows: int, tokens: int, d_out: int, dtype: Any) -> int:
    """Bytes that the kernel reads and writes, grid x blocks, a block that stays the same from step to step once: g, the rows and
    the kernel in, both results out, each of them once."""
    size = jnp.dtype(dtype).itemsize
    return size * (tokens * d_out + (rows + channels) * tokens + channels * d_out) + 4 * rows * d_out


def cotangents(
    rows: Float[Array, "rows tokens"],
    kernel: Float[Array, "channels d_out"],
    g: Float[Array, "tokens d_out"],
    *,
    interpret: Any = False,
) -> tuple[Float[Array, "channels tokens"], Float[Array, "rows d_out"]]:
    """See `xla.cotangents`. `interpret` is given to `pl.pallas_call`."""
    (tokens, d_out), channels = g.shape, len(kernel)
    sizes = tiles(len(rows), tokens, d_out, g.dtype)
    assert sizes is not None, "checked by api.expand"
    resident = lambda height: pl.BlockSpec((height, d_out), lambda i, j: (0, 0))
    by_tokens = lambda height: pl.BlockSpec((height, sizes.tokens), lambda i, j: (0, i))
    varying = jax.typeof(g).manual_axis_type  # inside `shard_map`
    result = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)
    return pl.pallas_call(
        functools.partial(_body, sizes=sizes, tokens=tokens),
        grid=(pl.cdiv(tokens, sizes.tokens), d_out // sizes.d_out),
        in_specs=[
            by_tokens(len(rows)),
            resident(channels),
            pl.BlockSpec((sizes.tokens, sizes.d_out), lambda i, j: (i, j)),
        ],
        out_specs=[by_tokens(channels), resident(len(rows))],
        out_shape=[result((channels, tokens), g.dtype), result((len(rows), d_out), jnp.float32)],
        scratch_shapes=[pltpu.VMEM((channels, sizes.tokens), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * tokens * d_out * (channels + len(rows)),
            bytes_accessed=hbm_bytes(channels, len(rows), tokens, d_out, g.dtype),
            transcendentals=0,
        ),
        interpret=interpret,
        name="expand_cotangents",
    )(rows, kernel, g)


def _body(rows: Any, kernel: Any, g: Any, d_state: Any, d_rows: Any, total: Any, *, sizes: Tiles, tokens: int) -> None:
    i, j = pl.program_id(0), pl.program_id(1)
    columns = pl.ds(j * sizes.d_out, sizes.d_out) if d_rows.shape[1] > sizes.d_out else pl.ds(0, sizes.d_out)
    tile, states = g[...], rows[...]
    if tokens % sizes.tokens:  # what lies past the last token may be anything
        left = tokens - i * sizes.tokens
        tile = jnp.where(jax.lax.broadcasted_iota(jnp.int32, tile.shape, 0) < left, tile, 0)
        states = jnp.where(jax.lax.broadcasted_iota(jnp.int32, states.shape, 1) < left, states, 0)
    dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)
    for_state = dot(kernel[:, columns], tile, (((1,), (1,)), ((), ())))
    for_rows = dot(states, tile, (((1,), (0,)), ((), ())))
    total[...] = jnp.where(j == 0, for_state, total[...] + for_state)
    d_rows[:, columns] = jnp.where(i == 0, for_rows, d_rows[:, columns] + for_rows)
    d_state[...] = total[...].astype(d_state.dtype)
