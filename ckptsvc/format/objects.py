"""The objects document: a rank's state tree without its tensors, as tagged JSON. Never pickle.

What JSON has (None, bool, int, float, str, list, dict with str keys) is written as itself. Everything else
is {"!": tag, "v": value}. An object of any other type is refused with its path and type; `register_codec`
teaches one more. Types are matched exactly: a subclass (an IntEnum, a namedtuple) means more than its base,
so it is refused rather than come back as something else.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from ckptsvc.errors import Damaged, InvalidInput, UnsupportedObject
from ckptsvc.format.arrays import decode_array, decode_bytes, encode_array, encode_bytes
from ckptsvc.format.compat import FORMAT, check_version
from ckptsvc.format.limits import (
    MAX_NAME_BYTES,
    MAX_OBJECTS_BYTES,
    MAX_OBJECTS_DEPTH,
    MAX_OBJECTS_ITEMS,
)
from ckptsvc.format.record import PARSE_ERRORS

TAG: Final = "!"
"""The key that marks an object of the document as a tagged value."""

_INT64: Final = range(-(2**63), 2**63)
_FACTORIES: Final = {f.__name__: f for f in (bool, int, float, str, list, tuple, dict, set)}


class TensorRef(msgspec.Struct, frozen=True):
    """Stands in a tree where a tensor was.

    Attributes:
        name: the logical tensor's name.
    """

    name: str


class Opaque(msgspec.Struct, frozen=True):
    """A value of a type for which this process has no codec. Encoded, it is what it was.

    Attributes:
        tag: the tag of the codec that wrote it.
        value: what that codec made of it.
    """

    tag: str
    value: Any


class Codec(NamedTuple):
    """How a registered type is stored."""

    cls: type
    tag: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


_codec_of_type: dict[type, Codec] = {}
_codec_of_tag: dict[str, Codec] = {}


def register_codec(cls: type, tag: str, encode: Callable[[Any], Any], decode: Callable[[Any], Any]) -> None:
    """Teaches this process to store objects of one more type.

    Args:
        cls: the type; subclasses need a codec of their own.
        tag: its name in documents, with a dot in it ("torch.dtype"), which built-in tags never have.
        encode: makes a storable value (of built-in or registered types) of an object.
        decode: makes the object of that value again; it must refuse bad values with an exception.

    Raises:
        InvalidInput: the type is built in, or the tag has no dot or belongs to another type.
    """
    if cls in _ENCODERS or issubclass(cls, np.generic):
        raise InvalidInput(f"{_type_name(cls)} is stored without a codec")
    if "." not in tag:
        raise InvalidInput(f"the tag {tag!r} has no dot", hint="use the type's full name, as in 'torch.dtype'")
    if tag in _codec_of_tag and _codec_of_tag[tag].cls is not cls:
        raise InvalidInput(f"the tag {tag!r} belongs to {_type_name(_codec_of_tag[tag].cls)}")
    codec = Codec(cls, tag, encode, decode)
    _codec_of_type[cls] = _codec_of_tag[tag] = codec


def encode(tree: Any) -> bytes:
    """The objects document of a state tree.

    Raises:
        UnsupportedObject: an object has a type that cannot be stored, or the tree is nested too deeply or is
            too large; the message has the object's path as a JSON pointer.
    """
    try:
        document = msgspec.json.encode({"format": FORMAT, "tree": _plain(tree, 0)})
    except _RefusedError as refused:
        path = "/" + "/".join(str(key).replace("~", "~0").replace("/", "~1") for key in reversed(refused.path))
        raise UnsupportedObject(f"{path}: {refused.why}", hint=refused.hint) from refused.__cause__
    too_much = _beyond_limits(document)
    if too_much:
        raise UnsupportedObject(
            f"the state apart from its tensors has {too_much}", hint="keep large data in tensors or arrays"
        )
    return document


def decode(data: bytes | memoryview, what: str = "objects document", *, strict: bool = True) -> Any:
    """The state tree of an objects document, with a `TensorRef` where each tensor was.

    Args:
        data: the whole document.
        what: where it came from, for messages.
        strict: refuse values without a codec; otherwise they come back as `Opaque`.

    Raises:
        Damaged: the document is malformed or beyond a limit.
        IncompatibleVersion: it is of a newer major version of the format.
        UnsupportedObject: `strict`, and there is no codec for a tag.
    """
    too_much = _beyond_limits(data)
    if too_much:
        raise Damaged(f"{what} has {too_much}")
    try:
        document = msgspec.json.decode(data)
        if not isinstance(document, dict):
            raise Damaged(f"{what} is not a JSON object")
        check_version(document.get("format"), what)
        if "tree" not in document:
            raise Damaged(f"{what} has no tree")
        return _Decoder(strict).value(document["tree"], 0)
    except PARSE_ERRORS as error:
        raise Damaged(f"{what} is not valid JSON: {error}") from None
    except _BadValueError as bad:
        raise Damaged(f"{what} is malformed: {bad}") from bad.__cause__


class _RefusedError(Exception):
    """An object that cannot be stored; `path` is filled in while the error goes up."""

    def __init__(self, why: str, hint: str = "") -> None:
        super().__init__(why)
        self.why = why
        self.hint = hint
        self.path: list[Any] = []


class _BadValueError(Exception):
    """A tagged value that is not what its tag says."""


def _beyond_limits(data: bytes | memoryview) -> str:
    """What a document has too much of, or ""; told without parsing it."""
    if len(data) > MAX_OBJECTS_BYTES:
        return f"{len(data)} bytes; at most {MAX_OBJECTS_BYTES} are allowed"
    text = bytes(data)
    items = text.count(b",") + text.count(b"[") + text.count(b"{")
    return f"{items} items; at most {MAX_OBJECTS_ITEMS} are allowed" if items > MAX_OBJECTS_ITEMS else ""


def _type_name(cls: type) -> str:
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


# Encoding: one function per type, each from a value (at a depth) to what JSON has.


def _plain(value: Any, depth: int) -> Any:
    encoder = _ENCODERS.get(type(value))
    if encoder is not None:
        if depth > MAX_OBJECTS_DEPTH:
            raise _RefusedError(f"nested more than {MAX_OBJECTS_DEPTH} levels deep", "is there a cycle?")
        return encoder(value, depth)
    if isinstance(value, np.generic):
        return _tagged("numpy.scalar", _array(np.asarray(value)))
    codec = _codec_of_type.get(type(value))
    if codec is None:
        raise _RefusedError(
            f"an object of type {_type_name(type(value))} cannot be stored",
            "store plain values, tensors and arrays, or register a codec for the type",
        )
    try:
        inner = codec.encode(value)
    except Exception as error:
        raise _RefusedError(f"the codec for {_type_name(codec.cls)} failed: {error}") from error
    return _tagged(codec.tag, _plain(inner, depth + 1))


def _tagged(tag: str, value: Any) -> dict[str, Any]:
    return {TAG: tag, "v": value}


def _items(values: Iterable[Any], depth: int) -> list[Any]:
    items: list[Any] = []
    try:
        items.extend(_plain(value, depth + 1) for value in values)
    except _RefusedError as refused:
        refused.path.append(len(items))  # those before it are in
        raise
    return items


def _pairs(mapping: Mapping[Any, Any], depth: int) -> list[Any]:
    pairs = []
    for key, value in mapping.items():
        try:
            pairs.append([_plain(key, depth + 1), _plain(value, depth + 1)])
        except _RefusedError as refused:
            refused.path.append(key)
            raise
    return pairs


def _dict(value: dict[Any, Any], depth: int) -> dict[str, Any]:
    if TAG in value or not all(type(key) is str and _is_unicode(key) for key in value):
        return _tagged("dict", _pairs(value, depth))
    plain: dict[str, Any] = {}
    depth += 1
    key = ""
    try:
        for key, item in value.items():
            plain[key] = _plain(item, depth)
    except _RefusedError as refused:
        refused.path.append(key)
        raise
    return plain


def _int(value: int, _: int) -> Any:
    return value if value in _INT64 else _tagged("int", hex(value))


def _float(value: float, _: int) -> Any:
    return value if math.isfinite(value) else _tagged("float", repr(value))


def _str(value: str, _: int) -> Any:
    return value if _is_unicode(value) else _tagged("str", encode_bytes(value.encode("utf-8", "surrogatepass")))


def _is_unicode(text: str) -> bool:
    """False for a str with lone surrogates (from undecodable file names), which JSON must not have."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeError:
        return False
    return True


