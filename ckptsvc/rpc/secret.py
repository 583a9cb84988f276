"""The secret that one user's agents on one host share, and the addresses at which they may use it.

It is a file in the user's private runtime directory. It never leaves the processes that have read it: how agents prove
to each other that they know it is in `rpc.proof`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import secrets
from pathlib import Path

from ckptsvc.errors import ConfigError
from ckptsvc.quantities import Address, parse_address

FILE = "secret"
_BYTES = 32
_SECRET = re.compile(rf"[0-9a-f]{{{2 * _BYTES}}}")


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address; a name, other than localhost, may mean anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def require_loopback(host: str, what: str) -> None:
    """Refuse an address of agents that others than this host reach; `what` says whose it is.

    Raises:
        ConfigError: it is not loopback.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"{what}, which is not loopback",
            hint="agents of several hosts need certificates: tls.ca_file, tls.cert_file, tls.key_file",
        )


def numeric(address: str) -> str:
    """The address at which an agent listens, or is looked for, in the one spelling that proofs are made over.

    "localhost" is 127.0.0.1 at both ends: a name with two meanings would let somebody else have one of them.

    Raises:
        ConfigError: not an address, or not loopback.
    """
    host, port = parse_address(address)
    require_loopback(host, f"the address of an agent is {address}")
    return str(Address("127.0.0.1" if host == "localhost" else str(ipaddress.ip_address(host)), port))


def shared_secret(directory: Path, name: str = FILE) -> str:
    """Read the secret in this private directory, or make it; several agents may do so at once.

    Raises:
        ConfigError: the file is not this user's alone, or holds no secret.
    """
    path = directory / name
    if not path.exists():
        fresh = directory / f"{name}.{secrets.token_hex(8)}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write(secrets.token_hex(_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)  # whole, or not at all; the first one counts
        os.unlink(fresh)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), errors="replace") as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(f"{path} is not readable by its owner alone", hint=f"remove {path}")
        text = file.read(1024).strip()
    if not _SECRET.fullmatch(text):
        raise ConfigError(f"{path} holds no secret", hint=f"remove {path}")  # anybody can guess an empty one
    return text
