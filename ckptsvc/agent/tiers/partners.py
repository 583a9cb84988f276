"""What this node keeps of others' snapshots: copies, parity, and what is rebuilt from it; and what it lets them read.

The coordinator orders it (control.redundancy). Agents ask each other for tickets here, in the event loop; the bytes go
from courier to courier (see `courier`). What has come in whole and matches its checksums becomes an arena like any
other, marked as a guest, so that a restore finds it; what has not is never labelled, and so never used.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
import msgspec

from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.tiers.guests import GUEST, Guests
from ckptsvc.agent.tiers.transfer import new_ticket
from ckptsvc.agent.tiers.twins import Twins
from ckptsvc.agent.worker.proxy import WorkerProxy
from ckptsvc.config import LARGEST_EXTENT, PAGE
from ckptsvc.control.runs import ranks_of
from ckptsvc.errors import AgentUnavailable, CkptsvcError, Fenced, InvalidInput, NotFound
from ckptsvc.format.checksum import extent_count
from ckptsvc.pipeline.arena import WAITING, Arena, Kept, Label, Parity, State
from ckptsvc.pipeline.parity import MAX_GROUP, Stripes
from ckptsvc.quantities import parse_address
from ckptsvc.rpc.bounds import check
from ckptsvc.rpc.channel import OPTIONS, error_of
from ckptsvc.rpc.trust import Trust, bind_host
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.rpc.v1 import coordinator_pb2_grpc
from ckptsvc.telemetry import Event, Purpose, log

logger = logging.getLogger("ckptsvc.agent")

MAX_SHARD = 1 << 42
"""Largest shard of which another agent is believed that it has one."""

ASK_TIMEOUT = 30.0
"""Seconds another agent has to give a ticket."""

DIGEST_PATIENCE = 5.0
"""Seconds to wait for the checksums that the save makes; the courier makes them where the store holds the save up."""

CORES_PER_STREAM = 8
"""One core in so many moves snapshots, while there are some to move."""

LOOK_EVERY = 0.5
"""Seconds between looks whether the courier can go on, beside those when a rank has ended its copy."""

Order = pb.Protect | pb.Rebuild


class Partners:
    """The transfers of one agent.

    Args:
        local: the agent's state.
        trust: what the user's agents know each other by.
        rate: bytes per second that may be read from other nodes; 0: as many as come.
        streams: connections for one transfer; 0: as many as the cores allow.
        twins: the copies that ranks may fill themselves; None: they do not.
    """

    def __init__(self, local: Local, trust: Trust, rate: float, streams: int = 0, twins: Twins | None = None) -> None:
        self._local, self._trust, self._rate, self._twins = local, trust, rate, twins
        self._streams = streams or max((os.cpu_count() or 1) // CORES_PER_STREAM, 1)
        self._guests = Guests(local)
        self._started: WorkerProxy | None = None
        self._next: dict[str, pb.Protect] = {}  # by job; the newest only, once what is being done is done
        self._busy: set[str] = set()
        self._rebuilding = asyncio.Lock()
        self._held = False

    def order(self, job: LocalJob, order: pb.Order) -> None:
        """An order of the coordinator."""
        if order.HasField("rebuild"):
            self._local.spawn(self._rebuild(job, order.rebuild))
            return
        self._next[job.name] = order.protect
        if job.name not in self._busy:
            self._busy.add(job.name)
            self._local.spawn(self._protect(job))

    def filling(self) -> None:
        """Leave the memory to the ranks while one copies a snapshot, which the training waits for."""
        arenas = self._local.pool.arenas.values()
        busy = any(a.state is State.FILLING and a.holder not in ("", GUEST, WAITING) for a in arenas)
        if busy == self._held or self._started is None or not self._started.running:
            return
        self._held = busy
        self._local.spawn(self._started.tell("hold", {"on": busy}))
        if busy:
            asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _look(self) -> None:
        self.filling()
        if self._held:
            asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    async def close(self) -> None:
        """End the courier; what it is doing is lost."""
        if self._started is not None:
            await self._started.close()

    @property
    def _courier(self) -> WorkerProxy:
        if self._started is None:
            host = bind_host(parse_address(self._trust.spelled(self._local.address)).host)
            self._started = WorkerProxy(
                "courier", "ckptsvc.agent.tiers.courier", (host, str(self._rate), str(self._streams))
            )
        return self._started

    # ---- what others read --------------------------------------------------------------------------------------------

    async def offer(self, request: pb.FetchRequest) -> pb.FetchResponse:
        """Give a ticket for what this node holds of a snapshot.

        Raises:
            NotFound: it does not hold all that was asked for, or not any more.
        """
        found = self._find(request, ranks_of(request.ranks))
        response = pb.FetchResponse(ticket=new_ticket())
        files: list[tuple[str, int]] = []
        waited = await asyncio.gather(*(self._digests(arena, label) for arena, label in found))
        for (arena, label), digests in zip(found, waited, strict=True):
            response.shards.add(rank=label.rank, nbytes=label.nbytes, extent=label.extent, digests=digests)
            files.append((str(arena.path), label.nbytes))
        if request.parity:
            arena, label = self._guests.parity_of(request.job, (request.epoch, request.step))
            found.append((arena, label))
            files.append((str(arena.path), label.nbytes))
            response.parity.CopyFrom(_parity_message(label))
        key, response.key = self._trust.new_key(response.ticket)
        given = {"ticket": response.ticket, "key": key, "files": files, "shown": self._trust.certificates()}
        admitted = await self._courier.call("admit", given)
        if not all(self._still_holds(*one) for one in found):  # filled anew while we waited: no answer mixes two steps
            raise NotFound(f"step {request.step} has left the memory of {self._local.name}")
        response.address = str(parse_address(self._trust.spelled(self._local.address))._replace(port=admitted["port"]))
        return response

    def _still_holds(self, arena: Arena, label: Label) -> bool:
        """Whether an arena holds what it did; that the save has ended meanwhile makes no difference."""
        now = arena.label if arena.name in self._local.pool.arenas else None
        return now is not None and msgspec.structs.replace(now, kept=label.kept) == label

    def _find(self, request: pb.FetchRequest, ranks: Sequence[int]) -> list[tuple[Arena, Label]]:
        """The arenas with the shards of these ranks, the node's own before copies."""
        found: dict[int, tuple[Arena, Label]] = {}
        for arena in self._local.pool.arenas.values():
            label = arena.label
            if label is None or label.parity is not None:
                continue
            is_better = label.rank not in found or found[label.rank][0].guest
            if is_better and (label.job, label.epoch, label.step) == (request.job, request.epoch, request.step):
                found[label.rank] = arena, label
        missing = [rank for rank in ranks if rank not in found]
        if missing:
            raise NotFound(f"{self._local.name} does not hold rank {missing[0]} of step {request.step}")
        return [found[rank] for rank in sorted(set(ranks))]

    async def _digests(self, arena: Arena, label: Label) -> bytes:
        job = self._local.jobs.get(arena.job)
        future = job.digests.get(arena.name) if job else None
        try:
            if future is not None:
                return await asyncio.wait_for(asyncio.shield(future), DIGEST_PATIENCE)
        except (TimeoutError, CkptsvcError):
            pass  # the store hangs, or has failed: that does not concern the memory
        args = {"path": str(arena.path), "nbytes": label.nbytes, "extent": label.extent}
        digests: bytes = (await self._courier.call("digest", args))["digests"]
        return digests

    # ---- what this node reads ----------------------------------------------------------------------------------------

    async def _protect(self, job: LocalJob) -> None:
        try:
            while job.name in self._next:
                order = self._next.pop(job.name)
                purpose = Purpose.PARITY if order.losses else Purpose.COPY
                try:
                    self._check_current(job, order)
                    await (self._guard if order.losses else self._copy)(job, order)
                except (CkptsvcError, OSError) as error:
                    self._failed(job, order, purpose, error)
                except Exception as error:  # an unforeseen one must not keep the next snapshot from being kept
                    logger.exception("step %d is not kept for other nodes", order.step)
                    self._failed(job, order, purpose, error)
        finally:
            self._busy.discard(job.name)

    def _check_current(self, job: LocalJob, order: Order) -> None:
        if order.attempt < max(job.attempts, default=0):
            self._local.metrics.orders_refused.inc()
            raise Fenced(f"attempt {order.attempt} is over; attempt {max(job.attempts)} runs")

    def _failed(self, job: LocalJob, order: Order, purpose: Purpose, error: Exception) -> None:
        self._local.metrics.partner_failures.labels(purpose).inc()
        log(logger, logging.WARNING, Event.PARTNER_FAILED, "step %d is not kept for other nodes (%s): %s", order.step,
            purpose, error, job=job.name, step=order.step, epoch=order.epoch)  # fmt: skip

    async def _copy(self, job: LocalJob, order: pb.Protect) -> None:
        """Copy what another node holds."""
        if len(order.members) != 1:
            raise InvalidInput("the order does not name the one node to copy from")
        holder = order.members[0]
        answer = await self._ask(job, order, holder)
        with self._guests.filling() as filling:
            targets = []
            for number, shard in enumerate(answer.shards):
                key = order.epoch, order.step
                twin = self._twins.take(job.name, shard.rank, key, shard.nbytes) if self._twins else None
                arena = filling.add(twin.arena) if twin else await filling.make(job, shard.rank, shard.nbytes, key)
                targets.append({"path": str(arena.path), "number": number, "filled": twin.nbytes if twin else 0})
            args = {"origin": self._origin(answer), "targets": targets}
            done = await self._courier.call("copy", args)
            for arena, shard in zip(filling.arenas, answer.shards, strict=True):
                self._guests.keep(job, arena, _label(job, order, shard.rank, shard.nbytes, shard.extent), shard.digests)
        self._guests.forget_others(job, (order.epoch, order.step), {shard.rank for shard in answer.shards})
        if self._twins is not None:
            if any(target["filled"] for target in targets):
                self._twins.judge(job, done["bytes"], sum(shard.nbytes for shard in answer.shards))
            self._twins.pair(job.name, order.attempt, ranks_of(holder.ranks))
        self._count(job, order, Purpose.COPY, done["bytes"], f"a copy of what {holder.node} holds")

    def _count(self, job: LocalJob, order: Order, purpose: Purpose, nbytes: int, what: str) -> None:
        self._local.metrics.partner_kept.labels(purpose).inc()
        self._local.metrics.partner_bytes.labels(purpose).inc(nbytes)
        log(logger, logging.INFO, Event.PARTNER_KEPT, "step %d: %s, %d bytes", order.step, what, nbytes,
            job=job.name, step=order.step, epoch=order.epoch)  # fmt: skip

    async def _guard(self, job: LocalJob, order: pb.Protect) -> None:
        """Make this node's part of the parity of its group."""
        names = [holder.node for holder in order.members]
        if self._local.name not in names or not 2 <= len(set(names)) == len(names) <= MAX_GROUP:
            raise InvalidInput("the order names no group that this node is in")
        keeper = names.index(self._local.name)
        answers = await asyncio.gather(*(self._ask(job, order, holder) for holder in order.members))
        extents = {shard.extent for answer in answers for shard in answer.shards}
        if len(extents) != 1:
            raise InvalidInput("the nodes of the group use different values of save.extent")
        (extent,) = extents
        stripes = _stripes(order, [[(s.nbytes, s.extent) for s in answer.shards] for answer in answers])
        nbytes = stripes.losses * stripes.chunk * extent
        with self._guests.filling() as filling:
            arena = await filling.make(job, -1, nbytes, (order.epoch, order.step))
            origins = [self._origin(a) if number != keeper else None for number, a in enumerate(answers)]
            args = {"stripes": _numbers(stripes), "extent": extent, "keeper": keeper, "origins": origins}
            done = await self._courier.call("guard", {**args, "path": str(arena.path)})
            members = [
                (n, [Kept(s.rank, s.nbytes, s.digests) for s in a.shards]) for n, a in zip(names, answers, strict=True)
            ]
            parity = Parity(losses=order.losses, digests=done["digests"], members=members)
            self._guests.keep(job, arena, _label(job, order, -1, nbytes, extent, parity), done["digests"])
        self._guests.forget_others(job, (order.epoch, order.step), {-1})
        self._count(
            job, order, Purpose.PARITY, done["bytes"], f"parity of {len(names)} nodes, for {order.losses} losses"
        )

    async def _rebuild(self, job: LocalJob, order: pb.Rebuild) -> None:
        """Rebuild shards of lost nodes, and tell how it went."""
        why = ""
        try:
            self._check_current(job, order)
            async with self._rebuilding:
                wanted = [rank for rank in ranks_of(order.ranks) if not self._has(job, order, rank)]
                if wanted:
                    await self._rebuild_shards(job, order, set(wanted))
        except (CkptsvcError, OSError) as error:
            self._failed(job, order, Purpose.REBUILD, error)
            why = str(error)
        except Exception as error:  # the ranks wait for an answer
            logger.exception("step %d was not rebuilt", order.step)
            why = f"{type(error).__name__}: {error}"
        event = pb.Rebuilt(job=job.name, node=self._local.name, epoch=order.epoch, step=order.step, why=why)
        self._local.report(job, pb.Report(rebuilt=event))

    def _has(self, job: LocalJob, order: Order, rank: int) -> bool:
        key = (job.name, order.epoch, order.step, rank)
        labels = (arena.label for arena in self._local.pool.arenas.values())
        return any(label and (label.job, label.epoch, label.step, label.rank) == key for label in labels)

    async def _rebuild_shards(self, job: LocalJob, order: pb.Rebuild, wanted: set[int]) -> None:
        left = {number: holder for number, holder in enumerate(order.members) if holder.address}
        answers = dict(zip(left, await asyncio.gather(
            *(self._ask(job, order, holder, parity=True) for holder in left.values())), strict=True))  # fmt: skip
        members, extent = _group(order, answers)
        stripes = _stripes(order, [[(kept.nbytes, extent) for kept in held] for _, held in members])
        size = stripes.losses * stripes.chunk * extent
        if any(answer.parity.nbytes != size for answer in answers.values()):
            raise InvalidInput("the parts of the parity do not fit each other")
        with self._guests.filling() as filling:
            lost, rebuilt = [], []
            for number, (_, held) in enumerate(members):
                if number in left:
                    continue
                paths = []
                for kept in held:
                    paths.append("")
                    if kept.rank in wanted:
                        arena = await filling.make(job, kept.rank, kept.nbytes, (order.epoch, order.step))
                        rebuilt.append(kept)
                        paths[-1] = str(arena.path)
                lost.append([number, [(i, k.nbytes, extent, k.digests) for i, k in enumerate(held)], paths])
            if {kept.rank for kept in rebuilt} != wanted:
                raise InvalidInput("shards are to be rebuilt that the group has no parity of")
            origins = [self._origin(answers[n]) if n in left else None for n in range(stripes.nodes)]
            args = {"stripes": _numbers(stripes), "extent": extent, "origins": origins, "lost": lost}
            done = await self._courier.call("rebuild", args)
            for arena, kept in zip(filling.arenas, rebuilt, strict=True):
                self._guests.keep(job, arena, _label(job, order, kept.rank, kept.nbytes, extent), kept.digests)
        what = f"the shards of ranks {sorted(wanted)} rebuilt from parity"
        self._count(job, order, Purpose.REBUILD, done["bytes"], what)

    async def _ask(self, job: LocalJob, order: Order, holder: pb.Holder, *, parity: bool = False) -> pb.FetchResponse:
        """A ticket for what a node holds of a snapshot; all it says is checked.

        Raises:
            CkptsvcError: there is none.
        """
        request = pb.FetchRequest(job=job.name, epoch=order.epoch, step=order.step, ranks=holder.ranks, parity=parity)
        address = self._trust.spelled(holder.address)
        try:
            async with asyncio.timeout(ASK_TIMEOUT), self._trust.channel(address, OPTIONS) as channel:
                admission = await self._trust.ask(channel, address, "Fetch")
                stub = coordinator_pb2_grpc.CoordinatorServiceStub(channel)
                call = stub.Fetch(request, timeout=ASK_TIMEOUT, metadata=admission.metadata)
                await admission.check(call)
                answer: pb.FetchResponse = await call
        except grpc.RpcError as error:
            raise error_of(error) from None
        except TimeoutError:
            raise AgentUnavailable(f"{holder.node} did not answer in {ASK_TIMEOUT:g} s") from None
        check(answer)
        answer.address = self._trust.spelled(answer.address)
        _check_answer(answer, ranks_of(holder.ranks), holder.node)
        if parity != answer.HasField("parity"):
            raise InvalidInput(f"{holder.node} has sent another thing than it was asked for")
        return answer

    def _origin(self, answer: pb.FetchResponse) -> dict[str, Any]:
        """The arguments that the courier takes as an Origin."""
        pieces = [(number, s.nbytes, s.extent, s.digests) for number, s in enumerate(answer.shards)]
        if answer.HasField("parity"):
            pieces.append((len(pieces), answer.parity.nbytes, answer.shards[0].extent, answer.parity.digests))
        key = self._trust.key_of(answer.ticket, answer.key)
        shown = self._trust.certificates()
        return {"address": answer.address, "ticket": answer.ticket, "key": key, "pieces": pieces, "shown": shown}


