"""The arenas for what belongs to other nodes: copies of their snapshots, and parity (its rank is -1).

They come after everything else: they are made where the limit leaves room, and go first when a rank of this node needs
it (agent.arenas). Two of a kind are kept, so that one is whole while the other is filled; where there is no room for
two, the older snapshot is given up for the newer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Collection, Iterator

from ckptsvc.agent import reports
from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import LocalJob
from ckptsvc.errors import ArenaExhausted, Fenced, NotFound
from ckptsvc.pipeline.arena import WAITING, Arena, Label, State, populate

GUEST = "another node"
"""Who fills such an arena."""

TWIN_PATIENCE = 10.0
"""Seconds that a rank gets to end what it copies there: a third arena beside that and a whole copy is not made."""

SLOTS = 2
"""Arenas for each shard of another node."""

Key = tuple[int, int]


class Guests:
    """Those of one agent."""

    def __init__(self, local: Local) -> None:
        self._local = local

    @contextlib.contextmanager
    def filling(self) -> Iterator[Filling]:
        """Arenas to be filled; those that are not kept are free again at the end."""
        filling = Filling(self._local)
        try:
            yield filling
        finally:
            for arena in filling.arenas:
                if arena.name in self._local.pool.arenas and arena.state is State.FILLING:
                    self._local.pool.release(arena)
                self._local.arena_changed(arena.job, arena.rank)

    def keep(self, job: LocalJob, arena: Arena, label: Label, digests: bytes) -> None:
        """The arena is whole and verified: from now on it can be restored from, or rebuilt with.

        Parity that was made before of the same snapshot, for a group of which nodes are lost, goes in the same moment.

        Raises:
            ArenaExhausted: the job has ended meanwhile, and its memory with it.
        """
        if arena.name not in self._local.pool.arenas:
            raise ArenaExhausted(f"step {label.step}: the memory for rank {label.rank} is gone")
        for other in list(self._local.pool.arenas.values()):
            is_same = (other.job, other.rank, other.key) == (job.name, label.rank, (label.epoch, label.step))
            if other.guest and is_same:
                self._local.dropped(job, other.label)
                self._local.pool.release(other)
        self._local.pool.keep_guest(arena, label)
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        future.set_result(digests)
        job.digests[arena.name] = future
        self._local.report(job, reports.staged(self._local.name, label, ended=True))

    def parity_of(self, job: str, key: Key) -> tuple[Arena, Label]:
        """This node's part of the parity for a snapshot.

        Raises:
            NotFound: there is none.
        """
        for arena in self._local.pool.arenas.values():
            label = arena.label
            if label and label.parity and (label.job, label.epoch, label.step) == (job, *key):
                return arena, label
        raise NotFound(f"{self._local.name} has no parity for step {key[1]}")

    def forget_others(self, job: LocalJob, key: Key, ranks: Collection[int]) -> None:
        """This node keeps these ranks' shards from now on: older ones of others are of no use any more."""
        for arena in list(self._local.pool.arenas.values()):
            if not arena.guest or arena.job != job.name or arena.rank in ranks or arena.state is State.FILLING:
                continue
            if arena.label is None or (arena.label.epoch, arena.label.step) < key:
                self._local.dropped(job, arena.label)
                self._local.pool.remove(arena)


class Filling:
    """Arenas that are about to be filled together."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self.arenas: list[Arena] = []

    async def make(self, job: LocalJob, rank: int, nbytes: int, key: Key, attempt: int = 0) -> Arena:
        """An arena for a shard of another node; what an attempt before that one kept of the same may be kept anew.

        Raises:
            ArenaExhausted: there is no room, or a rank goes on copying a newer snapshot there.
            Fenced: what is kept already is as new.
        """
        pool = self._local.pool
        own = await self._settled(job.name, rank, key)
        for arena in own:
            anew = arena.key == key and arena.label is not None and arena.label.attempt < attempt
            if arena.key >= key and not anew:
                raise Fenced(f"step {arena.key[1]} of rank {rank} is kept already; {key[1]} is not newer")
            if arena.holder == WAITING:  # for the order for another snapshot, if there ever is one
                pool.release(arena)
        idle = sorted((a for a in own if a.state is not State.FILLING), key=lambda a: a.key)  # free ones first
        for arena in [a for a in idle if a.capacity < nbytes]:
            self._local.dropped(job, arena.label)
            pool.remove(arena)
            idle.remove(arena)
        if len(idle) < SLOTS and not any(arena.state is State.FREE for arena in idle):
            try:
                return await self._new(job, rank, nbytes, key)
            except ArenaExhausted:
                if not idle:
                    raise
        arena = idle[0]
        self._local.dropped(job, arena.label)
        pool.release(arena)
        return self._take(arena, key)

    async def _settled(self, job: str, rank: int, key: Key) -> list[Arena]:
        """The arenas for a shard of another node, once no rank of ours is copying a newer snapshot into one of them.

        Raises:
            ArenaExhausted: it goes on copying.
        """
        deadline = time.monotonic() + TWIN_PATIENCE
        while True:
            own = [a for a in self._local.pool.arenas.values() if a.guest and (a.job, a.rank) == (job, rank)]
            filling = (a for a in own if a.state is State.FILLING and a.holder not in (GUEST, WAITING))
            if not any((a.epoch, a.step) > key for a in filling):
                return own
            if time.monotonic() > deadline:
                raise ArenaExhausted(f"step {key[1]} of rank {rank} gives way: a rank copies a newer one there")
            await asyncio.sleep(0.02)

    def add(self, arena: Arena) -> Arena:
        """An arena that a rank has filled (agent.tiers.twins)."""
        self.arenas.append(arena)
        return arena

    async def _new(self, job: LocalJob, rank: int, nbytes: int, key: Key) -> Arena:
        arena, fd = self._local.pool.make(job.name, rank, nbytes, guest=True)
        try:
            await asyncio.get_running_loop().run_in_executor(None, populate, fd, arena.capacity)
        except BaseException:
            self._local.pool.remove(arena)
            raise
        finally:
            os.close(fd)
        return self._take(arena, key)

    def _take(self, arena: Arena, key: Key) -> Arena:
        arena.state, arena.holder = State.FILLING, GUEST
        arena.epoch, arena.step = key
        self.arenas.append(arena)
        return arena
