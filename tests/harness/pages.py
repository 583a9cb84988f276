"""The status page in front of a browser: documents of agents in all states, a server that shows them, Chromium."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from ckptsvc.agent.http.page import Site
from ckptsvc.agent.status.grid import grid
from ckptsvc.agent.status.recent import Recent
from ckptsvc.control.membership import Job
from ckptsvc.control.save import Saves
from ckptsvc.quantities import Address
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync"]  # fmt: skip
TOKEN = "0123456789abcdef0123456789abcdef"
GOODPUT = {"share": 0.934, "seconds": {"useful": 30260.0, "blocked": 210.0, "detection": 62.0, "restart": 340.0,
    "redone": 1200.0, "other": 330.0}}  # fmt: skip


def job_of(ranks: int, per_node: int = 8, step: int = 12_430, name: str = "llama-8b") -> Job:
    """A job whose ranks train, some of them a step behind."""
    job = Job(
        name, "lustre:///scratch/ana/llama-8b", Saves(name, 1800.0), attempt=2, world_size=ranks, epoch=3, highest=step
    )
    for rank in range(ranks):
        job.ranks[rank], job.seen[rank] = f"nid{1 + rank // per_node:06d}", 1.0
    for number in range(-(-ranks // per_node)):
        late = 1 if number % 5 == 3 else 0
        job.doing[f"nid{1 + number:06d}"] = pb.Progressed(lowest=step - late, highest=step - late)
    return job


def coordinated(job: Job, stalled: tuple[int, ...] = (), **changes: Any) -> dict[str, Any]:
    """What an agent says of a job that it coordinates."""
    now = time.time()
    checkpoints = [
        {"epoch": 3 if i < 9 else 2, "step": job.highest - 30 - 100 * i,
            "tiers": ["memory", "store"] if i < 2 else ["store"], "outcome": "committed",
            "reason": "", "bytes": 96 << 30, "began": now - 40 - 600 * i,
            "seconds": 21.4 + 5 * ((7 * i) % 5) / 4, "ended": now - 18 - 600 * i}
        for i in range(24)
    ]  # fmt: skip
    checkpoints[6] |= {"outcome": "failed", "reason": "rank 17: no space left on device", "bytes": 0, "tiers": []}
    checkpoints[20] |= {"outcome": "deleted", "tiers": []}
    return {
        "job": job.name, "attempt": 2, "epoch": 3, "world_size": job.world_size,
        "live_ranks": len(job.ranks), "nodes": job.nodes,
        "running_saves": [], "in_memory": [], "on_disk": [], "restarts": 1, "incidents": [], "aside": {}, "nics": [],
        "store": job.store, "step": job.highest, "steps_per_second": 0.17, "every_seconds": 600.0, "phase": "running",
        "attempts": [{"attempt": 1, "began": now - 33000, "ranks": job.world_size},
            {"attempt": 2, "began": now - 5680, "ranks": job.world_size}],
        "grid": grid(job, stalled), "checkpoints": checkpoints, "drains": [], "goodput": GOODPUT,
    } | changes  # fmt: skip


def incident(ago: float = 5700.0, **changes: Any) -> dict[str, Any]:
    """One that is kept."""
    opened = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - ago))
    return {
        "id": "3f2a1c-1-1-9b2e", "job": "llama-8b", "attempt": 1, "kind": "hung", "opened": opened,
        "sentence": "rank 17 on nid000003 hung: its process is stopped, and 63 others wait for it in all_reduce",
        "rank": 17, "node": "nid000003", "confidence": 0.95,
        "actions": ["SIGKILL to rank 17 on nid000003", "restart 1 of 3"],
    } | changes  # fmt: skip


def document(*jobs: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What an agent says."""
    return {
        "status_version": 1, "time": time.time(), "version": "0.1.0", "node": "nid000001", "pid": 4242,
        "started": time.time() - 86400, "address": "127.0.0.1:40001", "metrics": "127.0.0.1:9464", "page": "",
        "ranks": [], "arena_limit": 512 << 30,
        "arenas": [{"job": "llama-8b", "rank": rank, "state": "kept", "step": 12_400, "bytes": 12 << 30,
            "for_others": False}
            for rank in range(8 if jobs else 0)],
        "max_write_rate": None, "local_disk": None, "saves": [], "coordinates": list(jobs), "launches": [],
        "incidents": [], "elections": [], "nics": [],
    } | changes  # fmt: skip


class Shown:
    """A real server that shows whatever document it is given.

    Attributes:
        document: the one that is shown.
        address: the beginning of its URLs.
    """

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.loop = asyncio.new_event_loop()
        self.site = Site(
            lambda: self.document | {"time": time.time()}, CollectorRegistry(), Recent(), TOKEN, lambda: None
        )
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        self.address = self.call(self._open)[1]

    def call(self, function: Callable[[], Any]) -> Any:
        """Call an asynchronous function in the server's thread."""
        return asyncio.run_coroutine_threadsafe(function(), self.loop).result(30)

    async def _open(self) -> tuple[str, str]:
        return self.site.open(Address("127.0.0.1", 0))

    def close(self) -> None:
        """Hang up."""
        self.call(self.site.close)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()


@contextlib.contextmanager
def shown(document: dict[str, Any]) -> Iterator[Shown]:
    """A server for the block."""
    server = Shown(document)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A browser of playwright's for the block."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
