from ckptsvc.rpc.v1 import agent_pb2 as _agent_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Verb(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    VERB_UNSPECIFIED: _ClassVar[Verb]
    VERB_CHECKPOINT: _ClassVar[Verb]
    VERB_PAUSE: _ClassVar[Verb]
    VERB_RESUME: _ClassVar[Verb]
    VERB_RESTART: _ClassVar[Verb]
    VERB_DRAIN: _ClassVar[Verb]
    VERB_UNDRAIN: _ClassVar[Verb]
    VERB_EXCLUDE: _ClassVar[Verb]
    VERB_INCLUDE: _ClassVar[Verb]
VERB_UNSPECIFIED: Verb
VERB_CHECKPOINT: Verb
VERB_PAUSE: Verb
VERB_RESUME: Verb
VERB_RESTART: Verb
VERB_DRAIN: Verb
VERB_UNDRAIN: Verb
VERB_EXCLUDE: Verb
VERB_INCLUDE: Verb

class Report(_message.Message):
    __slots__ = ("agent_hello", "rank_joined", "rank_left", "announced", "progressed", "staged", "durable", "shard_failed", "skipped", "dropped", "node_joined", "node_ready", "rank_exited", "node_left", "stop_requested", "rewound", "stalled", "moved", "examined", "nic_summary", "slowed", "local_kept", "local_dropped", "durable_wanted", "guarded", "rebuilt", "asked", "pausing", "more")
    AGENT_HELLO_FIELD_NUMBER: _ClassVar[int]
    RANK_JOINED_FIELD_NUMBER: _ClassVar[int]
    RANK_LEFT_FIELD_NUMBER: _ClassVar[int]
    ANNOUNCED_FIELD_NUMBER: _ClassVar[int]
    PROGRESSED_FIELD_NUMBER: _ClassVar[int]
    STAGED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FAILED_FIELD_NUMBER: _ClassVar[int]
    SKIPPED_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    NODE_JOINED_FIELD_NUMBER: _ClassVar[int]
    NODE_READY_FIELD_NUMBER: _ClassVar[int]
    RANK_EXITED_FIELD_NUMBER: _ClassVar[int]
    NODE_LEFT_FIELD_NUMBER: _ClassVar[int]
    STOP_REQUESTED_FIELD_NUMBER: _ClassVar[int]
    REWOUND_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    MOVED_FIELD_NUMBER: _ClassVar[int]
    EXAMINED_FIELD_NUMBER: _ClassVar[int]
    NIC_SUMMARY_FIELD_NUMBER: _ClassVar[int]
    SLOWED_FIELD_NUMBER: _ClassVar[int]
    LOCAL_KEPT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_DROPPED_FIELD_NUMBER: _ClassVar[int]
    DURABLE_WANTED_FIELD_NUMBER: _ClassVar[int]
    GUARDED_FIELD_NUMBER: _ClassVar[int]
    REBUILT_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    PAUSING_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    agent_hello: AgentHello
    rank_joined: RankJoined
    rank_left: RankLeft
    announced: Announced
    progressed: Progressed
    staged: Staged
    durable: Durable
    shard_failed: ShardFailed
    skipped: Skipped
    dropped: Dropped
    node_joined: NodeJoined
    node_ready: NodeReady
    rank_exited: RankExited
    node_left: NodeLeft
    stop_requested: StopRequested
    rewound: Rewound
    stalled: Stalled
    moved: Moved
    examined: Examined
    nic_summary: NicSummary
    slowed: Slowed
    local_kept: LocalKept
    local_dropped: LocalDropped
    durable_wanted: DurableWanted
    guarded: Guarded
    rebuilt: Rebuilt
    asked: Asked
    pausing: Pausing
    more: _containers.RepeatedCompositeFieldContainer[Report]
    def __init__(self, agent_hello: _Optional[_Union[AgentHello, _Mapping]] = ..., rank_joined: _Optional[_Union[RankJoined, _Mapping]] = ..., rank_left: _Optional[_Union[RankLeft, _Mapping]] = ..., announced: _Optional[_Union[Announced, _Mapping]] = ..., progressed: _Optional[_Union[Progressed, _Mapping]] = ..., staged: _Optional[_Union[Staged, _Mapping]] = ..., durable: _Optional[_Union[Durable, _Mapping]] = ..., shard_failed: _Optional[_Union[ShardFailed, _Mapping]] = ..., skipped: _Optional[_Union[Skipped, _Mapping]] = ..., dropped: _Optional[_Union[Dropped, _Mapping]] = ..., node_joined: _Optional[_Union[NodeJoined, _Mapping]] = ..., node_ready: _Optional[_Union[NodeReady, _Mapping]] = ..., rank_exited: _Optional[_Union[RankExited, _Mapping]] = ..., node_left: _Optional[_Union[NodeLeft, _Mapping]] = ..., stop_requested: _Optional[_Union[StopRequested, _Mapping]] = ..., rewound: _Optional[_Union[Rewound, _Mapping]] = ..., stalled: _Optional[_Union[Stalled, _Mapping]] = ..., moved: _Optional[_Union[Moved, _Mapping]] = ..., examined: _Optional[_Union[Examined, _Mapping]] = ..., nic_summary: _Optional[_Union[NicSummary, _Mapping]] = ..., slowed: _Optional[_Union[Slowed, _Mapping]] = ..., local_kept: _Optional[_Union[LocalKept, _Mapping]] = ..., local_dropped: _Optional[_Union[LocalDropped, _Mapping]] = ..., durable_wanted: _Optional[_Union[DurableWanted, _Mapping]] = ..., guarded: _Optional[_Union[Guarded, _Mapping]] = ..., rebuilt: _Optional[_Union[Rebuilt, _Mapping]] = ..., asked: _Optional[_Union[Asked, _Mapping]] = ..., pausing: _Optional[_Union[Pausing, _Mapping]] = ..., more: _Optional[_Iterable[_Union[Report, _Mapping]]] = ...) -> None: ...

class AgentHello(_message.Message):
    __slots__ = ("node", "job", "term", "address", "domain", "vacating")
    NODE_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VACATING_FIELD_NUMBER: _ClassVar[int]
    node: str
    job: str
    term: int
    address: str
    domain: str
    vacating: bool
    def __init__(self, node: _Optional[str] = ..., job: _Optional[str] = ..., term: _Optional[int] = ..., address: _Optional[str] = ..., domain: _Optional[str] = ..., vacating: bool = ...) -> None: ...

class RankJoined(_message.Message):
    __slots__ = ("job", "node", "store", "attempt", "rank", "world_size", "epoch", "every_steps", "every_seconds", "keep", "retention", "domain")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    EVERY_STEPS_FIELD_NUMBER: _ClassVar[int]
    EVERY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    RETENTION_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    store: str
    attempt: int
    rank: int
    world_size: int
    epoch: int
    every_steps: int
    every_seconds: float
    keep: int
    retention: Retention
    domain: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., store: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., epoch: _Optional[int] = ..., every_steps: _Optional[int] = ..., every_seconds: _Optional[float] = ..., keep: _Optional[int] = ..., retention: _Optional[_Union[Retention, _Mapping]] = ..., domain: _Optional[str] = ...) -> None: ...

