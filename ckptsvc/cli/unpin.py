"""`ckptsvc unpin`: let retention decide about a checkpoint again."""

from __future__ import annotations

import click

from ckptsvc.cli import address
from ckptsvc.cli.audit import take_down
from ckptsvc.cli.terminal import emit, note
from ckptsvc.errors import InvalidInput, NotFound
from ckptsvc.format.commit import parse_checkpoint_name
from ckptsvc.pipeline.catalog import Ref
from ckptsvc.pipeline.pins import pinned, unpin


@click.command()
@address.checkpoint_arguments
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(store: str, name: str | None, step: int | None, as_json: bool) -> None:
    """Take the pin of a checkpoint away: retention may delete it again.

    STORE is the run (a URL or a path), NAME one of its checkpoints, or --step says which. STORE may also be the address
    of the checkpoint itself. The checkpoint need not be there any more.

    \b
    JSON: {"store", "name", "pinned": false, "changed"}
    """  # noqa: D301  \b is click's
    place = address.parse(store, name, step)
    with address.opened(place) as opened:
        ref = _ref(place, pinned(opened), opened.url)
        changed = unpin(opened, ref)
        url = opened.url
    if changed:
        take_down("unpin", f"{url}/{ref.name}", "")
    if as_json:
        emit({"store": url, "name": ref.name, "pinned": False, "changed": changed})
    else:
        note(f"{ref.name} is not pinned any more" if changed else f"{ref.name} was not pinned")


def _ref(place: address.Address, pins: set[Ref], url: str) -> Ref:
    """Which checkpoint is meant: by its name, or the newest pinned one of a step."""
    if place.name is not None:
        parsed = parse_checkpoint_name(place.name)
        assert parsed is not None
        return Ref(parsed[1], parsed[0])
    if place.step is None:
        raise InvalidInput("which checkpoint?", hint="give its NAME or --step; `ckptsvc ls` shows which are pinned")
    found = sorted(ref for ref in pins if ref.step == place.step)
    if not found:
        raise NotFound(f"{url} has no pinned checkpoint of step {place.step}")
    return found[-1]
