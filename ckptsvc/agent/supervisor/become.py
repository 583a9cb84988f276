"""Where root becomes a user to run one command of his: drops all rights, and executes it.

    python -m ckptsvc.agent.supervisor.become UID GID GROUP,... COMMAND...

A program of its own, so that whoever starts it waits for nothing in it: from the moment it is the user's he may stop
it, and what is still to be done then is his.
"""

from __future__ import annotations

import os
import sys

from ckptsvc.agent.supervisor.entrance import drop
from ckptsvc.errors import EXIT_STATUS, CkptsvcError, ConfigError
from ckptsvc.rpc.accounts import Account


def main() -> int:
    """Run the command as the user, or say why not."""
    uid, gid, groups, *command = sys.argv[1:]
    try:
        drop(Account("", int(uid), int(gid), tuple(map(int, groups.split(","))), "/"))
        os.execvp(command[0], command)
    except CkptsvcError as error:
        problem = error
    except OSError as error:
        problem = ConfigError(f"user {uid} cannot execute {command[0]}: {error.strerror}")
    sys.stderr.write(f"error: {problem.what}\n")
    return EXIT_STATUS[problem.code]


if __name__ == "__main__":
    sys.exit(main())
