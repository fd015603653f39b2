"""Log-probabilities of given tokens in plain XLA, by blocks of the vocabulary with an online softmax.

The outer loop runs over the vocabulary: each block of the unembedding is read once, its gradient is written once, and
the token axis stays whole, so that tokens which `jax.jit` splits over devices stay where they are. When compact, an
inner loop runs over blocks of tokens, as many as hold wanted ones, a number known only at run time.

Names of dimensions: N tokens, or [b, n] in b blocks; D width; V vocabulary, v of it in one block. `weights` is one
block of the unembedding, [D, v], or [v, D] when transposed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.kernels.one_device import one_device
from jaxmethods.kernels.token_logprobs.reference import TokenStatistics, masked

LOGITS = 1 << 21
"""How many logits are held at once, about."""
LEAST_VOCAB = 2048
"""A block of the vocabulary is not made smaller than this, however many tokens there are."""
TOKENS = 512
"""Most tokens of one block, when compact; half of it when only some tokens are wanted, so that the last wastes less."""
LOW = -1e30
"""Where the running maximum starts; finite, so that differences are never nan."""


class Settings(NamedTuple):
    softcap: float | None
    axis_name: str | None
    transposed: bool
    compact: bool
    everything: bool
    """Log-sum-exp and entropy too."""

    @property
    def axis(self) -> int:
        """The axis of the unembedding that is the vocabulary."""
        return 0 if self.transposed else 1

    def vocabulary(self, unembedding: Array) -> int:
        """How many tokens there are, on all devices of the axis."""
        return unembedding.shape[self.axis] * (1 if self.axis_name is None else jax.lax.axis_size(self.axis_name))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Needs:
    """Which inputs are differentiated."""

    hidden: bool
    unembedding: bool


class Kept(NamedTuple):
    """What the backward pass needs of the forward pass."""

    lse: Float[Array, "b n"]
    entropy: Float[Array, "b n"] | None = None


class _Blocks(NamedTuple):
    """Tokens in blocks; the hidden states of those that are not wanted are 0."""

    hidden: Float[Array, "b n D"]
    targets: Int[Array, "b n"]
    """Counted from the first token of this device's vocabulary."""
    used: Int[Array, ""] | None = None
    """How many blocks hold wanted tokens; None means all. It and what follows is given where tokens were reordered."""
    order: Int[Array, "N"] | None = None
    """The tokens in the order in which they fill the blocks."""
    place: Int[Array, "N"] | None = None
    """Where in that order each wanted token stands."""


class _Softmax(NamedTuple):
    """Running results of an online softmax, by block of tokens."""

    top: Float[Array, "b n"]
    total: Float[Array, "b n"]
    """Sum of exp(logit - top)."""
    target: Float[Array, "b n"]
    """The target's logit; 0 where its block of the vocabulary was not met."""
    weighted: Float[Array, "b n"] | None
    """Sum of exp(logit - top) (logit - top), if asked for."""
    pull: Float[Array, "b n D"] | None
    """Sum of exp(logit - top) d(logit) / d(hidden), if asked for."""


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
    """See `api`; without `everything`, log-probabilities alone."""
    if compact is None:
        device = one_device()
        compact = device is not None and device.device_kind == "cpu"
    settings = Settings(softcap, axis_name, transposed, compact, everything)
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    hidden, unembedding = vary((hidden, unembedding), varying_axes(hidden, unembedding))
    found = _token_statistics(settings, hidden, unembedding, targets, where)
    return masked(found, targets, where, settings.vocabulary(unembedding))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_statistics(
    settings: Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None
) -> TokenStatistics:
    """Values at tokens that are not wanted mean nothing, but are finite."""
    return _forward(settings, hidden, unembedding, targets, where, with_direction=False)[0]


