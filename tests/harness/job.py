"""The jobs of a test: N ranks that run one function of the test module, under one of the launchers.

with launch.plain(2, train, "argument") as job:          # torchrun's variables set by hand, gloo
    job.wait_for("saved", step=3)
    job.kill(1)
results = launch.plain(2, train, "argument").results()
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.runtime import Runtime, eventually
from harness.zygote import Zygote

SCRIPT = Path(__file__).with_name("rank.py")
BEATING = Path(__file__).with_name("beating.py")
LIGHT = {
    "CKPTSVC_LAUNCH_STANDBY": "false",
    "CKPTSVC_LAUNCH_PREFLIGHT": "false",
    "CKPTSVC_LAUNCH_CRASH_LOOP": "0",  # these ranks save nothing
}
TIMEOUT = 60.0
TAIL = 60
"""Lines of each log that are shown when a job fails."""


class Runs(Protocol):
    """A process: a rank, or a launcher."""

    pid: int

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""

    def kill(self) -> None:
        """SIGKILL."""

    def wait(self) -> int:
        """Wait for its end."""


class Job:
    """A running job.

    Attributes:
        processes: the ranks by number, or the one launcher.
    """

    def __init__(self, runtime: Runtime, folder: Path, world: int, processes: Sequence[Runs], logs: list[Path]) -> None:
        self._runtime, self._folder, self._world = runtime, folder, world
        self.processes, self._logs = processes, logs

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for pid in self._live_ranks():  # a launcher that was killed leaves them
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _live_ranks(self) -> list[int]:
        """Those whose process id can be no other process's by now."""
        launched = {p.pid for script in (SCRIPT, BEATING) for p in self._runtime.processes(script.name)}
        forked = {process.pid for process in self.processes if process.poll() is None}
        return sorted({line["pid"] for line in self.reports()} & (launched | forked))

    def reports(self, event: str = "", rank: int | None = None) -> list[dict[str, Any]]:
        """What the ranks have reported so far, rank by rank in order."""
        found = []
        for number in range(self._world):
            path = self._folder / f"rank-{number}.jsonl"
            if rank not in (None, number) or not path.exists():
                continue
            for text in path.read_text().splitlines(keepends=True):
                line = json.loads(text) if text.endswith("\n") else {}
                if line and event in ("", line["event"]):
                    found.append(line)
        return found

    def wait_for(self, event: str, rank: int = 0, *, timeout: float = TIMEOUT, **values: Any) -> dict[str, Any]:
        """Wait until a rank has reported this; fails at once when the job ends without it."""
        deadline = time.monotonic() + timeout
        while True:
            ended = all(p.poll() is not None for p in self.processes)
            for line in self.reports(event, rank):
                if values.items() <= line.items():
                    return line
            if ended or time.monotonic() > deadline:
                why = "ended" if ended else f"has for {timeout:g} s"
                raise AssertionError(f"the job {why} without {event} {values} of rank {rank}\n{self.story()}")
            time.sleep(0.02)

    def go(self, name: str) -> None:
        """Let ranks that wait for `name` go on."""
        (self._folder / f"go-{name}").touch()

    def fault(self, name: str, rank: int, attempt: int = 1) -> None:
        """Make a rank of `beating` do what is bad, and wait until it does."""
        (self._folder / f"fault-{attempt}-{rank}").write_text(name)
        self.wait_for("fault", rank, attempt=attempt)

    def kill(self, rank: int = 0) -> None:
        """SIGKILL for one rank, however it was launched."""
        os.kill(self.reports(rank=rank)[-1]["pid"], signal.SIGKILL)

    def signal(self, number: int) -> None:
        """Send a signal to the processes (to the launcher, where there is one)."""
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self, timeout: float = TIMEOUT) -> list[int]:
        """Wait for the end; returns the exit statuses."""
        deadline = time.monotonic() + timeout
        while True:
            statuses = [p.poll() for p in self.processes]
            if None not in statuses:
                return [s for s in statuses if s is not None]
            if any(statuses):
                deadline = min(deadline, time.monotonic() + 5.0)  # the others may wait for the failed one for ever
            if time.monotonic() > deadline:
                raise AssertionError(f"the job did not end in time: {statuses}\n{self.story()}")
            time.sleep(0.02)

    def results(self, timeout: float = TIMEOUT) -> list[Any]:
        """Wait for the end, in good order; returns what the function returned on each rank (in its last attempt)."""
        with self:
            try:
                statuses = self.wait(timeout)
            except AssertionError as error:
                raise AssertionError(str(error)) from None
            if any(statuses):
                raise AssertionError(f"the job failed: {statuses}\n{self.story()}")
        return [self.reports("result", rank)[-1]["result"] for rank in range(self._world)]

    def story(self) -> str:
        """The end of every log, for the message of a failure; ranks that still run say where they are."""
        for pid in self._live_ranks():
            os.kill(pid, signal.SIGUSR2)
        time.sleep(0.3)
        parts = []
        for path in self._logs:
            if path.exists():
                parts.append(f"--- {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-TAIL:]))
        parts.append("--- agents\n" + "\n".join(self._runtime.log().splitlines()[-TAIL:]))
        return "\n".join(parts)

    def output(self) -> str:
        """All that ranks and launchers have written."""
        return "\n".join(p.read_text(errors="replace") for p in self._logs if p.exists())


class Launch:
    """Starts jobs; the fixture `launch`."""

    def __init__(self, runtime: Runtime, folder: Path, zygote: Callable[[], Zygote]) -> None:
        self._runtime, self._folder, self._zygote = runtime, folder, zygote
        self._count = 0

    def plain(self, world: int, function: Callable[..., Any], *arguments: Any, **environ: str) -> Job:
        """Ranks with torchrun's variables in their environment and no launcher; a single one has no such variables."""
        folder, spec = self._new(function, arguments)
        shared = self._runtime.environ | environ
        if world > 1:
            shared |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
            shared |= {"LOCAL_WORLD_SIZE": str(world), "CKPTSVC_JOB": environ.get("CKPTSVC_JOB", folder.name)}
        logs = [folder / f"rank-{rank}.log" for rank in range(world)]
        ranks = []
        for rank, log in enumerate(logs):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
            ranks.append(self._zygote().spawn(SCRIPT, [spec], shared | own, log))
        return Job(self._runtime, folder, world, ranks, logs)

    def service(
        self, world: int, function: Callable[..., Any], *arguments: Any, options: Sequence[str] = (), **environ: str
    ) -> Job:
        """Ranks under `ckptsvc run --standalone`."""
        command = [sys.executable, "-m", "ckptsvc.cli.main", "run", "--standalone", "--nproc-per-node", str(world)]
        return self._launched([*command, *options], world, function, arguments, environ)

    def beating(self, world: int, *options: str, **environ: str) -> Job:
        """Ranks without torch (`harness.beating`) under `ckptsvc run --standalone`."""
        folder = self._new_folder()
        command = [sys.executable, "-m", "ckptsvc.cli.main", "run", "--standalone", "--nproc-per-node", str(world)]
        return self._start([*command, *options, str(BEATING), str(folder)], folder, world, LIGHT | environ)

    def torchrun(self, world: int, function: Callable[..., Any], *arguments: Any, **environ: str) -> Job:
        """Ranks under torchrun."""
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        return self._launched(command, world, function, arguments, environ)

    def _launched(
        self,
        command: Sequence[str],
        world: int,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        environ: dict[str, str],
    ) -> Job:
        folder, spec = self._new(function, arguments)
        return self._start([*command, str(SCRIPT), spec], folder, world, environ)

    def _start(self, command: Sequence[str], folder: Path, world: int, environ: dict[str, str]) -> Job:
        log = folder / "launcher.log"
        with log.open("wb") as output:
            launcher = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._runtime.environ | environ,
            )
        return Job(self._runtime, folder, world, [launcher], [log])

    def _new(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Path, str]:
        folder = self._new_folder()
        spec = {
            "file": inspect.getfile(function),
            "function": function.__name__,
            "arguments": arguments,
            "folder": str(folder),
        }
        return folder, json.dumps(spec)

    def _new_folder(self) -> Path:
        self._count += 1
        folder = self._folder / f"job-{os.getpid()}-{self._folder.name}-{self._count}"
        folder.mkdir(parents=True)
        return folder


def free_port() -> int:
    """A TCP port that nobody uses now, below those that the kernel gives to whoever asks for any (ip(7))."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as sock:
            sock.bind(("", random.randint(20000, 32000)))
            port: int = sock.getsockname()[1]
            return port


__all__ = ["Job", "Launch", "eventually", "free_port"]
