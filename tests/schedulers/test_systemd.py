"""The units: systemd finds nothing wrong with them, exposes no more than is documented, and runs them.

The quick ones need systemd-analyze; the slow one starts a real systemd (harness.systemd), with a job that trains
through all that an operator does.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from harness.job import Launch
from harness.runtime import Runtime, eventually
from harness.systemd import systemd
from harness.users import ALICE, Node, opened_for_users, wait_until_gone

from ckptsvc.cli.agent import command
from ckptsvc.config import load

sys.path.append(str(Path(__file__).parents[1] / "fault"))

pytestmark = pytest.mark.systemd

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
SERVICES = {
    "ckptsvc-agent.service": 40,  # it starts processes of other users
    "ckptsvc-agent@.service": 30,
    "user/ckptsvc-agent.service": None,  # a user's manager can take nothing from him
}
"""Unit -> ten times the exposure that `systemd-analyze security` may find."""

DROP_INS = {
    "memory.conf": "ckptsvc-agent.service",
    "limits.conf": "ckptsvc-agent.service",
    "etcd.conf": "ckptsvc-agent.service",
    "tls.conf": "ckptsvc-agent@.service",
}


def analyze(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed: make test-service installs it")
    return subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        env=os.environ | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def lines(unit: str) -> list[tuple[str, str]]:
    """(key, value) of a unit, in order."""
    found = re.findall(r"^(\w+)=(.*)$", (UNITS / unit).read_text(), re.MULTILINE)
    assert found
    return found


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units with their drop-ins, and a program that is there."""
    folder = tmp_path / "units"
    for unit in SERVICES:
        text = (UNITS / unit).read_text()
        assert "/usr/bin/ckptsvc" in text
        path = folder / unit
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace("/usr/bin/ckptsvc", "/bin/true"))
    for name, unit in DROP_INS.items():
        beside = folder / f"{unit}.d"
        beside.mkdir(exist_ok=True)
        shutil.copy(UNITS / "examples" / name, beside)
    return folder


def test_every_example_is_of_a_unit() -> None:
    assert {path.name for path in (UNITS / "examples").iterdir()} == set(DROP_INS)


