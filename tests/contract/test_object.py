"""The driver of object stores, on servers that the tests start: the conformance suite, and what it cannot know.

CKPTSVC_TEST_S3 adds another S3 server: a JSON object such as {"url": "s3://bucket", "options": {"endpoint": "http://..."}}
for an existing bucket; each test uses a prefix of its own in it. Credentials come from the environment as usual.
"""

import contextlib
import json
import os
import random
import re
import signal
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from urllib.parse import parse_qs, parse_qsl, quote, urlencode, urlsplit

import pytest
from ckptsvc_drivers import object_clients
from ckptsvc_drivers.object_clients import parse
from ckptsvc_drivers.object_names import Upload, key_of, name_of, upload_of
from ckptsvc_drivers.object_parts import MOST_PARTS, cut
from harness.etcd import make_certificates
from harness.object_servers import AzureContainer, ObjectTests, S3Bucket, address_of, opened
from harness.proxy import Rule, proxy

from ckptsvc.errors import ConfigError, NotFound, StoreDenied, StoreError
from ckptsvc.pipeline.catalog import take_epoch
from ckptsvc.pipeline.garbage import find_garbage, remove_garbage
from ckptsvc.storage import check_key, connect, is_key
from ckptsvc.storage.testing import content_of, pages_with, put
from ckptsvc.storage.unfinished import unfinished_by_folder
from ckptsvc.storage.wrappers import Retrying

MiB = 1 << 20


class TestMoto(ObjectTests):
    @pytest.fixture
    def bucket(self, s3_bucket):
        return s3_bucket


class TestAzurite(ObjectTests):
    @pytest.fixture
    def bucket(self, azure_container) -> AzureContainer:
        return azure_container


if "CKPTSVC_TEST_S3" in os.environ:

    class TestOtherS3(ObjectTests):
        @pytest.fixture
        def bucket(self) -> Iterator[S3Bucket]:
            given = json.loads(os.environ["CKPTSVC_TEST_S3"])
            prefix = uuid.uuid4().hex[:3]  # short: the longest keys are as long as S3 takes
            bucket = S3Bucket(name=parse(given["url"]).bucket, prefix=prefix, **given.get("options", {}))
            yield bucket
            for entry in opened(bucket).list():
                opened(bucket).delete(entry.key)


