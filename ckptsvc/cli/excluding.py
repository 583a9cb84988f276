"""Excluding nodes where no agent runs that could be told: the list of the jobs to come is changed here."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ckptsvc.agent import nodelist
from ckptsvc.agent.orders.orders import check_node
from ckptsvc.cli.agents import agent_directory, ask_all
from ckptsvc.cli.audit import take_down
from ckptsvc.config import load
from ckptsvc.errors import ConfigError
from ckptsvc.rpc.accounts import user_name
from ckptsvc.rpc.v1.agent_pb2 import VerbResponse


def without_agent(
    node: str, directory: Path | None, reason: str, seconds: float, *, excluded: bool
) -> VerbResponse | None:
    """Do it, where no agent runs here; None where one does, which is to be asked instead.

    Raises:
        CkptsvcError: it cannot be done.
    """
    check_node(node)
    if ask_all(directory or agent_directory()):
        return None
    where = nodelist.directory_of(os.environ, load(os.environ).launch)
    if where is None:
        raise ConfigError("there is no place for the list of nodes: HOME is not set", hint="set launch.state")
    now, by = time.time(), user_name(os.getuid())
    why = f"{reason} ({by})" if reason else f"by {by}"
    nodelist.keep(where, {}, {node: nodelist.Word(excluded, now, now + seconds if seconds else 0.0, why)})
    take_down("exclude" if excluded else "include", node, why)
    what = f"node {node} is excluded from the jobs to come" if excluded else f"node {node} may be used again"
    return VerbResponse(done=True, what=[what])
