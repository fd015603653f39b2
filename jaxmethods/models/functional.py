"""What losses, generation and evaluation ask of a language model: hidden states, logits, log-probabilities of tokens.

They work on any module that is called like `Decoder`, also with adapters attached. `logits` and `sequence_logps` are
compiled once for each module and shape; the others are plain functions to build steps from.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.token_logprobs import token_logprobs
from jaxmethods.tree import Tree

Tokens = Int[Array | np.ndarray, "batch time"]
Mask = Bool[Array | np.ndarray, "batch time"]


def hidden_states(
    module: nn.Module,
    params: Tree,
    tokens: Tokens,
    mask: Mask | None = None,
    *,
    key: Array | None = None,
    **inputs: Any,
) -> tuple[Float[Array, "batch time width"], Float[Array, ""]]:
    """Hidden states of a module and the sum of the auxiliary losses its adapters report (0 without any), float32.

    Args:
        key: given while training: turns on dropout and router noise.
        inputs: more arguments of the module, such as `segment_ids` and `positions`.
    """
    rngs = None if key is None else {"dropout": key}
    output, reported = module.apply({"params": params}, tokens, mask=mask, **inputs, rngs=rngs, mutable=["losses"])
    total = sum((loss.sum() for loss in jax.tree.leaves(reported)), start=jnp.float32(0))
    return output.hidden, total


def unembedding(module: Any, params: Tree) -> Float[Array, "width vocab"]:
    """The matrix from hidden states to logits."""
    if module.config.tie_embeddings:
        return params["model"]["embed_tokens"]["embedding"].T
    return params["lm_head"]["unembedding"]


def logits_of(module: Any, params: Tree, hidden: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
    """Logits of hidden states, float32, soft-capped where the model has a cap."""
    matrix = unembedding(module, params).astype(hidden.dtype)
    logits = jnp.matmul(hidden, matrix, preferred_element_type=jnp.float32)
    cap = module.config.final_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


@functools.partial(jax.jit, static_argnums=0)
def logits(
    module: Any, params: Tree, tokens: Tokens, mask: Mask | None = None, **inputs: Any
) -> Float[Array, "batch time vocab"]:
    """Next-token logits at each position, float32.

    Args:
        tokens: [B, T] ids.
        mask: [B, T], true at real tokens, padding on either side; positions count real tokens. Logits at padding
            mean nothing.
    """
    hidden, _ = hidden_states(module, params, tokens, mask, **inputs)
    return logits_of(module, params, hidden)


def target_logps(
    module: Any,
    params: Tree,
    tokens: Tokens,
    target_mask: Mask,
    mask: Mask | None = None,
    *,
    key: Array | None = None,
    **inputs: Any,
) -> tuple[Float[Array, "batch time"], Float[Array, ""]]:
    """log p(token_t | tokens before t) where `target_mask` is true, 0 elsewhere; and the auxiliary loss.

    The first column has nothing before it: its value is 0 whatever the mask says. Never holds [B, T, V].
    """
    hidden, aux = hidden_states(module, params, tokens, mask, key=key, **inputs)
    # Every place is asked for the next token, the last one for none: no place is cut off, and shardings stay as they are.
    following = lambda x: jnp.roll(jnp.asarray(x), -1, axis=1)
    wanted = following(target_mask).at[:, -1].set(False)
    tied = module.config.tie_embeddings
    matrix = params["model"]["embed_tokens"]["embedding"] if tied else params["lm_head"]["unembedding"]
    logps = token_logprobs(
        hidden.reshape(-1, hidden.shape[-1]),
        matrix.astype(hidden.dtype),
        following(tokens).reshape(-1),
        softcap=module.config.final_softcap,
        where=wanted.reshape(-1),
        transposed=tied,
    )
    return jnp.roll(logps.reshape(wanted.shape), 1, axis=1), aux


def sequence_logps(
    module: Any, params: Tree, tokens: Tokens, target_mask: Mask, mask: Mask | None = None, *, images: Any = None
) -> Float[Array, "batch"]:
    """Summed log-probability of the tokens that `target_mask` marks, float32 [B].

    Args:
        tokens: [B, T] ids.
        target_mask: [B, T]; log p(token_t | tokens before t) is summed where it is true.
        mask: [B, T], true at real tokens; padding may stand on either side.
        images: for models that see; a text-only model takes None.

    Raises:
        ValueError: images for a model without a vision tower.
    """
    if images is not None:
        raise ValueError(f"{type(module).__name__} reads no images; leave images=None.")
    return _sequence_logps(module, params, tokens, target_mask, mask)


@functools.partial(jax.jit, static_argnums=0)
def _sequence_logps(module: Any, params: Tree, tokens: Any, target_mask: Any, mask: Any) -> Float[Array, "batch"]:
    return target_logps(module, params, tokens, target_mask, mask)[0].sum(axis=-1)