class Retention(_message.Message):
    __slots__ = ("steps", "seconds", "best", "metric", "highest", "age", "rate")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    METRIC_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    RATE_FIELD_NUMBER: _ClassVar[int]
    steps: int
    seconds: float
    best: int
    metric: str
    highest: bool
    age: float
    rate: float
    def __init__(self, steps: _Optional[int] = ..., seconds: _Optional[float] = ..., best: _Optional[int] = ..., metric: _Optional[str] = ..., highest: bool = ..., age: _Optional[float] = ..., rate: _Optional[float] = ...) -> None: ...

class RankLeft(_message.Message):
    __slots__ = ("job", "node", "attempt", "rank", "died", "detail")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DIED_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    rank: int
    died: bool
    detail: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., died: bool = ..., detail: _Optional[str] = ...) -> None: ...

class Announced(_message.Message):
    __slots__ = ("job", "attempt", "rank", "digest", "generation")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    rank: int
    digest: str
    generation: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., digest: _Optional[str] = ..., generation: _Optional[int] = ...) -> None: ...

class Progressed(_message.Message):
    __slots__ = ("job", "attempt", "node", "lowest", "highest", "blocked", "began", "behind", "phases")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    LOWEST_FIELD_NUMBER: _ClassVar[int]
    HIGHEST_FIELD_NUMBER: _ClassVar[int]
    BLOCKED_FIELD_NUMBER: _ClassVar[int]
    BEGAN_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    node: str
    lowest: int
    highest: int
    blocked: float
    began: int
    behind: _containers.RepeatedScalarFieldContainer[int]
    phases: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., node: _Optional[str] = ..., lowest: _Optional[int] = ..., highest: _Optional[int] = ..., blocked: _Optional[float] = ..., began: _Optional[int] = ..., behind: _Optional[_Iterable[int]] = ..., phases: _Optional[_Iterable[str]] = ...) -> None: ...

