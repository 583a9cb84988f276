from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_COMMITTED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]
    OUTCOME_SKIPPED: _ClassVar[Outcome]
    OUTCOME_FENCED: _ClassVar[Outcome]
    OUTCOME_LOCAL: _ClassVar[Outcome]
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_COMMITTED: Outcome
OUTCOME_FAILED: Outcome
OUTCOME_SKIPPED: Outcome
OUTCOME_FENCED: Outcome
OUTCOME_LOCAL: Outcome

class VerbRequest(_message.Message):
    __slots__ = ("job", "node", "reason", "seconds", "no_wait")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    NO_WAIT_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    reason: str
    seconds: float
    no_wait: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., no_wait: bool = ...) -> None: ...

class VerbResponse(_message.Message):
    __slots__ = ("done", "what", "left", "step", "bytes", "seconds")
    DONE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    done: bool
    what: _containers.RepeatedScalarFieldContainer[str]
    left: _containers.RepeatedScalarFieldContainer[str]
    step: int
    bytes: int
    seconds: float
    def __init__(self, done: bool = ..., what: _Optional[_Iterable[str]] = ..., left: _Optional[_Iterable[str]] = ..., step: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class PrepareRequest(_message.Message):
    __slots__ = ("plain_digest", "generation")
    PLAIN_DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    plain_digest: str
    generation: int
    def __init__(self, plain_digest: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class PrepareResponse(_message.Message):
    __slots__ = ("same_plain", "complete", "epoch")
    SAME_PLAIN_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    same_plain: _containers.RepeatedScalarFieldContainer[int]
    complete: bool
    epoch: int
    def __init__(self, same_plain: _Optional[_Iterable[int]] = ..., complete: bool = ..., epoch: _Optional[int] = ...) -> None: ...

class RewindRequest(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...

class RewindResponse(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class ProvideRequest(_message.Message):
    __slots__ = ("bytes",)
    BYTES_FIELD_NUMBER: _ClassVar[int]
    bytes: int
    def __init__(self, bytes: _Optional[int] = ...) -> None: ...

class ProvideResponse(_message.Message):
    __slots__ = ("slots",)
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    slots: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, slots: _Optional[_Iterable[str]] = ...) -> None: ...

class AcquireRequest(_message.Message):
    __slots__ = ("step", "bytes", "patience")
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PATIENCE_FIELD_NUMBER: _ClassVar[int]
    step: int
    bytes: int
    patience: float
    def __init__(self, step: _Optional[int] = ..., bytes: _Optional[int] = ..., patience: _Optional[float] = ...) -> None: ...

class AcquireResponse(_message.Message):
    __slots__ = ("slot", "capacity", "epoch", "twin_slot", "twin_rank")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TWIN_SLOT_FIELD_NUMBER: _ClassVar[int]
    TWIN_RANK_FIELD_NUMBER: _ClassVar[int]
    slot: str
    capacity: int
    epoch: int
    twin_slot: str
    twin_rank: int
    def __init__(self, slot: _Optional[str] = ..., capacity: _Optional[int] = ..., epoch: _Optional[int] = ..., twin_slot: _Optional[str] = ..., twin_rank: _Optional[int] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("slot", "step", "bytes", "aliases", "metrics", "staging", "twin_slot", "twin_bytes")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    STAGING_FIELD_NUMBER: _ClassVar[int]
    TWIN_SLOT_FIELD_NUMBER: _ClassVar[int]
    TWIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    slot: str
    step: int
    bytes: int
    aliases: _containers.ScalarMap[str, str]
    metrics: _containers.ScalarMap[str, str]
    staging: float
    twin_slot: str
    twin_bytes: int
    def __init__(self, slot: _Optional[str] = ..., step: _Optional[int] = ..., bytes: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., metrics: _Optional[_Mapping[str, str]] = ..., staging: _Optional[float] = ..., twin_slot: _Optional[str] = ..., twin_bytes: _Optional[int] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AbandonRequest(_message.Message):
    __slots__ = ("slot", "step", "reason", "code")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    slot: str
    step: int
    reason: str
    code: str
    def __init__(self, slot: _Optional[str] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ..., code: _Optional[str] = ...) -> None: ...

class AbandonResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WaitSaveRequest(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...

class WaitSaveResponse(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: SaveOutcome
    def __init__(self, outcome: _Optional[_Union[SaveOutcome, _Mapping]] = ...) -> None: ...

class SaveOutcome(_message.Message):
    __slots__ = ("epoch", "step", "outcome", "code", "reason", "bytes", "seconds", "timed_out")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    TIMED_OUT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    outcome: Outcome
    code: str
    reason: str
    bytes: int
    seconds: float
    timed_out: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., code: _Optional[str] = ..., reason: _Optional[str] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ..., timed_out: bool = ...) -> None: ...

class ListSnapshotsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSnapshotsResponse(_message.Message):
    __slots__ = ("snapshots", "notes", "committed_epoch", "committed_step")
    SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_EPOCH_FIELD_NUMBER: _ClassVar[int]
    COMMITTED_STEP_FIELD_NUMBER: _ClassVar[int]
    snapshots: _containers.RepeatedCompositeFieldContainer[Snapshot]
    notes: _containers.RepeatedScalarFieldContainer[str]
    committed_epoch: int
    committed_step: int
    def __init__(self, snapshots: _Optional[_Iterable[_Union[Snapshot, _Mapping]]] = ..., notes: _Optional[_Iterable[str]] = ..., committed_epoch: _Optional[int] = ..., committed_step: _Optional[int] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("epoch", "step", "world_size", "local", "aliases", "on_disk", "not_in_memory")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    ON_DISK_FIELD_NUMBER: _ClassVar[int]
    NOT_IN_MEMORY_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    world_size: int
    local: _containers.RepeatedCompositeFieldContainer[LocalShard]
    aliases: _containers.ScalarMap[str, str]
    on_disk: bool
    not_in_memory: bool
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ..., local: _Optional[_Iterable[_Union[LocalShard, _Mapping]]] = ..., aliases: _Optional[_Mapping[str, str]] = ..., on_disk: bool = ..., not_in_memory: bool = ...) -> None: ...

class LocalShard(_message.Message):
    __slots__ = ("rank", "slot", "bytes", "extent", "digests")
    RANK_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    slot: str
    bytes: int
    extent: int
    digests: bytes
    def __init__(self, rank: _Optional[int] = ..., slot: _Optional[str] = ..., bytes: _Optional[int] = ..., extent: _Optional[int] = ..., digests: _Optional[bytes] = ...) -> None: ...

class RefillRequest(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class RefillResponse(_message.Message):
    __slots__ = ("done", "snapshot")
    DONE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    done: bool
    snapshot: Snapshot
    def __init__(self, done: bool = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LeaveResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: bytes
    def __init__(self, json: _Optional[bytes] = ...) -> None: ...

class LaunchRequest(_message.Message):
    __slots__ = ("hello", "ready", "exit", "stop_wanted", "leaving")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    EXIT_FIELD_NUMBER: _ClassVar[int]
    STOP_WANTED_FIELD_NUMBER: _ClassVar[int]
    LEAVING_FIELD_NUMBER: _ClassVar[int]
    hello: LauncherHello
    ready: LauncherReady
    exit: RankExit
    stop_wanted: StopWanted
    leaving: Leaving
    def __init__(self, hello: _Optional[_Union[LauncherHello, _Mapping]] = ..., ready: _Optional[_Union[LauncherReady, _Mapping]] = ..., exit: _Optional[_Union[RankExit, _Mapping]] = ..., stop_wanted: _Optional[_Union[StopWanted, _Mapping]] = ..., leaving: _Optional[_Union[Leaving, _Mapping]] = ...) -> None: ...

class LauncherHello(_message.Message):
    __slots__ = ("job", "node", "node_rank", "min_nodes", "max_nodes", "nproc", "max_restarts", "address", "attempt", "first_rank", "log_dir", "world_size", "doorbell", "unfit", "crash_loop", "uptime", "grow", "check_network", "again")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    MIN_NODES_FIELD_NUMBER: _ClassVar[int]
    MAX_NODES_FIELD_NUMBER: _ClassVar[int]
    NPROC_FIELD_NUMBER: _ClassVar[int]
    MAX_RESTARTS_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    LOG_DIR_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    UNFIT_FIELD_NUMBER: _ClassVar[int]
    CRASH_LOOP_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    CHECK_NETWORK_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    node_rank: int
    min_nodes: int
    max_nodes: int
    nproc: int
    max_restarts: int
    address: str
    attempt: int
    first_rank: int
    log_dir: str
    world_size: int
    doorbell: int
    unfit: str
    crash_loop: int
    uptime: float
    grow: float
    check_network: bool
    again: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., node_rank: _Optional[int] = ..., min_nodes: _Optional[int] = ..., max_nodes: _Optional[int] = ..., nproc: _Optional[int] = ..., max_restarts: _Optional[int] = ..., address: _Optional[str] = ..., attempt: _Optional[int] = ..., first_rank: _Optional[int] = ..., log_dir: _Optional[str] = ..., world_size: _Optional[int] = ..., doorbell: _Optional[int] = ..., unfit: _Optional[str] = ..., crash_loop: _Optional[int] = ..., uptime: _Optional[float] = ..., grow: _Optional[float] = ..., check_network: bool = ..., again: bool = ...) -> None: ...

class LauncherReady(_message.Message):
    __slots__ = ("attempt", "port")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    port: int
    def __init__(self, attempt: _Optional[int] = ..., port: _Optional[int] = ...) -> None: ...

class RankExit(_message.Message):
    __slots__ = ("attempt", "rank", "status", "monotonic", "detail")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MONOTONIC_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    rank: int
    status: int
    monotonic: float
    detail: str
    def __init__(self, attempt: _Optional[int] = ..., rank: _Optional[int] = ..., status: _Optional[int] = ..., monotonic: _Optional[float] = ..., detail: _Optional[str] = ...) -> None: ...

class Leaving(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class StopWanted(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class LaunchResponse(_message.Message):
    __slots__ = ("start", "stop", "end", "notice")
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    start: StartRanks
    stop: StopRanks
    end: JobEnd
    notice: Notice
    def __init__(self, start: _Optional[_Union[StartRanks, _Mapping]] = ..., stop: _Optional[_Union[StopRanks, _Mapping]] = ..., end: _Optional[_Union[JobEnd, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ...) -> None: ...

class Notice(_message.Message):
    __slots__ = ("text",)
    TEXT_FIELD_NUMBER: _ClassVar[int]
    text: str
    def __init__(self, text: _Optional[str] = ...) -> None: ...

class StartRanks(_message.Message):
    __slots__ = ("attempt", "world_size", "first_rank", "node_rank", "nodes", "master_addr", "master_port")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    FIRST_RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    NODES_FIELD_NUMBER: _ClassVar[int]
    MASTER_ADDR_FIELD_NUMBER: _ClassVar[int]
    MASTER_PORT_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    world_size: int
    first_rank: int
    node_rank: int
    nodes: int
    master_addr: str
    master_port: int
    def __init__(self, attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., first_rank: _Optional[int] = ..., node_rank: _Optional[int] = ..., nodes: _Optional[int] = ..., master_addr: _Optional[str] = ..., master_port: _Optional[int] = ...) -> None: ...

class StopRanks(_message.Message):
    __slots__ = ("attempt", "grace", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GRACE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    grace: float
    reason: str
    def __init__(self, attempt: _Optional[int] = ..., grace: _Optional[float] = ..., reason: _Optional[str] = ...) -> None: ...

class JobEnd(_message.Message):
    __slots__ = ("status", "reason")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    status: int
    reason: str
    def __init__(self, status: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...
