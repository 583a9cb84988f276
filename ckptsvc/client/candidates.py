"""What can be restored, newest first over all tiers: snapshots in the job's memory, checkpoints in the store.

Rank 0 looks and tells the others, so that all try the same in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from ckptsvc.client.group import Group
from ckptsvc.client.link import AgentLink
from ckptsvc.client.restore import Image, memory_image, store_image
from ckptsvc.errors import AgentUnavailable, CkptsvcError, Damaged, NotFound
from ckptsvc.launch import Placement
from ckptsvc.pipeline import catalog
from ckptsvc.pipeline.catalog import Ref, open_checkpoint
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.storage import Store, connect

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
    """The candidates of one restore."""

    def __init__(self, url: str, link: AgentLink, group: Group, place: Placement) -> None:
        self._url, self._link, self._group, self._place = url, link, group, place
        self._store: Store | None = None
        self._snapshots: list[agent_pb2.Snapshot] = []

    def find(self, step: int | None = None) -> list[Candidate]:
        """All candidates (of one step), newest first; the same on every rank.

        Raises:
            StoreError: the store cannot be listed: to start afresh then would be to lose the run.
        """
        try:
            self._snapshots = self._link.snapshots(SNAPSHOT_TIMEOUT)
        except AgentUnavailable:
            self._snapshots = []
        message, failure = b"", None
        if self._group.rank == 0:
            try:
                message = msgspec.json.encode({"found": self._look()})
            except CkptsvcError as error:
                failure = error
                message = msgspec.json.encode({"code": error.code, "what": error.what})
        answer = msgspec.json.decode(self._group.broadcast(message))
        if failure or "found" not in answer:
            raise failure or Damaged(f"rank 0 cannot list the checkpoints: {answer['what']}")
        found = [Candidate(*entry) for entry in answer["found"]]
        return [c for c in found if step is None or c.step == step]

    def open(self, candidate: Candidate) -> Image:
        """Open one; all ranks call this together.

        Raises:
            Damaged, StoreError, NoCheckpoint: it cannot be read.
        """
        if candidate.tier == "memory":
            key = (candidate.epoch, candidate.step)
            mine = next((s for s in self._snapshots if (s.epoch, s.step) == key), None)
            return memory_image(mine, self._link, self._group, self._place.job, self._place.attempt)
        return store_image(open_checkpoint(self._connected(), Ref(candidate.epoch, candidate.step)))

    def _look(self) -> list[tuple[int, int, str]]:
        found = [(s.epoch, s.step, "memory") for s in self._snapshots]
        try:
            # A damaged record is a candidate too: trying it says what is wrong with it.
            found += [(ref.epoch, ref.step, "store") for ref, _ in catalog.find(self._connected())]
        except NotFound:
            pass  # nothing was ever written there
        # Highest epoch, then highest step, then memory.
        return sorted(found, key=lambda c: (-c[0], -c[1], c[2]))

    def _connected(self) -> Store:
        if self._store is None:
            self._store = connect(self._url)
        return self._store