def _fwd(settings: Settings, hidden, unembedding, targets, where):  # type: ignore[no-untyped-def]
    needs = Needs(hidden.perturbed, unembedding.perturbed)
    arrays = hidden.value, unembedding.value, targets.value, None if where is None else where.value
    # The direction serves the gradients of log-probabilities alone.
    only_hidden = needs == Needs(hidden=True, unembedding=False) and not settings.everything
    found, kept, direction = _forward(settings, *arrays, with_direction=only_hidden)
    return found, (needs, direction if only_hidden else (*arrays, kept))


def _bwd(settings: Settings, residuals, g: TokenStatistics):  # type: ignore[no-untyped-def]
    needs, saved = residuals
    if all(isinstance(x, SymbolicZero) for x in g if x is not None):
        return None, None, None, None
    if isinstance(saved, tuple):
        hidden, unembedding, targets, where, kept = saved
        return *backward(settings, needs, hidden, unembedding, targets, where, kept, instantiate(g)), None, None
    return (g.logps[:, None] * saved.astype(jnp.float32)).astype(saved.dtype), None, None, None


_token_statistics.defvjp(_fwd, _bwd, symbolic_zeros=True)


def instantiate(g: TokenStatistics) -> TokenStatistics:
    """The cotangents, with zeros where JAX knows that there is none."""
    zeros = lambda x: jnp.zeros(x.shape, x.dtype) if isinstance(x, SymbolicZero) else x
    return jax.tree.map(zeros, g, is_leaf=lambda x: isinstance(x, SymbolicZero))


def _forward(
    settings: Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None, *, with_direction: bool
) -> tuple[TokenStatistics, Kept, Array | None]:
    """The statistics, what of them the backward pass keeps, and, if asked, d(logps) / d(hidden) [N, D]."""
    blocks = _blocks(settings, hidden, unembedding, targets, where)
    state = _softmax(settings, blocks, unembedding, with_direction)
    top, total, target, weighted, pull = state
    if settings.axis_name is not None:
        top = jax.lax.pmax(top, settings.axis_name)
        shrink = jnp.exp(state.top - top)
        if weighted is not None:
            weighted = jax.lax.psum((weighted + (state.top - top) * total) * shrink, settings.axis_name)
        total, target = jax.lax.psum((total * shrink, target), settings.axis_name)
    total = jnp.maximum(total, 1.0)  # >= 1 wherever it was computed: the largest term is exp(0)
    lse = top + jnp.log(total)
    unblock = functools.partial(_unblock, blocks, tokens=len(targets))
    found, kept = TokenStatistics(unblock(target - lse)), Kept(lse)
    if weighted is not None:
        entropy = jnp.log(total) - weighted / total
        found, kept = TokenStatistics(found.logps, unblock(lse), unblock(entropy)), Kept(lse, entropy)
    if pull is None:
        return found, kept, None
    here = (blocks.targets >= 0) & (blocks.targets < unembedding.shape[settings.axis])
    own = jnp.take(unembedding, jnp.where(here, blocks.targets, 0), axis=settings.axis)
    own = (own if settings.transposed else jnp.moveaxis(own, 0, -1)).astype(jnp.float32)
    push = here * _slope(settings, target)
    direction = push[..., None] * own - jnp.exp(state.top - lse)[..., None] * pull
    return found, kept, unblock(direction.astype(hidden.dtype))


