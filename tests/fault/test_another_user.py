"""What users of one service try with each other's: real user ids, real agents."""

import contextlib
import fcntl
import json
import os
import random
import resource
import signal
import socket
import stat
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.runtime import eventually
from harness.users import ALICE, BOB, DAEMON, STRANGER, Node, Person, as_user, wait_until_gone
from harness.users_jobs import ask, error_of, rank_of, register, registration

from ckptsvc.agent.supervisor.gate import STRANGERS
from ckptsvc.agent.supervisor.records import locked
from ckptsvc.cli.agents import ask as ask_agent
from ckptsvc.errors import CkptsvcError, ConfigError, StoreDenied
from ckptsvc.rpc.dial import safe_target
from ckptsvc.rpc.identity import IdentityClient

ROOT = Person("root", 0, 0, (0,))


class TestAnotherUser:
    def test_does_not_wait_while_root_starts_hers(self, node: Node) -> None:
        node.start()
        records = os.open(node.directory / "agents", os.O_RDONLY)
        held = locked(records, BOB.uid)  # as an entrance of Bob's that goes no further
        waiting = threading.Thread(target=ask, args=(node, BOB))
        waiting.start()

        def entrances() -> list[str]:
            lines = [Path(f"/proc/{pid}/cmdline").read_text() for pid in node.processes()]
            return [line for line in lines if "supervisor.entrance" in line]

        eventually(lambda: len(entrances()) == 1, "it to be on its way")
        assert str(BOB.uid) not in entrances()[0]  # anybody can read who it is about
        assert ask(node, ALICE)["ok"] is True
        fcntl.flock(held, fcntl.LOCK_UN)
        waiting.join()
        assert node.agents()[BOB.uid]["state"] == "serves"
        for fd in (held, records):
            os.close(fd)

    def test_reaches_neither_socket_nor_file_nor_arena_of_hers(self, shared: Node) -> None:
        hers = shared.agent_directory(ALICE)
        arenas = shared.arenas / "ckptsvc" / str(ALICE.uid)

        def connect(kind: int, path: Path) -> None:
            with socket.socket(socket.AF_UNIX, kind) as sock:
                sock.connect(str(path))

        attempts: dict[str, Callable[[], object]] = {
            "list": lambda: os.listdir(hers),
            "grpc": lambda: connect(socket.SOCK_STREAM, hers / "agent.sock"),
            "identity": lambda: connect(socket.SOCK_SEQPACKET, hers / "identity.sock"),
            "secret": lambda: (hers / "secret").read_text(),
            "log": lambda: (hers / "agent.log").read_text(),
            "plant": lambda: (hers / "ready").write_text("1"),
            "arenas": lambda: os.listdir(arenas),
            "arena": lambda: (arenas / "lock").open("r+b"),
            "remove": lambda: arenas.rename(shared.arenas / "mine"),
            "all arenas": lambda: (shared.arenas / "ckptsvc").rename(shared.arenas / "mine"),
            "new arenas": lambda: (shared.arenas / "ckptsvc" / "54999").mkdir(),
            "users": lambda: os.listdir(shared.directory / "users"),
            "new": lambda: (shared.directory / "users" / "54999").symlink_to("/"),
            "swap": lambda: (shared.directory / "users").rename(shared.directory / "users2"),
            "records": lambda: os.listdir(shared.directory / "agents"),
            "socket": lambda: (shared.directory / "service.sock").unlink(),
            "lock": lambda: (shared.directory / "service.lock").open("r+b"),
        }
        for name, attempt in attempts.items():
            assert error_of(BOB, attempt) == "PermissionError", name

    def test_cannot_signal_trace_or_take_descriptors_of_hers(self, shared: Node) -> None:
        pid = shared.agents()[ALICE.uid]["pid"]

        def through_pidfd() -> None:
            fd = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(fd, signal.SIGKILL)
            finally:
                os.close(fd)

        for attempt in (
            lambda: os.kill(pid, signal.SIGKILL),
            through_pidfd,
            lambda: os.listdir(f"/proc/{pid}/fd"),
            lambda: Path(f"/proc/{pid}/environ").read_text(),
            lambda: os.open(f"/proc/{pid}/mem", os.O_RDONLY),
        ):
            assert error_of(BOB, attempt) == "PermissionError"
        assert Path(f"/proc/{pid}").exists()

    def test_cannot_pass_for_her_agent(self, shared: Node) -> None:
        for person in (BOB, ALICE):  # not even a process of her own that is not the one
            with pytest.raises(StoreDenied, match=f"is not the agent that was started for user {person.uid}"):
                ask(shared, person, "serve")
        assert shared.agents()[ALICE.uid]["state"] == "serves"

    def test_with_a_job_of_the_same_name_and_lies_about_ranks_touches_nothing_of_hers(self, shared: Node) -> None:
        rank = rank_of(shared, ALICE)
        eventually(lambda: shared.agents()[ALICE.uid]["ranks"] == 1, "her rank to be counted")

        def lie() -> list[str]:
            said = []
            for changes in ({}, {"rank": 7}, {"rank": 0, "world_size": 9}, {"pid": rank.pid}, {"attempt": 99},
                    {"job": "../../../../tmp/evil", "rank": 1, "world_size": 3}, {"token": "x"}):  # fmt: skip
                identity = IdentityClient(str(shared.agent_directory(BOB) / "identity.sock"))
                try:
                    _, fd = identity.call(registration(**changes))
                    os.close(fd)
                    said.append("ok")
                except CkptsvcError as error:
                    said.append(error.code)
                identity.close()
            return said

        bad = "invalid-input"
        assert as_user(BOB, lie) == ["ok", bad, "ok", bad, "ok", "ok", bad]
        with safe_target(shared.agent_directory(ALICE), ALICE.uid) as target:
            (hers,) = ask_agent(shared.agent_directory(ALICE), target)["ranks"]
        assert (hers["job"], hers["rank"], hers["world_size"], hers["attempt"]) == ("job", 0, 1, 0)
        assert rank.poll() is None
        rank.kill()
        eventually(lambda: shared.agents()[ALICE.uid]["ranks"] == 0, "her rank to be gone")
        assert not Path("/tmp/evil").exists()

    def test_gets_nothing_by_names_and_sizes_that_cannot_be(self, shared: Node) -> None:
        """As a rank of his own agent, which is let in: arenas by path, of another user, and too much of everything."""
        hers = shared.arenas / "ckptsvc" / str(ALICE.uid)
        (hers / "precious.arena").write_bytes(b"precious")
        os.chown(hers / "precious.arena", ALICE.uid, ALICE.gid)
        (hers / "precious.arena").chmod(0o600)
        found = json.loads(shared.python(BOB, f"""
import json
from pathlib import Path
import grpc
from ckptsvc.client.link import AgentLink
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.v1 import agent_pb2 as pb
link = AgentLink(Path({str(shared.agent_directory(BOB))!r}), {registration(job="greedy", store="memory://greedy")!r})
link.connect()
outside = ["../{ALICE.uid}/precious", "../{ALICE.uid}/precious.arena", {str(hers / "precious.arena")!r}, "..", "\\0"]
attempts = [lambda s=s: link.arena(s) for s in outside]
attempts += [lambda s=s: link.submit(pb.SubmitRequest(slot=s, step=1, bytes=8)) for s in outside]
attempts += [lambda s=s: link.abandon(s, 1, "x" * 100_000) for s in outside]
attempts += [lambda n=n: link.acquire(1, n, 0.1) for n in (0, 1 << 41, 1 << 60, (1 << 63) - 1)]
attempts += [lambda n=n: link.provide(n, 0.1) for n in (0, 1 << 60)]
attempts += [lambda: link.prepare("x" * 1000, 1, 1.0)]
attempts += [lambda: link.submit(pb.SubmitRequest(slot="s", step=1, aliases={{"a" * 5_000_000: "b" * 5_000_000}}))]
said = []
for attempt in attempts:
    try:
        attempt()
        said.append("")
    except CkptsvcError as error:
        said.append(error.code)
print(json.dumps(said))
"""))  # fmt: skip
        kept = (hers / "precious.arena").read_bytes()
        (hers / "precious.arena").unlink()
        assert kept == b"precious"
        refused = {"invalid-input", "arena-exhausted", "agent-unavailable"}  # the last: not in so short a time
        assert set(found[:10] + found[15:]) <= refused
        assert set(found[10:15]) <= {*refused, ""}  # an arena that he does not have is none to give up
        assert ask(shared, BOB)["ok"] is True
        assert "Traceback" not in (shared.agent_directory(BOB) / "agent.log").read_text()

    def test_is_turned_away_by_her_agent_even_with_a_connection_to_it(self, shared: Node) -> None:
        path = str(shared.agent_directory(ALICE) / "identity.sock")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

        def hand_over() -> int:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(path)
                socket.send_fds(ours, [b"x"], [sock.fileno()])
            return 0

        def use() -> str:
            _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
            with socket.socket(fileno=fds[0]) as sock:
                sock.send(json.dumps(registration(job="his")).encode())
                return sock.recv(65536).decode()

        # Who connected counts, not who speaks: what she gives away is hers to give.
        as_user(ALICE, hand_over)
        assert json.loads(as_user(BOB, use))["ok"] is True
        # One that he has opened himself, as far as root lets him, is his.
        ours.close()
        theirs.close()
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(path)
            sock.send(json.dumps(registration()).encode())
            assert f"serves user {ALICE.uid}, not user 0" in json.loads(sock.recv(65536))["what"]


