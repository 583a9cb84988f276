"""The systems that `ckptsvc bench store` compares: they write a piece of shared memory as an object, and read it back.

    ckptsvc   the driver, as the agent and a restore use it
    raw       the bare client with many connections, or the bare system calls: the limit of server or device
    others    what people use otherwise

Credentials and endpoints come from the environment, as each library takes them by itself.
"""

from __future__ import annotations

import importlib
import math
import os
import ssl
import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ckptsvc.cli.store_probe.load import connect_as_set, make_cold
from ckptsvc.errors import ConfigError
from ckptsvc.storage import Store

BLOCK = 8 << 20
"""Bytes of one raw write or read, and of one request to a server."""

PART = 16 << 20
"""Bytes of a part of a raw multipart upload."""

TENSORS = 16
"""Into which DCP's checkpoint is divided."""


class System(ABC):
    """One way to move bytes.

    Args:
        url: of a folder of its own, in the store; objects have a whole number of pages.
        connections: how many threads or connections a raw client uses.

    Attributes:
        note: how it does it, for people.
    """

    note = ""

    def __init__(self, url: str, connections: int) -> None:
        self.url, self.connections = url.rstrip("/"), connections

    def setup(self, source: memoryview, target: memoryview) -> None:
        """Import what is needed, and open what can be kept open. ImportError, ConfigError: it is not to be had."""
        self.source, self.target = source, target

    def describe(self) -> None:
        """Say how it does it in `note`, after an object was written; this is not measured."""
        self.note = self.note or type(self).__name__

    @abstractmethod
    def write(self, name: str) -> None:
        """Write the source; on return it is durable."""

    @abstractmethod
    def read(self, name: str) -> None:
        """Read the whole object into the target."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove it."""

    def cool(self, name: str) -> None:
        """Before a read that is to be cold."""
        if self.url.startswith("file://"):
            folder = Path(self.url.removeprefix("file://"))
            _evict(sorted(p for p in folder.rglob(f"{name}*") if p.is_file()) + sorted(folder.glob(f"{name}/*")))


class Ours(System):
    """The driver."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        self._store: Store = connect_as_set(self.url)

    def write(self, name: str) -> None:
        """See System."""
        self._store.write(name, self.source, len(self.source))

    def describe(self) -> None:
        """See System."""
        self.note = self.note or self._store.capabilities().direct_io or "direct I/O"

    def read(self, name: str) -> None:
        """See System."""
        self._store.read_into(name, 0, self.target)

    def delete(self, name: str) -> None:
        """See System."""
        self._store.delete(name)

    def cool(self, name: str) -> None:
        """See System."""
        make_cold(self._store, [name])


class RawFile(System):
    """System calls: O_DIRECT from several threads into reserved space, fsync; read likewise, or by one buffered run."""

    note = "O_DIRECT, preallocated, fsync"

    def _path(self, name: str) -> Path:
        return Path(self.url.removeprefix("file://"), name)

    def write(self, name: str) -> None:
        """See System."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._write(path, os.O_DIRECT)
        except OSError:
            self.note = "buffered (no O_DIRECT here), preallocated, fsync"
            self._write(path, 0)

    def _write(self, path: Path, flag: int) -> None:
        with suppress(FileNotFoundError):
            path.unlink()
        size = len(self.source)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | flag, 0o600)
        try:
            importlib.import_module("ckptsvc_drivers.linux").fallocate(fd, size)
            self._all(os.pwritev, fd, self.source)
            os.fsync(fd)
        finally:
            os.close(fd)

    def read(self, name: str) -> None:
        """See System."""
        fd = os.open(self._path(name), os.O_RDONLY | os.O_DIRECT)
        try:
            self._all(os.preadv, fd, self.target)
        finally:
            os.close(fd)

    def _all(self, call: Any, fd: int, memory: memoryview) -> None:
        def one(start: int) -> None:
            end = min(start + BLOCK, len(memory))
            while start < end:
                start += call(fd, [memory[start:end]], start)

        with ThreadPoolExecutor(self.connections) as pool:
            list(pool.map(one, range(0, len(memory), BLOCK)))

    def delete(self, name: str) -> None:
        """See System."""
        self._path(name).unlink(missing_ok=True)


