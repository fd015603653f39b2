"""Operations counted from jaxprs against counts by hand, laws, and XLA's own count where that one is sound."""

import functools
import itertools

import jax
import jax.extend.core.primitives
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jaxmethods.launch import cost


def arrays(*shapes, dtype=jnp.float32):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]


def flops(fn, *args, **kwargs):
    counted = cost.count(fn, *args, **kwargs)
    assert counted.flops == sum(counted.by_primitive.values())
    assert not counted.unknown_loops and not counted.uncounted
    return counted.flops


# Products.


@pytest.mark.parametrize(
    ("equation", "sizes"),
    [
        ("mk,kn->mn", {"m": 3, "k": 5, "n": 7}),
        ("bqhd,bkhd->bhqk", {"b": 2, "q": 3, "k": 4, "h": 5, "d": 6}),
        ("ij,ij->", {"i": 3, "j": 4}),
        ("i,j->ij", {"i": 3, "j": 4}),
    ],
)
def test_a_product_is_twice_the_sizes_of_its_axes(equation, sizes):
    operands = arrays(*(tuple(sizes[axis] for axis in term) for term in equation.split("->")[0].split(",")))
    counted = cost.count(functools.partial(jnp.einsum, equation), *operands)
    assert counted.matmul_flops == 2 * np.prod(list(sizes.values()))


def test_ragged_products_count_each_row_once_forwards_and_backwards():
    rows, experts, inner, outer = 16, 3, 8, 5
    x, w = arrays((rows, inner), (experts, inner, outer))
    groups = jax.ShapeDtypeStruct((experts,), jnp.int32)
    one = 2 * rows * inner * outer
    assert flops(jax.lax.ragged_dot, x, w, groups) == one

    def loss(x, w, groups):
        return (jax.lax.ragged_dot(x, w, groups) ** 2).sum()

    assert cost.count(jax.grad(loss, argnums=(0, 1)), x, w, groups).matmul_flops == 3 * one
    batched = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in (x, w, groups)]
    assert flops(jax.vmap(jax.lax.ragged_dot), *batched) == 2 * one


