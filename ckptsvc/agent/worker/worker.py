"""The I/O worker: one process for each job does all that touches the job's store.

A store can hang (a dead Lustre target leaves a writer that not even SIGKILL ends), so the control process never calls
one. The worker is spawned, never forked, and speaks msgpack frames over a socket pair: requests in, any number of
notes and one answer out. It ends when its agent does.
"""

from __future__ import annotations

import gc
import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, Protocol

import msgspec
import numpy as np

from ckptsvc.agent import nodelist
from ckptsvc.agent.worker.local import LocalCopies
from ckptsvc.agent.worker.settings import heard
from ckptsvc.errors import CkptsvcError, SaveFailed, StoreError
from ckptsvc.format.checksum import Digests, extent_digests
from ckptsvc.format.columns import Columns
from ckptsvc.format.commit import CommitRecord
from ckptsvc.format.extents import decode, encode
from ckptsvc.format.index import IndexInfo
from ckptsvc.format.merge import ShardRecord
from ckptsvc.pipeline.arena import Mappings
from ckptsvc.pipeline.catalog import Ref, read_commit, take_epoch
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.pipeline.commit import commit_checkpoint, confirm
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.increments import Economy, ShardWriter
from ckptsvc.pipeline.references import Bases
from ckptsvc.pipeline.retain import expire
from ckptsvc.pipeline.retention import Policy
from ckptsvc.pipeline.write import ShardImage, Written, write_shard
from ckptsvc.settings import SaveSettings, StoreSettings
from ckptsvc.storage import Progress, Spreading, Store, canonical
from ckptsvc.storage.opening import open_store
from ckptsvc.storage.rate import Rate
from ckptsvc.storage.wrappers import Limited, Retrying, innermost
from ckptsvc.telemetry import start_logging
from ckptsvc.telemetry.logs import told

FRAME = struct.Struct("<I")
THREADS = 16
"""Requests that are executed at a time."""

IN_FLIGHT = 2
"""Saves that may have begun before the newest commit was known: as many checkpoints before that are not yet deleted,
where saves refer to others."""

NOBODYS = 0
"""The number of a message that answers no request."""

MAX_FRAME = 1 << 30
"""Largest frame in bytes."""

_LEAST_PAUSE, _LONGEST_PAUSE = 0.0005, 0.02
"""Seconds between looks at how far a rank has come with its copy."""

Note = Callable[[dict[str, Any]], None]


class Request(msgspec.Struct):
    """One thing to do."""

    id: int
    op: str
    args: dict[str, Any]


