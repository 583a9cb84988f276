"""Several agents' memories: real arenas, couriers and calls between them; the orders are the test's."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pytest

from ckptsvc.agent.arenas import Arenas
from ckptsvc.agent.identity import Registration
from ckptsvc.agent.local import Local
from ckptsvc.agent.servicer import CoordinatorServicer
from ckptsvc.agent.sessions import LocalJob, Session
from ckptsvc.agent.tiers import partners
from ckptsvc.agent.tiers.partners import Partners
from ckptsvc.agent.tiers.transfer import Reader
from ckptsvc.agent.tiers.twins import Twins
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.control.runs import runs_of
from ckptsvc.errors import AgentUnavailable, NotFound
from ckptsvc.format.checksum import extent_digests
from ckptsvc.pipeline.arena import HUGE_PAGE, Arena, ArenaPool, Label, State, populate
from ckptsvc.quantities import Address
from ckptsvc.rpc.certificates import issue, make_authority
from ckptsvc.rpc.trust import ByCertificate, BySecret, Trust
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.rpc.v1 import coordinator_pb2_grpc
from ckptsvc.telemetry import Metrics

SECRET = "5" * 64
EXTENT = 8192
PATIENCE = 30.0


class Said:
    """In place of the way to a coordinator: keeps what is reported."""

    is_connected = True

    def __init__(self) -> None:
        self.reports: list[pb.Report] = []

    def report(self, report: pb.Report) -> None:
        self.reports.append(report)

    async def close(self) -> None:
        """There is nothing to close."""


class Member:
    """One node: its arenas, its courier, its port."""

    def __init__(self, name: str, folder: Path, limit: int, trust: Trust | None = None) -> None:
        self.trust = trust or BySecret(SECRET)
        self.pool = ArenaPool(folder / name, limit)
        self.pool.open()
        self.local = Local(name, self.pool, Metrics("test"), None, self.trust)  # type: ignore[arg-type]
        self.said = self.local._uplinks[""] = Said()  # type: ignore[assignment]
        self.job = self.local.jobs["job"] = LocalJob("job", "", "file:///run")
        self.twins = Twins(self.local)
        self.partners = Partners(self.local, self.trust, 0.0, streams=3, twins=self.twins)

    async def start(self) -> None:
        gate = self.trust.gate(lambda: None)
        self._server = grpc.aio.server(interceptors=[gate])
        servicer = CoordinatorServicer(nobody, self.local.name, self.partners.offer)
        coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(servicer, self._server)
        port, _ = self.trust.open_port(self._server, Address("127.0.0.1", 0))
        self.local.address = gate.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)
        await self.local.close()
        await self.partners.close()
        self.pool.close(remove=True)

    def stage(self, rank: int, data: bytes, *, step: int = 10) -> Arena:
        """A rank's snapshot, whole."""
        arena, fd = self.pool.make("job", rank, len(data))
        populate(fd, arena.capacity)
        os.pwrite(fd, data, 0)
        os.close(fd)
        label = Label(
            job="job", store="file:///run", coordinator="", attempt=1, epoch=1, step=step, rank=rank, world_size=8,
            nbytes=len(data), extent=EXTENT, aliases={},
        )  # fmt: skip
        self.pool.stage(arena, label)
        future = self.job.digests[arena.name] = asyncio.get_running_loop().create_future()
        future.set_result(extent_digests(data, EXTENT).tobytes())
        return arena

    def holder(self, *ranks: int, lost: bool = False) -> pb.Holder:
        return pb.Holder(node=self.local.name, address="" if lost else self.local.address, ranks=runs_of(ranks))

    def order(self, order: pb.Protect | pb.Rebuild) -> None:
        order.epoch, order.step, order.attempt, order.world_size = 1, order.step or 10, order.attempt or 1, 8
        if isinstance(order, pb.Protect):
            self.partners.order(self.job, pb.Order(job="job", protect=order))
        else:
            self.partners.order(self.job, pb.Order(job="job", rebuild=order))

    def reported(self, kind: str) -> list[Any]:
        return [getattr(r, kind) for r in self.said.reports if r.HasField(kind)]  # type: ignore[arg-type]

    def kept(self, rank: int, *, step: int = 10) -> bytes | None:
        """What is kept of another node's rank."""
        for arena in self.pool.arenas.values():
            if arena.guest and arena.label and (arena.label.rank, arena.label.step) == (rank, step):
                assert arena.state is State.KEPT
                assert arena.label.guest
                assert arena.label.kept
                return arena.path.read_bytes()[: arena.label.nbytes]
        return None

    def failures(self, purpose: str) -> float:
        value = self.local.metrics.registry.get_sample_value("ckptsvc_partner_failures_total", {"purpose": purpose})
        assert value is not None
        return value


