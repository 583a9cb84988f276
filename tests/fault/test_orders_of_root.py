"""Root gives orders to the agents of users; users give none to each other's, nor lead root's astray."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile

import pytest
from harness.runtime import eventually
from harness.users import ALICE, BOB, STRANGER, Node, Person, as_user, node_of_users

from ckptsvc.cli import others
from ckptsvc.cli.orders import PARTLY_DONE
from ckptsvc.cli.terminal import emit
from ckptsvc.errors import EXIT_STATUS
from ckptsvc.rpc import service
from ckptsvc.rpc.accounts import Account
from ckptsvc.rpc.dial import IDENTITY_SOCKET

ROOT = Person("root", 0, 0, (0,))

HOSTILE = """
import json, os, socket, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import grpc
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

(directory,) = sys.argv[1:]

def asked(sock):
    while True:
        peer, _ = sock.accept()
        peer.recv(4096)
        peer.send(json.dumps({"ok": True, "token": "x"}).encode())
        threading.Timer(20, peer.close).start()

class Agent(agent_pb2_grpc.AgentServiceServicer):
    def GetStatus(self, request, context):
        said = {"node": "\\x1b[2Jmine", "jobs": ["gpt"], **{n: [] for n in ("ranks", "arenas", "saves", "coordinates")}}
        if os.path.exists(f"{directory}/no-shape"):
            said = {"jobs": [7], "ranks": [{"rank": 1}]}
        return agent_pb2.GetStatusResponse(json=json.dumps(said).encode())

    def Exclude(self, request, context):
        if request.node == "n9":
            time.sleep(40)
        context.abort(grpc.StatusCode.UNKNOWN, "\\x1b]0;owned\\x07")

for name in ("agent.sock", "identity.sock"):
    os.rename(f"{directory}/{name}", f"{directory}/{name}.away")
