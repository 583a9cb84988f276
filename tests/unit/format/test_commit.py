from __future__ import annotations

import json

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from ckptsvc.errors import Damaged, IncompatibleVersion, InvalidInput
from ckptsvc.format.commit import (
    CommitRecord,
    EpochRecord,
    checkpoint_name,
    epoch_key,
    index_name,
    is_index_name,
    parse_checkpoint_name,
    parse_epoch_name,
    parse_shard_name,
    shard_name,
)

COMMIT = CommitRecord(
    step=100,
    epoch=7,
    attempt=2,
    job="jöb",
    writer="w" * 16,
    index="index-77aa01bc.safetensors",
    index_bytes=4096,
    index_digest="0123456789abcdef" * 2,
    shards=4,
    bytes=10**15,
    world_size=4,
    created="2026-01-02T03:04:05Z",
)


def sealed(**changes):
    fields = {**json.loads(COMMIT.encode()), **changes}
    del fields["check"]
    fields = {key: value for key, value in fields.items() if value is not None}
    dump = lambda: json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()  # noqa: E731
    fields["check"] = xxhash.xxh3_64_hexdigest(dump())
    return dump()


def test_a_record_comes_back_and_is_what_the_specification_says():
    assert CommitRecord.decode(COMMIT.encode()) == COMMIT
    assert sealed() == COMMIT.encode()


def test_an_epoch_record_comes_back():
    epoch = EpochRecord(epoch=7, job="j", attempt=2, owner="me", created="now")
    assert EpochRecord.decode(epoch.encode()) == epoch
    with pytest.raises(Damaged):
        EpochRecord.decode(COMMIT.encode())


@given(st.data())
def test_no_damaged_record_is_believed(kit, data):
    broken = data.draw(kit.damaged(COMMIT.encode()))
    found = kit.survives(CommitRecord.decode, broken)
    assert found is None or broken == COMMIT.encode()


def test_a_record_with_a_newer_minor_version_is_read():
    assert CommitRecord.decode(sealed(format="1.4", novelty="x")).step == 100


def test_a_record_with_a_newer_major_version_is_refused():
    with pytest.raises(IncompatibleVersion, match=r"step-1/COMMIT has format 3\.0"):
        CommitRecord.decode(sealed(format="3.0"), "step-1/COMMIT")


@pytest.mark.parametrize(
    "changes",
    [
        {"step": -1},
        {"step": 2**63},
        {"step": "100"},
        {"step": None},
        {"index": "../index-77aa01bc.safetensors"},
        {"index": "index-77aa01bc.safetensors\n"},
        {"index": "INDEX"},
        {"index_digest": "0" * 31},
        {"index_digest": "0" * 32 + "\n"},
        {"shards": 2**24 + 1},
        {"format": None},
    ],
)
def test_impossible_fields_are_damage_though_the_checksum_is_right(changes):
    with pytest.raises(Damaged):
        CommitRecord.decode(sealed(**changes))


def test_a_record_that_would_be_too_long_is_not_written():
    with pytest.raises(InvalidInput, match="65536"):
        EpochRecord(epoch=1, job="j" * 70_000, attempt=0, owner="o", created="c").encode()


@given(st.integers(0, 10**18 - 1), st.integers(0, 10**9 - 1))
def test_names_of_checkpoints_come_back(step, epoch):
    assert parse_checkpoint_name(checkpoint_name(step, epoch)) == (step, epoch)


def test_names_are_as_the_specification_spells_them():
    assert checkpoint_name(100, 7) == "step-000000000100.e00007"
    assert shard_name(3, "9f2c01ab") == "r00003-9f2c01ab.safetensors"
    assert index_name("77aa01bc") == "index-77aa01bc.safetensors"
    assert epoch_key(7) == "epochs/00000007.json"
    assert parse_shard_name("r00003-9f2c01ab.safetensors") == 3
    assert parse_shard_name(shard_name(123_456, "9f2c01ab")) == 123_456
    assert parse_epoch_name("00000007.json") == 7
    assert is_index_name("index-77aa01bc.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "",
        "epochs",
        "step-100.e7",
        "step-0000000000100.e00007",  # a zero too many
        "step-000000000100.e000007",
        "step-000000000100.e00007/",
        "step-000000000100.e00007\n",
        "step-00000000010٠.e00007",
    ],
)
def test_other_names_are_no_checkpoints(name):
    assert parse_checkpoint_name(name) is None


@pytest.mark.parametrize(
    "name", ["", "r3-9f2c01ab.safetensors", "r000003-9f2c01ab.safetensors", "r00003-9F2C01AB.safetensors"]
)
def test_other_names_are_no_shards(name):
    assert parse_shard_name(name) is None


@pytest.mark.parametrize("name", ["7.json", "000000007.json", "00000007.json.tmp"])
def test_other_names_are_no_epochs(name):
    assert parse_epoch_name(name) is None


@pytest.mark.parametrize(
    "call",
    [
        lambda: checkpoint_name(-1, 0),
        lambda: checkpoint_name(10**18, 0),
        lambda: checkpoint_name(0, 10**9),
        lambda: shard_name(-1, "9f2c01ab"),
        lambda: shard_name(0, "9f2c01a"),
        lambda: index_name("../../xx"),
        lambda: epoch_key(-1),
    ],
)
def test_impossible_names_are_not_made(call):
    with pytest.raises(InvalidInput):
        call()
