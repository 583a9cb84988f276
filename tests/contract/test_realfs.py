"""The drivers on real parallel file systems, and what is left when their servers are killed.

CephFS, GlusterFS (erasure coded and distributed) and MooseFS are started here from Debian's packages:
`make test-realfs` installs them. They need root and FUSE.
"""

import os
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ckptsvc_drivers.posix import Options, PosixStore
from harness.posix_suite import Posix
from harness.realfs.gluster import Gluster
from harness.realfs.moosefs import MooseFS
from harness.realfs.writers import Writers
from harness.runtime import eventually

from ckptsvc.errors import StoreError, StoreFull
from ckptsvc.storage import Store, connect
from ckptsvc.storage.testing import MiB, content_of, pages_with, put

pytestmark = [pytest.mark.slow, pytest.mark.realfs, pytest.mark.timeout(600)]

TESTS = Path(__file__).parents[1]
LAYOUT = "ceph.file.layout"


@pytest.fixture(scope="module")
def gluster() -> Iterator[Gluster]:
    server = Gluster()
    yield server
    server.close()


@pytest.fixture(scope="module")
def moosefs() -> Iterator[MooseFS]:
    servers = MooseFS()
    yield servers
    servers.close()


@pytest.fixture(scope="module")
def cephfs(ceph) -> Path:
    return ceph.mount(ceph.folder / "mount")


@pytest.fixture(scope="module")
def coded(gluster) -> Path:
    return gluster.mount("coded", gluster.daemons.folder / "coded")


@pytest.fixture(scope="module")
def spread(gluster) -> Path:
    return gluster.mount("spread", gluster.daemons.folder / "spread")


@pytest.fixture(scope="module")
def moose(moosefs) -> Path:
    return moosefs.mount(moosefs.daemons.folder / "mount")


