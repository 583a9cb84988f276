"""Taking snapshots: agree once for each structure of the state, then arena <- state, and hand it over.

What time may be lost where: `take` runs in the training loop; `arrange` and, with overlap, the copy run beside it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash

from ckptsvc.client.group import Group
from ckptsvc.client.link import AgentLink
from ckptsvc.client.parts import Capture
from ckptsvc.client.stage import StagePlan
from ckptsvc.client.state import StateTree
from ckptsvc.client.twins import Twins
from ckptsvc.errors import CkptsvcError, Fenced, InvalidInput, SaveFailed
from ckptsvc.format.commit import MAX_METRICS, metrics_text
from ckptsvc.format.objects import encode
from ckptsvc.format.shard import ShardInfo
from ckptsvc.launch import Placement
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.rpc.v1 import agent_pb2

log = logging.getLogger("ckptsvc")

AGREE_PATIENCE = 5.0
"""Seconds a snapshot waits for the other ranks after the structure of the state has changed."""

ARRANGE_TIMEOUT = 600.0
"""Seconds the preparations beside the training may take: terabytes of arenas are not there at once."""

ARRANGE_PATIENCE = 2.0
"""Seconds the end of a session waits for preparations."""


class Snapshots:
    """The snapshots of one rank.

    Args:
        tree: the state.
        link: to the agent.
        group: the job's ranks.
        place: of this rank.
        url: of the run.
        on_failure: takes an error that happened beside the training.

    Attributes:
        arranged: whether the preparations for the first snapshot have begun.
        last_step: step of the last snapshot that was taken; -1 before the first.
        last_tried: step of the last one that was tried, the same on all ranks.
        last_blocked: seconds it held the loop up.
        overlap: copy parameters and optimizer state beside the training; `fence` is called before they change.
        metrics: values of this step that go with its snapshot; rank 0's count.
    """

    def __init__(
        self,
        tree: StateTree,
        link: AgentLink,
        group: Group,
        place: Placement,
        url: str,
        on_failure: Callable[[CkptsvcError], None],
    ) -> None:
        self.last_step = -1
        self.last_tried = -1
        self.last_blocked = 0.0
        self.overlap = False
        self.metrics: Mapping[str, Any] | None = None
        self._tree, self._link, self._group, self._place, self._url = tree, link, group, place, url
        self._on_failure = on_failure
        self._plans: dict[str, StagePlan] = {}  # by structure of the state
        self._twins = Twins(link)
        self._arranging: threading.Thread | None = None
        self._copying: threading.Thread | None = None
        self._told = True  # for how long the last snapshot has held the loop up

    @property
    def arranged(self) -> bool:
        """Whether the preparations for the first snapshot have begun."""
        return self._arranging is not None

    def agree(self, capture: Capture, generation: int, timeout: float) -> StagePlan | None:
        """Tell the job which plain tensors this rank holds, learn who holds the same, and plan the staging.

        None if not every rank has told in time. The plan is remembered for this structure of the state.
        """
        plain = sorted(p.meta.name for p in capture.parts if p.holders.ranks is None)
        digest = xxhash.xxh3_64_hexdigest("\0".join(plain).encode())
        same, complete = self._link.prepare(digest, generation, timeout)
        if not complete:
            return None
        plan = StagePlan.make(capture, self._group.rank, same)
        self._plans = {capture.structure: plan}
        return plan

    def finish(self) -> None:
        """Wait until preparations in progress have ended, a few seconds at most."""
        if self._arranging is not None:
            self._arranging.join(ARRANGE_PATIENCE)

    def arrange(self, step: int) -> None:
        """Beside the training: agree on who stages what, have arenas made and mapped for the first snapshot."""
        self._arrange(self._tree.capture(), step)

    def _arrange(self, capture: Capture, generation: int) -> None:
        objects = len(encode(capture.objects))

        def work() -> None:
            try:
                plan = self._plans.get(capture.structure) or self.agree(capture, generation, ARRANGE_TIMEOUT)
                if plan is not None:
                    plan.forget(self._link.provide(plan.room(objects), ARRANGE_TIMEOUT))
            except CkptsvcError as error:
                log.warning("rank %d: not ready to save yet: %s", self._group.rank, error)

        self._arranging = threading.Thread(target=work, name="ckptsvc-arrange", daemon=True)
        self._arranging.start()

    def take(self, step: int, patience: float) -> None:
        """Take a snapshot; when this returns the agent has it (with overlap: will have it, before the next `fence`).

        A step is tried once in an epoch: before it is tried again, all ranks must begin another (see Session.save).

        Raises:
            InvalidInput: the state cannot be stored.
            CkptsvcError: there is no agent, no arena within `patience` seconds, or no epoch to save in.
        """
        self.fence()
        began = time.perf_counter()
        self.last_tried = step
        slot = ""
        try:
            capture = self._tree.capture()
            objects = encode(capture.objects)
            metrics = _numbers(self.metrics or {}) if self._group.rank == 0 else {}
            plan = self._plan_for(capture, step)
            offer = self._link.acquire(step, plan.template.total(len(objects)), patience)
            slot = offer.slot
            info = self._info(step, offer.epoch)
            arena = self._link.arena(slot)
            failpoint("before_copy")
            nbytes, finish = plan.write(capture, arena.view, slot, info, objects, overlap=self.overlap)
            twin = self._twins.write(offer, capture, plan, info, objects, overlap=self.overlap)
        except Exception as error:
            # Whatever it was: the other ranks must not wait for this one.
            self._abandon(slot, step, error)
            raise

        def hand_over() -> None:
            try:
                finish()
                other = twin.finish()
                failpoint("before_submit")
                request = agent_pb2.SubmitRequest(slot=slot, step=step, bytes=nbytes, aliases=capture.aliases)
                request.metrics.update(metrics)
                request.twin_slot, request.twin_bytes = other.slot, other.nbytes
                request.staging = time.perf_counter() - began
                self._link.submit(request)
                failpoint("after_submit")
            except Exception as error:
                self._abandon(slot, step, error)
                raise

        if self.overlap:
            self._copying = threading.Thread(target=self._beside, args=(hand_over,), name="ckptsvc-copy", daemon=True)
            self._copying.start()
        else:
            hand_over()
        self.last_step = step
        self.last_blocked = time.perf_counter() - began
        self._told = False
        if not self.overlap:
            self._tell()

    def _info(self, step: int, epoch: int) -> ShardInfo:
        return ShardInfo(
            run=self._url,
            job=self._place.job,
            step=step,
            epoch=epoch,
            attempt=self._place.attempt,
            rank=self._group.rank,
            world_size=self._group.size,
        )

    def fence(self, *_: Any) -> None:
        """Wait until the copy that runs beside the training is done: the state is about to change."""
        copying, self._copying = self._copying, None
        if copying is not None:
            began = time.perf_counter()
            copying.join()
            self.last_blocked += time.perf_counter() - began
        self._tell()

    def _tell(self) -> None:
        """Put on the heartbeat page for how long the last snapshot has held the loop up, once that is known."""
        if not self._told:
            self._told = True
            self._link.add("blocked", int(self.last_blocked * 1e9))
            self._link.add("snapshots", 1)

    def wait(self, timeout: float, progress: Callable[[], None]) -> bool:
        """Wait until the last snapshot's save has ended: True when committed, False if there was none.

        `progress` is called whenever the agent has answered that it is still at it.

        Raises:
            SaveFailed, Fenced: it ended otherwise, or has not ended within `timeout` seconds.
        """
        self.fence()
        if self.last_step < 0:
            return False
        what, began = f"step {self.last_step}", time.perf_counter()
        try:
            outcome = self._link.wait_save(self.last_step, timeout, progress)
        except CkptsvcError as error:
            raise SaveFailed(f"{what}: the outcome is not known: {error}") from error
        finally:
            self._link.add("waited", int((time.perf_counter() - began) * 1e9))
        if outcome.outcome == agent_pb2.OUTCOME_COMMITTED:
            return True
        if outcome.outcome == agent_pb2.OUTCOME_FENCED:
            raise Fenced(f"{what}: {outcome.reason}")
        raise SaveFailed(f"{what}: {outcome.reason or f'not committed after {timeout:g} s'}")

    def _beside(self, action: Callable[[], None]) -> None:
        try:
            action()
        except CkptsvcError as error:
            self._on_failure(error)
        except Exception as error:  # noqa: BLE001  no failure of a copy may end the training
            self._on_failure(CkptsvcError(f"{type(error).__name__}: {error}"))

    def _abandon(self, slot: str, step: int, why: Exception) -> None:
        code = why.code if isinstance(why, CkptsvcError) else "internal"
        try:
            self._link.abandon(slot, step, str(why) or type(why).__name__, code)
        except CkptsvcError as error:
            log.warning("rank %d: %s", self._group.rank, error)

    def _plan_for(self, capture: Capture, step: int) -> StagePlan:
        """The plan for the structure the state has now; the first time, all ranks agree on it."""
        plan = self._plans.get(capture.structure)
        if plan is not None:
            return plan
        if self._arranging is not None and self._arranging.is_alive():
            self._arranging.join(AGREE_PATIENCE)
            plan = self._plans.get(capture.structure)
        else:
            plan = self.agree(capture, step, AGREE_PATIENCE)
            self._arrange(capture, step)
        # Without an answer this rank stages all it holds: right whatever the others do, if more than need be.
        return plan or StagePlan.make(capture, self._group.rank, (self._group.rank,))


def _numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Metrics as they are recorded. A value that is no number is left out: a checkpoint is worth more than that."""
    found: dict[str, str] = {}
    for name, value in metrics.items():
        try:
            if len(found) == MAX_METRICS:
                raise InvalidInput(f"there are more than {MAX_METRICS}")
            if isinstance(value, torch.Tensor):
                value = value.detach()  # else torch warns of every loss
            found |= metrics_text({str(name): value})
        except InvalidInput as error:
            log.warning("metric %r is left out: %s", name, error)
    return found
