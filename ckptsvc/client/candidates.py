"""What can be restored, newest first over all tiers: snapshots in the job's memory, checkpoints in the store.

Rank 0 looks and tells the others, so that all try the same in the same order.
"""

from __future__ import annotations

import contextlib
import logging
from typing import NamedTuple

import msgspec

from ckptsvc.client.group import Group, together
from ckptsvc.client.link import AgentLink
from ckptsvc.client.restore import Image, memory_image, store_image
from ckptsvc.config import Settings
from ckptsvc.errors import BY_CODE, CkptsvcError, NotFound
from ckptsvc.format.commit import CommitRecord
from ckptsvc.launch import Placement
from ckptsvc.pipeline import catalog
from ckptsvc.pipeline.catalog import Checkpoint, Ref, decode_checkpoint, open_checkpoint, read_index
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.storage import Store, connect
from ckptsvc.storage.wrappers import Retrying

log = logging.getLogger("ckptsvc")

SNAPSHOT_TIMEOUT = 90.0
"""Seconds to wait for the agent's list: it waits for the checksums of a snapshot taken just before."""


class Candidate(NamedTuple):
    """One thing to try. Memory before the store where both have the same."""

    epoch: int
    step: int
    tier: str

    def __str__(self) -> str:
        where = "in memory" if self.tier == "memory" else "in the store"
        return f"step {self.step} (epoch {self.epoch}, {where})"


class Candidates:
    """The candidates of one restore.

    Args:
        url: of the run.
        settings: how often a store is tried again, and how long what is rebuilt from parity is waited for.
        link: to the agent.
        group: the job's ranks.
        place: of this one.
    """

    def __init__(self, url: str, settings: Settings, link: AgentLink, group: Group, place: Placement) -> None:
        self._url, self._retries, self._patience = url, settings.store.retries, settings.tiers.rebuild
        self._link, self._group, self._place = link, group, place
        self._store: Store | None = None
        self._snapshots: list[agent_pb2.Snapshot] = []

    def find(self, step: int | None = None) -> list[Candidate]:
        """All candidates (of one step), newest first; the same on every rank.

        Raises:
            StoreError: the store cannot be listed: to start afresh then would be to lose the run.
        """
        try:
            found = self._link.snapshots(SNAPSHOT_TIMEOUT + self._patience)
            self._snapshots = list(found.snapshots)
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
        if candidate.tier == "memory":
            key = (candidate.epoch, candidate.step)
            mine = next((s for s in self._snapshots if (s.epoch, s.step) == key), None)
            return memory_image(mine, self._link, self._group, self._place.job, self._place.attempt)
        return store_image(self._open_stored(Ref(candidate.epoch, candidate.step)))

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
        found = [(s.epoch, s.step, "memory") for s in self._snapshots]
        with contextlib.suppress(NotFound):  # nothing was ever written there
            # A damaged record is a candidate too: trying it says what is wrong with it.
            found += [(ref.epoch, ref.step, "store") for ref, _ in catalog.find(self._connected())]
        # Highest epoch, then highest step, then memory.
        return sorted(found, key=lambda c: (-c[0], -c[1], c[2]))

    def _connected(self) -> Store:
        if self._store is None:
            self._store = Retrying(connect(self._url), attempts=self._retries + 1)
        return self._store
