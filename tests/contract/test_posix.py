"""What the posix driver makes of a real file system: names, links, threads, the page cache."""

import fcntl
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ckptsvc_drivers.linux import System, file_system, in_page_cache
from ckptsvc_drivers.posix import Options, PosixStore

from ckptsvc.errors import ConfigError, NotFound, StoreDenied, StoreError
from ckptsvc.storage import connect
from ckptsvc.storage.testing import MiB, content_of, pages_with, put


def keys(store):
    return sorted(entry.key for entry in store.list())


def store_with(root: Path, system: System, **options) -> PosixStore:
    return PosixStore(str(root), Options(**options), system)


# --- names that lead astray --------------------------------------------------------------------------------------


def test_symbolic_links_are_not_followed(root, store, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    put(store, "step/a", b"1")
    (root / "link").symlink_to(outside)
    (root / "step" / "link").symlink_to("../../outside/secret")
    (root / "step" / "dangling").symlink_to(outside / "made")
    for key in ("link/secret", "step/link", "link/new", "link/deeper/new"):
        for operation in (
            lambda key=key: store.read(key),
            lambda key=key: store.size(key),
            lambda key=key: store.read_into(key, 0, memoryview(bytearray(1))),
        ):
            with pytest.raises((StoreDenied, NotFound)):
                operation()
    with pytest.raises(StoreDenied, match="symbolic links"):
        store.read("link/secret")
    with pytest.raises(StoreDenied, match="symbolic links"):
        put(store, "link/new", b"1")
    with pytest.raises(StoreDenied, match="symbolic links"):
        store.put_if_absent("link/new", b"1")
    with pytest.raises(StoreDenied, match="symbolic links"):
        store.delete("link/secret")
    with pytest.raises(StoreDenied, match="symbolic links"):
        list(store.list("link"))
    assert keys(store) == ["step/a"], "links are no objects and are not looked into"
    assert list(store.children()) == ["step"]
    assert store.put_if_absent("step/dangling", b"1") is False, "nothing is created through a link"
    put(store, "step/link", b"new")
    assert (root / "step/link").read_bytes() == b"new"
    assert sorted(path.name for path in outside.iterdir()) == ["secret"]
    assert (outside / "secret").read_bytes() == b"secret"


def test_the_root_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    store = connect(str(tmp_path / "link"))
    put(store, "a", b"1")
    assert (tmp_path / "real/a").read_bytes() == b"1"
    store.close()


def test_what_is_no_file_is_not_read(root, store):
    put(store, "dir/a", b"1")
    os.mkfifo(root / "dir/pipe")
    for key in ("dir", "dir/pipe"):
        with pytest.raises(NotFound):
            store.read(key)
    assert keys(store) == ["dir/a"]
    with pytest.raises(StoreError):
        put(store, "dir", b"1")
    with pytest.raises(NotFound, match="ENOTDIR"):
        put(store, "dir/a/below", b"1")


def test_foreign_names_are_passed_over(root, store):
    put(store, "a", b"1")
    with open(os.path.join(os.fsencode(root), b"\xff\xfe"), "wb"):
        pass
    assert keys(store) == ["a"]
    assert list(store.children()) == ["a"]


def test_empty_directories_go(root, store):
    for key in ("step/deep/a", "step/deep/b", "other/a"):
        put(store, key, b"1")
    store.delete("step/deep/a")
    assert (root / "step/deep/b").exists()
    store.delete("step/deep/b")
    assert sorted(path.name for path in root.iterdir()) == ["other"]
    store.delete("other/a")
    assert list(root.iterdir()) == [], "the root stays"


def test_the_file_system_is_that_of_the_innermost_mount(small_disk, tmp_path):
    assert file_system(str(small_disk / "not" / "yet")) == "tmpfs"
    assert file_system(str(small_disk)) == "tmpfs"
    assert file_system(str(tmp_path / "smaller")) == file_system(str(tmp_path))
    notes = connect(str(small_disk)).capabilities().notes
    assert notes == ("file system: tmpfs",)


@pytest.mark.parametrize("url", ["file://host/path", "file://", "file://relative", "file:///a\0b"])
def test_bad_addresses(url):
    with pytest.raises(ConfigError, match="file:///absolute/path"):
        connect(url)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"thread": 4}, "thread"),
        ({"threads": 0}, "threads"),
        ({"threads": "many"}, "threads"),
        ({"block": 1000}, "block"),
        ({"direct": "perhaps"}, "direct"),
    ],
)
def test_bad_options(tmp_path, options, word):
    with pytest.raises(ConfigError, match=word):
        connect(str(tmp_path), options)


def test_options_may_be_text(tmp_path):
    store = connect(str(tmp_path), {"threads": "2", "block": "65536", "direct": "false"})
    assert "option" in store.capabilities().direct_io
    store.close()


# --- threads ------------------------------------------------------------------------------------


