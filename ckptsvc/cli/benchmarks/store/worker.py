"""One system of `ckptsvc bench store` in a process of its own, so that its memory and CPU time are its own.

    python -m ckptsvc.cli.benchmarks.store.worker '{"system": ..., ...}'

Takes one word a line ("write", "read", "delete", with the name of an object), and answers with one line of JSON.
"""

from __future__ import annotations

import mmap
import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from ckptsvc.cli.benchmarks.store.systems import System, systems
from ckptsvc.errors import CkptsvcError


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is.

    Attributes:
        system: its name, as in `systems.systems`.
        url: of the folder that is its own.
        memory: file of shared memory: the source, then the target, whole pages each.
        nbytes: of an object.
        connections: of a raw client.
    """

    system: str
    url: str
    memory: str
    nbytes: int
    connections: int


def main(text: str) -> int:
    """Serve until standard input ends."""
    task = msgspec.json.decode(text, type=Task)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    with open(task.memory, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    for page in range(0, len(memory), mmap.PAGESIZE):
        memory[page]  # mapped now, not while it is measured
    half = len(memory) // 2
    source, target = memoryview(memory)[: task.nbytes], memoryview(memory)[half : half + task.nbytes]
    scheme = task.url.partition("://")[0]
    system = systems(scheme, ("fsspec", "dcp"))[task.system](task.url, task.connections)
    _answer(out, _attempt(lambda: system.setup(source, target)) | {"note": system.note})
    for line in sys.stdin:
        word, name = line.split()
        _answer(out, _attempt(lambda word=word, name=name: _do(system, word, name)))
    return 0


def _do(system: System, word: str, name: str) -> dict[str, Any]:
    if word == "delete":
        system.describe()
        system.delete(name)
        return {"note": system.note}
    if word == "read":
        system.cool(name)
        system.target[:: mmap.PAGESIZE] = bytes(len(range(0, len(system.target), mmap.PAGESIZE)))
    before = _resident(reset=True)
    began, used = time.perf_counter(), time.process_time()
    (system.write if word == "write" else system.read)(name)
    took, cpu = time.perf_counter() - began, time.process_time() - used
    wrong = word == "read" and system.target[:: mmap.PAGESIZE] != system.source[:: mmap.PAGESIZE]
    return {"seconds": took, "cpu": cpu, "memory": max(_resident() - before, 0), "wrong": wrong}


def _attempt(work: Any) -> dict[str, Any]:
    try:
        return work() or {}
    except ImportError as error:
        return {"error": f"not installed: {error}"}
    except (CkptsvcError, OSError) as error:
        return {"error": f"{type(error).__name__}: {error}"}
    except Exception as error:  # noqa: BLE001  whatever another library raises ends its part of the comparison only
        return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def _resident(*, reset: bool = False) -> int:
    """Bytes of this process in memory: the most since the last reset, or now (with `reset`), proc_pid_status(5)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    field = "VmRSS:" if reset else "VmHWM:"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0


def _answer(out: Any, message: dict[str, Any]) -> None:
    out.write(msgspec.json.encode(message).decode() + "\n")
    out.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
