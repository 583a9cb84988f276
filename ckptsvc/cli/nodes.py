"""`ckptsvc nodes`: which nodes are not used, and why."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from ckptsvc.agent import nodelist
from ckptsvc.cli import others
from ckptsvc.cli.terminal import Screen, duration, emit, note, printable
from ckptsvc.config import load
from ckptsvc.control.exclusion import FORGOTTEN, LIMIT, Strikes
from ckptsvc.errors import ConfigError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@others.options
def command(as_json: bool) -> int:
    """List the nodes that somebody has excluded, and those that have failed.

    They are read from the file that the coordinators of this user's jobs share (launch.state): no agent has to run.

    \b
    JSON: {"directory", "nodes": [{"node", "excluded", "by_hand", "score",
      "since", "until", "why"}]}
    excluded says whether jobs that begin now leave the node out; by_hand is
    null where nobody has said anything of it; score is what failures weigh
    (excluded above 2.5); times are Unix seconds, null for none.
    With --user and --all-users the JSON is {"users": [{"user", "uid",
    "status", "result", "said"}]}: exit status, document and messages of each.
    """  # noqa: D301  \b is click's
    if accounts := others.wanted():
        return others.show(accounts, as_json)
    where = nodelist.directory_of(os.environ, load(os.environ).launch)
    if where is None:
        raise ConfigError("there is no place for the list of nodes: HOME is not set", hint="set launch.state")
    found, now = nodelist.read(where), time.time()
    rows = [_about(name, found, now) for name in sorted(found.nodes.keys() | found.words.keys())]
    rows = [row for row in rows if row["excluded"] or row["by_hand"] or row["score"] > FORGOTTEN]
    if as_json:
        emit({"directory": str(where), "nodes": rows})
    elif rows:
        _show(rows, now)
    else:
        note(f"no node is excluded or has failed of late, by {printable(str(where / nodelist.NAME))}")
    return 0


def _about(name: str, found: nodelist.NodeList, now: float) -> dict[str, Any]:
    word, entry = found.words.get(name), found.nodes.get(name)
    score = Strikes(entry.score, entry.at, "").now(now) if entry else 0.0
    by_hand = None if word is None else word.holds(now)
    source: Any = word if word is not None and by_hand else entry or word
    return {
        "node": name,
        "excluded": bool(by_hand) or score > LIMIT,
        "by_hand": by_hand,
        "score": score,
        "since": source.at,
        "until": word.until or None if word is not None and by_hand else None,
        "why": source.why,
    }


def _show(rows: list[dict[str, Any]], now: float) -> None:
    def state(row: dict[str, Any]) -> str:
        if row["by_hand"]:
            return f"excluded for {duration(row['until'] - now)} more" if row["until"] else "excluded"
        return "has failed too often" if row["excluded"] else "has failed" if row["score"] > FORGOTTEN else "included"

    cells = [
        [printable(row["node"]), state(row), f"{row['score']:.1f}", duration(now - row["since"]), printable(row["why"])]
        for row in rows
    ]
    Screen().table(["NODE", "STATE", "FAILURES", "SINCE", "WHY"], cells, right=("FAILURES", "SINCE"), fold="WHY",
        style=lambda row, column: "doubt" if column == "STATE" and rows[row]["excluded"] else "")  # fmt: skip
