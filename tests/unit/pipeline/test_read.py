import itertools
import math

import numpy as np
import pytest
from harness.random_run import memory_store, part_of, regions, runs, small_run
from hypothesis import assume, given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, LayoutError
from ckptsvc.format.shard import objects_name
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.pipeline.catalog import open_checkpoint
from ckptsvc.pipeline.read import (
    WINDOW_EXTENTS,
    Want,
    deliver,
    fill,
    place_of,
    plan_windows,
    read_arrays,
    read_windows,
    verify,
    window_buffer,
)
from ckptsvc.pipeline.read import runs as runs_of
from ckptsvc.pipeline.sources import ArenaSource, StoreSource


@st.composite
def restores(draw):
    """A stored run, and wanted regions of its tensors."""
    run = draw(runs())
    wants = []
    for _ in range(draw(st.integers(1, 5))):
        meta = run.metas[draw(st.sampled_from(sorted(run.metas)))]
        region = draw(st.one_of(st.just(Box.full(meta.shape)), regions(meta.shape)))
        wants.append(Want(meta.name, meta.dtype, meta.shape, region))
    return run, wants


def open_run(run):
    store = memory_store()
    return open_checkpoint(store, run.store(store))


def raw(array):
    """The bytes: a carrier may hold a NaN."""
    return array.shape, array.tobytes()


