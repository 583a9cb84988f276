"""Object stores on loopback, each a process of its own: moto, which speaks S3, and Azurite, which speaks Azure's Blob.

Their raw accesses (`Bucket`) are boto3 and plain HTTP requests: nothing of what is under test.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, urlencode, urlsplit

import pytest
from ckptsvc_drivers.object_names import name_of
from harness.job import free_port

from ckptsvc.storage import Store, connect
from ckptsvc.storage.testing import StoreTests

ROOT = Path(__file__).parents[2]
START_TIMEOUT = 60.0
ACCOUNT = "devstoreaccount1"
# The key that Azurite's documentation gives for this account; it opens nothing else.
ACCOUNT_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="

S3_ENVIRON = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "of-ckptsvc", "AWS_REGION": "us-east-1"}
AZURE_ENVIRON = {"AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT, "AZURE_STORAGE_ACCOUNT_KEY": ACCOUNT_KEY}

GOOGLE_ENVIRON = {
    # of a service account that asks nobody for a token: obstore's way to an emulator
    "GOOGLE_SERVICE_ACCOUNT_KEY": '{"disable_oauth": true, "client_email": "", "private_key": "", "private_key_id": ""}'
}


class Bucket(Protocol):
    """A new bucket, seen without ckptsvc.

    Attributes:
        url: its address.
        options: with which a store connects to it.
    """

    url: str
    options: Mapping[str, Any]

    def read(self, name: str) -> bytes:
        """An object's bytes."""

    def write(self, name: str, content: bytes) -> None:
        """Make an object."""


class S3Bucket:
    """A bucket of an S3 server; made anew unless `name` says which, then only what lies below `prefix` counts."""

    def __init__(self, endpoint: str, name: str = "", prefix: str = "", **options: Any) -> None:
        self.name, self._prefix = name or f"t{uuid.uuid4().hex[:20]}", f"{prefix}/" if prefix else ""
        self.url = f"s3://{self.name}" + (f"/{prefix}" if prefix else "")
        self.options: dict[str, Any] = {"endpoint": endpoint} | options
        self.client = _boto3(endpoint, os.environ["AWS_ACCESS_KEY_ID"])
        if not name:
            self.client.create_bucket(Bucket=self.name)

    def read(self, name: str) -> bytes:
        """See Bucket."""
        content: bytes = self.client.get_object(Bucket=self.name, Key=self._prefix + name)["Body"].read()
        return content

    def write(self, name: str, content: bytes) -> None:
        """See Bucket."""
        self.client.put_object(Bucket=self.name, Key=self._prefix + name, Body=content)

    def names(self) -> list[str]:
        """Of all objects, a thousand at most."""
        return [each["Key"] for each in self.client.list_objects_v2(Bucket=self.name).get("Contents", [])]

    def uploads(self) -> list[str]:
        """Names of the objects with a multipart upload that was begun and neither completed nor aborted."""
        found = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        return [each["Key"] for each in found]

    def begin_upload(self, name: str) -> str:
        """Begin a multipart upload with one part in it, as a writer does that is then killed; returns its id."""
        upload: str = self.client.create_multipart_upload(Bucket=self.name, Key=name)["UploadId"]
        self.client.upload_part(Bucket=self.name, Key=name, UploadId=upload, PartNumber=1, Body=b"part")
        return upload


@functools.cache
def _boto3(endpoint: str, key: str) -> Any:
    """A client that speaks as plainly as the servers here understand; it takes 0.1 s to make one."""
    import boto3
    from botocore.config import Config

    plain = Config(
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"addressing_style": "path"},
        proxies={},
    )
    region = os.environ.get("AWS_REGION", "us-east-1")
    return boto3.client("s3", endpoint_url=endpoint, region_name=region, aws_access_key_id=key, config=plain,
        aws_secret_access_key=os.environ["AWS_SECRET_ACCESS_KEY"])  # fmt: skip


class S3AsGoogle(S3Bucket):
    """A new bucket of an S3 server, for a client of Google's XML API, which has S3's requests and answers.

    Google documents its bucket listings and multipart uploads as compatible with S3's. What differs is how a client
    signs, and the condition of a request that creates: `as_s3` puts both into S3's words, in a proxy between the two.

    Args:
        endpoint: of the S3 server.
        between: address of the proxy.
    """

    def __init__(self, endpoint: str, between: str) -> None:
        super().__init__(endpoint)
        self.url, self.options = f"gs://{self.name}", {"endpoint": between}


def as_s3(headers: dict[str, str]) -> None:
    """Change the headers of a request for Google into those of the same request for S3."""
    signed = "AWS4-HMAC-SHA256 Credential=tests/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    headers["authorization"] = signed  # moto looks for the name of the key in it
    if headers.pop("x-goog-if-generation-match", "") == "0":
        headers["if-none-match"] = "*"


