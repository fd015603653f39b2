"""A hidden Markov model with Gaussian-mixture emissions over the distances of steps, in log space (SAUP-HMMD, arXiv 2412.01033).

The states are how far an agent has gone astray: on its way, off it, lost. Initialised from states labelled by hand, or by k-means,
and refined by Baum-Welch; trajectories are [B, N, D] with a mask that is true at the first steps of each.

>>> data = observations(np.array([[0.1, 0.1, 0.9, 0.9]]), np.array([[0.0, 0.1, 0.8, 0.7]]))
>>> fitted = fit(from_kmeans(data, states=2), data).params
>>> posterior(fitted, data).gamma.argmax(-1).tolist()
[[0, 0, 1, 1]]
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp
from jaxtyping import Array, Bool, Float, Int

from jaxmethods.evals.saup.propagation import checked

Observations = Float[Array | np.ndarray, "batch steps dim"]
Mask = Bool[Array | np.ndarray, "masked real"]

STATES = 3
UNLABELLED = -1
_EMPTY = 1e-6
"""Steps: a component with fewer keeps the mean and variance that it had."""
_LEAST_VARIANCE = 1e-12


class CHMM(NamedTuple):
    """Parameters: S states, K Gaussians in each, D dimensions. Probabilities as logarithms; -inf for what cannot be."""

    log_initial: Float[Array, "states"]
    log_transition: Float[Array, "states states"]
    """[s, r]: log p(r at n + 1 | s at n)."""
    log_mixture: Float[Array, "states mixtures"]
    means: Float[Array, "states mixtures dim"]
    variances: Float[Array, "states mixtures dim"]


class Posterior(NamedTuple):
    """What all of a trajectory tells of its states."""

    gamma: Float[Array, "batch steps states"]
    """p(state at n | trajectory); 0 at padding."""
    xi: Float[Array, "batch transitions states states"]
    """[b, n, s, r]: p(s at n, r at n + 1 | trajectory); 0 where n + 1 is padding."""
    log_likelihood: Float[Array, "batch"]


class Fit(NamedTuple):
    """A fitted model."""

    params: CHMM
    log_likelihood: Float[Array, "iterations"]
    """Of all trajectories before each iteration; the last value again once it has converged."""
    objective: Float[Array, "iterations"]
    """The same with smoothing * (sum log initial + sum log transition), which Baum-Welch with smoothing never decreases."""
    iterations: Int[Array, ""]
    """How many changed the parameters."""


def observations(
    drift: Float[Array | np.ndarray, "batch steps"], gap: Float[Array | np.ndarray, "batch steps"], *, dim: int = 2
) -> Float[Array, "batch steps dim"]:
    """What the states emit: (D_a, D_o), as the paper's text has it, or with dim=1 their sum, as its algorithm does.

    Raises:
        ValueError: another `dim`.
    """
    if dim not in (1, 2):
        raise ValueError(f"{dim=} must be 1 (the sum of both distances) or 2 (both).")
    both = jnp.stack([jnp.asarray(drift), jnp.asarray(gap)], axis=-1)
    return both if dim == 2 else both.sum(axis=-1, keepdims=True)


# What is known of a trajectory's states


def posterior(params: CHMM, data: Observations, mask: Mask | None = None) -> Posterior:
    """Forward-backward over whole trajectories.

    Raises:
        ValueError: as `fit`.
    """
    return _posterior(params, jnp.asarray(data), _steps(data, mask))


def log_likelihood(params: CHMM, data: Observations, mask: Mask | None = None) -> Float[Array, "batch"]:
    """log p(trajectory), by the forward recursion."""
    return posterior(params, data, mask).log_likelihood


def filtered(params: CHMM, data: Observations, mask: Mask | None = None) -> Float[Array, "batch steps states"]:
    """p(state at n | steps up to n), for scores that are needed while the agent works; 0 at padding."""
    return _filtered(params, jnp.asarray(data), _steps(data, mask))


def viterbi(params: CHMM, data: Observations, mask: Mask | None = None) -> Int[Array, "batch steps"]:
    """The likeliest sequence of states; at padding the last one goes on."""
    return _likeliest(params, jnp.asarray(data), _steps(data, mask))


def state_distances(params: CHMM) -> Float[Array, "states"]:
    """The mean total distance in each state: the sum of the components of its mean. Weights of this mapping have SAUP-D's unit."""
    return (jnp.exp(params.log_mixture)[..., None] * params.means).sum(axis=(1, 2))


def sorted_states(params: CHMM) -> CHMM:
    """The same model with its states in the order of their mean total distance: state 0 is that of steps on their way."""
    order = jnp.argsort(state_distances(params))
    initial, transition, *emission = params
    return CHMM(initial[order], transition[order][:, order], *(part[order] for part in emission))


