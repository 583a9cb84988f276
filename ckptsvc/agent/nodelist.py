"""The list of nodes that have failed, in a file that outlives jobs: nodes.json in the state directory.

    {"version": 1, "nodes": {"n7": {"score": 2.5, "at": 1795270559.6, "why": "rank 3 was killed by signal 9"}}}

`score` is what the node had against it at `at` (unix seconds) and fades since then (control.exclusion). Several
coordinators may share the file, on a file system that all nodes see: it is replaced as a whole, and the heavier of two
entries for a node is kept. Anybody may delete it. It may be on a file system that hangs: this runs in an I/O worker.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ckptsvc.control.exclusion import Strikes
from ckptsvc.errors import Damaged, StoreError
from ckptsvc.settings import LaunchSettings

NAME = "nodes.json"
MAX_BYTES = 4 << 20
MAX_TEXT = 300
"""Characters of a node's name and of a reason."""


class Entry(msgspec.Struct, frozen=True):
    """One node."""

    score: float
    at: float
    why: str


class NodeList(msgspec.Struct, frozen=True):
    """The file."""

    version: int
    nodes: dict[str, Entry]


def directory_of(environ: Mapping[str, str], settings: LaunchSettings) -> Path | None:
    """Where the list is; None where this user has no home to keep it in."""
    if settings.state:
        return Path(settings.state)
    base = environ.get("XDG_STATE_HOME") or (f"{environ['HOME']}/.local/state" if environ.get("HOME") else "")
    return Path(base, "ckptsvc") if base.startswith("/") else None


def read(directory: Path) -> dict[str, Entry]:
    """All entries; none where there is no list.

    Raises:
        Damaged: it is not such a list.
        StoreError: it cannot be read.
    """
    try:
        with open(directory / NAME, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StoreError(f"{directory / NAME}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=NodeList)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Damaged(f"{directory / NAME} is not a list of nodes: {error}", hint="delete it") from None
    if found.version != 1:
        raise Damaged(f"{directory / NAME} has version {found.version}; this one knows 1", hint="delete it")
    now = time.time()  # what a wrong clock has written must fade as well
    return {
        n: msgspec.structs.replace(e, at=min(e.at, now))
        for n, e in found.nodes.items()
        if len(n) <= MAX_TEXT and 0 <= e.score < 1e6
    }


def keep(directory: Path, entries: dict[str, Entry]) -> None:
    """Merge entries into the list.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        known = read(directory)
    except Damaged:
        known = {}  # of no use to anybody
    merged = known | {n: e for n, e in entries.items() if n not in known or _heavier(e, known[n])}
    temporary = directory / f".{NAME}-{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(NodeList(1, merged)), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / NAME)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{directory / NAME}: {error.strerror}") from error


def _heavier(one: Entry, other: Entry) -> bool:
    at = max(one.at, other.at)
    return Strikes(one.score, one.at, "").now(at) >= Strikes(other.score, other.at, "").now(at)
