"""DAOS' client in this process: libdfs is found and started once, and each container is opened once.

libdaos keeps connections and network state that do not survive fork(2), so whatever was opened before a fork is
refused after it. (pydaos restarts the library in a forked child and passes handles on with dfs_local2global_all; an
I/O worker that is spawned needs neither.)
"""

from __future__ import annotations

import atexit
import errno
import importlib.util
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from ckptsvc.errors import CkptsvcError, ConfigError, NotFound, StoreDenied, StoreError, StoreUnavailable
from ckptsvc_drivers.libdfs import Library, Mount, check
from ckptsvc_drivers.linux import translate

_PLACES = ("libdfs.so", "/usr/lib64/libdfs.so", "/usr/lib/libdfs.so", "/opt/daos/lib64/libdfs.so")
_INSTALL = (
    "install DAOS' client (the package daos-client; on many machines `module load daos`), or name the library with the"
    " option `library`"
)
_AGENT = "is daos_agent running on this node (systemctl status daos_agent), and DAOS_AGENT_DRPC_DIR its directory?"


class Address(NamedTuple):
    """A container: the labels of pool and container, the name of the system ("" is the default), the library."""

    pool: str
    container: str
    system: str
    library: str


@dataclass(slots=True)
class Connection:
    """A container that this process has open; `release` it as often as `connect` gave it out."""

    address: Address
    mount: Mount
    read_only: bool
    pid: int
    users: int = 0

    def live(self) -> Mount:
        """The open container; StoreError in a forked child."""
        _refuse_after_fork(self.pid)
        return self.mount


_lock = threading.Lock()
_open: dict[Address, Connection] = {}
_libraries: dict[str, Library] = {}
_started_in = 0  # the process that has called dfs_init; 0 is none


def connect(address: Address) -> Connection:
    """Open a container, or share it if this process has it open.

    Raises:
        ConfigError: no libdfs, or it does not start.
        NotFound: no such pool or container.
        StoreError: as DAOS says.
    """
    with _lock:
        _refuse_after_fork(_started_in)
        library = _libraries.get(address.library)
        if library is None:
            library = _libraries[address.library] = find(address.library)
        connection = _open.get(address)
        if connection is None:
            _start(library)
            mount, read_only = _mount(library, address)
            connection = _open[address] = Connection(address, mount, read_only, os.getpid())
        connection.users += 1
        return connection


def release(connection: Connection) -> None:
    """Give a connection back; the last one to do so closes the container."""
    with _lock:
        if connection.pid != os.getpid():
            return  # what the parent has open is the parent's
        connection.users -= 1
        if connection.users == 0:
            del _open[connection.address]
            with suppress(OSError):  # nothing is lost: what was written is durable
                connection.mount.close()


def find(wanted: str) -> Library:
    """Load libdfs: from the path `wanted`, or from where it usually is.

    Raises:
        ConfigError: it is not there; says where it was looked for.
    """
    refused = []
    for place in (wanted,) if wanted else (*_PLACES, *_beside_pydaos()):
        try:
            return Library(place)
        except OSError as error:
            refused.append(str(error) if place in str(error) else f"{place}: {error}")
    raise ConfigError(f"DAOS' library libdfs cannot be loaded: {'; '.join(refused)}", hint=_INSTALL)


def _beside_pydaos() -> list[str]:
    """Where libdfs is if pydaos was found: it is installed as PREFIX/lib64/python3.x/site-packages/pydaos."""
    spec = importlib.util.find_spec("pydaos")
    if spec is None or spec.origin is None:
        return []
    folder = os.path.dirname(os.path.realpath(spec.origin))
    above = [folder]
    for _ in range(4):
        above.append(os.path.dirname(above[-1]))
    return [os.path.join(each, "libdfs.so") for each in above if os.path.exists(os.path.join(each, "libdfs.so"))]


def _start(library: Library) -> None:
    global _started_in
    if _started_in:
        return
    try:
        check(library.calls.dfs_init())
    except OSError as error:
        what = f"DAOS' client does not start: {error.strerror} [{errno.errorcode.get(error.errno or 0)}]"
        raise StoreUnavailable(f"{what}{_explanation()}", hint=_AGENT) from error
    _started_in = os.getpid()
    atexit.register(_end, library)


def _explanation() -> str:
    """What pydaos says about why the client does not start: libdfs folds most of DAOS' errors into EIO."""
    try:
        import pydaos  # type: ignore[import-not-found, unused-ignore]  # ships with DAOS' client, not on PyPI
    except ImportError as error:
        return f"; pydaos, which could say more, is not there either ({error})"
    try:
        pydaos.DaosClient()
    except pydaos.PyDError as error:
        return f"; pydaos says: {error}"
    return ""


def _mount(library: Library, address: Address) -> tuple[Mount, bool]:
    """Open the container, for reading only where no more is allowed."""
    where = f"daos://{address.pool}/{address.container}"
    for flags in (os.O_RDWR, os.O_RDONLY):
        try:
            return Mount(library, address.pool, address.container, address.system, flags), flags == os.O_RDONLY
        except OSError as error:
            refused = _refusal(error, where)
            if not isinstance(refused, StoreDenied):
                raise refused from error
    raise refused


def _refusal(error: OSError, where: str) -> CkptsvcError:
    if error.errno == errno.ENOENT:
        hint = "`daos pool list` and `daos container list POOL` name those there are"
        return NotFound(f"{where}: no such pool or no such container", hint=hint)
    if error.errno == errno.EINVAL:
        hint = "it must be of type POSIX: daos container create POOL LABEL --type POSIX"
        return ConfigError(f"{where} is no container with a file system in it", hint=hint)
    if error.errno in (errno.EACCES, errno.EPERM):
        hint = "`daos container get-acl` says who may; one made with --mode=balanced is refused by dfs_connect to all"
        return StoreDenied(f"{where}: this user may not open it", hint=hint)
    return translate(error, where)


def _refuse_after_fork(pid: int) -> None:
    if pid not in (0, os.getpid()):
        raise StoreError(
            f"DAOS' client was started in process {pid} and does not survive fork(2)",
            hint='connect in the process that uses the store, and start processes with the method "spawn"',
        )


def _end(library: Library) -> None:
    """At exit: close what is open, so that the servers need not find out for themselves."""
    if _started_in != os.getpid():
        return
    for connection in _open.values():
        with suppress(OSError):
            connection.mount.close()
    library.calls.dfs_fini()
