"""What becomes of the arenas in which ranks make the copies for their twins."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from ckptsvc.agent.identity import Registration
from ckptsvc.agent.local import Local
from ckptsvc.agent.node import Node
from ckptsvc.agent.process import handover
from ckptsvc.agent.tiers import guests
from ckptsvc.agent.tiers.guests import SLOTS, Guests
from ckptsvc.agent.worker.workers import Workers
from ckptsvc.config import load
from ckptsvc.errors import ArenaExhausted
from ckptsvc.pipeline.arena import WAITING, Arena, ArenaPool, Label, State
from ckptsvc.telemetry import Metrics

SIZE = 4096


def rank_of(attempt: int = 1) -> Registration:
    return Registration(op="register", job="job", store="file:///run", attempt=attempt, rank=5, world_size=8)


class Scene:
    """An agent whose rank 5 is the twin of rank 0, with as many whole copies of that one's shard as are kept."""

    def __init__(self, folder: Path) -> None:
        self.pool = ArenaPool(folder / "arenas", 100 << 20)
        self.pool.open()
        self.workers = Workers(load(os.environ))
        self.local = Local("n0", self.pool, Metrics("test"), None, "")  # type: ignore[arg-type]
        self.local._uplinks[""] = SimpleNamespace(report=lambda report: None, close=self.nothing)  # type: ignore[assignment]
        self.node = Node(self.local, self.workers, slots=2, linger=1.0, save_timeout=1.0)
        self.twins, self.guests = self.node.twins, Guests(self.local)

    async def nothing(self) -> None:
        """There is nothing to close."""

    def register(self, pid: int, attempt: int = 1) -> str:
        return self.node.register(rank_of(attempt), pid)[0]

    def copies(self, *keys: tuple[int, int]) -> list[Arena]:
        made = []
        for epoch, step in keys:
            arena, fd = self.pool.make("job", 0, SIZE, guest=True)
            os.close(fd)
            label = Label(
                job="job", store="file:///run", coordinator="", attempt=1, epoch=epoch, step=step, rank=0, world_size=8,
                nbytes=SIZE, extent=SIZE, aliases={}, guest=True,
            )  # fmt: skip
            self.pool.keep_guest(arena, label)
            made.append(arena)
        return made

    def offered(self, token: str, step: int = 30, epoch: int = 1) -> Arena:
        arena = self.twins.offer(token, step, epoch)
        assert arena is not None
        return arena

    def filled(self, token: str, step: int = 30) -> Arena:
        """An arena that waits for the order to copy."""
        arena = self.offered(token, step)
        self.twins.fill(token, arena.name, SIZE)
        assert (arena.state, arena.holder) == (State.FILLING, WAITING)
        return arena


@pytest.fixture
def within(tmp_path: Path) -> Callable[..., None]:
    """Runs a test in the event loop of a scene, with a rank and two copies."""

    def run(test: Callable[[Scene, str], Awaitable[None]], *, pid: int = 0) -> None:
        async def whole() -> None:
            scene = Scene(tmp_path)
            try:
                token = scene.register(pid or os.getpid())
                scene.twins.pair("job", 1, [0])
                await test(scene, token)
            finally:
                await scene.node.stop()
                await scene.workers.close()
                scene.pool.close(remove=True)

        asyncio.run(whole())

    return run


@pytest.mark.parametrize("how", ["it registers again", "it leaves"])
def test_what_a_process_that_lives_was_copying_into_is_nobody_elses(within, how: str) -> None:
    """Its copy may run on: bytes that the courier has verified there would not stay what they are."""

    async def test(scene: Scene, token: str) -> None:
        older, newer = scene.copies((1, 10), (1, 20))
        assert scene.offered(token) is older
        if how == "it leaves":
            scene.node.leave(token)
        else:
            scene.register(os.getpid())
        assert list(scene.pool.arenas.values()) == [newer]
        assert not older.path.exists()

    within(test)


