"""From an agent to the coordinator of a job: in the same process, or over a stream that is kept up for ever.

What is reported while the stream is down is dropped: on connecting, the node reports everything it holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any, Protocol

import grpc
import grpc.aio

from ckptsvc.agent.coordination.bandwidth import SECONDS, measure
from ckptsvc.agent.coordination.fresh import fresh
from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.process.repeated import Refusals
from ckptsvc.errors import AgentUnavailable, CkptsvcError, InvalidInput
from ckptsvc.rpc.bounds import check, check_report
from ckptsvc.rpc.channel import KEEPALIVE, OPTIONS, error_of
from ckptsvc.rpc.trust import Admission, Trust
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import LONGEST_REBUILD

log = logging.getLogger("ckptsvc.agent")

RECONNECT = 0.3
"""Seconds between attempts to reach a coordinator."""

LIST_TIMEOUT = 10.0
"""Seconds a coordinator has to begin to say which snapshots are complete."""

REBUILD_TIMEOUT = LONGEST_REBUILD + LIST_TIMEOUT
"""Seconds it has to say it: it waits for what is being rebuilt."""

REFUSED_PAUSE = 10.0
"""Seconds after which a coordinator is tried again that has refused what it was told: it is of another version."""

BACKOFF = [("grpc.initial_reconnect_backoff_ms", 300), ("grpc.max_reconnect_backoff_ms", 2000)]
"""gRPC's own pauses between connections; by default they grow to two minutes."""

GATHER = 0.02
"""Seconds after a message in which further reports wait for each other: a message costs the coordinator ten times as
much as a report in it."""

BUNDLE = 1 << 20
"""Bytes of reports in one message, unless a single one is larger."""


class Uplink(Protocol):
    """The way to one coordinator."""

    @property
    def is_connected(self) -> bool:
        """Whether a coordinator hears what is reported."""

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator; never blocks."""

    async def list_complete(self, job: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of a job in memory, newest first, once what is lost has been rebuilt."""

    async def measure(self) -> float:
        """Bytes per second to the coordinator's node and back (see `bandwidth`); 0.0 where that is this one."""

    async def close(self) -> None:
        """Stop."""


class Unsaid:
    """What this agent does not report, for its coordinator would refuse it, and all that follows: there is one line."""

    def __init__(self, node: str) -> None:
        self._node, self._refusals = node, Refusals("reports of this agent's own")

    def lets(self, report: pb.Report) -> bool:
        """Whether it may be said."""
        try:
            check_report(report, self._node)
        except InvalidInput as error:
            self._refusals.say(str(error))
            return False
        return True


class LocalUplink:
    """The coordinator is in this very process."""

    def __init__(self, hello: pb.AgentHello, shell: CoordinatorShell, on_order: Callable[[pb.Order], None]) -> None:
        self._node, self._shell, self._unsaid = hello.node, shell, Unsaid(hello.node)
        loop = asyncio.get_running_loop()

        def deliver(order: pb.Order | None) -> None:
            if order is not None:  # not at once: an order must not change what its cause is still working on
                loop.call_soon(on_order, order)

        shell.attend(self._node, deliver)
        shell.report(self._node, pb.Report(agent_hello=hello))

    @property
    def is_connected(self) -> bool:
        """It always is."""
        return True

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator."""
        if self._unsaid.lets(report):
            self._shell.report(self._node, report)

    async def list_complete(self, job: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of a job."""
        return await self._shell.list_complete(job)

    async def measure(self) -> float:
        """There is no way to measure."""
        return 0.0

    async def close(self) -> None:
        """Nothing to do."""