# Learning


def from_labels(
    data: Observations,
    labels: Int[Array | np.ndarray, "labelled places"],
    mask: Mask | None = None,
    *,
    states: int = STATES,
    mixtures: int = 1,
    smoothing: float = 1.0,
    variance_floor: float = 1e-4,
) -> CHMM:
    """The supervised start: counts of labelled states and transitions, with `smoothing` added, and moments of each state's steps.

    A state that no step has gets the moments of all steps. With several mixtures a state's steps are parted by k-means.

    Args:
        labels: [B, N], 0 to states - 1; -1 at steps that have none.
        variance_floor: as of `fit`.

    Raises:
        ValueError: labels of another shape or outside their range, or none at all; smoothing of 0 where a state never occurs; and
            as `fit`.
    """
    there, values = np.asarray(_steps(data, mask)), np.asarray(data)
    if np.shape(labels) != there.shape:
        raise ValueError(f"labels has shape {np.shape(labels)}; it must be {there.shape}, a state a step.")
    labels = np.where(there, np.asarray(labels), UNLABELLED)
    if (labels < UNLABELLED).any() or (labels >= states).any():
        raise ValueError(f"labels has {int(labels.max())}; states are 0 to {states - 1}, and -1 where there is none.")
    if not (labels >= 0).any():
        raise ValueError("labels has no labelled step; label some, or start with from_kmeans.")
    known, first = labels >= 0, labels[:, 0]
    follows = known[:, :-1] & known[:, 1:]
    initial = np.bincount(first[first >= 0], minlength=states) + smoothing
    moves = np.full((states, states), smoothing, float)
    np.add.at(moves, (labels[:, :-1][follows], labels[:, 1:][follows]), 1)
    if not (initial.sum() and (moves.sum(axis=1) > 0).all()):
        raise ValueError(
            f"{smoothing=}: no transition leaves state {int(moves.sum(axis=1).argmin())}; add some smoothing."
        )
    floor = np.asarray(_floor(jnp.asarray(values), jnp.asarray(there), variance_floor))
    parts = [
        _moments(values[labels == s] if (labels == s).any() else values[there], mixtures, floor) for s in range(states)
    ]
    shares, means, variances = (np.stack(part) for part in zip(*parts, strict=True))
    with np.errstate(divide="ignore"):
        logs = [np.log(initial / initial.sum()), np.log(moves / moves.sum(axis=1, keepdims=True)), np.log(shares)]
    return CHMM(*(jnp.asarray(part, values.dtype) for part in (*logs, means, variances)))


def from_kmeans(
    data: Observations,
    mask: Mask | None = None,
    *,
    states: int = STATES,
    mixtures: int = 1,
    smoothing: float = 1.0,
    variance_floor: float = 1e-4,
) -> CHMM:
    """The start without labels: k-means of all steps, the nearest cluster state 0. Nothing in it is random.

    Raises:
        ValueError: fewer different steps than states; and as `from_labels`.
    """
    there, values = np.asarray(_steps(data, mask)), np.asarray(data)
    distinct = len(np.unique(values[there], axis=0))
    if distinct < states:
        raise ValueError(
            f"there are {distinct} different steps for {states} states; give more trajectories, or fewer states."
        )
    labels = np.full(there.shape, UNLABELLED)
    labels[there] = _kmeans(values[there], states)
    return from_labels(
        data, labels, mask, states=states, mixtures=mixtures, smoothing=smoothing, variance_floor=variance_floor
    )  # fmt: skip


def fit(
    params: CHMM,
    data: Observations,
    mask: Mask | None = None,
    *,
    iterations: int = 50,
    tolerance: float = 1e-5,
    variance_floor: float = 1e-4,
    smoothing: float = 1.0,
) -> Fit:
    """Baum-Welch over all trajectories, until the gain is below `tolerance` of the objective, and states sorted by distance.

    A trajectory of one step tells of the start and of emissions, and nothing of transitions.

    Args:
        params: where it starts: `from_labels` or `from_kmeans`.
        data: [B, N, D]; float64 under `jax.enable_x64`.
        mask: [B, N], true at the steps of each trajectory, which stand first; all are when None.
        iterations: at most.
        variance_floor: the least variance, in that of all steps.
        smoothing: is added to the counts of starts and of transitions. With it the likelihood may fall a little, `objective` not.

    Raises:
        ValueError: a shape that does not fit, a trajectory without steps, padding before a step, a value that is not finite, or
            no iteration.
    """
    if iterations < 1:
        raise ValueError(f"{iterations=} must be at least 1.")
    there = _steps(data, mask)
    if np.shape(data)[-1] != params.means.shape[-1]:
        raise ValueError(f"data has {np.shape(data)[-1]} dimensions and the model {params.means.shape[-1]}.")
    return _fit(params, jnp.asarray(data), there, jnp.asarray(smoothing), iterations, tolerance, variance_floor)


