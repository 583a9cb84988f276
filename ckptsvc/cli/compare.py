"""Two checkpoints side by side: which tensors and plain values differ, and by how much.

Logical tensors are compared, whatever layout and world size each side was saved with. What is compared is read in
batches, in the order of the first side's shards, so that memory stays bounded and every extent of that side is read
about once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ckptsvc.cli import values
from ckptsvc.cli.numbers import Distance, distance
from ckptsvc.cli.values import Value
from ckptsvc.format.index import Index
from ckptsvc.geometry.box import Box, cut
from ckptsvc.pipeline.catalog import Checkpoint
from ckptsvc.pipeline.read import Want, read_arrays
from ckptsvc.pipeline.sources import StoreSource
from ckptsvc.types import DTYPES, TensorMeta

BATCH = 64 << 20
"""Bytes of each side in memory at a time."""

DOCUMENTS = 16
"""Documents of plain values in memory at a time, of each side."""

READERS = 2

OF_THE_RANKS = ("@rank", "@world_size")
"""Values of an objects document that say who wrote it; how a state was spread is no difference of the state."""

Matches = Callable[[str], bool]
Progress = Callable[[int], None]


class Different(NamedTuple):
    """A tensor of one name, dtype and shape whose elements differ."""

    meta: TensorMeta
    distance: Distance


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
    """

    def __init__(self, a: Checkpoint, b: Checkpoint, matches: Matches = lambda name: True) -> None:
        self._a, self._b, self._matches = a, b, matches
        self._ranks = min(a.index.info.world_size, b.index.info.world_size)
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
                entry.distance.add(distance(x, y, part.meta.dtype, tolerance))
            progress(sum(part.nbytes for part in batch))
        self._found.different = [entry for entry in found.values() if entry.distance.differing]
        self._found.equal += len(found) - len(self._found.different)
        for first in range(0, self._ranks, DOCUMENTS):
            ranks = range(first, min(first + DOCUMENTS, self._ranks))
            a, b = (values.read_documents(side, ranks) for side in (self._a, self._b))
            for rank, left, right in zip(ranks, a, b, strict=True):
                self._compare_values(rank, self._flat(left), self._flat(right), tolerance)
        return self._found

    def _plan(self) -> list[_Part]:
        """Sort the names out; what has to be read comes in the order of the first side's shards."""
        a, b = self._names(self._a.index), self._names(self._b.index)
        found, parts = self._found, []
        found.only_a = [_named(self._a.index, name) for name in a.keys() - b.keys()]
        found.only_b = [_named(self._b.index, name) for name in b.keys() - a.keys()]
        for name in sorted(a.keys() & b.keys(), key=lambda name: _position(self._a.index, name)):
            if a[name] == b[name] != name:
                continue  # tied to the same tensor on both sides, which is compared under its own name
            left, right = _named(self._a.index, name), _named(self._b.index, name)
            if left != right:
                found.mismatched.append(Mismatch(left, right))
            elif 0 in left.shape:
                found.equal += 1
            else:
                most = max(BATCH // DTYPES[left.dtype].itemsize, 1)
                parts += [_Part(left, box) for box in cut(Box.full(left.shape), most)]
        return parts

    def _names(self, index: Index) -> dict[str, str]:
        """Every logical name that counts, with the name it is stored under."""
        stored = {name: name for name in index.names()} | index.info.aliases
        return {name: of for name, of in stored.items() if self._counts(name) and self._matches(name)}

    def _counts(self, name: str) -> bool:
        if not name.startswith("@rank/"):
            return True
        rank, _, rest = name.removeprefix("@rank/").partition("/")
        return rest != "objects" and rank.isdecimal() and int(rank) < self._ranks

    def _read(self, side: Checkpoint, wants: Sequence[Want]) -> list[NDArray[Any]]:
        return read_arrays(side.index, StoreSource(side), wants, readers=READERS)

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


def _named(index: Index, name: str) -> TensorMeta:
    return index.meta(name)._replace(name=name)


def _position(index: Index, name: str) -> tuple[int, int]:
    """Shard and offset of the first region of a tensor."""
    first = index.region_rows(index.row(name)).start
    return int(index.region_shard[first]), int(index.region_offset[first])


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
