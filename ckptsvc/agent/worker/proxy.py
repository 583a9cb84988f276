"""The agent's side of an I/O worker: starts it, sends requests, starts it again when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from ckptsvc.errors import BY_CODE, CkptsvcError, StoreUnavailable
from ckptsvc.telemetry.logs import ABOUT, told

log = logging.getLogger("ckptsvc.agent")

_FRAME = struct.Struct("<I")
_RESTARTS = 3
"""How often one request survives the death of the worker."""

_LEAVE_PATIENCE = 0.2
"""Seconds a worker has to let its memory go before it is killed."""

_END_PATIENCE = 2.0
"""Seconds to wait for a killed worker to end."""

Note = Callable[[dict[str, Any]], None]


class WorkerDied(Exception):
    """The worker process ended under a request."""


class WorkerProxy:
    """One worker process; requests may run concurrently.

    Args:
        job: whose.
        module, arguments: the program that it runs.
        environ: added to its environment.

    Attributes:
        on_retry: called with the scheme of a store and the code of the error when a request to it is tried again.
    """

    def __init__(
        self,
        job: str,
        module: str = "ckptsvc.agent.worker.worker",
        arguments: tuple[str, ...] = (),
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self._environ: Mapping[str, str] = {} if environ is None else environ
        self.job, self._module, self._arguments = job, module, arguments
        self._what = f"the I/O worker of job {job}" if module == "ckptsvc.agent.worker.worker" else f"the {job}"
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._reader_task: asyncio.Task[None] | None = None
        self._pending: dict[int, tuple[asyncio.Future[dict[str, Any]], Note | None]] = {}
        self._ids = itertools.count(1)
        self._starting = asyncio.Lock()
        self._closed = False
        self.on_retry: Callable[[str, str], None] = lambda scheme, code: None

    async def call(self, op: str, args: dict[str, Any], on_note: Note | None = None) -> dict[str, Any]:
        """Run one operation in the worker.

        Operations may be repeated: a request whose worker dies is sent again to a new one.

        Raises:
            CkptsvcError: what the operation raised.
            StoreUnavailable: the worker died again and again, or has been closed.
        """
        for _ in range(_RESTARTS):
            writer = await self._ensure()
            number = next(self._ids)
            future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
            self._pending[number] = (future, on_note)
            body = msgspec.msgpack.encode({"id": number, "op": op, "args": args})
            writer.write(_FRAME.pack(len(body)) + body)
            try:
                return await future
            except WorkerDied:
                if self._closed:
                    raise StoreUnavailable(f"{self._what} has been closed") from None
                log.warning("%s died during %s; starting another", self._what, op)
            finally:
                self._pending.pop(number, None)
        raise StoreUnavailable(f"{self._what} died {_RESTARTS} times during {op}")

    async def tell(self, op: str, args: dict[str, Any]) -> None:
        """Run one operation that nobody waits for: that it failed is only logged."""
        try:
            await self.call(op, args)
        except (CkptsvcError, OSError) as error:
            log.debug("%s did not %s: %s", self._what, op, error)

    async def close(self) -> None:
        """End the worker; what it is doing is lost."""
        self._closed = True
        if self._reader_task:
            self._reader_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader_task
        if self._writer:
            self._writer.close()
        for future, _ in list(self._pending.values()):
            if not future.done():
                future.set_exception(WorkerDied())
        if self._process:
            await _ended(self._process, _LEAVE_PATIENCE)
            self._process.kill()
            # A process that hangs in a dead file system does not end of SIGKILL: do not wait for it.
            await _ended(self._process, _END_PATIENCE)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._writer is not None

    async def _ensure(self) -> asyncio.StreamWriter:
        async with self._starting:
            if self._closed:
                raise StoreUnavailable(f"{self._what} has been closed")
            if self._writer is not None:
                return self._writer
            try:
                ours, theirs = socket.socketpair()
            except OSError as error:
                raise StoreUnavailable(f"{self._what} could not be started: {error}") from error
            command = [sys.executable, "-P", "-m", self._module, str(theirs.fileno()), *self._arguments]
            try:
                self._process = subprocess.Popen(  # noqa: ASYNC220  exec of a known file: bounded and short
                    command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=self._environment()
                )
            except OSError as error:
                ours.close()
                raise StoreUnavailable(f"{self._what} could not be started: {error}") from error
            finally:
                theirs.close()
            try:
                reader, self._writer = await asyncio.open_connection(sock=ours)
            except BaseException:
                ours.close()  # the process sees it, and ends
                raise
            self._reader_task = asyncio.create_task(self._read(reader, self._process))
            return self._writer

    def _environment(self) -> dict[str, str]:
        """This process's environment; in the log, the worker speaks of its job."""
        about = told()
        if self._module == "ckptsvc.agent.worker.worker":
            about["job"] = self.job
        return {**os.environ, **self._environ, ABOUT: json.dumps(about)}

    async def _read(self, reader: asyncio.StreamReader, process: subprocess.Popen[bytes]) -> None:
        try:
            while True:
                (nbytes,) = _FRAME.unpack(await reader.readexactly(_FRAME.size))
                self._dispatch(msgspec.msgpack.decode(await reader.readexactly(nbytes)))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer, self._writer = self._writer, None
            if writer is not None:
                writer.close()
            await asyncio.get_running_loop().run_in_executor(None, process.wait)
            for future, _ in list(self._pending.values()):
                if not future.done():
                    future.set_exception(WorkerDied())

    def _dispatch(self, message: dict[str, Any]) -> None:
        if "retried" in message:
            self.on_retry(*message["retried"])
        entry = self._pending.get(message["id"])
        if entry is None:
            return
        future, on_note = entry
        if "note" in message:
            if on_note:
                on_note(message["note"])
        elif future.done():
            return
        elif "error" in message:
            code, what, hint = message["error"]
            future.set_exception(BY_CODE.get(code, CkptsvcError)(what, hint=hint))
        else:
            future.set_result(message["result"])


async def _ended(process: subprocess.Popen[bytes], patience: float) -> None:
    deadline = time.monotonic() + patience
    while process.poll() is None and time.monotonic() < deadline:  # noqa: ASYNC110  a process has no event
        await asyncio.sleep(0.01)
