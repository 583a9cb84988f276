"""Zip archives as files of tensors: the plan of a new one.

Members are stored, never compressed. Source: PKZIP APPNOTE 6.3.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

from ckptsvc.interop.outputs import Crc, Fill, OutputFile

ALIGNMENT = 64
"""Data of members begin at multiples of this, as torch's own do; `torch.load(mmap=True)` needs it."""

_ZIP64 = 0xFFFFFFFF


class ArchivePlan:
    """Lays out a file: sizes are known before, CRCs of tensors only after they were written.

    Members with tensors therefore have their CRC behind the data (APPNOTE 4.3.9, general purpose bit 3) and in the
    central directory at the end of the file.
    """

    def __init__(self) -> None:
        self._at = 0
        self._fixed: list[tuple[int, bytes]] = []
        self._fills: list[Fill] = []
        self._crcs: list[Crc] = []
        self._directory: list[tuple[str, int, int, int, int | None]] = []  # name, header, size, flags, crc
        self._waiting: list[tuple[int, int, int, int]] = []  # entry, first byte, size, place of the descriptor's CRC

    def member(self, name: str, data: bytes) -> None:
        """A member whose bytes are known."""
        self._header(name, len(data), 0, zlib.crc32(data))
        self._put(data)

    def filled(self, name: str, size: int, fills: Sequence[Fill], prefix: bytes = b"") -> None:
        """A member of `prefix` and `size` bytes of tensors; the fills' offsets count from the end of the prefix."""
        total = len(prefix) + size
        self._header(name, total, 8, 0)
        start = self._at
        if prefix:
            self._put(prefix)
        self._fills.extend(fill._replace(offset=self._at + fill.offset) for fill in fills)
        self._at += size
        self._waiting.append((len(self._directory) - 1, start, total, self._at + 4))
        self._put(struct.pack("<4sIQQ" if total >= _ZIP64 else "<4sIII", b"PK\x07\x08", 0, total, total))

    def output(self, key: str, rank: int = 0) -> OutputFile:
        """The plan of the whole file."""
        first = self._at
        places: dict[int, int] = {}
        for number, (name, header, size, flags, crc) in enumerate(self._directory):
            places[number] = self._at + 16
            self._put(_central(name.encode(), header, size, flags, crc or 0))
        for number, start, size, descriptor in self._waiting:
            self._crcs.append(Crc(start, size, (descriptor, places[number])))
        self._put(_end_of_directory(len(self._directory), first, self._at - first))
        return OutputFile(key, self._at, self._fixed, self._fills, self._crcs, rank)

    def _put(self, data: bytes) -> None:
        self._fixed.append((self._at, data))
        self._at += len(data)

    def _header(self, name: str, size: int, flags: int, crc: int) -> None:
        encoded = name.encode()
        large = size >= _ZIP64
        extra = struct.pack("<HHQQ", 1, 16, size, size) if large else b""
        short = self._at + 30 + len(encoded) + len(extra) + 4
        padding = -short % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (45 if large else 20, flags, 0, 0, 0x21, crc, *((_ZIP64,) * 2 if large else (size,) * 2))
        self._directory.append((name, self._at, size, flags, None if flags & 8 else crc))
        self._put(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fields, len(encoded), len(extra)) + encoded + extra)


def _central(name: bytes, header: int, size: int, flags: int, crc: int) -> bytes:
    """An entry of the central directory (APPNOTE 4.3.12), ZIP64 fields only where needed."""
    wide = (*((size, size) if size >= _ZIP64 else ()), *((header,) if header >= _ZIP64 else ()))
    extra = struct.pack(f"<HH{len(wide)}Q", 1, 8 * len(wide), *wide) if wide else b""
    version, size32 = (45 if wide else 20), min(size, _ZIP64)
    head = (b"PK\x01\x02", version, version, flags, 0, 0, 0x21, crc, size32, size32)
    return (
        struct.pack("<4sHHHHHHIII", *head)
        + struct.pack("<HHHHHII", len(name), len(extra), 0, 0, 0, 0, min(header, _ZIP64))
        + name
        + extra
    )


def _end_of_directory(count: int, start: int, size: int) -> bytes:
    end = b""
    if count >= 0xFFFF or start >= _ZIP64 or size >= _ZIP64:  # APPNOTE 4.3.14 and 4.3.15
        end = struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, start)
        end += struct.pack("<4sIQI", b"PK\x06\x07", 0, start + size, 1)
    few = min(count, 0xFFFF)
    return end + struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, few, few, min(size, _ZIP64), min(start, _ZIP64), 0)
