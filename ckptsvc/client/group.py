"""The ranks of the job as a group for our own few collectives: plain bytes over gloo, no pickle.

Used at attach and restore only, never in a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from ckptsvc.errors import BY_CODE, CkptsvcError, Damaged


class Group(Protocol):
    """What a restore needs of the job's ranks."""

    rank: int
    size: int

    def all_gather(self, data: bytes) -> list[bytes]:
        """Everybody's bytes, by rank."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's bytes."""

    def all_true(self, value: bool) -> bool:
        """Whether it is true everywhere."""

    def send(self, data: memoryview, to: int) -> Any:
        """Begin to send; the data must stay until `wait()` of what is returned."""

    def receive(self, into: memoryview, source: int) -> Any:
        """Begin to receive exactly that many bytes."""


class Alone:
    """A group of one."""

    rank, size = 0, 1

    def all_gather(self, data: bytes) -> list[bytes]:
        """See Group."""
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        """See Group."""
        return data

    def all_true(self, value: bool) -> bool:
        """See Group."""
        return value

    def send(self, data: memoryview, to: int) -> Any:
        """There is nobody to send to."""
        raise AssertionError("a group of one sends nothing")

    def receive(self, into: memoryview, source: int) -> Any:
        """There is nobody to receive from."""
        raise AssertionError("a group of one receives nothing")


class GlooGroup:
    """All ranks of the default process group, over a gloo group of our own.

    Its messages cannot meet the training's, and they travel in CPU memory whatever the training's back end is.
    """

    def __init__(self) -> None:
        self._pg: Any = dist.new_group(backend="gloo")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()

    def all_gather(self, data: bytes) -> list[bytes]:
        """See Group."""
        mine = torch.tensor([len(data)])
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(lengths, mine, group=self._pg)
        longest = max(int(n) for n in lengths)
        if longest == 0:
            return [b""] * self.size
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = _bytes_tensor(data)
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(found, padded, group=self._pg)
        return [t[: int(n)].numpy().tobytes() for t, n in zip(found, lengths, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        """See Group."""
        length = torch.tensor([len(data)])
        dist.broadcast(length, 0, group=self._pg)
        body = _bytes_tensor(data) if self.rank == 0 else torch.empty(int(length), dtype=torch.uint8)
        if int(length):
            dist.broadcast(body, 0, group=self._pg)
        return body.numpy().tobytes()

    def all_true(self, value: bool) -> bool:
        """See Group."""
        flag = torch.tensor([int(value)])
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self._pg)
        return bool(flag)

    def send(self, data: memoryview, to: int) -> Any:
        """See Group."""
        return dist.isend(torch.frombuffer(data, dtype=torch.uint8), to, group=self._pg)

    def receive(self, into: memoryview, source: int) -> Any:
        """See Group."""
        return dist.irecv(torch.frombuffer(into, dtype=torch.uint8), source, group=self._pg)


def _bytes_tensor(data: bytes) -> torch.Tensor:
    if not data:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_numpy(np.frombuffer(bytearray(data), dtype=np.uint8))


def the_group() -> Group:
    """The group of all ranks, or of this process alone where nothing is distributed."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return GlooGroup()
    return Alone()


def gather_rows(group: Group, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Sequence[np.ndarray[Any, Any]]:
    """Everybody's table of int64 rows of equal width, by rank."""
    width = rows.shape[1]
    return [np.frombuffer(data, np.int64).reshape(-1, width) for data in group.all_gather(rows.tobytes())]


@contextlib.contextmanager
def together(group: Group) -> Iterator[None]:
    """A step that every rank takes on its own, and that all pass or all fail: with the lowest failing rank's error.

    Without this a rank that fails would leave, and the others wait for it in the next collective.
    """
    failure: CkptsvcError | None = None
    try:
        yield
    except CkptsvcError as error:
        failure = error
    except Exception as error:  # noqa: BLE001  the others wait, whatever it was
        failure = Damaged(f"{type(error).__name__}: {error}")
    if group.size == 1:
        if failure is not None:
            raise failure
        return
    told = [failure.code, failure.what, failure.hint] if failure else []
    for rank, data in enumerate(group.all_gather(msgspec.json.encode(told))):
        if data != b"[]":
            code, what, hint = msgspec.json.decode(data, type=tuple[str, str, str])
            raise BY_CODE.get(code, CkptsvcError)(what if rank == group.rank else f"rank {rank}: {what}", hint=hint)