def nobody(job: str, term: int) -> Any:
    raise AgentUnavailable("nobody coordinates here")


async def until(condition: Callable[[], Any], what: str) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (value := condition()):
            await asyncio.sleep(0.01)
    return value


@pytest.fixture
def run() -> Any:
    """Runs a test with so many nodes."""
    folder = Path(tempfile.mkdtemp(prefix="ck-", dir="/dev/shm"))

    @asynccontextmanager
    async def members(count: int, limit: int, trust: Trust | None) -> AsyncIterator[list[Member]]:
        async with AsyncExitStack() as stack:
            made = [Member(f"n{number}", folder, limit, trust) for number in range(count)]
            for member in made:
                await member.start()
                stack.push_async_callback(member.stop)
            yield made

    def start(test: Callable[..., Any], count: int, limit: int = 1 << 30, trust: Trust | None = None) -> None:
        async def body() -> None:
            async with members(count, limit, trust) as made:
                await test(*made)

        asyncio.run(body())

    yield start
    shutil.rmtree(folder, ignore_errors=True)


def image(rank: int, nbytes: int) -> bytes:
    return random.Random(rank).randbytes(nbytes)


def test_a_copy_is_the_same_to_the_last_bit_and_outlives_the_agent(run: Any, tmp_path: Path) -> None:
    async def test(one: Member, other: Member) -> None:
        images = {2: image(2, 3_000_001), 3: image(3, EXTENT), 5: image(5, 1)}
        for rank, data in images.items():
            one.stage(rank, data)
        other.order(pb.Protect(members=[one.holder(2, 3, 5)]))
        await until(lambda: len(other.reported("staged")) == 3, "the copies")
        for event in other.reported("staged"):
            assert (event.node, event.copy, event.ended, event.world_size) == ("n1", True, True, 8)
        assert {rank: other.kept(rank) for rank in images} == images
        for arena in other.pool.arenas.values():
            assert arena.label is not None
            digests = await other.job.digests[arena.name]
            assert digests == extent_digests(images[arena.rank], EXTENT).tobytes()
        await until(lambda: other.pool.of("job", 2) == [], "copies to be nobody's own")
        again = ArenaPool(other.pool.root, 1 << 30)
        other.pool.close(remove=False)
        found = again.open()
        assert sorted((a.rank, a.guest, a.state) for a in found) == [(r, True, State.KEPT) for r in (2, 3, 5)]
        again.close(remove=True)

    run(test, 2)


def test_between_hosts_copies_and_parity_go_over_tls(run: Any, tmp_path: Path) -> None:
    authority = make_authority("one", 1)
    for name, data in zip(("ca", "cert", "key"), (authority.certificate, *issue(authority, "me", 1)), strict=True):
        (tmp_path / name).write_bytes(data)
        (tmp_path / name).chmod(0o600)

    async def test(*members: Member) -> None:
        held = {n: {rank: image(rank, size) for rank, size in UNEVEN[n].items()} for n in range(2)}
        await guarded(list(members), held, 1)
        one, other = members
        other.order(pb.Protect(members=[one.holder(*held[0])]))
        await until(lambda: other.kept(0), "the copy")
        assert {rank: other.kept(rank) for rank in held[0]} == held[0]
        offered = await one.partners.offer(pb.FetchRequest(job="job", epoch=1, step=10, ranks=runs_of([0])))
        with pytest.raises(AgentUnavailable):  # who comes without TLS is not heard
            await asyncio.to_thread(Reader, offered.address, offered.ticket, offered.key)

    run(test, 2, trust=ByCertificate(*(str(tmp_path / name) for name in ("ca", "cert", "key"))))


