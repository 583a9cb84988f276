"""What the coordinator wants done. The shell (coordination.runner) does it and reports back with the events below."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from ckptsvc.rpc.v1 import coordinator_pb2 as pb
from ckptsvc.telemetry import Cause


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

    `keep` is how many committed checkpoints stay afterwards; 0 keeps all. `retention` says which others stay.
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
    retention: pb.Retention = field(default_factory=pb.Retention)
    metrics: dict[str, str] = field(default_factory=dict)


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


class Answer(enum.Enum):
    """What a launcher's doorbell says. The kernel answers for a process, however busy or frozen that is."""

    UP = "it is there"
    GONE = "its host answers, and nobody listens"
    SILENT = "nothing answers"


@dataclass(frozen=True, slots=True)
class Probe:
    """See whether a launcher is still there, at once and within a second; answered by `Probed`."""

    job: str
    node: str
    address: str
    port: int


Strike = tuple[float, float, str]
"""What a node has against it in a list that outlives the coordinator: weight, its age in seconds, the last reason."""

Word = tuple[bool, float, float, str]
"""What a person has said of a node in that list: whether it is excluded, how long ago that was, seconds until it ends
(infinite: it does not), why."""


@dataclass(frozen=True, slots=True)
class ReadNodes:
    """Read the list of nodes that have failed; answered by `NodesRead`, with nothing where it cannot be read."""


@dataclass(frozen=True, slots=True)
class KeepNodes:
    """Keep the list of nodes that have failed, or that somebody has excluded or included; answered by `NodesKept`.

    `said` is how many words of people are among it, of all that this coordinator has heard.
    """

    strikes: dict[str, Strike]
    words: dict[str, Word] = field(default_factory=dict)
    said: int = 0


@dataclass(frozen=True, slots=True)
class Drain:
    """A node has failed once too often: ask the scheduler to give it to no further job, where that is wanted."""

    node: str
    reason: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """A launched job starts anew. There is nothing to do but to count it."""

    job: str
    cause: Cause


@dataclass(frozen=True, slots=True)
class Resumed:
    """A launched job has done the first step after a restart. There is nothing to do but to note how long it took.

    Attributes:
        job: as its ranks name it.
        attempt: that has done the step.
        why: the attempt before it has ended.
        times: of the fault, the first sign of it, the decision, the start of the ranks, their registration, the end of
            their restore, and the step; seconds of the coordinator's clock, ascending.
    """

    job: str
    attempt: int
    why: str
    times: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Audit:
    """An order of a person has been carried out, or refused: take it down."""

    asked: pb.Asked
    outcome: pb.Answered


Effect = (
    Send | AllotEpoch | Commit | Lookup | Record | Probe | ReadNodes | KeepNodes | Drain | Restarted | Resumed | Audit
)


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
class Probed:
    """Outcome of `Probe`."""

    job: str
    node: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class NodesRead:
    """Outcome of `ReadNodes`."""

    strikes: dict[str, Strike]
    words: dict[str, Word] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class NodesKept:
    """Outcome of `KeepNodes`: its `said`, and why the list could not be written; "" if it was."""

    said: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class CommitDone:
    """Outcome of `Commit`; `code` is empty when the checkpoint is committed."""

    job: str
    epoch: int
    step: int
    code: str = ""
    why: str = ""