@pytest.mark.parametrize(
    ("stride", "padding", "lhs_dilation", "rhs_dilation", "groups"),
    [(1, (0, 0), 1, 1, 1), (2, (1, 2), 1, 1, 1), (1, (2, 2), 3, 1, 1), (1, (2, 1), 1, 2, 2), (3, (-1, 4), 2, 2, 1)],
)
def test_a_convolution_counts_the_taps_that_meet_an_input(stride, padding, lhs_dilation, rhs_dilation, groups):
    batch, size, width, channels, filters = 2, 9, 3, 4, 6
    axes = ("NWC", "WIO", "NWC")

    def fn(x, w):
        return jax.lax.conv_general_dilated(x, w, (stride,), (padding,), (lhs_dilation,), (rhs_dilation,), axes, groups)

    x, w = arrays((batch, size, channels), (width, channels // groups, filters))
    outputs = jax.eval_shape(fn, x, w).shape[1]
    real = {place * lhs_dilation for place in range(size)}
    pairs = itertools.product(range(outputs), range(width))
    taps = sum(out * stride - padding[0] + tap * rhs_dilation in real for out, tap in pairs)
    assert flops(fn, x, w) == 2 * batch * taps * filters * channels // groups


def test_the_gradients_of_a_strided_convolution_cost_as_much_as_it_does():
    def fn(x, w):
        return jax.lax.conv_general_dilated(x, w, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = arrays((2, 16, 16, 3), (4, 4, 3, 8))  # patches of a vision tower
    both = jax.grad(lambda x, w: (fn(x, w) ** 2).sum(), argnums=(0, 1))
    assert cost.count(both, x, w).matmul_flops == 3 * flops(fn, x, w) == 3 * 2 * (2 * 16) * (4 * 4 * 3) * 8


# Everything else that is arithmetic.


def test_elementwise_operations_count_outputs_and_reductions_count_inputs():
    x, y = arrays((4, 8), (8,))
    assert flops(lambda x, y: jnp.exp(x) * y, x, y) == 32 + 32
    assert flops(lambda x: x.astype(jnp.bfloat16), x) == 32
    assert flops(lambda x: x.sum(0), x) == 32
    assert flops(lambda x: jnp.argmax(x, 1), x) == 32
    assert flops(lambda x: jnp.sort(x, 1), x) == 32 * 3  # log2(8)
    assert flops(lambda x, y: x.at[jnp.array([1, 3])].add(y, indices_are_sorted=True, mode="clip"), x, y) >= 16
    assert flops(lambda x: jnp.swapaxes(x, 0, 1).reshape(-1)[3:9], x) == 0


def test_factorisations_count_their_leading_terms():
    n = 12
    (a,) = arrays((n, n))
    assert cost.count(jnp.linalg.cholesky, a).by_primitive["cholesky"] == n**3 / 3
    assert cost.count(jax.scipy.linalg.lu_factor, a).by_primitive["lu"] == 2 * n**3 / 3
    b = jax.ShapeDtypeStruct((n, 5), jnp.float32)
    solve = functools.partial(jax.scipy.linalg.solve_triangular, lower=True)
    assert cost.count(solve, a, b).by_primitive["triangular_solve"] == n * n * 5


def test_what_has_no_rule_is_named():
    counted = cost.count(lambda x: jnp.linalg.svd(x)[0] * 2, *arrays((3, 3)))
    assert counted.uncounted == ("svd",)
    assert counted.by_primitive == {"mul": 9.0}


def test_every_public_primitive_of_jax_has_a_rule_or_is_known_to_have_none():
    without = {
        "custom_lin", "eig", "eigh", "fft", "hessenberg", "householder_product", "qr", "schur", "select_and_scatter",
        "svd", "tridiagonal", "tridiagonal_solve",
    }  # fmt: skip
    handled = {"scan", "while", "cond", "custom_linear_solve"} | set(cost._CALLS) | set(cost._RULES)
    public = {value.name for name, value in vars(jax.extend.core.primitives).items() if name.endswith("_p")}
    assert public - handled == without & public


def test_results_that_nobody_uses_are_free():
    x, w = arrays((4, 8), (8, 16))
    assert flops(lambda x, w: (x @ w, x + 1)[1], x, w) == 32


# Control flow.


def layer(x, w):
    return jnp.tanh(x @ w)


def test_a_scan_counts_its_length():
    x, w = arrays((4, 8), (6, 8, 8))
    one = flops(layer, x, *arrays((8, 8)))

    def layers(x, w):
        return jax.lax.scan(lambda c, w: (layer(c, w), None), x, w)[0]

    assert flops(layers, x, w) == 6 * one
    assert flops(lambda x, w: jax.lax.scan(lambda c, _: (layers(c, w), None), x, length=3)[0], x, w) == 3 * 6 * one


@pytest.mark.parametrize("remat", [False, True])
def test_depth_adds_layers_of_equal_cost(remat):
    body = jax.checkpoint(layer) if remat else layer

    def loss(w, x):
        return (jax.lax.scan(lambda c, w: (body(c, w), None), x, w)[0] ** 2).sum()

    def at(depth):
        w, x = arrays((depth, 8, 8), (4, 8))
        return cost.count(jax.grad(loss), w, x)

    assert at(8).flops - at(4).flops == 4 * (at(5).flops - at(4).flops)
    products = 4 if remat else 3  # forward, (again,) and two gradients
    assert at(8).matmul_flops - at(4).matmul_flops == 4 * products * 2 * 4 * 8 * 8


TEN, TWO = np.int32(10), np.int32(2)


@pytest.mark.parametrize(
    ("trips", "fn"),
    [
        (5, lambda x: jax.lax.fori_loop(0, 5, lambda i, c: layer(c, c), x)),
        (7, lambda x: jax.lax.fori_loop(jnp.int32(2), jnp.int32(9), lambda i, c: layer(c, c), x)),
        (5, lambda x: jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda i, c: layer(c, c), x))(x, 5)),
        (
            4,
            lambda x: jax.lax.while_loop(
                lambda c: jnp.greater(10, c[1]), lambda c: (layer(c[0], c[0]), 3 + c[1]), (x, 0)
            )[0],
        ),
        (7, lambda x: jax.lax.while_loop(lambda c: c[1] >= 4, lambda c: (layer(c[0], c[0]), c[1] - 3), (x, 22))[0]),
        (6, lambda x: jax.lax.while_loop(lambda c: c[1] <= TEN, lambda c: (layer(c[0], c[0]), c[1] + TWO), (x, 0))[0]),
        (0, lambda x: jax.lax.while_loop(lambda c: c[1] < 0, lambda c: (layer(c[0], c[0]), c[1] + 1), (x, 0))[0]),
    ],
)
def test_a_loop_with_constant_bounds_counts_its_trips(trips, fn):
    (x,) = arrays((8, 8))
    counted = cost.count(fn, x)
    assert counted.matmul_flops == trips * 2 * 8**3
    assert not counted.unknown_loops


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, n: jax.lax.fori_loop(0, n, lambda i, c: layer(c, c), x),
        lambda x, n: jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: layer(c, c), x),
        lambda x, n: jax.lax.while_loop(lambda c: c[1] < 3, lambda c: (layer(c[0], c[0]), c[1] - 1), (x, 0))[0],
        lambda x, n: jax.lax.while_loop(lambda c: c[1] < 9, lambda c: (layer(c[0], c[0]), c[1] * 2), (x, 1))[0],
    ],
    ids=["bound from data", "test of data", "endless", "not a constant stride"],
)
def test_a_loop_of_unknown_length_counts_once_and_is_named(fn):
    def search(x, n):
        return fn(x, n)

    counted = cost.count(jax.jit(search), *arrays((8, 8)), jax.ShapeDtypeStruct((), jnp.int32))
    assert counted.matmul_flops == 2 * 8**3
    assert len(counted.unknown_loops) == 1 and "while" in counted.unknown_loops[0]