class Mounted(Posix):
    """The conformance suite on a mounted file system."""

    @pytest.fixture
    def place(self) -> Path:
        raise NotImplementedError

    @pytest.fixture
    def store(self, place) -> Iterator[Store]:
        store = connect(str(place / uuid.uuid4().hex))
        yield store
        store.close()

    def test_processes_race_for_a_commit(self, store):
        """On several stores of the same place, each in a thread of its own."""
        others = [self.another(store) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for turn in range(20):
                key = f"turn-{turn}/COMMIT"
                won = list(pool.map(lambda other, key=key: other.put_if_absent(key, b"x" * 1000), others))
                assert sum(won) == 1
        for other in others:
            other.close()


class TestCephFS(Mounted):
    @pytest.fixture
    def place(self, cephfs):
        return cephfs


class TestGlusterCoded(Mounted):
    @pytest.fixture
    def place(self, coded):
        return coded


class TestGlusterSpread(Mounted):
    @pytest.fixture
    def place(self, spread):
        return spread


class TestMooseFS(Mounted):
    @pytest.fixture
    def place(self, moose):
        return moose


# --- striping on CephFS --------------------------------------------------------------------------------------------


def layout_of(path: Path) -> dict[str, str]:
    return dict(word.split("=") for word in os.getxattr(path, LAYOUT).decode().split())


@pytest.fixture
def striped(cephfs):
    """Makes stores in a new directory of CephFS, with options."""
    made = []

    def make(**options) -> PosixStore:
        made.append(connect(str(cephfs / uuid.uuid4().hex), options))
        return made[-1]

    yield make
    for store in made:
        store.close()


def path_in(store: PosixStore, key: str) -> Path:
    return Path(store.url.removeprefix("file://"), key)


def test_large_files_on_cephfs_are_striped_as_asked(striped):
    store = striped(stripes=3)
    content = content_of(70 * MiB + 77)
    put(store, "step/large", content)
    put(store, "step/small", content[:1000])
    assert layout_of(path_in(store, "step/large")) == {
        "stripe_unit": str(8 * MiB),
        "stripe_count": "3",
        "object_size": str(32 * MiB),
        "pool": "data",
    }
    assert store.layout("step/large") == (3, 8 * MiB, (), "")
    assert layout_of(path_in(store, "step/small"))["stripe_count"] == "1"
    assert path_in(store, "step/large").read_bytes() == content
    assert any(LAYOUT in note for note in store.capabilities().notes)


def test_a_file_of_one_stripe_has_objects_as_large_as_a_transfer(striped):
    store = striped()
    put(store, "a", bytes(2 * MiB))
    assert store.layout("a")[:2] == (1, 8 * MiB)
    assert layout_of(path_in(store, "a"))["object_size"] == str(8 * MiB)


def test_a_layout_that_cephfs_refuses_costs_nothing_but_the_layout(striped):
    store = striped(stripes=2, pool="absent")
    put(store, "a", content_of(2 * MiB))
    layout = store.layout("a")
    assert layout[:2] == (1, 4 * MiB), "the default"
    assert "pool=absent" in layout.problem
    assert store.read("a") == content_of(2 * MiB)


def test_without_striping_the_default_of_the_directory_holds(striped):
    store = striped(striping=False)
    put(store, "step/first", b"1")
    os.setxattr(path_in(store, "step"), "ceph.dir.layout", b"stripe_unit=1048576 stripe_count=2 object_size=2097152")
    put(store, "step/a", bytes(2 * MiB))
    assert layout_of(path_in(store, "step/a"))["stripe_count"] == "2"
    assert store.layout("step/a") is None


def test_a_layout_is_fixed_by_the_first_byte(striped):
    """The life cycle that Lustre's has as well, but with an error."""
    store = striped(stripes=2)
    put(store, "a", bytes(2 * MiB))
    with pytest.raises(OSError, match="not empty"):
        os.setxattr(path_in(store, "a"), LAYOUT, b"stripe_count=4")


def test_a_quota_is_a_full_store(striped):
    """EDQUOT in mid-write, of a directory of CephFS: nothing half is left, and what fits still goes in."""
    store = striped()
    put(store, "step-1/good", bytes(2 * MiB))
    root = path_in(store, "step-1").parent
    os.setxattr(root, "ceph.quota.max_bytes", b"%d" % (24 * MiB))
    content = content_of(100 * MiB)
    with pages_with(content) as data, pytest.raises(StoreFull, match="quota is used up") as caught:
        store.write("step-2/large", data, len(content))
    assert not caught.value.retryable
    assert [entry.key for entry in store.list()] == ["step-1/good"]
    os.setxattr(root, "ceph.quota.max_bytes", b"0")  # no limit: its clients learn late of space that has become free
    put(store, "step-2/small", content[: 2 * MiB])
    assert store.put_if_absent("step-2/COMMIT", b"record")


# --- servers and clients that are killed ----------------------------------------------------------------------------


def test_a_killed_object_server_loses_nothing(ceph, cephfs, tmp_path):
    """The writers wait until it is back; a client that has cached nothing finds all of it."""
    store = connect(str(cephfs / "killed-osd"), {"stripe_size": MiB})
    writers = Writers(lambda key, content: put(store, key, content))
    for _ in range(2):
        writers.wait_for(3)
        ceph.kill("osd")
        time.sleep(1)
        ceph.start("osd")
    writers.wait_for(3)
    writers.end()
    assert not writers.failures, "a write that waits is no failure"
    store.close()
    ceph.daemons.unmount(cephfs)
    ceph.mount(cephfs)
    writers.check(lambda key: (cephfs / "killed-osd" / key).read_bytes())


def test_a_killed_client_loses_nothing_that_was_acknowledged(ceph, cephfs):
    """ceph-fuse dies with what it had cached: what `write` has returned for is in the cluster."""
    point = ceph.daemons.mount("second", ceph.folder / "second", *ceph.client(ceph.folder / "second"))
    store = PosixStore(str(point / "killed-client"), Options(stripe_size=MiB))  # each file in four objects
    writers = Writers(lambda key, content: put(store, key, content))
    writers.wait_for(4)
    ceph.kill("second")
    eventually(lambda: writers.failures, "the writers to notice")
    writers.end()
    assert all(isinstance(error, StoreError) for error in writers.failures)
    store.close()
    writers.check(lambda key: (cephfs / "killed-client" / key).read_bytes())


def test_one_brick_of_three_may_be_lost(gluster, coded):
    """Writing and reading go on while a third of each file is missing; afterwards the brick is healed."""
    store = connect(str(coded / "killed-brick"))
    writers = Writers(lambda key, content: put(store, key, content))
    writers.wait_for(3)
    gluster.kill_brick(1)
    writers.wait_for(4)
    assert store.put_if_absent("step/COMMIT", b"while a brick is gone")
    gluster.start_bricks("coded")
    writers.wait_for(2)
    writers.end()
    assert not writers.failures
    writers.check(lambda key: store.read(key))
    eventually(lambda: gluster.unhealed("coded") == 0, "the brick to be healed", 180)
    gluster.kill_brick(0)  # now it is needed
    writers.check(lambda key: store.read(key))
    assert store.read("step/COMMIT") == b"while a brick is gone"
    gluster.start_bricks("coded")
    store.close()
