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

LOGITS = 1 << 21
"""How many logits are held at once, about."""
LEAST_VOCAB = 2048
"""A block of the vocabulary is not made smaller than this, however many tokens there are."""
TOKENS = 512
"""Most tokens of one block, when compact; half of it when only some tokens are wanted, so that the last wastes less."""
_LOW = -1e30
"""Where the running maximum starts; finite, so that differences are never nan."""


class _Settings(NamedTuple):
    softcap: float | None
    axis_name: str | None
    transposed: bool
    compact: bool

    @property
    def axis(self) -> int:
        """The axis of the unembedding that is the vocabulary."""
        return 0 if self.transposed else 1


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Needs:
    """Which inputs are differentiated."""

    hidden: bool
    unembedding: bool


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
    pull: Float[Array, "b n D"] | None
    """Sum of exp(logit - top) d(logit) / d(hidden), if asked for."""


def token_logprobs(
    hidden: Float[Array, "tokens dim"],
    unembedding: Float[Array, "dim vocab"] | Float[Array, "vocab dim"],
    targets: Int[Array, "tokens"],
    where: Bool[Array, "tokens"] | None,
    *,
    softcap: float | None,
    axis_name: str | None,
    transposed: bool,
    compact: bool | None,
) -> Float[Array, "tokens"]:
    """See `api.token_logprobs`."""
    if compact is None:
        compact = jax.default_backend() == "cpu" and _on_one_device()
    settings = _Settings(softcap, axis_name, transposed, compact)
    # Marked outside of the custom derivative: the transpose then sums gradients over the mesh axes that were added.
    hidden, unembedding = vary((hidden, unembedding), varying_axes(hidden, unembedding))
    logps = _token_logprobs(settings, hidden, unembedding, targets, where)
    vocab = unembedding.shape[settings.axis] * (1 if axis_name is None else jax.lax.axis_size(axis_name))
    logps = jnp.where((targets >= 0) & (targets < vocab), logps, jnp.nan)
    return logps if where is None else jnp.where(where, logps, 0.0)


def _on_one_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 or (not mesh.empty and mesh.are_all_axes_manual)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    settings: _Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None
) -> Array:
    """Values at tokens that are not wanted mean nothing, but are finite."""
    return _forward(settings, hidden, unembedding, targets, where, with_direction=False)[0]


def _fwd(settings: _Settings, hidden, unembedding, targets, where):  # type: ignore[no-untyped-def]
    needs = _Needs(hidden.perturbed, unembedding.perturbed)
    arrays = hidden.value, unembedding.value, targets.value, None if where is None else where.value
    only_hidden = needs == _Needs(hidden=True, unembedding=False)
    logps, lse, direction = _forward(settings, *arrays, with_direction=only_hidden)
    return logps, (needs, direction if only_hidden else (*arrays, lse))


def _bwd(settings: _Settings, residuals, g):  # type: ignore[no-untyped-def]
    needs, saved = residuals
    if isinstance(g, SymbolicZero):
        return None, None, None, None
    if isinstance(saved, tuple):
        hidden, unembedding, targets, where, lse = saved
        return *_backward(settings, needs, hidden, unembedding, targets, where, lse, g), None, None
    return (g[:, None] * saved.astype(jnp.float32)).astype(saved.dtype), None, None, None


_token_logprobs.defvjp(_fwd, _bwd, symbolic_zeros=True)


def _forward(
    settings: _Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None, *, with_direction: bool
) -> tuple[Array, Array, Array | None]:
    """Log-probabilities [N], log-sum-exp of the logits by block [b, n], and, if asked, d(logps) / d(hidden) [N, D]."""
    blocks = _blocks(settings, hidden, unembedding, targets, where)
    state = _softmax(settings, blocks, unembedding, with_direction)
    top, total, target = state.top, state.total, state.target
    if settings.axis_name is not None:
        top = jax.lax.pmax(top, settings.axis_name)
        total, target = jax.lax.psum((total * jnp.exp(state.top - top), target), settings.axis_name)
    lse = top + jnp.log(jnp.maximum(total, 1.0))  # >= 1 wherever it was computed: the largest term is exp(0)
    logps = _unblock(blocks, target - lse, len(targets))
    if state.pull is None:
        return logps, lse, None
    here = (blocks.targets >= 0) & (blocks.targets < unembedding.shape[settings.axis])
    own = jnp.take(unembedding, jnp.where(here, blocks.targets, 0), axis=settings.axis)
    own = (own if settings.transposed else jnp.moveaxis(own, 0, -1)).astype(jnp.float32)
    push = here * _slope(settings, target)
    direction = push[..., None] * own - jnp.exp(state.top - lse)[..., None] * state.pull
    return logps, lse, _unblock(blocks, direction.astype(hidden.dtype), len(targets))