def _softmax(settings: Settings, blocks: _Blocks, unembedding: Array, with_pull: bool) -> _Softmax:
    """The online softmax over this device's vocabulary."""

    def step(start: Any, weights: Array, i: Any, state: _Softmax) -> _Softmax:
        hidden, targets, (top, total, target, weighted, pull) = _at((blocks.hidden, blocks.targets, state), i)
        logits = _logits(settings, hidden, weights)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        shrink = jnp.exp(top - new_top)
        p = jnp.exp(logits - new_top[:, None])
        column = targets - start
        here = (column >= 0) & (column < logits.shape[1])
        own = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
        if weighted is not None:
            weighted = (weighted + (top - new_top) * total) * shrink + (p * (logits - new_top[:, None])).sum(axis=-1)
        if pull is not None:
            pull = pull * shrink[:, None] + _to_hidden(settings, p * _slope(settings, logits), weights)
        total = total * shrink + p.sum(axis=-1)
        new = _Softmax(new_top, total, jnp.where(here, own, target), weighted, pull)
        return _put(state, new, i)

    zeros = jnp.zeros(blocks.targets.shape, jnp.float32)
    pull = jnp.zeros(blocks.hidden.shape, jnp.float32) if with_pull else None
    state = vary(
        _Softmax(zeros + LOW, zeros, zeros, zeros if settings.everything else None, pull), varying_axes(unembedding)
    )

    def vocabulary(start: Any, weights: Array, state: _Softmax) -> _Softmax:
        return _over_tokens(blocks, functools.partial(step, start, weights), state)

    return _over_vocabulary(settings, blocks, unembedding, vocabulary, state)


def backward(
    settings: Settings,
    needs: Needs,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    where: Array | None,
    kept: Kept,
    g: TokenStatistics,
) -> tuple[Array | None, Array | None]:
    """Gradients of hidden and unembedding; None where not needed."""
    blocks = _blocks(settings, hidden, unembedding, targets, where)
    g = jax.tree.map(lambda x: _block(x if blocks.order is None else x[blocks.order], kept.lse.shape[1]), g)

    def step(start: Any, weights: Array, i: Any, state: Any) -> Any:
        d_hidden, d_weights = state
        h, *columns = _at((blocks.hidden, blocks.targets, kept, g), i)
        logits = _logits(settings, h, weights)
        targets, (lse, entropy), (g_logps, g_lse, g_entropy) = jax.tree.map(lambda x: x[:, None], columns)
        p = jnp.exp(logits - lse)
        d_logits = g_logps * ((jnp.arange(logits.shape[1]) == targets - start) - p)
        if entropy is not None:
            d_logits += p * (g_lse + g_entropy * (lse - logits - entropy))
        d_logits *= _slope(settings, logits)
        if d_hidden is not None:
            d_hidden = _put(d_hidden, _at(d_hidden, i) + _to_hidden(settings, d_logits, weights), i)
        if d_weights is not None:
            equation = "nv,nd->vd" if settings.transposed else "nd,nv->dv"
            operands = (d_logits.astype(h.dtype), h)
            d_weights += _einsum(equation, *(operands if settings.transposed else operands[::-1]))
        return d_hidden, d_weights

    def vocabulary(start: Any, weights: Array, state: Any) -> Any:
        d_hidden, d_unembedding = state
        d_weights = None
        if needs.unembedding:
            d_weights = vary(jnp.zeros(weights.shape, jnp.float32), varying_axes(weights))
        step_here = functools.partial(step, start, weights)
        d_hidden, d_weights = _over_tokens(blocks, step_here, (d_hidden, d_weights))
        if d_weights is not None:
            d_weights = d_weights.astype(unembedding.dtype)
            d_unembedding = jax.lax.dynamic_update_slice_in_dim(d_unembedding, d_weights, start, settings.axis)
        return d_hidden, d_unembedding

    state = (
        jnp.zeros(blocks.hidden.shape, jnp.float32) if needs.hidden else None,
        jnp.zeros(unembedding.shape, unembedding.dtype) if needs.unembedding else None,
    )
    state = vary(state, varying_axes(unembedding))
    d_hidden, d_unembedding = _over_vocabulary(settings, blocks, unembedding, vocabulary, state)
    if d_hidden is not None:
        d_hidden = _unblock(blocks, d_hidden, len(targets)).astype(hidden.dtype)
        if where is not None:
            d_hidden = jnp.where(where[:, None], d_hidden, 0)
    return d_hidden, d_unembedding


# The products.


def _einsum(equation: str, *operands: Array) -> Array:
    return jnp.einsum(equation, *operands, preferred_element_type=jnp.float32)


