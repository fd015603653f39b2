"""`jaxmethods plan`: what a run is, before it runs. No weight is read and no data is opened."""

from __future__ import annotations

import json
import time
from typing import Any

import jax
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxmethods import quantization, sharding, tree
from jaxmethods.launch import cost
from jaxmethods.launch.assembly import Assembly, assemble, model_shapes
from jaxmethods.launch.config import Run

COMPILED_UP_TO = 2e9
"""A step with more parameters than this is counted and not compiled for the devices at hand."""


def plan(run: Run) -> dict[str, Any]:
    """The run as plain values: model, trained part, bytes and FLOPs of a step on the devices of this machine.

    `bytes_per_device` is the compiler's own report where the step is small enough to compile here, else None;
    `state_bytes_per_device` follows from shapes and shardings alone. `flops_per_step` are counted from the program.

    Raises:
        ValueError, FileNotFoundError: what `train` would refuse about config and model.
    """
    mesh = sharding.make_mesh({"data": run.mesh.data, "fsdp": run.mesh.fsdp, "tensor": run.mesh.tensor})
    assembly = assemble(run, *model_shapes(run), mesh)
    trained, total = (
        tree.count(assembly.state.trained),
        tree.count(assembly.state.trained) + quantization.count(assembly.frozen),
    )
    arguments = (assembly.state, assembly.frozen, assembly.batch())
    counted = cost.count(assembly.step, *arguments)
    bytes_per_device, compile_seconds = None, None
    if total <= COMPILED_UP_TO:
        start = time.perf_counter()
        compiled = assembly.step.lower(*arguments).compile()
        compile_seconds = round(time.perf_counter() - start, 2)
        bytes_per_device = cost.memory(compiled)
    devices = list(mesh.devices.flat)
    peak = cost.peak_flops(devices[0])
    config = assembly.module.config
    return {
        "model": {
            "path": run.model, "family": config.family, "layers": config.num_layers, "width": config.hidden_size,
            "parameters": quantization.count(assembly.base), "dtype": run.param_dtype, "quantize": run.quantize,
        },
        "trained": {"parameters": trained, "share": trained / total, "layers": _layers(assembly)},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "mesh": dict(mesh.shape)},
        "tokens_per_step": run.batch_size * run.data.sequence_length,
        "steps": run.steps,
        "flops_per_step": counted.flops,
        "flops_per_device": counted.flops / len(devices),
        "state_bytes_per_device": {
            "trained": _bytes(assembly.state.trained), "optimizer": _bytes(assembly.state.opt), "frozen": _bytes(assembly.frozen),
        },
        "bytes_per_device": bytes_per_device,
        "compile_seconds": compile_seconds,
        "step_seconds_at_peak": counted.flops / len(devices) / peak if peak else None,
    }  # fmt: skip


def _layers(assembly: Assembly) -> dict[str, int]:
    """Trained parameters by the layer they belong to."""
    found: dict[str, int] = {}
    for path, leaf in tree.flatten(assembly.state.trained).items():
        layer = path.split("/adapter/")[0] if "/adapter/" in path else path.rsplit("/", 1)[0]
        found[layer] = found.get(layer, 0) + tree.count(leaf)
    return found


def _bytes(shapes: tree.Tree) -> int:
    """Bytes on one device, from shapes and shardings."""
    local = lambda x: jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
    return tree.size_in_bytes(jax.tree.map(local, shapes))


def show(plan: dict[str, Any], *, as_json: bool) -> None:
    """Prints a plan for people, or as one JSON object."""
    if as_json:
        print(json.dumps(plan))
        return
    model, trained, devices, state = (plan[k] for k in ("model", "trained", "devices", "state_bytes_per_device"))
    gib = lambda n: f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.1f} MiB"
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
        "a step": f"{plan['tokens_per_step']:,} tokens, {plan['flops_per_step']:.3g} FLOPs"
        + (f", {plan['step_seconds_at_peak']:.3f} s at the devices' peak" if plan["step_seconds_at_peak"] else ""),
        "a device holds": ", ".join(f"{name} {gib(size)}" for name, size in state.items()),
    }
    if plan["bytes_per_device"]:
        rows["a step needs"] = ", ".join(f"{name} {gib(size)}" for name, size in plan["bytes_per_device"].items())
        rows["compiles in"] = f"{plan['compile_seconds']} s"
    else:
        rows["a step needs"] = (
            f"not compiled here (more than {COMPILED_UP_TO:.0e} parameters): activations are not in the figures"
        )
    for name, text in rows.items():
        table.add_row(name, escape(text))
    Console().print(table)
