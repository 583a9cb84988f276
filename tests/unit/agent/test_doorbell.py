import asyncio
import socket
import time

import pytest

from ckptsvc.agent.launcher.doorbell import RING_TIMEOUT, hang_up, ring
from ckptsvc.control.effects import Answer


async def meanwhile_busy(port):
    """Ring, and keep the event loop busy for longer than an answer may take."""
    ringing = asyncio.ensure_future(ring("127.0.0.1", port))
    await asyncio.sleep(0)
    time.sleep(RING_TIMEOUT + 0.2)
    return await ringing


@pytest.fixture
def door():
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        yield listening.getsockname()[1]


@pytest.fixture
def closed():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def test_a_launcher_that_lives_answers_and_one_that_has_ended_does_not(closed):
    async def story():
        server, port = await hang_up("127.0.0.1")
        async with server:
            return await ring("127.0.0.1", port), await ring("127.0.0.1", closed), await ring("no.such.host.invalid", 1)

    assert asyncio.run(story()) == (Answer.UP, Answer.GONE, Answer.SILENT)


def test_who_drops_the_packets_is_silent(door):
    callers = [socket.socket() for _ in range(4)]
    try:
        for caller in callers:  # the kernel drops calls while nobody takes in those who wait
            caller.setblocking(False)
            caller.connect_ex(("127.0.0.1", door))
        assert asyncio.run(ring("127.0.0.1", door)) is Answer.SILENT
        assert asyncio.run(meanwhile_busy(door)) is Answer.SILENT
    finally:
        for caller in callers:
            caller.close()


def test_a_coordinator_that_is_too_busy_to_listen_does_not_take_that_for_silence(door, closed):
    assert asyncio.run(meanwhile_busy(door)) is Answer.UP
    assert asyncio.run(meanwhile_busy(closed)) is Answer.GONE
