"""One service for many users: real user ids, real agents, and what users try with each other's."""

import contextlib
import ctypes
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.job import free_port
from harness.observability import FOLDER
from harness.rank import Rank
from harness.runtime import eventually
from harness.users import (
    ALICE,
    BOB,
    DAEMON,
    SHARED,
    STRANGER,
    Node,
    Person,
    as_user,
    ids_of,
    node_of_users,
    wait_until_gone,
)

from ckptsvc.agent.supervisor import entrance
from ckptsvc.agent.supervisor.agents import User
from ckptsvc.agent.supervisor.board import Board
from ckptsvc.agent.supervisor.gate import STRANGERS
from ckptsvc.agent.supervisor.records import locked
from ckptsvc.cli.agents import ask as ask_agent
from ckptsvc.config import load
from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, LimitReached, StoreDenied
from ckptsvc.rpc import service
from ckptsvc.rpc.accounts import Account
from ckptsvc.rpc.dial import safe_target
from ckptsvc.rpc.identity import IdentityClient

ROOT = Person("root", 0, 0, (0,))
PTRACE_SEIZE = 0x4206
KEYCTL_GET_KEYRING_ID, KEYCTL_JOIN_SESSION_KEYRING, KEY_SPEC_SESSION_KEYRING = 0, 1, -3
RANK = Path(__file__).parents[1] / "harness" / "rank.py"


@pytest.fixture(scope="module")
def shared() -> Iterator[Node]:
    """A node whose service lasts for all tests that do it no harm."""
    with node_of_users() as node:
        node.start(system_operators="ck-daemon")
        for person in (ALICE, BOB):
            ask(node, person)
        yield node


@pytest.fixture(scope="class")
def divided() -> Iterator[Node]:
    """A node on which each user may have little."""
    with node_of_users() as node:
        node.start(system_user_ranks="3", system_user_jobs="2", arena_limit="64MiB", system_user_memory="75%",
            store_max_write_rate="100MiB/s")  # fmt: skip
        for person in (ALICE, BOB):
            ask(node, person)
        yield node


@pytest.fixture
def node() -> Iterator[Node]:
    """A node of the test's own; the service is not started."""
    with node_of_users() as own:
        yield own


def ask(node: Node, person: Person, op: str = "agent") -> dict[str, Any]:
    """The service's answer to a user; what it refuses with is raised here."""

    def call() -> dict[str, Any]:
        try:
            return service.ask(node.directory, op)
        except CkptsvcError as error:
            return {"refused": [type(error).__name__, str(error)]}

    answer: dict[str, Any] = as_user(person, call)
    if "refused" in answer:
        name, what = answer["refused"]
        raise {t.__name__: t for t in (AgentUnavailable, ConfigError, LimitReached, StoreDenied)}[name](what)
    return answer


def error_of(person: Person, act: Callable[[], object]) -> str:
    """The name of the system error that a user gets; "" if he gets none."""

    def attempt() -> str:
        try:
            act()
        except OSError as error:
            return type(error).__name__
        return ""

    return str(as_user(person, attempt))


def registration(**changes: Any) -> dict[str, Any]:
    fields = {"op": "register", "job": "job", "attempt": 0, "rank": 0, "world_size": 1, "store": "memory://users"}
    return fields | changes


def train(rank: Rank, store: str, until: int, patient: bool = False, first: str = "") -> dict[str, Any]:
    """Train and save; before that, try another store, and report how it refuses."""
    import torch

    import ckptsvc

    tensor = torch.zeros(1000)
    if first:
        with pytest.raises(CkptsvcError) as refusal:
            ckptsvc.attach({"tensor": tensor}, store=first, every="off")
        rank.report("refused", why=f"{type(refusal.value).__name__}: {refusal.value}")
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    rank.report("attached", agent=str(run._link.directory))
    while run.steps_done < until or (patient and not (rank.folder / "go-end").exists()):
        tensor += 1
        run.step()
        try:
            run.save(wait=True)
        except CkptsvcError as error:
            if not patient:
                raise
            rank.report("failed", why=str(error))
            time.sleep(0.2)
        else:
            rank.report("saved", step=run.steps_done)
    run.close()
    return {"steps": run.steps_done, "skipped": run.skipped, "sum": float(tensor.sum())}


def write_much(rank: Rank, store: str) -> None:
    """Save 512 KiB, again and again."""
    import torch

    import ckptsvc

    with ckptsvc.attach({"tensor": torch.zeros(128 << 10)}, store=store, every="off") as run:
        while not (rank.folder / "go-end").exists():
            run.step()
            run.save(wait=True)
            rank.report("saved", step=run.steps_done)


