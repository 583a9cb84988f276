"""The list of nodes that have failed or are excluded, in a file that outlives jobs: nodes.json in the state directory.

    {"version": 1, "nodes": {"n7": {"score": 2.5, "at": 1795270559.6, "why": "rank 3 was killed by signal 9"}},
     "words": {"n9": {"excluded": true, "at": 1795270600.0, "until": 0, "why": "a bad cable (ada)"}}}

`score` is what the node had against it at `at` (unix seconds) and fades since then (control.exclusion); `words` is what
people have said, until then or (0) until they say otherwise; who includes a node forgives it what it had against it.

Several coordinators may share the file, on a file system that all nodes see: it is replaced as a whole; the heavier of
two entries for a node is kept, and the later of two words. Anybody may delete it. The file system may hang: this
runs in an I/O worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from ckptsvc.control.exclusion import Strikes
from ckptsvc.errors import Damaged, StoreError
from ckptsvc.settings import LaunchSettings

NAME = "nodes.json"
LOCK_PATIENCE = 5.0
"""Seconds that a merge waits for another one."""
MAX_BYTES = 4 << 20
MAX_TEXT = 300
"""Characters of a node's name and of a reason."""

REMEMBERED = 30 * 86400.0
"""Seconds for which it is remembered that a node may be used again: as long as another list may say otherwise."""


class Entry(msgspec.Struct, frozen=True):
    """One node."""

    score: float
    at: float
    why: str


class Word(msgspec.Struct, frozen=True):
    """What a person has said of one node."""

    excluded: bool
    at: float
    until: float
    why: str

    def holds(self, now: float) -> bool:
        """Whether the node is excluded by it."""
        return self.excluded and not 0 < self.until <= now


class NodeList(msgspec.Struct, frozen=True):
    """The file."""

    version: int
    nodes: dict[str, Entry]
    words: dict[str, Word] = {}


def directory_of(environ: Mapping[str, str], settings: LaunchSettings) -> Path | None:
    """Where the list is; None where this user has no home to keep it in."""
    if settings.state:
        return Path(settings.state)
    base = environ.get("XDG_STATE_HOME") or (f"{environ['HOME']}/.local/state" if environ.get("HOME") else "")
    return Path(base, "ckptsvc") if base.startswith("/") else None


def read(directory: Path) -> NodeList:
    """What can be used of it; nothing where there is no list.

    Raises:
        Damaged: it is not such a list.
        StoreError: it cannot be read.
    """
    try:
        with open(directory / NAME, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return NodeList(1, {})
    except OSError as error:
        raise StoreError(f"{directory / NAME}: {error.strerror}") from error
    try:
        found = msgspec.json.decode(data, type=NodeList)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise Damaged(f"{directory / NAME} is not a list of nodes: {error}", hint="delete it") from None
    if found.version != 1:
        raise Damaged(f"{directory / NAME} has version {found.version}; this one knows 1", hint="delete it")
    now = time.time()  # what a wrong clock has written must fade as well
    nodes = {
        n: msgspec.structs.replace(e, at=min(e.at, now))
        for n, e in found.nodes.items()
        if len(n) <= MAX_TEXT and 0 <= e.score < 1e6
    }
    words = {  # whoever says something now has said it later than any of those
        n: msgspec.structs.replace(w, at=w.at if w.at <= now else now - 1.0)
        for n, w in found.words.items()
        if len(n) <= MAX_TEXT and (w.holds(now) or now - w.at < REMEMBERED)
    }
    return NodeList(1, _forgiven(nodes, words), words)


def _forgiven(nodes: dict[str, Entry], words: dict[str, Word]) -> dict[str, Entry]:
    return {n: e for n, e in nodes.items() if n not in words or words[n].excluded or e.at > words[n].at}


def keep(directory: Path, entries: dict[str, Entry], words: dict[str, Word] | None = None) -> None:
    """Merge entries and words into the list.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        with contextlib.suppress(FileExistsError):
            directory.mkdir(parents=True)
        with _alone(directory):
            _merge(directory, entries, words or {})
    except OSError as error:
        raise StoreError(f"{directory / NAME}: {error.strerror}") from error


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Others wait meanwhile, or one of two words would be lost; not for ever, and not where files have no locks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE
        with contextlib.suppress(OSError):
            while time.monotonic() < deadline:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05)
        yield
    finally:
        os.close(fd)


def _merge(directory: Path, entries: dict[str, Entry], words: dict[str, Word]) -> None:
    try:
        known = read(directory)
    except Damaged:
        known = NodeList(1, {})  # of no use to anybody
    nodes = known.nodes | {n: e for n, e in entries.items() if n not in known.nodes or _heavier(e, known.nodes[n])}
    said = known.words | {n: w for n, w in words.items() if n not in known.words or w.at > known.words[n].at}
    merged = NodeList(1, _forgiven(nodes, said), said)
    temporary = directory / f".{NAME}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(merged), indent=1))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, directory / NAME)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _heavier(one: Entry, other: Entry) -> bool:
    at = max(one.at, other.at)
    return Strikes(one.score, one.at, "").now(at) >= Strikes(other.score, other.at, "").now(at)