class RawFileBuffered(RawFile):
    """The same through the page cache, in one run: on some devices the faster way to read."""

    note = "buffered, one run, fsync"

    def write(self, name: str) -> None:
        """See System."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(self.source), BLOCK):
                file.write(self.source[start : start + BLOCK])
            os.fsync(file.fileno())

    def read(self, name: str) -> None:
        """See System."""
        with self._path(name).open("rb", buffering=0) as file:
            start = 0
            while start < len(self.target):
                got = file.readinto(self.target[start : start + BLOCK])
                if not got:
                    raise EOFError(name)
                start += got


class RawObstore(System):
    """obstore, with parts of one size and many of them at a time."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        self._obstore = importlib.import_module("obstore")
        from_url = importlib.import_module("obstore.store").from_url
        http = {"allow_http": True, "timeout": "600s"}
        unsigned = {"unsigned_payload": True} if self.url.startswith("s3://") else {}
        self._store = from_url(self.url, client_options=http, **unsigned)
        self._pool = ThreadPoolExecutor(self.connections)
        self.note = f"{self.connections} connections"

    def write(self, name: str) -> None:
        """See System."""
        self._obstore.put(self._store, name, self.source, use_multipart=True, chunk_size=PART,
            max_concurrency=self.connections)  # fmt: skip

    def read(self, name: str) -> None:
        """See System."""

        def part(start: int) -> None:
            end = min(start + BLOCK, len(self.target))
            got = self._obstore.get_range(self._store, name, start=start, end=end)
            self.target[start:end] = memoryview(got)

        list(self._pool.map(part, range(0, len(self.target), BLOCK)))

    def delete(self, name: str) -> None:
        """See System."""
        self._obstore.delete(self._store, name)


class RawBoto(System):
    """boto3: parts uploaded by threads of our own, ranges read straight into memory."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        boto3, config = importlib.import_module("boto3"), importlib.import_module("botocore.config").Config
        when = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
        more = {"signature_version": "s3v4", "retries": {"max_attempts": 0}}
        self._client = boto3.client("s3", config=config(max_pool_connections=self.connections, **more, **when))
        self._bucket, _, self._prefix = self.url.removeprefix("s3://").partition("/")
        self._pool = ThreadPoolExecutor(self.connections)
        self.note = f"{self.connections} connections"

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{self._prefix}/{name}".lstrip("/")}

    def write(self, name: str) -> None:
        """See System."""
        where = self._where(name)
        upload = self._client.create_multipart_upload(**where)["UploadId"]

        def part(number: int) -> dict[str, Any]:
            body = self.source[number * PART : (number + 1) * PART]
            return {"PartNumber": number + 1, "ETag": self._put({**where, "UploadId": upload}, number + 1, body)}

        parts = list(self._pool.map(part, range(math.ceil(len(self.source) / PART))))
        self._client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": parts})

    def _put(self, where: dict[str, str], number: int, body: memoryview) -> str:
        """Send a part; its ETag."""
        answer = self._client.upload_part(**where, PartNumber=number, Body=bytes(body))
        return str(answer["ETag"])

    def read(self, name: str) -> None:
        """See System."""
        where = self._where(name)

        def part(start: int) -> None:
            end = min(start + BLOCK, len(self.target))
            body = self._get(where, f"bytes={start}-{end - 1}")
            while start < end:
                got = body.readinto(self.target[start:end])
                if not got:
                    raise EOFError(name)
                start += got
            body.read()  # nothing, but then the connection can be used again

        list(self._pool.map(part, range(0, len(self.target), BLOCK)))

    def _get(self, where: dict[str, str], wanted: str) -> Any:
        """Ask for a range; where its bytes can be read."""
        return self._client.get_object(**where, Range=wanted)["Body"]._raw_stream

    def delete(self, name: str) -> None:
        """See System."""
        self._client.delete_object(**self._where(name))


class RawHttp(RawBoto):
    """Bare HTTP requests, to addresses that boto3 has signed: nothing lies between memory and sockets but TLS."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        self._mine = threading.local()
        self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))

    def _put(self, where: dict[str, str], number: int, body: memoryview) -> str:
        answer = self._ask("PUT", "upload_part", {**where, "PartNumber": number}, body, {})
        answer.read()
        return answer.headers["ETag"]

    def _get(self, where: dict[str, str], wanted: str) -> Any:
        return self._ask("GET", "get_object", where, None, {"Range": wanted})

    def _ask(
        self, method: str, operation: str, parameters: dict[str, Any], body: memoryview | None, headers: dict[str, str]
    ) -> HTTPResponse:
        address = urlsplit(self._client.generate_presigned_url(operation, Params=parameters))
        connection: HTTPConnection | None = getattr(self._mine, "connection", None)
        if connection is None:
            host, port = address.hostname or "", address.port
            secure = address.scheme == "https"
            connection = HTTPSConnection(host, port, context=self._tls) if secure else HTTPConnection(host, port)
            self._mine.connection = connection
        connection.request(method, f"{address.path}?{address.query}", body=body, headers=headers)
        answer = connection.getresponse()
        if answer.status >= 300:
            raise OSError(f"{operation}: the server answers {answer.status}")
        return answer


