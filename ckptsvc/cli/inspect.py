"""`ckptsvc inspect`: what a checkpoint holds."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import click

from ckptsvc.cli import address, values
from ckptsvc.cli.ls import metrics_text
from ckptsvc.cli.retention import as_json as metrics_json
from ckptsvc.cli.terminal import Screen, age, emit, natural, plural, printable, shortened, size
from ckptsvc.format.commit import PinRecord
from ckptsvc.format.index import Index
from ckptsvc.geometry.box import FlatRange, Region, is_whole
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.pins import read_pin
from ckptsvc.quantities import when
from ckptsvc.types import DTYPES

WIDE = 100
"""Columns from which on a terminal gets the number of shards of each tensor too."""

_VALUE_CHARACTERS = 200


class Layout(NamedTuple):
    """How a tensor is cut.

    Attributes:
        kind: "whole"; "slabs": boxes along one dimension; "tiles": a grid of boxes along several; "boxes": any others;
            "flat": ranges of the flattened tensor; "mixed": boxes and ranges.
        pieces: how many regions there are, empty ones not counted.
        dims: the dimensions along which it is cut.
        grid: the number of pieces along each of them, for slabs and tiles.
    """

    kind: str
    pieces: int
    dims: tuple[int, ...] = ()
    grid: tuple[int, ...] = ()

    def __str__(self) -> str:
        match self.kind:
            case "slabs":
                return f"{self.pieces} along dim {self.dims[0]}"
            case "tiles":
                return f"{'x'.join(map(str, self.grid))} tiles"
            case "whole":
                return "whole"
            case "flat":
                return plural(self.pieces, "flat range")
        return plural(self.pieces, "piece" if self.kind == "mixed" else "box").replace("boxs", "boxes")


class Row(NamedTuple):
    """A tensor; `alias_of` names the one it is tied to, whose bytes are its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    layout: Layout
    shards: int
    alias_of: str | None


