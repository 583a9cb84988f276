"""A restore over several ranks reads every byte once and gives everybody what they want, whatever happens to one."""

import numpy as np
import pytest
from harness.random_run import memory_store, part_of, regions, runs, small_run
from hypothesis import given, settings
from hypothesis import strategies as st
from threads import run

from ckptsvc.client.exchange import Readable, assign, exchange
from ckptsvc.errors import Damaged, StoreError, StoreUnavailable
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline.catalog import open_checkpoint
from ckptsvc.pipeline.read import WINDOW_EXTENTS, Want, array_sink, carrier, plan_windows
from ckptsvc.pipeline.sources import ArenaSource, StoreSource
from ckptsvc.types import DTYPES

EVERYTHING = Readable(True)


@st.composite
def tables(draw):
    """For each rank its rows (shard, window, mask) and what it can read; somebody can read every shard."""
    size = draw(st.integers(1, 5))
    row = st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(1, 2**WINDOW_EXTENTS - 1))
    rows = [draw(st.lists(row, max_size=12, unique_by=lambda r: r[:2])) for _ in range(size)]
    if draw(st.booleans()):
        return rows, [EVERYTHING] * size
    where = [draw(st.integers(0, size - 1)) for _ in range(4)]
    also = [draw(st.frozensets(st.integers(0, 3))) for _ in range(size)]
    return rows, [Readable(False, also[r] | {s for s in range(4) if where[s] == r}) for r in range(size)]


class TestAssignment:
    @given(tables())
    def test_every_window_has_one_reader_who_can_read_it(self, job):
        rows, readable = job
        tasks = [task for tasks in assign(rows, readable) for task in tasks]
        wanted = {(shard, number) for table in rows for shard, number, _ in table}
        assert sorted(task.key for task in tasks) == sorted(wanted)
        for task in tasks:
            assert readable[task.reader].everything or task.key[0] in readable[task.reader].shards

    @given(tables())
    def test_everybody_who_wants_a_window_gets_the_extents_they_want(self, job):
        rows, readable = job
        for tasks in assign(rows, readable):
            for task in tasks:
                wants = {r: m for r, table in enumerate(rows) for *key, m in table if tuple(key) == task.key}
                others = {rank: mask for rank, mask in wants.items() if rank != task.reader}
                assert dict(task.wanters) == others
                union = 0
                for mask in wants.values():
                    union |= mask
                assert task.mask == union

    @given(tables())
    def test_a_reader_reads_for_itself_if_it_can(self, job):
        """Nothing is sent that the reader's choice could have spared."""
        rows, readable = job
        for tasks in assign(rows, readable):
            for task in tasks:
                able = {
                    r
                    for r, table in enumerate(rows)
                    if any(tuple(key) == task.key for *key, _ in table)
                    and (readable[r].everything or task.key[0] in readable[r].shards)
                }
                assert task.reader in able or not able

    @given(tables())
    def test_in_a_round_nobody_reads_twice(self, job):
        rounds = assign(*job)
        for tasks in rounds:
            readers = [task.reader for task in tasks]
            assert len(set(readers)) == len(readers)
        assert all(rounds)

    @given(st.integers(2, 5), st.integers(1, 40))
    def test_what_all_want_is_divided_evenly(self, size, windows):
        rows = [[(0, number, 1) for number in range(windows)]] * size
        load = [0] * size
        for tasks in assign(rows, [EVERYTHING] * size):
            for task in tasks:
                load[task.reader] += 1
        assert max(load) - min(load) <= 1

    @given(tables())
    def test_numpy_rows_give_the_same(self, job):
        """What was gathered comes as arrays: all ranks must come to the same, bit for bit."""
        rows, readable = job
        arrays = [np.array(table, np.int64).reshape(-1, 3).tolist() for table in rows]
        assert assign(arrays, readable) == assign(rows, readable)

    def test_what_nobody_can_read_is_an_error(self):
        with pytest.raises(Damaged, match="shard 3 is in no node's memory"):
            assign([[(3, 0, 1)], []], [Readable(False, frozenset({1})), Readable(False)])


