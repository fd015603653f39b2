"""CAFe: one model that both embeds and generates, by a contrastive and a language-modelling loss through the same weights.

https://arxiv.org/abs/2503.19900. Each row is read three times: as the dialogue that it is (next-token loss), as its picture
with an instruction to compress it into one word, and as its answer with the same instruction. The two latter end in an
assistant's turn that is empty and closed; the hidden state at its closing token is the embedding.

The rows of a pair of any kind (the paper's MMEB model) are read as what the user says and what the assistant says: `pairs=True`.

Where paper and released code differ: the code halves the sum of both directions and the paper's page does not (a factor of 2 in
`alpha_con`; here it is halved), and the code's gradient over W devices is 1 / W of the loss's (`gather="official"` reproduces it; a
published run with `con_weight` c on W devices is one with `alpha_con` = c / W).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float

from jaxmethods import losses, tree
from jaxmethods.data.pictures import MARKER
from jaxmethods.data.views import Conversation, View
from jaxmethods.models.dual import unit
from jaxmethods.models.functional import Mask, Tokens, hidden_states, target_logps
from jaxmethods.models.vlm import as_images, pictures
from jaxmethods.sharding import rows_spec
from jaxmethods.tree import Mean, Tree

SYSTEM = "You are a helpful assistant."
OF_IMAGE = "Compress this image in one word:"
OF_TEXT = "Compress this sentence in one word:"

POOLINGS = ("last", "mean", "token")
CONTRASTS = ("symmetric", "one_way", "sigmoid")
GATHERS = ("exact", "official")

LARGEST_SCALE = 100.0
"""A learned scale (1 / temperature) is held below this, as CLIP's is."""


def embed(
    module: Any,
    params: Tree,
    tokens: Tokens,
    mask: Mask | None = None,
    images: Any = None,
    *,
    pooling: str = "last",
    token_id: int | None = None,
    key: Array | None = None,
) -> Float[Array, "batch width"]:
    """One embedding a row, of unit norm, float32.

    Args:
        tokens: [B, T], as `image_view`, `text_view` and `pair_view` put them; any other tokens too.
        mask: [B, T], true at real tokens, padding on either side.
        images: for models that see, as in `models.logits`.
        pooling: "last" reads the state at the last real token; "mean" averages those of all real tokens (the released code
            averages padding too); "token" reads the state at the last `token_id` of each row.
        key: while training, for dropout.

    Raises:
        ValueError: an unknown pooling, "token" without `token_id` or the reverse; images for a model that reads none; a row
            without anything to read (traced values cannot be looked at: its embedding is then 0).
    """
    images, tokens = as_images(module, tokens, images), jnp.asarray(tokens)
    mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
    there = _read(tokens, mask, pooling, token_id).any(axis=1)
    if not isinstance(there, jax.core.Tracer) and not there.all():
        what = "token" if token_id is None else f"token {token_id}"
        raise ValueError(
            f"row {int(there.argmin())} has no real {what}, so there is no state to read as its embedding."
        )
    inputs = {} if images is None else {"images": images}
    hidden, _ = hidden_states(module, params, tokens, mask, key=key, **inputs)
    return unit(pool(hidden, tokens, mask, pooling=pooling, token_id=token_id))


def pool(
    hidden: Float[Array, "batch time width"],
    tokens: Any,
    mask: Bool[Array, "batch time"],
    *,
    pooling: str = "last",
    token_id: int | None = None,
) -> Float[Array, "batch width"]:
    """One state a row, 0 where there is nothing to read; see `embed`."""
    read = _read(tokens, mask, pooling, token_id)
    if pooling == "mean":
        kept = jnp.where(read[..., None], hidden.astype(jnp.float32), 0.0)
        return kept.sum(axis=1) / jnp.maximum(read.sum(axis=1, keepdims=True), 1)
    at = read.shape[1] - 1 - jnp.argmax(read[:, ::-1], axis=1)
    return jnp.where(read.any(axis=1)[:, None], jnp.take_along_axis(hidden, at[:, None, None], axis=1)[:, 0], 0)


