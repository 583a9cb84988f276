"""A real agent in a private directory, and what a rank has of it."""

import contextlib
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness.runtime import eventually

from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc.channel import OPTIONS, TOKEN_KEY, error_of
from ckptsvc.rpc.dial import sockets
from ckptsvc.rpc.identity import IdentityClient
from ckptsvc.rpc.v1 import agent_pb2, agent_pb2_grpc


class Rank:
    """A registered rank (this very process)."""

    def __init__(self, agent: "Agent", identity: IdentityClient, token: str) -> None:
        self._agent, self.identity, self.token = agent, identity, token

    def call(self, method: str, request: Any, timeout: float = 10.0) -> Any:
        return self._agent.call(method, request, self.token, timeout)

    def close(self) -> None:
        """End in good order, if there still is somebody to tell."""
        with contextlib.suppress(CkptsvcError):
            self.call("Leave", agent_pb2.LeaveRequest())
        self.identity.close()


@dataclass
class Agent:
    """A running agent; the ranks that are still registered at the end are closed then."""

    process: "subprocess.Popen[bytes]"
    directory: Path
    channel: grpc.Channel
    ranks: list[Rank] = field(default_factory=list)

    @property
    def identity_path(self) -> str:
        return sockets(self.directory)[1]

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def call(self, method: str, request: Any, token: str | None = None, timeout: float = 10.0) -> Any:
        """One call; what the agent refuses with is raised."""
        stub = agent_pb2_grpc.AgentServiceStub(self.channel)
        metadata = () if token is None else ((TOKEN_KEY, token),)
        try:
            return getattr(stub, method)(request, timeout=timeout, metadata=metadata)
        except grpc.RpcError as failure:
            raise error_of(failure) from None

    def register(self, **changes: Any) -> Rank:
        identity = IdentityClient(self.identity_path)
        try:
            answer, fd = identity.call(registration(**changes))
        except CkptsvcError:
            identity.close()
            raise
        os.close(fd)
        rank = Rank(self, identity, answer["token"])
        self.ranks.append(rank)
        return rank

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


def registration(**changes: Any) -> dict[str, Any]:
    """What a rank says when it registers."""
    fields = {"op": "register", "job": "job", "attempt": 0, "rank": 0, "world_size": 1, "store": "memory://agent-tests"}
    return {**fields, **changes}


@pytest.fixture
def start(runtime):
    """Starts agents; they are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def begin(name: str = "a", *arguments: str, linger: str = "60s") -> Agent:
            directory = runtime.sockets / name
            directory.mkdir(mode=0o700, exist_ok=True)
            command = [sys.executable, "-m", "ckptsvc.agent.server", "--dir", str(directory), "--linger", linger]
            with open(directory / "agent.log", "ab") as log:
                process = subprocess.Popen([*command, *arguments], env=runtime.environ, stdout=log, stderr=log)
            stack.callback(process.wait, 10)
            stack.callback(process.terminate)
            ready = directory / "ready"

            def serves() -> bool:
                return ready.exists() and ready.read_text().startswith(f"{process.pid}\n")

            eventually(lambda: process.poll() is not None or serves(), "the agent to serve")
            assert process.poll() is None, (directory / "agent.log").read_text()
            channel = stack.enter_context(grpc.insecure_channel(f"unix:{sockets(directory)[0]}", options=OPTIONS))
            agent = Agent(process, directory, channel)
            stack.callback(agent.close)
            return agent

        yield begin


@pytest.fixture
def agent(start):
    """One agent."""
    return start()
