"""`ckptsvc status --watch` on a terminal: what the status page shows, in text, until q or Ctrl-C.

Where there is no terminal, each look is a line a job.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ckptsvc.cli.agents import NONSENSE, Answer
from ckptsvc.cli.terminal import duration, note, plural, printable, size, wants_colour
from ckptsvc.control.restart import launched_as
from ckptsvc.errors import AgentUnavailable, NotFound

SIGNS = {
    "dead": ("X", "bold red"), "stalled": ("!", "bold yellow"), "away": ("?", "yellow"), "waiting": ("o", "dim"),
    "restoring": ("^", "magenta"), "starting": ("~", "magenta"), "saving": ("v", "blue"), "training": (".", "green"),
    "ended": ("-", "dim"),
}  # fmt: skip
OTHER = ("*", "blue")  # a phase that the program has declared

MOST_RANKS = 512
"""Ranks of a job that have a sign each; in larger ones a node has one."""

CHECKPOINTS, INCIDENTS = 6, 4
"""So many are shown, the newest."""

WIDE = 72
"""Columns from which on it is shown what holds them, and how large they are."""

_OUTCOMES = {"committed": "green", "running": "blue", "local": "blue", "": "dim", "deleted": "dim"}
_EATS = ("useful", "blocked", "detection", "restart", "redone", "other")

Look = Callable[[], Sequence[Answer]]
Status = Mapping[str, Any]


def watch(look: Look, every: float) -> int:
    """Look again and again; returns the exit status when the person has seen enough."""
    if not sys.stdout.isatty():
        return _write_lines(look, every)
    console = Console(color_system="auto" if wants_colour(os.environ) else None, highlight=False)
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(_screen(look, console.width), refresh=True)
            if pressed(every):
                return 0


def _write_lines(look: Look, every: float) -> int:
    answers, missing = look(), ""  # where there is nothing to look at from the beginning, that is the end
    while True:
        for answer in answers:
            if answer.status is None:
                note(printable(f"the agent in {answer.directory} does not answer: {answer.error}"))
            else:
                try:
                    for line in lines(answer.status):
                        click.echo(line)
                except NONSENSE as error:
                    if answer.uid < 0:
                        raise
                    note(_nonsense(answer, error))
        sys.stdout.flush()
        time.sleep(every)
        try:
            answers, missing = look(), ""
        except (AgentUnavailable, NotFound) as error:  # an agent that is started anew is soon back
            if error.what != missing:
                note(error.what)
            answers, missing = [], error.what


def lines(status: Status) -> Iterator[str]:
    """A line for each job that the agent coordinates, or is about to; and one about the node, if there is trouble."""
    launches = _launches(status)
    for text in _of_node(status):
        yield f"{time.strftime('%H:%M:%S')}  node {printable(status['node'])}  {text}"
    for job in status["coordinates"]:
        done = next((each for each in job.get("checkpoints", ()) if each["outcome"] == "committed"), None)
        parts = [
            time.strftime("%H:%M:%S"),
            f"job {printable(job['job'])}",
            f"{job['live_ranks']} of {plural(job['world_size'], 'rank')}",
            f"step {job.get('step', 0):,}",
            f"checkpoint {done['step']:,}" if done else "no checkpoint",
            f"{max(job.get('step', 0) - done['step'], 0) if done else job.get('step', 0):,} at risk",
            f"{plural(job['restarts'], 'restart')}",
        ]
        parts += [f"goodput {100 * job['goodput']['share']:.1f} %"] if _has_goodput(job) else []
        counts = job.get("grid", {}).get("counts", {})
        parts += [f"{counts[word]} {word}" for word in ("dead", "stalled", "away") if counts.get(word)]
        parts += ["saves are paused"] if _pause(status, job["job"]) else []
        parts += [state] if (state := _launched(launches.pop(launched_as(job["job"]), None), job["live_ranks"])) else []
        yield "  ".join(parts)
    for launch in launches.values():
        if state := _launched(launch, 0):
            yield f"{time.strftime('%H:%M:%S')}  job {printable(launch['job'])}  {state}"


def _screen(look: Look, width: int) -> RenderableType:
    try:
        answers = look()
    except (AgentUnavailable, NotFound) as error:
        return Text(f"{printable(error.what)}\n\nq ends this")
    parts: list[RenderableType] = []
    for answer in answers:
        try:
            parts += picture(answer, width)
        except NONSENSE as error:
            if answer.uid < 0:
                raise
            parts.append(Text(_nonsense(answer, error), style="bold red"))
    return Group(*parts, Text("q ends this", style="dim"))


def _nonsense(answer: Answer, error: Exception) -> str:
    return printable(f"the agent of user {answer.user} answers with nonsense: {type(error).__name__}")


def picture(answer: Answer, width: int) -> list[RenderableType]:
    """One agent and its jobs."""
    status = answer.status
    if status is None:
        return [Text(printable(f"agent in {answer.directory} does not answer: {answer.error}\n"), style="bold red")]
    used = size(sum(arena["bytes"] for arena in status["arenas"]))
    up = duration(time.time() - status["started"])
    head = Text.assemble((f"agent of {printable(status['node'])}", "bold"), (f"  up {up}, arenas {used}", "dim"))
    parts: list[RenderableType] = [head, *(Text(line, style="yellow") for line in _of_node(status))]
    launches = _launches(status)
    incidents = status.get("incidents", [])  # an agent of an earlier version has none
    for job in status["coordinates"]:
        mine = [each for each in incidents if each["job"] == launched_as(job["job"])]
        title = Text.assemble((f"\njob {printable(job['job'])}", "bold"), f"  attempt {job['attempt']}")
        told = _about(status, job, launches.pop(launched_as(job["job"]), None))
        parts += [title, Padding(Group(*told, *_job(job, mine, width)), (0, 0, 0, 2))]
    for name in sorted({rank["job"] for rank in status["ranks"]} - {job["job"] for job in status["coordinates"]}):
        own = [rank for rank in status["ranks"] if rank["job"] == name]
        step = max(rank["step"] for rank in own)
        pause = _pause(status, name)
        parts.append(Text(f"\njob {printable(name)}: {plural(len(own), 'rank')} here at step {step:,}"))
        parts += [Text(f"  {pause}", style="yellow")] if pause else []
        launches.pop(launched_as(name), None)
    for launch in launches.values():
        parts.append(Text(f"\njob {printable(launch['job'])}: {_launched(launch, 0) or 'begins'}"))
    if not status["coordinates"] and not status["ranks"] and not launches:
        parts.append(Text("no job", style="dim"))
    return [*parts, Text()]


def _launches(status: Status) -> dict[str, Status]:
    """What `ckptsvc run` has said of jobs, by name; an agent of an earlier version knows of none."""
    return {launch["job"]: launch for launch in status.get("launches", ())}


def _launched(launch: Status | None, ranks: int) -> str:
    """Where a launch stands, if its ranks do not show it."""
    if launch is None:
        return ""
    if launch["phase"] == "ended":
        how = f"ended with status {launch['status']}" if launch["status"] else "ended"
        return printable(f"{how}: {launch['reason']}")
    if launch["phase"] == "gathering" and not ranks:
        return f"waits for nodes: {launch['nodes']:,} of {launch['min_nodes']:,} have come"
    if launch["phase"] == "stopping":
        return "is restarted"
    return printable(f"was asked to stop: {launch['stop_wanted']}") if launch["stop_wanted"] else ""


def _pause(status: Status, job: str) -> str:
    """Since when, by whom and why a job takes no snapshots by itself; "" if it does."""
    for pause in status.get("paused", ()):
        if pause["job"] == job:
            until = f", for {duration(max(pause['until'] - time.time(), 0.0))} more" if pause["until"] else ""
            why = f"; {pause['reason']}" if pause["reason"] else ""
            return printable(
                f"paused by {pause['by']}: no automatic snapshots from step {pause['step']:,} on{until}{why}"
            )
    return ""


def _of_node(status: Status) -> Iterator[str]:
    """What is wrong with the node or its agent, or was ordered of it."""
    if status.get("vacated"):
        yield printable(f"takes no new jobs: {status['vacated']}")
    disk = status.get("local_disk") or {"problem": "", "store_problem": ""}
    findings = (finding for card in status.get("nics", ()) for finding in card["findings"])
    problems = (election["problem"] for election in status.get("elections", ()))
    for text in (disk["problem"], disk["store_problem"], *problems, *findings):
        if text:
            yield printable(text)


def _about(status: Status, job: Status, launch: Status | None) -> Iterator[Text]:
    """What is said of a job before its ranks."""
    if job.get("store"):
        yield Text(printable(job["store"]), style="dim")
    for text in (_launched(launch, job["live_ranks"]), _pause(status, job["job"])):
        if text:
            yield Text(text, style="yellow")
    for drain in job.get("drains", ()):
        waits = f"step {drain['step']:,} waits on local disks for the durable store for {duration(drain['age'])}"
        yield Text(waits, style="yellow")


def _job(job: Status, incidents: Sequence[Status], width: int) -> Iterator[RenderableType]:
    counts = job.get("grid", {}).get("counts", {})
    saving = f", saving step {', '.join(f'{step:,}' for step in job['running_saves'])}" if job["running_saves"] else ""
    pace = f" ({job['steps_per_second']:.2g}/s)" if job.get("steps_per_second") else ""
    ranks = f"{job['live_ranks']:,} of {plural(job['world_size'], 'rank')} on {plural(len(job['nodes']), 'node')}"
    done = next((each["step"] for each in job.get("checkpoints", ()) if each["outcome"] == "committed"), 0)
    risk = f"; {plural(max(job.get('step', 0) - done, 0), 'step')} at risk" if job["live_ranks"] else ""
    yield Text(f"step {job.get('step', 0):,}{pace}{saving}{risk}; {ranks}; {plural(job['restarts'], 'restart')}")
    if _has_goodput(job):
        yield _goodput(job["goodput"])
    if counts:
        legend = ((_sign(word), f"{counts[word]:,} {printable(word)}") for word in job["grid"]["words"])
        yield Text("  ").join(Text.assemble(sign, f" {text}") for sign, text in legend)
        yield from ranks_of(job["grid"])
    if job.get("checkpoints"):
        yield _checkpoints(job["checkpoints"][:CHECKPOINTS], wide=width >= WIDE)
    for each in incidents[:INCIDENTS]:
        yield Text.assemble((f"{printable(each['kind'])}: ", "bold red"), printable(each["sentence"]))
    for text in (*(f"{node}: {why}" for node, why in job.get("aside", {}).items()), *job.get("nics", ())):
        yield Text(printable(text), style="yellow")


def ranks_of(grid: Status) -> Iterator[Text]:
    """The ranks, a line a node; of many, a sign for each node, the most urgent of its ranks."""
    words, odd = grid["words"], {rank: grid["words"][word] for rank, word, _ in grid["odd"]}
    numbers = [list(_numbers(spans)) for spans in grid["ranks"]]
    if sum(map(len, numbers)) <= MOST_RANKS:
        width = min(max((len(printable(node)) for node in grid["nodes"]), default=0), 20)
        for node, ranks, word in zip(grid["nodes"], numbers, grid["state"], strict=True):
            name = printable(node or "not here yet")[:width].ljust(width)
            signs = (_sign(odd.get(rank, words[word])) for rank in ranks)
            yield Text.assemble((f"{name} ", "dim"), *signs)
        return
    nodes = Text()
    for ranks, word in zip(numbers, grid["state"], strict=True):
        found = {odd.get(rank, words[word]) for rank in ranks} if odd.keys() & set(ranks) else {words[word]}
        nodes.append(*_sign(min(found, key=_urgency)))
    yield nodes


def _numbers(spans: str) -> Iterator[int]:
    for part in spans.split(", "):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def _urgency(word: str) -> int:
    return list(SIGNS).index(word) if word in SIGNS else len(SIGNS)


def _sign(word: str) -> tuple[str, str]:
    return SIGNS.get(word, OTHER)


def _has_goodput(job: Status) -> bool:
    return bool(job.get("goodput")) and job["goodput"]["share"] is not None


def _goodput(goodput: Status) -> Text:
    seconds, whole = goodput["seconds"], sum(goodput["seconds"].values()) or 1.0
    eaten = ", ".join(f"{name} {100 * seconds[name] / whole:.1f} %" for name in _EATS[1:] if seconds.get(name))
    return Text(f"goodput {100 * goodput['share']:.1f} %" + (f"; the rest: {eaten}" if eaten else ""))


def _checkpoints(checkpoints: Sequence[Status], *, wide: bool) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    columns = ["STEP", "OUTCOME", "TOOK", "WHEN", *(["SIZE", "HELD BY"] if wide else [])]
    for name in columns:
        table.add_column(name, justify="left" if name in ("OUTCOME", "HELD BY") else "right", no_wrap=name != "HELD BY")
    for each in checkpoints:
        running = each["outcome"] == "running"
        word = f"{each['durable']} of {each['ranks']} durable" if running else printable(each["outcome"]) or "known"
        at = each["ended"] or each["began"]
        row: list[RenderableType] = [
            f"{each['step']:,}",
            Text(word, style=_OUTCOMES.get(each["outcome"], "bold red")),
            duration(each["seconds"]) if each["seconds"] else "-",
            f"{duration(time.time() - at)} ago" if at else "-",
            size(each["bytes"]) if each["bytes"] else "-",
            Text(printable(", ".join(each["tiers"]) or each["reason"])),
        ]
        table.add_row(*row[: len(columns)])
    return table


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """What waits so many seconds for a q; keys are not shown meanwhile."""
    import termios
    import tty

    if not sys.stdin.isatty():

        def wait(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield wait
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)

    def pressed(seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if select.select([keyboard], [], [], left)[0]:
                key = os.read(keyboard, 64)
                if not key or b"q" in key or b"Q" in key:
                    return True
        return False

    try:
        tty.setcbreak(keyboard)
        yield pressed
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
