"""Evidence about ranks that seem stuck: what can be seen from outside, and what they still say themselves.

    /proc          state, kernel function, processor time                        always
    the witness    stacks and collectives, by a thread of the process            where it can run Python
    py-spy         stacks from outside; native ones where no thread answers      where it is installed and allowed
    the log        its last lines

Everything has a deadline and runs beside the event loop; what fails becomes a note. No environment variables, no
arguments, no values of variables: a report is for showing around.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ckptsvc.agent.aside import aside
from ckptsvc.agent.logtail import clean, one_line, tail
from ckptsvc.agent.sessions import Session
from ckptsvc.agent.watching import spy
from ckptsvc.agent.watching.procfs import Process, look
from ckptsvc.agent.watching.witness import Witness
from ckptsvc.control.blame import waits
from ckptsvc.rpc.identity import Page
from ckptsvc.rpc.testimony import WAITING_THREADS, Stack
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

WATCH = 0.3
"""Seconds for which a process's use of the processor is watched."""

PATIENCE = 0.25
"""Seconds after which a process that has not answered is looked at from outside, too."""

DEFAULT_SECONDS, MAX_SECONDS = 3.0, 60.0
"""For an order that says nothing sensible, and the most that one may ask for."""

SPIES = 4
"""Processes that py-spy looks at at the same time; with native stacks it takes a second and 330 MB for each."""

MAX_STACK = 16 << 10
"""Characters of a stack that are kept: the innermost frames."""


BRIEF_FRAMES = 8
"""Innermost frames of a rank that waits for others, where there are very many."""


@dataclass(frozen=True, slots=True)
class Target:
    """A rank to look at.

    Attributes:
        rank, pid: which.
        pidfd: a descriptor of its process; -1 where there is none (another pid namespace).
        page: its heartbeat page; None once the process has ended: then only its log is left.
        witness: the way to ask it; None if it offered none.
        log: file with its output; None if nobody keeps it.
        phase: what it has declared to be doing.
    """

    rank: int
    pid: int
    pidfd: int
    page: Page | None
    witness: Witness | None = None
    log: Path | None = None
    phase: str = ""

    @staticmethod
    def of(session: Session, *, log: Path | None = None, phase: str = "") -> Target:
        """The rank of a session."""
        return Target(session.reg.rank, session.pid, session.pidfd, session.page, session.witness, log, phase)

    @staticmethod
    def gone(rank: int, pid: int, *, log: Path | None = None) -> Target:
        """A rank that has ended and has no session any more."""
        return Target(rank, pid, -1, None, log=log)


async def collect(targets: Sequence[Target], seconds: float) -> list[pb.RankEvidence]:
    """Look at all targets at once; returns what is known after at most `seconds`, in their order."""
    spies = asyncio.Semaphore(SPIES)
    return list(await asyncio.gather(*(_Examination(target, seconds, spies).run() for target in targets)))


async def examine(
    order: pb.Examine, job: str, node: str, targets: Iterable[Target], nics: Callable[[], list[str]] | None = None
) -> pb.Examined:
    """Carry out a coordinator's order.

    Args:
        order: which ranks, and within how many seconds.
        job: of the ranks.
        node: this one's name.
        targets: the ranks of that attempt on this node.
        nics: finds one sentence for each network card that is not well; may block.
    """
    here = {target.rank: target for target in targets}
    wanted = list(order.ranks) or sorted(here)
    seconds = order.seconds if 0 < order.seconds <= MAX_SECONDS else DEFAULT_SECONDS
    found, cards = await asyncio.gather(
        collect([here[rank] for rank in wanted if rank in here], seconds), _cards(nics, seconds)
    )
    unknown = [
        pb.RankEvidence(rank=rank, enqueued=-1, completed=-1, notes=["this node knows no such rank"])
        for rank in wanted
        if rank not in here
    ]
    if order.brief:
        for one in found:
            shorten(one)
    return pb.Examined(
        job=job, attempt=order.attempt, incident=order.incident, node=node, ranks=[*found, *unknown], nics=cards
    )


def shorten(found: pb.RankEvidence) -> None:
    """Leave out, of a rank that waits for others, what no verdict needs: in a large job nearly all do."""
    if waits(found):
        found.stack = "\n".join(found.stack.split("\n")[-BRIEF_FRAMES:])
        for name in ("native_stack", "other_stacks", "log_tail"):
            found.ClearField(name)
        found.notes.append("it waits for others: shortened")


async def _cards(nics: Callable[[], list[str]] | None, seconds: float) -> list[str]:
    if nics is None:
        return []
    try:
        return [one_line(sentence) for sentence in await aside(nics, seconds)]
    except TimeoutError:
        return [f"the network cards did not say how they are within {seconds:g} s"]
    except Exception as error:  # noqa: BLE001  the ranks' evidence must not be lost for it
        return [f"the network cards could not be read: {error}"]


