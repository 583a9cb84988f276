"""The courier: the process of an agent that moves snapshots between nodes, and makes and uses parity.

It serves the other agents' couriers (agent.transfer), and does for its own what takes time: `copy`, `guard`, `rebuild`.
Nothing is written but the arenas that its agent names, and no arena counts before its agent has heard that all of it
matched its checksums. It touches no store, so one that hangs does not keep snapshots from other nodes.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import msgspec

from ckptsvc.agent.transfer import File, Listener, Pace, Piece, Reader, Tickets, check, open_arena, runs
from ckptsvc.agent.worker import Note, Request, serve
from ckptsvc.errors import InvalidInput, StoreUnavailable
from ckptsvc.format.checksum import extent_digests
from ckptsvc.pipeline.arena import TAIL, Mappings
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.pipeline.parity import Stripes, Sum, as_bytes, coefficient, zeros


class Origin(msgspec.Struct, frozen=True):
    """A connection to be made, and what can be read over it: shards by rank, then maybe a part of a parity."""

    address: str
    ticket: str
    key: str
    pieces: list[tuple[int, int, int, bytes]]  # Piece

    @property
    def files(self) -> list[Piece]:
        """What can be read."""
        return [Piece(*piece) for piece in self.pieces]


class Target(msgspec.Struct, frozen=True):
    """An arena to fill with a piece of an origin."""

    path: str
    number: int


class Courier:
    """Executes requests of one agent; every method named `do_*` is an operation.

    Args:
        host: where to listen for other couriers.
        rate: bytes per second that may be read from them; 0: as many as come.
    """

    def __init__(self, host: str, rate: float) -> None:
        self._host, self._tickets, self._pace = host, Tickets(), Pace(rate)
        self._listener: Listener | None = None
        self._mappings = Mappings()

    def expect(self, request: Request) -> None:
        """There is nothing to prepare."""

    def end(self) -> NoReturn:
        """End this process, whatever its threads are doing."""
        os._exit(0)

    def do_admit(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Give a ticket out; returns the port at which it can be shown."""
        if self._listener is None:
            try:
                self._listener = Listener(self._host, self._tickets)
            except OSError as error:
                raise StoreUnavailable(f"cannot listen at {self._host} for other nodes: {error.strerror}") from error
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
        targets = msgspec.convert(args["targets"], list[Target])
        files = {piece.number: piece for piece in origin.files}
        with Reader(origin.address, origin.ticket, origin.key) as reader:
            for target in targets:
                piece = files[target.number]
                reader.ask(piece.number, 0, piece.nbytes)
                with _arena(target.path, piece.nbytes) as view:
                    for extent in range(piece.extents):
                        block = view[extent * piece.extent : min((extent + 1) * piece.extent, piece.nbytes)]
                        self._take(reader, block, piece, extent)
        return {"bytes": reader.nbytes}

    def _take(self, reader: Reader, block: memoryview, piece: Piece, extent: int) -> None:
        self._pace.wait(len(block))
        reader.take(block)
        check(block, piece, extent, "what another node has sent")
        failpoint("in_transfer")

    # ---- parity ------------------------------------------------------------------------------------------------------

    def do_guard(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Make one node's part of the parity of a group, from what the others hold."""
        stripes, extent, keeper = Stripes(*args["stripes"]), args["extent"], args["keeper"]
        origins = {node: msgspec.convert(origin, Origin) for node, origin in enumerate(args["origins"]) if origin}
        size = stripes.chunk * extent
        nbytes = stripes.losses * size
        with contextlib.ExitStack() as stack:
            readers = {n: stack.enter_context(Reader(o.address, o.ticket, o.key)) for n, o in origins.items()}
            view = stack.enter_context(_arena(args["path"], nbytes))
            for line, stripe in enumerate(stripes.stripes_of(keeper)):
                rows = [
                    _Row(readers[node], origins[node].files, stripes.first(node, stripe), stripes.chunk, extent,
                         coefficient(line, node))
                    for node in stripes.data(stripe)
                ]  # fmt: skip
                self._sums(rows, stripes.chunk, extent, _Placed(view[line * size : (line + 1) * size], extent))
            digests = extent_digests(view[:nbytes], extent).tobytes()
        return {"digests": digests, "bytes": sum(reader.nbytes for reader in readers.values())}

    def do_rebuild(self, args: dict[str, Any], note: Note) -> dict[str, Any]:
        """Fill arenas with the shards of lost nodes, from what is left of the group; checked against their sums."""
        stripes, extent = Stripes(*args["stripes"]), args["extent"]
        origins = {node: msgspec.convert(origin, Origin) for node, origin in enumerate(args["origins"]) if origin}
        lost = set(range(stripes.nodes)) - origins.keys()
        with contextlib.ExitStack() as stack:
            readers = {n: stack.enter_context(Reader(o.address, o.ticket, o.key)) for n, o in origins.items()}
            for number, pieces, paths in args["lost"]:
                row = [Piece(*piece) for piece in pieces]
                views = [
                    stack.enter_context(_arena(path, piece.nbytes)) if path else None
                    for path, piece in zip(paths, row, strict=True)
                ]
                for stripe in stripes.stripes_with(number):
                    self._rebuild_chunk(stripes, extent, (number, stripe), lost, (readers, origins), (row, views))
        return {"bytes": sum(reader.nbytes for reader in readers.values())}

    def _rebuild_chunk(
        self,
        stripes: Stripes,
        extent: int,
        chunk: tuple[int, int],
        lost: set[int],
        there: tuple[dict[int, Reader], dict[int, Origin]],
        wanted: tuple[Sequence[Piece], Sequence[memoryview | None]],
    ) -> None:
        """Those parts of a lost node's chunk in one stripe that lie in shards that are wanted here."""
        (number, stripe), (readers, origins), (row, views) = chunk, there, wanted
        start = stripes.first(number, stripe)
        lines, nodes = stripes.recipe(stripe, number, lost)
        for piece, first, count in runs(row, start, stripes.chunk):
            view = views[piece.number]
            if view is None:
                continue
            offset = sum(p.extents for p in row[: piece.number]) + first - start  # in the chunk
            rows = [
                _Row(
                    readers[node], origins[node].files[:-1], stripes.first(node, stripe) + offset, count, extent, factor
                )
                for node, factor in nodes.items()
            ]
            for line, factor in lines.items():
                keeper = stripes.keepers(stripe)[line]
                rows.append(_Row(readers[keeper], origins[keeper].files[-1:], line * stripes.chunk + offset, count,
                    extent, factor))  # fmt: skip
            self._sums(rows, count, extent, _Checked(view, piece, first))

    def _sums(self, rows: list[_Row], count: int, extent: int, into: Callable[[int, memoryview], None]) -> None:
        """Add rows of extents to each other; all are read beside each other, so none can be far ahead."""
        buffer, total, sums = memoryview(bytearray(extent)), zeros(extent), Sum()
        incoming = [(row, row.extents()) for row in rows]
        for number in range(count):
            total[:] = 0
            for row, extents in incoming:
                length, piece, which = next(extents)
                if piece is not None:
                    self._take(row.reader, buffer[:length], piece, which)
                    sums.add(total, as_bytes(buffer[:length]), row.factor)
            into(number, total.data)


class _Row:
    """Extents of one node, asked for at once and read one after the other.

    Args:
        reader: the connection.
        pieces: what the node's row of extents is made of.
        first, count: which of them.
        extent: their bytes.
        factor: what they are multiplied by.
    """

    def __init__(
        self, reader: Reader, pieces: Sequence[Piece], first: int, count: int, extent: int, factor: int
    ) -> None:
        self.reader, self.factor = reader, factor
        self._pieces, self._first, self._count, self._extent = pieces, first, count, extent
        for piece, start, many in runs(pieces, first, count):
            reader.ask(piece.number, start * extent, min((start + many) * extent, piece.nbytes) - start * extent)

    def extents(self) -> Iterator[tuple[int, Piece | None, int]]:
        """(bytes, piece, extent in it) of each; there is no piece, and nothing to read, where the row has ended."""
        for piece, start, many in runs(self._pieces, self._first, self._count):
            for which in range(start, start + many):
                yield min(self._extent, piece.nbytes - which * self._extent), piece, which
        while True:
            yield 0, None, 0


class _Placed:
    """Takes extents one after the other."""

    def __init__(self, view: memoryview, extent: int) -> None:
        self._view, self._extent = view, extent

    def __call__(self, number: int, block: memoryview) -> None:
        start = number * self._extent
        self._view[start : start + self._extent] = block


class _Checked:
    """Takes extents of a piece from some on, and compares each with its checksum."""

    def __init__(self, view: memoryview, piece: Piece, first: int) -> None:
        self._view, self._piece, self._first = view, piece, first

    def __call__(self, number: int, block: memoryview) -> None:
        piece, which = self._piece, self._first + number
        start = which * piece.extent
        stop = min(start + piece.extent, piece.nbytes)
        check(block[: stop - start], piece, which, "what was rebuilt")
        self._view[start:stop] = block[: stop - start]


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
    yield memoryview(memory)[:nbytes]  # unmapped with the last view of it


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), Courier(sys.argv[2], float(sys.argv[3])))
