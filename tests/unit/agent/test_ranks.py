"""Ranks under a keeper: how they start, end and are stopped, and that nothing of them outlives anybody."""

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from harness.runtime import eventually
from harness.shell_run import alive

from ckptsvc.agent.launcher import keeper, output
from ckptsvc.agent.launcher.keeper import children_of
from ckptsvc.agent.launcher.ranks import Ranks
from ckptsvc.agent.watching.procfs import OomKills

TREE = """
echo $$ > {notes}/rank
sh -c 'echo $$ > {notes}/child; exec sleep 60' &
setsid sh -c 'echo $$ > {notes}/daemon; exec sleep 60' &
sh -c '(echo > /dev/null; exec setsid sh -c "echo \\$\\$ > {notes}/orphan; exec sleep 60") &'
"""


class Kept:
    """Ranks of a test, and what was said of them."""

    def __init__(self, script, folder, environ=None):
        self.said, self.ended = [], []
        command = ["sh", "-c", script]
        environ = os.environ | (environ or {})
        self.ranks = Ranks(command, environ, None, folder, self.ended.append, self.said.append)

    async def start(self, count=1, **variables):
        own = {rank: {"RANK": str(rank), **variables} for rank in range(count)}
        await self.ranks.start(1, own)

    async def all_ended(self):
        while any(rank.status is None for rank in self.ranks.live.values()):
            await asyncio.sleep(0.01)
        return [rank.status for rank in self.ranks.live.values()]


@asynccontextmanager
async def kept(script, folder, **environ):
    found = Kept(script, folder, environ)
    try:
        yield found
    finally:
        await found.ranks.close()


async def there(path):
    """The process id in a file, once it is there."""
    while not (path.exists() and path.read_text().strip()):
        await asyncio.sleep(0.01)
    return int(path.read_text())


