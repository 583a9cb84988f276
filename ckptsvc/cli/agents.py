"""Asking the agents of this node: the user's own, and those that belong to one job or stand in for another node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ckptsvc.cli.terminal import printable
from ckptsvc.config import agents_directory, load
from ckptsvc.errors import AgentUnavailable, CkptsvcError
from ckptsvc.rpc import service
from ckptsvc.rpc.dial import is_alive, safe_target, sockets

ASK_TIMEOUT = 5.0
"""Seconds an agent has for its answer; it needs a thousandth of that."""

MOST_AT_ONCE = 32
"""Agents of others that are asked at a time: one that does not answer takes `ASK_TIMEOUT`."""

NONSENSE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
"""What it comes to where another user's agent says what makes no sense."""

_OWN = ("job-*", "node-*")


class Answer(NamedTuple):
    """What an agent says: its status document (see agent/status/document.py), or the error instead of one.

    `user` and `uid` are set where agents of several users are asked; `ended`: the service knows that it does not run.
    """

    directory: Path
    status: dict[str, Any] | None
    error: CkptsvcError | None = None
    user: str = ""
    uid: int = -1
    ended: bool = False


class _OfJob(msgspec.Struct):
    job: str


class _OnDisk(msgspec.Struct):
    snapshots: list[_OfJob]


class _Said(msgspec.Struct):
    """What a status document has at least, so that it can be gone by."""

    node: str
    ranks: list[_OfJob]
    arenas: list[_OfJob]
    saves: list[_OfJob]
    coordinates: list[_OfJob]
    jobs: list[str] = []
    local_disk: _OnDisk | None = None


def agent_directory() -> Path:
    """Where the sockets of this user's agent are, by the settings; those of its private agents lie below.

    Raises:
        ConfigError: a setting is wrong, or the directory is not private.
    """
    settings = load(os.environ)
    own = agents_directory(settings, os.environ)
    given = service.directory_of(Path(settings.system.directory), os.geteuid())
    return given if not settings.agent.socket_dir and not is_alive(own) and is_alive(given) else own


def ask_users() -> list[Answer]:
    """The answers of the agents of all users of this node, as far as this user may ask them (see rpc.service).

    What they say is other people's: nothing in it is more than text.

    Raises:
        AgentUnavailable: this node has no service for many users.
    """
    directory = Path(load(os.environ).system.directory)
    if not service.is_there(directory):
        raise AgentUnavailable(f"no service for all users of this node listens in {directory}",
            hint="`ckptsvc status` shows your own agents; root starts it: `ckptsvc agent --system`")  # fmt: skip
    agents = service.ask(directory, "agents")["agents"]
    with ThreadPoolExecutor(MOST_AT_ONCE) as pool:
        return [answer for answer in pool.map(_ask_user, agents) if answer is not None]


def _ask_user(agent: dict[str, Any]) -> Answer | None:
    where, user, uid = Path(agent["directory"]), agent["user"], agent["uid"]
    if agent["state"] not in ("serves", "away"):
        problem = agent["problem"]
        return Answer(where, None, AgentUnavailable(problem), user, uid, ended=True) if problem else None
    try:
        with safe_target(where, uid) as target:
            document = _cleaned(ask(where, target))
        msgspec.convert(document, _Said)
    except CkptsvcError as error:
        return Answer(where, None, error, user, uid)
    except NONSENSE as error:
        return Answer(where, None, AgentUnavailable(printable(f"it answers with nonsense: {error}")), user, uid)
    return Answer(where, document, None, user, uid)


def _cleaned(value: Any) -> Any:
    """A document without anything that a terminal would obey."""
    if isinstance(value, dict):
        return {printable(str(key)): _cleaned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_cleaned(each) for each in value]
    return printable(value) if isinstance(value, str) else value


def ask_all(directory: Path, uid: int | None = None) -> list[Answer]:
    """The answers of all agents that serve this directory or one below it; `uid`: only of those of that user."""
    answers = []
    for each in _alive(directory):
        try:
            with contextlib.nullcontext("") if uid is None else safe_target(each, uid) as target:
                answers.append(Answer(each, ask(each, target)))
        except CkptsvcError as error:
            answers.append(Answer(each, None, error))
    return answers


def ask(directory: Path, target: str = "") -> dict[str, Any]:
    """The status document of one agent; `target` is where it serves, if that is not to be found by its path.

    Raises:
        AgentUnavailable: it does not answer, or not with such a document.
    """
    import grpc

    from ckptsvc.rpc.channel import LOCAL, OPTIONS, error_of
    from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

    options = LOCAL if target else OPTIONS
    with grpc.insecure_channel(target or f"unix:{sockets(directory)[0]}", options=options) as channel:
        try:
            response = agent_pb2_grpc.AgentServiceStub(channel).GetStatus(
                agent_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None
    try:
        return msgspec.json.decode(response.json, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise AgentUnavailable(f"the agent in {directory} answers with nonsense: {error}") from None


def _alive(directory: Path) -> Iterator[Path]:
    for each in [directory, *(path for pattern in _OWN for path in sorted(directory.glob(pattern)))]:
        if is_alive(each):
            yield each
