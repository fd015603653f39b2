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
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.kernels.token_logprobs import implementation_for, token_logprobs
from jaxmethods.models.vlm import as_images
from jaxmethods.sharding import tokens_spec
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


def logits(
    module: Any, params: Tree, tokens: Tokens, mask: Mask | None = None, *, images: Any = None, **inputs: Any
) -> Float[Array, "batch time vocab"]:
    """Next-token logits at each position, float32.

    Args:
        tokens: [B, T] ids.
        mask: [B, T], true at real tokens, padding on either side; positions count real tokens. Logits at padding
            mean nothing.
        images: for models that see: `models.Images`, or pixels [B, crops, S, S, 3] of pictures of one crop each, whose
            features stand in order at the row's image tokens.

    Raises:
        ValueError: images for a model that reads none; image tokens that are not as many as features.
    """
    if images is not None:
        inputs["images"] = as_images(module, tokens, images)
    return _logits(module, params, tokens, mask, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _logits(module: Any, params: Tree, tokens: Any, mask: Any, inputs: Any) -> Float[Array, "batch time vocab"]:
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

    mesh = getattr(module, "mesh", None)
    device = None if mesh is None else mesh.devices.flat[0]  # the one compiled for, which need not be this machine's
    logps_of = functools.partial(_flat_logps, softcap=module.config.final_softcap, transposed=tied, device=device)
    if mesh is not None and mesh.size > 1:
        logps_of = _on_shards(logps_of, mesh, tokens_spec(wanted.shape, mesh), matrix.shape, transposed=tied)
    logps = logps_of(hidden, matrix.astype(hidden.dtype), following(tokens), wanted)
    return jnp.roll(logps, 1, axis=1), aux


def _flat_logps(
    hidden: Array, matrix: Array, targets: Array, wanted: Array, *, transposed: bool, device: Any, **options: Any
) -> Float[Array, "batch time"]:
    flat = hidden.reshape(-1, hidden.shape[-1]), matrix, targets.reshape(-1)
    chosen = None if device is None else implementation_for(device, *flat[:2], transposed=transposed)
    options |= {"where": wanted.reshape(-1), "transposed": transposed, "implementation": chosen}
    return token_logprobs(*flat, **options).reshape(wanted.shape)


def _on_shards(logps_of: Any, mesh: Mesh, over: P, shape: tuple[int, ...], *, transposed: bool) -> Any:
    """`logps_of`, by each device for its tokens, which lie as `over` says, and its part of the vocabulary (over `tensor`).

    The matrix lies as the parameter does and is gathered along its width, so that its gradient is scattered again. Where
    an axis of the mesh does not divide, its devices do the same.
    """
    vocab_axis, width_axis = (0, 1) if transposed else (1, 0)
    splits = lambda axis, name: mesh.shape[name] > 1 and shape[axis] % mesh.shape[name] == 0
    names = {vocab_axis: "tensor" if splits(vocab_axis, "tensor") else None,
             width_axis: "fsdp" if splits(width_axis, "fsdp") else None}  # fmt: skip
    compact = mesh.devices.flat[0].platform == "cpu"

    def own(hidden: Array, matrix: Array, targets: Array, wanted: Array) -> Array:
        if names[width_axis]:
            matrix = jax.lax.all_gather(matrix, names[width_axis], axis=width_axis, tiled=True)
        return logps_of(hidden, matrix, targets, wanted, axis_name=names[vocab_axis], compact=compact)

    return jax.shard_map(own, mesh=mesh, in_specs=(over, P(names[0], names[1]), over, over), out_specs=over)


def sequence_logps(
    module: Any, params: Tree, tokens: Tokens, target_mask: Mask, mask: Mask | None = None, *, images: Any = None
) -> Float[Array, "batch"]:
    """Summed log-probability of the tokens that `target_mask` marks, float32 [B].

    Args:
        tokens: [B, T] ids.
        target_mask: [B, T]; log p(token_t | tokens before t) is summed where it is true.
        mask: [B, T], true at real tokens; padding may stand on either side.
        images: for models that see, as in `logits`; a text-only model takes None.

    Raises:
        ValueError: images for a model that reads none; image tokens that are not as many as features.
    """
    inputs = {} if images is None else {"images": as_images(module, tokens, images)}
    return _sequence_logps(module, params, tokens, target_mask, mask, inputs)


@functools.partial(jax.jit, static_argnums=0)
def _sequence_logps(
    module: Any, params: Tree, tokens: Any, target_mask: Any, mask: Any, inputs: Any
) -> Float[Array, "batch"]:
    return target_logps(module, params, tokens, target_mask, mask, **inputs)[0].sum(axis=-1)
