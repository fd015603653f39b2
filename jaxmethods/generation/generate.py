"""Autoregressive generation with a key-value cache, as one compiled program.

The prompt is read in one pass; then each turn of a `lax.while_loop` feeds one token a row and draws the next, until every
row has ended. The loop is bound by reading the parameters once a token. On one CPU device XLA would copy each layer of a
scanned stack before reading it, so there the stack is passed layer by layer (views of the same memory) and the layer loop
is unrolled; other devices read slices in place, and keep the scan and its short compilation.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxmethods import tree
from jaxmethods.generation import sampling
from jaxmethods.models.decoder import KVCache
from jaxmethods.models.functional import logits_of
from jaxmethods.models.vlm import as_images
from jaxmethods.quantization import is_quantized
from jaxmethods.tree import Tree


class Generation(NamedTuple):
    """New tokens of each row; what follows the end of a row is filler where `mask` is false."""

    tokens: Int[Array, "batch new"]
    """int32; filler is the model's pad id, else the first end token, else 0."""
    mask: Bool[Array, "batch new"]
    """True at generated tokens, the closing end token included."""
    logps: Float[Array, "batch new"]
    """float32 log-probabilities under the model itself: no temperature, no filter. 0 where `mask` is false."""


def generate(
    module: nn.Module,
    params: Tree,
    tokens: Int[Array | np.ndarray, "batch time"],
    mask: Bool[Array | np.ndarray, "batch time"] | None = None,
    *,
    max_new_tokens: int,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int | Int[Array, ""] | None = None,
    top_p: float | Float[Array, ""] | None = None,
    eos_id: int | tuple[int, ...] | None = None,
    images: Any = None,
    key: Key[Array, "*#batch"] | None = None,
) -> Generation:
    """Continues each prompt by up to `max_new_tokens` tokens.

    Compiled once for each module, shape and set of options in use; other values of `temperature` (but for 0), `top_k`,
    `top_p`, `eos_id` and `key` run the same program.

    A row's draws depend on its key and on how many tokens it has generated, on nothing else: neither the other rows nor
    padding nor `max_new_tokens` changes them. With one key, row i has fold_in(key, i).

    Args:
        module: called like `jaxmethods.models.Decoder`, also with adapters attached.
        params: the module's parameters; they may be sharded.
        tokens: [B, T] prompts.
        mask: [B, T], true at real tokens, all by default; padding may stand anywhere.
        temperature: logits are divided by it; 0 takes the most probable token and needs no key.
        top_k, top_p: see `sampling.filter_logits`.
        eos_id: the token or tokens that end a row; with None every row runs to `max_new_tokens`.
        images: what a model that sees takes beside the tokens, as in `models.logits`.
        key: one for the batch, or one for each row [B] (which makes draws independent of the rows' order too).

    Raises:
        ValueError: no key where tokens are drawn; max_new_tokens < 1; temperature < 0; top_k < 1; top_p outside of
            (0, 1]; a row of padding alone; images for a model that reads none, or that are not as many as the tokens say.
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
    greedy = not isinstance(temperature, jax.core.Tracer) and float(temperature) == 0.0
    _check(tokens, mask, max_new_tokens, temperature, top_k, top_p, key, greedy)
    images = as_images(module, tokens, images)
    ends = () if eos_id is None else tuple(int(end) for end in np.atleast_1d(eos_id))
    pad_id = getattr(module.config, "pad_id", None)  # type: ignore[attr-defined]
    filler = pad_id if pad_id is not None else ends[0] if ends else 0
    draw = None
    if not greedy and key is not None:
        rows = jnp.arange(tokens.shape[0])
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows) if key.ndim == 0 else key
        number = lambda x, dtype: None if x is None else jnp.asarray(x, dtype)
        draw = _Draw(keys, jnp.asarray(temperature, jnp.float32), number(top_k, jnp.int32), number(top_p, jnp.float32))
    module, params = _by_layer(module, params)
    return _generate(
        module,
        params,
        tokens,
        mask,
        jnp.asarray(ends, jnp.int32),
        jnp.int32(filler),
        images,
        draw,
        max_new_tokens=max_new_tokens,
    )


class _Draw(NamedTuple):
    """How tokens are drawn."""

    keys: Key[Array, "batch"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""] | None
    top_p: Float[Array, ""] | None


class _State(NamedTuple):
    """Carried from token to token; `turn` tokens are written, `last` is the latest of each row, `live` rows go on."""

    turn: Int[Array, ""]
    last: Int[Array, "batch"]
    live: Bool[Array, "batch"]
    cache: KVCache
    out: Generation


@functools.partial(jax.jit, static_argnames=("module", "max_new_tokens"))
def _generate(
    module: Any,
    params: Tree,
    tokens: Array,
    mask: Array,
    ends: Array,
    filler: Array,
    images: Any,
    draw: _Draw | None,
    *,
    max_new_tokens: int,
) -> Generation:
    rows, width = tokens.shape
    params = _cast(module, params)
    laid_out, stepper = params, module
    if (
        rows > 1
        and max_new_tokens >= _MANY
        and _is_split(params)
        and getattr(module, "dot_general", _kernel_first) is None
        and not is_quantized(module)
    ):
        laid_out, stepper = _transposed(params), module.clone(dot_general=_kernel_first)
    seen = {} if images is None else {"images": images}

    def write(hidden: Array, turn: Array, live: Array, cache: KVCache, out: Generation) -> _State:
        """Chooses each row's next token from its last hidden state [B, D]."""
        logits = _logits(module, params, hidden)
        if draw is None:
            chosen = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        else:
            keys = jax.vmap(jax.random.fold_in, (0, None))(draw.keys, turn)
            chosen = sampling.sample(keys, logits, draw.temperature, draw.top_k, draw.top_p)
        logps = jnp.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0] - jax.nn.logsumexp(logits, -1)
        new = Generation(jnp.where(live, chosen, filler), live, jnp.where(live, logps, 0.0))
        out = jax.tree.map(lambda old, x: jax.lax.dynamic_update_slice(old, x[:, None], (0, turn)), out, new)
        return _State(turn + 1, new.tokens, live & ~(chosen[:, None] == ends).any(-1), cache, out)

    def step(state: _State) -> _State:
        whole = _stacked(laid_out, transposed=laid_out is not params)
        output = stepper.apply({"params": whole}, state.last[:, None], mask=state.live[:, None], cache=state.cache)
        return write(output.hidden[:, 0], state.turn, state.live, output.cache, state.out)

    slots = width + max_new_tokens - 1  # the last token is never read again
    cache = KVCache.empty(module.config, rows, slots, module.dtype)
    prompt = module.apply({"params": _stacked(params)}, tokens, mask=mask, cache=cache, **seen)
    final = width - 1 - jnp.argmax(mask[:, ::-1], axis=-1)
    hidden = jnp.take_along_axis(prompt.hidden, final[:, None, None], axis=1)[:, 0]
    empty = Generation(
        jnp.full((rows, max_new_tokens), filler, jnp.int32),
        jnp.zeros((rows, max_new_tokens), bool),
        jnp.zeros((rows, max_new_tokens), jnp.float32),
    )
    first = write(hidden, jnp.int32(0), jnp.ones(rows, bool), prompt.cache, empty)
    return jax.lax.while_loop(lambda s: (s.turn < max_new_tokens) & s.live.any(), step, first).out