identity = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
identity.bind(f"{directory}/identity.sock")
identity.listen()
threading.Thread(target=asked, args=(identity,), daemon=True).start()
server = grpc.server(ThreadPoolExecutor(4))
agent_pb2_grpc.add_AgentServiceServicer_to_server(Agent(), server)
server.add_insecure_port(f"unix:{directory}/agent.sock")
server.start()
open(f"{directory}/hostile", "w").close()
time.sleep(60)
"""


def audited(node: Node, person: Person) -> list[tuple[str, str, str]]:
    path = node.home(person) / ".local/state/ckptsvc/audit.jsonl"
    if not path.exists():
        return []
    assert (path.stat().st_uid, path.stat().st_mode & 0o777) == (person.uid, 0o600)
    lines = map(json.loads, path.read_text().splitlines())
    return [(line["verb"], line["user"], line["outcome"]) for line in lines]


def test_root_may_order_and_others_may_not() -> None:
    with node_of_users() as node:
        node.start()
        for person in (ALICE, BOB):
            as_user(person, lambda: service.ask(node.directory, "agent")["directory"])
        order = ("exclude", "n9", "--reason", "a fan")
        status, said = node.command(ROOT, *order, "--user", ALICE.name, SUDO_UID="")
        assert status == 0, said
        assert "node n9 is excluded" in said
        status, said = node.command(BOB, *order, "--user", ALICE.name)
        assert (status, "only root gives orders" in said) == (EXIT_STATUS["invalid-input"], True)
        status, said = node.command(BOB, "pause", "job", "--dir", str(node.agent_directory(ALICE)))
        assert status != 0, said
        status, said = node.command(ROOT, *order, "--user", "nobody-at-all")
        assert (status, "has no agent here" in said) == (EXIT_STATUS["agent-unavailable"], True)
        mine = node.agent_directory(ALICE) / IDENTITY_SOCKET
        theirs = node.agent_directory(BOB) / IDENTITY_SOCKET

        def lead_astray() -> None:
            os.rename(mine, f"{mine}.away")
            os.symlink(theirs, mine)

        as_user(ALICE, lead_astray)
        status, said = node.command(ROOT, *order, "--user", ALICE.name, SUDO_UID="")
        assert (status, f"is no socket of user {ALICE.uid}" in said) == (EXIT_STATUS["agent-unavailable"], True)
        assert audited(node, ALICE) == [("exclude", "root", "done")]
        assert audited(node, BOB) == []
        status, said = node.command(ROOT, "undrain", "--user", BOB.name, SUDO_UID=str(ALICE.uid))
        assert status == 0, said
        as_user(ALICE, (node.home(ALICE) / ".local/state/ckptsvc/audit.jsonl").unlink)  # hers to edit; root's is not
        file = node.root / "state" / "audit.jsonl"
        assert (file.stat().st_uid, file.stat().st_mode & 0o777) == (0, 0o600)
        status, said = node.command(ROOT, "audit", "--json")
        entries = [(e["verb"], e["user"], e["via"], e["of"], e["outcome"]) for e in json.loads(said)["entries"]]
        assert entries == [
            *(("exclude", "root", "", ALICE.name, outcome) for outcome in ("begun", "done", "begun", "failed")),
            *(("undrain", ALICE.name, "root", BOB.name, outcome) for outcome in ("begun", "done")),
        ]


def test_root_sees_what_users_have_and_is_led_nowhere() -> None:
    with node_of_users() as node:
        node.start()
        for person in (ALICE, BOB):
            as_user(person, lambda: service.ask(node.directory, "agent")["directory"])
        secret = node.root / "roots-own.jsonl"
        entry = {"verb": "drain", "uid": 0, "user": "root", "node": "n", "outcome": "done", "what": "roots-own"}
        secret.write_text(json.dumps(entry))
        secret.chmod(0o600)
        status, said = node.command(ALICE, "exclude", "n9", "--reason", "hers")
        assert status == 0, said

        def lead_astray() -> None:
            state = node.home(BOB) / ".local/state/ckptsvc"
            state.mkdir(parents=True)
            (state / "audit.jsonl").symlink_to(secret)
            (state / "incidents").symlink_to("/root")
            (state / "nodes.json").symlink_to(secret)

        as_user(BOB, lead_astray)
        status, said = node.command(ROOT, "audit", "--all-users", "--json")
        found = {each["user"]: each for each in json.loads(said)["users"]}
        assert (found[ALICE.name]["status"], found[BOB.name]["status"]) == (0, EXIT_STATUS["config"])
        assert [e["target"] for e in found[ALICE.name]["result"]["entries"]] == ["n9"]
        for command in ("incidents", "nodes"):
            status, said = node.command(ROOT, command, "--user", BOB.name)
            assert "roots-own" not in said
            assert "Traceback" not in said, said
        status, said = node.command(BOB, "audit", "--user", ALICE.name)
        assert (status, "only root looks" in said) == (EXIT_STATUS["invalid-input"], True), said
        status, said = node.command(ROOT, "nodes", "--user", ALICE.name, "--json")
        assert [each["node"] for each in json.loads(said)["users"][0]["result"]["nodes"]] == ["n9"], said
        status, said = node.command(ROOT, "audit", "--user", "nobody-at-all")
        assert (status, "has no user" in said) == (EXIT_STATUS["not-found"], True), said

        (node.root / "bundles").mkdir(mode=0o700)
        target = node.root / "bundles" / "bundle.tar.gz"
        status, said = node.command(ROOT, "support-bundle", "--user", BOB.name, "-o", str(target))
        assert status == 0, said
        assert (target.stat().st_uid, target.stat().st_mode & 0o777) == (0, 0o600)
        with tarfile.open(target) as archive:
            texts = {m.name.partition("/")[2]: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
        assert f"agents/{BOB.uid}/agent.log" in texts
        assert f"agents/{BOB.uid}/status.json" in texts
        assert not any(b"roots-own" in text for text in texts.values())
        own = node.root / "bundles" / "own.tar.gz"
        status, said = node.command(ROOT, "support-bundle", "-o", str(own), RUNTIME_DIRECTORY=str(own.parent))
        assert status == 0, said
        with tarfile.open(own) as archive:
            agents = json.load(archive.extractfile("own/service/agents.json"))["agents"]  # type: ignore[arg-type]
        assert [each["uid"] for each in agents] == [ALICE.uid, BOB.uid]


def test_nothing_of_roots_own_shell_becomes_a_users_to_read(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setenv("CKPTSVC_SYSTEM_ENVIRONMENT", "HTTPS_PROXY")
    monkeypatch.setenv("HTTPS_PROXY", "http://root:roots-own@proxy")
    monkeypatch.setattr(others, "COMMAND", ("env",))
    ended = others.ask(Account("daemon", 1, 1, (1,), "/"))
    assert (ended.status, b"LOGNAME=daemon" in ended.out, b"roots-own" in ended.out) == (0, True, False)


def test_what_root_runs_as_a_user_is_bounded_whatever_that_user_does_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setattr(others, "PATIENCE", 3.0)
    monkeypatch.setattr(others, "MOST", 1 << 20)
    for program, said in (("kill -STOP $$", "takes too long"), ("exec cat /dev/zero", "says too much")):
        monkeypatch.setattr(others, "COMMAND", ("sh", "-c", program))
        ended = others.ask(Account("daemon", 1, 1, (1,), "/"))
        assert (ended.status, said in ended.err) == (1, True)


def test_nobody_stops_root_by_stopping_what_is_about_to_be_his(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    monkeypatch.setattr(others, "PATIENCE", 3.0)
    monkeypatch.setattr(others, "COMMAND", ("sleep", "60"))
    stops = f"[ $(id -u) = {STRANGER.uid} ] || exit 1; while :; do kill -STOP -1; done 2>&-"
    stopper = subprocess.Popen(["sh", "-c", stops], user=STRANGER.uid, group=STRANGER.gid, extra_groups=[])
    try:
        ended = others.ask(Account("stranger", STRANGER.uid, STRANGER.gid, (STRANGER.gid,), "/"))
    finally:
        stopper.kill()
        stopper.wait()
    assert (ended.status, "takes too long" in ended.err) == (1, True)


def test_what_one_user_says_keeps_root_from_no_other_user(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    accounts = [Account(name, uid, 1, (1,), "/") for name, uid in (("good", 1), ("nobody", (1 << 32) - 1))]
    monkeypatch.setattr(others, "COMMAND", ("echo", '{"a": 1}'))
    monkeypatch.setattr(others, "arguments", lambda *more: [])
    assert others.show(accounts, as_json=True) == PARTLY_DONE
    good, nobody = json.loads(capsys.readouterr().out)["users"]
    assert (good["status"], good["result"]) == (0, {"a": 1})
    assert (nobody["status"], nobody["result"]) == (EXIT_STATUS["config"], None)
    assert "could not become user" in nobody["said"]
    monkeypatch.setattr(others, "COMMAND", ("printf", "user good\\nit is well\\n"))
    others.show(accounts, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["user good", "  user good", "  it is well", "user nobody"]
    for depth in range(800, 1010):  # some of them can be read, and not written
        emit({"users": [others._plain(others.Said(accounts[0], 0, b"[" * depth + b"]" * depth, ""))]})


def test_what_an_agent_of_one_user_does_keeps_no_order_from_the_others() -> None:
    with node_of_users() as node:
        node.start()
        for person in (ALICE, BOB):
            as_user(person, lambda: service.ask(node.directory, "agent")["directory"])
        his = node.agent_directory(BOB)
        node.spawn(BOB, [sys.executable, "-c", HOSTILE, str(his)])
        eventually((his / "hostile").exists, "Bob's agent to be hostile")

        def order(target: str) -> str:
            status, said = node.command(ROOT, "exclude", target, "--all-users", "--timeout", "2s", SUDO_UID="")
            assert status == PARTLY_DONE, said
            assert f"node {target} is excluded" in said
            assert f"not done: the agent of user {BOB.name}" in said
            assert not {"\x1b", "\x07"} & set(said)
            return said

        assert "did not answer in time" in order("n9")
        assert "owned" in order("n8")
        as_user(BOB, (his / "no-shape").touch)
        assert "nonsense" in order("n7")
        assert audited(node, ALICE) == [("exclude", "root", "done")] * 3
        status, said = node.command(ROOT, "status", "--all-users", "--job", "gpt")
        assert (status, "Traceback" in said) == (PARTLY_DONE, False), said
