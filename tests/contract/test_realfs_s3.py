"""The object driver at Ceph's S3 (RGW), which checks signatures, and times, and quotas, and when it fails.

`make test-realfs` installs what is needed; it takes root.
"""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.realfs.daemons import need
from harness.realfs.writers import Writers
from harness.runtime import eventually

from ckptsvc.errors import StoreDenied, StoreFull, StoreUnavailable
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.storage import Store, connect
from ckptsvc.storage.testing import MiB, content_of, pages_with, put
from ckptsvc.storage.wrappers import Retrying

pytestmark = [pytest.mark.slow, pytest.mark.realfs, pytest.mark.timeout(600)]

TESTS = Path(__file__).parents[1]


@pytest.fixture
def bucket(ceph, monkeypatch):
    """A new bucket, and the environment of a client."""
    obstore = pytest.importorskip("obstore")
    boto3 = pytest.importorskip("boto3")
    for name, value in ceph.environ.items():
        monkeypatch.setenv(name, value)
    name = f"b-{uuid.uuid4().hex}"
    boto3.client("s3", endpoint_url=ceph.endpoint, region_name="us-east-1").create_bucket(Bucket=name)
    from obstore.store import S3Store

    made = S3Store(name, endpoint=ceph.endpoint, region="us-east-1", client_options={"allow_http": True})
    return obstore, made, name


def test_rgw_creates_once(bucket):
    """Of many at a time exactly one creates an object: what every commit on S3 rests on."""
    obstore, store, _ = bucket

    def create(number: int) -> bool:
        try:
            obstore.put(store, key, b"%d" % number, mode="create")
        except obstore.exceptions.AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for turn in range(10):
            key = f"turn-{turn}"
            won = list(pool.map(create, range(8)))
            assert sum(won) == 1
            assert bytes(obstore.get(store, key).bytes()) == b"%d" % won.index(True)


def test_the_object_driver_passes_its_suite_on_rgw(ceph, bucket):
    """`test_object.py` takes any S3 server from its environment."""
    given = {"url": f"s3://{bucket[2]}", "options": {"endpoint": ceph.endpoint}}
    environ = {**os.environ, **ceph.environ, "CKPTSVC_TEST_S3": json.dumps(given)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "OtherS3"]
    done = subprocess.run([*command, str(TESTS / "contract" / "test_object.py")], env=environ, cwd=TESTS.parent,
                          capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]


def test_a_killed_gateway_and_object_server_lose_nothing(ceph, bucket):
    """Under a save to S3: what is acknowledged is there, and a commit is still made once."""
    where = {"endpoint": ceph.endpoint}
    store = Retrying(connect(f"s3://{bucket[2]}/killed", where), attempts=20, timeout=90.0)

    def write(key: str, content: bytes) -> None:
        with pages_with(content) as data:
            store.write(key, data, len(content))

    writers = Writers(write)
    for name in ("rgw", "osd", "rgw"):
        writers.wait_for(2)
        ceph.kill(name)
        time.sleep(0.5)
        ceph.start(name)
    writers.wait_for(2)
    writers.end()
    assert store.put_if_absent("step/COMMIT", b"once")
    assert not connect(f"s3://{bucket[2]}/killed", where).put_if_absent("step/COMMIT", b"twice")
    writers.check(lambda key: store.read(key))
    store.close()


@pytest.fixture
def on_rgw(ceph, bucket) -> Iterator[Callable[..., Store]]:
    """Makes stores in a new bucket, with options."""
    made = []

    def make(**options) -> Store:
        made.append(connect(f"s3://{bucket[2]}/run", {"endpoint": ceph.endpoint, **options}))
        return made[-1]

    yield make
    for store in made:
        store.close()


@pytest.mark.parametrize("key", ["step/a", "a b/c+d=e%é~", "50%/%2e'()*!$&,;:@?#"])
def test_rgw_takes_the_signed_addresses_that_ranges_are_read_from(on_rgw, key):
    """It checks signatures, unlike moto."""
    store, content = on_rgw(), content_of(2 * MiB)
    put(store, key, content)
    buffer = bytearray(MiB)
    assert store._ranges.fill(store._name(key), 1000, memoryview(buffer))
    assert buffer == content[1000 : 1000 + MiB]


