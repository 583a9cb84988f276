"""Points in the life of a save at which a test can stop a process, to kill it, or others, at exactly that moment.

CKPTSVC_FAILPOINT names a directory (unset outside tests). A process that reaches a point whose name is the name of a
file in it renames that file to "<name>.held", writes its process id into it, and waits until it is removed. In the
order of a save:

    before_copy  in_copy  before_submit          training process: it has an arena; ...; the arena is full
    before_label  after_label                    agent: the snapshot is handed over; it is the agent's from now on
    after_submit                                 training process: `step` is about to return
    before_shard  in_shard  after_shard          I/O worker
    before_commit  before_record  after_commit   I/O worker: ...; the index is written; the record is there
    in_expire  in_sweep                          I/O worker: the commit record of an old checkpoint is removed; a file

With a local disk, where a shard goes first:

    after_local                                  I/O worker: it is a copy
    before_drain  in_drain  after_drain          I/O worker: ...; ...; it is in the durable store, and not marked so yet
    in_refill                                    I/O worker: a part of it is in an arena again

With nodes that keep copies for each other:

    in_transfer                                  courier: it has taken an extent from another node
"""

from __future__ import annotations

import os
import time
from pathlib import Path

VARIABLE = "CKPTSVC_FAILPOINT"


def failpoint(name: str) -> None:
    """Wait here if a test wants it."""
    folder = os.environ.get(VARIABLE)
    if folder:
        _hold(Path(folder), name)


def _hold(folder: Path, name: str) -> None:
    held = folder / f"{name}.held"
    try:
        (folder / name).rename(held)  # only one process gets it, once
    except FileNotFoundError:
        return
    held.write_text(str(os.getpid()))
    while held.exists():
        time.sleep(0.01)
