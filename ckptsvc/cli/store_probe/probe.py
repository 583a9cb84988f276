"""What `ckptsvc doctor` does to a store, in a process of its own: a store that hangs takes nobody with it.

    python -m ckptsvc.cli.store_probe.probe '{"url": ..., ...}'

One line of JSON for each stage that begins ({"stage": name}) and for each that ends ({"stage": name, "found": {...}}),
and one before anything is written ({"writes": true}), which another takes back if that was refused.
It ends, and removes what it has written, when its standard input is closed.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from ckptsvc.cli.store_probe.load import FOLDER, Buffers, clear, connect_as_set, each, make_cold, timed, workers
from ckptsvc.errors import CkptsvcError, ConfigError, StoreDenied
from ckptsvc.storage import Store
from ckptsvc.storage.clock import store_time

MiB = 1 << 20
RACERS, RACES = 8, 10
SMALL = 128
"""Bytes of a small object."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be measured.

    Attributes:
        url: of the store.
        folder: for all that is written.
        sizes: bytes of objects, ascending.
        parallel: how many at a time, ascending.
        most: bytes that are moved for one sample.
        repeat: samples of each.
        seconds: after which a stage begins nothing new.
        calls: small objects for the latencies.
        old: seconds after which what earlier probes have left is removed.
    """

    url: str
    folder: str
    sizes: tuple[int, ...] = (MiB, 16 * MiB, 128 * MiB)
    parallel: tuple[int, ...] = (1, 4, 16)
    most: int = 512 * MiB
    repeat: int = 3
    seconds: float = 20.0
    calls: int = 60
    old: float = 3600.0

    def grid(self) -> list[tuple[int, int, int]]:
        """(size, how many at a time, how many in all) of what is measured; nothing moves more than `most`."""
        found = []
        for size in self.sizes:
            for parallel in self.parallel:
                objects = max(parallel, min(4 * parallel, self.most // 8 // size))
                if size * objects <= self.most:
                    found.append((size, parallel, objects))
        return found


class Probe:
    """The stages; each returns what it has found, as plain values."""

    def __init__(self, spec: Spec, store: Store, pool: ThreadPoolExecutor) -> None:
        self._spec, self._store, self._pool = spec, store, pool

    def about(self) -> dict[str, Any]:
        """What the driver says, and what earlier probes have left."""
        names = self._store.children()
        others = [name for name in names if name.startswith(FOLDER) and name != self._spec.folder]
        say({"writes": True})
        try:
            # The first object makes the directory, without which some things cannot be known.
            self._store.put_if_absent(self._key("first"), b"1")
        except StoreDenied:
            say({"writes": False})
            raise
        now = store_time(self._store, self._spec.folder) if others else None
        old = set()
        for name in others:
            newest = max((e.modified for e in self._store.list(name)), default=0.0)
            if newest < (now or 0.0) - self._spec.old:
                clear(self._store, name)
                old.add(name)
        said: dict[str, Any] = msgspec.to_builtins(self._store.capabilities())
        return said | {"url": self._store.url, "removed": sorted(old)}

    def metadata(self) -> dict[str, Any]:
        """Seconds of every call on small objects."""
        keys = [self._key(f"small-{number:04d}") for number in range(self._spec.calls)]
        found: dict[str, list[float]] = {name: [] for name in ("create", "look up", "read", "list", "delete")}
        deadline = time.monotonic() + self._spec.seconds
        made: list[str] = []
        for key in keys:
            if time.monotonic() > deadline:
                break
            found["create"].append(timed(lambda key=key: self._store.put_if_absent(key, os.urandom(SMALL))))  # type: ignore[misc]
            made.append(key)
        for name, call in (("look up", self._store.size), ("read", self._store.read), ("delete", self._store.delete)):
            for key in made:
                if name == "delete" and len(found["list"]) < len(made) // 4 + 1:
                    found["list"].append(timed(lambda: self._store.children(self._spec.folder)))
                found[name].append(timed(lambda call=call, key=key: call(key)))  # type: ignore[misc]
        return {"listed": len(made), "calls": found}

    def race(self) -> dict[str, Any]:
        """How many of several writers of one object win, time and again."""
        winners = []
        for number in range(RACES):
            key, start, won = self._key(f"race-{number}"), threading.Barrier(RACERS), list[bool]()

            def put(me: int, key: str = key, start: threading.Barrier = start, won: list[bool] = won) -> None:
                start.wait(30)
                won.append(self._store.put_if_absent(key, b"%d" % me))

            for future in [self._pool.submit(put, me) for me in range(RACERS)]:
                future.result()
            winners.append(sum(won) if not self._store.put_if_absent(key, b"late") else -1)
            self._store.delete(key)
        return {"writers": RACERS, "winners": winners}

    def write(self) -> dict[str, Any]:
        """Seconds for writing many objects, by size and how many at a time."""
        return self._samples(self._spec.grid(), self._written, reads=False)

    def read(self) -> dict[str, Any]:
        """Likewise for reading what is not in the page cache."""
        cold = ""

        def sample(size: int, parallel: int, objects: int, buffers: Buffers) -> float:
            nonlocal cold
            keys = self._keys(objects)
            self._write_all(self._store, keys, size, max(parallel, 4), buffers)
            cold = make_cold(self._store, keys)
            took = each(self._pool, parallel, keys, lambda n, key: self._store.read_into(key, 0,
                buffers.target(n)[:size]))  # fmt: skip
            self._delete(keys)
            return took

        return self._samples(self._spec.grid(), sample, reads=True) | {"cold": cold}

    def tune(self) -> dict[str, Any]:
        """Seconds for writing one large object with other settings of the driver, where it has them."""
        size = self._spec.sizes[-1]
        ways = [{}, *({"threads": n} for n in (1, 2, 8, 16)), *({"block": n * MiB} for n in (2, 32))]  # of files
        ways += [*({"connections": n} for n in (4, 16, 32)), *({"part": n * MiB} for n in (8, 32))]  # of object stores
        stores: list[tuple[dict[str, int], Store]] = []
        with contextlib.ExitStack() as stack:
            for way in ways:
                try:
                    store = connect_as_set(self._spec.url, way)
                except ConfigError:
                    continue
                stack.callback(store.close)
                stores.append((way, store))
            buffers = Buffers(size, 0)
            stack.callback(buffers.close)
            samples: list[list[float]] = [[] for _ in stores]
            deadline = time.monotonic() + self._spec.seconds
            for repetition in range(self._spec.repeat):
                for (_, store), found in zip(stores, samples, strict=True):
                    if repetition and time.monotonic() > deadline:
                        continue
                    keys = self._keys(1)
                    found.append(self._write_all(store, keys, size, 1, buffers))
                    self._delete(keys)
        return {"size": size, "ways": [[way, found] for (way, _), found in zip(stores, samples, strict=True)]}

    def copy(self) -> dict[str, Any]:
        """Seconds for a copy in memory."""
        size = self._spec.sizes[-1]
        buffers = Buffers(size, 1)
        try:
            target, source = buffers.target(0)[:size], buffers.source[:size]

            def once() -> None:
                target[:] = source

            return {"size": size, "seconds": [timed(once) for _ in range(2 + self._spec.repeat)][2:]}
        finally:
            target.release()
            source.release()
            buffers.close()

    def _samples(
        self, grid: Sequence[tuple[int, int, int]], sample: Callable[[int, int, int, Buffers], float], *, reads: bool
    ) -> dict[str, Any]:
        """All repetitions, taking turns, so that the moods of a shared store fall on all alike."""
        found: list[list[float]] = [[] for _ in grid]
        deadline = time.monotonic() + self._spec.seconds
        for repetition in range(self._spec.repeat):
            for (size, parallel, objects), times in zip(grid, found, strict=True):
                if (repetition or size != self._spec.sizes[0]) and time.monotonic() > deadline:
                    continue
                buffers = Buffers(size, parallel if reads else 0)
                try:
                    times.append(sample(size, parallel, objects, buffers))
                finally:
                    buffers.close()
        return {
            "samples": [
                {"size": size, "parallel": parallel, "objects": objects, "seconds": times}
                for (size, parallel, objects), times in zip(grid, found, strict=True)
            ]
        }

    def _written(self, size: int, parallel: int, objects: int, buffers: Buffers) -> float:
        keys = self._keys(objects)
        took = self._write_all(self._store, keys, size, parallel, buffers)
        self._delete(keys)
        return took

    def _write_all(self, store: Store, keys: Sequence[str], size: int, parallel: int, buffers: Buffers) -> float:
        return each(self._pool, parallel, keys, lambda n, key: store.write(key, buffers.source, size))

    def _delete(self, keys: Sequence[str]) -> None:
        each(self._pool, 4, keys, lambda n, key: self._store.delete(key))

    def _keys(self, count: int) -> list[str]:
        token = secrets.token_hex(4)
        return [self._key(f"{token}-{number:04d}") for number in range(count)]

    def _key(self, name: str) -> str:
        return f"{self._spec.folder}/{name}"


STAGES = ("about", "race", "metadata", "copy", "write", "read", "tune")


def main(text: str) -> int:
    """Measure; the stages in their order."""
    spec = msgspec.json.decode(text, type=Spec)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started this one says when to end
    signal.signal(signal.SIGTERM, _ended)
    threading.Thread(target=_watch_input, daemon=True).start()
    try:
        store, first = connect_as_set(spec.url), None
        try:
            _run(spec, store)
        except CkptsvcError as error:
            first = error
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough
            with contextlib.suppress(OSError):  # there may be nobody left to tell
                say({"stage": "clean"})
            try:
                clear(store, spec.folder)
            except CkptsvcError as error:
                first = first or error
        if first is not None:
            raise first
    except CkptsvcError as error:
        say({"error": [error.code, error.what, error.hint]})
        return 1
    say({"stage": ""})
    return 0


def _run(spec: Spec, store: Store) -> None:
    with workers(max(RACERS, *spec.parallel)) as pool:
        probe = Probe(spec, store, pool)
        for name in STAGES:
            say({"stage": name})
            say({"stage": name, "found": getattr(probe, name)()})


def clean(url: str, folder: str) -> int:
    """Remove what a probe that was killed has left."""
    with contextlib.suppress(CkptsvcError):
        clear(connect_as_set(url), folder)
        return 0
    return 1


def say(message: dict[str, Any]) -> None:
    """One line."""
    sys.stdout.write(msgspec.json.encode(message).decode() + "\n")
    sys.stdout.flush()


def _ended(number: int, frame: object) -> None:
    sys.exit(128 + number)


def _watch_input() -> None:
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(clean(*sys.argv[2:]) if sys.argv[1] == "--clean" else main(sys.argv[1]))
