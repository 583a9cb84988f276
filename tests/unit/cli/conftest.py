"""A demo that never ran: logs as the training program writes them, and the facts made of them."""

import json
import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from ckptsvc.cli.demonstration import facts as demo_facts
from ckptsvc.cli.demonstration.facts import Facts, Incident, Run, Save

STEPS, EVERY, KILLED_AT, RESUMED_FROM = 12, 3, 8, 6


def loss_at(step: int) -> float:
    return 2.5 + 3.0 * math.exp(-step / 3)


def start(rank: int, attempt: int = 1, steps_done: int = 0, source: str | None = None) -> dict:
    who = {"rank": rank, "attempt": attempt, "pid": 100 * attempt + rank}
    return {"event": "start", "time": 1000.0 * attempt, "steps_done": steps_done, "source": source} | who


def step(number: int, attempt: int = 1, loss: float | None = None) -> dict:
    loss = loss_at(number) if loss is None else loss
    took = {"seconds": 0.2, "checkpoint_seconds": 0.004 if number % EVERY == 0 else 1e-6}
    return {
        "event": "step", "step": number, "loss": loss, "loss_hex": loss.hex(), "attempt": attempt, "rank": 0,
        "time": 1000.0 * attempt + number / 5,
    } | took  # fmt: skip


def state(number: int, attempt: int = 1) -> dict:
    facts = {"step": number, "digest": f"{number:032x}", "attempt": attempt, "rank": 0}
    return {"event": "state", "time": 1000.0 * attempt + number / 5} | facts


def log_of(*events: dict) -> list[str]:
    return [json.dumps(event) + "\n" for event in events]


def control_log() -> list[str]:
    numbers = range(1, STEPS + 1)
    return log_of(start(0), *map(step, numbers), *(state(n) for n in numbers if n % EVERY == 0))


def run_log(**changed: float) -> list[str]:
    """The interrupted run; `again_7=2.0` makes that the loss of step 7 in the second attempt."""
    first = [step(n, 1, changed.get(f"first_{n}")) for n in range(1, KILLED_AT + 1)]
    again = [step(n, 2, changed.get(f"again_{n}")) for n in range(RESUMED_FROM + 1, STEPS + 1)]
    back = [start(rank, 2, RESUMED_FROM, "memory") for rank in range(4)]
    return log_of(*map(start, range(4)), *first, *back, state(RESUMED_FROM, 2), *again, state(STEPS, 2))


def branch_log(apart: float = 1e-7, begin: int = 3, end: int = 9) -> list[str]:
    steps = [step(n, 1, loss_at(n) * (1 + apart)) for n in range(begin + 1, end + 1)]
    return log_of(start(0, 1, begin, "store"), state(begin), *steps)


def make_facts(run: list[str] | None = None, apart: tuple[float, float] = (1e-7, 0.0)) -> Facts:
    control = Run.from_log(control_log(), "control", "FSDP2, 4 ranks", "control")
    interrupted = Run.from_log(run or run_log(), "the run", "FSDP2, 4 ranks", "run")
    branches = [
        Run.from_log(branch_log(far), "resumed", layout, "branch")
        for far, layout in zip(apart, ("FSDP2, 3 ranks", "FSDP2 x TP, 2 x 2 ranks"), strict=True)
    ]
    incident = Incident(3, 103, "node-1", KILLED_AT, 1001.0, 1001.05, 1003.25, RESUMED_FROM, "memory")
    saves = tuple(Save(n, 1 + n // 9, 39_700_000, 4, 0.004, 0.25) for n in range(3, 13, 3))
    checks = [demo_facts.check_comeback(incident, interrupted), *demo_facts.check_run(interrupted, control, STEPS)]
    for branch in branches:
        checks += demo_facts.check_branch(branch, control, 3, 9)
    checks += demo_facts.check_saves(saves, range(3, 13, 3), ())
    machine = {"machine": "2 cores <fast & loud>"}
    phases = (("the control", 9.5), ("the run", 130.0))
    due = tuple(range(3, 13, 3))
    return Facts(
        (control, interrupted, *branches), (incident,), saves, tuple(checks), machine, phases, due, 1_790_000_000.0
    )


@pytest.fixture
def demo_logs() -> SimpleNamespace:
    return SimpleNamespace(run=run_log, branch=branch_log, control=control_log, loss_at=loss_at)


@pytest.fixture
def demo_facts_of() -> Callable[..., Facts]:
    return make_facts
