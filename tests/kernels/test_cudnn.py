"""cuDNN's kernels behind `attention`: what is asked of them everywhere, through XLA; themselves where there is a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods.kernels.attention import attention, cudnn
from tests.kernels.test_attention import inputs

on_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="takes one of NVIDIA's GPUs: JAX_PLATFORMS=cuda,cpu")
CASES = {
    "whole rows": {},
    "padding behind": {"segments": [[40], [25]]},
    "an empty row": {"segments": [[40], [-40]]},
    "a window": {"segments": [[40], [25]], "window": 7},
    "both ways": {"segments": [[40], [25]], "causal": False},
}


def with_gradients(run, *arrays):
    out, back = jax.vjp(run, *arrays)
    return out, *back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))


def compared(name, dtype, library, atol):
    options = dict(CASES[name])
    *qkv, places = inputs(40, segments=options.pop("segments", None), dim=16, dtype=dtype)
    window, causal = options.get("window"), options.get("causal", True)
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids")
    at = [jnp.asarray(places[name]) if name in places else None for name in names]
    run = lambda *qkv: cudnn.attention(*qkv, *at, window, causal=causal, softcap=None, scale=16**-0.5, library=library)
    reference = functools.partial(attention, **places, **options, implementation="reference")
    found = jax.jit(lambda *x: with_gradients(run, *x))(*qkv)
    exact = with_gradients(reference, *(x.astype(jnp.float32) for x in qkv))
    for got, expected in zip(found, exact, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(got.astype(jnp.float32), expected, atol=atol)


@pytest.mark.parametrize("name", CASES)
def test_what_is_asked_equals_the_reference(name):
    compared(name, jnp.float32, "xla", 2e-5)


@on_gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu_it_equals_the_reference(name):
    compared(name, jnp.bfloat16, "cudnn", 3e-2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "takes bfloat16 or float16.* here are float32"),
        ({"dtype": jnp.bfloat16, "dim": 12}, "a multiple of 8 up to 128 .*, 12 and None"),
        ({"dtype": jnp.bfloat16, "softcap": 5.0}, "and no softcap"),
        ({"dtype": jnp.bfloat16, "source": 12}, r"as many keys as queries \(12 and 8 here\)"),
        ({"dtype": jnp.bfloat16, "window": jnp.asarray(3)}, "a window known beforehand"),
    ],
)
def test_what_it_does_not_serve_is_refused(changes, says):
    options = {name: changes.pop(name) for name in ("softcap", "window") if name in changes}
    q, k, v, places = inputs(8, **changes)
    run = lambda window=None: attention(q, k, v, **places, **options | {"window": window}, implementation="cudnn")
    with pytest.raises(ValueError, match=says):
        jax.jit(run)(options["window"]) if "window" in options else run()
