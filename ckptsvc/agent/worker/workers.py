"""The I/O workers of an agent, one for each job, started when needed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

from ckptsvc.agent.worker.proxy import WorkerProxy
from ckptsvc.agent.worker.settings import told
from ckptsvc.settings import Settings


class Workers:
    """Worker processes by job.

    Args:
        settings: of the agent.
        on_retry: see `WorkerProxy`.
    """

    def __init__(
        self, settings: Settings | None = None, on_retry: Callable[[str, str], None] = lambda scheme, code: None
    ) -> None:
        self._on_retry = on_retry
        self._by_job: dict[str, WorkerProxy] = {}
        self._told: dict[str, str] = {}
        self._max_write_rate: int | None = None
        self._writing: Counter[str] = Counter()
        self._telling: set[asyncio.Task[None]] = set()
        self.use(settings or Settings())

    def use(self, settings: Settings) -> None:
        """The settings for workers that start from now on: what has become of the files since is not for them."""
        self.max_write_rate = settings.store.max_write_rate
        self._told |= told(settings)

    @property
    def max_write_rate(self) -> int | None:
        """Bytes per second that all of them may write to stores; None: no limit. A new one holds at once."""
        return self._max_write_rate

    @max_write_rate.setter
    def max_write_rate(self, rate: int | None) -> None:
        changed, self._max_write_rate = rate != self._max_write_rate, rate
        if changed:
            self._tell()

    @property
    def write_rate(self) -> float | None:
        """What the worker of a job that writes may write in a second: an even share."""
        return self.max_write_rate and self.max_write_rate / max(1, len(self._writing))

    async def write(
        self, job: str, op: str, args: dict[str, Any], on_note: Callable[[dict[str, Any]], None] | None = None
    ) -> dict[str, Any]:
        """Have the worker of a job write to a store; see `WorkerProxy.call`.

        Those that write at the same time share the rate, whatever they began with.
        """
        self._writing[job] += 1
        if self._writing[job] == 1:
            self._tell(but=job)
        try:
            return await self.of(job).call(op, args | {"rate": self.write_rate}, on_note)
        finally:
            self._writing[job] -= 1
            if not self._writing[job]:
                del self._writing[job]
                self._tell()

    def _tell(self, but: str = "") -> None:
        """Tell those that write what they may from now on."""
        for job in self._writing:
            worker = self.running(job)
            if worker is not None and job != but:
                task = asyncio.ensure_future(worker.tell("rate", {"rate": self.write_rate}))
                self._telling.add(task)
                task.add_done_callback(self._telling.discard)

    def of(self, job: str) -> WorkerProxy:
        """The worker of a job."""
        if job not in self._by_job:
            worker = self._by_job[job] = WorkerProxy(job, environ=self._told)
            worker.on_retry = self._on_retry
        return self._by_job[job]

    def running(self, job: str) -> WorkerProxy | None:
        """The worker of a job, where its process runs: what only undoes something starts none."""
        worker = self._by_job.get(job)
        return worker if worker is not None and worker.running else None

    def jobs(self) -> list[str]:
        """Jobs that have a worker."""
        return list(self._by_job)

    async def close(self, job: str | None = None) -> None:
        """End the worker of one job, or all."""
        for name in [job] if job else list(self._by_job):
            worker = self._by_job.pop(name, None)
            if worker:
                await worker.close()
