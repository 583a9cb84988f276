"""`ckptsvc status`: what the agents of this node are doing."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ckptsvc.agent.http.access import http_token, sign_in
from ckptsvc.cli.agents import NONSENSE, Answer, agent_directory, ask_all, ask_users
from ckptsvc.cli.terminal import Screen, duration, emit, note, plural, printable, size
from ckptsvc.config import load
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import AgentUnavailable, ConfigError, NotFound

PARTLY_DONE = 3
"""Exit status where an agent is there and does not answer."""

WATCH_EVERY = 2.0
"""Seconds between two looks."""

SAVES_SHOWN = 5
LATE = 60.0
"""Seconds without a heartbeat from which on it catches the eye."""

_OF_JOBS = ("ranks", "arenas", "saves", "coordinates")
_OUTCOME_STYLE = {"committed": "good", "failed": "bad", "fenced": "bad", "skipped": "doubt"}

Status = Mapping[str, Any]


@click.command()
@click.option("--job", metavar="NAME", help="Only this job.")
@click.option("--dir", "directory", type=click.Path(path_type=Path),
    help="Directory of the sockets; default: as for `ckptsvc agent`.")  # fmt: skip
@click.option("--all-users", is_flag=True, help="The agents of all users of this node's service. For operators.")
@click.option("--watch", "watching", is_flag=True, help="Look again every two seconds, until q or Ctrl-C.")
@click.option("--url", is_flag=True, help="Print the address of the status page, with the token that lets in.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document (with --watch, one a line).")
def command(
    job: str | None, directory: Path | None, all_users: bool, watching: bool, url: bool, as_json: bool
) -> int:  # fmt: skip
    """Show what the agents of this node are doing: the user's own, and those of single jobs.

    \b
    Exit status: 0; 3 an agent does not answer; 10 no agent has that job;
    20 no agent runs.
    \b
    JSON: {"directory", "agents": [{"directory", "error", "status": {
      "status_version", "version", "node", "pid", "started", "address",
      "metrics", "page", "time", "arena_limit", "max_write_rate", "jobs",
      "vacated", "paused": [{"job", "step", "by", "reason", "until"}],
      "ranks": [{"job", "attempt", "rank", "world_size", "pid", "store",
        "step", "phase", "heartbeat_age", "committed"}],
      "arenas": [{"job", "rank", "state", "step", "bytes", "for_others"}],
      "local_disk": {"directory", "problem", "snapshots": [{"job", "epoch",
        "step", "stage", "complete", "shards", "durable", "draining",
        "bytes", "age"}], "drains_allowed", "store_problem"} or null,
      "saves": [{"job", "epoch", "step", "outcome", "code", "reason",
        "bytes", "seconds"}],
      "compression": [{"job", "compressed", "why"}],
      "coordinates": [{"job", "attempt", "epoch", "world_size",
        "live_ranks", "nodes", "running_saves", "in_memory", "on_disk",
        "restarts", "incidents", "aside", "nics", "store", "step",
        "steps_per_second", "every_seconds", "phase", "attempts",
        "grid", "checkpoints", "drains"}],
      "launches": [{"job", "phase", "attempt", "nodes", "min_nodes",
        "max_nodes", "restarts", "max_restarts", "stop_wanted", "ended",
        "status", "reason"}],
      "incidents": [{"id", "job", "attempt", "kind", "opened", "sentence",
        "rank", "node", "confidence", "actions"}],
      "elections": [{"job", "coordinator", "address", "term", "here",
        "refused", "problem"}],
      "nics": [{"nic", "family", "link", "sent", "received", "findings"}]}}]}
    error is {"code", "what"} where there is no status, else null; with
    --all-users there is "user" too. Sizes in
    bytes, ages in seconds, times in Unix seconds; a step of -1 is none.
    "nics" are the network cards (bytes per second) and sentences about those
    in trouble: by their own counters, and in "coordinates" against the job's.
    "jobs" are the names that orders take; "vacated" says why the node takes no
    new ones, or is empty; "paused" since which step jobs take no snapshots.
    "aside" are nodes of the job that run no rank, with the reason. The stage
    of a snapshot on the local disk is "pending" until it is in the durable
    store ("committed") or known to stay where it is ("local"). "compression"
    says what save.compression has come to. "grid" holds
    the ranks as columns, see ckptsvc/agent/status/grid.py; "checkpoints" are the
    newest 64, with the tiers that hold them; "incidents" are the newest 50.
    """  # noqa: D301  \b is click's
    if url and all_users:
        raise ConfigError("a page is for its own user's eyes: --url does not go with --all-users")
    where = None if all_users else directory or agent_directory()
    if url:
        return _pages(_answers(where, job))
    if watching and not as_json:
        from ckptsvc.cli.status_watch import watch  # rich takes its time

        return watch(lambda: _answers(where, job), WATCH_EVERY)
    return _print(where, job, as_json, again=watching)


def _print(where: Path | None, job: str | None, as_json: bool, *, again: bool) -> int:
    while True:
        try:
            status = _look(where, job, as_json)
        except (AgentUnavailable, NotFound) as error:
            if not again:
                raise
            note(error.what)
            status = 0
        if not again:
            return status
        time.sleep(WATCH_EVERY)


def _pages(answers: Sequence[Answer]) -> int:
    """The addresses of the agents' pages, a line each: whoever has one can read what the agent says."""
    pages = [answer.status["page"] for answer in answers if answer.status and answer.status.get("page")]
    if not pages:
        raise NotFound("no agent serves a page", hint="agent.metrics_listen is off: set it to 127.0.0.1:0")
    token = http_token(load(os.environ), os.environ)
    for page in pages:
        click.echo(sign_in(page, token))
    return PARTLY_DONE if any(answer.status is None for answer in answers) else 0


