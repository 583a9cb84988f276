"""A process that has torch imported and forks a new one for every rank: a rank then starts in 50 ms, not in 4 s.

What it forks runs a script exactly as `python script arguments` would: its own arguments, environment and output, in a
process group of its own. The zygote itself has one thread and opens nothing that a fork could break.

    client -> zygote   {"id", "script", "arguments", "environ", "log"}
    zygote -> client   {"id", "pid"}, later {"id", "status"}     (exit status, or minus the signal's number)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PRELOADED = (
    "torch",
    "torch._dynamo",  # the first optimizer imports it
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "torch.utils.data",
    "msgspec",
    "numpy",
    "pytest",
    "xxhash",
)


class Forked:
    """A rank that the zygote has started; `status` is None while it runs."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote, self.pid = zygote, pid
        self.status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, or minus a signal's number; None while it runs."""
        self._zygote.receive(0.0)
        return self.status

    def kill(self) -> None:
        """SIGKILL for its whole process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end."""
        while (status := self.poll()) is None:
            time.sleep(0.005)
        return status


class Zygote:
    """The test session's end."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        environ = {k: v for k, v in os.environ.items() if not k.startswith(("CKPTSVC_", "COV_"))}
        environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=(theirs.fileno(),), env=environ
        )
        theirs.close()
        self._received = b""
        self._forked: dict[int, Forked] = {}
        self._last = 0

    def spawn(self, script: Path, arguments: list[str], environ: dict[str, str], log: Path) -> Forked:
        """Run a script in a new process."""
        self._last += 1
        number = self._last
        request = {
            "id": number,
            "script": str(script),
            "arguments": arguments,
            "environ": environ,
            "log": str(log),
        }
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        while number not in self._forked:
            self.receive(60.0)
        return self._forked[number]

    def receive(self, timeout: float) -> None:
        """Take in what the zygote has said."""
        said = select.poll()  # not select(): hundreds of tests have opened files before
        said.register(self._sock, select.POLLIN)
        if not said.poll(1000 * timeout):
            assert timeout == 0.0, "the zygote does not answer"
            return
        data = self._sock.recv(1 << 16)
        assert data, "the zygote has died"
        *lines, self._received = (self._received + data).split(b"\n")
        for message in map(json.loads, lines):
            if "pid" in message:
                self._forked[message["id"]] = Forked(self, message["pid"])
            else:
                self._forked[message["id"]].status = message["status"]

    def close(self) -> None:
        """End the zygote and all it has started."""
        self._sock.close()
        self._process.wait(10)


def serve(sock: socket.socket) -> None:
    """Fork on request, report every end, until the client is gone."""
    for name in PRELOADED:
        importlib.import_module(name)
    wake, woken = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, int] = {}
    waiting = b""

    def send(**message: Any) -> None:
        sock.sendall(json.dumps(message).encode() + b"\n")

    while True:
        ready = select.select([sock, wake], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
            for pid, status in _ended(children):
                send(id=children.pop(pid), status=status)
        if sock in ready:
            data = sock.recv(1 << 16)
            if not data:
                break
            *lines, waiting = (waiting + data).split(b"\n")
            for request in map(json.loads, lines):
                pid = os.fork()
                if pid == 0:
                    signal.set_wakeup_fd(-1)
                    sock.close()
                    os.close(wake)
                    os.close(woken)
                    _become(request)
                with contextlib.suppress(OSError):
                    os.setpgid(pid, pid)  # the child does it too: whoever comes first
                children[pid] = request["id"]
                send(id=request["id"], pid=pid)
    for pid in children:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def _ended(children: dict[int, int]) -> list[tuple[int, int]]:
    """(pid, status) of every child that has ended since the last look."""
    found = []
    for child in children:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            found.append((pid, os.waitstatus_to_exitcode(status)))
    return found


def _become(request: dict[str, Any]) -> None:
    """Be what `python script arguments` would be; does not return."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    os.environ.clear()
    os.environ.update(request["environ"])
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    sys.path[1:1] = [p for p in request["environ"].get("PYTHONPATH", "").split(os.pathsep) if p]
    runpy.run_path(request["script"], run_name="__main__")
    sys.exit(0)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
