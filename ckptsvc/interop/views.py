"""Tensors made of parts of other tensors: fused and split projections, transposed weights, stacked layers, padding.

A `Mapped` checkpoint is one whose tensors are such views of another's. Nothing is copied: a stored region of the base
becomes a stored region of the view that is seen through a `geometry.reshard.Block`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ckptsvc.errors import LayoutError
from ckptsvc.geometry.box import Box, FlatRange, Region, Shape, flat_to_boxes
from ckptsvc.geometry.reshard import Block, StoredRegion, check_cover
from ckptsvc.interop.logical import Logical, Note
from ckptsvc.pipeline.read import Source
from ckptsvc.types import DTYPES, TensorMeta


class Part(msgspec.Struct, frozen=True):
    """A box of a view and the box of the base tensor that it is.

    Attributes:
        box: in the view.
        name: the base tensor.
        base: in the base tensor.
        order: for each dimension of the view the dimension of the base, -1 for a new one of extent 1; None: the same.
    """

    box: Box
    name: str
    base: Box
    order: tuple[int, ...] | None = None


class View(msgspec.Struct, frozen=True):
    """A tensor made of parts, which tile it."""

    meta: TensorMeta
    parts: tuple[Part, ...]


def whole(meta: TensorMeta, name: str) -> View:
    """The tensor `meta` under another name."""
    box = Box.full(meta.shape)
    return View(meta._replace(name=name), (Part(box, meta.name, box),))


class Mapped:
    """A checkpoint whose tensors are views of another's; see `interop.logical.Logical`."""

    def __init__(
        self,
        base: Logical,
        views: Sequence[View],
        document: Mapping[str, Any] | None = None,
        *,
        aliases: Mapping[str, str] | None = None,
        notes: Sequence[Note] = (),
    ) -> None:
        """Checks that the parts of every view tile it and lie inside what they are views of.

        Args:
            base: what is viewed.
            views: all tensors of the new checkpoint.
            document: its plain values; None takes the base's, whatever the rank.
            aliases: further names of views.
            notes: added to the base's.

        Raises:
            LayoutError: a part is missing, or does not fit.
        """
        self._base = base
        self._views = {view.meta.name: view for view in views}
        self._document = document
        self.aliases = dict(aliases or {})
        self.notes = [*base.notes, *notes]
        for view in views:
            _check(view, base)

    @property
    def origin(self) -> str:
        """See Logical."""
        return self._base.origin

    @property
    def step(self) -> int:
        """See Logical."""
        return self._base.step

    @property
    def world_size(self) -> int:
        """See Logical."""
        return self._base.world_size if self._document is None else 1

    @property
    def extent(self) -> int:
        """See Catalogue."""
        return self._base.extent

    @property
    def source(self) -> Source:
        """See Logical."""
        return self._base.source

    def names(self) -> list[str]:
        """See Logical."""
        return sorted(self._views)

    def __contains__(self, name: object) -> bool:
        return name in self._views or name in self.aliases

    def document(self, rank: int = 0) -> dict[str, Any]:
        """See Logical."""
        return self._base.document(rank) if self._document is None else dict(self._document)

    def close(self) -> None:
        """See Logical."""
        self._base.close()

    def resolve(self, name: str) -> str:
        """See Catalogue."""
        return self._view(name).meta.name

    def meta(self, name: str) -> TensorMeta:
        """See Catalogue."""
        return self._view(name).meta

    def shard_name(self, shard: int) -> str:
        """See Catalogue."""
        return self._base.shard_name(shard)

    def touching(self, name: str, wanted: Sequence[Region]) -> list[StoredRegion]:
        """See Catalogue."""
        view = self._view(name)
        boxes = [box for region in wanted for box in _boxes(region, view.meta.shape)]
        return [
            seen
            for part in view.parts
            if any(part.box.intersect(box) is not None for box in boxes)
            for stored in self._base.touching(part.name, [part.base])
            for seen in _seen(stored, part, view.meta, self._base.meta(part.name).shape)
        ]

    def _view(self, name: str) -> View:
        view = self._views.get(self.aliases.get(name, name))
        if view is None:
            raise LayoutError(f"{self.origin} has no tensor {name[:200]!r}", hint="`ckptsvc inspect` lists what it has")
        return view


def _boxes(region: Region, shape: Shape) -> list[Box]:
    return [region] if isinstance(region, Box) else flat_to_boxes(shape, region.start, region.length)


def _seen(stored: StoredRegion, part: Part, meta: TensorMeta, base_shape: Shape) -> list[StoredRegion]:
    """The parts of a stored region of the base that are inside `part`, as stored regions of the view."""
    itemsize = DTYPES[meta.dtype].itemsize
    order = part.order if part.order is not None else tuple(range(len(base_shape)))
    found, skipped = [], 0
    for piece in _boxes(stored.region, base_shape):
        common = piece.intersect(part.base)
        offset = stored.offset + (skipped * itemsize if isinstance(stored.region, FlatRange) else 0)
        skipped += piece.size
        if common is None:
            continue
        inside = common.relative_to(piece.origin)
        block = stored.block
        if block is None:
            block = Block(piece.shape, inside, order)
        else:
            block = Block(block.shape, block.inside(inside), tuple(-1 if d < 0 else block.order[d] for d in order))
        place = common.relative_to(part.base.origin)
        region = Box(
            tuple(o + (0 if d < 0 else place.origin[d]) for o, d in zip(part.box.origin, order, strict=True)),
            tuple(1 if d < 0 else place.shape[d] for d in order),
        )
        size = itemsize
        for n in block.shape:
            size *= n
        found.append(StoredRegion(meta.name, region, stored.shard, offset, size, block))
    return found


def _check(view: View, base: Logical) -> None:
    meta = view.meta
    check_cover(meta.shape, [part.box for part in view.parts], name=meta.name)
    for part in view.parts:
        stored = base.meta(part.name)
        order = part.order if part.order is not None else tuple(range(len(stored.shape)))
        block = Block(stored.shape, part.base, order)
        if stored.dtype != meta.dtype or not block.is_sound() or block.region_shape != part.box.shape:
            raise LayoutError(
                f"{meta.name} {meta.dtype}{list(meta.shape)}: its part {part.box} cannot be {part.base} of"
                f" {part.name} {stored.dtype}{list(stored.shape)}"
            )
