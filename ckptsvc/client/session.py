"""The two calls: `attach` before the training loop, `step` in it.

    attach   find or start the agent, register, announce what this rank holds, restore the newest good checkpoint
    step     heartbeat (0.4 us); when a snapshot is due: arena <- state, hand it over, go on

Nothing that fails after `attach` ends the training: a snapshot that cannot be taken is skipped and reported.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import secrets
import socket
import threading
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from ckptsvc.client.candidates import Candidate, Candidates
from ckptsvc.client.group import Group, the_group
from ckptsvc.client.link import AgentLink
from ckptsvc.client.parts import Capture
from ckptsvc.client.restore import restore
from ckptsvc.client.stage import StagePlan
from ckptsvc.client.state import StateTree, optimizers_in
from ckptsvc.config import Settings, load, runtime_dir
from ckptsvc.errors import (
    EXIT_STATUS,
    AgentUnavailable,
    CkptsvcError,
    ConfigError,
    Damaged,
    Fenced,
    IncompatibleVersion,
    InvalidInput,
    NoCheckpoint,
    SaveFailed,
    StoreError,
)
from ckptsvc.format.objects import encode
from ckptsvc.format.shard import ShardInfo
from ckptsvc.launch import LOCAL_JOB, Placement, detect
from ckptsvc.pipeline.failpoint import failpoint
from ckptsvc.rpc.dial import ensure_agent, is_alive
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.storage import canonical

log = logging.getLogger("ckptsvc")

ATTACH_TIMEOUT = 120.0
"""Seconds until all ranks must have come to `attach`."""

AGREE_PATIENCE = 5.0
"""Seconds a snapshot waits for the other ranks after the structure of the state has changed."""

ARRANGE_TIMEOUT = 600.0
"""Seconds the preparations beside the training may take: terabytes of arenas are not there at once."""

RECONNECT_EVERY = 2.0
"""Seconds between attempts to reach an agent that is gone."""

PRIVATE_LINGER = "20s"
"""How long a private agent stays after its last rank has gone and its last save has ended."""


class StopTraining(SystemExit):
    """Raised by `step` when the job was asked to stop, after a last save has committed."""

    def __init__(self, reason: str) -> None:
        super().__init__(EXIT_STATUS["interrupted"])
        self.reason = reason


def attach(
    state: Mapping[str, Any],
    store: str | None = None,
    *,
    every: int | str | None = None,
    keep: int | None = None,
    include_rng: bool = True,
    resume: bool = True,
    overlap: bool = False,
) -> Session:
    """Restore the newest good checkpoint into `state`, and start saving it.

    Every rank of the job calls this once, after its process group (if any) is initialised.

    Args:
        state: name -> module, optimizer, object with `state_dict`/`load_state_dict`, tensor, array, or plain values.
            The mapping is kept and read again at every save.
        store: URL or path of the run; None takes `store.url` of the settings.
        every: steps (an int), a duration ("10min"), or "off"; None takes `save.every` of the settings.
        keep: newest committed checkpoints to keep, 0 for all; None takes `save.keep`.
        include_rng: save and restore the random number generators of Python, NumPy and torch.
        resume: False starts from the state as it is, whatever the run holds.
        overlap: copy parameters and optimizer state beside forward and backward; the next `optimizer.step()` waits for
            the copy. Only for programs in which nothing but the optimizers changes them after `run.step()`.

    Raises:
        ConfigError: a setting is wrong.
        RunBusy: another live job writes to this run.
        UnsupportedObject: something in `state` cannot be stored; says where.
        LayoutError: the checkpoint does not fit `state`.
        NoCheckpoint, Damaged: there are checkpoints, and none that could be restored.
        StoreError: the store cannot be read.
        AgentUnavailable: no agent could be reached or started.
    """
    overrides = {"store.url": store, "save.every": every, "save.keep": keep}
    settings = load(os.environ, overrides)
    if not settings.store.url:
        raise ConfigError("attach needs a store", hint='pass store="file:///path" or set CKPTSVC_STORE_URL')
    session = Session(state, settings, include_rng=include_rng)
    session._open(resume, overlap)
    return session


class Session:
    """What `attach` returns.

    Attributes:
        steps_done: steps this state has behind it: 0, or the step of the checkpoint that was restored.
        state: the plain values of the state tree, as restored (or as given).
        restored_from: "memory", "store", or None for a fresh start.
        last_blocked: seconds the loop was held up by the last snapshot.
        skipped: snapshots that were due and not taken.
    """

    def __init__(self, state: Mapping[str, Any], settings: Settings, *, include_rng: bool) -> None:
        self.steps_done = 0
        self.state: dict[str, Any] = dict(state)
        self.restored_from: str | None = None
        self.last_blocked = 0.0
        self.skipped = 0
        self.settings = settings
        self._tree_of = state
        self._include_rng = include_rng
        self._url = canonical(settings.store.url)
        self._plans: dict[str, StagePlan] = {}  # by structure of the state
        self._arranging: threading.Thread | None = None
        self._closed = False
        self._known_failure = -1
        self._copying: threading.Thread | None = None
        self._fences: list[Any] = []
        self._last_order = -1
        self._reconnecting: threading.Thread | None = None
        self._next_reconnect = 0.0
        self._last_saved = -1

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One training step is done: heartbeat, and a snapshot if one is due.

        Raises:
            StopTraining: the job was asked to stop, and has saved.
        """
        self.steps_done += 1
        page = self._link.page
        page.put("step", self.steps_done)
        page.put("at", time.monotonic_ns())
        due = self._every_steps and self.steps_done % self._every_steps == 0
        if (
            due
            or self._link.identity is None
            or page.get("save_at") != self._last_order
            or page.get("stop_at") >= 0
            or page.get("failed") != self._known_failure
            or self._arranging is None
        ):
            self._attend(bool(due))

    def save(self, *, wait: bool = False, timeout: float | None = None) -> bool:
        """Take a snapshot now; every rank must call this at the same step.

        Args:
            wait: return only when the checkpoint is committed.
            timeout: seconds to wait for an arena and for the commit; None takes `save.timeout`.

        Returns:
            whether the snapshot was taken (with `wait`: committed).

        Raises:
            SaveFailed, Fenced: only with `wait`: how the save ended otherwise.
            UnsupportedObject: something in the state cannot be stored.
        """
        limit = self.settings.save.timeout if timeout is None else timeout
        try:
            if self._link.identity is None:
                self._link.connect()
            self._snapshot(limit)
        except (InvalidInput, Fenced):
            raise
        except CkptsvcError as error:
            if wait:
                raise SaveFailed(f"step {self.steps_done} was not saved: {error}") from error
            self._report_skip(error)
            return False
        return not wait or self.wait(limit)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the last snapshot's save has ended; True when it is committed.

        Raises:
            SaveFailed, Fenced: it ended otherwise, or has not ended within `timeout` seconds.
        """
        self._fence()
        if self._last_saved < 0:
            return False
        limit = self.settings.save.timeout if timeout is None else timeout
        try:
            outcome = self._link.wait_save(self._last_saved, limit)
        except AgentUnavailable as error:
            raise SaveFailed(f"step {self._last_saved}: the outcome is not known: {error}") from error
        if outcome.outcome == agent_pb2.OUTCOME_COMMITTED:
            return True
        if outcome.outcome == agent_pb2.OUTCOME_FENCED:
            raise Fenced(f"step {self._last_saved}: {outcome.reason}")
        reason = outcome.reason or f"not committed after {limit:g} s"
        raise SaveFailed(f"step {self._last_saved}: {reason}")

    @property
    def committed_step(self) -> int | None:
        """Step of the newest checkpoint of this session known to be committed; None before the first."""
        step = self._link.page.get("committed")
        return step if step >= 0 else None

    def restore(self, step: int | None = None) -> int:
        """Go back to a checkpoint: of that step, or the newest. Every rank calls this together.

        Returns:
            the step restored.

        Raises:
            NoCheckpoint: there is none.
            Damaged: none of that step verifies.
        """
        self._fence()
        found = self._restore(step)
        if found is None:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NoCheckpoint(f"{self._url} has {what}")
        return found

    def close(self) -> None:
        """End the session in good order; saves in progress go on in the agent. Safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._fence()
        for fence in self._fences:
            fence.remove()
        atexit.unregister(self.close)
        with contextlib.suppress(CkptsvcError):  # an agent that is gone needs no good-bye
            self._link.leave()
        self._link.disconnect()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _open(self, resume: bool, overlap: bool) -> None:
        self._group: Group = the_group()
        self._place = _placement(self._group)
        coordinator = _coordinator(self._group, self._place)
        directory, self._private = _agent_directory(self._place, self.settings)
        every = self.settings.save.every
        self._every_steps = every.steps if every else 0
        self._tree = StateTree(self._tree_of, self._group.rank, self._group.size, self._include_rng)
        registration = {
            "op": "register",
            "job": self._place.job,
            "store": self._url,
            "attempt": self._place.attempt,
            "rank": self._group.rank,
            "world_size": self._group.size,
            "every_steps": self._every_steps,
            "every_seconds": every.seconds if every else 0.0,
            "keep": self.settings.save.keep,
            "extent": self.settings.save.extent,
            "coordinator": coordinator,
        }
        self._link = AgentLink(directory, registration)
        self._epoch = 0
        self._start_agent()
        self._link.connect()
        capture = self._tree.capture()
        encode(capture.objects)  # what cannot be stored is refused now, not at the first save
        if self._agree(capture, 0, ATTACH_TIMEOUT) is None:
            raise AgentUnavailable(
                f"not every one of {self._group.size} ranks has attached, or the run gave no epoch, within"
                f" {ATTACH_TIMEOUT:g} s"
            )
        if resume and self._restore(None) is not None:
            # Optimizers have their state now: the structure is the final one.
            self._arrange(self._tree.capture())
        self._link.page.put("step", self.steps_done)
        self._link.page.put("at", time.monotonic_ns())
        if overlap:
            self._fences = [o.register_step_pre_hook(self._fence) for o in optimizers_in(self._tree_of)]
            if not self._fences:
                raise ConfigError("overlap needs an optimizer in the state: its step is what the copy must not meet")
        atexit.register(self.close)

    def _start_agent(self) -> None:
        if self._private:
            arguments = ["--linger", PRIVATE_LINGER, "--name", self._place.node]
            ensure_agent(self._link.directory, arguments)

    def _agree(self, capture: Capture, generation: int, timeout: float) -> StagePlan | None:
        """Tell the job which plain tensors this rank holds, learn who holds the same, and plan the staging.

        None if not every rank has told in time. The result is remembered for this structure of the state.
        """
        plain = sorted(p.meta.name for p in capture.parts if p.holders.ranks is None)
        digest = xxhash.xxh3_64_hexdigest("\0".join(plain).encode())
        same, complete = self._link.prepare(digest, generation, timeout)
        if not complete:
            return None
        plan = StagePlan.make(capture, self._group.rank, same)
        self._plans = {capture.structure: plan}
        return plan

    def _arrange(self, capture: Capture) -> None:
        """Beside the training: agree on who stages what, have arenas made and mapped for the first snapshot."""
        generation = self.steps_done
        objects = len(encode(capture.objects))

        def work() -> None:
            try:
                plan = self._plans.get(capture.structure) or self._agree(capture, generation, ARRANGE_TIMEOUT)
                if plan is not None:
                    self._link.provide(plan.room(objects), ARRANGE_TIMEOUT)
            except CkptsvcError as error:
                log.warning("rank %d: not ready to save yet: %s", self._group.rank, error)

        self._arranging = threading.Thread(target=work, name="ckptsvc-arrange", daemon=True)
        self._arranging.start()

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _attend(self, due: bool) -> None:
        if self._link.identity is None:
            self._reconnect()
        page = self._link.page
        if page.get("failed") != self._known_failure:
            self._known_failure = page.get("failed")
            self._try(self._report_failure)
        order, stop = page.get("save_at"), page.get("stop_at")
        if order != self._last_order and order <= self.steps_done:
            self._last_order = order
            if order == self.steps_done:
                due = True
            elif order >= 0:
                self._try(lambda: self._link.abandon("", order, "already past the step at which to save"))
        stopping = 0 <= stop <= self.steps_done
        if due or stopping:
            patience = self.settings.save.timeout if stopping else self.settings.save.deadline
            self._try(lambda: self._snapshot(patience), count=True)
        elif self._arranging is None:
            # The first step after a fresh start: the optimizers have made their state by now.
            self._try(lambda: self._arrange(self._tree.capture()))
        if stopping:
            self._try(self.wait)
            self.close()
            raise StopTraining(f"asked to stop at step {stop}")

    def _report_failure(self) -> None:
        """Tell the program how a save that it has not waited for has ended."""
        outcome = self._link.wait_save(self._known_failure, 0.0)
        self._warn(f"step {self._known_failure} was not saved: {outcome.reason}")

    def _try(self, action: Any, *, count: bool = False) -> None:
        """Do something that must not end the training."""
        try:
            action()
        except CkptsvcError as error:
            if count:
                self._report_skip(error)
            else:
                log.warning("rank %d: %s", self._group.rank, error)

    def _report_skip(self, error: CkptsvcError) -> None:
        self.skipped += 1
        self._warn(f"snapshot of step {self.steps_done} skipped: {error}")

    def _warn(self, message: str) -> None:
        log.warning("rank %d: %s", self._group.rank, message)
        warnings.warn(f"ckptsvc: {message}", RuntimeWarning, stacklevel=2)

    def _snapshot(self, patience: float) -> None:
        self._fence()
        began = time.perf_counter()
        step = self.steps_done
        slot = ""
        try:
            capture = self._tree.capture()
            objects = encode(capture.objects)
            plan = self._plan_for(capture)
            slot, epoch = self._link.acquire(step, plan.template.total(len(objects)), patience)
            arena = self._link.arena(slot)
            info = ShardInfo(
                run=self._url,
                job=self._place.job,
                step=step,
                epoch=epoch,
                attempt=self._place.attempt,
                rank=self._group.rank,
                world_size=self._group.size,
            )
            failpoint("before_copy")
            nbytes, finish = plan.write(capture, arena.view, slot, info, objects, overlap=bool(self._fences))

            def hand_over() -> None:
                finish()
                failpoint("before_submit")
                self._link.submit(slot, step, nbytes, capture.aliases)
                failpoint("after_submit")

            if self._fences:
                self._copying = threading.Thread(
                    target=self._try, args=(hand_over,), kwargs={"count": True}, name="ckptsvc-copy", daemon=True
                )
                self._copying.start()
            else:
                hand_over()
        except InvalidInput as error:
            # Not a fault of the agent's: tell it, so that the other ranks do not wait for this one.
            why = str(error)
            self._try(lambda: self._link.abandon(slot, step, why))
            raise
        self._last_saved = step
        self.last_blocked = time.perf_counter() - began

    def _fence(self, *_: Any) -> None:
        """Wait until the copy that runs beside the training is done: an optimizer is about to change the state."""
        copying, self._copying = self._copying, None
        if copying is not None:
            began = time.perf_counter()
            copying.join()
            self.last_blocked += time.perf_counter() - began

    def _plan_for(self, capture: Capture) -> StagePlan:
        """The plan for the structure the state has now; the first time, all ranks agree on it."""
        plan = self._plans.get(capture.structure)
        if plan is not None:
            return plan
        if self._arranging is not None and self._arranging.is_alive():
            self._arranging.join(AGREE_PATIENCE)
            plan = self._plans.get(capture.structure)
        else:
            plan = self._agree(capture, self.steps_done, AGREE_PATIENCE)
            self._arrange(capture)
        # Without an answer this rank stages all it holds: right whatever the others do, if more than need be.
        return plan or StagePlan.make(capture, self._group.rank, (self._group.rank,))

    def _reconnect(self) -> None:
        """Try to reach the agent again, beside the training."""
        now = time.monotonic()
        if now < self._next_reconnect or (self._reconnecting and self._reconnecting.is_alive()):
            return
        self._next_reconnect = now + RECONNECT_EVERY

        def work() -> None:
            try:
                self._start_agent()
                self._link.connect()
                log.warning("rank %d: connected to the agent again", self._group.rank)
            except CkptsvcError as error:
                log.warning("rank %d: no agent: %s", self._group.rank, error)

        self._reconnecting = threading.Thread(target=work, name="ckptsvc-reconnect", daemon=True)
        self._reconnecting.start()

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def _restore(self, step: int | None) -> int | None:
        """Try the candidates, newest first, until one restores on every rank; None if there are none."""
        candidates = Candidates(self._url, self._link, self._group, self._place)
        tried: list[str] = []
        for candidate in candidates.find(step):
            try:
                values = self._restore_one(candidates, candidate)
            except (Damaged, IncompatibleVersion, StoreError) as error:
                tried.append(f"{candidate}: {error}")
                log.warning("rank %d: cannot restore %s: %s; trying an older one", self._group.rank, candidate, error)
                if self._group.rank == 0:
                    warnings.warn(f"ckptsvc: cannot restore {candidate}: {error}", RuntimeWarning, stacklevel=4)
                continue
            self.state = {**self._tree_of, **values}
            self.steps_done = candidate.step
            self.restored_from = candidate.tier
            log.info("rank %d: restored %s", self._group.rank, candidate)
            return candidate.step
        if tried:
            raise Damaged(f"none of {len(tried)} checkpoints could be restored; the newest: {tried[0]}")
        return None

    def _restore_one(self, candidates: Candidates, candidate: Candidate) -> dict[str, Any]:
        failure: CkptsvcError | None = None
        image = None
        try:
            image = candidates.open(candidate)
        except (Damaged, IncompatibleVersion, StoreError) as error:
            failure = error
        except (NoCheckpoint, AgentUnavailable) as error:
            failure = Damaged(str(error))
        if not self._group.all_true(failure is None):
            raise failure or Damaged("another rank cannot open it")
        assert image is not None
        return restore(image, self._tree, self._group)


