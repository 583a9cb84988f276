"""The processes of a benchmark: an agent of its own, the ranks of each workload, and none of them left behind."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from ckptsvc.cli.benchmarks.spec import Results, Spec
from ckptsvc.config import load
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.dial import ensure_agent, is_alive

POLL = 0.1
"""Seconds between looks at the ranks."""

STOP_TIMEOUT = 20.0
"""Seconds the agent has to end."""

Progress = Callable[[float], None]


class BenchFailed(CkptsvcError):
    """A rank of the benchmark ended; the message has the end of what it said."""


@contextlib.contextmanager
def agent() -> Iterator[tuple[Path, int]]:
    """An agent for the length of the context; yields its directory and process id.

    Raises:
        AgentUnavailable: it did not start.
    """
    # Mode 0700. Not in $TMPDIR, which schedulers make long: the path of a socket has 107 bytes at most.
    near = load(os.environ).agent.socket_dir or "/tmp"
    directory = Path(tempfile.mkdtemp(prefix="ckptsvc-bench-", dir=near))
    try:
        ensure_agent(directory, ["--name", "bench", "--linger", "120s"])
        pid = int((directory / "ready").read_text(encoding="utf-8").split()[0])
        try:
            yield directory, pid
        finally:
            _stop(directory, pid)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _stop(directory: Path, pid: int) -> None:
    deadline = time.monotonic() + STOP_TIMEOUT
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
        while is_alive(directory) and time.monotonic() < deadline:
            time.sleep(POLL)
        if is_alive(directory):
            os.kill(pid, signal.SIGKILL)


class Job:
    """The ranks of one workload; several may follow each other in one job, as restarted ranks do.

    Args:
        directory: of the agent.
        ranks: how many.
    """

    def __init__(self, directory: Path, ranks: int) -> None:
        self._ranks = ranks
        cores = len(os.sched_getaffinity(0))
        self._environ = os.environ | {
            "CKPTSVC_JOB": f"bench-{secrets.token_hex(4)}",
            "CKPTSVC_AGENT_SOCKET_DIR": str(directory),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // ranks))),
        }

    def run(self, spec: Spec, progress: Progress) -> list[Results]:
        """Run the ranks to their end; returns what each has measured.

        Raises:
            BenchFailed: a rank ended early.
        """
        with tempfile.TemporaryDirectory(prefix="ckptsvc-ranks-") as name, self._started(Path(name), spec) as processes:
            folder = Path(name)
            self._wait(folder, processes, lambda: all(p.poll() == 0 for p in processes), progress)
            return [msgspec.json.decode(path.read_bytes(), type=Results) for path in self._answers(folder)]

    def run_and_kill(self, spec: Spec, progress: Progress) -> None:
        """Run the ranks until all have answered, then end them with SIGKILL.

        Raises:
            BenchFailed: a rank ended early.
        """
        with tempfile.TemporaryDirectory(prefix="ckptsvc-ranks-") as name, self._started(Path(name), spec) as processes:
            folder = Path(name)
            self._wait(folder, processes, lambda: all(p.exists() for p in self._answers(folder)), progress)

    def _answers(self, folder: Path) -> list[Path]:
        return [folder / f"rank-{rank}.json" for rank in range(self._ranks)]

    @contextlib.contextmanager
    def _started(self, folder: Path, spec: Spec) -> Iterator[list[subprocess.Popen[bytes]]]:
        (folder / "spec.json").write_bytes(msgspec.json.encode(spec))
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank in range(self._ranks):
                with open(folder / f"rank-{rank}.log", "wb") as log:
                    environ = self._environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                    command = [sys.executable, "-P", "-m", "ckptsvc.cli.benchmarks.ranks", str(folder)]
                    processes.append(
                        subprocess.Popen(command, env=environ, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
                    )
            yield processes
        finally:
            for process in processes:
                process.kill()
                process.wait()

    def _wait(
        self, folder: Path, processes: list[subprocess.Popen[bytes]], done: Callable[[], bool], progress: Progress
    ) -> None:
        while not done():
            time.sleep(POLL)
            with contextlib.suppress(OSError, ValueError):
                progress(float((folder / "progress").read_text(encoding="utf-8")))
            for rank, process in enumerate(processes):
                if process.poll():
                    raise BenchFailed(f"rank {rank} of the benchmark {_ended(process)}: {_tail(folder, rank)}")


def _ended(process: subprocess.Popen[bytes]) -> str:
    status = process.returncode
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"


def _tail(folder: Path, rank: int) -> str:
    lines = (folder / f"rank-{rank}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-6:]) or "it said nothing"
