"""The names of the tensors of an index: a table ordered by hash, searched without making strings of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from ckptsvc.errors import Damaged
from ckptsvc.format import columnar
from ckptsvc.format.columnar import Array, Int64, UInt8, UInt64


def name_hash(name: bytes) -> int:
    """The xxh3_64 of a name."""
    return xxhash.xxh3_64_intdigest(name)


def name_columns(names: Sequence[bytes]) -> dict[str, Array]:
    """The columns of `Columns` that a list of names makes: all names, where each ends, and two hashes of each."""
    return {
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum(np.array([len(name) for name in names], np.uint64), dtype=np.uint64),
        "name_hash": np.array([name_hash(name) for name in names], np.uint64),
        "name_check": np.array([xxhash.xxh3_64_intdigest(name, 1) for name in names], np.uint64),
    }


class Names:
    """The names of n tensors; a row is a tensor.

    Args:
        names: all names, UTF-8, one after the other.
        ends: [n] where each ends.
        hashes: [n] the xxh3_64 of each, ascending.
        what: the name of the file, for messages.

    Raises:
        Damaged: a name is malformed or does not match its hash, or two hashes are equal.
    """

    def __init__(self, names: UInt8, ends: Array, hashes: UInt64, what: str) -> None:
        columnar.check_names(names, ends, f"the tensors of {what}")
        self._names = names
        self._ends = ends.astype(np.int64)
        self._hashes = hashes
        if not (hashes[1:] > hashes[:-1]).all():
            raise Damaged(f"the tensors of {what} are not in the order of their hashes")
        if (np.fromiter(map(name_hash, self), np.uint64, len(hashes)) != hashes).any():
            raise Damaged(f"{what} has a tensor whose name does not match its hash")

    def __len__(self) -> int:
        return len(self._hashes)

    def __iter__(self) -> Iterator[bytes]:
        """All names in order, as bytes."""
        return columnar.split(self._names, self._ends)

    def at(self, row: int) -> str:
        """The name of a tensor."""
        return self._bytes(row).decode()

    def row(self, name: str) -> int:
        """The row of a name, or -1."""
        wanted = _encode(name)
        row = int(self._hashes.searchsorted(np.uint64(name_hash(wanted))))
        # Different names in the table have different hashes, but any name may be asked for.
        return row if row < len(self) and self._bytes(row) == wanted else -1

    def rows(self, names: Sequence[str]) -> Int64:
        """The rows of many names, -1 where there is none."""
        result = np.empty(len(names), np.int64)
        for part in columnar.chunks(len(names)):
            result[part] = self._rows([_encode(name) for name in names[part]])
        return result

    def _rows(self, wanted: list[bytes]) -> Int64:
        hashes = np.fromiter(map(name_hash, wanted), np.uint64, len(wanted))
        rows = self._hashes.searchsorted(hashes)
        some = np.flatnonzero(rows < len(self))
        some = some[self._hashes[rows[some]] == hashes[some]]
        first = np.where(rows[some] > 0, self._ends[rows[some] - 1], 0)
        lengths = self._ends[rows[some]] - first
        found = columnar.split(columnar.gather(self._names, first, lengths), np.cumsum(lengths))
        result = np.full(len(rows), -1, np.int64)
        for i, name in zip(some.tolist(), found, strict=True):
            if wanted[i] == name:
                result[i] = rows[i]
        return result

    def _bytes(self, row: int) -> bytes:
        start = self._ends.item(row - 1) if row else 0
        return self._names[start : self._ends.item(row)].tobytes()


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
