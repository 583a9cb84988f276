"""`s3://`, `gs://`, `az://`: the object stores of Amazon, Google and Azure, and all that speak as they do.

Large objects go up in parts, many at a time, straight from the caller's memory, and come down in ranges into it. A
commit is one small request that the server refuses where the object exists. Nothing is renamed, and nothing on the
way of a save is listed.
"""

from __future__ import annotations

import functools
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, Concatenate, ParamSpec, TypeVar

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput, NotFound, StoreDenied, StoreError, StoreUnavailable
from ckptsvc.storage.api import READ_LIMIT, TEMPORARY_PREFIX, Capabilities, Entry, Progress
from ckptsvc.storage.arguments import check_key, check_prefix, check_record, check_size, check_target
from ckptsvc_drivers.object_clients import Clients, Options, options_from, parse
from ckptsvc_drivers.object_errors import facts_of, translate
from ckptsvc_drivers.object_names import key_of, name_of, upload_of
from ckptsvc_drivers.object_parts import Parts, cut
from ckptsvc_drivers.object_ranges import Ranges
from ckptsvc_drivers.object_uploads import abort, unfinished

FORK_SAFE = False
"""obstore's threads do not survive a fork: calls of a forked child would wait for ever."""

TAKES_TIMEOUT = True
"""The option `timeout` ends a request."""

OPTIONS = Options
"""What `[store.options.SCHEME]` may set."""

_SINGLE = 8 << 20  # bytes; an object up to this size is one request
_RANGE = 8 << 20  # bytes of one request when reading
_READERS = 8  # requests at a time when reading, of all calls together, where no option says
_CHUNK = 256 << 10  # bytes copied at a time: few enough to lie in the cache still
_CLEAN_UP = 5.0  # seconds for each request that cleans up after a failed write


P = ParamSpec("P")
T = TypeVar("T")


def _renewing(method: Callable[Concatenate[ObjectStore, P], T]) -> Callable[Concatenate[ObjectStore, P], T]:
    """Call a method once more where the server refuses the credentials, and others may be there by now."""

    @functools.wraps(method)
    def call(store: ObjectStore, /, *args: P.args, **kwargs: P.kwargs) -> T:
        generation = store._clients.generation
        try:
            return method(store, *args, **kwargs)
        except StoreDenied:
            if not store._renew(generation):
                raise
            return method(store, *args, **kwargs)

    return call


def connect(url: str, options: Mapping[str, object]) -> ObjectStore:
    """Return the store at `s3://bucket/prefix`, `gs://bucket/prefix` or `az://container/prefix`; asks nobody yet.

    Raises:
        ConfigError: the address names no bucket, or an option is unknown or out of range.
    """
    place = parse(url)
    return ObjectStore(Clients(place, options_from(place.url, options)))


