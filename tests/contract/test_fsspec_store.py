"""The fsspec driver on memory, files, a real SFTP server and an S3 server: conformance, exclusiveness, errors."""

import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import fsspec
import pytest
from ckptsvc_drivers import fsspec_protocols
from fsspec.implementations.memory import MemoryFileSystem
from harness.sftp import ReplacingFiles, SftpServer, SilentFiles

from ckptsvc.errors import ConfigError, Damaged, NotFound, StoreDenied, StoreError, StoreUnavailable
from ckptsvc.storage import Capabilities, connect
from ckptsvc.storage.testing import ODD_KEYS, MiB, StoreTests, content_of, put

PLACES = (
    os.environ.get("CKPTSVC_TEST_SFTP_SERVER", ""),
    "/usr/lib/openssh/sftp-server",
    "/usr/libexec/openssh/sftp-server",
)
OPENSSH = next(filter(None, map(shutil.which, PLACES)), "")


def keys(store):
    return sorted(entry.key for entry in store.list())


class TestMemory(StoreTests):
    @pytest.fixture
    def store(self):
        store = connect(f"fsspec+memory://{uuid.uuid4()}/run")
        yield store
        store.close()

    def raw_read(self, store, key):
        return MemoryFileSystem.store[f"{store._root}/{key}"].getvalue()

    def raw_write(self, store, key, content):
        MemoryFileSystem().pipe_file(f"{store._root}/{key}", content)


class OnDisk(StoreTests):
    """Objects are files below `root`."""

    @pytest.fixture(autouse=True)
    def _root(self, quick_place):
        self.root = quick_place / "run"

    def raw_read(self, store, key):
        return (self.root / key).read_bytes()

    def raw_write(self, store, key, content):
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


class TestFile(OnDisk):
    @pytest.fixture
    def store(self):
        store = connect(f"fsspec+file://{self.root}")
        yield store
        store.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home directory without known hosts."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    return tmp_path


@pytest.fixture(scope="module")
def _sftp(tmp_path_factory):
    server = SftpServer(tmp_path_factory.mktemp("sftp"))
    yield server
    server.close()


@pytest.fixture
def sftp(_sftp, home):
    """A server that this user knows."""
    shutil.copy(_sftp.known_hosts, home / ".ssh" / "known_hosts")
    return _sftp


@pytest.mark.slow
class TestSftp(OnDisk):
    @pytest.fixture
    def store(self, sftp):
        self.server = sftp
        store = self.another(None)
        yield store
        store.close()

    def another(self, store):
        return connect(f"{self.server.url}{self.root}", self.server.options())


def test_sftp_writes_reads_lists_and_deletes(sftp, quick_place):
    """The whole suite is slow."""
    store = connect(f"{sftp.url}{quick_place}/run", sftp.options())
    content = content_of(9 * MiB + 5)
    put(store, "step/a", content)
    assert (quick_place / "run/step/a").read_bytes() == store.read("step/a") == content
    part = bytearray(100)
    store.read_into("step/a", 8 * MiB - 50, memoryview(part))
    assert part == content[8 * MiB - 50 : 8 * MiB + 50]
    with pytest.raises(Damaged):
        store.read_into("step/a", 9 * MiB, memoryview(part))
    assert store.put_if_absent("step/b", b"1") is True
    assert store.put_if_absent("step/b", b"2") is False
    assert {(entry.key, entry.size) for entry in store.list()} == {("step/a", len(content)), ("step/b", 1)}
    with ThreadPoolExecutor(4) as pool:
        assert all(found == b"1" for found in pool.map(store.read, ["step/b"] * 8))
    for key in ("step/a", "step/b", "step/c"):
        store.delete(key)
    assert store.children() == []
    with pytest.raises(NotFound):
        store.read("step/a")
    store.close()


if OPENSSH:

    @pytest.fixture(scope="module")
    def openssh(tmp_path_factory):
        server = SftpServer(tmp_path_factory.mktemp("openssh"), command=OPENSSH)
        yield server
        server.close()

    class TestSftpOfOpenssh(TestSftp):
        @pytest.fixture
        def store(self, openssh, home):
            shutil.copy(openssh.known_hosts, home / ".ssh" / "known_hosts")
            self.server = openssh
            store = self.another(None)
            yield store
            store.close()

        def test_it_links_and_syncs(self, store):
            """Extensions that paramiko's own server has not."""
            with store._filesystem.ftp.open(f"{self.root.parent}/file", "wb") as file:
                assert fsspec_protocols._extended(file.sftp, "fsync@openssh.com", file.handle)
            names = f"{self.root.parent}/file", f"{self.root.parent}/link"
            assert fsspec_protocols._extended(store._filesystem.ftp, "hardlink@openssh.com", *names)
            assert os.path.samefile(*names)

