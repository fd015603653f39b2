"""Compiled programs read from their text, against counts made by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from jaxmethods import sharding
from jaxmethods.launch import hlo


def program(fn, *shapes, **options):
    return hlo.parse(jax.jit(fn, **options).lower(*shapes).compile().as_text())


def collectives(body, shape, axes=(("data", 2), ("fsdp", 4)), *, over="fsdp"):
    """kind -> (group, times, bytes) of a function on each device's part, [n / 4, ...], of an array."""
    mesh = sharding.make_mesh(dict(axes))
    fn = jax.shard_map(body, mesh=mesh, in_specs=P(over), out_specs=P(over), check_vma=False)
    found = hlo.collectives(program(fn, jax.ShapeDtypeStruct(shape, jnp.float32)), mesh.size)
    return {c.kind: (c.group, c.times, c.bytes) for c in found}


@pytest.mark.parametrize(
    ("name", "body", "bytes_each"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "fsdp"), 6 * 8 * 4),
        ("all-gather", lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:6], 4 * 6 * 8 * 4),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]), 6 * 8 * 4),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "fsdp", 1, 1, tiled=True), 6 * 8 * 4),
        ("reduce-scatter", lambda x: jnp.tile(jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True), 4), 6 * 8 * 4),
    ],
)  # fmt: skip
def test_collectives_of_each_kind_once_and_in_a_scan(name, body, bytes_each):
    group = 2 if name == "collective-permute" else 4
    assert collectives(body, (24, 8)) == {name: (group, 1, bytes_each)}

    def repeated(x):
        return jax.lax.scan(lambda carry, _: (body(carry) * 0.5, None), x, length=5)[0]

    assert collectives(repeated, (24, 8)) == {name: (group, 5, 5 * bytes_each)}


def test_a_group_over_one_axis_and_over_two():
    assert collectives(lambda x: jax.lax.psum(x, "data"), (24, 8))["all-reduce"][0] == 2
    assert collectives(lambda x: jax.lax.psum(x, ("data", "fsdp")), (24, 8))["all-reduce"][0] == 8


def test_what_a_device_sends_on_a_ring():
    of = lambda kind, group: hlo.Collective(kind, (tuple(range(group)),), 1, 1000, "").sent
    assert of("all-gather", 4) == of("reduce-scatter", 4) == of("all-to-all", 4) == 750
    assert of("all-reduce", 4) == 1500 and of("collective-permute", 2) == 1000


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, use_global_device_ids=true", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=[2,4]<=[8], dimensions={0}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        # The mesh holds devices 0 4 1 5 2 6 3 7, so that its first axis steps from 0 to 1.
        (
            "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}",
            [[0, 1, 2, 3], [4, 5, 6, 7]],
        ),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'y'}", [[3, 1], [2, 0]]),
        ("replica_groups=mesh['x'=8] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("channel_id=1, source_target_pairs={{0,1},{1,0},{6,7}}", [[0, 1], [1, 0], [6, 7]]),
    ],
)
def test_the_ways_that_groups_are_written(written, groups):
    assert [list(group) for group in hlo._groups(written, 8)] == groups


def test_a_group_in_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="not known here"):
        hlo._groups("replica_groups=<new>, dimensions={0}", 8)


