"""What can be restored, newest first over all tiers: snapshots in the job's memory or on its nodes' local disks,
checkpoints in the store.

Rank 0 looks and tells the others, so that all try the same in the same order.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ckptsvc.client.group import Group, together
from ckptsvc.client.link import AgentLink
from ckptsvc.client.restore import Image, memory_image, store_image
from ckptsvc.errors import BY_CODE, CkptsvcError, NotFound
from ckptsvc.format.commit import COMMIT, CommitRecord
from ckptsvc.launch import Placement
from ckptsvc.pipeline import catalog
from ckptsvc.pipeline.catalog import Checkpoint, Ref, decode_checkpoint, open_checkpoint, read_index
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.settings import Settings
from ckptsvc.storage import Store
from ckptsvc.storage.opening import open_apart
from ckptsvc.storage.wrappers import Retrying

log = logging.getLogger("ckptsvc")

SNAPSHOT_TIMEOUT = 90.0
"""Seconds to wait for the agent's list: it waits for the checksums of a snapshot taken just before."""


REFILL_TIMEOUT = 1800.0
"""Seconds that a snapshot may take from the local disk to memory."""

TIERS = {"memory": "in memory", "local": "on local disks", "store": "in the store"}
"""The tiers, in the order in which one and the same snapshot is tried, and how to speak of them."""


class Candidate(NamedTuple):
    """One thing to try. The faster tier first where several have the same."""

    epoch: int
    step: int
    tier: str

    def __str__(self) -> str:
        return f"step {self.step} (epoch {self.epoch}, {TIERS[self.tier]})"


class Candidates:
    """The candidates of one restore; `close` them when it is over.

    Args:
        url: of the run.
        settings: of the store, and how long what is rebuilt from parity is waited for.
        link: to the agent.
        group: the job's ranks.
        place: of this rank.
        progress: called now and then while something takes long.
    """

    def __init__(
        self,
        url: str,
        settings: Settings,
        link: AgentLink,
        group: Group,
        place: Placement,
        progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._url, self._settings, self._progress = url, settings.store, progress
        self._patience = settings.tiers.rebuild
        self._link, self._group, self._place = link, group, place
        self._store: Store | None = None
        self._snapshots: list[agent_pb2.Snapshot] = []
        self._committed = Ref(0, 0)

    def find(self, step: int | None = None) -> list[Candidate]:
        """All candidates (of one step), newest first; the same on every rank.

        Raises:
            StoreError: the store cannot be listed: to start afresh then would be to lose the run.
        """
        try:
            found = self._link.snapshots(SNAPSHOT_TIMEOUT + self._patience)
            self._snapshots = list(found.snapshots)
            self._committed = Ref(found.committed_epoch, found.committed_step)
            for note in found.notes if self._group.rank == 0 else ():
                log.warning("%s; an older one has to do", note)
        except CkptsvcError:
            self._snapshots = []
        message = b""
        with together(self._group):
            self._connected()
            if self._group.rank == 0:
                message = msgspec.json.encode(self._look())
        candidates = [Candidate(*entry) for entry in msgspec.json.decode(self._group.broadcast(message))]
        return [c for c in candidates if step is None or c.step == step]

    def open(self, candidate: Candidate) -> Image:
        """Open one; all ranks call this together.

        Raises:
            Damaged, StoreError, NoCheckpoint: it cannot be read.
        """
        if candidate.tier != "store":
            key = (candidate.epoch, candidate.step)
            mine = next((s for s in self._snapshots if (s.epoch, s.step) == key), None)
            if candidate.tier == "local":
                mine = self._refilled(mine, candidate)
            return memory_image(mine, self._link, self._group, self._place.job, self._place.attempt)
        return store_image(self._open_stored(Ref(candidate.epoch, candidate.step)))

    def _refilled(self, known: agent_pb2.Snapshot | None, candidate: Candidate) -> agent_pb2.Snapshot | None:
        """What is in this node's memory of a snapshot once its agent has read the local disk."""
        try:
            found = self._link.refill(candidate.epoch, candidate.step, REFILL_TIMEOUT, self._progress)
        except CkptsvcError as error:
            log.warning("rank %d: %s: %s", self._group.rank, candidate, error)
            return known
        if known is not None:
            found.MergeFrom(agent_pb2.Snapshot(world_size=known.world_size, aliases=known.aliases))
        return found

    def _open_stored(self, ref: Ref) -> Checkpoint:
        """Rank 0 reads commit record and index; the others get them from it, not from the store."""
        store = self._connected()
        if self._group.size == 1:
            return open_checkpoint(store, ref)
        record, image, failure = b"", b"", b""
        if self._group.rank == 0:
            try:
                commit, image = read_index(store, ref)
                record = commit.encode()
            except CkptsvcError as error:
                failure = msgspec.json.encode([error.code, error.what])
        failure = self._group.broadcast(failure)
        if failure:
            code, what = msgspec.json.decode(failure, type=tuple[str, str])
            raise BY_CODE[code](what)
        commit = CommitRecord.decode(self._group.broadcast(record))
        return decode_checkpoint(store, ref, commit, self._group.broadcast(image))

    def _look(self) -> list[tuple[int, int, str]]:
        found = [(s.epoch, s.step, "memory") for s in self._snapshots if not s.not_in_memory]
        found += [(s.epoch, s.step, "local") for s in self._snapshots if s.on_disk]
        with contextlib.suppress(NotFound):  # nothing was ever written there
            # A damaged record is a candidate too: trying it says what is wrong with it.
            found += [(ref.epoch, ref.step, "store") for ref in self._stored()]
        # Highest epoch, then highest step, then the fastest tier.
        order = list(TIERS)
        return sorted(found, key=lambda c: (-c[0], -c[1], order.index(c[2])))

    def _stored(self) -> list[Ref]:
        """What the store lists, and the newest checkpoint that the job knows of: a listing may be behind."""
        store = self._connected()
        listed = [ref for ref, _ in catalog.find(store)]
        if not self._committed.epoch or self._committed in listed:
            return listed
        if not catalog.exists(store, f"{self._committed.name}/{COMMIT}"):
            log.warning("%s was committed, and is not in %s any more", self._committed.name, store.url)
            return listed
        log.warning("%s: the listing is behind, %s is there all the same", store.url, self._committed.name)
        return [self._committed, *listed]

    def _connected(self) -> Store:
        if self._store is None:
            opened = open_apart(self._url, settings=self._settings)
            self._store = Retrying(opened, attempts=self._settings.retries + 1)
        return self._store

    def close(self) -> None:
        """Give back the store."""
        if self._store is not None:
            self._store.close()
