"""The names of a checkpoint's objects, and the commit record that makes them a checkpoint.

The record is written last and only if absent; its presence is the commit. It says which index belongs to
the checkpoint (other attempts may have left others) and verifies itself and the index.
"""

from __future__ import annotations

import re
from typing import Annotated, Final

import msgspec

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.format import record
from ckptsvc.format.checksum import digest64
from ckptsvc.format.compat import FORMAT
from ckptsvc.format.limits import MAX_RECORD_BYTES, MAX_REFERS, MAX_SHARDS

COMMIT: Final = "COMMIT"
"""Name of the commit record in a checkpoint's directory."""

EPOCHS: Final = "epochs"
"""Directory of the epoch records."""

Octets = bytes  # `bytes` is a field of CommitRecord
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
_STEP_MAX: Final = 10**18 - 1
_EPOCH_MAX: Final = 10**9 - 1
_RANK_MAX: Final = 10**9 - 1
_CHECKPOINT = re.compile(r"step-([0-9]{12,18})\.e([0-9]{5,9})", re.ASCII)
_SHARD = re.compile(r"r([0-9]{5,9})-[0-9a-f]{8}\.safetensors", re.ASCII)
_INDEX = re.compile(r"index-[0-9a-f]{8}\.safetensors", re.ASCII)
_EPOCH = re.compile(r"([0-9]{8,9})\.json", re.ASCII)
_TOKEN = re.compile(r"[0-9a-f]{8}", re.ASCII)


class CommitRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a checkpoint: sizes in bytes, digests in lower-case hexadecimal.

    Attributes:
        step: the training step.
        epoch: which attempt of the run saved it (fencing): a higher epoch is a later attempt.
        attempt: the attempt as the job's launcher counts it.
        job: the job's name.
        writer: a random id of the process that committed, to recognise its own record after a lost response.
        index: name of the index object in the same directory.
        index_bytes: its size.
        index_digest: its xxh3_128.
        shards: how many shards the index lists.
        bytes: the sum of their sizes.
        world_size: how many ranks saved.
        created: time of the commit, ISO 8601 in UTC.
        refers: folders of other checkpoints whose files this one needs, ascending.
        format: version of the format.
    """

    step: Count
    epoch: Count
    attempt: Count
    job: str
    writer: str
    index: str
    index_bytes: Count
    index_digest: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]
    shards: Annotated[int, msgspec.Meta(ge=0, le=MAX_SHARDS)]
    bytes: Count
    world_size: Count
    created: str
    refers: tuple[str, ...] = ()
    format: str = FORMAT

    def encode(self) -> Octets:
        """The bytes of the commit record: canonical JSON with the `check` of all other fields.

        Raises:
            InvalidInput: a field is too long or is no name of an index.
        """
        return _seal(self, "commit record")

    @classmethod
    def decode(cls, data: Octets, what: str = "commit record") -> CommitRecord:
        """Reads a commit record.

        Args:
            data: all bytes of the object.
            what: its key, for the message.

        Raises:
            Damaged: it does not verify or is malformed.
            IncompatibleVersion: it is of a newer major version.
        """
        commit = _unseal(data, cls, what)
        if not _INDEX.fullmatch(commit.index):
            raise Damaged(f"{what} names {commit.index!r} as its index, which is no name of an index")
        refers = commit.refers
        if (
            len(refers) > MAX_REFERS
            or list(refers) != sorted(set(refers))
            or None in map(parse_checkpoint_name, refers)
        ):
            raise Damaged(f"{what} refers to what are no other checkpoints: {', '.join(refers)[:200]}")
        return commit


class EpochRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt of a job on a run. Whoever creates the highest one owns the run; older attempts may not
    commit.

    Attributes:
        epoch: the number, also in the object's name.
        job: the job's name.
        attempt: the attempt as the job's launcher counts it.
        owner: a random id of the process that created it.
        created: ISO 8601 in UTC.
        format: version of the format.
    """

    epoch: Count
    job: str
    attempt: Count
    owner: str
    created: str
    format: str = FORMAT

    def encode(self) -> Octets:
        """The bytes of the record, as for a commit record. Raises InvalidInput when a field is too long."""
        return _seal(self, "epoch record")

    @classmethod
    def decode(cls, data: Octets, what: str = "epoch record") -> EpochRecord:
        """Reads an epoch record. Raises Damaged and IncompatibleVersion as for a commit record."""
        return _unseal(data, cls, what)