def test_a_reduction_of_which_each_device_keeps_a_slice_is_a_scatter():
    """As the TPU compiler writes it, inside of a fusion; in a loop of three trips that counts from one."""
    text = """HloModule step

%fused (p0: bf16[64,8]) -> bf16[16,8] {
  %p0 = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,8]{1,0} all-reduce(%p0), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  %at = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = bf16[16,8]{1,0} dynamic-slice(%all-reduce.1, %at, %zero), dynamic_slice_sizes={16,8}
}

%body (s: (s32[], bf16[64,8])) -> (s32[], bf16[64,8]) {
  %s = (s32[], bf16[64,8]) parameter(0)
  %x = bf16[64,8]{1,0} get-tuple-element(%s), index=1
  %part = bf16[16,8]{1,0} fusion(%x), kind=kCustom, calls=%fused
}

%condition (s: (s32[], bf16[64,8])) -> pred[] {
  %s = (s32[], bf16[64,8]) parameter(0)
  %last = s32[]{:T(128)} constant(4)
  %n = s32[]{:T(128)} get-tuple-element(%s), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %last), direction=LT
}

ENTRY %main (x: bf16[64,8]) -> (s32[], bf16[64,8]) {
  %x = bf16[64,8]{1,0} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], /*index=1*/bf16[64,8]) tuple(%one, %x)
  ROOT %while = (s32[], bf16[64,8]) while(%start), condition=%condition, body=%body
}
"""
    (found,) = hlo.collectives(hlo.parse(text), 4)
    assert (found.kind, found.group, found.times, found.bytes) == ("reduce-scatter", 4, 3, 3 * 64 * 8 * 2)


def test_trips_of_loops():
    def trips(fn):
        made = program(fn, jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((4,), jnp.float32))
        loops = [(i, c) for c in made.computations.values() for i in c.values() if i.opcode == "while"]
        return [hlo.trips(made, computation, loop) for loop, computation in loops]

    double = lambda i, x: jnp.sin(x) * 2
    assert trips(lambda n, x: jax.lax.fori_loop(0, 7, double, x)) == [7]
    assert trips(lambda n, x: jax.lax.scan(lambda c, _: (jnp.sin(c), c), x, length=6)) == [6]
    assert trips(lambda n, x: jax.lax.fori_loop(0, n, double, x)) == [None]


def test_traffic_counts_the_slices_that_a_scan_reads():
    """A scan over 10 matrices reads each once, not all of them ten times."""
    size = 10 * 64 * 64 * 4
    step = lambda x, w: (jnp.tanh(x @ w), None)
    made = program(
        lambda x, ws: jax.lax.scan(step, x, ws)[0],
        jax.ShapeDtypeStruct((1, 64), jnp.float32), jax.ShapeDtypeStruct((10, 64, 64), jnp.float32),
    )  # fmt: skip
    assert size <= hlo.memory_traffic(made) <= 4 * size  # each slice is read, and may be copied out first


def test_traffic_counts_the_slices_that_a_scan_writes():
    """Each of 10 results is written into its place; the stack is not written ten times."""
    size = 10 * 64 * 64 * 4
    step = lambda x, _: (jnp.sin(x), jnp.cos(x) * 2)
    made = program(lambda x: jax.lax.scan(step, x, length=10), jax.ShapeDtypeStruct((64, 64), jnp.float32))
    # Each trip reads and writes a 64 x 64 array in up to four operations; with the whole stack it would be 20 x size more.
    assert size <= hlo.memory_traffic(made) <= 10 * size


def test_what_stays_on_the_chip_is_no_traffic():
    text = """HloModule step

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %start = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%x)
  %near = f32[1000]{0:S(1)} copy-done(%start)
  %double = f32[1000]{0:S(1)} add(%near, %near)
  ROOT %out = f32[1000]{0} add(%double, %near)
}
"""
    assert hlo.memory_traffic(hlo.parse(text)) == 4000 + 0 + 4000


def test_a_collective_that_several_fusions_carry_on_counts_once():
    """How v5e's compiler spreads a gather over products: each step stands in a fusion of its own, on one channel."""
    step = """%step.{0} (p: f32[10]) -> f32[40] {{
  %p = f32[10]{{0}} parameter(0)
  ROOT %g.{0} = f32[40]{{0}} all-gather(%p), channel_id={1}, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}
}}

"""
    text = "HloModule step\n\n" + "".join(step.format(n, channel) for n, channel in enumerate((7, 7, 8)))
    text += """ENTRY %main (x: f32[10]) -> f32[40] {
  %x = f32[10]{0} parameter(0)
  %a = f32[40]{0} fusion(%x), kind=kOutput, calls=%step.0
  %b = f32[40]{0} fusion(%x), kind=kOutput, calls=%step.1
  ROOT %c = f32[40]{0} fusion(%x), kind=kOutput, calls=%step.2
}
"""
    (gathered,) = hlo.collectives(hlo.parse(text), 4)
    assert (gathered.kind, gathered.times, gathered.bytes) == ("all-gather", 2, 2 * 160)


