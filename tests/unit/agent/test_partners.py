"""What another agent says of what it holds is believed only where it can be."""

import random

import pytest
from google.protobuf.message import DecodeError

from ckptsvc.agent.tiers.partners import _check_answer, _group
from ckptsvc.agent.tiers.transfer import new_ticket
from ckptsvc.control.runs import runs_of
from ckptsvc.errors import InvalidInput
from ckptsvc.rpc.v1 import coordinator_pb2 as pb

EXTENT = 4096
SIZES = {"n0": {0: 5000, 1: 1}, "n1": {2: 4096}, "n2": {3: 9000}}


def shards(node):
    return [
        pb.Shard(rank=rank, nbytes=nbytes, extent=EXTENT, digests=bytes(8 * -(-nbytes // EXTENT)))
        for rank, nbytes in SIZES[node].items()
    ]


def answer(node="n0", *, parity=True):
    response = pb.FetchResponse(ticket=new_ticket(), address="127.0.0.1:7", shards=shards(node))
    if parity:
        response.parity.CopyFrom(pb.Parity(losses=1, nbytes=2 * EXTENT, digests=bytes(16)))
        for name in SIZES:
            response.parity.members.add(node=name, shards=shards(name))
    return response


def order(**changes):
    members = [pb.Holder(node=name, address="127.0.0.1:7", ranks=runs_of(sorted(SIZES[name]))) for name in SIZES]
    return pb.Rebuild(**{"losses": 1, "members": members, **changes})


def test_what_is_right_is_taken():
    _check_answer(answer(), [1, 0], "n0")
    members, extent = _group(order(), {0: answer("n0"), 1: answer("n1")})
    assert extent == EXTENT
    assert [(node, [(k.rank, k.nbytes) for k in held]) for node, held in members] == [
        (node, list(sizes.items())) for node, sizes in SIZES.items()
    ]


def changed(message, change):
    change(message)
    return message


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.shards.pop(),
        lambda a: a.shards.add(rank=9, nbytes=1, extent=EXTENT, digests=bytes(8)),
        lambda a: a.shards.reverse(),
        lambda a: setattr(a.shards[0], "rank", 7),
        lambda a: setattr(a.shards[0], "nbytes", 0),
        lambda a: setattr(a.shards[0], "nbytes", 1 << 50),
        lambda a: setattr(a.shards[0], "extent", 0),
        lambda a: setattr(a.shards[0], "extent", 100),
        lambda a: setattr(a.shards[0], "extent", 2 * EXTENT),
        lambda a: a.shards[0].MergeFrom(pb.Shard(nbytes=1, extent=(64 << 20) + EXTENT)),
        lambda a: setattr(a.shards[0], "digests", bytes(8)),
        lambda a: setattr(a, "ticket", "0" * 63),
        lambda a: setattr(a, "ticket", "G" * 64),
        lambda a: setattr(a.parity, "nbytes", 1 << 50),
        lambda a: setattr(a.parity, "digests", b""),
        lambda a: setattr(a.parity.members[1].shards[0], "digests", b"x"),
    ],
)
def test_what_cannot_be_is_refused(change):
    with pytest.raises(InvalidInput):
        _check_answer(changed(answer(), change), [0, 1], "n0")


@pytest.mark.parametrize(
    "change",
    [
        lambda a: setattr(a.parity, "losses", 2),
        lambda a: a.parity.members.pop(),
        lambda a: setattr(a.parity.members[0], "node", "n9"),
        lambda a: setattr(a.parity.members[2].shards[0], "nbytes", 8000),
        lambda a: setattr(a.parity.members[2].shards[0], "digests", bytes([1]) * 24),
        lambda a: setattr(a.shards[0], "digests", bytes([1]) * 8),
    ],
)
def test_those_that_are_left_must_agree(change):
    with pytest.raises(InvalidInput):
        _group(order(), {0: answer("n0"), 1: changed(answer("n1"), change)})


def test_a_group_of_nobody_or_of_others_is_refused():
    with pytest.raises(InvalidInput):
        _group(order(), {})
    with pytest.raises(InvalidInput):
        _group(order(members=[pb.Holder(node="n0", address="127.0.0.1:7")]), {0: answer()})


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bits_are_refused_or_make_no_sense_at_most_where_a_checksum_shows_it(seed):
    rng = random.Random(seed)
    for _ in range(50):
        raw = bytearray(answer().SerializeToString())
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        try:
            told = pb.FetchResponse.FromString(bytes(raw))
        except DecodeError:
            continue
        try:
            _check_answer(told, [0, 1], "n0")
            _group(order(), {0: told})
        except InvalidInput:
            continue
        assert [shard.rank for shard in told.shards] == [0, 1]
        assert all(len(s.digests) == 8 * -(-s.nbytes // s.extent) for s in told.shards)
