"""One service for many users: real user ids, real agents, and who has which."""

import ctypes
import json
import os
import shutil
import signal
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from harness.job import free_port
from harness.observability import FOLDER
from harness.runtime import eventually
from harness.users import ALICE, BOB, DAEMON, SHARED, STRANGER, Node, Person, as_user, ids_of, wait_until_gone
from harness.users_jobs import UsersJob, ask, error_of, rank_of

from ckptsvc.agent.supervisor import entrance
from ckptsvc.agent.supervisor.agents import User
from ckptsvc.agent.supervisor.board import NOWHERE, Board
from ckptsvc.config import load
from ckptsvc.errors import AgentUnavailable, LimitReached, StoreDenied
from ckptsvc.rpc.accounts import Account
from ckptsvc.rpc.dial import safe_target

ROOT = Person("root", 0, 0, (0,))
KEYCTL_GET_KEYRING_ID, KEYCTL_JOIN_SESSION_KEYRING, KEY_SPEC_SESSION_KEYRING = 0, 1, -3


def beat(person: Person, node: Node, stop: threading.Event, problems: list[str]) -> None:
    """Ask for the agent again and again, as ranks do that have lost it."""
    while not stop.is_set():
        try:
            ask(node, person)
        except AgentUnavailable:
            time.sleep(0.05)
        except Exception as error:
            problems.append(repr(error))


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
            1008: "http://localhost:4002",
        }  # fmt: skip
        agents.users = lambda: [User(u, u, name=f"u{u}", page=page, scrape=f"t{u}", pidfd=9) for u, page in led.items()]
        board.write(agents)
        found = json.loads((tmp_path / "metrics" / "targets.json").read_text())
        assert [each["targets"] for each in found] == [["127.0.0.1:4000"], ["[::1]:4001"]]
        assert [each["labels"]["user"] for each in found] == ["u1001", "u1005"]
        board.close()

    def test_asks_nobody_who_listens_where_an_agent_was_that_has_died(self, tmp_path: Path) -> None:
        if os.geteuid() != 0:
            pytest.skip("needs root")
        settings = load({}, {"system.directory": str(tmp_path), "system.metrics_group": "daemon"}, [])
        board, agents = Board(settings), types.SimpleNamespace(starts=1, failures=0)
        board.open()
        page, died = "http://127.0.0.1:4000", AgentUnavailable("it died")
        states = (
            User(1001, 1, "failed", page=page, problem=died), User(1003, 1, "away", page=page, pidfd=9),
            User(1002, 1, "starts", page=page, pidfd=9, starting=True), User(1004, 1, "ended", page=page),
        )  # fmt: skip
        agents.users = lambda: list(states)
        board.write(agents)
        found = json.loads((tmp_path / "metrics" / "targets.json").read_text())
        assert {each["labels"]["user"]: each["targets"] for each in found} == {
            "failed": [NOWHERE], "starts": [NOWHERE], "away": ["127.0.0.1:4000"],
        }  # fmt: skip
        assert {each["labels"]["instance"].rpartition(":")[2] for each in found} == {"4000"}
        board.close()
