"""What conversions have left beside their targets: records of what is finished, and files without their name."""

from __future__ import annotations

from collections.abc import Iterator

from ckptsvc.errors import CkptsvcError
from ckptsvc.interop.conversion.ledger import Ledger
from ckptsvc.interop.conversion.target import PARTIAL, RECORDS
from ckptsvc.pipeline.garbage import Garbage
from ckptsvc.storage import Store


def leftovers(store: Store, name: str) -> Iterator[Garbage]:
    """The records of an unfinished conversion into a target of files, and what it has written.

    Args:
        store: of the folder that the target is in, or would be.
        name: of the target. Nothing is yielded unless there is a conversion's record of it.
    """
    records = f"{name}{RECORDS}"
    if "plan" not in store.children(records):
        return
    try:
        plan = Ledger(store, records).read()
        title = f" of {plan.created}" if plan else ""
    except CkptsvcError:
        title = ""
    if store.url.startswith("file://"):  # elsewhere files have their own names at once
        written = tuple(store.list(f"{name}{PARTIAL}"))
        if written:
            yield Garbage(f"{name}{PARTIAL}", None, f"files of an unfinished conversion{title}", written)
    entries = sorted(store.list(records), key=lambda entry: entry.key.endswith("/plan"))  # the plan goes last
    yield Garbage(records, None, f"records of an unfinished conversion{title}", tuple(entries))
