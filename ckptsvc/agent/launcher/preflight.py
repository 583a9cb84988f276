"""Is this node fit to take part in a job? A few checks, in a process of their own, in a few seconds.

    python -I -S preflight.py '{"arenas": ..., "room": [...], "address": ...}'

It prints the name of every check before it makes it, and what is wrong, if anything, after it. Whatever hangs (a dead
file system, a name server) is thus named, and killed by who waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

TIMEOUT = 5.0
"""Seconds for all checks together."""

MIN_MEMORY = 512 << 20
"""Bytes of memory that must be available: less holds neither a rank nor a snapshot."""

MIN_ARENAS = 64 << 20
"""Bytes that must be free where arenas are made."""

MIN_ROOM = 64 << 20
"""Bytes that must be free in a directory that is written to."""

MEMINFO, CASSINI = Path("/proc/meminfo"), Path("/sys/class/cxi")


def memory(meminfo: Path = MEMINFO) -> str:
    """Enough memory is available; "" or what is wrong, as all checks."""
    for line in meminfo.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable" and int(value.split()[0]) << 10 < MIN_MEMORY:
            return f"{int(value.split()[0]) >> 10} MiB are available, and {MIN_MEMORY >> 20} MiB are the least"
    return ""


def room(directory: Path, least: int) -> str:
    """A file can be written there, and there is room."""
    vfs = os.statvfs(directory)
    if vfs.f_bavail * vfs.f_frsize < least:
        return f"{directory} has {vfs.f_bavail * vfs.f_frsize >> 20} MiB left, and {least >> 20} MiB are the least"
    trial = directory / f".ckptsvc-trial-{secrets.token_hex(8)}"
    # The directory may be anybody's (/tmp): a file or a link that is there is not ours to write to, or to remove.
    fd = os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(b"\0" * 4096)
            file.flush()
            os.fsync(file.fileno())
    finally:
        trial.unlink(missing_ok=True)
    return ""


def loopback(address: str) -> str:
    """A connection to the node's own address, and one to 127.0.0.1, come about."""
    for host in dict.fromkeys(("127.0.0.1", address)):
        with socket.create_server((host, 0)) as server, socket.create_connection(server.getsockname()[:2], timeout=2):
            pass
    return ""


def cards(cassini: Path = CASSINI) -> str:
    """No network card of the fast fabric is without a link, unless all are (then nobody uses them)."""
    # Ports of InfiniBand cards are not judged: on many nodes some are not cabled.
    states: dict[str, bool] = {}
    for card in sorted(cassini.glob("cxi*")):
        for name in ("device/port/link", "device/port/0/link/state"):  # Cassini 1 and 2
            with contextlib.suppress(OSError):
                states[card.name] = (card / name).read_text().strip() == "up"
    down = [name for name, up in states.items() if not up]
    return f"{', '.join(down)} has no link" if down and len(down) < len(states) else ""


def checks(arenas: str, directories: Iterable[str], address: str) -> dict[str, Callable[[], str]]:
    """All checks, by name."""
    found: dict[str, Callable[[], str]] = {
        "memory": memory,
        f"shared memory in {arenas}": lambda: room(Path(arenas), MIN_ARENAS),
    }
    for directory in directories:
        found[f"disk at {directory}"] = lambda directory=directory: room(Path(directory), MIN_ROOM)  # type: ignore[misc]
    return found | {"network to itself": lambda: loopback(address), "network cards": cards}


def main(given: dict[str, Any]) -> None:
    """Make the checks; one line of JSON before each, and one for each that fails."""
    for name, check in checks(given["arenas"], given["directories"], given["address"]).items():
        print(json.dumps({"check": name}), flush=True)  # noqa: T201  this is how it answers
        try:
            wrong = check()
        except OSError as error:
            wrong = str(error.strerror or error)
        if wrong:
            print(json.dumps({"check": name, "wrong": wrong}), flush=True)  # noqa: T201
    print(json.dumps({"check": ""}), flush=True)  # noqa: T201


async def reason_against(arenas: str, directories: list[str], address: str, timeout: float = TIMEOUT) -> str:
    """Why this node is unfit: "disk at /scratch: it has 3 MiB left"; "" if it is fit.

    Args:
        arenas: the directory of the arenas.
        directories: others that are written to.
        address: where other nodes reach this one.
        timeout: seconds for all checks.
    """
    given = json.dumps({"arenas": arenas, "directories": directories, "address": address})
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", __file__, given,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert process.stdout is not None
    wrong, current = [], "starting"
    deadline = asyncio.get_running_loop().time() + timeout
    try:
        while current:
            left = deadline - asyncio.get_running_loop().time()
            line = await asyncio.wait_for(process.stdout.readline(), max(left, 0.0))
            said = json.loads(line) if line else {"check": "", "wrong": "it ended without a result"}
            if "wrong" in said:
                wrong.append(f"{said['check'] or current}: {said['wrong']}")
            current = said["check"]
    except TimeoutError:
        wrong.append(f"{current}: no answer in {timeout:g} s")
    finally:
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            process.kill()
            await asyncio.wait_for(process.wait(), 1.0)  # one that hangs in a dead file system does not end
    return "; ".join(wrong)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
