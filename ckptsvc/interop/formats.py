"""The table of formats: their names in addresses, who reads them, who writes them, how they are recognised.

An address is `<format>:<path or URL>`, for example "deepspeed:/scratch/run/global_step100" or "hf:s3://bucket/llama",
or a path or URL alone, which is then looked at. Options of the format may follow, as in "torch:/x.pt?model=net".
Modules are imported when their format is used.
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


NATIVE = "ckptsvc"
"""The name of our own format."""

FORMATS: dict[str, Format] = {
    # First, because it is told by the names of its folders; it is written by `convert` itself (see conversion.native).
    NATIVE: Format("ckptsvc's own", "conversion.native:detect_native", "conversion.native:read_native"),
    "deepspeed-universal": Format(
        "DeepSpeed universal", "deepspeed.universal:detect", "deepspeed.universal:read", "deepspeed.write:write"
    ),
    # Before hf: checkpoints of Hugging Face's Trainer with DeepSpeed have weights beside, and the optimizer only here.
    "deepspeed": Format("DeepSpeed", "deepspeed.read:detect", "deepspeed.read:read", "deepspeed.native_write:write"),
    "bytecheckpoint": Format("ByteCheckpoint", "bytecheckpoint:detect", "bytecheckpoint:read"),
    "torchsnapshot": Format("torchsnapshot", "torchsnapshot:detect", "torchsnapshot:read"),
    "megatron": Format(
        "Megatron-Core torch_dist", "megatron.dist:detect", "megatron.dist:read", "megatron.dist_write:write"
    ),
    "megatron-classic": Format(
        "Megatron classic", "megatron.classic:detect", "megatron.classic:read", "megatron.classic_write:write"
    ),
    # Before hf: its writer of safetensors shards says in their headers which part of each tensor they have.
    "dcp": Format("PyTorch DCP", "dcp.read:detect", "dcp.read:read", "dcp.write:write"),
    "hf": Format("Hugging Face", "huggingface:detect", "huggingface:read", "huggingface:write"),
    "npz": Format("numpy", "npz:detect", "npz:read", "npz:write"),
    "torch": Format("torch.save", "torch_format.save:detect", "torch_format.save:read", "torch_format.save:write"),
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


def is_foreign(address: str) -> bool:
    """Whether an address names a format of another framework.

    Raises:
        InvalidInput: it begins with what looks like a format and is none.
    """
    return split_address(address)[0] not in {"", NATIVE}


def split_options(address: str) -> tuple[str, dict[str, str]]:
    """(address, options) of "hf:/path?name=value&name=value".

    Raises:
        InvalidInput: something after the "?" is not an option.
    """
    place, mark, query = address.partition("?")
    options: dict[str, str] = {}
    for item in query.split("&") if mark and query else ():
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InvalidInput(f"{item!r} in {address!r} is not an option", hint="write name=value")
        options[name] = value
    return place, options


def open_foreign(address: str, options: Mapping[str, str] | None = None) -> Logical:
    """Open a checkpoint of another framework.

    Args:
        address: see the module.
        options: of the format, besides those in the address.

    Raises:
        InvalidInput: no format is named, and none is recognised.
        CkptsvcError: as the importer raises.
    """
    address, own = split_options(address)
    name, place = split_address(address)
    files = open_files(place)
    try:
        if not name:
            name = recognised(files)
        read: Importer = _function(FORMATS[name].read)
        return read(files, f"{name}:{place}", {**own, **(options or {})})
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