class Worker(LocalCopies):
    """Executes requests on one store; every method named `do_*` is an operation."""

    def __init__(self, settings: StoreSettings, save: SaveSettings) -> None:
        mappings = Mappings()
        self._digesting = ThreadPoolExecutor(2 * THREADS, thread_name_prefix="ckptsvc-digest")
        shards = ShardWriter(_economy(save), self._digesting, mappings.pages)
        # `fills`: what is being written -> whether it is given up
        super().__init__(Rate(None), mappings, {}, shards, lambda url: open_store(url, settings=settings))
        self._settings = settings
        self._tell: Note = lambda message: None
        self._stores: dict[str, Store] = {}
        self._lock = threading.Lock()
        self._bases: dict[str, Bases] = {}
        self._recent: dict[str, list[Ref]] = {}  # the newest that were committed here, by store
        self._expiring: dict[str, dict[str, Any] | None] = {}  # store a thread deletes in -> what it does next

    def store(self, url: str) -> Store:
        """The store of that URL, connected once, with retries."""
        with self._lock:
            if url not in self._stores:
                # Limited within: what is written again is paid for again.
                limited = Limited(open_store(url, settings=self._settings), bytes_per_second=self._rate)
                self._stores[url] = Retrying(
                    limited, attempts=self._settings.retries + 1, on_retry=lambda error: self._retried(url, error)
                )
            return self._stores[url]

    def _retried(self, url: str, error: StoreError) -> None:
        self._tell({"id": NOBODYS, "retried": [canonical(url).partition("://")[0], error.code]})

    def speaks(self, tell: Note) -> None:
        """Take the way to tell the agent what is no answer."""
        self._tell = tell

    def end(self) -> NoReturn:
        """End this process, whatever its threads are doing."""
        self._mappings.close()
        os._exit(0)

    def do_write(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Write the shard in an arena, to the store or the local disk; notes its digests as soon as they are known."""
        failpoint("before_shard")
        try:
            return self._write(args, note)
        finally:
            self._fills.pop(args["fill"], None)

    def _write(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        store = self.disk(args["disk"]) if args["disk"] else self.store(args["store"])
        driver = innermost(store)
        if isinstance(driver, Spreading):
            driver.writers = args["writers"]
        with self._mappings.pages(args["path"], args["nbytes"]) as image:
            shard = ShardImage(image, *(args[name] for name in ("nbytes", "extent", "epoch", "step", "rank")))

            def on_digests(digests: Digests) -> None:
                note({"digests": digests.tobytes()})

            ready = self._ready(args) if args["fill"] else lambda nbytes: None
            if args["disk"]:  # whole: what goes on from there must not hang on what lies elsewhere
                written = self._write_whole(store, shard, on_digests, ready)
            else:
                written = self._shards.write(
                    store, shard, path=args["path"], committed=tuple(args["committed"]), on_digests=on_digests,
                    ready=ready,
                )  # fmt: skip
        failpoint("after_shard")
        key = f"{Ref(args['epoch'], args['step']).name}/{written.name}"
        return {
            "layout": driver.layout(key) if isinstance(driver, Spreading) else None,
            "name": written.name,
            "nbytes": written.nbytes,
            "stored": written.stored,
            "verdict": written.verdict,
            "digests": written.digests.tobytes(),
            "columns": written.columns.encode(),
            "segments": encode(written.segments) if written.segments else b"",
            "held_back": self._rate.collect(),
        }

    def _write_whole(
        self, store: Store, shard: ShardImage, on_digests: Callable[[Digests], None], ready: Progress
    ) -> Written:
        return write_shard(
            store, shard.image, shard.nbytes, extent=shard.extent, epoch=shard.epoch, step=shard.step, rank=shard.rank,
            pool=self._digesting, on_digests=on_digests, ready=ready,
        )  # fmt: skip

    def expect(self, request: Request) -> None:
        """A request has come in and will be executed in its turn."""
        if "rate" in request.args:  # for whatever writes: at once, however many are before it
            self._rate.limit = request.args["rate"]
        if request.op in ("write", "drain") and request.args["fill"]:
            self._fills[request.args["fill"]] = threading.Event()

    def _ready(self, args: dict[str, Any]) -> Progress:
        """Waits until a rank has copied so much."""
        given_up = self._fills[args["fill"]]

        def ready(nbytes: int) -> None:
            pause = _LEAST_PAUSE
            while self._mappings.filled(args["path"]) < nbytes and not given_up.wait(pause):
                pause = min(1.5 * pause, _LONGEST_PAUSE)
            if given_up.is_set():  # looked at last: the arena may be another snapshot's by now
                raise SaveFailed(f"the snapshot of step {args['step']} was given up")

        return ready

    def do_cancel(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """A snapshot that is being written will not be completed."""
        given_up = self._fills.get(args["fill"])
        if given_up:
            given_up.set()
        return {}

    def do_rate(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Write at another rate: see `expect`."""
        return {}

    def do_digest(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Checksums of a snapshot in memory."""
        with self._mappings.pages(args["path"], args["nbytes"]) as image:
            return {"digests": extent_digests(image[: args["nbytes"]], args["extent"]).tobytes()}

    def do_map(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Map a new arena, beside the training."""
        self._mappings.touch(args["path"])
        return {}

    def do_unmap(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Let go of an arena that has been removed."""
        self._mappings.forget(args["path"])
        return {}

    def do_epoch(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Take the next epoch of the run."""
        store = self.store(args["store"])
        epoch = take_epoch(store, args["job"], args["attempt"], secrets.token_hex(8), now_iso())
        return {"epoch": epoch}

    def do_commit(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Commit a checkpoint."""
        failpoint("before_commit")
        store = self.store(args["store"])
        info = msgspec.convert(args["info"], IndexInfo)
        shards = [_shard(each, info.extent) for each in args["shards"]]
        bases = self._bases.setdefault(store.url, Bases())
        began, times = time.monotonic(), dict[str, float]()
        record: CommitRecord = commit_checkpoint(
            store, info, shards, args["writer"], bases, metrics=args["metrics"],
            on_index=lambda: times.update(indexed=time.monotonic() - began),
        )  # fmt: skip
        times["seconds"] = time.monotonic() - began
        failpoint("after_commit")
        if self._shards.is_incremental:  # a save which is still on its way may refer to them
            recent = [Ref(record.epoch, record.step), *self._recent.get(store.url, [])]
            self._recent[store.url] = recent[:IN_FLIGHT]
        return {"index_bytes": record.index_bytes, **times}

    def do_expire(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Delete what nothing keeps. While one thread does, others leave it what they were asked for."""
        url, gone, objects = args["store"], [], 0
        with self._lock:
            busy = url in self._expiring
            self._expiring[url] = args
        while not busy:
            with self._lock:
                wanted = self._expiring[url]
                self._expiring[url] = None
                if wanted is None:
                    del self._expiring[url]
                    break
            try:
                store, policy = self.store(url), msgspec.convert(wanted["policy"], Policy)
                needed = [Ref(wanted["epoch"], wanted["step"]), *self._recent.get(store.url, ())]
                done = expire(store, policy, needed)
            except BaseException:
                with self._lock:
                    del self._expiring[url]
                raise
            gone += [ref.name for ref in done.gone]
            objects += done.objects
        return {"gone": gone, "objects": objects}

    def do_lookup(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Is this step committed, for good?"""
        store, ref = self.store(args["store"]), Ref(args["epoch"], args["step"])
        commit = read_commit(store, ref)
        if commit is not None:
            try:
                confirm(store, ref, commit)
            except SaveFailed:
                commit = None
        return {"committed": commit is not None}

    def do_read_nodes(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """The list of nodes that have failed."""
        found = nodelist.read(Path(args["directory"]))
        return {"nodes": msgspec.to_builtins(found.nodes), "words": msgspec.to_builtins(found.words)}

    def do_keep_nodes(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Keep the list of nodes that have failed."""
        words = msgspec.convert(args["words"], dict[str, nodelist.Word])
        nodelist.keep(Path(args["directory"]), msgspec.convert(args["nodes"], dict[str, nodelist.Entry]), words)
        return {}


class Executes(Protocol):
    """What serves requests: every method named `do_*` is an operation."""

    def expect(self, request: Request) -> None:
        """A request has come in and will be executed in its turn."""

    def speaks(self, tell: Note) -> None:
        """Take the way to tell the agent what is no answer."""

    def end(self) -> NoReturn:
        """End this process."""


def serve(sock: socket.socket, worker: Executes) -> None:
    """Answer requests until the agent closes its end."""
    # A thread that computes soon lets go one that has a block to write: by default it takes 5 ms, at every call.
    sys.setswitchinterval(0.0005)
    # The table of a shard is 100,000 objects without cycles: looking through them again and again doubles the time.
    gc.set_threshold(200_000, 20, 20)
    sending = threading.Lock()

    def send(message: dict[str, Any]) -> None:
        body = msgspec.msgpack.encode(message)
        try:
            with sending:
                sock.sendall(FRAME.pack(len(body)) + body)
        except ConnectionError:  # the agent has closed its end: there is nobody to work for
            worker.end()

    worker.speaks(send)

    def execute(request: Request) -> None:
        try:
            handler = getattr(worker, f"do_{request.op}")
            result = handler(request.args, lambda note: send({"id": request.id, "note": note}))
            send({"id": request.id, "result": result})
        except CkptsvcError as error:
            send({"id": request.id, "error": [error.code, error.what, error.hint]})
        except OSError as error:
            if error.errno is None or sock.fileno() < 0:
                os._exit(1)
            send({"id": request.id, "error": ["store", f"{request.op}: {error}", ""]})
        except Exception as error:  # noqa: BLE001  an unexpected failure of one save must not end the others'
            send(
                {
                    "id": request.id,
                    "error": ["internal", f"{request.op}: {type(error).__name__}: {error}", ""],
                }
            )

    decoder = msgspec.msgpack.Decoder(Request)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="ckptsvc-io") as pool:
        while True:
            head = _receive(sock, FRAME.size)
            if head is None:
                worker.end()  # the agent is gone: a thread that hangs in the store must not keep this process
            body = _receive(sock, FRAME.unpack(head)[0])
            if body is None:
                worker.end()
            request = decoder.decode(body)
            worker.expect(request)
            if request.op in ("unmap", "cancel", "hold"):  # they must not wait for threads that a store may hold up
                execute(request)
            else:
                pool.submit(execute, request)


def _receive(sock: socket.socket, nbytes: int) -> bytearray | None:
    if nbytes > MAX_FRAME:
        return None
    buffer = bytearray(nbytes)
    view = memoryview(buffer)
    while view:
        try:
            got = sock.recv_into(view)
        except ConnectionError:  # the agent was killed
            return None
        if got == 0:
            return None
        view = view[got:]
    return buffer


def _economy(save: SaveSettings) -> Economy:
    """What may be done to write less; most cores belong to the training."""
    threads = max((os.cpu_count() or 1) // 8, 1)
    return Economy(save.incremental, save.full_every, save.compression, save.compression_level, threads)


def _shard(told: dict[str, Any], extent: int) -> ShardRecord:
    """A shard to be committed, as its writer has told."""
    segments = decode(told["segments"], told["nbytes"], extent) if told["segments"] else None
    columns = Columns.decode(told["columns"])
    return ShardRecord(told["name"], told["rank"], told["nbytes"], _digests(told["digests"]), columns, segments)


def _digests(data: bytes) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.frombuffer(data, dtype="<u8")


if __name__ == "__main__":
    found = heard(os.environ)
    start_logging(found.log.format, found.log.level, **told())
    serve(socket.socket(fileno=int(sys.argv[1])), Worker(found.store, found.save))
