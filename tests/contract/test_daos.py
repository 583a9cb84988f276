"""The daos driver on a stand-in for libdfs: conformance, what runs at once, races, and what it makes of errors."""

import errno
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from ckptsvc_drivers import daos_client, libdfs
from harness.daos import standin as stand_in
from harness.daos.standin import Standin
from harness.stored import Run, Tensor, cli

from ckptsvc.errors import (
    EXIT_STATUS,
    ConfigError,
    Damaged,
    InvalidInput,
    NotFound,
    SaveFailed,
    StoreDenied,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from ckptsvc.storage import TEMPORARY_PREFIX, connect
from ckptsvc.storage.testing import MiB, StoreTests, content_of, pages_with, put
from ckptsvc.storage.wrappers import Retrying

URL = "daos://pool/cont/runs/a"


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    if stand_in.compiler() is None:
        pytest.skip("there is no C compiler to make a stand-in for libdfs with")
    return stand_in.build(tmp_path_factory.mktemp("libdfs"))


@pytest.fixture
def daos(library, quick_place, monkeypatch):
    """A DAOS of the test's own."""
    made = Standin(library, quick_place / "daos")
    monkeypatch.setenv("STANDIN_DAOS", str(made.root))
    monkeypatch.setattr(daos_client, "_PLACES", (str(library),))
    yield made
    made.reset()
    assert not daos_client._open, "a connection is left"


@pytest.fixture
def store(daos):
    store = connect(URL, {"threads": 4, "block": 4 * MiB})
    yield store
    store.close()


def file_of(daos, key):
    return daos.container / "runs" / "a" / key


def keys(store):
    return sorted(entry.key for entry in store.list())


class TestDaos(StoreTests):
    @pytest.fixture(autouse=True)
    def _daos(self, daos):
        self.daos = daos

    @pytest.fixture
    def store(self, daos):
        store = connect(URL)
        yield store
        store.close()

    def raw_read(self, store, key):
        return file_of(self.daos, key).read_bytes()

    def raw_write(self, store, key, content):
        path = file_of(self.daos, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.mark.slow
class TestDaosInSmallBlocks(TestDaos):
    @pytest.fixture
    def store(self, daos):
        store = connect("daos://pool/cont", {"threads": 2, "block": 1 << 16})
        yield store
        store.close()

    def raw_read(self, store, key):
        return (self.daos.container / key).read_bytes()

    def raw_write(self, store, key, content):
        path = self.daos.container / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


LIVE = os.environ.get("CKPTSVC_TEST_DAOS", "")

if LIVE:

    @pytest.mark.daos
    class TestRealDaos(StoreTests):
        """Against a real container; the raw accesses go through the driver too, by another store."""

        @pytest.fixture
        def store(self):
            store = connect(f"daos://{LIVE}/ckptsvc-test-{os.getpid()}-{time.monotonic_ns()}")
            yield store
            for entry in store.list():
                store.delete(entry.key)
            store.close()

        def raw_read(self, store, key):
            with closing(self.another(store)) as other:
                return other.read(key)

        def raw_write(self, store, key, content):
            with closing(self.another(store)) as other:
                put(other, key, content)

else:

    @pytest.mark.daos
    def test_real_daos():
        pytest.skip("CKPTSVC_TEST_DAOS names no pool/container")


def test_a_run_is_saved_listed_and_verified(daos):
    run = Run(URL)
    name = run.save(7, {"model/w": Tensor(np.arange(6000.0).reshape(60, 100), cut="dim 0")}, world=4)
    assert name in cli("ls", URL).out
    assert cli("verify", URL).status == 0
    shard = next(path for path in file_of(daos, name).glob("*.safetensors") if "index" not in path.name)
    shard.write_bytes(shard.read_bytes()[:-1])
    assert cli("verify", URL).status == EXIT_STATUS["damaged"]
    with pytest.raises(SaveFailed):
        run.save(7, {"model/w": Tensor(np.zeros(4))}, job="another")
    run.store.close()


# --- the library ------------------------------------------------------------------------------------------------


def test_structures_are_as_a_compiler_lays_them_out(daos):
    assert libdfs.size_of_structures() == daos.sizes()


@pytest.mark.parametrize(
    "url",
    [
        "daos://",
        "daos://pool",
        "daos:///cont/x",
        "daos://po ol/cont",
        "daos://pool/cont/../x",
        "daos://pool/cont/x//y",
        "daos://pool/cont/a\0b",
        "daos://pool/" + "c" * 128,
        "daos://pool/cont/" + "x/" * 600,
    ],
)
def test_what_is_no_address_is_refused(daos, url):
    with pytest.raises(ConfigError):
        connect(url)


@pytest.mark.parametrize(
    "options", [{"chunks": 1}, {"threads": 0}, {"chunk": 5}, {"block": 1}, {"object_class": "NONE_SUCH"}]
)
def test_options_are_checked(daos, options):
    with pytest.raises(ConfigError):
        connect(URL, options)


def test_without_libdfs_it_says_where_it_looked(daos, monkeypatch):
    monkeypatch.setattr(daos_client, "_PLACES", ("libnone-such.so", "/none/such/libdfs.so"))
    monkeypatch.setattr(daos_client, "_libraries", {})
    with pytest.raises(ConfigError, match=r"libnone-such.*/none/such/libdfs.so.*daos-client"):
        connect(URL)
    with pytest.raises(ConfigError, match=r"/chosen/libdfs.so.*daos-client"):
        connect(URL, {"library": "/chosen/libdfs.so"})


def test_a_library_that_lacks_a_call_is_refused(daos, monkeypatch):
    with pytest.raises(ConfigError, match=r"has no dfs_init"):
        connect(URL, {"library": "libc.so.6"})


def test_libdfs_is_found_beside_pydaos(daos, library, tmp_path, monkeypatch):
    package = tmp_path / "lib64" / "python3" / "site-packages" / "pydaos"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (tmp_path / "lib64" / "libdfs.so").symlink_to(library)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(daos_client, "_PLACES", ())
    assert daos_client.find("").path == str(tmp_path / "lib64" / "libdfs.so")


AGENT = """
import sys
from ckptsvc.errors import CkptsvcError
from ckptsvc.storage import connect
try:
    connect("daos://pool/cont", {"library": sys.argv[1]})
except CkptsvcError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("pydaos", [True, False])
def test_without_an_agent_it_says_so_in_pydaos_words_if_there_are_any(daos, library, pydaos):
    daos.agent.unlink()
    path = [*sys.path, str(stand_in.SOURCE)] if pydaos else sys.path
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(each for each in path if each)}
    ended = subprocess.run(
        [sys.executable, "-c", AGENT, library], env=environment, capture_output=True, text=True, check=True
    )
    assert "StoreUnavailable" in ended.stdout
    assert "daos_agent running" in ended.stdout
    assert ("DER_AGENT_COMM" in ended.stdout) is pydaos
    assert ("pydaos, which could say more, is not there" in ended.stdout) is not pydaos


def test_a_container_that_is_not_there(daos):
    with pytest.raises(NotFound, match=r"pool list"):
        connect("daos://pool/other")


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.EINVAL, ConfigError), (errno.EHOSTUNREACH, StoreUnavailable), (errno.ETIMEDOUT, StoreUnavailable)],
)
def test_a_container_that_does_not_open(daos, number, expected):
    daos.fault("dfs_connect", number)
    with pytest.raises(expected, match="daos://pool/cont"):
        connect(URL)


def test_a_container_that_may_only_be_read(daos, store):
    put(store, "a", b"1")
    daos.fault("dfs_connect", errno.EPERM)
    reader = connect(URL, {"library": str(daos.library)})  # an address of its own: not the same connection
    assert reader.read("a") == b"1"
    assert reader.children() == ["a"]
    assert "may be read only" in reader.capabilities().notes
    for change in (lambda: put(reader, "b", b"1"), lambda: reader.put_if_absent("b", b"1"), lambda: reader.delete("a")):
        with pytest.raises(StoreDenied):
            change()
    assert keys(reader) == ["a"]
    reader.close()
    daos.fault("dfs_connect", errno.EACCES, times=2)
    with pytest.raises(StoreDenied, match="get-acl"):
        connect(URL, {"library": str(daos.library)})


def test_one_connection_for_all_stores_in_a_process(daos, store):
    other = connect("daos://pool/cont/elsewhere")
    assert other._connection is store._connection
    other.close()
    put(store, "a", b"1")
    assert store.read("a") == b"1"


def test_a_forked_child_is_refused(daos, store):
    put(store, "a", b"1")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            refused = 0
            for attempt in (lambda: store.read("a"), lambda: connect(URL), lambda: put(store, "b", b"1")):
                try:
                    attempt()
                except StoreError as error:
                    refused += "fork(2)" in str(error)
            store.close()
            code = 0 if refused == 3 else 1
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read("a") == b"1"
    assert not store.capabilities().fork_safe


def test_capabilities_say_how_large_objects_lie(daos, store):
    assert "large objects: class RP_2GX, chunks of 4194304 bytes" in store.capabilities().notes
    chosen = connect(URL, {"object_class": "SX", "chunk": 1 << 20})
    assert "large objects: class SX, chunks of 1048576 bytes" in chosen.capabilities().notes
    chosen.close()


# --- what runs at once ----------------------------------------------------------------------------------------------


def test_several_blocks_of_one_object_are_written_at_once(daos, store):
    daos.gate("dfs_write", 4)
    content = content_of(16 * MiB)
    put(store, "a", content)
    assert daos.peak() == 4
    daos.reset()
    assert file_of(daos, "a").read_bytes() == content


def test_several_blocks_of_one_object_are_read_at_once(daos, store):
    content = content_of(16 * MiB + 5)
    put(store, "a", content)
    daos.gate("dfs_read", 4)
    buffer = bytearray(len(content))
    store.read_into("a", 0, memoryview(buffer))
    assert daos.peak() == 4
    assert buffer == content


def test_python_goes_on_while_a_call_hangs(daos, store):
    """The interpreter lock is free: other threads run, and the store's other calls get through."""
    put(store, "a", b"1")
    daos.fault("dfs_write", delay_ms=1000)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(put, store, "slow", b"2")
        for _ in range(10):
            assert store.read("a") == b"1"
        assert not slow.done(), "ten reads take a second?"
        slow.result()


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected", "retryable"),
    [
        (errno.ENOSPC, StoreFull, False),
        (errno.EDQUOT, StoreFull, False),
        (errno.EPERM, StoreDenied, False),
        (errno.ETIMEDOUT, StoreUnavailable, True),
        (errno.EHOSTUNREACH, StoreUnavailable, True),
        (errno.ESTALE, StoreUnavailable, True),
        (errno.EIO, StoreError, True),
        (errno.EINVAL, StoreError, False),
    ],
)
@pytest.mark.parametrize("call", ["dfs_open", "dfs_write", "dfs_lookup"])
def test_an_error_of_a_write_is_the_right_one_and_nothing_is_left(daos, store, call, number, expected, retryable):
    put(store, "other", b"1")
    daos.fault(call, number, skip=2 if call == "dfs_write" else 0)
    with pages_with(content_of(24 * MiB)) as data, pytest.raises(expected) as caught:
        store.write("a", data, 24 * MiB)
    assert caught.value.retryable is retryable
    assert f"{URL}/a" in str(caught.value)
    assert keys(store) == ["other"]
    put(store, "a", b"and now it works")
    assert store.read("a") == b"and now it works"


@pytest.mark.parametrize(
    ("number", "expected"), [(errno.EIO, StoreError), (errno.ETIMEDOUT, StoreUnavailable), (errno.EPERM, StoreDenied)]
)
@pytest.mark.parametrize("call", ["dfs_lookup", "dfs_read", "dfs_get_size", "dfs_getxattr"])
def test_an_error_of_a_read_is_the_right_one(daos, store, call, number, expected):
    put(store, "a", b"1")
    daos.fault(call, number)
    with pytest.raises(expected, match=f"{URL}/a"):
        store.read("a")
    assert store.read("a") == b"1"


@pytest.mark.parametrize("size", [1000, 16 * MiB])
def test_a_read_that_ends_early_is_damage(daos, store, size):
    put(store, "a", content_of(size))
    daos.fault("dfs_read", -1)
    with pytest.raises(Damaged):
        store.read_into("a", 0, memoryview(bytearray(size)))


def test_what_may_pass_is_tried_again_by_the_wrapper(daos, store):
    daos.fault("dfs_write", errno.ETIMEDOUT)
    daos.fault("dfs_setxattr", errno.EIO)
    patient = Retrying(store, first_wait=0.01)
    put(patient, "a", content_of(9 * MiB))
    assert patient.put_if_absent("b", b"1")
    assert (store.read("a"), store.read("b")) == (content_of(9 * MiB), b"1")


def test_a_file_made_in_a_directory_that_was_just_removed_is_made_again(daos, store):
    """DAOS makes it, where nobody will ever find it: the stand-in, too."""
    inside = threading.Event()

    def delete_again_and_again():
        while not inside.is_set():
            store.delete("step/none")

    with ThreadPoolExecutor(1) as pool:
        removing = pool.submit(delete_again_and_again)
        try:
            for number in range(50):
                put(store, f"step/{number}", b"1")
                assert store.put_if_absent(f"step/{number}.record", b"1")
                assert store.read(f"step/{number}") == store.read(f"step/{number}.record") == b"1"
                store.delete(f"step/{number}")
                store.delete(f"step/{number}.record")
        finally:
            inside.set()
        removing.result()


# --- records --------------------------------------------------------------------------------------------------------


def test_a_lost_answer_is_resolved_by_reading_the_record(daos, store):
    daos.fault("dfs_setxattr", errno.ETIMEDOUT, after=True)
    with pytest.raises(StoreUnavailable):
        store.put_if_absent("step/COMMIT", b"mine")
    assert store.read("step/COMMIT") == b"mine"
    daos.fault("dfs_setxattr", errno.ETIMEDOUT, after=True)
    assert Retrying(store, first_wait=0.01).put_if_absent("step/COMMIT2", b"mine")


def test_a_record_without_its_copy_is_whole(daos, store):
    """Its writer has died after the one step that counts."""
    daos.fault("dfs_write", errno.EIO)
    record = content_of(50_000)
    assert store.put_if_absent("step/COMMIT", record)
    assert file_of(daos, "step/COMMIT").read_bytes() == b""
    assert store.put_if_absent("step/COMMIT", b"other") is False
    assert store.size("step/COMMIT") == len(record)
    assert store.read("step/COMMIT") == record
    assert [entry.size for entry in store.list()] == [len(record)]
    part = bytearray(100)
    store.read_into("step/COMMIT", 49_900, memoryview(part))
    assert part == record[-100:]
    with pytest.raises(Damaged):
        store.read_into("step/COMMIT", 49_901, memoryview(part))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ETIMEDOUT])
