"""Copies on a local disk: what makes one, what is found again, what goes on to the store; nothing damaged does."""

import contextlib
import mmap
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from ckptsvc.errors import CkptsvcError, Damaged, StoreFull
from ckptsvc.format.checksum import digest64, extent_digests
from ckptsvc.format.record import canonical
from ckptsvc.format.shard import Part, ShardInfo, ShardTemplate
from ckptsvc.geometry.box import Box
from ckptsvc.pipeline import local_copy
from ckptsvc.pipeline.arena import Label
from ckptsvc.pipeline.local_copy import Copy, Mark
from ckptsvc.pipeline.write import write_shard
from ckptsvc.storage import Store, connect
from ckptsvc.storage.wrappers import Fault, Faulty
from ckptsvc.types import TensorMeta

EXTENT = 4096
MIB = 1 << 20


def made(disk: Store, nbytes: int = 200_000, *, step: int = 7, rank: int = 0, keep: bool = True) -> tuple[Copy, bytes]:
    """A shard on a disk as an agent writes it; returns its record and its bytes."""
    array = np.random.default_rng(step).integers(0, 256, nbytes, np.uint8)
    part = Part(TensorMeta("w", "uint8", (nbytes,)), Box.full((nbytes,)))
    template = ShardTemplate([part])
    total = template.total(2)
    image = mmap.mmap(-1, -(-total // mmap.PAGESIZE) * mmap.PAGESIZE)
    info = ShardInfo(run="file:///run", job="job", step=step, epoch=3, attempt=1, rank=rank, world_size=2)
    image[: template.data_start] = template.header(info, 2)
    entry = template.entries[0]
    image[entry.offset : entry.offset + entry.nbytes] = array.tobytes()
    image[template.objects_offset : total] = b"{}"
    with ThreadPoolExecutor(1) as pool:
        written = write_shard(disk, memoryview(image), total, extent=EXTENT, epoch=3, step=step, rank=rank, pool=pool,
            on_digests=lambda digests: None)  # fmt: skip
    label = Label(job="job", store="file:///run", coordinator="", attempt=1, epoch=3, step=step, rank=rank,
        world_size=2, nbytes=total, extent=EXTENT, aliases={"tied": "w"})  # fmt: skip
    copy = Copy(label=label, name=written.name, digests=written.digests.tobytes())
    if keep:
        local_copy.keep(disk, copy)
    return copy, bytes(image[:total])


def found(disk: Store) -> tuple[list[local_copy.Found], list[str]]:
    errors: list[str] = []
    return list(local_copy.scan(disk, lambda error: errors.append(str(error)))), errors


def go_on() -> None:
    """Nobody wants it to stop."""


@pytest.fixture
def disk(tmp_path: Path) -> Store:
    return connect(str(tmp_path / "disk"))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return connect(str(tmp_path / "run"))


def test_a_copy_is_found_with_all_that_is_known_of_it(disk: Store) -> None:
    older, _ = made(disk, step=6)
    copy, _ = made(disk)
    local_copy.mark(disk, copy, Mark.DURABLE)
    assert found(disk) == ([(older, frozenset()), (copy, frozenset({Mark.DURABLE}))], [])
    local_copy.mark(disk, copy, Mark.DURABLE)  # once more, after a kill
    local_copy.mark(disk, copy, Mark.COMMITTED)
    assert found(disk)[0][1].marks == {Mark.DURABLE, Mark.COMMITTED}


def test_what_has_no_record_or_no_shard_is_removed(disk: Store) -> None:
    made(disk, keep=False)
    copy, _ = made(disk, step=8)
    other, _ = made(disk, step=9)
    disk.delete(other.key)
    disk.put_if_absent(f"{copy.folder}/.tmp-0123456789abcdef", b"torn")
    disk.put_if_absent("elsewhere/note.txt", b"?")
    assert found(disk) == ([(copy, frozenset())], [])
    assert {entry.key for entry in disk.list()} == {copy.key, copy.key + ".json"}


def test_a_shard_of_another_length_than_its_record_says_is_reported_and_removed(disk: Store, tmp_path: Path) -> None:
    copy, _ = made(disk)
    with open(tmp_path / "disk" / copy.key, "ab") as file:
        file.write(b"more")
    copies, (why,) = found(disk)
    assert copies == []
    assert "is the record of" in why
    assert list(disk.list()) == []


def test_a_removed_copy_leaves_nothing(disk: Store) -> None:
    copy, _ = made(disk)
    for each in Mark:
        local_copy.mark(disk, copy, each)
    local_copy.remove(disk, copy.key)
    assert list(disk.list()) == []


def test_a_record_reads_as_it_was_written(disk: Store) -> None:
    copy, _ = made(disk)
    assert Copy.decode(copy.encode(), "x") == copy


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../../etc/passwd"},
        {"name": "r00001-01234567.safetensors"},
        {"name": "r00000-01234567.safetensors/x"},
        {"digests": b""},
        {"digests": b"12345678"},
        {"label": {"rank": 2}},
        {"label": {"rank": -1}},
        {"label": {"world_size": 1 << 40}},
        {"label": {"nbytes": 0}},
        {"label": {"nbytes": 1 << 63}},
        {"label": {"extent": 1}},
        {"label": {"extent": 1 << 30}},
        {"label": {"attempt": 1 << 31}},
        {"label": {"epoch": -1}},
        {"label": {"step": 10**18}},
        {"label": {"job": ""}},
        {"label": {"store": ""}},
    ],
)
def test_a_record_that_says_what_cannot_be_is_refused(disk: Store, change: dict[str, object]) -> None:
    copy, _ = made(disk)
    label = change.pop("label", {})
    assert isinstance(label, dict)
    bad = msgspec.structs.replace(copy, label=msgspec.structs.replace(copy.label, **label), **change)
    with pytest.raises(Damaged):
        Copy.decode(bad.encode(), "x")


