"""S²FT by hand, against slices of the full gradient, and in its limits. Its laws as an adapter: test_attach.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters
from jaxmethods.adapters import S2FT, Call

D_IN, D_OUT = 12, 8


def case(adapter):
    """(x, kernel, leaves with a random delta), float32."""
    keys = jax.random.split(jax.random.key(1), 4)
    leaves = adapter.init(keys[0], D_IN, D_OUT)
    leaves["delta"] = jax.random.normal(keys[1], leaves["delta"].shape)
    return jax.random.normal(keys[2], (5, D_IN)), jax.random.normal(keys[3], (D_IN, D_OUT)), leaves


def output(adapter, leaves, x, kernel):
    return adapter.apply(leaves, Call(x, x @ kernel, kernel, None, None)).y


sides = pytest.mark.parametrize("side", ["in", "out"])


@sides
def test_by_hand_and_merged(side):
    adapter = S2FT(side, share=0.5, block_size=2)
    x, kernel, leaves = case(adapter)
    changed = np.array(kernel, np.float64)
    for n, channel in enumerate(np.asarray(leaves["indices"])):
        if side == "in":
            changed[channel] += np.asarray(leaves["delta"])[n]
        else:
            changed[:, channel] += np.asarray(leaves["delta"])[:, n]
    np.testing.assert_allclose(output(adapter, leaves, x, kernel), np.asarray(x) @ changed, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(adapter.merge(leaves, kernel), changed, rtol=1e-6, atol=1e-6)


@sides
def test_its_gradient_is_the_slice_of_the_full_one(side):
    adapter = S2FT(side, share=0.4)
    x, kernel, leaves = case(adapter)
    loss = lambda y: jnp.sum(jnp.sin(y))
    own = jax.grad(lambda delta: loss(output(adapter, {**leaves, "delta": delta}, x, kernel)))(leaves["delta"])
    full = jax.grad(lambda kernel: loss(x @ kernel))(adapter.merge(leaves, kernel))
    want = full[leaves["indices"]] if side == "in" else full[:, leaves["indices"]]
    np.testing.assert_allclose(own, want, rtol=1e-4, atol=1e-5)


@sides
def test_all_channels_are_full_fine_tuning_of_the_matrix(side):
    leaves = S2FT(side, share=1.0).init(jax.random.key(0), D_IN, D_OUT)
    np.testing.assert_array_equal(leaves["indices"], np.arange(D_IN if side == "in" else D_OUT))
    assert leaves["delta"].shape == (D_IN, D_OUT)


def test_whole_blocks_are_drawn_uniformly_by_the_key():
    adapter = S2FT(share=0.25, block_size=4)
    draw = lambda key: np.asarray(adapter.init(key, 32, 3)["indices"])
    np.testing.assert_array_equal(draw(jax.random.key(5)), draw(jax.random.key(5)))
    counts = np.zeros(8)
    for key in jax.random.split(jax.random.key(0), 400):
        blocks = draw(key).reshape(2, 4)
        np.testing.assert_array_equal(blocks, blocks[:, :1] // 4 * 4 + np.arange(4))
        assert blocks[0, 0] < blocks[1, 0]
        counts[blocks[:, 0] // 4] += 1
    assert np.abs(counts - 100).max() < 4 * (400 * 0.25 * 0.75) ** 0.5


def test_two_of_disjoint_channels_fuse_in_any_order_and_come_off():
    adapter = S2FT(share=0.25)
    _, kernel, a = case(adapter)
    b = {**a, "indices": jnp.asarray([i for i in range(D_IN) if i not in np.asarray(a["indices"])][:3], jnp.int32)}
    one = adapter.merge(b, adapter.merge(a, kernel))
    np.testing.assert_array_equal(one, adapter.merge(a, adapter.merge(b, kernel)))
    restored = one.at[a["indices"]].set(kernel[a["indices"]]).at[b["indices"]].set(kernel[b["indices"]])
    np.testing.assert_array_equal(restored, kernel)
    assert np.linalg.matrix_rank(np.asarray(adapter.merge(a, kernel) - kernel)) <= 3


def test_the_papers_counts():
    """LLaMA3-8B, down projections alone, 3% of 14336 channels: 430 in each of 32 layers (the code draws 13,762 of all)."""
    shapes = jax.eval_shape(lambda key: S2FT(share=0.03).init(key, 14336, 4096), jax.random.key(0))
    assert shapes["delta"].shape == (430, 4096)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"side": "inn"}, "did you mean 'in'"), ({"share": 0.0}, "share=0.0"), ({"block_size": 0}, "block_size=0")],
)
def test_wrong_settings(wrong, says):
    with pytest.raises(ValueError, match=says):
        S2FT(**wrong)


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="block_size=5 does not divide the layer's 12 channels"):
        adapters.S2FT(block_size=5).init(jax.random.key(0), D_IN, D_OUT)
