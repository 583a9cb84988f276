"""`ckptsvc gc`: what interrupted work has left in a run, what retention would delete, and the removal of both."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click
import msgspec

from ckptsvc.cli import address, retention
from ckptsvc.cli.agents import agent_directory, ask_all
from ckptsvc.cli.audit import take_down
from ckptsvc.cli.retention import Judged
from ckptsvc.cli.terminal import Screen, duration, emit, note, plural, printable, progress, size
from ckptsvc.errors import CkptsvcError, InvalidInput, StoreError, StoreFull
from ckptsvc.format.commit import RETIRED
from ckptsvc.interop.conversion.leftovers import leftovers
from ckptsvc.interop.conversion.target import RECORDS
from ckptsvc.pipeline.catalog import list_refs
from ckptsvc.pipeline.garbage import Garbage, find_garbage, remove_garbage
from ckptsvc.pipeline.retain import Pace, expire
from ckptsvc.pipeline.retention import Policy
from ckptsvc.quantities import parse_duration
from ckptsvc.storage import Store
from ckptsvc.storage.clock import store_time
from ckptsvc.storage.opening import open_store

REMOVE, REMOVED, YOUNG, RUNNING, COMMITTED = "remove", "removed", "too young", "running", "committed meanwhile"
LATEST = "may be running"
SKEW = 60.0
"""Seconds by which two clocks may differ before anybody is told."""
_STYLE = {REMOVE: "doubt", REMOVED: "good"}


@dataclass(slots=True)
class Case:
    """Some garbage, where it is, and what becomes of it: one of the words above."""

    garbage: Garbage
    fate: str
    store: Store


@click.command()
@click.argument("store")
@click.option("--delete", is_flag=True, help="Delete it; without this flag nothing is changed.")
@click.option("--dry-run", is_flag=True, help="Change nothing, which is what happens without --delete.")
@click.option("--expire", "expires", is_flag=True, help="Deal with checkpoints, too, that retention does not keep.")
@click.option("--older-than", default="1h", show_default=True, metavar="TIME",
    help='Only garbage that was last written to so long ago, as "90s", "10min", "2h" or "7d".')  # fmt: skip
@click.option("--latest", is_flag=True,
    help="Also saves newer than every checkpoint, which may yet be committed unless the job is gone.")  # fmt: skip
@retention.options
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    store: str, delete: bool, dry_run: bool, expires: bool, older_than: str, latest: bool, as_json: bool,
    **rules: str | None,
) -> None:  # fmt: skip
    """Show what interrupted work has left in the run at STORE (a URL or a path), and --delete it.

    That is: folders whose save was never committed or whose deletion was interrupted, objects that no committed
    checkpoint refers to, temporary objects, records of unfinished conversions, uploads that were never completed. What
    is still at work looks the same, so only what is older than --older-than is deleted, by the clock of the store, and
    never a step that an agent of this node is saving. Saves that are newer than every checkpoint, of the job that has
    the run, may wait for their store however old they are: they stay without --latest. What a committed checkpoint
    refers to is never touched, nor checkpoints whose commit record or index cannot be read.

    Where retention is set (save.keep and [retention], or the options below), every checkpoint is listed with the rules
    that keep it. A running job deletes the others by itself; with --expire they are deleted here, for a run that has
    none.

    \b
    JSON: {"store", "dry_run", "older_than", "garbage": [{"folder", "why",
      "fate", "bytes", "modified", "objects": [{"key", "bytes", "modified"}]}],
      "found": {"objects", "bytes"}, "removed": {"objects", "bytes"},
      "policy": {"last", "steps", "seconds", "best", "metric", "highest",
      "age", "rate"}, "checkpoints": [{"name", "step", "epoch", "created",
      "bytes", "written", "metrics", "fate", "why": [...]}]}
    fate is "remove" (in a dry run), "removed", "too young", "running", "may be
    running" or "committed meanwhile", of a checkpoint "keep", "remove" or "removed";
    modified is ISO 8601 in UTC, null for an empty folder; removed counts what
    would be removed in a dry run. A checkpoint has so many bytes; written are
    those of its own files, which are free when it is gone.
    """  # noqa: D301  \b is click's
    if delete and dry_run:
        raise InvalidInput("--delete and --dry-run contradict each other")
    seconds, policy = parse_duration(older_than), retention.policy(rules)
    if expires:
        retention.refuse_nothing_to_expire(policy)
    place = address.parse(store)
    if place.name:
        raise InvalidInput(f"{store} is a checkpoint", hint="give the run that it belongs to")
    with ExitStack() as stack:
        opened = stack.enter_context(address.opened(place))
        running = _running_steps()
        now = _now(opened, seconds) if delete and opened.children() else time.time()
        judged = retention.look(opened, policy, now, running)
        cases = [Case(g, _fate(g, now - seconds, running, latest=latest), opened) for g in find_garbage(opened)]
        cases += [Case(g, _fate(g, now - seconds, ()), s) for s, g in _beside_targets(opened, place.url, stack)]
        hint = "" if cases or list_refs(opened) else address.what_instead(opened)
        if delete:
            judged = _expire(opened, judged, policy if expires else Policy(rate=policy.rate), now, seconds)
            _delete(cases, Pace(policy.rate))
            for ref in judged.removed:
                take_down("delete", f"{opened.url}/{ref.name}", "no rule of retention keeps it (ckptsvc gc)")
            if _going(cases):
                take_down("gc", opened.url, f"removed {plural(_sum(_going(cases))['objects'], 'object')}")
        url = opened.url
    if as_json:
        emit(_json(url, cases, judged, seconds, delete))
    else:
        _show(url, cases, judged, seconds, delete, expires, now, hint)


def _now(store: Store, older_than: float) -> float:
    """The time by the store's clock: by that of a node that is ahead, a save that is running would look abandoned.

    Raises:
        StoreError: it is not known, and matters.
    """
    here = time.time()
    try:
        there = store_time(store, RETIRED)
    except StoreFull:  # which is why somebody deletes
        note(f"{store.url} is full, and cannot be asked for its time: this node's clock counts")
        return here
    if there is None:
        if older_than:
            hint = "--older-than 0 deletes what is not committed, whatever its age: while nobody writes to the run"
            raise StoreError(f"{store.url} does not say when its objects were written", hint=hint)
        return here
    if abs(here - there) > SKEW:
        how = "ahead of" if here > there else "behind"
        note(f"this node's clock is {duration(abs(here - there))} {how} the store's, which counts")
    return there


def _beside_targets(store: Store, url: str, stack: ExitStack) -> Iterator[tuple[Store, Garbage]]:
    """What conversions into this target, or into those in this folder, have left."""
    for name in store.children():
        if name.endswith(RECORDS):
            yield from ((store, garbage) for garbage in leftovers(store, name.removesuffix(RECORDS)))
    above, _, last = url.rstrip("/").rpartition("/")
    if last and not above.endswith("/") and above.count("/") >= 2:
        with suppress(CkptsvcError):  # what is above a run may be nobody's business
            parent = open_store(above)
            stack.callback(parent.close)
            yield from ((parent, garbage) for garbage in leftovers(parent, last))


def _expire(store: Store, judged: Judged, policy: Policy, now: float, older_than: float) -> Judged:
    """Delete what retention does not keep, and what others began to delete so long ago."""
    needed = [ref for ref, why in judged.verdict.kept.items() if "in use" in why]
    going = judged.going if policy.last else 0
    with progress("deleting checkpoints", going) as advance:
        done = expire(store, policy, needed, now, older_than, advance)
    for ref in done.back:
        note(f"{ref.name} was half deleted, and is a checkpoint again: it is pinned, or another one needs it")
    judged.removed = done.gone
    return judged


def _running_steps() -> set[int]:
    """Steps that the agents of this node are saving, whatever their run: to keep too much does no harm."""
    try:
        answers = ask_all(agent_directory())
    except CkptsvcError as error:
        note(f"the agents of this node cannot be asked: {error}")
        return set()
    steps: set[int] = set()
    for answer in answers:
        if answer.status is None:
            note(f"the agent in {answer.directory} does not say what it is saving: {answer.error}")
            continue
        jobs, arenas = answer.status.get("coordinates", ()), answer.status.get("arenas", ())
        steps.update(step for job in jobs for step in job["running_saves"])
        steps.update(arena["step"] for arena in arenas if arena["state"] in ("filling", "staged"))
    return steps


def _fate(garbage: Garbage, before: float, running: Collection[int], *, latest: bool = False) -> str:
    if garbage.ref is not None and garbage.ref.step in running:
        return RUNNING
    if garbage.latest and not latest:
        return LATEST
    return REMOVE if garbage.modified <= before else YOUNG


def _delete(cases: Sequence[Case], pace: Pace) -> None:
    chosen = [case for case in cases if case.fate == REMOVE]
    with progress("deleting", sum(case.garbage.nbytes for case in chosen)) as advance:
        for case in chosen:
            case.fate = REMOVED if remove_garbage(case.store, case.garbage, pace) else COMMITTED
            advance(case.garbage.nbytes)


def _sum(cases: Sequence[Case]) -> dict[str, int]:
    return {
        "objects": sum(len(case.garbage.entries) for case in cases),
        "bytes": sum(case.garbage.nbytes for case in cases),
    }


def _going(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.fate in (REMOVE, REMOVED)]


def _json(url: str, cases: Sequence[Case], judged: Judged, seconds: float, delete: bool) -> dict[str, Any]:
    listed = [
        {
            "folder": case.garbage.folder,
            "why": case.garbage.why,
            "fate": case.fate,
            "bytes": case.garbage.nbytes,
            "modified": _iso(case.garbage.modified) if case.garbage.entries else None,
            "objects": [{"key": e.key, "bytes": e.size, "modified": _iso(e.modified)} for e in case.garbage.entries],
        }
        for case in cases
    ]
    sums = {"found": _sum(cases), "removed": _sum(_going(cases))}
    kept = {"policy": msgspec.to_builtins(judged.policy), "checkpoints": retention.document(judged)}
    return {"store": url, "dry_run": not delete, "older_than": seconds, "garbage": listed} | sums | kept


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _show(
    url: str, cases: Sequence[Case], judged: Judged, seconds: float, delete: bool, expires: bool, now: float, hint: str
) -> None:
    screen = Screen()
    if judged.policy.last and judged.commits:
        retention.show(screen, judged)
        gone = judged.verdict.gone
        if gone:
            what = f"{plural(len(gone), 'checkpoint')}, {size(judged.going)}"
            later = "this was a dry run" if expires else "a running job does so by itself"
            done = f"removed {what}" if delete and expires else f"--expire --delete would remove {what}; {later}"
            screen.line(done)
        if cases:
            screen.line()
    elif judged.policy != Policy(rate=judged.policy.rate) and judged.commits:
        note("save.keep is 0: every checkpoint is kept, whatever the other rules of retention are")
    if cases:
        _show_garbage(screen, cases, seconds, delete, now)
    elif not judged.policy.last or not judged.verdict.gone:
        note(f"nothing to remove in {url}")
    if hint:
        note(f"hint: {hint}")


def _show_garbage(screen: Screen, cases: Sequence[Case], seconds: float, delete: bool, now: float) -> None:
    rows = [
        [
            case.garbage.folder,
            f"{len(case.garbage.entries):,}",
            size(case.garbage.nbytes),
            duration(now - case.garbage.modified) if case.garbage.entries else "?",
            case.fate,
            printable(case.garbage.why),
        ]
        for case in cases
    ]
    screen.table(
        ["FOLDER", "OBJECTS", "SIZE", "AGE", "FATE", "WHY"],
        rows,
        right=("OBJECTS", "SIZE", "AGE"),
        fold="WHY",
        style=lambda row, column: _STYLE.get(cases[row].fate, "quiet") if column == "FATE" else "",
    )
    screen.line()
    found, gone = _sum(cases), _sum(_going(cases))
    screen.line(f"found {plural(found['objects'], 'object')}, {size(found['bytes'])}")
    what = f"{plural(gone['objects'], 'object')}, {size(gone['bytes'])}"
    if delete:
        screen.line(f"removed {what}")
    elif _going(cases):
        screen.line(f"--delete would remove {what}; this was a dry run")
    else:
        screen.line(f"nothing is older than {duration(seconds)} and can be removed")
    if any(case.fate == LATEST for case in cases):
        note("hint: --latest removes what may be running, too; for a run that no job writes to")
