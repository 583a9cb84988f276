"""The processes that `ckptsvc demo` starts, and waiting for what they say."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptsvc.errors import CkptsvcError

POLL = 0.01
"""Seconds between two looks at logs and processes."""

GRACE = 6.0
"""Seconds between SIGINT and SIGKILL for what is still there at the end."""


class DemoFailed(CkptsvcError):
    """The demo could not go on: a process ended, or something did not happen in time."""


class Child:
    """One process, the leader of a process group of its own; what it prints goes to `log`."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path, service: bool) -> None:
        self.name = name
        self.service = service
        self.process = process
        self.log = log

    @property
    def status(self) -> int | None:
        """Exit status, None while it runs."""
        return self.process.poll()

    def tail(self, lines: int = 12) -> str:
        """The end of what it printed."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def interrupt(self) -> None:
        """Asks the process, not its group, to end: it knows what to tell its own children."""
        self.process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        """Ends what is left of its process group, at once."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Children:
    """All processes of a demo; a context manager that leaves none of them behind."""

    def __init__(self, logs: Path, environ: Mapping[str, str]) -> None:
        self._logs = logs
        self._environ = dict(environ)
        self._all: list[Child] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, name: str, arguments: Sequence[str], *, service: bool = False) -> Child:
        """Starts a program; its output goes to `<logs>/<name>.log`. A service outlives what is none."""
        log = self._logs / f"{name}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environ,
                start_new_session=True,  # Ctrl-C is for the demo; it then ends its children itself, in order
            )
        child = Child(name, process, log, service)
        self._all.append(child)
        return child

    def stop(self) -> None:
        """Ends every child that is still there, services last: a launcher would start its agent again."""
        for service in (False, True):
            _end([child for child in self._all if child.service is service])
        self._all.clear()


def _end(children: Sequence[Child]) -> None:
    """SIGINT, and SIGKILL to what is left of their groups, also where the leader has ended by itself."""
    running = [child for child in children if child.status is None]
    for child in running:
        child.interrupt()
    deadline = time.monotonic() + GRACE
    while any(child.status is None for child in running) and time.monotonic() < deadline:
        time.sleep(POLL)
    for child in children:
        child.kill()
        child.process.wait()


class Events:
    """The complete JSON lines of a growing file, each given out once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def new(self) -> list[dict[str, Any]]:
        """What was added since the last call; lines that are no JSON objects are passed over."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                added = file.read()
        except FileNotFoundError:
            return []
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        events = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if isinstance(event, dict):
                    events.append(event)
        return events


def wait_until(condition: Callable[[], bool], what: str, timeout: float, needed: Sequence[Child] = ()) -> None:
    """Looks at `condition` until it holds.

    Args:
        condition: called every `POLL` seconds.
        what: what is waited for, for the error: "the agents to start".
        timeout: seconds.
        needed: processes without which it cannot come true; one that ends with status 0 is all right.

    Raises:
        DemoFailed: it took too long, or a process that is needed failed; the hint is the end of its log.
    """
    deadline = time.monotonic() + timeout
    while not condition():
        for child in needed:
            if child.status:
                raise DemoFailed(f"{child.name} ended with status {child.status}", hint=_log_of(child))
        if time.monotonic() > deadline:
            raise DemoFailed(f"waited {timeout:g} s for {what}", hint="\n".join(map(_log_of, needed)))
        time.sleep(POLL)


def _log_of(child: Child) -> str:
    return f"the end of {child.log}:\n{child.tail()}"
