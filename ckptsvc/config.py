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
from typing import Literal, NoReturn, get_args, get_origin

import msgspec

from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Limit
from ckptsvc.settings import Settings, problems

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
    "CKPTSVC_WORKER": "what an agent tells its I/O workers of the settings (agent/worker/settings.py)",
    "CKPTSVC_HANDOVER": "what an agent leaves to its successor in the same process (agent/handover)",
    "CKPTSVC_LOG_ABOUT": "what all lines of a process's log are about (set by ours for those they start)",
    "CKPTSVC_FAILPOINT": "directory of armed failpoints (tests; pipeline/failpoint.py)",
}
"""Every variable CKPTSVC_* that has a meaning and is not a setting."""

PAGE = 4096

LARGEST_EXTENT = 64 << 20
"""Bytes of save.extent: those who read a shard hold several extents in memory."""

LONGEST_REQUEST = 3600.0
"""Seconds of store.timeout."""

# Kubernetes puts such variables into every pod of a namespace that has a service called "ckptsvc...".
_KUBERNETES_LINK = re.compile(r"CKPTSVC_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_\w+)?)")


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
    if not os.path.isabs(settings.system.directory):
        refuse("system.directory", f"is {settings.system.directory!r}, which is not an absolute path")
    if agent.incidents_dir and not os.path.isabs(agent.incidents_dir):
        refuse("agent.incidents_dir", f"is {agent.incidents_dir!r}, which is not an absolute path")
    if agent.http_token_file and not os.path.isabs(agent.http_token_file):
        refuse("agent.http_token_file", f"is {agent.http_token_file!r}, which is not an absolute path")
    if settings.launch.state and not os.path.isabs(settings.launch.state):
        refuse("launch.state", f"is {settings.launch.state!r}, which is not an absolute path")
    if not os.path.isabs(arena.dir):
        refuse("arena.dir", f"is {arena.dir!r}, which is not an absolute path")
    if not os.path.isabs(settings.nics.root):
        refuse("nics.root", f"is {settings.nics.root!r}, which is not an absolute path")
    for key in ("ca_file", "cert_file", "key_file"):
        path = getattr(settings.tls, key)
        if path and not os.path.isabs(path):  # agents run in the directory of whoever started them
            refuse(f"tls.{key}", f"is {path!r}, which is not an absolute path")
    if len({bool(settings.tls.ca_file), bool(settings.tls.cert_file), bool(settings.tls.key_file)}) > 1:
        refuse("tls.cert_file", "needs tls.ca_file and tls.key_file, and they need it")
    if not 2 <= settings.etcd.ttl <= 60:
        refuse("etcd.ttl", f"is {settings.etcd.ttl:g} s, not 2 to 60")
    if save.extent == 0 or save.extent % PAGE or save.extent > LARGEST_EXTENT:
        refuse("save.extent", f"is {save.extent} bytes, not a multiple of {PAGE} or more than {LARGEST_EXTENT}")
    if settings.retention.best and not settings.retention.metric:
        refuse("retention.best", "needs retention.metric: of what are they the best?")
    if not 0 < settings.store.timeout <= LONGEST_REQUEST:
        refuse("store.timeout", f"is {settings.store.timeout:g} s, not more than 0 and at most {LONGEST_REQUEST:g}")
    if save.deadline >= save.timeout:
        refuse("save.deadline", f"is {save.deadline:g} s, not less than save.timeout, {save.timeout:g} s")
    for key, problem in problems(settings.tiers):
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


def limit_on(limit: Limit, directory: str | Path, key: str) -> int:
    """An amount in bytes; a share is one of the size of the file system that a directory is on.

    Raises:
        ConfigError: there is no such directory; `key` is the setting that names it.
    """
    try:
        vfs = os.statvfs(directory)
    except OSError as error:
        raise ConfigError(f"{key}: {directory}: {error.strerror}", hint="it must be there before an agent is") from None
    return limit.of(vfs.f_blocks * vfs.f_frsize)


def check_place(directory: str, key: str) -> None:
    """See that what a directory is to be made in is there: a mistyped path would fill another file system.

    Raises:
        ConfigError: it is not; `key` is the setting that names the directory.
    """
    above = os.path.dirname(directory.rstrip("/")) or "/"
    if not os.path.isdir(above):
        raise ConfigError(f"{key}: {directory}: there is no {above}", hint="mistyped, or not mounted?")


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