def test_what_a_kernel_says_of_itself_may_hold_line_breaks():
    """JAX's splash attention writes its blocks so. What comes after it in the loop's body is counted too."""
    text = """HloModule step

%body (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  %kernel = f32[1000]{0} custom-call(%x), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512}"
}}, metadata={op_name="splash"}
  ROOT %sum = f32[1000]{0} all-reduce(%kernel), replica_groups={{0,1}}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (x: f32[1000]) -> f32[1000] {
  %x = f32[1000]{0} parameter(0)
  ROOT %out = f32[1000]{0} call(%x), to_apply=%body
}
"""
    made = hlo.parse(text)
    assert list(made.computations) == ["body", "main"] and made.entry == "main"
    assert list(made.computations["body"]) == ["x", "kernel", "sum"]
    assert "op_name" in made.computations["body"]["kernel"].attributes
    (reduced,) = hlo.collectives(made, 2)
    assert (reduced.kind, reduced.group, reduced.bytes) == ("all-reduce", 2, 4000)
    assert hlo.memory_traffic(made) == 8000 + 8000 and hlo.memory_traffic(made, kernels=False) == 8000
    with pytest.raises(ValueError, match="ends inside of 'main'"):
        hlo.parse(text[: text.rindex("}")])


def test_traffic_of_a_slice_is_the_slice_also_in_a_fusion_inside_of_a_fusion():
    """10 of 1000 numbers are read and written; what the fusion adds to them it reads too. What is handed on is read as a whole."""
    text = """HloModule step

%inner (p: f32[1000], q: f32[10]) -> f32[10] {
  %p = f32[1000]{0} parameter(0)
  %q = f32[10]{0} parameter(1)
  %part = f32[10]{0} slice(%p), slice={[5:15]}
  ROOT %sum = f32[10]{0} add(%part, %q)
}

%outer (a: f32[1000], b: f32[10]) -> f32[10] {
  %a = f32[1000]{0} parameter(0)
  %b = f32[10]{0} parameter(1)
  ROOT %nested = f32[10]{0} fusion(%a, %b), kind=kLoop, calls=%inner
}

ENTRY %main (x: f32[1000], y: f32[10]) -> f32[10] {
  %x = f32[1000]{0} parameter(0)
  %y = f32[10]{0} parameter(1)
  WHAT
}
"""
    handed_on = text.replace("slice(%p), slice={[5:15]}", "bitcast(%p)").replace("ROOT %sum", "%sum")
    handed_on = handed_on.replace("%part =", "ROOT %part =").replace(
        "WHAT", "ROOT %o = f32[10]{0} fusion(%x, %y), calls=%outer"
    )
    assert hlo.memory_traffic(hlo.parse(handed_on)) > 4000
    traffic = lambda what: hlo.memory_traffic(hlo.parse(text.replace("WHAT", f"ROOT %out = f32[10]{{0}} {what}")))
    assert traffic("slice(%x), slice={[5:15]}") == 2 * 40
    assert (
        traffic("fusion(%x, %y), kind=kLoop, calls=%outer")
        == traffic("fusion(%x, %y), kind=kLoop, calls=%inner")
        == 3 * 40
    )


def test_traffic_of_one_elementwise_operation():
    made = program(lambda x, y: x + y, *[jax.ShapeDtypeStruct((1000,), jnp.float32)] * 2)
    assert hlo.memory_traffic(made) == 3 * 4000


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("HloModule nothing")