def test_of_two_snapshots_the_newer_takes_the_place_of_the_oldest(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        for step in (10, 20, 30):
            one.stage(0, image(step, 100_000), step=step)
            other.order(pb.Protect(step=step, members=[one.holder(0)]))
            await until(lambda step=step: other.kept(0, step=step), "the copy")
        assert other.kept(0, step=20) == image(20, 100_000)
        assert other.kept(0, step=30) == image(30, 100_000)
        assert other.kept(0, step=10) is None
        assert [(e.step, e.rank, e.node) for e in other.reported("dropped")] == [(10, 0, "n1")]
        other.order(pb.Protect(step=20, members=[one.holder(0)]))  # and never an older one
        await until(lambda: other.failures("copy") == 1, "it to be refused")

    run(test, 2)


def of_rank(member: Member, rank: int) -> Session:
    """A session of a rank of that node."""
    reg = Registration(op="register", job="job", store="file:///run", attempt=1, rank=rank, world_size=8)
    session = member.local.sessions[f"token-{rank}"] = Session.open(reg, os.getpid())
    session.token = f"token-{rank}"
    return session


def read(member: Member) -> float:
    """Bytes that were read for copies."""
    value = member.local.metrics.registry.get_sample_value("ckptsvc_partner_read_bytes_total", {"purpose": "copy"})
    assert value is not None
    return value


async def copied(one: Member, other: Member, step: int) -> None:
    """A copy of the snapshot of one rank, which has another content at each step."""
    one.stage(0, image(step, 100_000), step=step)
    other.order(pb.Protect(step=step, members=[one.holder(0)]))
    await until(lambda: other.kept(0, step=step) == image(step, 100_000), "the copy")


def test_what_a_rank_has_put_into_a_copy_is_not_read_again_and_never_believed(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        session = of_rank(other, 5)
        for step in (10, 20):
            assert other.twins.offer(session.token, step, 1) is None  # the arenas come with the first copies
            await copied(one, other, step)
        for step, wrong in ((30, [0, 50_000]), (40, [])):
            arena = other.twins.offer(session.token, step, 1)
            assert arena is not None
            assert other.kept(0, step=step - 10)  # the newest stays while the next one is being made
            content = bytearray(image(step, 100_000))
            for at in wrong:
                content[at] ^= 1
            with open(arena.path, "r+b") as file:
                file.write(content)
            before = read(other)
            other.twins.fill(session.token, arena.name, 100_000)
            await copied(one, other, step)
            assert read(other) - before == EXTENT * len(wrong)
        session.close()

    run(test, 2)


@pytest.mark.parametrize("how", ["it holds another state", "it says that it holds another state", "it has gone"])
def test_a_rank_that_is_no_twin_is_not_asked_again(run: Any, how: str) -> None:
    async def test(one: Member, other: Member) -> None:
        session = of_rank(other, 5)
        for step in (10, 20):
            await copied(one, other, step)
        arena = other.twins.offer(session.token, 30, 1)
        assert arena is not None
        if how == "it has gone":
            Arenas(other.local, Workers(), 2, other.twins).give_back(session)
            del other.local.sessions[session.token]
            assert arena.state is State.FREE
        else:
            other.twins.fill(session.token, arena.name, 100_000 if how == "it holds another state" else 0)
        await copied(one, other, 30)
        if how != "it has gone":
            assert other.twins.offer(session.token, 40, 1) is None
        await copied(one, other, 40)
        assert sum(arena.guest for arena in other.pool.arenas.values()) == 2  # none is left over
        session.close()

    run(test, 2)


def test_what_a_rank_has_put_into_a_copy_that_nobody_ordered_is_given_up(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        session = of_rank(other, 5)
        for step in (10, 20):
            await copied(one, other, step)
        for step in (30, 40):
            arena = other.twins.offer(session.token, step, 1)
            assert arena is not None
            other.twins.fill(session.token, arena.name, 100_000)
        await copied(one, other, 50)
        assert read(other) == 300_000
        assert other.twins.offer(session.token, 60, 1) is not None
        session.close()

    run(test, 2)


def test_an_order_of_an_attempt_that_is_over_is_refused(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        one.stage(0, image(0, 100))
        other.job.attempt(2)
        other.order(pb.Protect(attempt=1, members=[one.holder(0)]))
        await until(lambda: other.failures("copy") == 1, "it to be refused")
        assert other.pool.arenas == {}

    run(test, 2)


@pytest.mark.parametrize("limit", [HUGE_PAGE, 2 * HUGE_PAGE])
def test_where_memory_is_short_there_is_one_copy_or_none(run: Any, limit: int) -> None:
    async def test(one: Member, other: Member) -> None:
        one.pool.limit = 1 << 30
        own = [HUGE_PAGE] if limit > HUGE_PAGE else []
        for nbytes in (own or [HUGE_PAGE])[:1]:
            other.stage(7, image(7, nbytes // 2))
        for step in (10, 20):
            one.stage(0, image(step, 1000), step=step)
            other.order(pb.Protect(step=step, members=[one.holder(0)]))
            if limit > HUGE_PAGE:
                await until(lambda step=step: other.kept(0, step=step), "the copy")
            else:
                await until(lambda step=step: other.failures("copy") == step // 10, "it to be given up")
        assert other.kept(0, step=10) is None
        assert other.kept(7) is None

    run(test, 2, limit)


def test_copies_go_first_when_a_rank_of_this_node_needs_their_memory(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        one.pool.limit = 1 << 30
        one.stage(0, image(0, 1000))
        other.pool.keep(other.stage(7, image(7, 1000)))  # of a rank that is gone, and older
        other.order(pb.Protect(members=[one.holder(0)]))
        await until(lambda: other.kept(0), "the copy")
        reg = Registration(op="register", job="job", store="file:///run", attempt=1, rank=8, world_size=9)
        _, fd = Arenas(other.local, Workers(), 2, Twins(other.local))._make(reg, 1000, first=True)
        os.close(fd)
        assert other.kept(0) is None
        assert [arena.rank for arena in other.pool.arenas.values()] == [7, 8]
        assert other.job.digests.keys() <= other.pool.arenas.keys()  # nothing is remembered of what is gone
        assert [(e.rank, e.node) for e in other.reported("dropped")] == [(0, "n1")]
        assert other.local.metrics.registry.get_sample_value("ckptsvc_partner_dropped_total") == 1

    run(test, 2, 2 * HUGE_PAGE)


def test_an_answer_never_mixes_two_steps(run: Any) -> None:
    """An arena that goes on to the next step while the checksums of another are waited for."""

    async def test(one: Member, other: Member) -> None:
        early, late = one.stage(0, image(0, 1000)), one.stage(1, image(1, 1000))
        digests = one.job.digests[late.name]
        held_up = one.job.digests[late.name] = asyncio.get_running_loop().create_future()
        request = pb.FetchRequest(job="job", epoch=1, step=10, ranks=runs_of([0, 1]))
        offer = asyncio.ensure_future(one.partners.offer(request))
        await asyncio.sleep(0.1)
        assert early.label is not None
        one.pool.stage(early, msgspec.structs.replace(early.label, step=20))
        held_up.set_result(await digests)
        with pytest.raises(NotFound, match="step 10 has left the memory of n0"):
            await offer
        one.pool.stage(early, msgspec.structs.replace(early.label, step=10))
        one.pool.keep(late)  # only the save has ended
        assert len((await one.partners.offer(request)).shards) == 2

    run(test, 2)


def test_checksums_that_do_not_come_are_waited_for_together(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partners, "DIGEST_PATIENCE", 2.0)

    async def test(one: Member) -> None:
        for rank in range(8):  # as many would take longer one after the other than anybody waits
            arena = one.stage(rank, image(rank, 1000))
            one.job.digests[arena.name] = asyncio.get_running_loop().create_future()
        offer = one.partners.offer(pb.FetchRequest(job="job", epoch=1, step=10, ranks=runs_of(range(8))))
        answer = await asyncio.wait_for(offer, 12.0)
        assert [shard.digests for shard in answer.shards] == [
            extent_digests(image(rank, 1000), EXTENT).tobytes() for rank in range(8)
        ]

    run(test, 1)


def holding(runtime_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPTSVC_FAILPOINT", str(runtime_folder))
    (runtime_folder / "in_transfer").touch()
    return runtime_folder / "in_transfer.held"


@pytest.mark.parametrize("how", ["the sender dies", "the receiver dies", "the arena is filled anew"])
def test_what_comes_only_in_part_is_never_used(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    held = holding(tmp_path, monkeypatch)

    async def test(one: Member, other: Member) -> None:
        arena = one.stage(0, image(0, 64 << 20))  # more than the kernel keeps for the receiver
        other.order(pb.Protect(members=[one.holder(0)]))
        await until(lambda: held.exists() and held.read_text(), "the transfer to be under way")
        if how == "the arena is filled anew":
            with open(arena.path, "r+b") as file:
                file.seek(60 << 20)
                file.write(b"new")
            held.unlink()
        else:
            victim = one if how == "the sender dies" else other
            process = victim.partners._started._process  # type: ignore[union-attr]
            os.kill(process.pid, signal.SIGKILL)  # type: ignore[union-attr]
            await until(lambda: process.poll() is not None, "it to end")  # type: ignore[union-attr]
            held.unlink()
        if how == "the receiver dies":  # another courier does it all again
            await until(lambda: other.kept(0) == image(0, 64 << 20), "the copy")
            return
        await until(lambda: other.failures("copy") == 1, "the failure")
        assert other.reported("staged") == []
        assert other.kept(0) is None
        assert not list(other.pool.root.glob("*.json"))
        other.order(pb.Protect(step=20, members=[one.holder(0)]))  # and the next one is as if nothing had been
        one.stage(0, image(1, 1000), step=20)
        await until(lambda: other.kept(0, step=20) == image(1, 1000), "the next copy")

    run(test, 2)


def test_a_node_that_holds_something_else_is_not_asked_twice(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        other.order(pb.Protect(members=[one.holder(0)]))
        await until(lambda: other.failures("copy") == 1, "the failure")
        other.order(pb.Protect(members=[pb.Holder(node="n9", address="10.0.0.1:7", ranks=runs_of([0]))]))
        await until(lambda: other.failures("copy") == 2, "an address of elsewhere to be refused")

    run(test, 2)


async def guarded(members: list[Member], held: dict[int, dict[int, bytes]], losses: int) -> list[pb.Holder]:
    """Have every node stage these ranks, and make its part of the parity."""
    for number, images in held.items():
        for rank, data in images.items():
            members[number].stage(rank, data)
    holders = [members[number].holder(*images) for number, images in held.items()]
    for member in members:
        member.order(pb.Protect(losses=losses, members=holders))
    for member in members:
        await until(lambda member=member: member.reported("guarded"), "the parity")
        (event,) = member.reported("guarded")
        assert [h.node for h in event.members] == [m.local.name for m in members]
    return holders


UNEVEN = {0: {0: 100_000, 1: 1}, 1: {2: EXTENT, 3: 5 * EXTENT + 1}, 2: {4: 300_001}, 3: {5: 70_000, 6: 70_000, 7: 9}}


@pytest.mark.parametrize(("count", "losses", "lost"), [(3, 1, [2]), (4, 2, [1, 2])])
def test_a_lost_node_is_rebuilt_from_the_group_to_the_last_bit(
    run: Any, count: int, losses: int, lost: list[int]
) -> None:
    held = {n: {rank: image(rank, size) for rank, size in UNEVEN[n].items()} for n in range(count)}

    async def test(*members: Member) -> None:
        await guarded(list(members), held, losses)
        left = [number for number in held if number not in lost]
        told = [members[n].holder(*held[n], lost=n in lost) for n in held]
        wanted = {rank: data for number in lost for rank, data in held[number].items()}
        for place, number in enumerate(left):
            share = sorted(wanted)[place :: len(left)]
            if share:
                members[number].order(pb.Rebuild(losses=losses, members=told, ranks=runs_of(share)))
                await until(lambda number=number: members[number].reported("rebuilt"), "it to be rebuilt")
                assert members[number].reported("rebuilt")[0].why == ""
                assert {rank: members[number].kept(rank) for rank in share} == {rank: wanted[rank] for rank in share}
                assert sorted(e.rank for e in members[number].reported("staged") if e.copy) == share

    run(test, count)


def test_a_rebuild_for_which_the_training_waits_is_not_held_back_by_the_rate(run: Any) -> None:
    held = {n: {rank: image(rank, size) for rank, size in UNEVEN[n].items()} for n in range(3)}

    async def test(*members: Member) -> None:
        *group, spare = members
        spare.partners._rate = 1.0  # a byte a second: for ever
        await guarded(group, held, 1)
        told = [group[n].holder(*held[n], lost=n == 2) for n in held]
        spare.order(pb.Rebuild(losses=1, members=told, ranks=runs_of(sorted(held[2]))))
        await until(lambda: spare.reported("rebuilt"), "it to be rebuilt")
        assert {rank: spare.kept(rank) for rank in held[2]} == held[2]

    run(test, 4)


def test_parity_of_the_same_snapshot_is_made_anew_by_those_that_have_it_after_a_loss(run: Any) -> None:
    held = {n: {rank: image(rank, size) for rank, size in UNEVEN[n].items()} for n in range(3)}
    here = sorted(held[0] | held[2])

    async def test(one: Member, other: Member, gone: Member) -> None:
        holders = await guarded([one, other, gone], held, 1)
        told = [*holders[:2], gone.holder(*held[2], lost=True)]
        one.order(pb.Rebuild(losses=1, members=told, ranks=runs_of(sorted(held[2]))))
        await until(lambda: one.reported("rebuilt"), "it to be rebuilt")
        holders = [one.holder(*here), other.holder(*held[1])]
        one.order(pb.Protect(losses=1, members=holders))
        await until(lambda: one.failures("parity"), "what is kept already to be refused")
        for member in (one, other):
            member.order(pb.Protect(losses=1, members=holders, attempt=2))
            await until(lambda member=member: len(member.reported("guarded")) == 2, "the new parity")
            parts = [a.label for a in member.pool.arenas.values() if a.label and a.label.parity]
            assert [len(label.parity.members) for label in parts if label.parity] == [2]
            assert [event.rank for event in member.reported("dropped")] == [-1]
        told = [one.holder(*here, lost=True), holders[1]]
        other.order(pb.Rebuild(losses=1, members=told, ranks=runs_of(here), attempt=3))
        await until(lambda: other.reported("rebuilt"), "it to be rebuilt")
        assert {rank: other.kept(rank) for rank in here} == held[0] | held[2]

    run(test, 3)


@pytest.mark.parametrize("what", ["a survivor's snapshot", "a part of the parity", "too many are lost"])
def test_what_cannot_be_rebuilt_right_is_not_rebuilt_at_all(run: Any, what: str) -> None:
    held = {n: {rank: image(rank, size) for rank, size in UNEVEN[n].items()} for n in range(3)}

    async def test(*members: Member) -> None:
        await guarded(list(members), held, 1)
        lost = [2, 1] if what == "too many are lost" else [2]
        told = [members[n].holder(*held[n], lost=n in lost) for n in held]
        for arena in members[1].pool.arenas.values():
            if what != "too many are lost" and arena.guest == (what == "a part of the parity"):
                content = bytearray(arena.path.read_bytes())
                content[100] ^= 4
                arena.path.write_bytes(content)
        members[0].order(pb.Rebuild(losses=1, members=told, ranks=runs_of(sorted(held[2]))))
        await until(lambda: members[0].reported("rebuilt"), "the failure")
        assert members[0].reported("rebuilt")[0].why
        assert members[0].failures("rebuild") == 1
        assert [members[0].kept(rank) for rank in held[2]] == [None] * len(held[2])

    run(test, 3)


def test_the_transfer_stands_still_while_a_rank_copies_its_snapshot(run: Any) -> None:
    async def test(one: Member, other: Member) -> None:
        one.stage(0, image(0, 1000))
        other.order(pb.Protect(members=[one.holder(0)]))
        await until(lambda: other.kept(0), "the first copy, and with it the courier")
        own, fd = other.pool.make("job", 4, 1000)
        os.close(fd)
        own.holder = "a rank"
        other.partners.filling()
        await asyncio.sleep(0.2)  # the courier has been told
        one.stage(0, image(1, 1000), step=20)
        other.order(pb.Protect(step=20, members=[one.holder(0)]))
        await asyncio.sleep(1.0)
        assert other.kept(0, step=20) is None
        other.pool.release(own)
        await until(lambda: other.kept(0, step=20), "it to go on by itself")

    run(test, 2)
