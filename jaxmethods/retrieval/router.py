"""Which domain a query is of, and search in that domain's base alone (MMed-RAG, https://arxiv.org/abs/2410.13085, section 3.2).

Both ways to choose are one linear layer: trained on labelled features, or the prompts of each domain compared with the query's
features as CLIP does. The authors fine-tune BiomedCLIP; their code is not released.

>>> router = zero_shot([jnp.eye(3)[:1], jnp.eye(3)[1:]])  # a prompt of domain 0, two of domain 1
>>> router(jnp.array([[5.0, 0.0, 0.0], [0.0, 1.0, 1.0]])).domain.tolist()
[0, 1]
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from jaxmethods.models.dual import unit
from jaxmethods.retrieval import heads, search
from jaxmethods.retrieval.retriever import Retriever
from jaxmethods.tree import Tree


class Route(NamedTuple):
    """The domain of each query, int32, and how probable each domain is, float32."""

    domain: Int[Array, "queries"]
    probabilities: Float[Array, "queries domains"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["cosine"])
@dataclasses.dataclass(frozen=True)
class Router:
    """softmax(features @ kernel + bias): a pytree of float32 arrays.

    params: {"last": {"kernel" [F, D], "bias" [D]}}.
    cosine: features are brought to unit norm first.
    """

    params: Tree
    cosine: bool = False

    def __call__(self, features: Float[Array | np.ndarray, "queries d_in"]) -> Route:
        """The domain of each query.

        Raises:
            ValueError: features of another width.
        """
        reads = len(self.params["last"]["kernel"])
        if features.shape[1] != reads:
            raise ValueError(f"features have shape {tuple(features.shape)}; this router reads [N, {reads}].")
        return _routed(self, jnp.asarray(features))

    def save(self, path: Any) -> None:
        """Writes one safetensors file."""
        heads.write(path, self.params | {"cosine": np.float32(self.cosine)}, "router")

    @classmethod
    def load(cls, path: Any) -> Router:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: a file that is no router.
        """
        read = heads.read(path, "router", (frozenset({"last/kernel", "last/bias", "cosine"}),))
        return cls({"last": read["last"]}, bool(read["cosine"]))


@jax.jit
def _routed(router: Router, features: Array) -> Route:
    logits = heads.apply(router.params, unit(features) if router.cosine else features)
    return Route(jnp.argmax(logits, axis=1).astype(jnp.int32), jax.nn.softmax(logits))


def zero_shot(prompts: Sequence[Float[Array | np.ndarray, "_ d_in"]], *, temperature: float = 0.01) -> Router:
    """A router of text prompts: logits are cosines with each domain's direction / temperature, as CLIP's zero-shot classifier.

    A domain's direction is the mean of its prompts' embeddings, each of unit norm, brought to unit norm
    (https://arxiv.org/abs/2103.00020, section 3.1.4). Queries are embeddings in the same space.

    Args:
        prompts: of each domain, [its prompts, F], of any length.
        temperature: CLIP's own is 0.01.

    Raises:
        ValueError: no domain, a domain without prompts, or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be positive.")
    if not len(prompts) or not all(map(len, prompts)):
        raise ValueError(f"the domains have {[len(of) for of in prompts]} prompts; give at least one of each.")
    directions = unit(jnp.stack([unit(jnp.asarray(of)).mean(axis=0) for of in prompts]))
    return Router({"last": {"kernel": directions.T / temperature, "bias": jnp.zeros(len(prompts))}}, cosine=True)


def train_router(
    features: Float[Array | np.ndarray, "rows d_in"],
    domains: Int[Array | np.ndarray, "labels"],
    *,
    decay: float = 1e-3,
    steps: int = 100,
) -> Router:
    """Multinomial logistic regression by L-BFGS on all rows at once: convex, so there is no rate, start or order to choose.

    Minimises the mean of -log p(domain) + decay / 2 x ||kernel||^2, of features that are centred and scaled by their moments (which
    the kernel that comes back has in it).

    Args:
        domains: [N], 0 to D - 1, each of which occurs. With one domain every query is of it.
        decay: positive, so that probabilities stay below 1 where domains can be told apart.
        steps: of L-BFGS, each with a line search.

    Raises:
        ValueError: other numbers of rows and domains, a domain without rows, features that are not finite, decay <= 0.
    """
    if len(features) != len(domains) or not len(domains):
        raise ValueError(f"there are {len(features)} rows of features and {len(domains)} domains; give one for each.")
    if not decay > 0:
        raise ValueError(f"decay={decay} must be positive.")
    search.check_finite("features", features)
    found = np.unique(np.asarray(domains))
    if (missing := np.setdiff1d(np.arange(max(found[-1] + 1, 1)), found)).size or found[0] < 0:
        raise ValueError(
            f"domains go from {found[0]} to {found[-1]} without {missing[:1]}; number them from 0, each with rows."
        )
    params = _fitted(
        jnp.asarray(features, jnp.float32), jnp.asarray(domains, jnp.int32), decay, int(found[-1]) + 1, steps
    )
    return Router(params)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _fitted(features: Array, domains: Array, decay: Any, count: int, steps: int) -> Tree:
    mean, inverse = heads.moments(features)
    x = (features - mean) * inverse

    def value(params: Tree) -> Array:
        nats = optax.softmax_cross_entropy_with_integer_labels(heads.apply(params, x), domains).mean()
        return nats + decay / 2 * jnp.square(params["last"]["kernel"]).sum()

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(value)

    def step(carry: tuple[Tree, Any], _: None) -> tuple[tuple[Tree, Any], None]:
        params, state = carry
        now, grads = value_and_grad(params, state=state)
        updates, state = solver.update(grads, state, params, value=now, grad=grads, value_fn=value)
        return (optax.apply_updates(params, updates), state), None

    start = {"last": {"kernel": jnp.zeros((features.shape[1], count)), "bias": jnp.zeros(count)}}
    (params, _), _ = jax.lax.scan(step, (start, solver.init(start)), None, length=steps)
    return heads.fold(params, mean, inverse)


class Base(NamedTuple):
    """What can be found in one domain: its retriever, the embeddings of its reports, and the group of each."""

    retriever: Retriever
    reports: Float[Array | np.ndarray, "reports width"]
    """By the retriever's `embed_targets`."""
    groups: Int[Array | np.ndarray, "reports"] | None = None
    """A query never gets a report of its own group; groups are compared within a base only."""


