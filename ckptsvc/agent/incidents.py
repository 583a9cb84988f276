"""Incidents that are kept: one JSON file each, readable when no agent runs any more.

    {"format": "ckptsvc-incident/1", "incident": {... as Incident of coordinator.proto, every field ...}}

A file is named by the time, the job and the incident's id; writing an incident again (more has been done about it)
replaces its file.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import xxhash
from google.protobuf import json_format
from google.protobuf.message import Message

from ckptsvc.agent.aside import aside
from ckptsvc.config import private_directory
from ckptsvc.errors import CkptsvcError, ConfigError, Damaged, IncompatibleVersion, InvalidInput, NotFound
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import Settings
from ckptsvc.telemetry import Event, log

logger = logging.getLogger("ckptsvc.agent")

FORMAT = "ckptsvc-incident/"
VERSION = 1

KEPT = 200
"""Incidents that are kept; older ones go."""

MAX_BYTES = 8 << 20
"""Bytes of one file."""

STALE = 3600.0
"""Seconds after which a file that was never finished is removed."""

_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_NAME = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{6}-[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
_BULKY = ("native_stack", "other_stacks", "log_tail")


class Kept(NamedTuple):
    """One incident in the directory.

    Attributes:
        name: of the file without ".json"; what comes after the time is enough to find it by.
        incident: what the file holds, or why that cannot be used.
    """

    name: str
    incident: pb.Incident | CkptsvcError

    @property
    def key(self) -> str:
        """The part of the name that people use."""
        return self.name.partition("-")[2]


def incidents_directory(settings: Settings, environ: Mapping[str, str]) -> Path:
    """Where incidents are kept: `agent.incidents_dir`, else a directory of the user that survives reboots.

    Raises:
        ConfigError: the environment names no such place.
    """
    if settings.agent.incidents_dir:
        return Path(settings.agent.incidents_dir)
    return state_directory(environ, "agent.incidents_dir") / "incidents"


def state_directory(environ: Mapping[str, str], setting: str) -> Path:
    """Where what is to survive reboots is kept, unless a setting says otherwise.

    Raises:
        ConfigError: the environment names no such place.
    """
    if given := environ.get("STATE_DIRECTORY"):  # of systemd, which lists all of a unit's directories
        return Path(given.split(":")[0])
    state = environ.get("XDG_STATE_HOME", "")
    if not state.startswith("/"):  # a relative one is to be ignored: XDG base directory specification
        home = environ.get("HOME", "")
        if not home.startswith("/"):
            raise ConfigError(f"there is no place for {setting}: HOME is not set", hint=f"set {setting}")
        state = f"{home}/.local/state"
    return Path(state, "ckptsvc")


class IncidentLog:
    """The incidents in one directory, which need not exist yet."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._turn = asyncio.Lock()

    async def record(self, incident: pb.Incident, seconds: float = 10.0) -> Path | None:
        """Keep an incident without holding up the event loop; a failure is logged, and None returned."""
        copy = pb.Incident()
        copy.CopyFrom(incident)  # the caller may go on changing it
        try:
            async with self._turn:
                path = await aside(partial(self.write, copy), seconds)
        except (OSError, CkptsvcError) as error:  # TimeoutError is an OSError
            logger.warning("incident %s is not kept in %s: %s", incident.id, self.directory, str(error) or "no answer")
            return None
        log(logger, logging.WARNING, Event.INCIDENT_KEPT, "%s (%s)", incident.sentence, path,
            job=incident.job, attempt=incident.attempt)  # fmt: skip
        return path

    def write(self, incident: pb.Incident) -> Path:
        """Keep an incident; its file is there as a whole or not at all. May block on the file system.

        Raises:
            InvalidInput: it has no proper id.
            ConfigError: the directory is not this user's alone.
            OSError: it cannot be written.
        """
        name = name_of(incident)
        try:
            private_directory(self.directory)
        except ConfigError as error:
            raise ConfigError(error.what, hint="set agent.incidents_dir to a directory of your own") from error
        path = self.directory / f"{name}.json"
        fresh = self.directory / f".{name}.{secrets.token_hex(4)}.tmp"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.write(_encoded(incident))
                file.flush()
                os.fsync(file.fileno())
            fresh.rename(path)
        except BaseException:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        self._tidy()
        return path

    def newest_first(self) -> Iterator[Kept]:
        """All of them."""
        for name in self._names():
            with contextlib.suppress(NotFound):  # it was the oldest, and has gone
                yield self._kept(name)

    def find(self, wanted: str) -> Kept:
        """The incident of a name, the end of a name, or "last".

        Raises:
            NotFound: there is none.
            InvalidInput: there are several.
        """
        names = self._names()
        found = names[:1] if wanted == "last" else [n for n in names if n == wanted or n.endswith(f"-{wanted}")]
        if not found:
            raise NotFound(f"no incident {wanted!r} in {self.directory}", hint="`ckptsvc incidents` lists them")
        if len(found) > 1:
            raise InvalidInput(f"{len(found)} incidents are called {wanted}", hint=f"for example {found[0]}")
        return self._kept(found[0])

    def _names(self) -> list[str]:
        try:
            entries = os.listdir(self.directory)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ConfigError(f"cannot read {self.directory}: {error.strerror}") from error
        names = (entry.removesuffix(".json") for entry in entries if entry.endswith(".json"))
        return sorted(filter(_NAME.fullmatch, names), reverse=True)

    def _kept(self, name: str) -> Kept:
        path = self.directory / f"{name}.json"
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            with open(fd, "rb") as file:
                data = file.read(MAX_BYTES + 1)
            return Kept(name, decode(data))
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist") from None
        except OSError as error:
            return Kept(name, Damaged(f"{path}: {error.strerror}"))
        except CkptsvcError as error:
            return Kept(name, type(error)(f"{path}: {error.what}", hint=error.hint))

    def _tidy(self) -> None:
        for name in self._names()[KEPT:]:
            with contextlib.suppress(OSError):  # another agent has removed it
                (self.directory / f"{name}.json").unlink()
        for path in self.directory.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE:
                    path.unlink()


