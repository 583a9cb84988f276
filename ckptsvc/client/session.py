"""The two calls: `attach` before the training loop, `step` in it.

    attach   find or start the agent, register, announce what this rank holds, restore the newest good checkpoint
    step     heartbeat (0.5 us); when a snapshot is due: arena <- state, hand it over, go on

What takes longer than a step is a phase of its own (`Session.phase`): the agent must not take it for a hang.

Nothing that fails after `attach` ends the training: a snapshot that cannot be taken is skipped and reported.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Mapping
from typing import Any, NoReturn

from ckptsvc.client.candidates import Candidate, Candidates
from ckptsvc.client.foreign import restore_foreign
from ckptsvc.client.group import the_group, together
from ckptsvc.client.joining import agent_directory, coordinator_of, log_as_set, placement_of, registration
from ckptsvc.client.link import AgentLink
from ckptsvc.client.phases import FIRST_STEP, STEP, Inside, Phases
from ckptsvc.client.restore import restore
from ckptsvc.client.session_view import session_view
from ckptsvc.client.signals import StopSignals
from ckptsvc.client.snapshots import Snapshots
from ckptsvc.client.state import StateTree, optimizers_in
from ckptsvc.config import load
from ckptsvc.errors import (
    EXIT_STATUS,
    AgentUnavailable,
    CkptsvcError,
    ConfigError,
    Damaged,
    Fenced,
    IncompatibleVersion,
    InvalidInput,
    LayoutError,
    NoCheckpoint,
    SaveFailed,
    StoreError,
    UnsupportedObject,
)
from ckptsvc.format.objects import encode
from ckptsvc.rpc.dial import ensure_agent
from ckptsvc.settings import Settings
from ckptsvc.storage import canonical

log = logging.getLogger("ckptsvc")

ATTACH_TIMEOUT = 120.0
"""Seconds until all ranks must have come to `attach`."""

RECONNECT_EVERY = 0.5
"""Seconds between attempts to reach an agent that is gone: one that is replaced is away for about a second."""

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
    init_from: str | None = None,
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
        init_from: where a run begins that has no checkpoint yet: a checkpoint of another framework, as
            "deepspeed:/path/global_step100" or "hf:/path" (see `ckptsvc.interop.formats`). It is read as it lies.

    Raises:
        ConfigError: a setting is wrong.
        RunBusy: another live job writes to this run.
        UnsupportedObject: something in `state` cannot be stored; says where.
        LayoutError: the checkpoint does not fit `state`.
        Damaged, IncompatibleVersion: there are checkpoints, and none could be restored; all are of a newer version.
        StoreError: the store cannot be read.
        AgentUnavailable: no agent could be reached or started.
    """
    overrides = {"store.url": store, "save.every": every, "save.keep": keep}
    settings = load(os.environ, overrides)
    if not settings.store.url:
        raise ConfigError("attach needs a store", hint='pass store="file:///path" or set CKPTSVC_STORE_URL')
    session = Session(state, settings, include_rng=include_rng)
    session._open(resume, overlap, init_from)
    return session


