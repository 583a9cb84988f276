"""Whole tensors out of a run, and how reading ends when something is wrong."""

import threading
import uuid

import numpy as np
import pytest
from harness.stored import EXTENT, Run, Tensor

from ckptsvc.errors import Damaged, LayoutError
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.pipeline.catalog import Checkpoint, list_refs, open_checkpoint
from ckptsvc.pipeline.read import Want, plan_windows, read_arrays, read_windows
from ckptsvc.pipeline.sources import StoreSource

ARRAY = np.arange(40 * EXTENT, dtype=np.float32).reshape(160, EXTENT // 4)


@pytest.fixture
def checkpoint() -> Checkpoint:
    run = Run(f"memory://{uuid.uuid4()}")
    run.save(1, {"w": Tensor(ARRAY, cut="dim 0"), "c": Tensor(np.array([1j, 2]))}, world=2)
    return open_checkpoint(run.store, list_refs(run.store)[0])


def want(region: Box | FlatRange) -> Want:
    return Want("w", "float32", ARRAY.shape, region)


def test_regions_as_arrays(checkpoint: Checkpoint) -> None:
    wants = [want(Box((79, 3), (2, 5))), want(FlatRange(7, 100_000)), Want("c", "complex128", (2,), Box.full((2,)))]
    box, flat, complexes = read_arrays(checkpoint.index, StoreSource(checkpoint), wants, readers=2)
    assert np.array_equal(box.view(np.float32), ARRAY[79:81, 3:8])
    assert np.array_equal(flat.view(np.float32), ARRAY.reshape(-1)[7:100_007])
    assert complexes.tolist() == [1j, 2]
    assert read_arrays(checkpoint.index, StoreSource(checkpoint), []) == []


def test_what_does_not_fit_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(LayoutError):
        read_arrays(checkpoint.index, StoreSource(checkpoint), [Want("w", "int32", ARRAY.shape, Box.full(ARRAY.shape))])


class Stops(StoreSource):
    """Fails at the first read, or is interrupted there."""

    def __init__(self, checkpoint: Checkpoint, error: BaseException) -> None:
        super().__init__(checkpoint)
        self.error, self.reads, self._lock = error, 0, threading.Lock()

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads += 1
            if self.reads == 1:
                raise self.error
        super().read_into(shard, offset, buffer)


@pytest.mark.parametrize("error", [Damaged("bad"), KeyboardInterrupt()])
def test_after_an_error_nothing_more_is_read(checkpoint: Checkpoint, error: BaseException) -> None:
    windows = plan_windows(checkpoint.index, [want(Box.full(ARRAY.shape))])
    ordered = [windows[key] for key in sorted(windows)] * 10  # the same again and again: only how many matters
    source = Stops(checkpoint, error)
    with pytest.raises(type(error)):
        read_windows(ordered, source, EXTENT, lambda *_: None, readers=1)
    assert source.reads <= 4 < len(ordered)
