"""From rows to batches: shuffled, mixed, split among processes; the position in them is one integer.

The global batch is formed first, and each process makes the rows of it that it needs, so any number of processes sees the
same batches:

>>> rows = grain.MapDataset.source([{"tokens": np.array([i])} for i in range(6)])
>>> whole = batches(rows, batch_size=4, seed=1)
>>> halves = [batches(rows, batch_size=4, seed=1, share=share) for share in ([0, 1], [2, 3])]
>>> bool((np.concatenate([half[7]["tokens"] for half in halves]) == whole[7]["tokens"]).all())
True
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Sequence
from typing import Any

import grain
import numpy as np
from etils import epath
from jaxtyping import Int64

from jaxmethods.data.packing import Batch
from jaxmethods.images import TEXT

_AHEAD = 4
"""Batches that are made ahead of the device."""
_FILE = "position.json"


class Mixture(grain.MapDataset):
    """Rows of several sources, taken in turn in proportion to their weights (to within 1%); random-access.

    An epoch ends where one source has been seen once, so no row occurs twice in it. The next epoch goes on
    with the unseen rows of the longer sources.
    """

    def __init__(self, parts: Sequence[grain.MapDataset], weights: Sequence[float]):
        super().__init__(parts)
        if len(parts) != len(weights):
            raise ValueError(f"{len(parts)} sources cannot be mixed by {len(weights)} weights; give each source one.")
        self.weights = tuple(weights)
        self._mixed = grain.MapDataset.mix(parts, self.weights)

    def __len__(self) -> int:
        return len(self._mixed)

    def __getitem__(self, index: Any) -> Any:
        return self._mixed[index]

    def __str__(self) -> str:
        return f"Mixture(weights={self.weights})"


class Batches(grain.IterDataset):
    """This process' part of every batch: iterate over them, or take batch i alone by `batches[i]`.

    Its iterators are `BatchIterator`s.
    """

    def __init__(self, numbered: grain.MapDataset, identity: dict[str, int], writes: bool, threads: int = 1):
        super().__init__(
            numbered.to_iter_dataset(grain.ReadOptions(threads, prefetch_buffer_size=max(_AHEAD, threads)))
        )
        self._numbered = numbered
        self._identity = identity
        self._writes = writes

    def __len__(self) -> int:
        return len(self._numbered)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} batches; none has index {index}.")
        return self._numbered[index]

    def __iter__(self) -> BatchIterator:
        return BatchIterator(iter(self._parent), self._identity, self._writes)

    def __str__(self) -> str:
        return f"Batches({self._identity})"


class BatchIterator(grain.DatasetIterator):
    """Goes through `Batches`; `position` is the number of the batch that comes next.

    An orbax (v1) checkpointable. All processes save the same position, so one of them writes it for all, and
    any number of processes can load it; grain's own iterators write a file a process and load only into as
    many. Loading refuses a position in other data: another number of rows, batch size or seed.
    """

    def __init__(self, parent: grain.DatasetIterator, identity: dict[str, int], writes: bool):
        super().__init__(parent)
        self._identity = identity
        self._writes = writes

    def __next__(self) -> Batch:
        return next(self._parent)

    @property
    def position(self) -> int:
        """How many batches were taken, which is the number of the next one."""
        return int(self.get_state()["next_index"])

    def get_state(self) -> dict[str, Any]:
        return self._parent.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state)

    async def save(self, directory: Any) -> Awaitable[None]:
        """Called by orbax: takes the position now, writes it in the background."""
        text = json.dumps({"next_batch": self.position, **self._identity})

        async def write() -> None:
            if self._writes:
                folder = await directory.await_creation()
                await asyncio.to_thread((folder / _FILE).write_text, text)

        return write()

    async def load(self, directory: epath.Path) -> Awaitable[None]:
        """Called by orbax: reads the position. Raises ValueError where it was saved for other data."""

        async def read() -> None:
            saved = json.loads(await asyncio.to_thread((epath.Path(directory) / _FILE).read_text))
            for name, value in self._identity.items():
                if saved.get(name) != value:
                    raise ValueError(
                        f"the position was saved with {name}={saved.get(name)}, but now {name}={value}, by which "
                        "other batches would follow; restore the old setting, or start a new run."
                    )
            self.set_state({"next_index": saved["next_batch"]})

        return read()

    def __str__(self) -> str:
        return "BatchIterator"


def batches(
    rows: grain.MapDataset,
    *,
    batch_size: int,
    seed: int,
    epochs: int | None = None,
    share: Sequence[int] | None = None,
    writes: bool = True,
    threads: int = 1,
) -> Batches:
    """Batches of shuffled rows for training, without end or for `epochs` passes over the rows.

    Every epoch is a new permutation of all rows; batches go on across the end of an epoch, and only the rows
    behind the last full batch of the last epoch are left out. A batch is a dict of arrays [len(share), ...].

    Args:
        share: which rows of each batch this process makes, by their place in it (`sharding.rows_here`); None: all.
        writes: whether this process writes the position into checkpoints; one must.
        threads: that make batches; one is enough where rows are arrays in memory, several open pictures side by side.

    Raises ValueError where `share` is no part of the batch, or the rows do not make one batch.
    """
    if not len(rows):
        raise ValueError("there are no rows to make batches of.")
    if seed < 0:
        raise ValueError(f"seed={seed} must not be negative.")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs={epochs} must be positive, or None to go on without end.")
    if epochs is not None and len(rows) * epochs < batch_size:
        raise ValueError(
            f"{len(rows)} rows in epochs={epochs} do not fill one batch of batch_size={batch_size}; "
            f"take more epochs, or batch_size={len(rows) * epochs}."
        )
    stream = _shuffled(rows, seed).repeat(epochs)
    part = _Share(stream, batch_size, share)
    identity = {"batch_size": batch_size, "seed": seed, "rows": len(rows)}
    return Batches(part.batch(part.size, drop_remainder=True), identity, writes, threads)


def evaluation_batches(rows: grain.MapDataset, batch_size: int, *, share: Sequence[int] | None = None) -> Batches:
    """Every row exactly once, in order; the last batch is filled up with padding rows (`segment_ids` 0).

    `share` is what it is in `batches`."""
    if not len(rows):
        raise ValueError("there are no rows to make batches of.")
    part = _Share(_Filled(rows, batch_size), batch_size, share)
    return Batches(part.batch(part.size), {"batch_size": batch_size, "rows": len(rows)}, writes=False)


class _Share(grain.MapDataset):
    """One process' rows of every global batch of `batch_size` rows."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, share: Sequence[int] | None):
        super().__init__(rows)
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be positive.")
        self._places = range(batch_size) if share is None else tuple(share)
        if not self._places or min(self._places) < 0 or max(self._places) >= batch_size:
            raise ValueError(
                f"share={list(self._places)} must name some of the batch's rows, 0 to {batch_size - 1} for batch_size={batch_size}."
            )
        self.size = len(self._places)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self.size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self.size)
        return self._parent[batch * self._batch_size + self._places[row]]

    def __str__(self) -> str:
        return f"Share({self.size} rows of {self._batch_size})"


