"""Pins: small objects that keep a checkpoint from being deleted.

A pin counts from when it is in the store, for whoever deletes looks for pins once more after the commit record is gone
(see `retain`). Who pins looks for the commit record once more after the pin is there. So one of the two notices.
"""

from __future__ import annotations

from ckptsvc.errors import Damaged, IncompatibleVersion, NoCheckpoint, NotFound
from ckptsvc.format.commit import PINS, PinRecord, parse_pin_name, pin_key
from ckptsvc.format.limits import MAX_RECORD_BYTES
from ckptsvc.pipeline.catalog import Ref, exists, read_commit
from ckptsvc.pipeline.clock import now_iso
from ckptsvc.storage import Store

MAX_NOTE = 1000
"""Characters of a pin's note; the rest is cut off."""


def pin(store: Store, ref: Ref, note: str = "") -> bool:
    """Keep a checkpoint from being deleted; returns False if it was pinned already, by whomever.

    Raises:
        NoCheckpoint: there is none, or not any more.
        Damaged, IncompatibleVersion: its commit record cannot be used.
    """
    _check_there(store, ref, "has no commit record: its save never finished, or it was deleted")
    record = PinRecord(checkpoint=ref.name, note=note[:MAX_NOTE], created=now_iso())
    made = store.put_if_absent(pin_key(ref.name), record.encode())
    try:
        _check_there(store, ref, "has been deleted meanwhile")
    except NoCheckpoint:
        if made:
            store.delete(pin_key(ref.name))
        raise
    return made


def unpin(store: Store, ref: Ref) -> bool:
    """Let retention decide again; returns False if it was not pinned."""
    if not exists(store, pin_key(ref.name)):
        return False
    store.delete(pin_key(ref.name))
    return True


def pinned(store: Store) -> set[Ref]:
    """Every checkpoint that is pinned, whether it is there or not; what the pins say is not read."""
    found = filter(None, map(parse_pin_name, store.children(PINS)))
    return {Ref(epoch, step) for step, epoch in found}


def read_pin(store: Store, ref: Ref) -> PinRecord | None:
    """What the pin of a checkpoint says; None where there is no pin. One that cannot be read says nothing."""
    key = pin_key(ref.name)
    try:
        return PinRecord.decode(store.read(key, MAX_RECORD_BYTES), key)
    except NotFound:
        return None
    except (Damaged, IncompatibleVersion):
        return PinRecord(checkpoint=ref.name, note="", created="")


def _check_there(store: Store, ref: Ref, otherwise: str) -> None:
    if read_commit(store, ref) is None:
        raise NoCheckpoint(f"{store.url}/{ref.name} {otherwise}")