def _answers(where: Path | None, job: str | None) -> list[Answer]:
    """Of the agents of a directory or (None) of all users."""
    answers = ask_users() if where is None else ask_all(where)
    if where is None and not answers:
        note("no user has an agent now")
    elif not answers:
        raise AgentUnavailable(
            f"no agent runs in {where}",
            hint="`ckptsvc run` starts one for a job; `ckptsvc agent` runs one for the node",
        )
    return answers if job is None else _only(answers, job)


def _look(where: Path | None, job: str | None, as_json: bool) -> int:
    answers = _answers(where, job)
    if as_json:
        emit({"directory": where and str(where), "agents": [_json(answer) for answer in answers]})
        sys.stdout.flush()
    else:
        screen = Screen()
        for number, answer in enumerate(answers):
            if number:
                screen.line()
            try:
                _show(screen, answer)
            except NONSENSE as error:
                if answer.uid < 0:
                    raise
                screen.line("  " + screen.paint(f"answers with nonsense: {type(error).__name__}", "bad"))
    return PARTLY_DONE if any(answer.status is None for answer in answers) else 0


def _only(answers: Sequence[Answer], job: str) -> list[Answer]:
    """The agents that have the job, with nothing else in their status; those that do not answer may have it."""
    kept = []
    for answer in answers:
        if answer.status is None:
            kept.append(answer)
            continue
        mine: dict[str, Any] = {name: [each for each in answer.status[name] if each["job"] == job] for name in _OF_JOBS}
        if any(mine.values()):
            mine["compression"] = [each for each in answer.status.get("compression", ()) if each["job"] == job]
            disk = answer.status.get("local_disk")
            if disk:
                mine["local_disk"] = disk | {"snapshots": [each for each in disk["snapshots"] if each["job"] == job]}
            kept.append(answer._replace(status=answer.status | mine))
    if not kept:
        raise NotFound(f"no agent of this node has a job {job!r}", hint="`ckptsvc status` shows those it has")
    return kept


def _json(answer: Answer) -> dict[str, Any]:
    error = answer.error
    return {
        "directory": str(answer.directory),
        "error": error and {"code": error.code, "what": error.what},
        "status": answer.status,
        **({"user": answer.user} if answer.user else {}),
    }


def _show(screen: Screen, answer: Answer) -> None:
    status = answer.status
    if answer.user:
        screen.line(screen.paint(f"user {printable(answer.user)}", "head"))
    if status is None:
        screen.line(screen.paint(f"agent in {answer.directory}", "head"))
        screen.line("  " + screen.paint(printable(f"does not answer: {answer.error}"), "bad"))
        return
    screen.line(screen.paint(f"agent of {printable(status['node'])}", "head"))
    up = duration(time.time() - status["started"])
    metrics = f", metrics on {status['metrics']}" if status["metrics"] else ""
    screen.line(f"  pid {status['pid']}, up {up}, version {status['version']}, {answer.directory}")
    screen.line(f"  listens on {status['address']}{metrics}")
    screen.line(f"  {_arenas(status)}")
    if status.get("max_write_rate"):
        screen.line(f"  writes at most {size(status['max_write_rate'])}/s to stores")
    if status.get("vacated"):
        screen.line("  " + screen.paint(f"takes no new jobs: {printable(status['vacated'])}", "doubt"))
    for line in _local_disk(screen, status):
        screen.line(line)
    for job in _jobs(status):
        screen.line()
        for line in _describe(screen, status, job):
            screen.line(line)
        _show_ranks(screen, [rank for rank in status["ranks"] if rank["job"] == job])
        _show_saves(screen, [save for save in status["saves"] if save["job"] == job])


def _arenas(status: Status) -> str:
    arenas = status["arenas"]
    states = Counter(arena["state"] + " for other nodes" * arena.get("for_others", False) for arena in arenas)
    listed = ": " + ", ".join(f"{count} {state}" for state, count in sorted(states.items())) if arenas else ""
    used = sum(arena["bytes"] for arena in arenas)
    return f"arenas {size(used)} of {size(status['arena_limit'])}{listed}"


