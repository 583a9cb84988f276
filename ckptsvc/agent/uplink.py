"""From an agent to the coordinator of a job: in the same process, or over a stream that is kept up for ever.

What is reported while the stream is down is dropped: on connecting, the node reports everything it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Protocol

import grpc
import grpc.aio

from ckptsvc.agent.bandwidth import SECONDS, measure
from ckptsvc.agent.runner import CoordinatorShell
from ckptsvc.errors import AgentUnavailable
from ckptsvc.rpc.channel import KEEPALIVE, OPTIONS, error_of
from ckptsvc.rpc.secret import SECRET_KEY
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

log = logging.getLogger("ckptsvc.agent")

RECONNECT = 0.3
"""Seconds between attempts to reach a coordinator."""


class Uplink(Protocol):
    """The way to one coordinator."""

    @property
    def is_connected(self) -> bool:
        """Whether a coordinator hears what is reported."""

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator; never blocks."""

    async def list_complete(self, job: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of a job in memory, newest first."""

    async def measure(self) -> float:
        """Bytes per second to the coordinator's node and back (agent.bandwidth); 0.0 where that is this one."""

    async def close(self) -> None:
        """Stop."""


class LocalUplink:
    """The coordinator is in this very process."""

    def __init__(self, node: str, shell: CoordinatorShell, on_order: Callable[[pb.Order], None]) -> None:
        self._node, self._shell = node, shell
        loop = asyncio.get_running_loop()
        # Not at once: an order must not change what its cause is still working on.
        shell.attend(node, lambda order: (loop.call_soon(on_order, order), None)[1])

    @property
    def is_connected(self) -> bool:
        """It always is."""
        return True

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator."""
        self._shell.report(self._node, report)

    async def list_complete(self, job: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of a job."""
        return self._shell.list_complete(job)

    async def measure(self) -> float:
        """There is no way to measure."""
        return 0.0

    async def close(self) -> None:
        """Nothing to do."""


class RemoteUplink:
    """The coordinator is in another agent.

    `hello` says who calls, and for which term of which job. `resync` yields, on every connection, the reports that
    rebuild what the coordinator must know of this node.
    """

    def __init__(
        self,
        hello: pb.AgentHello,
        address: str,
        on_order: Callable[[pb.Order], None],
        resync: Callable[[], Iterable[pb.Report]],
        secret: str,
    ) -> None:
        self._metadata = ((SECRET_KEY, secret),)
        self._hello, self._address, self._on_order, self._resync = hello, address, on_order, resync
        self._queue: asyncio.Queue[pb.Report | None] | None = None
        self._channel = grpc.aio.insecure_channel(address, options=[*OPTIONS, *KEEPALIVE])
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)
        self._task = asyncio.ensure_future(self._run())

    @property
    def is_connected(self) -> bool:
        """Whether the stream is up."""
        return self._queue is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator, if it is connected."""
        if self._queue is not None:
            self._queue.put_nowait(report)

    async def list_complete(self, job: str) -> list[agent_pb2.Snapshot]:
        """Complete snapshots of a job."""
        try:
            request = pb.ListCompleteRequest(job=job, term=self._hello.term)
            answer = await self._stub.ListComplete(request, timeout=10, metadata=self._metadata)
        except grpc.RpcError as error:
            raise error_of(error) from None
        return list(answer.snapshots)

    async def measure(self) -> float:
        """Bytes per second to the coordinator's node and back."""

        async def begin(loads: AsyncIterator[pb.Load]) -> Any:
            return self._stub.Measure(loads, timeout=2 * SECONDS, metadata=self._metadata, wait_for_ready=True)

        return await measure(begin)

    async def close(self) -> None:
        """Stop."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._channel.close()

    async def _run(self) -> None:
        silent = False
        while True:
            try:
                await self._attend()
                silent = False
            except grpc.RpcError as error:
                if not silent:
                    what = error_of(error)
                    log.warning("coordinator %s: %s", self._address, AgentUnavailable(what.what).what)
                silent = True
            except Exception:
                log.exception("the connection to coordinator %s ended", self._address)
            self._queue = None
            await asyncio.sleep(RECONNECT)

    async def _attend(self) -> None:
        queue = self._queue = asyncio.Queue()
        queue.put_nowait(pb.Report(agent_hello=self._hello))
        for report in self._resync():
            queue.put_nowait(report)
        call = self._stub.Attend(self._reports(queue), metadata=self._metadata)
        try:
            async for order in call:
                self._on_order(order)
        finally:
            queue.put_nowait(None)  # grpc does not end who waits for the next report of a call that has ended

    @staticmethod
    async def _reports(reports: asyncio.Queue[pb.Report | None]) -> AsyncIterator[pb.Report]:
        while (report := await reports.get()) is not None:
            yield report
