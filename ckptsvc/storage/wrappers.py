"""Stores around a store: the same interface, with one behaviour more. They can be put around each other.

    Retrying   tries again what may pass
    Limited    bounds bytes per second and calls in flight
    Measured   reports every call: what, how long, how many bytes, which error
    Faulty     makes chosen calls fail, wait, hang or stop half-way, on purpose

Listings pass through a wrapper whole, so that a call is one call: tried again, measured and failed as one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import NamedTuple, TypeVar

import msgspec
import stamina

from ckptsvc.errors import BY_CODE, CkptsvcError, ConfigError, StoreError
from ckptsvc.storage.api import READ_LIMIT, Capabilities, Entry, Progress, Store
from ckptsvc.storage.arguments import check_target
from ckptsvc.storage.rate import Rate

T = TypeVar("T")


class Wrapper:
    """Passes everything on to `inner`; a subclass overrides `_call`, which every operation goes through."""

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def _call(self, op: str, key: str, nbytes: int, run: Callable[[], T]) -> T:
        """Do one operation.

        Args:
            op: name of the method.
            key: key or prefix, or "".
            nbytes: bytes to move, 0 where that is not known before.
            run: the operation on `inner`; may be called more than once.
        """
        return run()

    @property
    def url(self) -> str:
        """The address of the wrapped store."""
        return self.inner.url

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`."""
        return self._call("capabilities", "", 0, self.inner.capabilities)

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`."""
        self._call("write", key, size, lambda: self.inner.write(key, data, size, ready=ready, progress=progress))

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`."""
        return self._call("put_if_absent", key, len(data), lambda: self.inner.put_if_absent(key, data))

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        return self._call("read", key, 0, lambda: self.inner.read(key, limit))

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`."""
        self._call("read_into", key, buffer.nbytes, lambda: self.inner.read_into(key, offset, buffer))

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return self._call("size", key, 0, lambda: self.inner.size(key))

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`."""
        return iter(self._call("list", prefix, 0, lambda: tuple(self.inner.list(prefix))))

    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        return self._call("children", prefix, 0, lambda: self.inner.children(prefix))

    def delete(self, key: str) -> None:
        """See `Store.delete`."""
        self._call("delete", key, 0, lambda: self.inner.delete(key))

    def close(self) -> None:
        """See `Store.close`."""
        self._call("close", "", 0, self.inner.close)


def innermost(store: Store) -> Store:
    """Return the driver's store inside of all wrappers, for what not every store has (see `Spreading`)."""
    while isinstance(store, Wrapper):
        store = store.inner
    return store


class Retrying(Wrapper):
    """Tries again what failed with an error that says it may pass, after growing, jittered pauses.

    Args:
        inner: the store.
        attempts: how often in all.
        timeout: seconds after which no new attempt begins.
        first_wait: seconds before the second attempt, doubled for each further one.
        longest_wait: upper bound of that.
        on_retry: called with what has failed, before it is tried again.
    """

    def __init__(
        self,
        inner: Store,
        *,
        attempts: int = 6,
        timeout: float = 120.0,
        first_wait: float = 0.2,
        longest_wait: float = 15.0,
        on_retry: Callable[[StoreError], None] = lambda error: None,
    ) -> None:
        super().__init__(inner)
        self._on_retry = on_retry
        self._attempts, self._timeout = attempts, timeout
        self._first_wait, self._longest_wait = first_wait, longest_wait

    def _call(self, op: str, key: str, nbytes: int, run: Callable[[], T]) -> T:
        failed: list[StoreError] = []

        def once() -> T:
            if failed:
                self._on_retry(failed.pop())
            try:
                return run()
            except StoreError as error:
                failed.append(error)
                raise

        for attempt in stamina.retry_context(
            on=_may_pass,
            attempts=self._attempts,
            timeout=self._timeout,
            wait_initial=self._first_wait,
            wait_max=self._longest_wait,
            wait_jitter=self._first_wait,
        ):
            with attempt:
                return once()
        raise AssertionError("the last attempt returns or raises")

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`; bytes written again are not reported again."""
        reported = 0

        def once() -> None:
            written = 0

            def report(nbytes: int) -> None:
                nonlocal written, reported
                written += nbytes
                if progress is not None and written > reported:
                    news, reported = written - reported, written
                    progress(news)

            self.inner.write(key, data, size, ready=ready, progress=report)

        self._call("write", key, size, once)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`; after a lost response the object itself tells who created it."""
        tries = 0

        def once() -> bool:
            nonlocal tries
            tries += 1
            if self.inner.put_if_absent(key, data):
                return True
            return tries > 1 and self.inner.size(key) == len(data) and self.inner.read(key, len(data)) == data

        return self._call("put_if_absent", key, len(data), once)


def _may_pass(error: Exception) -> bool:
    return isinstance(error, StoreError) and error.retryable


