"""An agent makes way for its successor: newer code perhaps, or other settings, while jobs go on.

The process executes its program anew (decision 025). It keeps its id, by which systemd knows it, and the lock of its
directory, so that nobody else starts an agent there meanwhile; the successor listens where it has listened. All else is
as after a crash: snapshots lie labelled in their arenas and are saved on, ranks, launchers and agents connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NoReturn

import msgspec

from ckptsvc.agent.aside import aside
from ckptsvc.agent.process.trial import TRIAL_PATIENCE
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, RunBusy
from ckptsvc.pipeline.arena import WAITING, ArenaPool, State
from ckptsvc.quantities import Address, parse_address
from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.settings import AgentSettings

log = logging.getLogger("ckptsvc.agent")

VARIABLE = "CKPTSVC_HANDOVER"

SIGNAL = signal.SIGUSR2
"""What an agent makes way on."""

OWN_PATIENCE = 2.0
"""Seconds in which a lock that somebody only looks at is free."""

YIELD_PATIENCE = 20.0
"""Seconds that an agent which a job has started gets to make way for a service."""

COPY_PATIENCE = 10.0
"""Seconds that copies into arenas get to end: a snapshot that is not whole when the agent goes is skipped."""

PATIENCE = TRIAL_PATIENCE + COPY_PATIENCE + 30.0
"""Seconds after which whoever asked an agent to make way stops waiting for its successor."""


class Handed(msgspec.Struct, frozen=True):
    """What the successor gets, as JSON in the environment.

    Attributes:
        lock: descriptor of the directory's lock, which is held.
        listen, metrics: addresses in use; "": none.
    """

    lock: int
    listen: str = ""
    metrics: str = ""

    def listening(self, settings: AgentSettings) -> AgentSettings:
        """The settings with the ports that were in use, where they leave the choice to the kernel."""
        changes = {}
        for key, used in (("listen", self.listen), ("metrics_listen", self.metrics)):
            wanted = getattr(settings, key)
            if wanted is None or wanted.port or not used:
                continue
            with contextlib.suppress(ConfigError, OSError):
                changes[key] = _free(wanted._replace(port=parse_address(used).port))
        return msgspec.structs.replace(settings, **changes)


def _free(address: Address) -> Address:
    """The address; OSError where somebody else has got it meanwhile."""
    with socket.create_server(address, family=socket.AF_INET6 if ":" in address.host else socket.AF_INET):
        return address


def received(environ: MutableMapping[str, str], lock: Path) -> Handed | None:
    """What a predecessor in this process has left, if there was one; `lock` is the file it must have held."""
    text = environ.pop(VARIABLE, "")  # processes that we start have not been handed anything
    try:
        handed = msgspec.json.decode(text, type=Handed)
        held, there = os.fstat(handed.lock), os.stat(lock)
    except (msgspec.MsgspecError, OSError, OverflowError):
        return None
    if (held.st_dev, held.st_ino) != (there.st_dev, there.st_ino):
        return None
    os.set_inheritable(handed.lock, False)
    return handed


async def own(lock: int, directory: Path, *, is_service: bool) -> None:
    """Take the agent's lock.

    Somebody who only looks whether an agent lives holds it for an instant. A service takes it from an agent that a job
    has started while the service was away: that one would hold it for as long as the job runs.

    Raises:
        RunBusy: another agent serves this directory.
    """
    deadline, said = time.monotonic() + (YIELD_PATIENCE if is_service else OWN_PATIENCE), False
    busy = RunBusy(f"an agent already serves {directory}")
    while not _locked(lock):
        yields = await _asked_to_yield(directory) if is_service else None
        if yields is False or time.monotonic() > deadline:
            os.close(lock)
            raise busy
        if yields and not said:
            said = True
            log.warning("an agent that a job has started makes way for this service")
        await asyncio.sleep(0.05)


def _locked(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


async def _asked_to_yield(directory: Path) -> bool | None:
    """Ask the agent there to end at once; whether it does, or None where nobody answers (yet, or any more)."""

    def ask() -> bool:
        client = IdentityClient(sockets(directory)[1])
        try:
            client.call({"op": "yield"})
        finally:
            client.close()
        return True

    try:
        return await aside(ask, YIELD_PATIENCE)
    except (AgentUnavailable, TimeoutError):
        return None
    except CkptsvcError:
        return False


async def copies_end(pool: ArenaPool) -> None:
    """Wait, not for ever, for a moment in which no rank copies into an arena."""
    deadline = time.monotonic() + COPY_PATIENCE
    while any(a.state is State.FILLING and a.holder != WAITING for a in pool.arenas.values()):
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(0.02)


def succeed(handed: Handed) -> NoReturn:
    """Execute this process's program anew, with the arguments it was started with.

    Raises:
        OSError: that is not possible.
    """
    for number in (SIGNAL, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # until the successor listens for them, they would end it
    os.set_inheritable(handed.lock, True)
    os.environ[VARIABLE] = msgspec.json.encode(handed).decode()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def replace(directory: Path) -> float:
    """Have the agent of a directory make way, and wait until its successor serves; returns seconds.

    Raises:
        AgentUnavailable: there is no agent, it cannot be told, or it goes on as before.
    """
    ready = directory / "ready"

    def since() -> int:
        try:
            return ready.stat().st_mtime_ns
        except OSError:
            return 0

    client = IdentityClient(sockets(directory)[1])
    before, began, pid = since(), time.monotonic(), client.peer
    try:
        if pid <= 0:  # for kill(2) that would be all processes of ours
            raise AgentUnavailable(f"the agent in {directory} is of another process namespace", hint="tell it there")
        os.kill(pid, SIGNAL)
        gone = 0.0
        while time.monotonic() - began < PATIENCE:
            now = since()
            if now and now != before:
                return time.monotonic() - (gone or began)
            gone = gone or (0.0 if now else time.monotonic())
            os.kill(pid, 0)
            time.sleep(0.02)
    except ProcessLookupError:
        raise AgentUnavailable(f"the agent in {directory} has ended", hint="see its log") from None
    except PermissionError:
        raise AgentUnavailable(f"process {pid}, the agent in {directory}, is another user's") from None
    finally:
        client.close()
    raise AgentUnavailable(f"the agent in {directory} goes on as before", hint="its log says why")
