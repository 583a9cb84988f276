"""The parts of a support bundle: each bounded, without secrets, and left out where it cannot be had."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import platform
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

from ckptsvc.agent import nodelist
from ckptsvc.agent.http.access import FILE as HTTP_TOKEN
from ckptsvc.agent.http.access import http_token
from ckptsvc.agent.incidents import incidents_directory
from ckptsvc.agent.orders import standing
from ckptsvc.agent.orders.audit import audit_path
from ckptsvc.cli.agents import Answer, ask_all
from ckptsvc.cli.masking import Mask, is_secret, secrets_in
from ckptsvc.cli.settings import values
from ckptsvc.config import config_files, load
from ckptsvc.errors import CkptsvcError, InvalidInput, NotFound
from ckptsvc.quantities import parse_address
from ckptsvc.rpc import secret, service
from ckptsvc.settings import Settings

MAX_PART = 2 << 20
"""Bytes of one part; of a longer file, its end is taken."""

MAX_SECRET = 64 << 10

INCIDENTS = 20
"""Of the newest ones."""

PATIENCE = 5.0
"""Seconds for one page of metrics."""

UNITS = "ckptsvc-agent*"
JOURNAL_LINES = 10_000
JOURNAL_TIME = 20.0
"""Seconds for so many lines; a journal may have gigabytes."""

PACKAGES = (
    "ckptsvc", "torch", "grpcio", "protobuf", "msgspec", "numpy", "zstandard", "xxhash", "obstore", "fsspec",
    "prometheus-client", "click", "safetensors", "lightning", "transformers", "accelerate",
)  # fmt: skip
DRIVERS = ("nvidia", "amdgpu", "xe", "i915", "habanalabs", "cxi_ss1", "cxi_core", "mlx5_core", "lustre", "lnet")


@dataclass(frozen=True)
class Part:
    """One file of the bundle.

    Attributes:
        cut: only its end is there.
        problem: why there is nothing; "" if there is.
    """

    name: str
    about: str
    data: bytes = b""
    cut: bool = False
    problem: str = ""


def parts(directory: Path, environ: Mapping[str, str]) -> Iterator[Part]:
    """All parts, the most useful first.

    Raises:
        InvalidInput: the directory of the agents is somebody else's, or others may write to it.
    """
    directory = _own(directory)
    try:
        settings: Settings | CkptsvcError = load(environ)
    except CkptsvcError as error:
        settings = error
    mask = Mask(known_secrets(directory, environ, settings))
    collect = _Collector(mask)
    yield collect("versions.json", "versions of packages, kernel and drivers", _versions)
    yield collect("settings.toml", "the settings in force, and where each came from", lambda: _settings(settings))
    yield collect("environment.txt", "names of variables that matter, without values", lambda: _environment(environ))
    yield collect("facts.json", "memory, processors and limits of this node", lambda: _facts(settings))
    answers = ask_all(directory, os.geteuid())
    for answer in answers:
        name = answer.directory.name
        yield collect(f"agents/{name}/status.json", "what the agent says of itself", partial(_status, answer))
        yield collect(f"agents/{name}/metrics.txt", "its metrics", partial(_metrics, answer, settings))
    for log in sorted(directory.rglob("agent.log")):
        where = log.parent.name
        yield collect.file(f"agents/{where}/agent.log", "its log, and those of earlier agents there", log)
        if log.with_suffix(".log.1").exists():
            yield collect.file(f"agents/{where}/agent.log.1", "what was in it before", log.with_suffix(".log.1"))
        if (log.parent / standing.NAME).exists():
            yield collect.file(f"agents/{where}/{standing.NAME}", "orders it keeps", log.parent / standing.NAME)
    yield from _of_service(collect, settings)
    if isinstance(settings, CkptsvcError):
        return
    yield from _kept(collect, settings, environ)


def _of_service(collect: _Collector, settings: Settings | CkptsvcError) -> Iterator[Part]:
    """What systemd keeps of its units, as far as this user may read it; and for root, the service of all users."""
    if shutil.which("journalctl") is not None:
        for name, scope in (("journal.txt", "--system"), ("journal-user.txt", "--user")):
            yield collect(name, f"the log of the units {UNITS} (journalctl {scope})", partial(_journal, scope))
    if os.geteuid() != 0 or isinstance(settings, CkptsvcError):
        return
    where = Path(settings.system.directory)
    if service.is_there(where):
        yield collect("service/agents.json", "the agents of all users", lambda: service.ask(where, "agents"))
    if settings.system.audit_file and Path(settings.system.audit_file).exists():
        yield collect.file("service/audit.jsonl", "what root has ordered of them", Path(settings.system.audit_file))


def _journal(scope: str) -> str:
    """The newest lines of the units' log; journalctl stops by itself where there is nothing to be read.

    Raises:
        NotFound: there is no journal, or it does not answer.
    """
    command = ["journalctl", scope, "--unit", UNITS, "--lines", str(JOURNAL_LINES), "--no-pager", "--quiet"]
    try:
        ended = subprocess.run(
            [*command, "--output", "short-iso"], stdin=subprocess.DEVNULL, capture_output=True, timeout=JOURNAL_TIME,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotFound("journalctl does not answer") from None
    if ended.returncode != 0 or not ended.stdout:
        why = ended.stderr.decode("utf-8", "replace").strip().partition("\n")[0]
        raise NotFound(why or "nothing is in it that this user may read")
    return ended.stdout.decode("utf-8", "replace")


def _kept(collect: _Collector, settings: Settings, environ: Mapping[str, str]) -> Iterator[Part]:
    """What outlives agents."""
    try:
        incidents = sorted(incidents_directory(settings, environ).glob("*.json"), reverse=True)[:INCIDENTS]
        for incident in incidents:
            yield collect.file(f"incidents/{incident.name}", "an incident", incident)
        yield collect.file("audit.jsonl", "who has ordered what", audit_path(settings, environ))
    except (CkptsvcError, OSError) as error:
        yield Part("incidents", "incidents and audit log", problem=str(error))
    where = nodelist.directory_of(environ, settings.launch)
    if where is not None:
        yield collect.file("nodes.json", "nodes that are excluded, or have failed", where / nodelist.NAME)


class _Collector:
    """Makes parts, whatever goes wrong."""

    def __init__(self, mask: Mask) -> None:
        self._mask = mask

    def __call__(self, name: str, about: str, make: Callable[[], Any]) -> Part:
        try:
            found = make()
            if isinstance(found, str):
                data = self._mask.text(found)
            else:
                data = json.dumps(self._mask.plain(found), indent=1, default=str)
        except (CkptsvcError, OSError, ValueError) as error:
            return Part(name, about, problem=self._mask.text(str(error)) or type(error).__name__)
        raw = data.encode("utf-8", "replace")
        return Part(name, about, raw[-MAX_PART:], cut=len(raw) > MAX_PART)

    def file(self, name: str, about: str, path: Path) -> Part:
        """The end of a file; a file of JSON as a whole, or not at all."""
        try:
            with _opened(path) as file:
                nbytes = os.fstat(file.fileno()).st_size
                cut = nbytes > MAX_PART
                file.seek(max(nbytes - MAX_PART, 0))
                text = file.read(MAX_PART).decode("utf-8", "replace")
        except OSError as error:
            return Part(name, about, problem=error.strerror or str(error))
        if cut:
            text = text.partition("\n")[2]  # a part of a line could hide the name of a secret
        part = self(name, about, lambda: json.loads(text) if path.suffix == ".json" and not cut else text)
        return Part(name, about, part.data, cut, part.problem)


def _own(directory: Path) -> Path:
    """The directory, by a path without links.

    What lies there is read with this user's rights, and secrets are shown to who listens there: to root, a directory of
    somebody else's could say which.
    """
    found = Path(os.path.realpath(directory))
    with contextlib.suppress(FileNotFoundError):
        about = found.stat()
        if about.st_uid != os.geteuid() or about.st_mode & 0o022:
            whose = "others may write to" if about.st_uid == os.geteuid() else f"belongs to user {about.st_uid}"
            raise InvalidInput(f"{found} {whose}", hint="every user makes a bundle of his own agents: sudo -u USER")
    return found


def _opened(path: Path, *, named: bool = False) -> BinaryIO:
    """A file of this user, or of root; where a setting has named it, it may be a link, and anybody's.

    Raises:
        OSError: it is none.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if named else os.O_NOFOLLOW))
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode) or not (named or about.st_uid in (os.geteuid(), 0)):
        os.close(fd)
        raise OSError(errno.EPERM, "it is no file, or not this user's")
    return open(fd, "rb")


