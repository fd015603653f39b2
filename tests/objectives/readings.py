"""What the tests of CAFe share: batches of its views, and its losses in numpy."""

import jax
import numpy as np

ROWS, LENGTH, IMAGE = 8, 12, 60
ATOL = 1e-5
"""float32 sums in another order; losses are of order 1 and gradients of order 0.1."""


def readings(*names: str, rows: int = ROWS, seed: int = 0) -> dict:
    """Views of random text of unequal lengths, padded on the right, as the data room lays them out."""
    rng, batch = np.random.default_rng(seed), {}
    for name in names:
        real = np.arange(LENGTH) < rng.integers(7, LENGTH + 1, (rows, 1))
        batch[f"{name}/tokens"] = np.where(real, rng.integers(3, IMAGE, (rows, LENGTH)), 0).astype(np.int32)
        batch[f"{name}/segment_ids"] = real.astype(np.int32)
        batch[f"{name}/positions"] = np.where(real, np.arange(LENGTH), 0).astype(np.int32)
        batch[f"{name}/target_mask"] = real & (rng.random((rows, LENGTH)) < 0.5) & (np.arange(LENGTH) > 0)
    return batch


THREE = ("generation", "query", "target")


def with_pictures(batch: dict, *names: str, seed: int = 1) -> dict:
    """Some of the views with a picture at tokens 1 to 4."""
    rng, batch = np.random.default_rng(seed), dict(batch)
    pixels = rng.integers(0, 256, (ROWS, 1, 8, 8, 3)).astype(np.uint8)
    for name in names:
        batch[f"{name}/tokens"] = batch[f"{name}/tokens"].copy()
        batch[f"{name}/tokens"][:, 1:5] = IMAGE
        batch[f"{name}/target_mask"] = batch[f"{name}/target_mask"] & (batch[f"{name}/tokens"] != IMAGE)
        batch[f"{name}/pixels"] = pixels
        batch[f"{name}/places"] = np.full((ROWS, LENGTH, 1), -1, np.int32)
        batch[f"{name}/places"][:, 1:5, 0] = np.arange(4)
    return batch


def close(found, expected, atol=ATOL):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4), found, expected)


def log_softmax(x):
    return x - x.max(1, keepdims=True) - np.log(np.exp(x - x.max(1, keepdims=True)).sum(1, keepdims=True))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def contrast_by_hand(objective, embedded, own=None):
    """Of embeddings of unit length."""
    own = own or {}
    scale = min(np.exp(own.get("log_scale", -np.log(objective.temperature))), 100.0)
    query, target = embedded["query"], embedded["target"]
    logits = scale * query @ target.T
    if objective.contrast == "sigmoid":
        signs = 2 * np.eye(len(query)) - 1
        return np.log1p(np.exp(-signs * (logits + own.get("bias", objective.bias)))).sum() / len(query)
    forth = logits
    if "negative" in embedded:
        forth = np.concatenate([forth, scale * query @ embedded["negative"].T], axis=1)
    losses = [-np.diagonal(log_softmax(x)).mean() for x in (forth, logits.T)]
    return losses[0] if objective.contrast == "one_way" else sum(losses) / 2
