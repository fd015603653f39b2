"""Batches: every row once an epoch, the same for any number of processes, the same after a restart."""

import asyncio
import itertools
import json

import grain
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from jaxmethods.data import BatchIterator, Mixture, batches, evaluation_batches


def numbered(count, first=0):
    """Rows that say which they are; as real rows are, dicts of arrays."""
    return grain.MapDataset.source(
        [{"tokens": np.full(3, first + i, np.int32), "segment_ids": np.ones(3, np.int32)} for i in range(count)]
    )


def taken(stream, count):
    """The numbers of the rows in the first `count` batches."""
    return [batch["tokens"][:, 0].tolist() for batch in itertools.islice(stream, count)]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_every_epoch_has_every_row_once_in_an_order_of_its_own():
    for count, size in ((12, 4), (7, 3), (1, 2), (5, 8)):
        order = flat(taken(batches(numbered(count), batch_size=size, seed=0), 12 * count))
        epochs = [tuple(order[start : start + count]) for start in range(0, 6 * count, count)]
        assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
        assert len(set(epochs)) > 1 or count == 1


def test_the_seed_decides_the_order():
    def order(seed, rows=20):
        return taken(batches(numbered(rows), batch_size=5, seed=seed), 12)

    assert order(3) == order(3)
    orders = [order(seed) for seed in range(4)]
    epochs = {tuple(flat(some[start : start + 4])) for some in orders for start in (0, 4, 8)}
    assert len(epochs) == 12  # nor is the second epoch of one seed the first of the next


def test_the_order_is_the_same_in_all_versions():
    """A saved position means nothing if the order behind it changes: two epochs of seed 3, as first released."""
    order = flat(taken(batches(numbered(6), batch_size=6, seed=3), 2))
    assert order == [0, 4, 1, 5, 3, 2, 3, 5, 1, 2, 4, 0]


def test_batches_go_on_across_epochs_and_the_end_is_left_out():
    stream = batches(numbered(5), batch_size=4, seed=0, epochs=3)
    assert len(stream) == 3 and len(list(stream)) == 3
    rows = flat(taken(stream, 9))
    assert sorted(rows[:5]) == sorted(rows[5:10]) == list(range(5)) and len(rows) == 12


