"""Objects put together while they are written: the store gets the pieces, in order, whatever happens on the way."""

import numpy as np
import pytest
from harness.random_run import memory_store
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import SaveFailed, StoreUnavailable
from ckptsvc.pipeline.assembled import write_assembled
from ckptsvc.storage import connect
from ckptsvc.storage.wrappers import Faulty, Retrying

KEY = "step-000000000001.e00001/r00000-00000000.safetensors"


@given(st.lists(st.binary(max_size=9000), max_size=6))
def test_the_pieces_are_one_object(pieces):
    store = memory_store()
    assert write_assembled(store, KEY, [memoryview(piece) for piece in pieces]) == sum(map(len, pieces))
    assert store.read(KEY) == b"".join(pieces)


class Interrupted(Faulty):
    """Its first write ends after some bytes, which are reported as written."""

    def __init__(self, inner, after):
        super().__init__(inner)
        self.left = after

    def write(self, key, data, size, *, ready=None, progress=None):
        def break_off(nbytes):
            progress(nbytes)
            if self.left is not None:
                self.left -= nbytes
                if self.left <= 0:
                    self.left = None
                    raise StoreUnavailable("connection reset")

        self.inner.write(key, data, size, ready=ready, progress=break_off)


@pytest.mark.parametrize("after", [1, 20 << 20, 41 << 20])
def test_a_write_that_is_tried_again_begins_again(tmp_path, after):
    """What was reported as written had been given back: it is put together anew."""
    data = np.random.default_rng(0).integers(0, 256, 41 << 20, np.uint8)
    store = connect(f"file://{tmp_path}")
    pieces = [memoryview(data[:4096]), memoryview(data[4096 : 30 << 20]), memoryview(data[30 << 20 :])]
    write_assembled(Retrying(Interrupted(store, after), first_wait=0.001), KEY, pieces)
    assert store.read(KEY) == data.tobytes()
    store.close()


def test_a_store_that_does_not_wait_is_found_out():
    class Hasty(Faulty):
        def write(self, key, data, size, *, ready=None, progress=None):
            self.inner.write(key, data, size, progress=progress)

    store = memory_store()
    with pytest.raises(SaveFailed, match="ready"):
        write_assembled(Hasty(store), KEY, [memoryview(b"abc")])
    assert list(store.list()) == []
