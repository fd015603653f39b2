"""`jaxmethods plan`: what a run is, before it runs. No weight is read and no data is opened."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmethods import quantization, sharding, tree
from jaxmethods.kernels.attention import splash
from jaxmethods.launch import cost, hlo, plot, targets
from jaxmethods.launch.assembly import Assembly, assemble, model_shapes, whole_batches
from jaxmethods.launch.config import Mesh, Run

COMPILED_UP_TO = 2e9
"""A step with more parameters than this is counted and not compiled for the devices at hand."""


def plan(run: Run, topology: str | None = None) -> dict[str, Any]:
    """The run as plain values: model, trained part, bytes and FLOPs of a step.

    Args:
        topology: compile the step for these devices, such as `v5p:8x8x8` or `h100:2x8`; by default for those of this machine,
            where the step is small enough.

    Returns:
        `bytes_per_device`: the compiler's own report, with the `limit` of the device, or None where nothing was compiled;
        `state_bytes_per_device` follows from shapes and shardings alone. `flops_per_step` are counted from the program; they are
        a lower bound where `counted_once` names loops whose length depends on the data (attention over blocks of keys).
        `collectives`: by kind, how many, the bytes a device sends, and the seconds that its links take. `roofline`: seconds
        that a step takes at the published rates of matrix units, memory and interconnect, each alone;
        `step_seconds_roofline` is the largest of them, and `bound` its name. Where the step does not fit, `alternatives` says
        what each next choice needs (see `choices`).

    Raises:
        ValueError, FileNotFoundError: what `train` would refuse about config and model; an unknown topology.
        ImportError: the target's compiler is not installed.
    """
    devices = jax.devices() if topology is None else targets.devices_of(topology)
    assembly = _assembled(run, devices)
    trained = tree.count(assembly.state.trained)
    total = trained + quantization.count(assembly.frozen)
    config = assembly.module.config
    found = {
        "model": {
            "path": run.model, "family": config.family, "layers": config.num_layers, "width": config.hidden_size,
            "parameters": quantization.count(assembly.base), "dtype": run.param_dtype, "quantize": run.quantize,
        },
        "trained": {"parameters": trained, "share": trained / total, "layers": _layers(assembly)},
        "devices": {
            "topology": topology, "kind": devices[0].device_kind, "count": len(devices), "mesh": dict(assembly.mesh.shape),
        },
        "tokens_per_step": sum(x.size for name, x in assembly.batch().items() if name.rpartition("/")[2] == "tokens"),
        "steps": run.steps,
        "state_bytes_per_device": _state_bytes(assembly),
        "layout": layout(assembly),
    }  # fmt: skip
    found |= _examined(assembly, devices, compiles=topology is not None or total <= COMPILED_UP_TO)
    if found["fits"] is False:
        found["alternatives"] = [_tried(run, change, devices) for change in choices(run, assembly.mesh)]
    return found


def search(run: Run, topology: str) -> list[dict[str, Any]]:
    """The run on arrangements of a topology's devices, with micro-batches of several sizes; the best first (see `arrangements`).

    Those that fit come first, by `step_seconds_roofline`; then the others, by the bytes they need. Each is compiled, which takes
    a minute or so for a large model.

    Raises:
        ValueError: no arrangement gives each device as many rows as another.
    """
    devices = targets.devices_of(topology)
    found = [_tried(run, change, devices) for change in arrangements(run, len(devices))]
    if not found:
        raise ValueError(
            f"batch_size={run.batch_size} is no multiple of {topology}'s {len(devices)} devices, or of a half, a quarter or "
            f"an eighth of them; try batch_size={len(devices)}."
        )
    return ranked(found)


def ranked(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What fits, the fastest first; then what does not, by the bytes it needs."""
    return sorted(
        found, key=lambda one: (not one["fits"], one["step_seconds_roofline"] or one["bytes_per_device"]["total"])
    )