class Found(NamedTuple):
    """The reports of each query, best first: -inf and row -1 where its base has no more that are allowed."""

    domain: Int[np.ndarray, "queries"]
    scores: Float[np.ndarray, "queries k"]
    rows: Int[np.ndarray, "queries k"]
    """In the reports of the base of the query's domain."""


def find(
    features: Float[Array | np.ndarray, "queries d_in"],
    domain: Int[Array | np.ndarray, "choices"],
    bases: Sequence[Base],
    k: int,
    *,
    groups: Int[Array | np.ndarray, "grouped"] | None = None,
    mesh: Mesh | None = None,
) -> Found:
    """The k nearest reports of each query, in the base of its domain and by that domain's retriever. With one base, plain RAG.

    Args:
        features: [Q, F], what the retrievers' query heads read.
        domain: [Q], which base each query is searched in: `router(features).domain`.
        bases: one a domain. A base with fewer than k reports gives what it has.
        groups: [Q], of the queries: forbids the reports of the same group, where the base has groups.
        mesh: splits each base over all of its devices.

    Raises:
        ValueError: a domain without a base, k < 1, other numbers of rows; groups of queries where no base has any.
    """
    chosen = np.asarray(domain)
    if len(chosen) != len(features) or (groups is not None and len(groups) != len(features)):
        told = "" if groups is None else f" and {len(groups)} groups"
        raise ValueError(f"there are {len(features)} queries, {len(chosen)} domains{told}; give one for each query.")
    if len(chosen) and not 0 <= chosen.min() <= chosen.max() < len(bases):
        raise ValueError(
            f"domains go from {chosen.min()} to {chosen.max()} and there are {len(bases)} bases; give one a domain."
        )
    if k < 1:
        raise ValueError(f"{k=} must be at least 1.")
    if groups is not None and all(base.groups is None for base in bases):
        raise ValueError("groups of queries are given and no base has groups; give the groups of the reports as well.")
    scores, rows = np.full((len(chosen), k), -np.inf, np.float32), np.full((len(chosen), k), -1, np.int32)
    for number, (retriever, reports, of_reports) in enumerate(bases):
        asked = np.flatnonzero(chosen == number)
        if not len(asked) or not len(reports):
            continue
        # As many as fill up blocks of the search, so that few shapes are compiled; the last ones are searched again.
        filled = np.pad(asked, (0, -len(asked) % search.LEAST), mode="edge")
        forbidden = None if groups is None or of_reports is None else (np.asarray(groups)[filled], of_reports)
        queries = retriever.embed_queries(jnp.asarray(features)[filled])
        most = min(k, len(reports))
        of_base = search.top_k(queries, reports, most, forbidden=forbidden, mesh=mesh)
        for into, found in zip((scores, rows), of_base, strict=True):
            into[asked, :most] = np.asarray(found)[: len(asked)]
    return Found(chosen, scores, rows)