def _placement(group: Group) -> Placement:
    """Where this process stands; a job that nobody named gets a name that no other has."""
    place = detect(os.environ, socket.gethostname())
    if place.job == LOCAL_JOB:
        name = group.broadcast(f"local-{os.getpid()}-{secrets.token_hex(4)}".encode()).decode()
        place = Placement(**{**{f: getattr(place, f) for f in place.__slots__}, "job": name})
    return place


def _coordinator(group: Group, place: Placement) -> str:
    """Address of the job's coordinator; "" if this node's agent is it."""
    given = os.environ.get("CKPTSVC_COORDINATOR")
    nodes = sorted({n.decode() for n in group.all_gather(place.node.encode())})
    if given is None and len(nodes) > 1:
        raise ConfigError(
            f"the ranks are on {len(nodes)} nodes ({', '.join(nodes[:3])} ...), and none of their agents coordinates",
            hint="start the job with `ckptsvc run`, or set CKPTSVC_COORDINATOR to the address of one agent",
        )
    return given or ""


def _agent_directory(place: Placement, settings: Settings) -> tuple[Path, bool]:
    """(directory of the agent to use, whether it is private to this job)."""
    given = os.environ.get("CKPTSVC_SOCKET")
    if given:
        return Path(given), False
    shared = Path(settings.agent.socket_dir) if settings.agent.socket_dir else runtime_dir(os.environ)
    if is_alive(shared):
        return shared, False
    return shared / f"job-{xxhash.xxh3_64_hexdigest(place.job.encode())}", True
