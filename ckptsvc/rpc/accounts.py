"""Who a user of the node is, and whether a list of users and groups has him."""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass

NO_GROUP = -1


@dataclass(frozen=True, slots=True)
class Account:
    """A user as the system knows him; without an account, `name` is ""."""

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


def account_of(uid: int, gid: int = NO_GROUP) -> Account:
    """The account of a user; one without any has the group he came with, no other, and no home.

    It may take long: the accounts of many sites are on a network.

    Raises:
        OSError: the accounts cannot be read.
    """
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return Account("", uid, gid, (gid,), "/")
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return Account(entry.pw_name, uid, entry.pw_gid, tuple(groups), entry.pw_dir)


def is_listed(account: Account, names: Sequence[str]) -> bool:
    """Whether a list of users and "@group"s has him: by name, by number, by group."""
    for name in names:
        if name.startswith("@"):
            with contextlib.suppress(KeyError):
                if grp.getgrnam(name[1:]).gr_gid in account.groups:
                    return True
        elif name in (account.name, str(account.uid)):
            return True
    return False


def user_name(uid: int) -> str:
    """The name of a user; his number where there is no account."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
