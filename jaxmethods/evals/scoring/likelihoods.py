"""Log-likelihoods of continuations, of mixed lengths, from a stream: packed rows, few compiled programs, never [B, T, V].

Pairs that have their context in common (the choices of a question) read it once: contexts are packed into rows whose keys and
values are kept, and then their continuations are packed into rows of their own, each behind a copy of a row of contexts. Segment
ids say which context a continuation belongs to, so that a row may hold one continuation of each context before it.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxmethods import sharding
from jaxmethods.evals.scoring.planning import Work, plan, shapes_for, windows
from jaxmethods.evals.scoring.segments import Laid, Pair, behind, lay, segments_of, sizes
from jaxmethods.kernels.manual_axes import vary, varying_axes
from jaxmethods.kernels.token_logprobs import implementation_for, token_logprobs
from jaxmethods.models.decoder import KVCache
from jaxmethods.models.functional import hidden_states, unembedding
from jaxmethods.tree import Tree

BATCH_TOKENS = 2048
"""Places of a batch; more of them fill larger devices."""
WINDOW = 2048
"""Requests that are sorted by length at a time."""
LOGITS = 1 << 22
"""How many logits are held at once, about, where the likeliest token is looked for."""


class Likelihood(NamedTuple):
    """Of a continuation.

    logp: sum of log p(token | all before), nats. greedy: whether each token is the likeliest at its place, so that greedy decoding
    says the same; None where that was not asked. tokens: of the continuation. cut: tokens that the context lost at its beginning.
    """

    logp: float
    greedy: bool | None
    tokens: int
    cut: int


class _Tally:
    """Sums over the tokens of each pair, as batches come back."""

    def __init__(self, pairs: int):
        self.logps, self.likeliest = np.zeros(pairs), np.ones(pairs, bool)
        self._waiting: collections.deque[tuple[Laid, Any]] = collections.deque()

    def add(self, laid: Laid, found: Any) -> None:
        """Takes a batch that may still be computed; it is waited for when the one after the next comes."""
        self._waiting.append((laid, found))
        while len(self._waiting) > 2:
            self._collect()

    def finish(self) -> None:
        while self._waiting:
            self._collect()

    def _collect(self) -> None:
        laid, found = self._waiting.popleft()
        logps, likeliest = (np.asarray(x)[laid.rows, laid.slots] for x in found)
        np.add.at(self.logps, laid.owners, logps.astype(np.float64))
        np.logical_and.at(self.likeliest, laid.owners, likeliest)


def log_likelihoods(
    module: Any,
    params: Tree,
    pairs: Iterable[Pair],
    *,
    limit: int | None = None,
    greedy: bool = True,
    pack: bool = True,
    share: bool = True,
    batch_tokens: int = BATCH_TOKENS,
    window: int = WINDOW,
    mesh: Mesh | None = None,
    work: Work | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Iterator[Likelihood]:
    """Likelihoods in the order of the pairs; the stream is read a window at a time, and no pair's numbers depend on the others.

    A context that is too long loses its beginning, as in lm-evaluation-harness: `limit` tokens are read, and the last one of the
    continuation is not among them.

    Args:
        module: called like `models.Decoder`, also with adapters attached; text alone.
        params: they may be sharded.
        limit: tokens that the model reads at most; by default its configuration's `max_position_embeddings`.
        greedy: tell whether greedy decoding says the same, which looks for the likeliest token at each place.
        pack: pairs may share rows.
        share: pairs with the same context may share its keys and values.
        batch_tokens: places of a batch, about.
        window: pairs that are sorted by length at a time.
        mesh: of `sharding.make_mesh`, by default the module's own; rows of batches lie over `data` and `fsdp`.
        work: what was done is added to it.
        progress: called with the number of pairs that are done, after each window.

    Raises:
        ValueError: a pair without context or continuation, or with a continuation of more than `limit` tokens.
    """
    module, mesh = on_mesh(module, mesh)
    limit = limit or module.config.max_position_embeddings
    shapes = shapes_for(limit, batch_tokens, multiple=ways(mesh))
    work = Work() if work is None else work
    done = 0
    for some in windows(pairs, window):
        cuts = [_cut(pair, limit, done + number) for number, pair in enumerate(some, 1)]
        alone, shared = segments_of(some, limit, shapes[0].places if share and pack else None)
        tally = _Tally(len(some))
        run = functools.partial(_scored, module, params, mesh=mesh, greedy=greedy)
        for shape, rows in plan(sizes(alone), shapes, pack=pack):
            laid = lay(shape, [[(alone[i], number, 0) for number, i in enumerate(row, 1)] for row in rows])
            tally.add(laid, run(place(laid.arrays, mesh)))
            work.count(("likelihoods", *shape, greedy), shape.places, laid.tokens)
        for shape, rows in plan(sizes(shared), shapes):
            groups = [[shared[i] for i in row] for row in rows]
            laid = lay(shape, [[(of.context, number, 0) for number, of in enumerate(row, 1)] for row in groups])
            cache = _read(module, params, place(laid.arrays, mesh))
            work.count(("contexts", *shape), shape.places, laid.tokens)
            work.reused += sum(len(of.context.tokens) * (len(of.tails) - 1) for row in groups for of in row)
            for tail_shape, rows_of, tails in behind(shape, groups):
                laid = lay(tail_shape, tails)
                tally.add(laid, run(place(laid.arrays, mesh), cache, rows_of))
                work.count(("continuations", *shape, tail_shape.length, greedy), tail_shape.places, laid.tokens)
        tally.finish()
        done += len(some)
        work.requests += len(some)
        progress(done)
        for pair, logp, likeliest, cut in zip(some, tally.logps, tally.likeliest, cuts, strict=True):
            yield Likelihood(float(logp), bool(likeliest) if greedy else None, len(pair.continuation), cut)


def on_mesh(module: Any, mesh: Mesh | None) -> tuple[Any, Mesh | None]:
    """The module that knows a mesh, and that mesh."""
    if mesh is None:
        return module, getattr(module, "mesh", None)
    return (module.clone(mesh=mesh) if hasattr(module, "mesh") else module), mesh


def ways(mesh: Mesh | None) -> int:
    """Over how many devices the rows of a batch lie."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def place(arrays: dict[str, np.ndarray], mesh: Mesh | None) -> dict[str, Any]:
    """Arrays [rows, length] with their rows over the mesh."""
    return arrays if mesh is None else jax.device_put(arrays, sharding.batch_sharding(mesh))