class TestOneRank:
    @pytest.mark.parametrize(("script", "status"), [("exit 0", 0), ("exit 7", 7), ("kill -9 $$", -9)])
    def test_its_end_is_told(self, tmp_path, script, status):
        async def run():
            async with kept(script, tmp_path) as found:
                await found.start()
                assert await found.all_ended() == [status]
                while not found.ended:  # what it said last is looked at first
                    await asyncio.sleep(0.01)
                assert [rank.number for rank in found.ended] == [0]

        asyncio.run(run())

    @pytest.mark.parametrize(
        ("script", "detail"),
        [
            ("echo 'ValueError: not this one'; echo '[rank0]: torch.OutOfMemoryError: too big'; echo bye; exit 3",
             "torch.OutOfMemoryError: too big"),
            ("printf 'Traceback\\nMemoryError'; exit 1", "MemoryError"),
            ("echo 'no Error: here'; exit 1", ""),
            ("sleep 60 & echo 'KeyError: 1'; exit 1", "KeyError: 1"),  # the pipe stays open
            ("echo 'KeyError: 1'; exit 0", ""),
        ],
    )  # fmt: skip
    def test_an_exception_is_told_with_it(self, tmp_path, script, detail):
        async def scenario():
            async with kept(script, tmp_path) as found:
                await found.start()
                while not found.ended:
                    await asyncio.sleep(0.01)
                return found.ended[0].detail

        assert asyncio.run(scenario()) == detail

    def test_that_the_kernel_has_killed_something_for_lack_of_memory_is_told_with_it(self, tmp_path):
        async def scenario(script):
            async with kept(script, tmp_path) as found:
                vmstat = tmp_path / "vmstat"
                vmstat.write_text("pgmajfault 3\noom_kill 4\n")
                found.ranks._oom = OomKills(vmstat)
                vmstat.write_text("pgmajfault 3\noom_kill 5\n")
                await found.start()
                while not found.ended:
                    await asyncio.sleep(0.01)
                return found.ended[0].detail

        assert asyncio.run(scenario("kill -9 $$")).startswith("probably out of memory, for which the kernel has just")
        assert asyncio.run(scenario("kill -15 $$")) == ""

    def test_it_gets_its_variables_and_those_of_all(self, tmp_path, capfdbinary):
        async def run():
            async with kept('echo "$COLOUR $RANK $OWN"', tmp_path, COLOUR="blue") as found:
                await found.start(2, OWN="o")
                await found.all_ended()
                await found.ranks.stop(0.0)

        asyncio.run(run())
        assert (tmp_path / "attempt_1" / "rank_1.log").read_text() == "blue 1 o\n"
        assert sorted(capfdbinary.readouterr().out.splitlines()) == [b"[0] blue 0 o", b"[1] blue 1 o"]

    def test_it_leads_a_session_and_has_no_input(self, tmp_path):
        async def run():
            async with kept("ps -o sid= -p $$; echo $$; cat; readlink /proc/$$/fd/0", tmp_path) as found:
                await found.start()
                await found.all_ended()
                await found.ranks.stop(0.0)

        asyncio.run(run())
        session, pid, null = (tmp_path / "attempt_1" / "rank_0.log").read_text().split()
        assert session == pid
        assert null == "/dev/null"

    def test_signals_that_the_launcher_ignores_or_handles_are_as_they_were_before(self, tmp_path):
        async def run():
            async with kept("exec grep -E 'SigIgn|SigBlk' /proc/self/status", tmp_path) as found:
                await found.start()
                await found.all_ended()
                await found.ranks.stop(0.0)

        asyncio.run(run())
        text = (tmp_path / "attempt_1" / "rank_0.log").read_text()
        grep = ["grep", "-E", "SigIgn|SigBlk", "/proc/self/status"]
        assert text == subprocess.run(grep, capture_output=True, text=True, check=True).stdout

    def test_signals_that_a_scheduler_sends_to_all_processes_do_not_end_the_keeper(self, tmp_path):
        async def run():
            async with kept(
                f"trap 'exit 3' USR1; echo $$ > {tmp_path}/rank; while :; do sleep 0.05; done", tmp_path
            ) as found:
                await found.start()
                rank = await there(tmp_path / "rank")
                for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGHUP):
                    os.kill(found.ranks._process.pid, number)
                await asyncio.sleep(0.2)
                os.kill(rank, signal.SIGUSR1)
                assert await found.all_ended() == [3]
                assert found.said == []
                await found.ranks.stop(0.0)

        asyncio.run(run())

    def test_a_program_that_is_not_there(self, tmp_path):
        async def run():
            async with kept("", tmp_path) as found:
                found.ranks._command = ["/nonexistent", "x"]
                await found.start()
                assert await found.all_ended() == [keeper.NOT_FOUND]
                await found.ranks.stop(0.0)

        asyncio.run(run())
        text = (tmp_path / "attempt_1" / "rank_0.log").read_text()
        assert text == "ckptsvc run: cannot start /nonexistent: No such file or directory\n"

    def test_a_very_long_line_and_a_torn_one_come_through(self, tmp_path, capfdbinary):
        async def run():
            async with kept("head -c 300000 /dev/zero | tr '\\0' x; printf '\\nlast'", tmp_path) as found:
                await found.start()
                await found.all_ended()
                await found.ranks.stop(0.0)

        asyncio.run(run())
        assert (tmp_path / "attempt_1" / "rank_0.log").read_bytes() == b"x" * 300000 + b"\nlast"
        shown = capfdbinary.readouterr().out.splitlines()
        assert all(line.startswith(b"[0] ") for line in shown)
        assert b"".join(line[4:] for line in shown) == b"x" * 300000 + b"last"


class TestStopping:
    def test_who_obeys_is_not_killed(self, tmp_path):
        async def run():
            async with kept("trap 'exit 5' TERM; echo > $NOTE; while :; do sleep 0.05; done", tmp_path) as found:
                await found.start(NOTE=str(tmp_path / "note"))
                while not (tmp_path / "note").exists():
                    await asyncio.sleep(0.01)
                assert await found.ranks.stop(20.0) == []
                assert [rank.status for rank in found.ended] == [5]
                assert found.ranks.live == {}

        asyncio.run(run())

    def test_who_does_not_is(self, tmp_path):
        async def run():
            async with kept("trap '' TERM; echo $$ > $NOTE; while :; do sleep 0.05; done", tmp_path) as found:
                await found.start(NOTE=str(tmp_path / "note"))
                await there(tmp_path / "note")
                await found.ranks.stop(0.1)
                assert [rank.status for rank in found.ended] == [-9]

        asyncio.run(run())

    def test_a_frozen_rank_obeys_too(self, tmp_path):
        async def run():
            async with kept("echo $$ > $NOTE; exec sleep 60", tmp_path) as found:
                await found.start(NOTE=str(tmp_path / "note"))
                os.kill(await there(tmp_path / "note"), signal.SIGSTOP)
                await found.ranks.stop(20.0)
                assert [rank.status for rank in found.ended] == [-15]

        asyncio.run(run())

    def test_whatever_a_rank_has_started_is_killed_too(self, tmp_path):
        async def run():
            async with kept(TREE.format(notes=tmp_path) + "wait", tmp_path) as found:
                await found.start()
                pids = [await there(tmp_path / name) for name in ("rank", "child", "daemon", "orphan")]
                assert all(alive(pid) for pid in pids)
                assert await found.ranks.stop(0.1) == []
                assert not any(alive(pid) for pid in pids)

        asyncio.run(run())

    def test_also_when_the_rank_has_ended_long_before(self, tmp_path):
        async def run():
            async with kept(TREE.format(notes=tmp_path) + "sleep 0.3; exit 3", tmp_path) as found:
                await found.start()
                pids = [await there(tmp_path / name) for name in ("child", "daemon", "orphan")]
                assert await found.all_ended() == [3]
                assert all(alive(pid) for pid in pids)
                await found.ranks.stop(0.0)
                assert not any(alive(pid) for pid in pids)

        asyncio.run(run())

    def test_others_can_be_started_afterwards(self, tmp_path):
        async def run():
            async with kept("exit $CODE", tmp_path) as found:
                for code in range(5):
                    await found.start(3, CODE=str(code))
                    assert await found.all_ended() == [code] * 3
                    await found.ranks.stop(0.0)

        asyncio.run(run())


