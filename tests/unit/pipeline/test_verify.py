"""Verification names every damage, and nothing else."""

import threading
from pathlib import Path

import numpy as np
import pytest
from harness.stored import EXTENT, Run, Tensor

from ckptsvc.errors import StoreDenied, StoreError, StoreUnavailable
from ckptsvc.pipeline.catalog import Checkpoint, list_refs, open_checkpoint
from ckptsvc.pipeline.verify import CHUNK_EXTENTS, Damage, verify_checkpoint
from ckptsvc.storage.wrappers import Wrapper

ELEMENTS = 40 * EXTENT // 4  # of each tensor: 40 extents, so that a shard is several chunks


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(f"file://{tmp_path}")
    tensors = {name: Tensor(np.arange(2 * ELEMENTS, dtype=np.float32), cut="dim 0") for name in ("a", "b")}
    made.save(1, tensors, world=2)
    return made


@pytest.fixture
def checkpoint(run: Run) -> Checkpoint:
    return open_checkpoint(run.store, list_refs(run.store)[0])


def shard(tmp_path: Path, rank: int) -> Path:
    (path,) = tmp_path.glob(f"step-*/r{rank:05d}-*")
    return path


def flip(path: Path, *positions: int) -> None:
    data = bytearray(path.read_bytes())
    for position in positions:
        data[position] ^= 0x10
    path.write_bytes(data)


def verified(checkpoint: Checkpoint) -> tuple[list[Damage], int]:
    seen: list[int] = []
    damages = verify_checkpoint(checkpoint, progress=seen.append)
    return damages, sum(seen)


def total(checkpoint: Checkpoint) -> int:
    return sum(shard.nbytes for shard in checkpoint.index.shards)


def test_a_whole_checkpoint(checkpoint: Checkpoint) -> None:
    assert verified(checkpoint) == ([], total(checkpoint))


@pytest.mark.parametrize("at", [0, 5000, 17 * EXTENT + 3, 60 * EXTENT, -1])
def test_a_flipped_bit_is_found_wherever_it_is(checkpoint: Checkpoint, tmp_path: Path, at: int) -> None:
    path = shard(tmp_path, 1)
    at %= path.stat().st_size
    flip(path, at)
    (damage,), seen = verified(checkpoint)
    assert (tmp_path / damage.key) == path
    assert damage.start <= at < damage.stop
    assert damage.start % EXTENT == 0
    assert damage.stop - damage.start <= EXTENT
    assert damage.why == "checksum mismatch"
    assert seen == total(checkpoint)


def test_the_tensors_in_the_bytes_are_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    names = ("a", "b", "@rank/0/objects")
    regions = {name: next(r for r in checkpoint.index.regions(name) if r.shard == 0) for name in names}
    path = shard(tmp_path, 0)
    for name, region in regions.items():
        flip(path, region.offset + region.nbytes // 2)
        (damage,) = verified(checkpoint)[0]
        assert damage.tensors == (name,)
        flip(path, region.offset + region.nbytes // 2)
    flip(path, 100)
    assert verified(checkpoint)[0][0].tensors == ()  # its header


def test_neighbours_are_one_range(checkpoint: Checkpoint, tmp_path: Path) -> None:
    flip(shard(tmp_path, 0), *(number * EXTENT for number in (2, 15, 16, 17, 18, 40)))
    ranges = [(d.start // EXTENT, d.stop // EXTENT) for d in verified(checkpoint)[0]]
    assert ranges == [(2, 3), (15, 19), (40, 41)]
    assert 15 < CHUNK_EXTENTS < 18, "or nothing crosses a chunk here"


def test_a_missing_shard_is_named_and_the_others_are_read(checkpoint: Checkpoint, tmp_path: Path) -> None:
    size = shard(tmp_path, 0).stat().st_size
    shard(tmp_path, 0).unlink()
    flip(shard(tmp_path, 1), 9 * EXTENT)
    (missing, flipped), seen = verified(checkpoint)
    assert (missing.start, missing.stop, missing.why) == (0, size, "the shard is missing")
    assert missing.tensors == ("@rank/0/objects", "a", "b")
    assert flipped.start == 9 * EXTENT
    assert seen == total(checkpoint)


@pytest.mark.parametrize("length", [0, EXTENT, 20 * EXTENT + 1, -1])
def test_a_truncated_shard(checkpoint: Checkpoint, tmp_path: Path, length: int) -> None:
    path = shard(tmp_path, 0)
    size = path.stat().st_size
    length %= size
    with path.open("r+b") as file:
        file.truncate(length)
    (damage,), seen = verified(checkpoint)
    assert (damage.start, damage.stop) == (length // EXTENT * EXTENT, size)
    assert damage.why == f"the shard has {length} bytes; the index says {size}"
    assert seen == total(checkpoint)


def test_what_is_left_of_a_truncated_shard_is_judged(checkpoint: Checkpoint, tmp_path: Path) -> None:
    flip(shard(tmp_path, 0), 18 * EXTENT)
    with shard(tmp_path, 0).open("r+b") as file:
        file.truncate(20 * EXTENT + 1)
    assert [d.start // EXTENT for d in verified(checkpoint)[0]] == [18, 20]


def test_a_shard_that_is_too_long(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = shard(tmp_path, 0)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"more")
    (damage,), seen = verified(checkpoint)
    assert (damage.start, damage.stop, damage.tensors) == (size, size + 4, ())
    assert seen == total(checkpoint)


class Unreadable(Wrapper):
    """Reads of ranges with these bytes of rank 0's shard fail."""

    def __init__(self, run: Run, at: int, error: Exception) -> None:
        super().__init__(run.store)
        self.at, self.error = at, error

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        if "/r00000-" in key and offset <= self.at < offset + len(buffer):
            raise self.error
        super().read_into(key, offset, buffer)


def test_bytes_that_cannot_be_read_are_damage(run: Run) -> None:
    store = Unreadable(run, 20 * EXTENT + 5, StoreError("input/output error"))
    damages, seen = verified(open_checkpoint(store, list_refs(store)[0]))
    assert [(d.start, d.stop, d.why) for d in damages] == [
        (20 * EXTENT, 21 * EXTENT, "cannot be read: input/output error")
    ]
    assert seen == total(open_checkpoint(store, list_refs(store)[0]))


@pytest.mark.parametrize("error", [StoreUnavailable("gone"), StoreDenied("no")])
def test_a_store_that_fails_altogether_is_no_damage(run: Run, error: StoreError) -> None:
    store = Unreadable(run, 0, error)
    with pytest.raises(type(error)):
        verified(open_checkpoint(store, list_refs(store)[0]))


def test_an_interrupt_ends_it_soon(run: Run) -> None:
    many = Run(run.url)
    many.save(2, {"a": Tensor(np.zeros(64 * EXTENT), cut="dim 0")}, world=8)
    checkpoint = open_checkpoint(many.store, list_refs(many.store)[0])
    seen: list[int] = []

    def progress(nbytes: int) -> None:
        seen.append(nbytes)
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        verify_checkpoint(checkpoint, readers=2, progress=progress)
    assert len(seen) <= 2
    assert threading.active_count() == before