class RemoteUplink:
    """The coordinator is in another agent.

    `hello` says who calls, and for which term of which job. `resync` yields, on every connection, the reports that
    rebuild what the coordinator must know of this node. Nothing is told to, or taken from, a listener that has not
    proved to be an agent of ours (`trust`).

    Attributes:
        on_refused: called with each order that is not obeyed, because it says what cannot be.

    Raises:
        ConfigError: the address is none, or not one to look for agents at.
    """

    def __init__(
        self,
        hello: pb.AgentHello,
        address: str,
        on_order: Callable[[pb.Order], None],
        resync: Callable[[], Iterable[pb.Report]],
        trust: Trust,
    ) -> None:
        self._address, self._trust = trust.spelled(address), trust
        self._hello, self._on_order, self._resync = hello, on_order, resync
        self.on_refused: Callable[[], None] = lambda: None
        self._unsaid, self._refused = Unsaid(hello.node), Refusals(f"orders of coordinator {self._address}")
        self._queue: asyncio.Queue[pb.Report | None] | None = None
        self._dial()
        self._task = asyncio.ensure_future(self._run())

    def _dial(self) -> None:
        self._shown = self._trust.shown()
        self._channel = self._trust.channel(self._address, [*OPTIONS, *KEEPALIVE, *BACKOFF])
        self._stub = coordinator_pb2_grpc.CoordinatorServiceStub(self._channel)

    @property
    def is_connected(self) -> bool:
        """Whether the stream is up."""
        return self._queue is not None and self._channel.get_state() is grpc.ChannelConnectivity.READY

    def report(self, report: pb.Report) -> None:
        """Tell the coordinator, if it is connected."""
        if self._queue is not None and self._unsaid.lets(report):
            self._queue.put_nowait(report)

    async def list_complete(self, job: str) -> agent_pb2.ListSnapshotsResponse:
        """Complete snapshots of a job."""
        try:
            async with asyncio.timeout(LIST_TIMEOUT):
                admission = await self._ask("ListComplete")
                request = pb.ListCompleteRequest(job=job, term=self._hello.term)
                call = self._stub.ListComplete(request, timeout=REBUILD_TIMEOUT, metadata=admission.metadata)
                await admission.check(call)
            answer: agent_pb2.ListSnapshotsResponse = await call  # the line's pings say if the coordinator is gone
            check(answer)
        except grpc.RpcError as error:
            raise error_of(error) from None
        except TimeoutError:
            raise AgentUnavailable(f"coordinator {self._address} did not answer in time") from None
        except asyncio.CancelledError:
            raise self._hung_up() from None
        return answer

    async def measure(self) -> float:
        """Bytes per second to the coordinator's node and back."""

        async def begin(loads: AsyncIterator[pb.Load]) -> Any:
            admission = await self._ask("Measure")
            call = self._stub.Measure(loads, timeout=2 * SECONDS, metadata=admission.metadata, wait_for_ready=True)
            await admission.check(call)
            return call

        try:
            return await measure(begin)
        except asyncio.CancelledError:
            if isinstance(failure := self._hung_up(), asyncio.CancelledError):
                raise failure from None
            return 0.0

    def _hung_up(self) -> BaseException:
        """What a call ends with that grpc has cancelled because its channel was closed, or that somebody cancelled."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        return AgentUnavailable(f"the connection to coordinator {self._address} is made anew")

    async def close(self) -> None:
        """Stop."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self._channel.close()

    async def _run(self) -> None:
        said, pause = "", RECONNECT
        while True:
            try:
                await self._attend()
                said, pause = "", RECONNECT
            except (grpc.RpcError, CkptsvcError) as failure:
                error = error_of(failure) if isinstance(failure, grpc.RpcError) else failure
                if error.what != said:
                    log.warning("coordinator %s: %s", self._address, error)
                said, pause = error.what, REFUSED_PAUSE if isinstance(error, InvalidInput) else RECONNECT
            except Exception:
                log.exception("the connection to coordinator %s ended", self._address)
            self._queue = None
            await asyncio.sleep(pause)
            if self._trust.shown() is not self._shown:
                await self._channel.close()
                self._dial()

    async def _attend(self) -> None:
        admission = await self._ask("Attend")
        queue: asyncio.Queue[pb.Report | None] = asyncio.Queue()
        call = self._stub.Attend(self._reports(queue), metadata=admission.metadata)
        try:
            await admission.check(call)
            queue.put_nowait(pb.Report(agent_hello=self._hello))
            for report in filter(self._unsaid.lets, self._resync()):
                queue.put_nowait(report)
            self._queue = queue
            async with contextlib.aclosing(fresh(call)) as orders:
                async for order in orders:
                    self._obey(order)
        finally:
            queue.put_nowait(None)  # grpc does not end who waits for the next report of a call that has ended

    def _obey(self, order: pb.Order) -> None:
        try:
            check(order)
        except InvalidInput as error:
            self.on_refused()
            self._refused.say(str(error))
        else:
            self._on_order(order)

    async def _ask(self, method: str) -> Admission:
        return await self._trust.ask(self._channel, self._address, method)

    @staticmethod
    async def _reports(queue: asyncio.Queue[pb.Report | None]) -> AsyncIterator[pb.Report]:
        hello = await queue.get()
        if hello is None:
            return
        yield hello
        while True:
            waiting = [await queue.get()]
            while not queue.empty():
                waiting.append(queue.get_nowait())
            for message in bundles(report for report in waiting if report is not None):
                yield message
            if None in waiting:
                return
            await asyncio.sleep(GATHER)


def bundles(reports: Iterable[pb.Report]) -> Iterator[pb.Report]:
    """Put reports, in their order, into as few messages as make sense."""
    bundle: list[pb.Report] = []
    nbytes = 0
    for report in reports:
        size = report.ByteSize()
        if bundle and nbytes + size > BUNDLE:
            yield bundle[0] if len(bundle) == 1 else pb.Report(more=bundle)
            bundle, nbytes = [], 0
        bundle.append(report)
        nbytes += size
    if bundle:
        yield bundle[0] if len(bundle) == 1 else pb.Report(more=bundle)
