"""Values with units, as people write and read them: sizes, durations, intervals, amounts of memory, addresses.

Every parser takes what a settings file, an environment variable or an argument holds, and refuses it with examples.
"""

from __future__ import annotations

import json
import math
import re
import tomllib
from datetime import UTC, datetime
from typing import Any, NamedTuple, NoReturn

from ckptsvc.errors import ConfigError

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgtp", 1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgtp", 1)},
}
_DURATION_UNITS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"
_SIZE = re.compile(rf"({_NUMBER}) *([A-Za-z]*)")
_DURATION_PART = re.compile(rf"({_NUMBER}) *([a-z]+)")
_PERCENT = re.compile(rf"({_NUMBER}) *%")
_ACCOUNT = re.compile(r"@?[A-Za-z0-9_][A-Za-z0-9_.@\\-]{0,255}\$?")  # also DOMAIN\user and user@realm
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_ADDRESS = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\s:\[\]]+)):([0-9]{1,5})")


class Address(NamedTuple):
    """A TCP address; port 0 lets the kernel choose one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Every(NamedTuple):
    """How often to save: `steps` or `seconds` is set, the other is 0."""

    steps: int
    seconds: float


class Limit(NamedTuple):
    """An amount of memory: `nbytes`, or `share` (0 to 1) of a whole, is set; the other is 0."""

    nbytes: int
    share: float

    def of(self, total: int) -> int:
        """The limit in bytes where the whole is `total` bytes."""
        return self.nbytes or int(total * self.share)


ALL = Limit(0, 1.0)
"""No limit but the whole."""


def parse_size(value: object) -> int:
    """Bytes in a size: 4096, "512MiB", "8 GiB", "1.5TB" (KB is 1000 bytes, KiB is 1024).

    Raises:
        ConfigError: not a size, or not a whole number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    nbytes = math.nan
    if match := _match(_SIZE, value):
        nbytes = float(match[1]) * _SIZE_UNITS.get(match[2].lower(), math.nan)
    if not nbytes.is_integer():
        _refuse(value, "a size", '4096, "512MiB" or "8GiB"')
    return int(nbytes)


def parse_rate_or_off(value: object) -> int | None:
    """Bytes per second: "2GB/s", "512 MiB/s", a size alone, or None for "off".

    Raises:
        ConfigError: none of these, or zero.
    """
    if value == "off":
        return None
    text = value.strip().removesuffix("/s") if isinstance(value, str) else value
    try:
        rate = parse_size(text)
    except ConfigError:
        rate = 0
    if not rate:
        _refuse(value, "a rate", '"2GB/s" or "off"')
    return rate


def parse_duration(value: object) -> float:
    """Seconds in a duration: 90, 0.5, "90", "90s", "10min", "1h30min" (units ms, s, min, h, d).

    Raises:
        ConfigError: not a duration.
    """
    seconds = math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    elif match := _match(re.compile(_NUMBER), value):
        seconds = float(match[0])
    elif _match(re.compile(f"(?:{_DURATION_PART.pattern} *)+"), value):
        parts = _DURATION_PART.findall(str(value))
        seconds = sum(float(number) * _DURATION_UNITS.get(unit, math.nan) for number, unit in parts)
    if not (math.isfinite(seconds) and seconds >= 0):
        _refuse(value, "a duration", '30, "90s", "10min" or "1h30min"')
    return seconds


def parse_every(value: object) -> Every | None:
    """How often to save: a number of steps, a duration with its unit, or None for "off" (only when asked).

    Raises:
        ConfigError: none of these, or zero.
    """
    if value == "off":
        return None
    every = Every(0, 0.0)
    if isinstance(value, int) and not isinstance(value, bool):
        every = Every(value, 0.0)
    elif match := _match(re.compile("[0-9]+"), value):
        every = Every(int(match[0]), 0.0)
    elif isinstance(value, str):
        every = Every(0, parse_duration(value))
    if every.steps <= 0 and every.seconds <= 0:
        _refuse(value, "an interval", '500 (steps), "10min" or "off"')
    return every


def parse_limit(value: object) -> Limit:
    """An amount of memory: a size, or a share such as "50%".

    Raises:
        ConfigError: neither, zero, or more than 100 %.
    """
    match = _match(_PERCENT, value)
    limit = Limit(0, float(match[1]) / 100) if match else Limit(parse_size(value), 0.0)
    if not any(limit) or limit.share > 1:
        _refuse(value, "a limit", '"50%" or "8GiB"')
    return limit