def _check_answer(answer: pb.FetchResponse, ranks: Sequence[int], node: str) -> None:
    """Refuse what cannot be.

    Raises:
        InvalidInput: it cannot.
    """
    if [shard.rank for shard in answer.shards] != sorted(set(ranks)) or not answer.shards:
        raise InvalidInput(f"{node} has sent other shards than it was asked for")
    for shard in answer.shards:
        _check_piece(shard.nbytes, shard.extent, shard.digests, node)
    if len({shard.extent for shard in answer.shards}) > 1:
        raise InvalidInput(f"{node} uses different values of save.extent")
    if len(answer.ticket) != 64 or set(answer.ticket) - set("0123456789abcdef"):
        raise InvalidInput(f"{node} has sent no ticket")
    if answer.HasField("parity"):
        _check_piece(answer.parity.nbytes, answer.shards[0].extent, answer.parity.digests, node)
        for member in answer.parity.members:
            for shard in member.shards:
                _check_piece(shard.nbytes, shard.extent, shard.digests, node)


def _check_piece(nbytes: int, extent: int, digests: bytes, node: str) -> None:
    possible = 0 < nbytes <= MAX_SHARD and 0 < extent <= LARGEST_EXTENT and extent % PAGE == 0
    if not possible or len(digests) != 8 * extent_count(nbytes, extent):
        raise InvalidInput(f"{node} has a shard of {nbytes} bytes in extents of {extent}, which cannot be")


