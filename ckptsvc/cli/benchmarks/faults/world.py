"""A small job on several nodes for `ckptsvc bench faults`: its processes, how to hurt them, and what they write down.

    launcher of each node -> its agent, its rank -> steps.jsonl (the job), incidents/ and agent.log (the agents)

Every node is a host with an address of its own where network namespaces are permitted; elsewhere all are on this one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from ckptsvc.agent.incidents import IncidentLog
from ckptsvc.cli.benchmarks.faults.hosts import Hosts
from ckptsvc.cli.demonstration.processes import Events
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import ArenaSettings

NODES = 3
"""Nodes of a job, with a rank each; it goes on with one less."""

VICTIM = 1
"""The node, and its rank, that most faults are done to; 0 is the coordinator's."""

POLL = 0.03
"""Seconds between two looks at what has been written."""

SOON = 20
"""Steps that nobody will have done when an order has been read by all."""

ARENA_LIMIT = "64MiB"

JOB_MODULE = "ckptsvc.cli.benchmarks.faults.job"

_FOREIGN = ("CKPTSVC_", "SLURM_", "PBS_", "PMI_", "PALS_", "OMPI_", "TORCHELASTIC_", "PET_", "XDG_STATE")
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

_WRONG_CLOCK = """
import time
_right = time.time, time.time_ns
time.time = lambda: _right[0]() + {seconds}
time.time_ns = lambda: _right[1]() + {seconds} * 10**9
"""


class FaultBenchFailed(CkptsvcError):
    """A job of the benchmark did not get as far as to be hurt; the message has the end of what it said."""


class Sighting(NamedTuple):
    """An incident, and when it was first seen on disk, in seconds of the monotonic clock."""

    at: float
    incident: pb.Incident


class Etcd(Protocol):
    """What a world needs of one."""

    @property
    def url(self) -> str:
        """For agent.coordination."""

    def kill_leader(self) -> None:
        """SIGKILL for the member that leads."""


