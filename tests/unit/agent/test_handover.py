"""An agent that makes way, one that reads its settings again, and what systemd hears of both: with a real agent."""

import asyncio
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import pytest
from harness.runtime import eventually

from ckptsvc.agent.process import handover
from ckptsvc.agent.process.handover import Handed
from ckptsvc.agent.process.trial import obstacle
from ckptsvc.errors import AgentUnavailable
from ckptsvc.rpc.dial import is_alive
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.settings import AgentSettings, Settings

SIZE = 4096
LOOKS = """
import pathlib, sys, time
from ckptsvc.rpc.dial import is_alive
while is_alive(pathlib.Path(sys.argv[1])):
    time.sleep(0.001)
"""


def log_of(agent) -> str:
    return (agent.directory / "agent.log").read_text()


def attached(agent, **changes):
    rank = agent.register(**changes)
    assert rank.call("Prepare", agent_pb2.PrepareRequest(plain_digest="d")).complete
    return rank, set(rank.call("Provide", agent_pb2.ProvideRequest(bytes=SIZE)).slots)


class Manager:
    """What systemd is to a service: a socket that it is told of, and somebody who always listens."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(str(path))
        self._said: queue.Queue[list[str]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while data := self.sock.recv(4096):
            self._said.put(data.decode().split("\n"))

    def hear(self, wanted: str) -> list[str]:
        """The next message with that line."""
        while wanted not in (lines := self._said.get(timeout=30)):
            pass
        return lines


@pytest.fixture
def manager(runtime):
    """Every agent of the test is told of it."""
    path = runtime.root / "notify"
    found = Manager(path)
    runtime.environ |= {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": "1000000"}
    yield found
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as last:
        last.sendto(b"", str(path))
    found.sock.close()


@pytest.fixture
def service(runtime, manager):
    """An agent as systemd starts one: without an end of its own."""
    process = runtime.start_agent(directory=runtime.sockets)
    yield process
    if process.poll() is None:
        process.terminate()
        assert process.wait(20) == 0


def test_a_service_says_when_it_is_ready_reads_again_and_stops(runtime, manager, service) -> None:
    assert "STATUS=0 ranks of 0 jobs, 0 snapshots being saved, 0 MiB of arenas" in manager.hear("READY=1")
    manager.hear("WATCHDOG=1")
    folder = runtime.root / ".config" / "ckptsvc"
    folder.mkdir(parents=True)
    config = folder / "config.toml"
    config.write_text('[arena]\nlimit = "64MiB"\n[agent]\nname = "other"\n')
    service.send_signal(signal.SIGHUP)
    manager.hear("RELOADING=1")
    manager.hear("READY=1")
    assert runtime.status()["arena_limit"] == 64 << 20
    said = "settings read again: arena.limit: changed; agent.name: not before `ckptsvc agent --replace`"
    assert said in runtime.log().replace("agent.name, arena.limit", "")

    config.write_text('[arena]\nlimit = "lots"\n')
    service.send_signal(signal.SIGHUP)
    manager.hear("READY=1")
    assert runtime.status()["arena_limit"] == 64 << 20
    (line,) = [line for line in runtime.log().splitlines() if "not read again" in line]
    assert "the old ones hold" in line
    assert "arena.limit" in line
    assert "lots" in line

    service.send_signal(handover.SIGNAL)  # the settings being what they are, no successor could start
    (line,) = eventually(
        lambda: [line for line in runtime.log().splitlines() if "cannot be replaced" in line], "the refusal"
    )
    assert "arena.limit" in line
    assert runtime.status()["pid"] == service.pid
    service.terminate()
    manager.hear("STOPPING=1")
    assert service.wait(20) == 0


def test_a_successor_has_the_process_the_lock_the_ports_and_the_arenas(runtime, manager, service) -> None:
    manager.hear("READY=1")
    before = runtime.status()
    told = (runtime.sockets / "ready").read_text()
    # Whoever looks whether there is an agent always finds one.
    watched = subprocess.Popen([sys.executable, "-c", LOOKS, str(runtime.sockets)], env=runtime.environ)
    command = [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--replace", "--dir", str(runtime.sockets)]
    asked = subprocess.run(command, env=runtime.environ, capture_output=True, text=True, check=False)
    assert asked.returncode == 0, asked.stderr
    assert "a new agent serves" in asked.stdout + asked.stderr
    manager.hear("RELOADING=1")
    manager.hear("READY=1")
    manager.hear("WATCHDOG=1")
    after = runtime.status()
    assert after["pid"] == before["pid"] == service.pid
    assert after["started"] > before["started"]
    assert (runtime.sockets / "ready").read_text() == told, "the ports as well"
    assert watched.poll() is None, "there was a moment without an agent"
    watched.kill()
    watched.wait()
    assert is_alive(runtime.sockets)


@pytest.mark.parametrize("copies", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["idle", "copying"])
def test_a_rank_finds_its_free_arenas_again_and_nothing_of_what_it_was_filling(start, copies: bool) -> None:
    agent = start()
    rank, slots = attached(agent)
    assert len(slots) == 2
    if copies:  # for longer than the agent waits for
        slots.remove(rank.call("Acquire", agent_pb2.AcquireRequest(step=1, bytes=SIZE, patience=5.0)).slot)
    ready = agent.directory / "ready"
    before = ready.stat().st_mtime_ns
    os.kill(agent.process.pid, handover.SIGNAL)
    eventually(lambda: ready.exists() and ready.stat().st_mtime_ns != before, "the successor", 60)
    again, found = attached(agent)
    assert len(found) == 2
    assert found >= slots
    again.close()


def test_a_service_takes_the_directory_over_from_an_agent_that_a_job_has_started(runtime, start) -> None:
    private = start("shared")
    rank, _ = attached(private)
    service = runtime.start_agent(directory=private.directory)
    assert private.process.wait(20) == 0
    assert runtime.status(private.directory)["pid"] == service.pid
    assert "an agent that a job has started makes way for this service" in log_of(private)
    rank.identity.close()
    second = subprocess.run(  # not from another service
        [sys.executable, "-m", "ckptsvc.cli.main", "agent", "--dir", str(private.directory)],
        env=runtime.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 11
    assert "already serves" in second.stderr
    service.terminate()
    assert service.wait(20) == 0


class TestHanded:
    def test_a_port_is_taken_over_where_the_kernel_chose_it(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            handed = Handed(3, f"127.0.0.1:{port}", f"127.0.0.1:{port}")
            assert handed.listening(AgentSettings()).listen.port == 0, "somebody else has got it meanwhile"
        found = handed.listening(AgentSettings())
        assert (found.listen.port, found.metrics_listen and found.metrics_listen.port) == (port, port)
        fixed = AgentSettings(listen=found.listen._replace(port=7), metrics_listen=None)
        assert handed.listening(fixed) == fixed
        assert Handed(3, "nonsense").listening(AgentSettings()) == Settings().agent

    def test_only_the_lock_of_this_directory_counts(self, tmp_path) -> None:
        lock, other = tmp_path / "agent.lock", tmp_path / "other"
        lock.touch()
        other.touch()
        for text in ("", "nonsense", '{"lock": 999999}', '{"lock": -1}', '{"lock": 18446744073709551616}'):
            assert handover.received({handover.VARIABLE: text}, lock) is None
        with other.open() as held:
            environ = {handover.VARIABLE: msgspec.json.encode(Handed(held.fileno())).decode()}
            assert handover.received(environ, lock) is None
            assert environ == {}, "what this process starts has been handed nothing"
        with lock.open() as held:
            os.set_inheritable(held.fileno(), True)
            environ = {handover.VARIABLE: msgspec.json.encode(Handed(held.fileno())).decode()}
            assert handover.received(environ, lock) == Handed(held.fileno())
            assert not os.get_inheritable(held.fileno())


def test_an_agent_of_another_process_namespace_is_not_signalled(start, monkeypatch) -> None:
    """The kernel calls it process 0, which to kill(2) means all processes of the caller's group."""
    agent = start()
    monkeypatch.setattr(handover.os, "kill", lambda *told: pytest.fail(f"kill{told}"))
    monkeypatch.setattr("ckptsvc.rpc.identity.peer_of", lambda sock: (0, os.geteuid(), 0))
    with pytest.raises(AgentUnavailable, match="another process namespace"):
        handover.replace(agent.directory)


def test_nothing_is_run_from_the_directory_that_an_agent_is_in(tmp_path, monkeypatch):
    there = tmp_path / "ckptsvc"
    there.mkdir()
    (there / "__init__.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    assert asyncio.run(obstacle()) == ""
    assert not (tmp_path / "was-run").exists()
