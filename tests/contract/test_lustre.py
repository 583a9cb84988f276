"""Layouts of large files: chosen, asked for, read back; and that nothing of it ever fails a write.

"Protocol double" (tests/harness/lustre_double.py) is a FUSE file system that answers as recorded of Lustre 2.17. With
`-m lustre --lustre-dir=DIRECTORY` the same is tried on a real Lustre.
"""

import errno
import os
import struct
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from ckptsvc_drivers import lustre_striping
from ckptsvc_drivers.linux import System, file_system
from ckptsvc_drivers.lustre import LustreStore
from ckptsvc_drivers.lustre_layout import ALL_TARGETS, Component, decode, encode
from ckptsvc_drivers.lustre_striping import DELAY_CREATE, SUPER_MAGIC, LustreStriping
from ckptsvc_drivers.posix import Options, PosixStore
from ckptsvc_drivers.striping import CephStriping, Piece, StripingOptions, aligned_block, plan
from harness import lustre_double
from harness.posix_suite import Posix

from ckptsvc.errors import ConfigError, StoreDenied, StoreError, StoreFull
from ckptsvc.storage import Layout, Spreading, Store, connect
from ckptsvc.storage.testing import MiB, content_of, put

GiB, TiB = 1 << 30, 1 << 40
BLOCK = 8 * MiB


# --- what is chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nbytes", "writers", "targets", "stripes"),
    [
        (100 * MiB, 0, 0, 1),
        (GiB, 0, 0, 1),
        (GiB + 1, 0, 0, 2),
        (10 * GiB, 0, 0, 4),
        (10 * GiB, 10_000, 160, 1),  # more writers than targets: they load all targets as it is
        (10 * GiB, 80, 160, 2),
        (100 * GiB, 4, 160, 8),
        (100 * GiB, 1, 3, 3),
        (5 * TiB, 10_000, 160, 5),  # no object larger than 1 TiB
        (10 * GiB, 8, 0, 4),
    ],
)
def test_stripes_follow_from_size_and_writers(nbytes, writers, targets, stripes):
    assert plan(nbytes, writers, targets, BLOCK, StripingOptions()) == [Piece(None, stripes)]


@pytest.mark.parametrize(
    ("options", "targets", "stripes"),
    [
        ({"stripes": 3}, 0, 3),
        ({"stripes": 8}, 4, 4),
        ({"stripes": 8, "overstripe": True}, 4, 8),
        ({"stripes": -1}, 4, -1),
        ({"stripes": 3, "progressive": True}, 0, 3),
    ],
)
def test_the_operator_may_choose(options, targets, stripes):
    assert plan(GiB, 0, targets, BLOCK, StripingOptions(**options)) == [Piece(None, stripes)]


def test_progressive_layouts_have_the_steps_a_file_reaches():
    progressive = StripingOptions(progressive=True)
    assert plan(100 * MiB, 0, 0, BLOCK, progressive) == [Piece(None, 1)]
    assert plan(GiB, 0, 0, BLOCK, progressive) == [Piece(256 * MiB, 1), Piece(None, 4)]
    assert plan(9 * GiB, 0, 0, BLOCK, progressive) == [Piece(256 * MiB, 1), Piece(4 * GiB, 4), Piece(None, -1)]
    ends = [piece.end for piece in plan(9 * GiB, 0, 0, 48 * MiB, progressive)]
    assert ends == [288 * MiB, 86 * 48 * MiB, None], "whole stripes"


@pytest.mark.parametrize(
    ("block", "stripe", "aligned"),
    [(BLOCK, 0, BLOCK), (BLOCK, BLOCK, BLOCK), (BLOCK, MiB, BLOCK), (BLOCK, 16 * MiB, BLOCK), (BLOCK, 3 * MiB, 6 * MiB),
     (BLOCK, 12 * MiB, 4 * MiB)],
)  # fmt: skip
def test_transfers_fit_stripes(block, stripe, aligned):
    assert aligned_block(block, stripe) == aligned
    for offset in range(0, 24 * MiB, aligned):
        assert not stripe or offset % stripe + aligned <= stripe or aligned % stripe == 0


