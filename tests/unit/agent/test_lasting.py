"""An agent a part of which has failed ends; and one that was killed has left that on record."""

import asyncio
import logging
import os
from pathlib import Path

import pytest

from ckptsvc.agent.process import predecessor
from ckptsvc.agent.process.lasting import dispensable, until_told


async def fails(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


def test_the_first_failure_is_told_and_what_ends_by_itself_is_none() -> None:
    async def run() -> BaseException | None:
        stopping = asyncio.Event()
        ended, failed = (asyncio.ensure_future(c) for c in (asyncio.sleep(0), fails(MemoryError())))
        return await until_told(stopping, [ended, failed])

    assert isinstance(asyncio.run(run()), MemoryError)


def test_told_to_stop_it_does_not_wait_for_anything() -> None:
    async def run() -> BaseException | None:
        stopping = asyncio.Event()
        lasting = asyncio.ensure_future(asyncio.sleep(600))
        asyncio.get_running_loop().call_soon(stopping.set)
        found = await until_told(stopping, [lasting])
        lasting.cancel()
        return found

    assert asyncio.run(run()) is None


def test_what_is_dispensable_is_missed_and_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        asyncio.run(dispensable("no cards", fails(ValueError("of a file"))))
    assert [record.getMessage() for record in caplog.records] == ["no cards"]


def test_only_what_has_not_ended_in_good_order_is_told(tmp_path: Path) -> None:
    lock = os.open(tmp_path / "agent.lock", os.O_RDWR | os.O_CREAT)
    assert predecessor.begin(lock) == ""
    assert predecessor.begin(lock) == f"the agent before this one, process {os.getpid()}, was killed or broke off"
    predecessor.end(lock)
    assert predecessor.begin(lock) == ""
    os.ftruncate(lock, 0)
    os.pwrite(lock, b"7 -2\n", 0)  # two less than none
    assert "the kernel has killed" in predecessor.begin(lock)
    for rubbish in (b"\xff\n", b"7\n", b"x y\n", b"1 2 3\n"):
        os.ftruncate(lock, 0)
        os.pwrite(lock, rubbish, 0)
        assert predecessor.begin(lock) == ""
    os.close(lock)
