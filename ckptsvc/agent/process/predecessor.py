"""How the agent before this one has ended.

While one runs, its lock file says so; what is still there later was left by one that was killed (by the kernel for lack
of memory, say) and could tell nobody.

    PID OOM_KILLS       processes that the kernel had killed on this machine when it began
"""

from __future__ import annotations

import contextlib
import os

from ckptsvc.agent.watching.procfs import oom_kills

_LONGEST = 64


def begin(lock: int) -> str:
    """Write the record of this process; returns what is to be said of the one before, "" if it ended in good order."""
    try:
        left = os.pread(lock, _LONGEST, 0).decode("ascii").split()
        pid, before = (int(word) for word in left) if left else (0, 0)
    except (OSError, ValueError):
        pid, before = 0, 0
    now = oom_kills()
    with contextlib.suppress(OSError):  # a full disk: then the next one says nothing
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {now}\n".encode(), 0)
    if not pid:
        return ""
    killed = f"; since it began, the kernel has killed {now - before} processes here for lack of memory"
    return f"the agent before this one, process {pid}, was killed or broke off{killed if now > before else ''}"


def end(lock: int) -> None:
    """This agent ends in good order."""
    with contextlib.suppress(OSError):
        os.ftruncate(lock, 0)