@st.composite
def jobs(draw):
    """A stored run, and what each of one to five ranks wants of it."""
    stored = draw(runs())
    wants = []
    for _ in range(draw(st.integers(1, 5))):
        mine = []
        for _ in range(draw(st.integers(0, 4))):
            meta = stored.metas[draw(st.sampled_from(sorted(stored.metas)))]
            region = draw(st.one_of(st.just(Box.full(meta.shape)), regions(meta.shape)))
            mine.append(Want(meta.name, meta.dtype, meta.shape, region))
        wants.append(mine)
    return stored, wants


class Counting(StoreSource):
    """Notes which extents are read."""

    def __init__(self, checkpoint):
        super().__init__(checkpoint)
        self.extent = checkpoint.index.info.extent
        self.read = []

    def read_into(self, shard, offset, buffer):
        super().read_into(shard, offset, buffer)
        assert offset % self.extent == 0
        first = offset // self.extent
        self.read += [(shard, first + i) for i in range(-(-len(buffer) // self.extent))]


def open_run(stored):
    store = memory_store()
    return open_checkpoint(store, stored.store(store))


def fill(group, index, wants, readable, source):
    """One rank's restore: the arrays, and the bytes it has read."""
    shapes = [w.region.shape if isinstance(w.region, Box) else (w.region.length,) for w in wants]
    arrays = [np.full(s, 7, carrier(DTYPES[w.dtype].itemsize)) for s, w in zip(shapes, wants, strict=True)]
    windows = plan_windows(index, wants)
    read = exchange(group, windows, readable, source, index.info.extent, array_sink(arrays, wants))
    return arrays, read


def right(stored, wants, arrays):
    """Whether all is what was stored."""
    truth = [part_of(stored.truth[want.name], want.region) for want in wants]
    return all(a.tobytes() == t.tobytes() for a, t in zip(arrays, truth, strict=True))


class TestExchange:
    @settings(max_examples=60)
    @given(jobs())
    def test_everybody_gets_what_they_want_and_every_byte_is_read_once(self, job):
        stored, wants = job
        checkpoint = open_run(stored)
        index = checkpoint.index
        sources = [Counting(checkpoint) for _ in wants]
        results = run(len(wants), lambda group: fill(group, index, wants[group.rank], EVERYTHING, sources[group.rank]))
        for mine, result in zip(wants, results, strict=True):
            assert not isinstance(result, Exception), result
            assert right(stored, mine, result[0])
        read = [extent for source in sources for extent in source.read]
        needed = {
            (window.shard, window.number * WINDOW_EXTENTS + i)
            for mine in wants
            for window in plan_windows(index, mine).values()
            for i in range(WINDOW_EXTENTS)
            if window.mask >> i & 1
        }
        assert sorted(read) == sorted(needed)
        sizes = {
            key: min((key[1] + 1) * stored.extent, index.shards[key[0]].nbytes) - key[1] * stored.extent
            for key in needed
        }
        assert sum(result[1] for result in results) == sum(sizes.values())

    @settings(max_examples=40)
    @given(jobs(), st.data())
    def test_from_memory_that_is_spread_over_the_nodes(self, job, data):
        stored, wants = job
        index = open_run(stored).index
        size = len(wants)
        where = [data.draw(st.integers(0, size - 1)) for _ in index.shards]
        images = {n: memoryview(stored.image(shard.rank)).toreadonly() for n, shard in enumerate(index.shards)}

        def rank(group):
            held = {n: image for n, image in images.items() if where[n] == group.rank}
            source = ArenaSource(index, held)
            return fill(group, index, wants[group.rank], Readable(False, frozenset(held)), source)

        for mine, result in zip(wants, run(size, rank), strict=True):
            assert not isinstance(result, Exception), result
            assert right(stored, mine, result[0])

    def test_a_shard_that_is_nowhere_is_an_error_everywhere(self):
        stored = small_run(world_size=2)
        index = open_run(stored).index
        want = [Want("w", "float32", (100, 3), Box.full((100, 3)))]
        image = {0: memoryview(stored.image(0))}

        def rank(group):
            held = image if group.rank == 0 else {}
            return fill(group, index, want, Readable(False, frozenset(held)), ArenaSource(index, held))

        results = run(3, rank)
        assert [str(result) for result in results] == ["shard 1 is in no node's memory"] * 3


class Broken(StoreSource):
    """Fails at one extent of one shard."""

    def __init__(self, checkpoint, error):
        super().__init__(checkpoint)
        self._error = error

    def read_into(self, shard, offset, buffer):
        if shard == 1:
            raise self._error
        super().read_into(shard, offset, buffer)


class TestTrouble:
    """Whatever happens to one rank: nobody waits for ever, and the rank that met it says so."""

    def everybody_wants_all(self, size, source_of, sink_of=None):
        stored = small_run(world_size=4)
        checkpoint = open_run(stored)
        index = checkpoint.index
        want = [Want("w", "float32", (100, 3), Box.full((100, 3)))]

        def rank(group):
            windows = plan_windows(index, want)
            arrays = [np.zeros((100, 3), np.uint32)]
            sink = array_sink(arrays, want) if sink_of is None else sink_of(group.rank, array_sink(arrays, want))
            source = source_of(checkpoint, group.rank)
            failure = None
            try:
                exchange(group, windows, EVERYTHING, source, stored.extent, sink)
            except Exception as error:
                failure = error
            # As client.restore does: all learn of it.
            return failure, group.all_true(failure is None), right(stored, want, arrays)

        return run(size, rank)

    @pytest.mark.parametrize("size", [1, 2, 3, 5])
    def test_a_damaged_extent(self, size):
        def source_of(checkpoint, rank):
            if rank == 0:  # damage it once, for all
                image = bytearray(checkpoint.store.read(checkpoint.key(1)))
                image[4100] ^= 1
                checkpoint.store.write(checkpoint.key(1), memoryview(image), len(image))
            return StoreSource(checkpoint)

        results = self.everybody_wants_all(size, source_of)
        failures = [failure for failure, _, _ in results if failure is not None]
        assert [type(failure) for failure in failures] == [Damaged]
        assert "bytes 4096 to 4160 do not match" in str(failures[0])
        assert not any(fine for _, fine, _ in results)

    @pytest.mark.parametrize(
        "error", [StoreUnavailable("gone"), StoreError("EIO"), ValueError("a bug"), OSError(5, "EIO")]
    )
    def test_one_rank_cannot_read(self, error):
        def source_of(checkpoint, rank):
            return Broken(checkpoint, error) if rank == 1 else StoreSource(checkpoint)

        results = self.everybody_wants_all(3, source_of)
        assert [failure for failure, _, _ in results] == [None, error, None]
        assert not any(fine for _, fine, _ in results)

    def test_one_rank_cannot_take_what_it_gets(self):
        def sink_of(rank, sink):
            def broken(*_):
                raise RuntimeError("wrong shape")

            return broken if rank == 2 else sink

        results = self.everybody_wants_all(3, lambda checkpoint, rank: StoreSource(checkpoint), sink_of)
        assert [str(failure) for failure, _, _ in results] == ["None", "None", "wrong shape"]
        assert [correct for _, _, correct in results] == [True, True, False]
        assert not any(fine for _, fine, _ in results)

    def test_all_ranks_cannot_read(self):
        results = self.everybody_wants_all(3, lambda checkpoint, rank: Broken(checkpoint, StoreError("EIO")))
        assert any(failure is not None for failure, _, _ in results)
        assert not any(fine for _, fine, _ in results)