def _set(tag: str, values: Iterable[Any], depth: int) -> Any:
    # Sorted by what is written, so that equal sets are equal bytes.
    return _tagged(tag, sorted(_items(values, depth), key=msgspec.json.encode))


def _array(value: np.ndarray[Any, Any]) -> list[Any]:
    try:
        return encode_array(value)
    except InvalidInput as error:
        raise _RefusedError(error.what) from None


def _defaultdict(value: defaultdict[Any, Any], depth: int) -> Any:
    factory = value.default_factory
    name = None if factory is None else getattr(factory, "__name__", "")
    if name is not None and _FACTORIES.get(name) is not factory:
        raise _RefusedError(f"a defaultdict with the factory {factory!r} cannot be stored", "use a plain dict")
    return _tagged("defaultdict", [name, _pairs(value, depth)])


_ENCODERS: Final[dict[type, Callable[[Any, int], Any]]] = {
    type(None): lambda value, _: value,
    bool: lambda value, _: value,
    int: _int,
    float: _float,
    str: _str,
    list: _items,
    dict: _dict,
    tuple: lambda value, depth: _tagged("tuple", _items(value, depth)),
    TensorRef: lambda value, _: _tagged("tensor", value.name),
    bytes: lambda value, _: _tagged("bytes", encode_bytes(value)),
    bytearray: lambda value, _: _tagged("bytearray", encode_bytes(value)),
    complex: lambda value, depth: _tagged("complex", _items((value.real, value.imag), depth)),
    range: lambda value, depth: _tagged("range", _items((value.start, value.stop, value.step), depth)),
    set: lambda value, depth: _set("set", value, depth),
    frozenset: lambda value, depth: _set("frozenset", value, depth),
    deque: lambda value, depth: _tagged("deque", [value.maxlen, _items(value, depth)]),
    OrderedDict: lambda value, depth: _tagged("OrderedDict", _pairs(value, depth)),
    Counter: lambda value, depth: _tagged("Counter", _pairs(value, depth)),
    defaultdict: _defaultdict,
    np.ndarray: lambda value, _: _tagged("numpy.ndarray", _array(value)),
    Opaque: lambda value, depth: _tagged(value.tag, _plain(value.value, depth + 1)),
}