class _Filled(grain.MapDataset):
    """The rows, and behind them rows of padding up to a multiple of the batch size: zeros, and no picture's feature anywhere."""

    def __init__(self, rows: grain.MapDataset, batch_size: int):
        super().__init__(rows)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._parent) // self._batch_size) * self._batch_size

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        if index < len(self._parent):
            return self._parent[index]
        filler = lambda name: TEXT if name.rpartition("/")[2] == "places" else 0
        return {name: np.full_like(value, filler(name)) for name, value in self._parent[0].items()}

    def __str__(self) -> str:
        return f"Filled(to a multiple of {self._batch_size})"


class _Shuffled(grain.MapDataset):
    """The rows in an order that the seed decides, another one in each epoch.

    grain's own `shuffle` is not used: in epoch e it has the order of epoch 0 under seed + e, so that runs with
    neighbouring seeds share orders, and with few rows it is slow (6 ms a row for seven rows, 40 us for a
    thousand). Raw random bits and a stable sort, which numpy promises to keep as they are, make the order the
    same in all versions.
    """

    def __init__(self, rows: grain.MapDataset, *seeds: int):
        super().__init__(rows)
        self._seeds = seeds
        self._held = (-1, np.zeros(0, np.int64))  # the last epoch asked for, and its order

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        epoch, within = divmod(index, len(self))
        return self._parent[epoch * len(self) + int(self._order(epoch)[within])]

    def _order(self, epoch: int) -> Int64[np.ndarray, " rows"]:
        held, order = self._held
        if held != epoch:
            bits = np.random.PCG64(np.random.SeedSequence((*self._seeds, epoch)))
            order = np.argsort(bits.random_raw(len(self)), kind="stable")
            self._held = (epoch, order)
        return order

    def __str__(self) -> str:
        return f"Shuffled({', '.join(map(str, self._seeds))})"


def _shuffled(rows: grain.MapDataset, seed: int) -> grain.MapDataset:
    """The rows shuffled; a mixture by shuffling each source, which keeps its proportions."""
    if isinstance(rows, Mixture):
        return Mixture([_Shuffled(part, seed, number) for number, part in enumerate(rows.parents)], rows.weights)
    return _Shuffled(rows, seed, 0)