def _group(order: pb.Rebuild, answers: dict[int, pb.FetchResponse]) -> tuple[list[tuple[str, list[Kept]]], int]:
    """What each node of a group held, by what those that are left say, and the bytes of an extent.

    Raises:
        InvalidInput: they do not agree.
    """
    if not answers:
        raise InvalidInput("nobody is left of the group")
    first = next(iter(answers.values()))
    names, extent = [holder.node for holder in order.members], first.shards[0].extent
    told = list(first.parity.members)
    if [member.node for member in told] != names or not 2 <= len(set(names)) == len(names) <= MAX_GROUP:
        raise InvalidInput("the parity is of another group")
    for number, answer in answers.items():
        if list(answer.parity.members) != told or answer.parity.losses != order.losses:
            raise InvalidInput("the parts of the parity are of different groups")
        if list(answer.shards) != list(told[number].shards):
            raise InvalidInput(f"{names[number]} holds other shards than the parity was made of")
    if any(shard.extent != extent for member in told for shard in member.shards):
        raise InvalidInput("the nodes of the group use different values of save.extent")
    return [(m.node, [Kept(s.rank, s.nbytes, s.digests) for s in m.shards]) for m in told], extent


def _stripes(order: Order, held: Sequence[Sequence[tuple[int, int]]]) -> Stripes:
    """The layout of a parity; `held` has (bytes, extent) of each shard of each node."""
    return Stripes(len(held), order.losses, max(sum(extent_count(*shard) for shard in shards) for shards in held))


def _numbers(stripes: Stripes) -> tuple[int, int, int]:
    return stripes.nodes, stripes.losses, stripes.extents


def _label(job: LocalJob, order: Order, rank: int, nbytes: int, extent: int, parity: Parity | None = None) -> Label:
    return Label(
        job=job.name,
        store=job.store,
        coordinator=job.coordinator.partition("#")[0],  # of a way; see local.way_to
        attempt=order.attempt,
        epoch=order.epoch,
        step=order.step,
        rank=rank,
        world_size=order.world_size,
        nbytes=nbytes,
        extent=extent,
        aliases=dict(order.aliases),
        kept=True,
        guest=True,
        parity=parity,
    )


def _parity_message(label: Label) -> pb.Parity:
    parity = label.parity
    assert parity is not None
    message = pb.Parity(losses=parity.losses, nbytes=label.nbytes, digests=parity.digests)
    for node, held in parity.members:
        member = message.members.add(node=node)
        for kept in held:
            member.shards.add(rank=kept.rank, nbytes=kept.nbytes, extent=label.extent, digests=kept.digests)
    return message