class Staged(_message.Message):
    __slots__ = ("job", "node", "epoch", "step", "attempt", "rank", "world_size", "nbytes", "aliases", "store", "ended", "again", "metrics", "copy")
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
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    COPY_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    epoch: int
    step: int
    attempt: int
    rank: int
    world_size: int
    nbytes: int
    aliases: _containers.ScalarMap[str, str]
    store: str
    ended: bool
    again: bool
    metrics: _containers.ScalarMap[str, str]
    copy: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., nbytes: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., store: _Optional[str] = ..., ended: bool = ..., again: bool = ..., metrics: _Optional[_Mapping[str, str]] = ..., copy: bool = ...) -> None: ...

class Durable(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank", "name", "nbytes", "extent", "digests", "columns", "segments")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    name: str
    nbytes: int
    extent: int
    digests: bytes
    columns: bytes
    segments: bytes
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., name: _Optional[str] = ..., nbytes: _Optional[int] = ..., extent: _Optional[int] = ..., digests: _Optional[bytes] = ..., columns: _Optional[bytes] = ..., segments: _Optional[bytes] = ...) -> None: ...

class ShardFailed(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank", "code", "what")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    code: str
    what: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., code: _Optional[str] = ..., what: _Optional[str] = ...) -> None: ...

class Skipped(_message.Message):
    __slots__ = ("job", "attempt", "epoch", "step", "rank", "why")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    epoch: int
    step: int
    rank: int
    why: str
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Dropped(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank", "node")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    node: str
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ...) -> None: ...

class Guarded(_message.Message):
    __slots__ = ("job", "node", "epoch", "step", "losses", "members", "world_size", "aliases", "store")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    epoch: int
    step: int
    losses: int
    members: _containers.RepeatedCompositeFieldContainer[Holder]
    world_size: int
    aliases: _containers.ScalarMap[str, str]
    store: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., losses: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., world_size: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., store: _Optional[str] = ...) -> None: ...

class Rebuilt(_message.Message):
    __slots__ = ("job", "node", "epoch", "step", "why")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    epoch: int
    step: int
    why: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., why: _Optional[str] = ...) -> None: ...

class Holder(_message.Message):
    __slots__ = ("node", "address", "ranks")
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    node: str
    address: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankRun]
    def __init__(self, node: _Optional[str] = ..., address: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankRun, _Mapping]]] = ...) -> None: ...

class LocalKept(_message.Message):
    __slots__ = ("job", "node", "epoch", "step", "attempt", "rank", "world_size", "nbytes", "aliases", "store", "ended", "again", "outcome", "metrics")
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
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    AGAIN_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    epoch: int
    step: int
    attempt: int
    rank: int
    world_size: int
    nbytes: int
    aliases: _containers.ScalarMap[str, str]
    store: str
    ended: bool
    again: bool
    outcome: _agent_pb2.Outcome
    metrics: _containers.ScalarMap[str, str]
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., nbytes: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., store: _Optional[str] = ..., ended: bool = ..., again: bool = ..., outcome: _Optional[_Union[_agent_pb2.Outcome, str]] = ..., metrics: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LocalDropped(_message.Message):
    __slots__ = ("job", "epoch", "step", "rank")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    rank: int
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class DurableWanted(_message.Message):
    __slots__ = ("job", "node", "epoch", "step", "left_local")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    LEFT_LOCAL_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    epoch: int
    step: int
    left_local: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., left_local: bool = ...) -> None: ...

class NodeJoined(_message.Message):
    __slots__ = ("job", "node", "node_rank", "min_nodes", "max_nodes", "nproc", "max_restarts", "address", "attempt", "first_rank", "doorbell", "world_size", "unfit", "clock", "crash_loop", "uptime", "grow", "bandwidth", "again")
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
    DOORBELL_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    UNFIT_FIELD_NUMBER: _ClassVar[int]
    CLOCK_FIELD_NUMBER: _ClassVar[int]
    CRASH_LOOP_FIELD_NUMBER: _ClassVar[int]
    UPTIME_FIELD_NUMBER: _ClassVar[int]
    GROW_FIELD_NUMBER: _ClassVar[int]
    BANDWIDTH_FIELD_NUMBER: _ClassVar[int]
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
    doorbell: int
    world_size: int
    unfit: str
    clock: float
    crash_loop: int
    uptime: float
    grow: float
    bandwidth: float
    again: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., node_rank: _Optional[int] = ..., min_nodes: _Optional[int] = ..., max_nodes: _Optional[int] = ..., nproc: _Optional[int] = ..., max_restarts: _Optional[int] = ..., address: _Optional[str] = ..., attempt: _Optional[int] = ..., first_rank: _Optional[int] = ..., doorbell: _Optional[int] = ..., world_size: _Optional[int] = ..., unfit: _Optional[str] = ..., clock: _Optional[float] = ..., crash_loop: _Optional[int] = ..., uptime: _Optional[float] = ..., grow: _Optional[float] = ..., bandwidth: _Optional[float] = ..., again: bool = ...) -> None: ...

