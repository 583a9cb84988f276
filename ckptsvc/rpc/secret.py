"""The secret by which one user's agents on one host know each other.

A TCP port on loopback is open to every user of the host. So agents prove, on every call between them, that they can
read a file in the user's private runtime directory.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
from pathlib import Path
from typing import Any

from ckptsvc.errors import ConfigError, StoreDenied

SECRET_KEY = "ckptsvc-secret"
"""Metadata key of every call between agents."""

FILE = "secret"
_BYTES = 32


def is_loopback(host: str) -> bool:
    """Whether only this host reaches an address."""
    return host.startswith("127.") or host in ("localhost", "::1")


def require_loopback(host: str, what: str) -> None:
    """Refuse an address at which the secret would leave this host; `what` says whose it is.

    Raises:
        ConfigError: it is not loopback.
    """
    if not is_loopback(host):
        raise ConfigError(
            f"{what}, which is not loopback",
            hint="agents of several hosts need mutual TLS, which this version does not have",
        )


def shared_secret(directory: Path) -> str:
    """Read the secret in this private directory, or make it; several agents may do so at once.

    Raises:
        ConfigError: the file is not this user's alone.
    """
    path = directory / FILE
    if not path.exists():
        fresh = directory / f"{FILE}.{secrets.token_hex(8)}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(fd, "w") as file:
            file.write(secrets.token_hex(_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)  # whole, or not at all; the first one counts
        os.unlink(fresh)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW)) as file:
        status = os.fstat(file.fileno())
        if status.st_uid != os.geteuid() or status.st_mode & 0o077:
            raise ConfigError(f"{path} is not readable by its owner alone", hint=f"remove {path}")
        return file.read().strip()


def check_secret(metadata: Any, secret: str) -> None:
    """Raise StoreDenied unless a call's metadata has the secret."""
    for key, value in metadata or ():
        if key == SECRET_KEY and hmac.compare_digest(str(value).encode(), secret.encode()):
            return
    raise StoreDenied("this port is for the agents of its own user", hint="see agent.listen")