def _cut(pair: Pair, limit: int, number: int) -> int:
    """How many tokens the context loses."""
    context, continuation = len(pair.context), len(pair.continuation)
    if not context or not continuation:
        empty = "continuation" if context else "context"
        raise ValueError(f"request {number} has an empty {empty}; give at least one token of each.")
    if continuation > limit:
        raise ValueError(
            f"request {number} has a continuation of {continuation} tokens, and the model reads {limit} at most; shorten it, or "
            "score it by rolling windows."
        )
    return max(context + continuation - 1 - limit, 0)


# What is computed.


@functools.partial(jax.jit, static_argnames="module")
def _read(module: Any, params: Tree, batch: dict[str, Array]) -> KVCache:
    """Keys and values of a batch of contexts."""
    rows, slots = batch["tokens"].shape
    cache = KVCache.empty(module.config, rows, slots, module.dtype)
    output, _ = module.apply(
        {"params": params}, batch["tokens"], mask=batch["segment_ids"] > 0, segment_ids=batch["segment_ids"],
        positions=batch["positions"], cache=cache, mutable=["losses"],
    )  # fmt: skip
    return output.cache


@functools.partial(jax.jit, static_argnames=("module", "mesh", "greedy"))
def _scored(
    module: Any,
    params: Tree,
    batch: dict[str, Array],
    cache: KVCache | None = None,
    rows: Int[Array, "rows"] | None = None,
    *,
    mesh: Mesh | None,
    greedy: bool,
) -> tuple[Float[Array, "rows slots"], Bool[Array, "rows slots"]]:
    """(log-probability of each target, whether greedy decoding may say its pair); 0 and true where there is no target.

    Each row continues the row of `cache` that `rows` says.
    """
    told: dict[str, Any] = {} if cache is None else {"cache": _taken(cache, rows, batch["tokens"].shape[1])}
    hidden, _ = hidden_states(
        module, params, batch["tokens"], mask=batch["segment_ids"] > 0, segment_ids=batch["segment_ids"],
        positions=batch["positions"], **told,
    )  # fmt: skip
    hidden = jnp.take_along_axis(hidden, batch["places"][..., None], axis=1)
    tied = module.config.tie_embeddings
    matrix = unembedding(module, params).T if tied else unembedding(module, params)
    device = None if mesh is None else mesh.devices.flat[0]  # the one compiled for, which need not be this machine's
    of_tokens = functools.partial(
        _of_tokens, softcap=module.config.final_softcap, transposed=tied, device=device, greedy=greedy
    )
    given = hidden, matrix.astype(hidden.dtype), batch["targets"], batch["wanted"], batch["pairs"]
    if mesh is None or mesh.size == 1:
        return of_tokens(*given, axis_name=None)
    # Each device has its rows, and its part of the vocabulary where `tensor` divides it.
    axis = "tensor" if mesh.shape["tensor"] > 1 and matrix.shape[0 if tied else 1] % mesh.shape["tensor"] == 0 else None
    over = sharding.rows_spec(batch["tokens"].shape, mesh)
    of_matrix = P(axis, None) if tied else P(None, axis)
    own = functools.partial(of_tokens, axis_name=axis)
    return jax.shard_map(own, mesh=mesh, in_specs=(over, of_matrix, over, over, over), out_specs=(over, over))(*given)