@functools.partial(jax.jit, static_argnames="iterations")
def _fit(
    start: CHMM, data: Array, mask: Array, smoothing: Array, iterations: int, tolerance: Any, variance_floor: Any
) -> Fit:
    floor = _floor(data, mask, variance_floor)

    def iterate(carry: tuple[CHMM, Array, Array], _: None) -> tuple[tuple[CHMM, Array, Array], tuple[Array, ...]]:
        params, before, done = carry
        found = _posterior(params, data, mask)
        total = found.log_likelihood.sum()
        priors = jnp.concatenate([params.log_initial, params.log_transition.reshape(-1)])
        # 0 * -inf would be nan.
        reached = total + jnp.where(smoothing > 0, smoothing * jnp.where(smoothing > 0, priors, 0.0), 0.0).sum()
        done = done | (reached - before < tolerance * jnp.abs(reached))
        updated = _maximised(params, data, mask, found, smoothing, floor)
        params = jax.tree.map(lambda old, new: jnp.where(done, old, new), params, updated)
        return (params, reached, done), (total, reached, ~done)

    first = (start, jnp.asarray(-jnp.inf, data.dtype), jnp.asarray(False))
    (params, *_), (totals, objectives, moved) = jax.lax.scan(iterate, first, None, length=iterations)
    return Fit(sorted_states(params), totals, objectives, moved.sum())


def _maximised(params: CHMM, data: Array, mask: Array, found: Posterior, smoothing: Array, floor: Array) -> CHMM:
    """The M-step, by gamma, xi and the components' responsibilities."""
    initial = found.gamma[:, 0].sum(axis=0) + smoothing
    moves = found.xi.sum(axis=(0, 1)) + smoothing
    leaves = moves.sum(axis=1, keepdims=True)
    log_transition = jnp.where(leaves > 0, _log(moves / jnp.where(leaves > 0, leaves, 1.0)), params.log_transition)

    by_state, by_component = _emissions(params, data)
    responsible = found.gamma[..., None] * jnp.exp(by_component - by_state[..., None])
    responsible = jnp.where(mask[..., None, None], responsible, 0.0)  # [B, N, S, K]
    weight = responsible.sum(axis=(0, 1))
    filled = (weight > _EMPTY)[..., None]
    share = lambda total: total / jnp.where(filled, weight[..., None], 1.0)
    values = jnp.where(mask[..., None], data, 0.0)
    means = jnp.where(filled, share(jnp.einsum("bnsk,bnd->skd", responsible, values)), params.means)
    off = jnp.square(values[:, :, None, None] - means)
    spread = jnp.maximum(share(jnp.einsum("bnsk,bnskd->skd", responsible, off)), floor)
    of_state = weight.sum(axis=1, keepdims=True)
    log_mixture = jnp.where(
        of_state > _EMPTY, _log(weight / jnp.where(of_state > _EMPTY, of_state, 1.0)), params.log_mixture
    )
    return CHMM(
        _log(initial / initial.sum()), log_transition, log_mixture, means, jnp.where(filled, spread, params.variances)
    )  # fmt: skip


# The recursions


@jax.jit
def _posterior(params: CHMM, data: Array, mask: Array) -> Posterior:
    emission, _ = _emissions(params, data)

    def of(emission: Array, mask: Array) -> tuple[Array, Array, Array]:
        alpha, beta = _forward(params, emission, mask), _backward(params, emission, mask)
        total = logsumexp(alpha[-1])
        gamma = jnp.where(mask[:, None], jnp.exp(alpha + beta - total), 0.0)
        pairs = alpha[:-1, :, None] + params.log_transition + (emission + beta)[1:, None, :] - total
        return gamma, jnp.where(mask[1:, None, None], jnp.exp(pairs), 0.0), total

    return Posterior(*jax.vmap(of)(emission, mask))


@jax.jit
def _filtered(params: CHMM, data: Array, mask: Array) -> Array:
    alpha = jax.vmap(functools.partial(_forward, params))(_emissions(params, data)[0], mask)
    return jnp.where(mask[..., None], jax.nn.softmax(alpha, axis=-1), 0.0)


@jax.jit
def _likeliest(params: CHMM, data: Array, mask: Array) -> Array:
    return jax.vmap(functools.partial(_viterbi, params))(_emissions(params, data)[0], mask)


