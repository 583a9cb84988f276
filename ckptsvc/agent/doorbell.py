"""A port that answers for as long as a launcher lives, and the look after it.

Nothing is read or written there: the connection itself is the answer, and the kernel gives it, for a process that is
busy or frozen too. A stranger learns that something listens, and no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket

from ckptsvc.control.effects import Answer

RING_TIMEOUT = 0.8
"""Seconds to wait for an answer: with the pings of rpc.channel, a host that is cut off is known within three."""


async def hang_up(address: str) -> tuple[asyncio.Server, int]:
    """Hang up a doorbell; returns what keeps it there, and its port."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, address, 0, family=_family(address), backlog=64)
    return server, int(server.sockets[0].getsockname()[1])


async def ring(address: str, port: int) -> Answer:
    """Whether there is still somebody at the door."""
    connect = asyncio.get_running_loop().sock_connect
    with socket.socket(_family(address), socket.SOCK_STREAM) as door:
        door.setblocking(False)
        try:
            await asyncio.wait_for(connect(door, (address, port)), RING_TIMEOUT)
        except ConnectionRefusedError:
            return Answer.GONE
        except TimeoutError:
            return _heard(door)
        except OSError:  # no route, no name
            return Answer.SILENT
    return Answer.UP


def _heard(door: socket.socket) -> Answer:
    """What the kernel knows: a process that was too busy to look in time must not take that for silence."""
    waiting = select.poll()
    waiting.register(door, select.POLLOUT)
    if not waiting.poll(0):
        return Answer.SILENT
    error = door.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    return {0: Answer.UP, errno.ECONNREFUSED: Answer.GONE}.get(error, Answer.SILENT)


def _family(address: str) -> socket.AddressFamily:
    """One family, as for the ports of rendezvous stores: a host name may stand for several, each with its own port."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET
