"""Output to places that are slow, stand still, or fail."""

import asyncio
import os
import subprocess
import sys
import threading

import pytest
from harness.runtime import eventually

from ckptsvc.agent.launcher import outlet, output
from ckptsvc.agent.launcher.outlet import Outlet, Place

LINE = b"x" * 99 + b"\n"


class Pipe:
    """A pipe: a place to write to, and what comes out, once somebody begins to read."""

    def __init__(self):
        reading, writing = os.pipe()
        self.reading, self.writing = os.fdopen(reading, "rb"), os.fdopen(writing, "wb")
        self.fd, self._seen = writing, b""
        self._reader = threading.Thread(target=self._drain)

    def _drain(self):
        self._seen = self.reading.read()

    def read(self):
        """Begin to read."""
        self._reader.start()

    def seen(self):
        """All there was, to the end."""
        self.writing.close()
        self._reader.join()
        return self._seen


@pytest.fixture
def pipe():
    made = Pipe()
    yield made
    made.writing.close()
    made.reading.close()


def test_lines_come_out_as_they_went_in(tmp_path):
    out = Outlet("test")
    places = [Place(tmp_path / "logs" / name) for name in "ab"]
    for number in range(10_000):
        out.put(places[number % 2], f"{number}\n".encode())
    for place in places:
        out.finish(place)
    out.close()
    for odd, name in enumerate("ab"):
        assert (tmp_path / "logs" / name).read_text().splitlines() == [str(n) for n in range(odd, 10_000, 2)]


def test_what_finds_no_room_is_dropped_and_said_where_it_is_missing(pipe, monkeypatch):
    monkeypatch.setattr(outlet, "BUFFER", 1 << 20)
    out, place = Outlet("test"), Place(None, pipe.fd)
    for _ in range(20_000):  # nobody reads: were one of these to wait, it would wait for ever
        out.put(place, LINE)
    pipe.read()
    eventually(lambda: out._held == 0, "what waits to be written")
    out.put(place, b"the end\n")
    out.finish(place)
    out.close()
    *lines, said, end = pipe.seen().decode().splitlines()
    assert 0 < len(lines) < 20_000
    assert said == f"[ckptsvc run: {20_000 - len(lines)} lines are missing here: writing was slow]"
    assert end == "the end"


def test_one_that_stands_still_is_not_waited_for_at_the_end(pipe, monkeypatch):
    monkeypatch.setattr(outlet, "STANDSTILL", 0.1)
    out, place = Outlet("test"), Place(None, pipe.fd)
    for _ in range(2000):
        out.put(place, LINE)
    out.close()
    assert out._thread.is_alive()
    pipe.read()
    out._thread.join()
    assert pipe.seen() == LINE * 2000


def test_a_terminal_that_is_non_blocking_gets_all(pipe):
    os.set_blocking(pipe.fd, False)
    out, place = Outlet("test"), Place(None, pipe.fd)
    for _ in range(10_000):
        out.put(place, LINE)
    pipe.read()
    out.close()
    assert pipe.seen() == LINE * 10_000


@pytest.mark.parametrize("closed", ["the other end", "this end"])
def test_one_that_fails_is_given_up_and_says_why_once(pipe, closed):
    pipe.reading.close()
    said = []
    out, place = Outlet("test"), Place(None, pipe.fd if closed == "the other end" else -1, said.append)
    for _ in range(100):
        out.put(place, LINE)
    out.close()
    assert said == ["Broken pipe" if closed == "the other end" else "Bad file descriptor"]


def test_a_log_disk_that_stands_still_holds_up_neither_the_loop_nor_the_terminal(tmp_path, capfd, monkeypatch):
    """A FIFO that nobody reads: to open it for writing does not return."""
    monkeypatch.setattr(outlet, "STANDSTILL", 0.1)
    disk = tmp_path / "disk"
    os.mkfifo(disk)

    async def run():
        out = output.Output()
        reading, writing = output.pipe()
        copying = asyncio.ensure_future(out.copy(reading, "3", disk))
        await asyncio.to_thread(os.write, writing, b"one\ntwo")
        os.close(writing)
        await copying
        await out.close()

    asyncio.run(run())
    assert capfd.readouterr().out == "[3] one\n[3] two\n"
    os.close(os.open(disk, os.O_RDONLY | os.O_NONBLOCK))  # let the thread go


CHATTY = """
case $CKPTSVC_ATTEMPT in 1) yes 0123456789 | head -n 100000; exit 3;; esac
touch "$(dirname "$0")/second"
"""


def test_a_terminal_that_nobody_reads_does_not_keep_the_launcher_from_a_restart(runtime, tmp_path):
    script = tmp_path / "rank.sh"
    script.write_text(CHATTY)
    command = [sys.executable, "-m", "ckptsvc.cli.main", "run", "--no-python", "sh", str(script)]
    with subprocess.Popen(command, env=runtime.environ, stdout=subprocess.PIPE, text=True) as job:
        eventually((tmp_path / "second").exists, "the second attempt")
        shown, _ = job.communicate(timeout=30)
    assert job.returncode == 0
    assert shown == "[0] 0123456789\n" * 100_000