_MANY = 16
"""With fewer new tokens, laying out the kernels anew costs more than it saves."""


def _by_layer(module: Any, params: Tree) -> tuple[Any, Tree]:
    """On one CPU device: the module with its layers unrolled, and each stack of layers as a list of views of its layers."""
    leaves = jax.tree.leaves(params)
    if not all(isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in leaves):
        return module, params
    devices = {device for x in leaves for device in x.devices()}
    if {device.platform for device in devices} != {"cpu"} or len(devices) > 1 or not hasattr(module, "unroll"):
        return module, params

    def views(path: str, x: jax.Array) -> Any:
        if not path.startswith("model/layers/"):
            return x
        host = np.asarray(x)  # the same memory; so are its rows, where they are aligned
        return [jax.device_put(layer, *devices, may_alias=True) for layer in host]

    split = {path: views(path, x) for path, x in tree.flatten(params).items()}
    return module.clone(unroll=module.config.num_layers), tree.unflatten(split)


def _is_split(params: Tree) -> bool:
    return any(isinstance(x, list) for x in tree.flatten(params).values())


def _cast(module: Any, params: Tree) -> Tree:
    """Matrices in the module's dtype, once instead of at every token."""
    matrices = ("kernel", "embedding", "unembedding")
    cast = lambda path, x: tree.cast(x, module.dtype) if path.rsplit("/", 1)[-1] in matrices else x
    return tree.unflatten({path: cast(path, x) for path, x in tree.flatten(params).items()})


