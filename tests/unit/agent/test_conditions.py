"""What keeps an agent from starting: said alike by the agent, by `--check-config`, and by one that would make way."""

import os
import signal
import subprocess
import sys

import pytest
from harness.runtime import eventually
from harness.stored import cli

from ckptsvc.agent.process.conditions import ground_of
from ckptsvc.config import load
from ckptsvc.errors import ConfigError

NOWHERE = "/nonexistent/here"

WRONG = {
    "tls": ({f"tls.{name}_file": NOWHERE for name in ("ca", "cert", "key")}, "tls.ca_file: /nonexistent/here"),
    "listen": ({"agent.listen": "0.0.0.0:0"}, "agent.listen is 0.0.0.0:0, which is not loopback"),
    "metrics": ({"agent.metrics_listen": "0.0.0.0:0"}, "agent.metrics_listen is 0.0.0.0:0, which is not loopback"),
    "token": ({"agent.http_token_file": NOWHERE}, "agent.http_token_file: /nonexistent/here: No such file"),
    "arenas": ({"arena.dir": NOWHERE}, "arena.dir: /nonexistent/here: No such file"),
    "etcd": ({"agent.coordination": "etcd://x"}, "'x' in 'etcd://x' is not HOST:PORT"),
    "traces": ({"traces.endpoint": "foo"}, "traces.endpoint is 'foo'"),
    "option": ({"store.options": {"file": {"direkt": True}}}, "store.options.file.direkt: there is no such option"),
    "value": ({"store.options": {"file": {"threads": "many"}}}, "store.options.file: Expected `int`"),
    "scheme": ({"store.options": {"fiel": {"direct": True}}}, "no driver for fiel:// is installed"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_each_mistake_is_found_before_a_start(kind, tmp_path):
    overrides, said = WRONG[kind]
    before = sorted(tmp_path.rglob("*"))
    environ = {"CKPTSVC_AGENT_SOCKET_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
    with pytest.raises(ConfigError) as failure:
        ground_of(load(environ, overrides, files=[]), environ)
    assert failure.value.what.startswith(said)
    assert sorted(tmp_path.rglob("*")) == before, "a check makes nothing"


def test_what_is_right_is_not_found_wrong_and_nothing_is_made(tmp_path):
    environ = {"CKPTSVC_AGENT_SOCKET_DIR": str(tmp_path / "run"), "HOME": str(tmp_path)}
    (tmp_path / "arenas").mkdir()
    overrides = {"arena.dir": str(tmp_path / "arenas"), "tiers.local": str(tmp_path / "disk"), "arena.limit": "1MiB",
        "store.options": {"file": {"direct": False}}}  # fmt: skip
    ground = ground_of(load(environ, overrides, files=[]), environ)
    assert (ground.arena_bytes, ground.certificates, ground.etcd) == (1 << 20, None, None)
    assert sorted(each.name for each in tmp_path.rglob("*")) == ["arenas"]


def test_the_agent_and_the_command_say_the_same(runtime, monkeypatch):
    """One line, status 2, no traceback."""
    monkeypatch.setenv("CKPTSVC_ARENA_DIR", NOWHERE)
    status, _, err = cli("agent", "--check-config")
    said = err.splitlines()[0].removeprefix("error: ")
    assert (status, said.startswith("arena.dir: ")) == (2, True)
    directory = runtime.sockets / "a"
    command = [sys.executable, "-m", "ckptsvc.agent.server", "--dir", str(directory)]
    environ = {**runtime.environ, "CKPTSVC_ARENA_DIR": NOWHERE}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_the_service_of_all_users_is_checked_too(monkeypatch):
    monkeypatch.setenv("CKPTSVC_AGENT_LISTEN", "127.0.0.1:7070")
    status, _, err = cli("agent", "--system", "--check-config")
    assert (status, "needs a port of its own" in err) == (2, True)
    monkeypatch.setenv("CKPTSVC_AGENT_LISTEN", "127.0.0.1:0")
    monkeypatch.setenv("CKPTSVC_SYSTEM_OPERATORS", "root,nobody-of-that-name,@no-such-group")
    status, _, err = cli("agent", "--system", "--check-config")
    assert status == 0
    assert "system.operators: this node knows no user nobody-of-that-name" in err
    assert "system.operators: this node knows no group no-such-group" in err
    assert "user root" not in err


def test_an_agent_does_without_a_disk_that_is_not_there(runtime, start, monkeypatch):
    """Seen: a disk that one node had not mounted kept the whole job from starting."""
    monkeypatch.setenv("CKPTSVC_TIERS_LOCAL", NOWHERE)
    said = f"tiers.local: {NOWHERE}: there is no /nonexistent"
    status, _, err = cli("agent", "--check-config")
    assert (status, f"warning: {said}" in err) == (0, True)
    runtime.environ["CKPTSVC_TIERS_LOCAL"] = NOWHERE
    agent = start("a")
    agent.register()
    log = agent.directory / "agent.log"
    eventually(lambda: "is not used: " + said in log.read_text(), "it to be said")
    os.kill(agent.process.pid, signal.SIGUSR2)
    eventually(lambda: log.read_text().count(" serves in ") == 2, "the successor", 60)


def test_an_agent_does_not_make_way_for_one_that_could_not_start(runtime, start, tmp_path):
    """Seen: it made way, and then there was none."""
    token = tmp_path / "token"
    token.write_text("0" * 64)
    token.chmod(0o600)
    runtime.environ["CKPTSVC_AGENT_HTTP_TOKEN_FILE"] = str(token)
    agent = start("a", "--metrics-listen", "127.0.0.1:0")
    token.unlink()
    os.kill(agent.process.pid, signal.SIGUSR2)
    log = agent.directory / "agent.log"
    eventually(lambda: "cannot be replaced: agent.http_token_file" in log.read_text(), "the refusal", 60)
    assert agent.alive
    agent.register()


def test_an_agent_tries_its_successor_with_what_it_was_told_on_its_command_line(runtime, start):
    runtime.environ["CKPTSVC_AGENT_METRICS_LISTEN"] = "0.0.0.0:0"  # without certificates
    agent = start("a", "--metrics-listen", "off")
    os.kill(agent.process.pid, signal.SIGUSR2)
    log = agent.directory / "agent.log"
    eventually(lambda: "makes way for its successor" in log.read_text(), "it to make way", 60)
    eventually(lambda: log.read_text().count(" serves in ") == 2, "the successor", 60)