def test_what_a_process_was_copying_into_that_has_ended_can_be_used_again(within) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)

    async def test(scene: Scene, token: str) -> None:
        older, _ = scene.copies((1, 10), (1, 20))
        assert scene.offered(token) is older
        process.kill()
        process.wait()
        scene.node._exited(token)
        assert older.state is State.FREE
        assert older.name in scene.pool.arenas

    with process:
        within(test, pid=process.pid)


def test_what_was_filled_for_another_than_the_present_twin_is_given_up(within) -> None:
    async def test(scene: Scene, token: str) -> None:
        scene.copies((1, 10), (1, 20))
        arena = scene.filled(token)
        scene.twins.pair("job", 1, [0, 7])  # the same twins, one more rank
        assert arena.state is State.FILLING
        scene.twins.pair("job", 1, [7])
        assert arena.state is State.FREE

    within(test)


def test_what_was_filled_in_an_earlier_attempt_is_given_up(within) -> None:
    async def test(scene: Scene, token: str) -> None:
        scene.copies((1, 10), (1, 20))
        arena = scene.filled(token)
        scene.node.leave(token)
        again = scene.register(os.getpid(), attempt=2)
        assert scene.twins.offer(again, 30, 2) is None
        assert arena.state is State.FREE

    within(test)


def test_a_rank_that_needs_memory_gets_what_waits_for_an_order(within) -> None:
    async def test(scene: Scene, token: str) -> None:
        scene.copies((1, 10), (1, 20))
        arena = scene.filled(token)
        for other in [other for other in scene.pool.arenas.values() if other is not arena]:
            scene.pool.remove(other)
        scene.pool.limit = scene.pool.total
        made, fd = scene.node.arenas._make(rank_of(), SIZE, first=True)
        os.close(fd)
        assert list(scene.pool.arenas.values()) == [made]

    within(test)


def test_an_agent_that_makes_way_does_not_wait_for_what_waits_for_an_order(within, monkeypatch) -> None:
    monkeypatch.setattr(handover, "COPY_PATIENCE", 3600.0)

    async def test(scene: Scene, token: str) -> None:
        scene.copies((1, 10), (1, 20))
        scene.filled(token)
        await asyncio.wait_for(handover.copies_end(scene.pool), 30)

    within(test)


@pytest.mark.parametrize("who", ["a rank", "the courier"])
def test_after_a_rewind_the_copy_of_the_later_epoch_stays(within, who: str) -> None:
    async def test(scene: Scene, token: str) -> None:
        before, after = scene.copies((1, 100), (2, 60))
        if who == "a rank":
            assert scene.offered(token, 70, 2) is before
        else:
            with scene.guests.filling() as filling:
                assert await filling.make(scene.local.jobs["job"], 0, SIZE, (2, 70)) is before
        assert after.label is not None

    within(test)


def test_an_order_that_comes_while_a_rank_copies_the_next_snapshot_waits_and_makes_no_third_arena(within) -> None:
    async def test(scene: Scene, token: str) -> None:
        _, newest = scene.copies((1, 10), (1, 20))
        arena = scene.offered(token, 40)
        with scene.guests.filling() as filling:
            making = asyncio.ensure_future(filling.make(scene.local.jobs["job"], 0, SIZE, (1, 30)))
            done, _ = await asyncio.wait([making], timeout=0.1)
            assert not done
            scene.twins.fill(token, arena.name, SIZE)
            assert await asyncio.wait_for(making, 60) is arena
            assert newest.label is not None
            assert len(scene.pool.arenas) == SLOTS
        assert scene.twins.take("job", 0, (1, 40), SIZE) is None, "it is not what it was filled with any more"

    within(test)


def test_where_the_rank_goes_on_copying_the_whole_copy_stays(within, monkeypatch) -> None:
    monkeypatch.setattr(guests, "TWIN_PATIENCE", 0.0)

    async def test(scene: Scene, token: str) -> None:
        _, newest = scene.copies((1, 10), (1, 20))
        scene.offered(token, 40)
        with scene.guests.filling() as filling, pytest.raises(ArenaExhausted, match="gives way"):
            await filling.make(scene.local.jobs["job"], 0, SIZE, (1, 30))
        assert newest.label is not None
        assert len(scene.pool.arenas) == SLOTS

    within(test)
