"""Finding the agent: paths of its sockets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ckptsvc.errors import ConfigError
from ckptsvc.rpc import dial


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
