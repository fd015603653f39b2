"""The names, the shapes and the config of the released code, https://github.com/ZimpleX/SMoRE-LLM.

It saves a PEFT folder: `adapter_config.json` (peft_type "HIER_MOE") and `adapter_model.safetensors`, whose names are
"base_model.model." + the path of a linear map + "." + a name of `from_official`:

    state = split_state(safetensors.numpy.load_file(...))["model.layers.0.mlp.up_proj"]
    spec = spec_from_config(config, {name: array.shape for name, array in state.items()})
    leaves = from_official(state, spec)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmethods.adapters.smore.activations import GATE_ACTIVATIONS, initial_slope
from jaxmethods.adapters.smore.adapter import SMoRE
from jaxmethods.adapters.smore.leaves import Params, init
from jaxmethods.adapters.smore.spec import Spec
from jaxmethods.tree import flatten, require_one_of, unflatten

# Arrays of one linear map ---------------------------------------------------------------------------------------


def from_official(state: Mapping[str, Any], spec: Spec) -> Params:
    """Leaves from the arrays that the released code stores for one linear map.

    `state` maps its names, "moe_A.0" (or "moe_A.default.0", as in its live modules) and so on, to arrays whose matrices
    are [out, in]. Raises ValueError for names that are missing or unknown, for shapes other than `spec` gives, and for
    copies of shared arrays (variant "shared", `tied_down`) that differ.
    """
    arrays = {name.replace(".default", "", 1): jnp.asarray(value) for name, value in state.items()}
    names, copies = _official_names(spec), _copies(spec)
    known = [name for parts in names.values() for name in parts] + list(copies)
    if missing := [name for name in known if name not in arrays]:
        raise ValueError(f"the S'MoRE state lacks {missing[0]!r} ({len(missing)} arrays in all), which {spec} needs.")
    if unknown := [name for name in arrays if name not in known]:
        raise ValueError(
            f"the S'MoRE state holds {unknown[0]!r} ({len(unknown)} such arrays in all), for which {spec} has no place."
        )
    d_in, d_out = arrays["moe_A.0"].shape[-1], arrays["moe_W_final"].shape[0]
    fresh = jax.eval_shape(lambda: to_official(init(jax.random.key(0), d_in, d_out, spec), spec))
    for name, expected in fresh.items():
        if arrays[name].shape != expected.shape:
            raise ValueError(f"{name!r} has shape {arrays[name].shape}, but the spec gives {expected.shape}: {spec}")
    for name, original in copies.items():
        if not np.array_equal(arrays[name], arrays[original]):
            raise ValueError(f'{name!r} differs from {original!r}: not of variant="shared", whose layers share them.')

    flat = {}
    for path, parts in names.items():
        leaves = [arrays[name] for name in parts]
        if path.startswith("experts/a/"):  # [s_l, r_l, ...] of each layer
            if spec.tied_down:
                if not np.array_equal(leaves[0], jnp.broadcast_to(leaves[0][:1], leaves[0].shape)):
                    raise ValueError(f"{parts[0]!r} differs between experts, which tied_down=True does not allow.")
                leaves = [leaves[0][:1]]
            leaves = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in leaves]
        leaf = jnp.concatenate(leaves) if len(leaves) > 1 else leaves[0]
        flat[path] = leaf.swapaxes(-1, -2) if path.endswith("kernel") else leaf
    return unflatten(flat)


def to_official(params: Params, spec: Spec) -> dict[str, Array]:
    """Undoes `from_official`: arrays that layers or experts share are written once for each."""
    flat, state = flatten(params), dict[str, Array]()
    for path, parts in _official_names(spec).items():
        leaf = flat[path].swapaxes(-1, -2) if path.endswith("kernel") else flat[path]
        leaves = [leaf]
        if path.startswith("experts/a/"):
            blocks = jnp.split(leaf, np.cumsum(spec.down_sizes)[:-1])
            shapes = [(spec.experts[pool], spec.ranks[pool], *leaf.shape[1:]) for pool in spec.pools]
            leaves = [
                jnp.broadcast_to(block.reshape(-1, *shape[1:]), shape)
                for block, shape in zip(blocks, shapes, strict=True)
            ]
        elif path == "experts/slope":
            leaves = jnp.split(leaf, spec.layers)
        state |= dict(zip(parts, leaves, strict=True))
    return state | {name: state[original] for name, original in _copies(spec).items()}


def _official_names(spec: Spec) -> dict[str, list[str]]:
    """For each of our leaves the official arrays it is made of, one or one a layer."""
    every = range(spec.layers)
    names = {
        "experts/a/kernel": [f"moe_A.{pool}" for pool in spec.pools],
        "experts/a/bias": [f"moe_A_bias.{pool}" for pool in spec.pools],
        "experts/proj/kernel": ["moe_W_final"],
        "experts/proj/bias": ["moe_W_final_bias"],
        "router/down/kernel": ["moe_downproj_x.weight"],
        "router/down/bias": ["moe_downproj_x.bias"],
    }
    for layer in every:
        gate, official = f"router/gate/{layer}", f"moe_gate.{layer}"
        names |= {
            f"{gate}/hidden/kernel": [f"{official}.mlp.0.weight"],
            f"{gate}/hidden/bias": [f"{official}.mlp.0.bias"],
            f"{gate}/query/kernel": [f"{official}.mlp.2.weight"],
            f"{gate}/query/bias": [f"{official}.mlp.2.bias"],
            f"{gate}/keys": [f"{official}.keys"],
        }
        if layer in spec.pools:
            names[f"experts/b/{layer}/kernel"] = [f"moe_B.{layer}"]
            names[f"experts/b/{layer}/bias"] = [f"moe_B_bias.{layer}"]
        if layer:
            names[f"experts/w/{layer}/kernel"] = [f"moe_W.{layer}"]
            names[f"experts/w/{layer}/bias"] = [f"moe_W_bias.{layer}"]
        if spec.gate == "noisy_topk":
            names[f"{gate}/noise/kernel"] = [f"{official}.weight_noise.weight"]
    if spec.activation.startswith("prelu"):
        names["experts/slope"] = [f"moe_expert_act_param.{layer}" for layer in every]
    return names


def _copies(spec: Spec) -> dict[str, str]:
    """Copy -> original: with one pool for all layers, its arrays stand in the file under each layer."""
    layers = [layer for layer in range(spec.layers) if layer not in spec.pools]
    names = ("moe_A", "moe_A_bias", "moe_B", "moe_B_bias")
    return {f"{name}.{layer}": f"{name}.{spec.pool(layer)}" for name in names for layer in layers}


# A checkpoint of a whole model ----------------------------------------------------------------------------------

_PREFIX = "base_model.model."


def split_state(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The arrays of a checkpoint by the path of their linear map.

    >>> split_state({"base_model.model.model.layers.0.mlp.up_proj.moe_A.1": 5})
    {'model.layers.0.mlp.up_proj': {'moe_A.1': 5}}

    Raises ValueError for a name that is not of an adapted linear map.
    """
    states: dict[str, dict[str, Any]] = {}
    for name, array in arrays.items():
        path, found, rest = name.removeprefix(_PREFIX).partition(".moe_")
        if not (name.startswith(_PREFIX) and found):
            raise ValueError(f"{name!r} is not an array of a S'MoRE adapter; these are called {_PREFIX}PATH.moe_NAME.")
        states.setdefault(path, {})[f"moe_{rest}"] = array
    return states


