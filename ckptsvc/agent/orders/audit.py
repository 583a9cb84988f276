"""What people have ordered, and what was deleted: one line of JSON each, appended to a file that only its owner reads.

    {"time": "2026-11-21T22:04:05Z", "verb": "pause", "job": "gpt", "target": "", "uid": 1000, "user": "ada",
     "via": "", "node": "n7", "outcome": "done", "what": "job gpt takes no automatic snapshots from step 120 on"}

The agent that was asked writes it and, where the job's coordinator is on another node, that one's agent as well; the
command line does where it acts without an agent. `outcome` is "done", "begun", "failed" or "refused". What nobody has
ordered is there too, with the number -1, as "ckptsvc" (restarts, killed ranks, nodes the scheduler is told of) and
"retention".

The file is opened for every line, so that it may be moved away at any time, and appended to (O_APPEND), so that several
agents can share it. A line that cannot be written stops nothing: that is said in the log, once until it works again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import msgspec

from ckptsvc.agent.aside import aside
from ckptsvc.agent.incidents import state_directory
from ckptsvc.errors import ConfigError, NotFound
from ckptsvc.settings import Settings
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

NAME = "audit.jsonl"

PATIENCE = 2.0
"""Seconds that whoever gave an order waits for the line about it; the file may be on a server that hangs."""

MAX_TEXT = 400
"""Characters of one text in a line: a line is written with one call, and must be short for that to be whole."""

MAX_LINE = 16 << 10


class Entry(msgspec.Struct, frozen=True, kw_only=True, rename={"by": "user"}):
    """One line.

    Attributes:
        uid, by: who gave the order; -1 where it was nobody.
        via: who has passed it on for him.
        asked_on: the node where he did, if that is another one than `node`, where this was written.
        of: the user whose agent root has ordered that of; only in root's own file (system.audit_file).
    """

    time: str = ""
    verb: str
    job: str = ""
    target: str = ""
    uid: int
    by: str
    via: str = ""
    asked_on: str = ""
    of: str = ""
    node: str
    outcome: str
    what: str = ""


def audit_path(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Where the lines go: `agent.audit_file`, else a file of the user that survives reboots.

    Raises:
        ConfigError: the environment names no such place.
    """
    given = settings.agent.audit_file
    return Path(given) if given else state_directory(environ, "the audit log", "agent.audit_file") / NAME


class AuditLog:
    """One file, which need not be there yet; None: nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._turn = asyncio.Lock()
        self._failed = False

    async def record(self, entry: Entry) -> str:
        """Append a line, without holding up the event loop for long; returns why it is not there, or ""."""
        async with self._turn:
            try:
                await aside(partial(self.append, entry), PATIENCE)
            except (OSError, ConfigError) as error:  # TimeoutError is an OSError
                why = "no answer" if isinstance(error, TimeoutError) else error
                if not self._failed:
                    log(logger, logging.ERROR, Event.AUDIT_FAILED, "the audit log %s cannot be written: %s; %s by %s"
                        " and what follows is not in it", self.path, why, entry.verb, entry.by)  # fmt: skip
                self._failed = True
                return str(why)
            self._failed = False
            return ""

    def append(self, entry: Entry) -> None:
        """The same at once.

        Raises:
            OSError: it cannot be written.
            ConfigError: the file is open to others, or is none.
        """
        if self.path is None:
            return
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = os.open(self.path, flags, 0o600)
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid() or status.st_mode & 0o177:
                what = f"{self.path} is not a file of this user alone"
                raise ConfigError(what, hint="set agent.audit_file to another one, or chmod 600")
            line = msgspec.json.encode(_bounded(entry)) + b"\n"
            if self._failed:
                line = b"\n" + line  # the last one may be there to its half
            written = os.write(fd, line)
            if written < len(line):
                raise OSError(28, os.strerror(28))  # half a line: the file system is full
        finally:
            os.close(fd)


def audit_log(settings: Settings, environ: Mapping[str, str]) -> AuditLog:
    """That of an agent; where there is no place for one, nothing is kept, and that is said."""
    try:
        return AuditLog(audit_path(settings, environ))
    except ConfigError as error:
        logger.warning("no audit log is kept: %s", error)
        return AuditLog(None)


def _bounded(entry: Entry) -> Entry:
    texts = {
        name: getattr(entry, name)[:MAX_TEXT] for name in ("verb", "job", "target", "by", "via", "asked_on", "what")
    }
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return msgspec.structs.replace(entry, time=entry.time or now, **texts)


def read(path: Path) -> Iterator[Entry | str]:
    """The lines of a file, oldest first; one that is not understood comes as the text it is.

    Raises:
        NotFound: there is no such file.
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE):
                if line == b"\n":
                    continue
                try:
                    yield msgspec.json.decode(line, type=Entry)
                except (msgspec.MsgspecError, UnicodeError, RecursionError):
                    yield line.decode("utf-8", "replace").rstrip("\n")
    except FileNotFoundError:
        raise NotFound(f"nothing is in the audit log: there is no {path}") from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
