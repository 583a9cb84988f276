"""Files made in lock step: every byte read once, memory bounded, and nothing waits for ever."""

import os
import signal
import threading
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest
from harness.declared import EXTENT, Arrays, columns, rows

from ckptsvc.errors import InvalidInput, StoreError, StoreFull
from ckptsvc.format.checksum import extent_digests
from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.conversion import stream
from ckptsvc.interop.conversion.produce import Budget, Production
from ckptsvc.interop.conversion.tasks import TASK_BYTES, least, tasks
from ckptsvc.interop.outputs import Crc, Fill, OutputFile
from ckptsvc.interop.views import Mapped, Part, View
from ckptsvc.pipeline.read import READERS, window_bytes
from ckptsvc.storage import Store, connect
from ckptsvc.storage.wrappers import Fault, Faulty, Retrying
from ckptsvc.types import TensorMeta

RNG = np.random.default_rng(3)
SMALL = Budget(readers=1, edges=16 * EXTENT, held=100_000, step=30_000, block=256)


def memory() -> Store:
    return connect(f"memory://{uuid.uuid4()}")


def produce(source: Arrays, files: Sequence[OutputFile], store: Store, budget: Budget = SMALL):
    """Make the files; returns digests and the production."""
    found, written = {}, []
    made = Production(source, store, budget, written.append, lambda task, digests: found.update(digests))
    made.run(tasks(files, source))
    assert sum(written) == sum(file.nbytes for file in files)
    assert found.keys() == {file.key for file in files}
    for key, digests in found.items():
        assert np.array_equal(digests, extent_digests(store.read(key)))
    return made


@pytest.fixture
def matrices() -> Arrays:
    return Arrays(
        {
            "a": RNG.standard_normal((300, 257)).astype(np.float32),
            "b": RNG.standard_normal((513, 64)).astype(np.float32),
            "c": RNG.standard_normal((64, 100)),
        }
    )


@pytest.mark.parametrize("budget", [SMALL, Budget(4, 1 << 20, 1 << 24, 1 << 20, 4096), Budget(2, 0, 1, 1, 1)])
def test_column_slices_read_every_byte_once(matrices: Arrays, budget: Budget) -> None:
    """With a budget for one file at a time they cannot advance side by side, and are right all the same."""
    if budget.held == 1:
        matrices = Arrays({name: array[:8] for name, array in matrices.arrays.items()})
    files = [file for name in "abc" for file in columns(matrices, name, 7)]
    store = memory()
    produce(matrices, files, store, budget)
    for name in "abc":
        parts = [np.frombuffer(store.read(f"{name}{i}")[10:], matrices.arrays[name].dtype) for i in range(7)]
        height = len(matrices.arrays[name])
        assert np.array_equal(np.hstack([p.reshape(height, -1) for p in parts]), matrices.arrays[name])
        assert store.read(f"{name}3")[:10] == b"0123456789"
    if budget.edges:
        assert matrices.bytes_read <= 1.01 * len(matrices.content)


def test_memory_stays_within_the_budget(tmp_path: Path) -> None:
    """Four files advance side by side, many times longer than what may be in memory."""
    wide = Arrays({"w": RNG.standard_normal((8000, 800)).astype(np.float32)})
    store = connect(str(tmp_path), {"block": 1 << 16})
    block = 1 << 16
    limit = 2 * 4 * least(None, block)
    made = produce(wide, columns(wide, "w", 4), store, Budget(2, 4 * EXTENT, limit, block, block))
    store.close()
    assert made.most_held <= limit
    assert wide.bytes_read <= 1.01 * len(wide.content)  # two readers may want an edge at once


def test_a_budget_below_what_a_driver_takes_at_a_time_is_exceeded_rather_than_waited_for() -> None:
    """The driver asks for 8 MiB before it writes anything; three files side by side never get there."""
    wide = Arrays({"w": RNG.standard_normal((3000, 1400)).astype(np.float32)})
    store = memory()
    files = columns(wide, "w", 3)
    produce(wide, files, store, SMALL._replace(step=1 << 20))
    assert wide.bytes_read <= 1.01 * len(wide.content)  # two readers may want an edge at once
    whole = [np.frombuffer(store.read(f.key)[10:], np.float32).reshape(3000, -1) for f in files]
    assert np.array_equal(np.hstack(whole), wide.arrays["w"])


