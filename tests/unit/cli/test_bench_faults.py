"""What `ckptsvc bench faults` makes of what a job and its agents have written down."""

import io
import json
from dataclasses import replace

import pytest

from ckptsvc.cli.benchmarks.faults import command as bench_faults
from ckptsvc.cli.benchmarks.faults.command import command
from ckptsvc.cli.benchmarks.faults.job import FAULTS
from ckptsvc.cli.benchmarks.faults.kinds import KINDS, Bars, Blame, Kind
from ckptsvc.cli.benchmarks.faults.outcome import ENOUGH, Outcome, Row, Scene, judge
from ckptsvc.cli.benchmarks.faults.table import show
from ckptsvc.cli.benchmarks.faults.world import VICTIM, Sighting
from ckptsvc.cli.terminal import Screen
from ckptsvc.errors import ConfigError
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

AT = 100.0
BY_NAME = {kind.name: kind for kind in KINDS}


def steps(first, last, began, pid=1, attempt=1, every=0.1, committed=None):
    for number, step in enumerate(range(first, last + 1)):
        yield {"event": "step", "monotonic": began + number * every, "rank": 0, "pid": pid, "attempt": attempt,
            "step": step, "committed": committed, "skipped": 0}  # fmt: skip


def again(done, began, pid=2, attempt=2, source="memory", committed=100, count=ENOUGH):
    about = {"rank": 0, "pid": pid, "attempt": attempt}
    yield {"event": "begun", "monotonic": began + 0.1, "born": began, **about}
    yield {"event": "start", "monotonic": began + 0.5, "steps_done": done, "source": source, **about}
    yield from steps(done + 1, done + count, began + 1.0, pid, attempt, committed=committed)


def sighting(at, rank=VICTIM, node=f"n{VICTIM}"):
    return {"i.json": Sighting(at, pb.Incident(rank=rank, node=node, sentence="it was that one"))}


BEFORE = list(steps(1, 50, 90.0, committed=40))
KILLED = Kind("k", "rank: SIGKILL", lambda world: AT)
GOES_ON = replace(KILLED, restart=False, blame=Blame.NOBODY)


def outcome(kind, events, sightings=None, said=None, now=130.0):
    return judge(kind, Scene(AT, now, [*BEFORE, *events], sightings or {}, said))


class TestRestart:
    def test_all_times_are_from_the_fault_on(self):
        found = outcome(KILLED, again(48, 101.0), sighting(100.25))
        assert found == Outcome(0.25, True, 1.0, 2.0, 2, "memory", "it was that one", "")

    def test_steps_that_were_done_after_the_fault_are_lost_too(self):
        assert outcome(KILLED, [*steps(51, 53, 100.1), *again(48, 101.0)], sighting(100.25)).lost == 5

    @pytest.mark.parametrize("wrong", [{"rank": VICTIM + 1}, {"node": "n0"}, {"rank": -1}])
    def test_who_names_another_is_wrong(self, wrong):
        found = outcome(KILLED, again(48, 101.0), sighting(100.25, **wrong))
        assert (found.named, found.problem) == (False, "the wrong one was named")

    def test_of_a_host_the_node_is_enough(self):
        kind = replace(KILLED, blame=Blame.NODE)
        assert outcome(kind, again(48, 101.0), sighting(100.25, rank=-1)).problem == ""

    def test_nothing_seen_no_steps_and_nothing_committed_are_problems(self):
        assert outcome(KILLED, again(48, 101.0)).problem == "not seen"
        assert outcome(KILLED, again(48, 101.0), sighting(99.0)).problem == "not seen"  # of something before
        assert outcome(KILLED, [], sighting(100.25)).problem == "no steps"
        assert outcome(KILLED, again(48, 101.0, count=ENOUGH - 1), sighting(100.25)).problem == "no steps"
        stale = outcome(KILLED, again(48, 101.0, committed=50), sighting(100.25))
        assert stale.problem == "nothing was committed since"

    def test_a_restart_is_known_by_its_processes_for_torchrun_does_not_count_all(self):
        kind = replace(KILLED, blame=Blame.NOBODY, commits=False)
        assert outcome(kind, again(48, 101.0, attempt=1)).step == 2.0


