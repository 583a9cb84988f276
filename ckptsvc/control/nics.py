"""What is wrong with a network card: judged by its own counters, and against the other cards of the job.

A card is named only where it stands out: when half of the job's cards do the same, the job does something slow, or the
network has a problem that no node is to blame for. The thresholds come from a hang that was recorded on a Slingshot
machine of 480 ranks (its card had 205 to 520 timeouts, all others none; it was held back 11 to 84 times as long as the
median card) and from the vendor's limit for errors on the link.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import NicTrouble as Trouble

OUTLIER = 8.0
"""Times the job's median from which on a card stands out."""

LONG_BUSY = 5.0
"""Seconds without traffic that training has between two bursts of it; more makes an agent tell its coordinator."""

SILENT = 10.0
"""Seconds without traffic after which a card is silent, if the job's others are not."""

NO_ANSWER = 3.0
"""Seconds after which a card whose counters cannot be read any more is named."""

SURE = 4.0
"""Times the threshold from which on a finding is critical."""

INFO, WARNING, CRITICAL = "info", "warning", "critical"
SEVERITIES = (INFO, WARNING, CRITICAL)


class Level(NamedTuple):
    """From where on a field of NicReading is a sign of trouble."""

    floor: float
    trouble: Trouble
    phrase: str  # with {value} and {median}


LEVELS: dict[str, Level] = {
    # A card whose peer has died counts these too: where a node is lost, that explains them.
    "timeouts": Level(8, Trouble.TIMEOUTS, "{value:.0f} packets got no answer in the last 10 s (median {median:.0f})"),
    "failures": Level(8, Trouble.FAILURES, "{value:.0f} requests of the last 10 s failed or were cancelled after all "
        "retries (median {median:.0f})"),
    "stalled": Level(0.05, Trouble.CONGESTED, "the switch's flow control holds it back {value:.0%} of the time "
        "(median {median:.1%})"),
    "paused_tx": Level(0.05, Trouble.CONGESTED, "the network makes it wait {value:.0%} of the time "
        "(median {median:.1%})"),
    "paused_rx": Level(0.05, Trouble.CONGESTED, "it makes the network wait {value:.0%} of the time "
        "(median {median:.1%}): its node takes data too slowly"),
    "exhausted": Level(10_000, Trouble.CONGESTED, "it refused {value:.0f} requests in 10 s for want of resources "
        "(median {median:.0f}): its node takes data too slowly"),
    "waits": Level(1e6, Trouble.CONGESTED, "it had data and could not send for {value:.2g} ticks a second "
        "(median {median:.2g})"),
    "marks": Level(1e4, Trouble.CONGESTED, "{value:.2g} congestion notifications a second (median {median:.2g})"),
    # 20 a second is what link-level retry is built for (1e-10 of 200 Gb/s).
    "uncorrected": Level(20, Trouble.BAD_LINK, "{value:.0f} codewords of the last 10 s could not be repaired "
        "(median {median:.0f}): cable or optic"),
    "replays": Level(1000, Trouble.BAD_LINK, "{value:.0f} retries on the link in 10 s (median {median:.0f}): "
        "cable or optic"),
    "flaps": Level(1, Trouble.FLAPPING, "its link was restarted {value:.0f} times in the last 10 min "
        "(median {median:.0f})"),
}  # fmt: skip
"""Every number that can name a card; a field that is not here is told and shown, and decides nothing."""

_levels_of = attrgetter(*LEVELS)
_floors = tuple(level.floor for level in LEVELS.values())
_reals_of = attrgetter(*(f.name for f in pb.NicReading.DESCRIPTOR.fields if f.cpp_type == f.CPPTYPE_DOUBLE))

_EXACT = ("timeouts", "failures", "uncorrected", "flaps", "link", "link_down", "handler_absent", "gone")
"""Fields whose every change is told at once; the others' when they double or halve."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One card in trouble.

    Attributes:
        severity: "info" (supports another suspicion), "warning", or "critical".
        sentence: who and what, for a person.
        numbers: the signals of the card that are not zero, by field of NicReading; the medians as "median_<field>".
        since: when it was found, on the clock of whoever asked; set by the record that keeps it.
    """

    node: str
    nic: str
    kind: Trouble
    severity: str
    sentence: str
    numbers: dict[str, float] = field(default_factory=dict)
    since: float = 0.0


