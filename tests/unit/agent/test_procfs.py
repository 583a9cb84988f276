"""What /proc says of real processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.runtime import eventually

from ckptsvc.agent.watching.procfs import OomKills, Process, activity, has_ended, look, state

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


PARENT = """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent: pass
    os._exit(0)
print("ready", flush=True)
time.sleep(600)
"""


def test_the_state_alone(start: Start) -> None:
    pid, pidfd = start(SLEEP)
    eventually(lambda: state(pid) == "S", "it to sleep")
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: state(pid) == "T", "it to stop")
    os.kill(pid, signal.SIGKILL)
    assert has_ended(pidfd, 10)
    assert state(pid) == "Z"
    assert state(1 << 30) == "X"
    assert state(0) == "", "of another pid namespace"


def test_what_a_process_and_its_children_get_done(start: Start, tmp_path: Path) -> None:
    quiet, _ = start(SLEEP)
    file = str(tmp_path / "file")
    writer, _ = start(
        f"f = open({file!r}, 'wb', 0); print('ready', flush=True)\nwhile f.write(bytes(1 << 16)): f.seek(0)"
    )
    before = activity(quiet)
    eventually(lambda: activity(writer)[0] > 10 << 20, "the writer to write")
    assert activity(writer)[1] == 0.0
    if Path(f"/proc/{quiet}/task/{quiet}/children").exists():  # else the kernel was built without
        parent, _ = start(PARENT)
        eventually(lambda: activity(parent)[1] > 0.2, "the child to compute")
    assert activity(quiet) == before


def test_a_process_that_is_gone_does_nothing() -> None:
    assert activity(1 << 30) == activity(0) == (0, 0.0)


def test_kills_for_lack_of_memory_are_news_until_they_are_forgotten_twice(tmp_path: Path) -> None:
    vmstat = tmp_path / "vmstat"
    vmstat.write_text("nr_free_pages 7\noom_kill 2\n")
    kills = OomKills(vmstat)
    assert kills.lately() == 0
    vmstat.write_text("nr_free_pages 7\noom_kill 3\n")
    kills.forget()
    assert kills.lately() == 1  # it may have happened right before, and the process not have ended yet
    kills.forget()
    assert kills.lately() == 0


@pytest.mark.parametrize("text", [None, "", "oom_kill\n", "oom_kill many\n"])
def test_a_kernel_that_does_not_count_them_has_killed_none(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "vmstat").write_text(text)
    assert OomKills(tmp_path / "vmstat").lately() == 0
