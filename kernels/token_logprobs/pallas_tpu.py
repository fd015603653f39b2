"""Log-probabilities of given tokens by TPU kernels: logits exist as one tile at a time, on the chip.

Two kernels. The forward one goes over the vocabulary once for each block of tokens, with an online softmax; while it
holds a tile of logits and of the unembedding it also sums up the gradient of the log-probability in the hidden state
(its direction: the cotangent of a token only scales it), so that a backward pass owes nothing more to the hidden
states. The other kernel computes each tile again, from the saved log-sum-exp, for the gradient of the unembedding.

    values                                     2NDV operations
    and gradient of hidden                     4NDV
    and of the unembedding                     8NDV (6NDV without hidden's)

Tokens are first sorted by target, unwanted ones last. Then whole blocks of unwanted tokens are skipped, and the
columns of the unembedding that targets name lie, for each block of tokens, in few neighbouring blocks of the
vocabulary (N / n + V / v of all N / n * V / v tiles), where a product with a one-hot matrix takes them out: XLA's gather
of columns copies the whole [D, V] matrix first.

Names of dimensions: N tokens, n of them in one block; D width; V vocabulary, v of it in one block.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.kernels.one_device import VMEM_LIMIT
from jaxmethods.kernels.token_logprobs import xla
from jaxmethods.kernels.token_logprobs.reference import TokenStatistics, masked
from jaxmethods.kernels.token_logprobs.xla import LOW, Kept, Needs, Settings

VMEM = 46 << 20
"""Bytes that the blocks of one kernel may take on the chip."""
TOKENS, VOCAB = 1024, 1024
"""Most tokens and most of the vocabulary in one block."""
KERNELS = ("values", "direction", "unembedding")
PASSING = 256
"""Most of the one that passes by while the other stays."""
WIDTH = 512
"""How much of the width one product inside a kernel takes, where it divides the width."""


class Tiles(NamedTuple):
    """Lengths of blocks."""

    tokens: int
    vocab: int


def tiles(hidden: Any, unembedding: Any, *, transposed: bool, kernel: str) -> Tiles | None:
    """Blocks of a kernel ("values", "direction" or "unembedding") that fit on the chip, for arrays or their shapes.

    As long as possible along the axis whose block stays (tokens; for "unembedding" the vocabulary), since with its length
    the bytes of what passes by shrink. None where nothing fits: both arrays of one dtype, float32 or bfloat16, and a width up to
    16384 in bfloat16 or 8192.
    """
    count, dim = hidden.shape
    vocab = unembedding.shape[0 if transposed else 1]
    if hidden.dtype != unembedding.dtype or hidden.dtype not in (jnp.float32, jnp.bfloat16) or not count or not vocab:
        return None
    most = min(TOKENS, _up(count, 16)), min(VOCAB, _up(vocab, 128))
    stays, passes = most[::-1] if kernel == "unembedding" else most
    passes = min(passes, PASSING)
    while _vmem(stays, passes, dim, hidden.dtype, kernel) > VMEM:
        if stays <= 128 and passes <= 128:
            return None
        stays, passes = (_up(stays - 128, 128), passes) if stays > max(256, passes) or passes <= 128 else (stays, 128)
    n, v = (passes, stays) if kernel == "unembedding" else (stays, passes)
    return Tiles(n, min(v, vocab))


def fits(hidden: Any, unembedding: Any, *, transposed: bool) -> bool:
    """Whether every kernel has blocks that fit."""
    return all(tiles(hidden, unembedding, transposed=transposed, kernel=kernel) for kernel in KERNELS)


def _vmem(stays: int, passes: int, dim: int, dtype: Any, kernel: str) -> int:
    """Bytes that blocks take: what passes by and a gradient twice, what stays once, sums in float32, values of a tile."""
    size = jnp.dtype(dtype).itemsize
    kept = {"values": size, "direction": 3 * size + 4, "unembedding": 3 * size + 4}[kernel]
    return dim * (2 * size * passes + kept * stays) + 3 * 4 * stays * passes + 10 * 4 * 128 * (stays + passes)


def hbm_bytes(hidden: Any, unembedding: Any, *, transposed: bool, kernel: str) -> int:
    """Bytes that a kernel reads and writes: grid x blocks, of a block that stays from step to step once.

    Of N tokens in blocks of n, width D, and V of the vocabulary in blocks of v, with columns [N, 1] that lie as float32 [N, 128]:

        values        N D + N / n V D + 5 columns
        direction     2 N D more
        unembedding   2 V D + V / v (N D + 3 columns)
    """
    sizes = tiles(hidden, unembedding, transposed=transposed, kernel=kernel)
    assert sizes is not None
    (count, dim), vocab = hidden.shape, unembedding.shape[0 if transposed else 1]
    size = jnp.dtype(hidden.dtype).itemsize
    rows, matrix, column = _up(count, sizes.tokens) * dim * size, vocab * dim * size, _up(count, sizes.tokens) * 128 * 4
    if kernel == "unembedding":
        return 2 * matrix + -(-vocab // sizes.vocab) * (rows + 3 * column)
    return rows * (3 if kernel == "direction" else 1) + -(-count // sizes.tokens) * matrix + 5 * column


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def token_statistics(
    hidden: Float[Array, "tokens dim"],
    unembedding: Float[Array, "dim vocab"] | Float[Array, "vocab dim"],
    targets: Int[Array, "tokens"],
    where: Bool[Array, "tokens"] | None,
    *,
    softcap: float | None,
    axis_name: str | None,
    transposed: bool,
    compact: bool | None,
    everything: bool,
) -> TokenStatistics:
    """See `api`; always compact."""
    del compact
    if not fits(hidden, unembedding, transposed=transposed):
        raise ValueError(
            f"implementation='pallas_tpu' takes hidden and unembedding of one dtype, float32 or bfloat16, that fit on the chip; "
            f"these are {hidden.dtype}[{hidden.shape[0]}, {hidden.shape[1]}] and {unembedding.dtype}: use 'xla'."
        )
    settings = Settings(softcap, axis_name, transposed, False, everything)
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    hidden, unembedding = vary((hidden, unembedding), varying_axes(hidden, unembedding))
    found = _token_statistics(settings, hidden, unembedding, targets, where)
    return masked(found, targets, where, settings.vocabulary(unembedding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_statistics(
    settings: Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None
) -> TokenStatistics:
    """Values at tokens that are not wanted mean nothing, and may be nan."""
    return _forward(settings, hidden, unembedding, targets, where, with_direction=False)[0]


def _fwd(settings: Settings, hidden, unembedding, targets, where):  # type: ignore[no-untyped-def]
    needs = Needs(hidden.perturbed, unembedding.perturbed)
    arrays = hidden.value, unembedding.value, targets.value, None if where is None else where.value
    with_direction = needs.hidden and not settings.everything
    found, kept, direction = _forward(settings, *arrays, with_direction=with_direction)
    return found, (needs, direction, (*arrays, kept) if needs.unembedding or settings.everything else None)


def _bwd(settings: Settings, residuals, g: TokenStatistics):  # type: ignore[no-untyped-def]
    needs, direction, saved = residuals
    if all(isinstance(x, SymbolicZero) for x in g if x is not None):
        return None, None, None, None
    if settings.everything:
        hidden, unembedding, targets, where, kept = saved
        kept = Kept(*(x[None] if where is None else jnp.where(where, x, 0.0)[None] for x in kept))
        return *xla.backward(settings, needs, hidden, unembedding, targets, where, kept, xla.instantiate(g)), None, None
    d_hidden, d_unembedding = None, None
    if needs.hidden:
        d_hidden = (g.logps[:, None] * direction.astype(jnp.float32)).astype(direction.dtype)
    if needs.unembedding:
        hidden, unembedding, targets, where, kept = saved
        d_unembedding = _d_unembedding(settings, hidden, unembedding, targets, where, kept, g.logps)
    return d_hidden, d_unembedding, None, None


_token_statistics.defvjp(_fwd, _bwd, symbolic_zeros=True)


class _Rows(NamedTuple):
    """Tokens in the order in which the kernels take them, and padding after them."""

    order: Int[Array, "N"]
    hidden: Float[Array, "N D"]
    targets: Int[Array, "N 1"]
    """Counted from the first token of this device's vocabulary."""
    used: Int[Array, "1"]
    """How many blocks hold wanted tokens."""
    first: Int[Array, "blocks"]
    """The first block of the vocabulary that holds a target of each block of tokens; > last where none does."""
    last: Int[Array, "blocks"]

    @property
    def prefetched(self) -> tuple[Array, Array, Array]:
        return self.used, self.first, self.last