@pytest.mark.parametrize(
    "options",
    [{"stripes": -2}, {"stripes": 2001}, {"stripe_size": 1000}, {"pool": "a" * 16}, {"pool": "a b"}, {"writers": -1}],
)
def test_bad_options(tmp_path, options):
    for scheme in ("file", "lustre"):
        with pytest.raises(ConfigError, match=next(iter(options))):
            connect(f"{scheme}://{tmp_path}", options)


@pytest.mark.parametrize("url", ["lustre://host/path", "lustre://", "lustre:///a\0b"])
def test_bad_addresses(url):
    with pytest.raises(ConfigError, match="lustre:///absolute/path"):
        connect(url)


# --- where there is no Lustre --------------------------------------------------------------------------------------


class TestLustreElsewhere(Posix):
    """`lustre://` on another file system stores as well as `file://`, and says what is missing."""

    @pytest.fixture
    def store(self, quick_place):
        store = connect(f"lustre://{quick_place}")
        yield store
        store.close()

    def test_it_says_so(self, store, quick_place):
        put(store, "a", bytes(2 * MiB))
        kind = file_system(str(quick_place))
        assert store.layout("a").problem == f"{quick_place} is not on Lustre but on {kind}"
        assert store.capabilities().notes[-1] == store.layout("a").problem


class SaysLustre(System):
    """f_type of Lustre, on whatever it really is."""

    def kind(self, fd):
        return SUPER_MAGIC


@pytest.mark.parametrize("place", ["tmp_path", "shared_memory"])
def test_a_file_system_that_knows_no_layouts(place, request):
    """ext4, tmpfs and others: EOPNOTSUPP and ENOTTY, once each; then the files are made as ever."""

    class Counting(SaysLustre):
        asked = 0

        def set_attribute_of(self, *arguments):
            Counting.asked += 1
            super().set_attribute_of(*arguments)

        def ioctl(self, *arguments):
            Counting.asked += 1
            super().ioctl(*arguments)

    root = request.getfixturevalue(place) / "run"
    store = PosixStore(str(root), Options(), Counting())
    for number in range(5):
        put(store, f"step/{number}", content_of(2 * MiB, number))
        assert (root / f"step/{number}").read_bytes() == content_of(2 * MiB, number)
        assert "lustre.lov" in store.layout(f"step/{number}").problem
    assert Counting.asked <= 6, "counts of servers and targets, and each way once"
    assert any("LL_IOC_LOV_SETSTRIPE" in note for note in store.capabilities().notes)
    assert sorted(entry.key for entry in store.list()) == [f"step/{number}" for number in range(5)]
    store.close()


def test_elsewhere_nothing_is_asked(root):
    class Strict(System):
        def set_attribute(self, *_):
            raise AssertionError

        set_attribute_of = ioctl = mknod = set_attribute

    store = PosixStore(str(root), Options(), Strict())
    put(store, "a", bytes(2 * MiB))
    assert isinstance(store, Spreading)
    assert store.layout("a") is None
    store.close()


# --- the protocol double -------------------------------------------------------------------------------------------


class OnDouble(SaysLustre):
    """The ioctl goes to the double by the attribute that stands for it."""

    def __init__(self, targets=0, servers=0):
        self.found = targets, servers
        self.directories = []

    def ioctl(self, fd, request, buffer):
        if request == lustre_striping.COUNT_TARGETS:
            (servers,) = struct.unpack("=q", buffer)
            if not any(self.found):
                raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
            struct.pack_into("=i", buffer, 0, self.found[servers])
        elif request == lustre_striping.SET_DEFAULT_DIRECTORIES:
            self.directories.append((os.readlink(f"/proc/self/fd/{fd}"), bytes(buffer)))
        else:
            os.setxattr(fd, lustre_double.IOCTL, bytes(buffer))


@pytest.fixture
def double(tmp_path, _programs, request):
    with lustre_double.mounted(_programs, tmp_path, **getattr(request, "param", {})) as point:
        yield point


def store_on(point: Path, system: System | None = None, **options) -> PosixStore:
    return PosixStore(str(point / "run"), Options(**options), system or OnDouble())


def given(point: Path, key: str) -> tuple[Component, ...]:
    return decode(os.getxattr(point / "run" / key, lustre_double.LOV))


