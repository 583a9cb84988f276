"""Watches the node's network cards: reads them once a second, tells the jobs' coordinators what they must know.

Reading happens in threads, one for each place, because a read may hang; the event loop waits for them for `DEADLINE`
and goes on without those that are late. A place that hangs costs one thread that does nothing, and is told of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckptsvc.agent.local import Local
from ckptsvc.agent.watching.nics import NicProbe, Place, Reading, read
from ckptsvc.control.nic_card import SHARES, UNANSWERED, Card
from ckptsvc.control.nic_job import TELL_EVERY, JobNics
from ckptsvc.control.nics import Finding, is_news
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.settings import NicsSettings
from ckptsvc.telemetry import Event, NicSignal, NicTrouble, log

logger = logging.getLogger("ckptsvc.agent")

EVERY = 1.0
"""Seconds between readings; they are made at full seconds of the wall clock, so that all nodes read at once."""

DEADLINE = 0.25
"""Seconds a reading may take before the summary is made without it."""

SEARCH_EVERY = 10.0
"""Seconds between searches for cards that have come or gone."""

FORGET_AFTER = 600.0
"""Seconds after which a card that has gone is no longer told of."""


class Hand:
    """Runs a function that may hang in a thread of its own, when asked, and only ever once at a time.

    The thread ends with `close`, or never if the function never returns; it does not keep the process alive.
    """

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        self._work = work
        self._asked: queue.SimpleQueue[asyncio.Future[Any] | None] = queue.SimpleQueue()
        self._answer: asyncio.Future[Any] | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def ask(self) -> asyncio.Future[Any]:
        """The answer to come: of this request, or of an earlier one that is still under way."""
        if self._answer is None or self._answer.done():
            self._answer = asyncio.get_running_loop().create_future()
            self._asked.put(self._answer)
        return self._answer

    def close(self) -> None:
        """Let the thread end."""
        self._asked.put(None)

    def _run(self) -> None:
        while (answer := self._asked.get()) is not None:
            result = self._work()
            with contextlib.suppress(RuntimeError):  # the agent has ended meanwhile
                answer.get_loop().call_soon_threadsafe(_settle, answer, result)


def _settle(answer: asyncio.Future[Any], result: Any) -> None:
    if not answer.done():
        answer.set_result(result)


class Watched:
    """One place under watch."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.skip: frozenset[str] = frozenset()
        self.reported: set[str] = set()
        self.late = 0  # readings in a row that came too late, or not at all
        self.hand = Hand(lambda: read(place, self.skip), f"nic {place.nic}")


