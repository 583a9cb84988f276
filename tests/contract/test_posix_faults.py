"""The posix driver when things go wrong: killed processes, full and read-only disks, lost answers, late writers."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.posix import Options, PosixStore

from ckptsvc.errors import StoreDenied, StoreError, StoreFull, StoreUnavailable
from ckptsvc.storage import TEMPORARY_PREFIX, connect
from ckptsvc.storage.testing import MiB, content_of, pages_with, put


def python(script: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def keys(store):
    return sorted(entry.key for entry in store.list())


def store_with(root: Path, system: System, **options) -> PosixStore:
    return PosixStore(str(root), Options(**options), system)


class Failing(System):
    """Fails the `nth` call of one kind with one error; the calls before it work."""

    def __init__(self, call: str, number: int, nth: int = 1):
        self.number, self.left = number, nth
        setattr(self, call, self._failing(getattr(System, call)))

    def _failing(self, real):
        lock = threading.Lock()

        def call(*arguments):
            with lock:
                self.left -= 1
                now = self.left == 0
            if now:
                raise OSError(self.number, os.strerror(self.number))
            return real(self, *arguments)

        return call


# --- several processes -------------------------------------------------------------------------------------------

RACE = """
import errno, sys
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.posix import Options, PosixStore

class NoLinks(System):
    def link(self, *_):
        raise OSError(errno.EPERM, "no links")

root, me, links = sys.argv[1:]
store = PosixStore(root, Options(), System() if links == "links" else NoLinks())
print("ready", flush=True)
sys.stdin.readline()
for turn in range(40):
    if store.put_if_absent(f"turn-{turn}/COMMIT", me.encode() * 1000):
        print(turn, flush=True)
"""


@pytest.mark.parametrize("links", ["links", "no links"])
@pytest.mark.parametrize("place", ["tmp_path", "shared_memory"])
def test_eight_processes_commit_and_one_wins(place, links, request):
    root = request.getfixturevalue(place)
    racers = [python(RACE, str(root), f"racer-{number}", links) for number in range(8)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners: dict[int, list[int]] = {}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        for turn in out.split():
            winners.setdefault(int(turn), []).append(number)
    store = connect(str(root))
    assert sorted(winners) == list(range(40))
    for turn, won in winners.items():
        assert len(won) == 1
        assert store.read(f"turn-{turn}/COMMIT") == f"racer-{won[0]}".encode() * 1000
    assert keys(store) == sorted(f"turn-{turn}/COMMIT" for turn in range(40)), "nothing temporary is left"
    store.close()


def test_a_process_killed_before_its_commit_has_not_committed(root, store):
    racer = python(
        """
import os, signal, sys
from ckptsvc_drivers.linux import System
from ckptsvc_drivers.posix import Options, PosixStore
class Killed(System):
    def link(self, *_):
        os.kill(os.getpid(), signal.SIGKILL)
