"""Stores in a process of their own: the conformance suite, forks, and the end of either side."""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.runtime import eventually

from ckptsvc.errors import ConfigError, NotFound, StoreError, StoreUnavailable
from ckptsvc.storage import Store, connect
from ckptsvc.storage.apart import LINES, Apart
from ckptsvc.storage.opening import open_apart, open_store
from ckptsvc.storage.registry import survives_fork
from ckptsvc.storage.testing import StoreTests, content_of, put

MiB = 1 << 20


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """One for all tests of the suite: it takes half a second to start."""
    store = Apart(f"file://{tmp_path_factory.mktemp('apart')}/run", {})
    yield store
    store.close()


class TestApart(StoreTests):
    @pytest.fixture
    def store(self, process):
        yield process
        shutil.rmtree(path_of(process, ""), ignore_errors=True)

    def another(self, store):
        return Apart(store.url, {})

    def raw_read(self, store, key):
        return path_of(store, key).read_bytes()

    def raw_write(self, store, key, content):
        path = path_of(store, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def path_of(store: Store, key: str) -> Path:
    return Path(store.url.removeprefix("file://")) / key


@pytest.fixture
def apart(tmp_path):
    put(connect(str(tmp_path)), "a", content_of(3 * MiB))
    store = Apart(f"file://{tmp_path}", {})
    yield store
    store.close()


def children_of(pid: int) -> set[int]:
    return {int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}


def read_all(store: Store) -> bool:
    buffer = bytearray(3 * MiB)
    store.read_into("a", 0, memoryview(buffer))
    return bytes(buffer) == content_of(3 * MiB)


def in_a_fork(check) -> int:
    """The exit status of a forked child that does something."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        status = 1
        try:
            status = 0 if check() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_a_process_of_its_own_and_disturbs_nobody(apart):
    assert read_all(apart)
    assert apart.capabilities().fork_safe

    def check() -> bool:
        right = read_all(apart)
        apart.close()
        return right

    assert in_a_fork(check) == 0
    assert read_all(apart)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_that_only_closes_ends_nothing_of_its_parent(apart):
    process = apart._process
    assert in_a_fork(lambda: apart.close() is None) == 0
    assert read_all(apart)
    assert apart._process is process


def test_a_call_that_was_interrupted_leaves_no_answer_for_the_next_one(apart, monkeypatch):
    """As by Ctrl-C, between question and answer."""

    def interrupted(sock):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ckptsvc.storage.apart.receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            apart.read("a")
    assert apart.size("a") == 3 * MiB
    assert read_all(apart)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_the_process_ends_though_a_forked_child_lives(tmp_path):
    before = children_of(os.getpid())
    store = Apart(f"file://{tmp_path}", {})
    (process,) = children_of(os.getpid()) - before
    holder = os.fork()
    if holder == 0:
        signal.pause()
        os._exit(0)
    try:
        store.close()
        assert not Path(f"/proc/{process}").exists()
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def test_the_process_ends_with_its_owner(tmp_path):
    code = "from ckptsvc.storage.apart import Apart; import os, sys; s = Apart(sys.argv[1], {});"
    code += (
        "print(open(f'/proc/{os.getpid()}/task/{os.getpid()}/children').read(), flush=True); os.kill(os.getpid(), 9)"
    )

    ended = subprocess.run([sys.executable, "-c", code, f"file://{tmp_path}"], capture_output=True, text=True)
    process = int(ended.stdout)
    eventually(lambda: not Path(f"/proc/{process}/environ").exists(), "the process to end")


def test_a_process_that_dies_is_an_outage_and_the_next_call_starts_another(apart):
    for process in children_of(os.getpid()):
        if b"apart_process" in Path(f"/proc/{process}/cmdline").read_bytes():
            os.kill(process, signal.SIGKILL)
    with pytest.raises(StoreUnavailable):
        apart.read("a")
    assert read_all(apart)


def test_errors_come_as_they_were_raised(tmp_path):
    with pytest.raises(ConfigError, match="blocks"):
        Apart(f"file://{tmp_path}", {"blocks": 1})
    store = Apart(f"file://{tmp_path}", {})
    with pytest.raises(NotFound, match="none"):
        store.read("none")
    store.close()
    store = Apart("s3://bucket", {"endpoint": "http://127.0.0.1:9", "timeout": 1})
    with pytest.raises(StoreError, match="s3://bucket/none"):
        store.read("none")
    store.close()


def test_more_calls_than_lines(apart):
    with ThreadPoolExecutor(3 * LINES) as pool:
        assert all(pool.map(lambda _: read_all(apart), range(3 * LINES)))


def test_only_stores_that_do_not_survive_a_fork_are_apart(tmp_path, monkeypatch):
    assert survives_fork(str(tmp_path))
    assert not survives_fork("s3://bucket/prefix")
    assert not isinstance(open_apart(str(tmp_path)), Apart)
    store = open_apart("s3://bucket/prefix", {"endpoint": "http://127.0.0.1:9"})
    assert isinstance(store, Apart)
    assert store.url == "s3://bucket/prefix"
    store.close()


def test_options_of_the_settings_are_for_their_scheme(tmp_path, monkeypatch):
    monkeypatch.setenv("CKPTSVC_STORE_OPTIONS", '{"s3": {"timeout": 7}, "file": {"block": 65536}}')
    assert open_store("s3://bucket")._clients.options.timeout == 7
    assert open_store("s3://bucket", {"timeout": 8})._clients.options.timeout == 8
    assert open_store(str(tmp_path))._transfer._block == 65536
    monkeypatch.setenv("CKPTSVC_STORE_OPTIONS", "s3 = {timout = 7}")
    with pytest.raises(ConfigError, match="timout"):
        open_store("s3://bucket")
