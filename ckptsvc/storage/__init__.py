"""The port to the places where checkpoints are kept; `connect` opens one.

`api` says what a store is, `registry` finds the driver, `arguments` checks what a driver is given, `wrappers`
add behaviour to any store, and `testing` (which needs pytest and is not imported here) checks a driver.
"""

from ckptsvc.storage.api import READ_LIMIT, TEMPORARY_PREFIX, Capabilities, Entry, Layout, Progress, Spreading, Store
from ckptsvc.storage.arguments import (
    MAX_KEY_BYTES,
    MAX_PART_BYTES,
    check_key,
    check_prefix,
    check_record,
    check_size,
    check_target,
    is_key,
)
from ckptsvc.storage.registry import canonical, connect, schemes

__all__ = [
    "MAX_KEY_BYTES",
    "MAX_PART_BYTES",
    "READ_LIMIT",
    "TEMPORARY_PREFIX",
    "Capabilities",
    "Entry",
    "Layout",
    "Progress",
    "Spreading",
    "Store",
    "canonical",
    "check_key",
    "check_prefix",
    "check_record",
    "check_size",
    "check_target",
    "connect",
    "is_key",
    "schemes",
]