def _transposed(params: Tree) -> Tree:
    """Kernels of separate layers as [out, in], for `_kernel_first`."""
    turn = lambda path, x: path.endswith("/kernel") and isinstance(x, list)
    barrier = jax.lax.optimization_barrier  # the transposition is to be done here, not at every token
    return tree.unflatten(
        {path: [barrier(k.T) for k in x] if turn(path, x) else x for path, x in tree.flatten(params).items()}
    )


def _stacked(params: Tree, transposed: bool = False) -> Tree:
    """What the module expects. XLA takes the layers out of the stacks, and transpositions into products, without a copy."""

    def stack(path: str, x: Any) -> Any:
        if not isinstance(x, list):
            return x
        return jnp.stack([layer.T for layer in x] if transposed and path.endswith("/kernel") else x)

    return tree.unflatten({path: stack(path, x) for path, x in tree.flatten(params).items()})


def _kernel_first(x: Array, kernel: Array, dimensions: Any, precision: Any = None, **options: Any) -> Array:
    """`jax.lax.dot_general` of x [..., in] and a kernel [in, out], with the kernel as the first factor.

    XLA's CPU product of a few rows is fastest so, when the kernel lies in memory as [out, in].
    """
    flat = x.reshape(-1, x.shape[-1])
    y = jax.lax.dot_general(kernel, flat, (((0,), (1,)), ((), ())), precision, **options)
    y = jax.lax.optimization_barrier(
        y
    )  # else the compiler folds the transposition into the product and swaps its factors
    return y.T.reshape(*x.shape[:-1], kernel.shape[-1])


def _logits(module: Any, params: Tree, hidden: Array) -> Array:
    """`models.logits_of` a few rows; a tied table lies as [out, in] already."""
    if hidden.shape[0] == 1 or not _is_split(params) or not module.config.tie_embeddings:
        return logits_of(module, params, hidden)
    table = params["model"]["embed_tokens"]["embedding"]
    logits = _kernel_first(hidden, table.T, None, preferred_element_type=jnp.float32)
    cap = module.config.final_softcap
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def _check(
    tokens: Array,
    mask: Array,
    max_new_tokens: int,
    temperature: Any,
    top_k: Any,
    top_p: Any,
    key: Any,
    greedy: bool,
) -> None:
    """Refuses wrong arguments; values that are traced cannot be looked at."""
    known = lambda x: x is not None and not isinstance(x, jax.core.Tracer)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1.")
    if mask.shape != tokens.shape:
        raise ValueError(f"mask has shape {mask.shape} and tokens {tokens.shape}; give one mask entry for each token.")
    if known(temperature) and not 0 <= float(temperature) < float("inf"):
        raise ValueError(f"temperature={float(temperature)} must be 0 (greedy) or positive.")
    if known(top_k) and int(top_k) < 1:
        raise ValueError(f"top_k={int(top_k)} must be at least 1; leave it None to keep every token.")
    if known(top_p) and not 0 < float(top_p) <= 1:
        raise ValueError(f"top_p={float(top_p)} must lie in (0, 1]; leave it None to keep every token.")
    if key is None and not greedy:
        raise ValueError(
            "key is missing: drawing at temperature > 0 needs one, such as jax.random.key(0); or set temperature=0."
        )
    if known(key) and not greedy and key.shape not in ((), tokens.shape[:1]):
        raise ValueError(f"key has shape {key.shape}; give one key, or one for each of the {tokens.shape[0]} rows.")
    if known(mask) and mask.is_fully_addressable:
        empty = np.flatnonzero(~np.asarray(mask).any(axis=-1))
        if empty.size:
            raise ValueError(
                f"row {empty[0]} of the prompts is padding alone (mask is false throughout); leave it out."
            )
