"""What the machine gives this process: files that may be open (a connection, a pipe of a rank and an arena is one each),
and what it can be short of.
"""

from __future__ import annotations

import errno
import logging
import resource

log = logging.getLogger("ckptsvc.agent")


def raise_open_files() -> tuple[int, int]:
    """Raise the soft limit of open files to the hard one; returns both as they were, for the ranks.

    The soft one is 1024 nearly everywhere, for programs that use select(2), which can look at no more. Ours do not;
    the programs that ranks are may.
    """
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    except (OSError, ValueError) as error:  # the kernel's own limit is lower (fs.nr_open)
        log.debug("open files: %d, the limit cannot be raised: %s", before[0], error)
    else:
        log.debug("open files: %d, before %d", before[1], before[0])
    return before


SCARCE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES)


def lacking(error: OSError | MemoryError) -> str:
    """What the agent is short of, as a reason to end; "" if that is not it: whoever started it starts it again."""
    if isinstance(error, MemoryError):
        return "it gets no memory"
    if error.errno not in SCARCE:
        return ""
    return f"{error.strerror} ({error.filename})" if error.filename else error.strerror or ""