class UsersJob:
    """One rank of a user's that runs a function of this module."""

    def __init__(
        self, node: Node, person: Person, store: Path, until: int, *, patient: bool = False, first: Path | str = "",
        launcher: tuple[str, ...] = (), function: str = "train", name: str = "job",
    ) -> None:  # fmt: skip
        self.folder = node.home(person) / name
        self.folder.mkdir()
        os.chown(self.folder, person.uid, person.gid)
        arguments = [str(store), until, patient, str(first)] if function == "train" else [str(store)]
        spec = {"file": __file__, "function": function, "arguments": arguments, "folder": str(self.folder)}
        self._log = self.folder / "log"
        self.process = node.spawn(person, [sys.executable, *launcher, str(RANK), json.dumps(spec)], self._log)

    def reports(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "rank-0.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == event]

    def wait_for_save(self, step: int) -> None:
        def saved() -> bool:
            assert self.process.poll() is None, self._log.read_text()
            return any(line["step"] >= step for line in self.reports("saved"))

        eventually(saved, f"step {step} to be saved", 90)

    def result(self) -> dict[str, Any]:
        assert self.process.wait(90) == 0, self._log.read_text()
        found: dict[str, Any] = self.reports("result")[-1]["result"]
        return found


class TestJobs:
    def test_of_two_users_are_written_with_the_rights_of_each(self, node: Node) -> None:
        node.start()
        folder = node.root / "project"
        folder.mkdir()
        os.chown(folder, 0, SHARED)
        folder.chmod(0o2770)
        hers = UsersJob(node, ALICE, folder / "run", 2)  # only by a group that her account has
        his = UsersJob(node, BOB, node.home(BOB) / "run", 2, first=folder / "run")
        assert hers.result() == {"steps": 2, "skipped": 0, "sum": 2000.0}
        assert his.result() == {"steps": 2, "skipped": 0, "sum": 2000.0}
        for job, person in ((hers, ALICE), (his, BOB)):
            assert job.reports("attached")[0]["agent"] == str(node.agent_directory(person))
        for path in (folder / "run").rglob("*"):
            assert (path.stat().st_uid, path.stat().st_gid) == (ALICE.uid, SHARED)
        owners = {(path.stat().st_uid, path.stat().st_gid) for path in (node.home(BOB) / "run").rglob("*")}
        assert owners == {(BOB.uid, BOB.gid)}
        (refused,) = his.reports("refused")
        assert "StoreDenied" in refused["why"]
        assert "Permission denied" in refused["why"]

    @pytest.mark.slow
    def test_are_launched_with_the_agent_of_their_user(self, node: Node) -> None:
        node.start()
        run = ("-m", "ckptsvc.cli.main", "run", "--nproc-per-node", "1", "--no-standby", "--no-preflight")
        job = UsersJob(node, ALICE, node.home(ALICE) / "run", 2, launcher=run)
        assert job.result() == {"steps": 2, "skipped": 0, "sum": 2000.0}
        assert job.reports("attached")[0]["agent"] == str(node.agent_directory(ALICE))
        assert ids_of(node.agents()[ALICE.uid]["pid"])["Uid"].split()[0] == str(ALICE.uid)

    @pytest.mark.slow
    def test_go_on_while_the_service_is_killed_again_and_again_and_others_ask(self, node: Node) -> None:
        node.start()
        jobs = [UsersJob(node, p, node.home(p) / "run", 1, patient=True) for p in (ALICE, BOB)]
        for job in jobs:
            job.wait_for_save(1)
        stop, problems = threading.Event(), list[str]()
        asking = threading.Thread(target=beat, args=(BOB, node, stop, problems))
        asking.start()
        for _ in range(5):
            steps = [job.reports("saved")[-1]["step"] for job in jobs]
            node.stop(signal.SIGKILL)
            for job, step in zip(jobs, steps, strict=True):
                job.wait_for_save(step + 3)  # without any service
            node.start()
            eventually(lambda: {a["state"] for a in node.agents().values()} == {"serves"}, "the agents to come back")
        stop.set()
        asking.join()
        for job in jobs:
            (job.folder / "go-end").touch()
            assert job.result()["skipped"] == 0
        assert problems == []


class TestAnAgent:
    def test_is_its_users_and_has_no_right_or_descriptor_or_variable_of_roots(self, shared: Node) -> None:
        for person in (ALICE, BOB):
            pid = shared.agents()[person.uid]["pid"]
            ids = ids_of(pid)
            assert ids["Uid"].split() == [str(person.uid)] * 4
            assert ids["Gid"].split() == [str(person.gid)] * 4
            assert sorted(map(int, ids["Groups"].split())) == sorted(person.groups)
            assert int(ids["CapEff"], 16) == int(ids["CapPrm"], 16) == 0
            assert (ids["NoNewPrivs"], ids["Umask"]) == ("1", "0022")
            assert os.readlink(f"/proc/{pid}/cwd") == "/"
            assert os.getsid(pid) == pid
            environ = dict(v.split("=", 1) for v in Path(f"/proc/{pid}/environ").read_text().split("\0") if v)
            assert environ["HOME"] == str(shared.home(person))
            assert environ["USER"] == person.name
            allowed = {"PATH", "LANG", "HOME", "USER", "LOGNAME", "PYTHONPATH", "PYTHONNOUSERSITE", "GRPC_VERBOSITY"}
            assert {name for name in environ if not name.startswith("CKPTSVC_")} <= allowed
            held = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
            files = [path for path in held if path.startswith("/") and path != "/dev/null"]
            own = (str(shared.agent_directory(person)), str(shared.arenas))
            assert [path for path in files if not path.startswith(own)] == []

    def test_leaves_the_session_keyring_of_the_service(self) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        libc = ctypes.CDLL(None, use_errno=True)

        def keyctl(operation: int, argument: int | None) -> int:
            return int(libc.syscall(entrance._KEYCTL[os.uname().machine], operation, argument, 0))

        def of_agent(uid: int) -> int:
            entrance.drop(Account("", uid, uid, (uid,), "/"))
            return keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING)

        def of_service_and_agents() -> list[int]:
            found = [keyctl(KEYCTL_JOIN_SESSION_KEYRING, None)]  # as systemd does for a service (KeyringMode=private)
            found.append(as_user(ROOT, lambda: keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING)))
            return found + [as_user(ROOT, lambda uid=uid: of_agent(uid)) for uid in (ALICE.uid, BOB.uid)]

        service_has, child_has, *agents_have = as_user(ROOT, of_service_and_agents)
        assert service_has == child_has > 0
        assert len({service_has, *agents_have}) == 3
        assert min(agents_have) > 0

    def test_cannot_take_back_what_the_service_is_spared(self, node: Node) -> None:
        node.start()
        assert node.supervisor is not None
        try:
            Path(f"/proc/{node.supervisor.pid}/oom_score_adj").write_text("-500")
        except PermissionError:
            pytest.skip("needs CAP_SYS_RESOURCE")
        ask(node, ALICE)
        score = Path(f"/proc/{node.agents()[ALICE.uid]['pid']}/oom_score_adj")
        assert score.read_text() == "0\n"
        assert error_of(ALICE, lambda: score.write_text("-1")) == "PermissionError"
        assert error_of(ALICE, lambda: score.write_text("1")) == ""

    def test_is_one_for_each_user_however_often_he_asks(self, shared: Node) -> None:
        before = shared.agents()
        for person in (ALICE, BOB):
            assert ask(shared, person)["directory"] == str(shared.agent_directory(person))
        assert {u: a["pid"] for u, a in shared.agents().items()} == {u: a["pid"] for u, a in before.items()}

    def test_is_found_by_the_commands_of_its_user(self, shared: Node) -> None:
        status, said = shared.command(ALICE, "status", "--json")
        assert status == 0, said
        assert [a["directory"] for a in json.loads(said)["agents"]] == [str(shared.agent_directory(ALICE))]