# --- what is sent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 8 * MiB, 200 * MiB, 10 << 30, 5 << 40])
def test_a_part_is_never_too_small_and_there_are_never_too_many(size):
    part, connections = cut(size)
    assert part >= 5 * MiB
    assert -(-size // part) <= MOST_PARTS
    assert 1 <= connections <= 16
    assert connections == 1 or connections <= -(-size // part)


def test_settings_of_parts_are_kept_within_the_limits():
    assert cut(100 * MiB, 6 * MiB, 3) == (6 * MiB, 3)
    assert cut(100 << 30, 6 * MiB, 3).part == 11 * MiB  # 10,000 parts of 6 MiB do not hold it


def test_parts_go_up_side_by_side_and_each_only_when_it_is_ready(s3_bucket, between):
    """No byte is asked for before it is ready, and what is reported has been acknowledged, in order."""
    size, events = 31 * MiB, []
    store = opened(s3_bucket, endpoint=between.endpoint, part=5 * MiB, connections=3)
    between.rules.append(Rule("PUT .*partNumber=1&", delay=1.0))  # the first part is the last to arrive
    with pages_with(content_of(size)) as data:

        def ready(nbytes):
            sent = [int(part) for each in between.seen for part in re.findall(r"PUT .*partNumber=(\d+)", each)]
            assert all((part - 1) * 5 * MiB < events[-1][1] for part in sent if events)
            events.append(("ready", nbytes))

        store.write("step/a", data, size, ready=ready, progress=lambda nbytes: events.append(("progress", nbytes)))
    store.close()
    assert [nbytes for what, nbytes in events if what == "ready"] == [*range(5 * MiB, 31 * MiB, 5 * MiB), size]
    assert [nbytes for what, nbytes in events if what == "progress"] == [*[5 * MiB] * 6, MiB]
    assert events[:3] == [("ready", 5 * MiB), ("ready", 10 * MiB), ("ready", 15 * MiB)]  # the first is on its way
    assert 2 <= between.busiest <= 4
    assert s3_bucket.read("step/a") == content_of(size)


def test_a_writer_and_a_reader_need_little_memory_beyond_the_object(s3_bucket):
    """Each 64 MiB at most, libraries included: nothing is buffered, whatever the size of the object."""
    size = 128 * MiB
    code = """if True:
        import json, mmap, os, sys
        from pathlib import Path
        from ckptsvc.storage import connect
        store, size = connect(sys.argv[1], json.loads(sys.argv[2])), int(sys.argv[3])
        store.children()  # all is imported now
        def most():
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:"))
        with mmap.mmap(-1, size) as memory, memoryview(memory) as data:
            memory.write(os.urandom(size))
            Path("/proc/self/clear_refs").write_text("5")
            before = most()
            store.write("a", data, size)
            written = most()
            data[:: mmap.PAGESIZE] = bytes(size // mmap.PAGESIZE)
            store.read_into("a", 0, data)
            print(written - before, most() - before)
    """
    command = [sys.executable, "-c", code, s3_bucket.url, json.dumps(s3_bucket.options), str(size)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(int(grown) <= 64 * MiB for grown in done.stdout.split()), done.stdout


def test_a_save_lists_nothing_and_renames_nothing(s3_bucket, between):
    store = opened(s3_bucket, endpoint=between.endpoint)
    put(store, "step/a", content_of(9 * MiB))
    put(store, "step/b", content_of(MiB))
    assert store.put_if_absent("step/COMMIT", b"record")
    store.close()
    paths = [each.split(f"/{s3_bucket.name}")[1].partition("uploadId")[0] for each in between.seen]
    methods = [each.split(" ")[0] for each in between.seen]
    assert sorted(zip(methods, paths, strict=True)) == sorted(
        [
            ("POST", "/step/a?uploads="),
            ("PUT", "/step/a?partNumber=1&"),
            ("PUT", "/step/a?partNumber=2&"),
            ("POST", "/step/a?"),
            ("PUT", "/step/b"),
            ("PUT", "/step/COMMIT"),
        ]
    )


# --- names and addresses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["a", "a\nb", "back\\slash", "%", "%0A", "%%0A\n", "%25", "%2525", "50%/%2e", "\x7f%7F", "é"]
)
@pytest.mark.parametrize("prefix", ["", "p/q"])
def test_names_lead_back_to_their_keys(prefix, key):
    name = name_of(prefix, key)
    assert key_of(prefix, name) == key
    assert not any(ord(char) < 32 or char == "\\" for char in name)


def test_names_of_others_are_no_keys():
    assert key_of("run", "run2/a") is None
    assert key_of("run", "run") is None
    assert key_of("", "a//b") is None
    assert key_of("run", "run/../a") is None


@pytest.mark.parametrize("upload_id", ["2~abc", "a/b+c=", "x" * 900, "%2F"])
def test_uploads_have_keys_that_lead_back(upload_id):
    upload = Upload("step/shard", upload_id)
    assert upload_of(check_key(upload.temporary)) == upload
    assert upload_of("step/shard") is None


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("s3://", {}),
        ("s3:///prefix", {}),
        ("s3://key:secret@bucket/prefix", {}),
        ("s3://bucket/prefix?secret=1", {}),
        ("s3://bucket/a//b", {}),
        ("s3://bucket/../a", {}),
        ("s3://bucket", {"endpoint": "ftp://host"}),
        ("s3://bucket", {"endpoint": "https://user:secret@host"}),
        ("s3://bucket", {"endpoint": "http://example.com"}),
        ("s3://bucket", {"endpont": "https://host"}),
        ("s3://bucket", {"part": 4 * MiB}),
        ("s3://bucket", {"timeout": 0}),
        ("s3://bucket", {"ca_file": "/none"}),
        ("s3://bucket", {"ca_file": __file__}),
    ],
)
def test_addresses_and_options_that_are_wrong_are_refused_and_no_secret_is_repeated(url, options):
    with pytest.raises(ConfigError) as caught:
        connect(url, options)
    assert "secret" not in str(caught.value)


def test_an_address_has_one_spelling():
    assert connect("S3://bucket/run/").url == "s3://bucket/run"
    assert connect("gs://bucket").url == "gs://bucket"
    assert connect("s3://bucket", {"endpoint": "http://example.com", "allow_http": True}).url == "s3://bucket"


def test_a_prefix_is_kept_apart_from_its_neighbours(s3_bucket):
    store = connect(f"{s3_bucket.url}/run", s3_bucket.options)
    put(store, "a/b", b"1")
    put(connect(f"{s3_bucket.url}/run2", s3_bucket.options), "c", b"2")
    assert [entry.key for entry in store.list()] == ["a/b"]
    assert store.children() == ["a"]
    assert s3_bucket.read("run/a/b") == b"1"