def _read(tokens: Any, mask: Any, pooling: str, token_id: int | None) -> Bool[Array, "batch time"]:
    """The places that a pooling reads: all of these, or the last."""
    _check_pooling(pooling, token_id)
    mask = jnp.asarray(mask)
    return mask if token_id is None else mask & (jnp.asarray(tokens) == token_id)


def _check_pooling(pooling: str, token_id: int | None) -> None:
    tree.require_one_of("pooling", pooling, POOLINGS)
    if (token_id is None) == (pooling == "token"):
        raise ValueError(f"pooling={pooling!r} with token_id={token_id}: 'token' needs one, nothing else does.")


# The readings of a row (section c2 of the paper's code)


def image_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """The row's first picture, to be compressed into one word; what was said of it is not used.

    Raises:
        ValueError: the row has no picture.
    """
    if not conversation.images:
        raise ValueError(f"this row has no picture to embed; its messages are {_shown(conversation)}.")
    return _to_embed(f"{MARKER}\n{OF_IMAGE}", conversation.images[:1])


def text_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """All that the assistant says, joined without a separator, to be compressed into one word.

    Raises:
        ValueError: the assistant says nothing.
    """
    said = _said(conversation, "assistant", "")
    if not said.strip():
        raise ValueError(
            f"this row's caption is empty, so there is nothing to embed; its messages are {_shown(conversation)}."
        )
    return _to_embed(said[:most] + OF_TEXT)


def pair_view(conversation: Conversation, most: int | None = None, *, role: str = "user") -> Conversation:
    """All that one side says, with its pictures and nothing added: the query (user) or the target (assistant) of a pair."""
    said = {side: _said(conversation, side, "\n" if side == "user" else "") for side in ("user", "assistant")}
    first = said["user"].count(MARKER)
    images = conversation.images[:first] if role == "user" else conversation.images[first:]
    if not said[role].strip():
        raise ValueError(f"the {role}'s side of this pair is empty; its messages are {_shown(conversation)}.")
    return _to_embed(_cut(said[role], most), images)


def _cut(text: str, most: int | None) -> str:
    """The first so many characters of a text, and all of its markers, which its pictures need."""
    if most is None:
        return text
    kept: list[str] = []
    for part in text.split(MARKER):
        kept.append(part[: most - sum(map(len, kept))])
    return MARKER.join(kept)


def negative_view(conversation: Conversation, most: int | None = None, *, asked: str = OF_TEXT) -> Conversation:
    """The row's text that is no query's target, and behind it what is asked of targets.

    Raises:
        ValueError: the row has none.
    """
    text = conversation.row.get("negative")
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"this row has no text in its field 'negative'; its fields are {', '.join(map(str, conversation.row))}."
        )
    return _to_embed(text[:most] + asked)


def generation_view(conversation: Conversation, most: int | None = None) -> Conversation:
    """The dialogue as it is, with CAFe's system prompt where it has none of its own."""
    if conversation.messages and conversation.messages[0].get("role") == "system":
        return conversation
    return conversation._replace(messages=[{"role": "system", "content": SYSTEM}, *conversation.messages])


def _to_embed(content: str, images: Any = ()) -> Conversation:
    roles = (("system", SYSTEM), ("user", content), ("assistant", ""))
    return Conversation([{"role": role, "content": text} for role, text in roles], list(images))


def _said(conversation: Conversation, role: str, between: str) -> str:
    said = []
    for message in conversation.messages:
        if message.get("role") == role:
            content = message.get("content")
            if not isinstance(content, str):
                raise ValueError(f"the content of a message must be text to be embedded, not {type(content).__name__}.")
            said.append(content)
    return between.join(said)


def _shown(conversation: Conversation) -> str:
    return ", ".join(f"{m.get('role')}: {str(m.get('content'))[:40]!r}" for m in conversation.messages) or "none"


