"""Every flipped bit of what a checkpoint in segments needs is found, and named with its file; none is ever loaded."""

import numpy as np
import pytest
from harness.increments import ALL, Saver, assert_holds, big_run, floats
from harness.random_run import memory_store

from ckptsvc.errors import Damaged
from ckptsvc.pipeline.catalog import open_checkpoint
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.pipeline.verify import verify_checkpoint


@pytest.fixture(scope="module")
def saved():
    """A checkpoint with segments of all kinds, its run, and the objects that it needs."""
    run = big_run({"weights": floats(3000), "frozen": floats(3000, 1)}, extent=1024)
    saver = Saver(memory_store(), ALL)
    for step in (1, 2):
        run.truth["weights"] = run.truth["weights"] ^ np.random.default_rng(step).integers(0, 8, 3000, np.uint32)
        checkpoint, _ = saver.save(run, step)
    segments = checkpoint.index.segments
    found = list(segments.find(0, 0, checkpoint.index.shards[0].nbytes))
    assert {segment.base is None for segment in found} == {True, False}
    assert {segment.place.codec for segment in found} >= {0, 4}
    assert len(segments.files) == 2
    return saver.store, checkpoint, run


def overwrite(store, key, data):
    store.write(key, memoryview(data), len(data))


def read(checkpoint, run):
    wants = [Want(name, "float32", array.shape, held.region) for (name, array), held in zip(
        run.truth.items(), run.held, strict=True)]  # fmt: skip
    return read_arrays(open_checkpoint(checkpoint.store, checkpoint.ref).index, StoreSource(checkpoint), wants)


def test_each_flipped_bit_is_found(saved):
    store, checkpoint, run = saved
    loaded = 0
    for key, size in checkpoint.files(0).items():
        data = bytearray(store.read(key))
        assert len(data) == size
        for at in range(0, size, 41):
            data[at] ^= 1 << (at % 8)
            overwrite(store, key, data)
            damages = verify_checkpoint(checkpoint)
            if key.startswith(checkpoint.ref.name):
                assert damages, at
            for damage in damages:
                assert (damage.key, damage.start <= at < damage.stop) == (key, True) or "base in" in damage.why
            try:
                for found, array in zip(read(checkpoint, run), run.truth.values(), strict=True):
                    assert found.tobytes() == array.tobytes()
                loaded += 1
            except Damaged:
                assert damages
            data[at] ^= 1 << (at % 8)
        overwrite(store, key, data)
    assert loaded  # a flip in a header, say: no tensor is there
    assert_holds(checkpoint, run)


def test_a_file_that_is_gone_or_cut_is_named(saved):
    store, checkpoint, run = saved
    for key in checkpoint.files(0):
        data = bytearray(store.read(key))
        for left in (None, data[:-1], data[:5000], b"", data + b"x"):
            store.delete(key)
            if left is not None:
                overwrite(store, key, bytearray(left) or bytearray(1))
            damages = verify_checkpoint(checkpoint)
            assert key in {damage.key for damage in damages}
            assert {name for damage in damages for name in damage.tensors} <= {"weights", "frozen", "@rank/0/objects"}
            if left is None:
                assert any("missing" in damage.why for damage in damages)
                with pytest.raises(Damaged, match="missing"):
                    read(checkpoint, run)
        overwrite(store, key, data)
    assert_holds(checkpoint, run)
