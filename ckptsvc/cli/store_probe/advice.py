"""From what was measured to settings, each with its reason: pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from statistics import median
from typing import Any

MiB = 1 << 20
CLEAR = 1.1
"""How many times better something must be to be worth a setting."""

NOISY = 0.5
"""Spread of the samples, in parts of their median, from which on they are called noisy."""

DEFAULT_RATE = 100.0
LONG = 60.0
"""Seconds a save may take before a faster tier in front of the store pays."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A setting and why, or a warning.

    Attributes:
        setting: as in the settings file; "" for a warning.
        value: as it is written there.
        why: one sentence.
        change: it differs from the default.
    """

    setting: str
    value: str
    why: str
    change: bool = False


@dataclass(frozen=True, slots=True)
class Speed:
    """Bandwidth of some samples, in bytes a second."""

    median: float
    low: float
    high: float
    count: int

    @property
    def spread(self) -> float:
        """Between the slowest and the fastest, in parts of the median."""
        return (self.high - self.low) / self.median if self.median else 0.0


def speed(nbytes: float, seconds: Sequence[float]) -> Speed | None:
    """The bandwidth of samples that moved so many bytes each; None without one."""
    if not seconds:
        return None
    rates = [nbytes / max(s, 1e-9) for s in seconds]
    return Speed(median(rates), min(rates), max(rates), len(rates))


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share of them does not exceed."""
    return sorted(values)[max(ceil(share * len(values)) - 1, 0)]


def speeds(stage: Mapping[str, Any] | None) -> dict[tuple[int, int], Speed]:
    """Bandwidth by (size, how many at a time)."""
    found = {}
    for sample in (stage or {}).get("samples", ()):
        one = speed(sample["size"] * sample["objects"], sample["seconds"])
        if one is not None:
            found[sample["size"], sample["parallel"]] = one
    return found


def advise(found: Mapping[str, Mapping[str, Any]], cores: int, early_cores: int, nbytes: float | None) -> list[Advice]:
    """What should be set.

    Args:
        found: what `doctor_probe` has measured, by stage.
        cores: of this node.
        early_cores: the setting.
        nbytes: what this node saves each time, if that is known.
    """
    advice = [*_exclusive(found), *_direct(found.get("about", {})), *_driver(found)]
    advice += [*_extent(speeds(found.get("read"))), *_early(found, cores, early_cores)]
    return [*advice, *_rate(found.get("metadata", {})), *_tier(speeds(found.get("write")), nbytes)]


def _exclusive(found: Mapping[str, Mapping[str, Any]]) -> list[Advice]:
    winners = found.get("race", {}).get("winners", ())
    bad = [w for w in winners if w != 1]
    if bad:
        return [Advice("", "", f"in {len(bad)} of {len(winners)} races not exactly one writer won: two jobs could both"
            " commit to a run here. Use another store for runs")]  # fmt: skip
    if not found.get("about", {}).get("exclusive_create", True):
        return [Advice("", "", "the driver says that creating an object is not exclusive here, whatever was measured")]
    return []


def _direct(about: Mapping[str, Any]) -> list[Advice]:
    if about.get("direct_io") and str(about.get("url", "")).startswith(("file://", "lustre://")):
        return [Advice("", "", f"no direct I/O: {about['direct_io']}; writing takes more of the CPU")]
    return []


def _driver(found: Mapping[str, Mapping[str, Any]]) -> list[Advice]:
    tune = found.get("tune", {})
    options = f"store.options.{str(found.get('about', {}).get('url', '')).partition('://')[0] or 'file'}"
    ways = [(way, speed(tune["size"], seconds)) for way, seconds in tune.get("ways", ())]
    known = [(way, each) for way, each in ways if each is not None]
    base = next((each for way, each in known if not way), None)
    others = [(way, each) for way, each in known if way]
    if base is None or not others:
        return []
    way, top = max(others, key=lambda each: each[1].median)
    name, value = next(iter(way.items()))
    if top.median > CLEAR * base.median and top.low > base.median:
        why = f"{_mib(top.median)} for one large object instead of {_mib(base.median)}"
        text = f"{value // MiB}MiB" if name in ("block", "part") else str(value)
        return [Advice(f"{options}.{name}", text, why, change=True)]
    tried = ", ".join(dict.fromkeys(name for way, _ in others for name in way))
    return [Advice(options, "-", f"no other {tried} is clearly better than the driver's own: {_mib(base.median)}")]