class TestWhoMayHaveOne:
    def test_not_system_accounts_nor_numbers_without_an_account(self, shared: Node) -> None:
        with pytest.raises(StoreDenied, match="ck-daemon is of the system itself"):
            ask(shared, DAEMON)
        with pytest.raises(StoreDenied, match="54999 has no account on this node"):
            ask(shared, STRANGER)
        for person in (DAEMON, STRANGER):
            assert not shared.agent_directory(person).exists()

    @pytest.mark.slow
    def test_those_who_are_listed_by_name_number_and_group_and_root(self, node: Node) -> None:
        node.start(system_users="ck-daemon,54999,@ck-shared", system_max_users="3", system_umask="027")
        for person in (ALICE, DAEMON, STRANGER):  # Alice is in the group
            assert ask(node, person)["directory"] == str(node.agent_directory(person))
        with pytest.raises(StoreDenied, match="ck-bob may not use this node's service"):
            ask(node, BOB)
        with pytest.raises(LimitReached, match="serves 3 users already"):
            ask(node, ROOT)
        agents = node.agents()
        ids = ids_of(agents[STRANGER.uid]["pid"])
        assert ids["Groups"].split() == ids["Gid"].split()[:1] == [str(STRANGER.gid)]
        assert ids["Umask"] == "0027"
        os.kill(agents[DAEMON.uid]["pid"], signal.SIGTERM)  # it is idle
        wait_until_gone(agents[DAEMON.uid]["pid"])
        eventually(lambda: node.agents()[DAEMON.uid]["state"] == "ended", "it to be noticed")
        assert ask(node, ROOT)["directory"] == str(node.agent_directory(ROOT))