class Session:
    """What `attach` returns.

    Attributes:
        steps_done: steps this state has behind it: 0, or the step of the checkpoint that was restored.
        state: the plain values of the state tree, as restored (or as given).
        restored_from: "memory", "local", "store", the address given as `init_from`, or None for a fresh start.
        skipped: snapshots that were due and not taken.
    """

    def __init__(self, state: Mapping[str, Any], settings: Settings, *, include_rng: bool) -> None:
        self.steps_done = 0
        self.state: dict[str, Any] = dict(state)
        self.restored_from: str | None = None
        self.skipped = 0
        self.settings = settings
        self._tree_of = state
        self._include_rng = include_rng
        self._url = canonical(settings.store.url)
        self._closed = threading.Event()
        self._known_failure = -1
        self._rewinds = 0
        self._warm = False  # the first step is done
        self._fences: list[Any] = []
        self._orders = {"save_at": -1, "stop_at": -1}  # the last that have come due or passed
        self._stop_now = False  # alone, and told to end: there is nobody to agree with
        self._signals = StopSignals(self._signalled)

    # ---- the loop ----------------------------------------------------------------------------------------------------

    def step(self, metrics: Mapping[str, Any] | None = None) -> None:
        """One training step is done: heartbeat, and a snapshot if one is due.

        Args:
            metrics: values of this step by name, as {"loss": loss}: numbers, or tensors of one element, which are read
                only when a snapshot is taken. They are kept with its checkpoint; rank 0's count.

        Raises:
            StopTraining: the job was asked to stop, and has saved.
        """
        self.steps_done += 1
        self._snapshots.metrics = metrics
        page = self._phases.beat(self.steps_done)
        if not self._warm:
            self._warm = True
            self._phases.become(STEP)
        due = self._every_steps and self.steps_done % self._every_steps == 0
        if (
            due
            or page.get("save_at") != self._orders["save_at"]
            or page.get("stop_at") != self._orders["stop_at"]
            or page.get("failed") != self._known_failure
            or self._stop_now
            or not self._snapshots.arranged
        ):
            self._attend(bool(due) and not page.is_paused(self.steps_done))

    def phase(self, name: str) -> Inside:
        """Declare something that is not a training step: `with run.phase("evaluation"):`.

        Phases nest; the innermost counts. Each has its own history in this job, by which a hang is told from work.

        Args:
            name: at most 31 letters, digits, spaces and ". _ / -"; the same for what takes the same kind of time.

        Raises:
            InvalidInput: the name is not one.
        """
        return self._phases.inside(name)

    def progress(self, amount: int = 1) -> None:
        """Show that a long phase goes on, by any amount in any unit; it costs less than a microsecond."""
        self._phases.progress(amount)

    def save(
        self, *, wait: bool = False, timeout: float | None = None, metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Take a snapshot now; every rank must call this at the same step.

        Args:
            wait: return only when the checkpoint is committed.
            timeout: seconds to wait for an arena and for the commit; None takes `save.timeout`.
            metrics: as for `step`, in addition to those given there.

        Returns:
            whether the snapshot was taken (with `wait`: committed).

        Raises:
            SaveFailed, Fenced: only with `wait`: how the save ended otherwise.
            UnsupportedObject: something in the state cannot be stored.
        """
        limit = self.settings.save.timeout if timeout is None else timeout
        self._snapshots.metrics = {**(self._snapshots.metrics or {}), **(metrics or {})}
        try:
            self._link.connect()
            if self._snapshots.last_tried == self.steps_done:
                # Saved, or tried, at this step before: the state may be another one now, and is saved as such.
                self._new_epoch()
            with self.phase("save"):
                self._snapshots.take(self.steps_done, limit)
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
        with self.phase("save"):
            return self._snapshots.wait(
                self.settings.save.timeout if timeout is None else timeout, self._phases.progress
            )

    @property
    def last_blocked(self) -> float:
        """Seconds the loop was held up by the last snapshot; with overlap, by the wait before the optimizer too."""
        return self._snapshots.last_blocked

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
        self._snapshots.fence()
        found = self._restore(step)
        if found is None:
            what = "no checkpoint" if step is None else f"no checkpoint of step {step}"
            raise NoCheckpoint(f"{self._url} has {what}")
        self._try(self._new_epoch)  # steps come again that this one may hold already
        self._begin()
        return found

    def close(self) -> None:
        """End the session in good order; saves in progress go on in the agent. Safe to call twice."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._snapshots.fence()
        self._snapshots.finish()
        for fence in self._fences:
            fence.remove()
        atexit.unregister(self.close)
        self._signals.restore()
        with contextlib.suppress(CkptsvcError):  # an agent that is gone needs no good-bye
            self._link.leave()
        self._link.disconnect()

    def __repr__(self) -> str:
        where = f"rank {self._place.rank} of {self._place.world_size}"
        return f"<ckptsvc session of job {self._place.job}: {where}, {self.steps_done:,} steps done>"

    def _repr_html_(self) -> str:
        return session_view(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- opening -----------------------------------------------------------------------------------------------------

    def _open(self, resume: bool, overlap: bool, init_from: str | None) -> None:
        group = self._group = the_group()
        self._place = placement_of(group)
        coordinator = coordinator_of(group, self._place, self.settings)
        directory, self._private = agent_directory(self._place, self.settings)
        every = self.settings.save.every
        self._every_steps = every.steps if every else 0
        self._tree = StateTree(self._tree_of, group.rank, group.size, self._include_rng)
        self._link = AgentLink(directory, registration(group, self._place, self.settings, self._url, coordinator))
        log_as_set(self.settings, self._link.registration, lambda: self.steps_done)
        self._phases = Phases(self._link)
        self._snapshots = Snapshots(self._tree, self._link, group, self._place, self._url, self._report_skip)
        try:
            self._join(resume, overlap, init_from)
        except BaseException:
            self.close()
            raise

    def _join(self, resume: bool, overlap: bool, init_from: str | None) -> None:
        group = self._group
        self._start_agent()
        self._link.connect()
        capture = self._tree.capture()
        encode(capture.objects)  # what cannot be stored is refused now, not at the first save
        if self._snapshots.agree(capture, 0, ATTACH_TIMEOUT) is None:
            raise AgentUnavailable(
                f"not every one of {group.size} ranks has attached, or the run gave no epoch, within"
                f" {ATTACH_TIMEOUT:g} s"
            )
        if (resume and self._restore(None) is not None) or (init_from is not None and self._begin_from(init_from)):
            self._snapshots.arrange(self.steps_done)  # optimizers have their state now: the structure is final
        self._begin()
        if overlap:
            self._fences = [o.register_step_pre_hook(self._snapshots.fence) for o in optimizers_in(self._tree_of)]
            if not self._fences:
                raise ConfigError("overlap needs an optimizer in the state: its step is what the copy must not meet")
            self._snapshots.overlap = True
        atexit.register(self.close)
        self._signals.install(os.environ)
        self._phases.become(FIRST_STEP)
        threading.Thread(target=self._keep_connected, name="ckptsvc-keep-connected", daemon=True).start()

    def _start_agent(self) -> None:
        if self._private:
            arguments = ["--linger", PRIVATE_LINGER, "--name", self._place.node]
            ensure_agent(self._link.directory, arguments)

    def _begin(self) -> None:
        """Steps are done from here on."""
        self._phases.beat(self.steps_done).put("began", self.steps_done)

    def _new_epoch(self) -> None:
        """Begin another epoch; every rank calls this at the same step."""
        self._rewinds += 1
        self._link.rewind(self._rewinds, ATTACH_TIMEOUT)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _signalled(self, number: int) -> None:
        self._stop_now = self._group.size == 1
        self._link.page.put("signal", number)

    def _attend(self, due: bool) -> None:
        page = self._link.page
        if page.get("failed") != self._known_failure:
            self._known_failure = page.get("failed")
            if self._known_failure >= 0:  # a new agent's page says nothing yet
                self._try(self._report_failure)
        due = self._ordered("save_at") or due
        stopping = self._ordered("stop_at") or self._stop_now
        if due or stopping:
            patience = self.settings.save.timeout if stopping else self.settings.save.deadline
            with self.phase("save"):
                self._try(lambda: self._snapshots.take(self.steps_done, patience), count=True)
        elif not self._snapshots.arranged:
            # The first step after a fresh start: the optimizers have made their state by now.
            self._try(lambda: self._snapshots.arrange(self.steps_done))
        if stopping:
            self._stop()

    def _stop(self) -> NoReturn:
        self._try(self.wait)
        saved = "which is committed" if self.committed_step == self.steps_done else "which is not committed"
        reason = f"stopped on request at step {self.steps_done}, {saved}"
        if self._group.rank == 0:
            log.warning("%s", reason)
        self.close()
        raise StopTraining(reason)

    def _ordered(self, kind: str) -> bool:
        """Whether an order is due at this very step. A rank that obeyed later would leave the others waiting for it."""
        step = self._link.page.get(kind)
        if step == self._orders[kind] or step > self.steps_done:
            return False
        self._orders[kind] = step
        if 0 <= step < self.steps_done:
            self._try(lambda: self._link.abandon("", step, f"the order for step {step} came too late"))
        return step == self.steps_done

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
        except Exception as error:
            # A state_dict that fails, no descriptors, no memory: none of it is worth a training.
            log.exception("rank %d: unexpected", self._group.rank)
            if count:
                self._report_skip(CkptsvcError(f"{type(error).__name__}: {error}"))

    def _report_skip(self, error: CkptsvcError) -> None:
        self.skipped += 1
        if isinstance(error, AgentUnavailable):  # of others, the agent knows
            self._link.add("missed", 1)
        self._warn(f"snapshot of step {self.steps_done} skipped: {error}")

    def _warn(self, message: str) -> None:
        log.warning("rank %d: %s", self._group.rank, message)
        if self.settings.log.format == "text":  # else Python would print one that is no JSON
            warnings.warn(f"ckptsvc: {message}", RuntimeWarning, stacklevel=2)

    def _keep_connected(self) -> None:
        """Beside the training: as soon as the agent is gone, start it again or wait for it, and register again."""
        said = ""
        while True:
            self._link.wait_gone()
            if self._closed.is_set():
                return
            try:
                self._start_agent()
                self._link.connect()
                log.warning("rank %d: connected to the agent again", self._group.rank)
                said = ""
            except (CkptsvcError, OSError) as error:
                if str(error) != said:
                    log.warning("rank %d: no agent: %s", self._group.rank, error)
                said = str(error)
                self._closed.wait(RECONNECT_EVERY)
            if self._closed.is_set():
                self._link.disconnect()

    # ---- restoring ---------------------------------------------------------------------------------------------------

    def _restore(self, step: int | None) -> int | None:
        """Try the candidates, newest first, until one restores on every rank; None if there are none."""
        with self.phase("restore"):
            return self._restore_newest(step)

    def _begin_from(self, address: str) -> bool:
        """Start from another framework's checkpoint."""
        with self.phase("restore"):
            found = restore_foreign(address, self._tree_of, self._tree, self._group, self._phases.progress)
        values, self.steps_done = found
        self.state = {**self._tree_of, **values}
        self.restored_from = address
        return True

    def _restore_newest(self, step: int | None) -> int | None:
        where = self._url, self.settings, self._link, self._group, self._place
        with contextlib.closing(Candidates(*where, self._phases.progress)) as candidates:
            return self._restore_from(candidates, step)

    def _restore_from(self, candidates: Candidates, step: int | None) -> int | None:
        tried: list[str] = []
        newer = True  # every one of them was written by a newer version
        for candidate in candidates.find(step):
            try:
                values = self._restore_one(candidates, candidate)
            except (Damaged, IncompatibleVersion, StoreError) as error:
                tried.append(f"{candidate}: {error}")
                newer = newer and isinstance(error, IncompatibleVersion)
                log.warning("rank %d: cannot restore %s: %s; trying an older one", self._group.rank, candidate, error)
                if self._group.rank == 0:
                    warnings.warn(f"ckptsvc: cannot restore {candidate}: {error}", RuntimeWarning, stacklevel=5)
                continue
            self.state = {**self._tree_of, **values}
            self.steps_done = candidate.step
            self.restored_from = candidate.tier
            log.info("rank %d: restored %s", self._group.rank, candidate)
            return candidate.step
        if tried:
            kind = IncompatibleVersion if newer else Damaged
            raise kind(f"none of {len(tried)} checkpoints could be restored; the newest: {tried[0]}")
        return None

    def _restore_one(self, candidates: Candidates, candidate: Candidate) -> dict[str, Any]:
        """All ranks restore it, or all raise the same error.

        Raises:
            Damaged, IncompatibleVersion, StoreError: another candidate may do.
            LayoutError, UnsupportedObject: it does not fit the state; nor would another.
        """
        try:
            with together(self._group):
                image = candidates.open(candidate)
            return restore(image, self._tree, self._group, self._phases.progress)
        except (LayoutError, UnsupportedObject) as error:
            if candidate.tier != "store":
                raise Damaged(str(error)) from error  # the store has an older one, perhaps of before a change
            raise
