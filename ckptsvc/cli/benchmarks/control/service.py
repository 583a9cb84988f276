"""The coordinator's process of a benchmark: a real agent, which keeps nothing of what it hears when it is over."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptsvc.cli.benchmarks.machine import cpu_seconds
from ckptsvc.config import load
from ckptsvc.errors import AgentUnavailable
from ckptsvc.quantities import parse_address
from ckptsvc.rpc.secret import shared_secret

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")

START_TIMEOUT = 30.0
STOP_TIMEOUT = 20.0
"""Seconds to wait for it."""


@dataclass(slots=True)
class Service:
    """One coordinator after another, at the same address.

    Attributes:
        directory: of the agent, its secret, and the store.
        address: where it listens.
    """

    directory: Path
    address: tuple[str, int] = ("127.0.0.1", 0)
    _process: subprocess.Popen[bytes] = field(init=False)

    @staticmethod
    @contextlib.contextmanager
    def started() -> Iterator[Service]:
        """For the length of the context.

        Raises:
            AgentUnavailable: it did not start.
        """
        # Mode 0700. Not in $TMPDIR, which schedulers make long: the path of a socket has 107 bytes at most.
        directory = Path(tempfile.mkdtemp(prefix="ckptsvc-bench-", dir=load(os.environ).agent.socket_dir or "/tmp"))
        service = Service(directory)
        try:
            service.start()
            try:
                yield service
            finally:
                service.stop()
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    @property
    def secret(self) -> str:
        """What its agents must know."""
        return shared_secret(self.directory)

    @property
    def store(self) -> str:
        """Where its job saves."""
        return f"file://{self.directory}/run"

    def start(self) -> None:
        """Start it, again at the same port.

        Raises:
            AgentUnavailable: it did not come up.
        """
        ready = self.directory / "ready"
        ready.unlink(missing_ok=True)
        # A coordinator writes down which nodes have failed, and incidents: these are none of the user's.
        environ = os.environ | {
            "CKPTSVC_AGENT_SOCKET_DIR": str(self.directory),
            "CKPTSVC_AGENT_INCIDENTS_DIR": str(self.directory / "incidents"),
            "CKPTSVC_AGENT_COORDINATION": "",
            "CKPTSVC_LAUNCH_STATE": str(self.directory),
        }
        command = [sys.executable, "-P", "-m", "ckptsvc.agent.server", "--dir", str(self.directory),
            "--name", "coordinator", "--listen", "{}:{}".format(*self.address), "--metrics-listen", "off"]  # fmt: skip
        with open(self.directory / "agent.log", "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environ)
        deadline = time.monotonic() + START_TIMEOUT
        while not ready.exists():
            if time.monotonic() > deadline or self._process.poll() is not None:
                said = (self.directory / "agent.log").read_text(errors="replace").splitlines()[-5:]
                raise AgentUnavailable("the coordinator did not start", hint=" | ".join(said))
            time.sleep(0.02)
        where = parse_address(ready.read_text(encoding="utf-8").split("\n")[1])
        self.address = (where.host, where.port)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """End it in good order."""
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()

    def cpu(self, *, children: bool = False) -> float:
        """CPU seconds it has used so far; `children`: with its I/O workers."""
        return cpu_seconds([self._process.pid]) if children else sum(map(int, self._stat()[11:13])) / _TICKS

    def memory(self) -> int:
        """Bytes of memory it has now."""
        return int(self._stat()[21]) * _PAGE

    def _stat(self) -> list[str]:
        text = Path(f"/proc/{self._process.pid}/stat").read_text(encoding="utf-8")
        return text[text.rindex(")") + 2 :].split()
