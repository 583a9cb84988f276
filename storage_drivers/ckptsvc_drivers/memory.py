"""`memory://NAME`: objects in this process, shared by everything in it that connects to the same name.

The twin of the real stores for tests and trials. Nothing outlives the process.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import msgspec

from ckptsvc.errors import ConfigError, Damaged, InvalidInput, NotFound, StoreFull
from ckptsvc.storage.api import READ_LIMIT, TEMPORARY_PREFIX, Capabilities, Entry, Progress
from ckptsvc.storage.arguments import (
    check_key,
    check_prefix,
    check_record,
    check_size,
    check_target,
)

_BLOCK = 8 << 20  # bytes copied between two calls of `progress`


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of a `memory://` store.

    Attributes:
        capacity: bytes it may hold, so that a full store can be tried; None is no limit.
    """

    capacity: Annotated[int, msgspec.Meta(ge=0)] | None = None


OPTIONS = Options
"""What `[store.options.SCHEME]` may set."""


@dataclass(slots=True)
class _Space:
    """What lies under one name."""

    objects: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)


_SPACES: dict[str, _Space] = {}


def connect(url: str, options: Mapping[str, object]) -> MemoryStore:
    """Return the store of that name, the same objects for every caller in this process.

    Raises:
        ConfigError: no name, or an option is unknown or out of range.
    """
    name = url.removeprefix("memory://")
    if name == url or not re.fullmatch(r"[\w./-]{1,200}", name, re.ASCII):
        raise ConfigError(f"{url!r} does not name a memory store", hint="write memory://NAME")
    try:
        settings = msgspec.convert(dict(options), Options, strict=False)
    except msgspec.ValidationError as error:
        raise ConfigError(f"options of {url}: {error}") from error
    return MemoryStore(name, settings)


class MemoryStore:
    """Objects in a dictionary."""

    def __init__(self, name: str, options: Options = Options()) -> None:  # noqa: B008 (frozen)
        self._name = name
        self._capacity = options.capacity
        self._space = _SPACES.setdefault(name, _Space())

    @property
    def url(self) -> str:
        """`memory://` and the name."""
        return f"memory://{self._name}"

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`."""
        return Capabilities(
            exclusive_create=True,
            direct_io="objects live in the memory of this process",
            local=True,
            notes=("nothing outlives the process",),
        )

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`."""
        check_key(key)
        content = bytearray()
        with check_size(data, size) as view:
            for start in range(0, size, _BLOCK):
                if ready is not None:
                    ready(min(start + _BLOCK, size))
                content += view[start : start + _BLOCK]
                if progress is not None:
                    progress(min(_BLOCK, size - start))
        with self._space.lock:
            self._store(key, bytes(content))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`."""
        check_key(key)
        check_record(data)
        with self._space.lock:
            if key in self._space.objects:
                return False
            self._store(key, bytes(data))
            return True

    def _store(self, key: str, content: bytes) -> None:
        if self._capacity is not None:
            others = sum(len(held) for name, (held, _) in self._space.objects.items() if name != key)
            if others + len(content) > self._capacity:
                raise StoreFull(f"{self.url}/{key}: no space left", hint=f"capacity is {self._capacity} bytes")
        self._space.objects[key] = (content, time.time())

    def _content(self, key: str) -> bytes:
        try:
            return self._space.objects[check_key(key)][0]
        except KeyError:
            raise NotFound(f"{self.url}/{key}: no such object") from None

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        content = self._content(key)
        if len(content) > limit:
            raise InvalidInput(f"{self.url}/{key} has {len(content)} bytes, more than the {limit} allowed here")
        return content

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        content = self._content(key)
        with check_target(buffer, offset) as view:
            end = offset + len(view)
            if end > len(content):
                raise Damaged(f"{self.url}/{key} ends at byte {len(content)}, before {end}")
            view[:] = memoryview(content)[offset:end]

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return len(self._content(key))

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        start = f"{check_prefix(prefix)}/" if prefix else ""
        with self._space.lock:
            keys = [key[len(start) :] for key in self._space.objects if key.startswith(start)]
        names = {key.partition("/")[0] for key in keys}
        return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        start = f"{check_prefix(prefix)}/" if prefix else ""
        with self._space.lock:
            held = [(key, len(content), at) for key, (content, at) in self._space.objects.items()]
        return (Entry(*each) for each in held if each[0].startswith(start))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        with self._space.lock:
            self._space.objects.pop(check_key(key), None)

    def close(self) -> None:
        """Nothing to give back; the objects stay for others under the same name."""
