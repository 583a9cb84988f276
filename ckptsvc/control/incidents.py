"""Incidents: what has happened to a job, each with a number, kept up to date until nothing more is to be said of it."""

from __future__ import annotations

from collections.abc import Mapping

from ckptsvc.control.effects import Decision, Record, Restarted
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase, launched_as
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause

Standing = tuple[int, int]
"""(attempt, failures so far) of a launched job."""


class Incidents:
    """All jobs' incidents of one coordinator.

    Args:
        jobs: the coordinator's.
        mark: sets its numbers apart from another coordinator's.
    """

    def __init__(self, jobs: Mapping[str, Job], mark: str = "") -> None:
        self._jobs, self._mark = jobs, mark
        self._numbers: dict[str, tuple[int, int]] = {}  # job -> attempt, incidents in it
        self._fatal: dict[str, pb.Incident] = {}  # job -> why its last attempt that failed did so

    def begin(self, job: str, attempt: int, kind: str) -> pb.Incident:
        """A new incident; nobody has been told of it yet."""
        name = launched_as(job)
        known, number = self._numbers.get(name, (attempt, 0))
        number = number + 1 if known == attempt else 1
        self._numbers[name] = (attempt, number)
        parts = (str(attempt), str(number), self._mark)
        told = [
            j.highest for j in self._jobs.values() if (launched_as(j.name), j.attempt) == (name, attempt) and j.progress
        ]
        return pb.Incident(
            id="-".join(p for p in parts if p), job=name, attempt=attempt, kind=kind, rank=-1, step=max(told, default=0)
        )

    def fatal(self, incident: pb.Incident) -> None:
        """The attempt is being ended because of this: what follows from it is no incident of its own."""
        self._fatal[incident.job] = incident

    def pardon(self, job: str) -> None:
        """The attempt goes on after all."""
        self._fatal.pop(launched_as(job), None)

    def died(self, job: str, attempt: int, rank: int, node: str, detail: str) -> Decision:
        """A rank of a job without a launcher has ended out of order; those that follow it do so because of it."""
        if self._is_known(launched_as(job), attempt):
            return Decision()
        incident = self.begin(job, attempt, "died")
        incident.rank, incident.node, incident.confidence = rank, node, 1.0
        incident.sentence = f"rank {rank} on {node} died" + (f" ({detail})" if detail else "")
        self.fatal(incident)
        return record(incident)

    def failed(self, attempts: Attempts, before: Standing, kind: str, rank: int = -1, node: str = "") -> Decision:
        """If the running attempt of a launched job has failed since `before`: why, and what is done about it."""
        attempt, failures = before
        if len(attempts.incidents) == failures:
            return Decision()
        incident = self._fatal.get(attempts.job)
        if incident is None or incident.attempt != attempt:
            incident = self.begin(attempts.job, attempt, kind)
            incident.sentence, incident.rank, incident.node = attempts.last_failure, rank, node
            incident.confidence = 1.0
            self.fatal(incident)
        if attempts.phase is Phase.ENDED:
            incident.actions.append("the job ends")
            return record(incident)
        incident.actions.append(f"restart {attempts.restarts} of {attempts.max_restarts}")
        return record(incident).add(Decision([Restarted(attempts.job, Cause(incident.kind), incident.sentence)]))

    def about(self, node: str) -> str:
        """The incident that a node was last to blame for, as words: "incident 3-1 of job j"; "": none."""
        found = (incident for incident in self._fatal.values() if incident.node == node)
        return next((f"incident {incident.id} of job {incident.job}" for incident in found), "")

    def forget(self, job: str) -> None:
        """A job is over for good."""
        self._numbers.pop(launched_as(job), None)
        self._fatal.pop(launched_as(job), None)

    def _is_known(self, name: str, attempt: int) -> bool:
        incident = self._fatal.get(name)
        return incident is not None and incident.attempt == attempt


def standing(attempts: Attempts) -> Standing:
    """Where a launched job is, for `Incidents.failed`."""
    return attempts.attempt, len(attempts.incidents)


def record(incident: pb.Incident) -> Decision:
    """Keep the incident as it is now."""
    kept = pb.Incident()
    kept.CopyFrom(incident)
    said = "; ".join((kept.sentence, *kept.actions))
    return Decision([Record(kept)], [f"job {kept.job}: incident {kept.id}: {said}"])