class NodeReady(_message.Message):
    __slots__ = ("job", "node", "attempt", "port")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    port: int
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., port: _Optional[int] = ...) -> None: ...

class RankExited(_message.Message):
    __slots__ = ("job", "node", "attempt", "rank", "status", "detail")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    rank: int
    status: int
    detail: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., status: _Optional[int] = ..., detail: _Optional[str] = ...) -> None: ...

class NodeLeft(_message.Message):
    __slots__ = ("job", "node", "detail")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    detail: str
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class Rewound(_message.Message):
    __slots__ = ("job", "attempt", "count")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    count: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class StopRequested(_message.Message):
    __slots__ = ("job", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class Stalled(_message.Message):
    __slots__ = ("job", "node", "attempt", "rank", "phase", "step", "seconds", "threshold", "stopped")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    STOPPED_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    rank: int
    phase: str
    step: int
    seconds: float
    threshold: float
    stopped: bool
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ..., phase: _Optional[str] = ..., step: _Optional[int] = ..., seconds: _Optional[float] = ..., threshold: _Optional[float] = ..., stopped: bool = ...) -> None: ...

class Moved(_message.Message):
    __slots__ = ("job", "attempt", "rank")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    rank: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., rank: _Optional[int] = ...) -> None: ...

class Slowed(_message.Message):
    __slots__ = ("job", "node", "attempt", "step", "usual", "seconds")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    USUAL_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    step: int
    usual: float
    seconds: float
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., usual: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class Examined(_message.Message):
    __slots__ = ("job", "attempt", "incident", "node", "ranks", "nics", "round")
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    job: str
    attempt: int
    incident: str
    node: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankEvidence]
    nics: _containers.RepeatedScalarFieldContainer[str]
    round: int
    def __init__(self, job: _Optional[str] = ..., attempt: _Optional[int] = ..., incident: _Optional[str] = ..., node: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankEvidence, _Mapping]]] = ..., nics: _Optional[_Iterable[str]] = ..., round: _Optional[int] = ...) -> None: ...

class RankEvidence(_message.Message):
    __slots__ = ("rank", "pid", "phase", "step", "stalled", "state", "cpu", "waits_in", "answers", "enqueued", "completed", "collective", "stack", "native_stack", "log_tail", "notes", "threshold", "io_bytes", "children_cpu", "threads", "resident", "groups", "other_stacks", "asked")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    CPU_FIELD_NUMBER: _ClassVar[int]
    WAITS_IN_FIELD_NUMBER: _ClassVar[int]
    ANSWERS_FIELD_NUMBER: _ClassVar[int]
    ENQUEUED_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    STACK_FIELD_NUMBER: _ClassVar[int]
    NATIVE_STACK_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    IO_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_CPU_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    OTHER_STACKS_FIELD_NUMBER: _ClassVar[int]
    ASKED_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    phase: str
    step: int
    stalled: float
    state: str
    cpu: float
    waits_in: str
    answers: bool
    enqueued: int
    completed: int
    collective: str
    stack: str
    native_stack: str
    log_tail: str
    notes: _containers.RepeatedScalarFieldContainer[str]
    threshold: float
    io_bytes: int
    children_cpu: float
    threads: int
    resident: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupProgress]
    other_stacks: str
    asked: bool
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., phase: _Optional[str] = ..., step: _Optional[int] = ..., stalled: _Optional[float] = ..., state: _Optional[str] = ..., cpu: _Optional[float] = ..., waits_in: _Optional[str] = ..., answers: bool = ..., enqueued: _Optional[int] = ..., completed: _Optional[int] = ..., collective: _Optional[str] = ..., stack: _Optional[str] = ..., native_stack: _Optional[str] = ..., log_tail: _Optional[str] = ..., notes: _Optional[_Iterable[str]] = ..., threshold: _Optional[float] = ..., io_bytes: _Optional[int] = ..., children_cpu: _Optional[float] = ..., threads: _Optional[int] = ..., resident: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupProgress, _Mapping]]] = ..., other_stacks: _Optional[str] = ..., asked: bool = ...) -> None: ...

