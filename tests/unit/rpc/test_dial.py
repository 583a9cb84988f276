"""Finding the agent: paths of its sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptsvc.config import load
from ckptsvc.errors import ConfigError
from ckptsvc.rpc import dial, service
from ckptsvc.settings import Settings


def test_the_longest_socket_path_really_binds_and_the_next_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    room = dial.MAX_SOCKET_PATH - len(str(directory)) - 1
    assert room > 0, "pytest's temporary directory is too deep for this test"
    path = dial.socket_path(directory, "s" * room)
    bind = "import socket, sys; socket.socket(socket.AF_UNIX).bind(sys.argv[1])"
    subprocess.run([sys.executable, "-W", "ignore", "-c", bind, path], check=True)
    with pytest.raises(ConfigError, match="107"):
        dial.socket_path(directory, "s" * (room + 1))
    failed = subprocess.run([sys.executable, "-c", bind, path + "s"], capture_output=True, text=True, check=False)
    assert "too long" in failed.stderr


# ---- which agent is a user's


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in which a service could listen, or so it seems: its socket is there."""
    directory = tmp_path / "s"
    directory.mkdir(mode=0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(directory / service.SOCKET))
    monkeypatch.setattr(service, "RESTART_PATIENCE", 0.0)
    return directory


def settings_for(system: Path, **more: str) -> Settings:
    return load({}, {"system.directory": str(system), **more}, [])


@contextlib.contextmanager
def agent_in(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "agent.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.mark.skipif(os.geteuid() != 0, reason="what only root can put there")
def test_an_agent_is_the_one_that_is_set_then_ones_own_then_the_services(system: Path, tmp_path: Path) -> None:
    own, given = tmp_path / "own", service.directory_of(system, os.geteuid())
    settings = settings_for(system)
    assert dial.agents_home(own, settings_for(tmp_path / "none")) == own
    assert dial.agents_home(own, settings) == own  # nobody answers for the service
    with agent_in(given):
        assert dial.agents_home(own, settings) == given  # even then
        assert dial.agents_home(own, settings_for(system, **{"agent.socket_dir": str(own)})) == own
        with agent_in(own):
            assert dial.agents_home(own, settings) == own


@pytest.mark.skipif(os.geteuid() != 0, reason="what only root can put there")
def test_a_service_is_none_that_others_than_root_could_have_put_there(system: Path, tmp_path: Path) -> None:
    assert service.is_there(system)
    assert service.service_of(service.directory_of(system, 7)) == system
    assert service.service_of(tmp_path / "users" / "7") is None
    os.chown(system / service.SOCKET, 12345, 0)
    assert not service.is_there(system)
    os.chown(system / service.SOCKET, 0, 0)
    system.chmod(0o777)
    assert not service.is_there(system)
    system.chmod(0o755)
    os.chown(system, 12345, 0)
    assert not service.is_there(system)
    os.chown(system, 0, 0)
    (tmp_path / "link").symlink_to(system)
    assert not service.is_there(tmp_path / "link")
    (system / service.SOCKET).unlink()
    (system / service.SOCKET).write_text("")
    assert not service.is_there(system)
