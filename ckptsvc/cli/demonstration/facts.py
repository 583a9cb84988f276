"""What `ckptsvc demo` measured, as values, and the checks that decide whether it passed.

Nothing here starts a process or reads a clock: facts are built from the logs of the training program and
from the store, checks from the facts, and `ckptsvc.cli.demonstration.report` makes a page of both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

TOLERANCE = 1e-5
"""Largest relative difference of a loss at another layout.

Measured over 48 steps on 2, 3 and 2 x 2 ranks against 4: 1.1e-6. For comparison, halving the second moments
of one layer shows as 6e-5 in the third step; what is too small to be seen in losses is left to the digest of the state,
which has no tolerance.
"""


Role = Literal["control", "run", "branch"]


@dataclass(frozen=True, slots=True)
class Step:
    """A training step that was done. `at` is Unix time at its end, `blocked` the seconds in `run.step()`."""

    step: int
    loss: float
    at: float
    seconds: float
    blocked: float
    attempt: int


@dataclass(frozen=True, slots=True)
class Start:
    """A rank that is ready to step, after `steps_done` steps; `source`: where it read its state from."""

    attempt: int
    rank: int
    pid: int
    at: float
    steps_done: int
    source: str


@dataclass(frozen=True)
class Run:
    """One training: everything that its ranks logged.

    Attributes:
        label: for people, short: "control", "the run", "resumed".
        layout: for people: "FSDP2, 4 ranks".
        role: `control`, `run` (the one that is interrupted) or `branch` (resumed elsewhere).
        steps: in the order they were done; a step that was repeated is there twice.
        starts: one for each rank of each attempt.
        states: (attempt, step) -> digest of the whole state after that step.
    """

    label: str
    layout: str
    role: Role
    steps: tuple[Step, ...] = ()
    starts: tuple[Start, ...] = ()
    states: Mapping[tuple[int, int], str] = field(default_factory=dict)

    @classmethod
    def from_log(cls, lines: Iterable[str], label: str, layout: str, role: Role) -> Run:
        """Reads the JSON lines of `ckptsvc.cli.demonstration.train`; an unfinished last line is ignored."""
        steps, starts, states = [], [], {}
        for event in _events(lines):
            attempt, at = event["attempt"], event["time"]
            if event["event"] == "start":
                source = event["source"] or ""
                starts.append(Start(attempt, event["rank"], event["pid"], at, event["steps_done"], source))
            elif event["event"] == "step":
                loss, blocked = float.fromhex(event["loss_hex"]), event["checkpoint_seconds"]
                steps.append(Step(event["step"], loss, at, event["seconds"], blocked, attempt))
            elif event["event"] == "state":
                states[attempt, event["step"]] = event["digest"]
        return cls(label, layout, role, tuple(steps), tuple(starts), states)

    @property
    def title(self) -> str:
        """Label and layout."""
        return f"{self.label}: {self.layout}"

    @cached_property
    def attempts(self) -> dict[int, tuple[Step, ...]]:
        """The steps of each attempt, attempts in order."""
        numbers = sorted({step.attempt for step in self.steps} | {start.attempt for start in self.starts})
        return {number: tuple(s for s in self.steps if s.attempt == number) for number in numbers}

    @cached_property
    def losses(self) -> dict[int, float]:
        """Step -> loss, of the last attempt that did it."""
        return {step.step: step.loss for step in self.steps}

    def state(self, step: int) -> str | None:
        """Digest of the state after `step`, of the last attempt that has one."""
        found = [(attempt, digest) for (attempt, at), digest in self.states.items() if at == step]
        return max(found)[1] if found else None


def _events(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)


@dataclass(frozen=True, slots=True)
class Incident:
    """A rank that was killed. Times are Unix times; None where nothing said so.

    Attributes:
        rank: the rank, with its process id `pid`, on node `node`.
        step: the last step that was done when it was killed.
        killed: when the signal was sent.
        known: when the service knew.
        stepping: when the first step after the restart was done.
        resumed_from: steps done of the snapshot that the job went on from.
        source: where that snapshot was read from ("memory", "store"), empty if nothing said so.
    """

    rank: int
    pid: int
    node: str
    step: int
    killed: float
    known: float | None = None
    stepping: float | None = None
    resumed_from: int | None = None
    source: str = ""

    @property
    def known_after(self) -> float | None:
        """Seconds from the kill until the service knew."""
        return None if self.known is None else self.known - self.killed

    @property
    def stepping_after(self) -> float | None:
        """Seconds from the kill until the job had done a step again."""
        return None if self.stepping is None else self.stepping - self.killed

    @property
    def repeated(self) -> int | None:
        """Steps that had to be done twice."""
        return None if self.resumed_from is None else self.step - self.resumed_from


@dataclass(frozen=True, slots=True)
class Save:
    """One checkpoint of the run.

    Attributes:
        step: steps done in it.
        epoch: number of the attempt of the job that wrote it, as the store counts.
        nbytes: size of all its shards.
        shards: how many.
        blocked: seconds the training loop was held up, as the step that saved it saw it.
        durable: seconds from the same moment until the commit record was in the store.
    """

    step: int
    epoch: int
    nbytes: int
    shards: int
    blocked: float | None
    durable: float | None


@dataclass(frozen=True, slots=True)
class Check:
    """One claim, whether it held, and the numbers."""

    claim: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Facts:
    """All that the demo found out.

    Attributes:
        runs: the control first, then the run, then the branches.
        incidents: what was done to the run.
        saves: the checkpoints of the run, by step.
        checks: see `checks`.
        machine: label -> value, for people.
        phases: (what, seconds) of the demo itself.
        due: the steps at which the run had to take a checkpoint.
        finished: Unix time at the end of the demo.
    """

    runs: tuple[Run, ...]
    incidents: tuple[Incident, ...]
    saves: tuple[Save, ...]
    checks: tuple[Check, ...]
    machine: Mapping[str, str]
    phases: tuple[tuple[str, float], ...]
    due: tuple[int, ...]
    finished: float

    @property
    def passed(self) -> bool:
        """Whether every check held (and there was one)."""
        return bool(self.checks) and all(check.passed for check in self.checks)


def deviation(run: Run, control: Run) -> dict[int, float]:
    """Step -> relative difference of the losses, for the steps that both did, infinite where one is NaN."""
    apart = {}
    for step, loss in run.losses.items():
        if step in control.losses:
            expected = control.losses[step]
            far = 0.0 if loss == expected else abs(loss - expected) / max(abs(expected), 1e-300)
            apart[step] = far if math.isfinite(far) else math.inf
    return apart


def check_run(run: Run, control: Run, steps: int) -> list[Check]:
    """The interrupted run against the control at the same layout: equal, bit for bit."""
    wrong = sorted({s.step for s in run.steps if control.losses.get(s.step) != s.loss})
    missing = [step for step in range(1, steps + 1) if step not in run.losses]
    repeats = len(run.steps) - len(run.losses)
    if missing:
        detail = f"{len(missing)} of {steps} steps were never done, the first of them step {missing[0]}"
    elif wrong:
        detail = f"differs at {_count(len(wrong), 'step')}, the first of them step {wrong[0]}"
    else:
        detail = f"all {steps} steps, and {_count(repeats, 'step')} done twice, equal in all 64 bits"
    losses = Check("The loss of the run equals the control's, bit for bit", not missing and not wrong, detail)
    resumed = [start.steps_done for start in run.starts if start.rank == 0 and start.steps_done]
    states = [_check_state(f"after resuming at step {step}", run, control, step) for step in resumed]
    return [losses, *states, _check_state(f"at the end (step {steps})", run, control, steps)]


def check_comeback(incident: Incident, run: Run) -> Check:
    """The job came back without help, at the first try, from the snapshots that the agents still had."""
    claim = "The job came back by itself, from memory"
    if incident.resumed_from is None or incident.stepping is None:
        return Check(claim, False, "it never did a step again")
    restarts = len(run.attempts) - 1
    held = restarts == 1 and incident.source == "memory" and incident.resumed_from > 0
    source = f"read from {incident.source or 'nowhere'}"
    return Check(claim, held, f"went on from step {incident.resumed_from}, {source}; {_count(restarts, 'restart')}")


def check_branch(branch: Run, control: Run, start: int, stop: int) -> list[Check]:
    """A resume at another layout: the state equal bit for bit, the losses after it within `TOLERANCE`."""
    apart = deviation(branch, control)
    missing = [step for step in range(start + 1, stop + 1) if step not in apart]
    worst = max(apart, key=lambda step: apart[step], default=0)
    if missing:
        detail = f"{len(missing)} of {stop - start} steps were never done"
    else:
        detail = f"largest relative difference {short(apart[worst])} (step {worst}), tolerance {short(TOLERANCE)}"
    held = not missing and apart[worst] <= TOLERANCE
    claim = f"{branch.layout}: losses of steps {start + 1} to {stop} agree with the control's"
    return [_check_state(f"of step {start} restored", branch, control, start), Check(claim, held, detail)]


def _check_state(when: str, run: Run, control: Run, step: int) -> Check:
    mine, theirs = run.state(step), control.state(step)
    claim = f"{run.layout}: weights and optimizer state {when} equal the control's, bit for bit"
    if mine is None or theirs is None:
        return Check(claim, False, f"no digest of the {'state' if mine is None else 'control'} at step {step}")
    detail = f"digest {mine[:16]}" if mine == theirs else f"digest {mine[:16]}, the control's is {theirs[:16]}"
    return Check(claim, mine == theirs, detail)


def check_saves(saves: Iterable[Save], due: Iterable[int], unfinished: Iterable[str]) -> list[Check]:
    """Every checkpoint that was due is committed, and nothing that is not committed is left."""
    have, wanted, left = {save.step for save in saves}, tuple(due), tuple(unfinished)
    lost = [step for step in wanted if step not in have]
    detail = f"no checkpoint of step {', '.join(map(str, lost))}" if lost else f"all {len(wanted)} are there"
    half = f"without a commit record: {', '.join(left)}" if left else "every directory has its commit record"
    return [
        Check("Every checkpoint that was due is committed", not lost, detail),
        Check("No half-written checkpoint is left in the store", not left, half),
    ]


def short(number: float) -> str:
    """A small number for people: `2e-7`, and `0` for none."""
    return f"{number:.0e}".replace("e-0", "e-") if number else "0"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