def _extent(read: Mapping[tuple[int, int], Speed]) -> list[Advice]:
    """A part of a tensor is read in whole extents: they should be so large that the way there does not count."""
    single = sorted((size, each.median) for (size, parallel), each in read.items() if parallel == 1)
    if len(single) < 2:
        return []
    (small, slow), (large, fast) = single[0], single[-1]
    # seconds of an object: latency + size / bandwidth, through both sizes
    bandwidth = (large - small) / max(large / fast - small / slow, 1e-9)
    latency = max(small / slow - small / bandwidth, 0.0) if bandwidth > 0 else 0.0
    wanted = MiB
    while wanted < 16 * MiB and latency * bandwidth > wanted:
        wanted *= 2
    why = f"a read costs {latency * 1000:.1f} ms before its first byte, in which {latency * bandwidth / MiB:.1f} MiB"
    return [Advice("save.extent", f"{wanted // MiB}MiB", f"{why} could be read", change=wanted != MiB)]


def _early(found: Mapping[str, Mapping[str, Any]], cores: int, early_cores: int) -> list[Advice]:
    copied = speed(found.get("copy", {}).get("size", 0), found.get("copy", {}).get("seconds", ()))
    written = max((each.median for each in speeds(found.get("write")).values()), default=0.0)
    if copied is None or not written:
        return []
    ratio = copied.median / written
    if cores >= early_cores:
        why = f"snapshots are written while they are copied: this node has {cores} cores"
    else:
        why = f"this node has {cores} cores: writing while copying would slow the copy down"
    return [Advice("save.early_cores", str(early_cores), f"{why}; a copy is {ratio:.1f} times as fast as the store")]


def _rate(metadata: Mapping[str, Any]) -> list[Advice]:
    deletes = metadata.get("calls", {}).get("delete", ())
    if not deletes:
        return []
    able = 1 / max(median(deletes), 1e-6)
    if able / 2 >= DEFAULT_RATE:
        return [Advice("retention.rate", f"{DEFAULT_RATE:g}", f"the store deletes {able:,.0f} objects a second, one"
            " after the other")]  # fmt: skip
    wanted = max(round(able / 2), 1)
    why = f"the store deletes {able:,.0f} objects a second, one after the other; half of that is left to others"
    return [Advice("retention.rate", str(wanted), why, change=True)]


def _tier(write: Mapping[tuple[int, int], Speed], nbytes: float | None) -> list[Advice]:
    if not write:
        return []
    top = max(write.values(), key=lambda each: each.median)
    most = LONG * top.median
    if nbytes is None:
        return [Advice("tiers", "-", f"saves of more than {most / (1 << 30):,.0f} GiB from this node take over a minute"
            " here: then a tier in memory or on a local disk in front pays (--state says how much)")]  # fmt: skip
    seconds = nbytes / top.median
    if seconds > LONG:
        return [Advice("tiers", "local", f"this node's state takes {seconds:,.0f} s to write here: keep newer snapshots"
            " in the memory of other nodes, or on a local disk", change=True)]  # fmt: skip
    return [Advice("tiers", "-", f"this node's state is written in {seconds:.1f} s: no tier in front is needed")]


def noise(found: Mapping[str, Mapping[str, Any]]) -> str:
    """How far samples differ, if that is far; else ""."""
    all_of_them = [*speeds(found.get("write")).values(), *speeds(found.get("read")).values()]
    spreads = [each.spread for each in all_of_them if each.count > 1]
    if not spreads:
        return ""
    typical = median(spreads)
    if typical <= NOISY:
        return ""
    return f"the samples of one measurement differ by {typical:.0%} of their median: the node or the store is busy"


def _mib(rate: float) -> str:
    return f"{rate / MiB:,.0f} MiB/s"
