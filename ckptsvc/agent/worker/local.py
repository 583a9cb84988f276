"""What the I/O worker does with the copies on the node's local disk (see pipeline.local_copy)."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptsvc.errors import SaveFailed
from ckptsvc.format.checksum import extent_digests
from ckptsvc.format.extents import encode
from ckptsvc.pipeline import local_copy
from ckptsvc.pipeline.arena import Mappings
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.increments import ShardWriter
from ckptsvc.pipeline.local_copy import Copy, Mark
from ckptsvc.storage import Spreading, Store, connect
from ckptsvc.storage.rate import Rate
from ckptsvc.storage.wrappers import Limited, innermost

Note = Callable[[dict[str, Any]], None]


class LocalCopies:
    """The operations of a worker that concern local copies."""

    def __init__(
        self,
        rate: Rate,
        mappings: Mappings,
        fills: dict[int, threading.Event],
        shards: ShardWriter,
        opened: Callable[[str], Store],
    ) -> None:
        self._rate, self._mappings, self._fills, self._shards, self._opened = rate, mappings, fills, shards, opened
        self._bare: dict[str, Store] = {}
        self._connecting = threading.Lock()

    def disk(self, url: str) -> Store:
        """A folder of the local disk: nothing is tried again there, and nothing held back."""
        return self._connected(url, lambda: connect(url))

    def _durable(self, url: str) -> Store:
        # Not tried again: the agent does, and in between other shards have their turn.
        return self._connected(f"drain {url}", lambda: Limited(self._opened(url), bytes_per_second=self._rate))

    def _connected(self, name: str, connected: Callable[[], Store]) -> Store:
        with self._connecting:
            if name not in self._bare:
                self._bare[name] = connected()
            return self._bare[name]

    def do_local_scan(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Every copy in the folders of agents: [url of the job's folder, record, marks]; what was wrong with others."""
        found: list[Any] = []
        damaged: list[str] = []
        for folder in (each for directory in args["directories"] for each in sorted(Path(directory).iterdir())):
            if folder.is_dir() and not folder.is_symlink():
                store = self.disk(f"file://{folder}")
                for copy, marks in local_copy.scan(store, lambda error: damaged.append(str(error))):
                    found.append([store.url, copy.encode(), [mark.value for mark in marks]])
        return {"copies": found, "damaged": damaged}

    def do_local_tidy(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Remove what interrupted writes have left in one job's folder; nothing is being written there."""
        for _ in local_copy.scan(self.disk(args["disk"]), lambda error: None):
            pass
        return {}

    def do_local_keep(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """A shard has been written to the local disk: make it a copy."""
        local_copy.keep(self.disk(args["disk"]), Copy.decode(args["record"], "record"))
        failpoint("after_local")
        return {}

    def do_local_mark(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Remember that a copy is durable, or its checkpoint committed."""
        local_copy.mark(self.disk(args["disk"]), Copy.decode(args["record"], "record"), Mark(args["mark"]))
        return {}

    def do_local_remove(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Remove a copy."""
        local_copy.remove(self.disk(args["disk"]), args["key"])
        return {}

    def do_drain(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Write a copy to the durable store, unless it is there already."""
        given_up = self._fills[args["fill"]]

        def go_on() -> None:
            if given_up.is_set():
                raise SaveFailed("it is not to be drained any more")

        try:
            disk, copy = self.disk(args["disk"]), Copy.decode(args["record"], "record")
            began, before = time.monotonic(), self._rate.collect()
            done = {"name": copy.name, "segments": b"", "stored": 0, "layout": None, "verdict": None}
            if args["durable"]:
                columns, _ = local_copy.describe(disk, copy)
            else:
                failpoint("before_drain")
                store = self._durable(args["store"])
                driver = innermost(store)
                if isinstance(driver, Spreading):
                    driver.writers = copy.label.world_size
                written = self._shards.drain(disk, store, copy, tuple(args["committed"]), go_on)
                failpoint("after_drain")
                columns = written.columns
                done |= {"name": written.name, "stored": written.stored, "verdict": written.verdict}
                if isinstance(driver, Spreading):
                    done["layout"] = driver.layout(f"{copy.folder}/{written.name}")
                if written.segments is None:
                    local_copy.mark(disk, copy, Mark.DURABLE)
                else:  # the next process would not know what it refers to: it writes a whole one then
                    done["segments"] = encode(written.segments)
            seconds, held_back = time.monotonic() - began, before + self._rate.collect()
            return {**done, "columns": columns.encode(), "seconds": seconds, "held_back": held_back}
        finally:
            self._fills.pop(args["fill"], None)

    def do_refill(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Read a copy into a new arena; or see whether the arena that is there holds the same."""
        copy = Copy.decode(args["record"], "record")
        nbytes, extent = copy.label.nbytes, copy.label.extent
        if args["compare"]:
            with self._mappings.pages(args["path"], nbytes) as image:
                return {"same": extent_digests(image[:nbytes], extent).tobytes() == copy.digests}
        fd = os.open(args["path"], os.O_RDWR | os.O_CLOEXEC)
        try:
            with mmap.mmap(fd, 0) as memory, memoryview(memory) as arena:
                local_copy.refill(self.disk(args["disk"]), copy, arena)
        finally:
            os.close(fd)
        return {"same": True}