def arrangements(run: Run, devices: int) -> list[dict[str, Any]]:
    """What `search` tries: {"mesh": Mesh, "accumulate": n}.

    All devices share the parameters, or `data` holds 2, 4 or 8 copies of them (less to gather: on a torus of three axes much
    less); or `tensor` splits layers, or `sequence` rows, over 2, 4 or 8. Micro-batches are cut into 1, 2 and 4 where neither
    `data` nor `sequence` is used: what these are for, fewer bytes sent and fewer rows a device, cutting undoes.
    """
    meshes = [Mesh(1, devices // tensor, tensor) for tensor in (1, 2, 4, 8) if devices % tensor == 0]
    parts = (1,) if whole_batches(run) else (1, 2, 4)
    plain = [{"mesh": mesh, "accumulate": count} for mesh in meshes for count in parts]
    sizes = [size for size in (2, 4, 8) if devices % size == 0]
    copies = [Mesh(size, devices // size) for size in sizes if size < devices]
    splits = [Mesh(1, devices // size, 1, size) for size in sizes if splash.supports(run.data.sequence_length, size)]
    changes = plain + [{"mesh": mesh, "accumulate": 1} for mesh in (*copies, *splits)]
    rows = lambda change: change["mesh"].data * change["mesh"].fsdp * change["accumulate"]
    return [change for change in changes if run.batch_size % rows(change) == 0]


def choices(run: Run, mesh: Any) -> list[dict[str, Any]]:
    """What to change so that a step needs less memory, one step each: {field: value}.

    Compute more of the forward pass again, cut the batch into more parts, split parameters over what now holds copies of them,
    or layers over more devices.
    """
    found: list[dict[str, Any]] = []
    if run.remat != "full":
        found.append({"remat": {"none": "dots", "dots": "full"}[run.remat]})
    sizes = dict(mesh.shape)
    whole = whole_batches(run)
    rows = run.batch_size // run.accumulate if not whole else getattr(run.objective, "chunk", None) or run.batch_size
    if rows % (2 * sizes["data"] * sizes["fsdp"]) == 0:
        found.append({"objective.chunk": rows // 2} if whole else {"accumulate": 2 * run.accumulate})
    if sizes["data"] > 1:
        found.append({"mesh": Mesh(1, sizes["data"] * sizes["fsdp"], sizes["tensor"], sizes["sequence"])})
    elif sizes["fsdp"] % 2 == 0:
        found.append({"mesh": Mesh(sizes["data"], sizes["fsdp"] // 2, 2 * sizes["tensor"], sizes["sequence"])})
    return found


def _tried(run: Run, change: dict[str, Any], devices: Sequence[Any]) -> dict[str, Any]:
    if "objective.chunk" in change:
        changed = dataclasses.replace(
            run, objective=dataclasses.replace(run.objective, chunk=change["objective.chunk"])
        )
    else:
        changed = dataclasses.replace(run, **change)
    assembly = _assembled(changed, devices)
    examined = _examined(assembly, devices, compiles=True) | {"state_bytes_per_device": _state_bytes(assembly)}
    kept = ("state_bytes_per_device", "bytes_per_device", "fits", "step_seconds_roofline", "bound", "compile_seconds")
    plain = {name: dataclasses.asdict(x) if isinstance(x, Mesh) else x for name, x in change.items()}
    return {"change": plain} | {name: examined[name] for name in kept}


def _assembled(run: Run, devices: Sequence[Any]) -> Assembly:
    return assemble(run, *model_shapes(run), sharding.make_mesh(dataclasses.asdict(run.mesh), devices))


def _examined(assembly: Assembly, devices: Sequence[Any], *, compiles: bool) -> dict[str, Any]:
    """What a step costs: counted from the program and, where it compiles, read from what the compiler made of it."""
    with jax.set_mesh(assembly.mesh):  # by which a kernel outside of `shard_map`, on one device, is told its target
        traced = assembly.step.trace(assembly.state, assembly.frozen, assembly.batch())
    counted = cost.count_traced(traced)
    compiled = _compiled(assembly, devices, traced, counted) if compiles else _NOT_COMPILED
    flops = {
        "flops_per_step": counted.flops, "flops_per_device": counted.flops / len(devices),
        "counted_once": list(counted.unknown_loops),
    }  # fmt: skip
    return flops | compiled | _roofline(devices[0], counted.matmul_flops / len(devices), compiled)


_NOT_COMPILED: dict[str, Any] = {
    "bytes_per_device": None, "fits": None, "collectives": None, "memory_traffic_per_device": None, "compile_seconds": None,
}  # fmt: skip


def _compiled(
    assembly: Assembly, devices: Sequence[Any], traced: jax.stages.Traced, counted: cost.Cost
) -> dict[str, Any]:
    """What the compiler says of the step; of what its Pallas kernels move, what was counted."""
    chip = targets.chip_of(devices[0])
    limit = None if chip is None or chip.memory is None else int(chip.memory)
    start = time.perf_counter()
    with jax.set_mesh(assembly.mesh):
        lowered = traced.lower()
    try:
        compiled, text = targets.compile_for(lowered, devices[0].platform)
    except jax.errors.JaxRuntimeError as error:
        told = _OUT_OF_MEMORY.search(str(error))
        if told is None:
            raise
        size = lambda number, unit: int(float(number) * 2 ** {"K": 10, "M": 20, "G": 30}[unit])
        temporaries, available = size(*told.group(1, 2)), size(*told.group(3, 4))
        arguments = sum(_state_bytes(assembly).values())
        needed = {
            "arguments": arguments,
            "temporaries": temporaries,
            "total": arguments + temporaries,
            "limit": available,
        }
        seconds = round(time.perf_counter() - start, 2)
        return _NOT_COMPILED | {"bytes_per_device": needed, "fits": False, "compile_seconds": seconds}
    program = hlo.parse(text)
    memory = cost.memory(compiled)
    kinds: dict[str, dict[str, float]] = {}
    nodes = [device.process_index for device in assembly.mesh.devices.flat]
    for collective in hlo.collectives(program, len(devices)):
        kind = kinds.setdefault(collective.kind, {"count": 0, "bytes_sent": 0.0, "seconds": 0.0})
        kind["count"] += collective.times
        kind["bytes_sent"] += collective.sent
        kind["seconds"] += (
            0.0 if chip is None or not chip.link_rate else collective.sent / _rate(chip, collective, nodes)
        )
    return {
        "bytes_per_device": memory | {"limit": limit},
        "fits": None if limit is None else memory["total"] <= limit,
        "collectives": kinds,
        "memory_traffic_per_device": hlo.memory_traffic(program, kernels=False)
        + round(counted.kernel_bytes / len(devices)),
        "compile_seconds": round(time.perf_counter() - start, 2),
    }


def _rate(chip: targets.Chip, collective: hlo.Collective, nodes: Sequence[int]) -> float:
    """Bytes a second at which each device of a collective sends.

    A ring that goes through several nodes leaves each of them once, over the adapters of those of its devices that it has there.
    """
    assert chip.link_rate
    if chip.network_rate is None:
        return chip.link_rate
    here = [Counter(nodes[device] for device in group) for group in collective.groups]
    fewest = min((min(count.values()) for count in here if len(count) > 1), default=math.inf)
    return min(chip.link_rate, fewest * chip.network_rate)


_OUT_OF_MEMORY = re.compile(r"HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)")
"""How the TPU compiler refuses a program."""


def _roofline(device: Any, matmul_flops: float, compiled: dict[str, Any]) -> dict[str, Any]:
    """Seconds at the published rates, each resource alone, and the one that takes longest."""
    chip = targets.chip_of(device)
    if chip is None:
        return {"roofline": None, "step_seconds_roofline": None, "bound": None}
    seconds = {"compute": matmul_flops / chip.flops}
    if compiled["collectives"] is not None:
        if chip.memory_rate:
            seconds["memory"] = compiled["memory_traffic_per_device"] / chip.memory_rate
        if chip.link_rate:
            seconds["interconnect"] = sum((kind["seconds"] for kind in compiled["collectives"].values()), 0.0)
    bound = max(seconds, key=lambda name: seconds[name])
    return {"roofline": seconds, "step_seconds_roofline": seconds[bound], "bound": bound}


def _layers(assembly: Assembly) -> dict[str, int]:
    """Trained parameters by the layer they belong to."""
    found: dict[str, int] = {}
    for path, leaf in tree.flatten(assembly.state.trained).items():
        layer = path.split("/adapter/")[0] if "/adapter/" in path else path.rsplit("/", 1)[0]
        found[layer] = found.get(layer, 0) + tree.count(leaf)
    return found


def layout(assembly: Assembly) -> dict[str, dict[str, Any]]:
    """Where each array of the model lies: path -> shape, dtype, the mesh axes over which each of its axes is split, and bytes.

    A trained array's moments lie where it does.
    """
    found = {}
    for part, arrays in (("trained", assembly.state.trained), ("frozen", assembly.frozen)):
        for path, x in tree.flatten(arrays).items():
            entries = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
            names = ["+".join(e) if isinstance(e, tuple) else e or "-" for e in entries]
            found[path] = {
                "part": part, "dtype": str(x.dtype), "shape": list(x.shape), "over": names, "bytes_per_device": _bytes({"": x}),
            }  # fmt: skip
    return dict(sorted(found.items()))


def _state_bytes(assembly: Assembly) -> dict[str, int]:
    """Bytes on one device of what lives from step to step."""
    state = assembly.state
    return {"trained": _bytes(state.trained), "optimizer": _bytes(state.opt), "frozen": _bytes(assembly.frozen)}


def _bytes(shapes: tree.Tree) -> int:
    """Bytes on one device, from shapes and shardings."""
    local = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return tree.size_in_bytes(jax.tree.map(local, shapes))


def parts(found: dict[str, Any]) -> dict[str, int]:
    """A step's bytes on a device by what they are for: `frozen`, `trained`, `optimizer`, and `temporaries`, which is all else.

    Args:
        found: what `plan` found of a step that was compiled, or one of its `alternatives`, or of `search`.
    """
    held = found["state_bytes_per_device"]
    rest = found["bytes_per_device"]["total"] - sum(held.values())
    return {name: held[name] for name in ("frozen", "trained", "optimizer")} | {"temporaries": max(rest, 0)}


def draw(found: dict[str, Any] | list[dict[str, Any]], path: str | os.PathLike[str], *, title: str) -> None:
    """Draws what a plan's step needs of a device's memory, and each alternative; or each arrangement of a search.

    Raises:
        ValueError: the step was not compiled.
    """
    if isinstance(found, list):
        every = {_words(one["change"]): one for one in found}
    else:
        every = {"as given": found} | {_words(one["change"]): one for one in found.get("alternatives", ())}
    needed = [one["bytes_per_device"] for one in every.values()]
    if needed[0] is None:
        raise ValueError(
            "--picture shows a compiled step, and this one was not compiled; name a target: --topology v5p:4x4x4"
        )
    plot.draw_memory({name: parts(one) for name, one in every.items()}, path, limit=needed[0]["limit"], title=title)


def show(plan: dict[str, Any], *, as_json: bool) -> None:
    """Prints a plan for people, or as one JSON object."""
    if as_json:
        print(json.dumps(plan))
        return
    model, trained, devices, state = (plan[k] for k in ("model", "trained", "devices", "state_bytes_per_device"))
    mesh = " x ".join(f"{name}={size}" for name, size in devices["mesh"].items())
    table = Table(title="plan", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    rows = {
        "model": f"{model['path']}: {model['family']}, {model['layers']} layers of width {model['width']}, "
        f"{model['parameters']:,} parameters in {model['dtype']}"
        + (f", linear layers in {model['quantize']}" if model["quantize"] else ""),
        "trained": f"{trained['parameters']:,} parameters ({trained['share']:.2%}) in "
        + ", ".join(f"{layer} ({count:,})" for layer, count in list(trained["layers"].items())[:8])
        + (f", and {len(trained['layers']) - 8} more" if len(trained["layers"]) > 8 else ""),
        "devices": f"{devices['count']} x {devices['kind']} ({mesh})",
        "a step": f"{plan['tokens_per_step']:,} tokens, {'at least ' if plan['counted_once'] else ''}"
        f"{plan['flops_per_step']:.3g} FLOPs"
        + (f", {plan['step_seconds_roofline']:.3f} s at the devices' rates" if plan["roofline"] else ""),
        "a device holds": ", ".join(f"{name} {_gib(size)}" for name, size in state.items()),
    }
    if plan["bytes_per_device"]:
        sizes = {name: size for name, size in plan["bytes_per_device"].items() if size is not None}
        rows["a step needs"] = ", ".join(f"{name} {_gib(size)}" for name, size in sizes.items())
        rows["compiles in"] = f"{plan['compile_seconds']} s"
    else:
        rows["a step needs"] = (
            f"not compiled here (more than {COMPILED_UP_TO:.0e} parameters; --topology names a target): activations are not in "
            "the figures"
        )
    if plan["fits"] is not None:
        rows["fits"] = "yes" if plan["fits"] else "no"
    for other in plan.get("alternatives", ()):
        rows[f"with {_words(other['change'])}"] = _needs(other)
    if plan["collectives"]:
        rows["a device sends"] = ", ".join(
            f"{kind['bytes_sent'] / 2**30:.2f} GiB in {kind['count']} x {name}"
            for name, kind in plan["collectives"].items()
        )
    if plan["roofline"] and len(plan["roofline"]) > 1:
        rows["at published rates"] = (
            ", ".join(f"{name} {seconds:.3f} s" for name, seconds in plan["roofline"].items())
            + f": bound by {plan['bound']}"
        )
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table, _layout_table(plan["layout"]))


def show_search(found: list[dict[str, Any]], *, as_json: bool) -> None:
    """Prints what `search` found for people, or as one JSON array."""
    if as_json:
        print(json.dumps(found))
        return
    table = Table("", "needs", "at published rates", title="arrangements, the best first", title_justify="left")
    for one in found:
        seconds = one["step_seconds_roofline"]
        rate = "" if seconds is None else f"{seconds:.3f} s, bound by {one['bound']}"
        table.add_row(*map(escape, (_words(one["change"]), _needs(one), rate)))
    Console().print(table)


def _words(change: dict[str, Any]) -> str:
    """As one would give it on the command line."""
    mesh = lambda sizes: ",".join(f"{axis}={size}" for axis, size in sizes.items())
    return " ".join(f"--{name} {mesh(x) if isinstance(x, dict) else x}" for name, x in change.items())


def _needs(one: dict[str, Any]) -> str:
    needed = one["bytes_per_device"]
    return f"{_gib(needed['total'])} of {_gib(needed['limit'])}: {'fits' if one['fits'] else 'does not fit'}"


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"


def _layout_table(layout: dict[str, dict[str, Any]]) -> Table:
    table = Table("array", "", "shape", "split over", "on a device", title="where arrays lie", title_justify="left")
    for path, array in layout.items():
        split = ", ".join(array["over"]) if set(array["over"]) != {"-"} else "whole"
        shape = f"{array['dtype']}{array['shape']}"
        table.add_row(*map(escape, (path, array["part"], shape, split, _gib(array["bytes_per_device"]))))
    return table