def layout_of(shape: tuple[int, ...], regions: Sequence[Region]) -> Layout:
    """How the regions of a tensor of that shape cut it."""
    held = [region for region in regions if not region.is_empty]
    if len(held) <= 1 and all(is_whole(region, shape) for region in held):
        return Layout("whole", 1)
    flat = [region for region in held if isinstance(region, FlatRange)]
    boxes = [region for region in held if not isinstance(region, FlatRange)]
    if flat:
        return Layout("mixed" if boxes else "flat", len(held))
    dims = tuple(d for d, extent in enumerate(shape) if any(box.shape[d] != extent for box in boxes))
    # A grid has every combination of its intervals once: as many boxes as combinations, and no two the same.
    intervals = [{(box.origin[d], box.shape[d]) for box in boxes} for d in dims]
    grid = tuple(map(len, intervals))
    if prod(grid) != len(boxes) or len(set(boxes)) != len(boxes):
        return Layout("boxes", len(boxes), dims)
    return Layout("slabs" if len(dims) == 1 else "tiles", len(boxes), dims, grid)


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name fits one of the patterns, or there are none; a word without wildcards may be anywhere in it."""
    return not patterns or any(
        fnmatch.fnmatchcase(name, pattern) if any(c in pattern for c in "*?[") else pattern in name
        for pattern in patterns
    )


@click.command()
@address.checkpoint_arguments
@click.option("-m", "--match", "patterns", multiple=True, metavar="PATTERN",
    help='Only names that fit, as "model/*.weight"; a word without wildcards may be anywhere. Repeatable.')  # fmt: skip
@click.option("--sort", type=click.Choice(["name", "size"]), default="name", show_default=True)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Show the first N only.")
@click.option("--all", "show_all", is_flag=True, help="Show what belongs to single ranks, too (names with @).")
@click.option("--values", "show_values", is_flag=True, help="Show the plain values instead of the tensors.")
@click.option("--rank", type=click.IntRange(0), default=0, show_default=True, help="Whose plain values.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    store: str, name: str | None, step: int | None, patterns: tuple[str, ...], sort: str, limit: int | None,
    show_all: bool, show_values: bool, rank: int, as_json: bool,
) -> None:  # fmt: skip
    """Show what a checkpoint holds: its tensors and how they are cut, or its plain values.

    STORE is the run (a URL or a path), NAME one of its checkpoints; the newest is taken if neither NAME nor --step is
    given. STORE may also be the address of the checkpoint itself. The shards are not read, except for --values.

    \b
    JSON: {"checkpoint": {"store", "name", "step", "epoch", "attempt", "job",
      "world_size", "created", "format", "shards", "bytes", "stored", "metrics",
      "refers"}, "pinned": what was noted with its pin, or null, ...}
    and "tensors": [{"name", "dtype", "shape", "bytes", "layout": {"kind",
      "pieces", "dims", "grid"}, "shards", "alias_of"}], "totals": {"tensors",
      "elements", "bytes"}
    or with --values "rank", "values": [{"path", "type", "value"}]

    \b
    stored: {"written", "referenced", "compressed", "compressed_to", "deltas",
    "ratio", "refers"}: bytes of the files written for it; bytes of its shards
    that lie in files of other checkpoints (refers), that were compressed and to
    what, and that were stored as differences; written bytes per byte of a shard.
    \b
    layout kinds: "whole"; "slabs": boxes along one dimension; "tiles": a grid
    of boxes; "boxes": other boxes; "flat": ranges of the flattened tensor;
    "mixed". Names, dtypes and sizes are those of the logical tensors; totals
    count what is listed, tied tensors once.
    """  # noqa: D301  \b is click's
    place = address.parse(store, name, step)
    with address.opened(place) as opened:
        checkpoint = address.choose(opened, place)
        found = _values(checkpoint, rank, patterns) if show_values else None
        pin = read_pin(opened, checkpoint.ref)
    rows = [] if show_values else tensors(checkpoint.index, patterns, show_all)
    rows.sort(key=(lambda row: (-row.nbytes, natural(row.name))) if sort == "size" else lambda row: natural(row.name))
    if as_json:
        head = {"checkpoint": describe(checkpoint), "pinned": pin and pin.note}
        emit(head | (_values_json(found[:limit], rank) if found is not None else
            _tensors_json(rows[:limit], _totals(rows))))  # fmt: skip
        return
    screen = Screen()
    _show_header(screen, checkpoint, pin)
    if found is not None:
        _show_values(screen, found, limit)
    else:
        _show_tensors(screen, checkpoint.index, rows, limit, hidden=not show_all)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """A checkpoint as a JSON object."""
    commit = checkpoint.commit
    return {
        "store": checkpoint.store.url,
        "name": checkpoint.ref.name,
        "step": commit.step,
        "epoch": commit.epoch,
        "attempt": commit.attempt,
        "job": commit.job,
        "world_size": commit.world_size,
        "created": commit.created,
        "format": commit.format,
        "shards": commit.shards,
        "bytes": commit.bytes,
        "stored": stored(checkpoint),
        "metrics": metrics_json(commit.values),
        "refers": commit.refers,
    }


def stored(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the bytes of a checkpoint are stored, as a JSON object."""
    index, found = (
        checkpoint.index,
        dict.fromkeys(("written", "referenced", "compressed", "compressed_to", "deltas"), 0),
    )
    segments = index.segments
    if segments is not None:
        found.update(segments.stored(checkpoint.ref.name))
    whole = [shard.nbytes for row, shard in enumerate(index.shards) if segments is None or not segments.is_mapped(row)]
    found["written"] += sum(whole)
    ratio = round(found["written"] / max(checkpoint.commit.bytes, 1), 4)
    return {**found, "ratio": ratio, "refers": list(checkpoint.commit.refers)}


def tensors(index: Index, patterns: Sequence[str], show_all: bool) -> list[Row]:
    """The tensors with a name that fits, aliases too; those of single ranks only if asked for."""
    names = [*((name, None) for name in index.names()), *index.info.aliases.items()]
    return [
        _row(index, name, alias_of)
        for name, alias_of in names
        if (show_all or not name.startswith("@")) and matches(name, patterns)
    ]


def _row(index: Index, name: str, alias_of: str | None) -> Row:
    number = index.row(name)
    meta = index.meta_at(number)
    stored = index.regions(name)
    nbytes = prod(meta.shape) * DTYPES[meta.dtype].itemsize
    shards = len({piece.shard for piece in stored if piece.nbytes}) or 1
    layout = layout_of(meta.shape, [piece.region for piece in stored])
    return Row(name, meta.dtype, meta.shape, nbytes, layout, shards, alias_of)


def _totals(rows: Sequence[Row]) -> dict[str, int]:
    own = [row for row in rows if row.alias_of is None]
    return {
        "tensors": len(own),
        "elements": sum(prod(row.shape) for row in own),
        "bytes": sum(row.nbytes for row in own),
    }


