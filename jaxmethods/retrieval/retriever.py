"""A retriever of one domain: two heads on frozen features, trained so that a query lies near what belongs to it.

The features are arrays of any encoders: pictures by EfficientNet or CLIP, texts by MiniLM or a decoder's hidden states. So is each
R_d of MMed-RAG (https://arxiv.org/abs/2410.13085, section 3.2) here; the authors train their whole encoders, by the same loss.

    retriever = train(pictures, texts, key=jax.random.key(0), groups=group_of_text)
    scores, rows = search.top_k(retriever.embed_queries(seen), retriever.embed_targets(texts), 5)
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxmethods import losses, sharding, tree
from jaxmethods.models.dual import unit
from jaxmethods.retrieval import heads, search
from jaxmethods.training.optimizer import Optimizer
from jaxmethods.tree import Tree

MEASURES = ("loss", "recall")
LARGEST_SCALE = 100.0
"""The learned scale (1 / temperature) is clipped to this after each step, as CLIP's is."""
LOGITS = 1 << 21
"""How many logits of a loss with groups are held at once, about."""
AMONG = 5
"""Held-out recall is of the first so many."""


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """How a retriever is made and trained. Published (MMed-RAG): AdamW, 1e-3, decay 1e-2, batches of 32, 360 epochs, a look at
    held-out pairs every 10 (its released script: batches of 512, rate 1e-4).

    Args:
        width: of the space that both heads lead to.
        hidden: of a hidden layer in each head; None: the heads are linear.
        temperature: where the learned one starts; CLIP's is 0.07.
        optimizer: its schedule spans all epochs, whether or not training stops early.
        batch_size: pairs a step; what is left of an epoch is dropped, another part each time.
        epochs: at most.
        evaluate_every: epochs between looks at the held-out pairs.
        held_out: share of the groups that is not trained on; the parameters that do best there are kept. 0: the last ones.
        keep: what is best: the lowest held-out "loss", or the highest "recall" among the first five.
        patience: training ends after so many looks without a better one; None: never before its time.
    """

    width: int = 256
    hidden: int | None = None
    temperature: float = 0.07
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, weight_decay=1e-2)  # noqa: RUF009  # frozen
    batch_size: int = 32
    epochs: int = 360
    evaluate_every: int = 10
    held_out: float = 0.1
    keep: str = "loss"
    patience: int | None = 5

    def __post_init__(self) -> None:
        tree.require_one_of("keep", self.keep, MEASURES)
        for name, least in (
            ("width", 1),
            ("hidden", 1),
            ("batch_size", 2),
            ("epochs", 1),
            ("evaluate_every", 1),
            ("patience", 1),
        ):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        if not self.temperature >= 1 / LARGEST_SCALE:
            raise ValueError(
                f"temperature={self.temperature} must be at least {1 / LARGEST_SCALE}, where a learned one is held."
            )
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out} is a share of the groups and must be in [0, 1).")
        if self.epochs % self.evaluate_every:
            raise ValueError(
                f"epochs={self.epochs} must be a multiple of evaluate_every={self.evaluate_every}; "
                f"try epochs={-(-self.epochs // self.evaluate_every) * self.evaluate_every}."
            )


