"""An etcd of three members on loopback, whose leader can be killed."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ckptsvc.cli.benchmarks.faults.world import POLL, FaultBenchFailed, free_port

MEMBERS = 3
START_TIMEOUT = 30.0


class EtcdCluster:
    """A context manager.

    Args:
        program: path of etcd.
        folder: for what the members keep.
    """

    def __init__(self, program: str, folder: Path) -> None:
        self._program, self._folder = program, folder
        self._clients = [free_port("127.0.0.1") for _ in range(MEMBERS)]
        self._peers = [free_port("127.0.0.1") for _ in range(MEMBERS)]
        self._members: list[subprocess.Popen[bytes]] = []

    @property
    def url(self) -> str:
        """For agent.coordination."""
        return "etcd://" + ",".join(f"127.0.0.1:{port}" for port in self._clients)

    def __enter__(self) -> Self:
        try:
            for number in range(MEMBERS):
                self._start(number)
            deadline = time.monotonic() + START_TIMEOUT
            while not self._leader():
                if time.monotonic() > deadline:
                    raise FaultBenchFailed(f"{self._program} did not start", hint=f"logs in {self._folder}")
                time.sleep(POLL)
        except BaseException:
            self._kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._kill()

    def kill_leader(self) -> None:
        """SIGKILL for whichever member leads now."""
        leader = self._leader()
        for number, member in enumerate(self._members):
            if self._status(number).get("header", {}).get("member_id") == leader:
                member.kill()
                member.wait()

    def _kill(self) -> None:
        for member in self._members:
            member.kill()
            member.wait()

    def _start(self, number: int) -> None:
        peers = [f"http://127.0.0.1:{port}" for port in self._peers]
        client = f"http://127.0.0.1:{self._clients[number]}"
        options = {
            "name": f"e{number}",
            "data-dir": str(self._folder / f"etcd-{number}"),
            "log-level": "error",
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peers[number],
            "initial-advertise-peer-urls": peers[number],
            "initial-cluster": ",".join(f"e{n}={peer}" for n, peer in enumerate(peers)),
        }
        command = [self._program, *(f"--{name}={value}" for name, value in options.items())]
        with open(self._folder / f"etcd-{number}.log", "wb") as log:
            self._members.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log))

    def _leader(self) -> str:
        """Its member id; "" while there is none."""
        told = (self._status(number).get("leader", "0") for number in range(len(self._members)))
        return next((leader for leader in told if leader != "0"), "")

    def _status(self, number: int) -> dict[str, Any]:
        """What a member says of itself, {} if it does not answer (etcd's JSON gateway, Maintenance.Status)."""
        url = f"http://127.0.0.1:{self._clients[number]}/v3/maintenance/status"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(urllib.request.Request(url, b"{}"), timeout=2) as answer:
                found = json.load(answer)
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}
