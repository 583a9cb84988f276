"""What /proc says of real processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from harness.runtime import eventually

from ckptsvc.agent.procfs import Process, has_ended, look

Start = Callable[[str], tuple[int, int]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a Python program that says so when it is ready; gives its process id and a descriptor of it."""
    with contextlib.ExitStack() as stack:

        def begin(program: str) -> tuple[int, int]:
            child = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
            )
            stack.callback(child.kill)
            pidfd = os.pidfd_open(child.pid)
            stack.callback(os.close, pidfd)
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            return child.pid, pidfd

        yield begin


SLEEP = "import time; print('ready', flush=True); time.sleep(600)"


def test_a_process_that_sleeps(start: Start) -> None:
    pid, pidfd = start(SLEEP)
    eventually(lambda: look(pid, pidfd, 0.0).state == "S", "it to sleep")
    found = look(pid, pidfd, 0.1)
    assert (found.state, found.threads, found.notes) == ("S", 1, [])
    assert found.resident > 1 << 20
    assert found.cpu < 0.5
    assert "sleep" in found.waits_in


def test_the_busiest_thread_counts(start: Start) -> None:
    pid, pidfd = start(
        "import threading, time\n"
        "threading.Thread(target=lambda: [None for _ in iter(int, 1)], daemon=True).start()\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    eventually(lambda: look(pid, pidfd, 0.2).cpu > 0, "it to use a core")
    found = look(pid, pidfd, 0.2)
    assert found.threads == 2
    assert 0 <= found.cpu <= 1


def test_a_process_that_is_stopped(start: Start) -> None:
    pid, pidfd = start(SLEEP)
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: look(pid, pidfd, 0.0).state == "T", "it to stop")
    assert "stop" in look(pid, pidfd, 0.0).waits_in


def test_a_name_that_looks_like_the_fields_after_it(start: Start) -> None:
    pid, pidfd = start(
        "import ctypes, time; ctypes.CDLL(None).prctl(15, b'a) R 1 (b', 0, 0, 0)\nprint('ready', flush=True)\n"
        "time.sleep(600)"
    )
    eventually(lambda: look(pid, pidfd, 0.0).state == "S", "it to sleep")
    assert look(pid, pidfd, 0.0).threads == 1


def test_a_process_that_has_ended(start: Start) -> None:
    pid, pidfd = start(SLEEP)
    assert not has_ended(pidfd)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: has_ended(pidfd), "it to end")
    assert look(pid, pidfd, 0.0) == Process(state="X")


def test_another_process_that_has_the_number_now_is_not_taken_for_it(start: Start) -> None:
    old, pidfd = start(SLEEP)
    os.kill(old, signal.SIGKILL)
    eventually(lambda: has_ended(pidfd), "it to end")
    new, _ = start(SLEEP)
    assert look(new, pidfd, 0.0) == Process(state="X")
