"""GradCache, the sigmoid loss and interleaved hard negatives restated in torch: the same values and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from jaxmethods.losses import cached_info_nce, info_nce, sigmoid_loss  # noqa: E402

ATOL = 1e-5  # float32; gradients are of order 0.1
RNG = np.random.default_rng(0)
N, D = 12, 5


def drawn(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def leaves(*arrays):
    return [torch.tensor(x, requires_grad=True) for x in arrays]


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def test_gradient_cache_parity():
    """The three steps of GradCache by hand, with dropout masks that belong to rows, chunks of 5, and the temperature learned."""
    queries, targets, masks = drawn(N, 6), drawn(N, 6), (RNG.random((2, N, 16)) < 0.5).astype(np.float32) * 2
    weights = {"in": drawn(6, 16), "out": drawn(16, D)}

    first, second, temperature = leaves(weights["in"], weights["out"], np.float32(0.2))
    encode = lambda x, mask: torch.tanh(torch.tensor(x) @ first) * torch.tensor(mask) @ second
    sides = ((queries, masks[0]), (targets, masks[1]))
    chunks = [slice(0, 5), slice(5, 10), slice(10, 12)]
    with torch.no_grad():
        cached = [torch.cat([encode(x[c], mask[c]) for c in chunks]) for x, mask in sides]
    q, t = (x.requires_grad_() for x in cached)
    logits = unit(q) @ unit(t).T / temperature
    cross_entropy = torch.nn.functional.cross_entropy
    value = (cross_entropy(logits, torch.arange(N)) + cross_entropy(logits.T, torch.arange(N))) / 2
    value.backward()
    for (x, mask), embeddings in zip(sides, (q, t), strict=True):
        for c in chunks:
            (encode(x[c], mask[c]) * embeddings.grad[c]).sum().backward()

    ours = lambda params, temperature: cached_info_nce(
        lambda p, rows: jnp.tanh(rows[0] @ p["in"]) * rows[1] @ p["out"],
        params, (queries, masks[0]), (targets, masks[1]), chunk=5, temperature=temperature,
    )  # fmt: skip
    found, (d_params, d_temperature) = jax.jit(jax.value_and_grad(ours, (0, 1)))(weights, jnp.float32(0.2))
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    for name, theirs in (("in", first), ("out", second)):
        assert theirs.grad.abs().max() > 0.05
        np.testing.assert_allclose(d_params[name], theirs.grad, atol=ATOL)
    np.testing.assert_allclose(d_temperature, temperature.grad, rtol=1e-5)


def test_sigmoid_loss_parity():
    given = drawn(N, D), drawn(N, D), np.float32(np.exp(2.3)), np.float32(-10.0)
    q, t, scale, bias = theirs = leaves(*given)
    sign = 2 * torch.eye(N) - 1
    value = -torch.nn.functional.logsigmoid(sign * (scale * unit(q) @ unit(t).T + bias)).sum(1).mean()
    value.backward()
    ours = lambda q, t, scale, bias: sigmoid_loss(q, t, scale=scale, bias=bias)
    found, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2, 3)))(*given)
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    for x, y in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(x, y.grad, atol=ATOL)


def test_interleaved_hard_negatives_parity():
    """As VLM2Vec and E5-V have them: each target, then its K negatives; labels i (1 + K); one direction."""
    more = 2
    given = drawn(N, D), drawn(N * (1 + more), D)
    q, t = theirs = leaves(*given)
    labels = torch.arange(N) * (1 + more)
    value = torch.nn.functional.cross_entropy(unit(q) @ unit(t).T / 0.05, labels)
    value.backward()

    def ours(q, t):
        groups = t.reshape(N, 1 + more, D)
        return info_nce(q, groups[:, 0], temperature=0.05, symmetric=False, negatives=groups[:, 1:])

    found, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*given)
    np.testing.assert_allclose(found, value.item(), rtol=1e-5)
    for x, y in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(x, y.grad, atol=ATOL)
