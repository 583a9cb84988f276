import random
from collections import Counter

import pytest
from scenes import (
    COMPUTING,
    EVALUATING,
    FAULTS,
    LOADING,
    OF_NODES,
    TRAINING,
    WAITING,
    Stage,
    draw,
    in_collective,
    stage_of,
)

from ckptsvc.control.blame import Kind, Scene, blame, functions, waits
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

SURE = {"stopped", "zombie"}
"""Faults for which a rank is killed at once."""


def is_right(stage, verdict):
    if verdict.rank >= 0:
        return verdict.rank == stage.culprit
    return verdict.node == stage.node


def test_the_culprit_is_named():
    """In evidence with gaps, as it is in life. What no evidence is left of cannot be seen."""
    right, wrong = Counter(), Counter()
    for fault in FAULTS:
        rng = random.Random(f"blame {fault}")
        for _ in range(300):
            stage = draw(fault, rng)
            verdict = blame(stage.scene())
            right[fault] += is_right(stage, verdict)
            wrong[fault] += verdict.rank >= 0 and not is_right(stage, verdict)
            assert verdict.broken == (fault in SURE)
    assert len(FAULTS) >= 8
    assert right.total() >= 0.98 * 300 * len(FAULTS), right
    assert min(right.values()) >= 0.85 * 300, right
    assert wrong.total() <= 0.01 * 300 * len(FAULTS), wrong


@pytest.mark.parametrize("fault", sorted(set(FAULTS) - set(OF_NODES) - {"mismatched collective", "mismatched size"}))
def test_two_independent_kinds_of_evidence_speak_against_it(fault):
    """In full evidence; a process that is stopped or gone needs no second one beside its own lack of progress."""
    rng = random.Random(f"kinds {fault}")
    for _ in range(100):
        stage = stage_of(fault, rng)
        verdict = blame(stage.scene())
        assert verdict.broken or len(verdict.kinds) >= 2
        assert verdict.overdue
        assert verdict.confidence >= 0.8
        assert verdict.sentence.startswith(f"rank {stage.culprit} on {stage.node} hung: ")


@pytest.fixture
def stage():
    return Stage(random.Random(3))


class TestNobody:
    def test_all_wait_in_the_same_collective(self, stage):
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.node, verdict.confidence) == (-1, "", 0.0)
        assert (
            f"all of {stage.world} ranks wait in all_reduce of [1048576] float32 in group default" in verdict.sentence
        )
        assert "perhaps the network" in verdict.sentence

    def test_all_compute(self, stage):
        for evidence in stage.ranks.values():
            in_collective(evidence, stage.number, "")
            evidence.state, evidence.cpu, evidence.stack = "R", 1.0, COMPUTING
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.kinds) == (-1, frozenset())
        assert "nothing sets one" in verdict.sentence

    def test_nothing_is_known(self):
        assert blame(Scene({0: "a", 1: "b"}, {})).rank == -1
        assert blame(Scene({}, {})).rank == -1
        empty = {r: pb.RankEvidence(rank=r, enqueued=-1, completed=-1) for r in (0, 1)}
        assert blame(Scene({0: "a", 1: "b"}, empty)).rank == -1

    def test_a_suspended_job(self, stage):
        """Ctrl-Z at the terminal, or the scheduler makes room for another job."""
        for evidence in stage.ranks.values():
            evidence.state = "T"
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.broken) == (-1, False)
        assert "somebody has suspended the job" in verdict.sentence

    def test_a_job_of_one_rank_that_was_suspended(self):
        evidence = pb.RankEvidence(rank=0, state="T", stalled=9, threshold=4, enqueued=-1, completed=-1)
        assert blame(Scene({0: "a"}, {0: evidence})).rank == -1

    def test_a_job_of_one_rank_that_computes(self):
        evidence = pb.RankEvidence(rank=0, state="R", cpu=1, stalled=9, threshold=4, stack=COMPUTING, answers=True)
        assert blame(Scene({0: "a"}, {0: evidence})).rank == -1


