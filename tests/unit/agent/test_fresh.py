"""Orders that lie in a socket while a process stands still. It stands still here by blocking its event loop."""

import asyncio
import time
from contextlib import aclosing
from types import SimpleNamespace

import pytest

from ckptsvc.agent.coordination import fresh as module
from ckptsvc.agent.coordination.fresh import fresh
from ckptsvc.agent.launches import Launcher, Launches
from ckptsvc.agent.local import Local
from ckptsvc.rpc.trust import BySecret
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Metrics


class Stream:
    """Messages that a test sends; None ends it, an exception fails it."""

    def __init__(self):
        self.sent = asyncio.Queue()

    async def __aiter__(self):
        while (message := await self.sent.get()) is not None:
            if isinstance(message, Exception):
                raise message
            yield message


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for name, seconds in (("PAUSE", 0.3), ("DOUBT", 0.5), ("LOOK_EVERY", 0.05)):
        monkeypatch.setattr(module, name, seconds)


async def received(stream, into):
    async with aclosing(fresh(stream)) as messages:
        async for message in messages:
            into.append(message)


def run(scenario):
    """Play a scenario with a stream and its reader; returns what the reader got."""

    async def play():
        stream, got = Stream(), []
        reader = asyncio.ensure_future(received(stream, got))
        await asyncio.sleep(0.1)
        await scenario(stream, got)
        await reader
        return got

    return asyncio.run(play())


def test_all_come_through_in_order_to_the_end():
    async def scenario(stream, got):
        for message in (1, 2, 3, None):
            stream.sent.put_nowait(message)

    assert run(scenario) == [1, 2, 3]


def test_a_stream_that_fails_fails():
    async def scenario(stream, got):
        stream.sent.put_nowait(1)
        stream.sent.put_nowait(OSError("broken"))

    with pytest.raises(OSError, match="broken"):
        run(scenario)


@pytest.mark.parametrize("sent", ["before it goes on", "after it goes on"])
def test_what_came_in_a_pause_is_dropped_when_the_stream_has_ended(sent, caplog):
    async def scenario(stream, got):
        if sent == "before it goes on":
            stream.sent.put_nowait("stale")
        time.sleep(0.6)
        await asyncio.sleep(0.01)
        stream.sent.put_nowait("stale")
        await asyncio.sleep(0.01)
        stream.sent.put_nowait(None)

    assert run(scenario) == []
    assert "orders from before are not obeyed" in caplog.text


def test_and_obeyed_when_it_has_not():
    async def scenario(stream, got):
        stream.sent.put_nowait("in the pause")
        time.sleep(0.6)
        await asyncio.sleep(0.1)
        assert got == []
        while not got:
            await asyncio.sleep(0.01)
        stream.sent.put_nowait("later")
        stream.sent.put_nowait(None)

    assert run(scenario) == ["in the pause", "later"]


def test_an_attempt_that_has_been_here_is_not_started_again():
    async def play():
        metrics = Metrics("test")
        shell = SimpleNamespace(core=None)
        local = Local("n1", SimpleNamespace(arenas={}), metrics, shell, BySecret("secret"))
        launches = Launches(local)
        hello = agent_pb2.LauncherHello(job="job", nproc=1, min_nodes=1, max_nodes=1)
        launcher = launches._by_job["job"] = Launcher(hello, "")
        launcher.ready = agent_pb2.LauncherReady(attempt=2)  # the second has run here, and is over
        for attempt in (1, 2, 3, 2, 3, 4):
            launches.order(pb.Order(job="job", start=agent_pb2.StartRanks(attempt=attempt)))
        started = [launcher.orders.get_nowait().start.attempt for _ in range(launcher.orders.qsize())]
        return started, metrics.orders_refused._value.get()

    assert asyncio.run(play()) == ([3, 4], 3.0)