class AzureContainer:
    """A new container of Azurite's."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint, self.name = endpoint, f"t{uuid.uuid4().hex[:20]}"
        self.url = f"az://{self.name}"
        self.options: dict[str, Any] = {"endpoint": endpoint}
        self._call("PUT", self.name, {"restype": "container"})

    def read(self, name: str) -> bytes:
        """See Bucket."""
        return self._call("GET", f"{self.name}/{name}")

    def write(self, name: str, content: bytes) -> None:
        """See Bucket."""
        self._call("PUT", f"{self.name}/{name}", body=content, headers={"x-ms-blob-type": "BlockBlob"})

    def begin_upload(self, name: str) -> None:
        """Send one block of a blob and never commit it, as a writer does that is then killed."""
        block = base64.b64encode(uuid.uuid4().hex.encode()).decode()  # as long as obstore's: a blob has one length
        self._call("PUT", f"{self.name}/{name}", {"comp": "block", "blockid": block}, b"part")

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """A request with a signature of the account's key (Azure Storage, "Authorize with Shared Key")."""
        query, sent = query or {}, dict(headers or {})
        sent |= {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
        path = quote(path, safe="/~()*!.'")
        lines = [method, "", "", str(len(body)) if body else "", *[""] * 8]
        lines += [f"{name}:{sent[name]}" for name in sorted(sent)]
        lines += [f"/{ACCOUNT}/{ACCOUNT}/{path}", *(f"{name}:{query[name]}" for name in sorted(query))]
        signature = hmac.new(base64.b64decode(ACCOUNT_KEY), "\n".join(lines).encode(), hashlib.sha256).digest()
        sent["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
        if body or method == "PUT":
            sent["Content-Type"] = ""
        url = f"{self._endpoint}/{path}" + (f"?{urlencode(query)}" if query else "")
        return fetch(url, method, body, sent)


def shared_access(seconds: float) -> str:
    """A shared access signature of the account that ends so soon (Azure Storage, "Create an account SAS")."""
    until = datetime.now(UTC) + timedelta(seconds=seconds)
    fields = {"sp": "rwdlac", "ss": "b", "srt": "co", "st": "", "se": f"{until:%Y-%m-%dT%H:%M:%SZ}"}
    lines = [ACCOUNT, *fields.values(), "", "", "2020-08-04", ""]
    signature = hmac.new(base64.b64decode(ACCOUNT_KEY), "\n".join(lines).encode(), hashlib.sha256).digest()
    fields |= {"sv": "2020-08-04", "sig": base64.b64encode(signature).decode()}
    return urlencode({name: value for name, value in fields.items() if value})


class ObjectServer:
    """A server that can be killed and started again on the same port.

    Attributes:
        endpoint: its address.
        environ: credentials for it.
    """

    def __init__(self, command: list[str], port: int, log: Path, path: str, environ: Mapping[str, str]) -> None:
        self._command, self._port, self._log = command, port, log
        self.endpoint = f"http://127.0.0.1:{port}{path}"
        self.environ = environ
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; returns when it answers."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self._port), 1.0).close()
                return
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"{self._command[0]} did not start"
            time.sleep(0.05)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stopped (SIGSTOP) meanwhile: it accepts connections, and says nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextlib.contextmanager
def moto(folder: Path) -> Iterator[ObjectServer]:
    """A running moto; the test is skipped where it is not installed. What it holds is lost with its process."""
    pytest.importorskip("moto.server", reason="moto is not installed")
    pytest.importorskip("flask_cors", reason="moto's server is not installed")
    port = free_port()
    command = [sys.executable, str(Path(__file__).with_name("moto_server.py")), str(port)]
    server = ObjectServer(command, port, folder / "moto.log", "", S3_ENVIRON)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@contextlib.contextmanager
def azurite(folder: Path) -> Iterator[ObjectServer]:
    """A running Azurite; the test is skipped where npm has not installed it."""
    program = Path(sys.prefix) / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    if not program.exists() or shutil.which("node") is None:
        pytest.skip(f"there is no Azurite: {program}")
    port = free_port()
    command = [str(program), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder)]
    command += ["--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    server = ObjectServer(command, port, folder / "azurite.log", f"/{ACCOUNT}", AZURE_ENVIRON)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def opened(bucket: Bucket, **options: Any) -> Store:
    """A store on a bucket."""
    return connect(bucket.url, {**bucket.options, **options})


class ObjectTests(StoreTests):
    """What all object stores share: a fixture `bucket`."""

    @pytest.fixture
    def store(self, bucket: Bucket) -> Iterator[Store]:
        store = opened(bucket)
        self.bucket: Bucket = bucket
        yield store
        store.close()

    def another(self, store: Store) -> Store:
        return opened(self.bucket)

    def raw_read(self, store: Store, key: str) -> bytes:
        return self.bucket.read(name_of("", key))

    def raw_write(self, store: Store, key: str, content: bytes) -> None:
        self.bucket.write(name_of("", key), content)

    def test_exclusive_creation_is_found_out_once(self, store: Store) -> None:
        assert store.capabilities() is store.capabilities()


def fetch(url: str, method: str = "GET", body: bytes = b"", headers: Mapping[str, str] | None = None) -> bytes:
    """A plain HTTP request, without the proxy that the environment may name."""
    request = urllib.request.Request(url, body or None, dict(headers or {}), method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30) as answer:
        content: bytes = answer.read()
        return content


def address_of(endpoint: str) -> tuple[str, int]:
    """Host and port."""
    parts = urlsplit(endpoint)
    assert parts.hostname
    assert parts.port
    return parts.hostname, parts.port
