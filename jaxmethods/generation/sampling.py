"""Choosing a token from logits: temperature, top-k and nucleus filters, as pure functions.

>>> logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
>>> jnp.isfinite(filter_logits(logits, top_p=0.7)).tolist()
[True, True, False, False]
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key


def filter_logits(
    logits: Float[Array | np.ndarray, "*batch vocab"],
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Float[Array, "*batch vocab"]:
    """Logits of the tokens that may be drawn, float32; -inf at the others.

    `top_k` keeps the k highest logits. `top_p` then keeps the nucleus (https://arxiv.org/abs/1904.09751, section 3.1): the
    fewest tokens, taken from the most probable on, whose probabilities (among those that `top_k` left) sum to at least p;
    the most probable token always stays. Tokens as high as the last one kept stay too. Both may be traced: no sorting, and
    no shape depends on them.
    """
    logits = jnp.asarray(logits, jnp.float32)
    if top_k is not None:
        least = _least_kept(logits, jnp.ones(logits.shape, jnp.int32), jnp.asarray(top_k, jnp.int32))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p is not None:
        least = _least_kept(logits, jax.nn.softmax(logits, axis=-1), jnp.asarray(top_p, jnp.float32))
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def sample(
    key: Key[Array, "*#batch"],
    logits: Float[Array | np.ndarray, "*batch vocab"],
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
) -> Int[Array, "*batch"]:
    """Draws a token from softmax(filter_logits(logits / temperature)); temperature 0 takes the highest logit.

    Args:
        key: one for all, or one for each row; a row with its own key draws the same token in any batch.
    """
    logits = jnp.asarray(logits, jnp.float32)
    positive = jnp.asarray(temperature, jnp.float32) > 0
    allowed = filter_logits(logits / jnp.where(positive, temperature, 1.0), top_k, top_p)
    if key.ndim:
        noise = jnp.vectorize(lambda k: jax.random.gumbel(k, logits.shape[-1:]), signature="()->(v)")(key)
    else:
        noise = jax.random.gumbel(key, logits.shape)
    return jnp.argmax(jnp.where(positive, allowed + noise, logits), axis=-1).astype(jnp.int32)


def _least_kept(
    values: Float[Array, "*batch vocab"],
    weights: Float[Array, "*batch vocab"] | Int[Array, "*batch vocab"],
    target: Array,
) -> Float[Array, "*batch 1"]:
    """The highest bound such that the weights of all values >= bound sum to `target`; the lowest value if none does.

    The bound is found bit by bit: floats of one sign are ordered as their bits are.
    """
    ordered = _as_ordered_int(values)

    def halve(_: Array | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds  # `low` is low enough, `high` is too high or the highest value
        middle = (low & high) + ((low ^ high) >> 1)  # of two integers whose sum may overflow
        enough = jnp.where(ordered >= middle, weights, 0).sum(axis=-1, keepdims=True) >= target
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low, high = ordered.min(axis=-1, keepdims=True), ordered.max(axis=-1, keepdims=True) + 1
    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    return _as_float(low)


def _as_ordered_int(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """An int32 for each float32, in the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _as_float(x: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Undoes `_as_ordered_int`."""
    return jax.lax.bitcast_convert_type(jnp.where(x < 0, x ^ 0x7FFFFFFF, x), jnp.float32)
