"""The courier: the process of an agent that moves snapshots between nodes, and makes and uses parity.

It serves the other agents' couriers (see `transfer`), and does for its own what takes time: `copy`, `guard`, `rebuild`.
Nothing is written but the arenas that its agent names, and no arena counts before its agent has heard that all of it
matched its checksums. It touches no store, so one that hangs does not keep snapshots from other nodes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

import msgspec

from ckptsvc.agent.tiers.transfer import (
    MAX_CONNECTIONS,
    MAX_STREAMS,
    File,
    Listener,
    Pace,
    Piece,
    Reader,
    Tickets,
    check,
    matches,
    open_arena,
    runs,
)
from ckptsvc.agent.worker.worker import Note, Request, serve
from ckptsvc.errors import InvalidInput, StoreUnavailable
from ckptsvc.format.checksum import extent_digests
from ckptsvc.pipeline.arena import TAIL, Mappings
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.parity import Powers, Stripes, Sum, as_bytes, zeros
from ckptsvc.rpc.tls import Shown

_MADV_POPULATE_WRITE = 23
_MAPPED_AT_ONCE = 16 << 20


class Origin(msgspec.Struct, frozen=True):
    """A connection to be made, and what can be read over it: shards by rank, then maybe a part of a parity."""

    address: str
    ticket: str
    key: str
    pieces: list[tuple[int, int, int, bytes]]  # Piece
    shown: Shown | None = None

    @property
    def files(self) -> list[Piece]:
        """What can be read."""
        return [Piece(*piece) for piece in self.pieces]


class Target(msgspec.Struct, frozen=True):
    """An arena to fill with a piece of an origin; so many bytes in it may be right already."""

    path: str
    number: int
    filled: int = 0


class Courier:
    """Executes requests of one agent; every method named `do_*` is an operation.

    Args:
        host: where to listen for other couriers.
        rate: bytes per second that may be read from them; 0: as many as come. A rebuild is not held back: the training
            stands still for it.
        streams: connections, and threads, for one transfer; for a rebuild there are as many as cores.
    """

    def __init__(self, host: str, rate: float, streams: int) -> None:
        self._host, self._tickets, self._pace = host, Tickets(), Pace(rate)
        self._streams = min(streams, MAX_STREAMS)
        self._rebuilders = min(max(streams, os.cpu_count() or 1), MAX_STREAMS)
        self._listener: Listener | None = None
        self._mappings = Mappings()

    def expect(self, request: Request) -> None:
        """There is nothing to prepare."""

    def speaks(self, tell: Note) -> None:
        """There is nothing to tell but answers."""

    def end(self) -> NoReturn:
        """End this process, whatever its threads are doing."""
        os._exit(0)

    def do_admit(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Give a ticket out; returns the port at which it can be shown."""
        shown = msgspec.convert(args["shown"], Shown | None)
        if self._listener is None:
            try:
                self._listener = Listener(self._host, self._tickets, shown)
            except OSError as error:
                raise StoreUnavailable(f"cannot listen at {self._host} for other nodes: {error.strerror}") from error
        self._listener.shown = shown
        self._tickets.admit(args["ticket"], args["key"], [File(path, nbytes) for path, nbytes in args["files"]])
        return {"port": self._listener.port}

    def do_hold(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Let the training have the memory to itself, or go on."""
        self._pace.hold(on=args["on"])
        return {}

    def do_digest(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Checksums of a snapshot in memory."""
        with self._mappings.pages(args["path"], args["nbytes"]) as image:
            found = extent_digests(image[: args["nbytes"]], args["extent"]).tobytes()
        self._mappings.forget(args["path"])
        return {"digests": found}

    # ---- copies ------------------------------------------------------------------------------------------------------

    def do_copy(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Fill arenas with the pieces of one origin."""
        origin = msgspec.convert(args["origin"], Origin)
        files = {piece.number: piece for piece in origin.files}
        with contextlib.ExitStack() as stack:
            filled = [
                (
                    files[target.number],
                    stack.enter_context(_arena(target.path, files[target.number].nbytes)),
                    target.filled,
                )
                for target in msgspec.convert(args["targets"], list[Target])
            ]

            def copy(readers: dict[int, Reader], share: Share) -> None:
                for piece, view, known in filled:
                    for first, count in _lacking(piece, view[:known], *share(0, piece.extents)):
                        for _ in _Row(readers[0], [piece], first, count, piece.extent).blocks(self._take, view):
                            pass

            return {"bytes": self._stream({0: origin}, copy, self._streams)}

    def _take(self, reader: Reader, block: memoryview, piece: Piece, extent: int) -> None:
        self._pace.wait(len(block))
        self._take_at_once(reader, block, piece, extent)

    def _take_at_once(self, reader: Reader, block: memoryview, piece: Piece, extent: int) -> None:
        reader.take(block)
        check(block, piece, extent, "what another node has sent")
        failpoint("in_transfer")

    def _stream(
        self, origins: dict[int, Origin], work: Callable[[dict[int, Reader], Share], None], threads: int
    ) -> int:
        """Do work in several threads, each with its own connections and its share of it; returns the bytes read."""
        # All nodes of a group read from each other at once, and each serves only so many connections.
        streams = max(min(threads, MAX_CONNECTIONS // (2 * len(origins))), 1)

        def stream(number: int) -> int:
            with contextlib.ExitStack() as stack:
                readers = {
                    number: stack.enter_context(Reader(origin.address, origin.ticket, origin.key, origin.shown))
                    for number, origin in origins.items()
                }
                work(readers, functools.partial(_share, number, streams))
                return sum(reader.nbytes for reader in readers.values())

        with ThreadPoolExecutor(streams, thread_name_prefix="ckptsvc-stream") as pool:
            return sum(pool.map(stream, range(streams)))

    # ---- parity ------------------------------------------------------------------------------------------------------

    def do_guard(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Make one node's part of the parity of a group, from what the others hold."""
        stripes, extent, keeper = Stripes(*args["stripes"]), args["extent"], args["keeper"]
        origins = {node: msgspec.convert(origin, Origin) for node, origin in enumerate(args["origins"]) if origin}
        size = stripes.chunk * extent
        nbytes = stripes.losses * size
        with _arena(args["path"], nbytes) as view:

            def guard(readers: dict[int, Reader], share: Share) -> None:
                offset, count = share(0, stripes.chunk)
                for line, stripe in enumerate(stripes.stripes_of(keeper)):
                    rows = [
                        (_Row(readers[node], origins[node].files, stripes.first(node, stripe) + offset, count, extent),
                         stripes.factor(line, node))
                        for node in stripes.data(stripe)
                    ]  # fmt: skip
                    start = line * size + offset * extent
                    total = Total(rows, Sum(stripes.prime, extent), extent)
                    for _ in total.put(view[start : start + count * extent], self._take):
                        pass

            nread = self._stream(origins, guard, self._streams)
            return {"digests": extent_digests(view, extent).tobytes(), "bytes": nread}

    def do_rebuild(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Fill arenas with the shards of lost nodes, from what is left of the group; checked against their sums."""
        group = Group(
            Stripes(*args["stripes"]),
            args["extent"],
            {node: msgspec.convert(origin, Origin) for node, origin in enumerate(args["origins"]) if origin},
        )
        with contextlib.ExitStack() as stack:
            wanted = []
            for number, pieces, paths in args["lost"]:
                row = [Piece(*piece) for piece in pieces]
                views = [
                    stack.enter_context(_arena(path, piece.nbytes)) if path else None
                    for path, piece in zip(paths, row, strict=True)
                ]
                wanted.append((number, row, views))

            def rebuild(readers: dict[int, Reader], share: Share) -> None:
                for number, row, views in wanted:
                    for stripe in group.stripes.stripes_with(number):
                        for piece, first, count in runs(row, group.stripes.first(number, stripe), group.stripes.chunk):
                            view = views[piece.number]
                            if view is not None:
                                before = sum(p.extents for p in row[: piece.number])
                                part = piece, *share(first, count)
                                self._rebuild(group.total(readers, number, stripe, before, part), part, view)

            return {"bytes": self._stream(group.origins, rebuild, self._rebuilders)}

    def _rebuild(self, total: Total, part: tuple[Piece, int, int], view: memoryview) -> None:
        """Some extents of a lost shard."""
        piece, first, count = part
        into = view[first * piece.extent : min((first + count) * piece.extent, piece.nbytes)]
        for number, block in enumerate(total.put(into, self._take_at_once)):
            check(block, piece, first + number, "what was rebuilt")


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of which some nodes are lost, and the origins of those that are left."""

    stripes: Stripes
    extent: int
    origins: dict[int, Origin]

    def total(
        self, readers: dict[int, Reader], node: int, stripe: int, before: int, part: tuple[Piece, int, int]
    ) -> Total:
        """What some extents of a lost node's shard, after so many of earlier shards, are the sum of."""
        _, first, count = part
        recipe = self.stripes.recipe(stripe, node, set(range(self.stripes.nodes)) - self.origins.keys())
        offset = before + first - self.stripes.first(node, stripe)  # in the chunk
        rows = []
        for other, factor in recipe.nodes.items():
            start = self.stripes.first(other, stripe) + offset
            rows.append((_Row(readers[other], self.origins[other].files[:-1], start, count, self.extent), factor))
        for line, factor in recipe.lines.items():
            keeper = self.stripes.keepers(stripe)[line]
            start = line * self.stripes.chunk + offset
            rows.append((_Row(readers[keeper], self.origins[keeper].files[-1:], start, count, self.extent), factor))
        return Total(rows, Sum(self.stripes.prime, self.extent), self.extent, recipe.divisor)


class _Row:
    """Extents of one node, asked for at once and read one after the other.

    Args:
        reader: the connection.
        pieces: what the node's row of extents is made of.
        first, count: which of them.
        extent: their bytes.
    """

    def __init__(self, reader: Reader, pieces: Sequence[Piece], first: int, count: int, extent: int) -> None:
        self._reader, self._extent = reader, extent
        self._runs = list(runs(pieces, first, count))
        for piece, start, many in self._runs:
            reader.ask(piece.number, start * extent, min((start + many) * extent, piece.nbytes) - start * extent)

    def blocks(self, take: Take, into: memoryview | None = None) -> Iterator[memoryview]:
        """Read them, each where it belongs in `into`, a whole piece, or one after the other into the same memory.

        Into that memory whole extents are read, beyond the end of a piece zeros; beyond the end of the row there is
        nothing, as often as anybody asks.
        """
        buffer = memoryview(bytearray(self._extent)) if into is None else into
        for piece, start, many in self._runs:
            for which in range(start, start + many):
                low = which * self._extent
                length = min(self._extent, piece.nbytes - low)
                block = buffer[:length] if into is None else into[low : low + length]
                take(self._reader, block, piece, which)
                if into is None and length < self._extent:
                    buffer[length:] = bytes(self._extent - length)
                yield buffer if into is None else block
        while into is None:
            yield buffer[:0]


@dataclasses.dataclass(frozen=True)
class Total:
    """Rows of extents that are to be added up, what each is multiplied by, and what the sum is divided by."""

    rows: list[tuple[_Row, Powers]]
    sums: Sum
    extent: int
    divisor: int = 0

    def put(self, into: memoryview, take: Take) -> Iterator[memoryview]:
        """Fill memory with the sums, extent by extent; all rows are read beside each other, so none is far ahead."""
        whole = zeros(self.extent)
        incoming = [(row.blocks(take), factor) for row, factor in self.rows]
        for start in range(0, len(into), self.extent):
            target = into[start : start + self.extent]
            # Beyond the end of a shard there is nothing to write to; what is added up there is zero, if all is right.
            total = as_bytes(target) if len(target) == self.extent else whole
            self.sums.put(total, [(as_bytes(next(blocks)), factor) for blocks, factor in incoming], self.divisor)
            if total is whole:
                target[:] = whole.data[: len(target)]
            yield target


Take = Callable[[Reader, memoryview, Piece, int], None]
"""Reads an extent of a piece."""

Share = Callable[[int, int], tuple[int, int]]
"""The part of (first, count) that one of several threads does."""


def _share(number: int, of: int, first: int, count: int) -> tuple[int, int]:
    low, high = count * number // of, count * (number + 1) // of
    return first + low, high - low


def _lacking(piece: Piece, known: memoryview, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Of so many extents of a piece, the runs that `known`, some of its first bytes, has not or has otherwise."""
    start = first
    for extent in range(first, first + count):
        stop = min((extent + 1) * piece.extent, piece.nbytes)
        if stop <= len(known) and matches(known[extent * piece.extent : stop], piece, extent):
            if start < extent:
                yield start, extent - start
            start = extent + 1
    if start < first + count:
        yield start, first + count - start


@contextlib.contextmanager
def _arena(path: str, nbytes: int) -> Iterator[memoryview]:
    """An arena, to be written to."""
    fd = open_arena(path)
    try:
        size = os.fstat(fd).st_size - TAIL
        if not 0 < nbytes <= size:
            raise InvalidInput(f"{path} has {size} bytes; {nbytes} are to be put there")
        memory = mmap.mmap(fd, size + TAIL)
    finally:
        os.close(fd)
    for start in range(0, nbytes, _MAPPED_AT_ONCE):  # page by page, as they are written, it costs twice as much
        with contextlib.suppress(OSError):  # a kernel before 5.14
            memory.madvise(_MADV_POPULATE_WRITE, start, min(_MAPPED_AT_ONCE, size + TAIL - start))
    yield memoryview(memory)[:nbytes]  # unmapped with the last view of it


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Courier(sys.argv[2], float(sys.argv[3]), int(sys.argv[4])))
