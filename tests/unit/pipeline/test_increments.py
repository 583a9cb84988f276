"""Shards of which only what is new is written: what is read from them is what was saved, wherever the bytes are."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from harness.increments import ALL, NONE, Saver, assert_holds, big_run, floats
from harness.random_run import Held, Run, memory_store, runs
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, SaveFailed, StoreFull
from ckptsvc.format.commit import COMMIT
from ckptsvc.format.segment_file import Part, SegmentFileInfo, encode_header
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline import chapters, increments
from ckptsvc.pipeline.catalog import open_checkpoint
from ckptsvc.pipeline.increments import Economy
from ckptsvc.pipeline.packing import MEASURED_EVERY, Judge, Packed, Trial, is_worth
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.retain import expire
from ckptsvc.pipeline.retention import Policy
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty, Limited, Measured, Wrapper
from ckptsvc.types import TensorMeta


def change(run, rng, share: float) -> None:
    """Change a share of the elements of every tensor."""
    for name, array in run.truth.items():
        raw = bytearray(array.tobytes())
        for at in rng.integers(0, max(len(raw), 1), int(len(raw) * share)).tolist():
            raw[at] ^= 1 + int(rng.integers(255))
        run.truth[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)


@settings(max_examples=40)
@given(
    runs(), st.sampled_from(["off", "zstd"]), st.booleans(), st.lists(st.sampled_from([0, 0.001, 0.3, 1]), max_size=5),
    st.integers(1, 4), st.booleans(),
)  # fmt: skip
def test_what_was_saved_is_read_whatever_was_written(run, compression, incremental, shares, full_every, drained):
    rng = np.random.default_rng(1)
    disk = memory_store() if drained else None
    saver = Saver(memory_store(), Economy(incremental, full_every, compression), disk)
    kept = [(saver.save(run, 1)[0], {**run.truth})]
    for step, share in enumerate(shares, 2):
        change(run, rng, share)
        kept.append((saver.save(run, step)[0], {**run.truth}))
    for checkpoint, truth in kept:
        run.truth = truth
        assert_holds(checkpoint, run)


@pytest.mark.parametrize("drained", [False, True])
def test_what_has_not_changed_is_not_written_again(drained):
    run = big_run({"frozen": floats(90_000), "trained": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True), memory_store() if drained else None)
    first, all_of_it = saver.save(run, 1)
    assert (first.commit.format, first.commit.refers, first.index.segments) == ("1.0", (), None)
    run.truth["trained"] = floats(10_000, 1)
    second, some = saver.save(run, 2)
    assert some < all_of_it / 7
    assert (second.commit.format, second.index.info.format) == ("2.1", "2.0")
    assert (first.commit.written, second.commit.written) == (None, some)
    assert second.commit.refers == (first.ref.name,)
    assert second.commit.bytes == first.commit.bytes
    totals = second.index.segments.stored(second.ref.name)
    assert totals["written"] == some
    assert totals["referenced"] > 0.85 * second.commit.bytes
    run.truth["trained"] = floats(10_000, 2)
    third, _ = saver.save(run, 3)
    assert third.commit.refers == (first.ref.name,), "of the second nothing is needed"
    assert_holds(third, run)
    assert list(third.files(0)) == [file.key for file in third.index.segments.files]


@pytest.mark.parametrize("how", ["a flip", "it is given up"])
def test_a_copy_of_which_only_what_is_new_is_drained_leaves_nothing_where_that_fails(how, tmp_path):
    run = big_run({"frozen": floats(90_000), "trained": floats(10_000)})
    disk, store = connect(str(tmp_path)), memory_store()
    saver = Saver(store, Economy(incremental=True), disk)
    saver.save(run, 1)
    before = {entry.key for entry in store.list()}
    run.truth["trained"] = floats(10_000, 1)
    copy = saver.keep(saver.shard(run, 0, 2), run)
    calls = itertools.count()

    def go_on() -> None:
        if next(calls) == 1:  # all has been read once, and found right
            if how == "it is given up":
                raise SaveFailed("not wanted any more")
            with (tmp_path / copy.key).open("r+b") as file:
                file.seek(390_000)
                file.write(b"flip")

    with pytest.raises(SaveFailed if how == "it is given up" else Damaged):
        saver.writer.drain(disk, store, copy, saver.committed, go_on)
    assert {entry.key for entry in store.list()} == before


def test_a_whole_one_is_written_now_and_then():
    run = big_run({"frozen": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True, full_every=3))
    found = [saver.save(run, step)[0].commit.refers for step in range(1, 8)]
    assert [bool(refers) for refers in found] == [False, True, True, False, True, True, False]
    assert found[4] == ("step-000000000004.e00001",)


def test_only_what_is_committed_is_referred_to():
    run = big_run({"frozen": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True))
    saver.write(run, 0, 1)  # never committed
    second = saver.write(run, 0, 2)
    assert second.segments is None
    saver.save(run, 3)
    for step in (4, 5, 6):
        written = saver.write(run, 0, step)
        assert written.segments.folders == ["step-000000000003.e00001", f"step-{step:012}.e00001"]
    # Nothing gets committed any more: maybe for what it refers to.
    assert saver.write(run, 0, 7).segments is None


def test_another_layout_or_size_of_shard_is_no_problem():
    saver = Saver(memory_store(), ALL)
    for step, sizes in enumerate([(5000, 3000), (5000, 3000, 700), (100,), (5000, 3000), (5001,)], 1):
        run = big_run({f"t{i}": floats(n, i) for i, n in enumerate(sizes)})
        assert_holds(saver.save(run, step)[0], run)


def test_small_updates_are_stored_as_differences_one_deep():
    run = big_run({"weights": floats(100_000)}, extent=1 << 16)
    saver = Saver(memory_store(), ALL)
    sizes, kept = [], []
    for step in range(1, 6):
        checkpoint, stored = saver.save(run, step)
        sizes.append(stored)
        kept.append((checkpoint, {**run.truth}))
        totals = checkpoint.index.segments.stored(checkpoint.ref.name)
        assert bool(totals["deltas"]) == (step % 2 == 0), "a base is not a difference itself"
        run.truth["weights"] = run.truth["weights"] ^ np.random.default_rng(step).integers(0, 4, 100_000, np.uint32)
    assert max(sizes[1], sizes[3]) < 0.5 * min(sizes[0], sizes[2])
    for checkpoint, truth in kept:
        run.truth = truth
        assert_holds(checkpoint, run)


def test_a_difference_is_not_made_to_an_arena_that_has_been_filled_anew():
    run = big_run({"weights": floats(50_000)})
    saver = Saver(memory_store(), ALL)
    saver.save(run, 2)
    run.truth["weights"] = run.truth["weights"] ^ 1
    saver.arenas["0-0"][:] = bytes(len(saver.arenas["0-0"]))  # the rank is about to take the next snapshot
    checkpoint, _ = saver.save(run, 3)
    assert checkpoint.index.segments.stored(checkpoint.ref.name)["deltas"] == 0
    assert_holds(checkpoint, run)


@pytest.mark.parametrize("drained", [False, True])
def test_a_compressed_shard_is_a_few_files(monkeypatch, drained):
    monkeypatch.setattr(chapters, "BUFFER", chapters.HEADER + 100_000)
    run = big_run({"weights": floats(100_000)})
    saver = Saver(memory_store(), Economy(compression="zstd"), memory_store() if drained else None)
    checkpoint, stored = saver.save(run, 1)
    sizes = list(checkpoint.files(0).values())
    assert len(sizes) == 4
    assert all(90_000 < size <= 100_000 + 4096 for size in sizes[:-1]), "each is filled, whatever extents came to"
    assert (sum(sizes), checkpoint.commit.refers) == (stored, ())
    totals = checkpoint.index.segments.stored(checkpoint.ref.name)
    assert totals["compressed_to"] < 0.95 * totals["compressed"]
    assert_holds(checkpoint, run)
    assert checkpoint.own_names() == {key.rpartition("/")[2] for key in (e.key for e in saver.store.list())}


class Hanging(Wrapper):
    """Writes of the shards of two ranks hang until they may go on."""

    def __init__(self, inner) -> None:
        super().__init__(inner)
        self.hang, self.hung = threading.Event(), threading.Semaphore(0)

    def _call(self, op, key, nbytes, run):
        if op == "write" and key.rpartition("/")[2].startswith(("r00000-", "r00001-")):
            self.hung.release()
            assert self.hang.wait(30)
        return run()


@pytest.mark.parametrize("drained", [False, True])
def test_shards_that_hang_in_the_store_do_not_hold_up_others(monkeypatch, drained):
    """Seen: with one dead server of the store, two of four shards held all buffers, and no shard was written."""
    monkeypatch.setattr(chapters, "BUFFER", chapters.HEADER + 100_000)
    monkeypatch.setattr(chapters, "PATIENCE", 0.2)
    metas = [TensorMeta(f"w{rank}", "float32", (60_000,)) for rank in range(4)]
    truth = {meta.name: floats(60_000, rank) for rank, meta in enumerate(metas)}
    held = [Held(meta, Box.full(meta.shape), rank) for rank, meta in enumerate(metas)]
    run, store = Run(truth, metas, held, 4, 4096, 4 * [b"{}"]), Hanging(memory_store())
    saver = Saver(store, Economy(compression="zstd"), memory_store() if drained else None)
    with ThreadPoolExecutor(4) as pool:
        try:
            ill = [pool.submit(saver.write, run, rank, 1) for rank in (0, 1)]
            assert all(store.hung.acquire(timeout=30) for _ in ill)
            for rank in (2, 3, 2, 3):  # and those of a later save
                well = pool.submit(saver.write, run, rank, 1).result(30)
                assert well.nbytes > 0
            assert not any(each.done() for each in ill)
        finally:
            store.hang.set()
        assert all(each.result(30).segments for each in ill)
    checkpoint, _ = saver.save(run, 2)
    assert_holds(checkpoint, run)


def test_what_is_left_without_a_buffer_is_stored_as_it_is(monkeypatch):
    """From its second file on, and every byte of it."""
    monkeypatch.setattr(chapters, "BUFFER", chapters.HEADER + 100_000)
    monkeypatch.setattr(chapters, "PATIENCE", 0.1)
    takes = itertools.count()
    of_all = chapters._Buffers.take
    monkeypatch.setattr(chapters._Buffers, "spare", lambda self: None)
    monkeypatch.setattr(
        chapters._Buffers, "take", lambda self, go_on: None if next(takes) == 1 else of_all(self, go_on)
    )
    run = big_run({"weights": floats(100_000)})
    checkpoint, stored = Saver(memory_store(), Economy(compression="zstd")).save(run, 1)
    totals = checkpoint.index.segments.stored(checkpoint.ref.name)
    assert len(checkpoint.files(0)) == 2
    assert 0 < totals["compressed"] < 200_000
    assert stored > 350_000
    assert_holds(checkpoint, run)


def test_who_waits_for_a_buffer_can_be_told_to_end_and_takes_none():
    buffers = chapters._Buffers()
    held = [buffers.take(lambda: None) for _ in range(chapters.BUFFERS)]

    def go_on() -> None:
        buffers.give_back(held.pop())
        raise SaveFailed("not wanted any more")

    with pytest.raises(SaveFailed):
        buffers.take(go_on)
    assert buffers.spare() is not None
    assert buffers.spare() is None


@pytest.mark.parametrize("compression", ["off", "zstd"])
def test_a_header_has_room_for_all_segments_of_its_file(monkeypatch, compression):
    monkeypatch.setattr(increments, "MAX_PARTS", 7)
    monkeypatch.setattr(chapters, "PARTS", 7)
    run = big_run({"weights": floats(60_000)}, extent=1024)
    saver = Saver(memory_store(), Economy(incremental=True, compression=compression))
    saver.save(run, 1)
    run.truth["weights"][::768] ^= 1  # every third extent
    checkpoint, _ = saver.save(run, 2)
    assert len(checkpoint.index.segments.files) > 10
    assert checkpoint.commit.refers
    assert_holds(checkpoint, run)


def test_a_failed_write_leaves_nothing(monkeypatch):
    monkeypatch.setattr(chapters, "BUFFER", chapters.HEADER + 8192)
    run = big_run({"weights": floats(50_000)})
    store = Faulty(memory_store(), [Fault(op="write", nth=3, error="store-full")])
    with pytest.raises(StoreFull):
        Saver(store, Economy(compression="zstd")).write(run, 0, 1)
    assert list(store.inner.list()) == []


@pytest.mark.parametrize("drained", [False, True])
def test_whether_to_compress_is_measured(drained):
    few = big_run({"weights": floats(1_000_000) & np.uint32(0xFF00FF00)}, extent=1 << 18)
    noise = np.random.default_rng(0).integers(0, 2**32, 1_000_000, np.uint32)
    store, disk = Limited(memory_store(), bytes_per_second=20e6), memory_store() if drained else None
    saver = Saver(store, Economy(compression="auto"), disk)
    assert saver.write(few, 0, 1).segments is None, "how fast the store is is not known yet"
    written = saver.write(few, 0, 2)
    assert "leaves 35%" in written.verdict.why
    assert written.verdict.compressed
    assert written.stored < 0.4 * written.nbytes
    verdict = saver.write(big_run({"weights": noise}, extent=1 << 18), 0, 3).verdict
    assert "leaves 100%" in verdict.why
    assert not verdict.compressed


def test_compression_must_be_faster_than_the_store():
    halves = Trial(speed=500e6, ratio=0.5)
    assert is_worth(halves, bandwidth=100e6, threads=1).compressed
    assert not is_worth(halves, bandwidth=500e6, threads=1).compressed
    assert is_worth(halves, bandwidth=500e6, threads=2).compressed
    assert not is_worth(halves._replace(ratio=0.95), bandwidth=1e6, threads=1).compressed


def test_now_and_then_it_is_seen_how_fast_the_store_is_by_now():
    judge = Judge(1)
    judge.note("s", 1 << 30, 1000.0)
    pack, size = (lambda number: Packed(b"x", 4, False)), (lambda number: 1000)
    found = [judge.verdict("s", [0], pack, size, 1) for _ in range(2 * MEASURED_EVERY)]
    assert [each is None for each in found] == 2 * [*(MEASURED_EVERY - 1) * [False], True]
    judge.note("s", 1000, 1e-9)
    assert judge.verdict("s", [0], pack, size, 1).compressed, "a small write says little"
    for _ in range(20):
        judge.note("s", 1 << 50, 1.0)
    assert not judge.verdict("s", [0], pack, size, 1).compressed


@pytest.mark.parametrize("drained", [False, True])
def test_extents_that_would_take_too_much_memory_are_not_compressed_and_that_is_said(monkeypatch, drained):
    monkeypatch.setattr(increments, "LARGEST", 2048)
    run = big_run({"weights": floats(10_000)})
    written = Saver(memory_store(), Economy(compression="zstd"), memory_store() if drained else None).write(run, 0, 1)
    assert written.segments is None
    assert written.verdict == (False, "save.extent is 4096 bytes: more than 2048 are not compressed")


def test_the_header_of_the_fullest_file_has_room_in_its_buffer():
    info = SegmentFileInfo(
        run="r" * 30_000, job="j" * 30_000, step=10**18 - 1, epoch=10**9 - 1, attempt=2**31, rank=10**9 - 1,
        world_size=10**9, extent=1 << 20, shard_nbytes=2**63 - 1,
    )  # fmt: skip
    last = (2**63 - 1) // 4096
    parts = [Part(last, 1, chapters.BUFFER // chapters.PARTS, 8, True)] * chapters.PARTS
    assert len(encode_header(info, [p._replace(first=last - n) for n, p in enumerate(parts)])) <= chapters.HEADER


def test_what_is_referred_to_stays_as_long_as_it_is():
    run = big_run({"frozen": floats(10_000), "trained": floats(1000)})
    saver = Saver(memory_store(), Economy(incremental=True, full_every=4))
    refs = []
    for step in range(1, 10):
        run.truth["trained"] = floats(1000, step)
        checkpoint, _ = saver.save(run, step)
        refs.append(checkpoint.ref)
        expire(saver.store, Policy(last=1), [checkpoint.ref])
        there = [ref.step for ref in refs if saver.store.children(ref.name)]
        assert there == sorted({step, (step - 1) // 4 * 4 + 1})
        assert_holds(checkpoint, run)


def test_a_checkpoint_whose_base_was_deleted_is_not_committed():
    run = big_run({"frozen": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True))
    first, _ = saver.save(run, 1)
    for entry in list(saver.store.list(first.ref.name)):
        saver.store.delete(entry.key)
    with pytest.raises(SaveFailed, match=r"refers to step-000000000001.*deleted"):
        saver.save(run, 2)
    assert COMMIT not in saver.store.children("step-000000000002.e00001")


def test_a_copy_whose_base_was_deleted_is_drained_whole():
    """A save that failed at its commit would take the copy with it."""
    run = big_run({"frozen": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True), memory_store())
    first, _ = saver.save(run, 1)
    saver.store.delete(f"{first.ref.name}/{COMMIT}")
    second, _ = saver.save(run, 2)
    assert (second.index.segments, second.commit.refers) == (None, ())
    third, _ = saver.save(run, 3)
    assert third.commit.refers == (second.ref.name,)
    assert_holds(third, run)


def test_files_of_an_earlier_try_are_not_referred_to():
    """The coordinator may have committed another file of that rank than the one this process wrote last."""
    run = big_run({"frozen": floats(10_000)})
    saver = Saver(memory_store(), Economy(incremental=True))
    saver.save(run, 1)
    saver.committed = NONE
    saver.write(run, 0, 1)
    saver.committed = (1, 1)
    with pytest.raises(SaveFailed, match="refers to"):
        saver.save(run, 2)


def test_a_part_is_read_without_the_rest():
    run = big_run({"weights": floats(100_000), "bias": floats(1000, 1)})
    saver = Saver(memory_store(), ALL)
    for step in (1, 2):
        run.truth["weights"] = run.truth["weights"] ^ step
        checkpoint, _ = saver.save(run, step)
    read = []
    store = Measured(saver.store, lambda op, seconds, nbytes, error: read.append(nbytes))
    opened = open_checkpoint(store, checkpoint.ref)
    read.clear()
    (found,) = read_arrays(opened.index, StoreSource(opened), [Want("bias", "float32", (1000,), Box((0,), (1000,)))])
    assert found.tobytes() == run.truth["bias"].tobytes()
    assert sum(read) <= 4 * 4096, "two extents, each with its base"
    read.clear()
    part = memoryview(bytearray(10))
    StoreSource(opened).read_into(0, 50_003, part)
    assert bytes(part) == bytes(run.image(0, 2)[50_003:50_013])
    assert sum(read) <= 2 * 4096