def test_gc_finds_an_upload_at_rgw_that_nobody_finishes(on_rgw, bucket, ceph):
    import boto3

    client = boto3.client("s3", endpoint_url=ceph.endpoint, region_name="us-east-1")
    begun = {"Bucket": bucket[2], "Key": "run/step-000000000007.e00001/r00000-0.safetensors"}
    upload = client.create_multipart_upload(**begun)["UploadId"]
    client.upload_part(**begun, UploadId=upload, PartNumber=1, Body=b"part")
    store = on_rgw()
    (garbage,) = find_garbage(store)
    assert garbage.folder == "step-000000000007.e00001"
    assert remove_garbage(store, garbage)
    assert not client.list_multipart_uploads(Bucket=bucket[2]).get("Uploads")
    assert not list(find_garbage(store))


def test_rgw_refuses_who_has_the_wrong_time(ceph, bucket):
    """A quarter of an hour is what S3 allows."""
    need("faketime")
    code = f"""if True:
        from ckptsvc.errors import StoreDenied
        from ckptsvc.storage import connect
        store = connect("s3://{bucket[2]}/run", {{"endpoint": "{ceph.endpoint}"}})
        for operation in (
            lambda: store.put_if_absent("COMMIT", b"1"),
            lambda: store.read_into("a", 0, memoryview(bytearray(9))),
            lambda: list(store.list()),
        ):
            try:
                operation()
            except StoreDenied as error:
                print(error)
    """
    command = ["faketime", "-f", "+1h", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.count("set this machine's clock") == 3, done.stdout + done.stderr


def test_a_quota_of_rgw_is_a_full_store(ceph, on_rgw, bucket):
    ceph.admin("quota", "set", "--quota-scope=bucket", f"--bucket={bucket[2]}", f"--max-size={8 * MiB}")
    ceph.admin("quota", "enable", "--quota-scope=bucket", f"--bucket={bucket[2]}")
    store = on_rgw()
    put(store, "small", b"1")
    for size in (9 * MiB, 40 * MiB):
        with pytest.raises(StoreFull) as caught:
            put(store, "step/large", content_of(size))
        assert not caught.value.retryable
    assert not list(store.unfinished())


def test_keys_that_are_withdrawn_are_refused_and_new_ones_taken(ceph, on_rgw, monkeypatch):
    ceph.admin("key", "create", "--uid=test", "--key-type=s3", "--access-key=passing", "--secret-key=by")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "passing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "by")
    store, content = on_rgw(), content_of(20 * MiB)
    put(store, "a", content)
    ceph.admin("key", "rm", "--uid=test", "--access-key=passing")

    def refused() -> bool:
        try:
            return not store.read_into("a", 0, memoryview(bytearray(20 * MiB)))
        except StoreDenied:
            return True

    eventually(refused, "RGW to know it", 60)
    for operation in (lambda: put(store, "b", content), lambda: store.put_if_absent("COMMIT", b"1")):
        with pytest.raises(StoreDenied, match="credentials"):
            operation()
    for name, value in ceph.environ.items():
        monkeypatch.setenv(name, value)
    assert on_rgw().read("a", len(content)) == content


def test_a_disk_of_ceph_that_says_nothing_for_a_minute_costs_no_more_than_the_minute(ceph, on_rgw):
    """RGW takes requests meanwhile and answers none, as it does when the cluster is full: each ends in time."""
    inner, content = on_rgw(timeout=5), content_of(40 * MiB)
    put(inner, "before", content)
    with ceph.daemons.paused("osd"):
        begun = time.monotonic()
        with pytest.raises(StoreUnavailable):
            put(inner, "step/a", content)
        with pytest.raises(StoreUnavailable):
            inner.put_if_absent("step/COMMIT", b"1")
        with pytest.raises(StoreUnavailable):
            inner.read_into("before", 0, memoryview(bytearray(len(content))))
        assert time.monotonic() - begun < 60
        time.sleep(60 - (time.monotonic() - begun))
    store = Retrying(inner, attempts=30, timeout=120.0)
    put(store, "step/b", content)
    assert store.put_if_absent("step/COMMIT", b"2") or store.read("step/COMMIT") == b"1"  # the first may have arrived
    buffer = bytearray(len(content))
    store.read_into("step/b", 0, memoryview(buffer))
    assert buffer == content
