"""The private world of one test: its own sockets, arenas, failpoints and environment; and who is still in it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

MARK = "CKPTSVC_AGENT_SOCKET_DIR"
"""Every process of a test has this variable with the test's own directory in its environment."""

FOREIGN = ("CKPTSVC_", "SLURM_", "PBS_", "PMI_", "PALS_", "OMPI_", "TORCHELASTIC_", "XDG_")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

STOP_TIMEOUT = 10.0
FAULTY_STORE = str(Path(__file__).parent / "faulty_store")


class Process(NamedTuple):
    """A process of the test."""

    pid: int
    command: str


class Runtime:
    """Directories, environment and processes of one test.

    Attributes:
        environ: for every process of the test.
        leaves_snapshots: set by a test at whose end staged snapshots remain in arenas on purpose.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="ck-", dir="/tmp"))  # short: socket paths are limited
        self.arenas = Path(tempfile.mkdtemp(prefix="ck-", dir="/dev/shm"))
        self.sockets = self.root / "run"
        self.failpoints = self.root / "failpoints"
        for folder in (self.sockets, self.failpoints):
            folder.mkdir(mode=0o700)
        self.leaves_snapshots = False
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN) and k not in RANK_VARIABLES}
        self.environ = inherited | {
            MARK: str(self.sockets),
            "CKPTSVC_AGENT_METRICS_LISTEN": "off",
            "CKPTSVC_ARENA_DIR": str(self.arenas),
            "CKPTSVC_FAILPOINT": str(self.failpoints),
            "GLOO_SOCKET_IFNAME": "lo",
            "HOME": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(p for p in (FAULTY_STORE, os.environ.get("PYTHONPATH", "")) if p),
            "PYTHONUNBUFFERED": "1",
        }

    # ---- processes ---------------------------------------------------------------------------------------------------

    def processes(self, part: str = "") -> list[Process]:
        """Every live process of the test whose command has `part` in it, oldest first."""
        mark = f"{MARK}={self.sockets}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit() or int(folder.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                    if command and part in command:
                        found.append(Process(int(folder.name), command))
        return sorted(found)

    def agents(self) -> list[Process]:
        """The live agents."""
        return self.processes("ckptsvc.agent.server") + self.processes("ckptsvc.cli.main agent")

    def workers(self) -> list[Process]:
        """The live I/O workers."""
        return self.processes("ckptsvc.agent.worker.worker")

    def kill_agents(self) -> None:
        """SIGKILL for every agent; waits until they and their workers are gone."""
        for agent in self.agents():
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGKILL)
        eventually(lambda: not self.agents() and not self.workers(), "the agents to be gone")

    def start_agent(self, *options: str, directory: Path | None = None) -> subprocess.Popen[bytes]:
        """`ckptsvc agent`, by hand: the node's agent, or the one whose directory this is."""
        where = directory or self.sockets
        (where / "ready").unlink(missing_ok=True)
        command = [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--dir", str(where), *options]
        with (where / "agent.log").open("ab") as log:
            agent = subprocess.Popen(command, env=self.environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(lambda: (where / "ready").exists() or agent.poll() is not None, "the agent to start")
        return agent

    def stop(self, process: Process) -> None:
        """SIGTERM for a process; waits for its end."""
        os.kill(process.pid, signal.SIGTERM)
        eventually(lambda: process not in self.processes(), f"{process.command} to end")

    def agent_directory(self) -> Path:
        """The directory of the newest agent, alive or dead."""
        found = sorted(self.sockets.rglob("agent.lock"), key=lambda p: p.stat().st_mtime)
        assert found, "no agent was ever started"
        return found[-1].parent

    def log(self) -> str:
        """What all agents and their workers have logged."""
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.sockets.rglob("agent.log")))

    def status(self, directory: Path | None = None, timeout: float = 5.0) -> dict[str, Any]:
        """The status document of an agent."""
        import grpc

        from ckptsvc.rpc.dial import sockets
        from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

        path, _ = sockets(directory or self.agent_directory())
        with grpc.insecure_channel(f"unix:{path}") as channel:
            stub = agent_pb2_grpc.AgentServiceStub(channel)
            document: dict[str, Any] = json.loads(stub.GetStatus(agent_pb2.GetStatusRequest(), timeout=timeout).json)
        return document

    def metrics(self, address: str = "") -> str:
        """The metrics of an agent, as Prometheus gets them: of the newest one, or of the one at an address."""
        token = (self.sockets / "http-token").read_text().strip()
        where = f"http://{address or self.status()['metrics']}/metrics"
        request = urllib.request.Request(where, headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            return str(answer.read().decode())

    # ---- failpoints --------------------------------------------------------------------------------------------------

    def arm(self, point: str) -> None:
        """The next process that reaches this point of the code stops there (see pipeline.failpoint)."""
        (self.failpoints / point).touch()

    def reached(self, point: str, timeout: float = 30.0) -> int:
        """Wait until a process stands at this point; returns its process id."""
        held = self.failpoints / f"{point}.held"
        eventually(held.exists, f"a process to reach {point}", timeout)
        eventually(lambda: held.read_text() != "", "its process id")
        return int(held.read_text())

    def stands_at(self, point: str) -> bool:
        """Whether a process stands at this point."""
        return (self.failpoints / f"{point}.held").exists()

    def let_go(self, point: str) -> None:
        """Let the process that stands at this point go on."""
        (self.failpoints / f"{point}.held").unlink()

    # ---- end ---------------------------------------------------------------------------------------------------------

    def close(self) -> list[str]:
        """Stop the agents in good order, end what is left by force; returns what should not have been left."""
        problems = []
        for agent in self.agents():
            with contextlib.suppress(ProcessLookupError):
                os.kill(agent.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.02)
        for process in self.processes():
            problems.append(f"process {process.pid} was left: {process.command}")
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        arenas = [str(p) for p in self.arenas.rglob("*.arena")]
        if arenas and not self.leaves_snapshots:
            problems.append(f"arenas were left: {', '.join(arenas)}")
        if problems:
            problems.append(f"the agents' log:\n{self.log()}")
        shutil.rmtree(self.arenas, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)
        return problems


def eventually(condition: Any, what: str, timeout: float = 30.0) -> Any:
    """Wait for a true value and return it."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"waited {timeout:g} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small tmpfs mounted on a new folder; the test is skipped where mounting is not allowed."""
    import pytest

    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mounting a tmpfs is not permitted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