@pytest.mark.parametrize("unit", SERVICES)
def test_systemd_finds_nothing_wrong(installed: Path, unit: str, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    whose = ["--user"] if unit.startswith("user/") else []
    done = analyze("verify", "--man=no", *whose, str(installed / unit), XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    broken = (installed / unit).read_text().replace("[Service]", "[Service]\nWatchdogSecs=1\nRestart=sometimes")
    (installed / unit).write_text(broken)
    said = analyze("verify", "--man=no", *whose, str(installed / unit), XDG_RUNTIME_DIR=str(tmp_path)).stderr
    assert "WatchdogSecs" in said
    assert "sometimes" in said


@pytest.mark.parametrize(("unit", "threshold"), [(unit, most) for unit, most in SERVICES.items() if most])
def test_no_more_is_exposed_than_is_said(installed: Path, unit: str, threshold: int) -> None:
    done = analyze("security", "--offline=true", f"--threshold={threshold}", str(installed / unit))
    assert done.returncode == 0, done.stdout[-300:]
    assert analyze("security", "--offline=true", "--threshold=10", str(installed / unit)).returncode == 1


@pytest.mark.parametrize("unit", SERVICES)
def test_the_commands_are_ours_and_the_reload_checks_first(unit: str) -> None:
    told = lines(unit)
    for key, value in told:
        program, *arguments = shlex.split(value) if key.startswith("Exec") else ("", "")
        if program == "/usr/bin/ckptsvc":
            assert arguments[0] == "agent"
            known = {flag for option in command.params for flag in option.opts} | {"--system"}
            assert set(arguments[1:]) <= known
    start = dict(told)["ExecStart"]
    assert [value for key, value in told if key == "ExecReload"] == [
        f"{start} --check-config",
        "/bin/kill -HUP $MAINPID",
    ]
    assert ("Type", "notify") in told
    assert dict(told)["NotifyAccess"] == "main", "a worker must not speak for the agent"


def test_what_users_agents_inherit_lets_them_work() -> None:
    """They write to stores anywhere, use the cards of the network, and look at the processes of their jobs."""
    for unit in ("ckptsvc-agent.service", "ckptsvc-agent@.service"):
        told = dict(lines(unit))
        for key in ("ProtectHome", "PrivateTmp", "PrivateDevices", "PrivateNetwork", "ProtectProc", "PrivateUsers"):
            assert key not in told
        assert told["ProtectSystem"] == "full"
    assert dict(lines("ckptsvc-agent.service"))["KillMode"] == "process", "users' agents outlive a restart"


def test_the_settings_file_and_the_drop_ins_hold_settings() -> None:
    assert load({}, files=[UNITS / "config.toml"]).origin["arena.limit"].endswith("config.toml")
    for name in DROP_INS:
        text = (UNITS / "examples" / name).read_text()
        environ = dict(re.findall(r"^Environment=(\w+)=(\S+)$", text, re.MULTILINE))
        assert all(key.startswith("CKPTSVC_") for key in environ)
        load(environ, files=[])
    assert load({"CKPTSVC_AGENT_SOCKET_DIR": "/x"}, files=[]).agent.socket_dir == "/x"


UNIT = "ckptsvc-agent@root.service"
SYSTEM = "ckptsvc-agent.service"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_job_trains_through_all_that_an_operator_does(launch: Launch, runtime: Runtime, tmp_path: Path) -> None:
    from test_service import committed, ends_well, train

    program = tmp_path / "ckptsvc"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m ckptsvc.cli.main "$@"\n')
    program.chmod(0o755)
    unit = (UNITS / "ckptsvc-agent@.service").read_text().replace("/usr/bin/ckptsvc", str(program))
    environ = "".join(f'Environment="{key}={value}"\n' for key, value in runtime.environ.items() if '"' not in value)
    drop_in = (
        f"[Unit]\nDefaultDependencies=no\n[Service]\nWorkingDirectory={Path.cwd()}\nWatchdogSec=12\n{environ}"
        f"StandardOutput=append:{runtime.sockets}/agent.log\nStandardError=inherit\n"
    )
    store = tmp_path / "run"
    with systemd({"ckptsvc-agent@.service": unit, "ckptsvc-agent@.service.d/test.conf": drop_in}, tmp_path) as system:
        system.systemctl("start", UNIT)
        assert system.show(UNIT, "ActiveState") == "active"
        assert system.show(UNIT, "StatusText").startswith("0 ranks of 0 jobs")
        with launch.service(2, train, str(store)) as job:
            last = committed(job, store, 0)
            eventually(lambda: "2 ranks of 1 jobs" in system.show(UNIT, "StatusText"), "the status of the unit")

            folder = runtime.root / ".config" / "ckptsvc"
            folder.mkdir(parents=True)
            (folder / "config.toml").write_text('[log]\nlevel = "debug"\n')
            system.systemctl("reload", UNIT)
            eventually(lambda: "log.level: changed" in runtime.log(), "the settings to be read again")
            (folder / "config.toml").write_text("[log]\nlevle = 1\n")
            assert system.systemctl("reload", UNIT, check=False) == ""
            assert system.show(UNIT, "ActiveState") == "active"
            assert "did you mean log.level" in runtime.log()
            (folder / "config.toml").unlink()

            pid, started = system.show(UNIT, "MainPID"), runtime.status(runtime.sockets)["started"]
            system.systemctl("kill", "--kill-whom=main", "--signal=USR2", UNIT)
            eventually(lambda: _started(runtime) > started, "the successor")
            eventually(lambda: system.show(UNIT, "ActiveState") == "active", "systemd to hear of it")
            assert (system.show(UNIT, "MainPID"), system.show(UNIT, "NRestarts")) == (pid, "0")
            last = committed(job, store, last)

            system.systemctl("restart", UNIT)
            assert system.show(UNIT, "MainPID") != pid
            last = committed(job, store, last)

            pid = system.show(UNIT, "MainPID")
            system.systemctl("kill", "--kill-whom=main", "--signal=STOP", UNIT)  # its loop stands still
            eventually(lambda: system.show(UNIT, "NRestarts") == "1", "the watchdog", 60)
            eventually(lambda: system.show(UNIT, "ActiveState") == "active", "the agent to be started again", 60)
            last = committed(job, store, last)
            ends_well(job, store, 2)
        system.systemctl("stop", UNIT)
        assert system.show(UNIT, "Result") == "success"
        assert list(runtime.arenas.rglob("*.arena")) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_service_of_all_users_works_with_no_more_rights_than_it_has(tmp_path: Path) -> None:
    """It starts an agent of another user; that one outlives a restart, and makes way with the service."""
    root, arenas = (Path(tempfile.mkdtemp(prefix="ck-", dir=where)) for where in ("/tmp", "/dev/shm"))
    root.chmod(0o755)
    arenas.chmod(0o1777)
    inside: list[str] = []  # how to get there, once it is there
    node = Node(root, arenas, inside)
    program = root / "ckptsvc"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -P -m ckptsvc.cli.main "$@"\n')
    program.chmod(0o755)
    unit = (UNITS / "ckptsvc-agent.service").read_text().replace("/usr/bin/ckptsvc", str(program))
    kept = {key: value for key, value in node.environ.items() if key.startswith(("CKPTSVC_", "PYTHON"))}
    environ = "".join(f'Environment="{key}={value}"\n' for key, value in kept.items())
    drop_in = (
        f"[Unit]\nDefaultDependencies=no\n[Service]\nStateDirectory=\nLogsDirectory=\n{environ}"
        f"StandardOutput=append:{root}/service.log\nStandardError=inherit\n"
    )
    units = {"ckptsvc-agent.service": unit, "ckptsvc-agent.service.d/test.conf": drop_in}
    try:
        with systemd(units, tmp_path, opened_for_users(root)) as system:
            inside += ["nsenter", "-t", str(system.pid), "-a", "--"]
            system.systemctl("start", SYSTEM)
            assert system.show(SYSTEM, "StatusText") == "0 ranks of 0 users' agents"
            ask = "import ckptsvc.rpc.service as s, pathlib, sys; print(s.own_agent(pathlib.Path(sys.argv[1])))"
            code = ask.replace("sys.argv[1]", repr(str(node.directory)))
            assert node.python(ALICE, code).strip() == str(node.agent_directory(ALICE))
            log = node.agent_directory(ALICE) / "agent.log"
            (pid,) = (pid for pid in node.processes() if "agent.server" in Path(f"/proc/{pid}/cmdline").read_text())
            told = dict(re.findall(r"^(\w+):\s*(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE))
            assert told["Uid"].split() == [str(ALICE.uid)] * 4
            assert sorted(map(int, told["Groups"].split())) == sorted(ALICE.groups)
            assert (told["CapEff"], told["NoNewPrivs"], told["Seccomp"]) == ("0" * 16, "1", "2")
            eventually(lambda: "of 1 users" in system.show(SYSTEM, "StatusText"), "the status of the unit")

            main = system.show(SYSTEM, "MainPID")
            system.systemctl("restart", SYSTEM)
            assert system.show(SYSTEM, "MainPID") != main
            eventually(lambda: "of 1 users" in system.show(SYSTEM, "StatusText"), "the agent to be found again")
            assert Path(f"/proc/{pid}").exists()
            assert log.read_text().count("listens on") == 1

            main = system.show(SYSTEM, "MainPID")
            system.systemctl("kill", "--kill-whom=main", "--signal=USR2", SYSTEM)
            eventually(lambda: log.read_text().count("listens on") == 2, "the successor of the agent")
            assert "makes way for its successor" in log.read_text()
            eventually(lambda: system.show(SYSTEM, "ActiveState") == "active", "the service to be there again")
            assert (system.show(SYSTEM, "MainPID"), system.show(SYSTEM, "NRestarts")) == (main, "0")
            assert Path(f"/proc/{pid}").exists()
            score = Path(f"/proc/{pid}/oom_score_adj")
            assert int(score.read_text()) >= 0
            limits = Path(f"/proc/{pid}/limits").read_text()
            assert re.search(r"Max processes +32768 +32768 ", limits)
            assert not re.search(r"Max locked memory +unlimited", limits)
            system.systemctl("stop", SYSTEM)
            assert Path(f"/proc/{pid}").exists()
            system.systemctl("kill", "--kill-whom=all", "--signal=TERM", SYSTEM)  # as when the package is removed
            wait_until_gone(pid)
    finally:
        print(node.log())
        problems = node.close()
    assert problems == []


def _started(runtime: Runtime) -> float:
    try:
        return float(runtime.status(runtime.sockets)["started"])
    except Exception:
        return 0.0
