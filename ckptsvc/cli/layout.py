"""`ckptsvc layout`: how a parallel layout divides a checkpoint, and which rule says so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import click

from ckptsvc.cli.inspect import shape_text
from ckptsvc.cli.terminal import Screen, emit, plural, printable, size
from ckptsvc.errors import EXIT_STATUS, LayoutError
from ckptsvc.geometry.box import Shape
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.patterns import skeleton
from ckptsvc.geometry.placement import Entry, Placement
from ckptsvc.geometry.rules import Local, Rule
from ckptsvc.interop.formats import open_foreign
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.naming.families import family, read_family
from ckptsvc.interop.naming.layouts import Arrangement, arrange
from ckptsvc.interop.naming.shapes import declared

DECLARED = "declared:"
"""What the name of a model of known shape begins with, where a checkpoint is expected."""


class Row(NamedTuple):
    """Parameters that are alike but for the numbers in their names.

    Attributes:
        name: of the first.
        alike: how many there are.
        shape: of each.
        rule: the number of the rule that takes them; None if there is none, or several.
        pattern: the pattern of the rule that takes the first.
        cut: how tensor and expert parallelism divide each, for people.
        stages: the pipeline stages that hold one of them.
        nbytes: bytes that a rank that has one holds of it, with its optimizer state.
        problem: why it cannot be placed, or "".
    """

    name: str
    alike: int
    shape: Shape
    rule: int | None
    pattern: str
    cut: str
    stages: tuple[int, ...]
    nbytes: int
    problem: str = ""


class Stage(NamedTuple):
    """A pipeline stage: its layers as ranges, and bytes on the first of its ranks."""

    stage: int
    layers: list[tuple[int, int]]
    nbytes: int


class Variable(click.ParamType[tuple[str, int]]):
    """NAME=NUMBER."""

    name = "variable"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """See click."""
        if isinstance(value, tuple):
            return value
        name, _, number = str(value).partition("=")
        if not name.isidentifier() or not (number.isascii() and number.isdigit() and len(number) < 16):
            self.fail(f"{value!r} is not of the form NAME=NUMBER", param, ctx)
        return name, int(number)


@click.command()
@click.argument("src")
@click.option("--to", required=True, metavar="LAYOUT", help='As "dp=4,tp=2,pp=4,ep=8,zero=1".')
@click.option("--family", "named", metavar="NAME", help="Whose rules to use. Default: the family that fits the names.")
@click.option("--rules", type=click.Path(dir_okay=False), help="A file of rules of your own.")
@click.option("--variable", "variables", type=Variable(), multiple=True, metavar="NAME=NUMBER",
    help="A size that rules speak of, as heads=32, where the checkpoint does not say it. Repeatable.")  # fmt: skip
@click.option("--explain", is_flag=True, help="Which rule takes each tensor, and what it says.")
@click.option("--all", "show_all", is_flag=True, help="With --explain: every layer and expert by itself.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
def command(
    src: str, to: str, named: str | None, rules: str | None, variables: tuple[tuple[str, int], ...],
    explain: bool, show_all: bool, as_json: bool,
) -> int:  # fmt: skip
    """Show how a parallel layout would divide a checkpoint. Nothing is written, and no tensor is read.

    SRC is a checkpoint of any format, or "declared:NAME", a model of known shape: llama3-8b, llama3-70b, llama3-405b,
    gpt-1t, moe-1t.

    LAYOUT says dp, tp, pp, and as needed cp, ep, etp, vpp (interleaved stages), zero (0 to 3), stages ("balanced", or
    the layers of each, as 3/4/4/3), order (of ranks), uneven=1 (cut what does not divide as torch.chunk does).

    Ends with status 14 if a tensor has no rule or several, or does not divide.

    \b
    JSON: {"source", "layout", "world_size", "family", "sure", "variables",
      "rows": [{"name", "alike", "shape", "rule", "pattern", "cut", "stages",
      "bytes_a_rank", "problem"}], "stages": [{"stage", "layers": [[first,
      last]], "bytes_a_rank"}], "others", "problems"}
    "sure" is the part of the parameters that the family's rules take, null if
    the family was given. "others" are tensors of no parameter, kept whole.
    """  # noqa: D301  \b is click's
    parallel = Parallel.parse(to)
    if named and rules:
        raise click.UsageError("--family and --rules exclude each other")
    model = read_family(rules) if rules else family(named) if named else None
    logical = _open(src)
    try:
        arrangement = arrange(logical, parallel, model=model, given=dict(variables))
        rows = explained(arrangement.placement, each=show_all)
        problem = _problem(arrangement.placement)
        stages = [] if problem else _stages(arrangement.placement)
        if as_json:
            emit(_json(logical, arrangement, rows, stages, problem))
        else:
            _show(Screen(), logical, arrangement, rows if explain or problem else [], stages, problem)
    finally:
        logical.close()
    return EXIT_STATUS[LayoutError.code] if problem else 0


def explained(placement: Placement, *, each: bool = False) -> list[Row]:
    """What the rules say of every tensor, those that differ only in a number of their names together unless `each`."""
    states: dict[str, list[Entry]] = {}
    for entry in placement.tensors:
        states.setdefault(entry.parameter, []).append(entry)
    groups: dict[object, list[str]] = {}
    for parameter, entries in states.items():
        claim = placement.claims.get(parameter)
        key = parameter if each else (skeleton(parameter), claim and claim.rule.number, entries[0].shape)
        groups.setdefault(key, []).append(parameter)
    return [_row(placement, names, states) for names in groups.values()]


def _row(placement: Placement, names: Sequence[str], states: dict[str, list[Entry]]) -> Row:
    first, entries = names[0], states[names[0]]
    shape = entries[0].shape
    claim = placement.claims.get(first)
    if claim is None:
        several = [str(taken.rule) for taken in placement.contested.get(first, [])]
        return Row(first, len(names), shape, None, "", "", (), 0, " and ".join(several) or "no rule takes it")
    row = Row(first, len(names), shape, claim.rule.number, claim.pattern.text, "", (), 0)
    try:
        local = placement.local(entries[0], 0, 0)
        stages = tuple(sorted({chunk.stage for name in names for chunk in placement.home(name).chunks}))
        nbytes = sum(placement.bytes_of(entry, 0, 0) for entry in entries)
        return row._replace(cut=_cut(claim.rule, placement.parallel, shape, local), stages=stages, nbytes=nbytes)
    except LayoutError as error:
        return row._replace(problem=error.what)


def _cut(rule: Rule, parallel: Parallel, shape: Shape, local: Local) -> str:
    """As "dim 0 / 8, 2 sections", or "whole"."""
    ranks = parallel.expert_tp if rule.is_expert else parallel.tp
    said = []
    if rule.is_expert and parallel.ep > 1:
        said.append(f"experts / {parallel.ep}")
    if rule.cut is not None and ranks > 1:
        said.append(f"dim {rule.cut} / {ranks}")
        said += [f"{n} sections" for n in [len(local.pieces)] if n > 1]
        padded = local.shape[rule.cut] * ranks
        said += [f"padded to {padded}"] if rule.pad is not None and padded != shape[rule.cut] else []
    return ", ".join(said) or "whole"


def _problem(placement: Placement) -> LayoutError | None:
    try:
        placement.check()
    except LayoutError as error:
        return error
    return None


def _stages(placement: Placement) -> list[Stage]:
    parallel = placement.parallel
    chunks = placement.chunks()
    return [
        Stage(
            stage,
            [(c.first, c.first + c.layers - 1) for c in chunks if c.stage == stage and c.layers],
            placement.bytes_held(parallel.rank(pp=stage)),
        )
        for stage in range(parallel.pp)
    ]


def _open(src: str) -> Logical:
    if src.startswith(DECLARED):
        return declared(src.removeprefix(DECLARED))
    return open_foreign(src)


def _json(
    logical: Logical,
    arrangement: Arrangement,
    rows: Sequence[Row],
    stages: Sequence[Stage],
    problem: LayoutError | None,
) -> dict[str, Any]:
    placement, guess = arrangement.placement, arrangement.guess
    return {
        "source": logical.origin,
        "layout": str(placement.parallel),
        "world_size": placement.parallel.world_size,
        "family": arrangement.family.name,
        "sure": guess.sure if guess else None,
        "variables": placement.variables,
        "rows": [{("bytes_a_rank" if k == "nbytes" else k): v for k, v in row._asdict().items()} for row in rows],
        "stages": [{"stage": s.stage, "layers": s.layers, "bytes_a_rank": s.nbytes} for s in stages],
        "others": [meta.name for meta in arrangement.others],
        "problems": [{"what": problem.what, "hint": problem.hint}] if problem else [],
    }


def _show(
    screen: Screen, logical: Logical, arrangement: Arrangement, rows: Sequence[Row], stages: Sequence[Stage],
    problem: LayoutError | None,
) -> None:  # fmt: skip
    placement, guess = arrangement.placement, arrangement.guess
    screen.line(screen.paint(f"{printable(logical.origin)} at {placement.parallel}", "head"))
    fits = f": its rules take {guess.taken:,} of {plural(guess.parameters, 'parameter')}" if guess else ""
    screen.line(f"{plural(placement.parallel.world_size, 'rank')}; {printable(arrangement.family.title)}{fits}")
    said = ", ".join(f"{name} {value:,}" for name, value in sorted(placement.variables.items()))
    screen.line(screen.paint(said, "quiet"))
    screen.line()
    if rows:
        _show_rows(screen, rows)
    if stages:
        cells = [[str(s.stage), _ranges(s.layers), size(s.nbytes)] for s in stages]
        screen.table(["STAGE", "LAYERS", "A RANK"], cells, right=("STAGE", "A RANK"))
    if arrangement.others:
        screen.line(f"{plural(len(arrangement.others), 'tensor')} of no parameter, kept whole on rank 0")
    if problem:
        if not any(row.problem for row in rows):
            screen.line(screen.paint(printable(problem.what), "bad"))
        if problem.hint:
            screen.line(f"hint: {printable(problem.hint)}")


def _show_rows(screen: Screen, rows: Sequence[Row]) -> None:
    header = ["TENSOR", "SHAPE", "RULE", "CUT", "STAGES", "A RANK"]
    cells = [
        [
            printable(row.name) + (f"  x {row.alike:,}" if row.alike > 1 else ""),
            shape_text(row.shape),
            "-" if row.rule is None else f"{row.rule}",
            "-" if row.problem else printable(row.cut),
            _ranges((stage, stage) for stage in row.stages),
            size(row.nbytes) if not row.problem else "-",
        ]
        for row in rows
    ]
    screen.table(header, cells, right=("RULE", "A RANK"), fold="TENSOR",
        style=lambda number, column: "bad" if rows[number].problem else "")  # fmt: skip
    screen.line()
    for row in rows:
        if row.problem:
            what = row.problem if row.name in row.problem else f"{row.name}: {row.problem}"
            screen.line(screen.paint(printable(what), "bad"))


def _ranges(found: Iterable[tuple[int, int]]) -> str:
    """Ranges of numbers for people, neighbours joined: "0-3, 8"."""
    joined: list[list[int]] = []
    for first, last in found:
        if joined and joined[-1][1] + 1 == first:
            joined[-1][1] = last
        else:
            joined.append([first, last])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in joined) or "-"
