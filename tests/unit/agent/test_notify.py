"""What systemd hears, on a real datagram socket."""

import asyncio
import os
import secrets
import select
import socket
import time
from pathlib import Path

import pytest

from ckptsvc.agent.process.notify import MAX_STATUS, Notifier


@pytest.fixture(params=["path", "abstract"])
def manager(request, tmp_path_factory):
    """(socket, its address as systemd gives it)."""
    name = f"@ckptsvc-test-{secrets.token_hex(8)}"
    address = name if request.param == "abstract" else str(tmp_path_factory.mktemp("n") / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name[1:]}" if request.param == "abstract" else address)
        sock.settimeout(5)
        yield sock, address


def hear(sock: socket.socket) -> list[str]:
    return sock.recv(4096).decode().split("\n")


def notifier(address: str, **environ: str) -> Notifier:
    return Notifier.of({"NOTIFY_SOCKET": address, **environ}, os.getpid())


def test_each_message(manager) -> None:
    sock, address = manager
    told = notifier(address)
    told.ready("serves\nREADY=0")
    assert hear(sock) == ["READY=1", "STATUS=serves READY=0"], "a status is one line"
    before = time.monotonic_ns() // 1000
    told.reloading("reads")
    first, second, third = hear(sock)
    assert (first, third) == ("RELOADING=1", "STATUS=reads")
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000
    told.stopping("x" * 10_000)
    assert hear(sock) == ["STOPPING=1", f"STATUS={'x' * MAX_STATUS}"]


def test_the_watchdog_hears_twice_in_its_time_and_no_more_once_the_loop_is_stuck(manager) -> None:
    sock, address = manager
    told = notifier(address, WATCHDOG_USEC="200000")
    assert told.watchdog == 0.2
    told.ready("serves")
    hear(sock)
    heard: list[list[str]] = []

    async def scenario() -> None:
        beating = asyncio.ensure_future(told.beat(lambda: "serves"))
        for _ in range(3):
            heard.append(await asyncio.to_thread(hear, sock))
        time.sleep(0.5)  # stuck
        assert select.select([sock], [], [], 0)[0] == []
        beating.cancel()

    asyncio.run(scenario())
    assert heard == [["WATCHDOG=1"]] * 3


def test_a_status_is_told_when_it_changes(manager) -> None:
    sock, address = manager
    told = notifier(address, WATCHDOG_USEC="20000")
    told.ready("0 ranks")
    hear(sock)
    words = iter(["0 ranks", "2 ranks", "2 ranks"])

    async def scenario() -> None:
        beating = asyncio.ensure_future(told.beat(lambda: next(words)))
        assert [await asyncio.to_thread(hear, sock) for _ in range(3)] == [
            ["WATCHDOG=1"],
            ["WATCHDOG=1", "STATUS=2 ranks"],
            ["WATCHDOG=1"],
        ]
        beating.cancel()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}],
    ids=["none", "zero", "nonsense", "another process's"],
)
def test_no_watchdog(environ: dict[str, str]) -> None:
    assert notifier("/nowhere", **environ).watchdog is None


@pytest.mark.parametrize("address", ["", "vsock:2:1", "relative", "/no/such/socket", "@nobody"])
def test_where_nobody_listens_nothing_happens(address: str, tmp_path: Path) -> None:
    told = notifier(address, WATCHDOG_USEC="1000000")
    told.ready("serves")
    told.stopping("ends")
