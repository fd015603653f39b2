"""Adapters in and out of PEFT's layout: a folder with `adapter_config.json` and `adapter_model.safetensors`.

LoRA, rsLoRA and DoRA are PEFT's own. S²FT is written as the LoRA it is (https://arxiv.org/abs/2412.06289, section 4.3): one of its
factors selects channels, so whatever serves LoRA serves it. S'MoRE is written as its released code does, which adds the type
HIER_MOE to PEFT. A folder never holds the base model; it names it.

Linear maps are called by their path with dots, the number of the layer behind the part that is stacked: a kernel
`model/layers/mlp/up_proj/kernel` [layers, d_in, d_out] is `base_model.model.model.layers.{i}.mlp.up_proj`, as in transformers.
"""

from __future__ import annotations

import collections
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from jaxmethods import quantization, tree
from jaxmethods.adapters.attach import adapted_layers, attach, layers, leaves_of
from jaxmethods.adapters.base import AnyAdapter
from jaxmethods.adapters.files import check, read_folder, write_folder
from jaxmethods.adapters.lora import DoRA, LoRA
from jaxmethods.adapters.smore import SMoRE, official
from jaxmethods.tree import Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def save_peft(
    path: Any, adapted: Any, params: Tree, *, base_model: str | None = None, revision: str | None = None
) -> None:
    """Writes the adapters of a model as a new PEFT folder, float32.

    Args:
        path: the folder; it must not exist.
        base_model: name or path of the base model, for whoever opens the folder.
        revision: of the base model.

    Raises:
        FileExistsError: `path` exists.
        ValueError: adapters that have no common place in PEFT: of other kinds, S'MoRE beside others, DoRA beside others,
            two on one layer.
    """
    pairs = adapted_layers(adapted, params)
    if any(isinstance(adapter, SMoRE) for _, adapter in pairs):
        config, arrays = _smore_out(pairs, params)
    else:
        config, arrays = _lora_out(pairs, params)
    config |= {
        "base_model_name_or_path": base_model,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    content = {name: np.ascontiguousarray(np.asarray(x, np.float32)) for name, x in arrays.items()}
    text = json.dumps(dict(sorted(config.items())), indent=2) + "\n"
    write_folder(path, {CONFIG: text.encode(), WEIGHTS: save(content, {"format": "pt"})})


def load_peft(path: Any, module: Any, base_params: Tree) -> tuple[Any, Tree]:
    """The module with the adapters of a PEFT folder attached, and its parameters, adapters' leaves in float32.

    Layers of one stack may differ in rank, or be left out: they are filled up with zeros, which change nothing.

    Args:
        path: a folder that PEFT, the released code of S'MoRE, or `save_peft` wrote.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: a type or option that has no place here, or an adapter of another base: the first array whose name or
            shape does not fit is named.
    """
    config, arrays = read_folder(path, CONFIG, WEIGHTS, f"a PEFT adapter is a folder with {CONFIG} and {WEIGHTS}")
    places = {name: place for layer, shape in layers(base_params).items() for name, place in _names(layer, shape)}
    kind = config.get("peft_type")
    tree.require_one_of("peft_type", str(kind), ("LORA", "HIER_MOE"))
    pairs, leaves = (_lora_in if kind == "LORA" else _smore_in)(config, arrays, places, tree.flatten(base_params))
    adapted = attach(module, pairs)
    check(leaves, adapted, base_params, str(path))
    return adapted, tree.unflatten(
        tree.flatten(base_params) | {name: jnp.asarray(leaf) for name, leaf in leaves.items()}
    )


Place = tuple[str, int | None]
"""A layer's path, and which of its stack (None: it is not stacked)."""


def _names(layer: str, shape: Sequence[int]) -> Iterator[tuple[str, Place]]:
    """The dotted name of each linear map of a layer."""
    if len(shape) == 2:
        yield layer.replace("/", "."), (layer, None)
        return
    head, found, tail = layer.partition("/layers/")
    if not found:
        head, _, tail = layer.partition("/")
        found = "/"
    for number in range(shape[0]):
        yield f"{head}{found}{number}/{tail}".replace("/", "."), (layer, number)


# LoRA and what equals it ----------------------------------------------------------------------------------------


def _lora_out(pairs: list[tuple[str, AnyAdapter]], params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    flat, arrays = tree.flatten(params), {}
    written: dict[str, tuple[int, float]] = {}  # layer -> rank and alpha
    if twice := [layer for layer, n in collections.Counter(layer for layer, _ in pairs).items() if n > 1]:
        raise ValueError(
            f"layer {twice[0]!r} has several adapters, which one PEFT folder cannot hold; merge one of them."
        )
    if len({isinstance(adapter, DoRA) for _, adapter in pairs}) > 1:
        raise ValueError(
            "PEFT takes DoRA for all layers or for none; adapters.save (--format adapter) holds any mixture."
        )
    rslora = all(getattr(adapter, "rslora", False) for _, adapter in pairs)
    for layer, adapter in pairs:
        if not hasattr(adapter, "as_lora"):
            raise ValueError(
                f"a {adapter.kind!r} adapter (on {layer!r}) has no equal LoRA; save it with adapters.save."
            )
        leaves, kernel = leaves_of(flat, layer, adapter), quantization.kernel_in(flat, layer)
        convert = adapter.as_lora
        for _ in kernel.shape[2:]:
            convert = jax.vmap(convert)
        a, b = convert(leaves, kernel)
        rank, scale = a.shape[-1], getattr(adapter, "scale", 1.0)
        written[layer] = rank, scale * (math.sqrt(rank) if rslora else rank)
        for name, (_, number) in _names(layer, kernel.shape):
            own = lambda leaf, number=number: leaf if number is None else leaf[number]
            arrays[f"{_PREFIX}{name}.lora_A.weight"] = own(a).T
            arrays[f"{_PREFIX}{name}.lora_B.weight"] = own(b).T
            if isinstance(adapter, DoRA):
                arrays[f"{_PREFIX}{name}.lora_magnitude_vector"] = own(leaves["magnitude"])
    (rank, alpha), _ = collections.Counter(written.values()).most_common(1)[0]
    suffixes = _suffixes(list(written), list(layers(params)))
    return {
        "peft_type": "LORA", "r": rank, "lora_alpha": alpha,
        "lora_dropout": max(getattr(adapter, "dropout", 0.0) for _, adapter in pairs),
        "target_modules": sorted(suffixes.values()),
        "rank_pattern": {suffixes[layer]: r for layer, (r, _) in written.items() if r != rank},
        "alpha_pattern": {suffixes[layer]: a for layer, (_, a) in written.items() if a != alpha},
        "use_rslora": rslora, "use_dora": isinstance(pairs[0][1], DoRA),
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
    }, arrays  # fmt: skip


def _suffixes(chosen: list[str], every: list[str]) -> dict[str, str]:
    """For each chosen layer the shortest end of its name that no layer but it has; PEFT matches ends."""
    found = {}
    for layer in chosen:
        parts = layer.split("/")
        ends = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
        end = next(e for e in ends if [x for x in every if f"/{x}".endswith(f"/{e}")] == [layer])
        found[layer] = end.replace("/", ".")
    return found


def _lora_in(
    config: Mapping[str, Any], arrays: dict[str, Any], places: dict[str, Place], flat: dict[str, Any]
) -> tuple[dict[str, AnyAdapter], dict[str, Any]]:
    for option, usual in (("bias", "none"), ("fan_in_fan_out", False), ("modules_to_save", None), ("lora_bias", False)):
        if config.get(option, usual) not in (usual, [], None):
            raise ValueError(f"{CONFIG}: {option}={config[option]!r} is not supported; only {usual!r} is.")
    kind = DoRA if config.get("use_dora") else LoRA
    rslora = bool(config.get("use_rslora"))
    by_adapter: dict[AnyAdapter, list[str]] = {}
    leaves: dict[str, Any] = {}
    for layer, maps in _lora_maps(config, arrays, places, flat).items():
        # One adapter for the whole stack: of the largest rank and scale, which B makes up for where a map has less.
        rank, scale = max(part.a.shape[0] for part in maps.values()), max(part.scale for part in maps.values()) or 1.0
        alpha = scale * (math.sqrt(rank) if rslora else rank)
        adapter = kind(rank=rank, alpha=alpha, dropout=config.get("lora_dropout", 0.0), rslora=rslora)
        by_adapter.setdefault(adapter, []).append(layer)
        *stack, d_in, d_out = quantization.shape_in(flat, layer)
        own = {"a": np.zeros((*stack, d_in, rank), np.float32), "b": np.zeros((*stack, rank, d_out), np.float32)}
        if kind is DoRA:  # a map without an adapter keeps the lengths of its own columns
            kernel = np.asarray(quantization.kernel_in(flat, layer), np.float32)
            own["magnitude"] = np.sqrt(np.square(kernel).sum(-2))
        for number, part in maps.items():
            at, r = () if number is None else number, part.a.shape[0]
            own["a"][at][:, :r], own["b"][at][:r] = part.a.T, part.b.T * np.float32(part.scale / scale)
            if kind is DoRA:
                own["magnitude"][at] = part.magnitude
        leaves |= {f"{layer}/adapter/{kind.kind}/{name}": leaf for name, leaf in own.items()}
    return {_pattern(chosen): adapter for adapter, chosen in by_adapter.items()}, leaves


class _LoRAMap(NamedTuple):
    """What a folder says of one linear map."""

    a: np.ndarray  # [rank, d_in]
    b: np.ndarray  # [d_out, rank]
    magnitude: np.ndarray | None  # [d_out], of DoRA
    scale: float


def _lora_maps(
    config: Mapping[str, Any], arrays: dict[str, Any], places: dict[str, Place], flat: dict[str, Any]
) -> dict[str, dict[int | None, _LoRAMap]]:
    """By layer, then number in its stack. Raises ValueError for the first array that does not fit the model."""
    found: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)  # of each map: A, B, magnitude_vector
    for name, array in arrays.items():
        match = re.fullmatch(
            r"(?:base_model\.model\.)?(.+)\.lora_(A|B|magnitude_vector)(?:\.default)?(?:\.weight)?", name
        )
        if match is None:
            raise ValueError(f"{WEIGHTS}: {name!r} is no LoRA factor, and has no place here.")
        target, part = match[1], match[2]
        if target not in places:
            raise ValueError(
                f"{WEIGHTS}: {name!r} is of a layer that this model does not have; it is an adapter of another base."
            )
        d_in, d_out = quantization.shape_in(flat, places[target][0])[-2:]
        rank = array.shape[1 if part == "B" else 0]
        wanted = {"A": (rank, d_in), "B": (d_out, rank), "magnitude_vector": (d_out,)}[part]
        if array.shape != wanted:
            raise ValueError(
                f"{WEIGHTS}: {name!r} has shape {array.shape}; this model makes it {wanted}: it is an adapter of another base."
            )
        found[target][part] = np.asarray(array, np.float32)
    maps: dict[str, dict[int | None, _LoRAMap]] = collections.defaultdict(dict)
    for target, parts in found.items():
        layer, number = places[target]
        wanted_parts = ("A", "B", "magnitude_vector") if config.get("use_dora") else ("A", "B")
        if missing := [part for part in wanted_parts if part not in parts]:
            raise ValueError(f"{WEIGHTS}: layer {layer!r} ({number}) lacks its lora_{missing[0]}.")
        rank = parts["A"].shape[0]
        if parts["B"].shape[1] != rank:
            raise ValueError(f"{WEIGHTS}: {target!r} has rank {rank} in lora_A and {parts['B'].shape[1]} in lora_B.")
        alpha = _by_pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", 8))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        maps[layer][number] = _LoRAMap(parts["A"], parts["B"], parts.get("magnitude_vector"), scale)
    return maps


def _by_pattern(patterns: Mapping[str, float] | None, name: str, usual: float) -> float:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    return next(
        (value for pattern, value in (patterns or {}).items() if re.match(rf"(.*\.)?({pattern})$", name)), usual
    )


def _pattern(chosen: list[str]) -> str:
    return f"^({'|'.join(map(re.escape, chosen))})$"


# S'MoRE ---------------------------------------------------------------------------------------------------------


def _smore_out(pairs: list[tuple[str, AnyAdapter]], params: Tree) -> tuple[dict[str, Any], dict[str, Any]]:
    specs = {adapter for _, adapter in pairs}
    if len(specs) > 1:
        raise ValueError(
            "a PEFT folder of S'MoRE holds one spec and no other adapter; adapters.save (--format adapter) holds any."
        )
    flat, states, spec = tree.flatten(params), {}, pairs[0][1]
    for layer, _ in pairs:
        leaves = leaves_of(flat, layer, spec)
        for name, (_, number) in _names(layer, flat[f"{layer}/kernel"].shape):
            own = leaves if number is None else jax.tree.map(lambda leaf, n=number: leaf[n], leaves)
            states[name] = official.to_official(own, spec)
    targets = _suffixes([layer for layer, _ in pairs], list(layers(params)))
    return dict(official.config_from_spec(spec, sorted(targets.values()))), official.join_state(states)


def _smore_in(
    config: Mapping[str, Any], arrays: dict[str, Any], places: dict[str, Place], flat: dict[str, Any]
) -> tuple[dict[str, AnyAdapter], dict[str, Any]]:
    by_spec: dict[SMoRE, list[str]] = {}
    found: dict[str, dict[int | None, Tree]] = collections.defaultdict(dict)
    specs: dict[str, SMoRE] = {}
    for target, state in official.split_state(arrays).items():
        if target not in places:
            raise ValueError(
                f"{WEIGHTS}: {target!r} is a layer that this model does not have; it is an adapter of another base."
            )
        layer, number = places[target]
        spec = official.spec_from_config(config, {name: x.shape for name, x in state.items()})
        d_in, d_out = quantization.shape_in(flat, layer)[-2:]
        for name, width in (("moe_A.0", d_in), ("moe_W_final", d_out)):
            got = state[name].shape[-1 if name == "moe_A.0" else 0] if name in state else None
            if got != width:
                raise ValueError(
                    f"{WEIGHTS}: '{target}.{name}' is {got} wide; this model makes it {width}: it is an adapter of another "
                    "base."
                )
        found[layer][number] = official.from_official({k: np.asarray(v, np.float32) for k, v in state.items()}, spec)
        specs[layer] = spec
    leaves: dict[str, Any] = {}
    for layer, parts in found.items():
        by_spec.setdefault(specs[layer], []).append(layer)
        *stack, _, _ = flat[f"{layer}/kernel"].shape
        if stack and (missing := set(range(stack[0])) - {n for n in parts if n is not None}):
            raise ValueError(
                f"{WEIGHTS} has no S'MoRE for {layer!r} in layer {min(missing)}; it must be in all layers or none."
            )
        own = jax.tree.map(lambda *x: jnp.stack(x), *(parts[n] for n in range(stack[0]))) if stack else parts[None]
        leaves |= {f"{layer}/adapter/smore/{name}": leaf for name, leaf in tree.flatten(own).items()}
    return {_pattern(chosen): spec for spec, chosen in by_spec.items()}, leaves