def join_state(states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Undoes `split_state`."""
    return {f"{_PREFIX}{path}.{name}": array for path, state in states.items() for name, array in state.items()}


_POSITIONS = {
    "full": ("all", False),
    "star": ("child_v2", False),
    "child": ("child", False),
    "shared": ("all", True),
}
"""Variant -> (activation_position, is_shared_expert_pool)."""


def spec_from_config(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> SMoRE:
    """The spec of one linear map from `adapter_config.json`.

    A `dim_downproj_x` of 0 or less stands for the map's own input width, as in the released code, so that maps of
    different widths then have different specs.

    Args:
        config: the file's content. Fields added in later releases may be missing.
        shapes: of the map's arrays, by their names; they are checked by `from_official`.

    Raises:
        ValueError: fields that are missing, or ask for something that has no place here.
    """
    require_one_of("peft_type", config.get("peft_type", ""), ("HIER_MOE",))
    require_one_of("moe_arch", config.get("moe_arch", ""), ("smore",))
    required = ("num_experts", "num_active", "expert_dims", "gate_dims", "gate_type", "dim_downproj_x", "expert_act_fn")
    if missing := [name for name in required if name not in config]:
        raise ValueError(f"adapter_config.json lacks {', '.join(missing)}.")
    gate_arch = config.get("gate_arch", "mlp")
    if gate_arch != "mlp" and (config["gate_type"], gate_arch) != (
        "noisy_topk",
        "linear",
    ):  # which is an MLP all the same
        raise ValueError(f'gate_arch={gate_arch!r} has no counterpart here; only "mlp" has.')
    gate_activation = config.get("gate_act_fn", "relu")
    require_one_of("gate_act_fn", gate_activation, GATE_ACTIVATIONS)
    position = config.get("activation_position", "all"), bool(config.get("is_shared_expert_pool", False))
    variants = {position: variant for variant, position in _POSITIONS.items()}
    if position not in variants:
        raise ValueError(
            f"activation_position={position[0]!r} with is_shared_expert_pool={position[1]} has no counterpart here; "
            f"known are {', '.join(map(str, variants))}."
        )
    ranks, gate_dims = tuple(config["expert_dims"]), tuple(config["gate_dims"])
    alpha, router_dim = config.get("lora_alpha"), config["dim_downproj_x"]
    if alpha is not None and len(alpha) != len(ranks):
        raise ValueError(f"lora_alpha={alpha} has {len(alpha)} entries but expert_dims={list(ranks)} has {len(ranks)}.")
    if router_dim is None or router_dim <= 0:
        router_dim = shapes["moe_A.0"][-1]
    return SMoRE(
        experts=tuple(config["num_experts"]),
        fanout=tuple(config["num_active"]),
        ranks=ranks,
        gate=config["gate_type"],
        gate_dim=gate_dims[0] if len(set(gate_dims)) == 1 and len(gate_dims) == len(ranks) else gate_dims,
        router_dim=router_dim,
        activation=config["expert_act_fn"],
        variant=variants[position],
        scale=None if alpha is None else tuple(a / r for a, r in zip(alpha, ranks, strict=True)),
        initialization=config.get("init_method", "b_zero"),
        balance_weight=config.get("balance_loss_weight", 0.01),
        gate_activation=gate_activation,
    )


def config_from_spec(spec: Spec, target_modules: Sequence[str]) -> dict[str, Any]:
    """The content of `adapter_config.json` with which the released code builds `spec` on the modules named.

    It has no word for `tied_down`; the experts then own copies of A, as `to_official` writes them.
    """
    position, shared = _POSITIONS[spec.variant]
    activation = spec.activation
    if activation.startswith("prelu"):
        activation = f"prelu|{initial_slope(activation)}"
    alpha = None if spec.scale is None else [scale * r for scale, r in zip(spec.scale, spec.ranks, strict=True)]
    return {
        "activation_position": position,
        "auto_mapping": None,
        "balance_loss_weight": spec.balance_weight,
        "base_model_name_or_path": "",
        "bias": "none",
        "dim_downproj_x": spec.router_dim,
        "exclude_modules": None,
        "expert_act_fn": activation,
        "expert_dims": list(spec.ranks),
        "gate_act_fn": spec.gate_activation,
        "gate_arch": "mlp",
        "gate_dims": list(spec.gate_dims),
        "gate_type": spec.gate,
        "inference_mode": True,
        "init_method": spec.initialization,
        "init_moe_weights": True,
        "is_shared_expert_pool": shared,
        "layer_forward_mode": "subgraph",
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_scaling": None,
        "modules_to_save": None,
        "moe_arch": "smore",
        "moe_dropout": 0.0,
        "num_active": list(spec.children),
        "num_experts": list(spec.experts),
        "peft_type": "HIER_MOE",
        "revision": None,
        "target_modules": list(target_modules),
        "task_type": "CAUSAL_LM",
    }
