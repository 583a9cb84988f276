"""The port to the places where checkpoints are kept; `connect` opens one.

`api` says what a store is, `registry` finds the driver, `wrappers` add behaviour to any store, and `testing` (which
needs pytest and is not imported here) checks a driver.
"""

from ckptsvc.storage.api import (
    MAX_KEY_BYTES,
    READ_LIMIT,
    TEMPORARY_PREFIX,
    Capabilities,
    Entry,
    Store,
    check_key,
    check_prefix,
)
from ckptsvc.storage.registry import canonical, connect, schemes

__all__ = [
    "MAX_KEY_BYTES",
    "READ_LIMIT",
    "TEMPORARY_PREFIX",
    "Capabilities",
    "Entry",
    "Store",
    "canonical",
    "check_key",
    "check_prefix",
    "connect",
    "schemes",
]