# Decoding: the same in the other direction; whatever is not exactly as above is refused.


class _Decoder:
    def __init__(self, strict: bool) -> None:
        self.strict = strict

    def value(self, plain: Any, depth: int) -> Any:
        if depth > MAX_OBJECTS_DEPTH:
            raise _BadValueError(f"nested more than {MAX_OBJECTS_DEPTH} levels deep")
        cls = type(plain)
        if cls is list:
            return self.items(plain, depth)
        if cls is not dict:
            return plain
        if TAG in plain:
            return self.tagged(plain, depth)
        return {key: self.value(item, depth + 1) for key, item in plain.items()}

    def tagged(self, plain: dict[str, Any], depth: int) -> Any:
        tag, value = plain[TAG], plain.get("v")
        if len(plain) != 2 or "v" not in plain or not isinstance(tag, str):
            raise _BadValueError(f"a tagged value has the keys {sorted(plain)[:5]}")
        decoder = _DECODERS.get(tag)
        if decoder is None:
            return self.registered(tag, value, depth)
        try:
            return decoder(self, value, depth)
        except (InvalidInput, ValueError, TypeError, OverflowError) as error:
            if isinstance(error, UnsupportedObject):
                raise
            raise _BadValueError(f"a value with the tag {tag!r}: {error}") from error

    def registered(self, tag: str, plain: Any, depth: int) -> Any:
        value = self.value(plain, depth + 1)
        codec = _codec_of_tag.get(tag)
        if codec is None:
            if not self.strict:
                return Opaque(tag, value)
            raise UnsupportedObject(
                f"the checkpoint holds an object with the tag {tag[:200]!r}, for which there is no codec",
                hint="register the codec that wrote it before restoring",
            )
        try:
            return codec.decode(value)
        except Exception as error:
            raise _BadValueError(f"the codec for {tag!r} refused its value: {error}") from error

    def items(self, plain: Any, depth: int) -> list[Any]:
        return [self.value(item, depth + 1) for item in _typed(plain, list)]

    def pairs(self, plain: Any, depth: int) -> list[tuple[Any, Any]]:
        return [
            (self.value(key, depth + 1), self.value(item, depth + 1))
            for key, item in (_fields(pair, 2) for pair in _typed(plain, list))
        ]

    def numbers(self, plain: Any, depth: int, count: int, cls: type) -> list[Any]:
        return [_typed(item, cls) for item in self.items(_fields(plain, count), depth)]