def _sorted(
    settings: Settings, sizes: Tiles, hidden: Array, unembedding: Array, targets: Array, where: Array | None
) -> _Rows:
    vocab = unembedding.shape[settings.axis]
    if settings.axis_name is not None:
        targets = targets - vocab * jax.lax.axis_index(settings.axis_name)
    if where is not None:
        hidden = jnp.where(where[:, None], hidden, 0)  # padding may hold anything, also not finite
        targets = jnp.where(where, targets, jnp.iinfo(targets.dtype).max)
    order = jnp.argsort(targets)
    wanted = len(targets) if where is None else where.sum()
    rows = _pad(targets[order], sizes.tokens)
    here = (rows >= 0) & (rows < vocab) & (jnp.arange(len(rows)) < wanted)
    of_block = jnp.where(here, rows, -1).reshape(-1, sizes.tokens) // sizes.vocab
    first = jnp.where(here.reshape(of_block.shape), of_block, of_block.max() + 1).min(axis=1)
    used = jnp.asarray(-(-wanted // sizes.tokens), jnp.int32).reshape(1)
    return _Rows(
        order, _pad(hidden[order], sizes.tokens), jnp.where(here, rows, -1)[:, None], used, first, of_block.max(axis=1)
    )


def _pad(x: Array, multiple: int) -> Array:
    """[N, ...], with zeros up to a multiple."""
    return jnp.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))