def test_fixed_bytes_and_crcs_and_casts() -> None:
    values = RNG.standard_normal((4000, 50)).astype(np.float32)
    values[7, 7] = 1e30
    source = Arrays({"v": values})
    size = values.size * 2
    end = 64 + size
    file = OutputFile(
        "f", end + 300, [(0, b"HEAD" * 16), (end, b"....tail"), (end + 200, b"end of directory")],
        [Fill(64, "v", Box.full(values.shape), "float16")],
        [Crc(64, size, (end, end + 204)), Crc(end + 4, 4, (end + 250,))],
    )  # fmt: skip
    store = memory()
    made = produce(source, [file], store)
    content = store.read("f")
    with np.errstate(over="ignore"):
        half = values.astype(np.float16).tobytes()
    checked = zlib.crc32(half).to_bytes(4, "little")
    assert content[:64] == b"HEAD" * 16
    assert content[64:end] == half
    assert content[end : end + 8] == checked + b"tail"
    assert content[end + 200 : end + 216] == b"end " + checked + b"irectory"
    assert content[end + 250 : end + 254] == zlib.crc32(b"tail").to_bytes(4, "little")
    assert not any(content[end + 8 : end + 200])
    assert made.infinite == {"v": 1}


def test_files_without_tensors_and_empty_files() -> None:
    store = memory()
    files = [OutputFile("plain", 9000, [(8000, b"x")]), OutputFile("empty", 0), OutputFile("zeros", 3)]
    produce(Arrays({}), files, store)
    assert store.read("plain") == bytes(8000) + b"x" + bytes(999)
    assert (store.read("empty"), store.read("zeros")) == (b"", bytes(3))


def test_neighbours_in_an_extent_are_read_once() -> None:
    source = Arrays({f"t{i:03}": np.full(100, i, np.float32) for i in range(200)})
    whole = Box((0,), (100,))
    files = [OutputFile(name, 400, fills=[Fill(0, name, whole, "float32")]) for name in source.names()]
    produce(source, files, memory(), SMALL._replace(step=400))
    assert source.bytes_read == len(source.content)


@pytest.mark.parametrize("fault", [Fault(op="write", key="a3", error="store-full"), Fault(op="write", key="b*",
    error="store", short=20_000)])  # fmt: skip
def test_an_error_of_the_target_ends_all_and_leaves_no_thread(matrices: Arrays, fault: Fault) -> None:
    before = threading.active_count()
    files = [file for name in "abc" for file in columns(matrices, name, 7)]
    with pytest.raises(StoreFull if fault.error == "store-full" else StoreError):
        produce(matrices, files, Faulty(memory(), [fault]))
    assert threading.active_count() == before


def test_an_error_of_the_source_ends_all(matrices: Arrays) -> None:
    matrices.fail = StoreError("gone")
    with pytest.raises(StoreError, match="gone"):
        produce(matrices, columns(matrices, "a", 7), memory())


def test_a_store_that_writes_again_from_the_beginning_is_not_given_what_is_gone() -> None:
    """The first bytes are out of memory by then: the file is made again, not written with zeros in it."""
    source = Arrays({"w": RNG.standard_normal((3000, 1400)).astype(np.float32)})
    fault = Fault(op="write", error="store-unavailable", short=12 << 20)
    store = Retrying(Faulty(memory(), [fault]), first_wait=0.01)
    with pytest.raises(StoreError, match="again from its beginning"):
        produce(source, rows(source, "w", 1), store)


def test_too_little_memory_is_said_before_with_what_is_enough() -> None:
    for extent in (1 << 20, 256 << 10, EXTENT):
        with pytest.raises(InvalidInput, match="too little memory") as caught:
            Budget.of(10 << 20, extent)
        enough = int("".join(c for c in caught.value.hint.split("needs")[1].split("MiB")[0] if c.isdigit()))
        assert Budget.of(enough << 20, extent).readers == 1
    large = Budget.of(8 << 30, 1 << 20)
    assert large.readers == READERS
    assert large.held + large.edges + (READERS + 1) * window_bytes(1 << 20) <= 8 << 30


