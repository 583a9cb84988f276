"""The work of a conversion: files that are made together, and the steps in which that is done.

Files that need the same bytes of the source (the column slices of one matrix, say) are one group and advance side by
side, so that these bytes are read once. Groups are gathered into tasks, which are what is recorded as finished and what
workers share out. Neither depends on memory or on the number of workers: a conversion is resumed with any of both.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

from ckptsvc.geometry.box import Box, FlatRange, Region, as_flat, cut
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import Fill, OutputFile
from ckptsvc.pipeline.read import Want
from ckptsvc.types import DTYPES

REPEATED = 1 << 20
"""Bytes of a region from which on files that all hold it belong together; smaller ones are read again."""

TASK_BYTES = 16 << 20
"""Small files are gathered into tasks of so many bytes at least: a task costs a record, which costs a sync."""

MANY = 4096
"""Files are gathered into about so many tasks at most, but for files that are tasks by themselves."""

TASK_FILES = 256
"""Most files of a task that is gathered, and most files of a group: each is a thread while it is written."""

_GRAIN = 8  # pieces that the share of one step in a large tensor is looked at in

Group = Sequence[OutputFile]


class Task(NamedTuple):
    """Groups of files that are recorded together.

    Attributes:
        number: its place in the conversion.
        groups: made one after the other.
    """

    number: int
    groups: tuple[Group, ...]

    @property
    def files(self) -> list[OutputFile]:
        """All its files."""
        return [file for group in self.groups for file in group]

    @property
    def nbytes(self) -> int:
        """Bytes of its files."""
        return sum(file.nbytes for file in self.files)


class Piece(NamedTuple):
    """A part of a step: a part of one fill.

    Attributes:
        file: number of the file in its group.
        fill: number of the fill in its file, empty ones not counted.
        offset: where it goes in the file.
        want: what is read, in the dtype it is stored in.
        dtype: what it becomes.
    """

    file: int
    fill: int
    offset: int
    want: Want
    dtype: str


class Step(NamedTuple):
    """What is read at a time.

    Attributes:
        pieces: parts of files.
        nbytes: bytes that they add to files, with the fixed bytes behind them.
        finals: (number of a file, byte before which it has all its fills once this step is there).
    """

    pieces: list[Piece]
    nbytes: int
    finals: list[tuple[int, int]]


def tasks(files: Sequence[OutputFile], logical: Logical) -> list[Task]:
    """Every file in a group of a task, always the same way."""
    found: list[Task] = []
    groups: list[Group] = []
    nbytes = count = 0
    most = max(TASK_BYTES, sum(file.nbytes for file in files) // MANY)
    for group in _groups(files, logical):
        size = sum(file.nbytes for file in group)
        if groups and (nbytes + size > most or count + len(group) > TASK_FILES):
            found.append(Task(len(found), tuple(groups)))
            groups, nbytes, count = [], 0, 0
        groups.append(group)
        nbytes, count = nbytes + size, count + len(group)
    if groups:
        found.append(Task(len(found), tuple(groups)))
    return found


def share(found: Sequence[Task], number: int, of: int) -> list[Task]:
    """The tasks of worker `number` of so many: the largest first, each to who has least; in their order."""
    loads = [(0, i) for i in range(of)]
    mine = []
    for task in sorted(found, key=lambda task: (-task.nbytes, task.number)):
        load, who = heapq.heappop(loads)
        heapq.heappush(loads, (load + max(task.nbytes, 1), who))
        if who == number:
            mine.append(task)
    return sorted(mine, key=lambda task: task.number)


def _groups(files: Sequence[OutputFile], logical: Logical) -> Iterator[Group]:
    """Files that need the same bytes, in the order of their first file."""
    holders: dict[str, list[tuple[int, Region, int]]] = defaultdict(list)
    for number, file in enumerate(files):
        for fill in file.fills:
            holders[logical.resolve(fill.name)].append((number, fill.region, DTYPES[fill.dtype].itemsize))
    leader = list(range(len(files)))

    def lead(number: int) -> int:
        while leader[number] != number:
            leader[number] = number = leader[leader[number]]
        return number

    for name, held in holders.items():
        if len({number for number, _, _ in held}) > 1 and _together(held, logical.meta(name).shape):
            first = lead(held[0][0])
            for number, _, _ in held[1:]:
                other = lead(number)
                first, other = min(first, other), max(first, other)
                leader[other] = first
    gathered: dict[int, list[OutputFile]] = defaultdict(list)
    for number, file in enumerate(files):
        gathered[lead(number)].append(file)
    for group in gathered.values():
        for start in range(0, len(group), TASK_FILES):
            yield group[start : start + TASK_FILES]


def _together(held: Sequence[tuple[int, Region, int]], shape: tuple[int, ...]) -> bool:
    seen: set[Region] = set()
    for _, region, itemsize in held:
        if isinstance(region, Box) and as_flat(shape, region) is None:
            return True
        if region in seen and region.size * itemsize >= REPEATED:
            return True
        seen.add(region)
    return False


def split(group: Group, most: int, block: int) -> list[Group]:
    """A group in parts whose files need at most so many bytes of memory to get on side by side (see `least`).

    Source bytes that several parts need are read by each.
    """
    parts: list[list[OutputFile]] = [[]]
    nbytes = 0
    for file in group:
        needs = least(file, block)
        if parts[-1] and nbytes + needs > most:
            parts.append([])
            nbytes = 0
        parts[-1].append(file)
        nbytes += needs
    return [part for part in parts if part]


LEAST_BLOCK, MOST_BLOCK = 256 << 10, 8 << 20
"""Bytes that a driver writes at a time: smaller blocks cost time, larger ones gain nothing."""

_IN_FLIGHT = 9  # blocks of a file that are written and not reported yet, and one that is not complete


def least(file: OutputFile | None, block: int) -> int:
    """Bytes of memory that a file (any, if None) may need to get on, whatever else waits."""
    needs = _IN_FLIGHT * block
    return needs if file is None else min(file.nbytes, needs)


def steps(group: Group, logical: Logical, step_bytes: int) -> Iterator[Step]:
    """The steps that make the files of a group, each of about so many bytes; every fill is filled in order."""
    cursors = [_Cursor(file) for file in group]
    order = _common_order([list(cursor.by_key) for cursor in cursors])
    if order is None:  # the files contradict each other: one after the other then
        for number, file in enumerate(group):
            for step in steps([file], logical, step_bytes):
                finals = [(number, final) for _, final in step.finals]
                yield Step([piece._replace(file=number) for piece in step.pieces], step.nbytes, finals)
        return
    pieces: list[Piece] = []
    nbytes = 0
    for key in order:
        for batch in _batches(key, cursors, logical, step_bytes):
            size = sum(_size(piece) for piece in batch)
            if pieces and nbytes + size > step_bytes:
                yield _step(pieces, cursors)
                pieces, nbytes = [], 0
            pieces += batch
            nbytes += size
    if pieces:
        yield _step(pieces, cursors)


_Key = tuple[str, int]


class _Cursor:
    """How far a file is."""

    def __init__(self, file: OutputFile) -> None:
        self.fills = [fill for fill in file.fills if not fill.region.is_empty]
        self.sizes = [fill.region.size * DTYPES[fill.dtype].itemsize for fill in self.fills]
        self.ends = [*(fill.offset for fill in self.fills[1:]), file.nbytes]
        self.by_key: dict[_Key, list[int]] = {}
        """By tensor, and how often it came before in this file: numbers of its fills."""
        self._done = [0] * len(self.fills)
        self._first = 0  # the first fill that is not complete
        runs: dict[str, int] = defaultdict(int)
        last = None
        for number, fill in enumerate(self.fills):
            if fill.name != last:
                runs[fill.name] += 1
                last = fill.name
            self.by_key.setdefault((fill.name, runs[fill.name]), []).append(number)

    def add(self, fill: int, nbytes: int) -> int:
        """Note a piece; returns its bytes with those beside its fill that come with it."""
        before = self.fills[0].offset if fill == 0 and not self._done[0] else 0
        self._done[fill] += nbytes
        complete = self._done[fill] == self.sizes[fill]
        behind = self.ends[fill] - self.fills[fill].offset - self.sizes[fill] if complete else 0
        return before + nbytes + behind

    def final(self) -> int:
        """The byte before which all fills are there."""
        while self._first < len(self.fills) and self._done[self._first] == self.sizes[self._first]:
            self._first += 1
        if self._first == len(self.fills):
            return self.ends[-1]
        return self.fills[self._first].offset + self._done[self._first]


def _common_order(sequences: Sequence[Sequence[_Key]]) -> list[_Key] | None:
    """All keys in an order that agrees with every sequence; None if there is none."""
    first: dict[_Key, int] = {}
    after: dict[_Key, list[_Key]] = defaultdict(list)
    before: dict[_Key, int] = defaultdict(int)
    for sequence in sequences:
        previous = None
        for key in sequence:
            first.setdefault(key, len(first))
            if previous is not None:
                after[previous].append(key)
                before[key] += 1
            previous = key
    ready = [(number, key) for key, number in first.items() if not before[key]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, key = heapq.heappop(ready)
        order.append(key)
        for later in after[key]:
            before[later] -= 1
            if not before[later]:
                heapq.heappush(ready, (first[later], later))
    return order if len(order) == len(first) else None


def _batches(key: _Key, cursors: Sequence[_Cursor], logical: Logical, step_bytes: int) -> Iterator[list[Piece]]:
    """All fills of a tensor, in slabs of it where they are more than a step."""
    meta = logical.meta(key[0])
    fills = [(n, f, cursor.fills[f]) for n, cursor in enumerate(cursors) for f in cursor.by_key.get(key, ())]
    total = sum(fill.region.size * DTYPES[fill.dtype].itemsize for _, _, fill in fills)

    def piece(number: int, which: int, fill: Fill, region: Region, skipped: int) -> Piece:
        want = Want(meta.name, meta.dtype, meta.shape, region)
        return Piece(number, which, fill.offset + skipped * DTYPES[fill.dtype].itemsize, want, fill.dtype)

    if total <= step_bytes:
        yield [piece(number, which, fill, fill.region, 0) for number, which, fill in fills]
        return
    # Elements that several files have take room in each.
    widest = max(DTYPES[fill.dtype].itemsize for _, _, fill in fills)
    width = max(-(-total // prod(meta.shape)), widest)
    for slab in cut(Box.full(meta.shape), max(step_bytes // _GRAIN // width, 1)):
        found = [(number, which, fill, _common(fill.region, slab, meta.shape)) for number, which, fill in fills]
        batch = [piece(number, which, fill, *part) for number, which, fill, part in found if part is not None]
        if batch:
            yield batch


def _common(region: Region, slab: Box, shape: tuple[int, ...]) -> tuple[Region, int] | None:
    """What a region has of a slab, and how many of its elements come before; a slab is one run of the tensor."""
    if isinstance(region, Box):
        common = region.intersect(slab)
        if common is None:
            return None
        skipped = 0
        for low, origin, extent in zip(common.origin, region.origin, region.shape, strict=True):
            skipped = skipped * extent + low - origin
        return common, skipped
    run = as_flat(shape, slab)
    if run is None:
        return None
    start, stop = max(run.start, region.start), min(run.stop, region.stop)
    return (FlatRange(start, stop - start), start - region.start) if start < stop else None


def _size(piece: Piece) -> int:
    return piece.want.region.size * DTYPES[piece.dtype].itemsize


def _step(pieces: list[Piece], cursors: Sequence[_Cursor]) -> Step:
    nbytes = sum(cursors[piece.file].add(piece.fill, _size(piece)) for piece in pieces)
    return Step(pieces, nbytes, [(number, cursors[number].final()) for number in {piece.file for piece in pieces}])
