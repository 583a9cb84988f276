"""Both drivers, on several file systems and with every fallback, and all wrappers: the conformance suite."""

import errno
import fcntl
import os
import uuid
from collections.abc import Iterator

import pytest
from ckptsvc_drivers.linux import System, file_system
from ckptsvc_drivers.memory import MemoryStore
from ckptsvc_drivers.posix import Options, PosixStore
from harness.posix_suite import Posix, path_of

from ckptsvc.storage import Store, connect
from ckptsvc.storage.testing import StoreTests, put
from ckptsvc.storage.wrappers import Faulty, Limited, Measured, Retrying


class TestMemory(StoreTests):
    @pytest.fixture
    def store(self):
        return connect(f"memory://{uuid.uuid4()}")

    def raw_read(self, store, key):
        return store._space.objects[key][0]

    def raw_write(self, store, key, content):
        store._space.objects[key] = (content, 0.0)


class TestPosixOnDisk(Posix):
    @pytest.fixture
    def store(self, tmp_path):
        if file_system(str(tmp_path)) in ("tmpfs", "ramfs"):
            pytest.skip(f"{tmp_path} is no disk")
        store = connect(str(tmp_path / "made" / "when" / "needed"))
        yield store
        store.close()

    def test_direct_io_is_found_out(self, store):
        put(store, "a", b"1")
        kind = file_system(str(path_of(store, "")))
        if kind not in ("ext4", "xfs", "btrfs"):
            pytest.skip(f"what {kind} does is not known")
        assert store.capabilities().direct_io == ""
        assert store.capabilities().local
        assert kind in store.capabilities().notes[0]


class TestPosixInSharedMemory(Posix):
    @pytest.fixture
    def store(self, shared_memory):
        store = connect(f"file://{shared_memory}/run")
        yield store
        store.close()


class TestPosixInSmallBlocks(Posix):
    """Many blocks per object, one thread: every seam is crossed often."""

    @pytest.fixture
    def store(self, quick_place):
        store = connect(str(quick_place), {"threads": 1, "block": 1 << 16})
        yield store
        store.close()


class TestPosixBuffered(Posix):
    @pytest.fixture
    def store(self, quick_place):
        store = connect(str(quick_place), {"direct": False})
        yield store
        store.close()

    def test_says_so(self, store):
        put(store, "a", b"1")
        assert "option" in store.capabilities().direct_io


class NoDirectAtOpen(System):
    """Creates the file, then refuses, as some file systems do."""

    def open(self, name, flags, directory):
        fd = super().open(name, flags & ~os.O_DIRECT, directory)
        if flags & os.O_DIRECT:
            os.close(fd)
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return fd


class NoDirectAtTransfer(System):
    """Takes O_DIRECT at open, and then takes no block that comes that way."""

    def __init__(self):
        self.refused = 0

    def _refuse(self, fd):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            self.refused += 1
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    def pwrite(self, fd, part, offset):
        self._refuse(fd)
        return super().pwrite(fd, part, offset)

    def pread(self, fd, part, offset):
        self._refuse(fd)
        return super().pread(fd, part, offset)


class NoLinks(System):
    def link(self, source, target, directory):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


class ShortCalls(System):
    """Every call moves a part of what it is asked to, and never a whole number of pages."""

    def pwrite(self, fd, part, offset):
        return super().pwrite(fd, part[: max(1, len(part) // 2 - 1)], offset)

    def pread(self, fd, part, offset):
        return super().pread(fd, part[: max(1, len(part) // 2 - 1)], offset)

    def reserve(self, fd, nbytes):
        """As a file system without fallocate(2)."""


class PosixWith(Posix):
    system: type[System]

    @pytest.fixture
    def store(self, quick_place) -> Iterator[Store]:
        store = PosixStore(str(quick_place), Options(), self.system())
        yield store
        store.close()


class TestPosixWithoutDirectAtOpen(PosixWith):
    system = NoDirectAtOpen

    def test_says_so(self, store):
        assert "opened" in store.capabilities().direct_io


class TestPosixWithoutDirectAtTransfer(PosixWith):
    system = NoDirectAtTransfer

    def test_says_so(self, store):
        assert "transferred" in store.capabilities().direct_io
        assert store._system.refused


class TestPosixWithoutLinks(PosixWith):
    system = NoLinks

    def test_says_so(self, store):
        assert any("hard links" in note for note in store.capabilities().notes)


class TestPosixWithShortCalls(PosixWith):
    system = ShortCalls


class Wrapped(StoreTests):
    """A wrapper that has nothing to do changes nothing."""

    def wrap(self, store: Store) -> Store:
        raise NotImplementedError

    @pytest.fixture
    def store(self):
        return self.wrap(connect(f"memory://{uuid.uuid4()}"))

    def _space(self, store):
        while not isinstance(store, MemoryStore):
            store = store.inner
        return store._space.objects

    def raw_read(self, store, key):
        return self._space(store)[key][0]

    def raw_write(self, store, key, content):
        self._space(store)[key] = (content, 0.0)


class TestRetrying(Wrapped):
    def wrap(self, store):
        return Retrying(store)


class TestLimited(Wrapped):
    def wrap(self, store):
        return Limited(store, bytes_per_second=1e12, in_flight=3)


class TestMeasured(Wrapped):
    def wrap(self, store):
        return Measured(store, lambda *_: None)


class TestFaulty(Wrapped):
    def wrap(self, store):
        return Faulty(store)


class TestAllWrappers(Wrapped):
    def wrap(self, store):
        return Measured(Retrying(Limited(Faulty(store), in_flight=2)), lambda *_: None)