class TestGoingOn:
    def test_the_longest_pause_counts(self):
        found = outcome(GOES_ON, steps(51, 60, 103.0, every=3.0, committed=60), now=131.0)
        assert (found.step, found.problem, found.named) == (3.0, "", True)
        assert outcome(GOES_ON, steps(51, 60, 101.0, committed=60), now=131.0).step == pytest.approx(29.1)

    def test_a_restart_is_a_false_kill(self):
        assert outcome(GOES_ON, again(48, 101.0)).problem == "a healthy job was restarted"

    def test_so_is_blame_for_a_rank_but_not_for_a_node(self):
        events = list(steps(51, 90, 100.1, committed=60))
        assert outcome(GOES_ON, events, sighting(103.0)).problem == "a rank was blamed"
        assert outcome(GOES_ON, events, sighting(103.0, rank=-1)).problem == ""

    def test_what_should_have_been_said_is_waited_for(self):
        kind, events = replace(GOES_ON, says="a word"), list(steps(51, 90, 100.1, committed=60))
        assert outcome(kind, events).problem == "not seen"
        assert outcome(kind, events, said=102.5).seen == 2.5


class TestRows:
    def test_bars_are_met_by_every_run_or_not_at_all(self):
        kind = replace(KILLED, bars=Bars(seen=1.0, process=1.0, step=3.0))
        good = Outcome(seen=0.5, named=True, process=1.4, step=2.9, lost=0)
        assert Row(kind, "", (good, good)).met() is True
        for worse in ({"seen": 1.1}, {"process": 1.6}, {"step": 3.1}, {"step": None}, {"problem": "no steps"}):
            assert Row(kind, "", (good, replace(good, **worse))).met() is False
        assert Row(KILLED, "", (good,)).met() is None
        assert Row(kind, "needs root").met() is None

    def test_the_table_shows_medians_and_what_went_wrong(self):
        good = Outcome(0.02, True, 0.06, 0.41, 0, "memory", "rank 1 died")
        bad = Outcome(problem="no steps", sentence="it\x1b[31m is\nred")
        rows = [Row(BY_NAME["rank-killed"], "", (good, bad), (Outcome(process=4.0, step=12.0), bad)),
            Row(BY_NAME["link-cut"], "needs root")]  # fmt: skip
        out = io.StringIO()
        show(Screen(out), {"load": "1"}, rows, separate=False, confirm="10s")
        lines = [" ".join(line.split()) for line in out.getvalue().splitlines()]
        assert "rank: SIGKILL 0.02 1 of 2 0.06 0.41 0 memory 1 of 2 seen 1, process + 1 not met" in lines
        assert "rank: SIGKILL 0.06 0.41 1 of 2 4.0 12.0 1 of 2 no steps" in lines
        assert "not run: host: link cut: needs root" in lines
        assert "\x1b" not in out.getvalue()

    def test_the_document_is_json(self):
        row = Row(BY_NAME["slow"], "", (Outcome(problem="not seen"),))
        assert json.loads(json.dumps(row.document()))["runs"][0]["problem"] == "not seen"


def test_kinds_are_well_formed():
    assert len(BY_NAME) == len(KINDS) == len({kind.what for kind in KINDS})
    assert all(kind.restart for kind in KINDS if kind.peer)
    assert len(FAULTS) == 10


def test_a_kind_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="--kinds nonsense is not known"):
        command.main(["--kinds", "rank-killed,nonsense"], standalone_mode=False)
    with pytest.raises(ConfigError):
        command.main(["--confirm", "soon"], standalone_mode=False)
    assert [kind.name for kind in bench_faults._wanted("slow,missed,slow")] == ["slow", "missed"]