def test_the_place_of_an_unknown_loop_is_told():
    def search(x, n):
        return jax.lax.scan(lambda c, _: (jax.lax.fori_loop(0, n, lambda i, c: c * 2, c), None), x, length=3)[0]

    (loop,) = cost.count(
        lambda x, n: jax.jit(search)(x, n), *arrays((8,)), jax.ShapeDtypeStruct((), jnp.int32)
    ).unknown_loops
    assert loop.startswith("search/scan[3]/while: 10 operations a trip")


def test_a_branch_counts_as_the_costliest_one():
    x, w = arrays((4, 8), (8, 8))

    def fn(x, w, i):
        return jax.lax.switch(i, [lambda: x, lambda: layer(x, w), lambda: x + 1])

    counted = cost.count(fn, x, w, jax.ShapeDtypeStruct((), jnp.int32))
    assert counted.by_primitive["dot_general"] == 2 * 4 * 8 * 8
    assert "add" not in counted.by_primitive


def test_calls_are_transparent():
    custom = jax.custom_vjp(layer)
    custom.defvjp(lambda x, w: (layer(x, w), (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
    tangent = jax.custom_jvp(layer)
    tangent.defjvp(lambda primals, tangents: (layer(*primals), layer(*tangents)))
    x, w = arrays((4, 8), (8, 8))
    for wrapped in (
        jax.jit(layer),
        jax.checkpoint(layer),
        custom,
        tangent,
        jax.jit(jax.jit(layer)),
        jax.named_call(layer),
    ):
        assert flops(wrapped, x, w) == flops(layer, x, w)
    gradient = jax.grad(lambda x, w: custom(x, w).sum(), argnums=(0, 1))
    assert cost.count(gradient, x, w).matmul_flops == 2 * 2 * 4 * 8 * 8  # the rule's; nobody reads the forward pass


def test_arguments_may_be_trees_keywords_and_statics():
    (x,) = arrays((4, 8))
    assert flops(lambda tree, *, scale: tree["x"] * scale, {"x": x}, scale=x) == 32
    assert flops(jax.jit(lambda x, n: sum(x + i for i in range(n)), static_argnums=1), x, 3) == 32 * 3 + 32 * 3
    key = jax.eval_shape(lambda: jax.random.key(0))
    assert flops(lambda key, x: jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x, 0), key, x) > 32


# Many devices, and kernels.


def test_a_sharded_function_costs_what_all_devices_do():
    x, w = arrays((16, 8), (8, 8))
    whole = 2 * 16 * 8 * 8
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharded = functools.partial(jax.shard_map, mesh=mesh, out_specs=P("data", "tensor"))
    assert flops(sharded(jnp.matmul, in_specs=(P("data"), P(None, "tensor"))), x, w) == whole
    rows = functools.partial(jax.shard_map, jnp.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data"))
    assert flops(rows(axis_names={"data"}), x, w) == whole  # `tensor` is the compiler's: inner shapes are whole there
    assert flops(rows(), x, w) == 2 * whole  # both devices along `tensor` do the same work
    assert flops(jax.jit(jnp.matmul, in_shardings=jax.NamedSharding(mesh, P("data"))), x, w) == whole


@pytest.mark.parametrize("tile", [(16, 8, 8), (8, 16, 4), (32, 32, 32)])
def test_a_kernel_counts_its_grid(tile):
    m, n, k = (size // t for size, t in zip((32, 32, 32), tile, strict=True))

    def kernel(x, w, out):
        @pl.when(pl.program_id(2) == 0)
        def _():
            out[...] = jnp.zeros_like(out)

        out[...] += x[...] @ w[...]

    call = pl.pallas_call(
        kernel,
        grid=(m, n, k),
        in_specs=[
            pl.BlockSpec((tile[0], tile[2]), lambda i, j, n: (i, n)),
            pl.BlockSpec((tile[2], tile[1]), lambda i, j, n: (n, j)),
        ],
        out_specs=pl.BlockSpec((tile[0], tile[1]), lambda i, j, n: (i, j)),
        out_shape=jax.ShapeDtypeStruct((32, 32), jnp.float32),
    )
    counted = cost.count(call, *arrays((32, 32), (32, 32)))
    assert counted.matmul_flops == 2 * 32**3
    assert counted.by_primitive["add"] == 32 * 32 * k
    assert not counted.unknown_loops and not counted.uncounted
    padded = lambda rows: rows * 128 * 4  # a float32 block of 4, 8, 16 or 32 rows and few columns
    # x changes with i and n, w with n and j, unless the axis has one place; the result leaves once for each i and j.
    x, w = (m * n * k if k > 1 else m), (m * n * k if k > 1 or n > 1 else 1)
    assert counted.kernel_bytes == x * padded(tile[0]) + w * padded(tile[2]) + m * n * padded(tile[0])


def test_a_block_whose_place_the_data_decide_moves_in_every_step():
    def double(places, x, out):
        out[...] = x[...] * 2

    def fn(places, x):
        grid = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(6,),
            in_specs=[pl.BlockSpec((8, 128), lambda i, places: (places[i], 0))],
            out_specs=pl.BlockSpec((8, 128), lambda i, places: (i // 2, 0)),
        )
        return pl.pallas_call(double, grid_spec=grid, out_shape=x)(places, x)

    block = 8 * 128 * 4
    counted = cost.count(fn, jax.ShapeDtypeStruct((6,), jnp.int32), *arrays((24, 128)))
    assert counted.kernel_bytes == (6 + 3) * block
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    both = jax.shard_map(fn, mesh=mesh, in_specs=(P(), P()), out_specs=P(), check_vma=False)
    assert cost.count(both, jax.ShapeDtypeStruct((6,), jnp.int32), *arrays((24, 128))).kernel_bytes == 2 * 9 * block


def test_a_kernel_whose_grid_depends_on_data_is_named():
    def double(x, out):
        out[...] = x[...] * 2

    def fn(x, n):
        spec = pl.BlockSpec((8, 8), lambda i: (i, 0))
        return pl.pallas_call(double, grid=(n,), in_specs=[spec], out_specs=spec, out_shape=x)(x)

    counted = cost.count(fn, *arrays((32, 8)), jax.ShapeDtypeStruct((), jnp.int32))
    assert counted.by_primitive == {"mul": 64.0}
    assert counted.unknown_loops == ("pallas_call: the grid depends on data",)


# XLA counts the same where there is no loop; it reports transcendental functions apart.


def attention(x, w):
    q, k, v = jnp.split(x @ w, 3, axis=-1)
    return jax.nn.softmax(q @ k.swapaxes(-1, -2) / 8, axis=-1) @ v


def convolutions(x, w):
    y = jax.lax.conv_general_dilated(x, w, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return jax.nn.standardize(jax.nn.relu(y))


@pytest.mark.parametrize(
    ("fn", "shapes"),
    [
        (jax.value_and_grad(lambda x, w: layer(layer(x, w), w).sum(), argnums=(0, 1)), [(64, 48), (48, 48)]),
        (attention, [(2, 64, 48), (48, 3 * 48)]),
        (jax.grad(lambda x, w: attention(x, w).sum(), argnums=(0, 1)), [(2, 64, 48), (48, 3 * 48)]),
        (convolutions, [(2, 17, 17, 8), (5, 5, 8, 16)]),
        (jax.grad(lambda x, w: (convolutions(x, w) ** 3).sum(), argnums=(0, 1)), [(2, 17, 17, 8), (5, 5, 8, 16)]),
    ],
    ids=["mlp gradient", "attention", "attention gradient", "convolution", "convolution gradient"],
)
def test_xla_counts_the_same_where_nothing_loops(fn, shapes):
    shapes = arrays(*shapes)
    report = jax.jit(fn).lower(*shapes).compile().cost_analysis()
    np.testing.assert_allclose(flops(fn, *shapes), report["flops"] + report.get("transcendentals", 0.0), rtol=0.03)


# Memory.


def test_memory_is_arguments_and_results_less_what_they_share():
    x, w = arrays((64, 32), (32, 32))
    plain = cost.memory(jax.jit(jnp.matmul).lower(x, w).compile())
    assert plain["arguments"] == 4 * (64 * 32 + 32 * 32)
    assert plain["outputs"] == 4 * 64 * 32
    assert plain["aliased"] == 0
    donated = cost.memory(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert donated["aliased"] == donated["arguments"] == donated["outputs"] == 4 * 64 * 32
    assert donated["total"] == 4 * 64 * 32 + donated["temporaries"]