def known_secrets(directory: Path, environ: Mapping[str, str], settings: Settings | CkptsvcError) -> Iterator[str]:
    """Values that must not be in a bundle, from all places where this user's are kept."""
    yield from (value for name, value in environ.items() if is_secret(name))
    for path in [*directory.rglob(secret.FILE), *directory.rglob(HTTP_TOKEN)]:
        yield from _lines(path)
    if isinstance(settings, CkptsvcError):
        return
    yield from secrets_in(settings.store.options)
    for table in (settings.etcd, settings.tls, settings.agent):
        for name in ("password_file", "key_file", "http_token_file"):
            given = getattr(table, name, "")
            if given:
                yield from _lines(Path(given), named=True)


def _lines(path: Path, *, named: bool = False) -> Iterator[str]:
    try:
        with _opened(path, named=named) as file:
            yield from file.read(MAX_SECRET).decode("utf-8", "replace").splitlines()
    except OSError:
        return


def _versions() -> dict[str, Any]:
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    drivers = {name: _first_line(Path("/sys/module", name, "version")) for name in DRIVERS if _has_module(name)}
    release = dict(line.split("=", 1) for line in _first_lines(Path("/etc/os-release")) if "=" in line)
    return {
        "packages": found,
        "python": platform.python_version(),
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "system": release.get("PRETTY_NAME", "").strip('"'),
        "drivers": drivers,
        "nvidia": _first_line(Path("/proc/driver/nvidia/version")),
    }


