"""What a decoder recomputes in the backward pass, and what its configuration refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.launch import cost
from jaxmethods.models import functional
from tests import tiny

TOKENS = np.arange(24, dtype=np.int32).reshape(2, 12)


def gradient(module):
    def loss(params):
        return functional.target_logps(module, params, TOKENS, jnp.ones(TOKENS.shape, bool))[0].sum()

    return jax.grad(loss)


def test_rematerialisation_changes_the_work_and_not_the_gradients():
    module, params = tiny.decoder("llama")
    plain = gradient(module)
    want = plain(params)
    products = {"none": cost.count(plain, params).matmul_flops}
    for remat in ("dots", "full"):
        again = gradient(module.clone(remat=remat))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), again(params), want)
        products[remat] = cost.count(again, params).matmul_flops
    assert products["dots"] == products["none"] < products["full"]  # "dots" keeps every product, attention's too


def test_an_odd_head_size_is_refused():
    module, _ = tiny.decoder("llama")
    with pytest.raises(ValueError, match="head_dim=7 must be even"):
        dataclasses.replace(module.config, head_dim=7)
