"""Copies that ranks fill themselves: what replicas of data parallelism hold need not come over the network.

This node keeps a copy of what another one holds. Where a rank here has the same replicated state as one there, its
twin, each stages a part of it; when it takes its snapshot, the rank here can put the other's part into the arena for
the copy as well. What it has put there counts for nothing until the courier has compared it, extent by extent, with the
checksums of the original, and has read what differs (decision 023).
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from typing import NamedTuple

from ckptsvc.agent.local import Local
from ckptsvc.agent.sessions import Key, LocalJob, Session
from ckptsvc.agent.tiers.guests import GUEST, SLOTS
from ckptsvc.pipeline.arena import WAITING, Arena, State

logger = logging.getLogger("ckptsvc.agent")

WORTH = 0.5
"""Share of a copy that must not have to be read all the same: else the ranks do not hold the same."""


class Pairs(NamedTuple):
    """Whose twins the ranks of this node are, by rank.

    Attributes:
        attempt, theirs: in which attempt, and of the node with which ranks.
        twins: rank here -> rank there; none, where that has turned out to be in vain.
    """

    attempt: int
    theirs: tuple[int, ...]
    twins: dict[int, int]


class Filled(NamedTuple):
    """An arena that a rank has filled for its twin: with which snapshot, and how many bytes."""

    key: Key
    arena: Arena
    nbytes: int


class Twins:
    """Those of one agent."""

    def __init__(self, local: Local) -> None:
        self._local = local
        self._pairs: dict[str, Pairs] = {}
        self._filled: dict[tuple[str, int], Filled] = {}

    def pair(self, job: str, attempt: int, theirs: Iterable[int]) -> None:
        """This node keeps the shards of these ranks: each one's twin is the rank in the same place here."""
        before, theirs = self._pairs.get(job), tuple(sorted(theirs))
        if before is None or before[:2] != (attempt, theirs):
            regs = [session.reg for session in self._local.sessions.values()]
            ours = sorted(reg.rank for reg in regs if (reg.job, reg.attempt) == (job, attempt))
            pairs = self._pairs[job] = Pairs(attempt, theirs, dict(zip(ours, theirs, strict=False)))
            is_same = before is not None and before.attempt == attempt
            self._give_up(job, pairs.twins.values() if is_same else ())

    def forget(self, job: str) -> None:
        """The job is over; its arenas are gone."""
        self._pairs.pop(job, None)
        for name in [name for name in self._filled if name[0] == job]:
            del self._filled[name]

    def of(self, session: Session) -> int | None:
        """The rank whose twin this one is."""
        pairs = self._pairs.get(session.reg.job)
        return pairs.twins.get(session.reg.rank) if pairs and pairs.attempt == session.reg.attempt else None

    def offer(self, token: str, step: int, epoch: int) -> Arena | None:
        """An arena to fill for the twin, where there is one that needs no waiting; the newest whole copy stays."""
        session, pool = self._local.session(token), self._local.pool
        rank, job = self.of(session), session.reg.job
        if job in self._pairs and self._pairs[job].attempt < session.reg.attempt:
            del self._pairs[job]
            self._give_up(job)
        if rank is None:
            return None
        before = self._filled.pop((job, rank), None)
        if before is not None and self._is_ours(before.arena):
            pool.release(before.arena)  # nobody has asked for it
        guests = [arena for arena in pool.arenas.values() if arena.guest and (arena.job, arena.rank) == (job, rank)]
        idle = sorted((arena for arena in guests if arena.state is not State.FILLING), key=lambda arena: arena.key)
        if not idle or (idle[0].state is not State.FREE and len(idle) < SLOTS):
            return None
        arena = idle[0]  # free ones come first
        self._local.dropped(self._local.jobs[job], arena.label)
        pool.release(arena)
        arena.state, arena.step, arena.epoch, arena.holder = State.FILLING, step, epoch, token
        return arena

    def fill(self, token: str, slot: str, nbytes: int) -> None:
        """A rank has filled what it was offered.

        Without a slot it has not, this time; without bytes, because it does not hold the same state as its twin. An
        arena that is not there any more has gone for something more important.
        """
        session = self._local.session(token)
        rank = self.of(session)
        for arena in list(self._local.pool.arenas.values()):
            if not arena.guest or (arena.holder, arena.state) != (token, State.FILLING):
                continue
            if rank == arena.rank and arena.name == slot and 0 < nbytes <= arena.capacity:
                arena.holder = WAITING
                self._filled[arena.job, rank] = Filled((arena.epoch, arena.step), arena, nbytes)
                continue
            self._local.pool.release(arena)
            if rank is not None and slot:
                del self._pairs[arena.job].twins[session.reg.rank]

    def take(self, job: str, rank: int, key: Key, nbytes: int) -> Filled | None:
        """What was filled for this shard, to be compared and kept; the caller frees the arena otherwise."""
        filled = self._filled.pop((job, rank), None)
        if filled is None or not self._is_ours(filled.arena):
            return None
        if filled.key == key and nbytes <= filled.arena.capacity:
            filled.arena.holder = GUEST
            return filled
        self._local.pool.release(filled.arena)
        return None

    def _is_ours(self, arena: Arena) -> bool:
        known = self._local.pool.arenas.get(arena.name) is arena
        return known and (arena.state, arena.holder) == (State.FILLING, WAITING)

    def _give_up(self, job: str, but: Collection[int] = ()) -> None:
        """Free what was filled for other ranks than these: nobody will ask for it."""
        for name, filled in list(self._filled.items()):
            if name[0] == job and name[1] not in but:
                del self._filled[name]
                if self._is_ours(filled.arena):
                    self._local.pool.release(filled.arena)

    def judge(self, job: LocalJob, nread: int, nbytes: int) -> None:
        """Of a copy that ranks had filled, so much had to be read all the same."""
        pairs = self._pairs.get(job.name)
        if pairs is not None and pairs.twins and nread > WORTH * nbytes:
            self._pairs[job.name] = pairs._replace(twins={})
            self._give_up(job.name)
            logger.info("job %s: %d of %d bytes of the partner's copy are not what the ranks of this node hold: they do"
                " not fill it any more", job.name, nread, nbytes)  # fmt: skip
