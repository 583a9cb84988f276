"""The objects document: a rank's state tree without its tensors, as tagged JSON. Never pickle.

What JSON has (None, bool, int, float, str, list, dict with str keys) is written as itself. Everything else is an
object whose first key is "!", the tag. An object of any other type is refused with its path and type; `register_codec`
teaches one more. Types are matched exactly: a subclass (an IntEnum, a namedtuple) means more than its base, so it
is refused too, rather than come back as something else.
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from ckptsvc.errors import Damaged, InvalidInput, UnsupportedObject
from ckptsvc.format.compat import FORMAT, check_version
from ckptsvc.format.limits import (
    MAX_NAME_BYTES,
    MAX_NDIM,
    MAX_OBJECTS_BYTES,
    MAX_OBJECTS_DEPTH,
    MAX_OBJECTS_ITEMS,
)
from ckptsvc.format.record import PARSE_ERRORS

TAG: Final = "!"
"""The key that marks an object as a tagged value."""

_VALUE: Final = "v"
_INT64: Final = range(-(2**63), 2**63)
_DTYPE_KINDS: Final = "biufcSUmM"
_PLAIN_FACTORIES: Final = {f.__name__: f for f in (int, float, str, list, dict, set, bool, tuple)}


class TensorRef(NamedTuple):
    """Stands in a tree where a tensor was.

    Attributes:
        name: the logical tensor's name.
    """

    name: str


class Codec(NamedTuple):
    """How a registered type is stored.

    Attributes:
        tag: its name in the document.
        encode: value -> a value the document can hold.
        decode: the opposite.
    """

    tag: str
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
