"""JAX's kernel for TPUs behind `attention`: as the reference, on one device and on several, and through the TPU's compiler."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmethods import adapters, sharding
from jaxmethods.data import Data
from jaxmethods.kernels.attention import attention, splash
from jaxmethods.launch import Run, cost, targets
from jaxmethods.launch.assembly import assemble
from jaxmethods.models.attention import attention_on
from tests import tiny
from tests.compiler import needs_compiler
from tests.kernels.test_attention import inputs

PACKED = [[100, 60, 80, -16], [256]]
CASES = {
    "causal": {},
    "packed": {"segments": PACKED},
    "left padded": {"segments": [[-130, 126], [-256]]},
    "a window and a soft-cap": {"segments": PACKED, "window": 70, "softcap": 2.0},
}


def with_gradients(run, q, k, v):
    out, back = jax.vjp(run, q, k, v)
    return out, *back(jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))


def test_what_plan_counts_of_it():
    """Every block of the square: two products forward, and backward three for the queries and four for keys and values.

    A causal mask leaves (1 + 1 / n) / 2 of them to n blocks, which the count does not know.
    """
    tokens, heads, width = 2048, 4, 128
    q, k = (jax.ShapeDtypeStruct((1, tokens, n, width), jnp.bfloat16) for n in (heads, 2))
    at = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    options = {"causal": True, "softcap": None, "scale": 1.0}
    run = lambda q, k, v, at: splash.attention(q, k, v, at, at, at, at, None, **options)
    product = 2 * tokens**2 * heads * width
    assert cost.count(run, q, k, k, at).matmul_flops == 2 * product
    both = cost.count(lambda q, k, v, at: jax.vjp(lambda *x: run(*x, at), q, k, v)[1](q), q, k, k, at)
    assert both.matmul_flops == pytest.approx((2 + 3 + 4) * product, rel=1e-3)
    # Forward: in each head each of 4 blocks of queries meets 4 blocks of keys and values; queries and results once. What is
    # more: each query's segment and place, in a tile's 128 columns.
    forward = cost.count(run, q, k, k, at).kernel_bytes
    keys, queries = 4 * heads * tokens * width * 2 * 2, 2 * heads * tokens * width * 2
    assert keys + queries <= forward <= 1.5 * (keys + queries)
    assert not both.unknown_loops and not both.uncounted


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    options = dict(CASES[name])
    q, k, v, places = inputs(256, segments=options.pop("segments", None))
    reference = functools.partial(attention, **places, **options, implementation="reference")
    window, softcap = options.get("window"), options.get("softcap")
    names = ("q_positions", "kv_positions", "q_segment_ids", "kv_segment_ids")
    at = [jnp.asarray(places[name]) if name in places else None for name in names]

    def run(q, k, v):
        arrays = q, k, v, *at
        return splash.attention(*arrays, window, causal=True, softcap=softcap, scale=8**-0.5, interpret=True)

    for got, expected in zip(
        jax.jit(lambda *x: with_gradients(run, *x))(q, k, v), with_gradients(reference, q, k, v), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("implementation", ["xla", "splash"])
@pytest.mark.parametrize(
    "axes", [{"fsdp": 2, "sequence": 2, "tensor": 2}, {"sequence": 2, "tensor": 4}, {"tensor": 8}], ids=str
)
def test_several_devices_give_what_one_gives(axes, implementation, monkeypatch):
    """Also with more devices along `tensor` than key-value heads (2), and than heads (4)."""
    monkeypatch.setattr(splash, "kernel", functools.partial(splash.kernel, interpret=True))
    q, k, v, places = inputs(256, segments=PACKED)
    expected = with_gradients(functools.partial(attention, **places, implementation="reference"), q, k, v)
    mesh = sharding.make_mesh(axes)
    told = dict(window=None, softcap=None, scale=None, implementation=implementation)
    run = functools.partial(attention_on, mesh, **jax.tree.map(jnp.asarray, places), **told)
    got = jax.jit(lambda *x: with_gradients(run, *x))(q, k, v)
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"time": 130}, "multiple of 128 tokens, and these have 130"),
        ({"time": 128, "source": 256}, r"as many keys as queries \(256 and 128 here\)"),
        ({"time": 128, "causal": False}, "is causal"),
    ],
)
def test_what_it_does_not_serve_is_refused(changes, says):
    q, k, v, places = inputs(changes.pop("time"), changes.pop("source", None))
    with pytest.raises(ValueError, match=says):
        attention(q, k, v, **places, **changes, implementation="splash")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
def test_a_run_on_a_slice_takes_it(topology):
    """Forward and backward kernels stand in the step of a run whose rows are split over `sequence`."""
    module, params = tiny.decoder(hidden_size=256, head_dim=64, intermediate_size=256)
    run = Run(
        model="", data=Data(train="x.jsonl", sequence_length=512), workdir="", batch_size=4,
        adapters={"proj": adapters.LoRA(2)}, compute_dtype="bfloat16",
    )  # fmt: skip
    mesh = sharding.make_mesh({"fsdp": 2, "sequence": 2, "tensor": 2}, targets.devices_of(topology))
    made = assemble(run, module, jax.eval_shape(lambda: params), mesh)
    _, text = targets.compile_for(made.step.lower(made.state, made.frozen, made.batch()), "tpu")
    assert all(f"splash_mha_{part}" in text for part in ("fwd", "dq", "dkv"))
