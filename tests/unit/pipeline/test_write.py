import re

import numpy as np
import pytest
from harness.random_run import POOL, memory_store, runs, small_run
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, SaveFailed, StoreFull
from ckptsvc.format.checksum import extent_digests
from ckptsvc.format.commit import parse_shard_name
from ckptsvc.pipeline.write import write_shard
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Fault, Faulty


def write(store, image, nbytes=None, **changes):
    fields = {"extent": 64, "epoch": 1, "step": 10, "rank": 1, "pool": POOL, "on_digests": lambda digests: None}
    return write_shard(store, memoryview(image), len(image) if nbytes is None else nbytes, **{**fields, **changes})


@pytest.fixture(params=["memory", "file"])
def store(request, tmp_path):
    if request.param == "memory":
        yield memory_store()
    else:
        store = connect(f"file://{tmp_path}/run")
        yield store
        store.close()


def test_what_is_in_the_arena_is_in_the_store(store):
    image = small_run().image(1)
    written = write(store, image + b"\xff" * 5000, len(image))
    key = f"step-000000000010.e00001/{written.name}"
    assert store.read(key) == bytes(image)
    assert parse_shard_name(written.name) == 1
    assert written.nbytes == len(image)
    assert (written.info.rank, written.info.step, written.info.job) == (1, 10, "job")
    assert np.array_equal(written.digests, extent_digests(image, 64))


def test_every_write_has_a_name_of_its_own():
    store, image = memory_store(), small_run().image(1)
    names = {write(store, image).name for _ in range(20)}
    assert len(names) == 20
    assert all(re.fullmatch(r"r00001-[0-9a-f]{8}\.safetensors", name) for name in names)


@given(runs(), st.data())
def test_the_table_says_what_the_rank_holds(run, data):
    rank = data.draw(st.integers(0, run.world_size - 1))
    written = write(memory_store(), run.image(rank), rank=rank)
    assert len(written.columns) == sum(held.rank == rank for held in run.held)


def test_a_store_that_does_not_wait_for_what_it_writes_is_found_out():
    class Hasty(Faulty):
        def write(self, key, data, size, *, ready=None, progress=None):
            self.inner.write(key, data, size, progress=progress)

    store = memory_store()
    with pytest.raises(SaveFailed, match="ignores `ready`"):
        write(Hasty(store, []), small_run().image(1))
    assert list(store.list()) == []


def test_digests_are_told_although_the_store_fails():
    """With them the snapshot can still be restored from memory."""
    image, told = small_run().image(1), []
    faulty = Faulty(memory_store(), [Fault(op="write", error="store-full", short=1000)])
    with pytest.raises(StoreFull):
        write(faulty, image, on_digests=told.append)
    assert np.array_equal(told[0], extent_digests(image, 64))


@pytest.mark.parametrize("at", [0, 3, 8, 9, 100])
def test_an_image_without_a_valid_header_is_not_written(at):
    store, image = memory_store(), small_run().image(1)
    image[at] ^= 0xFF
    with pytest.raises(Damaged):
        write(store, image)
    assert list(store.list()) == []


def test_an_image_that_is_shorter_than_it_says_is_not_written():
    store, image = memory_store(), small_run().image(1)
    with pytest.raises(Damaged):
        write(store, image, len(image) - 1)
    assert list(store.list()) == []