def test_a_changed_record_is_damaged_and_nothing_else(disk: Store) -> None:
    copy, _ = made(disk, 20_000)
    data, rng = copy.encode(), random.Random(4)
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 3])):
            match rng.randrange(3):
                case 0:
                    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
                case 1:
                    del changed[rng.randrange(len(changed)) :][:40]
                case 2:
                    at = rng.randrange(len(changed) + 1)
                    changed[at:at] = rng.choice([b"\0", b'"', b"{", b"9" * 30, "é".encode()])
        if bytes(changed) != data:
            with pytest.raises(CkptsvcError):
                Copy.decode(bytes(changed), "x")


def test_a_record_that_somebody_made_up_is_refused_or_is_one(disk: Store) -> None:
    """With a right checksum, but fields of any type."""
    copy, _ = made(disk, 20_000)
    rng = random.Random(5)
    values = [None, -1, 0, 2**70, 1.5, "", "x", [], {}, {"a": 1}, True]
    for _ in range(1000):
        fields = msgspec.json.decode(copy.encode())
        del fields["check"]
        target = fields if rng.random() < 0.4 else fields["label"]
        if isinstance(target, dict):
            target[rng.choice(sorted(target))] = rng.choice(values)
        fields["check"] = digest64(canonical(fields))
        with contextlib.suppress(CkptsvcError):
            Copy.decode(canonical(fields), "x")


@pytest.mark.parametrize("nbytes", [1, 200_000, 40 * MIB])
def test_what_is_drained_is_the_same_byte_for_byte(disk: Store, store: Store, nbytes: int, tmp_path: Path) -> None:
    copy, image = made(disk, nbytes)
    assert local_copy.drain(disk, store, copy, go_on) > 0
    assert (tmp_path / "run" / copy.key).read_bytes() == image
    local_copy.drain(disk, store, copy, go_on)  # again, after a kill: in the same place
    assert [entry.key for entry in store.list()] == [copy.key]


def test_a_drain_takes_little_memory(disk: Store, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a shard of 160 MiB, never more than the pieces under way are there."""
    copy, _ = made(disk, 160 * MIB)
    most = 0
    read = local_copy._read

    def counted(*args: object) -> None:
        nonlocal most
        read(*args)  # type: ignore[arg-type]
        rollup = Path("/proc/self/smaps_rollup").read_text()
        rss = int(next(line for line in rollup.splitlines() if line.startswith("Anonymous:")).split()[1]) * 1024
        most = max(most, rss - before)

    before = 0
    monkeypatch.setattr(local_copy, "_read", counted)
    local_copy.describe(disk, copy)
    before, most = most, 0
    local_copy.drain(disk, store, copy, go_on)
    assert most < 120 * MIB


@pytest.mark.parametrize("at", [0, 100, 5000, 150_000, -1])
def test_a_damaged_copy_is_not_drained_and_leaves_nothing(disk: Store, store: Store, tmp_path: Path, at: int) -> None:
    copy, _ = made(disk)
    path = tmp_path / "disk" / copy.key
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(Damaged):
        local_copy.drain(disk, store, copy, go_on)
    assert list(store.list()) == []
    with pytest.raises(Damaged):
        local_copy.refill(disk, copy, memoryview(bytearray(len(data))))


def test_a_copy_that_cannot_be_read_is_damaged_and_no_trouble_of_the_store(disk: Store, store: Store) -> None:
    copy, _ = made(disk)
    broken = Faulty(disk, [Fault(op="read_into", error="store", times=0)])
    with pytest.raises(Damaged, match="cannot be read"):
        local_copy.drain(broken, store, copy, go_on)


def test_trouble_of_the_store_is_no_damage(disk: Store, store: Store) -> None:
    copy, _ = made(disk)
    with pytest.raises(StoreFull):
        local_copy.drain(disk, Faulty(store, [Fault(op="write", error="store-full")]), copy, go_on)


def test_a_drain_can_be_stopped(disk: Store, store: Store) -> None:
    class StopError(Exception):
        pass

    def stop() -> None:
        raise StopError

    copy, _ = made(disk)
    with pytest.raises(StopError):
        local_copy.drain(disk, store, copy, stop)
    assert list(store.list()) == []


@pytest.mark.parametrize("nbytes", [1, 200_000, 20 * MIB])
def test_a_refilled_arena_holds_the_same_bytes(disk: Store, nbytes: int) -> None:
    copy, image = made(disk, nbytes)
    with mmap.mmap(-1, len(image) + mmap.PAGESIZE) as memory, memoryview(memory) as arena:
        local_copy.refill(disk, copy, arena)
        assert bytes(arena[: len(image)]) == image
        assert extent_digests(arena[: len(image)], EXTENT).tobytes() == copy.digests
