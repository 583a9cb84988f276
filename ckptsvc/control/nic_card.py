"""What the readings of one network card add up to: counts over ten seconds, rates and shares over three."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping

from ckptsvc.control.nic_counters import BY_FILE, HANDLER, LINK_UP, Counter, Value, elapsed, rise
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import NicSignal as Signal

WINDOW = 10.0
"""Seconds over which events are counted."""

FLAP_WINDOW = 600.0
"""Seconds over which restarts of the link are: a link that comes and goes does so every few minutes."""

RECENT = 3
"""Readings that a rate is the mean of, and a share of time the median of: one bad second is none."""

FRESH = 5.0
"""Seconds after which a reading no longer counts as recent."""

IN_USE = 1e6
"""Bytes per second below which a card carries no training traffic."""

STILL = 0.1
"""Share of its usual traffic below which a card counts as idle."""

USUAL_HALF_LIFE = 600.0
"""Seconds in which the memory of a card's busiest moment fades to a half."""

UNANSWERED = 3.0
"""Seconds without any readable counter after which a card that could be read before does not answer."""

RATES = frozenset({Signal.SENT, Signal.RECEIVED, Signal.WAITS, Signal.MARKS})
SHARES = frozenset({Signal.PAUSED_TX, Signal.PAUSED_RX, Signal.STALLED})
COUNTS = frozenset(Signal) - RATES - SHARES
STEADY = frozenset({Signal.UNCORRECTED, Signal.REPLAYS})
"""Counted only when they rise in `STEADILY` readings of the window: a link may have a burst of errors and repair it."""

STEADILY = 3

_OF_HANDLER = frozenset(counter.file for counter in HANDLER)


class Card:
    """One card's recent past.

    Args:
        nic: its name on the node.
        family: "cxi", "ib" or "roce".
    """

    def __init__(self, nic: str, family: str) -> None:
        self.nic, self.family = nic, family
        self._before: dict[str, tuple[Value, float]] = {}
        self._past: dict[Signal, deque[tuple[float, float]]] = {signal: deque() for signal in Signal}
        self._usual = 0.0
        self._busy_at = self._flow_at = -math.inf
        self._read_at: float | None = None
        self._link = ""
        self._was_up = self._had_handler = False
        self._handler: bool | None = None
        self._gone = False

    def add(self, values: Mapping[str, Value], now: float) -> dict[Signal, float]:
        """Take in a reading of some of its files.

        Args:
            values: what each file said, by its path in the tables.
            now: when, in seconds of a monotonic clock.

        Returns:
            What has been added to each signal since the last reading: bytes, events, or seconds held back.
        """
        added: dict[Signal, float] = {}
        spans: dict[Signal, float] = {}
        for file, value in values.items():
            counter = BY_FILE[file]
            before = self._before.get(file)
            self._before[file] = (value, now)
            if file not in _OF_HANDLER:
                self._read_at = now
            if before is None or now <= before[1]:
                continue
            seconds = elapsed(before[0], value, now - before[1])
            risen = rise(counter, before[0].number, value.number, seconds)
            if risen is not None:
                _gather(added, counter, risen)
                spans[counter.signal] = seconds
        for signal, amount in added.items():
            if signal in RATES:
                self._past[signal].append((now, amount / spans[signal]))
            elif signal in SHARES:
                self._past[signal].append((now, min(1.0, amount / spans[signal])))
            elif amount:
                self._past[signal].append((now, amount))
        self._follow_traffic(now)
        return added

    def see_link(self, state: str) -> None:
        """The driver's word for the state of the link; "" if it could not be read."""
        self._link = state
        self._was_up = self._was_up or state in LINK_UP

    def see_handler(self, present: bool) -> None:
        """Whether the card's retry handler answers."""
        self._handler = present
        self._had_handler = self._had_handler or present

    def see_gone(self, gone: bool) -> None:
        """Whether the card is still on the node."""
        self._gone = gone

    def begin(self) -> None:
        """A new attempt of the job begins: what was counted in the last one is not held against the card.

        Flaps stay: they are about the cable, not about the attempt.
        """
        for signal, past in self._past.items():
            if signal is not Signal.FLAPS:
                past.clear()
        self._busy_at = self._flow_at

    def reading(self, now: float) -> pb.NicReading:
        """The card as it is at `now`."""
        reading = pb.NicReading(
            nic=self.nic,
            family=self.family,
            link=self._link,
            link_down=bool(self._link) and self._link not in LINK_UP,
            link_lost=bool(self._link) and self._link not in LINK_UP and self._was_up,
            handler_absent=self._handler is False,
            handler_lost=self._handler is False and self._had_handler,
            gone=self._gone,
        )
        for signal in Signal:
            value = self._value(signal, now)
            if value:
                setattr(reading, signal.replace("-", "_"), round(value) if signal in COUNTS else value)
        for signal in (Signal.SENT, Signal.RECEIVED):
            if not reading.HasField(signal.value) and self._recent(signal, now):
                setattr(reading, signal.value, 0.0)  # known to be nothing
        if self._usual >= IN_USE:
            reading.usual = self._usual
            # Where the traffic is not known, the card is not idle.
            reading.idle = max(0.0, self._flow_at - self._busy_at)
        if self._read_at is not None and now - self._read_at >= UNANSWERED:
            reading.unanswered = now - self._read_at
        return reading

    def _value(self, signal: Signal, now: float) -> float:
        if signal in RATES:
            recent = self._recent(signal, now)
            return statistics.fmean(recent) if recent else 0.0
        if signal in SHARES:
            recent = self._recent(signal, now)
            return statistics.median_low(recent) if len(recent) > 1 else 0.0
        past = self._past[signal]
        window = FLAP_WINDOW if signal is Signal.FLAPS else WINDOW
        while past and now - past[0][0] >= window:
            past.popleft()
        if signal in STEADY and len(past) < STEADILY:
            return 0.0
        return sum(amount for _, amount in past)

    def _recent(self, signal: Signal, now: float) -> list[float]:
        past = self._past[signal]
        while len(past) > RECENT:
            past.popleft()
        return [amount for at, amount in past if now - at < FRESH]

    def _follow_traffic(self, now: float) -> None:
        """Keep the busiest moment in mind, and when the card was last busy."""
        traffic = (self._past[Signal.SENT], self._past[Signal.RECEIVED])
        if not any(past and past[-1][0] == now for past in traffic):
            return
        flow = self._value(Signal.SENT, now) + self._value(Signal.RECEIVED, now)
        if self._flow_at > -math.inf:
            self._usual *= 0.5 ** ((now - self._flow_at) / USUAL_HALF_LIFE)
        self._flow_at = now
        self._usual = max(self._usual, flow)
        if flow >= STILL * self._usual or self._busy_at == -math.inf:
            self._busy_at = now


def _gather(added: dict[Signal, float], counter: Counter, risen: int) -> None:
    """Events and bytes add up; of several priorities, the one that was held back longest counts."""
    amount = risen * counter.unit
    before = added.get(counter.signal, 0.0)
    added[counter.signal] = max(before, amount) if counter.signal in SHARES else before + amount