def _local_disk(screen: Screen, status: Status) -> Iterator[str]:
    disk = status.get("local_disk")  # an agent of an earlier version has none
    if not disk:
        return
    held = sorted(disk["snapshots"], key=lambda each: (each["epoch"], each["step"]))
    newest = f", newest step {held[-1]['step']:,} ({held[-1]['stage']})" if held else ""
    yield f"  local disk {size(sum(each['bytes'] for each in held))}: {plural(len(held), 'snapshot')}{newest}"
    waiting = [each for each in held if each["stage"] == "pending"]
    for each in waiting[:1]:
        done = f"{each['durable']} of {plural(each['shards'], 'shard')} durable, {duration(each['age'])} old"
        behind = f"; {len(waiting) - 1} more behind it" if waiting[1:] else ""
        yield f"    draining step {each['step']:,}: {done}{behind}"
    for problem in filter(None, (disk["problem"], disk["store_problem"])):
        yield "    " + screen.paint(printable(problem), "doubt")


def _jobs(status: Status) -> list[str]:
    """Every job the agent has to do with, coordinated ones first."""
    return list(dict.fromkeys(each["job"] for name in ("coordinates", "ranks", "saves") for each in status[name]))


def _describe(screen: Screen, status: Status, job: str) -> Iterator[str]:
    yield "  " + screen.paint(f"job {printable(job)}", "head")
    stores = sorted({rank["store"] for rank in status["ranks"] if rank["job"] == job})
    if stores:
        yield f"    store {printable(', '.join(stores))}"
    for election in status.get("elections", ()):  # an agent of an earlier version has none
        if election["job"] == launched_as(job):
            if election["coordinator"]:
                yield f"    coordinator {printable(election['coordinator'])}, elected in term {election['term']}"
            if election["problem"]:
                yield "    " + screen.paint(printable(election["problem"]), "doubt")
    for each in status.get("compression", ()):
        if each["job"] == job:
            yield f"    {'' if each['compressed'] else 'not '}compressed: {printable(each['why'])}"
    for pause in status.get("paused", ()):
        if pause["job"] == job:
            until = f" for {duration(pause['until'] - time.time())} more" if pause["until"] else ""
            why = f": {printable(pause['reason'])}" if pause["reason"] else ""
            text = f"paused by {printable(pause['by'])} from step {pause['step']:,} on{until}{why}"
            yield "    " + screen.paint(text, "doubt")
    for own in status["coordinates"]:
        if own["job"] == job:
            nodes = f"{plural(len(own['nodes']), 'node')}" if own["nodes"] else "no node"
            ranks = f"{own['live_ranks']} of {plural(own['world_size'], 'rank')} on {nodes}"
            yield f"    coordinated here: attempt {own['attempt']}, epoch {own['epoch']}, {ranks}"
            saving, memory = (", ".join(map(str, own[name])) or "none" for name in ("running_saves", "in_memory"))
            disks = f"; on local disks: {', '.join(map(str, own['on_disk']))}" if own.get("on_disk") else ""
            yield f"    steps being saved: {saving}; in memory: {memory}{disks}"
            if own["restarts"]:
                yield "    " + screen.paint(plural(own["restarts"], "restart"), "doubt")
            for incident in own["incidents"]:
                yield f"      {printable(incident)}"
            for node, why in own.get("aside", {}).items():
                yield "    " + screen.paint(f"{printable(node)}: {printable(why)}", "doubt")
            for trouble in own.get("nics", ()):  # an agent of an earlier version has none
                yield "    " + screen.paint(printable(trouble), "doubt")


def _show_ranks(screen: Screen, ranks: Sequence[Status]) -> None:
    if not ranks:
        return
    late = [each["heartbeat_age"] is not None and each["heartbeat_age"] > LATE for each in ranks]
    rows = [
        [
            str(each["rank"]),
            str(each["pid"]),
            f"{each['step']:,}",
            "none yet" if each["heartbeat_age"] is None else f"{duration(each['heartbeat_age'])} ago",
            "none" if each["committed"] < 0 else f"{each['committed']:,}",
        ]
        for each in ranks
    ]
    header = ["RANK", "PID", "STEP", "HEARTBEAT", "COMMITTED"]
    screen.table(header, rows, right=header, indent="    ",
        style=lambda row, column: "doubt" if column == "HEARTBEAT" and late[row] else "")  # fmt: skip


def _show_saves(screen: Screen, saves: Sequence[Status]) -> None:
    newest = sorted(saves, key=lambda each: (each["epoch"], each["step"]), reverse=True)[:SAVES_SHOWN]
    if not newest:
        return
    rows = [
        [
            f"{each['step']:,}",
            "running" if each["outcome"] == "unspecified" else each["outcome"],
            size(each["bytes"]),
            duration(each["seconds"]),
            "" if each["outcome"] == "committed" else printable(each["reason"]),
        ]
        for each in newest
    ]
    style = [_OUTCOME_STYLE.get(each["outcome"], "") for each in newest]
    screen.table(["SAVED STEP", "OUTCOME", "SIZE", "TOOK", "WHY"], rows, right=("SAVED STEP", "SIZE", "TOOK"),
        fold="WHY", indent="    ", style=lambda row, column: style[row] if column == "OUTCOME" else "")  # fmt: skip
