"""The books of the jobs that a coordinator leads (control.ledger), as metrics."""

from __future__ import annotations

from itertools import pairwise

from ckptsvc.control.effects import Resumed
from ckptsvc.control.ledger import Ledger
from ckptsvc.telemetry import Detection, Metrics, Restart, Share

_PARTS = (Detection.NOTICE, Detection.DECIDE, Restart.STOP, Restart.START, Restart.RESTORE, Restart.FIRST_STEP)
"""What lies between the times of `Resumed`."""


class Books:
    """Publishes what one coordinator has booked."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._published: dict[str, dict[Share, float]] = {}

    def publish(self, ledger: Ledger) -> None:
        """Bring the metrics up to date."""
        for name in self._published.keys() - ledger.accounts.keys():
            self._forget(name)
        for name, account in ledger.accounts.items():
            before = self._published.setdefault(name, {})
            for share, seconds in account.books.seconds.items():
                self._metrics.job_time.labels(name, share).inc(max(seconds - before.get(share, 0.0), 0.0))
                before[share] = seconds
            if account.books.ratio is not None:
                self._metrics.goodput.labels(name).set(account.books.ratio)

    def resumed(self, effect: Resumed) -> None:
        """A restart is over: how long its parts took."""
        for part, (begin, end) in zip(_PARTS, pairwise(effect.times), strict=True):
            histogram = self._metrics.detection if isinstance(part, Detection) else self._metrics.restart
            histogram.labels(part).observe(end - begin)

    def close(self) -> None:
        """Another coordinator leads from now on."""
        for name in list(self._published):
            self._forget(name)

    def _forget(self, job: str) -> None:
        del self._published[job]
        self._metrics.forget_coordinated(job)