# --- credentials ---------------------------------------------------------------------------------------------------


def test_credentials_come_from_a_profile(s3_bucket, between, monkeypatch, tmp_path):
    """~/.aws/credentials, where the environment has no keys."""
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = one\naws_secret_access_key = secret-one\n"
        "[other]\naws_access_key_id = two\naws_secret_access_key = secret-two\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for options, expected in (({}, "one"), ({"profile": "other"}, "two")):
        store = opened(s3_bucket, endpoint=between.endpoint, **options)
        put(store, "a", b"1")
        store.close()
        assert f"Credential={expected}/" in between.headers["authorization"]
    with pytest.raises(ConfigError, match="third"):
        put(opened(s3_bucket, profile="third"), "a", b"1")


REVOKED = (403, b"<Error><Code>InvalidAccessKeyId</Code></Error>")


def keys_in(path, name: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {name}\naws_secret_access_key = secret-{name}\n")


@pytest.fixture(params=["boto3", "without boto3"])
def renewable(request, s3_bucket, between, monkeypatch, tmp_path):
    """An open store that has used the keys in a file, and the file."""
    if request.param != "boto3":
        monkeypatch.setitem(sys.modules, "boto3", None)
    file = tmp_path / "credentials"
    keys_in(file, "old")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = opened(s3_bucket, endpoint=between.endpoint, timeout=20)
    put(store, "a", b"1")
    store.size("a")
    yield store, file
    store.close()


OPERATIONS = {
    "small": lambda store: put(store, "b", b"1"),
    "parts": lambda store: put(store, "b", content_of(9 * MiB)),
    "record": lambda store: store.put_if_absent("c", b"1"),
    "read": lambda store: store.read("b"),
    "range": lambda store: store.read_into("b", 0, memoryview(bytearray(1 * MiB))),
    "ranges": lambda store: store.read_into("b", 0, memoryview(bytearray(9 * MiB))),
    "size": lambda store: store.size("b"),
    "list": lambda store: next(store.list()),
    "children": lambda store: store.children(),
    "delete": lambda store: store.delete("b"),
}


def test_an_open_store_takes_keys_that_were_renewed(renewable, between, monkeypatch):
    monkeypatch.setattr(object_clients, "RENEW_EVERY", 0.0)
    store, file = renewable
    before = "old"
    for name, operation in OPERATIONS.items():
        keys_in(file, name)
        refusal = Rule("", signed=f"Credential={before}/|Credential={before}%2F", answer=REVOKED)
        between.rules[:] = [refusal]
        operation(store)
        met = refusal.met
        assert 1 <= met <= 4, name  # each of two ranges is asked for in two ways
        operation(store)
        assert refusal.met == met, name
        before = name
        put(store, "a", b"1")
        store.size("a")  # by the other client


def test_keys_that_were_not_renewed_are_not_read_again_and_again(renewable, between):
    store, _ = renewable
    between.rules.append(Rule("", signed="Credential=old", answer=REVOKED))
    for _ in range(5):
        with pytest.raises(StoreDenied):
            store.size("a")
    assert between.rules[0].met == 6


def test_what_was_reported_as_written_is_not_read_again_with_other_keys(renewable, s3_bucket, between):
    """Its memory may be somebody else's by then; the next write has the other keys."""
    _, file = renewable
    keys_in(file, "old")
    store = opened(s3_bucket, endpoint=between.endpoint, connections=1)
    put(store, "a", b"1")
    keys_in(file, "new")
    between.rules.append(Rule("partNumber=3", signed="Credential=old", answer=REVOKED))
    told = []
    with pages_with(content_of(20 * MiB)) as data, pytest.raises(StoreDenied):
        store.write("b", data, len(data), progress=told.append)
    assert told
    put(store, "b", content_of(20 * MiB))
    assert "Credential=new" in between.headers["authorization"]
    store.close()


def test_what_is_sent_is_signed_where_that_is_asked_for(s3_bucket, between):
    for sign, expected in ((False, "UNSIGNED-PAYLOAD"), (True, "6b86b273ff34fce19d6b804eff5a3f57")):  # sha256 of "1"
        put(opened(s3_bucket, endpoint=between.endpoint, sign_payload=sign), "a", b"1")
        assert between.headers["x-amz-content-sha256"].startswith(expected)


def test_tls_is_checked_with_an_authority_of_ones_own(s3_bucket, moto_server, tmp_path):
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with proxy(address_of(moto_server.endpoint), context) as between:
        store = opened(s3_bucket, endpoint=between.endpoint, ca_file=str(tmp_path / "ca.crt"))
        put(store, "a", content_of(9 * MiB))
        s3_bucket.begin_upload("b")
        assert [entry.key[:1] for entry in store.list()] == ["a", "b"]
        store.close()
        with pytest.raises(StoreDenied, match="certificate"):
            put(opened(s3_bucket, endpoint=between.endpoint), "a", b"1")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_and_does_not_hang(s3_bucket):
    opened(s3_bucket).children()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        try:
            opened(s3_bucket).children()
        except StoreError as error:
            os._exit(0 if "fork" in str(error) else 2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- uploads that nobody finishes ----------------------------------------------------------------------------------


def test_a_failed_write_leaves_no_upload(s3_bucket):
    store = opened(s3_bucket)

    def ready(nbytes):
        if nbytes > 16 * MiB:
            raise ArithmeticError

    with pages_with(content_of(24 * MiB)) as data, pytest.raises(ArithmeticError):
        store.write("step/a", data, 24 * MiB, ready=ready)
    assert s3_bucket.uploads() == []


def test_abandoned_uploads_are_listed_and_deleted(s3_bucket):
    """And those beside the prefix are left alone."""
    store = connect(f"{s3_bucket.url}/run", s3_bucket.options)
    for name in ("run/step-1/a\\b".replace("\\", "%5C"), "run/step-1/a", "run/step-10/a", "run2/step-1/a"):
        s3_bucket.begin_upload(name)
    put(store, "step-1/x", b"1")
    found = {entry.key.partition("/.tmp-")[0] for entry in store.list("step-1")}
    assert found == {"step-1/a\\b", "step-1/a", "step-1/x"}
    assert store.children("step-1") == ["x"]
    assert {folder: len(entries) for folder, entries in unfinished_by_folder(Retrying(store)).items()} == {
        "step-1": 2,
        "step-10": 1,
    }
    for entry in store.list():
        store.delete(entry.key)
        store.delete(entry.key)
    assert s3_bucket.uploads() == ["run2/step-1/a"]


def test_requests_of_our_own_carry_the_signature_that_aws_computes(s3_bucket, between):
    """Recomputed by botocore, for a server that checks it: moto does not."""
    store = connect(f"{s3_bucket.url}/run", s3_bucket.options | {"endpoint": between.endpoint})
    s3_bucket.begin_upload("run/step 1/a+b")
    (entry,) = store.list("step 1")
    store.delete(entry.key)
    assert s3_bucket.uploads() == []
    ours = [each for each in between.seen if "X-Amz-Signature" in each]
    assert [each.split(" ")[0] for each in ours] == ["GET", "DELETE"]
    for each in ours:
        method, _, target = each.partition(" ")
        assert signature_of(method, between.endpoint + target) == parse_qs(urlsplit(target).query)["X-Amz-Signature"][0]


def signature_of(method: str, url: str) -> str:
    from botocore.auth import S3SigV4QueryAuth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    split = urlsplit(url)
    query = dict(parse_qsl(split.query, keep_blank_values=True))
    query.pop("X-Amz-Signature")
    auth = S3SigV4QueryAuth(Credentials("tests", "of-ckptsvc"), "s3", "us-east-1")
    request = AWSRequest(method, split._replace(query=urlencode(query, quote_via=quote)).geturl())
    request.headers["host"] = split.netloc
    request.context["timestamp"] = query["X-Amz-Date"]
    canonical = "\n".join(
        [
            method,
            split.path,
            "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items())),
            f"host:{split.netloc}\n",
            "host",
            "UNSIGNED-PAYLOAD",
        ]
    )
    signature: str = auth.signature(auth.string_to_sign(request, canonical), request)
    return signature


def test_uploads_of_many_pages(s3_bucket, between):
    """A server that lists one at a time is asked until it has no more."""
    for number in range(3):
        s3_bucket.begin_upload(f"step-1/{number}")
    store = opened(s3_bucket, endpoint=between.endpoint)
    pages = [page(f"step-1/{number}", more=number < 2) for number in range(3)]
    between.rules += [Rule("GET .*uploads", answer=(200, each), times=1) for each in pages]
    found = list(store.list("step-1"))
    assert [entry.key[:8] for entry in found] == ["step-1/0", "step-1/1", "step-1/2"]
    assert {entry.modified for entry in found} == {datetime(2026, 1, 1, tzinfo=UTC).timestamp()}
    asked = [each for each in between.seen if "uploads" in each]
    assert "key-marker=step-1%2F0" in asked[1]
    assert "upload-id-marker=u" in asked[2]


def page(key: str, *, more: bool) -> bytes:
    upload = f"<Upload><Key>{key}</Key><UploadId>u</UploadId><Initiated>2026-01-01T00:00:00.000Z</Initiated></Upload>"
    markers = f"<NextKeyMarker>{key}</NextKeyMarker><NextUploadIdMarker>u</NextUploadIdMarker>"
    ended = f"<IsTruncated>{'true' if more else 'false'}</IsTruncated>"
    return f'<R xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{upload}{markers}{ended}</R>'.encode()


@pytest.mark.parametrize("answer", [b"", b"<R>", b'<!DOCTYPE R [<!ENTITY a "b">]><R>&a;</R>', b"\xff"])
def test_a_list_of_uploads_that_is_none_is_an_error(s3_bucket, between, answer):
    between.rules.append(Rule("GET .*uploads", answer=(200, answer)))
    with pytest.raises(StoreError):
        list(opened(s3_bucket, endpoint=between.endpoint).list())


def test_damaged_lists_of_uploads_are_errors_or_lists(s3_bucket, between):
    """Seeded: bytes of an answer changed, lost and doubled."""
    chance = random.Random(5)
    store = opened(s3_bucket, endpoint=between.endpoint)
    for _ in range(25):
        answer = bytearray(page("step-1/a", more=False))
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(len(answer))
            answer[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
        between.rules = [Rule("GET .*uploads.*key-marker", answer=(200, page("z", more=False)))]
        between.rules.append(Rule("GET .*uploads", answer=(200, bytes(answer))))
        with contextlib.suppress(StoreError):
            assert all(is_key(entry.key) for entry in store.list())


def test_who_may_not_list_uploads_may_list_objects(s3_bucket, between):
    store = opened(s3_bucket, endpoint=between.endpoint)
    put(store, "a", b"1")
    between.rules.append(Rule("GET .*uploads", answer=(403, b"<Error><Code>AccessDenied</Code></Error>")))
    assert [entry.key for entry in store.list()] == ["a"]


def test_gc_finds_the_upload_of_a_writer_that_was_killed(s3_bucket):
    """In a folder that has nothing else, and in one whose save was never committed; others' uploads are not touched."""
    store = opened(s3_bucket)
    for name in ("step-000000000007.e00001/r00000-0.safetensors", "step-000000000008.e00001/r0", "another/thing"):
        s3_bucket.begin_upload(name)
    put(store, "step-000000000008.e00001/r1", b"1")
    found = list(find_garbage(store))
    assert {garbage.folder: len(garbage.entries) for garbage in found} == {
        "step-000000000007.e00001": 1,
        "step-000000000008.e00001": 2,
    }
    assert all(remove_garbage(store, garbage) for garbage in found)
    assert s3_bucket.uploads() == ["another/thing"]
    assert list(find_garbage(store)) == []


def test_azure_shows_nothing_of_a_blob_that_was_never_committed(azure_container):
    """It forgets the blocks after a week; until then they are in nobody's way."""
    store = opened(azure_container)
    azure_container.begin_upload("step/a")
    assert list(store.list()) == []
    assert store.children() == []
    with pytest.raises(NotFound):
        store.size("step/a")
    put(store, "step/a", content_of(20 * MiB))
    assert azure_container.read("step/a") == content_of(20 * MiB)


# --- commits -------------------------------------------------------------------------------------------------------


def test_a_server_that_replaces_what_it_shall_create_is_found_out_and_nothing_is_committed_to_it(s3_bucket, between):
    between.rules.append(
        Rule("PUT", headers={"if-none-match": "no-such-etag"})
    )  # which moto ignores, as some servers do
    store = opened(s3_bucket, endpoint=between.endpoint)
    assert not store.capabilities().exclusive_create
    with pytest.raises(StoreError, match="exactly one of several writers"):
        take_epoch(store, "job", 1, "owner", "now")
    assert list(store.list()) == []


def test_two_writers_race_for_one_commit(s3_bucket):
    """Each with a client of its own, again and again: exactly one wins."""
    stores = [opened(s3_bucket) for _ in range(4)]
    with ThreadPoolExecutor(len(stores)) as pool:
        for turn in range(10):
            start = threading.Barrier(len(stores))

            def contend(number, turn=turn, start=start):
                start.wait()
                return stores[number].put_if_absent(f"t{turn}/COMMIT", f"writer {number}".encode())

            won = [number for number, won in enumerate(pool.map(contend, range(len(stores)))) if won]
            assert [f"writer {number}".encode() for number in won] == [s3_bucket.read(f"t{turn}/COMMIT")]