def _forward(params: CHMM, emission: Array, mask: Array) -> Float[Array, "steps states"]:
    """log p(steps up to n, state at n); it stays as it is at padding."""

    def go_on(alpha: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        emitted, real = step
        after = emitted + logsumexp(alpha[:, None] + params.log_transition, axis=0)
        alpha = jnp.where(real, after, alpha)
        return alpha, alpha

    first = params.log_initial + emission[0]
    _, rest = jax.lax.scan(go_on, first, (emission[1:], mask[1:]))
    return jnp.concatenate([first[None], rest])


def _backward(params: CHMM, emission: Array, mask: Array) -> Float[Array, "steps states"]:
    """log p(steps after n | state at n)."""

    def go_back(beta: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        emitted, real = step
        before = logsumexp(params.log_transition + (emitted + beta)[None], axis=1)
        beta = jnp.where(real, before, beta)
        return beta, beta

    last = jnp.zeros_like(params.log_initial)
    _, rest = jax.lax.scan(go_back, last, (emission[1:], mask[1:]), reverse=True)
    return jnp.concatenate([rest, last[None]])


def _viterbi(params: CHMM, emission: Array, mask: Array) -> Int[Array, "steps"]:
    def go_on(best: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        emitted, real = step
        ways = best[:, None] + params.log_transition
        come_from = jnp.where(real, ways.argmax(axis=0), jnp.arange(len(best)))
        return jnp.where(real, emitted + ways.max(axis=0), best), come_from

    best, come_from = jax.lax.scan(go_on, params.log_initial + emission[0], (emission[1:], mask[1:]))
    trace = lambda state, come_from: (come_from[state], state)
    first, rest = jax.lax.scan(trace, best.argmax(), come_from, reverse=True)
    return jnp.concatenate([first[None], rest])


def _emissions(
    params: CHMM, data: Array
) -> tuple[Float[Array, "*batch states"], Float[Array, "*batch states mixtures"]]:
    """log b_s(o), and log (c_sk N(o; mu_sk, var_sk)) of each component."""
    off = jnp.square(data[..., None, None, :] - params.means) / params.variances
    normal = -0.5 * (off + jnp.log(2 * jnp.pi * params.variances)).sum(axis=-1)
    by_component = params.log_mixture + normal
    return logsumexp(by_component, axis=-1), by_component


def _log(values: Array) -> Array:
    """log, -inf at 0 and with no gradient there."""
    return jnp.where(values > 0, jnp.log(jnp.where(values > 0, values, 1.0)), -jnp.inf)


# Help


def _steps(data: Observations, mask: Mask | None) -> Array:
    """The mask, checked."""
    if np.ndim(data) != 3:
        raise ValueError(f"data has shape {np.shape(data)}; it must be [trajectories, steps, dimensions].")
    there = checked("data", data, mask)
    if not isinstance(there, jax.core.Tracer) and (np.diff(np.asarray(there).astype(int), axis=1) > 0).any():
        raise ValueError("mask is false before a step; padding must stand behind the steps of a trajectory.")
    return there


def _floor(data: Array, mask: Array, share: Any) -> Float[Array, "dim"]:
    weight = mask[..., None] / mask.sum()
    values = jnp.where(mask[..., None], data, 0.0)
    mean = (weight * values).sum(axis=(0, 1))
    variance = (weight * jnp.square(values - mean)).sum(axis=(0, 1))
    return jnp.maximum(share * variance, _LEAST_VARIANCE)


def _moments(values: np.ndarray, mixtures: int, floor: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(shares [K], means [K, D], variances [K, D]) of some steps; where they are too few to be parted, all components are alike."""
    part = np.zeros(len(values), int)
    if len(np.unique(values, axis=0)) >= mixtures:
        part = _kmeans(values, mixtures)
    groups = [values[part == k] if (part == k).any() else values for k in range(mixtures)]
    sizes = np.array([len(group) for group in groups], float)
    return (
        sizes / sizes.sum(),
        np.stack([group.mean(axis=0) for group in groups]),
        np.stack([np.maximum(group.var(axis=0), floor) for group in groups]),
    )


def _kmeans(values: np.ndarray, count: int) -> np.ndarray:
    """The cluster of each row, started from equal parts by total size, and numbered by it."""
    from scipy.cluster.vq import ClusterError, kmeans2

    order = np.argsort(values.sum(axis=1), kind="stable")
    part = np.empty(len(values), int)
    part[order] = np.arange(len(values)) * count // len(values)
    starts = np.stack([values[part == k].mean(axis=0) for k in range(count)])
    try:
        centres, part = kmeans2(values.astype(float), starts, iter=100, minit="matrix", missing="raise")
    except ClusterError:  # a cluster ran empty: the equal parts remain
        centres = starts
    return np.argsort(np.argsort(centres.sum(axis=1)))[part]
