"""The agent's HTTP server, with real connections: what it refuses, and whom nobody can hurt."""

import asyncio
import contextlib
import socket

import pytest

from ckptsvc.agent.http import httpd
from ckptsvc.agent.http.httpd import HttpServer, Refused, Request, Response, parse
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address

LOOPBACK = Address("127.0.0.1", 0)
GOOD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


async def hello(request: Request) -> Response:
    if request.path == "/large":
        return Response(200, b"x" * (32 << 20))
    if request.path == "/bad":
        raise RuntimeError("a bug")
    return Response(200, request.path.encode())


async def forever():
    while True:
        yield b"x" * 4096


def served(story, handler=hello, **given):
    """Run a story with the port of a server; the server closes behind it."""

    async def whole():
        server = HttpServer(handler, **given)
        try:
            await asyncio.wait_for(story(server, server.open(LOOPBACK).port), 60)
        finally:
            await server.close()

    asyncio.run(whole())


async def ask(port: int, text: bytes = GOOD) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(text)
    answer = await reader.read()
    writer.close()
    return answer


class TestParsing:
    def test_a_request(self):
        found = parse(b"HEAD /a/b?x=1&y=%20z HTTP/1.1\r\nHost: h:1 \r\nCookie: a=1\r\ncookie: b=2\r\nX:\r\n\r\n")
        assert found == Request(
            "HEAD", "/a/b", {"x": "1", "y": " z"}, {"host": "h:1", "cookie": "a=1; b=2", "x": ""}
        )  # fmt: skip

    @pytest.mark.parametrize(
        ("text", "status"),
        [
            (b"POST / HTTP/1.1\r\n\r\n", 405),
            (b"DELETE / HTTP/1.1\r\n\r\n", 405),
            (b"GET http://other/ HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"GET /a b HTTP/1.1\r\n\r\n", 400),
            (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
            (b"GET /?" + b"&".join(b"a%d=1" % i for i in range(9)) + b" HTTP/1.1\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n folded\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nX: a\nb\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nContent-Length: 5\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 400),
            (b"GET / HTTP/1.1\r\n" + b"".join(b"a%d: 1\r\n" % i for i in range(70)) + b"\r\n", 400),
            (b"\x16\x03\x01\x02\r\n\r\n", 400),
            (b"\r\n\r\n", 400),
        ],
    )
    def test_what_is_refused(self, text, status):
        with pytest.raises(Refused) as caught:
            parse(text)
        assert caught.value.response.status == status


class TestServing:
    def test_answers_say_what_browsers_must_not_do(self):
        async def story(server, port):
            answer = (await ask(port)).decode()
            head, _, body = answer.partition("\r\n\r\n")
            assert head.startswith("HTTP/1.1 200 OK\r\n")
            assert body == "/"
            for line in ("Cache-Control: no-store", "X-Content-Type-Options: nosniff", "Content-Length: 1"):
                assert line in head
            assert "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'" in head
            head_only = (await ask(port, GOOD.replace(b"GET", b"HEAD"))).decode()
            assert head_only == head + "\r\n\r\n"

        served(story)

    def test_a_request_of_any_length_is_refused(self):
        async def story(server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 10_000)
            with contextlib.suppress(ConnectionResetError):  # it may overtake the answer
                assert (await reader.read()).startswith(b"HTTP/1.1 431 ")
            writer.close()
            assert b" 200 OK" in await ask(port)

        served(story)

    def test_a_bug_is_logged_and_ends_one_connection(self, caplog):
        async def story(server, port):
            assert await ask(port, GOOD.replace(b"/ ", b"/bad ")) == b""
            assert b" 200 OK" in await ask(port)

        served(story)
        assert "a bug" in caplog.text

    def test_a_port_in_use(self):
        async def story(server, port):
            with pytest.raises(ConfigError, match=r"agent\.metrics_listen: 127\.0\.0\.1:\d+: Address already in use"):
                HttpServer(hello).open(Address("127.0.0.1", port))

        served(story)


class TestHostileReaders:
    def test_who_says_nothing_is_hung_up_on(self, monkeypatch):
        monkeypatch.setattr(httpd, "REQUEST_TIME", 0.1)

        async def story(server, port):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HT")
            assert await reader.read() == b""
            writer.close()

        served(story)

    def test_who_only_connects_keeps_nobody_out(self, monkeypatch):
        monkeypatch.setattr(httpd, "REQUEST_TIME", 60.0)

        async def story(server, port):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * httpd.MAX_WAITING)]
            assert b" 200 OK" in await ask(port)
            assert len(server._waiting) <= httpd.MAX_WAITING
            assert await silent[0][0].read() == b""  # the oldest had to go
            for _, writer in silent:
                writer.close()

        served(story)

    def test_a_flood_takes_nobody_his_turn(self):
        async def story(server, port):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(httpd.MAX_WAITING)]
            with contextlib.ExitStack() as stack:  # all at once, as far as the server's loop can tell

                def come():
                    return stack.enter_context(socket.create_connection(("127.0.0.1", port)))

                honest = come()
                honest.sendall(GOOD)
                for _ in range(httpd.MAX_WAITING):
                    come()
                honest.setblocking(False)
                assert (await asyncio.get_running_loop().sock_recv(honest, 100)).startswith(b"HTTP/1.1 200 ")
            for _, writer in silent:
                writer.close()

        served(story)

    def test_who_is_not_let_in_takes_no_place_of_those_who_are(self, monkeypatch):
        monkeypatch.setattr(httpd, "MAX_SERVED", 2)

        def door(request):
            return Response(401, b"x" * (32 << 20)) if request.path == "/strange" else None

        async def story(server, port):
            with contextlib.ExitStack() as stack:
                strangers = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(4)]
                for each in strangers:
                    each.sendall(GOOD.replace(b"/ ", b"/strange "))
                    each.setblocking(False)
                    assert await asyncio.get_running_loop().sock_recv(each, 12) == b"HTTP/1.1 401"
                assert b" 200 OK" in await ask(port)  # while they take their time
                assert len(server._waiting) == 4

        served(story, door=door)

    def test_who_does_not_read_is_hung_up_on(self, monkeypatch):
        monkeypatch.setattr(httpd, "WRITE_TIME", 0.2)

        async def story(server, port):
            with socket.create_connection(("127.0.0.1", port)) as lazy:
                lazy.sendall(GOOD.replace(b"/ ", b"/large "))
                while not server._served:
                    await asyncio.sleep(0.01)
                while server._served:
                    await asyncio.sleep(0.01)
            assert b" 200 OK" in await ask(port)

        served(story)

    def test_streams_are_few_and_end_when_their_reader_goes(self, monkeypatch):
        monkeypatch.setattr(httpd, "MAX_SERVED", 2)

        async def streaming(request):
            return Response(200, stream=forever())

        async def story(server, port):
            open_now = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for reader, writer in open_now:
                writer.write(GOOD)
                assert await reader.readexactly(4) == b"HTTP"
            assert b" 503 " in await ask(port)
            for _, writer in open_now:
                writer.transport.abort()
            while server._served:
                await asyncio.sleep(0.01)

        served(story, streaming)

    def test_a_stream_that_nobody_reads_takes_no_memory_and_ends(self, monkeypatch):
        monkeypatch.setattr(httpd, "WRITE_TIME", 0.2)
        made = 0

        async def counted():
            nonlocal made
            async for piece in forever():
                made += 1
                yield piece

        async def streaming(request):
            return Response(200, stream=counted())

        async def story(server, port):
            with socket.create_connection(("127.0.0.1", port)) as lazy:
                lazy.sendall(GOOD)
                while not server._served:
                    await asyncio.sleep(0.01)
                while server._served:
                    await asyncio.sleep(0.01)
            assert made * 4096 < 64 << 20  # the kernel's buffers, and one of ours

        served(story, streaming)