def _back(rows: _Rows, x: Array) -> Array:
    """In the order in which the tokens were given."""
    return x[jnp.argsort(rows.order)]


def _forward(
    settings: Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None, *, with_direction: bool
) -> tuple[TokenStatistics, Kept, Array | None]:
    """The statistics, what of them the backward pass keeps [N], and, if asked, d(logps) / d(hidden) [N, D]."""
    sizes = _tiles(settings, hidden, unembedding, "direction" if with_direction else "values")
    rows = _sorted(settings, sizes, hidden, unembedding, targets, where)
    dim, vocab = hidden.shape[1], unembedding.shape[settings.axis]
    blocks, columns = len(rows.hidden) // sizes.tokens, -(-vocab // sizes.vocab)
    rows_block = lambda width: pl.BlockSpec(
        (sizes.tokens, width), lambda i, j, *_: (i, 0), pipeline_mode=pl.Buffered(1) if width == dim else None
    )
    # The blocks of unwanted tokens are skipped, and ask for no other block of the unembedding than is there.
    column = lambda i, j, used, *_: jnp.where(i < used[0], j, columns - 1)
    column_shape = lambda width, dtype: jax.ShapeDtypeStruct(
        (len(rows.hidden), width), dtype, manual_axis_type=jax.typeof(unembedding).manual_axis_type
    )
    found = pl.pallas_call(
        functools.partial(_forward_kernel, settings, sizes, vocab, with_direction),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(blocks, columns),
            in_specs=[rows_block(dim), _weights_block(settings, sizes, dim, column), rows_block(1)],
            out_specs=[rows_block(1)] * 4 + [rows_block(dim)] * (2 * with_direction),
            scratch_shapes=[pltpu.VMEM((sizes.tokens, dim), jnp.float32)] * with_direction,
        ),
        out_shape=[column_shape(1, jnp.float32)] * 4 + [column_shape(dim, hidden.dtype)] * (2 * with_direction),
        compiler_params=_params("parallel", "arbitrary"),
        name="token_logprobs_forward",
    )(*vary(rows.prefetched, varying_axes(unembedding)), rows.hidden, unembedding, rows.targets)
    local_top, local_total, target, weighted = (_back(rows, x[:, 0]) for x in found[:4])
    top, total = local_top, local_total
    if settings.axis_name is not None:
        top = jax.lax.pmax(local_top, settings.axis_name)
        shrink = jnp.exp(local_top - top)
        total, target, weighted = jax.lax.psum(
            (total * shrink, target, (weighted + (local_top - top) * total) * shrink), settings.axis_name
        )
    lse = top + jnp.log(total)
    kept, found_here = Kept(lse), TokenStatistics(target - lse)
    if settings.everything:
        kept = Kept(lse, jnp.log(total) - weighted / total)
        found_here = TokenStatistics(target - lse, *kept)
    if not with_direction:
        return found_here, kept, None
    own, mean = (_back(rows, x).astype(jnp.float32) for x in found[4:])
    share = jnp.exp(local_top - top) * local_total / total  # of this device's vocabulary in all probability
    direction = _slope(settings, target[:, None]) * own - share[:, None] * mean
    if where is not None:
        direction = jnp.where(where[:, None], direction, 0)
    return found_here, kept, direction.astype(hidden.dtype)


