"""Settings: what may be set, where a value comes from, and the directory the service's sockets live in.

A value is taken from the last of these that has one:

    default < /etc/ckptsvc/config.toml < $XDG_CONFIG_HOME/ckptsvc/config.toml < $CKPTSVC_CONFIG
            < environment variable CKPTSVC_<SECTION>_<KEY> < flag or argument

`Settings.origin` says which one it was, for a person who wonders. An unknown key is refused together with the nearest
right one: a setting that is silently ignored is found out when the checkpoint it was about is missing.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import stat
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, get_args

import msgspec

from ckptsvc.errors import ConfigError

SYSTEM_FILE = Path("/etc/ckptsvc/config.toml")

OTHER_VARIABLES: dict[str, str] = {
    "CKPTSVC_CONFIG": "one more settings file, which must exist",
    "CKPTSVC_JOB": "id of the job (launch.py)",
    "CKPTSVC_ATTEMPT": "number of this incarnation of the job's ranks (launch.py)",
    "CKPTSVC_NODE": "name of this node (launch.py)",
}
"""Every variable CKPTSVC_* that has a meaning and is not a setting."""

MAX_SOCKET_PATH = 107
"""Bytes in the path of a unix socket: sun_path has 108, with the terminating NUL (unix(7))."""

_SIZE_UNITS = {"": 1, "b": 1, **{f"{p}b": 1000**n for n, p in enumerate("kmgtp", 1)}}
_SIZE_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgtp", 1)}
_DURATION_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
# A Kubernetes service called "ckptsvc..." puts such variables into every pod of its namespace.
_KUBERNETES_LINK = re.compile(r"CKPTSVC_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_[0-9]+_[A-Z]+\w*)?)")


class Address(NamedTuple):
    """A TCP address; port 0 lets the kernel choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Every(NamedTuple):
    """How often to save: one of `steps` and `seconds` is set, the other is 0."""

    steps: int
    seconds: float


class Limit(NamedTuple):
    """An amount of memory: `nbytes`, or `share` (0 to 1) of a whole; one of them is set, the other is 0."""

    nbytes: int
    share: float

    def of(self, total: int) -> int:
        """The limit in bytes, where the whole is `total` bytes."""
        return self.nbytes or int(total * self.share)


def parse_size(value: object) -> int:
    """Bytes in a size: 4096, "512MiB", "8 GiB", "1.5TB" (KB = 1000, KiB = 1024).

    Raises:
        ConfigError: not a size, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    nbytes = float(match[1]) * _SIZE_UNITS.get(match[2].lower(), math.nan) if match else math.nan
    if not nbytes.is_integer():
        _refuse(value, "a size", '4096, "512MiB" or "8GiB"')
    return int(nbytes)


def parse_duration(value: object) -> float:
    """Seconds in a duration: 90, 0.5, "90s", "10min", "1h30min" (units ms, s, min, h, d).

    Raises:
        ConfigError: not a duration.
    """
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str) and re.fullmatch(f"({_QUANTITY.pattern})+", value):
        parts = _QUANTITY.findall(value)
        seconds = sum(float(number) * _DURATION_UNITS.get(unit, math.nan) for number, unit in parts)
    if not (math.isfinite(seconds) and seconds >= 0):
        _refuse(value, "a duration", '30, "90s", "10min" or "1h30min"')
    return seconds


def parse_every(value: object) -> Every | None:
    """How often to save: a number of steps, a duration with its unit, or None for "off" (only when asked to).

    Raises:
        ConfigError: none of these, or zero.
    """
    if value == "off":
        return None
    text = str(value)
    is_steps = isinstance(value, int | str) and text.isascii() and text.isdigit()
    every = Every(int(text), 0.0) if is_steps else Every(0, parse_duration(value if "a" else value))
    if not any(every):
        _refuse(value, "an interval", '500 (steps), "10min" or "off"')
    return every


def parse_limit(value: object) -> Limit:
    """A limit: a size, or a share such as "50%".

    Raises:
        ConfigError: neither, zero, or more than 100%.
    """
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", value.strip()) if isinstance(value, str) else None
    limit = Limit(0, float(percent[1]) / 100) if percent else Limit(parse_size(value), 0.0)
    if not any(limit) or limit.share > 1:
        _refuse(value, "a limit", '"50%" or "8GiB"')
    return limit


def parse_address(value: object) -> Address:
    """A TCP address, "host:port" or "[v6]:port".

    Raises:
        ConfigError: not an address.
    """
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^\s:\[\]]+)):([0-9]{1,5})", value) if isinstance(value, str) else None
    if match is None or int(match[3]) > 65535:
        _refuse(value, "an address", '"127.0.0.1:0" or "[::1]:7070"')
    return Address(match[1] or match[2], int(match[3]))
