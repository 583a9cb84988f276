"""What an operator's Prometheus reads of a node with many users, in files of root's.

    DIR/metrics/targets.json    all agents, for `file_sd_configs`; for members of system.metrics_group
    DIR/metrics/ckptsvc.prom    the service itself, for the textfile collector of node_exporter; for everybody

An agent's metrics name jobs, which are nobody's business but its user's and the operator's, and every user reaches
every port of loopback. One token for all agents would be every user's: Prometheus shows it to whoever listens where an
agent should. So each connection of an agent to the service has a token of its own. It opens that agent's /metrics and
nothing else, and whoever takes the port of an agent that has ended learns what opens nothing any more.
"""

from __future__ import annotations

import contextlib
import grp
import ipaddress
import json
import logging
import os
import re
import socket
from asyncio import sleep
from collections import Counter
from pathlib import Path
from typing import Any

from ckptsvc.agent.supervisor import records
from ckptsvc.agent.supervisor.agents import Agents, User
from ckptsvc.errors import ConfigError
from ckptsvc.settings import Settings
from ckptsvc.telemetry import AgentState
from ckptsvc.telemetry.service import AGENTS, FAILURES, RANKS, STARTS, exposition

logger = logging.getLogger("ckptsvc.supervisor")

FOLDER, TARGETS, TEXT = "metrics", "targets.json", "ckptsvc.prom"

NOWHERE = "127.0.0.1:0"
"""Where an agent that has died is a target: nobody can listen there, and so nobody can answer for it."""

EVERY = 2.0
"""Seconds between looks whether something has changed."""

_PAGE = re.compile(r"(https?)://(([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):([0-9]{1,5}))")


class Board:
    """Keeps the files up to date."""

    def __init__(self, settings: Settings) -> None:
        self._directory, self._group = Path(settings.system.directory), settings.system.metrics_group
        self._node = settings.agent.name or socket.gethostname()
        listen = settings.agent.metrics_listen
        self._hosts = {socket.gethostname(), listen.host if listen else ""} - {"localhost"}
        self._fd = self._gid = -1
        self._written: dict[str, str] = {}
        self._problem = ""

    def open(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: it is not root's alone, or there is no such group.
        """
        self._gid = group_of(self._group)
        path = self._directory / FOLDER
        with contextlib.suppress(FileExistsError):
            path.mkdir(0o755)
        try:
            self._fd = records.opened(str(path), None, 0o755)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        if not self._group:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(TARGETS, dir_fd=self._fd)

    def close(self) -> None:
        """The files stay: agents go on."""
        os.close(self._fd)

    async def run(self, agents: Agents) -> None:
        """Look again and again, until cancelled. Agents of an earlier service have connected before the first look."""
        while True:
            await sleep(EVERY)
            self.write(agents)

    def write(self, agents: Agents) -> None:
        """Write what has changed; where that fails, it is said once, and tried again."""
        users = agents.users()
        states = Counter(user.state for user in users)
        told: dict[str, Any] = {
            AGENTS: {state: states[state] for state in AgentState},
            RANKS: sum(user.ranks for user in users),
            STARTS: agents.starts,
            FAILURES: agents.failures,
        }
        try:
            self._put(TEXT, exposition(told), 0o644, -1)
            if self._group:
                listed = [target for user in users if (target := self._target(user)) is not None]
                self._put(TARGETS, json.dumps(listed, indent=1) + "\n", 0o640, self._gid)
        except OSError as error:
            if str(error) != self._problem:
                logger.warning("what Prometheus reads in %s is old: %s", self._directory / FOLDER, error)
            self._problem = str(error)

    def _target(self, user: User) -> dict[str, Any] | None:
        """An agent that serves, or ought to; where it would lead Prometheus elsewhere, it is none.

        The port of one that has died is anybody's: it is asked nowhere until the next one says where it serves.
        """
        found = _PAGE.fullmatch(user.page)
        if found is None or user.state == "ended":
            return None
        scheme, address, host, port = found.groups()
        if not (_is_loopback(host.strip("[]")) or host in self._hosts):
            return None
        if user.pidfd < 0 or user.starting:
            scheme, address = "http", NOWHERE
        labels = {"instance": f"{self._node}:{port}", "user": user.name, "__scheme__": scheme}
        return {"targets": [address], "labels": labels | {"__param_scrape": user.scrape}}

    def _put(self, name: str, text: str, mode: int, gid: int) -> None:
        """Put a file there, whole or not at all."""
        if self._written.get(name) == text:
            return
        fresh = f"{name}.new"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(fresh, flags, 0o600, dir_fd=self._fd), "w") as file:
            file.write(text)
            file.flush()
            os.fchown(file.fileno(), -1, gid)
            os.fchmod(file.fileno(), mode)
        os.rename(fresh, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        self._written[name], self._problem = text, ""


def _is_loopback(host: str) -> bool:
    """Whether it is an address of loopback; "localhost" is two, and where an agent has one, anybody has the other."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def group_of(name: str) -> int:
    """The number of a group; -1 for "".

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return grp.getgrnam(name).gr_gid if name else -1
    except KeyError:
        raise ConfigError(f"system.metrics_group: this node has no group {name!r}") from None
