"""Finding the agent of this node, or starting a private one."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptsvc.errors import AgentUnavailable, CkptsvcError, ConfigError
from ckptsvc.rpc import service
from ckptsvc.settings import Settings

log = logging.getLogger("ckptsvc.client")

GRPC_SOCKET = "agent.sock"
IDENTITY_SOCKET = "identity.sock"
LOCK = "agent.lock"

MAX_SOCKET_PATH = 107
"""Bytes in the path of a unix socket: sun_path has 108, the last one for the terminating NUL (unix(7))."""

START_TIMEOUT = 30.0
"""Seconds a new agent may take until it answers (it starts in 0.3 s; a cold file system can be slow)."""


def socket_path(directory: Path, name: str) -> str:
    """The path of the unix socket `name` in `directory`.

    Raises:
        ConfigError: it is longer than the kernel allows.
    """
    path = str(directory / name)
    length = len(os.fsencode(path))
    if length > MAX_SOCKET_PATH:
        raise ConfigError(
            f"the socket path {path} has {length} bytes; the kernel allows {MAX_SOCKET_PATH}",
            hint="set agent.socket_dir to a shorter directory",
        )
    return path


def sockets(directory: Path) -> tuple[str, str]:
    """Paths of the gRPC and the identity socket of the agent whose directory this is."""
    return socket_path(directory, GRPC_SOCKET), socket_path(directory, IDENTITY_SOCKET)


def is_alive(directory: Path) -> bool:
    """Whether an agent holds this directory's lock."""
    try:
        with open(directory / LOCK, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def agents_home(own: Path, settings: Settings) -> Path:
    """The directory of this user's agent: his own, or the one that the node's system service gives him.

    What is set counts first, then an agent of his own that lives, then the service (system.directory).

    Args:
        own: where his agent is without a service (config.agents_directory).
        settings: say whether `own` was set, and where the service is.
    """
    system = Path(settings.system.directory)
    if settings.agent.socket_dir or is_alive(own) or not service.is_there(system):
        return own
    given = service.directory_of(system, os.geteuid())
    if is_alive(given):
        return given  # even while nobody answers for the service itself
    try:
        return service.own_agent(system)
    except CkptsvcError as error:
        log.warning("the system service in %s starts no agent for this user: %s", system, error)
        return own


@contextlib.contextmanager
def safe_socket(directory: Path, name: str, uid: int) -> Iterator[str]:
    """A path of a user's socket, for root: links that the user may have put there are not followed.

    Raises:
        AgentUnavailable: there is no socket of that user.
    """
    try:
        above = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fd = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=above)
        finally:
            os.close(above)
    except OSError as error:
        raise AgentUnavailable(f"no agent serves in {directory}: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid:
            raise AgentUnavailable(f"{directory / name} is no socket of user {uid}")
        yield f"/proc/self/fd/{fd}"
    finally:
        os.close(fd)


@contextlib.contextmanager
def safe_target(directory: Path, uid: int) -> Iterator[str]:
    """The gRPC target of a user's agent, for root; see `safe_socket`."""
    with safe_socket(directory, GRPC_SOCKET, uid) as path:
        yield f"unix:{path}"


def address_of(directory: Path) -> str:
    """Where the agent of this directory listens for others; "" while it does not serve."""
    try:
        return (directory / "ready").read_text(encoding="utf-8").split("\n")[1]
    except (OSError, ValueError, IndexError):
        return ""


def agent_arguments(
    name: str, listen: str = "", coordination: str = "", max_write_rate: int | None = None
) -> list[str]:
    """For the agent that a job starts, now or when the one that is there has ended: it goes when it is done.

    Args:
        name: of the node.
        listen: address at which other agents look for it; "": none in particular.
        coordination: where the job's coordinator is elected; "": nowhere.
        max_write_rate: bytes per second it may write to stores; None: no limit.
    """
    arguments = ["--name", name, "--linger", "30s"]
    if listen:
        arguments += ["--listen", listen]
    if coordination:
        arguments += ["--coordination", coordination]
    if max_write_rate:
        arguments += ["--max-write-rate", str(max_write_rate)]
    return arguments


def ensure_agent(directory: Path, arguments: Sequence[str] = ()) -> bool:
    """Start an agent in this directory unless one is there; returns whether this call started it.

    Many ranks may call this at once: one of them starts it, all wait until it answers. An agent of the system service
    is started by that alone.

    Raises:
        AgentUnavailable: it did not come up, or has ended at once; the hint has the end of its log.
    """
    above = service.service_of(directory)
    if above is not None:
        if not is_alive(directory):
            _ask_for(directory, above)
        return False
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _starting(directory):
        agent = None if is_alive(directory) else _start(directory, arguments)
        ready = directory / "ready"
        deadline = time.monotonic() + START_TIMEOUT
        while not (is_alive(directory) and ready.exists()):
            ended = agent is not None and agent.poll() is not None and not is_alive(directory)
            if ended or time.monotonic() > deadline:
                raise AgentUnavailable(f"the agent in {directory} did not start", hint=_tail(directory / "agent.log"))
            time.sleep(0.02)
    return agent is not None


def _ask_for(directory: Path, above: Path) -> None:
    try:
        service.own_agent(above)
    except AgentUnavailable as error:
        raise AgentUnavailable(error.what, hint=error.hint or _tail(directory / "agent.log")) from None
    except CkptsvcError as error:  # a rank goes on without its agent; that it may have none again is for the log
        raise AgentUnavailable(f"the system service starts no agent: {error.what}", hint=error.hint) from None


@contextlib.contextmanager
def _starting(directory: Path) -> Iterator[None]:
    with open(directory / "start.lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _start(directory: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    with contextlib.suppress(FileNotFoundError):
        (directory / "ready").unlink()
    command = [sys.executable, "-P", "-m", "ckptsvc.agent.server", "--dir", str(directory), *arguments]
    with open(directory / "agent.log", "ab") as log:
        # Its own session: the agent must outlive the trainer, its process group and its terminal.
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "RANK", "LOCAL_RANK")},
        )


def _tail(path: Path) -> str:
    try:
        return f"its log ends: {path.read_text(errors='replace').splitlines()[-1]}"
    except (OSError, IndexError):
        return f"see {path}"