class Medians:
    """What is normal in a job at this moment: computed from readings of its cards, and only what is asked for."""

    def __init__(self, readings: Sequence[pb.NicReading]) -> None:
        self._readings = readings
        self._medians: dict[tuple[str, str], float | None] = {}
        self._well: dict[tuple[str, str, str], bool | None] = {}

    def of(self, family: str, name: str) -> float | None:
        """The (lower) median of a field over the *other* cards, for a card that is above it; None: no others."""
        key = (family, name)
        if key not in self._medians:
            values = sorted(float(getattr(r, name)) for r in self._readings if r.family == family)
            self._medians[key] = values[len(values) // 2 - 1] if len(values) > 1 else None
        return self._medians[key]

    def others_well(self, family: str, nic: str, bad: str) -> bool | None:
        """Whether most of the other nodes' cards of that name do not have the flag `bad`; None: there are none."""
        key = (family, nic, bad)
        if key not in self._well:
            flags = [bool(getattr(r, bad)) for r in self._readings if (r.family, r.nic) == (family, nic)]
            others = len(flags) - 1  # the one that asks has the flag
            self._well[key] = flags.count(False) * 2 > others if others > 0 else None
        return self._well[key]


def judge(node: str, nic: pb.NicReading, job: Medians, known: Collection[Trouble] = ()) -> list[Finding]:
    """What is wrong with one card.

    Args:
        node: where it is.
        nic: its last reading.
        job: what is normal.
        known: troubles it is known to have: half of their threshold keeps them, so that they do not come and go.
    """
    found: dict[Trouble, Finding] = {}
    for kind, severity, phrase, numbers in [*_levels(nic, job, known), *_states(nic, job)]:
        before = found.get(kind)
        if before is None or SEVERITIES.index(severity) > SEVERITIES.index(before.severity):
            found[kind] = Finding(node, nic.nic, kind, severity, f"{nic.nic} on {node}: {phrase}", numbers)
    return list(found.values())


def has_signs(nic: pb.NicReading) -> bool:
    """Whether there is anything to judge: seldom, and a coordinator of ten thousand nodes asks very often."""
    # 2: what is known to be in trouble is kept at half of the threshold.
    if any(value * 2 >= floor for value, floor in zip(_levels_of(nic), _floors, strict=True)):
        return True
    return nic.link_down or nic.handler_absent or nic.gone or nic.unanswered >= NO_ANSWER or nic.idle >= SILENT


_Sign = tuple[Trouble, str, str, dict[str, float]]


def _levels(nic: pb.NicReading, job: Medians, known: Collection[Trouble]) -> Iterator[_Sign]:
    for name, (floor, trouble, phrase) in LEVELS.items():
        value = getattr(nic, name)
        easier = 2.0 if trouble in known else 1.0
        if value * easier < floor:
            continue
        median = job.of(nic.family, name) or 0.0
        if value * easier < OUTLIER * median:
            continue
        severity = CRITICAL if value >= SURE * floor else WARNING
        said = phrase.format(value=value, median=median) + _traffic(nic)
        yield trouble, severity, said, numbers_of(nic) | {f"median_{name}": median}


def _states(nic: pb.NicReading, job: Medians) -> Iterator[_Sign]:
    numbers = numbers_of(nic)
    if nic.gone:
        yield Trouble.NO_ANSWER, CRITICAL, "the card is not on the node any more", numbers
    elif nic.unanswered >= NO_ANSWER:
        yield Trouble.NO_ANSWER, WARNING, f"its counters have not been readable for {nic.unanswered:.0f} s", numbers
    others = job.others_well(nic.family, nic.nic, "link_down") if nic.link_down else None
    if nic.link_down and (nic.link_lost if others is None else others):
        yield Trouble.LINK_DOWN, CRITICAL, f"its link is {nic.link[:40]!r}", numbers
    others = job.others_well(nic.family, nic.nic, "handler_absent") if nic.handler_absent else None
    if nic.handler_absent and (nic.handler_lost if others is None else others):
        phrase = f"its retry handler (cxi_rh@{nic.nic}) does not run: lost packets are not sent again"
        yield Trouble.NO_HANDLER, CRITICAL, phrase, numbers
    idle = job.of(nic.family, "idle") if nic.idle >= SILENT else None
    if idle is not None and idle < LONG_BUSY:
        phrase = f"it has moved nothing for {nic.idle:.0f} s, while most of the job's cards have"
        yield Trouble.SILENT, INFO, phrase, numbers | {"median_idle": idle}


def _traffic(nic: pb.NicReading) -> str:
    """How much less than usual the card moves, where it is a lot."""
    now = nic.sent + nic.received
    if not nic.usual or not nic.HasField("sent") or now * 10 > nic.usual:
        return ""
    return f"; it moves {now / 1e9:.2g} GB/s instead of {nic.usual / 1e9:.2g}"


def numbers_of(nic: pb.NicReading) -> dict[str, float]:
    """The numbers of a reading that are not zero, by field."""
    fields = ((field.name, value) for field, value in nic.ListFields())
    return {name: float(value) for name, value in fields if type(value) in (int, float) and value}


def is_plausible(nic: pb.NicReading) -> bool:
    """Whether the numbers that have come over the wire are numbers, and the names are short."""
    numbers = all(0 <= number < math.inf for number in _reals_of(nic))  # not so for NaN
    return numbers and 0 < len(nic.nic) <= 64 and len(nic.link) <= 64


def is_news(told: pb.NicReading | None, now: pb.NicReading) -> bool:
    """Whether a card's coordinator must hear of `now` at once, if it has last heard `told`."""
    if told is None or any(getattr(told, name) != getattr(now, name) for name in _EXACT):
        return True
    troubled = False
    for name, level in LEVELS.items():
        before, after = getattr(told, name), getattr(now, name)
        if max(before, after) * 2 >= level.floor and _has_moved(before, after):
            return True
        troubled = troubled or after >= level.floor
    if troubled and _has_moved(told.sent + told.received, now.sent + now.received):
        return True
    for name, limits in (("idle", (LONG_BUSY, SILENT)), ("unanswered", (NO_ANSWER,))):
        if any((getattr(told, name) < limit) != (getattr(now, name) < limit) for limit in limits):
            return True
    return False


def _has_moved(before: float, after: float) -> bool:
    return max(before, after) > 2 * min(before, after)
