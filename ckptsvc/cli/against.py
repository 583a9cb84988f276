"""`ckptsvc verify --against`: do two checkpoints, of whatever formats and layouts, hold the same tensors?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from ckptsvc.cli.compare import Comparison, Pair
from ckptsvc.cli.inspect import shape_text
from ckptsvc.cli.terminal import Screen, emit, natural, plural, printable, progress
from ckptsvc.interop.formats import open_foreign
from ckptsvc.interop.logical import Logical
from ckptsvc.types import TensorMeta

SHOWN = 20
"""Tensors of each kind that are named; JSON has all."""


def verify_against(
    a: str, b: str, *, name: str | None, step: int | None, tolerance: float | None, as_json: bool
) -> int:
    """Compare the tensors of two checkpoints, each with its own name in both; what belongs to single ranks is left out.

    Args:
        a: address of one, as for `ckptsvc convert`.
        b: of the other.
        name: which checkpoint of a run `a` is.
        step: of what step.
        tolerance: see `numbers.distance`.
        as_json: print JSON.

    Returns:
        the exit status: 0 equal, 1 different.
    """
    options = ({} if name is None else {"name": name}) | ({} if step is None else {"step": str(step)})
    with ExitStack() as stack:
        sides = []
        for where, chosen in ((a, options), (b, {})):
            sides.append(open_foreign(where, chosen))
            stack.callback(sides[-1].close)
        pair = Pair(sides[0], sides[1], lambda each: not each.startswith("@"), documents=False)
        with progress("comparing", pair.nbytes) as advance:
            found = pair.compare(tolerance, advance)
    for metas in (found.only_a, found.only_b):
        metas.sort(key=lambda meta: natural(meta.name))
    found.mismatched.sort(key=lambda each: natural(each.a.name))
    found.different.sort(key=lambda each: natural(each.meta.name))
    if as_json:
        emit(_json(sides, found, tolerance))
    else:
        _show(Screen(), sides, found)
    return 0 if found.is_equal else 1


def _json(sides: Sequence[Logical], found: Comparison, tolerance: float | None) -> dict[str, Any]:
    return {
        "a": sides[0].origin,
        "b": sides[1].origin,
        "ok": found.is_equal,
        "tolerance": tolerance,
        "equal": found.equal,
        "only_in_a": [meta._asdict() for meta in found.only_a],
        "only_in_b": [meta._asdict() for meta in found.only_b],
        "mismatched": [{"name": a.name, "a": _kind(a), "b": _kind(b)} for a, b in found.mismatched],
        "different": [
            meta._asdict()
            | {"elements": far.elements, "differing": far.differing, "max_abs": far.max_abs, "first": first}
            for meta, far, first in found.different
        ],
    }


def _kind(meta: TensorMeta) -> dict[str, Any]:
    return {"dtype": meta.dtype, "shape": meta.shape}


def _show(screen: Screen, sides: Sequence[Logical], found: Comparison) -> None:
    for letter, side in zip("AB", sides, strict=True):
        screen.line(f"{screen.paint(letter, 'head')}  {printable(side.origin)}")
    for title, metas in (("only in A", found.only_a), ("only in B", found.only_b)):
        _section(screen, f"tensors {title}", [f"{_text(meta)}  {printable(meta.name)}" for meta in metas])
    _section(
        screen,
        "tensors of another dtype or shape",
        [f"{printable(a.name)}  {_text(a)} in A, {_text(b)} in B" for a, b in found.mismatched],
    )
    _section(
        screen,
        "tensors that differ",
        [
            f"{printable(meta.name)}  {far.differing:,} of {far.elements:,} elements, the first at {list(first)};"
            f" at most {'?' if far.max_abs is None else format(far.max_abs, '.3g')} apart"
            for meta, far, first in found.different
        ],
    )
    compared = plural(found.equal + len(found.different), "tensor")
    if found.is_equal:
        screen.line(f"{screen.paint('the same', 'good')}: {compared}")
    else:
        bad = len(found.different) + len(found.mismatched) + len(found.only_a) + len(found.only_b)
        screen.line(f"{screen.paint('different', 'bad')}: {plural(bad, 'tensor')}, {found.equal:,} are equal")


def _text(meta: TensorMeta) -> str:
    return f"{meta.dtype} {shape_text(meta.shape)}"


def _section(screen: Screen, title: str, lines: Sequence[str]) -> None:
    if lines:
        screen.line(screen.paint(f"{title}: {len(lines):,}", "doubt"))
        for line in lines[:SHOWN]:
            screen.line(f"  {line}")
        if len(lines) > SHOWN:
            screen.line(f"  and {len(lines) - SHOWN:,} more")