class TestInnocence:
    def test_a_rank_within_the_time_of_its_phase_is_named_and_not_accused(self, stage):
        stage.not_there(phase="evaluation", stack=EVALUATING, stalled=12.0, threshold=600.0, cpu=1.0, state="R")
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.overdue) == (stage.culprit, False)
        assert "is what the others wait for, still within its time" in verdict.sentence
        assert "no progress for 12.0 s in phase evaluation, where 600.0 s are allowed" in verdict.sentence

    def test_a_process_under_a_debugger_is_not_broken(self, stage):
        stage.change(state="t")
        assert not blame(stage.scene()).broken

    def test_of_two_that_disagree_neither_is_sure(self):
        rng = random.Random(5)
        stage = Stage(rng)
        while stage.world != 2:
            stage = Stage(rng)
        in_collective(stage.ranks[1], stage.number, "barrier in group default (gloo)")
        verdict = blame(stage.scene())
        assert verdict.kinds == frozenset()
        assert verdict.confidence == 0.25
        assert "(or one of ranks 1)" in verdict.sentence

    def test_one_signal_of_many_ranks_names_none_for_sure(self, stage):
        for rank in range(stage.world // 2):
            in_collective(stage.ranks[rank], stage.number - 1, "")
        assert blame(stage.scene()).kinds == frozenset()

    def test_a_silent_agent_does_not_make_its_ranks_guilty(self, stage):
        stage.silent.add("n0")
        for rank in [r for r, node in stage.nodes.items() if node == "n0"]:
            del stage.ranks[rank]
        verdict = blame(stage.scene())
        assert not verdict.overdue
        assert verdict.node == "n0"
        assert "node n0 does not answer" in verdict.signals


class TestSignals:
    def test_a_stopped_rank_is_told_from_one_that_waits(self, stage):
        stage.change(state="T", answers=False)
        verdict = blame(stage.scene())
        assert verdict.kinds == {Kind.PROCESS}
        assert verdict.signals[0] == "its process is stopped (state T)"
        assert verdict.confidence == 0.95

    def test_the_lowest_sequence_number(self, stage):
        stage.unseen("stack", "answers")
        stage.not_there()
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.kinds) == (stage.culprit, {Kind.COLLECTIVE})
        assert f"it has not started collective {stage.number}, all_reduce of" in verdict.sentence

    def test_who_holds_up_those_that_hold_up_others(self, stage):
        """The lowest is the cause, those between wait for it."""
        one, other = 0, 1
        stage.unseen("stack", "answers")
        for rank, number in ((one, stage.number - 2), (other, stage.number - 1)):
            in_collective(stage.ranks[rank], number, "")
        assert blame(stage.scene()).rank == one

    def test_an_operation_of_another_kind(self):
        stage = draw("mismatched collective", random.Random(11))
        verdict = blame(stage.scene())
        assert "it is in all_gather of [1048576] float32" in verdict.sentence
        assert "under the same number" in verdict.sentence

    def test_steps_that_were_not_done(self, stage):
        stage.unseen("stack", "answers", "collective")
        stage.change(step=stage.step - 1, state="R", cpu=1.0)
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.kinds) == (stage.culprit, {Kind.STEPS, Kind.WORK})
        assert f"it has done {stage.step - 1} steps" in verdict.sentence

    def test_a_stack_of_its_own_where_none_is_known_to_wait(self, stage):
        stage.unseen("collective")
        for evidence in stage.ranks.values():
            evidence.stack, evidence.cpu = COMPUTING, 1.0
        stage.change(stack=LOADING)
        verdict = blame(stage.scene())
        assert (verdict.rank, verdict.kinds) == (stage.culprit, {Kind.STACK})

    def test_one_that_was_not_asked_is_not_accused_of_not_answering(self, stage):
        stage.change(asked=False, answers=False)
        assert blame(stage.scene()).rank == -1

    def test_where_no_rank_was_asked_none_is_accused_of_not_answering(self, stage):
        stage.unseen("answers")
        assert blame(stage.scene()).rank == -1


