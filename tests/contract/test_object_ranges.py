"""Ranges that the object driver reads over connections of its own: when it does, and when it leaves them to obstore."""

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from ckptsvc_drivers.object_clients import Clients, options_from, parse
from ckptsvc_drivers.object_ranges import Ranges
from harness.etcd import make_certificates
from harness.object_servers import S3_ENVIRON, address_of, opened
from harness.proxy import Rule, proxy

from ckptsvc.errors import StoreDenied, StoreUnavailable
from ckptsvc.storage.testing import content_of, put

MiB = 1 << 20
SIGNED = re.compile(r"[?&](X-Amz-Signature|sig)=")


def read(store, size: int, key: str = "a") -> bytes:
    buffer = bytearray(size)
    store.read_into(key, 0, memoryview(buffer))
    return bytes(buffer)


def ways(between) -> list[bool]:
    """Whether each GET was of a signed address, in order."""
    return [bool(SIGNED.search(each)) for each in between.seen if each.startswith("GET")]


@pytest.fixture
def store(s3_bucket, between):
    s3_bucket.write("a", content_of(20 * MiB))
    store = opened(s3_bucket, endpoint=between.endpoint, timeout=20)
    yield store
    store.close()


def test_ranges_come_from_signed_addresses_and_nothing_else_is_asked(store, between):
    assert read(store, 20 * MiB) == content_of(20 * MiB)
    assert ways(between) == [True] * 3


def test_azure_takes_signed_addresses_too_but_not_of_names_that_need_escapes(azure_container):
    """Which obstore 0.12 signs as they are escaped, and Azure looks at the name itself."""
    content = content_of(9 * MiB)
    endpoint, path = azure_container.options["endpoint"].rsplit("/", 1)
    with proxy(address_of(endpoint)) as between:
        store = opened(azure_container, endpoint=f"{between.endpoint}/{path}")
        for key, signed in (("step/a.b-c_d~1", True), ("a b", False), ("step/é", False)):
            put(store, key, content)
            between.seen.clear()
            assert read(store, len(content), key) == content
            assert ways(between) == [signed] * 2
        store.close()


@pytest.mark.parametrize("status", [200, 301, 400, 401, 403])
def test_after_a_refusal_signed_addresses_rest(store, between, status):
    """There are policies that take no signature in an address, and servers that ignore ranges."""
    between.rules.append(Rule("GET .*X-Amz-Signature", answer=(status, b"<Error><Code>AccessDenied</Code></Error>")))
    assert read(store, MiB) == content_of(20 * MiB)[:MiB]
    assert read(store, MiB) == content_of(20 * MiB)[:MiB]
    assert ways(between) == [True, False, False]


@pytest.mark.parametrize("status", [404, 429, 500, 503])
def test_a_server_that_is_busy_or_knows_no_such_object_is_asked_again_and_they_do_not_rest(store, between, status):
    between.rules.append(
        Rule("GET .*X-Amz-Signature", answer=(status, b"<Error><Code>SlowDown</Code></Error>"), times=1)
    )
    for _ in range(2):
        assert read(store, MiB) == content_of(20 * MiB)[:MiB]
    assert ways(between) == [True, False, True]


def test_an_idle_connection_that_the_server_has_closed_is_replaced(store, between):
    read(store, MiB)
    between.rules.append(Rule("GET", lose_request=True, times=1))
    assert read(store, MiB) == content_of(20 * MiB)[:MiB]
    assert ways(between) == [True] * 3


def test_a_new_connection_that_breaks_is_left_to_obstore(store, between):
    between.rules.append(Rule("GET", cut_body=1000, times=1))
    assert read(store, MiB) == content_of(20 * MiB)[:MiB]
    assert ways(between) == [True, False]


def test_over_tls_the_server_is_checked_with_an_authority_of_ones_own(s3_bucket, moto_server, tmp_path):
    s3_bucket.write("a", content_of(20 * MiB))
    make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    with proxy(address_of(moto_server.endpoint), context) as between:
        store = opened(s3_bucket, endpoint=between.endpoint, ca_file=str(tmp_path / "ca.crt"))
        assert read(store, 20 * MiB) == content_of(20 * MiB)
        assert ways(between) == [True] * 3
        store.close()
        distrusting = opened(s3_bucket, endpoint=between.endpoint)
        with pytest.raises(StoreDenied, match="certificate"):
            read(distrusting, MiB)
        assert len(ways(between)) == 3
        distrusting.close()


