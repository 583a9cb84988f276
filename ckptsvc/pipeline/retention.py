"""Which checkpoints stay, and why: one pure decision, for a store and for a tier of fast disks alike.

    last     the newest so many
    every    one for each so many steps, and one for each so much time
    best     those with the best values of a metric
    age      those younger than so long
    pinned   those a person has pinned
    needed   those that a running save or a drain works with
    refers   those whose files another one that stays needs (of incremental checkpoints)

A rule only ever keeps. What no rule keeps goes; without the first one, everything stays.

Where no clock can be trusted, the times in the commit records say how old a checkpoint is, from one commit to the
next. Between two epochs, and where times are suddenly far apart, lies a rest of the run or a writer whose clock is
wrong, and nobody can tell which: such a gap makes what is before it older by REST of `age` at most.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Annotated

import msgspec

from ckptsvc.pipeline.catalog import Ref
from ckptsvc.settings import Settings

NEWEST = "the newest"
"""Why the newest checkpoint stays, whatever the policy is."""

REST = 1 / 8
"""The part of `age` that a rest of the run takes at most."""

SUDDEN = 8
"""How many times as long as usual a rest within an epoch is at least; it is also longer than `age`."""


_Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
_Amount = Annotated[float, msgspec.Meta(ge=0, lt=1e12)]


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be kept.

    Attributes:
        last: the newest so many; 0 keeps everything, whatever else is said.
        steps: one checkpoint for each so many steps: that of the step itself, or the next after it; 0: no such rule.
        seconds: likewise, one for each so many seconds.
        best: so many with the best values of `metric`.
        metric: name of a value that the training gave with its saves.
        highest: the highest values are the best, not the lowest.
        age: those that were committed within so many seconds.
        rate: objects that may be deleted in a second, for whoever deletes; 0: no limit.
    """

    last: _Count = 0
    steps: _Count = 0
    seconds: _Amount = 0.0
    best: _Count = 0
    metric: Annotated[str, msgspec.Meta(max_length=100)] = ""
    highest: bool = False
    age: _Amount = 0.0
    rate: _Amount = 0.0


