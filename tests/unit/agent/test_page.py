"""What the agent serves: how often the document is made, what is answered to whom, and TLS beyond loopback."""

import asyncio
import contextlib
import json
import ssl

import pytest
from harness.pages import TOKEN, document, incident
from prometheus_client import CollectorRegistry, Counter

from ckptsvc.agent.http import httpd, page
from ckptsvc.agent.http.page import Feed, Site
from ckptsvc.agent.incidents import IncidentLog
from ckptsvc.agent.status.recent import MAX_LISTED, Recent
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address
from ckptsvc.rpc.certificates import issue, make_authority
from ckptsvc.rpc.tls import Shown
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def incident_of(number, **changes):
    fields = {
        "id": f"1-{number}-ab",
        "job": "job",
        "attempt": 1,
        "kind": "died",
        "sentence": f"rank {number} died",
        "rank": number,
    }
    return pb.Incident(**fields | {"opened": f"2026-01-01T00:{number // 60:02d}:{number % 60:02d}Z"} | changes)


class TestFeed:
    def test_a_document_is_made_once_a_second_for_all_who_look(self):
        made, clock = [], Clock()
        feed = Feed(lambda: made.append(1) or {"n": len(made)}, clock)
        for _ in range(5):
            assert json.loads(feed.document()) == {"n": 1}
        clock.now += page.EVERY
        assert json.loads(feed.document()) == {"n": 2}

    def test_one_that_takes_long_is_made_seldom(self):
        clock, made = Clock(), []

        def make():
            clock.now += 0.04
            made.append(1)
            return {}

        feed = Feed(make, clock)
        feed.document()
        clock.now += 0.04 * page.SHARE - 0.1
        feed.document()
        assert len(made) == 1
        clock.now += 0.1
        feed.document()
        assert len(made) == 2

    def test_nobody_waits_for_ever_for_the_next(self):
        clock, made = Clock(), []

        def make():
            clock.now += 60.0
            made.append(1)
            return {}

        feed = Feed(make, clock)
        feed.document()
        feed.document()
        assert len(made) == 2

    def test_what_has_not_changed_is_not_told_again(self, monkeypatch):
        monkeypatch.setattr(page, "EVERY", 0.01)
        monkeypatch.setattr(page, "ALIVE_EVERY", 0.05)
        told = {"time": 0.0, "jobs": 0}

        def make():
            told["time"] += 1  # which alone is no news
            return dict(told)

        async def story():
            events = Feed(make).events()
            found = [await anext(events) for _ in range(4)]
            told["jobs"] = 1
            while b'"jobs":1' not in found[-1]:
                found.append(await anext(events))
            return found

        found = asyncio.run(asyncio.wait_for(story(), 20))
        assert found[0] == b"retry: 2000\n\n"
        assert found[1].startswith(b"event: status\nid: 1\ndata: {")
        assert all(each.startswith(b": keep-alive\nevent: alive\ndata: ") for each in found[2:-1])
        assert found[-1].startswith(b"event: status\nid: 2\n")


class TestRecent:
    def test_the_newest_incidents_a_line_each(self):
        recent = Recent()
        for number in range(MAX_LISTED + 10):
            recent.note(incident_of(number))
        recent.note(incident_of(30, actions=["restart 1 of 3"], sentence="<b>\x1b[2J" + "x" * 900))
        found = recent.newest_first()
        assert len(found) == MAX_LISTED
        assert (found[0]["rank"], found[-1]["rank"]) == (59, 10)
        again = next(each for each in found if each["rank"] == 30)
        assert again["actions"] == ["restart 1 of 3"]
        assert again["sentence"] == "<b>" + "x" * 397

    def test_one_that_cannot_be_named_does_no_harm(self):
        recent = Recent()
        recent.note(incident_of(1, id="-1-1"))
        recent.note(incident_of(1, opened="?"))
        assert recent.newest_first() == []

    def test_those_that_were_kept_are_there_after_a_restart(self, tmp_path):
        recent = Recent()
        recent.kept = IncidentLog(tmp_path / "incidents")
        recent.kept.write(incident_of(1))
        recent.kept.write(incident_of(2))
        (tmp_path / "incidents" / "20260101T000003Z-abcdef-1-3-ab.json").write_text("nonsense")
        recent.note(incident_of(2, sentence="more is known by now"))
        asyncio.run(recent.load())
        assert [each["sentence"] for each in recent.newest_first()] == ["more is known by now", "rank 1 died"]