def name_of(incident: pb.Incident) -> str:
    """The name of an incident's file without ".json".

    Raises:
        InvalidInput: its id or its time cannot be part of one.
    """
    opened = moment(incident.opened)
    if opened is None or not _ID.fullmatch(incident.id):
        raise InvalidInput(f"an incident {incident.id!r} of {incident.opened!r} cannot be kept")
    job = xxhash.xxh3_64_hexdigest(incident.job.encode("utf-8", "surrogatepass"))[:6]
    return f"{opened:%Y%m%dT%H%M%SZ}-{job}-{incident.id}"


def moment(opened: str) -> datetime | None:
    """A time in ISO 8601, in UTC; None where it is none."""
    try:
        found = datetime.fromisoformat(opened)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def plain(message: Message) -> dict[str, Any]:
    """Every field of a message as plain values (protobuf's own JSON leaves out zeros and writes numbers as text)."""
    values: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if isinstance(value, str | int | float):
            values[field.name] = value
        else:
            values[field.name] = [plain(item) if isinstance(item, Message) else item for item in value]
    return values


def decode(data: bytes) -> pb.Incident:
    """The incident in a file.

    Raises:
        Damaged: there is none.
        IncompatibleVersion: it was written by a later version.
    """
    if len(data) > MAX_BYTES:
        raise Damaged(f"more than {MAX_BYTES} bytes are no incident")
    try:
        document = json.loads(data)
        written = document["format"]
        if not isinstance(written, str) or not written.startswith(FORMAT):
            raise Damaged("this is no incident")
        if written != f"{FORMAT}{VERSION}":
            raise IncompatibleVersion(f"written as {written[:64]}; this version reads {FORMAT}{VERSION}")
        incident = json_format.ParseDict(document["incident"], pb.Incident(), ignore_unknown_fields=True)
        name_of(incident)
    except (ValueError, TypeError, KeyError, RecursionError, json_format.ParseError) as error:
        raise Damaged(f"this is no incident: {type(error).__name__}") from None
    numbers = [incident.confidence, incident.detected]
    numbers += [number for rank in incident.ranks for number in (rank.stalled, rank.cpu)]
    if not all(map(math.isfinite, numbers)):
        raise Damaged("a number in it is not finite")
    return incident


def _encoded(incident: pb.Incident) -> bytes:
    """The file; what would make it too large is left out, and that is said."""
    for ranks, bulky in ((None, True), (None, False), (1000, False), (100, False), (1, False)):
        shorter = _shortened(incident, ranks, bulky)
        document = {"format": f"{FORMAT}{VERSION}", "incident": plain(shorter)}
        try:
            data = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:
            raise InvalidInput("an incident with a number that is not finite cannot be kept") from None
        if len(data) <= MAX_BYTES:
            return data
    raise InvalidInput(f"an incident of {len(data)} bytes cannot be kept")


def _shortened(incident: pb.Incident, most: int | None, bulky: bool) -> pb.Incident:
    if bulky:
        return incident
    shorter = pb.Incident()
    shorter.CopyFrom(incident)
    ranks = sorted(shorter.ranks, key=lambda rank: rank.rank != incident.rank)[:most]
    for rank in ranks:
        if rank.rank != incident.rank:
            for field in _BULKY:
                rank.ClearField(field)
    left_out = len(incident.ranks) - len(ranks)
    del shorter.ranks[:]
    shorter.ranks.extend(ranks)
    shorter.notes.append("the logs and native stacks of the other ranks were left out: there was too much")
    if left_out:
        shorter.notes.append(f"the evidence of {left_out} ranks was left out: there was too much")
    return shorter
