"""`ckptsvc incidents`: what went wrong, who was to blame, and what was seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from ckptsvc.agent.http.incident_page import page
from ckptsvc.agent.http.incident_view import view
from ckptsvc.agent.incidents import IncidentLog, Kept, incidents_directory, moment, plain
from ckptsvc.agent.logtail import one_line
from ckptsvc.cli.incident_text import show, wrapped
from ckptsvc.cli.terminal import Screen, age, emit, note, printable
from ckptsvc.config import load
from ckptsvc.errors import CkptsvcError, InvalidInput, NotFound
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

PARTLY_DONE = 3
"""Exit status where some files cannot be used."""


@click.command()
@click.argument("wanted", required=False, metavar="[ID]")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@click.option("--html", "target", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the report of ID as a page that needs no other file.")  # fmt: skip
@click.option("--dir", "directory", type=click.Path(path_type=Path),
    help="Where incidents are kept; default: as for `ckptsvc agent`.")  # fmt: skip
def command(wanted: str | None, as_json: bool, target: Path | None, directory: Path | None) -> int:
    """List the incidents of this user's jobs, newest first, or show one (ID, or "last").

    They are read from files: no agent has to run.

    \b
    Exit status: 0; 3 some files cannot be used; 10 no such incident,
    or no such directory;
    12 the incident is damaged; 13 a newer version wrote it.
    \b
    JSON of the list: {"directory", "incidents": [{"id", "name", "job",
      "attempt", "kind", "opened", "sentence", "rank", "node", "confidence",
      "step"}], "unusable": [{"name", "code", "what"}]}
    JSON of one: {"name", "incident"}, with every field of the message
    Incident in proto/ckptsvc/rpc/v1/coordinator.proto.
    rank is -1 where nobody could be named; confidence is 0 to 1.
    """  # noqa: D301  \b is click's
    if directory is not None and not directory.is_dir():
        raise NotFound(f"there is no directory {directory}")
    kept = IncidentLog(directory or incidents_directory(load(os.environ), os.environ))
    if wanted is None:
        if target is not None:
            raise InvalidInput("--html needs to know which incident", hint="`ckptsvc incidents last --html FILE`")
        return _list(kept, as_json)
    found = kept.find(wanted)
    if isinstance(found.incident, CkptsvcError):
        raise found.incident
    if target is not None:
        _write(target, page(found.incident, found.key))
        note(f"wrote {printable(str(target))}")
    if as_json:
        emit({"name": found.name, "incident": plain(found.incident)})
    elif target is None:
        show(Screen(), view(found.incident, found.key))
    return 0


def _list(kept: IncidentLog, as_json: bool) -> int:
    incidents: list[tuple[Kept, pb.Incident]] = []
    unusable: list[tuple[Kept, CkptsvcError]] = []
    for each in kept.newest_first():
        if isinstance(each.incident, CkptsvcError):
            unusable.append((each, each.incident))
        else:
            incidents.append((each, each.incident))
    if as_json:
        emit(
            {
                "directory": str(kept.directory),
                "incidents": [_summary(each, incident) for each, incident in incidents],
                "unusable": [{"name": each.name, "code": error.code, "what": error.what} for each, error in unusable],
            }
        )
        return PARTLY_DONE if unusable else 0
    screen = Screen()
    for each, incident in incidents:
        when = age(moment(incident.opened))
        about = f"{when} ago  {one_line(incident.kind)}  job {one_line(incident.job)}, attempt {incident.attempt}"
        screen.line(f"{screen.paint(each.key, 'head')}  {about}")
        for line in wrapped(screen, one_line(incident.sentence) or "Nobody could be named.", "    "):
            screen.line(line)
    for _, error in unusable:
        note(printable(error.what))
    if not incidents:
        note(f"no incidents in {printable(str(kept.directory))}")
    return PARTLY_DONE if unusable else 0


def _summary(kept: Kept, incident: pb.Incident) -> dict[str, Any]:
    values = plain(incident)
    fields = ("job", "attempt", "kind", "opened", "sentence", "rank", "node", "confidence", "step")
    return {"id": kept.key, "name": kept.name} | {field: values[field] for field in fields}


def _write(target: Path, text: str) -> None:
    try:
        target.write_text(text, "utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot write {target}: {error.strerror}") from error
