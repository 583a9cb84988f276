"""A checkpoint seen through a name map: every tensor under its other name, joined, split, transposed or stacked.

What comes out is a `views.Mapped`: its data is still where it was.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import prod
from typing import Any

import msgspec

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.format.document import join, split
from ckptsvc.geometry.box import Box, Shape
from ckptsvc.interop.logical import Logical, Note
from ckptsvc.interop.naming.joined import Recipe, Source, recipes
from ckptsvc.interop.naming.names import NameMap, bind
from ckptsvc.interop.views import Mapped, Part, View, whole
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import TensorMeta

_SHOWN = 5


class Parameter(msgspec.Struct):
    """What a checkpoint has of one parameter or buffer.

    Attributes:
        model: the model's own tensor; None if it has optimizer state only.
        state: its optimizer state, by slot ("exp_avg").
    """

    model: TensorMeta | None = None
    state: dict[str, TensorMeta] = {}

    @property
    def shape(self) -> Shape:
        """Its shape: the model's, or that of its largest state."""
        metas = [self.model] if self.model else list(self.state.values())
        return max((meta.shape for meta in metas), key=prod)


def parameters(logical: Logical) -> tuple[dict[str, Parameter], list[str]]:
    """(what there is of every parameter, by its name; names of the tensors that are of none)."""
    found: dict[str, Parameter] = {}
    others = []
    for name in logical.names():
        match split(name):
            case ["model", parameter]:
                found.setdefault(parameter, Parameter()).model = logical.meta(name)
            case ["optimizer", "state", parameter, slot]:
                found.setdefault(parameter, Parameter()).state[slot] = logical.meta(name)
            case _:
                others.append(name)
    return found, others


def mapped(
    logical: Logical, table: NameMap, variables: Mapping[str, int], *, to: str, forms: Collection[str] = ()
) -> Mapped:
    """The checkpoint with the names and shapes of the side `to`; nothing is read but steps that must agree.

    Args:
        logical: a checkpoint with the names of the other side.
        table: the map.
        variables: sizes that the map speaks of (`families.variables`).
        to: one of the map's sides.
        forms: spellings to write where the map knows several.

    Raises:
        InvalidInput: there is no such side.
        LayoutError: a tensor nobody takes, or two rules take, or whose shape contradicts the map; parts that are
            missing, or have different steps, dtypes or param groups.
    """
    if to not in table.sides:
        raise InvalidInput(f"{to!r} is no side of the map", hint=f"it has {' and '.join(table.sides)}")
    side = 1 - table.sides.index(to)
    known, others = parameters(logical)
    bound, unknown, dropped = bind(known, table, side, forms)
    if unknown and not table.keep:
        more = f" and {len(unknown) - _SHOWN:,} more" if len(unknown) > _SHOWN else ""
        raise LayoutError(
            f"{logical.origin}: the map from {table.sides[side]} to {to} has no name for"
            f" {', '.join(unknown[:_SHOWN])}{more}",
            hint="leave them out (--only), or give a map that has them",
        )
    shapes = {name: parameter.shape for name, parameter in known.items()}
    made = [recipe for entry in bound for recipe in recipes(entry, side, shapes, variables)]
    made += [_kept(name, shapes[name]) for name in unknown]
    if twice := _first_twice([recipe.name for recipe in made]):
        raise LayoutError(f"two tensors of {logical.origin} are called {twice} under {to}")
    maker = _Maker(logical, known)
    views = [view for recipe in made for view in maker.views(recipe)]
    maker.check_values()
    views += [whole(logical.meta(name), name) for name in others]
    notes = [Note("lost", f"{name}: {drop.why}") for name, drop in dropped]
    notes += [note for recipe in made for note in _padding(recipe)]
    aliases = _aliases(logical, table, side, forms, known, {view.meta.name for view in views}, notes)
    document = _document(logical.document(), made)
    return Mapped(logical, views, document, aliases=aliases, notes=notes)


def _kept(name: str, shape: Shape) -> Recipe:
    return Recipe(name, shape, (Source(Box.full(shape), name, Box.full(shape), None),))