class _Examination:
    """Of one rank; fills `found` as it learns."""

    def __init__(self, target: Target, seconds: float, spies: asyncio.Semaphore) -> None:
        self._target, self._seconds, self._spies = target, seconds, spies
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._watched = asyncio.Event()
        self._pidfd = -1
        self.found = pb.RankEvidence(rank=target.rank, pid=target.pid, phase=target.phase, enqueued=-1, completed=-1)
        if target.page is not None:
            at = target.page.get("at")
            self.found.step = target.page.told("step")
            self.found.stalled = max(time.monotonic() - at / 1e9, 0.0) if at else 0.0

    async def run(self) -> pb.RankEvidence:
        """All parts beside each other, until the deadline."""
        if self._target.page is None:
            self.found.state = "X"
            await self._attempt("the log", self._read_log())
            return self.found
        try:
            # Our own: the session closes its descriptor when the process ends, and its number may be used again.
            self._pidfd = os.dup(self._target.pidfd) if self._target.pidfd >= 0 else -1
        except OSError as error:
            self._note(f"the process: {error.strerror}")
        try:
            await self._examine()
        finally:
            if self._pidfd >= 0:
                os.close(self._pidfd)
        return self.found

    async def _examine(self) -> None:
        process = await self._attempt("the process", self._look(0.0, self._seconds / 4))
        parts = [self._attempt("the log", self._read_log())]
        if process is None or process.state != "X":
            parts += [
                self._attempt("the process", self._watch()),
                self._attempt("the stacks", self._find_stacks(process)),
            ]
        await asyncio.gather(*parts)

    async def _attempt(self, what: str, part: Coroutine[Any, Any, Any]) -> Any:
        """One part of the examination; what it leaves out is noted."""
        try:
            async with asyncio.timeout_at(self._deadline):
                return await part
        except TimeoutError:
            self._note(f"{what}: not found out within {self._seconds:g} s")
        except Exception as error:  # noqa: BLE001  the other parts are worth having
            self._note(f"{what}: {error}")
        return None

    def _note(self, text: str) -> None:
        text = one_line(text)
        if text not in self.found.notes:
            self.found.notes.append(text)

    def _left(self) -> float:
        return max(self._deadline - asyncio.get_running_loop().time(), 0.0)

    async def _watch(self) -> None:
        try:
            await self._look(WATCH, self._left())
        finally:
            self._watched.set()

    async def _look(self, window: float, seconds: float) -> Process | None:
        target, found = self._target, self.found
        if self._pidfd < 0:
            if target.pidfd < 0:
                self._note("the process: it belongs to another pid namespace")
            return None
        process = await aside(partial(look, target.pid, self._pidfd, window), seconds)
        found.state, found.threads, found.resident = process.state, process.threads, process.resident
        found.cpu, found.waits_in = process.cpu, process.waits_in
        for note in process.notes:
            self._note(note)
        return process

    async def _read_log(self) -> None:
        path = self._target.log
        if path is None:
            self._note("the log: nobody keeps this rank's output")
        else:
            self.found.log_tail = await aside(partial(tail, path), self._left())

    async def _find_stacks(self, process: Process | None) -> None:
        """Ask the process; if that takes long, look from outside while waiting for its answer."""
        stopped = process is not None and process.state in "Tt"
        asking = None if stopped else asyncio.ensure_future(self._ask())
        try:
            if asking is not None:
                await asyncio.wait({asking}, timeout=PATIENCE)
            if not self.found.answers:
                self._keep(await self._spy(native=False))
            if asking is not None:
                await asking
        finally:
            if asking is not None:
                asking.cancel()
        # Where Python still answers, its stacks say enough; a stopped or blocked process cannot be held for more.
        await self._watched.wait()  # which must not see it being held
        if not self.found.answers and self.found.state in "RS":
            native = await self._spy(native=True)
            self.found.native_stack = _text(native.stacks[:1])

    async def _ask(self) -> None:
        witness, found = self._target.witness, self.found
        if witness is None:
            self._note("no thread of the process takes questions")
            return
        patience = self._seconds / 2
        try:
            answer = await witness.ask("stacks", patience)
        except TimeoutError:
            found.asked = True
            self._note(f"no thread of the process answered within {patience:g} s")
            return
        except (OSError, ValueError) as error:
            self._note(f"the process was asked in vain: {error}")
            return
        found.asked = found.answers = True
        self._keep(spy.Dump(answer.stacks, [answer.note] if answer.note else []))
        try:
            recorded = await witness.ask("collectives", self._left() * 0.9)
        except (TimeoutError, OSError, ValueError) as error:
            self._note(f"the flight recorder did not answer {error}".strip())
            return
        if recorded.note:
            self._note(recorded.note)
        for group in recorded.groups:
            found.groups.add(
                group=clean(group.name), enqueued=group.enqueued, completed=group.completed,
                collective=clean(group.collective),
            )  # fmt: skip
        if found.groups:
            first = found.groups[0]
            found.enqueued, found.completed, found.collective = first.enqueued, first.completed, first.collective

    async def _spy(self, *, native: bool) -> spy.Dump:
        if self._pidfd < 0:
            return spy.Dump([], [])
        async with self._spies:
            # A reserve, so that what py-spy has found, or that it was too slow, still comes into the report.
            return await spy.dump(self._target.pid, self._pidfd, self._left() * 0.8, native=native)

    def _keep(self, dump: spy.Dump) -> None:
        for note in dump.notes:
            self._note(note)
        if dump.stacks:
            self.found.stack = _text([stack for stack in dump.stacks if stack.main])
            others = [stack for stack in dump.stacks if not stack.main and stack.thread not in WAITING_THREADS]
            self.found.other_stacks = _text(others, named=True)


def _text(stacks: Iterable[Stack], *, named: bool = False) -> str:
    """Stacks a line a frame, cut at the outer end."""
    parts = []
    for stack in stacks:
        lines = [clean(frame) for frame in stack.frames]
        while lines and sum(map(len, lines)) > MAX_STACK:
            del lines[0]
        parts.append("\n".join([f"thread {clean(stack.thread)}", *(f"  {line}" for line in lines)] if named else lines))
    return "\n".join(parts)[:MAX_STACK]
