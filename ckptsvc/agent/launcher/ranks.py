"""The ranks of one node, as the launcher sees them: started, ended, stopped. The keeper (see `keeper`) does it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptsvc.agent.launcher import keeper
from ckptsvc.agent.launcher.keeper import MAX_MESSAGE, SWEEP_PATIENCE
from ckptsvc.agent.launcher.output import Output, log_file, pipe
from ckptsvc.agent.logtail import one_line
from ckptsvc.agent.watching.procfs import OomKills

DRAIN = 1.0
"""Seconds for the last output of ranks that have ended. Nobody waits longer for whoever else holds the pipe."""


OOM_WINDOW = 10.0
"""Seconds after which a kill for lack of memory becomes old: it is news for once to twice as long."""

LAST_WORDS = 0.1
"""Seconds after the end of a rank that failed in which the rest of its output is looked at for the reason."""

# The last line of a traceback, after what torch puts before each.
_EXCEPTION = re.compile(rb"(?:\[rank\d+\]: ?)?((?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*(?:Error|Exception)\b(?::.*)?)\s*")


@dataclass(slots=True)
class Rank:
    """One process.

    Attributes:
        output: copies what it writes.
        status: None while it runs, else an exit status or minus a signal's number.
        ended_at: when, in seconds of the monotonic clock.
        detail: what is known of why it failed, for people.
        error: the last line of its output that names an exception.
    """

    number: int
    output: asyncio.Task[None] | None = None
    pid: int = 0
    status: int | None = None
    ended_at: float = 0.0
    detail: str = ""
    error: bytes = b""

    def heard(self, line: bytes) -> None:
        """A line of its output."""
        if found := _EXCEPTION.fullmatch(line):
            self.error = found[1]


class Ranks:
    """All ranks of this node.

    Args:
        command: program and arguments of every rank.
        environ: of every rank, before its own variables are added.
        warm: what the warm interpreter is told (see `standby`); None: ranks are started without one.
        log_dir: where output is kept; None: it is only shown.
        ended: called when a rank has ended.
        say: tells the user something.
        files: the limits of open files (soft, hard) that ranks get; None: those of this process.

    Attributes:
        output: where all goes that they, and the launcher, have to say; `close` is its end.
        live: ranks of the current attempt by number; ended ones too, until they have been stopped.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        warm: dict[str, Any] | None,
        log_dir: Path | None,
        ended: Callable[[Rank], None],
        say: Callable[[str], None],
        files: tuple[int, int] | None = None,
    ) -> None:
        self._command, self._environ, self._warm = list(command), dict(environ), warm
        self._log_dir, self._ended, self._say, self._files = log_dir, ended, say, files
        self.live: dict[int, Rank] = {}
        self.output = Output()
        self._changing = asyncio.Lock()
        self._changed = asyncio.Event()
        self._swept: asyncio.Future[list[int]] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sock: socket.socket | None = None
        self._listening: asyncio.Task[None] | None = None
        self._copying: asyncio.Task[None] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        self._oom = OomKills()
        self._watching: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Start the keeper, and with it the warm interpreter."""
        if self._process is not None:
            self._process.wait()  # it has died
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._process = subprocess.Popen(  # noqa: ASYNC220  exec of a known file: bounded and short
            # By its file, and without what a user's environment may do to an interpreter.
            [sys.executable, "-I", "-S", keeper.__file__, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            env=self._environ,
            start_new_session=True,
        )
        theirs.close()
        self._sock.setblocking(False)
        reading, writing = pipe()
        self._copying = asyncio.ensure_future(self.output.copy(reading, "standby", None))
        await self._send({"op": "open", "command": self._command, "warm": self._warm, "files": self._files}, writing)
        self._listening = asyncio.ensure_future(self._listen(self._sock))
        if self._watching is None:
            self._watching = asyncio.ensure_future(self._watch_memory())

    async def close(self) -> None:
        """End the keeper; whatever is left below it is killed. It is the end of these ranks."""
        for task in (self._listening, self._copying, self._watching, *self._telling):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        if self._sock is not None:
            self._sock.close()
            self._sock = None
        if self._process is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        await self.output.close()

    async def start(self, attempt: int, variables: Mapping[int, Mapping[str, str]]) -> None:
        """Start ranks, each with variables of its own. There is none of an earlier attempt (see `stop`)."""
        async with self._changing:
            if self._sock is None:
                await self.open()
            await self._start(attempt, variables)

    async def _start(self, attempt: int, variables: Mapping[int, Mapping[str, str]]) -> None:
        for number, own in variables.items():
            kept = log_file(self._log_dir, attempt, number) if self._log_dir else None
            reading, writing = pipe()
            rank = self.live[number] = Rank(number)
            rank.output = asyncio.ensure_future(self.output.copy(reading, str(number), kept, rank.heard))
            await self._send({"op": "start", "rank": number, "variables": dict(own)}, writing)

    async def stop(self, grace: float) -> list[int]:
        """Stop all ranks, and whatever they have started; returns processes that do not end even of SIGKILL.

        SIGTERM comes `grace` seconds before SIGKILL; with 0, not at all.
        """
        async with self._changing:
            return await self._stop(grace)

    async def _stop(self, grace: float) -> list[int]:
        deadline = time.monotonic() + grace
        for rank in self.live.values():
            if rank.status is None and grace > 0:
                # A stopped process does not see SIGTERM until it is continued.
                for number in (signal.SIGTERM, signal.SIGCONT):
                    await self._send({"op": "signal", "rank": rank.number, "number": number})
        while any(rank.status is None for rank in self.live.values()):
            self._changed.clear()
            try:
                await asyncio.wait_for(self._changed.wait(), max(deadline - time.monotonic(), 0.0))
            except TimeoutError:
                break
        left = await self._sweep() if self.live else []
        tasks = [rank.output for rank in self.live.values() if rank.output is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=DRAIN)
        for task in tasks:
            task.cancel()
        self.live.clear()
        return left

    async def _sweep(self) -> list[int]:
        if self._sock is None:
            return []  # the keeper is dead, and the ranks with it
        self._swept = asyncio.get_running_loop().create_future()
        await self._send({"op": "sweep"})
        try:
            return await asyncio.wait_for(self._swept, 2 * SWEEP_PATIENCE)
        except TimeoutError:
            return [-1]  # the keeper itself hangs
        finally:
            self._swept = None

    async def _send(self, message: dict[str, Any], fd: int = -1) -> None:
        """One message to the keeper; the descriptor is closed here."""
        data, loop = json.dumps(message).encode(), asyncio.get_running_loop()
        try:
            while self._sock is not None:
                try:
                    socket.send_fds(self._sock, [data], [fd] if fd >= 0 else [])
                except BlockingIOError:
                    writable = asyncio.Event()
                    loop.add_writer(self._sock, writable.set)
                    await writable.wait()
                    loop.remove_writer(self._sock)
                except OSError:
                    return  # it is gone, which `_listen` sees
                else:
                    return
        finally:
            if fd >= 0:
                os.close(fd)

    async def _listen(self, sock: socket.socket) -> None:
        while data := await _receive(sock):
            message = json.loads(data)
            event = message["event"]
            if event == "started" and message["rank"] in self.live:
                self.live[message["rank"]].pid = message["pid"]
            elif event == "ended":
                self._note(message["rank"], message["status"])
            elif event == "swept" and self._swept is not None and not self._swept.done():
                self._swept.set_result(message["left"])
            elif event == "warm" and message["ready"]:
                self._say(f"standby: a warm interpreter of {message['mib']} MiB, ready after"
                    f" {message['seconds']:.1f} s")  # fmt: skip
            elif event == "warm":
                self._say(f"no standby: {message['why']}")
        self._say("the keeper of the ranks has died, and they with it")
        sock.close()
        self._sock = None
        if self._swept is not None and not self._swept.done():
            self._swept.set_result([])
        for number, rank in list(self.live.items()):
            if rank.pid and rank.status is None:
                with contextlib.suppress(ProcessLookupError):  # the rank is dead or dying, its children need not be
                    os.killpg(rank.pid, signal.SIGKILL)
            self._note(number, -signal.SIGKILL)

    def _note(self, number: int, status: int) -> None:
        rank = self.live.get(number)
        if rank is not None and rank.status is None:
            rank.status, rank.ended_at = status, time.monotonic()
            self._changed.set()
            if status > 0 and rank.output is not None:
                self._telling = {t for t in self._telling if not t.done()}
                self._telling.add(asyncio.ensure_future(self._tell_why(rank, rank.output)))
                return
            if status == -signal.SIGKILL and (killed := self._oom.lately()):
                processes = "a process" if killed == 1 else f"{killed} processes"
                rank.detail = f"probably out of memory, for which the kernel has just killed {processes} of this node"
            self._ended(rank)

    async def _tell_why(self, rank: Rank, output: asyncio.Task[None]) -> None:
        await asyncio.wait((output,), timeout=LAST_WORDS)
        rank.detail = one_line(rank.error.decode(errors="replace"))
        if self.live.get(rank.number) is rank:  # else it has been stopped meanwhile, and a later one may run
            self._ended(rank)

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(OOM_WINDOW)
            self._oom.forget()


async def _receive(sock: socket.socket) -> bytes:
    """The next message; empty when the other end is gone."""
    try:
        return await asyncio.get_running_loop().sock_recv(sock, MAX_MESSAGE)
    except OSError:
        return b""
