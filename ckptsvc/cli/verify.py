"""`ckptsvc verify`: re-read a checkpoint and check every byte of it, or compare it with another."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import click

from ckptsvc.cli import address
from ckptsvc.cli.against import verify_against
from ckptsvc.cli.diff import Tolerance
from ckptsvc.cli.terminal import Screen, duration, emit, natural, plural, printable, progress, size
from ckptsvc.errors import EXIT_STATUS, Damaged, IncompatibleVersion, InvalidInput
from ckptsvc.format.commit import COMMIT, CommitRecord
from ckptsvc.pipeline.catalog import Ref, Refused, open_checkpoint
from ckptsvc.pipeline.verify import Damage, verify_checkpoint
from ckptsvc.storage import Store

_STYLE = {"ok": "good", "damaged": "bad", "newer format": "doubt"}
_STATUS = {"ok": 0, "damaged": EXIT_STATUS["damaged"], "newer format": EXIT_STATUS["incompatible-version"]}
NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one checkpoint is; `nbytes` of `shards` shards were read in `seconds`."""

    name: str
    state: str
    shards: int
    nbytes: int
    seconds: float
    damages: Sequence[Damage]


@click.command()
@address.checkpoint_arguments
@click.option("--all", "every", is_flag=True, help="All committed checkpoints of the run.")
@click.option("--against", metavar="OTHER", help="See that OTHER holds the same tensors, whatever format it has.")
@click.option("--tolerance", type=Tolerance(), metavar="X",
    help="With --against: equal is what is |a-b| <= X * max(1, |a|, |b|) apart.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    store: str, name: str | None, step: int | None, every: bool, against: str | None, tolerance: float | None,
    as_json: bool,
) -> int:  # fmt: skip
    """Re-read a checkpoint and check every byte of it against its checksums.

    STORE is the run (a URL or a path), NAME one of its checkpoints; the newest is taken if neither NAME nor --step is
    given. STORE may also be the address of the checkpoint itself. With --against, STORE and OTHER are addresses as for
    `ckptsvc convert`; tensors are equal when all their bits are, unless there is a --tolerance.

    \b
    Exit status: 0 all is well; 10 there is nothing to verify; 12 something is
    damaged; 13 something was written by a newer ckptsvc. With --against also
    1: they differ.
    \b
    JSON: {"store", "ok", "checkpoints": [{"name", "state", "shards", "bytes",
      "seconds", "damage": [{"file", "start", "stop", "why", "tensors"}]}]}
    state is "ok", "damaged" or "newer format"; file is the key in the store;
    [start, stop) is in bytes of that file; tensors are the names of the logical
    tensors in these bytes: none in headers, index and commit record.
    With --against: {"a", "b", "ok", "tolerance", "equal", "only_in_a",
      "only_in_b", "mismatched", "different"}, as "tensors" of `ckptsvc diff`;
      "first" of a different one is the index of the first differing element
    """  # noqa: D301  \b is click's
    if against is not None and not every:
        return verify_against(store, against, name=name, step=step, tolerance=tolerance, as_json=as_json)
    if against is not None or tolerance is not None:
        raise InvalidInput("--against compares one checkpoint, without --all; --tolerance goes with --against")
    place = address.parse(store, name, step)
    if every and (place.name or step is not None):
        raise InvalidInput("--all means all checkpoints; leave NAME and --step away")
    screen = None if as_json else Screen()
    verdicts = []
    with address.opened(place) as opened:
        chosen = address.matching(opened, place)
        for ref, commit in chosen if every else chosen[:1]:
            verdicts.append(_verify(opened, ref, commit))
            if screen:
                _show(screen, verdicts[-1])
        url = opened.url
    worst = max((_STATUS[verdict.state] for verdict in verdicts), key=_badness)
    if screen and every:
        bad = sum(1 for verdict in verdicts if verdict.state != "ok")
        screen.line(f"{plural(len(verdicts), 'checkpoint')}, {bad or 'none'} bad")
    if as_json:
        emit({"store": url, "ok": worst == 0, "checkpoints": [_json(verdict) for verdict in verdicts]})
    return worst


def _badness(status: int) -> int:
    return [0, EXIT_STATUS["incompatible-version"], EXIT_STATUS["damaged"]].index(status)


def _verify(store: Store, ref: Ref, commit: CommitRecord | Refused) -> Verdict:
    began = time.monotonic()
    what, length = COMMIT, 0
    try:
        if not isinstance(commit, CommitRecord):
            raise commit
        what, length = commit.index, commit.index_bytes
        checkpoint = open_checkpoint(store, ref, commit)
    except IncompatibleVersion as error:
        return Verdict(ref.name, "newer format", 0, 0, 0.0, [Damage(f"{ref.name}/{what}", 0, length, (), str(error))])
    except Damaged as error:
        return Verdict(ref.name, "damaged", 0, 0, 0.0, [Damage(f"{ref.name}/{what}", 0, length, (), error.what)])
    nbytes = sum(shard.nbytes for shard in checkpoint.index.shards)
    with progress(f"step {ref.step}", nbytes) as advance:
        damages = verify_checkpoint(checkpoint, progress=advance)
    state = "damaged" if damages else "ok"
    return Verdict(ref.name, state, len(checkpoint.index.shards), nbytes, time.monotonic() - began, damages)


def _json(verdict: Verdict) -> dict[str, Any]:
    return {
        "name": verdict.name,
        "state": verdict.state,
        "shards": verdict.shards,
        "bytes": verdict.nbytes,
        "seconds": round(verdict.seconds, 3),
        "damage": [
            {"file": d.key, "start": d.start, "stop": d.stop, "why": d.why, "tensors": d.tensors}
            for d in verdict.damages
        ],
    }


def _show(screen: Screen, verdict: Verdict) -> None:
    state = screen.paint(verdict.state, _STYLE[verdict.state])
    read = f"  {plural(verdict.shards, 'shard')}, {size(verdict.nbytes)} in {duration(verdict.seconds)}"
    screen.line(f"{verdict.name}  {state}{read if verdict.shards else ''}")
    for damage in verdict.damages:
        file = damage.key.removeprefix(f"{verdict.name}/")
        where = f" bytes {damage.start:,} to {damage.stop:,}" if damage.stop > damage.start else ""
        why = damage.why.removeprefix(damage.key).lstrip(", ")
        screen.line(printable(f"  {file}{where}: {why}"))
        if damage.tensors:
            names = sorted(damage.tensors, key=lambda name: (name.startswith("@"), natural(name)))
            for name in names[:NAMES_SHOWN]:
                screen.line(f"    {printable(name)}")
            if len(names) > NAMES_SHOWN:
                screen.line(f"    and {len(names) - NAMES_SHOWN:,} more")
        elif damage.start == 0 and verdict.shards:
            screen.line("    its header")