class TestLinksInTheWay:
    def test_of_the_directory_of_an_agent_are_refused(self, node: Node) -> None:
        node.start()
        target = node.home(BOB) / "target"
        target.mkdir(mode=0o755)
        # Nobody but root can put one there: this is what root does to say that it would not help.
        node.agent_directory(BOB).symlink_to(target)
        with pytest.raises(ConfigError, match="is no directory"):
            ask(node, BOB)
        assert list(target.iterdir()) == []
        assert target.stat().st_uid == 0

    @pytest.mark.slow
    def test_of_the_files_in_it_do_harm_to_nobody_but_the_user(self, node: Node) -> None:
        node.start()
        ask(node, BOB)
        his, precious = node.agent_directory(BOB), node.root / "precious"
        precious.write_text("precious")
        precious.chmod(0o600)
        (node.root / "service.lock").touch()
        pid = node.agents()[BOB.uid]["pid"]
        os.kill(pid, signal.SIGTERM)
        wait_until_gone(pid)

        def plant() -> int:
            for name in ("agent.log", "ready", "ready.new", "agent.lock", "agent.sock", "identity.sock"):
                (his / name).unlink(missing_ok=True)
                (his / name).symlink_to(precious)
            return 0

        as_user(BOB, plant)
        with pytest.raises(ConfigError, match="the agent's log cannot be written"):
            ask(node, BOB)
        assert precious.read_text() == "precious"
        assert (precious.stat().st_uid, stat.S_IMODE(precious.stat().st_mode)) == (0, 0o600)
        assert ask(node, ALICE)["ok"] is True

    def test_and_a_directory_of_his_in_shared_memory_are_refused_by_root(self, node: Node) -> None:
        (node.home(BOB) / "trap").mkdir(mode=0o777)
        as_user(BOB, lambda: (node.arenas / "ckptsvc").symlink_to(node.home(BOB) / "trap"))
        assert node.command(ROOT, "agent", "--system")[0] == 2
        (node.arenas / "ckptsvc").unlink()
        as_user(BOB, lambda: (node.arenas / "ckptsvc").mkdir())
        status, said = node.command(ROOT, "agent", "--system")
        assert (status, "ckptsvc is not root's alone" in said) == (2, True)
        (node.arenas / "ckptsvc").rmdir()
        node.start()
        assert ask(node, ALICE)["ok"] is True


