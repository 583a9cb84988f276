"""`ckptsvc run` with ranks that are shell scripts."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from harness.runtime import Runtime, eventually


class Run:
    """One `ckptsvc run`. Every rank leaves a file "ATTEMPT-RANK" with its process id and its node in `notes`."""

    def __init__(
        self, runtime: Runtime, folder: Path, script: str, *options: str, before: Sequence[str] = (), **environ: str
    ) -> None:
        self.notes = folder / "notes"
        self.notes.mkdir(exist_ok=True)
        path = folder / "rank.sh"
        note = f'"{self.notes}/$CKPTSVC_ATTEMPT-$RANK"'
        path.write_text(f"echo $$ $CKPTSVC_NODE > {note}.new; mv {note}.new {note}\n{script}\n")
        command = [*before, sys.executable, "-m", "ckptsvc.cli.main", "run", *options, "--no-python", "sh", str(path)]
        self.log = folder / f"run-{len(list(folder.glob('run-*')))}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, env=runtime.environ | environ, stdout=log, stderr=log)

    def rank(self, attempt: int, rank: int) -> tuple[int, str]:
        """The process of a rank, and its node, once it runs."""
        path = self.notes / f"{attempt}-{rank}"
        eventually(path.exists, f"rank {rank} of attempt {attempt}: {self.log.read_text()}")
        pid, node = path.read_text().split()
        return int(pid), node

    def pid(self, attempt: int, rank: int) -> int:
        """The process of a rank, once it runs."""
        return self.rank(attempt, rank)[0]

    def end(self, timeout: float = 30.0) -> int:
        """The exit status."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            logs = "\n".join(path.read_text() for path in self.log.parent.glob("run-*.log"))
            raise AssertionError(f"it does not end:\n{logs}") from None

    def handles_signals(self) -> bool:
        """Whether it has got as far as to catch SIGUSR1."""
        (line,) = [x for x in Path(f"/proc/{self.process.pid}/status").read_text().splitlines() if "SigCgt" in x]
        return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)

    def attempts(self) -> list[str]:
        """Those in which a rank has run."""
        return sorted({path.name.split("-")[0] for path in self.notes.glob("*[0-9]")})


def kill(pid: int) -> None:
    """SIGKILL, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    """Whether it runs (and is not a zombie)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