def test_small_files_are_recorded_together() -> None:
    source = Arrays({})
    small = [OutputFile(str(i), 1000) for i in range(1000)]
    assert [len(task.files) for task in tasks(small, source)] == [256, 256, 256, 232]
    large = [OutputFile(str(i), TASK_BYTES // 2 + 1) for i in range(4)]
    assert [len(task.files) for task in tasks(large, source)] == [1, 1, 1, 1]


def test_what_is_written_goes_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = []

    class Watched(stream.mmap.mmap):
        def madvise(self, option: int, *where: int) -> None:
            if option == stream.mmap.MADV_DONTNEED and where:
                dropped.append(where)
            super().madvise(option, *where)

    monkeypatch.setattr(stream.mmap, "mmap", Watched)
    source = Arrays({"w": RNG.standard_normal((3000, 1400)).astype(np.float32)})
    store = memory()
    produce(source, rows(source, "w", 1), store)
    assert store.read("w0")[10:] == source.arrays["w"].tobytes()
    assert [start for start, _ in dropped] == [sum(n for _, n in dropped[:i]) for i in range(len(dropped))]
    assert sum(n for _, n in dropped) > 14 << 20


def some_region(random: Random, shape: tuple[int, ...]) -> Box | FlatRange:
    if random.random() < 0.4:
        start = random.randrange(int(np.prod(shape)))
        return FlatRange(start, random.randint(0, int(np.prod(shape)) - start))
    origin = tuple(random.randrange(n) for n in shape)
    return Box(origin, tuple(random.randint(1, n - o) for n, o in zip(shape, origin, strict=True)))


@pytest.mark.parametrize("seed", range(12))
def test_any_files_of_any_regions_in_any_order(seed: int, tmp_path: Path) -> None:
    """Regions overlap, repeat, come in orders that contradict each other, with gaps and other types between."""
    random = Random(seed)
    shapes = [tuple(random.randint(1, 40) for _ in range(random.randint(1, 3))) for _ in range(6)]
    source = Arrays({f"t{i}": RNG.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)})
    files, truth = [], {}
    for number in range(random.randint(1, 9)):
        fills, content = [], bytearray()
        for _ in range(random.randint(0, 8)):
            name = random.choice(source.names())
            region, dtype = some_region(random, source.arrays[name].shape), random.choice(["float32", "float64"])
            content += bytes(random.randint(0, 300))
            fills.append(Fill(len(content), name, region, dtype))
            array = source.arrays[name]
            flat = isinstance(region, FlatRange)
            part = array.reshape(-1)[region.start : region.stop] if flat else array[region.slices()]
            content += part.astype(dtype).tobytes()
        content += bytes(random.randint(0, 3000))
        files.append(OutputFile(str(number), len(content), fills=fills))
        truth[str(number)] = bytes(content)
    store = connect(str(tmp_path), {"block": 1 << 16})
    held, edges = random.choice([1, 5000, 1 << 20]), random.choice([0, 1 << 20])
    produce(source, files, store, Budget(random.randint(1, 3), edges, held, random.choice([100, 4000]), 64))
    assert all(store.read(key) == content for key, content in truth.items())
    store.close()


@pytest.mark.parametrize("step", [2000, 1 << 20])
def test_views_of_stored_tensors_are_written_as_tensors(step: int) -> None:
    """Transposed, fused and stacked at plan time, in slabs too."""
    source = Arrays({name: RNG.standard_normal((60, 40)).astype(np.float32) for name in "abc"})
    full = Box((0, 0), (60, 40))
    turned = View(TensorMeta("t", "float32", (40, 60)), (Part(Box((0, 0), (40, 60)), "a", full, (1, 0)),))
    fused = View(
        TensorMeta("f", "float32", (120, 40)),
        tuple(Part(Box((60 * i, 0), (60, 40)), name, full) for i, name in enumerate("bc")),
    )
    stacked = View(
        TensorMeta("s", "float32", (2, 40, 60)),
        tuple(Part(Box((i, 0, 0), (1, 40, 60)), name, full, (-1, 1, 0)) for i, name in enumerate("ab")),
    )
    mapped = Mapped(source, [turned, fused, stacked])
    a, b, c = (source.arrays[name] for name in "abc")
    truth = {"t": a.T, "f": np.concatenate([b, c]), "s": np.stack([a.T, b.T])}
    files = []
    for name, array in truth.items():
        for number in range(2):  # two files with the halves of the last dimension of each
            half = array.shape[-1] // 2
            region = Box((*(0,) * (array.ndim - 1), number * half), (*array.shape[:-1], half))
            files.append(OutputFile(f"{name}{number}", array.nbytes // 2, fills=[Fill(0, name, region, "float32")]))
    store = memory()
    produce(mapped, files, store, Budget(2, 64 * EXTENT, 1 << 20, step, 256))
    for name, array in truth.items():
        halves = [np.frombuffer(store.read(f"{name}{i}"), np.float32) for i in range(2)]
        shape = (*array.shape[:-1], -1)
        assert np.array_equal(np.concatenate([half.reshape(shape) for half in halves], axis=-1), array), name


def test_an_interrupt_from_the_keyboard_ends_all_soon(matrices: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it reads, and while all threads wait for each other."""
    read_into, before = matrices.read_into, threading.active_count()

    def slow(shard: int, offset: int, buffer: memoryview) -> None:
        read_into(shard, offset, buffer)
        ended.wait(0.2)

    ended = threading.Event()
    monkeypatch.setattr(matrices, "read_into", slow)
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    files = [file for name in "abc" for file in columns(matrices, name, 7)]
    with pytest.raises(KeyboardInterrupt):
        produce(matrices, files, memory(), SMALL._replace(edges=0, step=2000))
    timer.join()
    assert threading.active_count() == before
    assert matrices.bytes_read < len(matrices.content) / 2
