"""Pickles of other frameworks, read without running them.

A pickle is a program that may import anything and call it. This reader lets it name what is on a list only, and what is
on the list are plain types and classes without behaviour (`Stub`). Whatever else is named is refused with its name.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import reprlib
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Self, cast

import numpy as np

from ckptsvc.errors import Damaged, InvalidInput
from ckptsvc.interop.torch_format.pickled_numpy import NUMPY

Allowed = Mapping[tuple[str, str], Any]
"""(module, qualified name) -> what stands for it here."""

MAX_DEPTH = 200
"""Deepest nesting of containers that is walked."""

MAX_EXPANSION = 20
"""Most objects that are met by walking through what a pickle made, for each of its bytes: what it refers to twice is
met twice, so that a hundred bytes can make a walk without end. Real pickles have about one."""

ALWAYS_EXPANSION = 100_000
"""As many objects may be met in any case."""


class Fixed(type):
    """A class that is as it was written: a pickle can ask to set attributes of whatever it has named."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise Damaged(f"a pickle changes the class {cls.__name__}")

    def __delattr__(cls, name: str) -> None:
        raise Damaged(f"a pickle changes the class {cls.__name__}")


class _Function:
    """A function of ours that a pickle may call, and not change."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Damaged("a pickle changes a function")


class Stub(metaclass=Fixed):
    """An object of a class that is not here: what it was made from and the attributes it was given.

    Attributes:
        args: the positional arguments of its constructor.
        state: what its `__setstate__` or `__dict__` was given, or None.
    """

    args: tuple[Any, ...]
    state: Any = None

    def __new__(cls, *args: Any) -> Self:
        """Most pickles call this alone, not `__init__`."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __init__(self, *args: Any) -> None:
        """Takes what `__new__` took."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute of the object it stands for."""
        state = self.state[0] if isinstance(self.state, tuple) and self.state else self.state
        return state.get(name, default) if isinstance(state, dict) else default


def stub(name: str) -> type[Stub]:
    """A new class that stands for one that is not here."""
    return cast("type[Stub]", Fixed(name, (Stub,), {}))


def shown(value: Any) -> str:
    """An object of a pickle for a message: at most its beginning, because a small pickle can make an endless one."""
    return _SHORT.repr(value) if type(value) in _SHOWN else f"<{type(value).__name__}>"


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80
_SHOWN = {str, bytes, int, float, bool, type(None), list, tuple, dict}

PLAIN: Allowed = {
    ("collections", "OrderedDict"): OrderedDict,
    ("collections", "defaultdict"): lambda *args: defaultdict(None, *args[1:]),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("builtins", "frozenset"): frozenset,
    ("builtins", "complex"): complex,
    ("builtins", "slice"): slice,
    ("builtins", "bytearray"): lambda *args: _bytearray(*args),
    ("_codecs", "encode"): lambda text, encoding="latin1": _latin1(text, encoding),
    ("argparse", "Namespace"): stub("Namespace"),
    ("pathlib", "PosixPath"): lambda *parts: joined("/", parts),
    ("pathlib._local", "PosixPath"): lambda *parts: joined("/", parts),
    **NUMPY,
}
"""Plain types that many frameworks' pickles name."""