class NicWatch:
    """The cards of this node. Owned by the event loop, like all of the agent.

    Attributes:
        cards: the cards that are watched, by name.
        readings: what they said last.
    """

    def __init__(self, local: Local, settings: NicsSettings) -> None:
        self.cards: dict[str, Card] = {}
        self.readings: list[pb.NicReading] = []
        self._local, self._settings = local, settings
        self._watched: dict[Path, Watched] = {}
        self._told: dict[tuple[str, int], dict[str, pb.NicReading]] = {}  # by job and attempt, card
        self._gone: dict[str, float] = {}
        self._slot = zlib.crc32(local.name.encode()) % round(TELL_EVERY)
        self._own = JobNics("this node")

    def findings(self) -> list[Finding]:
        """Cards of this node in trouble, compared with its other cards only (the coordinator knows the whole job)."""
        return self._own.findings()

    def sentences(self) -> list[str]:
        """One sentence for each of these, for the evidence of an incident."""
        return [finding.sentence for finding in self.findings()]

    async def run(self) -> None:
        """Watch until cancelled."""
        search = Hand(NicProbe(Path(self._settings.root)).places, "nic search") if self._settings.enabled else None
        found: asyncio.Future[list[Place]] | None = None
        searched = -SEARCH_EVERY
        try:
            while True:
                now = time.monotonic()
                if search and (found or now - searched >= SEARCH_EVERY):
                    found, searched = search.ask(), now
                    await asyncio.wait([found], timeout=DEADLINE)
                    if found.done():
                        self._found(found.result(), now)
                        found = None
                if self.cards:
                    await self._round()
                self._count()
                await asyncio.sleep(_until_full_second(time.time()))
        finally:
            for hand in (search, *(watched.hand for watched in self._watched.values())):
                if hand:
                    hand.close()
            self._watched.clear()

    def _found(self, places: list[Place], now: float) -> None:
        """Begin to watch what is new; let go of what has gone."""
        there = {place.directory: place for place in places}
        for directory, place in there.items():
            if directory not in self._watched:
                self._watched[directory] = Watched(place)
            self._watched[directory].skip = frozenset()  # what was missing may be there now
            if place.nic not in self.cards:
                self.cards[place.nic] = Card(place.nic, place.family)
                log(logger, logging.INFO, Event.NIC_FOUND, "watching network card %s", place.nic, node=self._local.name)
        for directory in self._watched.keys() - there.keys():
            self._watched.pop(directory).hand.close()
        present = {place.nic for place in places}
        for nic, card in list(self.cards.items()):
            card.see_gone(nic not in present)
            if nic in present:
                self._gone.pop(nic, None)
            elif now - self._gone.setdefault(nic, now) > FORGET_AFTER:
                del self.cards[nic], self._gone[nic]
                self._local.metrics.forget_nic(nic)

    async def _round(self) -> None:
        """Read every card once, and tell what is to be told."""
        began = time.monotonic()
        answers = {watched.hand.ask(): watched for watched in self._watched.values()}
        if answers:  # none: all cards have gone
            await asyncio.wait(answers, timeout=DEADLINE)
        now = time.monotonic()
        for answer, watched in answers.items():
            if answer.done():
                self._take(watched, answer.result(), now)
            else:
                watched.late += 1
            if watched.place.is_handler and watched.late * EVERY >= UNANSWERED:
                self.cards[watched.place.nic].see_handler(False)  # it is there, and does nothing
        if not any(watched.late for watched in answers.values()):
            self._local.metrics.nic_read_seconds.set(now - began)
        self._follow_attempts()
        self.readings = [card.reading(now) for card in self.cards.values()]
        for reading in self.readings:
            up = bool(reading.link) and not reading.link_down
            self._local.metrics.nic_link_up.labels(reading.nic).set(float(up))
        self._own.take(pb.NicSummary(node=self._local.name, nics=self.readings), now)
        self._own.tick(now)
        self._tell()

    def _take(self, watched: Watched, reading: Reading, now: float) -> None:
        place, card, metrics = watched.place, self.cards[watched.place.nic], self._local.metrics
        watched.late = 0
        for signal, amount in card.add(reading.values, now).items():
            if signal is NicSignal.SENT:
                metrics.nic_sent.labels(card.nic).inc(amount)
            elif signal is NicSignal.RECEIVED:
                metrics.nic_received.labels(card.nic).inc(amount)
            elif signal in SHARES:
                metrics.nic_held.labels(card.nic, signal).inc(amount)
            else:
                metrics.nic_events.labels(card.nic, signal).inc(amount)
        if place.link:
            card.see_link(reading.link)
        if place.is_handler:
            card.see_handler(bool(reading.values))
        else:
            watched.skip |= reading.missing
        metrics.nic_read_failures.inc(len(reading.failed))
        troubles = {**dict.fromkeys(reading.missing, "is not there"), **reading.failed}
        new = {file: why for file, why in troubles.items() if file not in watched.reported and not place.is_handler}
        if new:
            watched.reported |= new.keys()
            some = ", ".join(f"{file}: {why}" for file, why in list(new.items())[:3])
            log(logger, logging.WARNING, Event.NIC_UNREADABLE, "%d of %d counters of %s cannot be read (%s); said once",
                len(new), len(place.counters), place.nic, some, node=self._local.name)  # fmt: skip

    def _follow_attempts(self) -> None:
        """What happened before an attempt began says nothing about it."""
        attempts = {(s.reg.job, s.reg.attempt) for s in self._local.sessions.values()}
        for key in self._told.keys() - attempts:
            del self._told[key]
        begun = attempts - self._told.keys()
        self._told.update((key, {}) for key in sorted(begun))
        for card in self.cards.values() if begun else ():
            card.begin()

    def _tell(self) -> None:
        """A summary to the coordinator of every job with ranks here, when there is news or it is this node's turn."""
        turn = self._is_our_turn()
        for (job, attempt), told in self._told.items():
            if turn or any(is_news(told.get(reading.nic), reading) for reading in self.readings):
                summary = pb.NicSummary(job=job, node=self._local.name, attempt=attempt, nics=self.readings)
                self._local.report(self._local.jobs[job], pb.Report(nic_summary=summary))
                told.clear()
                told.update((reading.nic, reading) for reading in self.readings)

    def _is_our_turn(self) -> bool:
        """Every ten seconds, at another second on each node."""
        return round(time.time()) % round(TELL_EVERY) == self._slot

    def _count(self) -> None:
        """The findings in the jobs that this agent coordinates."""
        kinds = Counter(f.kind for core in self._local.cores() for job in core.jobs for f in core.nic_findings(job))
        for kind in NicTrouble:
            self._local.metrics.nic_findings.labels(kind).set(kinds[kind])


def _until_full_second(clock: float) -> float:
    """Seconds to the next full second of the wall clock that is not about to be or has just been."""
    wait = EVERY - clock % EVERY
    return wait if wait >= EVERY / 2 else wait + EVERY