def test_a_name_that_was_only_taken_is_no_record(daos, store, number):
    """Its writer has died, or met a full pool, before the step that counts: garbage that is listed, no record."""
    daos.fault("dfs_setxattr", number)
    with pytest.raises(StoreFull if number == errno.ENOSPC else StoreUnavailable):
        store.put_if_absent("step/COMMIT", b"mine")
    for look in (store.read, store.size, lambda key: store.read_into(key, 0, memoryview(bytearray()))):
        with pytest.raises(NotFound):
            look("step/COMMIT")
    assert [(entry.key, entry.size) for entry in store.list()] == [("step/COMMIT", 0)]
    assert store.put_if_absent("step/COMMIT", b"another writer's")
    assert store.read("step/COMMIT") == b"another writer's"


def test_a_record_has_a_limit(daos, store):
    assert store.put_if_absent("most", content_of(65536))
    assert store.read("most") == content_of(65536)
    with pytest.raises(InvalidInput):
        store.put_if_absent("more", content_of(65537))
    assert keys(store) == ["most"]


def test_an_empty_object_is_not_absent(daos, store):
    put(store, "a", b"")
    assert store.put_if_absent("a", b"1") is False
    assert store.read("a") == b""


RACE = """
import sys
from ckptsvc.storage import connect
library, me = sys.argv[1:]
store = connect("daos://pool/cont/runs/a", {"library": library})
print("ready", flush=True)
sys.stdin.readline()
for turn in range(60):
    if store.put_if_absent(f"turn-{turn}/COMMIT", me.encode() * 1000):
        print(turn, flush=True)
store.close()
"""


