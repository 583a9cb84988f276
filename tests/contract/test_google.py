"""`gs://`: what the client of the object driver says to Google, at servers that understand a part of it each.

No server that can be had here serves all of Google's XML API, which obstore speaks. An S3 server understands all but
the signature and the condition of a commit, and runs in every test. Google's own test server (googleapis/
storage-testbench on GitHub), started by hand, knows the condition, and single objects:
CKPTSVC_TEST_GS_TESTBENCH=http://HOST:PORT. It serves all of the JSON API, so that `fsspec+gs://` meets it as well,
where gcsfs is installed; GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false keeps gcsfs from asking for more, by gRPC.

CKPTSVC_TEST_GS='{"url": "gs://bucket"}' runs the suite in a bucket at Google; credentials are found as usual.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from ckptsvc_drivers.object_clients import parse
from harness.object_servers import GOOGLE_ENVIRON, ObjectTests, S3AsGoogle, address_of, fetch, opened
from harness.proxy import Proxy, Rule, proxy

from ckptsvc.errors import Damaged, NotFound, StoreDenied, StoreError
from ckptsvc.pipeline.catalog import take_epoch
from ckptsvc.storage import connect
from ckptsvc.storage.testing import ODD_KEYS, MiB, StoreTests, content_of, pages_with, put

TESTBENCH = os.environ.get("CKPTSVC_TEST_GS_TESTBENCH", "").rstrip("/")
needs_testbench = pytest.mark.skipif(not TESTBENCH, reason="CKPTSVC_TEST_GS_TESTBENCH names no storage-testbench")


class TestGoogleClient(ObjectTests):
    """All that is sent to Google, at an S3 server: names, parts, ranges, listings."""

    @pytest.fixture
    def bucket(self, google_bucket) -> S3AsGoogle:
        return google_bucket


def test_a_commit_is_one_request_with_googles_condition(google_bucket, between):
    store = opened(google_bucket)
    assert store.put_if_absent("step/COMMIT", b"record")
    assert between.headers["x-goog-if-generation-match"] == "0"
    assert [each.split(" ")[0] for each in between.seen] == ["PUT"]
    put(store, "step/a", content_of(9 * MiB))  # Google takes no condition with a multipart upload
    assert "x-goog-if-generation-match" not in between.headers


def test_nothing_is_committed_where_the_condition_is_ignored(google_bucket, between):
    """S3 servers do not know Google's, nor do some emulators of Google's."""
    adapt = between.rules[0].adapt

    def forget(headers):
        headers.pop("x-goog-if-generation-match", None)
        adapt(headers)

    between.rules[0].adapt = forget
    store = opened(google_bucket)
    assert not store.capabilities().exclusive_create
    with pytest.raises(StoreError, match="exactly one of several writers"):
        take_epoch(store, "job", 1, "owner", "now")
    assert list(store.list()) == []


def test_an_answer_of_googles_is_told_like_any_other(between):
    between.rules.append(Rule("", answer=(403, b"<Error><Code>AccessDenied</Code></Error>")))
    store = connect("gs://bucket/run", {"endpoint": between.endpoint, "anonymous": True})
    with pytest.raises(StoreDenied, match="gs://bucket/run/a"):
        store.read("a")
    assert between.seen[0].startswith("GET /bucket/run%2Fa")


# --- Google's own test server --------------------------------------------------------------------------------------


class GoogleBucket:
    """A new bucket at storage-testbench.

    Attributes:
        name: the bucket's.
        between: a proxy that adds the two headers of Google's answers which the server leaves out.
    """

    def __init__(self, between: Proxy) -> None:
        self.name, self.between = f"t{uuid.uuid4().hex[:20]}", between
        between.rules.append(Rule("", answer_headers=ANSWERED))
        body, kind = json.dumps({"name": self.name}).encode(), {"Content-Type": "application/json"}
        fetch(f"{TESTBENCH}/storage/v1/b?project=tests", "POST", body, kind)

    def read(self, name: str) -> bytes:
        """An object's bytes, by the JSON API."""
        return fetch(f"{TESTBENCH}/storage/v1/b/{self.name}/o/{quote(name, safe='')}?alt=media")

    def write(self, name: str, content: bytes) -> None:
        """Make an object, likewise."""
        url = f"{TESTBENCH}/upload/storage/v1/b/{self.name}/o?uploadType=media&name={quote(name, safe='')}"
        fetch(url, "POST", content, {"Content-Type": "application/octet-stream"})