class ObjectStore:
    """Objects in a bucket, below a prefix."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients
        self._prefix = clients.place.prefix
        self._ranges = Ranges(clients)
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._found: Capabilities | None = None

    @property
    def url(self) -> str:
        """Scheme, bucket and prefix."""
        return self._clients.place.url

    def close(self) -> None:
        """End the threads and our own connections; obstore's end by themselves."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self._ranges.close()

    def capabilities(self) -> Capabilities:
        """See `Store.capabilities`; whether the server refuses to create twice is tried once for each store object."""
        if self._found is not None:
            return self._found
        key = TEMPORARY_PREFIX + secrets.token_hex(8)
        where = f"object store: {self._clients.endpoint or self._clients.place.scheme}"
        try:
            # There are servers that replace what they were asked to create.
            exclusive = self._create(key, b"1") and not self._create(key, b"2")
        except StoreDenied as error:
            return self._capable(False, where, f"not known: nothing can be written: {error}")
        finally:
            with suppress(StoreError):
                self.delete(key)
        note = () if exclusive else ("the server replaces an object that it was asked to create",)
        self._found = self._capable(exclusive, where, *note)
        return self._found

    def _capable(self, exclusive: bool, *notes: str) -> Capabilities:
        return Capabilities(exclusive_create=exclusive, direct_io="objects are sent over the network", notes=notes)

    def _renew(self, generation: int) -> bool:
        """See `Clients.renew`; what the old credentials have signed goes, too."""
        renewed = self._clients.renew(generation)
        if renewed:
            self._ranges.renew()
        return renewed

    # --- writing --------------------------------------------------------------------------------------------

    def write(
        self, key: str, data: memoryview, size: int, *, ready: Progress | None = None, progress: Progress | None = None
    ) -> None:
        """See `Store.write`; seen by readers when it is whole, not before."""
        reported, generation = 0, self._clients.generation

        def report(nbytes: int) -> None:
            nonlocal reported
            reported += nbytes
            if progress is not None:
                progress(nbytes)

        try:
            self._write(key, data, size, ready, report)
        except StoreDenied:
            if not self._renew(generation) or reported:  # whose memory may be somebody else's by now
                raise
            self._write(key, data, size, ready, report)

    def _write(self, key: str, data: memoryview, size: int, ready: Progress | None, progress: Progress) -> None:
        import obstore

        name = self._name(check_key(key))
        with check_size(data, size) as view:
            options = self._clients.options
            plan = cut(size, options.part, options.connections)
            single = size <= max(_SINGLE, options.part)
            parts = Parts(view, size if single else plan.part, ready, progress)
            try:
                with self._errors(key):
                    if single:
                        part = next(parts) if size else memoryview(b"")
                        obstore.put(self._clients.patient, name, part, use_multipart=False)
                    else:
                        obstore.put(
                            self._clients.patient,
                            name,
                            parts,
                            use_multipart=True,
                            chunk_size=plan.part,
                            max_concurrency=plan.connections,
                        )
                parts.let_go()
                parts.report()
            except BaseException as error:
                parts.let_go()
                if not single:
                    self._abort(key)
                if isinstance(error, NotFound):  # of an upload, after a server has lost its memory
                    what = f"{self.url}/{key}: the server does not know the upload any more, or there is no such bucket"
                    raise StoreUnavailable(what) from None
                raise

    def _abort(self, key: str) -> None:
        """After a failed write: abort its upload if that is quickly done, so that `gc` need not find it."""
        with suppress(StoreError):
            for upload, _ in unfinished(self._clients, key, _CLEAN_UP):
                if upload.key == key:
                    abort(self._clients, upload, _CLEAN_UP)

    def put_if_absent(self, key: str, data: bytes) -> bool:
        """See `Store.put_if_absent`; after a lost answer the object itself tells who created it."""
        check_key(key)
        check_record(data)
        try:
            return self._create(key, data)
        except StoreUnavailable:  # it may have been done all the same
            try:
                return self.read(key, len(data)) == data
            except InvalidInput:
                return False  # longer than ours
            except NotFound:
                pass
            raise

    @_renewing
    def _create(self, key: str, data: bytes) -> bool:
        """One request that creates an object if it is not there; whether it did."""
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        with self._errors(key):
            try:
                obstore.put(self._clients.plain, self._name(key), data, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError) as error:
                if facts_of(error).code == "ConditionalRequestConflict":  # another request is at it, and may yet fail
                    raise StoreUnavailable(f"{self.url}/{key} is being created by somebody else") from None
                return False
        return True

    @_renewing
    def delete(self, key: str) -> None:
        """See `Store.delete`; the key under which `list` shows an unfinished upload aborts it."""
        import obstore

        upload = upload_of(check_key(key))
        if upload is not None:
            abort(self._clients, upload)
            return
        with suppress(NotFound), self._errors(key):
            obstore.delete(self._clients.plain, self._name(key))

    # --- reading --------------------------------------------------------------------------------------------

    @_renewing
    def read(self, key: str, limit: int = READ_LIMIT) -> bytes:
        """See `Store.read`."""
        import obstore

        with self._errors(check_key(key)):
            found = obstore.get(self._clients.plain, self._name(key))
            size = found.meta["size"]
            if size > limit:
                raise InvalidInput(f"{self.url}/{key} has {size} bytes, more than the {limit} allowed")
            content = found.bytes().to_bytes()
        if len(content) != size:
            raise StoreUnavailable(f"{self.url}/{key}: {len(content)} of {size} bytes have come")
        return content

    def read_into(self, key: str, offset: int, buffer: memoryview) -> None:
        """See `Store.read_into`; a large range in several requests at a time."""
        check_key(key)
        with check_target(buffer, offset) as view:
            if not view:
                self.size(key)
                return

            def fetch(start: int) -> None:
                with view[start : start + _RANGE] as part:
                    self._fetch(key, offset + start, part)

            if len(view) <= _RANGE:
                fetch(0)
                return
            futures = [self._readers().submit(fetch, start) for start in range(0, len(view), _RANGE)]
            try:
                for future in futures:
                    future.result()
            finally:
                for future in futures:
                    future.cancel()
                wait(futures)

    @_renewing
    def _fetch(self, key: str, offset: int, view: memoryview) -> None:
        """One range in one request; in another one by obstore, unless the first went well."""
        import obstore

        try:
            if self._ranges.fill(self._name(key), offset, view):
                return
        except TimeoutError:
            raise StoreUnavailable(f"{self.url}/{key}: no answer in time") from None
        done, end = 0, offset + len(view)
        with self._errors(key):
            found = obstore.get(self._clients.plain, self._name(key), options={"range": (offset, end)})
            if found.range != (offset, end):
                raise Damaged(f"{self.url}/{key} ends at byte {found.range[1]}, before {end}")
            for chunk in found.stream(min_chunk_size=_CHUNK):
                if done + len(chunk) <= len(view):
                    view[done : done + len(chunk)] = chunk
                done += len(chunk)
        if done != len(view):
            raise StoreUnavailable(f"{self.url}/{key}: {done} of {len(view)} bytes have come")

    def _readers(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                readers = self._clients.options.connections or _READERS
                self._pool = ThreadPoolExecutor(readers, thread_name_prefix="ckptsvc-object")
            return self._pool

    @_renewing
    def size(self, key: str) -> int:
        """See `Store.size`."""
        import obstore

        with self._errors(check_key(key)):
            return obstore.head(self._clients.plain, self._name(key))["size"]

    # --- listing --------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list`; uploads that nobody has finished are among what is listed (S3)."""
        return self._below(check_prefix(prefix))

    def _below(self, prefix: str) -> Iterator[Entry]:
        pages = self._pages(prefix)
        with self._errors(prefix):
            for chunk in pages:
                for each in chunk:
                    key = key_of(self._prefix, each["path"])
                    if key is not None:
                        yield Entry(key, each["size"], each["last_modified"].timestamp())
        yield from self.unfinished(prefix)

    @_renewing
    def _pages(self, prefix: str) -> Iterator[Any]:
        """A listing as it comes, of which the first page is there."""
        import obstore

        with self._errors(prefix):
            pages = iter(obstore.list(self._clients.plain, self._name(prefix) or None))
            return chain([next(pages, [])], pages)

    def unfinished(self, prefix: str = "") -> Iterator[Entry]:
        """See `storage.unfinished.KeepsUnfinished`."""
        with suppress(StoreDenied):  # who may write objects need not be allowed to list uploads
            for _, entry in unfinished(self._clients, prefix):
                yield entry

    @_renewing
    def children(self, prefix: str = "") -> Sequence[str]:
        """See `Store.children`."""
        import obstore

        with self._errors(check_prefix(prefix)):
            found = obstore.list_with_delimiter(self._clients.plain, self._name(prefix) or None)
            paths = [*found["common_prefixes"], *(each["path"] for each in found["objects"])]
        keys = filter(None, (key_of(self._prefix, path.rstrip("/")) for path in paths))
        names = {key.rpartition("/")[2] for key in keys}
        return sorted(name for name in names if not name.startswith(TEMPORARY_PREFIX))

    def _name(self, key: str) -> str:
        return name_of(self._prefix, key)

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        """Turn an error of obstore into one of ours that names the object; others pass."""
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, FileNotFoundError) as error:
            # not `from error`: its text repeats addresses with signatures
            raise translate(error, f"{self.url}/{key}" if key else self.url) from None
        except CkptsvcError:
            raise
