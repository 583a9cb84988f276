"""Logs -> facts -> checks: each check passes on a run that is right and fails on one that is not."""

import math
from collections.abc import Callable

import pytest

from ckptsvc.cli.demonstration import facts as demo_facts
from ckptsvc.cli.demonstration.facts import TOLERANCE, Facts, Incident, Run, Save

Make = Callable[..., Facts]


def failed(facts: Facts) -> list[str]:
    return [check.claim for check in facts.checks if not check.passed]


def test_a_demo_without_fault_passes_every_check(demo_facts_of: Make) -> None:
    facts = demo_facts_of()
    assert failed(facts) == []
    assert facts.passed
    assert len(facts.checks) == 10


def test_a_log_is_read_whole_but_for_an_unfinished_line(demo_logs) -> None:
    lines = demo_logs.run()
    run = Run.from_log([*lines, '{"event": "st'], "the run", "FSDP2", "run")
    assert {number: len(steps) for number, steps in run.attempts.items()} == {1: 8, 2: 6}
    assert run.losses == {n: demo_logs.loss_at(n) for n in range(1, 13)}
    assert [s.source for s in run.starts if s.attempt == 2] == ["memory"] * 4
    assert run.state(6) == f"{6:032x}"
    assert run.state(7) is None


@pytest.mark.parametrize("where", ["first_2", "first_8", "again_7", "again_12"])
def test_one_bit_in_one_loss_fails(demo_facts_of: Make, demo_logs, where: str) -> None:
    number = int(where.partition("_")[2])
    changed = math.nextafter(demo_logs.loss_at(number), math.inf)
    facts = demo_facts_of(demo_logs.run(**{where: changed}))
    assert failed(facts) == ["The loss of the run equals the control's, bit for bit"]
    assert f"step {number}" in next(check.detail for check in facts.checks if not check.passed)


def test_a_loss_that_is_no_number_fails(demo_facts_of: Make, demo_logs) -> None:
    facts = demo_facts_of(demo_logs.run(again_9=math.nan))
    assert failed(facts) == ["The loss of the run equals the control's, bit for bit"]


def test_a_step_that_was_never_done_fails(demo_facts_of: Make, demo_logs) -> None:
    lines = [line for line in demo_logs.run() if '"step": 11' not in line]
    assert "step 11" in next(c.detail for c in demo_facts_of(lines).checks if not c.passed)


def test_a_state_that_differs_fails_even_where_losses_agree(demo_facts_of: Make, demo_logs) -> None:
    right, wrong = f"{6:032x}", f"{5:032x}"
    lines = [line.replace(right, wrong) for line in demo_logs.run()]
    assert [claim for claim in failed(demo_facts_of(lines)) if "after resuming at step 6" in claim]


def test_a_state_that_was_not_logged_fails(demo_facts_of: Make, demo_logs) -> None:
    lines = [line for line in demo_logs.run() if '"state"' not in line]
    assert len(failed(demo_facts_of(lines))) == 2


@pytest.mark.parametrize(("apart", "passes"), [(0.0, True), (TOLERANCE * 0.9, True), (TOLERANCE * 1.1, False)])
def test_branches_agree_within_the_tolerance(demo_facts_of: Make, apart: float, passes: bool) -> None:
    assert demo_facts_of(apart=(1e-7, apart)).passed is passes


def test_a_branch_that_is_no_number_or_stopped_early_fails(demo_facts_of: Make, demo_logs) -> None:
    control = demo_facts_of().runs[0]
    for lines in (demo_logs.branch(math.nan), demo_logs.branch(end=8), []):
        branch = Run.from_log(lines, "resumed", "FSDP2, 3 ranks", "branch")
        assert not demo_facts.check_branch(branch, control, 3, 9)[1].passed


@pytest.mark.parametrize(
    "change",
    [{"stepping": None}, {"resumed_from": None}, {"resumed_from": 0}, {"source": "store"}, {"source": ""}],
)
def test_coming_back_means_stepping_again_from_memory(demo_facts_of: Make, change: dict) -> None:
    run = demo_facts_of().runs[1]
    facts = {"known": 1.0, "stepping": 2.0, "resumed_from": 6, "source": "memory"}
    assert demo_facts.check_comeback(Incident(3, 1, "node-1", 8, 0.5, **facts), run).passed
    assert not demo_facts.check_comeback(Incident(3, 1, "node-1", 8, 0.5, **facts | change), run).passed


def test_coming_back_at_the_second_try_fails(demo_facts_of: Make, demo_logs) -> None:
    lines = [line.replace('"attempt": 2', '"attempt": 3') for line in demo_logs.run() if '"start"' in line]
    assert "The job came back by itself, from memory" in failed(demo_facts_of(demo_logs.run() + lines))


def test_a_checkpoint_that_is_missing_or_half_fails() -> None:
    saves = [Save(step, 1, 10, 4, 0.1, 0.2) for step in (3, 9)]
    assert [c.passed for c in demo_facts.check_saves(saves, (3, 9), ())] == [True, True]
    assert [c.passed for c in demo_facts.check_saves(saves, (3, 6, 9), ("step-6.e1",))] == [False, False]


def test_times_of_an_incident() -> None:
    incident = Incident(3, 1, "node-1", 8, 100.0, 100.25, 103.0, 6)
    assert (incident.known_after, incident.stepping_after, incident.repeated) == (0.25, 3.0, 2)
    unknown = Incident(3, 1, "node-1", 8, 100.0)
    assert (unknown.known_after, unknown.stepping_after, unknown.repeated) == (None, None, None)


def test_no_check_is_no_pass(demo_facts_of: Make) -> None:
    facts = demo_facts_of()
    assert not Facts((), (), (), (), {}, (), (), facts.finished).passed


def test_small_numbers_for_people() -> None:
    assert [demo_facts.short(n) for n in (1.85e-7, 1e-5, 0.0, 2e-12)] == ["2e-7", "1e-5", "0", "2e-12"]