class Limited(Wrapper):
    """Bounds what a store is asked for.

    Args:
        inner: the store.
        bytes_per_second: of all reads and writes of objects together; None is no limit. A `Rate` may be shared with
            other stores.
        in_flight: calls at the same time, others wait; None is no limit.
    """

    _STEP = 8 << 20  # bytes read between two looks at the clock

    def __init__(
        self, inner: Store, *, bytes_per_second: float | Rate | None = None, in_flight: int | None = None
    ) -> None:
        super().__init__(inner)
        if in_flight is not None and in_flight <= 0:
            raise ConfigError(f"in_flight is {in_flight}; it must be more than 0")
        self._slots = threading.BoundedSemaphore(in_flight) if in_flight else nullcontext()
        self._rate = bytes_per_second if isinstance(bytes_per_second, Rate) else Rate(bytes_per_second)

    def _call(self, op: str, key: str, nbytes: int, run: Callable[[], T]) -> T:
        with self._slots:
            return run()

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`; the store is held back through `progress`."""

        def held_back(nbytes: int) -> None:
            self._rate.pay(nbytes)
            if progress is not None:
                progress(nbytes)

        super().write(key, data, size, ready=ready, progress=held_back)

    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        content = super().read(key, limit)
        self._rate.pay(len(content))
        return content

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`; reads in steps where there is a rate."""
        if self._rate.limit is None:
            super().read_into(key, offset, buffer)
            return
        with check_target(buffer, offset) as view:
            for start in range(0, len(view) or 1, self._STEP):
                with view[start : start + self._STEP] as part:
                    super().read_into(key, offset + start, part)
                    self._rate.pay(len(part))


Observe = Callable[[str, float, int, Exception | None], None]
"""Is told the operation, its seconds, the bytes it moved or tried to, and the error it ended with, if any."""


class Measured(Wrapper):
    """Tells `observe` about every call, also about those that fail, in the thread that made it."""

    def __init__(self, inner: Store, observe: Observe) -> None:
        super().__init__(inner)
        self._observe = observe

    def _call(self, op: str, key: str, nbytes: int, run: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            result = run()
        except Exception as error:
            self._observe(op, time.perf_counter() - start, nbytes, error)
            raise
        moved = len(result) if isinstance(result, bytes) else nbytes
        self._observe(op, time.perf_counter() - start, moved, None)
        return result


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What shall happen to which calls. The calls that match `op` and `key` are counted from 1.

    Attributes:
        op: name of the operation; "*" and "?" stand for any characters.
        key: key or prefix it is called with; likewise.
        nth: the first matching call it happens to.
        times: how many calls from there on; 0 is all.
        error: code of the error to raise (see `ckptsvc.errors`), or "" for none.
        retryable: whether that error says it may pass; None leaves what its class says. EIO is "store", True.
        delay: seconds to wait first.
        hang: wait, before anything else happens, until `Faulty.release`.
        short: of a `write`, first write only so many bytes.
        lost: first do the operation as asked: only the response is lost.
    """

    op: str = "*"
    key: str = "*"
    nth: int = 1
    times: int = 1
    error: str = ""
    retryable: bool | None = None
    delay: float = 0.0
    hang: bool = False
    short: int | None = None
    lost: bool = False

    def __post_init__(self) -> None:
        if self.error and self.error not in BY_CODE:
            raise ValueError(f"no error has the code {self.error!r}; known: {', '.join(sorted(BY_CODE))}")
        if self.nth < 1 or self.times < 0 or self.delay < 0 or (self.short or 0) < 0:
            raise ValueError("nth is 1 or more; times, delay and short are not negative")
        if (self.lost or self.short is not None) and not self.error:
            raise ValueError("`lost` and `short` end with an error: say which")


def decode_faults(text: str | bytes) -> tuple[Fault, ...]:
    """Return the faults in a JSON array, for a plan that comes through a setting.

    Raises:
        ConfigError: it says what is wrong where.
    """
    try:
        return msgspec.json.decode(text, type=tuple[Fault, ...])
    except msgspec.MsgspecError as error:
        raise ConfigError(f"the plan of faults cannot be read: {error}") from error


class Call(NamedTuple):
    """A call that a `Faulty` store has seen."""

    op: str
    key: str


class Faulty(Wrapper):
    """Does as the plan says to the calls that match it; of several faults that are due, the first.

    Attributes:
        calls: every call so far, in order.
    """

    def __init__(self, inner: Store, plan: Sequence[Fault] = ()) -> None:
        super().__init__(inner)
        self.calls: list[Call] = []
        self._plan = tuple(plan)
        self._seen = [0] * len(self._plan)
        self._lock = threading.Lock()
        self._released = threading.Event()

    def release(self) -> None:
        """Let the calls that hang go on, and let none hang from now on."""
        self._released.set()

    def _call(self, op: str, key: str, nbytes: int, run: Callable[[], T]) -> T:
        return self._meet(self._due(op, key), op, key, run)

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`."""

        def write(nbytes: int) -> None:
            self.inner.write(key, data, nbytes, ready=ready, progress=progress)

        fault = self._due("write", key)
        if fault is None or fault.short is None:
            self._meet(fault, "write", key, lambda: write(size))
        else:
            kept = min(fault.short, size)
            self._meet(fault, "write", key, lambda: write(size), first=lambda: write(kept))

    def _due(self, op: str, key: str) -> Fault | None:
        """Count a call; returns the fault that it meets, if any."""
        due = None
        with self._lock:
            self.calls.append(Call(op, key))
            for position, fault in enumerate(self._plan):
                if not (fnmatchcase(op, fault.op) and fnmatchcase(key, fault.key)):
                    continue
                self._seen[position] += 1
                past = self._seen[position] - fault.nth
                if due is None and past >= 0 and (fault.times == 0 or past < fault.times):
                    due = fault
        return due

    def _meet(
        self,
        fault: Fault | None,
        op: str,
        key: str,
        run: Callable[[], T],
        first: Callable[[], object] | None = None,
    ) -> T:
        """Do what `fault` says to the operation `run`; `first` is what still happens before the error."""
        if fault is None:
            return run()
        if fault.hang:
            self._released.wait()
        time.sleep(fault.delay)
        if not fault.error:
            return run()
        if fault.lost:
            run()
        elif first is not None:
            first()
        error: CkptsvcError = BY_CODE[fault.error](f"fault injected into {op} of {self.url}/{key}")
        if fault.retryable is not None:
            error.retryable = fault.retryable
        raise error
