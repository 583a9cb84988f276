"""What a rank puts into the copy that its node keeps of another rank's snapshot, where it holds the same (tiers.twins).

It is an offer that may be declined: nothing that goes wrong here may cost the rank its own snapshot.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from ckptsvc.client.link import AgentLink
from ckptsvc.client.parts import Capture
from ckptsvc.client.stage import StagePlan
from ckptsvc.errors import CkptsvcError
from ckptsvc.format.shard import ShardInfo
from ckptsvc.pipeline.arena import TAIL
from ckptsvc.rpc.v1 import agent_pb2

log = logging.getLogger("ckptsvc")

SLOTS = 2
"""Arenas of twins that stay in this process's memory."""

WITHOUT = 3
"""Snapshots in a row without an offer after which none stays: the agent may have given their memory to others."""


class Twin(NamedTuple):
    """The snapshot of the other rank, as far as this one has it.

    Attributes:
        slot: the arena it is in.
        nbytes: of the image; 0: this rank does not hold the same state.
        late: what is left to do before the state may change.
    """

    slot: str = ""
    nbytes: int = 0
    late: Callable[[], None] = lambda: None

    def finish(self) -> Twin:
        """Do what is left to do; returns what there is then, which is nothing if that fails."""
        try:
            self.late()
        except Exception as error:  # noqa: BLE001  as in `Twins.write`
            log.warning("the copy of another rank's state is left to the network: %s", error)
            return Twin()
        return self


class Twins:
    """The twins of one rank."""

    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._plan: tuple[str, int, StagePlan] | None = None  # for a structure of the state, and a rank
        self._slots: list[str] = []
        self._without = 0
        self._mapping: threading.Thread | None = None

    def write(
        self,
        offer: agent_pb2.AcquireResponse,
        capture: Capture,
        plan: StagePlan,
        info: ShardInfo,
        objects: bytes,
        *,
        overlap: bool,
    ) -> Twin:
        """Fill what is offered; the arguments are those of this rank's own snapshot."""
        slot, rank = offer.twin_slot, offer.twin_rank
        self._without = 0 if slot else self._without + 1
        if self._without == WITHOUT:
            self._keep([])
        if not slot or not self._is_mapped(slot):
            return Twin()
        try:
            twin = self._plan_of(capture, plan, rank)
            arena = self._link.arena(slot).view
            if not twin.chosen or twin.template.total(len(objects)) > len(arena) - TAIL:
                return Twin(slot)
            # Its objects are its own, and so is its label: what is put there for them will not match, and be read.
            info = msgspec.structs.replace(info, rank=rank)
            nbytes, late = twin.write(capture, arena, slot, info, objects, overlap=overlap)
        except Exception as error:  # noqa: BLE001  whatever it was: the network does it then
            log.warning("rank %d: the copy of rank %d's state is left to the network: %s", info.rank, rank, error)
            return Twin()
        return Twin(slot, nbytes, late)

    def _plan_of(self, capture: Capture, plan: StagePlan, rank: int) -> StagePlan:
        if self._plan is None or self._plan[:2] != (capture.structure, rank):
            if self._plan is not None:
                self._plan[2].forget([])
            self._plan = capture.structure, rank, StagePlan.make(capture, rank, plan.same_plain)
        return self._plan[2]

    def _is_mapped(self, slot: str) -> bool:
        """Whether the arena is in memory; if not, it will be the next time: the training does not wait for that."""
        if slot not in self._slots:
            self._keep([*self._slots, slot][-SLOTS:])
        if self._link.is_mapped(slot):
            return True
        if self._mapping is None or not self._mapping.is_alive():
            self._mapping = threading.Thread(target=self._map, args=(slot,), name="ckptsvc-map", daemon=True)
            self._mapping.start()
        return False

    def _keep(self, slots: list[str]) -> None:
        """Let go of all arenas but these."""
        if self._plan is not None:
            self._plan[2].forget(slots)
        for gone in set(self._slots).difference(slots):
            self._link.unmap(gone)
        self._slots = slots

    def _map(self, slot: str) -> None:
        try:
            self._link.arena(slot)
        except (CkptsvcError, OSError) as error:
            log.debug("the arena %s cannot be mapped: %s", slot, error)
