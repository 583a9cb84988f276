"""What becomes of snapshots in arenas: how they are written, and when they are let go."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from harness.increments import big_run, floats

from ckptsvc.agent.local import Local
from ckptsvc.agent.saves import Saves
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.agent.tiers.local_tier import LocalTier
from ckptsvc.agent.tiers.lowering import Lowering
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.config import load
from ckptsvc.format.commit import COMMIT
from ckptsvc.pipeline.arena import Arena, ArenaPool, Label, populate
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import TierSettings
from ckptsvc.storage import connect
from ckptsvc.telemetry import Metrics, Outcome


class Said:
    """In place of the way to a coordinator: keeps what is reported."""

    is_connected = True

    def __init__(self) -> None:
        self.reports: asyncio.Queue[pb.Report] = asyncio.Queue()

    def report(self, report: pb.Report) -> None:
        self.reports.put_nowait(report)

    async def next(self, kind: str) -> pb.Report:
        while not (report := await asyncio.wait_for(self.reports.get(), 60)).HasField(kind):  # type: ignore[arg-type]
            pass
        return report

    async def close(self) -> None:
        """There is nothing to close."""


class Scene:
    """An agent's saves, of one job; the local disk, where it is set, is out of use."""

    def __init__(self, folder: Path, *, tier: bool) -> None:
        self.pool, self.store = ArenaPool(folder / "arenas", 100 << 20), f"file://{folder / 'run'}"
        self.pool.open()
        self.workers = Workers(load(os.environ))
        self.local = Local("n0", self.pool, Metrics("test"), None, "")  # type: ignore[arg-type]
        self.said = self.local._uplinks[""] = Said()  # type: ignore[assignment]
        self.job = self.local.jobs["job"] = LocalJob("job", "", self.store)
        settings = TierSettings(local=str(folder / "disk"))
        disk = LocalTier(self.local, self.workers, settings, "tag", 1.0) if tier else None
        self.saves = Saves(self.local, self.workers, early=False, tier=disk)

    def arena(self, step: int, data: bytes, rank: int = 0, *, epoch: int = 1, guest: bool = False) -> Arena:
        """A snapshot that is staged, or kept for another node."""
        arena, fd = self.pool.make("job", rank, len(data), guest=guest)
        populate(fd, arena.capacity)
        os.pwrite(fd, data, 0)
        os.close(fd)
        label = Label(
            job="job", store=self.store, coordinator="", attempt=1, epoch=epoch, step=step, rank=rank, world_size=1,
            nbytes=len(data), extent=4096, aliases={}, guest=guest,
        )  # fmt: skip
        arena.step, arena.epoch = step, epoch
        if guest:
            self.pool.keep_guest(arena, label)
        else:
            self.pool.stage(arena, label)
        return arena


@pytest.fixture
def within(tmp_path: Path) -> Callable[..., None]:
    """Runs a test in the event loop of a scene."""

    def run(test: Callable[[Scene], Awaitable[None]], *, tier: bool = False) -> None:
        async def whole() -> None:
            scene = Scene(tmp_path, tier=tier)
            try:
                await test(scene)
            finally:
                await scene.local.close()
                await scene.workers.close()
                scene.pool.close(remove=True)

        asyncio.run(whole())

    return run


@pytest.mark.parametrize("tier", [True, False])
def test_beside_a_local_disk_a_shard_for_the_store_is_whole(within, monkeypatch, tier: bool) -> None:
    """Its save may wait for drains so long that retention deletes what it would refer to."""
    monkeypatch.setenv("CKPTSVC_SAVE_INCREMENTAL", "true")
    run = big_run({"frozen": floats(90_000)})

    async def test(scene: Scene) -> None:
        written = []
        for step in (10, 20):
            scene.saves.recover([scene.arena(step, run.image(0, step))])
            written.append((await scene.said.next("durable")).durable)
            scene.job.newest = (1, step)
        assert written[0].segments == b""
        assert (written[1].segments == b"") == tier

    within(test, tier=tier)


def test_a_share_of_the_local_disk_is_what_its_user_gets_of_it(within) -> None:
    async def test(scene: Scene) -> None:
        tier = scene.saves._tier
        assert tier is not None
        tier.root.parent.mkdir()
        assert await tier.open() == []
        tier.share = 1000
        assert not tier._make_room("job", 1001)
        assert tier.problem == "no room on the local disk: this user's share of tiers.local_limit is 1000 bytes"
        assert tier._make_room("job", 1000)
        tier.share = None  # nobody else has something to do
        assert tier._make_room("job", 1001)
        tier.close()

    within(test, tier=True)


