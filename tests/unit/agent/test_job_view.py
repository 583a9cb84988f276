"""What a coordinator tells of its jobs in the status document, from what agents have reported to it."""

import msgspec
import pytest
from harness.pages import coordinated, job_of

from ckptsvc.agent import reports
from ckptsvc.agent.status.job_view import job_view, launch_view
from ckptsvc.control.coordinator import Coordinator
from ckptsvc.control.effects import CommitDone
from ckptsvc.control.restart import Attempts, Phase
from ckptsvc.rpc.bounds import check_report
from ckptsvc.rpc.identity import PAGE_BYTES, Page
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

WALL = 1_000_000.0
"""Unix seconds when the coordinator's clock is at 0."""


@pytest.fixture
def core():
    return Coordinator()


def joined(core, now, attempt=1, ranks=2):
    for rank in range(ranks):
        event = pb.RankJoined(
            job="j", node=f"n{rank}", store="memory://run", attempt=attempt, rank=rank, world_size=ranks, epoch=attempt
        )
        core.handle(f"n{rank}", pb.Report(rank_joined=event), now)


def saved(core, step, now, *, durable=True, epoch=1):
    for rank in range(2):
        staged = pb.Staged(
            job="j",
            node=f"n{rank}",
            epoch=epoch,
            step=step,
            attempt=1,
            rank=rank,
            world_size=2,
            nbytes=100,
            store="memory://run",
        )
        core.handle(f"n{rank}", pb.Report(staged=staged), now)
        if durable:
            event = pb.Durable(job="j", epoch=epoch, step=step, rank=rank, name="s", nbytes=100, extent=4096)
            core.handle(f"n{rank}", pb.Report(durable=event), now + 1)


def seen(core, now):
    """The view, as it is sent."""
    return msgspec.json.decode(msgspec.json.encode(job_view(core, core.jobs["j"], now, WALL + now)))


def test_checkpoints_over_time(core):
    joined(core, 10.0)
    saved(core, 100, 20.0)
    core.jobs["j"].saves.commit_done(CommitDone("j", 1, 100), 23.5)
    saved(core, 200, 40.0, durable=False)
    newest, older = seen(core, 50.0)["checkpoints"]
    assert newest == {
        "epoch": 1, "step": 200, "tiers": ["memory"], "outcome": "running", "reason": "", "bytes": 0,
        "began": WALL + 40, "seconds": 10.0, "ended": None, "ranks": 2, "staged": 2, "durable": 0,
    }  # fmt: skip
    assert older == {
        "epoch": 1, "step": 100, "tiers": ["memory", "store"], "outcome": "committed", "reason": "", "bytes": 200,
        "began": WALL + 20, "seconds": 3.5, "ended": WALL + 23.5,
    }  # fmt: skip


def test_what_retention_has_deleted_and_what_has_failed(core):
    joined(core, 10.0)
    saved(core, 100, 20.0)
    core.jobs["j"].saves.commit_done(CommitDone("j", 1, 100), 22.0)
    core.deleted("j", ["step-000000000100.e00001", "nonsense"])
    core.deleted("unknown", ["step-000000000100.e00001"])
    saved(core, 200, 30.0)
    core.jobs["j"].saves.commit_done(CommitDone("j", 1, 200, "damaged", "the index\n\x1b[2J is gone"), 31.0)
    failed, deleted = seen(core, 50.0)["checkpoints"]
    assert (deleted["outcome"], deleted["tiers"]) == ("deleted", ["memory"])
    assert (failed["outcome"], failed["reason"], failed["tiers"]) == ("failed", "the index is gone", ["memory"])


def test_attempts_and_ranks_that_have_gone(core):
    joined(core, 10.0, attempt=1)
    joined(core, 60.0, attempt=2)
    left = pb.RankLeft(job="j", node="n1", attempt=2, rank=1, died=True)
    core.handle("n1", pb.Report(rank_left=left), 65.0)
    found = seen(core, 70.0)
    assert found["attempts"] == [
        {"attempt": 1, "began": WALL + 10, "ranks": 2}, {"attempt": 2, "began": WALL + 60, "ranks": 2}]  # fmt: skip
    assert found["grid"]["counts"] == {"dead": 1, "starting": 1}
    joined(core, 80.0, attempt=3)
    assert seen(core, 81.0)["grid"]["counts"] == {"starting": 2}


def test_what_agents_report_of_their_ranks(core):
    joined(core, 10.0)
    pages = []
    for step, phase in ((12, b"step"), (9, b"save")):
        page = Page(memoryview(bytearray(PAGE_BYTES)))
        page.put("step", step)
        page.enter(phase.ljust(32, b"\0"), 1)
        pages.append(page)
    core.jobs["j"].ranks[1] = "n0"
    report = reports.progressed("n0", "j", 1, pages)
    assert (report.progressed.lowest, report.progressed.highest) == (9, 12)
    assert (list(report.progressed.behind), list(report.progressed.phases)) == ([0, 3], ["step", "save"])
    core.handle("n0", report, 11.0)
    found = seen(core, 12.0)["grid"]
    assert found["counts"] == {"saving": 1, "training": 1}
    assert found["odd"] == [[1, found["words"].index("saving"), 3]]
    alike = reports.progressed("n0", "j", 1, pages[:1]).progressed
    assert (list(alike.behind), list(alike.phases)) == ([], [])
    assert list(reports.progressed("n0", "j", 1, pages[1:]).progressed.phases) == ["save"]


def test_a_stalled_rank(core):
    joined(core, 10.0)
    stalled = pb.Stalled(job="j", node="n1", attempt=1, rank=1, phase="step", step=5, seconds=9.0, threshold=4.0)
    core.handle("n1", pb.Report(stalled=stalled), 20.0)
    assert seen(core, 21.0)["grid"]["counts"] == {"stalled": 1, "starting": 1}


def test_a_launched_job_before_and_after_its_ranks():
    attempts = Attempts("j", 4, 6, 3)
    before = launch_view(attempts, 10.0, WALL)
    assert (before["phase"], before["nodes"], before["min_nodes"], before["ended"]) == ("gathering", 0, 4, None)
    attempts.phase, attempts.outcome, attempts.ended = Phase.ENDED, (86, "rank 1\x1b[2J failed"), 15.0
    after = launch_view(attempts, 20.0, WALL + 20)
    assert (after["phase"], after["status"], after["reason"], after["ended"]) == (
        "ended",
        86,
        "rank 1 failed",
        WALL + 15,
    )


def test_the_harness_makes_documents_as_agents_do(core):
    joined(core, 10.0)
    assert job_view(core, core.jobs["j"], 11.0, WALL).keys() <= coordinated(job_of(2)).keys()


@pytest.mark.parametrize("word", ["step", "blocked", "waited", "began"])
@pytest.mark.parametrize("lie", [-(1 << 63), -2, (1 << 53) + 1, (1 << 63) - 1])
def test_a_rank_that_lies_on_its_page_does_not_silence_the_others(word, lie):
    pages = [Page(memoryview(bytearray(PAGE_BYTES))) for _ in range(2)]
    pages[0].put("step", 7)
    pages[1].put(word, lie)
    report = reports.progressed("n0", "j", 1, pages)
    check_report(report, "n0")
    assert 7 in (report.progressed.lowest, report.progressed.highest)