class Fsspec(System):
    """fsspec with its own file system for the scheme (s3fs for S3), as one would write it."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        fsspec = importlib.import_module("fsspec")
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if self.url.startswith("s3://"):
            when = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
            options["config_kwargs"] = when
        self._fs, self._path = fsspec.core.url_to_fs(self.url, **options)
        self.note = type(self._fs).__name__

    def write(self, name: str) -> None:
        """See System."""
        path = f"{self._path}/{name}"
        if self.url.startswith("file://"):  # pipe_file would copy all of it first
            self._fs.makedirs(self._path, exist_ok=True)
            with self._fs.open(path, "wb") as file:
                file.write(self.source)
                file.flush()
                os.fsync(file.fileno())
        else:
            self._fs.pipe_file(path, bytes(self.source))

    def read(self, name: str) -> None:
        """See System."""
        path = f"{self._path}/{name}"
        if self.url.startswith("file://"):
            with self._fs.open(path, "rb") as file:
                file.readinto(self.target)
        else:
            self.target[:] = self._fs.cat_file(path)

    def delete(self, name: str) -> None:
        """See System."""
        self._fs.rm_file(f"{self._path}/{name}")


class Dcp(System):
    """torch.distributed.checkpoint with FsspecWriter and FsspecReader: a dictionary of tensors."""

    def setup(self, source: memoryview, target: memoryview) -> None:
        """See System."""
        super().setup(source, target)
        torch = importlib.import_module("torch")
        self._dcp = importlib.import_module("torch.distributed.checkpoint")
        self._module = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")
        step = len(source) // TENSORS
        self._states = [
            {f"t{n}": torch.frombuffer(memory[n * step : (n + 1) * step], dtype=torch.uint8) for n in range(TENSORS)}
            for memory in (source, target)
        ]
        self.note = f"{TENSORS} tensors, 4 threads, sync_files"

    def write(self, name: str) -> None:
        """See System."""
        writer = self._module.FsspecWriter(f"{self.url}/{name}", thread_count=4, sync_files=True)
        self._dcp.save(self._states[0], storage_writer=writer, no_dist=True)

    def read(self, name: str) -> None:
        """See System."""
        reader = self._module.FsspecReader(f"{self.url}/{name}")
        self._dcp.load(self._states[1], storage_reader=reader, no_dist=True)

    def delete(self, name: str) -> None:
        """See System."""
        fs, path = importlib.import_module("fsspec").core.url_to_fs(f"{self.url}/{name}")
        fs.rm(path, recursive=True)


RAW: dict[str, dict[str, type[System]]] = {
    "file": {"raw O_DIRECT": RawFile, "raw buffered": RawFileBuffered},
    "s3": {"raw obstore": RawObstore, "raw boto3": RawBoto, "raw http": RawHttp},
    "gs": {"raw obstore": RawObstore},
    "az": {"raw obstore": RawObstore},
}
"""Raw clients by scheme; the fastest of them, each time, is the limit."""

OTHERS: dict[str, type[System]] = {"fsspec": Fsspec, "dcp": Dcp}
"""What can be compared with, at any store."""


def systems(scheme: str, others: tuple[str, ...]) -> dict[str, type[System]]:
    """All that are measured at stores of a scheme, ours first.

    Raises:
        ConfigError: no raw client is known for the scheme.
    """
    if scheme not in RAW:
        raise ConfigError(f"no raw client of {scheme}:// is known", hint=f"known are {', '.join(RAW)}")
    return {"ckptsvc": Ours, **RAW[scheme], **{name: OTHERS[name] for name in others}}


def _evict(paths: list[Path]) -> None:
    importlib.import_module("ckptsvc.cli.benchmarks.machine").evict(paths)