class TestOperators:
    def test_see_the_agents_of_all_and_users_their_own(self, shared: Node) -> None:
        for operator in (ROOT, DAEMON):
            assert {ALICE.uid, BOB.uid} <= {each["uid"] for each in ask(shared, operator, "agents")["agents"]}
        for person in (ALICE, BOB):
            assert [each["uid"] for each in ask(shared, person, "agents")["agents"]] == [person.uid]

    def test_see_what_they_do(self, shared: Node) -> None:
        status, said = shared.command(ROOT, "status", "--all-users")
        assert status == 0, said
        assert "user ck-alice" in said
        assert "user ck-bob" in said
        status, said = shared.command(BOB, "status", "--all-users", "--json")
        assert status == 0, said
        assert [each["user"] for each in json.loads(said)["agents"]] == ["ck-bob"]

    def test_give_orders_as_root_and_the_audit_log_names_the_person(self, shared: Node) -> None:
        status, said = shared.command(ROOT, "exclude", "n9", "--user", "ck-alice", "--json", SUDO_UID=str(BOB.uid))
        assert status == 0, said
        assert json.loads(said)["what"], said
        status, said = shared.command(ALICE, "audit", "--json")
        (line,) = [line for line in json.loads(said)["entries"] if line["verb"] == "exclude"]
        assert (line["user"], line["via"], line["target"], line["outcome"]) == ("ck-bob", "root", "n9", "done")
        status, said = shared.command(BOB, "exclude", "n9", "--user", "ck-alice")
        assert status == 2
        assert "only root gives orders to the agents of others" in said
        status, said = shared.command(ROOT, "exclude", "n9", "--user", "nobody-here")
        assert status == 20, said

    def test_do_not_follow_what_a_user_has_put_in_the_way(self, shared: Node) -> None:
        hers, his = shared.agent_directory(ALICE), shared.agent_directory(BOB)

        def swap() -> int:
            (his / "agent.sock").rename(his / "kept.sock")
            (his / "agent.sock").symlink_to(hers / "agent.sock")
            return 0

        as_user(BOB, swap)
        status, said = shared.command(ROOT, "status", "--all-users", "--json")
        as_user(BOB, lambda: str((his / "kept.sock").rename(his / "agent.sock")))
        found = {each["user"]: each for each in json.loads(said)["agents"]}
        assert status == 3
        assert "no socket of user 54002" in found["ck-bob"]["error"]["what"]
        assert found["ck-alice"]["status"]["ranks"] == []
        with pytest.raises(AgentUnavailable, match="no socket of user"), safe_target(hers, BOB.uid):
            pass


