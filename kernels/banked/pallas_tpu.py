"""`banked_linear` by a TPU kernel: the ids of the rows' entries are known before the first step (scalar prefetch), so that each
step fetches its row's entry from the bank itself while the last one is multiplied.

The grid is (d_out / o, rows), o output channels in one block: adjacent rows with one entry then fetch it once.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxmethods.kernels.one_device import VMEM, VMEM_LIMIT

_LANES = 128


def tile(time: int, d_in: int, d_out: int, dtype: Any, bank_dtype: Any) -> int | None:
    """How many output channels one block has: all of them, or as many whole lanes as divide them and fit on the chip.

    None where there are none: another dtype, no token, or rows too long.
    """
    floats = (jnp.float32, jnp.bfloat16)
    if dtype not in floats or bank_dtype not in floats or not time:
        return None
    widths = [d_out, *(o for o in range(d_out // _LANES * _LANES, 0, -_LANES) if d_out % o == 0)]
    return next((o for o in widths if vmem(time, d_in, o, dtype, bank_dtype) <= VMEM), None)


def vmem(time: int, d_in: int, o: int, dtype: Any, bank_dtype: Any) -> int:
    """Bytes of VMEM: a row, an entry's block and the result, each twice, the entry in x's dtype, and float32 sums."""
    size, t = jnp.dtype(dtype).itemsize, -(-time // 16) * 16
    entry = d_in * max(o, 16)
    return 2 * (size * t * (d_in + o) + jnp.dtype(bank_dtype).itemsize * entry) + size * entry + 4 * t * o


def hbm_bytes(rows: Any, time: int, d_in: int, d_out: int, o: int, dtype: Any, bank_dtype: Any) -> int:
    """Bytes that the kernel reads and writes: grid x blocks; an entry is fetched again where a row's differs from the last row's.

    `rows` are ids as numpy has them; all rows of x are read for each of the d_out / o blocks.
    """
    size, blocks = jnp.dtype(dtype).itemsize, d_out // o
    kept = [max(int(row), 0) for row in rows]
    fetched = 1 + sum(a != b for a, b in itertools.pairwise(kept))
    entries = jnp.dtype(bank_dtype).itemsize * fetched * d_in * d_out
    return size * len(kept) * time * (blocks * d_in + d_out) + entries + 4 * len(kept)


def banked_linear(
    x: Float[Array, "batch time d_in"],
    bank: Float[Array, "size _ _"],
    rows: Int[Array, " batch"],
    *,
    transposed: bool,
    interpret: Any = False,
) -> Float[Array, "batch time d_out"]:
    """See `api`. `interpret` is given to `pl.pallas_call`."""
    (batch, time, d_in), d_out = x.shape, bank.shape[1 if transposed else 2]
    o = tile(time, d_in, d_out, x.dtype, bank.dtype)
    assert o is not None, "checked by api.banked_linear"
    # A row without an adapter reads entry 0, and writes zeros.
    if transposed:
        entry = pl.BlockSpec((1, o, d_in), lambda j, b, ids: (jnp.maximum(ids[b], 0), j, 0))
    else:
        entry = pl.BlockSpec((1, d_in, o), lambda j, b, ids: (jnp.maximum(ids[b], 0), 0, j))
    size, item = jnp.dtype(bank.dtype).itemsize, jnp.dtype(x.dtype).itemsize
    return pl.pallas_call(
        functools.partial(_body, transposed=transposed),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(d_out // o, batch),
            in_specs=[pl.BlockSpec((1, time, d_in), lambda j, b, ids: (b, 0, 0)), entry],
            out_specs=pl.BlockSpec((1, time, o), lambda j, b, ids: (b, 0, j)),
        ),
        out_shape=jax.ShapeDtypeStruct((batch, time, d_out), x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * time * d_in * d_out,
            bytes_accessed=batch * (size * d_in * d_out + item * time * (d_in + d_out)),
            transcendentals=0,
        ),
        interpret=interpret,
        name="banked_linear",
    )(rows, x, bank)


def _body(ids: Any, x: Any, entry: Any, y: Any, *, transposed: bool) -> None:
    contracted = (((1,), (1 if transposed else 0,)), ((), ()))
    found = jax.lax.dot_general(x[0], entry[0].astype(x.dtype), contracted, preferred_element_type=jnp.float32)
    y[0] = jnp.where(ids[pl.program_id(1)] >= 0, found, 0).astype(y.dtype)
