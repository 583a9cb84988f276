"""Puts what the ranks of a DeepSpeed checkpoint hold together as logical tensors, and compares what several hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from ckptsvc.geometry.box import Box, FlatRange
from ckptsvc.interop.deepspeed.cut import Cut, Cuts, Place, places_of_runs, places_of_tensor, uncut
from ckptsvc.interop.deepspeed.files import Shape
from ckptsvc.interop.deepspeed.zero import Run
from ckptsvc.interop.logical import Foreign, Note, Stretch
from ckptsvc.interop.torch_format.file import StoredTensor
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import DTYPES, TensorMeta

COMPARED_BYTES = 64 << 20
"""Copies of replicated tensors are compared up to so many bytes in all."""


class _Copy(NamedTuple):
    logical: str
    holder: str


class Assembly:
    """Adds the pieces of all model-parallel ranks to a `Foreign`.

    The first pipeline stage that has a tensor is the one whose copy counts: the later copies of tied modules get no
    gradients of their own and go astray in DeepSpeed.
    """

    def __init__(self, foreign: Foreign, cuts: Cuts) -> None:
        self._foreign, self._cuts = foreign, cuts
        self._copies = Foreign(foreign.origin, foreign.files)
        self._copied: list[_Copy] = []
        self._stages: dict[str, int] = {}
        self._known: dict[tuple[int, str], Cut] = {}

    def add_runs(
        self, logical: str, stage: int, name: str, dtype: str, shapes: Sequence[Shape], runs: Sequence[Sequence[Run]]
    ) -> None:
        """What the tensor-parallel ranks of a stage have of a flattened parameter.

        Args:
            logical: the name it gets.
            stage: the pipeline stage.
            name: the parameter, which says how it is cut.
            dtype: element type.
            shapes: its shape in each rank.
            runs: where each rank keeps it.
        """
        cut = self._cut(stage, name, shapes)
        places = [places_of_runs(r, dtype, s, cut, i) for i, (r, s) in enumerate(zip(runs, shapes, strict=True))]
        self._put(logical, stage, dtype, cut, places)

    def add_tensors(
        self, logical: str, stage: int, name: str, tensors: Sequence[StoredTensor], *, is_buffer: bool = False
    ) -> None:
        """What the tensor-parallel ranks of a stage have of a tensor of the module. Buffers are taken as replicated."""
        shapes = [tensor.shape for tensor in tensors]
        if is_buffer and not self._cuts.is_claimed(name) and len(set(shapes)) == 1:
            cut = uncut(shapes[0])
        else:
            cut = self._cut(stage, name, shapes)
        self._put(logical, stage, tensors[0].dtype, cut, [places_of_tensor(t, cut, i) for i, t in enumerate(tensors)])

    def _cut(self, stage: int, name: str, shapes: Sequence[Shape]) -> Cut:
        key = (stage, name)
        if key not in self._known:
            self._known[key] = self._cuts.of(name, shapes)
        return self._known[key]

    def _put(self, logical: str, stage: int, dtype: str, cut: Cut, places: Sequence[Iterable[Place]]) -> None:
        meta = TensorMeta(logical, dtype, cut.shape)
        is_first = self._stages.setdefault(logical, stage) == stage
        for rank, each in enumerate(places):
            if is_first and not (rank and cut.is_replicated):
                target = self._foreign
                named = meta
            else:
                holder = f"stage {stage}" + (f", rank {rank}" if cut.is_replicated and len(places) > 1 else "")
                named = meta._replace(name=f"{logical} in {holder}")
                target = self._copies
                if named.name not in target:
                    self._copied.append(_Copy(logical, holder))
            if 0 in cut.shape:
                target.add(named, Box.full(cut.shape), Stretch("", 0, 0, b""))
            for region, where, block in each:
                if not isinstance(region, FlatRange) or region.length:
                    target.add(named, region, where, block)

    def compare(self) -> list[Note]:
        """Compare the copies with what counts."""
        if not self._copied:
            return []
        self._copies.seal()
        different, seen = [], 0
        for logical, holder in self._copied:
            name = f"{logical} in {holder}"
            meta, other = self._foreign.meta(logical), self._copies.meta(name)
            if (meta.dtype, meta.shape) != (other.dtype, other.shape):
                different.append(name)
                continue
            seen += Box.full(meta.shape).size * DTYPES[meta.dtype].itemsize
            if seen > COMPARED_BYTES:
                what = (
                    f"copies of replicated tensors beyond {COMPARED_BYTES >> 20} MiB were not compared, from {name} on"
                )
                return [*_differ(different), Note("warning", what)]
            mine = _whole(self._foreign, meta)
            if mine != _whole(self._copies, other):
                different.append(name)
        return _differ(different)


def _differ(names: Sequence[str]) -> list[Note]:
    if not names:
        return []
    some = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return [Note("repaired", f"copies differ from those of the first stage or rank, which are used: {some}")]


def _whole(foreign: Foreign, meta: TensorMeta) -> bytes:
    want = Want(meta.name, meta.dtype, meta.shape, Box.full(meta.shape))
    return read_arrays(foreign, foreign.source, [want])[0].tobytes()
