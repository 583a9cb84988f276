"""`ckptsvc diff`: what is different between two checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import click

from ckptsvc.cli import address, values
from ckptsvc.cli.compare import Comparison, Different, Pair, ValueChange
from ckptsvc.cli.inspect import describe, matches, shape_text
from ckptsvc.cli.numbers import has_numbers
from ckptsvc.cli.terminal import Screen, age, emit, natural, plural, printable, progress, shortened
from ckptsvc.interop.conversion.native import NativeLogical
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.quantities import when
from ckptsvc.types import TensorMeta

_VALUE_CHARACTERS = 60  # where there is no terminal that says how many fit
_ORDERS: dict[str, Callable[[Different], Any]] = {
    "name": lambda each: natural(each.meta.name),
    "abs": lambda each: -(each.distance.max_abs or 0),
    "rel": lambda each: -(each.distance.max_rel or 0),
    "count": lambda each: -each.distance.differing,
}


class Tolerance(click.ParamType[float]):
    """A number from 0 on."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """From text, such as 1e-6."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not (math.isfinite(number) and number >= 0):
            self.fail(f"{value!r} is not a number from 0 on", param, ctx)
        return number


@click.command()
@click.argument("a")
@click.argument("b")
@click.option("--step-a", type=click.IntRange(0), metavar="N", help="Of A, the newest checkpoint of this step.")
@click.option("--step-b", type=click.IntRange(0), metavar="N", help="Of B, the newest checkpoint of this step.")
@click.option("-m", "--match", "patterns", multiple=True, metavar="PATTERN",
    help='Only tensors and values whose name fits, as "model/*". Repeatable.')  # fmt: skip
@click.option(
    "--tolerance", type=Tolerance(), metavar="X", help="Equal is what is |a-b| <= X * max(1, |a|, |b|) apart."
)
@click.option("--sort", type=click.Choice(list(_ORDERS)), default="name", show_default=True,
    help="Order of the tensors that differ: by name, or the farthest apart first.")  # fmt: skip
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Show the first N of each kind only.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    a: str, b: str, step_a: int | None, step_b: int | None, patterns: tuple[str, ...], tolerance: float | None,
    sort: str, limit: int | None, as_json: bool,
) -> int:  # fmt: skip
    """Compare two checkpoints, of one run or of two, whatever layouts they were saved with.

    A and B are addresses of checkpoints (a URL or a path that ends in step-...), or of runs, whose newest is meant.
    Tensors are equal when all their bits are, unless there is a --tolerance. How a state was spread over ranks is not
    compared, nor what belongs to ranks that only one of the two has.

    \b
    Exit status: 0 equal; 1 different.
    \b
    JSON: {"a", "b", "equal", "tolerance", "tensors", "values"}
      a, b: as "checkpoint" of `ckptsvc inspect`
      tensors: {"equal": how many, "only_in_a", "only_in_b": [{"name", "dtype",
        "shape"}], "mismatched": [{"name", "a": {"dtype", "shape"}, "b"}],
        "different": [{"name", "dtype", "shape", "elements", "differing",
        "not_finite", "max_abs", "max_rel"}]}
      values: {"ranks", "compared", "different": [{"rank", "path", "in_a",
        "in_b", "a", "b"}]}
    differing, not_finite: elements that are not equal, and those of them where
    one side is NaN or infinite. max_abs, max_rel: largest |a-b|, and largest
    |a-b| / max(|a|,|b|), over all others; null where there are none, or where
    the dtype has bits and no numbers.
    """  # noqa: D301  \b is click's
    with ExitStack() as stack:
        sides = [_open(stack, a, step_a), _open(stack, b, step_b)]
        pair = Pair(NativeLogical(sides[0]), NativeLogical(sides[1]), lambda name: matches(name, patterns))
        with progress("comparing", pair.nbytes) as advance:
            found = pair.compare(tolerance, advance)
    found.only_a.sort(key=_by_name)
    found.only_b.sort(key=_by_name)
    found.mismatched.sort(key=lambda each: _by_name(each.a))
    found.different.sort(key=lambda each: natural(each.meta.name))
    found.different.sort(key=_ORDERS[sort])
    if as_json:
        head = {"a": describe(sides[0]), "b": describe(sides[1]), "equal": found.is_equal, "tolerance": tolerance}
        emit(head | _json(found, limit))
    else:
        _show(Screen(), sides, found, limit)
    return 0 if found.is_equal else 1


def _open(stack: ExitStack, where: str, step: int | None) -> Checkpoint:
    place = address.parse(where, step=step)
    return address.choose(stack.enter_context(address.opened(place)), place)


def _by_name(meta: TensorMeta) -> Any:
    return natural(meta.name)