class TestEverythingWanted:
    @given(restores(), st.sampled_from([1, 3]))
    def test_is_what_was_stored(self, restore, readers):
        run, wants = restore
        checkpoint = open_run(run)
        arrays = read_arrays(checkpoint.index, StoreSource(checkpoint), wants, readers=readers)
        for want, array in zip(wants, arrays, strict=True):
            assert raw(array) == raw(part_of(run.truth[want.name], want.region))

    @given(restores())
    def test_is_the_same_from_memory(self, restore):
        run, wants = restore
        checkpoint = open_run(run)
        index = checkpoint.index
        images = {n: memoryview(run.image(shard.rank)).toreadonly() for n, shard in enumerate(index.shards)}
        arrays = read_arrays(index, ArenaSource(index, images), wants)
        for want, array in zip(wants, arrays, strict=True):
            assert raw(array) == raw(part_of(run.truth[want.name], want.region))

    @given(restores())
    def test_every_element_is_delivered_once(self, restore):
        run, wants = restore
        checkpoint = open_run(run)
        counts = [np.zeros(part_of(run.truth[w.name], w.region).shape, np.int64) for w in wants]

        def sink(target, place, source):
            place_of(counts[target], wants[target].region, place)[...] += 1

        windows = plan_windows(checkpoint.index, wants)
        read_windows(list(windows.values()), StoreSource(checkpoint), run.extent, sink)
        assert all((count == 1).all() for count in counts)

    @given(restores())
    def test_only_extents_that_are_needed_are_read(self, restore):
        """The masks are exactly the extents that some wanted byte lies in."""
        run, wants = restore
        checkpoint = open_run(run)
        index, extent = checkpoint.index, run.extent
        needed = set()
        for window in plan_windows(index, wants).values():
            base = window.number * WINDOW_EXTENTS * extent
            for piece in window.pieces:
                flat = np.arange(math.prod(piece.shape)).reshape(piece.shape)[piece.box.slices()].reshape(-1)
                for element in (flat.min(), flat.max()):
                    byte = base + piece.start + int(element) * piece.itemsize
                    needed |= {(window.shard, byte // extent), (window.shard, (byte + piece.itemsize - 1) // extent)}
            mine = {n - window.number * WINDOW_EXTENTS for shard, n in needed if shard == window.shard}
            masked = {i for i in range(WINDOW_EXTENTS) if window.mask >> i & 1}
            assert mine & set(range(WINDOW_EXTENTS)) <= masked
            assert min(masked) in mine
            assert max(masked) in mine

    def test_and_no_byte_more(self):
        checkpoint = open_run(small_run())
        read = []

        class Counting(StoreSource):
            def read_into(self, shard, offset, buffer):
                read.append((shard, offset, len(buffer)))
                super().read_into(shard, offset, buffer)

        want = Want("w", "float32", (100, 3), Box((48, 1), (4, 1)))
        (array,) = read_arrays(checkpoint.index, Counting(checkpoint), [want])
        assert array.tolist() == [[145], [148], [151], [154]]
        # Rows 48 and 49 are at the end of shard 0, rows 50 and 51 at the start of shard 1: an extent or two of each.
        assert sorted(shard for shard, _, _ in read) == [0, 1]
        assert all(length <= 128 and offset % 64 == 0 for _, offset, length in read)


class TestDamage:
    @given(restores(), st.data())
    def test_in_any_extent_that_is_needed_is_found(self, restore, data):
        run, wants = restore
        checkpoint = open_run(run)
        index, store = checkpoint.index, checkpoint.store
        windows = plan_windows(index, wants)
        extents = [
            (window.shard, window.number * WINDOW_EXTENTS + i)
            for window in windows.values()
            for i in range(WINDOW_EXTENTS)
            if window.mask >> i & 1
        ]
        assume(extents)
        shard, extent = data.draw(st.sampled_from(extents))
        key = checkpoint.key(shard)
        image = bytearray(store.read(key))
        low, high = extent * run.extent, min((extent + 1) * run.extent, len(image))
        at = data.draw(st.integers(low, high - 1))
        image[at] ^= 1 << data.draw(st.integers(0, 7))
        store.write(key, memoryview(image), len(image))
        with pytest.raises(Damaged, match=f"{index.shards[shard].name}: bytes {low} to .* do not match their checksum"):
            read_arrays(index, StoreSource(checkpoint), wants)

    @given(restores(), st.data())
    def test_elsewhere_does_no_harm(self, restore, data):
        run, wants = restore
        checkpoint = open_run(run)
        index, store = checkpoint.index, checkpoint.store
        needed = {
            (window.shard, window.number * WINDOW_EXTENTS + i)
            for window in plan_windows(index, wants).values()
            for i in range(WINDOW_EXTENTS)
            if window.mask >> i & 1
        }
        for number, shard in enumerate(index.shards):
            image = bytearray(store.read(checkpoint.key(number)))
            for extent in range(-(-shard.nbytes // run.extent)):
                if (number, extent) not in needed:
                    image[extent * run.extent] ^= 1
            store.write(checkpoint.key(number), memoryview(image), len(image))
        for want, array in zip(wants, read_arrays(index, StoreSource(checkpoint), wants), strict=True):
            assert raw(array) == raw(part_of(run.truth[want.name], want.region))

    @pytest.mark.parametrize("how", ["missing", "truncated"])
    def test_of_a_whole_shard_is_named(self, how):
        checkpoint = open_run(small_run())
        key, store = checkpoint.key(1), checkpoint.store
        if how == "missing":
            store.delete(key)
        else:
            store.write(key, memoryview(store.read(key)[:-200]), len(store.read(key)) - 200)
        with pytest.raises(Damaged, match=checkpoint.index.shards[1].name):
            read_arrays(checkpoint.index, StoreSource(checkpoint), [Want("w", "float32", (100, 3), Box.full((100, 3)))])

    def test_in_memory_is_found(self):
        checkpoint = open_run(small_run())
        index = checkpoint.index
        images = [small_run().image(rank) for rank in (0, 1)]
        images[1][4600] ^= 1
        source = ArenaSource(index, dict(enumerate(map(memoryview, images))))
        with pytest.raises(Damaged, match=r"r00001-.* \(in memory\): bytes 4544 to 4608 do not match"):
            read_arrays(index, source, [Want("w", "float32", (100, 3), Box.full((100, 3)))])


class TestRefusals:
    @pytest.mark.parametrize(
        ("want", "message"),
        [
            (Want("nobody", "float32", (100, 3), Box.full((100, 3))), "no tensor 'nobody'"),
            (Want("w", "float64", (100, 3), Box.full((100, 3))), r"stored as float32\[100, 3\] and wanted as float64"),
            (Want("w", "float32", (3, 100), Box.full((3, 100))), r"stored as float32\[100, 3\] and wanted as"),
            (Want("w", "float32", (100, 3), Box((0, 0), (101, 3))), "not inside"),
            (Want("w", "float32", (100, 3), FlatRange(0, 301)), "not inside"),
        ],
    )
    def test_say_what_does_not_fit(self, want, message):
        checkpoint = open_run(small_run())
        with pytest.raises(LayoutError, match=message):
            plan_windows(checkpoint.index, [want])

    def test_nothing_wanted_is_nothing_read(self):
        checkpoint = open_run(small_run())
        assert plan_windows(checkpoint.index, []) == {}
        assert read_windows([], StoreSource(checkpoint), 64, lambda *a: None) == 0

    def test_an_empty_region_needs_nothing(self):
        checkpoint = open_run(small_run())
        assert plan_windows(checkpoint.index, [Want("w", "float32", (100, 3), Box((5, 0), (0, 3)))]) == {}

    def test_data_that_is_not_aligned_is_refused(self):
        checkpoint = open_run(small_run())
        checkpoint.index.region_offset = checkpoint.index.region_offset + 2
        with pytest.raises(LayoutError, match="not aligned"):
            plan_windows(checkpoint.index, [Want("w", "float32", (100, 3), Box.full((100, 3)))])


class TestReading:
    def test_a_document_is_a_tensor_like_any_other(self):
        run = small_run()
        checkpoint = open_run(run)
        for rank in (0, 1):
            meta = checkpoint.index.meta(objects_name(rank))
            want = Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape))
            (array,) = read_arrays(checkpoint.index, StoreSource(checkpoint), [want])
            assert array.tobytes() == run.objects[rank]

    def test_progress_adds_up_to_what_is_returned(self):
        checkpoint = open_run(small_run())
        windows = plan_windows(checkpoint.index, [Want("w", "float32", (100, 3), Box.full((100, 3)))])
        told = []
        total = read_windows(list(windows.values()), StoreSource(checkpoint), 64, lambda *a: None, progress=told.append)
        assert sum(told) == total
        assert 1200 <= total <= 1200 + 4 * 64

    def test_a_sink_that_fails_stops_the_reading(self):
        checkpoint = open_run(small_run())
        windows = plan_windows(checkpoint.index, [Want("w", "float32", (100, 3), Box.full((100, 3)))])

        def sink(*_):
            raise RuntimeError("no room")

        with pytest.raises(RuntimeError, match="no room"):
            read_windows(list(windows.values()), StoreSource(checkpoint), 64, sink)

    def test_a_part_of_a_window_can_be_filled_for_others(self):
        """As in client.exchange: the mask is the union of what several ranks want."""
        checkpoint = open_run(small_run())
        source = StoreSource(checkpoint)
        windows = plan_windows(checkpoint.index, [Want("w", "float32", (100, 3), Box((0, 0), (1, 3)))])
        (window,) = windows.values()
        assert window.mask == 1 << (4096 % (64 * WINDOW_EXTENTS)) // 64
        buffer = window_buffer(64)
        everything = (1 << 9) - 1
        assert fill(window, everything, source, 64, buffer) == 9 * 64
        verify(window, everything, source, 64, buffer)
        found = []
        deliver(window, buffer, lambda target, place, array: found.append(array.tolist()))
        assert found == [[[0, 1, 2]]]


@given(st.integers(0, 2**64 - 1))
def test_runs_of_a_mask_are_its_bits(mask):
    bits = [i for first, last in runs_of(mask) for i in range(first, last)]
    assert bits == [i for i in range(64) if mask >> i & 1]
    for (_, last), (first, _) in itertools.pairwise(runs_of(mask)):
        assert first > last