class TestDeaths:
    def test_of_the_keeper(self, tmp_path):
        """The ranks end with it, and are told; the next ones have another keeper."""

        async def run():
            async with kept(TREE.format(notes=tmp_path) + "wait", tmp_path) as found:
                await found.start()
                pids = [await there(tmp_path / name) for name in ("rank", "child")]
                left = [await there(tmp_path / name) for name in ("daemon", "orphan")]
                found.ranks._process.kill()
                assert await found.all_ended() == [-9]
                while any(alive(pid) for pid in pids):
                    await asyncio.sleep(0.01)
                assert await found.ranks.stop(0.0) == []
                for pid in left:  # they wanted to be out of reach, and their keeper was killed
                    os.kill(pid, signal.SIGKILL)
                (tmp_path / "rank").unlink()
                await found.start()
                assert alive(await there(tmp_path / "rank"))
                assert "the keeper of the ranks has died" in found.said[0]

        asyncio.run(run())

    def test_of_the_launcher(self, tmp_path):
        """However it ends, nothing that it has started outlives it."""
        program = """
            import asyncio, os, sys
            from ckptsvc.agent.launcher.ranks import Ranks
            async def run():
                ranks = Ranks(["sh", "-c", sys.argv[1]], os.environ, None, None, print, print)
                await ranks.start(1, {0: {}})
                await asyncio.sleep(60)
            asyncio.run(run())
        """
        script = TREE.format(notes=tmp_path) + "wait"
        launcher = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program), script])
        names = ("rank", "child", "daemon", "orphan")
        eventually(lambda: all((tmp_path / n).exists() and (tmp_path / n).read_text() for n in names), "the tree")
        pids = [int((tmp_path / name).read_text()) for name in names]
        assert all(alive(pid) for pid in pids)
        launcher.kill()
        launcher.wait()
        eventually(lambda: not any(alive(pid) for pid in pids), "the tree to be gone")


def test_children_are_found_with_and_without_the_kernels_list(monkeypatch):
    child = subprocess.Popen(["sleep", "60"])
    try:
        assert child.pid in children_of(os.getpid())
        monkeypatch.setattr(Path, "read_text", lambda path: _refuse(path) if path.name == "children" else _text(path))
        assert child.pid in children_of(os.getpid())
    finally:
        child.kill()
        child.wait()


def _refuse(path):
    raise OSError(path)


def _text(path):
    with open(path) as file:
        return file.read()


def test_time_is_not_lost(tmp_path):
    """A rank that dies is known at once, not at the next look."""

    async def run():
        async with kept("kill -9 $$", tmp_path) as found:
            await found.start()
            await found.all_ended()
            began = time.monotonic()
            await found.ranks.stop(30.0)
            assert time.monotonic() - began < 10

    asyncio.run(run())


def test_a_full_disk_for_their_output_kills_no_rank(tmp_path, capfd):
    """What cannot be kept is said once, and read all the same: a rank must not die of its own print."""

    async def run():
        reading, writing = output.pipe()
        out = output.Output()
        copying = asyncio.ensure_future(out.copy(reading, "3", Path("/dev/full")))
        with open(writing, "w", buffering=1) as rank:
            for line in range(3):
                await asyncio.to_thread(print, "line", line, file=rank)
        await copying
        await out.close()

    asyncio.run(run())
    shown, said = capfd.readouterr()
    assert shown == "[3] line 0\n[3] line 1\n[3] line 2\n"
    assert said.count("the output of rank 3 is not kept any more") == 1