@pytest.fixture(scope="module")
def point(tmp_path_factory, _programs):
    """One double for all tests of the suite."""
    with lustre_double.mounted(_programs, tmp_path_factory.mktemp("double")) as point:
        yield point


class TestProtocolDouble(Posix):
    """The data path is the same where files get layouts; small files inherit theirs."""

    @pytest.fixture
    def store(self, point):
        store = LustreStore(str(point / uuid.uuid4().hex), Options(), OnDouble())
        yield store
        store.close()

    def another(self, store):
        return LustreStore(store.url.removeprefix("lustre://"), Options(), OnDouble())


def test_a_layout_is_set_and_read_back(double):
    store = store_on(double, OnDouble(targets=4), stripes=3)
    content = content_of(17 * MiB + 5)
    put(store, "step/a", content)
    (component,) = given(double, "step/a")
    assert (component.stripes, component.stripe_size, len(component.targets)) == (3, BLOCK, 3)
    assert store.layout("step/a") == Layout(3, BLOCK, component.targets, "")
    assert store.layout("step/a") is None, "told once"
    assert (double / "run/step/a").read_bytes() == content
    put(store, "step/small", bytes(MiB - 1))
    assert given(double, "step/small")[0].stripe_size == 4 * MiB, "the default of its directory"
    put(store, "step/a", bytes(2 * MiB))  # again, over the old one
    assert given(double, "step/a")[0].stripes == 3
    store.close()


def test_writers_count(double):
    """Who knows how many write says so; many writers on few targets take one each."""
    layouts = []
    for writers in (1, 2, 100):
        striping = LustreStriping(OnDouble(targets=4), Options(), BLOCK)
        fd = os.open(double, os.O_RDONLY | os.O_DIRECTORY)
        created = striping.create(f"w{writers}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, fd, 100 * GiB, writers)
        layouts.append(created.layout)
        os.close(created.fd)
        os.close(fd)
    assert [layout.stripes for layout in layouts] == [4, 2, 1]


def test_what_the_servers_cut_down_is_noticed_and_learned(double):
    """Eight stripes of four targets are four, without an error."""
    system = OnDouble()  # the number of targets is not known
    store = store_on(double, system, stripes=8)
    put(store, "a", bytes(MiB))
    put(store, "b", bytes(MiB))
    assert store.layout("a") == Layout(4, BLOCK, given(double, "a")[0].targets, "4 stripes instead of 8")
    assert store.layout("b").problem == "", "asked for four"
    store.close()


def test_overstriping(double):
    store = store_on(double, OnDouble(targets=4), stripes=8, overstripe=True)
    put(store, "a", bytes(MiB))
    assert store.layout("a")[:2] == (8, BLOCK)
    assert len(given(double, "a")[0].targets) == 8
    store.close()


def test_every_target(double):
    store = store_on(double, stripes=-1)
    put(store, "a", bytes(MiB))
    assert store.layout("a")[0] == 4
    store.close()


def test_a_pool_is_asked_for(double):
    store = store_on(double, stripes=2, pool="flash")
    put(store, "a", bytes(MiB))
    assert given(double, "a")[0].pool == "flash"
    store.close()


def test_progressive_layouts_grow_with_the_file(double):
    striping = LustreStriping(OnDouble(targets=4), Options(progressive=True), BLOCK)
    fd = os.open(double, os.O_RDONLY | os.O_DIRECTORY)
    created = striping.create("a", os.O_CREAT | os.O_EXCL | os.O_WRONLY, fd, 9 * GiB, 0)
    found = decode(os.getxattr(double / "a", lustre_double.LOV))
    assert [(each.end, each.stripes) for each in found[:2]] == [(256 * MiB, 1), (4 * GiB, 4)]
    assert found[2].stripes == ALL_TARGETS
    assert [len(each.targets) for each in found] == [1, 0, 0]
    assert (created.layout.stripes, created.layout.problem) == (4, "")
    os.pwrite(created.fd, b"1", 5 * GiB)
    found = decode(os.getxattr(double / "a", lustre_double.LOV))
    assert [len(each.targets) for each in found] == [1, 0, 4]
    os.close(created.fd)
    os.close(fd)


@pytest.mark.parametrize("double", [{"locked": True}], indirect=True)
def test_the_lock_of_the_administrator_leaves_the_attribute(double):
    """llite.*.enable_setstripe_gid refuses the ioctl only."""
    store = store_on(double, stripes=2)
    put(store, "a", bytes(MiB))
    assert store.layout("a")[0] == 2
    store.close()


class NoAttribute(OnDouble):
    """A client that refuses the attribute of a file, but takes the ioctl and the default of a directory."""

    files = 0

    def set_attribute_of(self, file, directory, name, value):
        if file != ".":
            self.files += 1
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        super().set_attribute_of(file, directory, name, value)


def test_the_ioctl_is_the_second_way(double):
    system = NoAttribute()
    store = store_on(double, system, stripes=2)
    for key in ("a", "b"):
        put(store, key, bytes(MiB))
        assert store.layout(key)[0] == 2
    assert system.files == 1, "a way that is refused is not tried again"
    assert any("Operation not permitted" in note for note in store.capabilities().notes)
    store.close()


@pytest.mark.parametrize("double", [{"locked": True}], indirect=True)
def test_the_default_of_the_directory_is_the_third_way(double):
    store = store_on(double, NoAttribute(), stripes=2)
    lustre_double.forget(double)
    for key in ("step-1/a", "step-1/b", "step-2/a"):
        put(store, key, bytes(MiB))
        assert store.layout(key)[:2] == (2, BLOCK)
    assert lustre_double.counts(double)["setxattr"] == 1 + 2, "the ioctl once, and each directory once"
    store.close()


@pytest.mark.parametrize("double", [{"refuse": errno.EACCES}], indirect=True)
def test_where_all_is_refused_files_have_the_default(double):
    store = store_on(double, stripes=2)
    for key in ("a", "b"):
        put(store, key, content_of(2 * MiB))
        assert store.layout(key)[:2] == (1, 4 * MiB), "what it really is"
        assert (double / "run" / key).read_bytes() == content_of(2 * MiB)
    put(store, "c", bytes(2 * MiB))
    assert "default holds" in store.layout("c").problem
    store.close()


def test_a_layout_that_comes_too_late_is_noticed(double):
    """As where a file has its objects before the attribute is set: no error, no effect; the next way is taken."""

    class Late(OnDouble):
        def mknod(self, name, directory):
            os.close(self.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, directory))

    store = store_on(double, Late(), stripes=2)
    put(store, "a", content_of(2 * MiB))
    assert store.layout("a")[:2] == (2, BLOCK)
    assert [path.name for path in (double / "run").iterdir()] == ["a"]
    assert any("no effect" in note for note in store.capabilities().notes)
    store.close()


