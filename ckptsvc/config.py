"""Settings: what may be set, where a value comes from, and the directory the service's sockets live in.

A value is taken from the last of these that has one:

    default < /etc/ckptsvc/config.toml < $XDG_CONFIG_HOME/ckptsvc/config.toml < $CKPTSVC_CONFIG
            < environment variable CKPTSVC_<SECTION>_<KEY> < flag or argument

`Settings.origin` says which one it was. An unknown key is refused together with the nearest right one: a
setting that is silently ignored is found out on the day the checkpoint it was about is missing.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn, get_args, get_origin

import msgspec

from ckptsvc import tiers
from ckptsvc.errors import ConfigError
from ckptsvc.quantities import (
    Address,
    Every,
    Limit,
    parse_address,
    parse_address_or_off,
    parse_duration,
    parse_duration_or_off,
    parse_every,
    parse_limit,
    parse_names,
    parse_size,
)

SYSTEM_FILE = Path("/etc/ckptsvc/config.toml")

OTHER_VARIABLES: dict[str, str] = {
    "CKPTSVC_CONFIG": "one more settings file; it must exist",
    "CKPTSVC_JOB": "id of the job (launch/)",
    "CKPTSVC_ATTEMPT": "number of this incarnation of the job's ranks (launch/)",
    "CKPTSVC_NODE": "name of this node (launch/)",
    "CKPTSVC_DEADLINE": "when the scheduler will end the job, in unix seconds (launch/)",
    "CKPTSVC_SOCKET": "directory of the agent to use (set by `ckptsvc run` for its ranks)",
    "CKPTSVC_COORDINATOR": "address of the job's coordinator (set by `ckptsvc run` for its ranks)",
    "CKPTSVC_WARM": "what a warm interpreter is to do (set by `ckptsvc run` for its own; agent/warm)",
    "CKPTSVC_FAILPOINT": "directory of armed failpoints (tests; pipeline/failpoint.py)",
}
"""Every variable CKPTSVC_* that has a meaning and is not a setting."""

PAGE = 4096

# Kubernetes puts such variables into every pod of a namespace that has a service called "ckptsvc...".
_KUBERNETES_LINK = re.compile(r"CKPTSVC_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_\w+)?)")


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[agent]: the service on each node.

    Attributes:
        socket_dir: directory of the unix sockets; "" means `runtime_dir`.
        listen: where other agents reach this one.
        metrics_listen: where Prometheus and browsers reach this one, or "off".
        name: name of the node; "" means the one its scheduler or the host gives it.
        coordinator: the agent that decides, or "off": the agents elect one.
        coordination: where agents elect the coordinators of their jobs, "etcd://host:port,host:port/prefix"; "" means
            that the agent whose address `ckptsvc run` was given coordinates.
        incidents_dir: where incidents are kept; "" means ckptsvc/incidents in $XDG_STATE_HOME (~/.local/state).
    """

    socket_dir: str = ""
    listen: Annotated[Address, parse_address] = Address("127.0.0.1", 0)
    metrics_listen: Annotated[Address | None, parse_address_or_off] = Address("127.0.0.1", 0)
    name: str = ""
    coordinator: Annotated[Address | None, parse_address_or_off] = None
    coordination: str = ""
    incidents_dir: str = ""


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


