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

RINGS = 4
"""Tries in that time, one more as long as those before it are silent. What is lost of one the kernel repeats after a
second, too late: one packet that a network drops, as any may, would be a lost host."""


async def hang_up(address: str) -> tuple[asyncio.Server, int]:
    """Hang up a doorbell; returns what keeps it there, and its port.

    While this process is frozen the kernel answers, and nobody takes what it has answered: as many as it will keep.
    """

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(answer, address, 0, family=_family(address), backlog=socket.SOMAXCONN)
    return server, int(server.sockets[0].getsockname()[1])


async def ring(address: str, port: int) -> Answer:
    """Whether there is still somebody at the door; the first try that is answered decides.

    Raises:
        OSError: this process has no descriptors left, which says nothing of the other.
    """
    host = await _numeric(address, port)
    if not host:
        return Answer.SILENT
    pause = RING_TIMEOUT / RINGS
    tries = [asyncio.ensure_future(_try(host, port, 0.0, RING_TIMEOUT))]
    try:
        await asyncio.wait(tries, timeout=pause)
        # Nearly always that was enough, and there may be ten thousand doors to ring at.
        if not tries[0].done() or tries[0].result() is Answer.SILENT:
            later = range(1, RINGS)
            tries += [asyncio.ensure_future(_try(host, port, (n - 1) * pause, RING_TIMEOUT - n * pause)) for n in later]
        for answered in asyncio.as_completed(tries):
            answer = await answered
            if answer is not Answer.SILENT:
                return answer
    finally:
        for each in tries:
            each.cancel()
        await asyncio.gather(*tries, return_exceptions=True)
    return Answer.SILENT


async def _numeric(address: str, port: int) -> str:
    """The address without a name, which takes no time to look up if it is one already; "" if nobody knows the name."""
    with contextlib.suppress(OSError, UnicodeError):  # the latter: no name of a host has parts of that length
        socket.getaddrinfo(address, port, flags=socket.AI_NUMERICHOST)
        return address
    with contextlib.suppress(OSError, UnicodeError):  # a timeout too
        async with asyncio.timeout(RING_TIMEOUT):
            loop = asyncio.get_running_loop()
            found = await loop.getaddrinfo(address, port, family=_family(address), type=socket.SOCK_STREAM)
            return str(found[0][4][0])
    return ""


async def _try(host: str, port: int, delay: float, patience: float) -> Answer:
    await asyncio.sleep(delay)
    with socket.socket(_family(host), socket.SOCK_STREAM) as door:
        door.setblocking(False)
        try:
            async with asyncio.timeout(patience):
                await asyncio.get_running_loop().sock_connect(door, (host, port))
        except ConnectionRefusedError:
            return Answer.GONE
        except TimeoutError:
            return _heard(door)
        except OSError:  # no route
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