def test_a_layout_that_cannot_be_understood_is_told(double):
    class Strange(OnDouble):
        def get_attribute(self, fd, name):
            return b"\xff" * 40

    store = store_on(double, Strange())
    put(store, "a", content_of(2 * MiB))
    assert "cannot be read back" in store.layout("a").problem
    assert store.read("a") == content_of(2 * MiB)
    store.close()


def test_real_errors_are_errors(double):
    class Full(OnDouble):
        number = errno.ENOSPC

        def mknod(self, name, directory):
            raise OSError(self.number, os.strerror(self.number))

    store = store_on(double, system := Full())
    with pytest.raises(StoreFull):
        put(store, "a", bytes(2 * MiB))
    system.number = errno.EROFS
    with pytest.raises(StoreDenied):
        put(store, "a", bytes(2 * MiB))
    system.number = errno.EPERM  # mknod(2) is not permitted here: there are other ways
    put(store, "a", bytes(2 * MiB))
    assert store.layout("a").problem == ""
    store.close()


def test_what_takes_the_place_of_a_new_file_is_not_written_to(double):
    """Between mknod and open, somebody puts a name of another file there: it stays as it is."""
    (double / "run").mkdir()
    (double / "precious").write_bytes(b"precious")

    class Swapped(OnDouble):
        left = 1

        def set_attribute_of(self, file, directory, name, value):
            super().set_attribute_of(file, directory, name, value)
            if self.left:
                self.left = 0
                os.unlink(double / "run" / file)
                os.link(double / "precious", double / "run" / file)

    store = store_on(double, Swapped())
    put(store, "a", bytes(2 * MiB))
    assert (double / "precious").read_bytes() == b"precious"
    assert (double / "run/a").read_bytes() == bytes(2 * MiB)
    store.close()


def test_a_pipe_in_place_of_a_new_file_hangs_nobody(double):
    class Swapped(OnDouble):
        left = 1

        def set_attribute_of(self, file, directory, name, value):
            super().set_attribute_of(file, directory, name, value)
            if self.left:
                self.left = 0
                os.unlink(double / "run" / file)
                os.mkfifo(double / "run" / file)

    store = store_on(double, Swapped())
    with pytest.raises(StoreError):  # ENXIO: nobody reads from it
        put(store, "a", bytes(2 * MiB))
    put(store, "a", bytes(2 * MiB))
    assert (double / "run/a").read_bytes() == bytes(2 * MiB)
    store.close()


def test_new_runs_have_their_directories_spread(double):
    system = OnDouble(targets=4, servers=3)
    store = store_on(double, system, writers=25_000)
    put(store, "step-1/a", bytes(2 * MiB))
    put(store, "step-2/a", bytes(2 * MiB))
    ((where, wanted),) = system.directories
    assert where == str(double / "run")
    assert struct.unpack_from("=IiI", wanted) == (0x0CD30CD0, 3, 0xFFFFFFFF), "names of a step on all three"
    store.close()
    again = store_on(double, system)
    put(again, "step-3/a", bytes(2 * MiB))
    assert len(system.directories) == 1, "a run that exists keeps what its owner chose"
    again.close()


def test_one_metadata_server_is_left_alone(double):
    system = OnDouble(targets=4, servers=1)
    store = store_on(double, system)
    put(store, "a", b"1")
    assert system.directories == []
    store.close()


def test_a_save_of_many_ranks_costs_a_few_operations_each(double):
    """One file made, laid out, opened and synced a rank; whatever else there is does not grow with the ranks."""

    def save(ranks: int, step: str) -> dict[str, int]:
        lustre_double.forget(double)
        stores = [store_on(double, OnDouble(targets=4)) for _ in range(4)]  # as of four nodes
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda rank: put(stores[rank % 4], f"{step}/rank-{rank}", bytes(MiB)), range(ranks)))
        put(stores[0], f"{step}/index", bytes(5000))
        assert stores[0].put_if_absent(f"{step}/COMMIT", b"record")
        for store in stores:
            store.close()
        return lustre_double.counts(double)

    save(4, "step-0")  # makes the run
    few, many = save(4, "step-1"), save(16, "step-2")
    assert set(many) == {"mkdir", "mknod", "setxattr", "getxattr", "open", "fsync", "fsyncdir", "link", "unlink"}
    assert many["mknod"] == 16 + 2, "shards, index, record"
    assert many["setxattr"] == many["getxattr"] == 16
    assert many["open"] == many["fsync"] == 16 + 2
    assert many["fsyncdir"] == 2 * (16 + 2), "the directory of the step and that of the run"
    assert many["link"] == many["unlink"] == 1, "the commit"
    assert many["mkdir"] <= 4, "at most one a node"
    per_rank = {name: (many[name] - few[name]) / 12 for name in many if name != "mkdir"}
    assert max(per_rank.values()) <= 2
    assert sum(per_rank.values()) == 7


# --- CephFS, as far as that goes without one (tests/contract/test_realfs.py has a real one) ---------------------------


class Ceph(System):
    """The attribute of CephFS, kept in memory."""

    def __init__(self, refuse=0):
        self.refuse, self.layout = refuse, b"stripe_unit=4194304 stripe_count=1 object_size=4194304 pool=data"

    def set_attribute(self, fd, name, value):
        if self.refuse or os.fstat(fd).st_size:
            raise OSError(self.refuse or errno.ENOTEMPTY, "refused")
        self.layout = value

    def get_attribute(self, fd, name):
        return self.layout