def _tensors_json(rows: Sequence[Row], totals: dict[str, int]) -> dict[str, Any]:
    listed = [
        {
            "name": row.name,
            "dtype": row.dtype,
            "shape": row.shape,
            "bytes": row.nbytes,
            "layout": row.layout._asdict(),
            "shards": row.shards,
            "alias_of": row.alias_of,
        }
        for row in rows
    ]
    return {"tensors": listed, "totals": totals}


def _show_header(screen: Screen, checkpoint: Checkpoint, pin: PinRecord | None) -> None:
    commit = checkpoint.commit
    screen.line(screen.paint(f"{checkpoint.ref.name}  {printable(checkpoint.store.url)}", "head"))
    saved = f"saved {age(when(commit.created))} ago by {plural(commit.world_size, 'rank')}"
    screen.line(printable(f"step {commit.step:,}, epoch {commit.epoch}, job {commit.job}, attempt {commit.attempt}"))
    screen.line(f"{saved}: {size(commit.bytes)} in {plural(commit.shards, 'shard')}, format {printable(commit.format)}")
    if checkpoint.index.segments is not None:
        screen.line(_stored_text(stored(checkpoint)))
    if commit.metrics:
        screen.line(metrics_text(commit))
    if pin is not None:
        screen.line(f"pinned {age(when(pin.created))} ago" + (f": {printable(pin.note)}" if pin.note else ""))
    screen.line()


def _stored_text(found: dict[str, Any]) -> str:
    parts = [f"{size(found['written'])} written ({found['ratio']:.0%})"]
    if found["referenced"]:
        where = plural(len(found["refers"]), "other checkpoint")
        parts.append(f"{size(found['referenced'])} referenced in {where}")
    if found["compressed"]:
        deltas = f", {size(found['deltas'])} of it as differences" if found["deltas"] else ""
        parts.append(f"{size(found['compressed'])} compressed to {size(found['compressed_to'])}{deltas}")
    return ", ".join(parts)


def _show_tensors(screen: Screen, index: Index, rows: Sequence[Row], limit: int | None, hidden: bool) -> None:
    header = ["NAME", "DTYPE", "SHAPE", "SIZE", "LAYOUT", "SHARDS"]
    cells = [
        [
            printable(row.name),
            row.dtype,
            shape_text(row.shape),
            size(row.nbytes) if row.alias_of is None else "-",
            str(row.layout) if row.alias_of is None else f"tied to {printable(row.alias_of)}",
            f"{row.shards:,}",
        ]
        for row in rows[:limit]
    ]
    if screen.width is not None and screen.width < WIDE:
        header, cells = header[:-1], [row[:-1] for row in cells]
    if cells:
        screen.table(header, cells, right=("SIZE", "SHARDS"), fold="NAME")
        screen.line()
    totals = _totals(rows)
    shown = f"the first {len(cells):,} of " if len(cells) < len(rows) else ""
    screen.line(
        f"{shown}{plural(totals['tensors'], 'tensor')}, {totals['elements']:,} elements, {size(totals['bytes'])}"
    )
    own = [name for name in index.names() if name.startswith("@")] if hidden else []
    if own:
        nbytes = sum(prod(index.meta(name).shape) * DTYPES[index.meta(name).dtype].itemsize for name in own)
        screen.line(screen.paint(f"and {size(nbytes)} that belong to single ranks (--values, --all)", "quiet"))


def shape_text(shape: Sequence[int]) -> str:
    """A shape as Python writes a list of it."""
    return f"[{', '.join(map(str, shape))}]"


def _values(checkpoint: Checkpoint, rank: int, patterns: Sequence[str]) -> list[values.Value]:
    found = list(values.flatten(*values.read_documents(checkpoint, [rank])))
    found = values.without_skeleton(found, checkpoint.index.names())
    return [value for value in found if matches(value.path, patterns)]


def _values_json(found: Sequence[values.Value], rank: int) -> dict[str, Any]:
    listed = [{"path": v.path, "type": v.type, "value": values.as_json(v.value)} for v in found]
    return {"rank": rank, "values": listed}


def _show_values(screen: Screen, found: Sequence[values.Value], limit: int | None) -> None:
    rows = [
        [printable(v.path), printable(v.type), printable(shortened(values.text(v.value), _VALUE_CHARACTERS))]
        for v in found[:limit]
    ]
    if rows:
        screen.table(["PATH", "TYPE", "VALUE"], rows, fold="VALUE")
        screen.line()
    shown = f"the first {len(rows):,} of " if len(rows) < len(found) else ""
    screen.line(f"{shown}{plural(len(found), 'value')}")
