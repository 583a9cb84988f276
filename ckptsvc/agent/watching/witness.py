"""The agent's end of a witness connection: ask a rank's process where it is, and do not wait long."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Literal

import msgspec

from ckptsvc.rpc.identity import MAX_PACKET
from ckptsvc.rpc.testimony import Answer, Question


class Witness:
    """A process that answers questions about itself as long as one of its threads can run.

    Args:
        sock: non-blocking; the process's credentials and token have been checked.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._turn = asyncio.Lock()
        self._asked = 0
        self._closed = asyncio.Event()

    async def ask(self, what: Literal["stacks", "collectives"], seconds: float) -> Answer:
        """Ask "stacks" or "collectives".

        Raises:
            TimeoutError: no answer within so many seconds.
            ConnectionError: the process has ended, or closed its session.
            ValueError: the answer cannot be understood.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(seconds), self._turn:
            if self._closed.is_set():
                raise ConnectionError("the connection has ended")
            self._asked += 1
            await loop.sock_sendall(self._sock, msgspec.json.encode(Question(self._asked, what)))
            while True:
                packet = await loop.sock_recv(self._sock, MAX_PACKET)
                if not packet:
                    self.close()
                    raise ConnectionError("the connection has ended")
                answer = msgspec.json.decode(packet, type=Answer)
                if answer.id == self._asked:  # else a late one
                    return answer

    def close(self) -> None:
        """No more questions: the process's thread ends."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)  # wakes a question that is being asked

    async def closed(self) -> None:
        """Wait for `close`, and until nobody uses the socket any more."""
        await self._closed.wait()
        async with self._turn:
            pass
