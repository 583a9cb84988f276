"""What happens to jobs, as their books (control.goodput) see it; and the course of each restart, part by part."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, islice

from ckptsvc.control.effects import Decision, Resumed
from ckptsvc.control.goodput import Goodput
from ckptsvc.control.health import Case
from ckptsvc.control.membership import Job
from ckptsvc.control.restart import Attempts, Phase
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

TURNS = frozenset({"rank_exited", "node_joined", "node_ready", "node_left"})
"""Reports after which a job may be doing something else, and soon a third thing; what others tell is seen at a tick."""

LOOKED_AT = 64
"""Agents that are away, of which one may be the sign of a lost node."""

Sign = tuple[float, float]
"""When something went wrong as far as that can be told, and when there was a sign of it."""


@dataclass(slots=True)
class Course:
    """A restart under way: what ended the attempt, and when it had come how far."""

    attempt: int
    why: str
    fault: float
    known: float
    decided: float
    started: float | None = None
    joined: float | None = None
    restored: float | None = None


@dataclass(slots=True)
class Account:
    """One job.

    Attributes:
        books: where its time goes.
        joined_at: of the attempt that is known.
        left_at: when a rank of it has last ended; 0: none has.
        died: a rank of it has not ended in good order.
        sign: that something is wrong with it.
        course: of its restart.
    """

    books: Goodput
    joined_at: float | None = None
    left_at: float = 0.0
    died: bool = False
    sign: Sign | None = None
    course: Course | None = None


@dataclass(slots=True)
class Ledger:
    """All jobs of one coordinator."""

    accounts: dict[str, Account] = field(default_factory=dict)

    def look(self, job: Job, attempts: Attempts | None, case: Case | None, now: float) -> None:
        """See what has become of a job.

        Args:
            job: the job.
            attempts: its launcher's view of it, if it has one.
            case: ranks that stand still.
            now: the time.
        """
        account = self.accounts.get(job.name)
        if account is None:
            if not job.ranks:
                return  # nothing but what it has left
            account = self.accounts[job.name] = Account(Goodput(job.joined_at))
        if attempts is not None:
            self._launched(account, job, attempts, case, now)
        if job.ranks and account.joined_at != job.joined_at:
            account.joined_at, account.died = job.joined_at, False
            account.books.begin(job.attempt, job.joined_at)
        if case is not None and case.stalled:
            account.books.stall(now)
        else:
            account.books.move(now)
        if attempts is None and not job.ranks and account.joined_at is not None:
            account.joined_at = None
            if account.died:
                account.books.leave(account.left_at or now)
            else:
                account.books.end(account.left_at or now)
        account.books.tick(now)

    def _launched(self, account: Account, job: Job, attempts: Attempts, case: Case | None, now: float) -> None:
        course, attempt = account.course, attempts.attempt
        if attempts.phase is Phase.ENDED:
            account.books.end(now)
            account.course = None
        elif attempts.phase is Phase.STOPPING and (course is None or course.attempt < attempt):
            decided = min(attempts.since, now)
            fault, known = account.sign or (decided, decided)
            account.course = Course(attempt, attempts.last_failure, fault, known, decided)
            account.books.fail(fault, decided)
        elif attempts.phase is Phase.RUNNING:
            account.sign = _sign(job, attempts, case)
            if course is not None and course.attempt < attempt:
                course.started = course.started or attempts.began
                if course.joined is None and job.attempt == attempt and len(job.ranks) == job.world_size:
                    course.joined = now

    def left(self, event: pb.RankLeft, now: float) -> None:
        """A rank has ended."""
        account = self.accounts.get(event.job)
        if account is not None:
            account.left_at = now
            if event.died:
                account.died, account.sign = True, account.sign or (now, now)

    def progressed(self, job: Job, event: pb.Progressed, now: float) -> Decision:
        """How far a job is."""
        account = self.accounts.get(job.name)
        if account is None or event.attempt != job.attempt:
            return Decision()
        began = event.began if event.HasField("began") else None
        first = account.books.progress(event.attempt, event.highest, began, event.blocked, now)
        course = account.course
        if course is None or course.attempt >= event.attempt:
            return Decision()
        if account.books.began is not None and course.restored is None:
            course.restored = now
        if not first:
            return Decision()
        account.course = None
        times = (course.fault, course.known, course.decided, course.started, course.joined, course.restored, now)
        told = tuple(accumulate((course.fault if at is None else at for at in times), max))
        return Decision([Resumed(job.name, event.attempt, course.why, told)])

    def forget(self, job: str) -> None:
        """A job is over for good."""
        self.accounts.pop(job, None)


def _sign(job: Job, attempts: Attempts, case: Case | None) -> Sign | None:
    """The first sign that something is wrong; found without looking at each of 100,000 ranks, whenever one says so."""
    signs = [(since, since) for since, _ in islice(attempts.suspects.values(), 1)]
    for name, since in islice(job.away.items(), LOOKED_AT):
        node = attempts.nodes.get(name)
        if node is not None and node.away_since is not None:
            signs.append((since, since))
            break
    if case is not None:
        signs += [(case.opened - event.seconds, case.opened) for event in islice(case.stalled.values(), 1)]
    return min(signs, key=lambda sign: sign[1], default=None)
