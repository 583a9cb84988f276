"""What users of a service do with it in tests: ask, register, train."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness.rank import Rank
from harness.runtime import eventually
from harness.users import Node, Person, as_user

from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError, LimitReached, StoreDenied
from ckptsvc.rpc import service
from ckptsvc.rpc.identity import IdentityClient

RANK = Path(__file__).with_name("rank.py")


def ask(node: Node, person: Person, op: str = "agent") -> dict[str, Any]:
    """The service's answer to a user; what it refuses with is raised here."""

    def call() -> dict[str, Any]:
        try:
            return service.ask(node.directory, op)
        except CkptsvcError as error:
            return {"refused": [type(error).__name__, str(error)]}

    answer: dict[str, Any] = as_user(person, call)
    if "refused" in answer:
        name, what = answer["refused"]
        raise {t.__name__: t for t in (AgentUnavailable, ConfigError, LimitReached, StoreDenied)}[name](what)
    return answer


def error_of(person: Person, act: Callable[[], object]) -> str:
    """The name of the system error that a user gets; "" if he gets none."""

    def attempt() -> str:
        try:
            act()
        except OSError as error:
            return type(error).__name__
        return ""

    return str(as_user(person, attempt))


def registration(**changes: Any) -> dict[str, Any]:
    fields = {"op": "register", "job": "job", "attempt": 0, "rank": 0, "world_size": 1, "store": "memory://users"}
    return fields | changes


def train(rank: Rank, store: str, until: int, patient: bool = False, first: str = "") -> dict[str, Any]:
    """Train and save; before that, try another store, and report how it refuses."""
    import torch

    import ckptsvc

    tensor = torch.zeros(1000)
    if first:
        with pytest.raises(CkptsvcError) as refusal:
            ckptsvc.attach({"tensor": tensor}, store=first, every="off")
        rank.report("refused", why=f"{type(refusal.value).__name__}: {refusal.value}")
    run = ckptsvc.attach({"tensor": tensor}, store=store, every="off")
    rank.report("attached", agent=str(run._link.directory))
    while run.steps_done < until or (patient and not (rank.folder / "go-end").exists()):
        tensor += 1
        run.step()
        try:
            run.save(wait=True)
        except CkptsvcError as error:
            if not patient:
                raise
            rank.report("failed", why=str(error))
            time.sleep(0.2)
        else:
            rank.report("saved", step=run.steps_done)
    run.close()
    return {"steps": run.steps_done, "skipped": run.skipped, "sum": float(tensor.sum())}


def write_much(rank: Rank, store: str) -> None:
    """Save 512 KiB, again and again."""
    import torch

    import ckptsvc

    with ckptsvc.attach({"tensor": torch.zeros(128 << 10)}, store=store, every="off") as run:
        while not (rank.folder / "go-end").exists():
            run.step()
            run.save(wait=True)
            rank.report("saved", step=run.steps_done)


def save_too_much(rank: Rank, store: str) -> dict[str, Any]:
    """Take a snapshot that is larger than what a user may take, then a smaller one."""
    import torch

    import ckptsvc

    with ckptsvc.attach({"tensor": torch.zeros(8 << 20)}, store=f"{store}-large", every="off") as run:
        run.step()
        with pytest.raises(CkptsvcError) as refusal:
            run.save(wait=True, timeout=3.0)
        run.step()
    with ckptsvc.attach({"tensor": torch.zeros(1000)}, store=f"{store}-small", every="off") as run:
        run.step()
        run.save(wait=True)
    return {"why": str(refusal.value)}


class UsersJob:
    """One rank of a user's that runs a function of this module."""

    def __init__(
        self, node: Node, person: Person, store: Path, until: int, *, patient: bool = False, first: Path | str = "",
        launcher: tuple[str, ...] = (), function: str = "train", name: str = "job",
    ) -> None:  # fmt: skip
        self.folder = node.home(person) / name
        self.folder.mkdir()
        os.chown(self.folder, person.uid, person.gid)
        arguments = [str(store), until, patient, str(first)] if function == "train" else [str(store)]
        spec = {"file": __file__, "function": function, "arguments": arguments, "folder": str(self.folder)}
        self._log = self.folder / "log"
        self.process = node.spawn(person, [sys.executable, *launcher, str(RANK), json.dumps(spec)], self._log)

    def reports(self, event: str) -> list[dict[str, Any]]:
        path = self.folder / "rank-0.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [line for line in lines if line["event"] == event]

    def wait_for_save(self, step: int) -> None:
        def saved() -> bool:
            assert self.process.poll() is None, self._log.read_text()
            return any(line["step"] >= step for line in self.reports("saved"))

        eventually(saved, f"step {step} to be saved", 90)

    def result(self) -> dict[str, Any]:
        assert self.process.wait(90) == 0, self._log.read_text()
        found: dict[str, Any] = self.reports("result")[-1]["result"]
        return found


def register(node: Node, person: Person, job: str = "job") -> str:
    """Register a rank with one's own agent, and leave."""
    identity = IdentityClient(str(node.agent_directory(person) / "identity.sock"))
    answer, fd = identity.call(registration(job=job))
    os.close(fd)
    identity.close()
    return "ok" if answer["ok"] else str(answer)


def rank_of(node: Node, person: Person) -> subprocess.Popen[str]:
    """A process that is registered with its user's agent for as long as it lives."""
    code = f"""
import os, sys, time
from ckptsvc.rpc.identity import IdentityClient
identity = IdentityClient({str(node.agent_directory(person) / "identity.sock")!r})
answer, fd = identity.call({registration()!r})
time.sleep(60)
"""
    return node.spawn(person, [sys.executable, "-c", code])