class World:
    """One job on `NODES` nodes, from its start to its end; a context manager that leaves nothing behind.

    Args:
        hosts: one for each node; None: all nodes are on this one.
        etcd: where the nodes elect their coordinator; None: it is the agent of the first.
        settings: variables of all processes besides those of the benchmark.
        evaluates: the job evaluates now and then.
        wrong_clock: seconds by which the victim's wall clock is wrong.
        timeout: of the ranks' collectives, in seconds; 0: torch's default.

    Attributes:
        folder: of all that is written.
        events: lines of the job's own log so far.
        incidents: by file name.
    """

    def __init__(
        self, hosts: Hosts | None, settings: Mapping[str, str], *, etcd: Etcd | None = None, evaluates: bool = False,
        wrong_clock: int = 0, timeout: float = 0.0,
    ) -> None:  # fmt: skip
        # Short, for it holds unix sockets; private, for a job believes what lies there.
        self.folder = Path(tempfile.mkdtemp(prefix="ckf-", dir="/tmp"))
        (self.folder / "tmp").mkdir()
        self._arenas = Path(tempfile.mkdtemp(prefix="ckf-", dir=ArenaSettings().dir))
        self.hosts, self.etcd, self.evaluates, self.timeout = hosts, etcd, evaluates, timeout
        self.events: list[dict[str, Any]] = []
        self.incidents: dict[str, Sighting] = {}
        self._log = Events(self.folder / "steps.jsonl")
        self._launchers: list[subprocess.Popen[bytes]] = []
        self._cleanups: list[Callable[[], None]] = []
        self.port = free_port(self.address(0) if hosts is None else "127.0.0.1")
        self._environ = _environ(self.folder, dict(settings), "lo" if hosts is None else "eth0")
        self._wrong_clock = wrong_clock

    def __enter__(self) -> Self:
        try:
            for node in range(NODES):
                self._start(node)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _kill_all(f"CKPTSVC_AGENT_SOCKET_DIR={self.folder}")
        for launcher in self._launchers:
            launcher.wait()
        for clean in reversed(self._cleanups):
            clean()
        for folder in (self._arenas, self.folder):
            shutil.rmtree(folder, ignore_errors=True)

    def at_end(self, clean: Callable[[], None]) -> None:
        """Something to be done when all processes have ended."""
        self._cleanups.append(clean)

    # ---- processes

    def address(self, node: int) -> str:
        """Where other nodes reach this one."""
        return self.hosts.address(node + 1) if self.hosts else "127.0.0.1"

    def command(self, node: int) -> list[str]:
        """The launcher of a node."""
        command = [sys.executable, "-P", "-m", "ckptsvc.cli.main", "run", "--nnodes", f"{NODES - 1}:{NODES}"]
        command += ["--node", f"n{node}", "--node-rank", str(node), "--address", self.address(node)]
        command += ["--rdzv-id", "faults", *self.meeting(), "--max-restarts", "9", "--no-preflight"]
        evaluates = ["--evaluates"] if self.evaluates else []
        return [*command, "--log-dir", str(self.folder / "ranks"), "-m", JOB_MODULE, str(self.folder), *evaluates]

    def meeting(self) -> list[str]:
        """How the nodes find their coordinator."""
        if self.etcd is not None:
            return ["--coordination", self.etcd.url]
        return ["--rdzv-endpoint", f"{self.address(0)}:{self.port}"]

    def _start(self, node: int) -> None:
        environ = self._environ | {"CKPTSVC_ARENA_DIR": str(self._arenas / f"n{node}")}
        Path(environ["CKPTSVC_ARENA_DIR"]).mkdir(mode=0o700)
        if node == VICTIM and self._wrong_clock:
            patch = self.folder / "clock" / "sitecustomize.py"
            patch.parent.mkdir()
            patch.write_text(_WRONG_CLOCK.format(seconds=self._wrong_clock), encoding="utf-8")
            paths = [str(patch.parent), *filter(None, [environ.get("PYTHONPATH")])]
            environ["PYTHONPATH"] = os.pathsep.join(paths)
        before = self.hosts.on(node + 1) if self.hosts else []
        with open(self.launcher_log(node), "wb") as log:
            launcher = subprocess.Popen(
                [*before, *self.command(node)], env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        self._launchers.append(launcher)

    def launcher_log(self, node: int) -> Path:
        """What a launcher prints."""
        return self.folder / f"run-{node}.log"

    def rank_pid(self, rank: int = VICTIM) -> int:
        """The process of a rank of the newest attempt."""
        self.look()
        pid: int = [e["pid"] for e in self.events if e["event"] == "start" and e["rank"] == rank][-1]
        return pid

    def agent_pid(self, node: int) -> int:
        """The process of a node's agent."""
        return int((self.folder / f"node-n{node}" / "ready").read_text(encoding="utf-8").split()[0])

    def worker_pid(self, node: int) -> int:
        """The process that does a node's input and output.

        Raises:
            ProcessLookupError: there is none.
        """
        for pid in processes_with(f"CKPTSVC_ARENA_DIR={self._arenas}/n{node}"):
            if b"ckptsvc.agent.worker.worker" in _read(pid, "cmdline"):
                return pid
        raise ProcessLookupError(f"node n{node} has no I/O worker")

    def kill_node(self, node: int) -> None:
        """SIGKILL for every process of a node."""
        if self.hosts:
            self.hosts.kill(node + 1)
        else:
            _kill_all(f"CKPTSVC_ARENA_DIR={self._arenas}/n{node}")

    # ---- what has happened

    def look(self) -> None:
        """Take in what has been written since the last look."""
        self.events += self._log.new()
        offset = time.time() - time.monotonic()
        for path in sorted(self.folder.glob("incidents/*.json")):
            with contextlib.suppress(OSError):
                at = path.stat().st_mtime - offset
                found = IncidentLog(path.parent).find(path.stem).incident
                if isinstance(found, pb.Incident):
                    first = self.incidents[path.name].at if path.name in self.incidents else at
                    self.incidents[path.name] = Sighting(first, found)

    def said(self, text: str) -> bool:
        """Whether an agent has written this to its log."""
        return any(text in log.read_text(errors="replace") for log in self.folder.glob("node-*/**/agent.log"))

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
        """Look until a condition holds.

        Raises:
            FaultBenchFailed: it took too long, or a launcher has ended.
        """
        deadline = time.monotonic() + seconds
        while not condition():
            ended = any(launcher.poll() is not None for launcher in self._launchers)
            if ended or time.monotonic() > deadline:
                why = "a launcher ended" if ended else f"{seconds:g} s were not enough"
                raise FaultBenchFailed(f"waiting for {what}: {why}", hint=self._story())
            time.sleep(POLL)
            self.look()

    def order(self, fault: str, rank: int = VICTIM) -> float:
        """Ask a rank to misbehave, or all of them (-1) at the same step; returns when they began to."""
        attempt = max(e["attempt"] for e in self.events)
        step = 0 if rank >= 0 else max(e["step"] for e in self.events if e["event"] == "step") + SOON
        fresh = self.folder / "order.new"
        order = {"fault": fault, "rank": rank, "attempt": attempt, "step": step}
        fresh.write_text(json.dumps(order), encoding="utf-8")
        fresh.rename(self.folder / "order.json")
        self.wait(lambda: any(e["event"] == "fault" for e in self.events), f"rank {rank} to do {fault}", 30.0)
        at: float = next(e["monotonic"] for e in self.events if e["event"] == "fault")
        return at

    def _story(self) -> str:
        logs = [self.launcher_log(node) for node in range(NODES)]
        return "\n".join(f"{log}:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-8:]) for log in logs)


class TorchrunWorld(World):
    """The same job under torchrun with its default settings, one agent on each node."""

    def command(self, node: int) -> list[str]:
        """Its launcher."""
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", f"{NODES - 1}:{NODES}"]
        command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "faults", "--max-restarts", "9"]
        command += ["--rdzv-endpoint", f"{self.address(0)}:{self.port}", "--local-addr", self.address(node)]
        return [*command, "-m", JOB_MODULE, str(self.folder), "--plain", "--timeout", f"{self.timeout:g}"]


def _environ(folder: Path, settings: dict[str, str], interface: str) -> dict[str, str]:
    """No settings of the user's, no scheduler, no ranks of an outer launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN) and k not in _RANKS}
    return kept | {
        "CKPTSVC_AGENT_SOCKET_DIR": str(folder),
        "CKPTSVC_AGENT_METRICS_LISTEN": "off",
        "CKPTSVC_AGENT_INCIDENTS_DIR": str(folder / "incidents"),
        "CKPTSVC_LAUNCH_STATE": str(folder / "state"),  # who fails here is no bad node for the user's next job
        "CKPTSVC_ARENA_LIMIT": ARENA_LIMIT,
        "CKPTSVC_FAILPOINT": str(folder),
        "GLOO_SOCKET_IFNAME": interface,
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(folder / "tmp"),  # who is killed leaves there what it has made
    } | settings  # fmt: skip


def free_port(host: str) -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def processes_with(variable: str) -> list[int]:
    """All processes that have this in their environment, oldest first, but this one."""
    mark = variable.encode()
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]
    return sorted(pid for pid in pids if mark in _read(pid, "environ").split(b"\0"))


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""  # it has ended, or is another user's


def _kill_all(variable: str) -> None:
    """SIGKILL for all processes with this in their environment, until there is none."""
    deadline = time.monotonic() + 10.0
    while (left := processes_with(variable)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(POLL)