def http(address: str, path: str, token: str = "") -> tuple[int, str]:
    """Status and body of an answer; `token` is shown as a program does."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(f"http://{address}{path}", headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class TestAnOperatorsPrometheus:
    def test_reads_the_metrics_of_all_agents_and_nothing_else_and_no_user_those_of_another(self, node: Node) -> None:
        node.start(agent_metrics_listen="127.0.0.1:0", system_metrics_group="ck-daemon")
        for person in (ALICE, BOB):
            ask(node, person)
        rank_of(node, ALICE)
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted")
        listed = node.directory / "metrics" / "targets.json"

        def targets() -> dict[str, tuple[str, str]]:
            found = json.loads(as_user(DAEMON, listed.read_text)) if listed.exists() else []
            return {t["labels"]["user"]: (t["targets"][0], t["labels"]["__param_scrape"]) for t in found}

        eventually(lambda: targets().keys() == {"ck-alice", "ck-bob"}, "both agents to be listed")
        for person in (ALICE, BOB):
            assert error_of(person, lambda: listed.read_text()) == "PermissionError"
            assert error_of(person, lambda: (listed.parent / "x").touch()) == "PermissionError"
        (hers, opens), (his, opens_his) = targets()["ck-alice"], targets()["ck-bob"]
        for address, scrape in ((hers, opens), (his, opens_his)):
            status, text = http(address, f"/metrics?scrape={scrape}")
            assert (status, "\nckptsvc_sessions " in text) == (200, True)
            for path in ("/", "/status.json", "/events", "/incidents/last"):
                for way in (f"{path}?scrape={scrape}", f"{path}?token={scrape}"):
                    assert http(address, way)[0] == 401
            assert http(address, "/metrics", scrape)[0] == 401
        assert "\nckptsvc_sessions 1.0\n" in http(hers, f"/metrics?scrape={opens}")[1]
        # What a user can know: his own token, and what Prometheus shows where he listens in the place of his agent.
        own = as_user(BOB, (node.agent_directory(BOB) / "http-token").read_text)
        assert http(his, "/status.json", own)[0] == 200
        for path, token in (("/metrics", own), (f"/metrics?scrape={own}", ""), (f"/metrics?scrape={opens_his}", "")):
            assert http(hers, path, token)[0] == 401
        counted = as_user(BOB, (listed.parent / "ckptsvc.prom").read_text).splitlines()
        assert 'ckptsvc_service_agents{state="serves"} 2' in counted
        # An agent that dies under its ranks is down until the next one serves; what had opened it opens it no more.
        os.kill(node.agents()[ALICE.uid]["pid"], signal.SIGKILL)
        eventually(lambda: targets().get("ck-alice", ("", opens))[1] != opens, "another agent of hers")
        again, opens_now = targets()["ck-alice"]
        assert http(again, f"/metrics?scrape={opens}")[0] == 401
        assert http(again, f"/metrics?scrape={opens_now}")[0] == 200

        def failures() -> bool:
            return "ckptsvc_service_agent_failures_total 1" in (listed.parent / "ckptsvc.prom").read_text()

        eventually(failures, "her agent's end to be counted")

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("prometheus") is None, reason="make test-observability installs Debian's")
    def test_is_one_with_the_settings_of_the_repository(self, node: Node) -> None:
        yaml = pytest.importorskip("yaml", reason="run make install")
        node.start(agent_metrics_listen="127.0.0.1:0", system_metrics_group="ck-daemon")
        job = UsersJob(node, ALICE, node.home(ALICE) / "run", 1, patient=True)
        ask(node, BOB)
        job.wait_for_save(1)
        text = (FOLDER / "prometheus-users.yaml").read_text().replace("/run/ckptsvc", str(node.directory))
        settings = yaml.safe_load(text)
        settings["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        folder, port = node.home(DAEMON), free_port()
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(settings))
        shutil.copy(FOLDER / "rules.yaml", folder)
        node.spawn(DAEMON, [
            str(shutil.which("prometheus")), f"--config.file={folder}/prometheus.yaml", "--log.level=warn",
            f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}",
        ], folder / "log")  # fmt: skip

        def found(query: str) -> list[dict[str, str]]:
            try:
                status, text = http(f"127.0.0.1:{port}", f"/api/v1/query?query={urllib.parse.quote(query)}")
            except OSError:
                return []
            return [each["metric"] for each in json.loads(text)["data"]["result"]] if status == 200 else []

        def users(query: str) -> set[str]:
            return {each["user"] for each in found(query)}

        eventually(lambda: users("up == 1") == {"ck-alice", "ck-bob"}, "both agents to be scraped", 60)
        (committed,) = eventually(lambda: found("ckptsvc_last_committed_step"), "her job to be seen", 60)
        assert (committed["user"], "exported_job" in committed) == ("ck-alice", False)
        assert committed["job"] != "ckptsvc"
        eventually(
            lambda: users("job:ckptsvc_last_committed_step:max") == {"ck-alice"}, "the rules to keep users apart"
        )
        os.kill(node.agents()[BOB.uid]["pid"], signal.SIGTERM)  # it is idle, and ends in order
        eventually(lambda: users("up") == {"ck-alice"}, "his to be no target any more", 60)
        (job.folder / "go-end").touch()
        job.result()

    def test_is_not_led_elsewhere_by_an_agent(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        settings = load({}, {"system.directory": str(tmp_path), "system.metrics_group": "daemon"}, [])
        board, agents = Board(settings), types.SimpleNamespace(starts=1, failures=0)
        board.open()
        led = {
            1001: "http://127.0.0.1:4000", 1002: "http://10.0.0.1:80", 1003: "http://127.0.0.1:4000/x?", 1004: "",
            1005: "http://[::1]:4001", 1006: "http://localhost.example.org:80", 1007: "file:///etc/shadow",
        }  # fmt: skip
        agents.users = lambda: [User(u, u, name=f"u{u}", page=page, scrape=f"t{u}", pidfd=9) for u, page in led.items()]
        board.write(agents)
        found = json.loads((tmp_path / "metrics" / "targets.json").read_text())
        assert [each["targets"] for each in found] == [["127.0.0.1:4000"], ["[::1]:4001"]]
        assert [each["labels"]["user"] for each in found] == ["u1001", "u1005"]
        board.close()


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
link = AgentLink(Path({str(shared.agent_directory(BOB))!r}), {registration()!r})
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
        refused = {"invalid-input", "arena-exhausted"}
        assert set(found[:10] + found[15:]) == refused
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


class TestShares:
    def test_of_ranks_and_jobs_are_kept_by_each_users_agent(self, divided: Node) -> None:
        def register_many() -> list[str]:
            said, held = [], []
            for job, rank in (("a", 0), ("b", 0), ("c", 0), ("a", 1), ("b", 1), ("a", 0)):
                identity = IdentityClient(str(divided.agent_directory(ALICE) / "identity.sock"))
                held.append(identity)
                try:
                    _, fd = identity.call(registration(job=job, rank=rank, world_size=8))
                    os.close(fd)
                    said.append("ok")
                except CkptsvcError as error:
                    said.append(f"{error.code}: {error.what}")
            return said

        said = as_user(ALICE, register_many)
        jobs, ranks = "this agent has 2 jobs already", "3 ranks are registered with this agent already"
        # At last a rank comes anew that is there already: it takes its own place.
        assert said == ["ok", "ok", f"limit-reached: {jobs}", "ok", f"limit-reached: {ranks}", "ok"]
        assert as_user(BOB, lambda: register(divided, BOB)) == "ok"
        eventually(lambda: divided.agents()[ALICE.uid]["ranks"] == 0, "all ranks to be gone")
        # What is remembered of jobs whose ranks have died makes room.
        assert as_user(ALICE, lambda: register(divided, ALICE, "d")) == "ok"

    def test_of_memory_and_bandwidth_follow_the_users_who_have_something_to_do(self, divided: Node) -> None:
        def shares() -> set[tuple[int, int]]:
            found = set()
            for person in (ALICE, BOB):
                with safe_target(divided.agent_directory(person), person.uid) as target:
                    status = ask_agent(divided.agent_directory(person), target)
                found.add((status["arena_limit"] >> 20, status["max_write_rate"] >> 20))
            return found

        ranks = []
        for person, share in ((ALICE, (48, 100)), (BOB, (32, 50))):
            ranks.append(rank_of(divided, person))
            eventually(lambda who=person: divided.agents()[who.uid]["ranks"] == 1, "the rank to be counted")
            eventually(lambda now=share: shares() == {now}, f"{share} MiB for each")
        for rank in ranks:
            rank.kill()
        eventually(lambda: shares() == {(48, 100)}, "all of it to be had again")


def rate_of(node: Node, person: Person, saves: UsersJob) -> float:
    """Bytes per second at which a user's agent writes, by its own account: what it has written, and waited for that.

    From the second save on that begins now: the first may have begun at another rate.
    """

    def account() -> tuple[float, float]:
        with safe_target(node.agent_directory(person), person.uid) as target:
            address = ask_agent(node.agent_directory(person), target)["metrics"]
        token = (node.agent_directory(person) / "http-token").read_text().strip()
        request = urllib.request.Request(f"http://{address}/metrics", headers={"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
        values = {name: float(value) for name, _, value in lines if not name.startswith("#")}
        (written,) = [v for name, v in values.items() if name.startswith("ckptsvc_written_bytes_total")]
        return written, values["ckptsvc_write_held_back_seconds_total"]

    begun = saves.reports("saved")[-1]["step"]
    saves.wait_for_save(begun + 2)
    before = account()
    saves.wait_for_save(begun + 6)
    after = account()
    return (after[0] - before[0]) / (after[1] - before[1])


class TestTheRateOfWrites:
    @pytest.mark.slow
    def test_is_divided_among_users_and_of_one_user_among_his_jobs_that_write(self, node: Node) -> None:
        node.start(store_max_write_rate="2MiB/s", agent_metrics_listen="127.0.0.1:0")

        def job(person: Person, name: str) -> UsersJob:
            begun = UsersJob(node, person, node.home(person) / f"run-{name}", 0, function="write_much", name=name)
            begun.wait_for_save(1)
            return begun

        def about(rate: float, person: Person, saves: UsersJob) -> bool:
            return 0.9 * rate < rate_of(node, person, saves) <= 1.02 * rate

        hers = job(ALICE, "a")
        assert about(2 << 20, ALICE, hers)
        idle = UsersJob(node, ALICE, node.home(ALICE) / "idle", 1, patient=True, name="idle")
        idle.wait_for_save(1)
        os.kill(idle.reports("saved")[-1]["pid"], signal.SIGSTOP)  # it is there, and writes nothing
        assert about(2 << 20, ALICE, hers)
        his = job(BOB, "b")
        assert about(1 << 20, ALICE, hers)
        assert about(1 << 20, BOB, his)
        for each in (hers, his):
            (each.folder / "go-end").touch()
            assert each.process.wait(60) == 0


def save_too_much(rank: Rank, store: str) -> dict[str, Any]:
    """Take a snapshot that is larger than what a user may take, then a smaller one."""
    import torch

    import ckptsvc

    with ckptsvc.attach({"tensor": torch.zeros(8 << 20)}, store=f"{store}-large", every="off") as run:
        run.step()
        with pytest.raises(CkptsvcError) as refusal:
            run.save(wait=True, timeout=3.0)
        run.step()
    with ckptsvc.attach({"tensor": torch.zeros(1000)}, store=f"{store}-small", every="off") as run:
        run.step()
        run.save(wait=True)
    return {"why": str(refusal.value)}


class TestTheShareOfMemory:
    @pytest.mark.slow
    def test_is_all_that_a_real_snapshot_gets(self, node: Node) -> None:
        node.start(arena_limit="64MiB", system_user_memory="25%")
        hers = UsersJob(node, ALICE, node.home(ALICE) / "run", 0, function="save_too_much")
        assert "takes the job beyond its share, 16 MiB" in hers.result()["why"]
        his = UsersJob(node, BOB, node.home(BOB) / "run", 2)
        assert his.result()["steps"] == 2


class TestSpaceInAStore:
    """Workers write as the user: what a file system does not give him, they do not get."""

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("options", "why"),
        [
            pytest.param("size=2m", "No space left on device", id="full"),
            pytest.param("size=64m,usrquota_block_hardlimit=2m", "Disk quota exceeded", id="quota"),
        ],
    )
    def test_that_a_user_has_used_up_costs_him_saves_and_nobody_else(self, node: Node, options: str, why: str) -> None:
        place = node.root / "small"
        place.mkdir()
        mounted = node.spawn(ROOT, ["mount", "-t", "tmpfs", "-o", f"mode=1777,{options}", "tmpfs", str(place)])
        said, _ = mounted.communicate(timeout=20)
        if mounted.returncode:
            pytest.skip(f"no such file system (quotas need CONFIG_TMPFS_QUOTA): {said.strip()}")
        node.start()
        hers = UsersJob(node, ALICE, place / "hers", 1, patient=True)
        hers.wait_for_save(1)
        fill = f"""
