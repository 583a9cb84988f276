"""What makes a node unfit, and that a check that hangs is named."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

import pytest
from harness.runtime import tmpfs

from ckptsvc.agent.launcher import preflight
from ckptsvc.agent.launcher.doorbell import RING_TIMEOUT, hang_up, ring
from ckptsvc.agent.launcher.preflight import cards, loopback, memory, reason_against, room
from ckptsvc.control.effects import Answer


def reason(*arguments, **named):
    return asyncio.run(reason_against(*arguments, **named))


def test_this_machine_is_fit(tmp_path):
    assert reason("/dev/shm", [str(tmp_path)], "127.0.0.1", timeout=60.0) == ""
    assert list(tmp_path.iterdir()) == []


def test_all_that_is_wrong_is_said(tmp_path):
    said = reason(str(tmp_path / "none"), ["/proc"], "127.0.0.1", timeout=60.0)
    assert f"shared memory in {tmp_path / 'none'}: No such file or directory" in said
    assert "disk at /proc: /proc has 0 MiB left, and 64 MiB are the least" in said


def test_a_check_that_hangs_is_named(tmp_path, monkeypatch):
    """Here the answer of a disk never comes: it is a named pipe."""
    (tmp_path / "preflight.py").write_text(
        Path(preflight.__file__).read_text().replace("vfs = os.statvfs(directory)", "open(directory / 'pipe')")
    )
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "preflight.py"))
    assert reason(str(tmp_path), [], "127.0.0.1", timeout=2.0) == f"shared memory in {tmp_path}: no answer in 2 s"


def test_checks_that_cannot_be_made_are_not_passed(tmp_path, monkeypatch):
    (tmp_path / "preflight.py").write_text("raise SystemExit(1)")
    monkeypatch.setattr(preflight, "__file__", str(tmp_path / "preflight.py"))
    assert reason("/dev/shm", [], "127.0.0.1", timeout=60.0) == "starting: it ended without a result"


@pytest.mark.parametrize(
    ("kib", "said"), [(100 << 10, "100 MiB are available, and 512 MiB are the least"), (1 << 20, "")]
)
def test_memory(tmp_path, kib, said):
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable:   {kib} kB\n")
    assert memory(tmp_path / "meminfo") == said


def test_an_old_kernel_does_not_tell_how_much_memory_is_available(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 1 kB\n")
    assert memory(tmp_path / "meminfo") == ""


def test_room(tmp_path):
    with tmpfs(tmp_path / "small", "1m") as small:
        assert room(small, 1 << 19) == ""
        assert room(small, 1 << 30) == f"{small} has 1 MiB left, and 1024 MiB are the least"
        (small / "fill").write_bytes(b"x" * (1 << 20))
        with pytest.raises(OSError, match="No space left"):
            room(small, 0)


def test_an_address_of_another_host_is_not_this_nodes():
    with pytest.raises(OSError, match="assign"):
        loopback("192.0.2.1")


class TestCards:
    @pytest.fixture
    def sysfs(self, tmp_path):
        def write(path, text):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text + "\n")

        return write

    def look(self, tmp_path):
        return cards(tmp_path / "cxi")

    def test_there_may_be_none(self, tmp_path):
        assert self.look(tmp_path) == ""

    def test_cassini(self, tmp_path, sysfs):
        sysfs("cxi/cxi0/device/port/link", "down")
        sysfs("cxi/cxi1/device/port/0/link/state", "up")
        assert self.look(tmp_path) == "cxi0 has no link"

    def test_cards_that_nobody_uses(self, tmp_path, sysfs):
        sysfs("cxi/cxi0/device/port/link", "down")
        assert self.look(tmp_path) == ""


@pytest.mark.parametrize("planted", ["link", "file"])
def test_what_others_have_put_in_a_shared_directory_is_left_alone(tmp_path, monkeypatch, planted):
    monkeypatch.setattr(preflight.secrets, "token_hex", lambda _: "guessed")
    victim, trial = tmp_path / "victim", tmp_path / ".ckptsvc-trial-guessed"
    victim.write_text("precious")
    if planted == "link":
        trial.symlink_to(victim)
    else:
        trial.write_text("precious")
    with pytest.raises(FileExistsError):
        room(tmp_path, 0)
    assert victim.read_text() == trial.read_text() == "precious"


class TestDoorbell:
    def test_it_answers_while_its_owner_lives(self):
        async def run():
            server, port = await hang_up("127.0.0.1")
            assert await ring("127.0.0.1", port) is Answer.UP
            server.close()
            await server.wait_closed()
            assert await ring("127.0.0.1", port) is Answer.GONE
            return port

        asyncio.run(run())

    def test_also_when_it_is_busy_or_frozen(self):
        """Nobody accepts here: the kernel answers."""
        with socket.create_server(("127.0.0.1", 0), backlog=8) as server:
            assert asyncio.run(ring("127.0.0.1", server.getsockname()[1])) is Answer.UP

    def test_a_packet_that_is_lost_is_no_lost_host(self):
        """The kernel drops who comes while the queue is full, and says nothing, as a network does."""

        async def run():
            with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
                address = server.getsockname()
                with socket.create_connection(address):  # the queue is full now
                    ringing = asyncio.ensure_future(ring(*address))
                    await asyncio.sleep(RING_TIMEOUT / 3)
                    assert not ringing.done(), "the first try was not lost"
                    server.accept()[0].close()
                    return await ringing

        assert asyncio.run(run()) is Answer.UP

    def test_nobody_at_all_is_known_in_time(self):
        async def run():
            with (
                socket.create_server(("127.0.0.1", 0), backlog=0) as server,
                socket.create_connection(server.getsockname()),
            ):
                return await ring(*server.getsockname())

        assert asyncio.run(run()) is Answer.SILENT

    def test_a_frozen_launcher_is_rung_at_many_times(self):
        """Whoever rings stays in the kernel's queue, and nobody takes him out of it."""

        async def run():
            server, port = await hang_up("127.0.0.1")
            with contextlib.ExitStack() as connections:
                for _ in range(200):  # this thread does not get to accept them
                    connections.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            server.close()
            await server.wait_closed()

        asyncio.run(run())

    @pytest.mark.parametrize("address", ["no-such-host.invalid", "0.0.0.0.0"])
    def test_an_address_that_leads_nowhere_is_silent(self, address):
        assert asyncio.run(ring(address, 9)) is Answer.SILENT
