"""Tasks -> files: read in windows, cast, put where it belongs, written behind.

    steps --plan_windows--> windows --read, verify--> pieces --cast--> streams --Store.write--> files

Windows are planned step by step while earlier ones are read, and a step is let in only when there is memory for it.
Steps become final in their order, so every file grows from its beginning; files that share source bytes grow together.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ckptsvc.errors import InvalidInput
from ckptsvc.format.checksum import Digests
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.reshard import View
from ckptsvc.interop.conversion.casts import cast_into
from ckptsvc.interop.conversion.stream import Gate, StoppedError, Stream
from ckptsvc.interop.conversion.tasks import LEAST_BLOCK, MOST_BLOCK, Group, Step, Task, least, split, steps
from ckptsvc.interop.logical import Logical
from ckptsvc.pipeline.read import (
    READERS,
    Source,
    Window,
    deliver,
    fill,
    held,
    place_of,
    plan_windows,
    verify,
    window_buffer,
    window_bytes,
)
from ckptsvc.storage import Store

MAX_OPEN = 256
"""Most files that are being written at a time: the last bytes of small ones are synced side by side."""

_CASTING = 12 << 20  # bytes of temporary arrays while a thread casts (see casts.BLOCK)
_STEP = 64 << 20
_SIDE_BY_SIDE = 256  # blocks that fit in what is held: so 14 files can advance side by side (see tasks.least)


class Budget(NamedTuple):
    """How the memory of a conversion is divided, in bytes.

    Attributes:
        readers: windows that are read at a time.
        edges: kept of what was read, because neighbours may need it.
        held: of files, filled and not yet written.
        step: of files, that are read for at a time.
        block: that the driver is to write at a time, where it can be told.
    """

    readers: int
    edges: int
    held: int
    step: int
    block: int

    @classmethod
    def of(cls, memory: int, extent: int) -> Budget:
        """Divide `memory` bytes where a digest stands for `extent` bytes.

        Raises:
            InvalidInput: it is too little for anything.
        """
        window = window_bytes(extent)
        readers = min(max(memory // (8 * (window + _CASTING)), 1), READERS)
        edges = min(memory // 8, 256 << 20)
        held = memory - edges - (readers + 1) * (window + _CASTING)
        if held < 2 * least(None, LEAST_BLOCK):
            enough = ((2 * (window + _CASTING) + 2 * least(None, LEAST_BLOCK)) * 8 // 7 >> 20) + 1
            raise InvalidInput(
                f"{max(memory, 0) >> 20} MiB are too little memory for a conversion",
                hint=f"beside the program itself it needs {enough} MiB: give --memory more",
            )
        block = LEAST_BLOCK
        while block < MOST_BLOCK and 2 * block * _SIDE_BY_SIDE <= held:
            block *= 2
        return cls(readers, edges, held, min(max(held // 8, 1 << 20), _STEP), block)


class EdgeCache:
    """A source that keeps the first and last extents of what was read: neighbours in them are wanted soon.

    Attributes:
        nbytes: bytes read from the source below.
    """

    def __init__(self, inner: Source, extent: int, limit: int) -> None:
        self._inner, self._extent, self._limit = inner, extent, limit
        self._kept: OrderedDict[tuple[int, int], bytes] = OrderedDict()
        self._lock = threading.Lock()
        self._size = 0
        self.nbytes = 0
        self.size, self.digests, self.name, self.view = inner.size, inner.digests, inner.name, inner.view

    def read_into(self, shard: int, offset: int, buffer: memoryview) -> None:
        """See pipeline.read.Source; ranges begin where an extent does."""
        first = offset // self._extent
        last = (offset + len(buffer) - 1) // self._extent
        low, high = 0, len(buffer)
        if self._given(shard, first, buffer[: self._extent]):
            low = min(self._extent, high)
        at = (last - first) * self._extent
        if low < high and last > first and self._given(shard, last, buffer[at:]):
            high = at
        if low < high:
            self._inner.read_into(shard, offset + low, buffer[low:high])
            with self._lock:
                self.nbytes += high - low
            if low == 0:
                self._keep(shard, first, buffer[: self._extent])
            if high == len(buffer) and last > first:
                self._keep(shard, last, buffer[at:])

    def _given(self, shard: int, extent: int, part: memoryview) -> bool:
        with self._lock:
            data = self._kept.get((shard, extent))
            if data is None or len(data) != len(part):
                return False
            self._kept.move_to_end((shard, extent))
        part[:] = data
        return True

    def _keep(self, shard: int, extent: int, part: memoryview) -> None:
        if len(part) > self._limit:
            return
        data = bytes(part)
        with self._lock:
            self._size += len(data) - len(self._kept.pop((shard, extent), b""))
            self._kept[shard, extent] = data
            while self._size > self._limit:
                self._size -= len(self._kept.popitem(last=False)[1])


Done = Callable[[Task, Mapping[str, Digests]], None]
"""Is told when all files of a task are durable, in the thread that wrote the last one."""


class _Filling:
    """A step while it is read."""

    def __init__(self, step: Step, streams: Sequence[Stream], infinite: Counter[str]) -> None:
        self.streams, self.finals = streams, step.finals
        self.missing = 0
        self.complete = False
        self._pieces, self._infinite = step.pieces, infinite

    def put(self, target: int, place: View, source: NDArray[Any]) -> None:
        """See pipeline.read.Sink."""
        piece = self._pieces[target]
        region = piece.want.region
        array = self.streams[piece.file].array(piece.offset, piece.dtype, region.size)
        if isinstance(region, Box):
            array = array.reshape(region.shape)
        there = place_of(array, region, place)
        if piece.dtype == piece.want.dtype:
            there[...] = source
            return
        try:
            infinite = cast_into(there, source, piece.dtype, piece.want.dtype)
        except InvalidInput as error:
            raise InvalidInput(f"{piece.want.name}: {error.what}") from None
        if infinite:
            self._infinite[piece.want.name] += infinite


class Production:
    """Makes the files of tasks in a store.

    Args:
        logical: where the tensors come from.
        store: where the files go.
        budget: of memory.
        progress: called with the bytes written since the last call, from several threads.
        done: see `Done`.

    Attributes:
        infinite: by tensor, how many finite values became infinite in a cast.
    """

    def __init__(
        self, logical: Logical, store: Store, budget: Budget, progress: Callable[[int], None], done: Done
    ) -> None:
        self._logical, self._store, self._budget = logical, store, budget
        self._progress, self._done = progress, done
        self._gate = Gate(
            max(budget.held - budget.step, budget.step)
        )  # where all are stuck, a step is let in beyond it
        self._source = EdgeCache(logical.source, logical.extent, budget.edges)
        self._planning = threading.Lock()
        self._reading = threading.Semaphore(budget.readers)
        self._begun: deque[_Filling] = deque()
        self._streams: list[Stream] = []
        self._windows: Iterator[tuple[_Filling, Window]] = iter(())
        self.infinite: Counter[str] = Counter()

    @property
    def bytes_read(self) -> int:
        """Bytes read from the source so far."""
        return self._source.nbytes

    @property
    def most_held(self) -> int:
        """The most bytes of files that were in memory at a time."""
        return self._gate.most

    def run(self, tasks: Iterable[Task]) -> None:
        """Make all files of these tasks, each asked for when its turn comes.

        Raises:
            CkptsvcError: what failed first; files of tasks that were not reported done may be there in part.
        """
        self._windows = self._plan(tasks)
        count = self._budget.readers + 1
        pool = ThreadPoolExecutor(count, thread_name_prefix="ckptsvc-read")
        try:
            with pool:
                try:
                    for future in [pool.submit(self._work) for _ in range(count)]:
                        future.result()
                except BaseException as error:  # an interrupt from the keyboard
                    self._gate.fail(error)
                    raise
        finally:
            for stream in self._streams:
                stream.join()
        if self._gate.error:
            raise self._gate.error

    def _work(self) -> None:
        buffer: memoryview | None = None
        extent, source = self._logical.extent, self._source
        try:
            while (found := self._next()) is not None:
                filling, window = found
                filled = held(window, source, extent)
                if filled is None:
                    filled = buffer = buffer or window_buffer(extent)
                    with self._reading:
                        fill(window, window.mask, source, extent, filled)
                    verify(window, window.mask, source, extent, filled)
                deliver(window, filled, filling.put)
                self._delivered(filling, len(window.pieces))
        except StoppedError:
            pass
        except BaseException as error:  # noqa: BLE001  told by `run`
            self._gate.fail(error)

    def _next(self) -> tuple[_Filling, Window] | None:
        with self._planning:
            return None if self._gate.error else next(self._windows, None)

    def _delivered(self, filling: _Filling, pieces: int) -> None:
        """Note pieces that are there, and publish the steps that are complete, in their order."""
        with self._gate.changed:
            filling.missing -= pieces
            filling.complete = filling.missing == 0
            while self._begun and self._begun[0].complete:
                first = self._begun.popleft()
                for number, final in first.finals:
                    first.streams[number].publish(final)
                self._gate.unpublished -= 1
            self._gate.changed.notify_all()

    # ---- planning, in the thread that wants the next window -------------------------------------------------

    def _plan(self, tasks: Iterable[Task]) -> Iterator[tuple[_Filling, Window]]:
        for task in tasks:
            left = _Left(task, self._done)
            for group in task.groups:
                for part in split(group, self._budget.held // 2, self._budget.block):
                    yield from self._plan_group(part, left)

    def _plan_group(self, group: Group, left: _Left) -> Iterator[tuple[_Filling, Window]]:
        self._streams = [stream for stream in self._streams if not stream.ended]
        streams = [Stream(file, self._gate, self._store, self._progress) for file in group]
        opened: set[int] = set()
        for number, stream in enumerate(streams):
            if all(fill.region.is_empty for fill in stream.file.fills):
                self._gate.take(stream.file.nbytes)
                self._open(stream, left)
                opened.add(number)
                with self._gate.changed:
                    stream.publish(stream.file.nbytes)
                    self._gate.unpublished -= 1
                    self._gate.changed.notify_all()
        for step in steps(group, self._logical, self._budget.step):
            windows = plan_windows(self._logical, [piece.want for piece in step.pieces])
            self._gate.take(step.nbytes)
            for number, _ in step.finals:
                if number not in opened:
                    opened.add(number)
                    self._open(streams[number], left)
            filling = _Filling(step, streams, self.infinite)
            filling.missing = sum(len(window.pieces) for window in windows.values())
            with self._gate.changed:
                self._begun.append(filling)
            for key in sorted(windows):
                yield filling, windows[key]

    def _open(self, stream: Stream, left: _Left) -> None:
        self._gate.room(MAX_OPEN)
        self._streams.append(stream)
        stream.open(left.written)


class _Left:
    """The files of a task that are not written yet."""

    def __init__(self, task: Task, done: Done) -> None:
        self._task, self._done = task, done
        self._lock = threading.Lock()
        self._count = len(task.files)
        self._digests: dict[str, Digests] = {}

    def written(self, stream: Stream) -> None:
        """A file is durable; the last one makes the task done."""
        with self._lock:
            self._digests[stream.file.key] = stream.digests
            self._count -= 1
            last = not self._count
        if last:
            self._done(self._task, self._digests)