def _seal(value: msgspec.Struct, what: str) -> Octets:
    fields = msgspec.to_builtins(value)
    if not fields.get("refers"):  # so that a record that refers to nothing is as it was before there was such a field
        fields.pop("refers", None)
    fields["check"] = digest64(record.canonical(fields))
    data = record.canonical(fields)
    if len(data) > MAX_RECORD_BYTES:
        raise InvalidInput(f"the {what} would have {len(data)} bytes; at most {MAX_RECORD_BYTES} are allowed")
    return data


def _unseal(data: Octets, cls: type[record.R], what: str) -> record.R:
    fields = record.parse(data, MAX_RECORD_BYTES, what)
    check = fields.pop("check", None)
    if check != digest64(record.canonical(fields)):
        raise Damaged(f"{what} does not match its own checksum")
    return record.convert(fields, cls, what)


def checkpoint_name(step: int, epoch: int) -> str:
    """The directory of the checkpoint of a step saved in an epoch: "step-000000000100.e00007".

    Raises:
        InvalidInput: a number is negative or has too many digits.
    """
    _check_number("step", step, _STEP_MAX)
    _check_number("epoch", epoch, _EPOCH_MAX)
    return f"step-{step:012d}.e{epoch:05d}"


def parse_checkpoint_name(name: str) -> tuple[int, int] | None:
    """The (step, epoch) of a checkpoint's directory; None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    if match is None:
        return None
    step, epoch = int(match[1]), int(match[2])
    return (step, epoch) if checkpoint_name(step, epoch) == name else None


def shard_name(rank: int, token: str) -> str:
    """The object of one rank's shard: "r00003-9f2c01ab.safetensors".

    Args:
        rank: the rank that holds the snapshot.
        token: 8 random lower-case hexadecimal digits, new for every write.

    Raises:
        InvalidInput: the rank or the token is not of that form.
    """
    _check_number("rank", rank, _RANK_MAX)
    return f"r{rank:05d}-{_checked_token(token)}.safetensors"


def parse_shard_name(name: str) -> int | None:
    """The rank of a shard's name; None for any other name."""
    match = _SHARD.fullmatch(name)
    if match is None:
        return None
    rank = int(match[1])
    return rank if f"{rank:05d}" == match[1] else None


def index_name(token: str) -> str:
    """The object of an index: "index-77aa01bc.safetensors"; InvalidInput unless `token` is 8 hex digits."""
    return f"index-{_checked_token(token)}.safetensors"


def is_index_name(name: str) -> bool:
    """Whether this is the name of an index."""
    return _INDEX.fullmatch(name) is not None


def epoch_key(epoch: int) -> str:
    """The key of an epoch record in the store: "epochs/00000007.json"; InvalidInput when out of range."""
    _check_number("epoch", epoch, _EPOCH_MAX)
    return f"{EPOCHS}/{epoch:08d}.json"


def parse_epoch_name(name: str) -> int | None:
    """The epoch of a name below "epochs/"; None for any other name."""
    match = _EPOCH.fullmatch(name)
    if match is None:
        return None
    epoch = int(match[1])
    return epoch if f"{epoch:08d}" == match[1] else None


def _check_number(what: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise InvalidInput(f"{what} {value} is not between 0 and {most}")


def _checked_token(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise InvalidInput(f"{token!r} is not 8 lower-case hexadecimal digits")
    return token
