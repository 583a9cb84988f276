"""The keeper: the small process between `ckptsvc run` and its ranks.

    python -I -S keeper.py FD        FD: a SOCK_SEQPACKET socket to the launcher; one message is one JSON object

    open    {op, command, warm, files}       what to run; `warm` is for the warm interpreter (see `warm`) or null;
                                             `files`: [soft, hard] limits of open files, or null
    start   {op, rank, variables} + output   a rank with these variables added to its environment
    signal  {op, rank, number}               to the rank's process
    sweep   {op}                             SIGKILL for every rank and for everything that ranks have left behind
            {event: started, rank, pid, warm}   `warm`: forked from the warm interpreter, else by exec
            {event: ended, rank, status}     an exit status, or minus a signal's number
            {event: swept, left}             processes that not even SIGKILL has ended within `SWEEP_PATIENCE`
            {event: warm, ready, ...}        the warm interpreter is ready (mib, seconds), or will not be (why)

It is the parent of all ranks and, as a subreaper (prctl(2)), becomes the parent of whatever outlives a rank: no tree of
processes gets away, however deep. When the launcher is gone, it kills them all; when it is killed itself, the kernel
kills the ranks (PR_SET_PDEATHSIG). Each rank leads a session of its own, out of reach of the terminal's signals.

One thread and the standard library only: forking is safe, and it takes 10 MiB.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

MAX_MESSAGE = 128 << 10
"""Bytes in one message: about twenty variables for one rank."""

SWEEP_PATIENCE = 10.0
"""Seconds that killed processes get to end. One that waits for a dead device or file system (state D) never does."""

WARM_PATIENCE = 60.0
"""Seconds that a rank waits for the warm interpreter to become ready; it is then started without it."""

WARM = "CKPTSVC_WARM"
"""The variable that tells a warm interpreter what it is, and what to do."""

FAIL = "raise SystemExit(1)"

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as a shell says it

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
# Slurm hands SIGUSR1 on to every process of a step, sessions or not; a keeper that it ended would take the ranks along.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
_libc = ctypes.CDLL(None, use_errno=True)


class Start(NamedTuple):
    """A rank to be started."""

    rank: int
    variables: dict[str, str]
    output: int
    since: float


class Keeper:
    """One keeper; `serve` returns when the launcher is gone and every process below is dead."""

    def __init__(self, launcher: socket.socket) -> None:
        self._launcher = launcher
        self._command: list[str] = []
        self._files: list[int] | None = None
        self._ranks: dict[int, int] = {}  # pid -> rank
        self._warm: socket.socket | None = None
        self._warm_pid = 0
        self._warm_since = 0.0
        self._ready = False
        self._wanted: list[Start] = []  # for the warm interpreter, once it is ready
        self._handed: dict[int, Start] = {}  # to it; not started yet
        self._signals = {number: signal.getsignal(number) for number in _IGNORED}
        self._woken, wake = os.pipe()
        for fd in (self._woken, wake):
            os.set_blocking(fd, False)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    def serve(self) -> None:
        """Do what the launcher says until it is gone."""
        while True:
            poll = select.poll()
            for fd in (self._launcher.fileno(), self._woken):
                poll.register(fd, select.POLLIN)
            if self._warm is not None:
                poll.register(self._warm.fileno(), select.POLLIN)
            ready = [fd for fd, _ in poll.poll(1000 if self._wanted else None)]
            # The warm interpreter first: it tells of a rank before that rank can have ended.
            if self._warm is not None and self._warm.fileno() in ready:
                self._hear_warm(self._warm)
            if self._woken in ready:
                os.read(self._woken, 4096)
            self._reap()
            if self._wanted and time.monotonic() - self._wanted[0].since > WARM_PATIENCE:
                self._without_warm(f"the warm interpreter was not ready in {WARM_PATIENCE:g} s")
            if self._launcher.fileno() in ready and not self._obey():
                self._drop_warm()
                self._sweep()
                return

    # ---- the launcher's orders ---------------------------------------------------------------------------------------

    def _obey(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._launcher, MAX_MESSAGE, 1)
        except ConnectionError:
            return False
        if not data:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
        order = json.loads(data)
        if order["op"] == "open":
            self._command, self._files = order["command"], order["files"]
            if order["warm"]:
                self._start_warm(order["warm"], fds[0])
            else:
                os.close(fds[0])
        elif order["op"] == "start":
            start = Start(order["rank"], order["variables"], fds[0], time.monotonic())
            if self._warm is None:
                self._exec(start)
            else:
                self._wanted.append(start)
                self._hand_over()
        elif order["op"] == "signal":
            self._forget_wanted(order["rank"])
            for pid, rank in self._ranks.items():
                if rank == order["rank"]:
                    os.kill(pid, order["number"])  # not reaped yet: it can be no other process
        elif order["op"] == "sweep":
            self._tell(event="swept", left=self._sweep())
        return True

    def _tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # the launcher is gone: the next read says so
            self._launcher.send(json.dumps(message).encode())

    # ---- ranks -------------------------------------------------------------------------------------------------------

    def _exec(self, start: Start) -> None:
        """Start a rank as a new program."""
        pid = self._spawn(self._command, os.environ | start.variables, start.output)
        self._ranks[pid] = start.rank
        self._tell(event="started", rank=start.rank, pid=pid, warm=False)

    def _spawn(self, command: list[str], environ: dict[str, str], output: int, keep: int = -1) -> int:
        """Fork and exec; closes `output` here. `keep` is a descriptor that the program gets too."""
        keeper = os.getpid()
        pid = os.fork()
        if pid:
            os.close(output)
            return pid
        try:
            os.setsid()
            die_with(keeper)
            signal.set_wakeup_fd(-1)
            for number, handler in self._signals.items():
                signal.signal(number, signal.SIG_IGN if handler is signal.SIG_IGN else signal.SIG_DFL)
            for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # as subprocess does
                signal.signal(number, signal.SIG_DFL)
            if self._files:
                resource.setrlimit(resource.RLIMIT_NOFILE, (self._files[0], self._files[1]))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(output, 1)
            os.dup2(output, 2)
            if keep >= 0:
                os.set_inheritable(keep, True)
            os.execvpe(command[0], command, environ)
        except OSError as error:
            os.write(2, f"ckptsvc run: cannot start {command[0]}: {error.strerror}\n".encode())
            os._exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)
        finally:
            os._exit(NOT_EXECUTABLE)

    def _reap(self) -> None:
        """Take in every child that has ended: ranks, and what ranks have left behind."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid in self._ranks:
                    status = os.waitstatus_to_exitcode(status)
                    self._tell(event="ended", rank=self._ranks.pop(pid), status=status)

    def _forget_wanted(self, rank: int | None = None) -> None:
        """Do not start one rank, or any, that still waits for the warm interpreter."""
        for start in [start for start in self._wanted if rank in (None, start.rank)]:
            self._wanted.remove(start)
            os.close(start.output)
            self._tell(event="ended", rank=start.rank, status=-signal.SIGKILL)

    def _sweep(self) -> list[int]:
        """Kill whatever is below, but the warm interpreter; returns what is left after `SWEEP_PATIENCE` seconds."""
        deadline = time.monotonic() + SWEEP_PATIENCE
        self._forget_wanted()
        while True:
            if self._warm is not None:
                self._hear_warm(self._warm)
            left = [pid for pid in children_of(os.getpid()) if pid != self._warm_pid]
            for pid in left:  # what a killed process leaves behind comes to us, and is killed in the next round
                os.kill(pid, signal.SIGKILL)
            self._reap()
            left = [pid for pid in children_of(os.getpid()) if pid != self._warm_pid]
            if not (left or self._handed) or time.monotonic() > deadline:
                return left
            select.select([self._woken], [], [], 0.05)
            with contextlib.suppress(BlockingIOError):
                os.read(self._woken, 4096)

    # ---- the warm interpreter ----------------------------------------------------------------------------------------

    def _start_warm(self, spec: dict[str, Any], output: int) -> None:
        self._warm_since = time.monotonic()
        given = os.environ.get("PYTHONPATH")
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join([spec.pop("directory"), *filter(None, [given])])}
        # An interpreter that for some reason does not look there would run the script at once, as no rank at all.
        trial = self._spawn([*self._command[:1], "-c", FAIL], environ | {WARM: "trial"}, os.dup(output))
        if os.waitstatus_to_exitcode(os.waitpid(trial, 0)[1]) != 0:
            os.close(output)
            self._tell(event="warm", ready=False, why=f"{self._command[0]} imports no sitecustomize from PYTHONPATH")
            return
        self._warm, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        spec |= {"fd": theirs.fileno(), "keeper": os.getpid(), "pythonpath": given}
        self._warm_pid = self._spawn(self._command, environ | {WARM: json.dumps(spec)}, output, theirs.fileno())
        theirs.close()

    def _hand_over(self) -> None:
        while self._ready and self._warm is not None and self._wanted:
            start = self._wanted.pop(0)
            self._handed[start.rank] = start
            request = {"rank": start.rank, "variables": start.variables}
            with contextlib.suppress(OSError):  # it is gone: the next read says so
                socket.send_fds(self._warm, [json.dumps(request).encode()], [start.output])

    def _hear_warm(self, warm: socket.socket) -> None:
        while self._warm is not None:
            try:
                data = warm.recv(MAX_MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except ConnectionError:
                data = b""
            message: dict[str, Any] = json.loads(data) if data else {"cannot": "the warm interpreter has ended"}
            if "pid" in message:
                start = self._handed.pop(message["rank"])
                os.close(start.output)
                self._ranks[message["pid"]] = start.rank
                self._tell(event="started", rank=start.rank, pid=message["pid"], warm=True)
            elif "ready" in message:
                self._ready = True
                self._tell(event="warm", seconds=time.monotonic() - self._warm_since, **message)
                self._hand_over()
            else:
                self._without_warm(message["cannot"])

    def _without_warm(self, why: str) -> None:
        """Start what waits for the warm interpreter without it."""
        self._drop_warm()
        self._tell(event="warm", ready=False, why=why)
        waiting, self._wanted, self._handed = [*self._handed.values(), *self._wanted], [], {}
        for start in waiting:
            self._exec(start)

    def _drop_warm(self) -> None:
        if self._warm is not None:
            self._warm.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._warm_pid, signal.SIGKILL)
        self._warm, self._warm_pid, self._ready = None, 0, False


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; at once if that is another one than expected."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def children_of(pid: int) -> list[int]:
    """The live or dead, not yet reaped children of a process of one thread (proc(5); the file is optional)."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return [child for child in _processes() if _parent_of(child) == pid]


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0  # it has ended meanwhile


def main() -> NoReturn:
    """Serve the launcher at the other end of the descriptor that was given."""
    launcher = socket.socket(fileno=int(sys.argv[1]))
    launcher.set_inheritable(False)  # a rank that had it would keep the launcher from seeing that the keeper is dead
    Keeper(launcher).serve()
    sys.exit(0)


if __name__ == "__main__":
    main()