def parse_address(value: object) -> Address:
    """A TCP address: "host:port", "10.0.0.1:7070", "[::1]:0".

    Raises:
        ConfigError: not an address.
    """
    match = _match(_ADDRESS, value)
    if match is None or int(match[3]) > 65535:
        _refuse(value, "an address", '"127.0.0.1:0" or "[::1]:7070"')
    return Address(match[1] or match[2], int(match[3]))


def parse_address_or_off(value: object) -> Address | None:
    """A TCP address, or None for "off".

    Raises:
        ConfigError: neither.
    """
    return None if value == "off" else parse_address(value)


def parse_duration_or_off(value: object) -> float | None:
    """Seconds in a duration, or None for "off"; else ConfigError."""
    return None if value == "off" else parse_duration(value)


def parse_directory_or_off(value: object) -> str:
    """An absolute path, also as file://path; "" for "off".

    Raises:
        ConfigError: neither.
    """
    if value in ("", "off"):
        return ""
    path = value.removeprefix("file://") if isinstance(value, str) else ""
    if not path.startswith("/") or "\0" in path:
        _refuse(value, "a directory on this node", '"/local/nvme" or "off"')
    return path


def parse_names(value: object) -> tuple[str, ...]:
    """Names of Python modules: "torch, torch.optim", or a list of them.

    Raises:
        ConfigError: one of them cannot be a module's name.
    """
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        _refuse(value, "a list of modules", '"torch,transformers"')
    found = tuple(name.strip() for name in names if name.strip())
    if not all(part.isidentifier() for name in found for part in name.split(".")):
        _refuse(value, "a list of modules", '"torch,transformers"')
    return found


def parse_accounts(value: object) -> tuple[str, ...]:
    """Users and groups: "alice, 1234, @physics", or a list of them.

    Raises:
        ConfigError: one of them can be neither.
    """
    return _words(value, _ACCOUNT, "a list of users and groups", '"alice,1234,@physics"')


def parse_variables(value: object) -> tuple[str, ...]:
    """Names of environment variables: "HTTPS_PROXY, SSL_CERT_FILE", or a list of them.

    Raises:
        ConfigError: one of them cannot be a name.
    """
    return _words(value, _VARIABLE, "a list of environment variables", '"HTTPS_PROXY,SSL_CERT_FILE"')


def parse_umask(value: object) -> int:
    """File permissions that are taken away, in octal: "022", "0o077".

    Raises:
        ConfigError: not a umask, or one that keeps the owner out.
    """
    text = value.strip().removeprefix("0o") if isinstance(value, str) else ""
    if not re.fullmatch("0*[0-7]{1,2}", text):
        _refuse(value, "a umask that leaves the owner his rights, in quotes", '"022" or "077"')
    return int(text, 8)


def parse_tables(value: object) -> dict[str, dict[str, Any]]:
    """Tables by name: as a settings file has them, or one line of JSON or TOML: {"s3": {"region": "eu-west-1"}}.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("{") else tomllib.loads(value)
        except ValueError:
            _refuse(value, "a line of JSON or TOML", _TABLES)
    if not isinstance(value, dict) or not all(isinstance(table, dict) for table in value.values()):
        _refuse(value, "a table for each scheme", _TABLES)
    return {str(name): dict(table) for name, table in value.items()}


def _words(value: object, pattern: re.Pattern[str], kind: str, examples: str) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        _refuse(value, kind, examples)
    found = tuple(word.strip() for word in words if word.strip())
    if not all(pattern.fullmatch(word) for word in found):
        _refuse(value, kind, examples)
    return found


_TABLES = """{"s3": {"region": "eu-west-1"}} or s3 = {region = "eu-west-1"}"""


def _match(pattern: re.Pattern[str], value: object) -> re.Match[str] | None:
    return pattern.fullmatch(value.strip()) if isinstance(value, str) else None


def _refuse(value: object, kind: str, examples: str) -> NoReturn:
    raise ConfigError(f"{value!r} is not {kind}", hint=f"for example {examples}")


def size(nbytes: float) -> str:
    """Bytes for people: "512 B", "64.0 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if nbytes < 1023.95 or unit == "TiB":
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:,.1f} {unit}"
        nbytes /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """A time span for people, to one unit: "12 s", "3 min", "5 h", "9 d"."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    for unit, length, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} d"


def when(created: str) -> datetime | None:
    """The time in a record (ISO 8601), or None where there is none to read."""
    try:
        found = datetime.fromisoformat(created)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)
