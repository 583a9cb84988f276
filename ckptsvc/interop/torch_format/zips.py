"""Zip archives of other frameworks: a range of a file as a stream for `zipfile`, and where a member's data begins."""

from __future__ import annotations

import io
from typing import IO, Any

from ckptsvc.errors import Damaged
from ckptsvc.interop.files import Files


class FileRange(io.RawIOBase):
    """A range of a file for `zipfile`, which seeks to the end first."""

    def __init__(self, files: Files, key: str, start: int, length: int) -> None:
        self._files, self._key, self._start, self._length, self._at = files, key, start, length, 0

    # ruff: noqa: D102  see io.RawIOBase

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._at, self._length)[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self._length - self._at), 0)
        if count:
            self._files.read_into(self._key, self._start + self._at, view[:count])
        self._at += count
        return count


def data_offset(stream: IO[bytes], header: int, what: str) -> int:
    """Where a member's data begins: after its local header, whose extra field pads it (PKZIP APPNOTE 4.3.7)."""
    stream.seek(header)
    local = stream.read(30)
    if len(local) != 30 or local[:4] != b"PK\x03\x04":
        raise Damaged(f"{what} has a broken zip header at byte {header}")
    return header + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