def packet(chance: random.Random) -> bytes:
    """One that is no good request of anybody's."""
    kinds: list[Callable[[], bytes]] = [
        lambda: chance.randbytes(chance.randrange(1, 200)),
        lambda: b"{" * chance.randrange(1, 4000),
        lambda: b"[" * 4090,
        lambda: json.dumps({"op": chance.choice(["", "root", "state", "serve", "AGENT"])}).encode(),
        lambda: json.dumps({"op": "agent", "uid": 0}).encode(),
        lambda: json.dumps({"op": "agents", "ranks": chance.choice([-1, 1 << 40, 1 << 90])}).encode(),
        lambda: json.dumps({"op": "agent", "x" * 3000: 1}).encode(),
        lambda: b'{"op":"agents"}' + b" " * chance.randrange(4096, 60000),
        lambda: b'{"op":"agents","op":' + b"9" * 3000 + b"}",
        lambda: b'{"op":"agents"' + chance.randbytes(3),
        lambda: struct.pack("<Q", chance.getrandbits(64)),
        lambda: b'{"op":"\xff\xfe"}',
    ]
    return chance.choice(kinds)()


class TestTheProtocol:
    @pytest.mark.parametrize("seed", range(3))
    def test_survives_what_is_no_request(self, shared: Node, seed: int) -> None:
        chance = random.Random(seed)
        packets = [packet(chance) for _ in range(150)]

        def send() -> list[str]:
            answers = []
            for data in packets:
                with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                    sock.settimeout(20)
                    sock.connect(str(shared.directory / "service.sock"))
                    with contextlib.suppress(BrokenPipeError):
                        sock.send(data)
                        with contextlib.suppress(ConnectionError):
                            answers.append(sock.recv(65536).decode())
            return answers

        answers = [json.loads(answer) for answer in as_user(DAEMON, send) if answer]
        assert answers
        assert not any(answer["ok"] for answer in answers)
        assert {answer["code"] for answer in answers} <= {"invalid-input", "store-denied", "limit-reached"}
        assert shared.supervisor is not None
        assert shared.supervisor.poll() is None
        assert ask(shared, ALICE)["ok"] is True
        assert "Traceback" not in (shared.root / "service.log").read_text()

    def test_takes_no_descriptors(self, shared: Node) -> None:
        assert shared.supervisor is not None
        held = len(os.listdir(f"/proc/{shared.supervisor.pid}/fd"))

        def send() -> int:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.connect(str(shared.directory / "service.sock"))
                fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(100)]
                socket.send_fds(sock, [b'{"op":"agents"}'], fds)
                sock.recv(65536)
            return 0

        as_user(BOB, send)
        eventually(lambda: len(os.listdir(f"/proc/{shared.supervisor.pid}/fd")) <= held, "the descriptors to be closed")

    @pytest.mark.slow
    def test_of_an_agent_that_says_what_cannot_be_harms_no_other(self, node: Node) -> None:
        node.start(system_linger="600s")
        for person in (ALICE, BOB):
            ask(node, person)
        pid = node.agents()[BOB.uid]["pid"]
        os.kill(pid, signal.SIGKILL)  # his own to kill
        eventually(lambda: node.agents()[BOB.uid]["state"] == "ended", "it to be noticed")
        hers = node.agents()[ALICE.uid]
        with pytest.raises(StoreDenied):
            ask(node, BOB, "serve")
        assert ask(node, BOB)["ok"] is True
        assert node.agents()[ALICE.uid]["pid"] == hers["pid"]