class GroupProgress(_message.Message):
    __slots__ = ("group", "enqueued", "completed", "collective")
    GROUP_FIELD_NUMBER: _ClassVar[int]
    ENQUEUED_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_FIELD_NUMBER: _ClassVar[int]
    COLLECTIVE_FIELD_NUMBER: _ClassVar[int]
    group: str
    enqueued: int
    completed: int
    collective: str
    def __init__(self, group: _Optional[str] = ..., enqueued: _Optional[int] = ..., completed: _Optional[int] = ..., collective: _Optional[str] = ...) -> None: ...

class Asked(_message.Message):
    __slots__ = ("id", "job", "node", "verb", "target", "reason", "seconds", "attempt", "at", "by")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    VERB_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    AT_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    id: str
    job: str
    node: str
    verb: Verb
    target: str
    reason: str
    seconds: float
    attempt: int
    at: float
    by: Caller
    def __init__(self, id: _Optional[str] = ..., job: _Optional[str] = ..., node: _Optional[str] = ..., verb: _Optional[_Union[Verb, str]] = ..., target: _Optional[str] = ..., reason: _Optional[str] = ..., seconds: _Optional[float] = ..., attempt: _Optional[int] = ..., at: _Optional[float] = ..., by: _Optional[_Union[Caller, _Mapping]] = ...) -> None: ...

class Caller(_message.Message):
    __slots__ = ("uid", "name", "node", "via")
    UID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    VIA_FIELD_NUMBER: _ClassVar[int]
    uid: int
    name: str
    node: str
    via: str
    def __init__(self, uid: _Optional[int] = ..., name: _Optional[str] = ..., node: _Optional[str] = ..., via: _Optional[str] = ...) -> None: ...

