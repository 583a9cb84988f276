"""`ckptsvc pin`: keep a checkpoint, whatever retention says."""

from __future__ import annotations

import click

from ckptsvc.cli import address
from ckptsvc.cli.audit import take_down
from ckptsvc.cli.terminal import emit, note, printable
from ckptsvc.errors import NoCheckpoint
from ckptsvc.format.commit import CommitRecord
from ckptsvc.pipeline.pins import pin, read_pin


@click.command()
@address.checkpoint_arguments
@click.option("--note", "why", default="", metavar="TEXT", help="Why, for people; `ckptsvc inspect` shows it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(store: str, name: str | None, step: int | None, why: str, as_json: bool) -> None:
    """Keep a checkpoint from being deleted by retention, until `ckptsvc unpin`.

    STORE is the run (a URL or a path), NAME one of its checkpoints; the newest is taken if neither NAME nor --step is
    given. STORE may also be the address of the checkpoint itself. A pin is a small object in the run.

    \b
    JSON: {"store", "name", "pinned": true, "changed", "note"}
    changed is false if it was pinned already; its note is left as it is then.
    """  # noqa: D301  \b is click's
    place = address.parse(store, name, step)
    with address.opened(place) as opened:
        committed = [ref for ref, commit in address.matching(opened, place) if isinstance(commit, CommitRecord)]
        if not committed:
            raise NoCheckpoint(f"the commit record of what you mean in {opened.url} cannot be used")
        ref = committed[0]
        changed = pin(opened, ref, why)
        record = read_pin(opened, ref)
        url = opened.url
    if changed:
        take_down("pin", f"{url}/{ref.name}", why)
    said = record.note if record else ""
    if as_json:
        emit({"store": url, "name": ref.name, "pinned": True, "changed": changed, "note": said})
    elif changed:
        note(f"{ref.name} is pinned")
    else:
        note(f"{ref.name} was pinned already" + (f": {printable(said)}" if said else ""))
