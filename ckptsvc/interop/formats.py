"""The table of formats: their names in addresses, who reads them, who writes them, how they are recognised.

An address is `<format>:<path or URL>`, for example "deepspeed:/scratch/run/global_step100" or "hf:s3://bucket/llama",
or a path or URL alone, which is then looked at. Modules are imported when their format is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ckptsvc.errors import CkptsvcError, InvalidInput
from ckptsvc.interop.files import Files, open_files
from ckptsvc.interop.logical import Logical
from ckptsvc.interop.outputs import Output

Importer = Callable[[Files, str, Mapping[str, str]], Logical]
"""(files, origin for messages, options) -> the checkpoint. The options of a format are documented in its module."""

Exporter = Callable[[Logical, Mapping[str, str]], Output]
"""(checkpoint, options) -> the files of that format."""

Detector = Callable[[Files], bool]
"""Whether these files are a checkpoint of the format, judged by names and small files."""


class Format(NamedTuple):
    """A row of the table; the functions are named "module:function" below ckptsvc.interop.

    Attributes:
        title: what people call it.
        detect: a `Detector`; asked in the order of the table.
        read: an `Importer`.
        write: an `Exporter`, or "" if the format is only read.
    """

    title: str
    detect: str
    read: str
    write: str = ""


FORMATS: dict[str, Format] = {
    "bytecheckpoint": Format("ByteCheckpoint", "bytecheckpoint:detect", "bytecheckpoint:read"),
    "torchsnapshot": Format("torchsnapshot", "torchsnapshot:detect", "torchsnapshot:read"),
    "megatron": Format("Megatron-Core torch_dist", "megatron_dist:detect", "megatron_dist:read"),
    "megatron-classic": Format("Megatron classic", "megatron_classic:detect", "megatron_classic:read"),
    "dcp": Format("PyTorch DCP", "dcp:detect", "dcp:read", "dcp_write:write"),
}
"""By the name in addresses."""


def split_address(address: str) -> tuple[str, str]:
    """(format, path or URL); the format is "" if the address does not name one.

    Raises:
        InvalidInput: it begins with what looks like a format and is none.
    """
    name, colon, rest = address.partition(":")
    if not colon or rest.startswith("//") or "/" in name or name == "":
        return "", address
    if name not in FORMATS:
        raise InvalidInput(f"{name!r} is no format", hint=f"known are {', '.join(sorted(FORMATS))}")
    return name, rest


def open_foreign(address: str, options: Mapping[str, str] | None = None) -> Logical:
    """Open a checkpoint of another framework.

    Args:
        address: see the module.
        options: of the format, as in `--from-option NAME=VALUE`.

    Raises:
        InvalidInput: no format is named, and none is recognised.
        CkptsvcError: as the importer raises.
    """
    name, place = split_address(address)
    files = open_files(place)
    try:
        if not name:
            name = recognised(files)
        read: Importer = _function(FORMATS[name].read)
        return read(files, f"{name}:{place}", options or {})
    except BaseException:
        files.close()
        raise


def recognised(files: Files) -> str:
    """The format of these files.

    Raises:
        InvalidInput: none is recognised.
    """
    for name, entry in FORMATS.items():
        if _detects(entry, files):
            return name
    raise InvalidInput(
        f"{files.url} is no checkpoint of a format that is recognised",
        hint=f"name the format, as in 'dcp:{files.url}'; known are {', '.join(sorted(FORMATS))}",
    )


def exporter(name: str) -> Exporter:
    """The exporter of a format.

    Raises:
        InvalidInput: there is no such format, or it is only read.
    """
    if name not in FORMATS or not FORMATS[name].write:
        writable = ", ".join(sorted(known for known, entry in FORMATS.items() if entry.write))
        raise InvalidInput(f"{name!r} cannot be written", hint=f"can be written: {writable}")
    function: Exporter = _function(FORMATS[name].write)
    return function


def _detects(entry: Format, files: Files) -> bool:
    try:
        return bool(_function(entry.detect)(files))
    except CkptsvcError:  # what cannot be read is not recognised; the importer says why
        return False


def _function(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(f"ckptsvc.interop.{module}"), function)