class _Maker:
    """Views of one checkpoint; remembers which values have to be equal."""

    def __init__(self, logical: Logical, known: Mapping[str, Parameter]) -> None:
        self._logical = logical
        self._known = known
        self._equal: list[list[TensorMeta]] = []

    def views(self, recipe: Recipe) -> list[View]:
        """The tensors of a parameter: the model's and its optimizer state."""
        parts = [(name, self._known[name]) for name in recipe.made_of]
        models = {name: part.model for name, part in parts if part.model is not None}
        made = [self._view(f"model/{join('', recipe.name)}", recipe, models)] if models else []
        for slot in dict.fromkeys(slot for _, part in parts for slot in part.state):
            metas = {name: part.state[slot] for name, part in parts if slot in part.state}
            if len(metas) < len(parts):
                without = next(name for name, _ in parts if name not in metas)
                raise LayoutError(
                    f"{self._logical.origin}: {next(iter(metas))} has {slot}, and {without} has not: together they are"
                    f" {recipe.name}"
                )
            made.append(self._view(join("optimizer/state", recipe.name, slot), recipe, metas))
        return made

    def _view(self, name: str, recipe: Recipe, metas: Mapping[str, TensorMeta]) -> View:
        missing = [part for part in recipe.made_of if part not in metas]
        if missing:
            raise LayoutError(f"{self._logical.origin}: {missing[0]}, which {recipe.name} is made of, is missing")
        first = next(iter(metas.values()))
        if any(meta.dtype != first.dtype for meta in metas.values()):
            listed = ", ".join(f"{meta.name} {meta.dtype}" for meta in metas.values())
            raise LayoutError(f"{name} is made of tensors of different element types: {listed}")
        if any(meta.shape != self._known[part].shape for part, meta in metas.items()):
            return self._value(name, list(metas.values()), recipe)
        parts = tuple(Part(s.box, metas[s.name].name, s.base, s.order) for s in recipe.sources)
        return View(TensorMeta(name, first.dtype, recipe.shape), parts)

    def _value(self, name: str, metas: Sequence[TensorMeta], recipe: Recipe) -> View:
        """State of another shape than its parameter: a number for all of it (a step)."""
        as_it_is = len(recipe.sources) == 1 and recipe.shape == self._known[recipe.sources[0].name].shape
        if any(prod(meta.shape) != 1 for meta in metas) and not as_it_is:
            odd = next(meta for meta in metas if prod(meta.shape) != 1)
            raise LayoutError(
                f"{odd.name} {list(odd.shape)} has another shape than its parameter: the map does not say what it is of"
                f" {recipe.name}"
            )
        if len(metas) > 1:
            self._equal.append(list(metas))
        return whole(metas[0], name)

    def check_values(self) -> None:
        """Read the numbers that must be equal.

        Raises:
            LayoutError: two differ.
        """
        metas = [meta for group in self._equal for meta in group]
        wants = [Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape)) for meta in metas]
        arrays = iter(read_arrays(self._logical, self._logical.source, wants) if wants else ())
        for group in self._equal:
            values = [(meta, next(arrays).tobytes()) for meta in group]
            for meta, value in values[1:]:
                if value != values[0][1]:
                    raise LayoutError(
                        f"{self._logical.origin}: {values[0][0].name} and {meta.name} differ, and would be one value",
                        hint="they were not trained for the same number of steps",
                    )


def _document(document: Mapping[str, Any], made: Sequence[Recipe]) -> dict[str, Any]:
    """The plain values with the parameters of param groups under their new names."""
    optimizer = document.get("optimizer")
    groups = optimizer.get("param_groups") if isinstance(optimizer, dict) else None
    if not isinstance(optimizer, dict) or not isinstance(groups, list):
        return dict(document)
    into: dict[str, list[str]] = {}
    for recipe in made:
        for name in recipe.made_of:
            into.setdefault(name, []).append(recipe.name)
    group_of: dict[str, int] = {}
    renamed = []
    for number, group in enumerate(groups):
        if not isinstance(group, dict) or not isinstance(group.get("params"), list):
            renamed.append(group)
            continue
        names: dict[Any, None] = {}
        for old in group["params"]:
            for new in into.get(old, [old]) if isinstance(old, str) else [old]:
                names[new] = None
                if group_of.setdefault(str(new), number) != number:
                    raise LayoutError(f"the parts of {new} are in param groups {group_of[str(new)]} and {number}")
        renamed.append({**group, "params": list(names)})
    return {**document, "optimizer": {**optimizer, "param_groups": renamed}}


def _aliases(
    logical: Logical, table: NameMap, side: int, forms: Collection[str], known: Mapping[str, Parameter],
    present: Collection[str], notes: list[Note],
) -> dict[str, str]:  # fmt: skip
    """The aliases under their new names; what is joined or split has none."""

    def renamed(name: str) -> str | None:
        path = split(name)
        at = {2: 1, 4: 2}.get(len(path)) if path[0] in ("model", "optimizer") else None
        if at is None:
            return name
        match = table.match(path[at], side, known, forms)
        if match is None:
            return name if table.keep else None
        pair = match.pair
        if len(pair.left) > 1 or pair.sections or pair.stacked_left or pair.stacked_right:
            return None
        path[at] = (pair.left[0] if side else pair.right).fill(match.values)
        return join("", *path)

    aliases = {}
    for alias, name in logical.aliases.items():
        new_alias, new_name = renamed(alias), renamed(name)
        if new_alias is None or new_name is None or new_name not in present or new_alias in present:
            notes.append(Note("lost", f"{alias}, another name of {name}, has no counterpart"))
        else:
            aliases[new_alias] = new_name
    return aliases


def _padding(recipe: Recipe) -> Iterator[Note]:
    if recipe.left_out:
        yield Note("lost", f"{recipe.made_of[0]}: rows of padding: {recipe.left_out:,}")
    elif recipe.left_out is None:
        kept = (
            f"all {recipe.shape[0]:,} rows are kept, and some may be padding: the size of the vocabulary is not known"
        )
        yield Note("warning", f"{recipe.made_of[0]}: {kept}")


def _first_twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