PosixStore(sys.argv[1], Options(), Killed()).put_if_absent("step/COMMIT", b"never")
""",
        str(root),
    )
    racer.communicate(timeout=60)
    assert racer.returncode == -signal.SIGKILL
    assert list(store.children("step")) == [], "readers see nothing"
    (left,) = keys(store)
    assert left.startswith(f"step/{TEMPORARY_PREFIX}"), "gc sees what is left"
    assert store.put_if_absent("step/COMMIT", b"mine")
    store.delete(left)
    assert keys(store) == ["step/COMMIT"]


def test_a_forked_child_can_use_the_store(root, store):
    put(store, "parent", content_of(9 * MiB, 1))  # the threads are running now
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(20)  # a child that waits for its parent's threads would wait for ever
            put(store, "child", content_of(9 * MiB, 2))
            store.close()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (root / "child").read_bytes() == content_of(9 * MiB, 2)
    put(store, "parent", content_of(9 * MiB, 3))
    assert (root / "parent").read_bytes() == content_of(9 * MiB, 3)


# --- disks that refuse -------------------------------------------------------------------------------------------


def used(path: Path) -> int:
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.mark.parametrize("reserve", [True, False])
@pytest.mark.parametrize("direct", [True, False])
def test_a_full_disk_is_not_left_full(small_disk, direct, reserve):
    class Counting(System):
        written = 0

        def reserve(self, fd, nbytes):
            if reserve:  # if not, the disk fills up in mid-write
                super().reserve(fd, nbytes)

        def pwrite(self, fd, part, offset):
            moved = super().pwrite(fd, part, offset)
            self.written += moved
            return moved

    system = Counting()
    store = store_with(small_disk / "run", system, direct=direct)
    put(store, "step-1/good", content_of(2 * MiB))
    before, written = used(small_disk), system.written
    content = content_of(14 * MiB)
    for _ in range(3):
        with pages_with(content) as data, pytest.raises(StoreFull, match="ENOSPC") as caught:
            store.write("step-2/big", data, len(content))
        assert not caught.value.retryable
    assert not reserve or system.written == written, "noticed before a byte was written"
    assert keys(store) == ["step-1/good"]
    assert used(small_disk) <= before + MiB
    assert store.read("step-1/good") == content_of(2 * MiB)
    put(store, "step-2/small", content_of(2 * MiB))
    store.close()


def test_a_record_on_a_full_disk_is_absent(small_disk):
    store = store_with(small_disk, System())
    with pytest.raises(StoreFull):
        store.put_if_absent("step/COMMIT", content_of(16 * MiB))
    assert keys(store) == []
    assert store.put_if_absent("step/COMMIT", b"small enough")
    store.close()


def test_a_read_only_file_system(small_disk):
    store = connect(str(small_disk / "run"))
    put(store, "a", b"there")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for operation in (
        lambda: put(store, "b", b"1"),
        lambda: store.put_if_absent("b", b"1"),
        lambda: store.delete("a"),
        lambda: put(store, "new/b", b"1"),
    ):
        with pytest.raises(StoreDenied, match="read-only") as caught:
            operation()
        assert not caught.value.retryable
    assert store.read("a") == b"there"
    assert "written" in store.capabilities().direct_io
    store.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_a_directory_of_somebody_else(root, store, tmp_path):
    put(store, "step/a", b"there")
    os.chmod(root / "step", 0o755)
    for path in (tmp_path, *tmp_path.parents[:-2]):
        os.chmod(path, 0o755)
    os.seteuid(65534)
    try:
        with pytest.raises(StoreDenied):
            put(store, "step/b", b"1")
        with pytest.raises(StoreDenied):
            store.put_if_absent("step/b", b"1")
    finally:
        os.seteuid(0)
    assert keys(store) == ["step/a"]


def open_in(root):
    """What this process has open there; other tests may have left something else for the garbage collector."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of the directory that is listed
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return sorted(path for path in found if path.startswith(str(root)))


@pytest.mark.parametrize("call", ["reserve", "pwrite", "sync"])
@pytest.mark.parametrize(
    ("number", "kind", "retryable"),
    [
        (errno.EIO, StoreError, True),
        (errno.ENOSPC, StoreFull, False),
        (errno.EDQUOT, StoreFull, False),
        (errno.EROFS, StoreDenied, False),
        (errno.ETIMEDOUT, StoreUnavailable, True),
        (errno.ESTALE, StoreUnavailable, True),
    ],
)
def test_any_error_leaves_nothing_behind(root, call, number, kind, retryable):
    content = content_of(20 * MiB + 5)
    nth = 2 if call == "pwrite" else 1
    store = store_with(root, Failing(call, number, nth))
    before = open_in(root)
    with pages_with(content) as data:
        with pytest.raises(kind, match=errno.errorcode[number]) as caught:
            store.write("step/a", data, len(content))
        assert type(caught.value) is kind
        assert caught.value.retryable is retryable
        assert keys(store) == []
        store.write("step/a", data, len(content))
    assert (root / "step/a").read_bytes() == content
    assert open_in(root) == before
    store.close()


@pytest.mark.parametrize("call", ["open", "pwrite", "sync", "link"])
def test_an_error_in_a_commit_leaves_nothing_behind(root, call):
    (root / "step").mkdir(parents=True)
    store = store_with(root, Failing(call, errno.EIO))
    with pytest.raises(StoreError, match="EIO"):
        store.put_if_absent("step/COMMIT", b"record")
    assert keys(store) == []
    assert store.put_if_absent("step/COMMIT", b"record")
    store.close()


