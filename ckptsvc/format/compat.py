"""The version of the format and the rule for other versions.

A version is "major.minor". A new minor version only adds what an older reader may ignore; a new major
version changes what it must understand. So a reader takes every minor version of the majors it knows and
refuses newer majors.

Major 2 adds segments: shards whose bytes lie in other files than one of their own. It is written only where
there are some: all else stays readable by all that read major 1.
"""

from __future__ import annotations

import re
from typing import Final

from ckptsvc.errors import Damaged, IncompatibleVersion

FORMAT: Final = "1.0"
"""What this code writes where it can."""

WITH_METRICS: Final = "1.1"
"""What a commit record with metrics has: 1.0 does not know them."""

SEGMENTED: Final = "2.0"
"""What it writes where shards have segments."""

WITH_WRITTEN: Final = "2.1"
"""What the commit record of a checkpoint with segments has, which says how many bytes were written for it."""

_NEWEST_MAJOR: Final = 2
_VERSION = re.compile(r"(0|[1-9][0-9]{0,5})\.(0|[1-9][0-9]{0,5})", re.ASCII)


def check_version(version: object, what: str) -> tuple[int, int]:
    """Splits a version into its numbers and refuses what this reader cannot understand.

    Args:
        version: the `format` field as it was found.
        what: the object it was found in, for the message.

    Raises:
        Damaged: it is not a version at all.
        IncompatibleVersion: its major version is newer than this reader's.
    """
    match = _VERSION.fullmatch(version) if isinstance(version, str) else None
    if match is None:
        raise Damaged(f"{what} does not say which version of the format it has")
    major, minor = int(match[1]), int(match[2])
    if major > _NEWEST_MAJOR:
        raise IncompatibleVersion(
            f"{what} has format {major}.{minor}; this ckptsvc reads up to {_NEWEST_MAJOR}.x",
            hint="read it with a newer ckptsvc",
        )
    if major < 1:
        raise Damaged(f"{what} has format {major}.{minor}, which never existed")
    return major, minor
