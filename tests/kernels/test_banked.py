"""A linear map of its own for each row, against numpy row by row; the TPU kernel interpreted, simulated and compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmethods.kernels.banked import banked_linear, pallas_tpu
from jaxmethods.launch import cost
from tests.compiler import TOPOLOGIES, needs_compiler, report

ROWS = np.array([2, 2, -1, 0, 4], np.int32)
run = jax.jit(banked_linear, static_argnames=("transposed", "implementation"))


def inputs(time, d_in, d_out, dtype=jnp.float32, transposed=False):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(5, time, d_in)), dtype)
    return x, jnp.asarray(rng.normal(size=(5, d_out, d_in) if transposed else (5, d_in, d_out)), jnp.float32)


def by_hand(x, bank, transposed=False, dtype=jnp.float32):
    bank = np.float64(bank.astype(dtype))
    bank = bank.swapaxes(1, 2) if transposed else bank
    return np.stack(
        [0 * x0 @ bank[0] if row < 0 else x0 @ bank[row] for x0, row in zip(np.float64(x), ROWS, strict=True)]
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("time", "d_in", "d_out", "dtype"), [(1, 37, 300, jnp.float32), (3, 21, 256, jnp.bfloat16)])
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu"])
def test_each_row_by_its_own_entry(implementation, time, d_in, d_out, dtype, transposed):
    x, bank = inputs(time, d_in, d_out, dtype, transposed)
    y = run(x, bank, ROWS, transposed=transposed, implementation=implementation)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2.0**-7
    np.testing.assert_allclose(np.float64(y), by_hand(x, bank, transposed, dtype), rtol=tolerance, atol=tolerance)
    assert not y[2].any()


def test_an_entry_in_several_blocks(monkeypatch):
    """As where an entry does not fit on the chip whole: 384 channels in three blocks of whole lanes."""
    x, bank = inputs(2, 64, 384)
    whole = pallas_tpu.vmem(2, 64, 384, x.dtype, bank.dtype)
    monkeypatch.setattr(pallas_tpu, "VMEM", whole // 2)
    assert pallas_tpu.tile(2, 64, 384, x.dtype, bank.dtype) == 128
    y = pallas_tpu.banked_linear(x, bank, jnp.asarray(ROWS), transposed=False, interpret=True)
    np.testing.assert_allclose(y, by_hand(x, bank), rtol=1e-5, atol=1e-5)


def test_the_simulated_tpu_finds_no_race_and_nothing_uninitialised(capfd):
    x, bank = inputs(1, 24, 128)
    simulated = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    y = pallas_tpu.banked_linear(x, bank, jnp.asarray(ROWS), transposed=False, interpret=simulated)
    np.testing.assert_allclose(y, by_hand(x, bank), rtol=1e-5, atol=1e-5)
    assert "race" not in "".join(capfd.readouterr()).lower()


def test_gradients_reach_the_entries_that_rows_use():
    x, bank = inputs(2, 6, 8)
    loss = lambda x, bank: (run(x, bank, ROWS, implementation="pallas_tpu") ** 2).sum()
    d_x, d_bank = jax.grad(loss, (0, 1))(x, bank)
    y = by_hand(x, bank)
    want = np.zeros(bank.shape)
    for n, row in enumerate(ROWS):
        if row >= 0:
            want[row] += 2 * np.float64(x[n]).T @ y[n]
            np.testing.assert_allclose(d_x[n], 2 * y[n] @ np.float64(bank[row]).T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_bank, want, rtol=1e-4, atol=1e-4)
    assert not d_x[2].any() and not d_bank[1].any() and not d_bank[3].any()


def test_what_does_not_fit_says_so():
    x, bank = inputs(1, 6, 8)
    with pytest.raises(ValueError, match=r"x has width 6 and the bank \(5, 6, 8\) \(transposed=True\) takes 8"):
        banked_linear(x, bank, ROWS, transposed=True)
    with pytest.raises(ValueError, match="implementation='fast' is unknown"):
        banked_linear(x, bank, ROWS, implementation="fast")
    with pytest.raises(ValueError, match=r"float16\[1, 6\] to 8 does not: use 'xla'"):
        banked_linear(x.astype(jnp.float16), bank, ROWS, implementation="pallas_tpu")


def test_bytes_by_hand():
    """Rows 2, 2, -1 (entry 0), 0, 4 fetch three entries, not five."""
    entries = 3 * 37 * 300 * 4
    x_and_y = 2 * 5 * 1 * (37 + 300)
    assert pallas_tpu.hbm_bytes(ROWS, 1, 37, 300, 300, jnp.bfloat16, jnp.float32) == entries + x_and_y + 4 * 5
    # The ids are not known beforehand: counted from the kernel, every row fetches its entry, in whole tiles.
    arrays = [((32, 1, 432), jnp.bfloat16), ((256, 432, 4096), jnp.float32), ((32,), jnp.int32)]
    kernel = functools.partial(banked_linear, implementation="pallas_tpu")
    counted = cost.count(kernel, *(jax.ShapeDtypeStruct(*a) for a in arrays)).kernel_bytes
    one_each = pallas_tpu.hbm_bytes(range(32), 1, 432, 4096, 4096, jnp.bfloat16, jnp.float32)
    assert one_each <= counted <= 1.001 * one_each


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", TOPOLOGIES)
@pytest.mark.parametrize(("d_in", "d_out", "transposed"), [(432, 4096, False), (4096, 16, True), (16, 4096, False)])
def test_the_tpu_compiler_takes_it_and_entries_are_read_once(topology, d_in, d_out, transposed):
    """32 rows decode with 256 adapters: S²FT's channels of a down projection, and LoRA's pair of rank 16."""
    shapes = [
        jax.ShapeDtypeStruct((32, 1, d_in), jnp.bfloat16),
        jax.ShapeDtypeStruct((256, d_out, d_in) if transposed else (256, d_in, d_out), jnp.float32),
        jax.ShapeDtypeStruct((32,), jnp.int32),
    ]
    form = functools.partial(banked_linear, transposed=transposed)
    kernel, xla = (report(topology, functools.partial(form, implementation=i), *shapes) for i in ("pallas_tpu", "xla"))
    assert 'custom_call_target="tpu_custom_call"' in kernel.text
    bank = 256 * d_in * d_out * 4
    assert bank <= kernel.traffic <= bank + 2e6  # the whole bank is counted as read; it is copied nowhere
    assert kernel.temporaries <= max(xla.temporaries, 1e6)
    moved = pallas_tpu.hbm_bytes(range(32), 1, d_in, d_out, d_out, jnp.bfloat16, jnp.float32)
    if not topology.startswith("v5e"):  # which has room on the chip for what XLA gathers here
        assert moved <= 0.4 * xla.traffic