def _has_module(name: str) -> bool:
    return Path("/sys/module", name).is_dir()


def _first_line(path: Path) -> str | None:
    return next(iter(_first_lines(path)), None)


def _first_lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace")[:MAX_SECRET].splitlines()
    except OSError:
        return []


def _settings(settings: Settings | CkptsvcError) -> str:
    if isinstance(settings, CkptsvcError):
        return f"# they cannot be used: {settings}\n"
    files = [f"# {path}" for path in config_files(os.environ)]
    lines = [f"{key} = {value}  # {origin}" for key, value, origin in values(settings)]
    return "\n".join([*files, *lines]) + "\n"


def _environment(environ: Mapping[str, str]) -> str:
    ours = ("CKPTSVC_", "SLURM_", "PBS_", "PMI_", "PALS_", "TORCH", "NCCL_", "CUDA_", "AWS_", "AZURE_", "GOOGLE_")
    return "".join(f"{name}\n" for name in sorted(environ) if name.startswith(ours))


def _facts(settings: Settings | CkptsvcError) -> dict[str, Any]:
    memory = dict(line.split(":", 1) for line in _first_lines(Path("/proc/meminfo")) if ":" in line)
    arenas = "/dev/shm" if isinstance(settings, CkptsvcError) else settings.arena.dir
    vfs = os.statvfs(arenas)
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in ("NOFILE", "MEMLOCK", "NPROC")}
    return {
        "processors": os.cpu_count(),
        "usable_processors": len(os.sched_getaffinity(0)),
        "load": os.getloadavg(),
        "memory": {name: memory.get(name, "").strip() for name in ("MemTotal", "MemAvailable", "Shmem", "SwapTotal")},
        "arenas": {"directory": arenas, "bytes": vfs.f_blocks * vfs.f_frsize, "free": vfs.f_bavail * vfs.f_frsize},
        "limits": limits,
        "cgroup_memory": _first_line(Path("/sys/fs/cgroup/memory.max")),
        "uptime": _first_line(Path("/proc/uptime")),
    }


def _status(answer: Answer) -> Any:
    if answer.error is not None:
        raise answer.error
    return answer.status


def _metrics(answer: Answer, settings: Settings | CkptsvcError) -> str:
    said = (answer.status or {}).get("metrics", "")
    if not said:
        raise OSError("it has no HTTP port")
    address = parse_address(said)
    if not secret.is_loopback(address.host):  # the token is for nobody else
        raise OSError(f"its HTTP port is not on loopback: curl https://{address}/metrics shows them")
    headers = {"Authorization": f"Bearer {token}"} if (token := _token(answer.directory, settings)) else {}
    connection = http.client.HTTPConnection(address.host, address.port, timeout=PATIENCE)  # follows nobody elsewhere
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/metrics", headers=headers)
            response = connection.getresponse()
            found = response.read(MAX_PART).decode("utf-8", "replace")
        except http.client.HTTPException as error:
            raise OSError(f"it does not speak HTTP: {error!r}") from None
    if response.status != http.HTTPStatus.OK:
        raise OSError(f"it answers {response.status}")
    return found


def _token(directory: Path, settings: Settings | CkptsvcError) -> str:
    """What lets in: agents of jobs share that of the directory above theirs."""
    if not isinstance(settings, CkptsvcError) and settings.agent.http_token_file:
        return http_token(settings, os.environ)
    tokens = (line for where in (directory, directory.parent) for line in _lines(where / HTTP_TOKEN))
    return next(tokens, "")
