from ckptsvc.agent.watching.evidence import BRIEF_FRAMES, shorten
from ckptsvc.control.blame import waits
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

FRAMES = [f"forward_{n} (model.py:{n})" for n in range(30)]
LONG = {"other_stacks": "thread loader\n  get (queue.py:171)", "log_tail": "step 7", "native_stack": "poll"}


def test_of_a_rank_that_waits_for_others_only_the_innermost_frames_are_told():
    found = pb.RankEvidence(rank=1, state="S", stack="\n".join([*FRAMES, "all_reduce (distributed.py:9)"]), **LONG)
    shorten(found)
    assert found.stack.split("\n") == [*FRAMES[1 - BRIEF_FRAMES :], "all_reduce (distributed.py:9)"]
    assert [found.other_stacks, found.log_tail, found.native_stack] == ["", "", ""]
    assert found.notes == ["it waits for others: shortened"]
    assert waits(found)


def test_of_any_other_everything_is():
    found = pb.RankEvidence(rank=1, state="R", cpu=1.0, stack="\n".join(FRAMES), **LONG)
    before = found.SerializeToString()
    shorten(found)
    assert found.SerializeToString() == before
