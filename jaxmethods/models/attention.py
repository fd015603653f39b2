"""Attention of a model whose arrays lie on a mesh: each device attends from its rows, tokens and heads."""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from jaxmethods.kernels.attention import attention, splash
from jaxmethods.sharding import tokens_spec


def attention_on(
    mesh: Mesh | None,
    q: Float[Array, "batch time heads head_dim"],
    k: Float[Array, "batch source kv_heads head_dim"],
    v: Float[Array, "batch source kv_heads head_dim"],
    *,
    q_positions: Array,
    kv_positions: Array,
    q_segment_ids: Array,
    kv_segment_ids: Array,
    window: int | Array | None,
    softcap: float | None,
    scale: float | None,
    implementation: str | None,
) -> Float[Array, "batch time heads head_dim"]:
    """`kernels.attention` under `jax.shard_map`; no mesh, or one device: the op itself.

    Rows lie over `data` and `fsdp`, heads over `tensor`. Queries stay split over `sequence`; keys and values of the row are
    gathered over it, and their gradients scattered. A ring of devices that pass keys on would send as many bytes; gathering
    needs room for one layer's keys and values of whole rows instead (Llama-3-8B, 131,072 tokens, bfloat16: 0.5 GiB a row), is
    one operation that the compiler can start early, and leaves the op as it is. With causal attention the devices that hold
    the ends of rows have the most to do, in both ways.

    An axis of the mesh that does not divide is left out: its devices do the same. More devices along `tensor` than there are
    key-value heads share them.
    """
    places: dict[str, Any] = {"q_positions": q_positions, "kv_positions": kv_positions,
                              "q_segment_ids": q_segment_ids, "kv_segment_ids": kv_segment_ids}  # fmt: skip
    options: dict[str, Any] = {"softcap": softcap, "scale": scale}
    if mesh is None or mesh.size == 1:
        return attention(q, k, v, **places, window=window, implementation=implementation, **options)
    rows, tokens = tokens_spec(q.shape, mesh)
    heads, kv_heads, ways = q.shape[2], k.shape[2], mesh.shape["tensor"]
    over = "tensor" if kv_heads % ways == 0 else None
    shares = over is None and heads % ways == 0 and ways % kv_heads == 0

    def own(q: Array, k: Array, v: Array, places: dict[str, Any], given: Any) -> Array:
        if shares:
            first = jax.lax.axis_index("tensor") * kv_heads // ways
            k, v = (jax.lax.dynamic_slice_in_dim(x, first, 1, axis=2) for x in (k, v))
        if tokens is not None:
            k, v = (jax.lax.all_gather(x, tokens, axis=1, tiled=True) for x in (k, v))
        if implementation == "splash":
            return splash.apply(given, q, k, v, places["q_segment_ids"], places["kv_segment_ids"], scale=factor)
        fixed = window if given is None else given
        return attention(q, k, v, **places, window=fixed, implementation=implementation, **options)

    given, of_given = window if isinstance(window, jax.Array) else None, P()
    if implementation == "splash":  # its blocks to visit differ from device to device, and so it is an argument
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        parts, own_heads = (mesh.shape["sequence"] if tokens else 1), heads // (ways if over or shares else 1)
        given = splash.kernel(own_heads, q.shape[1], window=window, softcap=softcap, shards=parts)
        of_given = given.manual_sharding_spec(NamedSharding(mesh, P(None, tokens)))
    of_q, of_kv = P(rows, tokens, "tensor" if shares else over), P(rows, tokens, over)
    of_places = {name: P(rows, tokens) if name.startswith("q_") else P(rows) for name in places}
    sharded = jax.shard_map(
        own, mesh=mesh, in_specs=(of_q, of_kv, of_kv, of_places, of_given), out_specs=of_q,
        check_vma=implementation not in ("splash", "cudnn"),  # libraries' kernels do not say over which axes their results vary
    )  # fmt: skip
    return sharded(q, k, v, places, given)