def test_concurrent_writes_share_few_threads(root):
    class Counting(System):
        def __init__(self):
            self.running = self.most = 0
            self.lock = threading.Lock()

        def pwrite(self, fd, part, offset):
            with self.lock:
                self.running += 1
                self.most = max(self.most, self.running)
            try:
                time.sleep(0.002)
                return super().pwrite(fd, part, offset)
            finally:
                with self.lock:
                    self.running -= 1

    system = Counting()
    store = store_with(root, system, threads=3, block=1 << 16)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: put(store, str(number), bytes(2 * MiB)), range(8)))
    assert system.most == 3
    store.close()


def test_a_write_waits_for_its_progress(root):
    """Nothing is queued far ahead: a rate limit holds, and other writers get their turn in the threads."""

    class Counting(System):
        calls = 0

        def pwrite(self, fd, part, offset):
            self.calls += 1
            return super().pwrite(fd, part, offset)

    system = Counting()
    store = store_with(root, system, threads=1, block=1 << 16)
    seen = []

    def progress(nbytes):
        if not seen:
            time.sleep(0.2)
            seen.append(system.calls)

    with pages_with(bytes(4 * MiB)) as data:
        store.write("a", data, 4 * MiB, progress=progress)
    assert seen[0] <= 2
    assert system.calls == 64
    store.close()


# --- direct I/O ------------------------------------------------------------------------------------------------------


class Watching(System):
    """Notes which blocks were moved by direct I/O."""

    def __init__(self):
        self.direct = []

    def _note(self, fd):
        self.direct.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT))

    def pread(self, fd, part, offset):
        self._note(fd)
        return super().pread(fd, part, offset)

    def pwrite(self, fd, part, offset):
        self._note(fd)
        return super().pwrite(fd, part, offset)


@pytest.mark.parametrize("size", [1, 4096, 3 * MiB + 1])
def test_writes_of_any_size_are_direct_to_the_last_byte(root, size):
    system = Watching()
    store = store_with(root, system, block=1 << 20)
    put(store, "a", b"makes the directory")
    if store.capabilities().direct_io:
        pytest.skip("no direct I/O here")
    system.direct.clear()
    content = content_of(size)
    put(store, "a", content)
    assert system.direct == [True] * -(-size // MiB)
    assert (root / "a").read_bytes() == content
    store.close()


def test_only_aligned_memory_is_written_directly(root):
    """GlusterFS refuses other memory after it has said that all is written."""
    system = Watching()
    store = store_with(root, system)
    content = content_of(2 * MiB)
    with pages_with(content) as data:
        store.write("a", data[1:], MiB)
        store.write("b", data[:MiB].toreadonly(), MiB)
    assert (root / "a").read_bytes() == content[1 : MiB + 1]
    if store.capabilities().direct_io:
        pytest.skip("no direct I/O here")
    assert system.direct[:2] == [False, True]
    store.close()


def test_files_are_read_in_blocking_mode(root):
    """On Lustre a read with O_NONBLOCK fails where another node holds a lock."""

    class Blocking(System):
        seen = ()

        def pread(self, fd, part, offset):
            self.seen += (os.get_blocking(fd),)
            return super().pread(fd, part, offset)

    store = store_with(root, system := Blocking())
    put(store, "a", b"1")
    assert store.read("a") == b"1"
    assert system.seen == (True,)
    store.close()


def test_cold_reads_are_direct_and_warm_ones_are_not(root):
    system = Watching()
    store = store_with(root, system)
    content = content_of(24 * MiB + 100)
    put(store, "a", content)
    if store.capabilities().direct_io:
        pytest.skip("no direct I/O here")
    system.direct.clear()
    fd = os.open(root / "a", os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if in_page_cache(fd, 0, 24 * MiB):
        pytest.skip("this file system keeps its pages")
    with pages_with(bytes(len(content))) as buffer:
        store.read_into("a", 0, buffer[: len(content)])
        assert buffer[: len(content)] == content
        assert system.direct == [True, True, True, False], "three blocks, and a tail shorter than a page"
        system.direct.clear()
        store.read_into("a", 4096, buffer[:MiB])
        assert system.direct == [True]
        assert buffer[:MiB] == content[4096 : 4096 + MiB]
        system.direct.clear()
        store.read_into("a", 4096, buffer[: MiB - 1])  # short
        store.read_into("a", 100, buffer[:MiB])  # not aligned in the file
        store.read_into("a", 4096, buffer[100 : 100 + MiB])  # not aligned in memory
        assert system.direct == [False] * 3
        (root / "a").read_bytes()
        assert in_page_cache(fd, 0, 24 * MiB)
        system.direct.clear()
        store.read_into("a", 0, buffer[: len(content)])
        assert buffer[: len(content)] == content
        assert not any(system.direct)
    os.close(fd)
    store.close()
