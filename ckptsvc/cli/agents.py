"""Asking the agents of this node: the user's own, and those that belong to one job or stand in for another node."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from ckptsvc.config import agents_directory, load
from ckptsvc.errors import AgentUnavailable, CkptsvcError
from ckptsvc.rpc.dial import is_alive, sockets

ASK_TIMEOUT = 5.0
"""Seconds an agent has for its answer; it needs a thousandth of that."""

_OWN = ("job-*", "node-*")


class Answer(NamedTuple):
    """What an agent says: its status document (see agent/status.py), or the error instead of one."""

    directory: Path
    status: dict[str, Any] | None
    error: CkptsvcError | None = None


def agent_directory() -> Path:
    """Where the sockets of this user's agent are, by the settings; those of its private agents lie below.

    Raises:
        ConfigError: a setting is wrong, or the directory is not private.
    """
    return agents_directory(load(os.environ), os.environ)


def ask_all(directory: Path) -> list[Answer]:
    """The answers of all agents that serve this directory or one below it."""
    answers = []
    for each in _alive(directory):
        try:
            answers.append(Answer(each, ask(each)))
        except CkptsvcError as error:
            answers.append(Answer(each, None, error))
    return answers


def ask(directory: Path) -> dict[str, Any]:
    """The status document of one agent.

    Raises:
        AgentUnavailable: it does not answer, or not with such a document.
    """
    import grpc

    from ckptsvc.rpc.channel import OPTIONS, error_of
    from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc

    with grpc.insecure_channel(f"unix:{sockets(directory)[0]}", options=OPTIONS) as channel:
        try:
            response = agent_pb2_grpc.AgentServiceStub(channel).GetStatus(
                agent_pb2.GetStatusRequest(), timeout=ASK_TIMEOUT
            )
        except grpc.RpcError as failure:
            raise error_of(failure) from None
    try:
        return msgspec.json.decode(response.json, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise AgentUnavailable(f"the agent in {directory} answers with nonsense: {error}") from None


def _alive(directory: Path) -> Iterator[Path]:
    for each in [directory, *(path for pattern in _OWN for path in sorted(directory.glob(pattern)))]:
        if is_alive(each):
            yield each
