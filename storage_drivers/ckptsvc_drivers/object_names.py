"""Keys of ours and names at the server: the same but for control characters, backslashes and the store's prefix.

obstore takes no control characters, and Azure takes a backslash for "/". They are written as percent escapes, and a "%"
that would look like one of them is, too; any other name is kept to the letter.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import quote, unquote

from ckptsvc.storage.api import TEMPORARY_PREFIX
from ckptsvc.storage.arguments import is_key

_ESCAPE = re.compile(r"[\x00-\x1f\x7f\\]|%(?=0[0-9A-F]|1[0-9A-F]|25|5C|7F)")
_ESCAPED = re.compile(r"%(0[0-9A-F]|1[0-9A-F]|25|5C|7F)")
_UPLOAD = f"/{TEMPORARY_PREFIX}upload-"
_PIECE = 200  # characters of an upload's id in one part of a key, which has 255 bytes at most


def name_of(prefix: str, key: str) -> str:
    """The name at the server of a key below a store's prefix; `key` may be "" where everything is meant."""
    whole = "/".join(part for part in (prefix, key) if part)
    return _ESCAPE.sub(lambda found: f"%{ord(found[0]):02X}", whole)


def key_of(prefix: str, name: str) -> str | None:
    """The key of a name at the server; None where it lies beside the prefix, or is none that a store can have."""
    whole = _ESCAPED.sub(lambda found: chr(int(found[1], 16)), name)
    if prefix:
        if not whole.startswith(f"{prefix}/"):
            return None
        whole = whole[len(prefix) + 1 :]
    return whole if is_key(whole) else None


class Upload(NamedTuple):
    """A multipart upload: of the object `key`, with the server's id of it."""

    key: str
    id: str

    @property
    def temporary(self) -> str:
        """The key under which a listing shows it and `delete` aborts it."""
        quoted = quote(self.id, safe="")
        pieces = [quoted[at : at + _PIECE] for at in range(0, len(quoted), _PIECE)]
        return self.key + _UPLOAD + "/".join(pieces)


def upload_of(key: str) -> Upload | None:
    """The upload that a temporary key stands for, or None."""
    object_key, _, rest = key.partition(_UPLOAD)
    return Upload(object_key, unquote(rest.replace("/", ""))) if rest and object_key else None