class TestAFlood:
    def test_of_requests_does_not_keep_others_waiting(self, shared: Node) -> None:
        code = f"""
import socket, time
end = time.monotonic() + 60
held = []
while time.monotonic() < end:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.settimeout(5)
    try:
        sock.connect({str(shared.directory / "service.sock")!r})
        sock.send(b'{{"op":"agent"}}')
    except OSError:
        pass
    held.append(sock)
    if len(held) > 900:
        held.clear()
"""
        flood = shared.spawn(STRANGER, [sys.executable, "-c", code])
        try:
            log = shared.root / "service.log"
            eventually(lambda: "callers are turned away: user 54999" in log.read_text(), "the flood to be noticed")
            assert ask(shared, ALICE)["directory"] == str(shared.agent_directory(ALICE))
            assert as_user(ALICE, lambda: register(shared, ALICE)) == "ok"
        finally:
            flood.kill()
            flood.communicate()
        assert log.read_text().count("turned away") < 5  # the log is not flooded too

    def test_of_silent_connections_makes_room_for_who_has_something_to_say(self, shared: Node) -> None:
        def fill() -> list[Any]:
            """Connect as several numbers, which one person may have; what the first of them hears, and others."""
            resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
            held = []
            for uid in range(54900, 54900 + 2 * STRANGERS // 100):
                os.seteuid(uid)
                for _ in range(100):
                    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                    sock.connect(str(shared.directory / "service.sock"))
                    held.append(sock)
                os.seteuid(0)
            held[0].settimeout(20)
            answer = json.loads(held[0].recv(65536))
            with pytest.raises(StoreDenied):  # one more is heard, and told the right thing
                ask(shared, STRANGER)
            return [answer["code"], answer["what"], ask(shared, ALICE)["ok"]]

        code, what, hers = as_user(ROOT, fill)
        assert (code, hers) == ("limit-reached", True)
        assert "too many connections are open, and user 54900 has most" in what
