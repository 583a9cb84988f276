"""Processes of a test that end with it, in this network or in one of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.runtime import eventually

START_TIMEOUT = 120.0
COMMAND_TIMEOUT = 60.0
END_TIMEOUT = 20.0

WITH_US = ("setpriv", "--pdeathsig", "KILL")
"""Before a command: it is killed when the tests end, however they do."""


def need(*programs: str) -> None:
    """Skip the test where it is not root's, or a program is not installed."""
    if os.geteuid() != 0 or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("needs root and /dev/fuse")
    absent = [program for program in programs if shutil.which(program) is None]
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (make test-realfs installs them)")


class Daemons:
    """Foreground processes by name, each with a log, and the mount points of those that serve one.

    Attributes:
        folder: all that they keep; short, because sockets lie in it.
    """

    def __init__(self, kind: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix=f"ck-{kind}-"))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._mounts: dict[Path, str] = {}

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process, or start it again."""
        with self._log(name).open("ab") as log:
            process = subprocess.Popen([*WITH_US, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._running[name] = process
        return process

    def mount(self, name: str, point: Path, *command: str) -> Path:
        """Start a process that serves a mount point; returns it."""
        point.mkdir(parents=True, exist_ok=True)
        self._mounts[point] = name
        self.start(name, *command)
        self.wait_for(point.is_mount, f"{name} to mount {point}", name)
        return point

    def unmount(self, point: Path) -> None:
        """Unmount in good order; a client that then takes its time is killed."""
        self.run("umount", str(point))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._running[self._mounts[point]].wait(END_TIMEOUT)
        self.kill(self._mounts[point])

    def wait_for(self, condition: object, what: str, *names: str) -> None:
        """Wait until something is so, as long as these processes live."""

        def met() -> bool:
            for name in names:
                assert self._running[name].poll() is None, f"{name} has ended:\n{self.story(name)}"
            return bool(condition())  # type: ignore[operator]

        eventually(met, what, START_TIMEOUT)

    def kill(self, name: str) -> None:
        """SIGKILL, and wait for the end."""
        process = self._running.pop(name)
        process.kill()
        process.wait(END_TIMEOUT)

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """Stopped (SIGSTOP) meanwhile."""
        self._running[name].send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._running[name].send_signal(signal.SIGCONT)

    def run(self, *command: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """Run a command to its end; returns what it says."""
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, f"{' '.join(command)}: {done.stderr or done.stdout}"
        return done.stdout

    def story(self, name: str) -> str:
        """The end of a log."""
        return self._log(name).read_text(errors="replace")[-3000:]

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def close(self) -> None:
        """Unmount, end all, and leave nothing."""
        for point in self._mounts:
            subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)
        for process in self._running.values():
            process.kill()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(END_TIMEOUT)
        for point in self._mounts:
            if not point.is_mount():
                point.rmdir()
        shutil.rmtree(self.folder)


class Enclosed(Daemons):
    """Daemons in a network, a process table and a mount table of their own; only FUSE clients mount outside.

    They may listen on all addresses: nobody outside is on their network. When the first process is gone, all are.
    """

    ADDRESS = "10.99.0.1"

    def __init__(self, kind: str, *hidden: str) -> None:
        """`hidden` are directories of the machine that the daemons see empty, and may write to."""
        super().__init__(kind)
        mounts = "".join(f"mkdir -p {path} && mount -t tmpfs none {path} && " for path in hidden)
        # The first process is the parent of orphans: it must take note of their end, or they seem to live on.
        reaping = f"touch {self.folder}/ready && while :; do sleep 3600 & wait $!; done"
        inside = f"ip link set lo up && ip addr add {self.ADDRESS}/32 dev lo && {mounts}{reaping}"
        flags = ("--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private")
        outer = self.start("enclosure", "unshare", *flags, "sh", "-c", inside)

        def ready() -> bool:
            return (self.folder / "ready").exists()

        self.wait_for(ready, "the enclosure to be ready", "enclosure")
        self._first = int(Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text())

    def inside(self, *command: str) -> tuple[str, ...]:
        """The command that does this inside."""
        return ("nsenter", f"--target={self._first}", "--net", "--mount", "--pid", *command)

    def client(self, *command: str) -> tuple[str, ...]:
        """The command that does this on the network inside, and mounts outside."""
        return ("nsenter", f"--target={self._first}", "--net", *command)

    def listens(self, port: int) -> bool:
        """Whether something inside listens there; see proc(5)."""
        lines = Path(f"/proc/{self._first}/net/tcp").read_text().splitlines()[1:]
        return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)

    def processes(self, part: str) -> list[int]:
        """Process ids, as seen from outside, of the daemons that have this in their command."""
        space = os.readlink(f"/proc/{self._first}/ns/pid")
        found = []
        for folder in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not folder.name.isdigit() or os.readlink(folder / "ns/pid") != space:
                    continue
                if part.encode() in (folder / "cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(int(folder.name))
        return found
