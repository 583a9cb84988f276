"""What must hold at every moment of a simulation, and what must have come about at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from machine import GROW, JOB

from ckptsvc.control.effects import Audit, Commit, Effect, Restarted, Send
from ckptsvc.control.goodput import Mode
from ckptsvc.control.restart import Phase
from ckptsvc.pipeline.arena import State
from ckptsvc.rpc.v1 import agent_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause, Share

if TYPE_CHECKING:
    from machine import Machine, Rank
    from simulation import Store, World

COMMITTED = agent_pb2.OUTCOME_COMMITTED

WAITS = 10.0
"""Seconds longer than was agreed on that a node may wait for a place that there is."""

LATE = 3.0
"""Seconds between the last look at a rank and its end. That it has come back shows at its next step only."""

NEWS = 15.0
"""Seconds after which nodes that run have been heard of, or are out of reach, and the ranks beside them are stopped."""

REWRITE = 30.0
"""Seconds in which an agent that was away has certainly written and reported again what it holds."""

Save = tuple[str, int, int]  # job, epoch, step


class Violation(AssertionError):
    """Something that must not be; `explain` adds how it came about."""

    def explain(self, world: World) -> None:
        schedule = world.schedule
        lines = [
            f"{self.args[0]}, at {world.now:.2f} s",
            f"Schedule.draw({schedule.seed}), perhaps with fewer faults",
            f"{schedule.nodes} nodes, of which {schedule.least} to {schedule.most} are used",
            f"the last of them comes {schedule.late:.1f} s after the others",
            f"{schedule.nproc} ranks on each, {schedule.steps} steps",
            f"they keep for each other: {schedule.partner}",
            f"a save every {schedule.every_steps} steps and every {schedule.every_seconds:g} s (0: never)",
            "faults:",
            *map(str, schedule.faults),
            "orders:",
            *map(str, schedule.orders),
            "what happened last:",
            *list(world.trace)[-60:],
        ]
        self.args = ("\n".join(lines),)


def require(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


class Checks:
    """Watches a world."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._durable: set[tuple[str, int, int, int]] = set()  # reported to this coordinator
        self._outcomes: dict[Save, agent_pb2.SaveOutcome] = {}  # decided by this coordinator
        self._denied: set[Save] = set()  # some agent was told that this save has failed for good
        self._waits_since: float | None = None  # a node, for a place in a job that has too few
        self._grown = 0
        self._automatic: dict[tuple[int, int, int], bool] = {}  # epoch, attempt and step -> whether it was saved
        self._books: dict[
            str, tuple[dict[Share, float], float | None]
        ] = {}  # what this coordinator has booked, since when
        self._unaware_until = 0.0  # nodes new to the job were started by a coordinator that had heard of no others

    def new_coordinator(self) -> None:
        """It has heard and said nothing yet."""
        self._durable, self._outcomes, self._waits_since, self._books = set(), {}, None, {}

    def reported(self, report: pb.Report) -> None:
        """The coordinator hears something."""
        if report.WhichOneof("event") == "durable":
            event = report.durable
            self._durable.add((event.job, event.epoch, event.step, event.rank))

    def decided(self, effect: Effect) -> None:
        """The coordinator wants something."""
        if isinstance(effect, Restarted) and effect.cause is Cause.GROWN:
            self._grown += 1
            most = len(self._world.machines) + len(self._world.schedule.faults)
            require(self._grown <= most, f"the job is started anew for the {self._grown}. time to grow")
        if isinstance(effect, Audit):
            self._carried_out(effect)
        if isinstance(effect, Send) and effect.order.WhichOneof("effect") == "start":
            self._starting()
        if isinstance(effect, Commit):
            ranks = [shard.rank for shard in effect.shards]
            require(ranks == list(range(effect.world_size)), f"a commit of the shards of ranks {ranks}")
            for rank in ranks:
                key = (effect.job, effect.epoch, effect.step, rank)
                require(key in self._durable, f"a commit though no durable shard was reported for {key}")
        elif isinstance(effect, Send) and effect.order.WhichOneof("effect") == "save_ended":
            outcome = effect.order.save_ended.outcome
            save = (effect.order.job, outcome.epoch, outcome.step)
            first = self._outcomes.get(save)
            require(first in (None, outcome), f"{save} ended twice: {first} and {outcome}")
            if first is None and "have not written" in outcome.reason:
                self._somebody_is_away_or_has_not_written(save)
            self._outcomes[save] = outcome

    def _carried_out(self, effect: Audit) -> None:
        """An order of a person is said to be done."""
        asked, outcome = effect.asked, effect.outcome
        if outcome.code:
            return
        if asked.verb == pb.VERB_CHECKPOINT:
            steps = {step for _, step in self._world.store.commits}
            require(outcome.step in steps, f"a checkpoint of step {outcome.step} was ordered, and is not committed")
        if asked.verb == pb.VERB_DRAIN:
            attempts = self._world.brain.core.launched.get(JOB)
            going = attempts is not None and attempts.phase is Phase.RUNNING and asked.target in attempts.hosts
            require(not going, f"{asked.target} is said to be drained, and the job runs there")

    def automatic(self, machine: Machine, rank: Rank, step: int, *, taken: bool) -> None:
        """A rank has, or has not, taken a snapshot that is due by its interval."""
        now, session = self._world.now, machine.line.session
        if (
            session is None
            or machine.line.excused
            or now - session.began < NEWS
            or now - machine.agent_stopped_until < NEWS
        ):
            return  # it may not have heard of an order
        first = self._automatic.setdefault((rank.epoch, rank.attempt, step), taken)  # a later job has another epoch
        require(first == taken, f"of attempt {rank.attempt}, some ranks save step {step}, and some do not")
        pauses = self._world.brain.core.pauses
        known, held = pauses.known.get(JOB), pauses.holding.get(JOB)
        if self._world.brain.alive and known and known.paused and held and held.version == known.version:
            bad = taken and held.attempt == rank.attempt and held.step <= step
            require(not bad, f"step {step} is saved, and the job is paused from step {held.step} on")

    def _starting(self) -> None:
        attempts = self._world.brain.core.launched[JOB]
        runs = any(rank.alive for machine in self._world.machines.values() for rank in machine.ranks.values())
        if runs and attempts.attempt == 1 and not attempts.inherited:  # nobody told it that there was another before
            self._unaware_until = self._world.now + NEWS

    def _somebody_is_away_or_has_not_written(self, save: Save) -> None:
        """A save has timed out: what is in the store must not have waited for a report that never came."""
        job = self._world.brain.core.jobs[save[0]]
        ranks = range(job.world_size)
        sessions = [machine.line.session for machine in self._world.machines.values()]
        if all(session and self._world.now - session.began > REWRITE for session in sessions):
            written = all((*save[1:], rank) in self._world.store.shards for rank in ranks)
            require(not written, f"{save} failed though every shard is durable and every agent is there")

    def told(self, job: str, outcome: agent_pb2.SaveOutcome) -> None:
        """An agent hears how a save has ended."""
        save = (job, outcome.epoch, outcome.step)
        committed = (outcome.epoch, outcome.step) in self._world.store.commits
        if outcome.outcome == COMMITTED:
            require(committed, f"{save} is said to be committed, and is not")
        elif outcome.code != "store-unavailable":  # then nobody can know
            require(not committed, f"{save} is said to have failed ({outcome.reason}), and is committed")
            self._denied.add(save)

    def committing(self, effect: Commit, store: Store) -> None:
        """A commit record is being written."""
        save = (effect.job, effect.epoch, effect.step)
        require(save not in self._denied, f"{save} is committed after an agent was told that it has failed")
        for rank in range(effect.world_size):
            require((effect.epoch, effect.step, rank) in store.shards, f"{save} is committed without rank {rank}")

    def killing(self, rank: Rank) -> None:
        """An agent obeys the order to kill a rank."""
        hung = rank.hangs or (rank.hung == "elsewhere" and self._world.now - rank.went_on_at < LATE)
        require(hung, f"rank {rank.number} of attempt {rank.attempt} is killed, and does not hang")
        for_long = self._world.now - rank.stepped_at > self._world.brain.core.policy.confirm
        require(rank.hangs == "T" or for_long, f"rank {rank.number} is killed, and may be at work")

    def always(self) -> None:
        """After every event."""
        self._one_job_in_the_run()
        self._one_attempt_runs()
        self._nobody_waits_for_a_free_place()
        self._the_books_add_up()
        if self._world.in_flight == 0:
            self._memory_is_there()

    def _the_books_add_up(self) -> None:
        for name, account in self._world.brain.core.ledger.accounts.items():
            books = account.books
            before, begun = self._books.get(name, (dict.fromkeys(Share, 0.0), None))
            require(all(books.seconds[share] >= before[share] for share in Share), f"time of {name} was taken back")
            if name != JOB or books.mode is Mode.ENDED:  # until it begins again, if it does
                begun = None
            else:
                begun = books.since - books.total if begun is None else begun
                require(abs(books.since - books.total - begun) < 1e-6, f"time of {name} is not booked, or twice")
            require(books.since <= self._world.now + 1e-6, f"time of {name} is booked that has not been yet")
            self._books[name] = dict(books.seconds), begun

    def _one_job_in_the_run(self) -> None:
        writers = [job.name for job in self._world.brain.core.jobs.values() if job.ranks]
        require(len(writers) <= 1, f"jobs {writers} write to one run")

    def _one_attempt_runs(self) -> None:
        # A node that is out of reach runs on. What keeps it from doing harm are epochs.
        if self._world.now < self._unaware_until:
            return
        machines = [m for m in self._world.machines.values() if not m.line.excused]
        alive = [rank for machine in machines for rank in machine.ranks.values() if rank.alive]
        running, numbers = {rank.attempt for rank in alive}, sorted(rank.number for rank in alive)
        require(len(running) <= 1, f"attempts {sorted(running)} run at the same time")
        require(
            len(set(numbers)) == len(numbers), f"attempt {sum(running)} runs twice at the same time, as ranks {numbers}"
        )

    def _nobody_waits_for_a_free_place(self) -> None:
        brain, now = self._world.brain, self._world.now
        attempts = brain.core.launched.get(JOB) if brain.alive else None
        waiting = attempts.waiting(now) if attempts is not None else []
        if not waiting:
            self._waits_since = None
        elif self._waits_since is None:
            self._waits_since = now
        else:
            require(now - self._waits_since < GROW + WAITS, f"nodes {waiting} wait, and the job has too few")

    def _memory_is_there(self) -> None:
        """Nothing is under way and no connection is broken without the coordinator's knowing: its list is right."""
        brain, machines = self._world.brain, self._world.machines.values()
        if not brain.alive or any(brain.peers.get(m.name) is not m.line.session for m in machines):
            return
        held = {
            (a.label.job, a.label.epoch, a.label.step, a.label.rank)
            for m in machines
            if m.agent_alive
            for a in m.local.pool.arenas.values()
            if a.label is not None
        }
        for job in brain.core.jobs:
            for snapshot in brain.core.snapshots(job):
                for rank in range(snapshot.world_size):
                    key = (job, snapshot.epoch, snapshot.step, rank)
                    require(key in held, f"the snapshot of rank {rank} in {key} is listed and nowhere in memory")
        self._parity_is_there()

    def _parity_is_there(self) -> None:
        """What counts as rebuildable can be rebuilt."""
        core, machines = self._world.brain.core, self._world.machines
        for name, known in core.redundancy.jobs.items():
            for key in known.guards:
                if key not in core.jobs[name].saves.complete or not core.redundancy.is_rebuildable(
                    core.jobs[name], key
                ):
                    continue
                missing = set(range(core.jobs[name].saves.complete[key])) - core.jobs[name].saves.held[key].keys()
                for guard in known.guards[key]:
                    group = guard.members
                    left = [n for n, ranks in group.items() if machines[n].has(name, key, ranks, group)]
                    if len(group) - len(left) <= guard.losses:
                        missing.difference_update(*group.values())
                require(not missing, f"{key} counts as rebuildable without {missing}")

    def finished(self) -> bool:
        """Whether all has come to an end."""
        return not self._unfinished()

    def give_up(self) -> None:
        """It should have by now."""
        raise Violation("waits for ever: " + "; ".join(self._unfinished()))

    def _unfinished(self) -> list[str]:
        world = self._world
        left = [
            f"the save of step {save.step} in epoch {save.epoch} is open, without {save.missing or 'commit'}"
            for job in world.brain.core.jobs.values()
            for save in job.saves.open.values()
        ]
        left += [f"an order: {work.waits_for}" for _, work, _ in world.brain.core.verbs.working.values()]
        for machine in world.machines.values():
            if machine.launcher_waits:
                left.append(f"the launcher of {machine.name} waits")
            if machine.agent_alive:
                left += [
                    f"{arena.label} on {machine.name} is neither saved nor given up"
                    for arena in machine.local.pool.arenas.values()
                    if arena.state is State.STAGED
                ]
        return left