class History(NamedTuple):
    """What was seen at each look; nan after training ended, and in held-out fields where nothing was held out."""

    loss: Float[Array, "looks"]
    """Mean over the batches since the look before."""
    held_out_loss: Float[Array, "looks"]
    """Of all held-out pairs as one batch."""
    held_out_recall: Float[Array, "looks"]
    """Share of held-out queries with a right one of the held-out targets among the first five."""
    temperature: Float[Array, "looks"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params", "history"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Retriever:
    """Two trained heads: a pytree of float32 arrays.

    params: {"queries": head, "targets": head, "log_scale"}, heads as `heads.init` makes them.
    history: of its training; not saved.
    """

    params: Tree
    history: History | None = None

    def embed_queries(self, features: Float[Array | np.ndarray, "rows d_in"]) -> Float[Array, "rows width"]:
        """Embeddings of unit norm, [N, P]."""
        return _embedded("queries", self.params["queries"], features)

    def embed_targets(self, features: Float[Array | np.ndarray, "rows d_in"]) -> Float[Array, "rows width"]:
        """Embeddings of unit norm, [N, P]."""
        return _embedded("targets", self.params["targets"], features)

    @property
    def temperature(self) -> Float[Array, ""]:
        """What cosines are divided by in the loss."""
        return jnp.exp(-self.params["log_scale"])

    def save(self, path: Any) -> None:
        """Writes one safetensors file."""
        heads.write(path, self.params, "retriever")

    @classmethod
    def load(cls, path: Any) -> Retriever:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no retriever.
        """
        linear, deep = (
            frozenset(
                f"{side}/{layer}/{leaf}"
                for side in ("queries", "targets")
                for layer in layers
                for leaf in ("kernel", "bias")
            )
            for layers in (("last",), ("first", "last"))
        )
        return cls(heads.read(path, "retriever", tuple(names | {"log_scale"} for names in (linear, deep))))


def init(key: Array, query_width: int, target_width: int, config: RetrieverConfig | None = None) -> Retriever:
    """An untrained retriever of features of these widths."""
    config = config or RetrieverConfig()
    of_queries, of_targets = jax.random.split(key)
    head = lambda of, d_in: heads.init(of, d_in, config.width, config.hidden)
    sides = {"queries": head(of_queries, query_width), "targets": head(of_targets, target_width)}
    return Retriever(sides | {"log_scale": jnp.float32(-math.log(config.temperature))})


def contrastive_loss(
    queries: Float[Array | np.ndarray, "pairs dim"],
    targets: Float[Array | np.ndarray, "targets dim"],
    *,
    temperature: float | Float[Array | np.ndarray, ""],
    groups: Int[Array | np.ndarray, "rows"] | None = None,
) -> Float[Array, ""]:
    """`losses.info_nce` of both directions; with groups, other pairs of a pair's own group are none of its negatives.

    The loss of pair i is (lse_j z_ij + lse_j z_ji) / 2 - z_ii, j over i and the pairs of other groups, z = cosines / temperature:
    with all groups different it is `info_nce`. Never holds [pairs, pairs].

    Args:
        queries, targets: [N, D], of any length; row i of both is one pair.
        groups: [N]; those of equal texts are equal. None: all differ.
    """
    if groups is None:
        return losses.info_nce(queries, targets, temperature=temperature)
    q, t, of = unit(jnp.asarray(queries)), unit(jnp.asarray(targets)), jnp.asarray(groups)
    place = jnp.arange(len(q))

    def of_pair(row: tuple[Array, ...]) -> Array:
        query, target, group, own = row
        among = (of != group) | (place == own)
        choice = lambda one, others: jax.nn.logsumexp(jnp.where(among, others @ one / temperature, -jnp.inf))
        return (choice(query, t) + choice(target, q)) / 2 - query @ target / temperature

    block = min(max(LOGITS // len(q), 1), len(q))
    return jax.lax.map(jax.checkpoint(of_pair, prevent_cse=False), (q, t, of, place), batch_size=block).mean()


def train(
    queries: Float[Array | np.ndarray, "pairs query_width"],
    targets: Float[Array | np.ndarray, "targets target_width"],
    *,
    config: RetrieverConfig | None = None,
    key: Array,
    groups: Int[Array | np.ndarray, "rows"] | None = None,
    mesh: Mesh | None = None,
) -> Retriever:
    """Trains a retriever on pairs of features; one compiled program.

    Features are centred and scaled by the training pairs' moments; the heads that come back have that in their first layer.

    Args:
        queries, targets: [N, F] and [N, G], frozen features, any float dtype; row i of both is one pair.
        key: of the heads' start, the order of pairs and the choice of those that are held out.
        groups: [N]: pairs with equal numbers are never negatives of each other, are right answers of each other in held-out recall,
            and stay on one side of the split. Give equal texts (or pictures) equal numbers. None: all pairs differ.
        mesh: the rows of each batch lie over `data` and `fsdp`, features and heads whole on every device; the numbers are those of
            one device but for rounding.

    Raises:
        ValueError: other numbers of queries, targets and groups, features that are not finite, fewer training pairs than
            `batch_size`, fewer than two held-out groups, or a loss that is not finite.
    """
    config = config or RetrieverConfig()
    if not len(queries) == len(targets) == (len(targets) if groups is None else len(groups)):
        told = "" if groups is None else f" and {len(groups)} groups"
        raise ValueError(f"there are {len(queries)} queries, {len(targets)} targets{told}; row i of all is one pair.")
    search.check_finite("queries", queries)
    search.check_finite("targets", targets)
    of_split, of_start, of_order = jax.random.split(key, 3)
    numbers = np.arange(len(queries)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    out = _held_out(numbers, config.held_out, of_split)
    if (count := int((~out).sum())) < config.batch_size:
        raise ValueError(
            f"batch_size={config.batch_size} and there are {count} training pairs; choose batch_size of at most {count}."
        )
    side = lambda rows: tuple(jnp.asarray(x)[rows].astype(jnp.float32) for x in (queries, targets))
    of = lambda rows: None if groups is None else jnp.asarray(numbers[rows], jnp.int32)
    pairs, held = (*side(~out), of(~out)), (*side(out), of(out)) if out.any() else None
    start = init(of_start, queries.shape[1], targets.shape[1], config).params
    if mesh is not None:
        pairs, held, start, of_order = jax.device_put((pairs, held, start, of_order), sharding.replicated(mesh))
    params, history = _trained(start, pairs, held, of_order, config=config, mesh=mesh)
    if (lost := np.isinf(history.loss)).any():
        raise ValueError(
            f"the loss is not finite by epoch {(int(lost.argmax()) + 1) * config.evaluate_every}; lower "
            f"optimizer.learning_rate={config.optimizer.learning_rate}."
        )
    return Retriever(params, history)


def _held_out(groups: np.ndarray, share: float, key: Array) -> np.ndarray:
    """Which pairs are held out: those of a share of the groups, by chance."""
    count = int(groups.max()) + 1
    chosen = np.asarray(jax.random.permutation(key, count))[: round(share * count)]
    if share and len(chosen) < 2:
        raise ValueError(
            f"held_out={share} of {count} groups is {len(chosen)}; held-out pairs need at least 2, or none: held_out=0."
        )
    return np.isin(groups, chosen)


@functools.partial(jax.jit, static_argnames=("config", "mesh"))
def _trained(
    start: Tree, pairs: Any, held: Any, key: Array, *, config: RetrieverConfig, mesh: Any
) -> tuple[Tree, History]:
    means = {name: heads.moments(x) for name, x in zip(("queries", "targets"), pairs, strict=False)}
    standard = lambda given: tuple((x - m) * s for x, (m, s) in zip(given[:2], means.values(), strict=True))
    inputs, of_pairs, count = standard(pairs), pairs[2], len(pairs[0])
    batches = count // config.batch_size
    tx = config.optimizer.transformation(config.epochs * batches)

    def loss_of(params: Tree, given: Any, groups: Any) -> Array:
        q, t = (heads.apply(params[name], x) for name, x in zip(("queries", "targets"), given, strict=True))
        return contrastive_loss(q, t, temperature=jnp.exp(-params["log_scale"]), groups=groups)

    def step(state: tuple[Tree, Any], rows: Array) -> tuple[tuple[Tree, Any], Array]:
        params, opt = state
        given = [sharding.split_rows(x[rows], mesh) for x in inputs]
        loss, grads = jax.value_and_grad(loss_of)(params, given, None if of_pairs is None else of_pairs[rows])
        updates, opt = tx.update(grads, opt, params)
        params = optax.apply_updates(params, updates)
        params["log_scale"] = jnp.minimum(params["log_scale"], math.log(LARGEST_SCALE))
        return (params, opt), loss

    def epoch(state: tuple[Tree, Any], number: Array) -> tuple[tuple[Tree, Any], Array]:
        order = jax.random.permutation(jax.random.fold_in(key, number), count)[: batches * config.batch_size]
        return jax.lax.scan(step, state, order.reshape(batches, config.batch_size))

    def seen(params: Tree) -> tuple[Array, Array]:
        """Loss and recall of the held-out pairs."""
        if held is None:
            return jnp.float32(jnp.nan), jnp.float32(jnp.nan)
        given, of_held = standard(held), held[2]
        q, t = (unit(heads.apply(params[name], x)) for name, x in zip(("queries", "targets"), given, strict=True))
        ids = jnp.arange(len(q)) if of_held is None else of_held
        recall = (search.ranks(q, t, (ids, ids)) < AMONG).mean(dtype=jnp.float32)
        return loss_of(params, given, of_held), recall

    def go_on(carry: Any, first: Array) -> tuple[Any, History]:
        state, best, score, missed = carry
        state, losses_seen = jax.lax.scan(epoch, state, first + jnp.arange(config.evaluate_every))
        params = state[0]
        loss, recall = seen(params)
        now = -loss if config.keep == "loss" else recall
        better = (now > score) | (held is None)
        best = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, best)
        carry = state, best, jnp.where(better, now, score), jnp.where(better, 0, missed + 1)
        mean = losses_seen.mean()
        mean = jnp.where(jnp.isfinite(mean), mean, jnp.inf)  # nan is of looks that were not made
        return carry, History(mean, loss, recall, jnp.exp(-params["log_scale"]))

    def look(carry: Any, first: Array) -> tuple[Any, History]:
        if config.patience is None:
            return go_on(carry, first)
        ended = lambda carry, first: (carry, History(*[jnp.float32(jnp.nan)] * 4))
        return jax.lax.cond(carry[-1] < config.patience, go_on, ended, carry, first)

    firsts = jnp.arange(0, config.epochs, config.evaluate_every)
    carry = (start, tx.init(start)), start, jnp.float32(-jnp.inf), jnp.int32(0)
    (_, best, _, _), history = jax.lax.scan(look, carry, firsts)
    return best | {name: heads.fold(best[name], *means[name]) for name in means}, history


@jax.jit
def _apply(head: Tree, features: Array) -> Array:
    return unit(heads.apply(head, features))


def _embedded(side: str, head: Tree, features: Any) -> Array:
    reads = len(head.get("first", head["last"])["kernel"])
    if features.ndim != 2 or features.shape[1] != reads:
        raise ValueError(f"features of {side} have shape {tuple(features.shape)}; this retriever reads [N, {reads}].")
    return _apply(head, jnp.asarray(features))
