"""Two checkpoints side by side: which tensors and plain values differ, and by how much.

Logical tensors are compared, whatever layout, world size and format each side has. What is compared is read in batches,
in the order of the first side's shards, so that memory stays bounded and every extent of that side is read about once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ckptsvc.cli import values
from ckptsvc.cli.numbers import Distance, distance, first_different
from ckptsvc.cli.values import Value
from ckptsvc.geometry.box import Box, cut
from ckptsvc.interop.logical import Logical
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.types import DTYPES, TensorMeta

BATCH = 64 << 20
"""Bytes of each side in memory at a time."""

READERS = 2

OF_THE_RANKS = ("@rank", "@world_size")
"""Values of an objects document that say who wrote it; how a state was spread is no difference of the state."""

Matches = Callable[[str], bool]
Progress = Callable[[int], None]


class Different(NamedTuple):
    """A tensor of one name, dtype and shape whose elements differ, the first in row-major order at `first`."""

    meta: TensorMeta
    distance: Distance
    first: tuple[int, ...] = ()


class Mismatch(NamedTuple):
    """A tensor of one name with two dtypes or shapes; its elements are not compared."""

    a: TensorMeta
    b: TensorMeta


class ValueChange(NamedTuple):
    """A plain value of a rank that differs; None on the side that does not have it."""

    rank: int
    path: str
    a: Value | None
    b: Value | None


@dataclass
class Comparison:
    """What is different. Lists are in no particular order.

    Attributes:
        only_a: tensors of the first side only.
        only_b: tensors of the second side only.
        mismatched: tensors with two dtypes or shapes.
        different: tensors with differing elements.
        equal: number of tensors that are equal.
        ranks: number of ranks whose own tensors and plain values were compared: those that both sides have.
        values: number of plain values that were compared, over all these ranks.
        changes: plain values that differ.
    """

    only_a: list[TensorMeta] = field(default_factory=list)
    only_b: list[TensorMeta] = field(default_factory=list)
    mismatched: list[Mismatch] = field(default_factory=list)
    different: list[Different] = field(default_factory=list)
    equal: int = 0
    ranks: int = 0
    values: int = 0
    changes: list[ValueChange] = field(default_factory=list)

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_a or self.only_b or self.mismatched or self.different or self.changes)


class _Part(NamedTuple):
    """A box of a tensor that both sides have; never more than a batch."""

    meta: TensorMeta
    box: Box

    @property
    def nbytes(self) -> int:
        return self.box.size * DTYPES[self.meta.dtype].itemsize


class Pair:
    """Two checkpoints that are to be compared.

    Args:
        a: one side.
        b: the other.
        matches: which names of tensors and paths of values count.
        documents: compare the plain values of the ranks too.
    """

    def __init__(self, a: Logical, b: Logical, matches: Matches = lambda name: True, *, documents: bool = True) -> None:
        self._a, self._b, self._matches = a, b, matches
        self._ranks = min(a.world_size, b.world_size) if documents else 0
        self._found = Comparison(ranks=self._ranks)
        self._parts = self._plan()

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors that are to be read from each side."""
        return sum(part.nbytes for part in self._parts)

    def compare(self, tolerance: float | None = None, progress: Progress = lambda nbytes: None) -> Comparison:
        """Read and compare.

        Args:
            tolerance: see `numbers.distance` and `values.same`.
            progress: called with bytes compared since the last call.

        Raises:
            Damaged, StoreError: a side cannot be read.
        """
        found: dict[str, Different] = {}
        for batch in _batches(self._parts):
            wants = [Want(part.meta.name, part.meta.dtype, part.meta.shape, part.box) for part in batch]
            for part, x, y in zip(batch, self._read(self._a, wants), self._read(self._b, wants), strict=True):
                entry = found.setdefault(part.meta.name, Different(part.meta, Distance()))
                apart = distance(x, y, part.meta.dtype, tolerance)
                if apart.differing and not entry.distance.differing:
                    found[part.meta.name] = entry._replace(first=_first(part, x, y, tolerance))
                entry.distance.add(apart)
            progress(sum(part.nbytes for part in batch))
        self._found.different = [entry for entry in found.values() if entry.distance.differing]
        self._found.equal += len(found) - len(self._found.different)
        for rank in range(self._ranks):
            left, right = (self._flat(side.document(rank)) for side in (self._a, self._b))
            self._compare_values(rank, left, right, tolerance)
        return self._found

    def _plan(self) -> list[_Part]:
        """Sort the names out; what has to be read comes in the order of the first side's shards."""
        a, b = self._names(self._a), self._names(self._b)
        found, parts = self._found, []
        found.only_a = [_named(self._a, name) for name in a.keys() - b.keys()]
        found.only_b = [_named(self._b, name) for name in b.keys() - a.keys()]
        for name in sorted(a.keys() & b.keys(), key=lambda name: _position(self._a, name)):
            if a[name] == b[name] != name:
                continue  # tied to the same tensor on both sides, which is compared under its own name
            left, right = _named(self._a, name), _named(self._b, name)
            if left != right:
                found.mismatched.append(Mismatch(left, right))
            elif 0 in left.shape:
                found.equal += 1
            else:
                most = max(BATCH // DTYPES[left.dtype].itemsize, 1)
                parts += [_Part(left, box) for box in cut(Box.full(left.shape), most)]
        return parts

    def _names(self, side: Logical) -> dict[str, str]:
        """Every logical name that counts, with the name it is stored under."""
        stored = {name: name for name in side.names()} | dict(side.aliases)
        return {name: of for name, of in stored.items() if self._counts(name) and self._matches(name)}

    def _counts(self, name: str) -> bool:
        if not name.startswith("@rank/"):
            return True
        rank, _, rest = name.removeprefix("@rank/").partition("/")
        return rest != "objects" and rank.isdecimal() and int(rank) < self._ranks

    def _read(self, side: Logical, wants: Sequence[Want]) -> list[NDArray[Any]]:
        return read_arrays(side, side.source, wants, readers=READERS)

    def _compare_values(self, rank: int, a: dict[str, Value], b: dict[str, Value], tolerance: float | None) -> None:
        self._found.values += len(a.keys() | b.keys())
        for path in [*a, *(path for path in b if path not in a)]:
            x, y = a.get(path), b.get(path)
            if x is None or y is None or not values.same(x.value, y.value, tolerance):
                self._found.changes.append(ValueChange(rank, path, x, y))

    def _flat(self, document: Any) -> dict[str, Value]:
        return {
            value.path: value
            for value in values.flatten(document)
            if value.path not in OF_THE_RANKS and self._matches(value.path)
        }


def _named(side: Logical, name: str) -> TensorMeta:
    return side.meta(name)._replace(name=name)


def _position(side: Logical, name: str) -> tuple[int, int]:
    """Shard and offset of the first region of a tensor."""
    shape = side.meta(name).shape
    corner = Box((0,) * len(shape), tuple(min(extent, 1) for extent in shape))
    return min(((stored.shard, stored.offset) for stored in side.touching(name, [corner])), default=(0, 0))


def _first(part: _Part, x: NDArray[Any], y: NDArray[Any], tolerance: float | None) -> tuple[int, ...]:
    """Where in the tensor the first element of a part is that differs."""
    at = first_different(x, y, part.meta.dtype, tolerance)
    inside = np.unravel_index(at, part.box.shape) if part.box.shape else ()
    return tuple(origin + int(i) for origin, i in zip(part.box.origin, inside, strict=True))


def _batches(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    batch: list[_Part] = []
    nbytes = 0
    for part in parts:
        if batch and nbytes + part.nbytes > BATCH:
            yield batch
            batch, nbytes = [], 0
        batch.append(part)
        nbytes += part.nbytes
    if batch:
        yield batch