def policy_of(settings: Settings) -> Policy:
    """The policy of the settings."""
    wanted = settings.retention
    return Policy(
        last=settings.save.keep,
        steps=wanted.every.steps if wanted.every else 0,
        seconds=wanted.every.seconds if wanted.every else 0.0,
        best=wanted.best,
        metric=wanted.metric,
        highest=wanted.order == "highest",
        age=wanted.age or 0.0,
        rate=wanted.rate,
    )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A committed checkpoint, as far as it matters here.

    Attributes:
        ref: which.
        created: when it was committed, in seconds since 1970; None where that is not known.
        metrics: values that the training gave with it.
        refers: names of checkpoints whose files it needs.
    """

    ref: Ref
    created: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    refers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """What stays, with all reasons, newest first; and what goes, oldest first."""

    kept: dict[Ref, list[str]]
    gone: list[Ref]


def decide(
    candidates: Iterable[Candidate],
    policy: Policy,
    now: float | None,
    *,
    pinned: Collection[Ref] = (),
    needed: Collection[Ref] = (),
) -> Verdict:
    """Decide what may be deleted.

    Args:
        candidates: all committed checkpoints of a run, or those in one tier, in any order.
        policy: what to keep.
        now: seconds since 1970, by a clock that is known to be right; None: there is none.
        pinned: kept because a person said so.
        needed: kept because something is at work on them.
    """
    found = sorted(candidates, key=lambda each: each.ref, reverse=True)
    reasons: dict[Ref, list[str]] = {each.ref: [] for each in found}
    if found:
        reasons[found[0].ref].append(NEWEST)
    if not policy.last:
        for each in found:
            reasons[each.ref].append("nothing is to be deleted (save.keep is 0)")
    for each in found[: policy.last]:
        reasons[each.ref].append(f"among the last {policy.last}")
    for each in _one_in(found, policy.steps):
        reasons[each.ref].append(f"one for every {policy.steps} steps")
    for each in _one_within(found, policy.seconds):
        reasons[each.ref].append(f"one for every {span(policy.seconds)}")
    for each in best(found, policy):
        which = "highest" if policy.highest else "lowest"
        reasons[each.ref].append(f"among the {policy.best} with the {which} {policy.metric}")
    ages = _ages(found, policy.age, now)
    for each in found:
        if policy.age and ages.get(each.ref, 0.0) <= policy.age:
            reasons[each.ref].append(f"younger than {span(policy.age)}")
        if each.ref in pinned:
            reasons[each.ref].append("pinned")
        if each.ref in needed:
            reasons[each.ref].append("in use")
    _close(found, reasons)
    kept = {ref: why for ref, why in reasons.items() if why}
    return Verdict(kept, [each.ref for each in reversed(found) if each.ref not in kept])


def best(candidates: Iterable[Candidate], policy: Policy) -> list[Candidate]:
    """Those with the best values of the policy's metric, best first; of equal ones the newer.

    A checkpoint without a value, or with one that is NaN or infinite, is never among them.
    """
    if not policy.best or not policy.metric:
        return []
    valued = [each for each in candidates if math.isfinite(each.metrics.get(policy.metric, math.nan))]
    valued.sort(key=lambda each: each.ref, reverse=True)
    valued.sort(key=lambda each: each.metrics[policy.metric], reverse=policy.highest)
    return valued[: policy.best]


def _one_in(found: Sequence[Candidate], steps: int) -> list[Candidate]:
    """The first checkpoint of every so many steps.

    Where the job went back to an earlier step, its later try counts: a checkpoint is passed over if a later epoch has
    reached the same steps.
    """
    chosen: dict[int, Candidate] = {}
    lowest = math.inf  # step of all that are newer
    for each in found if steps else ():
        before = chosen.get(each.ref.step // steps)
        if before is None or (each.ref.step < lowest and each.ref.step < before.ref.step):
            chosen[each.ref.step // steps] = each
        lowest = min(lowest, each.ref.step)
    return list(chosen.values())


def _one_within(found: Sequence[Candidate], seconds: float) -> list[Candidate]:
    """The first checkpoint of every span of time, counted from 1970 so that it stays the same one; and undated ones."""
    chosen: dict[int, Candidate] = {}
    undated = []
    for each in reversed(found) if seconds else ():
        if each.created is None:
            undated.append(each)
            continue
        span_of_it = int(each.created // seconds)
        before = chosen.get(span_of_it)
        if before is None or each.created < (before.created or 0.0):
            chosen[span_of_it] = each
    return [*chosen.values(), *undated]


def _ages(found: Sequence[Candidate], longest: float, now: float | None) -> dict[Ref, float]:
    """How old those are whose time of commit is known, as the module says; `longest` is the age that matters."""
    known = [(each.ref, each.created) for each in found if each.created is not None]
    if now is not None:
        return {ref: now - created for ref, created in known}
    gaps = [newer - older for (_, newer), (_, older) in pairwise(known)]
    sudden = max(longest, SUDDEN * median(map(abs, gaps))) if gaps else 0.0
    age = 0.0
    ages = {ref: age for ref, _ in known[:1]}
    for ((newer, _), (older, _)), gap in zip(pairwise(known), gaps, strict=True):
        rested = newer.epoch != older.epoch or abs(gap) > sudden
        age += min(max(gap, 0.0), REST * longest) if rested else gap
        ages[older] = age
    return ages


def _close(found: Sequence[Candidate], reasons: dict[Ref, list[str]]) -> None:
    """Keep what those that stay refer to, and what these refer to, and so on."""
    by_name = {each.ref.name: each for each in found}
    waiting = [each for each in found if reasons[each.ref]]
    while waiting:
        each = waiting.pop()
        for name in each.refers:
            other = by_name.get(name)
            if other is None or other is each:
                continue
            if not reasons[other.ref]:
                waiting.append(other)
            why = f"{each.ref.name} needs files of it"
            if why not in reasons[other.ref]:
                reasons[other.ref].append(why)


def span(seconds: float) -> str:
    """A time as it is set: "2 h", "7 d", "90 s"."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
