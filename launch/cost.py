"""What a program costs: floating-point operations counted from its jaxpr, memory as its compiler reports it.

XLA's own `cost_analysis()` counts the body of a loop once, whatever its length, and knows nothing of what a
Pallas kernel does. A jaxpr still has the lengths and the kernels' bodies, so the count is made there, before
anything is compiled.

>>> import jax
>>> x, w = jax.ShapeDtypeStruct((4, 8), "float32"), jax.ShapeDtypeStruct((8, 16), "float32")
>>> count(lambda x, w: jax.numpy.tanh(x @ w), x, w).by_primitive
{'dot_general': 1024.0, 'tanh': 64.0}
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun, jaxprs_in_params


@dataclass(frozen=True)
class Cost:
    """Operations of one call, over all devices that take part in it.

    `flops` is the sum of `by_primitive` (largest first). `kernel_bytes` are what Pallas kernels read from and write to
    main memory. `unknown_loops` names the loops whose number of
    trips the program alone does not tell; each is counted as one trip, so `flops` is then a lower bound.
    `uncounted` names the primitives that do arithmetic for which there is no rule here (an
    eigendecomposition, a foreign kernel); each is counted as zero, or as one run of the function inside.
    """

    flops: float
    by_primitive: dict[str, float]
    kernel_bytes: float = 0.0
    unknown_loops: tuple[str, ...] = ()
    uncounted: tuple[str, ...] = ()

    @property
    def matmul_flops(self) -> float:
        """The part done by matrix units: dot products and convolutions."""
        return sum(self.by_primitive.get(name, 0.0) for name in _PRODUCTS)


def count(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Cost:
    """Operations of `fn(*args, **kwargs)`; nothing runs, and `jax.ShapeDtypeStruct` serves for every array.

    Arguments that are no arrays belong in a closure, or are static arguments of an `fn` that is jitted.

    Rules. A product of matrices is 2 x M x N x K, also when its rows are ragged (every row is in one group);
    a convolution is 2 x each pair of kernel tap and real input (padding and dilation holes are skipped). An
    elementwise operation is 1 for each element of its output, whatever it is (exp, compare, select, cast,
    random bits) and whatever the dtype; a reduction is 1 for each element of its input. Moving data (reshape,
    gather, collectives that do not add) is free. The body of a scan counts times its length, of a while loop
    times its trips where start, bound and stride are constants, of `shard_map` times the devices of its
    manual axes, of a Pallas kernel times its grid. A `cond` counts as its costliest branch, so a kernel that
    skips blocks (a causal mask) is counted as if it skipped none. A kernel's block is moved when its place in the
    array is another than in the grid's step before, padded to whole tiles; where data decide the place, in every step;
    what a kernel copies itself is not counted. Equations whose results nobody uses are not
    counted: the compiler drops them too.

    What is rematerialised is counted again, because it is computed again. For model FLOPs in the sense of
    PaLM (https://arxiv.org/abs/2204.02311, appendix B), count the step of the model without
    rematerialisation.
    """
    jitted = fn if isinstance(fn, jax.stages.Wrapped) else jax.jit(fn)
    return count_traced(jitted.trace(*args, **kwargs))


def count_traced(traced: jax.stages.Traced) -> Cost:
    """As `count`, of a call that has been traced; for devices that are absent, outside of `jax.set_mesh` with them."""
    jaxpr = traced.jaxpr
    tally = _tally(jaxpr, [None] * len(_open(jaxpr).invars), "")
    return Cost(
        flops=float(sum(tally.operations.values())),
        by_primitive={name: float(n) for name, n in tally.operations.most_common() if n},
        kernel_bytes=float(tally.kernel_bytes),
        unknown_loops=tuple(tally.unknown_loops),
        uncounted=tuple(sorted(tally.uncounted)),
    )


@dataclass
class _Tally:
    operations: Counter[str] = field(default_factory=Counter)
    kernel_bytes: int = 0
    unknown_loops: list[str] = field(default_factory=list)
    uncounted: set[str] = field(default_factory=set)

    def add(self, other: _Tally, times: int = 1) -> None:
        for name, n in other.operations.items():
            self.operations[name] += n * times
        self.kernel_bytes += other.kernel_bytes * times
        self.unknown_loops += other.unknown_loops
        self.uncounted |= other.uncounted


# Integers that are known while tracing (loop bounds), by variable; None: not known.
_Known = dict[Var, int | None]


def _tally(jaxpr: Any, inputs: Sequence[int | None], path: str) -> _Tally:
    """One run of `jaxpr` (open or closed), whose inputs have the given values where they are known."""
    consts = map(_integer, getattr(jaxpr, "consts", ()))
    body = _open(jaxpr)
    known: _Known = dict(zip(body.constvars, consts, strict=False))
    known.update(zip(body.invars, inputs, strict=True))
    tally = _Tally()
    for eqn in _used_equations(body):
        values = [_value(v, known) for v in eqn.invars]
        if eqn.primitive.name == "convert_element_type":
            known[eqn.outvars[0]] = values[0]
        tally.add(_equation(eqn, values, path))
    return tally


def _used_equations(jaxpr: Jaxpr) -> list[JaxprEqn]:
    """The equations that have an effect or that the outputs depend on, in order."""
    wanted = {v for v in jaxpr.outvars if isinstance(v, Var)}
    used = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in wanted for v in eqn.outvars):
            used.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var))
    return used[::-1]


def _equation(eqn: JaxprEqn, values: list[int | None], path: str) -> _Tally:
    name, params = eqn.primitive.name, eqn.params
    tally = _Tally()
    if name == "scan":
        inner = f"{path}scan[{params['length']}]/"
        tally.add(_tally(params["jaxpr"], [None] * len(eqn.invars), inner), params["length"])
    elif name == "while":
        _while(tally, eqn, values, path)
    elif name == "cond":
        branches = [_tally(branch, values[1:], f"{path}cond/") for branch in params["branches"]]
        tally.add(max(branches, key=lambda branch: sum(branch.operations.values())))
        for branch in branches:  # which branch is the costliest may hang on a loop of unknown length
            tally.unknown_loops += [loop for loop in branch.unknown_loops if loop not in tally.unknown_loops]
    elif name == "shard_map":
        devices = math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
        tally.add(_tally(params["jaxpr"], values, f"{path}shard_map[{devices}]/"), devices)
    elif name == "pallas_call":
        grid = params["grid_mapping"].grid
        inner = f"{path}pallas_call{list(grid)}/" if _is_static(grid) else f"{path}pallas_call/"
        body = _tally(params["jaxpr"], [None] * len(_open(params["jaxpr"]).invars), inner)
        tally.add(body, math.prod(int(size) for size in grid if isinstance(size, int | np.integer)))
        if _is_static(grid):
            tally.kernel_bytes += _kernel_bytes(params["grid_mapping"])
        else:
            tally.unknown_loops.append(f"{path}pallas_call: the grid depends on data")
    elif name == "custom_linear_solve":  # its other functions serve transposition
        solve = params["jaxprs"].solve
        tally.add(_tally(solve, [None] * len(_open(solve).invars), path))
    elif name in _CALLS:
        (called,) = jaxprs_in_params(params)
        inner = f"{path}{params['name']}/" if isinstance(params.get("name"), str) else path
        tally.add(_tally(called, _padded(values, len(called.invars)), inner))
    elif name in _RULES:
        tally.operations[name] += _RULES[name](eqn)
    else:
        tally.uncounted.add(name)
        for called in jaxprs_in_params(params):
            tally.add(_tally(called, [None] * len(called.invars), f"{path}{name}/"))
    return tally


def _while(tally: _Tally, eqn: JaxprEqn, values: list[int | None], path: str) -> None:
    condition, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    trips = _trips(eqn, values)
    inner = f"{path}while[{'?' if trips is None else trips}]/"
    trip = _tally(body, [None] * len(_open(body).invars), inner)
    trip.add(_tally(condition, [None] * len(_open(condition).invars), inner))
    tally.add(trip, 1 if trips is None else trips)
    if trips is None:
        each = sum(trip.operations.values())
        tally.unknown_loops.append(f"{path}while: {each:.3g} operations a trip, counted once")


def _trips(eqn: JaxprEqn, values: list[int | None]) -> int | None:
    """How often a while loop runs that counts in constant strides from a known start to a known bound."""
    condition, body = _open(eqn.params["cond_jaxpr"]), _open(eqn.params["body_jaxpr"])
    in_condition, in_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    known = dict(zip(condition.invars, values[:in_condition], strict=False))
    body_known = dict(zip(body.invars, values[in_condition : in_condition + in_body], strict=False))
    starts = values[in_condition + in_body :]
    carried = zip(body.invars[in_body:], body.outvars, condition.invars[in_condition:], starts, strict=True)
    counters = {}
    for before, after, tested, start in carried:
        if after is before:  # handed on unchanged, as `fori_loop` does with its bound
            known[tested] = body_known[before] = start
        else:
            counters[tested] = (before, after, start)

    test = _maker(condition.outvars[0], condition)
    if test is None or test.primitive.name not in _FLIPPED:
        return None
    order, (left, right) = test.primitive.name, (_uncast(v, condition) for v in test.invars)
    if not isinstance(left, Var) or left not in counters:  # bound > counter reads counter < bound
        order, left, right = _FLIPPED[order], right, left
    if not isinstance(left, Var) or left not in counters:
        return None
    before, after, first = counters[left]
    bound, stride = _value(right, known), _stride(body, before, after, body_known)
    if first is None or bound is None or stride is None:
        return None
    if order in ("gt", "ge"):
        first, bound, stride = -first, -bound, -stride
    distance = bound - first + (order in ("le", "ge"))
    if distance <= 0:
        return 0
    return -(-distance // stride) if stride > 0 else None


_FLIPPED = {"lt": "gt", "gt": "lt", "le": "ge", "ge": "le"}


def _stride(body: Jaxpr, before: Var, after: Any, known: _Known) -> int | None:
    """The constant that one trip adds to a counter."""
    step = _maker(_uncast(after, body), body)
    if step is None or step.primitive.name not in ("add", "sub"):
        return None
    left, right = (_uncast(v, body) for v in step.invars)
    if right is before and step.primitive.name == "add":
        left, right = right, left
    amount = _value(right, known)
    if left is not before or amount is None:
        return None
    return amount if step.primitive.name == "add" else -amount


def _maker(v: Any, jaxpr: Jaxpr) -> JaxprEqn | None:
    return next((eqn for eqn in jaxpr.eqns if any(v is out for out in eqn.outvars)), None)


def _uncast(v: Any, jaxpr: Jaxpr) -> Any:
    """The variable or literal of which `v` is a cast."""
    while (maker := _maker(v, jaxpr)) is not None and maker.primitive.name == "convert_element_type":
        v = maker.invars[0]
    return v


def _open(jaxpr: Any) -> Jaxpr:
    return getattr(jaxpr, "jaxpr", jaxpr)


def _integer(value: Any) -> int | None:
    is_integer = jax.numpy.issubdtype(jax.numpy.result_type(value), np.integer)
    return int(value) if is_integer and np.ndim(value) == 0 else None


def _value(v: Any, known: _Known) -> int | None:
    return _integer(v.val) if isinstance(v, Literal) else known.get(v)


def _padded(values: list[int | None], length: int) -> list[int | None]:
    """As many values as the function has inputs; unknown ones where the two do not match one to one."""
    return values if len(values) == length else [None] * length


def _is_static(grid: Sequence[Any]) -> bool:
    return all(isinstance(size, int | np.integer) for size in grid)


def _kernel_bytes(mapping: Any) -> int:
    """What one call of a Pallas kernel moves: each block as often as its place changes along the grid."""
    steps = np.indices(mapping.grid, np.int32).reshape(len(mapping.grid), -1)
    total = 0
    for block in mapping.block_mappings:
        ref = block.transformed_block_aval
        if str(ref.memory_space) in ("any", "hbm", "smem"):
            continue
        shape: tuple[int, ...] = (1, 1, *ref.shape)
        size, rows = ref.dtype.itemsize, shape[-2]
        rows = _up(rows, min(32 // size, 1 << (rows - 1).bit_length()))  # few are kept as few, in a power of two
        tiled = math.prod(shape[:-2]) * rows * _up(shape[-1], 128) * size
        total += tiled * _moves(block.index_map_jaxpr, steps)
    return total


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _moves(index_map: Any, steps: np.ndarray) -> int:
    """How often the place of a block changes in these steps of a grid, the first time included."""
    jaxpr = index_map.jaxpr
    of_data = jaxpr.invars[len(steps) :]
    if any(v in of_data for eqn in jaxpr.eqns for v in eqn.invars if isinstance(v, Var)):
        return steps.shape[1]
    place = lambda *step: jaxpr_as_fun(index_map)(*step, *of_data)  # the data stand there unread
    with jax.ensure_compile_time_eval():
        places = np.stack(jax.vmap(place)(*steps))
    return 1 + int((places[:, 1:] != places[:, :-1]).any(0).sum())


# Rules: operations of one equation. All are exact integers.


def _shape(v: Any) -> tuple[int, ...]:
    return getattr(v.aval, "shape", ())


def _free(eqn: JaxprEqn) -> int:
    return 0


def _each_output(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.outvars[0]))


def _each_input(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.invars[0]))


def _each_operand(eqn: JaxprEqn) -> int:
    return sum(math.prod(_shape(v)) for v in eqn.invars)


def _each_update(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.invars[2]))


def _addupdate(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.invars[1]))


def _product(left: tuple[int, ...], right: tuple[int, ...], shared: Collection[Any]) -> int:
    """2 x the left operand x those axes of the right one that the left one does not have."""
    return 2 * math.prod(left) * math.prod(n for axis, n in enumerate(right) if axis not in shared)


def _dot_general(eqn: JaxprEqn) -> int:
    (_, contracted), (_, batch) = eqn.params["dimension_numbers"]
    return _product(_shape(eqn.invars[0]), _shape(eqn.invars[1]), (*contracted, *batch))


def _ragged_dot(eqn: JaxprEqn) -> int:
    """Each row meets the matrix of one group, so the groups' axis counts no more than a shared one does."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = (*contracted, *batch, *numbers.rhs_group_dimensions)
    return _product(_shape(eqn.invars[0]), _shape(eqn.invars[1]), shared)


def _convolution(eqn: JaxprEqn) -> int:
    """2 x outputs x input channels of a group x taps that meet a real input, counted along each axis."""
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    # Each shape as (rows, channels, *space); the kernel's as (output channels, channels of a group, *space).
    image = [_shape(eqn.invars[0])[axis] for axis in numbers.lhs_spec]
    kernel = [_shape(eqn.invars[1])[axis] for axis in numbers.rhs_spec]
    out = [_shape(eqn.outvars[0])[axis] for axis in numbers.out_spec]
    taps = 1
    for axis, stride in enumerate(p["window_strides"]):
        hole, spread = p["lhs_dilation"][axis], p["rhs_dilation"][axis]
        corner = np.arange(out[2 + axis])[:, None] * stride - p["padding"][axis][0]
        at = corner + np.arange(kernel[2 + axis]) * spread
        taps *= int(np.sum((at >= 0) & (at <= (image[2 + axis] - 1) * hole) & (at % hole == 0)))
    return 2 * taps * out[0] * out[1] * kernel[1]


def _window(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.outvars[0])) * math.prod(eqn.params["window_dimensions"])


