"""What the coordinator wants done. The shell (agent.runner) does it and reports back with the events below."""

from __future__ import annotations

from dataclasses import dataclass, field

from ckptsvc.rpc.v1 import coordinator_pb2 as pb


@dataclass(frozen=True, slots=True)
class Send:
    """An order for one node's agent."""

    node: str
    order: pb.Order


@dataclass(frozen=True, slots=True)
class AllotEpoch:
    """Take the next epoch of the run in the store, for one attempt of a job; answered by `EpochDone`."""

    job: str
    attempt: int
    rewinds: int
    store: str


@dataclass(frozen=True, slots=True)
class Commit:
    """Every shard is durable: write index and commit record; answered by `CommitDone`.

    `keep` is how many committed checkpoints stay afterwards; 0 keeps all.
    """

    job: str
    epoch: int
    step: int
    attempt: int
    world_size: int
    store: str
    keep: int
    aliases: dict[str, str]
    shards: tuple[pb.Durable, ...]


@dataclass(frozen=True, slots=True)
class Lookup:
    """Is there a commit record for this step? Answered by `LookupDone`, or by nothing if the store cannot be read."""

    job: str
    epoch: int
    step: int
    store: str


@dataclass(frozen=True, slots=True)
class Record:
    """Keep an incident, in place of what was kept under its id before."""

    incident: pb.Incident


Effect = Send | AllotEpoch | Commit | Lookup | Record


@dataclass(slots=True)
class Decision:
    """Effects in order, and why: one sentence each that a person can read in the log."""

    effects: list[Effect] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def add(self, other: Decision) -> Decision:
        """Append another decision to this one."""
        self.effects += other.effects
        self.reasons += other.reasons
        return self


@dataclass(frozen=True, slots=True)
class EpochDone:
    """Outcome of `AllotEpoch`; `epoch` is 0 when none could be taken, with an error code and a sentence."""

    job: str
    attempt: int
    rewinds: int
    epoch: int
    code: str = ""
    why: str = ""


@dataclass(frozen=True, slots=True)
class LookupDone:
    """Outcome of `Lookup`."""

    job: str
    epoch: int
    step: int
    committed: bool


@dataclass(frozen=True, slots=True)
class CommitDone:
    """Outcome of `Commit`; `code` is empty when the checkpoint is committed."""

    job: str
    epoch: int
    step: int
    code: str = ""
    why: str = ""
