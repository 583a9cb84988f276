"""The system service of a node (`ckptsvc agent --system`): what users, their agents and operators say to it.

It listens on DIR/service.sock (SOCK_SEQPACKET; DIR is system.directory, which root owns). One packet is one message in
JSON. Both ends know each other by SO_PEERCRED: nobody says who he is, nobody but root answers.

    agent     {op}         -> {ok, directory}      the caller's own agent, which is started if it is not there
    agents    {op}         -> {ok, agents: [{uid, user, directory, pid, state, ranks, since, problem}]}
                           an operator hears of all users' agents, anybody else of his own
    serve     {op}         -> {ok, memory, write_rate, jobs, ranks, local, scrape}
                           from an agent which the service has started; the connection stays open:
        state     {op, ranks, busy, page}         the agent, when that changes
        shares    {op, memory, write_rate, jobs, ranks, local}     the service, when that changes
        wanted    {op}                            the service, when somebody asks for the agent

A refusal is {ok: false, code, what, hint}, as on the identity socket of an agent. Sizes are in bytes, rates in bytes
per second (0: no limit), `since` in Unix seconds. `state` is "starts", "serves", "away" (it lives and is not
connected), "ended" or "failed". `page` is where the agent serves HTTP, `scrape` the token that opens its metrics.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from typing import Any

from ckptsvc.errors import AgentUnavailable
from ckptsvc.rpc.identity import IdentityClient

SOCKET = "service.sock"
USERS = "users"

MAX_REQUEST = 4096
"""Bytes of a message to the service."""

PATIENCE = 45.0
"""Seconds a caller waits: the service gives an agent that it starts START_TIMEOUT, and then says so."""


RESTART_PATIENCE = 5.0
"""Seconds that a service whose socket is there may take until it answers: it has been started anew, or is gone."""


def directory_of(directory: Path, uid: int) -> Path:
    """The directory of a user's agent, where the service's is `directory`."""
    return directory / USERS / str(uid)


def is_there(directory: Path) -> bool:
    """Whether root has put a service's socket there, in a directory where nobody else could have."""
    try:
        above, socket = os.lstat(directory), os.lstat(directory / SOCKET)
    except OSError:
        return False
    private = stat.S_ISDIR(above.st_mode) and above.st_uid == 0 and not above.st_mode & 0o022
    return private and stat.S_ISSOCK(socket.st_mode) and socket.st_uid == 0


def service_of(agent: Path) -> Path | None:
    """The directory of the service that starts the agent of this directory; None where somebody else does."""
    above = agent.parent
    return above.parent if above.name == USERS and is_there(above.parent) else None


def ask(directory: Path, op: str) -> dict[str, Any]:
    """Ask the service for something.

    Raises:
        AgentUnavailable: it does not answer.
        CkptsvcError: what it refused with.
    """
    client = _connected(directory)
    try:
        if client.owner != 0:
            raise AgentUnavailable(f"the process that listens in {directory} belongs to user {client.owner}, not root")
        return client.call({"op": op})[0]
    finally:
        client.close()


def _connected(directory: Path) -> IdentityClient:
    """A connection; a service that is being started anew is waited for."""
    deadline = time.monotonic() + RESTART_PATIENCE
    while True:
        try:
            return IdentityClient(str(directory / SOCKET), PATIENCE)
        except AgentUnavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)


def own_agent(directory: Path) -> Path:
    """The directory of this user's agent, which serves now.

    Raises:
        AgentUnavailable: the service does not answer, or the agent does not start.
        CkptsvcError: the user may not have one.
    """
    found = Path(str(ask(directory, "agent")["directory"]))
    if found != directory_of(directory, os.geteuid()):
        raise AgentUnavailable(f"the service in {directory} names {found}, which is not this user's")
    return found
