"""The parts of the service for many users that need no users: its gate, its requests, its records, who may come in."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import pytest

from ckptsvc.agent.supervisor import accounts, records
from ckptsvc.agent.supervisor.accounts import check
from ckptsvc.agent.supervisor.agents import STARTING, Agents, User
from ckptsvc.agent.supervisor.gate import BURST, CONNECTIONS, RATE, REMEMBERED, STRANGERS, Gate, Visit
from ckptsvc.agent.supervisor.supervisor import environment_of, node_of, parse
from ckptsvc.config import load
from ckptsvc.control.shares import Node
from ckptsvc.errors import AgentUnavailable, ConfigError, InvalidInput, StoreDenied
from ckptsvc.rpc.accounts import Account, is_listed
from ckptsvc.rpc.service import MAX_REQUEST

PERSON = Account("alice", 1000, 1000, (1000, 0), "/home/alice")


def test_what_runs_as_root_has_no_grpc_and_no_protobuf_in_it() -> None:
    """The command, the service and the entrance."""
    programs = "ckptsvc.cli.agent, ckptsvc.agent.supervisor.supervisor, ckptsvc.agent.supervisor.entrance"
    code = f"import {programs}, sys; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in ended.stdout.split()}
    assert "msgspec" in loaded
    assert loaded & {"grpc", "google", "prometheus_client", "numpy", "torch", "ckptsvc_drivers"} == set()


def _stay() -> None:
    pytest.fail("this connection was hung up on")


class TestGate:
    def test_lets_a_burst_in_and_then_so_many_a_second_of_each_user(self) -> None:
        gate = Gate()
        asked = [gate.asks(1, 100.0) for _ in range(int(BURST) + 10)]
        assert asked == [True] * int(BURST) + [False] * 10
        assert gate.asks(2, 100.0)  # another user has his own
        assert sum(gate.asks(1, 101.0) for _ in range(1000)) == int(RATE)
        assert not gate.asks(1, 50.0)  # a clock that goes back gives nothing

    def test_counts_connections_of_each(self) -> None:
        gate = Gate()
        visits = [Visit(1, _stay) for _ in range(CONNECTIONS)]
        assert [gate.enter(visit, True, float(n)) for n, visit in enumerate(visits)] == [""] * CONNECTIONS
        assert "user 1 has" in gate.enter(Visit(1, _stay), True, 1e6)
        gate.leave(visits[0])
        gate.leave(visits[0])  # as one that is hung up on does, when it ends
        assert gate.enter(Visit(1, _stay), True, 1e6) == ""
        assert "user 1 has" in gate.enter(Visit(1, _stay), True, 1e6)

    def test_makes_room_by_hanging_up_on_whoever_has_most(self) -> None:
        gate, gone = Gate(), list[int]()
        gate.most = 10
        visits = [Visit(1 + (n > 6), partial(gone.append, n)) for n in range(10)]
        for n, visit in enumerate(visits):
            assert gate.enter(visit, True, float(n)) == ""
        gate.keep(visits[0])  # for this one waits for an agent
        assert gate.enter(Visit(3, _stay), True, 10.0) == ""
        assert gone == [1]
        gate.leave(visits[1])
        assert gate.enter(Visit(0, _stay), True, 10.0) == ""  # root makes nobody go
        assert gone == [1]
        full = Gate()
        full.most = 1
        waits = Visit(1, _stay)
        assert full.enter(waits, True, 0.0) == ""
        full.keep(waits)
        assert "too many connections" in full.enter(Visit(2, _stay), True, 0.0)

    def test_lets_those_who_may_have_no_agent_take_no_room_of_those_who_may(self) -> None:
        gate, gone = Gate(), list[int]()
        for uid in range(1, 3 * STRANGERS + 1):  # numbers that one person has
            assert gate.enter(Visit(uid, partial(gone.append, uid)), False, 1.0) == ""
        assert len(gone) == 2 * STRANGERS
        hers = [Visit(100_000, _stay) for _ in range(STRANGERS)]
        assert [gate.enter(visit, True, 1.0) for visit in hers] == [""] * STRANGERS
        assert len(gone) == 2 * STRANGERS
        newcomer = Visit(200_000, _stay)
        assert gate.enter(newcomer, False, 1.0) == ""
        with gate.waiting(newcomer):
            assert gate._open == {False: STRANGERS - 1, True: STRANGERS + 1}
        gate.leave(newcomer)
        assert gate._open == {False: STRANGERS - 1, True: STRANGERS}

    def test_does_not_grow_with_users_that_came_once(self) -> None:
        gate = Gate()
        for uid in range(5 * REMEMBERED):
            gate.asks(uid, uid * 10.0)
        assert len(gate._callers) <= REMEMBERED + 1


class TestRequests:
    def test_are_what_the_protocol_says(self) -> None:
        assert parse(b'{"op":"agent"}').op == "agent"
        assert (parse(b'{"op":"state","ranks":3,"busy":true}').ranks) == 3
        for bad in (b"", b"{}", b"[]", b'{"op":"root"}', b'{"op":"agent","uid":0}', b'{"op":"state","ranks":-1}',
                b'{"op":"state","ranks":2147483648}', b'{"op":"state","busy":1}', b"[" * MAX_REQUEST):  # fmt: skip
            with pytest.raises(InvalidInput):
                parse(bad)
        with pytest.raises(InvalidInput, match="at most 4096 bytes"):
            parse(b'{"op":"agent"}' + b" " * MAX_REQUEST)

    def test_that_are_none_are_refused_whatever_they_are(self) -> None:
        chance = random.Random(7)
        good = [b'{"op":"agent"}', b'{"op":"agents"}', b'{"op":"serve"}', b'{"op":"state","ranks":1,"busy":false}']
        for _ in range(3000):
            data = bytearray(chance.choice(good))
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                request = parse(bytes(data))
            except InvalidInput:
                continue
            assert request.op in ("agent", "agents", "serve", "state")
            assert 0 <= request.ranks < 1 << 31


class TestWhoMayComeIn:
    def test_people_do_where_nobody_is_listed(self) -> None:
        check(PERSON, [], 1000)
        check(Account("root", 0, 0, (0,), "/root"), [], 1000)
        for account, message in (
            (Account("daemon", 999, 999, (999,), "/"), "of the system itself"),
            (Account("nobody", 65534, 65534, (65534,), "/"), "of the system itself"),
            (Account("", 5000, 5000, (5000,), "/"), "no account on this node"),
        ):
            with pytest.raises(StoreDenied, match=message):
                check(account, [], 1000)

    def test_a_list_is_by_name_number_and_group(self) -> None:
        root = next(name for name in ("root", "wheel") if _has_group(name))
        for names in (["alice"], ["1000"], [f"@{root}"], ["bob", "1000"]):
            check(PERSON, names, 1000)
        for names in (["bob"], ["@alice"], ["100"], ["@no-such-group"]):
            with pytest.raises(StoreDenied, match="alice may not use"):
                check(PERSON, names, 1000)
        assert is_listed(Account("daemon", 2, 2, (2,), "/"), ("daemon",))


def _has_group(name: str) -> bool:
    import grp

    return any(group.gr_name == name and group.gr_gid == 0 for group in grp.getgrall())


class TestAccounts:
    def test_are_judged_once_in_a_while(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked: list[int] = []

        def look(uid: int, gid: int) -> Account:
            looked.append(uid)
            if uid == 7:
                raise OSError("the directory server is down")
            return Account(f"user{uid}", uid, gid, (gid,), "/")

        monkeypatch.setattr(accounts, "account_of", look)

        async def test() -> None:
            known = accounts.Accounts([], 1000, ["user2000"])
            for _ in range(3):
                await known.admit(1000, 1)
                with pytest.raises(StoreDenied, match="user999 is of the system"):
                    await known.admit(999, 1)
            assert looked == [1000, 999]
            assert [await known.is_operator(uid, 1) for uid in (0, 1000, 2000)] == [True, False, True]
            for _ in range(2):  # that nobody knows is not remembered
                with pytest.raises(AgentUnavailable, match="the directory server is down"):
                    await known.admit(7, 1)
            assert looked == [1000, 999, 2000, 7, 7]
            monkeypatch.setattr(accounts, "KNOWN_FOR", -1.0)
            await known.admit(1000, 1)
            assert looked[-1] == 1000

        asyncio.run(test())

    def test_are_looked_up_once_for_all_who_ask_at_the_same_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        looked: list[int] = []
        answer = threading.Event()

        def look(uid: int, gid: int) -> Account:
            looked.append(uid)
            if uid == 1000:
                assert answer.wait(60)
            return Account(f"user{uid}", uid, gid, (gid,), "/")

        monkeypatch.setattr(accounts, "account_of", look)

        async def test() -> None:
            known = accounts.Accounts([], 1000, [])
            asking = [asyncio.ensure_future(known.admit(1000, 1)) for _ in range(1000)]
            await known.admit(1001, 1)  # waits for none of them
            assert (known.admits(1000), known.admits(1001)) == (False, True)
            asking[0].cancel()  # and nobody waits for him
            answer.set()
            await asyncio.gather(*asking[1:])
            assert known.admits(1000)

        asyncio.run(test())
        assert sorted(looked) == [1000, 1001]


class TestRecords:
    def test_name_one_process_and_no_later_one_of_its_number(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        own = records.Record(os.getpid(), records.began(os.getpid()), "alice", 1000)
        records.write(fd, 1000, own)
        assert records.read(fd, 1000) == own
        assert records.all_of(fd) == [1000]
        pidfd = records.watch(own)
        assert pidfd >= 0
        os.close(pidfd)
        assert records.watch(records.Record(own.pid, own.began - 1, "alice", 1000)) == -1
        assert records.watch(records.Record(1 << 22, own.began, "alice", 1000)) == -1
        os.close(fd)

    def test_that_are_torn_or_no_files_are_none(self, tmp_path: Path) -> None:
        fd = os.open(tmp_path, os.O_RDONLY)
        (tmp_path / "1").write_text('{"pid": 1')
        (tmp_path / "2").write_text(json.dumps({"pid": "x", "began": 1, "user": "", "gid": 0}))
        (tmp_path / "3").mkdir()
        (tmp_path / "4").symlink_to("/etc/passwd")
        os.mkfifo(tmp_path / "5")
        (tmp_path / "6").write_bytes(os.urandom(5000))
        assert [records.read(fd, uid) for uid in range(8)] == [None] * 8
        os.close(fd)

    def test_are_kept_where_only_their_owner_writes(self, tmp_path: Path) -> None:
        folder = tmp_path / "service"
        for fd in records.open_directories(folder):
            os.close(fd)
        assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == {
            "users": 0o711,
            "agents": 0o700,
        }
        (folder / "users").rmdir()
        (folder / "users").symlink_to(tmp_path)
        with pytest.raises(ConfigError):
            records.open_directories(folder)
        folder.chmod(0o777)
        with pytest.raises(ConfigError, match="is not root's alone"):
            records.open_directories(folder)


def test_a_user_who_stops_the_process_that_has_become_his_keeps_nobody_elses_from_being_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []

    def execute(self: Agents, user: User, report: int) -> None:
        held.append(os.dup(report))
        os.write(report, b'{"user": "someone"}\n')  # and then it stands still

    async def story() -> None:
        settings = load({}, {}, [])
        agents = Agents(tmp_path, str(tmp_path), settings.system, Node(1, 1, 0, 1, 1, 0), [], {})
        for uid in range(STARTING + 1):
            agents._start(User(uid, uid))
        while len(held) <= STARTING:
            await asyncio.sleep(0.01)
        for task in agents._tasks:
            task.cancel()
        await asyncio.gather(*agents._tasks, return_exceptions=True)

    monkeypatch.setattr(Agents, "_execute", execute)
    try:
        asyncio.run(asyncio.wait_for(story(), 15.0))
    finally:
        for fd in held:
            os.close(fd)


class TestWhatAgentsGet:
    def test_of_the_environment_is_settings_and_what_is_listed(self) -> None:
        given = {"SECRET": "s", "HTTPS_PROXY": "p", "CKPTSVC_SAVE_KEEP": "3", "CKPTSVC_AGENT_SOCKET_DIR": "/root/x",
            "LD_PRELOAD": "evil.so", "HOME": "/root", "TZ": "UTC"}  # fmt: skip
        found = environment_of(given, ("HTTPS_PROXY",))
        assert found.keys() - {"PATH", "LANG", "PYTHONNOUSERSITE"} == {"CKPTSVC_SAVE_KEEP", "HTTPS_PROXY", "TZ"}

    def test_of_the_node_is_divided_only_where_ports_allow_it(self, tmp_path: Path) -> None:
        here = {"arena.dir": str(tmp_path), "arena.limit": "1GiB"}
        node = node_of(load({}, here, []))
        assert (node.memory, node.user_memory, node.write_rate) == (1 << 30, 1 << 29, 0)
        assert node_of(load({}, here | {"system.user_memory": "8GiB"}, [])).user_memory == 1 << 30
        disk = {"tiers.local": str(tmp_path), "tiers.local_limit": "10MiB"}
        assert (node.local, node_of(load({}, here | disk, [])).local) == (0, 10 << 20)
        assert node_of(load({}, here | disk | {"tiers.local": str(tmp_path / "none")}, [])).local == 0
        with pytest.raises(ConfigError, match="a port of its own"):
            node_of(load({}, here | {"agent.metrics_listen": "127.0.0.1:9000"}, []))
        with pytest.raises(ConfigError, match="No such file"):
            node_of(load({}, {"arena.dir": str(tmp_path / "none")}, []))
