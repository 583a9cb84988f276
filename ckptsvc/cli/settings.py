"""Every setting as a person sees it: what it is for, how its value is written, where that came from."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import msgspec

from ckptsvc.cli.masking import is_secret, masked_url
from ckptsvc.quantities import (
    Address,
    Every,
    Limit,
    parse_accounts,
    parse_duration,
    parse_duration_or_off,
    parse_every,
    parse_limit,
    parse_names,
    parse_size,
    parse_umask,
    parse_variables,
)
from ckptsvc.settings import Settings

_ATTRIBUTE = re.compile(r"^ {4}(\w+): ", re.MULTILINE)
_KINDS = {
    parse_duration: 'duration: 30, "90s", "1h30min"',
    parse_duration_or_off: 'duration or "off"',
    parse_size: 'size: 4096, "512MiB"',
    parse_limit: 'size or share: "8GiB", "50%"',
    parse_every: 'steps, duration or "off"',
    parse_names: "names, comma-separated",
    parse_accounts: 'users and "@group"s, comma-separated',
    parse_variables: "names, comma-separated",
    parse_umask: 'octal: "022"',
}


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        key: "section.name", as in a settings file.
        variable: the environment variable that sets it.
        kind: what its value is.
        default: as it is written in a settings file.
        about: what it does.
    """

    key: str
    variable: str
    kind: str
    default: str
    about: str


def sections() -> Iterator[tuple[str, str, list[Setting]]]:
    """Name of each section, what it is about, and its settings, in the order of the code."""
    for section in msgspec.structs.fields(Settings):
        if section.name == "origin":
            continue
        title, attributes = _documented(section.type.__doc__ or "")
        settings = []
        for field in msgspec.structs.fields(section.type):
            key = f"{section.name}.{field.name}"
            default = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
            about = attributes.get(field.name, "")
            settings.append(Setting(key, _variable(key), _kind(field.type), written(default, field.type), about))
        yield section.name, title.partition("]: ")[2] or title, settings


def values(settings: Settings) -> Iterator[tuple[str, str, str]]:
    """Key, value as it is written in a settings file, and origin, of every setting."""
    for section in msgspec.structs.fields(Settings):
        if section.name == "origin":
            continue
        table = getattr(settings, section.name)
        for field in msgspec.structs.fields(section.type):
            key = f"{section.name}.{field.name}"
            yield key, written(getattr(table, field.name), field.type), settings.origin[key]


def written(value: Any, kind: Any = None) -> str:
    """A value as TOML that is read back as that value.

    What a table holds under the name of a secret is left out, and so is what a URL gives away (cli.masking).
    """
    parser = _parser(kind)
    if value is None:
        return '"off"'
    if isinstance(value, Mapping):
        inner = ((k, '"..."' if is_secret(str(k)) else written(v)) for k, v in value.items())
        return "{" + ", ".join(f"{json.dumps(str(k))} = {text}" for k, text in inner) + "}"
    if isinstance(value, Every):
        return str(value.steps) if value.steps else json.dumps(_duration(value.seconds))
    if isinstance(value, Limit):
        return json.dumps(f"{value.share * 100:g}%" if value.share else _size(value.nbytes))
    if isinstance(value, Address):
        return json.dumps(str(value))
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(written(each) for each in value) + "]"
    if isinstance(value, int | float):
        if parser in (parse_duration, parse_duration_or_off):
            return json.dumps(_duration(value))
        if parser is parse_umask:
            return json.dumps(f"{value:03o}")
        return json.dumps(_size(int(value))) if parser is parse_size else f"{value!r}"
    return json.dumps(masked_url(str(value)), ensure_ascii=False)


def _variable(key: str) -> str:
    return f"CKPTSVC_{key.replace('.', '_').upper()}"


def _documented(text: str) -> tuple[str, dict[str, str]]:
    """The first line of a docstring, and its attributes."""
    head, _, rest = text.partition("Attributes:\n")
    parts = _ATTRIBUTE.split("\n".join(line[4:] for line in rest.splitlines()))
    about = {name: " ".join(words.split()) for name, words in zip(parts[1::2], parts[2::2], strict=True)}
    return " ".join(head.split()), about


def _parser(kind: Any) -> Any:
    return next(filter(callable, get_args(kind)[1:]), None) if kind is not None else None


def _kind(kind: Any) -> str:
    parser = _parser(kind)
    if parser is not None:
        return _KINDS.get(parser) or ('"host:port"' + (' or "off"' if parser.__name__.endswith("_or_off") else ""))
    bounds = [each for each in get_args(kind)[1:] if isinstance(each, msgspec.Meta)]
    plain = get_args(kind)[0] if bounds else kind
    if get_origin(plain) is Literal:
        return ", ".join(f'"{each}"' for each in get_args(plain))
    name = {str: "text", bool: "true or false", int: "whole number", float: "number"}.get(plain, "table")
    limits = [
        f"{sign} {bound:g}"
        for each in bounds
        for sign, bound in ((">=", each.ge), ("<=", each.le))
        if bound is not None
    ]
    return f"{name}, {' and '.join(limits)}" if limits else name


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length and seconds % length == 0:
            return f"{seconds / length:.0f}{unit}"
    number, unit = (seconds * 1000, "ms") if 0 < seconds < 1 else (seconds, "s")
    return f"{number:.6f}".rstrip("0").rstrip(".") + unit


def _size(nbytes: int) -> str:
    for power, unit in reversed(list(enumerate(("KiB", "MiB", "GiB", "TiB"), 1))):
        if nbytes and nbytes % 1024**power == 0:
            return f"{nbytes // 1024**power}{unit}"
    return f"{nbytes}B"