class Pausing(_message.Message):
    __slots__ = ("job", "version", "paused", "left", "attempt", "step", "by", "reason")
    JOB_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    job: str
    version: int
    paused: bool
    left: float
    attempt: int
    step: int
    by: str
    reason: str
    def __init__(self, job: _Optional[str] = ..., version: _Optional[int] = ..., paused: bool = ..., left: _Optional[float] = ..., attempt: _Optional[int] = ..., step: _Optional[int] = ..., by: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class NicSummary(_message.Message):
    __slots__ = ("job", "node", "attempt", "nics")
    JOB_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    job: str
    node: str
    attempt: int
    nics: _containers.RepeatedCompositeFieldContainer[NicReading]
    def __init__(self, job: _Optional[str] = ..., node: _Optional[str] = ..., attempt: _Optional[int] = ..., nics: _Optional[_Iterable[_Union[NicReading, _Mapping]]] = ...) -> None: ...

class NicReading(_message.Message):
    __slots__ = ("nic", "family", "sent", "received", "usual", "idle", "timeouts", "peer_timeouts", "retries", "failures", "exhausted", "uncorrected", "replays", "flaps", "paused_tx", "paused_rx", "stalled", "waits", "marks", "link", "link_down", "link_lost", "handler_absent", "handler_lost", "unanswered", "gone")
    NIC_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    USUAL_FIELD_NUMBER: _ClassVar[int]
    IDLE_FIELD_NUMBER: _ClassVar[int]
    TIMEOUTS_FIELD_NUMBER: _ClassVar[int]
    PEER_TIMEOUTS_FIELD_NUMBER: _ClassVar[int]
    RETRIES_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    EXHAUSTED_FIELD_NUMBER: _ClassVar[int]
    UNCORRECTED_FIELD_NUMBER: _ClassVar[int]
    REPLAYS_FIELD_NUMBER: _ClassVar[int]
    FLAPS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_TX_FIELD_NUMBER: _ClassVar[int]
    PAUSED_RX_FIELD_NUMBER: _ClassVar[int]
    STALLED_FIELD_NUMBER: _ClassVar[int]
    WAITS_FIELD_NUMBER: _ClassVar[int]
    MARKS_FIELD_NUMBER: _ClassVar[int]
    LINK_FIELD_NUMBER: _ClassVar[int]
    LINK_DOWN_FIELD_NUMBER: _ClassVar[int]
    LINK_LOST_FIELD_NUMBER: _ClassVar[int]
    HANDLER_ABSENT_FIELD_NUMBER: _ClassVar[int]
    HANDLER_LOST_FIELD_NUMBER: _ClassVar[int]
    UNANSWERED_FIELD_NUMBER: _ClassVar[int]
    GONE_FIELD_NUMBER: _ClassVar[int]
    nic: str
    family: str
    sent: float
    received: float
    usual: float
    idle: float
    timeouts: int
    peer_timeouts: int
    retries: int
    failures: int
    exhausted: int
    uncorrected: int
    replays: int
    flaps: int
    paused_tx: float
    paused_rx: float
    stalled: float
    waits: float
    marks: float
    link: str
    link_down: bool
    link_lost: bool
    handler_absent: bool
    handler_lost: bool
    unanswered: float
    gone: bool
    def __init__(self, nic: _Optional[str] = ..., family: _Optional[str] = ..., sent: _Optional[float] = ..., received: _Optional[float] = ..., usual: _Optional[float] = ..., idle: _Optional[float] = ..., timeouts: _Optional[int] = ..., peer_timeouts: _Optional[int] = ..., retries: _Optional[int] = ..., failures: _Optional[int] = ..., exhausted: _Optional[int] = ..., uncorrected: _Optional[int] = ..., replays: _Optional[int] = ..., flaps: _Optional[int] = ..., paused_tx: _Optional[float] = ..., paused_rx: _Optional[float] = ..., stalled: _Optional[float] = ..., waits: _Optional[float] = ..., marks: _Optional[float] = ..., link: _Optional[str] = ..., link_down: bool = ..., link_lost: bool = ..., handler_absent: bool = ..., handler_lost: bool = ..., unanswered: _Optional[float] = ..., gone: bool = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("job", "term", "epoch_allotted", "job_refused", "holders", "save_at", "stop_at", "save_ended", "snapshot_complete", "start", "stop", "end", "examine", "kill", "incident", "local_complete", "drain_shards", "protect", "rebuild", "answered", "pausing", "vacate")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    EPOCH_ALLOTTED_FIELD_NUMBER: _ClassVar[int]
    JOB_REFUSED_FIELD_NUMBER: _ClassVar[int]
    HOLDERS_FIELD_NUMBER: _ClassVar[int]
    SAVE_AT_FIELD_NUMBER: _ClassVar[int]
    STOP_AT_FIELD_NUMBER: _ClassVar[int]
    SAVE_ENDED_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    EXAMINE_FIELD_NUMBER: _ClassVar[int]
    KILL_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    LOCAL_COMPLETE_FIELD_NUMBER: _ClassVar[int]
    DRAIN_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PROTECT_FIELD_NUMBER: _ClassVar[int]
    REBUILD_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_FIELD_NUMBER: _ClassVar[int]
    PAUSING_FIELD_NUMBER: _ClassVar[int]
    VACATE_FIELD_NUMBER: _ClassVar[int]
    job: str
    term: int
    epoch_allotted: EpochAllotted
    job_refused: JobRefused
    holders: Holders
    save_at: SaveAt
    stop_at: StopAt
    save_ended: SaveEnded
    snapshot_complete: SnapshotComplete
    start: _agent_pb2.StartRanks
    stop: _agent_pb2.StopRanks
    end: _agent_pb2.JobEnd
    examine: Examine
    kill: Kill
    incident: Incident
    local_complete: LocalComplete
    drain_shards: DrainShards
    protect: Protect
    rebuild: Rebuild
    answered: Answered
    pausing: Pausing
    vacate: Vacate
    def __init__(self, job: _Optional[str] = ..., term: _Optional[int] = ..., epoch_allotted: _Optional[_Union[EpochAllotted, _Mapping]] = ..., job_refused: _Optional[_Union[JobRefused, _Mapping]] = ..., holders: _Optional[_Union[Holders, _Mapping]] = ..., save_at: _Optional[_Union[SaveAt, _Mapping]] = ..., stop_at: _Optional[_Union[StopAt, _Mapping]] = ..., save_ended: _Optional[_Union[SaveEnded, _Mapping]] = ..., snapshot_complete: _Optional[_Union[SnapshotComplete, _Mapping]] = ..., start: _Optional[_Union[_agent_pb2.StartRanks, _Mapping]] = ..., stop: _Optional[_Union[_agent_pb2.StopRanks, _Mapping]] = ..., end: _Optional[_Union[_agent_pb2.JobEnd, _Mapping]] = ..., examine: _Optional[_Union[Examine, _Mapping]] = ..., kill: _Optional[_Union[Kill, _Mapping]] = ..., incident: _Optional[_Union[Incident, _Mapping]] = ..., local_complete: _Optional[_Union[LocalComplete, _Mapping]] = ..., drain_shards: _Optional[_Union[DrainShards, _Mapping]] = ..., protect: _Optional[_Union[Protect, _Mapping]] = ..., rebuild: _Optional[_Union[Rebuild, _Mapping]] = ..., answered: _Optional[_Union[Answered, _Mapping]] = ..., pausing: _Optional[_Union[Pausing, _Mapping]] = ..., vacate: _Optional[_Union[Vacate, _Mapping]] = ...) -> None: ...

class Answered(_message.Message):
    __slots__ = ("id", "code", "what", "begun", "step", "bytes", "seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHAT_FIELD_NUMBER: _ClassVar[int]
    BEGUN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: str
    code: str
    what: str
    begun: bool
    step: int
    bytes: int
    seconds: float
    def __init__(self, id: _Optional[str] = ..., code: _Optional[str] = ..., what: _Optional[str] = ..., begun: bool = ..., step: _Optional[int] = ..., bytes: _Optional[int] = ..., seconds: _Optional[float] = ...) -> None: ...

class Vacate(_message.Message):
    __slots__ = ("on", "reason")
    ON_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    on: bool
    reason: str
    def __init__(self, on: bool = ..., reason: _Optional[str] = ...) -> None: ...

class Protect(_message.Message):
    __slots__ = ("epoch", "step", "attempt", "world_size", "aliases", "losses", "members")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    attempt: int
    world_size: int
    aliases: _containers.ScalarMap[str, str]
    losses: int
    members: _containers.RepeatedCompositeFieldContainer[Holder]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., losses: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ...) -> None: ...

class Rebuild(_message.Message):
    __slots__ = ("epoch", "step", "attempt", "world_size", "aliases", "losses", "members", "ranks")
    class AliasesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    attempt: int
    world_size: int
    aliases: _containers.ScalarMap[str, str]
    losses: int
    members: _containers.RepeatedCompositeFieldContainer[Holder]
    ranks: _containers.RepeatedCompositeFieldContainer[RankRun]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., attempt: _Optional[int] = ..., world_size: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ..., losses: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Holder, _Mapping]]] = ..., ranks: _Optional[_Iterable[_Union[RankRun, _Mapping]]] = ...) -> None: ...