def _softmax(settings: _Settings, blocks: _Blocks, unembedding: Array, with_pull: bool) -> _Softmax:
    """The online softmax over this device's vocabulary."""

    def step(start: Any, weights: Array, i: Any, state: _Softmax) -> _Softmax:
        hidden, targets, (top, total, target, pull) = _at((blocks.hidden, blocks.targets, state), i)
        logits = _logits(settings, hidden, weights)
        new_top = jnp.maximum(top, logits.max(axis=-1))
        shrink = jnp.exp(top - new_top)
        p = jnp.exp(logits - new_top[:, None])
        column = targets - start
        here = (column >= 0) & (column < logits.shape[1])
        own = jnp.take_along_axis(logits, jnp.where(here, column, 0)[:, None], axis=1)[:, 0]
        if pull is not None:
            pull = pull * shrink[:, None] + _to_hidden(settings, p * _slope(settings, logits), weights)
        new = _Softmax(new_top, total * shrink + p.sum(axis=-1), jnp.where(here, own, target), pull)
        return _put(state, new, i)

    zeros = jnp.zeros(blocks.targets.shape, jnp.float32)
    pull = jnp.zeros(blocks.hidden.shape, jnp.float32) if with_pull else None
    state = vary(_Softmax(zeros + _LOW, zeros, zeros, pull), varying_axes(unembedding))

    def vocabulary(start: Any, weights: Array, state: _Softmax) -> _Softmax:
        return _over_tokens(blocks, functools.partial(step, start, weights), state)

    return _over_vocabulary(settings, blocks, unembedding, vocabulary, state)


def _backward(
    settings: _Settings,
    needs: _Needs,
    hidden: Array,
    unembedding: Array,
    targets: Array,
    where: Array | None,
    lse: Float[Array, "b n"],
    g: Float[Array, "N"],
) -> tuple[Array | None, Array | None]:
    """Gradients of hidden and unembedding; None where not needed."""
    blocks = _blocks(settings, hidden, unembedding, targets, where)
    g = _block(g if blocks.order is None else g[blocks.order], lse.shape[1])

    def step(start: Any, weights: Array, i: Any, state: Any) -> Any:
        d_hidden, d_weights = state
        h, targets, lse_i, g_i = _at((blocks.hidden, blocks.targets, lse, g), i)
        logits = _logits(settings, h, weights)
        is_target = jnp.arange(logits.shape[1]) == (targets - start)[:, None]
        d_logits = g_i[:, None] * (is_target - jnp.exp(logits - lse_i[:, None])) * _slope(settings, logits)
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


def _logits(settings: _Settings, hidden: Float[Array, "n D"], weights: Array) -> Float[Array, "n v"]:
    logits = _einsum("nd,vd->nv" if settings.transposed else "nd,dv->nv", hidden, weights)
    return logits if settings.softcap is None else settings.softcap * jnp.tanh(logits / settings.softcap)


def _to_hidden(settings: _Settings, d_logits: Float[Array, "n v"], weights: Array) -> Float[Array, "n D"]:
    return _einsum("nv,vd->nd" if settings.transposed else "nv,dv->nd", d_logits.astype(weights.dtype), weights)


def _slope(settings: _Settings, logits: Array) -> Array | float:
    """The soft-cap's derivative, given its values."""
    return 1.0 if settings.softcap is None else 1.0 - jnp.square(logits / settings.softcap)


# The loops.


def _over_vocabulary(
    settings: _Settings, blocks: _Blocks, unembedding: Array, step: Callable[[Any, Array, Any], Any], state: Any
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


def _blocks(settings: _Settings, hidden: Array, unembedding: Array, targets: Array, where: Array | None) -> _Blocks:
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
