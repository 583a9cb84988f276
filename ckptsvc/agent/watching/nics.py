"""Finds the node's network cards and reads their counters: HPE Cassini (Slingshot), InfiniBand, RoCE.

Every read here may hang (a card that has failed, a retry handler that is stopped serves its files through FUSE) and
blocks the thread that makes it: `agent.watching.nic_watch` gives each place a thread of its own.

Files are opened anew for each reading: 0.44 ms for the 49 files of a Cassini (on tmpfs, on one slow core; all 1,890
would take 20 ms), where files kept open would take 0.09 ms. But a FUSE file that stays open is served from the page
cache and never changes, and a card that is reset leaves descriptors that fail for ever. On a real card each file is a
read over PCIe besides, which has not been measured.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ckptsvc.control.nic_counters import (
    CASSINI,
    CASSINI_LINK,
    HANDLER,
    INFINIBAND,
    INFINIBAND_LINK,
    Counter,
    Value,
    parse,
)
from ckptsvc.control.nic_job import MAX_NICS
from ckptsvc.errors import InvalidInput

LONGEST = 4096
"""Bytes of a file that are looked at: a sysfs attribute is never longer than a page."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")


@dataclass(frozen=True, slots=True)
class Place:
    """A directory that tells something of one card.

    Attributes:
        nic: the card's name on the node: "cxi0", "mlx5_0:1".
        family: "cxi", "ib" or "roce".
        directory: what the paths of `counters` and `link` are below.
        counters: the table of its files.
        link: files of which one says the state of the link; empty where none does.
        is_handler: the place is the card's retry handler: files in it mean that it lives.
    """

    nic: str
    family: str
    directory: Path
    counters: tuple[Counter, ...]
    link: tuple[str, ...] = ()
    is_handler: bool = False


@dataclass(slots=True)
class Reading:
    """What one place said, once.

    Attributes:
        values: by the path of the file in its table.
        link: the driver's word for the state of the link; "" if there was none.
        failed: files that could not be read or understood, with the reason; those that do not exist are in `missing`.
        missing: files of the table that are not there (another release of the driver has others).
    """

    values: dict[str, Value] = field(default_factory=dict)
    link: str = ""
    failed: dict[str, str] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)


class NicProbe:
    """Looks below `root` for cards. It keeps nothing: two probes, or two threads, never disturb each other."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._cxi = root / "sys/class/cxi"
        self._infiniband = root / "sys/class/infiniband"
        self._handlers = root / "run/cxi"

    def places(self) -> list[Place]:
        """Every place of every card that is there now; at most `MAX_NICS` cards."""
        found = [*self._cassini(), *self._ports()]
        cards = list(dict.fromkeys(place.nic for place in found))[:MAX_NICS]
        return [place for place in found if place.nic in cards]

    def _cassini(self) -> Iterator[Place]:
        for name in _names(self._cxi):
            device = self._cxi / name / "device"
            if os.path.isdir(device / "telemetry"):  # a virtual function has none
                yield Place(name, "cxi", device, CASSINI, CASSINI_LINK)
                yield Place(name, "cxi", self._handlers / name, HANDLER, is_handler=True)

    def _ports(self) -> Iterator[Place]:
        for device in _names(self._infiniband):
            for port in _names(self._infiniband / device / "ports"):
                directory = self._infiniband / device / "ports" / port
                try:
                    roce = _content(directory / "link_layer").strip() == b"Ethernet"
                except OSError:
                    roce = False
                yield Place(f"{device}:{port}", "roce" if roce else "ib", directory, INFINIBAND, INFINIBAND_LINK)


def read(place: Place, skip: frozenset[str] = frozenset()) -> Reading:
    """Read all files of a place, except those in `skip`; never fails.

    Args:
        place: what to read.
        skip: files that were missing and are not looked for again.
    """
    reading = Reading()
    directory = str(place.directory)  # joining Path objects would double the cost of a reading
    for counter in place.counters:
        if counter.file in skip:
            continue
        try:
            reading.values[counter.file] = parse(_content(f"{directory}/{counter.file}"))
        except FileNotFoundError:
            reading.missing.add(counter.file)
        except OSError as error:
            reading.failed[counter.file] = errno.errorcode.get(error.errno or 0, "error")
        except InvalidInput as error:
            reading.failed[counter.file] = error.what
    for file in place.link:
        try:
            reading.link = _content(f"{directory}/{file}").decode("ascii", "replace").strip()[:40]
        except OSError:
            continue
        if reading.link:
            break
    return reading


def _content(path: Path | str) -> bytes:
    # O_NONBLOCK: whatever is there in place of a counter must not make the open wait for a writer.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(fd, LONGEST)
    finally:
        os.close(fd)


def _names(directory: Path) -> list[str]:
    """Names in a directory that may be a card's or a port's, cxi2 before cxi10; none if it cannot be read."""
    try:
        names = [name for name in os.listdir(directory) if _NAME.fullmatch(name)]
    except OSError:
        return []
    return sorted(names, key=lambda name: (re.sub("[0-9]+", "", name), [int(n) for n in re.findall("[0-9]+", name)]))
