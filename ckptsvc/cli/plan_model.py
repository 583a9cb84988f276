"""How long a checkpoint takes, how often one is best taken, and what time is then left for the training.

Failures come with a constant rate 1/M (M: the mean time between failures of the whole job). A snapshot holds the
training up for C, then it is written beside it and can be restored from the store after L. A failure costs the steps
since the snapshot that is restored, and D until the job is where that was: noticing, starting anew, reading.

    best interval   Daly's: t = sqrt(2CM) (1 + sqrt(C/2M)/3 + C/18M) - C for C < 2M, else M: J. T. Daly, A higher order
                    estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems
                    22 (2006), 303-312; its first term is J. W. Young's, Communications of the ACM 17 (1974), 530-531
    useful time     t / (M exp(D/M) (exp((t + C)/M) - 1)): the expected time for t seconds of work, ibid., with D + L
                    where the store is read: what is not durable yet when a failure comes is lost, too

Where some failures leave the memory of the nodes as it is (a rank dies, not a node), D is the mean of both kinds.
The next save begins when the last one is durable: no interval is shorter than L.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LONGEST = 700.0
"""Exponents from which on an expected time is called infinite."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is planned for; bytes, bytes a second and seconds.

    Attributes:
        nbytes: of one checkpoint.
        ranks, nodes: of the job.
        copy: bytes a second that one rank copies into memory.
        store: bytes a second that the store takes from all nodes together.
        read: that it gives.
        local: that the disk of one node takes and gives; 0: there is none.
        mtbf: mean time between failures of the job.
        restart: from a failure until the ranks run again, without reading.
        soft: share of the failures that leave the memory of the nodes as it is.
        overlap: share of the copy for which the training waits.
    """

    nbytes: float
    ranks: int
    nodes: int
    copy: float
    store: float
    read: float
    mtbf: float
    restart: float
    soft: float
    local: float = 0.0
    overlap: float = 1.0

    @property
    def copying(self) -> float:
        """Seconds until a snapshot is in memory."""
        return self.nbytes / self.ranks / self.copy

    @property
    def waiting(self) -> float:
        """Seconds that a snapshot holds the training up: C."""
        return self.copying * self.overlap

    @property
    def to_store(self) -> float:
        """Seconds until it is durable: L."""
        return self.copying + self.nbytes / self.store

    @property
    def to_disk(self) -> float:
        """Seconds until it is on the nodes' disks; infinite where they have none."""
        return self.copying + (self.nbytes / self.nodes / self.local if self.local else math.inf)

    @property
    def reading(self) -> float:
        """Seconds to restore from the store."""
        return self.nbytes / self.read + self.copying


@dataclass(frozen=True, slots=True)
class Plan:
    """What comes of one way to keep checkpoints.

    Attributes:
        name: "store", "store + memory" or "disk + memory".
        interval: seconds of training between two snapshots.
        best: what it would be if a save took no time behind the training.
        waiting: share of the time in which the training waits for snapshots.
        lost: seconds that a failure costs on average.
        useful: share of the time that is left for training.
        limited: the interval is as long as a save takes: writing faster would help.
    """

    name: str
    interval: float
    best: float
    waiting: float
    lost: float
    useful: float
    limited: bool


def daly(cost: float, mtbf: float) -> float:
    """The best interval, in seconds of training between two checkpoints.

    Args:
        cost: seconds that one holds the training up.
        mtbf: mean time between failures, in seconds.
    """
    if cost >= 2 * mtbf:
        return mtbf
    part = cost / (2 * mtbf)
    return math.sqrt(2 * cost * mtbf) * (1 + math.sqrt(part) / 3 + part / 9) - cost


def useful_share(interval: float, cost: float, down: float, mtbf: float) -> float:
    """Share of the time in which steps are done that count, between 0 and 1.

    Args:
        interval: seconds of training between two checkpoints.
        cost: seconds that one holds the training up.
        down: seconds that a failure costs besides the steps since the last checkpoint.
        mtbf: mean time between failures, in seconds.
    """
    if (interval + cost) / mtbf > LONGEST or down / mtbf > LONGEST:
        return 0.0
    return interval / (mtbf * math.exp(down / mtbf) * math.expm1((interval + cost) / mtbf))


def plans(job: Job) -> list[Plan]:
    """The ways to keep checkpoints that the job has, the plainest first."""
    from_store = job.restart + job.reading
    from_memory = job.restart + job.copying
    found = [
        _plan("store", job, job.to_store, from_store + job.to_store),
        _plan("store + memory", job, job.to_store, _mean(job.soft, from_memory, from_store + job.to_store)),
    ]
    if job.local:
        # A lost node takes its disk along: what was drained to the store last is restored then.
        drained = max(job.to_store, job.to_disk)
        found.append(
            _plan("disk + memory", job, job.to_disk, _mean(job.soft, from_memory, from_store + drained + job.to_disk))
        )
    return found


def needed(job: Job) -> float:
    """Bytes a second that the store must take so that it does not limit the interval; infinite where none is enough."""
    spare = daly(job.waiting, job.mtbf) - job.copying
    return job.nbytes / spare if spare > 0 else math.inf


def memory(job: Job, slots: int, group: int) -> dict[str, float]:
    """Bytes of memory on each node: for its own snapshots, and what more it takes to keep those of others.

    While a newer one is made, the latter are there twice.

    Args:
        job: what is planned for.
        slots: snapshots of its own that a node holds.
        group: nodes that keep parity for each other.
    """
    one = job.nbytes / job.nodes
    found = {"snapshots": slots * one}
    if job.nodes > 1:
        found["copy"] = one
    if job.nodes >= group:
        found |= {"xor": one / (group - 1), "rs": 2 * one / (group - 2)}
    return found


def _plan(name: str, job: Job, writing: float, down: float) -> Plan:
    best = daly(job.waiting, job.mtbf)
    interval = max(best, writing)
    return Plan(
        name=name,
        interval=interval,
        best=best,
        waiting=job.waiting / (interval + job.waiting),
        lost=interval / 2 + down,
        useful=useful_share(interval, job.waiting, down, job.mtbf),
        limited=writing > best,
    )


def _mean(share: float, of_that: float, otherwise: float) -> float:
    return share * of_that + (1 - share) * otherwise


def doubts(job: Job, found: list[Plan]) -> list[str]:
    """Where the formulas do not hold, or hardly, and what limits the job: sentences for people."""
    said = []
    if job.waiting >= 2 * job.mtbf:
        said.append("a snapshot takes longer than two failures: Daly's formula does not hold, and nothing gets done")
    elif job.waiting > 0.1 * job.mtbf:
        said.append("a snapshot takes more than a tenth of the time between two failures: the estimate is rough")
    if job.to_store > job.mtbf:
        said.append("a save takes longer than the time between two failures: most of them are never completed")
    down = job.restart + job.reading
    if down > 0.5 * job.mtbf:
        said.append("restarting takes more than half of the time between two failures: the estimate is rough")
    if found[0].limited:
        said.append(
            f"the store is the limit: the best interval is {found[0].best:.0f} s, and a save takes {job.to_store:.0f}"
            f" s; {needed(job) / 1e9:,.0f} GB/s would do"
            if math.isfinite(needed(job))
            else "the store is the limit: no store is fast enough for the best interval"
        )
    return said