@dataclasses.dataclass(frozen=True)
class CAFe:
    """alpha_lm x mean of -log p(token) + alpha_con x contrastive loss of the pairs of the batch.

    Args:
        alpha_lm, alpha_con: of the language-modelling and of the contrastive loss; 0 leaves out its forward passes too.
        contrast: "symmetric" or "one_way" InfoNCE (`losses.info_nce`), or "sigmoid" (`losses.sigmoid_loss`).
        temperature: of InfoNCE; for "sigmoid" its inverse is the scale (the released code has e^2.3 there, and never calls it).
        bias: of "sigmoid".
        learn_temperature: train the temperature (and the bias) from these values; published runs hold them.
        pairs: rows are pairs of any kind: what the user says and what the assistant says.
        negatives: rows have one more text, in the field `negative`, that is no query's target.
        pooling, token_id: see `embed`.
        heads: a linear layer with bias on the state, one for queries and one for targets, that start as the identity.
        marks: which tokens of the dialogue are predicted: "published" or "answers" (see `data.Renderer`).
        chunk: most rows encoded at once, over all devices: the contrastive batch is then `batch_size` in the memory of `chunk`
            (`losses.in_chunks`). None: all at once.
        gather: over devices, "exact", or "official": the gradient of the contrastive loss is 1 / W of it, as in released runs.
        embedding_length: tokens of the rows that are embedded; None: the data's `sequence_length`.
    """

    alpha_lm: float = 1.0
    alpha_con: float = 1.0
    contrast: str = "symmetric"
    temperature: float = 0.05
    bias: float = -10.0
    learn_temperature: bool = False
    pairs: bool = False
    negatives: bool = False
    pooling: str = "last"
    token_id: int | None = None
    heads: bool = False
    marks: str = "published"
    chunk: int | None = None
    gather: str = "exact"
    embedding_length: int | None = None

    def __post_init__(self) -> None:
        tree.require_one_of("contrast", self.contrast, CONTRASTS)
        tree.require_one_of("gather", self.gather, GATHERS)
        _check_pooling(self.pooling, self.token_id)
        if self.alpha_lm < 0 or self.alpha_con < 0 or not self.alpha_lm + self.alpha_con:
            raise ValueError(
                f"alpha_lm={self.alpha_lm} and alpha_con={self.alpha_con} must not be negative, nor both 0."
            )
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive.")
        if self.negatives and self.contrast == "sigmoid":
            raise ValueError("negatives=True is for InfoNCE; the sigmoid loss has no columns to add.")
        if self.learn_temperature and self.temperature * LARGEST_SCALE < 1:
            raise ValueError(
                f"temperature={self.temperature} with learn_temperature=True: a learned one is held above {1 / LARGEST_SCALE}; "
                "start from there, or leave it fixed."
            )
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk={self.chunk} must be at least 1 row, or None.")
        if self.embedding_length is not None and self.embedding_length < 2:
            raise ValueError(f"embedding_length={self.embedding_length} must be at least 2 tokens, or None.")

    system: ClassVar[str] = SYSTEM
    """What the system says where a dialogue does not tell."""

    @property
    def whole_batches(self) -> bool:
        """Whether a batch cannot be cut into parts whose losses add up."""
        return self.alpha_con > 0

    @property
    def least_rows(self) -> int:
        """The smallest batch: in InfoNCE a pair alone has nothing to be told from."""
        return 2 if self.alpha_con and self.contrast != "sigmoid" and not self.negatives else 1

    def views(self) -> dict[str, View]:
        """The readings of a row that this objective takes."""
        found = {"generation": View(generation_view, marks=self.marks)} if self.alpha_lm else {}
        if self.alpha_con:
            found |= self.embeddings()
        if self.alpha_con and self.negatives:
            make = functools.partial(negative_view, asked="" if self.pairs else OF_TEXT)
            found["negative"] = View(make, embeds=True, pictures=False, length=self.embedding_length)
        return found

    def embeddings(self) -> dict[str, View]:
        """The readings that are embedded: "query" and "target"."""
        embedded = functools.partial(View, embeds=True, length=self.embedding_length)
        if self.pairs:
            sides = {"query": "user", "target": "assistant"}
            return {name: embedded(functools.partial(pair_view, role=role)) for name, role in sides.items()}
        return {"query": embedded(image_view), "target": embedded(text_view, pictures=False)}

    def init(self, width: int) -> Tree:
        """Parameters of the objective's own, for a model of that width; empty where it has none."""
        own: dict[str, Any] = {}
        if self.learn_temperature:
            own["log_scale"] = jnp.float32(-math.log(self.temperature))
            if self.contrast == "sigmoid":
                own["bias"] = jnp.float32(self.bias)
        if self.heads:
            own["heads"] = {name: {"matrix": jnp.eye(width), "bias": jnp.zeros(width)} for name in ("query", "target")}
        return own

    def embed(
        self, module: Any, params: Tree, batch: Mapping[str, Any], name: str, key: Any = None
    ) -> Float[Array, "batch width"]:
        """The embeddings of one view's batch (`tokens`, `segment_ids`, and pictures), through the heads where there are any."""
        return self._encode(module, params, batch, name, key)[0]

    def _encode(self, module: Any, params: Tree, batch: Mapping[str, Any], name: str, key: Any) -> tuple[Array, Array]:
        tokens, mask = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segment_ids"]) > 0
        hidden, aux = hidden_states(module, params, tokens, mask, key=key, **pictures(batch))
        state = pool(hidden, tokens, mask, pooling=self.pooling, token_id=self.token_id)
        if self.heads:
            head = params["objective"]["heads"]["query" if name == "query" else "target"]
            state = state.astype(jnp.float32) @ head["matrix"] + head["bias"]
        return unit(state), aux

    def loss_fn(self, module: Any) -> Any:
        """`loss_fn(params, batch, key) -> (Mean, metrics)`; the batch has the arrays of `views`.

        Metrics: `loss` (what is minimised, without auxiliary losses), `language_loss` (nats a target token),
        `contrastive_loss`; while training `auxiliary_loss`; in evaluation `recall`, the share of queries whose own target is the
        nearest of the batch's targets and negatives.
        """
        mesh = getattr(module, "mesh", None)

        def forward(params: Tree, rows: Mapping[str, Any]) -> dict[str, Array]:
            """What the rows give, one entry each."""
            views, keys = tree.unflatten({k: v for k, v in rows.items() if k != "key"}), rows.get("key")
            count = len(jax.tree.leaves(views)[0])
            found: dict[str, Array] = {}
            aux = jnp.float32(0)
            for number, (name, batch) in enumerate(sorted(views.items())):
                key = None if keys is None else jax.random.fold_in(keys[0], number)
                if name == "generation":
                    mask = batch["segment_ids"] > 0
                    told = {"segment_ids": batch["segment_ids"], "positions": batch["positions"], **pictures(batch)}
                    logps, more = target_logps(
                        module, params, batch["tokens"], batch["target_mask"], mask, key=key, **told
                    )
                    found["nll"], found["targets"] = -logps.sum(axis=1), batch["target_mask"].sum(axis=1)
                else:
                    found[name], more = self._encode(module, params, batch, name, key)
                aux = aux + more / len(views)
            return found | {"auxiliary": jnp.broadcast_to(aux, (count,))}

        def loss_fn(params: Tree, batch: Mapping[str, Any], key: Any) -> tuple[Mean, dict[str, Mean]]:
            count = len(next(iter(batch.values())))
            rows = dict(batch) if key is None else dict(batch) | {"key": jax.random.split(key, count)}
            function = functools.partial(forward, params)
            found = function(rows) if self.chunk is None else losses.in_chunks(function, rows, self.chunk)
            metrics = {}
            weight, value = jnp.float32(count), jnp.float32(0)
            if self.alpha_lm:
                nll = Mean(found["nll"].sum(), found["targets"].sum().astype(jnp.float32))
                metrics["language_loss"] = nll
                value, weight = self.alpha_lm * nll.value(), nll.weight
            if self.alpha_con and key is not None:
                contrastive = self._contrast(params, found, mesh)
                metrics["contrastive_loss"] = Mean(contrastive * count, jnp.float32(count))
                value = value + self.alpha_con * contrastive
            elif self.alpha_con:
                real = (jnp.asarray(batch["query/segment_ids"]) > 0).any(axis=1)
                metrics |= self._evaluated(params, found, real)
                value = value + self.alpha_con * metrics["contrastive_loss"].value()
                weight = weight if self.alpha_lm else metrics["contrastive_loss"].weight
            told = Mean(value * weight, weight)
            if key is None:
                return told, metrics | {"loss": told}
            auxiliary = found["auxiliary"].mean()
            total = Mean((value + auxiliary) * weight, weight)
            return total, metrics | {"loss": told, "auxiliary_loss": Mean(auxiliary * weight, weight)}

        return loss_fn

    def _settings(self, params: Tree) -> tuple[Any, Any]:
        """(temperature, bias): numbers, or arrays where they are learned."""
        if not self.learn_temperature:
            return self.temperature, self.bias
        own = params["objective"]
        return jnp.exp(-_held(own["log_scale"])), own.get("bias", self.bias)

    def _contrast(self, params: Tree, found: Mapping[str, Array], mesh: Any) -> Float[Array, ""]:
        """The contrastive loss of the whole batch, each device with its rows."""
        temperature, bias = self._settings(params)
        names = [name for name in ("query", "target", "negative") if name in found]

        def loss(embeddings: Any, temperature: Any, bias: Any, axes: Any = None) -> Array:
            query, target, *more = embeddings
            if axes is not None and self.gather == "official":
                query, target, *more = (losses.gather_without_gradient(x, axes) for x in embeddings)
                return jax.lax.pmean(loss((query, target, *more), temperature, bias), axes)
            if self.contrast == "sigmoid":
                return losses.sigmoid_loss(query, target, scale=1 / temperature, bias=bias, axis_name=axes)
            told: Any = dict(symmetric=self.contrast == "symmetric", negatives=more[0] if more else None)
            return losses.info_nce(query, target, temperature=temperature, axis_name=axes, **told)

        given = [found[name] for name in names]
        spec = P(None) if mesh is None else rows_spec(given[0].shape, mesh)
        axes = spec[0] if isinstance(spec[0], tuple) else () if spec[0] is None else (spec[0],)
        if all(mesh.shape[axis] == 1 for axis in axes):
            return loss(given, temperature, bias)
        over = jax.shard_map(
            functools.partial(loss, axes=axes),
            mesh=mesh, in_specs=([spec] * len(given), P(), P()), out_specs=P(),
        )  # fmt: skip
        return over(given, jnp.asarray(temperature, jnp.float32), jnp.asarray(bias, jnp.float32))

    def _evaluated(self, params: Tree, found: Mapping[str, Array], real: Bool[Array, "batch"]) -> dict[str, Mean]:
        """The contrastive loss of a batch whose last rows may be filling, and how often the own target is the nearest.

        Negatives are there to be mistaken for it, as in training.
        """
        temperature, bias = self._settings(params)
        product = lambda x, y: jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
        cosines = product(found["query"], found["target"])
        own, mine = jnp.diagonal(cosines), jnp.eye(len(cosines), dtype=bool)
        wrong, back = (jnp.where(real & ~mine, x, -jnp.inf) for x in (cosines, cosines.T))
        if "negative" in found:
            more = jnp.where(real, product(found["query"], found["negative"]), -jnp.inf)
            wrong = jnp.concatenate([wrong, more], axis=1)
        if self.contrast == "sigmoid":
            logits = cosines / temperature + bias
            each = jnp.where(real, jax.nn.softplus(jnp.where(mine, -logits, logits)), 0.0).sum(axis=1)
        else:
            # -log softmax at the own one is log(1 + sum of exp(those of the wrong ones - its own)).
            nce = lambda x: jax.nn.softplus(jax.nn.logsumexp((x - own[:, None]) / temperature, axis=1))
            each = nce(wrong) if self.contrast == "one_way" else (nce(wrong) + nce(back)) / 2
        nearest = (own > wrong.max(axis=1)).astype(jnp.float32)
        return {"contrastive_loss": Mean.of(each, real), "recall": Mean.of(nearest, real)}


@jax.custom_vjp
def _held(log_scale: Float[Array, ""]) -> Float[Array, ""]:
    """The logarithm of a learned scale, at most `LARGEST_SCALE`'s; beyond that a gradient reaches it only to bring it back."""
    return jnp.minimum(log_scale, math.log(LARGEST_SCALE))


_held.defvjp(
    lambda log_scale: (_held(log_scale), log_scale > math.log(LARGEST_SCALE)),
    lambda beyond, g: (jnp.where(beyond & (g < 0), 0.0, g),),
)
