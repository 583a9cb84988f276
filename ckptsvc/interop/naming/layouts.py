"""What a person asks of a checkpoint by the family of its model: to be arranged on ranks, to be called otherwise.

`arrange` places its tensors by the family's rules; `translate` gives them the names and shapes of another framework.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from ckptsvc.errors import InvalidInput, LayoutError
from ckptsvc.geometry.box import Box, Region
from ckptsvc.geometry.parallel import Parallel
from ckptsvc.geometry.placement import Entry, Placement
from ckptsvc.geometry.shares import Shares
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.naming.families import Family, Guess, family, guess, variables
from ckptsvc.interop.naming.mapping import Parameter, mapped, parameters
from ckptsvc.interop.views import Mapped
from ckptsvc.types import DTYPES, TensorMeta

SURE = 0.5
"""The part of the parameters that the rules of a family must take for it to be taken for the checkpoint's."""


class Arrangement(NamedTuple):
    """A checkpoint under a layout.

    Attributes:
        family: whose rules are used.
        guess: how well they fit; None if the family was given.
        placement: what is where.
        shares: who stores what of it.
        others: tensors that are of no parameter: rank 0 has them, whole.
    """

    family: Family
    guess: Guess | None
    placement: Placement
    shares: Shares
    others: tuple[TensorMeta, ...]

    def regions(self, rank: int) -> list[tuple[str, Region]]:
        """What a rank stores: over all ranks every element of every tensor exactly once."""
        own: list[tuple[str, Region]] = [] if rank else [(meta.name, Box.full(meta.shape)) for meta in self.others]
        return own + self.shares.regions(rank)


def arrange(
    logical: Logical, parallel: Parallel, *, model: Family | None = None, given: Mapping[str, int] | None = None
) -> Arrangement:
    """Place the tensors of a checkpoint; `placement.check()` is still to be called.

    Args:
        logical: the checkpoint.
        parallel: the layout.
        model: whose rules; None takes the family that fits the names.
        given: variables that the checkpoint does not say, or says wrong.

    Raises:
        LayoutError: no family fits the names.
    """
    known, others = parameters(logical)
    guessed = None
    if model is None:
        guessed = _guessed(logical, known)
        model = family(guessed.family)
    shapes = {name: parameter.shape for name, parameter in known.items()}
    values = variables(logical.document(), shapes) | dict(given or {})
    placement = Placement(model.rules, parallel, entries(known), values)
    return Arrangement(model, guessed, placement, Shares(placement), tuple(map(logical.meta, others)))


def translate(
    logical: Logical,
    *,
    to: str,
    model: Family | None = None,
    given: Mapping[str, int] | None = None,
    forms: Collection[str] = (),
) -> Mapped:
    """The checkpoint with the names and shapes of another framework, its data where it was.

    Args:
        logical: the checkpoint, with the names of the other side.
        to: a side of the family's map: "hf" or "megatron" (of the family megatron: "layers" or "stacked").
        model: whose map; None takes the family that fits the names, which are then Hugging Face's.
        given: variables that the checkpoint does not say, or says wrong.
        forms: spellings to write where the map knows several (see the family's file).

    Raises:
        LayoutError: no family fits the names, or the map does not fit the checkpoint.
        InvalidInput: the family's map has no such side.
    """
    known, _ = parameters(logical)
    if model is None:
        model = family(_guessed(logical, known).family)
    if model.names is None or to not in model.names.sides:
        sides = " and ".join(model.names.sides) if model.names else "none"
        raise InvalidInput(
            f"{logical.origin}: the names of {model.title} have no side {to!r} (sides: {sides})",
            hint="Megatron's names do not tell the family: give it with --family, as llama",
        )
    shapes = {name: parameter.shape for name, parameter in known.items()}
    values = variables(logical.document(), shapes) | dict(given or {})
    return mapped(logical, model.names, values, to=to, forms=forms)


def _guessed(logical: Logical, known: Mapping[str, Parameter]) -> Guess:
    best = guess(known)[0]
    if best.sure < SURE:
        raise LayoutError(
            f"{logical.origin}: its names are of no family that is known ({best.family} fits best:"
            f" {best.taken:,} of {best.parameters:,} parameters)",
            hint="give one with --family, or rules of your own with --rules",
        )
    return best


def entries(known: Mapping[str, Parameter]) -> list[Entry]:
    """The tensors of all parameters as `Placement` wants them, layer 2 before layer 10."""
    found = []
    for name in sorted(known, key=_natural):
        parameter = known[name]
        metas = [(parameter.model, False)] if parameter.model else []
        for meta, state in [*metas, *((meta, True) for meta in parameter.state.values())]:
            found.append(Entry(meta.name, name, meta.shape, DTYPES[meta.dtype].itemsize, state))
    return found


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"([0-9]+)", name)]
