"""All that can be set, section by section; `config` says where a value comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec

from ckptsvc.quantities import (
    ALL,
    Address,
    Every,
    Limit,
    parse_accounts,
    parse_address,
    parse_address_or_off,
    parse_directory_or_off,
    parse_duration,
    parse_duration_or_off,
    parse_every,
    parse_limit,
    parse_names,
    parse_rate_or_off,
    parse_size,
    parse_tables,
    parse_umask,
    parse_variables,
)

LONGEST_REBUILD = 3600.0
"""Seconds that tiers.rebuild may be."""

SLOWEST_PARTNER = 1 << 20
"""Bytes per second that tiers.partner_rate must be: whoever sends takes one that reads nothing for minutes as gone."""


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[agent]: the service on each node.

    Attributes:
        socket_dir: directory of the unix sockets; "" means `runtime_dir`.
        listen: where other agents reach this one.
        metrics_listen: where Prometheus and browsers reach this one, or "off"; beyond loopback it takes [tls].
        http_token_file: holds the token that they show; "" means http-token in the directory of the sockets, which is
            made. For a Prometheus of another user, a file that its group may read.
        name: name of the node; "" means the one its scheduler or the host gives it.
        coordinator: the agent that decides, or "off": the agents elect one.
        coordination: where agents elect the coordinators of their jobs, "etcd://host:port,host:port/prefix"; "" means
            that the agent whose address `ckptsvc run` was given coordinates.
        incidents_dir: where incidents are kept; "" means ckptsvc/incidents in $XDG_STATE_HOME (~/.local/state).
        audit_file: where it is taken down who has ordered what; "" means ckptsvc/audit.jsonl there.
    """

    socket_dir: str = ""
    listen: Annotated[Address, parse_address] = Address("127.0.0.1", 0)
    metrics_listen: Annotated[Address | None, parse_address_or_off] = Address("127.0.0.1", 0)
    http_token_file: str = ""
    name: str = ""
    coordinator: Annotated[Address | None, parse_address_or_off] = None
    coordination: str = ""
    incidents_dir: str = ""
    audit_file: str = ""


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[etcd]: how to speak to the etcd of agent.coordination.

    Attributes:
        ttl: how long a coordinator's lease lives without it (whole seconds; etcd may make it longer).
        user: whom to log in as.
        password_file: with what; readable by its owner alone.
        ca_file: certificates (PEM) of those who sign etcd's; "" means a connection that is not encrypted.
        cert_file: our own certificate, where etcd wants one.
        key_file: its key; readable by its owner alone.
    """

    ttl: Annotated[float, parse_duration] = 3.0
    user: str = ""
    password_file: str = ""
    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""


class SystemSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[system]: one service for all users of a node (`ckptsvc agent --system`).

    What it limits is fair among jobs that keep to it; what a user's processes can take without it, the kernel limits.

    Attributes:
        directory: where it listens; root owns it. Those who look for it look there too.
        users: who may use it: names, numbers, "@group"; "" means all whose number is at least `min_uid`, and root.
        min_uid: lower numbers are of the system's own accounts, which must be named in `users`.
        operators: who, besides root, hears of the agents of all users: names, numbers, "@group". To give them orders
            he becomes root by sudo(8), and the audit log names him.
        metrics_group: who may read `directory`/metrics/targets.json, which lets a Prometheus read the metrics of all
            agents: a group, as a rule Prometheus's own. "" means that there is no such file.
        audit_file: where it is taken down what root orders of users' agents; "" means nowhere but in their audit logs,
            which are theirs.
        max_users: agents at a time.
        user_memory: what the arenas of one user may take; a share is one of arena.limit. Where more users have jobs
            than this leaves room for, each may take an even part. store.max_write_rate is divided among them anyway.
        user_jobs: jobs that one user may have on the node at a time.
        user_ranks: ranks of his jobs, together.
        linger: how long an agent stays that has nothing to do.
        umask: of what agents write, in octal.
        environment: names of variables, comma-separated, that agents get from the service's own environment.
    """

    directory: str = "/run/ckptsvc"
    users: Annotated[tuple[str, ...], parse_accounts] = ()
    min_uid: Annotated[int, msgspec.Meta(ge=1, lt=1 << 32)] = 1000
    operators: Annotated[tuple[str, ...], parse_accounts] = ()
    metrics_group: str = ""
    audit_file: str = "/var/lib/ckptsvc/audit.jsonl"
    max_users: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 128
    user_memory: Annotated[Limit, parse_limit] = Limit(0, 0.5)
    user_jobs: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 64
    user_ranks: Annotated[int, msgspec.Meta(ge=1, le=65536)] = 1024
    linger: Annotated[float, parse_duration] = 600.0
    umask: Annotated[int, parse_umask] = 0o022
    environment: Annotated[tuple[str, ...], parse_variables] = ()


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[tls]: certificates by which agents of several hosts know each other; without them, all are on one host.

    Attributes:
        ca_file: certificates (PEM) of those who sign them.
        cert_file: this user's own, with the name <user>.user.ckptsvc; read anew when it changes. "{user}" in its path
            stands for the user's name, in that of the key too.
        key_file: its key; readable by its owner alone.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""

    def of(self, user: str) -> TlsSettings:
        """Those of one user."""
        cert_file, key_file = (path.replace("{user}", user) for path in (self.cert_file, self.key_file))
        return TlsSettings(ca_file=self.ca_file, cert_file=cert_file, key_file=key_file)

    @property
    def is_set(self) -> bool:
        """Whether there are any."""
        return bool(self.cert_file)


class ArenaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[arena]: the shared memory that snapshots live in.

    Attributes:
        dir: a directory in memory (tmpfs).
        limit: what all arenas of the node together may take; a share is one of the file system's size.
        slots: arenas per rank. With one, no snapshot can be taken while the last one is still being written.
        job_limit: what the arenas of one job may take; a share is one of `limit`. While several jobs have ranks on the
            node, none gets more new arenas than make its even part of `limit`.
    """

    dir: str = "/dev/shm"
    limit: Annotated[Limit, parse_limit] = Limit(0, 0.5)
    slots: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    job_limit: Annotated[Limit, parse_limit] = ALL


class SaveSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[save]: when snapshots are taken, and how they become checkpoints.

    Attributes:
        every: interval between snapshots: steps, a duration, or "off".
        keep: newest committed checkpoints that are left in the store; 0 leaves all.
        extent: bytes per checksum; a multiple of the page size, 4096.
        threads: writers per shard.
        deadline: seconds the training loop may wait for a free arena before the snapshot is skipped.
        timeout: seconds after which a save that has not committed is given up.
        early_cores: a large snapshot is written while it is copied on nodes with at least so many cores; on fewer, the
            writing slows the copy down, for which the training waits.
        incremental: write only what has changed since the newest checkpoint, and refer to its files for the rest.
        full_every: then one of so many checkpoints in a row is whole: as many hang on one file at most.
        compression: "off"; "zstd": compress what is written; "auto": where that is measured to be done sooner. Extents
            of more than 4 MiB are not compressed.
        compression_level: of zstandard.
    """

    every: Annotated[Every | None, parse_every] = Every(0, 600.0)
    keep: Annotated[int, msgspec.Meta(ge=0)] = 0
    extent: Annotated[int, parse_size] = 1024 * 1024
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    deadline: Annotated[float, parse_duration] = 1.0
    timeout: Annotated[float, parse_duration] = 1800.0
    early_cores: Annotated[int, msgspec.Meta(ge=1)] = 8
    incremental: bool = False
    full_every: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 16
    compression: Literal["off", "auto", "zstd"] = "off"
    compression_level: Annotated[int, msgspec.Meta(ge=1, le=19)] = 1


class RetentionSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[retention]: which checkpoints stay besides the newest `save.keep`. With save.keep = 0 all do.

    Attributes:
        every: one for each so many steps, or each duration, for good; or "off".
        best: so many with the best values of `metric`.
        metric: name of a value that the training gives: run.step(metrics={"loss": ...}).
        order: which of its values are the best.
        age: those that are younger, or "off". A job counts that from commit to commit; of a time in which the run
            rested, an eighth of this at most.
        rate: objects that are deleted in a second; 0: as many as the store lets.
    """

    every: Annotated[Every | None, parse_every] = None
    best: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)] = 0
    metric: Annotated[str, msgspec.Meta(max_length=100)] = ""
    order: Literal["lowest", "highest"] = "lowest"
    age: Annotated[float | None, parse_duration_or_off] = None
    rate: Annotated[float, msgspec.Meta(ge=0, lt=1e9)] = 100.0


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[scheduler]: what is done because of, or asked of, Slurm or PBS.

    Attributes:
        margin: a job saves and stops by itself so long before the end of its time, where that is known, or "off".
        drain: ask the scheduler to give a bad node to no further job; that needs an operator's rights.
    """

    margin: Annotated[float | None, parse_duration_or_off] = 30.0
    drain: bool = False


class LaunchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[launch]: how `ckptsvc run` starts ranks.

    Attributes:
        standby: keep one warm interpreter on each node, from which all its ranks are forked, at the start and at every
            restart. Only for commands that are a Python script or module.
        preload: what it imports, comma-separated; it is of no use without the first.
        standby_memory: the most memory it may take; with more, ranks are started without it.
        preflight: check a node before it takes part in a job.
        grow: how long a job that runs on fewer nodes than it may waits for its next checkpoint before it starts anew
            with those that have come; "off": they wait for the next restart.
        crash_loop: failed attempts in a row without a newer step to restore that end a job; 0: they never do.
        state: directory in which the list of nodes that have failed is kept from job to job, best on a file system that
            all nodes share; "" means $XDG_STATE_HOME/ckptsvc or ~/.local/state/ckptsvc.
    """

    standby: bool = True
    preload: Annotated[tuple[str, ...], parse_names] = (
        "torch", "torch._dynamo", "ckptsvc.client.session", "grpc.experimental", "ckptsvc_drivers.posix",
    )  # fmt: skip
    standby_memory: Annotated[int, parse_size] = 2 << 30
    preflight: bool = True
    grow: Annotated[float | None, parse_duration_or_off] = 600.0
    crash_loop: Annotated[int, msgspec.Meta(ge=0)] = 3
    state: str = ""


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[store]: where checkpoints are kept.

    Attributes:
        url: for example "file:///scratch/run7" or a bare path; "" means that the caller names one.
        retries: further attempts after a failure that may pass.
        timeout: seconds one request to an object store may take. (A call into a file system, or DAOS, cannot be ended:
            where one hangs, `save.timeout` gives the save up.)
        options: for the drivers, a table for each scheme: [store.options.s3]; see storage_drivers/README.md. In the
            environment as one line of JSON or TOML: {"s3": {"region": "eu-west-1"}}.
        max_write_rate: bytes per second that a node may write to the store, all its jobs together, or "off".
    """

    url: str = ""
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    timeout: Annotated[float, parse_duration] = 60.0
    options: Annotated[dict[str, dict[str, Any]], parse_tables] = {}
    max_write_rate: Annotated[int | None, parse_rate_or_off] = None


class TierSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[tiers]: what is kept of snapshots between the memory of their node and the durable store.

    Attributes:
        partner: what other nodes keep in their memory: "copy" (of all, on one of them), "xor" or "rs" (parity against
            the loss of one node, or of two, of each group), or "off".
        group: the fewest nodes that keep parity for each other.
        domain: this node's failure domain, a word that nodes share which may be lost together; "auto": its switch or
            chassis, where the scheduler or the node's name tells. Where an agent knows none, its ranks' is taken.
        partner_every: every how many snapshots.
        replicas: with "copy": ranks put what they hold as replicas of the other node's state into the copy themselves,
            when they take a snapshot: the network is spared, and the training waits for twice the bytes.
        partner_rate: bytes per second that this node reads from others for it, but for a rebuild; 0: as many as come.
        rebuild: how long a restore waits for what is rebuilt from parity before an older checkpoint has to do.
        local: a directory on a disk of each node, to which every snapshot is written first, or "off". It is made where
            it is missing, unless what it is to lie in is missing too.
        local_keep: newest snapshots that stay there, where there is room for them.
        local_limit: what an agent's snapshots may take there, or those of all users of a system service together; a
            share is one of the file system's size.
        durable_every: the first of so many snapshots goes on to the durable store, the others stay local.
        durable_backlog: so many may wait to be written there; when it is behind by more, only the newest is.
    """

    partner: Literal["off", "copy", "xor", "rs"] = "off"
    group: Annotated[int, msgspec.Meta(ge=2, le=64)] = 4
    domain: str = "auto"
    partner_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    replicas: bool = False
    partner_rate: Annotated[int, parse_size] = 1 << 30
    rebuild: Annotated[float, parse_duration] = 60.0
    local: Annotated[str, parse_directory_or_off] = ""
    local_keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    local_limit: Annotated[Limit, parse_limit] = Limit(0, 0.5)
    durable_every: Annotated[int, msgspec.Meta(ge=1)] = 1
    durable_backlog: Annotated[int, msgspec.Meta(ge=1)] = 2


class HealthSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[health]: when a rank hangs, and what is done about it.

    Attributes:
        enabled: watch for ranks that make no progress.
        automatic: in which jobs the rank that is to blame is killed: "launched" (by `ckptsvc run`, which starts it
            again), "always", or "never": then it is only reported.
        floor: time without progress that is never a stall.
        factor: a stall is longer than so many times the 99th percentile of the job's own steps (of its own evaluations,
            and so on, by phase).
        startup: how long a phase that the job has little experience with may be without progress.
        confirm: how long a rank that is to blame, and whose process is neither stopped nor gone, must stand still
            before it is killed. Work that takes longer than this and is no step should be declared (`Session.phase`).
        give_up: how long all ranks must stand still until they are started anew, though nobody can be blamed.
    """

    enabled: bool = True
    automatic: Literal["launched", "always", "never"] = "launched"
    floor: Annotated[float, parse_duration] = 4.0
    factor: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 3.0
    startup: Annotated[float, parse_duration] = 600.0
    confirm: Annotated[float, parse_duration] = 120.0
    give_up: Annotated[float, parse_duration] = 1800.0


class NicsSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[nics]: the watch over the node's network cards.

    Attributes:
        enabled: read their counters once a second; a node without such cards has nothing to read.
        root: directory that stands for "/" when /sys and /run are looked up (containers, tests).
    """

    enabled: bool = True
    root: str = "/"


class LogSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[log]: what agents, their workers, launchers and sessions write to standard error.

    Attributes:
        format: "text": lines for people; "json": one object a line.
        level: which lines: these, and worse ones.
    """

    format: Literal["text", "json"] = "text"
    level: Literal["debug", "info", "warning", "error"] = "info"


class TraceSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[traces]: OpenTelemetry spans of saves and restarts; needs the extra `traces`.

    Attributes:
        endpoint: of a collector that speaks OTLP over gRPC, "http://host:4317" or "https://..."; "" means none.
        ratio: the share of saves and restarts of which there are traces; the same ones on all nodes.
        ca_file: certificates (PEM) of those who sign the collector's; "" means the system's.
    """

    endpoint: str = ""
    ratio: Annotated[float, msgspec.Meta(ge=0, le=1)] = 1.0
    ca_file: str = ""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, validated.

    Attributes:
        origin: where each value came from, by "section.key": "default", the path of a file, the name of an
            environment variable, or "argument".
    """

    agent: AgentSettings = AgentSettings()
    system: SystemSettings = SystemSettings()
    tls: TlsSettings = TlsSettings()
    arena: ArenaSettings = ArenaSettings()
    save: SaveSettings = SaveSettings()
    retention: RetentionSettings = RetentionSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    store: StoreSettings = StoreSettings()
    tiers: TierSettings = TierSettings()
    health: HealthSettings = HealthSettings()
    nics: NicsSettings = NicsSettings()
    etcd: EtcdSettings = EtcdSettings()
    launch: LaunchSettings = LaunchSettings()
    log: LogSettings = LogSettings()
    traces: TraceSettings = TraceSettings()
    origin: dict[str, str] = {}


def problems(tiers: TierSettings) -> Iterator[tuple[str, str]]:
    """What is wrong with them together: key, and the rest of the sentence."""
    if tiers.partner == "rs" and tiers.group < 3:
        yield "tiers.group", f'is {tiers.group}; with tiers.partner = "rs", it takes 3 nodes to lose 2'
    if tiers.replicas and (tiers.partner != "copy" or tiers.partner_every != 1):
        yield "tiers.replicas", 'needs tiers.partner = "copy", and tiers.partner_every = 1'
    if 0 < tiers.partner_rate < SLOWEST_PARTNER:
        yield "tiers.partner_rate", f"is {tiers.partner_rate} bytes a second, less than 1 MiB and not 0"
    if not 0 <= tiers.rebuild <= LONGEST_REBUILD:
        yield "tiers.rebuild", f"is {tiers.rebuild:g} s, more than {LONGEST_REBUILD:g} s"
