"""The client of etcd, against a real one: leases, keys, waiting, servers that are gone, logins."""

import asyncio
import socket
import time

import pytest
from harness.job import free_port

from ckptsvc.errors import ConfigError, CoordinationUnavailable
from ckptsvc.rpc.etcd import Etcd, EtcdUrl, Login, check_reachable, parse_url


def with_client(url, function, login=None):
    """Run one coroutine with a client of its own."""

    async def run():
        client = Etcd(parse_url(url), login or Login())
        try:
            return await function(client)
        finally:
            await client.close()

    return asyncio.run(run())


# ---- URLs


@pytest.mark.parametrize(
    ("text", "servers", "prefix"),
    [
        ("etcd://a:1", ("a:1",), "/ckptsvc"),
        ("etcd://b:2,a:1/", ("a:1", "b:2"), "/ckptsvc"),
        ("etcd://a:1,a:1/x/y", ("a:1",), "/x/y"),
        ("etcd://[::1]:2379/x/", ("[::1]:2379",), "/x"),
    ],
)
def test_a_url_names_servers_and_a_prefix(text, servers, prefix):
    assert parse_url(text) == EtcdUrl(servers, prefix)
    assert parse_url(str(parse_url(text))) == parse_url(text)


@pytest.mark.parametrize(
    "text",
    ["", "etcd://", "a:1", "http://a:1", "etcd://a", "etcd://a:b", "etcd://a:99999", "etcd://a:1,", "etcd://a:1/x y",
     "etcd://a:1//x", "etcd://a:1/x#job", "etcd://" + "a" * 400 + ":1"],
)  # fmt: skip
def test_what_is_no_url_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="for example etcd://"):
        parse_url(text)


def test_a_password_in_the_url_is_refused_and_not_repeated():
    with pytest.raises(ConfigError, match="password_file") as refused:
        parse_url("etcd://root:secret@a:1")
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(Login(user="root", password="secret"))


# ---- keys and leases


def test_a_key_is_made_once_and_goes_with_its_lease(etcd):
    async def story(client):
        assert (await client.get("/k")).value is None
        first, second = await client.grant(5), await client.grant(5)
        term = await client.create("/k", b"one", first.lease)
        assert await client.create("/k", b"two", second.lease) == 0
        found = await client.get("/k")
        assert (found.value, found.created, found.lease) == (b"one", term, first.lease)
        assert term > 0
        assert await client.keep_alive(first.lease) == first.ttl == 5
        await client.revoke(first.lease)
        assert (await client.get("/k")).value is None
        assert await client.keep_alive(first.lease) == 0
        await client.revoke(first.lease)  # again: no error
        assert await client.create("/k", b"late", first.lease) == 0  # with a lease that has ended
        assert await client.create("/k", b"two", second.lease) > term

    with_client(etcd.url, story)


def test_waiting_ends_when_the_key_changes_even_before_the_wait_began(etcd):
    async def story(client):
        lease = (await client.grant(5)).lease
        before = await client.get("/k")
        assert not await client.changed("/k", before.revision, 0.3)
        waiting = asyncio.ensure_future(client.changed("/k", before.revision, 30))
        await client.create("/other", b"", lease)
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await client.create("/k", b"", lease)
        assert await asyncio.wait_for(waiting, 10)
        assert await asyncio.wait_for(client.changed("/k", before.revision, 30), 10)

    with_client(etcd.url, story)


def test_a_lease_that_nobody_renews_ends(etcd):
    async def story(client):
        granted = await client.grant(2)
        await client.create("/k", b"", granted.lease)
        found = await client.get("/k")
        assert await client.changed("/k", found.revision, 30)
        assert (await client.get("/k")).value is None

    with_client(etcd.url, story)


# ---- servers that do not answer


def test_a_refused_connection_says_where_and_what_to_do():
    with pytest.raises(CoordinationUnavailable, match=r"etcd://127.0.0.1:\d+.*is it running"):
        asyncio.run(check_reachable(parse_url(f"etcd://127.0.0.1:{free_port()}"), Login()))


def test_dead_and_silent_servers_are_passed_over(etcd):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never says a word
        quiet, dead = silent.getsockname()[1], free_port()
        url = f"etcd://127.0.0.1:{quiet},127.0.0.1:{dead},{etcd.url.removeprefix('etcd://')}"

        async def story(client):
            for _ in range(3):
                assert (await client.get("/k")).revision > 0

        with_client(url, story)


def test_one_that_is_no_etcd_is_an_error_not_a_hang():
    async def run():
        async def web(reader, writer):
            writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(web, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            await check_reachable(parse_url(f"etcd://127.0.0.1:{port}"), Login())
        finally:
            server.close()

    with pytest.raises(CoordinationUnavailable):
        asyncio.run(run())


def test_a_client_outlives_its_server(etcd):
    async def story(client):
        before = await client.get("/k")
        waiting = asyncio.ensure_future(client.changed("/k", before.revision, 30))
        await asyncio.sleep(0.2)
        etcd.kill()
        with pytest.raises(CoordinationUnavailable):
            await asyncio.wait_for(waiting, 10)
        with pytest.raises(CoordinationUnavailable):
            await client.get("/k")
        etcd.start()
        deadline = time.monotonic() + 30
        while True:
            try:
                assert (await client.get("/k")).revision >= before.revision
            except CoordinationUnavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            else:
                return

    with_client(etcd.url, story)


# ---- logins


def test_who_does_not_log_in_is_refused_and_told_what_to_set(etcd):
    etcd.want_login("right")

    async def get(client):
        return await client.get("/k")

    for login in (Login(), Login(user="root", password="wrong"), Login(user="nobody", password="right")):
        with pytest.raises(ConfigError, match=r"etcd\.user"):
            with_client(etcd.url, get, login)
    assert with_client(etcd.url, get, Login(user="root", password="right")).revision > 0


def test_a_login_is_renewed_when_the_server_has_forgotten_it(etcd):
    etcd.want_login("right")

    async def story(client):
        lease = (await client.grant(60)).lease
        etcd.kill()
        etcd.start()  # its tokens were in memory
        await asyncio.sleep(0.7)
        deadline = time.monotonic() + 30
        while True:
            try:
                assert await client.keep_alive(lease) == 60
            except CoordinationUnavailable:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.1)
            else:
                return

    with_client(etcd.url, story, Login(user="root", password="right"))