def test_what_was_drained_after_its_save_had_been_left_local_is_drained_anew_when_it_is_wanted(
    within, monkeypatch
) -> None:
    """It may refer to a checkpoint that is deleted by then."""
    monkeypatch.setenv("CKPTSVC_SAVE_INCREMENTAL", "true")
    run = big_run({"frozen": floats(90_000)})

    async def test(scene: Scene) -> None:
        tier, worker, drained = scene.saves._tier, scene.workers.of("job"), []
        assert tier is not None
        (tier.root.parent).mkdir()
        assert await tier.open() == []
        lowering, call = Lowering(scene.local, scene.workers, tier), worker.call
        left_local = agent_pb2.SaveOutcome(epoch=1, step=20, outcome=agent_pb2.OUTCOME_LOCAL)

        async def called(op: str, *rest: Any) -> dict[str, Any]:
            done = await call(op, *rest)
            if op == "drain":
                drained.append(done["segments"])
                if len(drained) == 2:  # the word comes when it has just been drained
                    tier.ended(scene.job, left_local)
            return done

        monkeypatch.setattr(worker, "call", called)
        for step in (10, 20):
            scene.saves.recover([scene.arena(step, run.image(0, step))])
            await scene.said.next("local_kept")
            lowering.start(scene.job, (1, step))
            if step == 10:
                await scene.said.next("durable")
                connect(scene.store).put_if_absent(f"{Ref(1, 10).name}/{COMMIT}", b"a record")
                scene.job.newest = (1, 10)
        (held,) = tier.copies(scene.job, (1, 20))
        while held.fill:
            await asyncio.sleep(0.01)
        assert [segments != b"" for segments in drained] == [False, True]
        scene.job.newest = (1, 30)  # what it refers to may be gone
        lowering.start(scene.job, (1, 20))
        assert (await scene.said.next("durable")).durable.segments == b""
        tier.close()

    within(test, tier=True)


def test_shards_that_fit_nowhere_leave_memory_when_their_save_has_failed(within) -> None:
    """Kept ones and copies for others too: every restore would find them first."""

    async def test(scene: Scene) -> None:
        own, _ = scene.arena(20, b"x" * 5000), scene.arena(20, b"x" * 5000, 1, guest=True)
        scene.pool.keep(own)
        older = scene.arena(10, b"x" * 5000)
        scene.pool.keep(older)
        failed = agent_pb2.OUTCOME_FAILED
        scene.saves.ended(scene.job, agent_pb2.SaveOutcome(epoch=1, step=20, outcome=failed, code="save-failed"))
        assert own.label is not None, "whole in memory it may be yet"
        scene.saves.ended(scene.job, agent_pb2.SaveOutcome(epoch=1, step=20, outcome=failed, code="layout"))
        assert [a.label for a in scene.pool.arenas.values() if a.label is not None] == [older.label]
        gone = [(await scene.said.next("dropped")).dropped for _ in range(2)]
        assert {(event.step, event.rank) for event in gone} == {(20, 0), (20, 1)}

    within(test)


@pytest.mark.parametrize(
    ("outcome", "counted"),
    [
        ({"outcome": agent_pb2.OUTCOME_FAILED, "timed_out": True}, "timed-out"),
        ({"outcome": agent_pb2.OUTCOME_FAILED}, "failed"),
        ({"outcome": agent_pb2.OUTCOME_FENCED}, "fenced"),
        ({"outcome": agent_pb2.OUTCOME_SKIPPED}, "skipped"),
        ({"outcome": agent_pb2.OUTCOME_LOCAL}, "local"),
        ({"outcome": agent_pb2.OUTCOME_COMMITTED}, "committed"),
    ],
)
def test_a_save_is_counted_once_by_how_it_ended(within, outcome: dict[str, Any], counted: str) -> None:
    async def test(scene: Scene) -> None:
        for _ in range(2):
            scene.saves.ended(scene.job, agent_pb2.SaveOutcome(epoch=1, step=5, **outcome))
        value = scene.local.metrics.registry.get_sample_value
        found = {each.value: value("ckptsvc_saves_total", {"outcome": each.value}) for each in Outcome}
        assert {name for name, number in found.items() if number} == {counted}
        assert found[counted] == 1

    within(test)
