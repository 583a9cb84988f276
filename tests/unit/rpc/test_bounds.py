"""What a message may say: every field has a bound, and what is beyond it is named."""

import math

import pytest
from google.protobuf.message import Message

from ckptsvc.errors import InvalidInput
from ckptsvc.rpc import bounds
from ckptsvc.rpc.bounds import MAX_STEP, MOST_RANKS, MOST_REPORTS, bound_of, check, check_report
from ckptsvc.rpc.v1 import agent_pb2, coordinator_pb2
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

ANSWERS = (pb.Order, pb.FetchResponse, agent_pb2.ListSnapshotsResponse)
"""What an agent is told by others, besides what it is asked."""


def messages() -> list[Message]:
    """One of each kind that comes from somebody else, the kinds in it too."""
    services = [s for f in (agent_pb2, coordinator_pb2) for s in f.DESCRIPTOR.services_by_name.values()]
    found = [method.input_type._concrete_class for service in services for method in service.methods]
    found += ANSWERS
    for kind in found:
        inner = (field.message_type for field in kind.DESCRIPTOR.fields if field.message_type is not None)
        found += [i._concrete_class for i in inner if not i.GetOptions().map_entry and i._concrete_class not in found]
    return [kind() for kind in found]


@pytest.mark.parametrize("message", messages(), ids=lambda message: message.DESCRIPTOR.name)
def test_every_field_has_a_bound(message: Message) -> None:
    """A new one needs one in `FIELDS`, or, where its name means something else elsewhere, in `EXCEPTIONS`."""
    for field in message.DESCRIPTOR.fields:
        bound, here = bound_of(field), getattr(message, field.name)  # KeyError: nobody has said
        assert bound is not None or isinstance(here, bool), field.full_name
        assert (bound is bounds.fits) == isinstance(here, Message), f"{field.full_name}: a single message, or several"
        if bound is not None and not isinstance(here, Message) and bound is not bounds.FIELDS["extent"]:
            assert bound(here), f"{field.full_name}: what is not set is within"


def test_no_bound_is_for_a_field_that_is_not_there() -> None:
    fields = {(m.DESCRIPTOR.name, f.name) for m in messages() for f in m.DESCRIPTOR.fields}
    assert bounds.FIELDS.keys() <= {name for _, name in fields}
    assert {tuple(each.split(".")) for each in bounds.EXCEPTIONS} <= fields
    assert bounds.RULES.keys() <= {kind for kind, _ in fields}


JOINED = {"job": "j", "node": "n", "nproc": 12, "min_nodes": 1, "max_nodes": 1, "address": "10.0.0.1"}
STAGED = {"job": "j", "node": "n", "rank": 1, "world_size": 2, "nbytes": 4096, "step": 3}


@pytest.mark.parametrize(
    ("report", "field"),
    [
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"nproc": (1 << 31) - 1})), "NodeJoined.nproc"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"nproc": 0})), "NodeJoined"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"first_rank": MOST_RANKS - 1})), "NodeJoined"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"min_nodes": 2})), "NodeJoined"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"address": "a b"})), "NodeJoined.address"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"uptime": math.nan})), "NodeJoined.uptime"),
        (pb.Report(node_joined=pb.NodeJoined(**JOINED | {"clock": math.inf})), "NodeJoined.clock"),
        (pb.Report(staged=pb.Staged(**STAGED | {"world_size": -(1 << 31)})), "Staged.world_size"),
        (pb.Report(staged=pb.Staged(**STAGED | {"rank": 2})), "Staged"),
        (pb.Report(staged=pb.Staged(**STAGED | {"rank": -1})), "Staged.rank"),
        (pb.Report(staged=pb.Staged(**STAGED | {"step": MAX_STEP + 1})), "Staged.step"),
        (pb.Report(staged=pb.Staged(**STAGED | {"job": "j\nm"})), "Staged.job"),
        (pb.Report(staged=pb.Staged(**STAGED | {"aliases": {"a": "b" * (9 << 20)}})), "Staged.aliases"),
        (pb.Report(progressed=pb.Progressed(job="j", node="n", behind=[1] * 20_000)), "Progressed.behind"),
        (pb.Report(progressed=pb.Progressed(job="j", node="n", phases=["\x1b[2J"])), "Progressed.phases"),
        (pb.Report(asked=pb.Asked(id="i", node="n", by=pb.Caller(name="\x07"))), "Caller.name"),
        (pb.Report(asked=pb.Asked(id="i", node="n", reason="x" * 301)), "Asked.reason"),
        (pb.Report(pausing=pb.Pausing(job="j", reason="x" * 301)), "Pausing.reason"),
        (
            pb.Report(
                guarded=pb.Guarded(
                    job="j", node="n", world_size=2, members=[pb.Holder(ranks=[pb.RankRun(count=MOST_RANKS)])] * 2
                )
            ),
            "Guarded",
        ),
        (pb.Report(more=[pb.Report(staged=pb.Staged(**STAGED | {"rank": 9}))]), "Staged"),
        (pb.Report(staged=pb.Staged(**STAGED | {"node": "m"})), "staged of another node"),
        (pb.Report(more=[pb.Report(node_left=pb.NodeLeft(job="j", node="m"))]), "node_left of another node"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_what_cannot_be_is_refused_by_name(report: pb.Report, field: str) -> None:
    with pytest.raises(InvalidInput, match=f"says what cannot be: {field}(,|$)"):
        check_report(report, "n")


def test_what_can_be_is_not() -> None:
    most = {"rank": MOST_RANKS - 1, "world_size": MOST_RANKS, "step": MAX_STEP, "nbytes": 1 << 42}
    for report in (
        pb.Report(node_joined=pb.NodeJoined(**JOINED, grow=-1.0, node_rank=-1, doorbell=65535)),
        pb.Report(staged=pb.Staged(**STAGED | most, aliases={"lm_head\n": "embed"})),
        pb.Report(dropped=pb.Dropped(job="j", node="n", rank=-1)),  # its part of a parity
        pb.Report(examined=pb.Examined(job="j", node="n", ranks=[pb.RankEvidence(stack="a\nb", enqueued=-1)])),
        pb.Report(),
    ):
        check_report(report, "n")


def test_an_order_that_cannot_be_is_refused_too() -> None:
    check(pb.Order(job="j", save_at=pb.SaveAt(attempt=1, step=7)))
    for order in (
        pb.Order(job="j", save_at=pb.SaveAt(step=-1)),
        pb.Order(job="j", start=agent_pb2.StartRanks(attempt=1, world_size=2, first_rank=2, nodes=1)),
        pb.Order(job="j", examine=pb.Examine(seconds=math.nan)),
        pb.Order(job="j", kill=pb.Kill(rank=-7)),
        pb.Order(job="j", holders=pb.Holders(groups=[pb.HolderGroup(runs=[pb.RankRun(first=1, count=MOST_RANKS)])])),
    ):
        with pytest.raises(InvalidInput):
            check(order)


def test_a_message_of_nothing_but_empty_reports_is_refused_before_they_are_looked_at() -> None:
    check_report(pb.Report(more=[pb.Report()] * 1000), "n")
    with pytest.raises(InvalidInput, match=r"Report\.more"):
        check_report(pb.Report.FromString(b"\xaa\x06\x00" * (MOST_REPORTS + 1)), "n")
