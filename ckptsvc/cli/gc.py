"""`ckptsvc gc`: what interrupted saves have left, and its removal."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from ckptsvc.cli import address
from ckptsvc.cli.agents import agent_directory, ask_all
from ckptsvc.cli.terminal import Screen, duration, emit, note, plural, printable, progress, size
from ckptsvc.errors import CkptsvcError, InvalidInput
from ckptsvc.pipeline.garbage import Garbage, find_garbage, remove_garbage
from ckptsvc.quantities import parse_duration
from ckptsvc.storage import Store

REMOVE, REMOVED, YOUNG, RUNNING, COMMITTED = "remove", "removed", "too young", "running", "committed meanwhile"
_STYLE = {REMOVE: "doubt", REMOVED: "good"}


@dataclass(slots=True)
class Case:
    """Some garbage, and what becomes of it: one of the words above."""

    garbage: Garbage
    fate: str


@click.command()
@click.argument("store")
@click.option("--delete", is_flag=True, help="Delete it; without this flag nothing is changed.")
@click.option("--older-than", default="1h", show_default=True, metavar="TIME",
    help='Only what was last written to so long ago, as "90s", "10min", "2h" or "7d".')  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(store: str, delete: bool, older_than: str, as_json: bool) -> None:
    """Show what interrupted saves have left in the run at STORE (a URL or a path), and --delete it.

    That is: folders whose save was never committed, objects that no committed checkpoint refers to, and temporary
    objects. A save that is still running looks the same, so only what is older than --older-than is deleted, and never
    a step that an agent of this node is saving. What a committed checkpoint refers to is never touched, nor checkpoints
    whose commit record or index cannot be read.

    \b
    JSON: {"store", "dry_run", "older_than", "garbage": [{"folder", "why",
      "fate", "bytes", "modified", "objects": [{"key", "bytes", "modified"}]}],
      "found": {"objects", "bytes"}, "removed": {"objects", "bytes"}}
    fate is "remove" (in a dry run), "removed", "too young", "running" or
    "committed meanwhile"; modified is ISO 8601 in UTC, null for an empty
    folder; removed counts what would be removed in a dry run.
    """  # noqa: D301  \b is click's
    seconds = parse_duration(older_than)
    place = address.parse(store)
    if place.name:
        raise InvalidInput(f"{store} is a checkpoint", hint="give the run that it belongs to")
    with address.opened(place) as opened:
        running = _running_steps()
        before = time.time() - seconds
        cases = [Case(garbage, _fate(garbage, before, running)) for garbage in find_garbage(opened)]
        if delete:
            _delete(opened, cases)
        url = opened.url
    if as_json:
        emit(_json(url, cases, seconds, delete))
    else:
        _show(url, cases, seconds, delete)


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


def _fate(garbage: Garbage, before: float, running: Collection[int]) -> str:
    if garbage.ref is not None and garbage.ref.step in running:
        return RUNNING
    return REMOVE if garbage.modified <= before else YOUNG


def _delete(store: Store, cases: Sequence[Case]) -> None:
    chosen = [case for case in cases if case.fate == REMOVE]
    with progress("deleting", sum(case.garbage.nbytes for case in chosen)) as advance:
        for case in chosen:
            case.fate = REMOVED if remove_garbage(store, case.garbage) else COMMITTED
            advance(case.garbage.nbytes)


def _sum(cases: Sequence[Case]) -> dict[str, int]:
    return {
        "objects": sum(len(case.garbage.entries) for case in cases),
        "bytes": sum(case.garbage.nbytes for case in cases),
    }


def _going(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.fate in (REMOVE, REMOVED)]


def _json(url: str, cases: Sequence[Case], seconds: float, delete: bool) -> dict[str, Any]:
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
    return {"store": url, "dry_run": not delete, "older_than": seconds, "garbage": listed} | sums


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _show(url: str, cases: Sequence[Case], seconds: float, delete: bool) -> None:
    if not cases:
        note(f"nothing to remove in {url}")
        return
    now = time.time()
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
    screen = Screen()
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