with open({str(place / "ballast")!r}, "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError as error:
        print(error)
"""
        assert why in node.python(ALICE, fill)
        eventually(lambda: any(why in line["why"] for line in hers.reports("failed")), "a save to fail")
        his = UsersJob(node, BOB, (place if "quota" in options else node.home(BOB)) / "his", 2)
        assert his.result()["steps"] == 2
        failed = len(hers.reports("failed"))
        eventually(lambda: len(hers.reports("failed")) > failed, "the training to go on")
        before = max(line["step"] for line in hers.reports("saved"))
        assert node.python(ALICE, f"import os; os.unlink({str(place / 'ballast')!r})") == ""
        hers.wait_for_save(before + 1)
        (hers.folder / "go-end").touch()
        assert hers.result()["skipped"] == 0


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


def register(node: Node, person: Person, job: str = "job") -> str:
    """Register a rank with one's own agent, and leave."""
    identity = IdentityClient(str(node.agent_directory(person) / "identity.sock"))
    answer, fd = identity.call(registration(job=job))
    os.close(fd)
    identity.close()
    return "ok" if answer["ok"] else str(answer)


def beat(person: Person, node: Node, stop: threading.Event, problems: list[str]) -> None:
    """Ask for the agent again and again, as ranks do that have lost it."""
    while not stop.is_set():
        try:
            ask(node, person)
        except AgentUnavailable:
            time.sleep(0.05)
        except Exception as error:
            problems.append(repr(error))


class TestTheServicesOwnEnd:
    def test_by_kill_leaves_agents_and_their_ranks_and_another_finds_them(self, node: Node) -> None:
        node.start()
        for person in (ALICE, BOB):
            ask(node, person)
        before = node.agents()
        rank = rank_of(node, ALICE)
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted")
        node.stop(signal.SIGKILL)
        assert node.command(ALICE, "status")[0] == 0  # nobody needs the service for what is there
        node.start()
        eventually(lambda: {a["state"] for a in node.agents().values()} == {"serves"}, "the agents to come back")
        assert {u: a["pid"] for u, a in node.agents().items()} == {u: a["pid"] for u, a in before.items()}
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted again")
        assert rank.poll() is None

    def test_before_it_knew_of_an_agent_does_not_leave_that_alone(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        agent, record = node.agents()[ALICE.uid]["pid"], node.directory / "agents" / str(ALICE.uid)
        node.stop(signal.SIGKILL)
        record.rename(node.root / "record")
        node.start()
        assert node.agents() == {}
        (node.root / "record").rename(record)  # an entrance is on its way, and writes it a little later
        eventually(lambda: ALICE.uid in node.agents(), "the agent to be found")
        assert (node.agents()[ALICE.uid]["pid"], node.agents()[ALICE.uid]["state"]) == (agent, "serves")

    @pytest.mark.slow
    def test_is_none_when_it_is_told_to_read_its_settings_again(self, node: Node) -> None:
        settings = node.root / "config.toml"
        settings.write_text('[system]\nuser_memory = "10%"\n')
        new = node.root / "new" / "ckptsvc"
        node.environ["PYTHONPATH"] = f"{new.parent}:{node.environ['PYTHONPATH']}"
        node.start(config=str(settings))
        ask(node, ALICE)
        agent = node.agents()[ALICE.uid]["pid"]
        assert node.supervisor is not None
        settings.write_text('[system]\nuser_memories = "10%"\n')
        node.supervisor.send_signal(signal.SIGHUP)
        log = node.root / "service.log"
        eventually(
            lambda: "the service and its settings stay as they were" in log.read_text(), "the mistake to be noticed"
        )
        settings.write_text('[system]\nusers = "ck-bob"\n')
        new.mkdir(parents=True)
        (new / "__init__.py").write_text("raise SystemExit('this version is broken')")
        node.supervisor.send_signal(signal.SIGUSR2)
        eventually(lambda: "this version is broken" in log.read_text(), "the trial to fail")
        assert ask(node, ALICE)["ok"] is True
        shutil.rmtree(new)
        hers = node.agent_directory(ALICE) / "agent.log"
        node.supervisor.send_signal(signal.SIGUSR2)
        eventually(lambda: log.read_text().count("listens in") == 2, "it to listen again")
        eventually(lambda: hers.read_text().count("listens on") == 2, "her agent to begin anew too")
        assert node.supervisor.poll() is None
        assert ask(node, BOB)["ok"] is True  # while it begins anew, callers wait
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "serves", "her agent to come back")
        assert node.agents()[ALICE.uid]["pid"] == agent
        os.kill(agent, signal.SIGTERM)
        wait_until_gone(agent)  # and is no zombie, though another program has started it
        with pytest.raises(StoreDenied, match="ck-alice may not use"):
            ask(node, ALICE)

    @pytest.mark.slow
    def test_in_good_order_leaves_them_too(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        pid = node.agents()[ALICE.uid]["pid"]
        assert node.stop() == 0
        assert ids_of(pid)["Uid"].split()[0] == str(ALICE.uid)
        assert not any(s in ids_of(pid)["State"] for s in "ZX")

    @pytest.mark.slow
    def test_a_second_one_is_refused(self, shared: Node) -> None:
        status, said = shared.command(ROOT, "agent", "--system")
        assert (status, "another service serves" in said) == (11, True)

    @pytest.mark.slow
    def test_needs_root_and_ports_that_agents_can_share(self, shared: Node) -> None:
        status, said = shared.command(ALICE, "agent", "--system")
        assert (status, "must be started by root" in said) == (2, True)
        status, said = shared.command(ROOT, "agent", "--system", "--listen", "127.0.0.1:7070")
        assert (status, "every user's agent needs a port of its own" in said) == (2, True)


class TestAnAgentsEnd:
    @pytest.mark.slow
    def test_is_survived_by_a_job_that_goes_on_saving(self, node: Node) -> None:
        node.start()
        job = UsersJob(node, ALICE, node.home(ALICE) / "run", 1, patient=True)
        for _ in range(3):
            done = job.reports("saved")
            job.wait_for_save(done[-1]["step"] + 1 if done else 1)
            os.kill(node.agents()[ALICE.uid]["pid"], signal.SIGKILL)
        job.wait_for_save(job.reports("saved")[-1]["step"] + 3)
        (job.folder / "go-end").touch()
        assert job.result()["steps"] > 6

    def test_under_its_ranks_brings_another_at_once(self, node: Node) -> None:
        node.start()
        ask(node, ALICE)
        rank_of(node, ALICE)
        eventually(lambda: node.agents()[ALICE.uid]["ranks"] == 1, "the rank to be counted")
        first = node.agents()[ALICE.uid]["pid"]
        os.kill(first, signal.SIGKILL)
        eventually(lambda: node.agents()[ALICE.uid]["pid"] not in (first, -1), "another agent")
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "serves", "it to serve")

    def test_that_its_user_keeps_from_being_reaped_stops_nobody(self, node: Node) -> None:
        """A process that is traced is its tracer's to reap first, and he sleeps."""
        node.start()
        ask(node, BOB)
        first = node.agents()[BOB.uid]["pid"]
        code = f"""
import ctypes, os, signal, time
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
if libc.ptrace({PTRACE_SEIZE}, {first}, None, None):
    print(os.strerror(ctypes.get_errno()), flush=True)
os.kill({first}, signal.SIGKILL)
print("killed", flush=True)
time.sleep(120)
"""
        tracer = node.spawn(BOB, [sys.executable, "-c", code])
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == "killed\n"
        eventually(lambda: node.agents()[BOB.uid]["pid"] == -1, "its end to be noticed")  # the service answers
        assert ids_of(first)["State"].startswith("Z")
        assert ask(node, ALICE)["ok"] is True
        with pytest.raises(AgentUnavailable, match=f"runs already: process {first}"):  # one such process is enough
            ask(node, BOB)
        assert tracer.poll() is None
        tracer.kill()
        eventually(lambda: not Path(f"/proc/{first}").exists(), "it to be reaped, once it can be")

    @pytest.mark.slow
    def test_after_doing_nothing_is_no_failure_and_it_is_started_again_on_demand(self, node: Node) -> None:
        node.start(system_linger="1s")
        ask(node, ALICE)
        first = node.agents()[ALICE.uid]["pid"]
        wait_until_gone(first)
        eventually(lambda: node.agents()[ALICE.uid]["state"] == "ended", "it to be noticed")
        assert ask(node, ALICE)["ok"] is True
        assert node.agents()[ALICE.uid]["pid"] not in (first, -1)


def rank_of(node: Node, person: Person) -> subprocess.Popen[str]:
    """A process that is registered with its user's agent for as long as it lives."""
    code = f"""
import os, sys, time
from ckptsvc.rpc.identity import IdentityClient
identity = IdentityClient({str(node.agent_directory(person) / "identity.sock")!r})
answer, fd = identity.call({registration()!r})
time.sleep(60)
"""
    return node.spawn(person, [sys.executable, "-c", code])