def test_where_the_environment_names_a_proxy_obstore_speaks_with_it(s3_bucket, between, monkeypatch):
    s3_bucket.write("a", content_of(MiB))
    for excepted, signed in (("", False), ("127.0.0.1", True)):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", excepted)
        ranges = ranges_of(between.endpoint, s3_bucket.name)
        assert ranges.fill("a", 0, memoryview(bytearray(MiB))) == signed
        ranges.close()


def test_without_credentials_nothing_is_signed(s3_bucket, between):
    s3_bucket.write("a", content_of(MiB))
    s3_bucket.client.put_object_acl(Bucket=s3_bucket.name, Key="a", ACL="public-read")
    store = opened(s3_bucket, endpoint=between.endpoint, anonymous=True)
    assert read(store, MiB) == content_of(MiB)
    assert ways(between) == [False]
    store.close()


# --- answers -------------------------------------------------------------------------------------------------------


def ranges_of(endpoint: str, bucket: str = "bucket", **options) -> Ranges:
    place = parse(f"s3://{bucket}")
    return Ranges(Clients(place, options_from(place.url, {"endpoint": endpoint, **options})))


@contextmanager
def scripted(serve: Callable[[socket.socket], None]) -> Iterator[tuple[str, list[bytes]]]:
    """A server on loopback that reads a request of each connection and has `serve` answer it; yields all requests."""
    seen: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    sock, _ = listener.accept()
                except OSError:
                    return
                with sock:
                    try:
                        seen.append(sock.recv(65536))
                        serve(sock)
                    except OSError:
                        pass

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(10)


@pytest.fixture
def credentials(monkeypatch):
    for name, value in S3_ENVIRON.items():
        monkeypatch.setenv(name, value)


GOOD = b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 5-14/100\r\nContent-Length: 10\r\n\r\n0123456789"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 206",
        b"HTTP/1.1 206 Partial Content\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 206 Partial Content\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        GOOD[:-1],
        GOOD.replace(b"5-14", b"6-15"),
        GOOD.replace(b"5-14", b"5-13"),
        GOOD.replace(b"bytes 5-14/100", b"5-14"),
        GOOD.replace(b"Content-Range: bytes 5-14/100\r\n", b""),
        GOOD.replace(b"Length: 10", b"Length: 9"),
        GOOD.replace(b"Length: 10", b"Length: 11"),
        GOOD.replace(b"Length: 10", b"Length: -10"),
        GOOD.replace(b"Content-Length: 10\r\n", b""),
        GOOD.replace(b"Content-Length: 10", b"Transfer-Encoding: chunked"),
        GOOD.replace(b"206", b"200"),
        GOOD.replace(b"206", b"307").replace(b"\r\n", b"\r\nLocation: http://127.0.0.1:9/\r\n", 1),
        GOOD.replace(b"HTTP/1.1", b"HTTP/9"),
    ],
)
def test_what_is_not_just_the_range_that_was_asked_for_is_not_taken(credentials, answer):
    with scripted(lambda sock: sock.sendall(answer)) as (endpoint, _):
        ranges = ranges_of(endpoint, timeout=10)
        assert ranges.fill("a", 5, memoryview(bytearray(10))) is False
        ranges.close()


def test_the_range_that_was_asked_for_is_taken(credentials):
    """Also from a server that closes the connection after each answer."""
    with scripted(lambda sock: sock.sendall(GOOD.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))) as (at, seen):
        ranges = ranges_of(at)
        for _ in range(2):
            buffer = bytearray(10)
            assert ranges.fill("a", 5, memoryview(buffer))
            assert buffer == b"0123456789"
        ranges.close()
    assert all(b"\r\nRange: bytes=5-14\r\n" in request for request in seen)


def test_a_server_that_drips_is_given_up_when_the_time_of_the_request_is_over(credentials):
    """Each byte comes in time, the answer does not."""

    def drip(sock: socket.socket) -> None:
        sock.sendall(GOOD[:-10])
        for byte in GOOD[-10:]:
            time.sleep(0.4)
            sock.sendall(bytes([byte]))

    with scripted(drip) as (endpoint, seen):
        ranges = ranges_of(endpoint, timeout=1)
        with pytest.raises(TimeoutError):
            ranges.fill("a", 5, memoryview(bytearray(10)))
        ranges.close()
    assert len(seen) == 1


def test_a_server_that_never_answers_is_unavailable_and_asked_once(store, s3_bucket, between):
    store = opened(s3_bucket, endpoint=between.endpoint, timeout=1)
    between.rules.append(Rule("GET", hang=True))
    with pytest.raises(StoreUnavailable, match=f"{s3_bucket.url}/a: no answer in time"):
        read(store, MiB)
    assert ways(between) == [True]
    store.close()