@contextlib.asynccontextmanager
async def site(certificates=lambda: None, recent=None, host="127.0.0.1"):
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc(3)
    found = Site(lambda: document(incidents=[incident()]), registry, recent or Recent(), TOKEN, certificates)
    try:
        yield found.open(Address(host, 0))
    finally:
        await found.close()


async def get(port, path, tls=None, **headers):
    name = {"server_hostname": "me.user.ckptsvc"} if tls else {}
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls, **name)
    lines = [f"GET {path} HTTP/1.1", "Host: 127.0.0.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer = await reader.read()
    writer.close()
    return answer.decode()


class TestSite:
    def run(self, story, *arguments, **options):
        async def whole():
            async with site(*arguments, **options) as (where, url):
                return await asyncio.wait_for(story(int(where.rpartition(":")[2]), url), 30)

        return asyncio.run(whole())

    def test_says_by_number_where_localhost_is_for_that_name_has_two_addresses(self):
        async def story(port, url):
            assert url == f"http://127.0.0.1:{port}"
            assert "200 OK" in await get(port, "/healthz")

        self.run(story, host="localhost")

    def test_programs_get_all_there_is(self, tmp_path):
        recent = Recent()
        recent.kept = IncidentLog(tmp_path / "incidents")
        recent.kept.write(incident_of(1, sentence="<script>x</script> died"))
        token = {"Authorization": f"Bearer {TOKEN}"}

        async def story(port, url):
            assert url == f"http://127.0.0.1:{port}"
            assert "things_total 3.0" in await get(port, "/metrics", **token)
            openmetrics = await get(port, "/metrics", Accept="application/openmetrics-text; version=1.0.0", **token)
            assert openmetrics.endswith("# EOF\n")
            assert (
                json.loads((await get(port, "/status.json", **token)).partition("\r\n\r\n")[2])["node"] == "nid000001"
            )
            report = await get(port, "/incidents/last", **token)
            assert "&lt;script&gt;x&lt;/script&gt; died" in report
            assert "script-src" not in report
            assert "frame-ancestors 'none'" in report
            assert "404 Not Found" in await get(port, "/incidents/1-9-ab", **token)
            shown = await get(port, "/", **token)
            assert "script-src 'sha256-" in shown.partition("\r\n\r\n")[0]

        self.run(story, recent=recent)

    def test_a_person_signs_in_once(self):
        async def story(port, url):
            answer = await get(port, f"/?token={TOKEN}")
            assert "303 See Other" in answer
            assert "\r\nLocation: /\r\n" in answer
            cookie = answer.partition("Set-Cookie: ")[2].partition(";")[0]
            assert "200 OK" in await get(port, "/", Cookie=cookie)
            door = await get(port, "/", Accept="text/html")
            assert "401 Unauthorized" in door
            assert "ckptsvc status --url" in door

        self.run(story)

    def test_beyond_loopback_it_takes_certificates(self):
        async def story():
            async with site(host="0.0.0.0"):
                pass

        with pytest.raises(ConfigError, match="which is not loopback") as caught:
            asyncio.run(story())
        assert "tls.cert_file" in caught.value.hint

    def test_with_certificates_it_speaks_tls_only_and_shows_new_ones(self, monkeypatch):
        monkeypatch.setattr(httpd, "REQUEST_TIME", 2.0)
        authority = make_authority("one", 1)
        pairs = [issue(authority, "me", 1.0) for _ in range(2)]
        shown = [Shown(authority.certificate, pair.certificate, pair.key, "me.user.ckptsvc") for pair in pairs]
        now = [shown[0]]
        client = ssl.create_default_context(cadata=authority.certificate.decode())

        async def serial(port):
            _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=client, server_hostname="me.user.ckptsvc")
            found = writer.get_extra_info("peercert")["serialNumber"]
            writer.transport.abort()
            return found

        async def story(port, url):
            assert url.startswith("https://")
            assert url.endswith(f":{port}")
            answer = await get(port, f"/?token={TOKEN}", client)
            assert "; SameSite=Strict; Secure\r\n" in answer
            with contextlib.suppress(OSError):
                assert "200" not in await get(port, "/healthz")
            reader, silent = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.suppress(OSError):
                assert await reader.read() == b""  # no handshake, no patience
            silent.close()
            first = await serial(port)
            now[0] = shown[1]
            assert await serial(port) != first

        self.run(story, lambda: now[0], host="0.0.0.0")