class Examine(_message.Message):
    __slots__ = ("attempt", "incident", "ranks", "seconds", "round", "brief")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    INCIDENT_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    BRIEF_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    incident: str
    ranks: _containers.RepeatedScalarFieldContainer[int]
    seconds: float
    round: int
    brief: bool
    def __init__(self, attempt: _Optional[int] = ..., incident: _Optional[str] = ..., ranks: _Optional[_Iterable[int]] = ..., seconds: _Optional[float] = ..., round: _Optional[int] = ..., brief: bool = ...) -> None: ...

class Kill(_message.Message):
    __slots__ = ("attempt", "rank", "reason", "state")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    rank: int
    reason: str
    state: str
    def __init__(self, attempt: _Optional[int] = ..., rank: _Optional[int] = ..., reason: _Optional[str] = ..., state: _Optional[str] = ...) -> None: ...

class Incident(_message.Message):
    __slots__ = ("id", "job", "attempt", "kind", "opened", "sentence", "rank", "node", "confidence", "signals", "actions", "ranks", "nics", "step", "detected", "notes")
    ID_FIELD_NUMBER: _ClassVar[int]
    JOB_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    OPENED_FIELD_NUMBER: _ClassVar[int]
    SENTENCE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    CONFIDENCE_FIELD_NUMBER: _ClassVar[int]
    SIGNALS_FIELD_NUMBER: _ClassVar[int]
    ACTIONS_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    DETECTED_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    id: str
    job: str
    attempt: int
    kind: str
    opened: str
    sentence: str
    rank: int
    node: str
    confidence: float
    signals: _containers.RepeatedScalarFieldContainer[str]
    actions: _containers.RepeatedScalarFieldContainer[str]
    ranks: _containers.RepeatedCompositeFieldContainer[RankEvidence]
    nics: _containers.RepeatedScalarFieldContainer[str]
    step: int
    detected: float
    notes: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[str] = ..., job: _Optional[str] = ..., attempt: _Optional[int] = ..., kind: _Optional[str] = ..., opened: _Optional[str] = ..., sentence: _Optional[str] = ..., rank: _Optional[int] = ..., node: _Optional[str] = ..., confidence: _Optional[float] = ..., signals: _Optional[_Iterable[str]] = ..., actions: _Optional[_Iterable[str]] = ..., ranks: _Optional[_Iterable[_Union[RankEvidence, _Mapping]]] = ..., nics: _Optional[_Iterable[str]] = ..., step: _Optional[int] = ..., detected: _Optional[float] = ..., notes: _Optional[_Iterable[str]] = ...) -> None: ...