def test_processes_race_for_a_commit_and_one_wins(daos, library, store):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, library, f"racer-{number}"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners = {}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=60)
        assert racer.returncode == 0
        for turn in out.split():
            winners.setdefault(int(turn), []).append(number)
    assert sorted(winners) == list(range(60))
    for turn, won in winners.items():
        assert len(won) == 1
        assert store.read(f"turn-{turn}/COMMIT") == f"racer-{won[0]}".encode() * 1000
    assert not [key for key in keys(store) if TEMPORARY_PREFIX in key]


def test_a_directory_is_not_taken_for_an_object(daos, store):
    put(store, "step/a", b"1")
    with pytest.raises(StoreError):
        put(store, "step", b"1")
    with pytest.raises(StoreError):
        store.put_if_absent("step", b"1")
    store.delete("step")
    assert keys(store) == ["step/a"]


def test_deleting_below_an_object_does_not_delete_it(daos, store):
    put(store, "step", b"1")
    store.delete("step/a")
    store.delete("step/a/b")
    assert store.read("step") == b"1"


def test_a_record_on_a_name_that_was_made_anew_meanwhile_is_ours(daos, store):
    """Between opening the file and setting the attribute another process removes it and takes the name again."""
    daos.fault("dfs_setxattr", delay_ms=500)
    with ThreadPoolExecutor(1) as pool:
        putting = pool.submit(store.put_if_absent, "step/COMMIT", b"mine")
        deadline = time.monotonic() + 20
        while not file_of(daos, "step/COMMIT").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        file_of(daos, "step/COMMIT").unlink()
        file_of(daos, "step/COMMIT").touch()
        assert putting.result() is True
    assert store.read("step/COMMIT") == b"mine"
    assert store.put_if_absent("step/COMMIT", b"another") is False


def test_names_that_are_no_keys_are_not_listed(daos, store):
    put(store, "step/a", b"1")
    os.mknod(os.fsencode(str(file_of(daos, "step"))) + b"/\xff\xfe")
    assert keys(store) == ["step/a"]
    assert store.children("step") == ["a"]


def test_many_names_come_in_pages(daos, store):
    directory = file_of(daos, "step")
    directory.mkdir(parents=True)
    for number in range(600):
        (directory / f"{number:04}").touch()
    assert len(store.children("step")) == 600
    assert len(keys(store)) == 600