@pytest.mark.parametrize(
    ("options", "nbytes", "layout"),
    [
        ({}, MiB, b"stripe_unit=8388608 stripe_count=1 object_size=8388608"),
        ({}, 9 * GiB, b"stripe_unit=8388608 stripe_count=1 object_size=8388608"),
        ({"stripes": 2}, MiB, b"stripe_unit=8388608 stripe_count=2 object_size=33554432"),
        ({"stripes": -1}, MiB, b"stripe_unit=8388608 stripe_count=4 object_size=33554432"),
        ({"stripe_size": 3 << 16, "stripes": 3}, MiB, b"stripe_unit=196608 stripe_count=3 object_size=786432"),
        ({"stripe_size": 48 * MiB, "stripes": 4, "pool": "fast"}, 9 * GiB,
         b"stripe_unit=50331648 stripe_count=4 object_size=100663296 pool=fast"),
    ],
)  # fmt: skip
def test_cephfs_layouts(tmp_path, options, nbytes, layout):
    system = Ceph()
    striping = CephStriping(system, StripingOptions(**options), BLOCK)
    fd = os.open(tmp_path, os.O_RDONLY)
    created = striping.create("a", os.O_CREAT | os.O_EXCL | os.O_WRONLY, fd, nbytes, 0)
    assert system.layout == layout
    assert f"stripe_count={created.layout.stripes} ".encode() in layout
    assert created.layout.problem == ""
    os.close(created.fd)
    os.close(fd)


def test_cephfs_may_refuse(tmp_path):
    striping = CephStriping(Ceph(errno.EPERM), StripingOptions(stripes=4), BLOCK)
    fd = os.open(tmp_path, os.O_RDONLY)
    created = striping.create("a", os.O_CREAT | os.O_EXCL | os.O_WRONLY, fd, MiB, 0)
    assert created.layout[:2] == (1, 4 * MiB)
    assert "not permitted" in created.layout.problem
    os.close(created.fd)
    os.close(fd)


# --- a real Lustre ---------------------------------------------------------------------------------------------------


@pytest.fixture
def real(request):
    """A directory of the test's own on a real Lustre."""
    where = request.config.getoption("--lustre-dir")
    if where is None:
        pytest.skip("needs a directory on a real Lustre: --lustre-dir")
    root = Path(where) / f"ckptsvc-test-{uuid.uuid4().hex}"
    store = connect(f"lustre://{root}")
    yield store, root
    for entry in store.list():
        store.delete(entry.key)
    store.close()
    with suppress(FileNotFoundError):  # nothing was written
        root.rmdir()


@pytest.mark.slow
@pytest.mark.lustre
class TestRealLustre(Posix):
    """The suite on a real Lustre."""

    @pytest.fixture
    def store(self, real) -> Store:
        return real[0]


@pytest.mark.slow
@pytest.mark.lustre
@pytest.mark.parametrize("way", ["_by_attribute", "_by_ioctl", "_by_directory"])
def test_each_way_on_a_real_lustre(real, way):
    store, root = real
    put(store, "step/first", bytes(MiB))
    assert store.layout("step/first").problem == ""
    assert store.layout("step/first") is None
    striping = store._striping
    assert isinstance(striping, LustreStriping)
    striping._ways = (getattr(striping, way),)
    put(store, f"step/{way}", content_of(20 * MiB))
    layout = store.layout(f"step/{way}")
    assert (layout.stripe_size, layout.problem) == (BLOCK, "")
    assert layout.stripes == len(layout.targets) == 1
    assert (root / f"step/{way}").read_bytes() == content_of(20 * MiB)
    fd = os.open(root / "step" / way, os.O_RDONLY)
    (component,) = decode(os.getxattr(fd, lustre_striping.ATTRIBUTE))
    os.close(fd)
    assert component.targets == layout.targets


@pytest.mark.slow
@pytest.mark.lustre
def test_a_late_layout_on_a_real_lustre(real):
    """What the protocol double is told to do is what Lustre does."""
    store, root = real
    put(store, "a", bytes(2 * MiB))
    before = os.getxattr(root / "a", lustre_striping.ATTRIBUTE)
    os.setxattr(root / "a", lustre_striping.ATTRIBUTE, encode([Component(1, 1 << 16)]))
    assert os.getxattr(root / "a", lustre_striping.ATTRIBUTE) == before
    assert DELAY_CREATE == 0x2100