def _taken(cache: KVCache, rows: Any, slots: int) -> KVCache:
    """Some rows of a cache, with empty slots behind those that are filled."""

    def taken(x: Array, axis: int) -> Array:
        return jnp.pad(jnp.take(x, rows, axis=axis), [(0, slots if i == axis + 1 else 0) for i in range(x.ndim)])

    return KVCache(
        taken(cache.k, 1), taken(cache.v, 1), taken(cache.positions, 0), taken(cache.segment_ids, 0), cache.length
    )


def _of_tokens(
    hidden: Float[Array, "rows slots width"],
    matrix: Array,
    targets: Int[Array, "rows slots"],
    wanted: Bool[Array, "rows slots"],
    pairs: Int[Array, "rows slots"],
    *,
    softcap: float | None,
    transposed: bool,
    device: Any,
    greedy: bool,
    axis_name: str | None,
) -> tuple[Float[Array, "rows slots"], Bool[Array, "rows slots"]]:
    flat, of, where = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), wanted.reshape(-1)
    implementation = None if device is None else implementation_for(device, flat, matrix, transposed=transposed)
    told: Any = {"softcap": softcap, "transposed": transposed, "axis_name": axis_name}
    logps = token_logprobs(flat, matrix, of, where=where, implementation=implementation, **told)
    logps = logps.reshape(targets.shape)
    if not greedy:
        return logps, jnp.ones_like(wanted)
    right = lambda asked: (likeliest(flat, matrix, asked.reshape(-1), **told) == of).reshape(targets.shape)
    return logps, _said_greedily(logps, wanted, pairs, right)


def _said_greedily(
    logps: Float[Array, "rows slots"],
    wanted: Bool[Array, "rows slots"],
    pairs: Int[Array, "rows slots"],
    right: Callable[[Array], Array],
) -> Bool[Array, "rows slots"]:
    """False at targets of pairs that hold one which is not the likeliest at its place.

    `right` looks at all logits of the places that it is asked for, which costs as much as the log-probabilities did. A token above
    1/2 is the likeliest in any case, and one wrong token settles its pair: so the least likely token of each pair is looked at
    first, and the others only where that was right.
    """
    of_pair = lambda x: jnp.take_along_axis(x, pairs, axis=1)
    unsure = wanted & ~(logps > -0.69)  # log 1/2, and more than is lost to rounding; also what is nan
    low = jax.vmap(lambda pair, x: jnp.full(x.shape, jnp.inf).at[pair].min(x))
    first = unsure & (logps == of_pair(low(pairs, jnp.where(unsure, logps, jnp.inf))))
    wrong = first & ~right(first)
    lost = of_pair(jax.vmap(lambda pair, x: jnp.zeros(x.shape, bool).at[pair].max(x))(pairs, wrong))
    rest = unsure & ~first & ~lost
    return ~wanted | (~lost & (~rest | right(rest)))


def likeliest(
    hidden: Float[Array, "tokens width"],
    matrix: Array,
    where: Bool[Array, "tokens"],
    *,
    softcap: float | None = None,
    transposed: bool = False,
    axis_name: str | None = None,
) -> Int[Array, "tokens"]:
    """The token with the largest logit at each wanted place (the first of several), by blocks of places; int32, anything elsewhere.

    Args:
        matrix: [width, vocab], or [vocab, width] when `transposed`; under `axis_name` this device's part of the vocabulary.
    """
    vocab = matrix.shape[0 if transposed else 1]
    size = min(max(LOGITS // vocab, 32), len(where))
    count = -(-len(where) // size)
    order = jnp.argsort(~where)  # wanted places first
    rows = jnp.pad(hidden[order], ((0, count * size - len(where)), (0, 0))).reshape(count, size, -1)

    def step(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        block = jax.lax.dynamic_index_in_dim(rows, i, keepdims=False)
        equation = "nd,vd->nv" if transposed else "nd,dv->nv"
        logits = jnp.einsum(equation, block, matrix, preferred_element_type=jnp.float32)
        logits = logits if softcap is None else softcap * jnp.tanh(logits / softcap)
        best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        new = jnp.take_along_axis(logits, best[:, None], axis=-1)[:, 0], best
        return tuple(jax.lax.dynamic_update_index_in_dim(old, x, i, 0) for old, x in zip(found, new, strict=True))

    start = jnp.zeros((count, size), jnp.float32), jnp.zeros((count, size), jnp.int32)
    start = vary(start, varying_axes(hidden, matrix, where))
    top, best = jax.lax.fori_loop(0, -(-where.sum() // size), step, start)
    if axis_name is not None:
        best = best + vocab * jax.lax.axis_index(axis_name)
        first = jnp.where(top == jax.lax.pmax(top, axis_name), best, jnp.iinfo(jnp.int32).max)
        best = jax.lax.pmin(first, axis_name)
    return jnp.zeros(len(where), jnp.int32).at[order].set(best.reshape(-1)[: len(where)])
