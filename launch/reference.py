"""The reference's log-probabilities of preference pairs, computed once and kept in a Parquet file.

A row of the file is a pair: `key`, a hash of both sides' tokens, marks and pictures, and `chosen` and `rejected`, the summed
log-probabilities. So pairs are found again in any order, in any mixture, and after others were added; these are then scored. Which
model, precision, tokenizer and template made the numbers stands in the file, and another's are refused.

Every number is written whole or not at all: a run that is stopped while it scores goes on from its last minute.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet
from etils import epath
from jax.experimental import multihost_utils

from jaxmethods import data, sharding, tree
from jaxmethods.launch.files import write_whole
from jaxmethods.objectives import preference
from jaxmethods.tree import Tree

SECONDS = 60.0
"""Between two writings of the file, at least."""
_ABOUT = b"jaxmethods.reference"
_KEY = 16
_Known = dict[bytes, tuple[float, float]]


def kept(
    path: str,
    of_rows: Sequence[Any],
    *,
    known: _Known,
    made_by: Mapping[str, str],
    module: Any,
    params: Tree,
    mesh: Any,
    batch_size: int,
    say: Callable[[str], None] = lambda text: None,
) -> list[Any]:
    """The rows with the arrays `reference_chosen` and `reference_rejected`; pairs that the file lacks are scored and added.

    Args:
        of_rows: what `data.build` returned for the views of `Preference`; None stays None.
        known: what `read` found in the file; new pairs are added to it.
        made_by: the `fingerprint` of module, parameters and tokenizer.
        module, params: the reference; scored in the module's dtype.
        batch_size: pairs scored at once, over all devices.

    Raises:
        ValueError: a log-probability that is not finite.
    """
    file = _File(path, made_by, known)
    score = jax.jit(functools.partial(_score, module), out_shardings=sharding.replicated(mesh))
    start, before, wanted = time.monotonic(), len(known), set[bytes]()
    try:
        for part in (part for rows in of_rows if rows is not None for part in _parts(rows)):
            share = sharding.rows_here(batch_size, mesh)
            for batch in data.evaluation_batches(part, batch_size, share=share):
                keys = _keys(batch, share, batch_size)
                wanted.update(key for key in keys if any(key))
                if all(key in known or not any(key) for key in keys):
                    continue
                logps = jax.device_get(score(params, sharding.place_rows(batch, batch_size, mesh)))
                for key, chosen, rejected in zip(keys, logps.chosen.tolist(), logps.rejected.tolist(), strict=True):
                    if any(key):
                        _require_finite(key, chosen, rejected)
                        known[key] = chosen, rejected
                file.save(at_least=SECONDS)
    finally:
        file.save()
    new = len(known) - before
    say(
        f"reference: {len(wanted):,} pairs, {new:,} of them scored now in {time.monotonic() - start:.0f} s; kept in {path}"
    )
    return [None if rows is None else _mapped(rows, known) for rows in of_rows]


def fingerprint(module: Any, params: Tree, tokenizer: Any) -> dict[str, str]:
    """What the numbers depend on besides a pair itself, by name."""
    text = lambda value: hashlib.blake2b(value.encode(), digest_size=_KEY).hexdigest()
    leaves = tree.flatten(params)
    sums = jax.device_get(_digests(leaves))
    told = [(path, str(x.dtype), x.shape, sums[path].tolist()) for path, x in sorted(leaves.items())]
    return {
        "model": text(repr((getattr(module, "whole", module.config), told))),
        "precision": str(jnp.dtype(module.dtype)),
        "tokenizer": text(tokenizer.backend_tokenizer.to_str()),
        "template": text(str(tokenizer.chat_template)),
    }


@jax.jit
def _digests(leaves: dict[str, Any]) -> dict[str, Any]:
    """Of all leaves by one program: many small ones under way at a time, each with collectives, can wait for each other."""
    return {path: _digest(x) for path, x in leaves.items()}


def _digest(x: Any) -> Any:
    """Two 32-bit sums of mixed bits, each with its place: equal however the array is split over devices."""
    bits = x
    if jnp.issubdtype(x.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    mixed, stride = bits.astype(jnp.uint32), 1
    for axis in reversed(range(x.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        mixed = mixed + place * jnp.uint32(stride * 0x9E3779B1 % 2**32)
        stride *= x.shape[axis]
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # murmur3's last step
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), (mixed * mixed).sum(dtype=jnp.uint32)])


def read(path: str, made_by: Mapping[str, str] | None = None) -> _Known:
    """Key of a pair -> (chosen, rejected); empty where there is no file.

    Raises:
        ValueError: a file of something else, or of another maker; says what differs.
    """
    file = epath.Path(path)
    if not file.exists():
        return {}
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(file.read_bytes()))
        about = json.loads((table.schema.metadata or {})[_ABOUT])
        columns = [table.column(name).to_pylist() for name in ("key", "chosen", "rejected")]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} holds no reference log-probabilities ({error}); give objective.cache another file."
        ) from None
    if made_by is not None and (other := [name for name, value in made_by.items() if about.get(name) != value]):
        raise ValueError(
            f"{path} was made with another {' and another '.join(other)}; give objective.cache another file, or delete this one "
            "to have it made again."
        )
    return dict(zip(columns[0], zip(*columns[1:], strict=True), strict=True))


class _File:
    """The file, written whole by process 0 whenever it is worth it."""

    def __init__(self, path: str, made_by: Mapping[str, str], known: _Known):
        self._path, self._made_by, self._known = path, dict(made_by), known
        self._written, self._when = len(known), time.monotonic()

    def save(self, at_least: float = 0.0) -> None:
        if len(self._known) == self._written or time.monotonic() - self._when < at_least:
            return
        self._written, self._when = len(self._known), time.monotonic()
        if jax.process_index():
            return
        values = np.array(list(self._known.values()), np.float32).reshape(-1, 2)
        keys = pa.array(list(self._known), pa.binary(_KEY))
        table = pa.table({"key": keys, "chosen": values[:, 0], "rejected": values[:, 1]})
        held = io.BytesIO()
        pyarrow.parquet.write_table(table.replace_schema_metadata({_ABOUT: json.dumps(self._made_by)}), held)
        epath.Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, held.getvalue())


def _score(module: Any, params: Tree, batch: Mapping[str, Any]) -> Any:
    sides = tree.unflatten({name: x for name, x in batch.items() if "/" in name})
    return preference.pair_logps(module, params, preference.together(sides["chosen"], sides["rejected"]), None)[0]


def _keys(batch: Mapping[str, np.ndarray], share: Sequence[int], batch_size: int) -> list[bytes]:
    """The key of every row of the global batch; zeros of a row that fills it up."""
    here = np.zeros((batch_size, _KEY), np.uint8)
    for number, place in enumerate(share):
        here[place] = np.frombuffer(_key({name: x[number] for name, x in batch.items()}), np.uint8)
    if jax.process_count() > 1:
        here = multihost_utils.process_allgather(here).max(axis=0)
    return [row.tobytes() for row in here]


def _key(row: Mapping[str, np.ndarray]) -> bytes:
    """A hash of what both sides hold, padding left out."""
    if not row["chosen/segment_ids"].any():
        return bytes(_KEY)
    whole = hashlib.blake2b(digest_size=_KEY)
    for name in sorted(name for name in row if "/" in name):
        side, _, kind = name.partition("/")
        length = int((row[f"{side}/segment_ids"] > 0).sum())
        part = row[name] if kind == "pixels" else row[name][:length]
        whole.update(f"{name} {part.dtype} {part.shape} ".encode() + np.ascontiguousarray(part).tobytes())
    return whole.digest()


def _parts(rows: Any) -> Sequence[Any]:
    """All rows, source by source: a mixture's epoch ends before its longer sources do."""
    return rows.parents if isinstance(rows, data.Mixture) else (rows,)


def _mapped(rows: Any, known: _Known) -> Any:
    def told(row: dict[str, Any]) -> dict[str, Any]:
        chosen, rejected = known[_key(row)]
        return row | {"reference_chosen": np.float32(chosen), "reference_rejected": np.float32(rejected)}

    parts: list[grain.MapDataset] = [part.map(told) for part in _parts(rows)]
    return data.Mixture(parts, rows.weights) if isinstance(rows, data.Mixture) else parts[0]


def _require_finite(key: bytes, chosen: float, rejected: float) -> None:
    if not (math.isfinite(chosen) and math.isfinite(rejected)):
        raise ValueError(
            f"the reference gives pair {key.hex()} the log-probabilities {chosen} and {rejected}; the model's weights or "
            "compute_dtype cannot be right."
        )


__all__ = ["fingerprint", "kept", "read"]