def _scattered_window(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.invars[0])) * math.prod(eqn.params["window_dimensions"])


def _sort(eqn: JaxprEqn) -> int:
    """n log2 n comparisons along the sorted axis (the last one of `top_k`)."""
    shape = _shape(eqn.invars[0])
    n = shape[eqn.params.get("dimension", -1)]
    return math.prod(shape) * math.ceil(math.log2(n)) if n > 1 else 0


def _cholesky(eqn: JaxprEqn) -> int:
    *batch, n, _ = _shape(eqn.invars[0])
    return math.prod(batch) * n**3 // 3


def _lu(eqn: JaxprEqn) -> int:
    """2 m n k - (m + n) k^2 + 2/3 k^3 with k = min(m, n): 2/3 n^3 where m = n."""
    *batch, m, n = _shape(eqn.invars[0])
    k = min(m, n)
    return math.prod(batch) * (2 * m * n * k - (m + n) * k**2 + 2 * k**3 // 3)


def _triangular_solve(eqn: JaxprEqn) -> int:
    return math.prod(_shape(eqn.invars[1])) * _shape(eqn.invars[0])[-1]


_PRODUCTS = ("dot_general", "ragged_dot_general", "ragged_dot", "conv_general_dilated")

# Primitives that run the one function they hold once.
_CALLED_ONCE = """
    jit pjit closed_call core_call call checkpoint remat remat2 custom_jvp_call custom_vjp_call composite
    custom_partitioning eval_jaxpr run_scoped run_state
"""
_CALLS = frozenset(_CALLED_ONCE.split())

_GROUPS: dict[Callable[[JaxprEqn], int], str] = {
    _each_output: """
        abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz
        complex conj convert_element_type cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor
        ge gt igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p log2 logistic
        lt lt_to max min mul mulhi ne neg nextafter not one_minus_square or polygamma polynomial
        population_count pow random_bits random_fold_in random_gamma random_seed random_split real
        reduce_precision regularized_incomplete_beta rem rng_bit_generator rng_uniform round rsqrt select_n
        shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stochastic_round sub
        tan tanh threefry2x32 xor zeta
    """,
    _each_input: """
        argmax argmin cumlogsumexp cummax cummin cumprod cumsum reduce reduce_and reduce_max reduce_min
        reduce_or reduce_prod reduce_scatter reduce_sum reduce_xor
    """,
    _each_operand: "pmax pmin psum psum2 psum_invariant",
    _each_update: "scatter-add scatter-sub scatter-mul scatter-min scatter-max",
    _addupdate: "addupdate",
    _window: "reduce_window reduce_window_max reduce_window_min reduce_window_sum select_and_gather_add",
    _scattered_window: "select_and_scatter_add",
    _sort: "approx_top_k sort top_k",
    _dot_general: "dot_general",
    _ragged_dot: "ragged_dot ragged_dot_general",
    _convolution: "conv_general_dilated",
    _cholesky: "cholesky",
    _lu: "lu",
    _triangular_solve: "triangular_solve",
    _free: """
        after_all all_gather all_gather_invariant all_gather_reduced all_to_all axis_index bitcast
        bitcast_convert_type broadcast_in_dim collective_permute concatenate copy copy_p create_token
        debug_callback debug_print delay device_put dma_start dma_wait dynamic_slice dynamic_update_slice
        empty empty2 expand_dims full gather get get_barrier_semaphore iota io_callback layout_constraint load
        lu_pivots_to_permutation masked_load masked_swap mesh_cast multiple_of name num_programs
        optimization_barrier pad pbroadcast pcast ppermute program_id pure_callback pvary random_unwrap
        random_wrap ragged_all_to_all repeat reshape reshard rev roll scatter semaphore_read semaphore_signal
        semaphore_wait sharding_constraint slice split squeeze stop_gradient store swap tie tile transpose
        unreduced_psum unvary
    """,
}

_RULES = {name: rule for rule, names in _GROUPS.items() for name in names.split()}


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes on each device that the compiler plans for a compiled function.

    `total` = `arguments` + `outputs` - `aliased` (outputs that take over a donated argument) + `temporaries`.

    Raises ValueError where the backend does not report it.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend does not report the memory of compiled functions; compile for another.")
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
    }
    total = parts["arguments"] + parts["outputs"] - parts["aliased"] + parts["temporaries"]
    return parts | {"total": total}