def _typed(value: Any, cls: type) -> Any:
    if type(value) is not cls:
        raise _BadValueError(f"expected {_type_name(cls)}, found {_type_name(type(value))}")
    return value


def _fields(value: Any, count: int) -> list[Any]:
    if type(value) is not list or len(value) != count:
        raise _BadValueError(f"expected a list of {count}")
    return value


def _decode_float(_: _Decoder, value: Any, __: int) -> float:
    if value not in ("nan", "inf", "-inf"):
        raise _BadValueError(f"{str(value)[:50]!r} is no special float")
    return float(value)


def _decode_int(_: _Decoder, value: Any, __: int) -> int:
    return int(_typed(value, str), 16)


def _decode_tensor(_: _Decoder, value: Any, __: int) -> TensorRef:
    if not 1 <= len(_typed(value, str).encode()) <= MAX_NAME_BYTES:
        raise _BadValueError(f"a tensor name has 1 to {MAX_NAME_BYTES} bytes")
    return TensorRef(value)


def _decode_deque(decoder: _Decoder, value: Any, depth: int) -> deque[Any]:
    maxlen, plain = _fields(value, 2)
    items = decoder.items(plain, depth)
    if maxlen is not None and len(items) > _typed(maxlen, int):
        raise _BadValueError("a deque is longer than its greatest length")
    return deque(items, maxlen)


def _decode_defaultdict(decoder: _Decoder, value: Any, depth: int) -> defaultdict[Any, Any]:
    name, plain = _fields(value, 2)
    if name is not None and name not in _FACTORIES:
        raise _BadValueError(f"{str(name)[:50]!r} is no factory of a defaultdict")
    factory: Any = None if name is None else _FACTORIES[name]
    return defaultdict(factory, decoder.pairs(plain, depth))


_DECODERS: Final[dict[str, Callable[[_Decoder, Any, int], Any]]] = {
    "int": _decode_int,
    "float": _decode_float,
    "str": lambda _, value, __: decode_bytes(value).decode("utf-8", "surrogatepass"),
    "bytes": lambda _, value, __: decode_bytes(value),
    "bytearray": lambda _, value, __: bytearray(decode_bytes(value)),
    "complex": lambda decoder, value, depth: complex(*decoder.numbers(value, depth, 2, float)),
    "range": lambda decoder, value, depth: range(*decoder.numbers(value, depth, 3, int)),
    "tuple": lambda decoder, value, depth: tuple(decoder.items(value, depth)),
    "set": lambda decoder, value, depth: set(decoder.items(value, depth)),
    "frozenset": lambda decoder, value, depth: frozenset(decoder.items(value, depth)),
    "deque": _decode_deque,
    "dict": lambda decoder, value, depth: dict(decoder.pairs(value, depth)),
    "OrderedDict": lambda decoder, value, depth: OrderedDict(decoder.pairs(value, depth)),
    "Counter": lambda decoder, value, depth: Counter(dict(decoder.pairs(value, depth))),
    "defaultdict": _decode_defaultdict,
    "tensor": _decode_tensor,
    "numpy.ndarray": lambda _, value, __: decode_array(value),
    "numpy.scalar": lambda _, value, __: decode_array(value)[()],
}
