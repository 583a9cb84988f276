"""Leases on the shares of a conversion: who is refused, who takes over, who finds out."""

import os
import subprocess
import sys
import time
import uuid

import msgspec
import pytest

from ckptsvc.errors import RunBusy, SaveFailed
from ckptsvc.interop.conversion import lease
from ckptsvc.interop.conversion.lease import Holder, Lease
from ckptsvc.storage import Store, connect


@pytest.fixture
def store() -> Store:
    return connect(f"memory://{uuid.uuid4()}")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.05)
    monkeypatch.setattr(lease, "STALE", 1.0)


def left_by(store: Store, holder: Holder, number: int = 0, of: int = 1) -> None:
    store.put_if_absent(f"f/process-{number:05d}-of-{of:05d}.000003", msgspec.json.encode(holder))


def elsewhere() -> Holder:
    return msgspec.structs.replace(Holder.here(), place="another boot", token="other")


def test_a_share_is_held_once_until_it_is_released(store: Store) -> None:
    first, second, beside = Lease(store, "f", 0, 2), Lease(store, "f", 0, 2), Lease(store, "f", 1, 2)
    first.take()
    beside.take()
    with pytest.raises(RunBusy, match=f"process {os.getpid()} of this node"):
        second.take()
    with pytest.raises(RunBusy):
        Lease(store, "f", 0, 1).take()
    first.release()
    second.take()
    for each in (second, beside):
        each.release()
    assert list(store.list()) == []


def test_of_a_process_of_this_node_that_is_dead_it_is_taken_over_at_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE", 3600.0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = Holder.here()
    left_by(store, msgspec.structs.replace(here, pid=ended.pid))
    left_by(store, msgspec.structs.replace(here, started=here.started - 1), 0, 5)  # its pid is another process now
    held = Lease(store, "f", 0, 1)
    held.take()
    held.release()


def test_of_a_node_that_is_silent_it_is_taken_over(store: Store) -> None:
    left_by(store, elsewhere())
    held = Lease(store, "f", 0, 1)
    held.take()
    held.release()
    assert list(store.list()) == []


def test_a_holder_on_another_node_that_is_alive_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "STALE", 60.0)
    other = Lease(store, "f", 0, 1)
    other._holder = elsewhere()
    other.take()
    with pytest.raises(RunBusy, match="is at work"):
        Lease(store, "f", 0, 1).take()
    other.check()
    other.release()


def test_a_holder_finds_out_that_it_was_taken_over(store: Store) -> None:
    held = Lease(store, "f", 0, 1)
    held.take()
    number = int(held.key.rpartition(".")[2])
    for turn in range(number + 1, number + 1000):  # it goes on meanwhile
        store.put_if_absent(f"f/process-00000-of-00001.{turn:06d}", msgspec.json.encode(elsewhere()))
    end = time.monotonic() + 60
    while not held._lost and time.monotonic() < end:
        time.sleep(0.01)
    with pytest.raises(SaveFailed, match="taken over"):
        held.check()
    held.release()