class EpochAllotted(_message.Message):
    __slots__ = ("attempt", "epoch", "code", "why", "rewinds")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    REWINDS_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    epoch: int
    code: str
    why: str
    rewinds: int
    def __init__(self, attempt: _Optional[int] = ..., epoch: _Optional[int] = ..., code: _Optional[str] = ..., why: _Optional[str] = ..., rewinds: _Optional[int] = ...) -> None: ...

class JobRefused(_message.Message):
    __slots__ = ("attempt", "code", "why")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    code: str
    why: str
    def __init__(self, attempt: _Optional[int] = ..., code: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class Holders(_message.Message):
    __slots__ = ("attempt", "groups", "generation")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    groups: _containers.RepeatedCompositeFieldContainer[HolderGroup]
    generation: int
    def __init__(self, attempt: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[HolderGroup, _Mapping]]] = ..., generation: _Optional[int] = ...) -> None: ...

class HolderGroup(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RankRun]
    def __init__(self, runs: _Optional[_Iterable[_Union[RankRun, _Mapping]]] = ...) -> None: ...

class RankRun(_message.Message):
    __slots__ = ("first", "count", "step")
    FIRST_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    first: int
    count: int
    step: int
    def __init__(self, first: _Optional[int] = ..., count: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class SaveAt(_message.Message):
    __slots__ = ("attempt", "step")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    step: int
    def __init__(self, attempt: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class StopAt(_message.Message):
    __slots__ = ("attempt", "step", "reason")
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    attempt: int
    step: int
    reason: str
    def __init__(self, attempt: _Optional[int] = ..., step: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class SaveEnded(_message.Message):
    __slots__ = ("outcome",)
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    outcome: _agent_pb2.SaveOutcome
    def __init__(self, outcome: _Optional[_Union[_agent_pb2.SaveOutcome, _Mapping]] = ...) -> None: ...

class SnapshotComplete(_message.Message):
    __slots__ = ("epoch", "step", "world_size", "aliases")
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
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    world_size: int
    aliases: _containers.ScalarMap[str, str]
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ..., world_size: _Optional[int] = ..., aliases: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LocalComplete(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class DrainShards(_message.Message):
    __slots__ = ("epoch", "step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step: int
    def __init__(self, epoch: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ListCompleteRequest(_message.Message):
    __slots__ = ("job", "term")
    JOB_FIELD_NUMBER: _ClassVar[int]
    TERM_FIELD_NUMBER: _ClassVar[int]
    job: str
    term: int
    def __init__(self, job: _Optional[str] = ..., term: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("job", "epoch", "step", "ranks", "parity")
    JOB_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    job: str
    epoch: int
    step: int
    ranks: _containers.RepeatedCompositeFieldContainer[RankRun]
    parity: bool
    def __init__(self, job: _Optional[str] = ..., epoch: _Optional[int] = ..., step: _Optional[int] = ..., ranks: _Optional[_Iterable[_Union[RankRun, _Mapping]]] = ..., parity: bool = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("ticket", "address", "shards", "parity", "key")
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    PARITY_FIELD_NUMBER: _ClassVar[int]
    KEY_FIELD_NUMBER: _ClassVar[int]
    ticket: str
    address: str
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    parity: Parity
    key: str
    def __init__(self, ticket: _Optional[str] = ..., address: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ..., parity: _Optional[_Union[Parity, _Mapping]] = ..., key: _Optional[str] = ...) -> None: ...

class Shard(_message.Message):
    __slots__ = ("rank", "nbytes", "extent", "digests")
    RANK_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    EXTENT_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    rank: int
    nbytes: int
    extent: int
    digests: bytes
    def __init__(self, rank: _Optional[int] = ..., nbytes: _Optional[int] = ..., extent: _Optional[int] = ..., digests: _Optional[bytes] = ...) -> None: ...

class Parity(_message.Message):
    __slots__ = ("losses", "nbytes", "digests", "members")
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    losses: int
    nbytes: int
    digests: bytes
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, losses: _Optional[int] = ..., nbytes: _Optional[int] = ..., digests: _Optional[bytes] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("node", "shards")
    NODE_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    node: str
    shards: _containers.RepeatedCompositeFieldContainer[Shard]
    def __init__(self, node: _Optional[str] = ..., shards: _Optional[_Iterable[_Union[Shard, _Mapping]]] = ...) -> None: ...