class ArenaSettings(msgspec.Struct, frozen=True, kw_only=True):
    """[arena]: the shared memory that snapshots live in.

    Attributes:
        dir: a directory in memory (tmpfs).
        limit: what all arenas of the node together may take; a share is one of the file system's size.
        slots: arenas per rank. With one, no snapshot can be taken while the last one is still being written.
    """

    dir: str = "/dev/shm"
    limit: Annotated[Limit, parse_limit] = Limit(0, 0.5)
    slots: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2


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
    """

    every: Annotated[Every | None, parse_every] = Every(0, 600.0)
    keep: Annotated[int, msgspec.Meta(ge=0)] = 0
    extent: Annotated[int, parse_size] = 1024 * 1024
    threads: Annotated[int, msgspec.Meta(ge=1, le=64)] = 4
    deadline: Annotated[float, parse_duration] = 1.0
    timeout: Annotated[float, parse_duration] = 1800.0
    early_cores: Annotated[int, msgspec.Meta(ge=1)] = 8


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
        timeout: seconds one request may take.
    """

    url: str = ""
    retries: Annotated[int, msgspec.Meta(ge=0, le=100)] = 5
    timeout: Annotated[float, parse_duration] = 60.0


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


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings, validated.

    Attributes:
        origin: where each value came from, by "section.key": "default", the path of a file, the name of an
            environment variable, or "argument".
    """

    agent: AgentSettings = AgentSettings()
    arena: ArenaSettings = ArenaSettings()
    save: SaveSettings = SaveSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    store: StoreSettings = StoreSettings()
    tiers: tiers.TierSettings = tiers.TierSettings()
    health: HealthSettings = HealthSettings()
    nics: NicsSettings = NicsSettings()
    etcd: EtcdSettings = EtcdSettings()
    launch: LaunchSettings = LaunchSettings()
    origin: dict[str, str] = {}


_SECTIONS = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.name != "origin"}
_FIELDS = {
    f"{section}.{field.name}": field
    for section, struct in _SECTIONS.items()
    for field in msgspec.structs.fields(struct)
}
_VARIABLES = {f"CKPTSVC_{key.replace('.', '_').upper()}": key for key in _FIELDS}


def load(
    environ: Mapping[str, str],
    overrides: Mapping[str, object] | None = None,
    files: Sequence[Path] | None = None,
) -> Settings:
    """Read every source and make the settings of this process.

    Args:
        environ: the environment; empty variables count as unset.
        overrides: values by "section.key" from flags or arguments; None means that it was not given.
        files: the TOML files to read, later ones winning; None means those of `config_files`.

    Raises:
        ConfigError: a file cannot be read, a key is unknown, or a value is wrong; says which and from where.
    """
    found: dict[str, tuple[object, str]] = {}
    for path in config_files(environ) if files is None else files:
        found.update(_read_file(path))
    found.update(_read_environment(environ))
    for key, value in (overrides or {}).items():
        if key not in _FIELDS:
            _refuse_key(key, _FIELDS, "argument")
        if value is not None:
            found[key] = (value, "argument")

    values: dict[str, dict[str, object]] = {section: {} for section in _SECTIONS}
    for key, (value, origin) in found.items():
        section, _, name = key.partition(".")
        values[section][name] = _parse(key, value, origin)
    settings = msgspec.structs.replace(
        Settings(),
        origin={key: found[key][1] if key in found else "default" for key in _FIELDS},
        **{section: struct(**values[section]) for section, struct in _SECTIONS.items()},
    )
    _check(settings)
    return settings


def config_files(environ: Mapping[str, str]) -> list[Path]:
    """The files to read, later ones winning: those that exist, and the one that CKPTSVC_CONFIG names."""
    home = environ.get("XDG_CONFIG_HOME") or (f"{environ['HOME']}/.config" if environ.get("HOME") else "")
    optional = [SYSTEM_FILE]
    if home.startswith("/"):  # a relative one is to be ignored: XDG base directory specification
        optional.append(Path(home, "ckptsvc", "config.toml"))
    named = environ.get("CKPTSVC_CONFIG")
    # os.path: Path.exists() raises where a directory above may not be read
    return [path for path in optional if os.path.exists(path)] + ([Path(named)] if named else [])


def _read_file(path: Path) -> Iterator[tuple[str, tuple[object, str]]]:
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", hint="settings files must be readable") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise ConfigError(f"{path}: {error}") from error
    for section, table in document.items():
        if section not in _SECTIONS:
            _refuse_key(section, _SECTIONS, str(path))
        if not isinstance(table, dict):
            raise ConfigError(f"{section} in {path} is not a table", hint=f"write [{section}]")
        for name, value in table.items():
            key = f"{section}.{name}"
            if key not in _FIELDS:
                _refuse_key(key, _FIELDS, str(path))
            yield key, (value, str(path))


def _read_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, tuple[object, str]]]:
    for variable, value in environ.items():
        if variable in _VARIABLES:
            if value:
                yield _VARIABLES[variable], (value, variable)
        elif _is_mistaken(variable):
            _refuse_key(variable, _VARIABLES, "environment")


def _is_mistaken(variable: str) -> bool:
    """Whether an unknown variable was meant to be a setting.

    Others are let pass: environment modules set <PACKAGE>_ROOT, <PACKAGE>_VERSION and the like.
    """
    if variable in OTHER_VARIABLES or _KUBERNETES_LINK.fullmatch(variable):
        return False
    if any(f"{variable}_".startswith(f"CKPTSVC_{section.upper()}_") for section in _SECTIONS):
        return True
    return variable.startswith("CKPTSVC_") and bool(difflib.get_close_matches(variable, _VARIABLES, 1, 0.9))


def _refuse_key(key: str, known: Mapping[str, object], origin: str) -> NoReturn:
    nearest = [name for name in known if name.startswith(key)] or difflib.get_close_matches(key, known, 1, 0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"known are {', '.join(known)}"
    raise ConfigError(f"unknown setting {key} ({origin})", hint=hint)


def _parse(key: str, value: object, origin: str) -> object:
    """One value as its field wants it; a number may be text, for an environment holds nothing else."""
    kind = _FIELDS[key].type
    parser: Callable[[object], object] | None = next(filter(callable, get_args(kind)[1:]), None)
    try:
        return parser(value) if parser else msgspec.convert(value, kind, strict=False)
    except ConfigError as error:
        raise ConfigError(f"{key} ({origin}): {error.what}", hint=error.hint) from None
    except msgspec.ValidationError as error:
        hint = f"one of {', '.join(get_args(kind))}" if get_origin(kind) is Literal else ""
        raise ConfigError(f"{key} ({origin}) is {value!r}: {error}", hint=hint) from None


def _check(settings: Settings) -> None:
    """What one value alone cannot show."""

    def refuse(key: str, problem: str) -> NoReturn:
        raise ConfigError(f"{key} ({settings.origin[key]}) {problem}")

    agent, arena, save, health = settings.agent, settings.arena, settings.save, settings.health
    if agent.socket_dir and not os.path.isabs(agent.socket_dir):
        refuse("agent.socket_dir", f"is {agent.socket_dir!r}, which is not an absolute path")
    if agent.incidents_dir and not os.path.isabs(agent.incidents_dir):
        refuse("agent.incidents_dir", f"is {agent.incidents_dir!r}, which is not an absolute path")
    if settings.launch.state and not os.path.isabs(settings.launch.state):
        refuse("launch.state", f"is {settings.launch.state!r}, which is not an absolute path")
    if not os.path.isabs(arena.dir):
        refuse("arena.dir", f"is {arena.dir!r}, which is not an absolute path")
    if not os.path.isabs(settings.nics.root):
        refuse("nics.root", f"is {settings.nics.root!r}, which is not an absolute path")
    if not 2 <= settings.etcd.ttl <= 60:
        refuse("etcd.ttl", f"is {settings.etcd.ttl:g} s, not 2 to 60")
    if save.extent == 0 or save.extent % PAGE:
        refuse("save.extent", f"is {save.extent} bytes, which is not a multiple of {PAGE}")
    if save.deadline >= save.timeout:
        refuse("save.deadline", f"is {save.deadline:g} s, not less than save.timeout, {save.timeout:g} s")
    for key, problem in tiers.problems(settings.tiers):
        refuse(key, problem)
    for key in ("floor", "startup", "confirm", "give_up"):
        if getattr(health, key) == 0:
            refuse(f"health.{key}", 'is 0; to switch the watch off, set health.enabled to "false"')


def runtime_dir(environ: Mapping[str, str], *, uid: int | None = None, root: Path = Path("/")) -> Path:
    """The private directory that holds the sockets of this user's agent, made if need be.

    $RUNTIME_DIRECTORY (systemd made it), else /run/user/UID/ckptsvc if somebody made that, else
    /tmp/ckptsvc-UID. It is not made in /run/user/UID, which comes and goes with the user's logins, while jobs
    stay; nor in $TMPDIR, which schedulers make long and different for each job.

    Args:
        environ: the environment.
        uid: the user; None means the effective user of this process.
        root: stands for "/" (tests).

    Raises:
        ConfigError: the directory is not one, belongs to another user, or is open to others.
    """
    uid = os.geteuid() if uid is None else uid
    if given := environ.get("RUNTIME_DIRECTORY"):
        directory = Path(given.split(":")[0])  # systemd lists all of a unit's directories
        _check_owner(directory, {uid, 0}, private=False)  # its mode is the administrator's business
        return directory
    directory = root / "run" / "user" / str(uid) / "ckptsvc"
    if not os.path.lexists(directory):
        directory = root / "tmp" / f"ckptsvc-{uid}"
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError:
            pass
        except OSError as error:
            raise ConfigError(f"cannot make {directory}: {error.strerror}", hint=_OTHER_PLACE) from error
    _check_owner(directory, {uid}, private=True)
    return directory


def agents_directory(settings: Settings, environ: Mapping[str, str]) -> Path:
    """The private directory of this user's agents: agent.socket_dir, or `runtime_dir`. Made if need be.

    Raises:
        ConfigError: it is not one, belongs to another user, or is open to others.
    """
    given = settings.agent.socket_dir
    return private_directory(Path(given)) if given else runtime_dir(environ)


def private_directory(path: Path) -> Path:
    """Make a directory that only this user can enter, or check that it is one.

    Raises:
        ConfigError: it cannot be made, belongs to another user, is open to others, or is a link.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}", hint=_OTHER_PLACE) from error
    _check_owner(path, {os.geteuid()}, private=True)
    return path


_OTHER_PLACE = "set agent.socket_dir or RUNTIME_DIRECTORY to a directory of your own"


def _check_owner(directory: Path, owners: set[int], *, private: bool) -> None:
    # lstat: in /tmp anybody may put a link where ours would be
    try:
        status = os.lstat(directory)
    except OSError as error:
        raise ConfigError(f"{directory}: {error.strerror}", hint=_OTHER_PLACE) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigError(f"{directory} is not a directory", hint=_OTHER_PLACE)
    if status.st_uid not in owners:
        raise ConfigError(f"{directory} belongs to user {status.st_uid}", hint=_OTHER_PLACE)
    if private and status.st_mode & 0o077:
        raise ConfigError(f"{directory} is open to other users", hint=f"chmod 700 {directory}")
