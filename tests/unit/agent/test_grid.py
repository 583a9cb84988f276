"""The ranks of a job in the status document."""

import msgspec
from harness.pages import job_of

from ckptsvc.agent.status.grid import MAX_ODD, WORDS, grid
from ckptsvc.rpc.v1 import coordinator_pb2 as pb


def told(job, node, **changes):
    job.doing[node] = pb.Progressed(**{"highest": job.highest, "lowest": job.highest} | changes)


def each(found):
    """(word, behind) of every rank, from the columns."""
    ranks = {}
    for spans, word, behind in zip(found["ranks"], found["state"], found["behind"], strict=True):
        for part in spans.split(", "):
            first, _, last = part.partition("-")
            ranks.update(dict.fromkeys(range(int(first), int(last or first) + 1), (found["words"][word], behind)))
    return ranks | {rank: (found["words"][word], behind) for rank, word, behind in found["odd"]}


def test_ranks_that_train():
    job = job_of(16, 4)
    found = grid(job)
    assert found["counts"] == {"training": 16}
    assert (found["nodes"], found["ranks"]) == (job.nodes, ["0-3", "4-7", "8-11", "12-15"])
    assert found["behind"] == [0, 0, 0, 1]
    assert (found["odd"], found["left_out"], found["front"]) == ([], 0, job.highest)


def test_every_state_there_is():
    job = job_of(36, 4)
    names = job.nodes
    told(job, names[0], behind=[0, 0, 7, 0], lowest=job.highest - 7)
    told(job, names[1], phases=["save"])
    told(job, names[2], phases=["restore", "restore", "attach", "evaluation"])
    job.away[names[3]] = 100.0
    del job.doing[names[4]]
    for rank in (20, 21, 22):
        job.ended[rank] = job.ranks.pop(rank), rank == 21
    for rank in range(32, 36):
        del job.ranks[rank]
    found = grid(job, stalled=[25], expected={35: "spare"})
    words = {rank: word for rank, (word, _) in each(found).items()}
    assert [words[rank] for rank in range(4, 8)] == ["saving"] * 4
    assert [words[rank] for rank in range(8, 12)] == ["restoring", "restoring", "starting", "evaluation"]
    assert {words[rank] for rank in range(12, 16)} == {"away"}
    assert {words[rank] for rank in range(16, 20)} == {"starting"}
    assert [words[rank] for rank in (20, 21, 22, 23, 25)] == ["ended", "dead", "ended", "training", "stalled"]
    assert {words[rank] for rank in range(32, 36)} == {"waiting"}
    assert each(found)[2] == ("training", 7)
    assert found["nodes"][-1] == ""
    assert "spare" in found["nodes"]
    assert sum(found["counts"].values()) == 36
    assert [found["words"][word] for _, word, _ in found["odd"]][:2] == ["dead", "stalled"]


def test_what_a_hostile_agent_tells_is_bounded():
    job = job_of(8, 8)
    told(job, job.nodes[0], behind=[1] * 3, phases=["\x1b[31m<b>" + "x" * 500])
    (word,) = grid(job)["words"]
    assert word == "<b>" + "x" * 29
    job = job_of(4096, 8)
    for number, node in enumerate(job.nodes):
        told(job, node, phases=[f"phase {number}-{i}" for i in range(8)], behind=list(range(8)))
    found = grid(job)
    assert len(found["words"]) <= 32 + len(WORDS)
    assert len(found["odd"]) == MAX_ODD
    assert found["left_out"] == 4096 - 512 - MAX_ODD


def test_a_hundred_thousand_ranks_are_compact():
    job = job_of(10_624 * 12, 12)
    found = grid(job, stalled=[77_777])
    assert found["counts"] == {"training": 127_487, "stalled": 1}
    assert len(msgspec.json.encode(found)) < 1 << 20
