"""What a planned conversion will cost, before a byte is read: by going through its steps with nothing in them."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from math import prod
from typing import NamedTuple

from ckptsvc.geometry.box import Region, is_whole
from ckptsvc.geometry.reshard import plan
from ckptsvc.interop.conversion.produce import Budget
from ckptsvc.interop.conversion.tasks import Step, Task, least, split, steps
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import OutputFile
from ckptsvc.pipeline.read import flat_bounds, window_bytes
from ckptsvc.types import DTYPES

_COARSE = 16 << 30  # bytes of a step here: as a rule what is read does not depend on it, and the time to find out does


class Estimate(NamedTuple):
    """The cost, in bytes.

    Attributes:
        needed: of the source, that the target is made of, each once.
        read: of the source, with the rest of every extent that is needed in part, and what is read again.
        written: of the target.
        files: how many, without the small ones that come last.
        memory: the most that is in memory for data, beside the program itself.
    """

    needed: int
    read: int
    written: int
    files: int
    memory: int

    @property
    def amplification(self) -> float:
        """Bytes read for every byte that is needed."""
        return self.read / self.needed if self.needed else 1.0

    def seconds(self, read: float | None, write: float | None) -> float | None:
        """How long it takes at these bandwidths (bytes a second): reading and writing go on side by side."""
        times = [nbytes / rate for nbytes, rate in ((self.read, read), (self.written, write)) if rate]
        return max(times, default=None)


def estimate(logical: Logical, tasks: Sequence[Task], budget: Budget) -> Estimate:
    """The cost of tasks; `logical` is not read.

    Raises:
        LayoutError: the source does not have what a file needs.
    """
    reads = _Reads(logical, budget.edges)
    most = 0
    for task in tasks:
        for group in task.groups:
            for part in split(group, budget.held // 2, budget.block):
                most = max(most, sum(least(file, budget.block) for file in part))
                before = reads.state()
                turned = [reads.add(step) for step in steps(part, logical, max(budget.step, _COARSE))]
                if any(turned):  # slabs of a transposed tensor are everywhere in the source
                    reads.reset(before)
                    for step in steps(part, logical, budget.step):
                        reads.add(step)
    files = [file for task in tasks for file in task.files]
    written = sum(file.nbytes for file in files)
    buffers = (budget.readers + 1) * window_bytes(logical.extent)
    memory = buffers + min(max(budget.held, most), written) + min(budget.edges, reads.nbytes)
    return Estimate(_needed(logical, files), reads.nbytes, written, len(files), memory)


def _needed(logical: Logical, files: Iterable[OutputFile]) -> int:
    wanted: dict[str, set[Region]] = defaultdict(set)
    for file in files:
        for fill in file.fills:
            wanted[logical.resolve(fill.name)].add(fill.region)
    total = 0
    for name, regions in wanted.items():
        meta = logical.meta(name)
        size = prod(meta.shape)
        some = size if any(is_whole(region, meta.shape) for region in regions) else sum(r.size for r in regions)
        total += min(some, size) * DTYPES[meta.dtype].itemsize
    return total


class _Reads:
    """Counts what is read, extent by extent, as `produce.EdgeCache` would let it through."""

    def __init__(self, logical: Logical, limit: int) -> None:
        self._logical, self._extent = logical, logical.extent
        self._edges: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._room = limit // self._extent
        self.nbytes = 0

    def state(self) -> tuple[int, OrderedDict[tuple[int, int], None]]:
        """To come back to with `reset`."""
        return self.nbytes, self._edges.copy()

    def reset(self, state: tuple[int, OrderedDict[tuple[int, int], None]]) -> None:
        """Forget what was counted since."""
        self.nbytes, self._edges = state

    def add(self, step: Step) -> bool:
        """Count a step; returns whether dimensions are put in another order in it."""
        turned = False
        regions: dict[str, list[Region]] = defaultdict(list)
        for piece in step.pieces:
            regions[piece.want.name].append(piece.want.region)
        spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for name, wanted in regions.items():
            meta = self._logical.meta(name)
            itemsize = DTYPES[meta.dtype].itemsize
            stored = self._logical.touching(name, wanted)
            for copy in plan(stored, wanted, itemsize, meta.shape, name=name):
                turned = turned or (copy.order is not None and list(copy.order) != sorted(copy.order))
                source = stored[copy.stored]
                first, last = flat_bounds(copy.source, itemsize)
                base = source.offset + copy.source.offset * itemsize
                spans[source.shard].append(
                    (
                        (base + first) // self._extent,
                        (base + last - 1) // self._extent + 1,
                    )
                )
        for shard, found in spans.items():
            for first, last in _merged(found):
                self._read(shard, first, last)
        return turned

    def _read(self, shard: int, first: int, last: int) -> None:
        end = min(last * self._extent, self._logical.source.size(shard))
        self.nbytes += end - first * self._extent
        for extent in {first, last - 1}:
            if (shard, extent) in self._edges:
                self.nbytes -= min((extent + 1) * self._extent, end) - extent * self._extent
                self._edges.move_to_end((shard, extent))
            elif self._room:
                self._edges[shard, extent] = None
                if len(self._edges) > self._room:
                    self._edges.popitem(last=False)


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged
