"""The names of a checkpoint's objects, and the commit record that makes them a checkpoint.

The record is written last and only if absent; its presence is the commit. It says which index belongs to
the checkpoint (other attempts may have left others) and verifies itself and the index.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
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

PINS: Final = "pins"
"""Directory of the records that keep a checkpoint from being deleted."""

RETIRED: Final = "retired"
"""Directory of the commit records of checkpoints that are being deleted."""

MAX_METRICS: Final = 64
"""Values that a commit record may have."""

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
_METRIC_NAME = re.compile(r"[^\s\x00-\x1f\x7f\ud800-\udfff]{1,100}")
_FLOAT = re.compile(r"nan|-?inf|-?[0-9]+(\.[0-9]+)?(e[+-][0-9]+)?", re.ASCII)


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
        refers: folders of other checkpoints of the run whose files this one needs, ascending.
        metrics: values that the training gave with this checkpoint, as text (see `metrics_text`).
        written: bytes of the files that were written for the shards, where these have segments; else None.
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
    metrics: dict[str, str] = {}
    written: Count | None = None
    format: str = FORMAT

    @property
    def values(self) -> dict[str, float]:
        """The metrics as numbers; NaN and infinities are possible."""
        return {name: float(text) for name, text in self.metrics.items()}

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
        try:
            check_metrics(commit.metrics)
        except InvalidInput as error:
            raise Damaged(f"{what}: {error}") from None
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


class PinRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Somebody wants a checkpoint to stay, whatever retention says.

    Attributes:
        checkpoint: its name, also in the object's name.
        note: why, for people.
        created: ISO 8601 in UTC.
        format: version of the format.
    """

    checkpoint: str
    note: str
    created: str
    format: str = FORMAT

    def encode(self) -> Octets:
        """The bytes of the record, as for a commit record. Raises InvalidInput when a field is too long."""
        return _seal(self, "pin")

    @classmethod
    def decode(cls, data: Octets, what: str = "pin") -> PinRecord:
        """Reads a pin. Raises Damaged and IncompatibleVersion as for a commit record."""
        return _unseal(data, cls, what)


def metrics_text(values: Mapping[str, float]) -> dict[str, str]:
    """Values as a commit record has them: the shortest text that is read back as the same binary64 number.

    Raises:
        InvalidInput: there are too many, a name is not 1 to 100 characters without spaces, or a value is no number.
    """
    found = {}
    for name, value in values.items():
        try:
            found[name] = repr(float(value))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise InvalidInput(f"metric {name!r} is no number: {error}") from None
    check_metrics(found)
    return found


def check_metrics(metrics: Mapping[str, str]) -> None:
    """See that these are metrics as a commit record has them.

    Raises:
        InvalidInput: as in `metrics_text`, or a number is spelled otherwise.
    """
    if len(metrics) > MAX_METRICS:
        raise InvalidInput(f"{len(metrics)} metrics are too many: {MAX_METRICS} are the most")
    for name, text in metrics.items():
        if not _METRIC_NAME.fullmatch(name):
            raise InvalidInput(f"{name!r} is no name of a metric: 1 to 100 characters without spaces")
        if not _FLOAT.fullmatch(text) or repr(float(text)) != text:
            raise InvalidInput(f"metric {name!r} is {text[:100]!r}, and no number as it should be written")


def _seal(value: msgspec.Struct, what: str) -> Octets:
    # What is empty is left out: the records of a checkpoint without it are those of version 1.0.
    fields = {name: each for name, each in msgspec.to_builtins(value).items() if each not in ([], (), {}, None)}
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


def pin_key(name: str) -> str:
    """The key of the pin of a checkpoint: "pins/step-000000000100.e00007.json"."""
    return f"{PINS}/{name}.json"


def parse_pin_name(name: str) -> tuple[int, int] | None:
    """The (step, epoch) of a name below "pins/"; None for any other name."""
    return parse_checkpoint_name(name.removesuffix(".json")) if name.endswith(".json") else None


def _check_number(what: str, value: int, most: int) -> None:
    if not 0 <= value <= most:
        raise InvalidInput(f"{what} {value} is not between 0 and {most}")


def _checked_token(token: str) -> str:
    if not _TOKEN.fullmatch(token):
        raise InvalidInput(f"{token!r} is not 8 lower-case hexadecimal digits")
    return token
