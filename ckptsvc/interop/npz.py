"""numpy archives (`.npz`): arrays of frameworks that are not torch, in and out.

Names are canonical where they begin with "model/" or "optimizer/", and names of the model otherwise: "layers/0/w" is
"model/layers/0/w". Source: numpy 2, `numpy/lib/format.py` (versions 1 to 3 of the array format).

Read options: none. Write options:
    file    name of the archive; default "checkpoint.npz"
    dtype   element type for those that numpy does not know (bfloat16, float8); without it they are refused
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from ckptsvc.errors import CkptsvcError, Damaged, InvalidInput, UnsupportedObject
from ckptsvc.geometry.box import Box
from ckptsvc.geometry.reshard import Block
from ckptsvc.interop.archive import ArchivePlan
from ckptsvc.interop.files import Files, LocalFiles
from ckptsvc.interop.logical import MODEL, Foreign, Logical, Note, Stretch
from ckptsvc.interop.options import known
from ckptsvc.interop.outputs import Fill, Output
from ckptsvc.interop.torch_format.zips import FileRange, data_offset
from ckptsvc.types import DTYPES, TensorMeta

MAX_HEADER = 1 << 16
"""Longest header of an array, in bytes."""

MAX_UNPACKED = 1 << 31
"""Largest compressed array that is unpacked in memory, in bytes; only one of that size is there at a time."""

_STATE = "optimizer/"
_NUMPY = {name: np.dtype(name) for name in DTYPES if hasattr(np, name) and name != "bool"} | {"bool": np.dtype(bool)}
_NAMES = {dtype.str: name for name, dtype in _NUMPY.items()}


def detect(files: Files) -> bool:
    """One file with the ending .npz."""
    return isinstance(files, LocalFiles) and files.only.endswith(".npz")


def read(files: Files, origin: str, options: Mapping[str, str]) -> Foreign:
    """One archive.

    Raises:
        InvalidInput: the address is no file, or an array is of objects (a pickle).
        Damaged: it is not an archive of arrays, or is truncated.
    """
    known(options, ())
    key = files.only if isinstance(files, LocalFiles) else ""
    if not key:
        raise InvalidInput(f"{origin} is a folder: name the file")
    foreign = Foreign(origin, files)
    what, length = f"{files.url}", files.size(key)
    stream = io.BufferedReader(FileRange(files, key, 0, length), 64 << 10)
    try:
        with zipfile.ZipFile(stream) as archive:
            for member in archive.infolist():
                _add(foreign, archive, member, key, what)
    except CkptsvcError:
        raise
    except Exception as error:  # noqa: BLE001  what zipfile and numpy raise of broken files is not listed anywhere
        raise Damaged(f"{what} is not a readable archive of arrays: {error}") from None
    return foreign.seal()


def write(logical: Logical, options: Mapping[str, str]) -> Output:
    """One archive that `numpy.load(allow_pickle=False)` reads.

    Raises:
        UnsupportedObject: numpy has no such element type, and no other was asked for.
    """
    known(options, ("file", "dtype"))
    archive = ArchivePlan()
    notes: list[Note] = []
    cast = 0
    for name in logical.names():
        if name.startswith("@"):
            continue
        meta = logical.meta(name)
        dtype = meta.dtype if meta.dtype in _NUMPY else options.get("dtype", "")
        if dtype not in _NUMPY:
            raise UnsupportedObject(
                f"{name}: numpy has no element type {meta.dtype}", hint="cast with the option dtype=float32"
            )
        cast += dtype != meta.dtype
        size = Box.full(meta.shape).size * DTYPES[dtype].itemsize
        fills = [Fill(0, name, Box.full(meta.shape), dtype)] if size else []
        member = f"{name.removeprefix(MODEL)}.npy"
        archive.filled(member, size, fills, _header(np.dtype(_NUMPY[dtype]), meta.shape))
    if cast:
        notes.append(Note("lost", f"{cast} tensors are cast to {options['dtype']}"))
    if logical.aliases:
        notes.append(Note("lost", f"{len(logical.aliases)} further names of tied tensors are not written"))
    if logical.document():
        notes.append(Note("lost", "plain values (parameter groups, schedulers) have no place in an archive of arrays"))
    return Output([archive.output(options.get("file", "checkpoint.npz"))], notes=notes, facts=dict(options))


def _add(foreign: Foreign, archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str, what: str) -> None:
    if not member.filename.endswith(".npy"):
        raise Damaged(f"{what} has the member {member.filename[:200]!r}, which is not an array")
    with archive.open(member) as opened:
        head = opened.read(MAX_HEADER)
    shape, fortran, dtype, start = _parsed(head, f"{what}: {member.filename[:200]!r}")
    name = member.filename.removesuffix(".npy")
    name = name if name.startswith((MODEL, _STATE)) else f"{MODEL}{name}"
    meta = TensorMeta(name, dtype, shape)
    size = Box.full(shape).size * DTYPES[dtype].itemsize
    if start + size != member.file_size:
        raise Damaged(f"{what}: {member.filename[:200]!r} has {member.file_size} bytes, {start + size} are expected")
    block = None
    if fortran and len(shape) > 1:
        stored = shape[::-1]
        block = Block(stored, Box.full(stored), tuple(range(len(shape) - 1, -1, -1)))
    if member.compress_type == zipfile.ZIP_STORED:
        assert archive.fp is not None
        begin = data_offset(archive.fp, member.header_offset, what) + start
        foreign.add(meta, Box.full(shape), (key, begin), block)
        return
    if member.compress_type != zipfile.ZIP_DEFLATED:
        raise InvalidInput(f"{what}: {name} is compressed in a way that numpy does not know")
    if size > MAX_UNPACKED:
        raise InvalidInput(f"{what}: {name} is compressed and has {size} bytes", hint="save it with numpy.savez")
    load = _unpacker(member.filename, start)
    foreign.add(meta, Box.full(shape), Stretch(key, 0, size, None, load), block)


def _unpacker(member: str, start: int) -> Any:
    def load(files: Files) -> bytes:
        assert isinstance(files, LocalFiles)
        with zipfile.ZipFile(FileRange(files, files.only, 0, files.size(files.only))) as archive:
            return archive.read(member)[start:]

    return load


def _parsed(head: bytes, what: str) -> tuple[tuple[int, ...], bool, str, int]:
    """(shape, column-major, element type, first byte of the data) in the header of an array."""
    stream = io.BytesIO(head)
    version = np.lib.format.read_magic(stream)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(
        version
    )
    if read_header is None:
        raise Damaged(f"{what}: unknown version {version} of the array format")
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject:
        raise InvalidInput(f"{what} is an array of Python objects, which is a pickle", hint="it is not read")
    name = _NAMES.get(dtype.str)
    if name is None or any(n < 0 for n in shape):
        raise InvalidInput(f"{what}: the element type {dtype.str!r} is not supported")
    return tuple(int(n) for n in shape), bool(fortran), name, stream.tell()


def _header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()