ANSWERED = {"etag": '"0"', "last-modified": "Thu, 01 Jan 2026 00:00:00 GMT"}


@pytest.fixture
def testbench(monkeypatch) -> Iterator[GoogleBucket]:
    for name, value in GOOGLE_ENVIRON.items():
        monkeypatch.setenv(name, value)
    with proxy(address_of(TESTBENCH)) as between:
        yield GoogleBucket(between)


@needs_testbench
def test_googles_server_lets_one_writer_commit(testbench):
    """Each with a client of its own, again and again; a lost answer is resolved."""
    url, options = f"gs://{testbench.name}/run", {"endpoint": testbench.between.endpoint}
    stores = [connect(url, options) for _ in range(8)]
    assert stores[0].capabilities().exclusive_create
    with ThreadPoolExecutor(len(stores)) as pool:
        for turn in range(20):
            start = threading.Barrier(len(stores))

            def contend(number, turn=turn, start=start):
                start.wait()
                return stores[number].put_if_absent(f"t{turn}/COMMIT", f"writer {number}".encode())

            won = [number for number, won in enumerate(pool.map(contend, range(len(stores)))) if won]
            assert [f"writer {number}".encode() for number in won] == [testbench.read(f"run/t{turn}/COMMIT")]
    testbench.between.rules.insert(0, Rule("PUT", lose_answer=True, times=1))
    assert stores[0].put_if_absent("lost/COMMIT", b"mine")
    assert not stores[1].put_if_absent("lost/COMMIT", b"other")


@needs_testbench
@pytest.mark.parametrize("size", [0, 1, 4097, 8 * MiB])
def test_googles_server_gives_back_what_was_written(testbench, size):
    store = connect(f"gs://{testbench.name}/run", {"endpoint": testbench.between.endpoint})
    put(store, "step/a", content_of(size))
    assert testbench.read("run/step/a") == store.read("step/a", 8 * MiB) == content_of(size)
    assert store.size("step/a") == size
    with pages_with(bytes(8 * MiB)) as data:
        store.read_into("step/a", size // 2, data[: size - size // 2])
        assert data[: size - size // 2] == content_of(size)[size // 2 :]
        with pytest.raises(Damaged):
            store.read_into("step/a", size, data[:1])
    with pytest.raises(NotFound):
        store.read("step/b")


if TESTBENCH:

    class TestGcsfs(StoreTests):
        """`fsspec+gs://`, which speaks the JSON API."""

        @pytest.fixture
        def store(self, testbench):
            pytest.importorskip("gcsfs")
            self.bucket = testbench
            store = self.another(None)
            yield store
            store.close()

        def another(self, store):
            return connect(f"fsspec+gs://{self.bucket.name}", {"endpoint_url": TESTBENCH, "token": "anon"})

        def raw_read(self, store, key):
            return self.bucket.read(key)

        def raw_write(self, store, key, content):
            self.bucket.write(key, content)

        @pytest.mark.parametrize("key", [key for key in ODD_KEYS if "\n" not in key])  # the server finds no such object
        def test_odd_keys(self, store, key):
            super().test_odd_keys(store, key)


# --- a bucket at Google --------------------------------------------------------------------------------------------


class OtherBucket:
    """What lies below a prefix of a bucket, seen through the library alone."""

    def __init__(self, url: str, **options: str) -> None:
        from obstore.store import GCSStore

        self.url, self.options = url, options
        place = parse(url)
        endpoint = {"base_url": options["endpoint"]} if "endpoint" in options else {}
        self._client = GCSStore(place.bucket, prefix=place.prefix, client_options={"allow_http": True}, **endpoint)

    def read(self, name: str) -> bytes:
        """See Bucket."""
        return bytes(self._client.get(name).bytes())

    def write(self, name: str, content: bytes) -> None:
        """See Bucket."""
        self._client.put(name, content, use_multipart=False)


if "CKPTSVC_TEST_GS" in os.environ:

    class TestOtherGoogle(ObjectTests):
        @pytest.fixture
        def bucket(self) -> Iterator[OtherBucket]:
            given = json.loads(os.environ["CKPTSVC_TEST_GS"])
            bucket = OtherBucket(f"{given['url']}/{uuid.uuid4().hex[:3]}", **given.get("options", {}))
            yield bucket
            for entry in opened(bucket).list():
                opened(bucket).delete(entry.key)
