"""Stacks from outside, by py-spy where that is installed: it reads a process's memory and needs none of its threads.

Python stacks are read while the process runs, or is stopped. Native ones need it held for an instant (ptrace).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import msgspec

from ckptsvc.agent.aside import aside
from ckptsvc.agent.watching.procfs import has_ended, look
from ckptsvc.rpc.testimony import MAX_THREADS, Stack, cut, frame_line

MAX_OUTPUT = 8 << 20
"""Bytes that are read of what py-spy says."""

TRIES = 3
"""What is read of a running process may contradict itself."""

_END = 1.0  # seconds that a program may take to end when it is killed
_NATIVE_NAME = 160


class Dump(NamedTuple):
    """The stacks, main thread first, and remarks: who holds the interpreter lock, or why there are no stacks."""

    stacks: list[Stack]
    notes: list[str]


class _Frame(msgspec.Struct):
    name: str
    filename: str
    line: int = 0
    module: str | None = None


class _Thread(msgspec.Struct):
    frames: list[_Frame]
    thread_name: str | None = None
    os_thread_id: int | None = None
    owns_gil: bool = False


def find() -> str | None:
    """Path of py-spy, or None where it is not installed."""
    beside = os.path.dirname(sys.executable)  # of a service, whose PATH has no virtual environment
    return shutil.which("py-spy", path=os.pathsep.join((beside, os.environ.get("PATH", os.defpath))))


async def dump(pid: int, pidfd: int, seconds: float, *, native: bool = False) -> Dump:
    """The stacks of a process, within so many seconds."""
    program = find()
    if program is None:
        return Dump([], ["py-spy is not installed on this node"])
    arguments = [program, "dump", "--json", "--native" if native else "--nonblocking", "--pid", str(pid)]
    why = ""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    for _ in range(TRIES):
        left = max(deadline - loop.time(), 0.0)
        try:
            output = await aside(partial(_run, arguments, left), left + _END)
        except TimeoutError:
            why = f"py-spy had not finished after {seconds:.1f} s"
            if native:
                await _let_go(pid, pidfd)
            break
        except (OSError, ValueError) as error:
            why = f"py-spy: {error}"
            if native:
                break
            continue
        if has_ended(pidfd):
            return Dump([], ["the process has ended"])  # and what was read may be of another one
        return _parse(output, pid)
    return Dump([], [why])


def _run(arguments: list[str], seconds: float) -> bytes:
    """What a program writes.

    Raises:
        TimeoutError: it had not finished after so many seconds, and was ended.
        OSError: it cannot be started.
        ValueError: it failed; the message is what it says about that.
    """
    with open(os.memfd_create("output"), "rb") as output, open(os.memfd_create("complaint"), "rb") as complaint:
        process = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=complaint, env={"PATH": os.defpath}
        )
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (MAX_OUTPUT, MAX_OUTPUT))
        pidfd = os.pidfd_open(process.pid)
        try:
            if not has_ended(pidfd, seconds):
                raise TimeoutError
        finally:
            os.close(pidfd)
            process.kill()
            status = process.wait()
        if status == -signal.SIGXFSZ:
            raise ValueError(f"it says more than {MAX_OUTPUT} bytes")
        if status == 0:
            return os.pread(output.fileno(), MAX_OUTPUT, 0)
        said = [
            line.strip() for line in os.pread(complaint.fileno(), 1 << 16, 0).decode("utf-8", "replace").splitlines()
        ]
        causes = [line for line in said[:4] if line and not line.startswith(("Caused by", "Stack backtrace"))]
        raise ValueError("; ".join(causes) or "failed")


async def _let_go(pid: int, pidfd: int) -> None:
    """A py-spy that was killed while it attached can leave the process stopped."""
    with contextlib.suppress(TimeoutError, OSError):
        if (await aside(lambda: look(pid, pidfd, 0.0), 1.0)).state == "T":
            signal.pidfd_send_signal(pidfd, signal.SIGCONT)


def _parse(output: bytes, pid: int) -> Dump:
    try:
        threads = msgspec.json.decode(output, type=list[_Thread])
    except msgspec.MsgspecError as error:
        return Dump([], [f"py-spy's answer is not understood: {error}"])
    threads.sort(key=lambda thread: thread.os_thread_id != pid)
    stacks = [
        Stack(
            thread.thread_name or f"thread {thread.os_thread_id}",
            thread.os_thread_id == pid,
            cut([_line(frame) for frame in reversed(thread.frames)]),
        )
        for thread in threads[:MAX_THREADS]
    ]
    holders = [f"thread {stack.thread} holds the interpreter lock"
        for stack, thread in zip(stacks, threads, strict=False) if thread.owns_gil]  # fmt: skip
    return Dump(stacks, holders)


def _line(frame: _Frame) -> str:
    if frame.module is not None and not frame.line:
        name = "??" if frame.name.startswith("0x") else frame.name[:_NATIVE_NAME]  # an address is another in each rank
        return f"{name} ({os.path.basename(frame.module)})"
    return frame_line(frame.filename, frame.line, frame.name)
