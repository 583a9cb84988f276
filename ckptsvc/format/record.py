"""Small JSON records with one spelling only, decoded strictly.

Canonical form: one JSON object in UTF-8, keys sorted by code point, no white space, no escape that JSON
does not require, integers and strings (and objects of strings) as the only values. So equal records are
equal bytes, a digest of a record has a meaning, and a duplicate key or trailing garbage cannot hide: the
reader encodes what it understood and compares.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar

import msgspec

from ckptsvc.errors import Damaged
from ckptsvc.format.compat import check_version

R = TypeVar("R", bound=msgspec.Struct)

PARSE_ERRORS: Final = (msgspec.MsgspecError, UnicodeError, RecursionError, OverflowError)
"""All that msgspec raises for bytes that are not the JSON that was asked for."""


def canonical(record: object) -> bytes:
    """The canonical form of a Struct or of a dict of plain values."""
    return msgspec.json.encode(record, order="sorted")


def parse(data: bytes, limit: int, what: str) -> dict[str, Any]:
    """A record as a dict, its version checked but not its fields.

    Args:
        data: the bytes of the record.
        limit: the most bytes it may have.
        what: the object they came from, for the message.

    Raises:
        Damaged: too long, not JSON, not an object, or not in canonical form.
        IncompatibleVersion: the record's format is of a newer major version.
    """
    if len(data) > limit:
        raise Damaged(f"{what} has {len(data)} bytes; at most {limit} are allowed")
    try:
        record = msgspec.json.decode(data)
        if not isinstance(record, dict):
            raise Damaged(f"{what} is not a JSON object")
        check_version(record.get("format"), what)
        if canonical(record) != bytes(data):
            raise Damaged(f"{what} is not in canonical form")
    except PARSE_ERRORS as error:
        raise Damaged(f"{what} is not valid JSON: {error}") from None
    return record


def convert(record: dict[str, Any], cls: type[R], what: str) -> R:
    """The record as a value of `cls`; fields that `cls` does not know (of a newer minor version) are dropped.

    Raises:
        Damaged: a field is missing or of the wrong type or range.
    """
    try:
        return msgspec.convert(record, cls)
    except PARSE_ERRORS as error:
        raise Damaged(f"{what} has a bad field: {error}") from None