def test_a_file_system_that_cannot_sync_directories(root):
    class NoDirectorySync(System):
        def sync(self, fd):
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            super().sync(fd)

    store = store_with(root, NoDirectorySync())
    put(store, "step/a", b"1")
    assert store.put_if_absent("step/COMMIT", b"1")
    store.close()


@pytest.mark.parametrize("gone", [True, False])
def test_a_directory_that_changes_its_handle_is_looked_up_again(root, gone):
    """ESTALE: it was removed with what is in it, or its server has another handle for it by now."""

    class Stale(System):
        left, synced = 1, 0

        def sync(self, fd):
            ours = os.readlink(f"/proc/self/fd/{fd}") == str(root / "step")
            if ours and self.left:
                self.left = 0
                if gone:
                    (root / "step/a").unlink()
                    (root / "step").rmdir()
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            self.synced += ours
            super().sync(fd)

    store = store_with(root, system := Stale())
    put(store, "step/a", b"1")
    assert (root / "step/a").exists() != gone
    assert system.synced == (not gone)
    store.close()


def test_everything_is_synced_before_return(root):
    class Recorder(System):
        def __init__(self):
            self.synced = []

        def sync(self, fd):
            super().sync(fd)
            self.synced.append(os.fstat(fd).st_ino)

    system = Recorder()
    store = store_with(root, system)
    put(store, "step/a", b"1")
    expected = {path.stat().st_ino for path in (root / "step/a", root / "step", root, root.parent)}
    assert expected <= set(system.synced), "the file, and every directory that has a new name in it"
    system.synced.clear()
    store.put_if_absent("step/COMMIT", b"1")
    assert {(root / "step/COMMIT").stat().st_ino, (root / "step").stat().st_ino} <= set(system.synced)
    system.synced.clear()
    store.delete("step/COMMIT")
    assert (root / "step").stat().st_ino in system.synced
    store.close()


# --- answers that get lost, writers that are late ------------------------------------------------------------------


def test_a_link_whose_answer_was_lost_still_won(root):
    class LostAnswer(System):
        def link(self, source, target, directory):
            super().link(source, target, directory)
            super().link(source, target, directory)  # what a network file system's own second try meets

    store = store_with(root, LostAnswer())
    assert store.put_if_absent("COMMIT", b"mine")
    assert store.put_if_absent("COMMIT", b"other") is False
    assert store.read("COMMIT") == b"mine"
    assert keys(store) == ["COMMIT"]
    store.close()


def test_a_claim_that_fails_is_withdrawn(root, monkeypatch):
    class NoLinks(System):
        def link(self, source, target, directory):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    store = store_with(root, NoLinks())
    with monkeypatch.context() as patch:

        def rename(*arguments, **more):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "rename", rename)
        with pytest.raises(StoreError, match="EIO"):
            store.put_if_absent("COMMIT", b"mine")
    assert keys(store) == []
    assert store.put_if_absent("COMMIT", b"other")
    store.close()


@pytest.mark.parametrize("then_fails", [False, True])
def test_a_late_writer_harms_nobody(root, store, then_fails):
    """One that hung while its object was written again elsewhere, and then wakes up."""
    arrived, go_on = threading.Event(), threading.Event()

    class Hanging(System):
        def pwrite(self, fd, part, offset):
            arrived.set()
            go_on.wait(30)
            if then_fails:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return super().pwrite(fd, part, offset)

    late = store_with(root, Hanging())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(put, late, "step/a", content_of(3 * MiB, 1))
        assert arrived.wait(30)
        put(store, "step/a", content_of(2 * MiB, 2))
        go_on.set()
        error = future.exception(30)
    assert (error is not None) == then_fails
    assert (root / "step/a").read_bytes() == content_of(2 * MiB, 2)
    late.close()


def test_a_fallback_in_mid_write_keeps_every_byte(root):
    """The third block is refused by direct I/O: all later ones go through the page cache, none is lost."""
    system = Failing("pwrite", errno.EINVAL, nth=3)
    store = store_with(root, system, threads=2, block=1 << 20)
    content = content_of(9 * MiB + 77)
    put(store, "a", content)
    assert system.left < 0
    assert (root / "a").read_bytes() == content
    store.close()