def loads(
    data: bytes | memoryview,
    allowed: Allowed,
    what: str,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The object of one pickle.

    Args:
        data: the pickle.
        allowed: what it may name beyond `PLAIN`.
        what: where it comes from, for messages.
        persistent: makes objects of persistent ids.

    Raises:
        InvalidInput: it names something that is not on the list; the message says what.
        Damaged: it is not a pickle, or beyond a limit.
    """
    return Unpickler(io.BytesIO(data), allowed, what, persistent).load()


class Unpickler(pickle.Unpickler):
    """Reads one pickle after another of a stream; see `loads`."""

    def __init__(
        self, file: io.BytesIO, allowed: Allowed, what: str, persistent: Callable[[Any], Any] | None = None
    ) -> None:
        super().__init__(file)
        self._file, self._allowed, self._what, self._persistent = file, allowed, what, persistent

    def load(self) -> Any:
        """The next object."""
        _check_memo(self._file.getbuffer()[self._file.tell() :], self._what)
        try:
            before = self._file.tell()
            made = super().load()
            check_expansion(made, self._file.tell() - before)
        except (InvalidInput, Damaged) as error:
            if self._what in error.what:
                raise
            raise type(error)(f"{self._what}: {error.what}", hint=error.hint) from None
        except Exception as error:  # noqa: BLE001  what a broken pickle raises is not listed anywhere
            raise Damaged(f"{self._what} is not a readable pickle: {type(error).__name__}: {error}") from None
        return made

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a global."""
        key = (module, name)
        found = self._allowed.get(key) or PLAIN.get(key)
        if found is None:
            raise InvalidInput(
                f"{self._what} is a pickle that imports {module}.{name}, which is not on the list of what may be built",
                hint="it is not run; if the type is harmless, save the object as plain values",
            )
        return _Function(found) if callable(found) and not isinstance(found, type) else found

    def persistent_load(self, pid: Any) -> Any:
        """What stands for a persistent id."""
        if self._persistent is None:
            raise Damaged(f"{self._what} refers to data outside itself")
        return self._persistent(pid)


_LEAVES = frozenset({type(None), bool, int, float, complex, str, bytes, bytearray})


def check_expansion(root: Any, nbytes: int) -> None:
    """Check that walks through what a pickle made end, and soon.

    Args:
        root: what it made.
        nbytes: its length.

    Raises:
        Damaged: it contains itself, is nested too deeply, or expands to too much.
    """
    limit = max(ALWAYS_EXPANSION, MAX_EXPANSION * nbytes)
    known: dict[int, int] = {}

    def count(node: Any, depth: int) -> int:
        """How many objects are met; each is looked into once."""
        found = known.get(id(node))
        if found is not None:
            if not found:
                raise Damaged("an object of a pickle contains itself")
            return found
        if depth > MAX_DEPTH:
            raise Damaged(f"an object is nested more than {MAX_DEPTH} deep")
        known[id(node)] = 0
        total = 1
        for part in _parts(node):
            total += len(part)
            if not _LEAVES.issuperset(map(type, part)):
                total += sum(count(item, depth + 1) for item in part if type(item) not in _LEAVES)
        if total > limit:
            raise Damaged(f"a pickle of {nbytes} bytes expands to more than {limit} objects")
        known[id(node)] = total
        return total

    if type(root) not in _LEAVES:
        count(root, 0)


def _parts(node: Any) -> Iterable[Collection[Any]]:
    """What is in an object: of a container, or of what stands for an object of a class that is not here."""
    if isinstance(node, dict):
        return node.keys(), node.values()
    if isinstance(node, list | tuple | set | frozenset):
        return (node,)
    attributes = getattr(node, "__dict__", None)
    return (attributes.values(),) if isinstance(attributes, dict) else ()


_PUT = re.compile(rb"p[ \t\r\v\f]*\+?([0-9_]+)[ \t\r\v\f]*(?:[\n\0]|\Z)")
"""What may be an opcode PUT, with everything that C's unpickler takes for a number."""


def _check_memo(data: memoryview, what: str) -> None:
    """Refuse a memo index that is larger than the pickle: the unpickler would reserve memory for all below it."""
    size = len(data)
    array = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(array == ord("r"))
    at = at[at + 4 < size]
    numbers = sum(array[at + 1 + i].astype(np.int64) << 8 * i for i in range(4))
    suspicious = bool((np.asarray(numbers) > size).any())
    # Digits that are few and small are no harm even if they are those of an opcode.
    suspicious |= any(not (found[1].isdigit() and len(found[1]) < 19 and int(found[1]) <= size)
                      for found in _PUT.finditer(data))  # fmt: skip
    if suspicious:  # or bytes of something else
        _count_memo(bytes(data), what)


_WIDTHS = [256] * 256
"""For each opcode the bytes of its argument; below 0 what `pickletools` says instead; 256 for no opcode."""
for _opcode in pickletools.opcodes:
    _WIDTHS[ord(_opcode.code)] = _opcode.arg.n if _opcode.arg else 0

_INDEX = re.compile(rb"[0-9]{1,18}\n")

_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def _count_memo(data: bytes, what: str) -> None:
    """Go through the opcodes, as `pickletools.genops` does, which also makes every argument and takes longer."""
    widths, at, size = _WIDTHS, 0, len(data)
    put, long_put, stop = b"pr."
    while at < size:
        opcode = data[at]
        width = widths[opcode]
        first = at + 1
        if 0 <= width < 256:
            at = first + width
            if opcode == stop:
                return
            if opcode == long_put and (number := int.from_bytes(data[first:at], "little")) > size:
                raise Damaged(f"{what} is a pickle that asks for memory for {number} objects")
        elif width == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if opcode in b"ci" else 1):  # module and name
                at = data.find(b"\n", at) + 1 or size
            if opcode == put and not (_INDEX.fullmatch(data, first, at) and int(data[first:at]) <= size):
                raise Damaged(f"{what} is a pickle that asks for memory for {data[first:at][:20]!r} objects")
        elif width in _LENGTHS:
            at = first + _LENGTHS[width]
            at += int.from_bytes(data[first:at], "little")
        else:
            raise Damaged(f"{what} is not a readable pickle: {opcode:#04x} is no opcode")


def joined(between: str, parts: tuple[Any, ...]) -> str:
    """A path or a device, of what its constructor was given.

    Raises:
        Damaged: that is neither text nor a number.
    """
    if not all(type(part) in (str, int) for part in parts):
        raise Damaged("a pickle makes a path or a device of something else than text")
    return between.join(map(str, parts))


def _bytearray(content: Any = b"", encoding: Any = "latin-1") -> bytearray:
    if isinstance(content, str):  # before protocol 3
        content = _latin1(content, encoding)
    if not isinstance(content, bytes):  # of a number it would be so many zeros
        raise Damaged("a pickle makes bytes of something that is neither bytes nor text")
    return bytearray(content)


def _latin1(text: Any, encoding: str) -> bytes:
    if not isinstance(text, str) or encoding not in {"latin1", "latin-1"}:
        raise Damaged("a pickle encodes something that is not text in latin1")
    return text.encode("latin1")
