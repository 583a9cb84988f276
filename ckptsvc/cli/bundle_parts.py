"""The parts of a support bundle: each bounded, without secrets, and left out where it cannot be had."""

from __future__ import annotations

import json
import os
import platform
import resource
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from ckptsvc.agent import nodelist, standing
from ckptsvc.agent.audit import audit_path
from ckptsvc.agent.incidents import incidents_directory
from ckptsvc.cli.agents import Answer, ask_all
from ckptsvc.cli.masking import Mask, is_secret, secrets_in
from ckptsvc.cli.settings import values
from ckptsvc.config import config_files, load
from ckptsvc.errors import CkptsvcError
from ckptsvc.rpc import secret
from ckptsvc.settings import Settings

MAX_PART = 2 << 20
"""Bytes of one part; of a longer file, its end is taken."""

MAX_SECRET = 64 << 10

INCIDENTS = 20
"""Of the newest ones."""

PATIENCE = 5.0
"""Seconds for one page of metrics."""

PACKAGES = (
    "ckptsvc", "torch", "grpcio", "protobuf", "msgspec", "numpy", "zstandard", "xxhash", "obstore", "fsspec",
    "prometheus-client", "click", "safetensors", "lightning", "transformers", "accelerate",
)  # fmt: skip
DRIVERS = ("nvidia", "amdgpu", "xe", "i915", "habanalabs", "cxi_ss1", "cxi_core", "mlx5_core", "lustre", "lnet")
HTTP_TOKEN = "http-token"
"""File in an agent's directory with what its HTTP port wants to see."""


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
    """All parts, the most useful first."""
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
    answers = ask_all(directory)
    for answer in answers:
        name = answer.directory.name
        yield collect(f"agents/{name}/status.json", "what the agent says of itself", partial(_status, answer))
        yield collect(f"agents/{name}/metrics.txt", "its metrics", partial(_metrics, answer))
    for log in sorted(directory.rglob("agent.log")):
        where = log.parent.name
        yield collect.file(f"agents/{where}/agent.log", "its log, and those of earlier agents there", log)
        if (log.parent / standing.NAME).exists():
            yield collect.file(f"agents/{where}/{standing.NAME}", "orders it keeps", log.parent / standing.NAME)
    if isinstance(settings, CkptsvcError):
        return
    yield from _kept(collect, settings, environ)


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
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
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
                yield from _lines(Path(given))


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open("rb") as file:
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


def _metrics(answer: Answer) -> str:
    address = (answer.status or {}).get("metrics", "")
    if not address:
        raise OSError("it has no HTTP port")
    request = urllib.request.Request(f"http://{address}/metrics")
    token = next(iter(_lines(answer.directory / HTTP_TOKEN)), "")
    if token:
        request.add_header("Authorization", f"Bearer {token}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy for the web is not meant for it
    with opener.open(request, timeout=PATIENCE) as response:
        found: str = response.read(MAX_PART).decode("utf-8", "replace")
        return found
