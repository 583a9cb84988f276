"""What systemd is told of this process: lines in a datagram to $NOTIFY_SOCKET (sd_notify(3), systemd.service(5)).

    READY=1  RELOADING=1 + MONOTONIC_USEC=...  STOPPING=1  STATUS=one line  WATCHDOG=1

WATCHDOG=1 comes from the event loop, twice in the time that systemd allows: a loop that is stuck is found, and a store
or a disk that hangs kills nobody, for the loop never waits for one.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping

log = logging.getLogger("ckptsvc.agent")

SEND_PATIENCE = 0.5
"""Seconds a message may wait for room in systemd's queue."""

TELL_EVERY = 10.0
"""Seconds between two looks whether the status has changed, where no watchdog wants more."""

MAX_STATUS = 500
"""Characters of a status."""


class Notifier:
    """Tells one service manager, or nobody; what cannot be told is no reason to stop serving.

    Args:
        address: of its socket: a path, or "@name" in the abstract namespace; "": there is none.
        watchdog: seconds within which it wants to hear of us; None: it does not.
    """

    def __init__(self, address: str = "", watchdog: float | None = None) -> None:
        if address[:1] not in ("/", "@"):
            address = ""  # systemd knows vsock addresses too, for whole machines
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog = watchdog if address else None
        self._said = ""

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> Notifier:
        """The manager that the environment names, where it means this process."""
        seconds = None
        if environ.get("WATCHDOG_PID", str(pid)) == str(pid):
            usec = environ.get("WATCHDOG_USEC", "")
            seconds = int(usec) / 1e6 if usec.isdecimal() and int(usec) else None
        return cls(environ.get("NOTIFY_SOCKET", ""), seconds)

    def ready(self, status: str) -> None:
        """We serve (again)."""
        self._said = _line(status)
        self._send("READY=1", f"STATUS={self._said}")

    def reloading(self, status: str) -> None:
        """We read the settings again, or make way for a successor in this process; `ready` follows."""
        self._said = _line(status)
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", f"STATUS={self._said}")

    def stopping(self, status: str) -> None:
        """We end."""
        self._send("STOPPING=1", f"STATUS={_line(status)}")

    async def beat(self, status: Callable[[], str]) -> None:
        """Show that the event loop lives, and say what it does when that has changed; until cancelled."""
        if not self._address:
            return
        period = min(self.watchdog / 2, TELL_EVERY) if self.watchdog else TELL_EVERY
        while True:
            lines = ["WATCHDOG=1"] if self.watchdog else []
            if (now := _line(status())) != self._said:
                self._said = now
                lines.append(f"STATUS={now}")
            self._send(*lines)
            await asyncio.sleep(period)

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            # Made anew each time: systemd makes its socket anew when it starts itself anew.
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(SEND_PATIENCE)
                sock.sendto("\n".join(lines).encode(), os.fsencode(self._address))
        except OSError as error:
            log.debug("the service manager does not hear %s: %s", lines[0], error)


def _line(text: str) -> str:
    """As one line: another would be another message."""
    return " ".join(text.split())[:MAX_STATUS]
