"""gRPC in, node and coordinator out; nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import msgspec

from ckptsvc.agent.coordination.bandwidth import Mirror
from ckptsvc.agent.coordination.runner import CoordinatorShell
from ckptsvc.agent.launches import Launches
from ckptsvc.agent.node import Node
from ckptsvc.agent.orders.callers import Callers
from ckptsvc.agent.orders.orders import Orders
from ckptsvc.agent.process.repeated import Refusals
from ckptsvc.agent.status.sparing import Sparing
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import CkptsvcError, InvalidInput, LimitReached
from ckptsvc.format.commit import check_metrics
from ckptsvc.rpc.bounds import MAX_NAME, check, check_report
from ckptsvc.rpc.channel import TOKEN_KEY, trailers_of
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc, coordinator_pb2_grpc
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

REPLY_TIME = 0.05
"""Seconds before the caller's deadline at which an answer is sent, so that it arrives."""

PREPARE_TIMEOUT = 120.0
PROVIDE_TIMEOUT = 600.0
VERB_TIMEOUT = 3600.0

MOST_ORDERS = 1 << 16
"""That wait for one agent to read them: of one that has as many ranks as a node can have, each gets a handful."""

Handler = Callable[..., Awaitable[Any]]


def _errors(handler: Handler) -> Handler:
    """Look whether the request says what can be; send a `CkptsvcError` to the caller as what it is."""

    @functools.wraps(handler)
    async def guarded(self: Any, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            check(request)
            return await handler(self, request, context)
        except CkptsvcError as error:
            await context.abort(*trailers_of(error))
        except OSError as error:  # no descriptors, no memory, no room: it passes
            await context.abort(*trailers_of(CkptsvcError(f"the agent cannot: {error.strerror or error}")))

    return guarded


def _token(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == TOKEN_KEY:
            return str(value)
    raise InvalidInput("this call is for registered ranks only")


def _remaining(context: grpc.aio.ServicerContext[Any, Any], most: float) -> float:
    left = context.time_remaining()
    return most if left is None else max(min(left - REPLY_TIME, most), 0.0)


class AgentServicer(agent_pb2_grpc.AgentServiceServicer):
    """For local ranks, launchers and the command line. Who may call what is in rpc.roles."""

    def __init__(
        self, node: Node, launches: Launches, status: Callable[[], dict[str, Any]], callers: Callers, orders: Orders
    ) -> None:
        self._node, self._launches = node, launches
        self._status = Sparing(lambda: msgspec.json.encode(status()))
        self._callers, self._orders = callers, orders

    @_errors
    async def Prepare(self, request: agent_pb2.PrepareRequest, context: Any) -> agent_pb2.PrepareResponse:
        """See agent.proto."""
        timeout = _remaining(context, PREPARE_TIMEOUT)
        ranks, complete, epoch = await self._node.prepare(
            _token(context), request.plain_digest, request.generation, timeout
        )
        return agent_pb2.PrepareResponse(same_plain=ranks, complete=complete, epoch=epoch)

    @_errors
    async def Rewind(self, request: agent_pb2.RewindRequest, context: Any) -> agent_pb2.RewindResponse:
        """See agent.proto."""
        timeout = _remaining(context, PREPARE_TIMEOUT)
        return agent_pb2.RewindResponse(epoch=await self._node.rewind(_token(context), request.count, timeout))

    @_errors
    async def Provide(self, request: agent_pb2.ProvideRequest, context: Any) -> agent_pb2.ProvideResponse:
        """See agent.proto."""
        timeout = _remaining(context, PROVIDE_TIMEOUT)
        return agent_pb2.ProvideResponse(slots=await self._node.arenas.provide(_token(context), request.bytes, timeout))

    @_errors
    async def Acquire(self, request: agent_pb2.AcquireRequest, context: Any) -> agent_pb2.AcquireResponse:
        """See agent.proto."""
        timeout = _remaining(context, request.patience)
        token = _token(context)
        arena, epoch = await self._node.arenas.acquire(token, request.step, request.bytes, timeout)
        self._node.saves.expect(token, arena, epoch, request.bytes)
        answer = agent_pb2.AcquireResponse(slot=arena.name, capacity=arena.capacity, epoch=epoch)
        twin = self._node.twins.offer(token, request.step, epoch)
        if twin is not None:
            answer.twin_slot, answer.twin_rank = twin.name, twin.rank
        self._node.on_filling()
        return answer

    @_errors
    async def Submit(self, request: agent_pb2.SubmitRequest, context: Any) -> agent_pb2.SubmitResponse:
        """See agent.proto."""
        metrics = dict(request.metrics)
        check_metrics(metrics)
        aliases, token = dict(request.aliases), _token(context)
        self._node.twins.fill(token, request.twin_slot, request.twin_bytes)
        self._node.saves.submit(token, request.slot, request.step, request.bytes, aliases, metrics, request.staging)
        self._node.on_filling()
        return agent_pb2.SubmitResponse()

    @_errors
    async def Abandon(self, request: agent_pb2.AbandonRequest, context: Any) -> agent_pb2.AbandonResponse:
        """See agent.proto."""
        self._node.arenas.abandon(_token(context), request.slot, request.step, request.reason[:500], request.code)
        return agent_pb2.AbandonResponse()

    @_errors
    async def WaitSave(self, request: agent_pb2.WaitSaveRequest, context: Any) -> agent_pb2.WaitSaveResponse:
        """See agent.proto."""
        try:
            waiting = self._node.saves.wait_save(_token(context), request.step)
            outcome = await asyncio.wait_for(waiting, _remaining(context, 600.0))
        except TimeoutError:
            outcome = agent_pb2.SaveOutcome()
        return agent_pb2.WaitSaveResponse(outcome=outcome)

    @_errors
    async def ListSnapshots(
        self, request: agent_pb2.ListSnapshotsRequest, context: Any
    ) -> agent_pb2.ListSnapshotsResponse:
        """See agent.proto."""
        return await self._node.saves.list_snapshots(_token(context))

    @_errors
    async def Refill(self, request: agent_pb2.RefillRequest, context: Any) -> agent_pb2.RefillResponse:
        """See agent.proto."""
        try:
            filling = self._node.refills.refill(_token(context), (request.epoch, request.step))
            snapshot = await asyncio.wait_for(filling, _remaining(context, 600.0))
        except TimeoutError:
            return agent_pb2.RefillResponse()
        return agent_pb2.RefillResponse(done=True, snapshot=snapshot)

    @_errors
    async def Leave(self, request: agent_pb2.LeaveRequest, context: Any) -> agent_pb2.LeaveResponse:
        """See agent.proto."""
        self._node.leave(_token(context))
        return agent_pb2.LeaveResponse()

    @_errors
    async def GetStatus(self, request: agent_pb2.GetStatusRequest, context: Any) -> agent_pb2.GetStatusResponse:
        """See agent.proto."""
        return agent_pb2.GetStatusResponse(json=self._status.get())

    async def Launch(
        self, request_iterator: AsyncIterator[agent_pb2.LaunchRequest], context: Any
    ) -> AsyncIterator[agent_pb2.LaunchResponse]:
        """See agent.proto."""
        try:
            async for response in self._launches.serve(request_iterator, context):
                yield response
        except CkptsvcError as error:
            await context.abort(*trailers_of(error))

    async def Checkpoint(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_CHECKPOINT, request, context)

    async def Pause(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_PAUSE, request, context)

    async def Resume(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_RESUME, request, context)

    async def Restart(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_RESTART, request, context)

    async def Drain(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_DRAIN, request, context)

    async def Undrain(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_UNDRAIN, request, context)

    async def Exclude(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_EXCLUDE, request, context)

    async def Include(self, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        """See agent.proto."""
        return await self._order(pb.VERB_INCLUDE, request, context)

    async def _order(self, verb: pb.Verb, request: agent_pb2.VerbRequest, context: Any) -> agent_pb2.VerbResponse:
        caller = self._callers.of(context.invocation_metadata())
        try:
            if caller is None:
                raise InvalidInput("who calls has hung up")
            return await self._orders.carry_out(verb, request, caller, _remaining(context, VERB_TIMEOUT))
        except CkptsvcError as error:
            await context.abort(*trailers_of(error))
            raise  # abort does, by another error


class CoordinatorServicer(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """For the agents of other nodes: rpc.proof.Gate lets in nobody else."""

    def __init__(
        self,
        shell_of: Callable[[str, int], CoordinatorShell],
        node: str,
        offer: Callable[[pb.FetchRequest], Awaitable[pb.FetchResponse]],
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._shell_of, self._node, self._offer, self._on_refused = shell_of, node, offer, on_refused
        self._ending: set[asyncio.Task[None]] = set()
        self._mirror, self._refusals = Mirror(), Refusals("reports of agents")

    async def Attend(self, request_iterator: AsyncIterator[pb.Report], context: Any) -> AsyncIterator[pb.Order]:
        """See coordinator.proto."""
        node = "?"
        try:
            first = await anext(aiter(request_iterator))
            hello = first.agent_hello
            node = hello.node
            check(first)
            if not node or node == self._node:
                raise InvalidInput(f"the first report must be a hello of another node than {self._node}")
            shell = self._shell_of(hello.job, hello.term)
        except CkptsvcError as error:
            await self._hang_up(error, node, context)
        orders: asyncio.Queue[pb.Order | None] = asyncio.Queue(MOST_ORDERS)
        call = asyncio.current_task()
        assert call is not None

        def deliver(order: pb.Order | None) -> None:
            try:
                orders.put_nowait(order)
            except asyncio.QueueFull:  # it hears everything when it is back
                if not call.cancelling():
                    call.cancel()  # it waits in vain for the last order to be read
                    ending = asyncio.ensure_future(self._give_up(node, context))
                    self._ending.add(ending)
                    ending.add_done_callback(self._ending.discard)

        shell.attend(node, deliver)
        shell.report(node, first)
        reading = asyncio.ensure_future(self._read(shell, node, request_iterator))
        reading.add_done_callback(lambda task: deliver(None))
        try:
            while (order := await orders.get()) is not None:
                yield order
            failure = reading.exception() if reading.done() and not reading.cancelled() else None
            if isinstance(failure, CkptsvcError):
                await self._hang_up(failure, node, context)
            if failure is not None:
                raise failure
        finally:
            reading.cancel()
            shell.depart(node, deliver)

    async def _hang_up(self, error: CkptsvcError, node: str, context: Any) -> None:
        if isinstance(error, InvalidInput):
            self._on_refused()
            self._refusals.say(f"{error}, by the agent of {node[:MAX_NAME]} at {context.peer()}, which is hung up on")
        await context.abort(*trailers_of(error))

    async def _give_up(self, node: str, context: Any) -> None:
        with contextlib.suppress(grpc.aio.AbortError):
            await self._hang_up(LimitReached(f"the agent of {node} does not read its orders"), node, context)

    async def _read(self, shell: CoordinatorShell, node: str, reports: AsyncIterator[pb.Report]) -> None:
        async for message in reports:
            check_report(message, node)
            for report in (message, *message.more):
                shell.report(node, report)

    @_errors
    async def ListComplete(self, request: pb.ListCompleteRequest, context: Any) -> agent_pb2.ListSnapshotsResponse:
        """See coordinator.proto."""
        shell = self._shell_of(launched_as(request.job), request.term)
        return await shell.list_complete(request.job)

    @_errors
    async def Fetch(self, request: pb.FetchRequest, context: Any) -> pb.FetchResponse:
        """See coordinator.proto."""
        return await self._offer(request)

    async def Measure(self, request_iterator: AsyncIterator[pb.Load], context: Any) -> AsyncIterator[pb.Load]:
        """See coordinator.proto."""
        try:
            async for load in self._mirror.reflect(request_iterator):
                yield load
        except CkptsvcError as error:
            await context.abort(*trailers_of(error))
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "a measurement takes less")


def add_agent_service(servicer: AgentServicer, server: Any) -> None:
    """Register the servicer (the generated function is untyped)."""
    agent_pb2_grpc.add_AgentServiceServicer_to_server(servicer, server)


def add_coordinator_service(servicer: CoordinatorServicer, server: Any) -> None:
    """Register the servicer (the generated function is untyped)."""
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, server)
