"""Orders of people that outlive this agent: which jobs are paused, and whether the node is being drained.

They are in a small file in the agent's own directory (which is in memory, as a rule), are told to every coordinator
that the agent meets, and hold for ranks that register before it has met one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from ckptsvc.agent.sessions import Session
from ckptsvc.control.pauses import FIRST
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import NodeUnfit
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

logger = logging.getLogger("ckptsvc.agent")

NAME = "orders.json"
MAX_BYTES = 1 << 20
"""Of the file; of more, the oldest jobs are forgotten too."""

UNREADABLE = "drained: what orders an earlier agent has kept cannot be read"
"""Said where its file is damaged: maybe the node was being drained."""

MAX_JOBS = 256
"""Jobs that are remembered; of more, the oldest are forgotten."""


class Held(msgspec.Struct, frozen=True):
    """One job, as pb.Pausing; `until` is in unix seconds, 0: it does not end by itself."""

    version: int
    paused: bool
    until: float
    attempt: int
    step: int
    by: str
    reason: str


class Document(msgspec.Struct):
    """The file."""

    version: int = 1
    pausing: dict[str, Held] = {}
    vacated: str = ""


class StandingOrders:
    """Those of one agent.

    Args:
        path: the file; None: they are kept in memory only.

    Attributes:
        vacated: why the node takes no new jobs; "" if it does.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._kept = Document() if path is None else _read(path)

    @property
    def vacated(self) -> str:
        """See the class."""
        return self._kept.vacated

    def check_open(self) -> None:
        """May a new job begin here?

        Raises:
            NodeUnfit: the node is being drained.
        """
        if self.vacated:
            hint = "`ckptsvc undrain` lets it take them again"
            raise NodeUnfit(f"this node takes no new jobs: {self.vacated}", hint=hint)

    def vacate(self, why: str) -> None:
        """Take no new jobs from now on ("": take them again)."""
        if why != self._kept.vacated:
            self._kept.vacated = why
            self._write()

    def take(self, order: pb.Pausing) -> None:
        """Keep what the coordinator says of a job."""
        known = self._kept.pausing.pop(order.job, None)
        until = time.time() + order.left if order.left > 0 else 0.0
        held = Held(order.version, order.paused, until, order.attempt, order.step, order.by, order.reason)
        self._kept.pausing[order.job] = held if known is None or known.version <= order.version else known
        while len(self._kept.pausing) > MAX_JOBS:
            del self._kept.pausing[next(iter(self._kept.pausing))]
        self._write()

    def apply(self, session: Session) -> None:
        """Tell a rank, on its page.

        One that registers without an epoch may be of other processes than those that were paused, and told to go on,
        under the same attempt number: what lay between is not left out again.
        """
        held = self._kept.pausing.get(session.reg.job)
        if held is None:
            return
        same = held.attempt == session.reg.attempt
        page = session.page
        before = page.get("paused") or (FIRST if session.reg.epoch else held.step)
        if held.paused and not 0 < held.until <= time.time():
            step = held.step if same else FIRST
            if page.get("resumed") >= step:
                page.put("resumed", 0)
            page.put("paused", step)
        elif same and not held.paused and held.step > before:
            page.put("paused", before)
            page.put("resumed", held.step)
        else:
            page.put("paused", 0)
            page.put("resumed", 0)

    def forget(self, job: str) -> None:
        """A job is over, by the name that its ranks register, or as it was launched."""
        over = [name for name in self._kept.pausing if job in (name, launched_as(name))]
        for name in over:
            del self._kept.pausing[name]
        if over:
            self._write()

    def report(self, job: str) -> Iterator[pb.Report]:
        """What a coordinator must hear of a job."""
        held = self._kept.pausing.get(job)
        if held is not None:
            left = max(held.until - time.time(), 1.0) if held.until else 0.0
            yield pb.Report(
                pausing=pb.Pausing(
                    job=job, version=held.version, paused=held.paused, left=left, attempt=held.attempt,
                    step=held.step, by=held.by, reason=held.reason,
                )
            )  # fmt: skip

    def is_paused(self, job: str) -> bool:
        """Whether a job takes no automatic snapshots, as far as this node has heard."""
        held = self._kept.pausing.get(job)
        return held is not None and held.paused

    def paused(self) -> Iterator[dict[str, object]]:
        """For the status document: which jobs are, from which step on, by whom, why, until when (unix seconds)."""
        for job, held in self._kept.pausing.items():
            if held.paused:
                yield {"job": job, "step": held.step, "by": held.by, "reason": held.reason, "until": held.until or None}

    def _write(self) -> None:
        if self._path is None:
            return
        while len(text := msgspec.json.encode(self._kept)) > MAX_BYTES and self._kept.pausing:
            del self._kept.pausing[next(iter(self._kept.pausing))]
        fresh = self._path.with_suffix(".new")
        try:
            with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(text)
            os.replace(fresh, self._path)
        except OSError as error:
            logger.warning("orders are not kept for the next agent: %s: %s", self._path, error.strerror)


def _read(path: Path) -> Document:
    try:
        with open(path, "rb") as file:
            found = msgspec.json.decode(file.read(MAX_BYTES), type=Document)
        return found if found.version == 1 else Document(vacated=UNREADABLE)
    except FileNotFoundError:
        return Document()
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        logger.warning("orders that an earlier agent has kept are not known: %s: %s", path, error)
        return Document(vacated=UNREADABLE)