else:

    def test_sftp_of_openssh():
        pytest.skip("there is no sftp-server of OpenSSH's")


# --- S3, as s3fs speaks it ------------------------------------------------------------------------------------------


MOTO = """
import threading
from moto.server import DomainDispatcherApplication, MotoRequestHandler, create_backend_app, run_simple

moto, lock = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with lock:
        return [b"".join(moto(environ, start_response))]

run_simple("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
"""
"""By itself, moto looks whether an object is there and writes it then: of several at once, more than one may win."""


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    """The address of an S3 server (moto's) in a process of its own."""
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("w") as out:
        server = subprocess.Popen([sys.executable, "-u", "-c", MOTO], stdout=subprocess.DEVNULL, stderr=out)
    try:
        while not (found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", log.read_text())):
            assert server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[1]
    finally:
        server.kill()
        server.wait()


@pytest.mark.slow
class TestS3(StoreTests):
    @pytest.mark.parametrize("key", [key for key in ODD_KEYS if "\n" not in key])  # which moto's router does not take
    def test_odd_keys(self, store, key):
        super().test_odd_keys(store, key)

    @pytest.fixture
    def store(self, s3):
        self.options = {"endpoint_url": s3, "key": "testing", "secret": "testing"}
        self.client = boto3.client(
            "s3",
            endpoint_url=s3,
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        self.bucket = f"bucket-{uuid.uuid4()}"
        self.client.create_bucket(Bucket=self.bucket)
        store = self.another(None)
        yield store
        store.close()

    def another(self, store):
        return connect(f"fsspec+s3://{self.bucket}/run", self.options)

    def raw_read(self, store, key):
        return self.client.get_object(Bucket=self.bucket, Key=f"run/{key}")["Body"].read()

    def raw_write(self, store, key, content):
        self.client.put_object(Bucket=self.bucket, Key=f"run/{key}", Body=content)


# --- addresses and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "fsspec://x",
        "fsspec+://x",
        "fsspec+nonesuch://x/y",
        "fsspec+memory://a\nb",
        "fsspec+simplecache://x::memory://x",
        "fsspec+sftp://me:secret@host/x",
        "fsspec+https://host/x?token=secret",
    ],
)
def test_what_is_no_address_is_refused(url):
    with pytest.raises(ConfigError) as caught:
        connect(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("options", [{"block": 0}, {"block": "many"}])
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        connect("fsspec+memory://x", options)


def test_a_protocol_whose_package_is_missing_says_which():
    with pytest.raises(ConfigError, match="gcsfs"):
        connect("fsspec+gs://bucket/x")


def test_a_forked_child_is_refused():
    store = connect(f"fsspec+memory://{uuid.uuid4()}")
    put(store, "a", b"1")
    child = os.fork()
    if child == 0:
        code = 1
        try:
            store.read("a")
        except StoreError as error:
            code = 0 if "fork(2)" in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert not store.capabilities().fork_safe


# --- exclusive or not -----------------------------------------------------------------------------------------------


class Guessing(MemoryFileSystem):
    """A protocol of which nothing is known; its own "create" looks first and writes then."""

    protocol = "guessing"


class Overwriting(MemoryFileSystem):
    """An object store that ignores the condition."""

    protocol = "overwriting"

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        super().pipe_file(path, value, mode="overwrite")


@pytest.fixture(params=[Guessing, Overwriting])
def not_exclusive(request, monkeypatch):
    fsspec.register_implementation(request.param.protocol, request.param, clobber=True)
    if request.param is Overwriting:
        monkeypatch.setitem(fsspec_protocols._KNOWN, "overwriting", fsspec_protocols._OBJECTS)
    store = connect(f"fsspec+{request.param.protocol}://{uuid.uuid4()}/run")
    yield store
    store.close()


def test_where_creating_is_not_exclusive_it_says_so_and_refuses(not_exclusive):
    found = not_exclusive.capabilities()
    assert isinstance(found, Capabilities)
    assert not found.exclusive_create
    assert any("exclusive" in note for note in found.notes)
    put(not_exclusive, "step/shard", b"1")
    with pytest.raises(StoreError, match="exclusive"):
        not_exclusive.put_if_absent("step/COMMIT", b"1")
    assert keys(not_exclusive) == ["step/shard"], "nothing of the trial is left"
    assert not_exclusive.read("step/shard") == b"1"


def test_a_server_whose_rename_replaces_is_found_out(tmp_path, home, quick_place):
    server = SftpServer(tmp_path, ReplacingFiles)
    shutil.copy(server.known_hosts, home / ".ssh" / "known_hosts")
    store = connect(f"{server.url}{quick_place}/run", server.options())
    assert not store.capabilities().exclusive_create
    with pytest.raises(StoreError, match="not exclusive on this server"):
        store.put_if_absent("COMMIT", b"1")
    assert keys(store) == []
    store.close()
    server.close()


class Conflicting(MemoryFileSystem):
    """An object store that answers "try again" while others write, as S3 does."""

    protocol = "conflicting"
    refusals = 3

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        if type(self).refusals and mode == "create":
            type(self).refusals -= 1
            raise OSError(5, "An error occurred (ConditionalRequestConflict) when calling PutObject")
        made = fsspec.implementations.memory.MemoryFile(self, self._strip_protocol(path), value)
        if self.store.setdefault(made.path, made) is not made:
            raise OSError(22, "PreconditionFailed: at least one of the pre-conditions did not hold")


def test_a_conflict_on_an_object_store_is_no_loss(monkeypatch):
    fsspec.register_implementation("conflicting", Conflicting, clobber=True)
    monkeypatch.setitem(fsspec_protocols._KNOWN, "conflicting", fsspec_protocols._OBJECTS)
    monkeypatch.setattr(Conflicting, "refusals", 3)
    store = connect(f"fsspec+conflicting://{uuid.uuid4()}/run")
    assert store.capabilities().exclusive_create
    monkeypatch.setattr(Conflicting, "refusals", 3)
    assert store.put_if_absent("COMMIT", b"1") is True
    monkeypatch.setattr(Conflicting, "refusals", 1)
    assert store.put_if_absent("COMMIT", b"2") is False
    monkeypatch.setattr(Conflicting, "refusals", 1000)
    monkeypatch.setattr(fsspec_protocols.time, "sleep", lambda _: None)
    with pytest.raises(StoreError, match="Conflict"):
        store.put_if_absent("COMMIT", b"3")


RACE = """
import json, sys
from ckptsvc.storage import connect
url, options, me = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
store = connect(url, options)
assert store.capabilities().exclusive_create
print("ready", flush=True)
sys.stdin.readline()
for turn in range(20):
    if store.put_if_absent(f"turn-{turn}/COMMIT", me.encode() * 1000):
        print(turn, flush=True)
store.close()
"""


@pytest.mark.parametrize("kind", ["file", "sftp", "s3"])
def test_processes_race_for_a_commit_and_one_wins(kind, request, tmp_path, quick_place):
    import json

    if kind == "file":
        url, options = f"fsspec+file://{quick_place}/run", {}
    elif kind == "sftp":
        server = request.getfixturevalue("sftp")
        url, options = f"{server.url}{quick_place}/run", server.options()
    else:
        address = request.getfixturevalue("s3")
        options = {"endpoint_url": address, "key": "testing", "secret": "testing"}
        bucket = f"bucket-{uuid.uuid4()}"
        fsspec.filesystem("s3", skip_instance_cache=True, **options).mkdir(bucket)
        url = f"fsspec+s3://{bucket}/run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, url, json.dumps(options), f"racer-{number}"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    winners = {}
    for number, racer in enumerate(racers):
        out, _ = racer.communicate(timeout=90)
        assert racer.returncode == 0
        for turn in out.split():
            winners.setdefault(int(turn), []).append(number)
    store = connect(url, options)
    assert sorted(winners) == list(range(20))
    for turn, won in winners.items():
        assert len(won) == 1
        assert store.read(f"turn-{turn}/COMMIT") == f"racer-{won[0]}".encode() * 1000
    assert keys(store) == sorted(f"turn-{turn}/COMMIT" for turn in range(20)), "nothing temporary is left"
    store.close()


def test_threads_race_in_memory_and_one_wins():
    store = connect(f"fsspec+memory://{uuid.uuid4()}")
    with ThreadPoolExecutor(8) as pool:
        for turn in range(50):
            won = list(pool.map(lambda me, turn=turn: store.put_if_absent(f"{turn}", b"%d" % me), range(8)))
            assert won.count(True) == 1
            assert store.read(f"{turn}") == b"%d" % won.index(True)


# --- what others see ------------------------------------------------------------------------------------------------


def test_what_another_process_writes_is_seen_at_once(s3):
    """No listing is kept: fsspec would, for ever."""
    options = {"endpoint_url": s3, "key": "testing", "secret": "testing"}
    bucket = f"bucket-{uuid.uuid4()}"
    other = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    other.mkdir(bucket)
    store = connect(f"fsspec+s3://{bucket}/run", options)
    put(store, "a", b"1")
    assert store.children() == ["a"]
    other.pipe_file(f"{bucket}/run/b", b"2")
    assert store.children() == ["a", "b"]
    assert store.read("b") == b"2"
    other.rm_file(f"{bucket}/run/a")
    assert store.children() == ["b"]
    with pytest.raises(NotFound):
        store.read("a")


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_host_is_not_trusted(sftp, home, quick_place):
    (home / ".ssh" / "known_hosts").write_text("")
    with pytest.raises((StoreError, ConfigError), match="known_hosts"):
        connect(f"{sftp.url}{quick_place}/run", sftp.options())


def test_a_wrong_password_is_denied(sftp, quick_place):
    with pytest.raises(StoreDenied, match="credentials"):
        connect(f"{sftp.url}{quick_place}/run", {"password": "wrong", "look_for_keys": False, "allow_agent": False})


def test_a_server_that_is_gone_is_unavailable(tmp_path, home, quick_place):
    server = SftpServer(tmp_path)
    shutil.copy(server.known_hosts, home / ".ssh" / "known_hosts")
    store = connect(f"{server.url}{quick_place}/run", server.options())
    put(store, "a", b"1")

    def hang_up(nbytes):
        server.close()

    data = content_of(24 * MiB)
    with pytest.raises(StoreError) as caught:
        store.write("b", memoryview(data), len(data), progress=hang_up)
    assert caught.value.retryable
    with pytest.raises(StoreError):
        store.read("a")
    with pytest.raises(StoreUnavailable):
        connect(f"{server.url}{quick_place}/run", server.options())
    store.close()


def test_a_server_that_falls_silent_is_unavailable(tmp_path, home, quick_place, monkeypatch):
    monkeypatch.setattr(fsspec_protocols, "_SFTP_TIMEOUT", 3.0)
    server = SftpServer(tmp_path, SilentFiles)
    shutil.copy(server.known_hosts, home / ".ssh" / "known_hosts")
    store = connect(f"{server.url}{quick_place}/run", server.options())
    put(store, "a", b"1")
    try:
        with pytest.raises(StoreUnavailable):
            store.read("silent")
        assert store.read("a") == b"1", "by a new connection"
    finally:
        SilentFiles.go_on.set()
        store.close()
        server.close()


def test_wrong_credentials_are_denied(s3):
    """moto checks none, so the server's answer is put into the client's mouth."""
    store = connect("fsspec+s3://bucket/run", {"endpoint_url": s3, "anon": True})

    def refuse(path, **_):
        raise PermissionError("Access Denied")

    store._filesystem.info = refuse
    with pytest.raises(StoreDenied):
        store.read("a")


@pytest.mark.parametrize(
    ("raised", "expected", "retryable"),
    [
        (TimeoutError("too long"), StoreUnavailable, True),
        (ConnectionResetError(104, "reset"), StoreUnavailable, True),
        (OSError(28, "full"), StoreError, False),
        (EOFError(), StoreUnavailable, True),
        (RuntimeError("a library's own"), StoreError, False),
    ],
)
def test_whatever_a_library_raises_becomes_an_error_of_ours(raised, expected, retryable):
    store = connect(f"fsspec+memory://{uuid.uuid4()}")

    def fail(*_, **__):
        raise raised

    store._filesystem.info = fail
    with pytest.raises(expected) as caught:
        store.read("a")
    assert caught.value.retryable is retryable
    assert f"{store.url}/a" in str(caught.value)


def test_a_partial_read_is_damage():
    store = connect(f"fsspec+memory://{uuid.uuid4()}")
    put(store, "a", b"0123456789")
    store._filesystem.cat_file = lambda path, start, end: b"012"
    with pytest.raises(Damaged):
        store.read("a")


def test_a_write_that_fails_leaves_nothing(quick_place: Path):
    store = connect(f"fsspec+file://{quick_place}/run", {"block": 1 << 20})
    whole = store._filesystem.open

    def opened(path, mode, **options):
        file = whole(path, mode, **options)
        blocks = iter(range(2))

        def write(data):
            if next(blocks, None) is None:
                raise OSError(28, "No space left on device")
            return file.f.write(data)

        file.write = write
        return file

    store._filesystem.open = opened
    with pytest.raises(StoreError):
        put(store, "step/a", content_of(5 * MiB))
    assert keys(store) == []