def _logits(settings: Settings, hidden: Float[Array, "n D"], weights: Array) -> Float[Array, "n v"]:
    logits = _einsum("nd,vd->nv" if settings.transposed else "nd,dv->nv", hidden, weights)
    return logits if settings.softcap is None else settings.softcap * jnp.tanh(logits / settings.softcap)


def _to_hidden(settings: Settings, d_logits: Float[Array, "n v"], weights: Array) -> Float[Array, "n D"]:
    return _einsum("nv,vd->nd" if settings.transposed else "nv,dv->nd", d_logits.astype(weights.dtype), weights)


def _slope(settings: Settings, logits: Array) -> Array | float:
    """The soft-cap's derivative, given its values."""
    return 1.0 if settings.softcap is None else 1.0 - jnp.square(logits / settings.softcap)


# The loops.


def _over_vocabulary(
    settings: Settings, blocks: _Blocks, unembedding: Array, step: Callable[[Any, Array, Any], Any], state: Any
) -> Any:
    """`state = step(start, weights, state)` for each block of the vocabulary; a smaller last one after the loop."""
    axis = settings.axis
    vocab = unembedding.shape[axis]
    width = max(LOGITS // blocks.targets.shape[1], LEAST_VOCAB)
    whole = vocab // width

    def body(j: Array, state: Any) -> Any:
        start = j * width
        return step(start, jax.lax.dynamic_slice_in_dim(unembedding, start, width, axis), state)

    if whole == 1:
        state = step(0, jax.lax.slice_in_dim(unembedding, 0, width, axis=axis), state)
    elif whole > 1:
        state = jax.lax.fori_loop(0, whole, body, state)
    if vocab % width:
        state = step(whole * width, jax.lax.slice_in_dim(unembedding, whole * width, vocab, axis=axis), state)
    return state


def _over_tokens(blocks: _Blocks, step: Callable[[Any, Any], Any], state: Any) -> Any:
    """`state = step(i, state)` for each block of tokens that holds wanted ones."""
    if blocks.used is None and len(blocks.hidden) == 1:
        return step(None, state)
    return jax.lax.fori_loop(0, len(blocks.hidden) if blocks.used is None else blocks.used, step, state)


def _at(tree: Any, i: Any) -> Any:
    """Block `i` of each array; the only one when `i` is None."""
    if i is None:
        return jax.tree.map(lambda x: x[0], tree)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(old: Any, new: Any, i: Any) -> Any:
    """`old` with block `i` replaced."""
    if i is None:
        return jax.tree.map(lambda x: x[None], new)
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), old, new)


def _blocks(settings: Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None) -> _Blocks:
    if settings.axis_name is not None:
        targets = targets - unembedding.shape[settings.axis] * jax.lax.axis_index(settings.axis_name)
    if where is not None:
        hidden = jnp.where(where[:, None], hidden, 0)  # padding may hold anything, also not finite
    if not settings.compact:
        return _Blocks(hidden[None], targets[None])
    most = TOKENS if where is None else TOKENS // 2
    count = -(-len(targets) // most)
    size = -(-len(targets) // count)
    if where is None:
        return _Blocks(_block(hidden, size), _block(targets, size))
    order = jnp.argsort(~where)
    used = -(-where.sum() // size)
    return _Blocks(_block(hidden[order], size), _block(targets[order], size), used, order, jnp.cumsum(where) - 1)


def _block(x: Array, size: int) -> Array:
    """[N, ...] -> [b, size, ...], padded with 0."""
    blocks = -(-len(x) // size)
    return jnp.pad(x, [(0, blocks * size - len(x))] + [(0, 0)] * (x.ndim - 1)).reshape(blocks, size, *x.shape[1:])


def _unblock(blocks: _Blocks, x: Array, tokens: int) -> Array:
    """[b, n, ...] -> [N, ...]; anything at tokens that are not wanted, if they were reordered."""
    x = x.reshape(-1, *x.shape[2:])[:tokens]
    return x if blocks.place is None else x[blocks.place]
