"""`ckptsvc audit`: who has ordered what."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from ckptsvc.agent.orders.audit import AuditLog, Entry, audit_path, read
from ckptsvc.cli import others
from ckptsvc.cli.masking import masked_url
from ckptsvc.cli.terminal import Screen, emit, note, printable
from ckptsvc.config import load
from ckptsvc.errors import CkptsvcError, InvalidInput
from ckptsvc.quantities import parse_duration
from ckptsvc.rpc.accounts import user_name

PARTLY_DONE = 3
"""Exit status where some lines cannot be used."""

_STYLE = {"done": "good", "begun": "doubt", "failed": "bad", "refused": "bad"}


@click.command()
@click.option("--since", metavar="TIME|WHEN", help="Only what is younger, as 2h, 7d or 2026-11-21T08:00.")
@click.option("--verb", metavar="VERB", help="Only orders of this kind, as drain or delete.")
@click.option("--file", "given", type=click.Path(path_type=Path), help="The file; default: agent.audit_file.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@others.options
def command(since: str | None, verb: str | None, given: Path | None, as_json: bool) -> int:
    """Show what was ordered, by whom, and what came of it; and which checkpoints were deleted. Oldest first.

    It is read from a file: no agent has to run. What was refused is in it as well. What nobody has ordered has the user
    "ckptsvc" or "retention". Root sees, with his own, what he has ordered of users' agents (system.audit_file).

    \b
    Exit status: 0; 3 some lines cannot be used; 10 there is no such file.
    \b
    JSON: {"file", "entries": [{"time", "verb", "job", "target", "uid", "user",
      "via", "asked_on", "of", "node", "outcome", "what"}], "unusable": N}
    outcome is "done", "begun", "failed" or "refused"; time is ISO 8601, UTC;
    "of" is the user whose agent root has given an order to.
    With --user and --all-users the JSON is {"users": [{"user", "uid",
    "status", "result", "said"}]}: exit status, document and messages of each.
    """  # noqa: D301  \b is click's
    if accounts := others.wanted():
        return others.show(accounts, as_json)
    path = given or audit_path(load(os.environ), os.environ)
    first = _moment(since) if since else ""
    entries, unusable = [], 0
    for entry in _read(path, None if given else others.audit_file()):
        if isinstance(entry, str):
            unusable += 1
        elif entry.time >= first and verb in (None, entry.verb):
            entries.append(entry)
    if as_json:
        emit({"file": str(path), "entries": msgspec.to_builtins(entries), "unusable": unusable})
    else:
        _show(entries)
        if not entries:
            note(f"nothing of that is in {printable(str(path))}")
        if unusable:
            note(f"lines that are not understood: {unusable}")
    return PARTLY_DONE if unusable else 0


def _read(path: Path, of_root: Path | None) -> Iterator[Entry | str]:
    """The lines of a file; and of root's, which may be the only one."""
    lines = list(read(of_root)) if of_root is not None and of_root.exists() else []
    if not lines or path.exists():
        lines += read(path)
    return iter(sorted(lines, key=lambda line: "" if isinstance(line, str) else line.time))


def _moment(since: str) -> str:
    """The first moment that is meant, as the lines have it."""
    try:
        return _utc(datetime.fromisoformat(since).timestamp())  # without a zone: local time
    except ValueError:
        pass
    try:
        return _utc(time.time() - parse_duration(since))
    except CkptsvcError:
        raise InvalidInput(f"--since {since}: neither a time span nor a date", hint="2h, 7d, 2026-11-21") from None


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _show(entries: list[Entry]) -> None:
    rows = []
    for entry in entries:
        where = entry.node + (f" (asked on {entry.asked_on})" if entry.asked_on else "")
        by = entry.by + (f" via {entry.via}" if entry.via else "") + (f", of {entry.of}'s agent" if entry.of else "")
        cells = (entry.time, entry.verb, entry.target or entry.job, by, where, entry.outcome, entry.what)
        rows.append([printable(text) for text in cells])
    if rows:
        Screen().table(["TIME", "VERB", "WHAT", "BY", "ON", "OUTCOME", "SAID"], rows, fold="SAID",
            style=lambda row, column: _STYLE.get(rows[row][5], "") if column == "OUTCOME" else "")  # fmt: skip


def take_down(verb: str, target: str, what: str) -> None:
    """Append what this program has done without an agent; where that fails, it is said, and stops nothing."""
    uid, target = os.getuid(), masked_url(target)
    entry = Entry(
        verb=verb, target=target, uid=uid, by=user_name(uid), node=socket.gethostname(), outcome="done", what=what
    )
    try:
        AuditLog(audit_path(load(os.environ), os.environ)).append(entry)
    except (OSError, CkptsvcError) as error:
        note(f"this is not in the audit log: {error}")