def _json(found: Comparison, limit: int | None) -> dict[str, Any]:
    return {
        "tensors": {
            "equal": found.equal,
            "only_in_a": [meta._asdict() for meta in found.only_a[:limit]],
            "only_in_b": [meta._asdict() for meta in found.only_b[:limit]],
            "mismatched": [{"name": a.name, "a": _kind(a), "b": _kind(b)} for a, b in found.mismatched[:limit]],
            "different": [
                meta._asdict() | {name: getattr(apart, name) for name in apart.__struct_fields__}
                for meta, apart, _ in found.different[:limit]
            ],
        },
        "values": {
            "ranks": found.ranks,
            "compared": found.values,
            "different": [
                {
                    "rank": change.rank,
                    "path": change.path,
                    "in_a": change.a is not None,
                    "in_b": change.b is not None,
                    "a": values.as_json(change.a.value) if change.a else None,
                    "b": values.as_json(change.b.value) if change.b else None,
                }
                for change in found.changes[:limit]
            ],
        },
    }


def _kind(meta: TensorMeta) -> dict[str, Any]:
    return {"dtype": meta.dtype, "shape": meta.shape}


def _show(screen: Screen, sides: Sequence[Checkpoint], found: Comparison, limit: int | None) -> None:
    for letter, side in zip("AB", sides, strict=True):
        commit = side.commit
        saved = f"saved {age(when(commit.created))} ago by {plural(commit.world_size, 'rank')}"
        screen.line(f"{screen.paint(letter, 'head')}  {printable(side.store.url)}/{side.ref.name}")
        screen.line(f"   {saved}")
    for title, metas in (("only in A", found.only_a), ("only in B", found.only_b)):
        rows = [[printable(meta.name), meta.dtype, shape_text(meta.shape)] for meta in metas]
        _section(screen, f"tensors {title}", ["NAME", "DTYPE", "SHAPE"], rows, limit)
    rows = [[printable(a.name), *(f"{m.dtype} {shape_text(m.shape)}" for m in (a, b))] for a, b in found.mismatched]
    _section(screen, "tensors of another dtype or shape", ["NAME", "A", "B"], rows, limit)
    _show_different(screen, found.different, limit)
    _show_changes(screen, found.changes, found.ranks, limit)
    screen.line()
    screen.line(_summary(screen, found))


def _show_different(screen: Screen, different: Sequence[Different], limit: int | None) -> None:
    header = ["NAME", "DIFFERING", "OF", "MAX ABS", "MAX REL", "NOT FINITE"]
    rows = [
        [printable(meta.name), f"{far.differing:,}", f"{far.elements:,}", _number(far.max_abs), _number(far.max_rel),
            f"{far.not_finite:,}" if has_numbers(meta.dtype) else "bits only"]
        for meta, far, _ in different
    ]  # fmt: skip
    if all(row[-1] == "0" for row in rows):
        header, rows = header[:-1], [row[:-1] for row in rows]
    _section(screen, "tensors that differ", header, rows, limit)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _show_changes(screen: Screen, changes: Sequence[ValueChange], ranks: int, limit: int | None) -> None:
    most = _VALUE_CHARACTERS if screen.width is None else max(screen.width // 3 - 4, 12)
    alike: dict[tuple[str, str, str], list[int]] = {}  # most values are the same on all ranks, before and after
    for each in changes:
        alike.setdefault((printable(each.path), _text(each.a, most), _text(each.b, most)), []).append(each.rank)
    rows = [[path, a, b, "all" if len(held) == ranks else _ranges(held)] for (path, a, b), held in alike.items()]
    header = ["PATH", "A", "B", "RANKS"]
    if ranks == 1:
        header, rows = header[:-1], [row[:-1] for row in rows]
    _section(screen, "plain values that differ", header, rows, limit, "PATH")


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers for people: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return shortened(", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs), 30)


def _text(value: values.Value | None, most: int) -> str:
    return "(none)" if value is None else printable(shortened(values.text(value.value), most))


def _section(
    screen: Screen, title: str, header: list[str], rows: list[list[str]], limit: int | None, fold: str = "NAME"
) -> None:
    if not rows:
        return
    screen.line()
    more = f", the first {limit:,}" if limit and limit < len(rows) else ""
    screen.line(screen.paint(f"{title}: {len(rows):,}{more}", "doubt"))
    screen.table(header, rows[:limit], right=("DIFFERING", "OF"), fold=fold, indent="  ")


def _summary(screen: Screen, found: Comparison) -> str:
    tensors = found.equal + len(found.different)
    if found.is_equal:
        return f"{screen.paint('equal', 'good')}: {plural(tensors, 'tensor')}, {plural(found.values, 'plain value')}"
    counts = {
        f"of {plural(tensors, 'tensor')}": len(found.different),
        "of another dtype or shape": len(found.mismatched),
        "only in A": len(found.only_a),
        "only in B": len(found.only_b),
        f"of {plural(found.values, 'plain value')}": len(found.changes),
    }
    listed = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
    return f"{screen.paint('different', 'bad')}: {listed}"