def _forward_kernel(settings, sizes, vocab, with_direction, used, first, last, hidden, weights, targets, *outs):  # type: ignore[no-untyped-def]
    """One tile: tokens of block i, vocabulary of block j. Results stay on the chip while j goes on."""
    top, total, target, weighted, *rest = outs
    own, mean, pull = rest or (None, None, None)
    i, j = pl.program_id(0), pl.program_id(1)
    start = j * sizes.vocab

    @pl.when(j == 0)
    def _() -> None:
        top[...] = jnp.full(top.shape, LOW, jnp.float32)
        for x in (total, target, weighted, own, pull):
            if x is not None:
                x[...] = jnp.zeros(x.shape, x.dtype)

    @pl.when(i < used[0])
    def _() -> None:
        logits = _logits(settings, hidden, weights, sizes)
        at = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        left = vocab - start if vocab % sizes.vocab else None
        if left is not None:  # behind the end of the vocabulary the last block may hold anything
            logits = jnp.where(at < left, logits, LOW)
        new_top = jnp.maximum(top[...], logits.max(axis=1, keepdims=True))
        shrink = jnp.exp(top[...] - new_top)
        p = jnp.exp(logits - new_top)
        if settings.everything:
            moved = (weighted[...] + (top[...] - new_top) * total[...]) * shrink
            weighted[...] = moved + (p * (logits - new_top)).sum(axis=1, keepdims=True)
        top[...] = new_top
        total[...] = total[...] * shrink + p.sum(axis=1, keepdims=True)
        is_target = at == targets[...] - start
        if pull is not None:
            slopes = p * _slope(settings, logits)
            if left is not None:  # the slope at LOW is not finite
                slopes = jnp.where(at < left, slopes, 0.0)
            slopes = slopes.astype(weights.dtype)

            @functools.partial(_over_width, pull.shape[1])
            def _(part: Any) -> None:
                pull[:, part] = pull[:, part] * shrink + _to_hidden(settings, slopes, weights, part, left)

        @pl.when((first[i] <= j) & (j <= last[i]))
        def _() -> None:
            target[...] += jnp.where(is_target, logits, 0.0).sum(axis=1, keepdims=True)
            if own is not None:
                one = is_target.astype(jnp.float32).astype(weights.dtype)

                @functools.partial(_over_width, own.shape[1])
                def _(part: Any) -> None:  # exact: each row takes one of the unembedding's
                    own[:, part] += _to_hidden(settings, one, weights, part, left).astype(own.dtype)

    @pl.when((i < used[0]) & (j == pl.num_programs(1) - 1))
    def _() -> None:
        if mean is not None:
            mean[...] = (pull[...] / total[...]).astype(mean.dtype)


