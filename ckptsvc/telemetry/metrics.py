"""All metrics of one agent."""

from __future__ import annotations

from ckptsvc.telemetry import jobs, nics, saves
from ckptsvc.telemetry.agents import AgentMetrics
from ckptsvc.telemetry.declaring import Declarations
from ckptsvc.telemetry.jobs import JobMetrics
from ckptsvc.telemetry.nics import NicMetrics
from ckptsvc.telemetry.saves import SaveMetrics
from ckptsvc.telemetry.tiers import TierMetrics


class Metrics(SaveMetrics, TierMetrics, JobMetrics, NicMetrics, AgentMetrics):
    """The metrics of one agent, in a registry of its own (`registry`), at zero until something happens.

    Attributes:
        declared: how each was declared, by subject.
    """

    def __init__(self, version: str) -> None:
        self._declare = declare = Declarations()
        for subject in (SaveMetrics, TierMetrics, JobMetrics, NicMetrics, AgentMetrics):
            subject.__init__(self, declare)
        self.registry, self.declared = declare.registry, declare.all
        self.build.labels(version).set(1)

    def forget(self, job: str) -> None:
        """Drop the series of a job that has left this node, so that an agent's metrics do not grow with every job."""
        self._declare.forget("job", job, saves.JOB)
        self.let_go(job)

    def forget_coordinated(self, job: str) -> None:
        """The same of a job that is not coordinated here any more."""
        self._declare.forget("job", job, jobs.JOB)

    def forget_nic(self, nic: str) -> None:
        """Drop the series of a card that is not on the node any more."""
        self._declare.forget("nic", nic, nics.NIC)
