"""What can be seen of a process from outside."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from harness.runtime import eventually

from ckptsvc.agent.examine import Target, activity, collect, process_state

SPIN = "def spin():\n while True: pass"

PARENT = """
import os, time
parent = os.getpid()
if os.fork() == 0:
    while os.getppid() == parent: pass
    os._exit(0)
time.sleep(60)
"""


@pytest.fixture
def run():
    """Starts programs; they are killed at the end."""
    started = []

    def start(program: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE)
        started.append(process)
        process.stdout.read(1)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def examine(*pids: int, seconds: float = 0.5):
    targets = [Target(rank, pid) for rank, pid in enumerate(pids)]
    return asyncio.run(collect(targets, seconds))


def test_a_sleeper_a_worker_and_one_that_is_stopped(run):
    sleeper, worker, stopped = run("import time; time.sleep(60)"), run("while True: pass"), run("while True: pass")
    os.kill(stopped.pid, signal.SIGSTOP)
    eventually(lambda: process_state(stopped.pid) == "T", "the process to stop")
    one, two, three = examine(sleeper.pid, worker.pid, stopped.pid)
    assert (one.rank, one.pid, one.state, two.rank, three.state) == (0, sleeper.pid, "S", 1, "T")
    assert two.state == "R"
    assert one.cpu < 0.2
    assert three.cpu == 0
    assert {e.enqueued for e in (one, two, three)} == {-1}
    eventually(lambda: examine(worker.pid)[0].cpu > 0.2, "the worker to get a core")


def test_the_busiest_thread_counts(run):
    process = run(f"import threading, time\n{SPIN}\nthreading.Thread(target=spin).start()\ntime.sleep(60)")
    eventually(lambda: examine(process.pid)[0].cpu > 0.2, "the thread to get a core")


def test_a_process_that_is_gone(run):
    process = run("import time; time.sleep(60)")
    process.kill()
    eventually(lambda: process_state(process.pid) == "Z", "the process to end")
    assert examine(process.pid)[0].state == "Z"
    process.wait()
    assert process_state(process.pid) == "X"
    (evidence,) = examine(process.pid)
    assert (evidence.state, evidence.cpu, evidence.waits_in) == ("X", 0, "")
    assert evidence.notes


def test_a_process_of_another_namespace():
    assert process_state(0) == ""
    (evidence,) = examine(0)
    assert (evidence.state, list(evidence.notes)) == ("", ["its process is in another pid namespace"])
    assert activity(0) == (0, 0.0)


def test_what_it_and_its_children_do_is_counted(run, tmp_path):
    quiet = run("import time; time.sleep(60)")
    writer = run(f"f = open({str(tmp_path / 'x')!r}, 'wb', 0)\nwhile True: f.write(bytes(1 << 16)); f.seek(0)")
    parent = run(PARENT)
    before = activity(quiet.pid)
    eventually(lambda: activity(writer.pid)[0] > 10 << 20, "the writer to write")
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if children.exists():  # else the kernel was built without
        eventually(lambda: activity(parent.pid)[1] > 0.2, "the child to compute")
    assert activity(quiet.pid) == before


def test_nothing_to_examine():
    assert examine() == []
