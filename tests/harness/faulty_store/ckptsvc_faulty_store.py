"""Drivers for tests.

`striped+file:///path` is the directory /path; it says that every shard has as many stripes as there are writers.
`faulty+file:///path` is the directory /path behind `Faulty`, with a plan that tests change:

/path.plan     JSON: the faults (storage.wrappers.Fault); read again whenever the file changes
/path.calls    one line for every call: process id, operation, key
/path.release  once it is there, calls that hang go on
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from ckptsvc_drivers.posix import PosixStore

from ckptsvc.storage import Layout
from ckptsvc.storage import connect as connect_inner
from ckptsvc.storage.wrappers import Fault, Faulty, decode_faults


class PlannedStore(Faulty):
    """Faulty, by a plan in a file."""

    def __init__(self, path: str) -> None:
        super().__init__(connect_inner(f"file://{path}"))
        self._path = path
        self._read_at = -1
        self._reading = threading.Lock()
        threading.Thread(target=self._await_release, daemon=True).start()

    @property
    def url(self) -> str:
        """The address that leads here again."""
        return f"faulty+file://{self._path}"

    def _due(self, op: str, key: str) -> Fault | None:
        with self._reading:
            self._update()
            with open(f"{self._path}.calls", "a") as file:
                file.write(f"{os.getpid()} {op} {key}\n")
        return super()._due(op, key)

    def _update(self) -> None:
        try:
            changed = os.stat(f"{self._path}.plan").st_mtime_ns
        except FileNotFoundError:
            return
        if changed != self._read_at:
            with open(f"{self._path}.plan", "rb") as file:
                self._plan = decode_faults(file.read())
            self._seen = [0] * len(self._plan)
            self._read_at = changed

    def _await_release(self) -> None:
        while not os.path.exists(f"{self._path}.release"):
            time.sleep(0.05)
        self.release()


class StripedStore(PosixStore):
    """Decides over how many targets an object is spread, as that of Lustre does."""

    scheme = "striped+file"

    def layout(self, key: str) -> Layout | None:
        """See `Spreading`; of what there is."""
        self.size(key)
        return Layout(self.writers, 1 << 20, tuple(range(self.writers)), "")


def connect_striped(url: str, options: Mapping[str, Any]) -> StripedStore:
    """Its entry point."""
    return StripedStore(url.partition("://")[2])


def connect(url: str, options: Mapping[str, Any]) -> PlannedStore:
    """The entry point."""
    return PlannedStore(url.partition("://")[2])
