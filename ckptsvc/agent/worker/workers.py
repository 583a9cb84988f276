"""The I/O workers of an agent, one for each job, started when needed."""

from __future__ import annotations

from collections.abc import Callable

from ckptsvc.agent.worker.proxy import WorkerProxy
from ckptsvc.agent.worker.settings import told
from ckptsvc.settings import Settings


class Workers:
    """Worker processes by job.

    Args:
        settings: of the agent.
        on_retry: see `WorkerProxy`.

    Attributes:
        max_write_rate: bytes per second that all of them may write; None: no limit.
    """

    def __init__(
        self, settings: Settings | None = None, on_retry: Callable[[str, str], None] = lambda scheme, code: None
    ) -> None:
        self._on_retry = on_retry
        self._by_job: dict[str, WorkerProxy] = {}
        self._told: dict[str, str] = {}
        self.max_write_rate: int | None = None
        self.use(settings or Settings())

    def use(self, settings: Settings) -> None:
        """The settings for workers that start from now on: what has become of the files since is not for them."""
        self.max_write_rate = settings.store.max_write_rate
        self._told |= told(settings)

    @property
    def write_rate(self) -> float | None:
        """What a worker may write in a second: an even share of what the node may."""
        return self.max_write_rate and self.max_write_rate / max(1, len(self._by_job))

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