def contiguous(size, index, count):
    """The rows of part `index` of `count`."""
    return range(index * size // count, (index + 1) * size // count)


def test_a_share_is_any_rows_of_the_batch_in_its_own_order():
    whole = batches(numbered(11), batch_size=8, seed=5)
    part = batches(numbered(11), batch_size=8, seed=5, share=[1, 4, 6])
    for number in range(4):
        assert np.array_equal(part[number]["tokens"], whole[number]["tokens"][[1, 4, 6]])


def test_processes_see_their_parts_of_the_same_batches():
    whole = batches(numbered(11), batch_size=8, seed=5)
    for count in (1, 2, 4, 8):
        parts = [iter(batches(numbered(11), batch_size=8, seed=5, share=contiguous(8, i, count))) for i in range(count)]
        for number, batch in enumerate(itertools.islice(whole, 5)):
            shares = [next(part) for part in parts]
            assert all(share["tokens"].shape == (8 // count, 3) for share in shares)
            for name in batch:
                assert np.array_equal(np.concatenate([share[name] for share in shares]), batch[name])
                assert np.array_equal(whole[number][name], batch[name])


def test_resuming_at_any_position_with_any_number_of_processes():
    rows = numbered(7)
    order = taken(batches(rows, batch_size=4, seed=2), 12)
    for position in range(9):
        iterator = iter(batches(rows, batch_size=4, seed=2))
        assert taken(iterator, position) == order[:position]
        state = json.loads(json.dumps(iterator.get_state()))
        assert iterator.position == position and list(state.values()) == [position]  # one integer
        for count in (1, 2, 4):
            shares = []
            for index in range(count):
                part = iter(batches(rows, batch_size=4, seed=2, share=contiguous(4, index, count)))
                next(part)  # wherever it stood
                part.set_state(state)
                assert part.position == position
                shares.append(taken(part, 3))
            assert [flat(parts) for parts in zip(*shares, strict=True)] == order[position : position + 3]


def test_checkpoints_move_between_process_counts(tmp_path):
    """Through orbax: saved by one process, loaded by each of one, two and four."""
    rows = numbered(10)
    iterator = iter(batches(rows, batch_size=4, seed=1))
    taken(iterator, 3)
    ocp.save_checkpointables(tmp_path / "step", {"data": iterator})
    expected = taken(iterator, 2)
    for count in (1, 2, 4):
        shares = []
        for index in range(count):
            part = iter(batches(rows, batch_size=4, seed=1, share=contiguous(4, index, count)))
            assert isinstance(part, BatchIterator) and isinstance(part, grain.DatasetIterator)
            ocp.load_checkpointables(tmp_path / "step", {"data": part})
            assert part.position == 3
            shares.append(taken(part, 2))
        assert [flat(parts) for parts in zip(*shares, strict=True)] == expected


class Folder:
    """What orbax hands to `save`: a folder in the making."""

    def __init__(self, path):
        self.path = path

    async def await_creation(self):
        return self.path


def save(iterator, path):
    async def run():
        await (await iterator.save(Folder(path)))

    asyncio.run(run())


def load(iterator, path):
    async def run():
        await (await iterator.load(path))

    asyncio.run(run())


def test_one_process_writes_the_position_for_all(tmp_path):
    def parts():
        share = lambda i: {"share": contiguous(4, i, 2), "writes": i == 0}
        return [iter(batches(numbered(9), batch_size=4, seed=1, **share(i))) for i in (0, 1)]

    first, second = parts()
    taken(first, 2), taken(second, 2)
    save(second, tmp_path)
    assert not list(tmp_path.iterdir())
    save(first, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    for part in parts():
        load(part, tmp_path)
        assert part.position == 2


def test_a_position_in_other_data_is_refused(tmp_path):
    iterator = iter(batches(numbered(9), batch_size=4, seed=1))
    taken(iterator, 2)
    save(iterator, tmp_path)
    for rows, size, seed, message in (
        (9, 2, 1, "batch_size=4, but now batch_size=2"),
        (9, 4, 2, "seed=1, but now seed=2"),
        (8, 4, 1, "rows=9, but now rows=8"),
    ):
        with pytest.raises(ValueError, match=f"saved with {message}"):
            load(iter(batches(numbered(rows), batch_size=size, seed=seed)), tmp_path)


def test_mixtures_keep_their_proportions_everywhere():
    rows = Mixture([numbered(300), numbered(100, first=1000), numbered(50, first=2000)], [5.0, 2.0, 1.0])
    stream = batches(rows, batch_size=8, seed=0)
    order = np.array(flat(taken(stream, 200)))
    source = order // 1000
    for start in (0, 37, 803):  # any stretch, not only on average
        counts = np.bincount(source[start : start + 400], minlength=3) / 400
        assert np.abs(counts - np.array([5, 2, 1]) / 8).max() < 0.01
    for which, size in enumerate((300, 100, 50)):  # each source goes through permutations of its own rows
        drawn = order[source == which] - 1000 * which
        epochs = [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]
        assert len(epochs) > 2 and all(sorted(epoch) == list(range(size)) for epoch in epochs)
        assert not np.array_equal(epochs[0], epochs[1])
    assert stream[150]["tokens"][:, 0].tolist() == order[150 * 8 : 151 * 8].tolist()


def test_no_row_occurs_twice_in_an_epoch_of_a_mixture():
    rows = Mixture([numbered(40), numbered(30, first=1000)], [0.5, 0.5])
    order = flat(taken(batches(rows, batch_size=6, seed=0, epochs=1), 99))
    assert len(order) == len(set(order)) == 60


def test_mixtures_split_by_process_and_resume():
    def stream(index=0, count=1):
        rows = Mixture([numbered(9), numbered(5, first=1000)], [1.0, 3.0])
        return batches(rows, batch_size=4, seed=1, share=contiguous(4, index, count))

    order = taken(stream(), 10)
    parts = [iter(stream(index, 2)) for index in (0, 1)]
    for part in parts:
        part.set_state({"next_index": 6})
    assert [a + b for a, b in zip(*(taken(part, 4) for part in parts), strict=True)] == order[6:]


def test_evaluation_has_every_row_once_and_fills_up_with_padding():
    for count, size in ((10, 4), (8, 4), (1, 4)):
        stream = evaluation_batches(numbered(count), size)
        assert len(stream) == -(-count // size)
        for _ in range(2):  # and again, as often as one likes
            seen = list(stream)
            assert all(batch["tokens"].shape == (size, 3) for batch in seen)
            rows = np.concatenate([batch["tokens"][:, 0] for batch in seen])
            real = np.concatenate([batch["segment_ids"][:, 0] for batch in seen])
            assert rows[real > 0].tolist() == list(range(count))
            assert not rows[real == 0].any() and (np.diff(real) <= 0).all()
        halves = [evaluation_batches(numbered(count), size, share=contiguous(size, i, 2)) for i in (0, 1)]
        for batch, *parts in zip(seen, *halves, strict=True):
            for name in batch:
                assert np.array_equal(np.concatenate([part[name] for part in parts]), batch[name])


def test_what_is_wrong_is_said():
    rows = numbered(5)
    for share in ([], [3, 4], [-1]):
        with pytest.raises(ValueError, match=r"must name some of the batch's rows, 0 to 3 for batch_size=4"):
            batches(rows, batch_size=4, seed=0, share=share)
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        batches(rows, batch_size=0, seed=0)
    with pytest.raises(ValueError, match="batch_size=0 must be positive"):
        evaluation_batches(rows, 0)
    with pytest.raises(ValueError, match="epochs=0 must be positive"):
        batches(rows, batch_size=4, seed=0, epochs=0)
    with pytest.raises(ValueError, match="5 rows in epochs=1 do not fill one batch of batch_size=6"):
        batches(rows, batch_size=6, seed=0, epochs=1)
    with pytest.raises(ValueError, match="seed=-1"):
        batches(rows, batch_size=4, seed=-1)
    with pytest.raises(ValueError, match="no rows"):
        batches(numbered(0), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="2 sources cannot be mixed by 1 weights"):
        Mixture([rows, rows], [1.0])
    with pytest.raises(IndexError, match="there are 2 batches; none has index 2"):
        batches(rows, batch_size=4, seed=0, epochs=2)[2]
