"""Goodput: what the time of one job goes into. Every second goes into exactly one of these (decision 021):

    useful     steps that nobody had done before, and what the program does between them: an evaluation is no waste
    blocked    the training loop was held up by saves, and waited for them where it asked to
    detection  nothing moved any more, until it was known what was to be done, or it went on by itself
    restart    from there to the first step of the next attempt
    redone     steps that had been done before; and the part of a step that was never finished
    other      the rest: start-up, the first restore, the first step, the end

Steps are repeated because an attempt began with an older checkpoint. Their first pass was counted as useful; its
second is not. So the counts only grow, and come to the same as if the first had been taken back.

Time is booked when it is known what it was: that of a step when the step is done. `since` says how far the books are.
What is here is soft state: a new coordinator begins at zero, and does not know which steps were done before its time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ckptsvc.telemetry import Share


class Mode(Enum):
    """What the job is doing; its value is what its time is booked as, where that is known at once."""

    STARTING = Share.OTHER
    STALLED = Share.DETECTION
    RESTARTING = Share.RESTART
    STEPPING = "stepping"
    GONE = "gone"
    ENDED = "ended"


@dataclass(slots=True)
class Goodput:
    """The books of one job; all times are of the coordinator's clock, in seconds.

    Attributes:
        since: until when all time is booked.
        seconds: what has been booked.
        mode: what the job is doing.
        attempt: the attempt that is meant.
        step: steps that it has done.
        peak: steps that any attempt has done.
    """

    since: float
    seconds: dict[Share, float] = field(default_factory=lambda: dict.fromkeys(Share, 0.0))
    mode: Mode = Mode.STARTING
    attempt: int = 0
    step: int = 0
    peak: int = 0
    began: int | None = None  # steps done when the attempt had restored; None: it has not
    blocked: float = 0.0  # seconds that the ranks of the attempt have told of
    owed: float = 0.0  # of them, those that are not booked yet

    @property
    def total(self) -> float:
        """All time that is booked, in seconds."""
        return sum(self.seconds.values())

    @property
    def ratio(self) -> float | None:
        """The share of it that was useful; None before there is any."""
        return self.seconds[Share.USEFUL] / self.total if self.total else None

    def begin(self, attempt: int, now: float) -> None:
        """Ranks of an attempt come: the first one, or the next."""
        if self.mode is Mode.ENDED:
            self.since, self.mode = max(self.since, now), Mode.STARTING
        elif self.mode is Mode.GONE:
            self.mode = Mode.RESTARTING
        elif self.mode in (Mode.STEPPING, Mode.STALLED):  # nobody has said that the one before had failed
            self.fail(now, now)
        self.tick(now)
        self.attempt, self.began, self.blocked, self.owed = attempt, None, 0.0, 0.0

    def progress(self, attempt: int, step: int, began: int | None, blocked: float, now: float) -> bool:
        """How far the ranks are.

        Args:
            attempt: of the ranks that say so; those of another one are not heard.
            step: steps done by the rank that is furthest.
            began: how many it had done when it had restored; None: it has not.
            blocked: seconds for which saves have held the attempt up so far.
            now: the time.

        Returns:
            whether this was the first step of the attempt.
        """
        if attempt != self.attempt or self.mode in (Mode.GONE, Mode.ENDED):
            return False
        if 0.0 <= blocked - self.blocked < float("inf"):
            self.owed += blocked - self.blocked
            self.blocked = blocked
        if began is not None and began != self.began:
            if self.mode is Mode.STEPPING:  # the program has gone back to a checkpoint by itself
                self._book(Share.OTHER, now)
            self.began = self.step = began
            self.peak = max(self.peak, began)
        if self.began is None or step <= self.step:
            self.tick(now)
            return False
        first = self.mode in (Mode.STARTING, Mode.RESTARTING)
        if self.mode is Mode.STEPPING:
            self._book_steps(step, now)
        else:
            self.tick(now)
        self.step, self.peak, self.mode = step, max(self.peak, step), Mode.STEPPING
        return first

    def stall(self, now: float) -> None:
        """A rank makes no progress for longer than its history explains: nothing was done since the last step."""
        if self.mode is Mode.STEPPING:
            self.mode = Mode.STALLED
            self.tick(now)

    def move(self, now: float) -> None:
        """It goes on after all, in the step it is at."""
        if self.mode is Mode.STALLED:
            self.tick(now)
            self.mode = Mode.STEPPING

    def fail(self, fault: float, now: float) -> None:
        """The attempt has failed, and that is known; `fault` is when it happened as far as that can be told."""
        if self.mode is Mode.STEPPING:
            self._book(Share.REDONE, min(max(fault, self.since), now))
            self._book(Share.DETECTION, now)
        self.tick(now)
        if self.mode is not Mode.ENDED:
            self.mode = Mode.RESTARTING

    def leave(self, now: float) -> None:
        """All ranks are gone, and whether others will come is not known: what follows is a restart if they do."""
        if self.mode is not Mode.ENDED:
            self.fail(now, now)
            self.mode = Mode.GONE

    def end(self, now: float) -> None:
        """The job is over."""
        if self.mode is Mode.STEPPING:
            self._book(Share.OTHER, now)
        self.tick(now)
        self.mode = Mode.ENDED

    def tick(self, now: float) -> None:
        """Book what can be booked by now."""
        if isinstance(self.mode.value, Share):
            self._book(self.mode.value, now)

    def _book(self, share: Share, until: float) -> None:
        span = until - self.since
        if span > 0:
            self.seconds[share] += span
            self.since = until

    def _book_steps(self, step: int, now: float) -> None:
        """The time since the last step was seen: what saves took of it, and the rest by which steps were new."""
        span = max(now - self.since, 0.0)
        held = min(self.owed, span)
        self.owed -= held
        self._book(Share.BLOCKED, self.since + held)
        new = (step - max(self.step, min(self.peak, step))) / (step - self.step)
        self._book(Share.REDONE, self.since + (now - self.since) * (1.0 - new))
        self._book(Share.USEFUL, now)