def _d_unembedding(
    settings: Settings,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    where: Array | None,
    kept: Kept,
    g: Float[Array, "N"],
) -> Array:
    """The gradient of the unembedding, for cotangents of log-probabilities."""
    sizes = _tiles(settings, hidden, unembedding, "unembedding")
    rows = _sorted(settings, sizes, hidden, unembedding, targets, where)
    dim, vocab = hidden.shape[1], unembedding.shape[settings.axis]
    blocks, columns = len(rows.hidden) // sizes.tokens, -(-vocab // sizes.vocab)
    if where is not None:
        kept, g = Kept(jnp.where(where, kept.lse, 0.0)), jnp.where(where, g, 0.0)
    lse, g = (_pad(x[rows.order], sizes.tokens)[:, None] for x in (kept.lse, g))
    row = lambda j, i, used: jnp.minimum(i, jnp.maximum(used[0] - 1, 0))
    rows_block = lambda width: pl.BlockSpec((sizes.tokens, width), lambda j, i, used: (row(j, i, used), 0))
    weights_block = _weights_block(settings, sizes, dim, lambda j, i, used: j, pl.Buffered(1))
    out_block = _weights_block(settings, sizes, dim, lambda j, i, used: j)
    return pl.pallas_call(
        functools.partial(_d_unembedding_kernel, settings, sizes),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(columns, blocks),
            in_specs=[rows_block(dim), weights_block, rows_block(1), rows_block(1), rows_block(1)],
            out_specs=out_block,
            scratch_shapes=[pltpu.VMEM((sizes.vocab, dim), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(
            unembedding.shape, unembedding.dtype, manual_axis_type=jax.typeof(unembedding).manual_axis_type
        ),
        compiler_params=_params("parallel", "arbitrary"),
        name="token_logprobs_d_unembedding",
    )(*vary((rows.used, rows.hidden), varying_axes(unembedding)), unembedding, rows.targets, lse, g)


def _d_unembedding_kernel(settings, sizes, used, hidden, weights, targets, lse, g, out, total):  # type: ignore[no-untyped-def]
    """One tile: vocabulary of block j, tokens of block i. What lies behind the vocabulary's end gives rows that are cut off."""
    j, i = pl.program_id(0), pl.program_id(1)

    @pl.when(i == 0)
    def _() -> None:
        total[...] = jnp.zeros(total.shape, total.dtype)

    @pl.when(i < used[0])
    def _() -> None:
        logits = _logits(settings, hidden, weights, sizes)
        is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1) == targets[...] - j * sizes.vocab
        d_logits = g[...] * (is_target.astype(jnp.float32) - jnp.exp(logits - lse[...]))
        d_logits *= _slope(settings, logits)
        d_logits = d_logits.astype(hidden.dtype)

        @functools.partial(_over_width, hidden.shape[1])
        def _(part: Any) -> None:  # of the two operands it is the narrow one that is transposed
            total[:, part] += _product(d_logits, hidden[:, part], 0, 0)

    @pl.when(i == pl.num_programs(1) - 1)
    def _() -> None:
        @functools.partial(_over_width, hidden.shape[1])
        def _(part: Any) -> None:
            if settings.transposed:
                out[:, part] = total[:, part].astype(out.dtype)
            else:
                out[part, :] = total[:, part].T.astype(out.dtype)


# What both kernels share.


def _tiles(settings: Settings, hidden: Array, unembedding: Array, kernel: str) -> Tiles:
    sizes = tiles(hidden, unembedding, transposed=settings.transposed, kernel=kernel)
    assert sizes is not None  # `token_statistics` has asked
    return sizes


def _weights_block(settings: Settings, sizes: Tiles, dim: int, column: Any, pipeline_mode: Any = None) -> pl.BlockSpec:
    """A block of the unembedding, whose place in the vocabulary `column` tells."""
    if settings.transposed:
        return pl.BlockSpec((sizes.vocab, dim), lambda *at: (column(*at), 0), pipeline_mode=pipeline_mode)
    return pl.BlockSpec((dim, sizes.vocab), lambda *at: (0, column(*at)), pipeline_mode=pipeline_mode)


def _params(*semantics: Any) -> pltpu.CompilerParams:
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=VMEM_LIMIT)


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _over_width(dim: int, step: Callable[[Any], None]) -> None:
    """`step(part)` for each part of the width, in a loop: written out in one, a tile's products take minutes to compile."""
    if dim % WIDTH:
        step(slice(None))
    else:
        jax.lax.fori_loop(0, dim // WIDTH, lambda k, _: step(pl.ds(pl.multiple_of(k * WIDTH, WIDTH), WIDTH)), None)


def _logits(settings: Settings, hidden: Any, weights: Any, sizes: Tiles) -> Array:
    """Logits of one tile, from references."""
    dim = hidden.shape[1]
    part_of = lambda part: _product(
        hidden[:, part], weights[:, part] if settings.transposed else weights[part, :], 1, 1 - settings.axis
    )
    if dim % WIDTH:
        logits = part_of(slice(None))
    else:
        step = lambda k, so_far: so_far + part_of(pl.ds(pl.multiple_of(k * WIDTH, WIDTH), WIDTH))
        logits = jax.lax.fori_loop(0, dim // WIDTH, step, jnp.zeros(sizes, jnp.float32))
    return logits if settings.softcap is None else settings.softcap * jnp.tanh(logits / settings.softcap)


def _to_hidden(settings: Settings, columns: Array, weights: Any, part: Any, left: Any) -> Array:
    """columns [n, v] times a part of the width of one block, of which `left` tokens are in the vocabulary; None means all."""
    w = weights[:, part] if settings.transposed else weights[part, :]
    if left is not None:
        w = jnp.where(jax.lax.broadcasted_iota(jnp.int32, w.shape, settings.axis) < left, w, jnp.zeros_like(w))
    return _product(columns, w, 1, settings.axis)


def _slope(settings: Settings, logits: Array) -> Array | float:
    """The soft-cap's derivative, given its values."""
    return 1.0 if settings.softcap is None else 1.0 - jnp.square(logits / settings.softcap)
