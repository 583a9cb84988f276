"""The conformance suite for drivers and wrappers; needs pytest.

Subclass `StoreTests`, give it the fixture `store` and the two raw accesses, and run it with pytest::

    class TestMine(StoreTests):
        @pytest.fixture
        def store(self, tmp_path):
            store = connect(f"mine://{tmp_path}")
            yield store
            store.close()

        def raw_read(self, store, key): ...
        def raw_write(self, store, key, content): ...

Each test begins with an empty store. The raw accesses go around the driver, so that reading and writing are
not only checked against each other.
"""

from __future__ import annotations

import mmap
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput, NotFound
from ckptsvc.storage.api import TEMPORARY_PREFIX, Capabilities, Store
from ckptsvc.storage.arguments import MAX_KEY_BYTES, MAX_PART_BYTES
from ckptsvc.storage.registry import connect

KiB, MiB = 1 << 10, 1 << 20

SIZES = (0, 1, 4095, 4096, 4097, MiB + 1, 17 * MiB + 4099)
"""Bytes of an object: around a page, around the blocks that drivers cut large objects into."""

BAD_KEYS = (
    "",
    "/",
    "/a",
    "a/",
    "a//b",
    ".",
    "..",
    "a/../b",
    "../a",
    "a/.",
    "a\0b",
    "\ud800",
    "x" * (MAX_PART_BYTES + 1),
    "é" * (MAX_PART_BYTES // 2 + 1),
    "/".join("abcdefghi" for _ in range(MAX_KEY_BYTES // 10 + 1)),
)
"""What no operation may take for a key."""

ODD_KEYS = (
    ".hidden",
    "...",
    "a b",
    "50%/%2e%2e/c",
    "über/größe",
    "-rf",
    "*?[x]",
    "line\nbreak",
    "back\\slash",
    "x" * MAX_PART_BYTES,
    "/".join("abcdefghi" for _ in range(MAX_KEY_BYTES // 10)),
)
"""Keys that are allowed and easily mistreated."""


def content_of(nbytes: int, seed: int = 0) -> bytes:
    """Return `nbytes` reproducible random bytes."""
    return random.Random(seed).randbytes(nbytes)


@contextmanager
def pages_with(content: bytes, *, more: int = 0) -> Iterator[memoryview]:
    """Put `content` at the start of page-aligned memory, as a snapshot lies there.

    Closing the memory fails where somebody still holds on to it.

    Args:
        content: the bytes.
        more: at least so many other bytes after them.
    """
    pages = -(-(len(content) + more) // mmap.PAGESIZE) or 1
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE)
    memory[:] = b"\xa5" * len(memory)
    memory[: len(content)] = content
    try:
        with memoryview(memory) as view:
            yield view
    finally:
        memory.close()


def put(store: Store, key: str, content: bytes) -> None:
    """Write an object as the product does."""
    with pages_with(content) as data:
        store.write(key, data, len(content))


class StoreTests:
    """What every store must do."""

    @pytest.fixture
    def store(self) -> Iterator[Store]:
        """Yield an empty store; to be overridden."""
        raise NotImplementedError

    def raw_read(self, store: Store, key: str) -> bytes:
        """Return an object's bytes without the store's help; to be overridden."""
        raise NotImplementedError

    def raw_write(self, store: Store, key: str, content: bytes) -> None:
        """Make an object with these bytes without the store's help; to be overridden."""
        raise NotImplementedError

    def another(self, store: Store) -> Store:
        """Return a second store on the same objects."""
        return connect(store.url)

    # --- the store itself -----------------------------------------------------------------------------------

    def test_is_a_store(self, store: Store) -> None:
        """It has every method, and its address leads to the same objects."""
        assert isinstance(store, Store)
        assert "://" in store.url
        put(store, "a/b", b"one")
        other = self.another(store)
        assert other.url == store.url
        assert other.read("a/b") == b"one"
        other.close()
        assert store.read("a/b") == b"one"

    def test_capabilities_leave_nothing(self, store: Store) -> None:
        """They can be asked for at any time; what was tried out is gone afterwards."""
        assert isinstance(store.capabilities(), Capabilities)
        put(store, "a", b"one")
        found = store.capabilities()
        assert found.exclusive_create, "commits need it"
        assert [entry.key for entry in store.list()] == ["a"]

    # --- large objects --------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", SIZES)
    def test_write_stores_the_bytes(self, store: Store, size: int) -> None:
        """Exactly `size` bytes are stored and come back, whatever lies behind them in memory."""
        content = content_of(size)
        with pages_with(content, more=5000) as data:
            store.write("dir/object", data, size)
        assert store.size("dir/object") == size
        assert self.raw_read(store, "dir/object") == content
        back = bytearray(size)
        store.read_into("dir/object", 0, memoryview(back))
        assert back == content
        assert store.read("dir/object", size) == content

    @pytest.mark.parametrize("shift", [1, 8, 512])
    def test_write_takes_unaligned_and_read_only_memory(self, store: Store, shift: int) -> None:
        """Such memory may be slower, not wrong."""
        content = content_of(3 * MiB)
        store.write("a", memoryview(content)[shift:], len(content) - shift)
        assert self.raw_read(store, "a") == content[shift:]
        with pages_with(content) as data:
            store.write("b", data[shift:], MiB + 7)
        assert self.raw_read(store, "b") == content[shift : shift + MiB + 7]

    def test_write_takes_wider_elements(self, store: Store) -> None:
        """The size counts bytes, not elements."""
        content = content_of(4096)
        store.write("a", memoryview(content).cast("Q"), 4095)
        assert self.raw_read(store, "a") == content[:4095]

    @pytest.mark.parametrize("size", [3, 2 * MiB])
    def test_write_replaces(self, store: Store, size: int) -> None:
        """An earlier object of that name leaves no trace, longer or shorter."""
        put(store, "a", content_of(MiB, 1))
        put(store, "a", content_of(size, 2))
        assert store.size("a") == size
        assert self.raw_read(store, "a") == content_of(size, 2)

    @pytest.mark.parametrize("size", [-1, 4097])
    def test_write_refuses_a_size_that_is_not_there(self, store: Store, size: int) -> None:
        """A size outside the memory is an error before anything is made."""
        with pages_with(b"x" * 4096) as data, pytest.raises(InvalidInput):
            store.write("a", data, size)
        assert list(store.list()) == []

    @pytest.mark.parametrize("size", SIZES)
    def test_progress_adds_up(self, store: Store, size: int) -> None:
        """In the calling thread, in pieces of more than nothing, `size` in all; what is behind it is not read again."""
        seen: list[int] = []
        threads: set[int] = set()

        def progress(nbytes: int) -> None:
            data[sum(seen) : sum(seen) + nbytes] = bytes(nbytes)
            seen.append(nbytes)
            threads.add(threading.get_ident())

        with pages_with(content_of(size)) as data:
            store.write("a", data, size, progress=progress)
        assert (sum(seen), self.raw_read(store, "a")) == (size, content_of(size))
        assert all(nbytes > 0 for nbytes in seen)
        assert threads <= {threading.get_ident()}

    def test_progress_can_stop_a_write(self, store: Store) -> None:
        """What it raises comes out; the memory is free at once, and the store goes on working."""

        class Stop(Exception):
            pass

        def progress(nbytes: int) -> None:
            raise Stop

        content = content_of(24 * MiB)
        with pages_with(content) as data, pytest.raises(Stop):
            store.write("a", data, len(content), progress=progress)
        put(store, "a", content[: 3 * MiB])
        assert self.raw_read(store, "a") == content[: 3 * MiB]

    @pytest.mark.parametrize("size", [1, 9 * MiB + 1, 24 * MiB])
    def test_a_write_takes_no_byte_before_it_is_ready(self, store: Store, size: int) -> None:
        """The memory is filled as `ready` is called for it, in growing steps up to the size."""
        content, asked = content_of(size), [0]
        with pages_with(bytes(size)) as data:

            def ready(nbytes: int) -> None:
                data[asked[-1] : nbytes] = content[asked[-1] : nbytes]
                asked.append(nbytes)

            store.write("a", data, size, ready=ready)
        assert self.raw_read(store, "a") == content
        assert (asked, asked[-1]) == (sorted(asked), size)

    def test_ready_can_stop_a_write(self, store: Store) -> None:
        """What it raises comes out, and nothing is left of the object."""

        def ready(nbytes: int) -> None:
            if nbytes > 16 * MiB:
                raise ArithmeticError

        with pages_with(content_of(24 * MiB)) as data, pytest.raises(ArithmeticError):
            store.write("a", data, 24 * MiB, ready=ready)
        assert list(store.list()) == []

    def test_several_threads_write_and_read(self, store: Store) -> None:
        """Calls in several threads neither mix nor wait for each other for ever."""
        contents = [content_of(9 * MiB + number, number) for number in range(4)]

        def save_and_load(number: int) -> bool:
            content = contents[number]
            put(store, f"step/{number}", content)
            with pages_with(bytes(len(content))) as pages, pages[: len(content)] as buffer:
                store.read_into(f"step/{number}", 0, buffer)
                return buffer == content

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(save_and_load, range(4)))
        assert len(store.children("step")) == 4

    # --- records --------------------------------------------------------------------------------------------

    def test_put_if_absent_never_replaces(self, store: Store) -> None:
        """The first one wins, and the object stays as it made it."""
        assert store.put_if_absent("step/COMMIT", b"first") is True
        assert store.put_if_absent("step/COMMIT", b"second, and longer") is False
        assert store.put_if_absent("step/COMMIT", b"first") is False
        assert self.raw_read(store, "step/COMMIT") == b"first"
        assert [entry.key for entry in store.list()] == ["step/COMMIT"]

    def test_put_if_absent_respects_a_written_object(self, store: Store) -> None:
        """It makes no difference how the object came to be."""
        put(store, "a", b"written")
        assert store.put_if_absent("a", b"put") is False
        assert store.read("a") == b"written"

    def test_put_if_absent_again_after_delete(self, store: Store) -> None:
        """Deleted is absent."""
        assert store.put_if_absent("a", b"1")
        store.delete("a")
        assert store.put_if_absent("a", b"2")
        assert store.read("a") == b"2"

    def test_put_if_absent_takes_no_empty_object(self, store: Store) -> None:
        """A driver may need the empty object as a mark."""
        with pytest.raises(InvalidInput):
            store.put_if_absent("a", b"")

    def test_put_if_absent_has_one_winner(self, store: Store) -> None:
        """Of many threads that put at once exactly one wins, every time, and its object is there."""
        writers = 6

        def contend(number: int, key: str, start: threading.Barrier) -> bool:
            start.wait()
            return store.put_if_absent(key, f"writer {number}".encode() * 100)

        with ThreadPoolExecutor(writers) as pool:
            for turn in range(10):
                start = threading.Barrier(writers)
                futures = [pool.submit(contend, number, f"t{turn}/COMMIT", start) for number in range(writers)]
                won = [number for number, future in enumerate(futures) if future.result()]
                assert len(won) == 1
                assert store.read(f"t{turn}/COMMIT") == f"writer {won[0]}".encode() * 100

    # --- reading --------------------------------------------------------------------------------------------

    def test_read_has_a_limit(self, store: Store) -> None:
        """An object that is larger than expected is refused, not loaded."""
        self.raw_write(store, "a", b"12345")
        assert store.read("a", 5) == b"12345"
        with pytest.raises(InvalidInput):
            store.read("a", 4)

    @pytest.mark.parametrize(
        ("offset", "size"), [(0, 1), (1, 4096), (4096, 4096), (4097, 17 * MiB), (2 * MiB, 17 * MiB + 5)]
    )
    def test_read_into_any_range(self, store: Store, offset: int, size: int) -> None:
        """Any range, into aligned and unaligned memory, and nothing outside the buffer."""
        content = content_of(19 * MiB + 5)
        self.raw_write(store, "a", content)
        for shift in (0, 3):
            with pages_with(b"", more=size + shift + 1) as memory:
                with memory[shift : shift + size] as buffer:
                    store.read_into("a", offset, buffer)
                    assert buffer == content[offset : offset + size]
                assert memory[shift + size] == 0xA5
                assert shift == 0 or memory[shift - 1] == 0xA5

    @pytest.mark.parametrize(("offset", "size"), [(0, 101), (100, 1), (50, 51), (10**6, 1), (0, 20 * MiB)])
    def test_read_into_notices_the_end(self, store: Store, offset: int, size: int) -> None:
        """An object that ends too early is damaged; short reads are never passed off as whole."""
        self.raw_write(store, "a", content_of(100))
        with pages_with(b"", more=size) as pages, pages[:size] as buffer, pytest.raises(Damaged):
            store.read_into("a", offset, buffer)

    def test_a_truncated_object_is_damaged(self, store: Store) -> None:
        """Also where it is large, and where it is cut in the middle of a page."""
        content = content_of(20 * MiB)
        put(store, "a", content)
        for kept in (18 * MiB, 18 * MiB + 100):
            self.raw_write(store, "a", content[:kept])
            assert store.size("a") == kept
            with pages_with(b"", more=len(content)) as buffer, pytest.raises(Damaged):
                store.read_into("a", 0, buffer)

    def test_read_into_nothing(self, store: Store) -> None:
        """An empty buffer needs an object all the same."""
        self.raw_write(store, "a", b"1")
        store.read_into("a", 1, memoryview(bytearray()))
        with pytest.raises(NotFound):
            store.read_into("b", 0, memoryview(bytearray()))

    def test_read_into_checks_the_buffer(self, store: Store) -> None:
        """Read-only or scattered memory and negative offsets are refused."""
        self.raw_write(store, "a", bytes(100))
        with pytest.raises(InvalidInput):
            store.read_into("a", 0, memoryview(bytes(10)))
        with pytest.raises(InvalidInput):
            store.read_into("a", 0, memoryview(bytearray(10))[::2])
        with pytest.raises(InvalidInput):
            store.read_into("a", -1, memoryview(bytearray(10)))

    @pytest.mark.parametrize("key", ["none", "dir/none", "dir", "dir/there/none"])
    def test_what_is_not_there_is_not_found(self, store: Store, key: str) -> None:
        """No object, a part that leads to keys, and a key below an object."""
        put(store, "dir/there", b"1")
        for operation in (
            lambda: store.read(key),
            lambda: store.size(key),
            lambda: store.read_into(key, 0, memoryview(bytearray(1))),
        ):
            with pytest.raises(NotFound):
                operation()

    # --- names ----------------------------------------------------------------------------------------------

    def test_an_empty_store_lists_nothing(self, store: Store) -> None:
        """Nothing is no error, with a prefix or without."""
        assert list(store.list()) == []
        assert list(store.list("a/b")) == []
        assert list(store.children()) == []
        assert list(store.children("a/b")) == []

    def test_list_goes_by_whole_parts(self, store: Store) -> None:
        """Every object below the prefix with its size and time, and none beside it."""
        begin = time.time()
        for key in ("a", "step-1/x", "step-1/deep/er/y", "step-10/z"):
            put(store, key, b"!" * len(key))
        assert {entry.key for entry in store.list()} == {"a", "step-1/x", "step-1/deep/er/y", "step-10/z"}
        assert {entry.key for entry in store.list("step-1")} == {"step-1/x", "step-1/deep/er/y"}
        assert {entry.key for entry in store.list("step-1/deep")} == {"step-1/deep/er/y"}
        for entry in store.list():
            assert entry.size == len(entry.key)
            assert begin - 60 < entry.modified < time.time() + 60

    def test_children_are_one_level(self, store: Store) -> None:
        """Sorted, each once, objects and parts that lead to keys alike."""
        for key in ("b", "a/x", "a/y/1", "a/y/2", "ab/z"):
            put(store, key, b"1")
        assert list(store.children()) == ["a", "ab", "b"]
        assert list(store.children("a")) == ["x", "y"]
        assert list(store.children("a/y")) == ["1", "2"]
        assert list(store.children("a/none")) == []

    def test_temporary_objects_are_listed_for_gc_only(self, store: Store) -> None:
        """What an interrupted writer left can be found and deleted, and misleads nobody."""
        left = f"step-1/{TEMPORARY_PREFIX}0123456789abcdef"
        self.raw_write(store, left, b"left")
        put(store, "step-1/x", b"1")
        assert list(store.children("step-1")) == ["x"]
        assert {entry.key for entry in store.list("step-1")} == {left, "step-1/x"}
        store.delete(left)
        assert {entry.key for entry in store.list("step-1")} == {"step-1/x"}

    def test_delete_is_idempotent(self, store: Store) -> None:
        """Twice is as good as once; neighbours stay; the place can be used again."""
        store.delete("never/was")
        for key in ("step/a", "step/b"):
            put(store, key, b"1")
        store.delete("step/a")
        store.delete("step/a")
        with pytest.raises(NotFound):
            store.read("step/a")
        assert [entry.key for entry in store.list()] == ["step/b"]
        store.delete("step/b")
        assert list(store.children("step")) == []
        put(store, "step/a", b"2")
        assert store.read("step/a") == b"2"

    def test_delete_while_listing(self, store: Store) -> None:
        """A listing outlives the deletion of what it lists."""
        for number in range(20):
            put(store, f"step/{number % 4}/{number}", b"1")
        for entry in store.list("step"):
            store.delete(entry.key)
        assert list(store.list()) == []

    def test_deleting_and_writing_side_by_side(self, store: Store) -> None:
        """Emptying a directory never trips a writer that is about to use it."""
        done = threading.Event()

        def empty() -> None:
            while not done.is_set():
                store.delete("step/old")
                store.delete("step/new")

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(empty)
            try:
                for _ in range(40):
                    put(store, "step/old", b"1")
                    store.put_if_absent("step/new", b"1")
            finally:
                done.set()
            future.result()

    @pytest.mark.parametrize("key", ODD_KEYS)
    def test_odd_keys(self, store: Store, key: str) -> None:
        """They are kept to the letter."""
        put(store, key, b"odd")
        assert store.put_if_absent(key, b"again") is False
        assert self.raw_read(store, key) == b"odd"
        assert [entry.key for entry in store.list()] == [key]
        first, _, rest = key.partition("/")
        assert list(store.children()) == [first]
        assert not rest or list(store.children(first)) == [rest.partition("/")[0]]
        store.delete(key)
        assert list(store.list()) == []

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_bad_keys(self, store: Store, key: str) -> None:
        """Every operation refuses them, and nothing is made."""
        operations: list[Callable[[], object]] = [
            lambda: store.write(key, memoryview(b"1"), 1),
            lambda: store.put_if_absent(key, b"1"),
            lambda: store.read(key),
            lambda: store.read_into(key, 0, memoryview(bytearray(1))),
            lambda: store.size(key),
            lambda: store.delete(key),
        ]
        if key:  # as a prefix, "" is everything
            operations += [lambda: list(store.list(key)), lambda: store.children(key)]
        for operation in operations:
            with pytest.raises(InvalidInput):
                operation()
        assert list(store.list()) == []

    def test_errors_name_the_object(self, store: Store) -> None:
        """What, and where: the address and the key."""
        with pytest.raises(CkptsvcError) as caught:
            store.read("step-1/none")
        assert store.url in str(caught.value)
        assert "step-1/none" in str(caught.value)