class TestReading:
    def test_functions_of_a_stack(self):
        assert functions(WAITING) == ("main", "train_step", "all_reduce")
        assert functions(WAITING.replace("3252", "9")) == functions(WAITING)
        assert functions("  <module> (a.py:1)\n    A.f (b.py:2)") == ("<module>", "f")
        assert functions("f.<locals>.<lambda> (a.py:1)\nA.B._c (a.py:2)") == ("<lambda>", "_c")
        assert functions("... 7 outer frames\nf (a.py:1)") == ("...", "f")
        assert functions("") == functions("\n\n") == ()

    @pytest.mark.parametrize(
        ("stack", "cpu", "expected"),
        [
            (WAITING, 1.0, True),
            (COMPUTING, 0.0, False),
            (LOADING, 0.0, False),
            (TRAINING + "backward (torch/_tensor.py:1)\n_engine_run_backward (torch/autograd/graph.py:9)", 0.0, True),
            (TRAINING + "backward (torch/_tensor.py:1)\n_engine_run_backward (torch/autograd/graph.py:9)", 1.0, False),
        ],
    )
    def test_whether_a_stack_waits_for_others(self, stack, cpu, expected):
        assert waits(pb.RankEvidence(state="S", cpu=cpu, stack=stack, enqueued=-1, completed=-1)) is expected

    def test_without_stack_and_recorder_one_that_sleeps_waits(self):
        assert waits(pb.RankEvidence(state="S", enqueued=-1, completed=-1))
        assert not waits(pb.RankEvidence(state="R", cpu=1, enqueued=-1, completed=-1))
        stopped = pb.RankEvidence(state="T")
        in_collective(stopped, 5, "barrier")
        assert not waits(stopped)


@pytest.mark.parametrize("seed", range(100))
def test_any_evidence_gives_a_verdict_that_names_a_rank_of_the_job(seed):
    rng = random.Random(seed)
    text = ["", "x", "\n", "all_reduce", WAITING, "(((", "a\x00b", "😀 of"]
    ranks = {
        r: pb.RankEvidence(
            rank=r,
            step=rng.choice([-1, 0, 5, 1 << 62]),
            stalled=rng.choice([0, 5, float("nan"), float("inf"), -1]),
            threshold=rng.choice([0, 4, float("nan")]),
            state=rng.choice(["", "R", "S", "D", "T", "t", "Z", "X", "??"]),
            cpu=rng.choice([0, 1, -1, float("nan")]),
            answers=rng.random() < 0.5,
            enqueued=rng.choice([-1, 0, 7, 8]),
            completed=rng.choice([-1, 0, 7, 8, 9]),
            collective=rng.choice(text),
            stack=rng.choice(text),
            groups=[
                pb.GroupProgress(group=g, enqueued=rng.choice([-1, 0, 7]), completed=7, collective=rng.choice(text))
                for g in "ab"[: rng.randrange(3)]
            ],
        )
        for r in range(rng.randint(0, 5))
    }
    nodes = {r: f"n{r % 2}" for r in range(5)}
    verdict = blame(Scene(nodes, ranks, {"n1", "n9"} if rng.random() < 0.3 else (), {"n0": ["bad"], "n7": ["worse"]}))
    assert verdict.rank in {-1, *nodes}
    assert verdict.sentence
    assert 0 <= verdict.confidence <= 1


def test_a_rank_that_was_not_seen_is_not_said_to_hang(stage):
    """All that is known is that its node does not answer; that it is the only one there says nothing."""
    nodes = {rank: f"n{rank}" for rank in stage.nodes}
    del stage.ranks[0]
    verdict = blame(Scene(nodes, stage.ranks, {"n0"}))
    assert (verdict.rank, verdict.node) == (-1, "n0")
    assert verdict.sentence.startswith("node n0 hung: node n0 does not answer")


@pytest.mark.parametrize(
    ("frame", "shown"),
    [
        ("step (/home/me/project/src/train.py:7)", "step (src/train.py:7)"),
        ("step (train.py:7)", "step (train.py:7)"),
        ("all_reduce (torch/distributed/distributed_c10d.py:9)", "all_reduce (distributed/distributed_c10d.py:9)"),
        ("<lambda> (/a b/c (d)/e.py:1)", "<lambda> (/a b/c (d)/e.py:1)"),
    ],
)
def test_of_a_long_path_the_sentence_has_the_end(stage, frame, shown):
    stage.change(stack=f"main (/home/me/train.py:1)\n{frame}", state="R", cpu=1.0)
    in_collective(stage.ranks[stage.culprit], stage.number - 1, "")
    assert f"it is in {shown}, while" in blame(stage.scene()).sentence
